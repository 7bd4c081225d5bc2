//! Consensus: the one door through which the cloud changes and is read.
//!
//! [`Replica`] wires openraft to the storage of this controller and to its peers. No openraft type leaves this crate;
//! what a caller sees is the model's `State`, an index, and who leads.
//!
//! ```text
//!   propose ──► (follower: one call for all that queued) ──► leader stamps `at` ──► log ──► State::apply on every replica
//!   linearize ──► one read-index round for all who wait ──► local applied index catches up ──► read(|state| …)
//! ```
//!
//! Deliberately not here: what the entries mean (model), who may ask (controller), what the bytes on disk look like
//! (storage). Lease reads do not exist: a read is a read-index round or says that it is stale.

mod proto {
    #![allow(clippy::all)]
    tonic::include_proto!("trefoil.raft.v1");
}

mod clock;
mod core;
mod dialect;
mod error;
mod feed;
mod linear;
mod log;
mod machine;
mod membership;
mod peer;
mod propose;
mod replica;
mod serve;
mod status;
mod succession;
mod watcher;
mod wire;

pub use error::{MembershipError, OpenError, ProposeError, ReadError};
pub use feed::{Changes, Compacted};
pub use propose::{Committed, PROPOSE_DEADLINE, Proposal};
pub use replica::{PeerTls, Replica, ReplicaConfig, Timing};
pub use serve::PeerService;
pub use status::{Fenced, HashAt, Leadership, MemberStatus, QuorumStatus, Role};

#[cfg(test)]
mod suite;
