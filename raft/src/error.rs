//! What may go wrong at this crate's border.

use model::ControllerId;
use serde::{Deserialize, Serialize};

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Storage(#[from] storage::failure::StorageError),
    #[error("the timing is not sound: {0}")]
    Timing(String),
    #[error("the certificate: {0}")]
    Certificate(String),
    #[error("the certificate is of '{found}', not of {expected}")]
    Identity { expected: ControllerId, found: String },
    #[error(
        "the state is of cluster epoch {state} and this controller of {own}: it is not a member of the quorum any more"
    )]
    Epoch { state: u64, own: u64 },
    #[error("consensus did not start: {0}")]
    Start(String),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ProposeError {
    /// Nothing was proposed: no leader could be reached, or the leader has lost its quorum.
    #[error("there is no quorum")]
    NoQuorum,
    /// Nothing was proposed: the term that the caller planned in is over.
    #[error("this controller does not lead that term any more")]
    NotLeader,
    /// It may or may not be committed. A retry under the same request id is safe.
    #[error("the outcome is unknown")]
    Unknown,
    /// Nothing was proposed: too much is on its way already.
    #[error("too many requests are on their way")]
    Overloaded,
    /// Nothing was proposed.
    #[error("the request has {bytes} bytes, {limit} are allowed")]
    TooLarge { bytes: usize, limit: usize },
    /// Nothing was proposed: some member might not understand it.
    #[error("it needs feature level {needs}, and the cloud is at {at}")]
    Level { needs: u32, at: u32 },
    #[error("this controller is stopping")]
    Stopped,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ReadError {
    #[error("there is no quorum")]
    NoQuorum,
    /// The quorum answered; this replica has not caught up with the answer.
    #[error("this controller is too far behind")]
    Timeout,
    #[error("this controller is stopping")]
    Stopped,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum MembershipError {
    #[error("there is no quorum")]
    NoQuorum,
    #[error("{0} is not a member")]
    NotFound(ControllerId),
    /// It goes on; asking again later is fine.
    #[error("it takes too long: {0}")]
    Timeout(String),
    #[error("{0}")]
    Refused(String),
    #[error("the outcome is unknown")]
    Unknown,
    #[error("this controller is stopping")]
    Stopped,
}
