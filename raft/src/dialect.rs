//! openraft, told what our types are, and the way between its types and those on disk.

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use model::Applied;
use openraft::{BasicNode, EntryPayload};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use storage::record::{self, Body, Payload, Position, Record, Voters};

openraft::declare_raft_types!(
    pub TypeConfig:
        D = EncodedEntry,
        R = Outcome,
);

pub type Raft = openraft::Raft<TypeConfig, crate::machine::Machine>;
pub type LogId = openraft::alias::LogIdOf<TypeConfig>;
pub type LeaderId = openraft::alias::LeaderIdOf<TypeConfig>;
pub type Vote = openraft::alias::VoteOf<TypeConfig>;
pub type Entry = openraft::alias::EntryOf<TypeConfig>;
pub type StoredMembership = openraft::alias::StoredMembershipOf<TypeConfig>;
pub type Membership = openraft::Membership<u64, BasicNode>;
pub type SnapshotMeta = openraft::alias::SnapshotMetaOf<TypeConfig>;
pub type Snapshot = openraft::alias::SnapshotOf<TypeConfig, storage::snapshot::Snapshot>;

/// `postcard(model::Entry)`: encoded once by the leader, decoded once by each `apply`, bytes in between.
#[derive(Clone, PartialEq, Eq)]
pub struct EncodedEntry(pub Bytes);

/// What `apply` came to; `None` for entries that are not the model's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome(pub Option<Applied>);

impl fmt::Debug for EncodedEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "entry of {} bytes", self.0.len())
    }
}

impl fmt::Display for EncodedEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl Serialize for EncodedEntry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for EncodedEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesVisitor;
        impl de::Visitor<'_> for BytesVisitor {
            type Value = EncodedEntry;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<EncodedEntry, E> {
                Ok(EncodedEntry(Bytes::copy_from_slice(bytes)))
            }
        }
        deserializer.deserialize_bytes(BytesVisitor)
    }
}

pub fn position(id: &LogId) -> Position {
    Position { term: id.leader_id.term, leader: id.leader_id.node_id, index: id.index }
}

pub fn log_id(position: Position) -> LogId {
    LogId { leader_id: LeaderId { term: position.term, node_id: position.leader }, index: position.index }
}

pub fn to_stored_vote(vote: &Vote) -> record::Vote {
    let leader = vote.leader_id();
    record::Vote { term: leader.term, candidate: leader.node_id, committed: vote.is_committed() }
}

pub fn from_stored_vote(vote: record::Vote) -> Vote {
    if vote.committed { Vote::new_committed(vote.term, vote.candidate) } else { Vote::new(vote.term, vote.candidate) }
}

pub fn to_voters(membership: &Membership) -> Voters {
    Voters {
        sets: membership.get_joint_config().clone(),
        addresses: membership.nodes().map(|(id, node)| (*id, node.addr.clone())).collect(),
    }
}

/// `None` when a voter has no address: then the stored membership is damaged.
pub fn from_voters(voters: Voters) -> Option<Membership> {
    let nodes: BTreeMap<u64, BasicNode> =
        voters.addresses.into_iter().map(|(id, addr)| (id, BasicNode { addr })).collect();
    if voters.sets.is_empty() && nodes.is_empty() {
        return Some(Membership::default());
    }
    Membership::new(voters.sets, nodes).ok()
}

pub fn to_stored_membership(membership: &StoredMembership) -> record::Membership {
    record::Membership { at: membership.log_id().as_ref().map(position), voters: to_voters(membership.membership()) }
}

pub fn from_stored_membership(membership: record::Membership) -> Option<StoredMembership> {
    Some(StoredMembership::new(membership.at.map(log_id), from_voters(membership.voters)?))
}

pub fn encode(entry: &Entry) -> (u64, Vec<u8>) {
    let position = position(&entry.log_id);
    let voters;
    let body = match &entry.payload {
        EntryPayload::Blank => Body::Blank,
        EntryPayload::Normal(encoded) => Body::Entry(&encoded.0),
        EntryPayload::Membership(membership) => {
            voters = to_voters(membership);
            Body::Membership(&voters)
        }
    };
    (position.index, record::encode(position, body))
}

/// `None` when the membership in it is damaged.
pub fn from_record(record: Record) -> Option<Entry> {
    let payload = match record.payload {
        Payload::Blank => EntryPayload::Blank,
        Payload::Entry(bytes) => EntryPayload::Normal(EncodedEntry(bytes.into())),
        Payload::Membership(voters) => EntryPayload::Membership(from_voters(voters)?),
    };
    Some(Entry { log_id: log_id(record.position), payload })
}
