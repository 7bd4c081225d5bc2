//! What flows in an agent's session (`NodeSession.Attach`), postcard-encoded in `Frame.body`.
//!
//! The agent opens with `Hello`; the controller answers `Welcome` with the incarnation of this session, then sends the
//! whole `Assignment` whenever its generation rises. Reports carry a number; `Reported` answers after they are
//! committed. A controller that is not the leader answers the call itself with a refusal that names the leader.

use std::net::IpAddr;

use model::{
    Assignment, Capacity, HypervisorKind, NodeSummary,
    command::{ImageReport, VmReport},
};
use serde::{Deserialize, Serialize};

/// The largest frame either side accepts.
pub const MAX_FRAME_BYTES: usize = 16 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    Hello { version: String, address: String, underlay: IpAddr, hypervisor: HypervisorKind, capacity: Capacity },
    VmReports { number: u64, reports: Vec<VmReport> },
    ImageReports { number: u64, reports: Vec<ImageReport> },
    Summary(NodeSummary),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// `beat_targets`: `host:port` (UDP) of every controller; sent again when the quorum changes.
    Welcome {
        incarnation: u64,
        beat_targets: Vec<String>,
    },
    BeatTargets(Vec<String>),
    Assignment(Box<Assignment>),
    /// Everything up to this report number is in the log.
    Reported {
        number: u64,
    },
}

pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_stdvec(message).expect("session messages have no type that postcard refuses")
}

/// # Errors
/// When the bytes are not exactly one message.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, postcard::Error> {
    let (message, rest) = postcard::take_from_bytes(bytes)?;
    if rest.is_empty() { Ok(message) } else { Err(postcard::Error::DeserializeBadEncoding) }
}
