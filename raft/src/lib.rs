//! Consensus: the one door through which the cloud changes and is read.
//!
//! [`Replica`] wires openraft to the storage of this controller and to its peers. No openraft type leaves this crate;
//! what a caller sees is the model's `State`, an index, and who leads.
//!
//! ```text
//!   propose ──► (follower: one stream to the leader) ──► leader stamps `at` ──► log ──► State::apply on every replica
//!   linearize ──► one read-index round for all who wait ──► local applied index catches up ──► read(|state| …)
//! ```
//!
//! Deliberately not here: what the entries mean (model), who may ask (controller), what the bytes on disk look like
//! (storage). Lease reads do not exist: a read is a read-index round or says that it is stale.

mod proto {
    #![allow(clippy::all)]
    tonic::include_proto!("trefoil.raft.v1");
}

mod replica;
mod propose;
mod linear;
mod membership;
mod status;
mod error;
mod core;
mod watcher;
mod machine;
mod log;
mod types;
mod wire;
mod peer;
mod serve;

pub use error::{MembershipError, OpenError, ProposeError, ReadError};
pub use propose::{Committed, PROPOSE_DEADLINE, Proposal};
pub use replica::{PeerTls, Replica, ReplicaConfig, Timing};
pub use serve::PeerService;
pub use status::{HashAt, Leadership, MemberStatus, QuorumStatus, Role};

/*  The whole public surface, for those who code against it before it compiles:

pub struct ReplicaConfig {
    pub id: ControllerId,
    pub data: PathBuf,                 // DATA/raft-log, DATA/state-N, DATA/CURRENT, DATA/snapshots are made in it
    pub tls: PeerTls,
    pub timing: Timing,
    pub snapshot_every: u64,           // entries between snapshots; Timing and this have Default-like constants below
}
pub struct Timing { pub heartbeat_millis: u64, pub election_min_millis: u64, pub election_max_millis: u64 }
impl Timing { pub const LAN: Timing (50,150,300); pub const NOISY: Timing (150,500,1000); }     // Default = NOISY
ReplicaConfig::SNAPSHOT_EVERY: u64 = 10_000

impl Replica {                                                             // Clone
    pub async fn open(config: ReplicaConfig) -> Result<Replica, OpenError>
    pub fn service(&self) -> PeerService          // a tonic service: Server::builder().add_service(replica.service())
    pub fn id(&self) -> ControllerId
    pub async fn is_initialized(&self) -> bool    // false: neither founded nor added by a leader yet
    pub async fn initialize(&self, address: &str) -> Result<(), MembershipError>
                                                  // a one-member quorum; returns when it leads

    pub async fn propose(&self, proposal: Proposal) -> Result<Committed, ProposeError>
                                                  // any replica; bounded wait PROPOSE_DEADLINE 5 s, then Unknown
    pub async fn propose_as_leader(&self, term: u64, command: Command) -> Result<Committed, ProposeError>
                                                  // planners: actor System, no request id; NotLeader if the term is over
    pub async fn linearize(&self) -> Result<u64, ReadError>                // the index; then call read
    pub fn read<T>(&self, f: impl FnOnce(&State) -> T) -> T                // this replica's state, possibly old
    pub fn read_indexed<T>(&self, f: impl FnOnce(&State, u64) -> T) -> T   // with the applied index it is of
    pub fn stale_age(&self) -> Option<Duration>   // since a quorum (leader) or the leader (follower) was last heard
    pub fn is_leader(&self) -> bool
    pub fn leadership(&self) -> Leadership
    pub fn watch_leadership(&self) -> watch::Receiver<Leadership>
    pub fn watch_applied(&self) -> watch::Receiver<u64>
    pub fn status(&self) -> QuorumStatus          // what this replica knows, at once
    pub async fn survey(&self) -> QuorumStatus    // also asks every member (1 s) for its applied index and hash
    pub fn members(&self) -> BTreeMap<ControllerId, String>                // id -> address, from the membership

    pub async fn add_learner(&self, id: ControllerId, address: &str) -> Result<(), MembershipError>   // caught up
    pub async fn promote(&self, id: ControllerId) -> Result<(), MembershipError>
    pub async fn remove(&self, id: ControllerId) -> Result<(), MembershipError>
    pub async fn transfer(&self, to: ControllerId) -> Result<(), MembershipError>
                       // membership calls work on any replica: they are forwarded to the leader
    pub async fn shutdown(&self)                  // hands leadership over first; idempotent
}

pub struct Leadership { pub leader: Option<ControllerId>, pub term: u64, pub leading: bool }
        // leading: this replica leads AND has applied everything of earlier terms (so its State is fit to plan from)
pub struct Proposal { pub request: Option<model::command::Request>, pub actor: Actor, pub command: Command }
pub struct Committed { pub index: u64, pub applied: Applied }
pub enum ProposeError {
    NoQuorum,        // not proposed, surely without effect: no leader known or reachable, or the leader has lost its quorum
    NotLeader,       // only from propose_as_leader
    Unknown,         // may or may not be committed: retry under the same request id
    Overloaded,      // not proposed: too many in flight
    TooLarge { bytes: usize, limit: usize },
    Stopped,
}
pub enum ReadError { NoQuorum, Timeout, Stopped }
pub enum MembershipError { NoQuorum, NotFound(ControllerId), Timeout(String), Refused(String), Unknown, Stopped }
pub struct HashAt { pub index: u64, pub hash: [u8; 16] }
pub enum Role { Leader, Voter, Learner }
pub struct MemberStatus { pub id: ControllerId, pub address: String, pub role: Role, pub reachable: bool,
                          pub matched: Option<u64>, pub applied: Option<u64>, pub hash: Option<HashAt> }
pub struct QuorumStatus { pub id: ControllerId, pub leader: Option<ControllerId>, pub term: u64,
                          pub last: u64, pub committed: u64, pub applied: u64, pub snapshot: u64,
                          pub members: Vec<MemberStatus>, pub hashes_agree: bool }
*/

#[cfg(test)]
mod suite;
