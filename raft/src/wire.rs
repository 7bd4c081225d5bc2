//! What controllers say to each other, as postcard in the frames of `proto/raft.proto`.

use openraft::raft::{SnapshotResponse, TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse};
use postcard::ser_flavors::Size;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use storage::snapshot::Manifest;
use tonic::Status;

use crate::{
    dialect::{TypeConfig, Vote},
    error::{MembershipError, ProposeError, ReadError},
    membership::Change,
    propose::{Committed, Proposal},
    proto::Frame,
    status::Report,
};

/// The largest message: a replicated batch is about 2 MiB, a forwarded one is bounded by the proposals in it.
pub const MAX_FRAME_BYTES: usize = 32 << 20;

#[derive(Serialize, Deserialize)]
pub enum Call {
    Vote(VoteRequest<TypeConfig>),
    PreVote(VoteRequest<TypeConfig>),
    Transfer(TransferLeaderRequest<TypeConfig>),
    /// From a follower. `millis`: how long the proposers still wait.
    Propose {
        proposals: Vec<Proposal>,
        millis: u64,
    },
    ReadIndex,
    Change(Change),
    Report,
}

#[derive(Serialize, Deserialize)]
pub enum Answer {
    Vote(VoteResponse<TypeConfig>),
    Transfer(TransferLeaderResponse<TypeConfig>),
    Propose(Vec<Result<Committed, ProposeError>>),
    ReadIndex(Result<u64, ReadError>),
    Change(Result<(), MembershipError>),
    Report(Report),
}

/// The first frame of a snapshot.
#[derive(Serialize, Deserialize)]
pub struct SnapshotHead {
    pub vote: Vote,
    pub manifest: Manifest,
}

pub type SnapshotAnswer = SnapshotResponse<TypeConfig>;

pub fn encode<T: Serialize>(message: &T) -> Frame {
    Frame { body: to_bytes(message).into() }
}

pub fn to_bytes<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_stdvec(message).expect("no message has a type that postcard refuses")
}

/// Of what [`to_bytes`] would make.
pub fn size<T: Serialize>(message: &T) -> usize {
    postcard::serialize_with_flavor(message, Size::default()).expect("no message has a type that postcard refuses")
}

/// `None` unless the bytes are exactly one value.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Some(value),
        _ => None,
    }
}

/// # Errors
/// When another version, or not a controller, speaks on the other side.
pub fn decode_frame<T: DeserializeOwned>(frame: &Frame) -> Result<T, Status> {
    decode(&frame.body).ok_or_else(|| Status::invalid_argument("the message cannot be decoded"))
}
