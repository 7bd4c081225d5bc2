//! What flows in an agent's session (`NodeSession.Attach`), postcard-encoded in `Frame.body`.
//!
//! The agent opens with `Hello`; the controller answers `Welcome` with the incarnation of this session, then sends what is
//! new of the assignment whenever its generation rises or its tunnels change: `News` to an agent that says in the call's metadata that it
//! understands them, and to others the whole `Assignment`. Reports carry a number; `Reported` answers after they are
//! committed. A controller that is not the leader answers the call itself with a refusal that names the leader.

use std::net::IpAddr;

use model::{
    Assignment, Capacity, Held, HypervisorKind, News, NodeSummary, VmId,
    command::{BackupReport, ImageReport, MoveReport, RehearsalReport, VmReport},
};
use serde::{Deserialize, Serialize};

/// The largest frame that a controller accepts: any host of the cloud may send it one.
pub const MAX_FRAME_BYTES: usize = 16 << 20;
/// The largest frame that an agent accepts, and only the leader sends it any. The first news of a session are the whole
/// assignment: some two thousand machines, each with keys and user data. A host whose assignment did not fit could not be
/// told anything any more, not even to give machines away.
pub const MAX_ASSIGNMENT_FRAME_BYTES: usize = 256 << 20;
/// Metadata of the call, with any value: the agent puts an assignment together from news.
pub const NEWS_KEY: &str = "trefoil-news";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    Hello {
        version: String,
        address: String,
        underlay: IpAddr,
        hypervisor: HypervisorKind,
        capacity: Capacity,
    },
    VmReports {
        number: u64,
        reports: Vec<VmReport>,
    },
    ImageReports {
        number: u64,
        reports: Vec<ImageReport>,
    },
    BackupReports {
        number: u64,
        reports: Vec<BackupReport>,
    },
    MoveReports {
        number: u64,
        reports: Vec<MoveReport>,
    },
    Summary(NodeSummary),
    RehearsalReports {
        number: u64,
        reports: Vec<RehearsalReport>,
    },
    /// Every guest of the cloud that the host holds: the answer to a welcome that asks for it.
    Stock(Vec<(VmId, Held)>),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// `beat_targets`: `host:port` (UDP) of every controller; sent again when the quorum changes. `epoch`: of the quorum;
    /// one that is lower than what the host has seen is of a quorum that was given up. `take_stock`: the host has to say
    /// what it holds before it is told what it should be.
    Welcome {
        incarnation: u64,
        beat_targets: Vec<String>,
        epoch: u64,
        take_stock: bool,
    },
    BeatTargets(Vec<String>),
    Assignment(Box<Assignment>),
    /// Everything up to this report number is in the log.
    Reported {
        number: u64,
    },
    /// The first stand on nothing, each other one on those before.
    News(Box<News>),
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_a_message_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(message) = decode::<FromAgent>(&bytes) {
                prop_assert_eq!(decode::<FromAgent>(&encode(&message)), Ok(message));
            }
            if let Ok(message) = decode::<ToAgent>(&bytes) {
                prop_assert_eq!(decode::<ToAgent>(&encode(&message)), Ok(message));
            }
        }

        #[test]
        fn a_cut_or_lengthened_message_is_refused(number in any::<u64>(), cut in 1_usize..4) {
            let bytes = encode(&ToAgent::Reported { number });
            prop_assert!(decode::<ToAgent>(&bytes[..bytes.len() - cut.min(bytes.len())]).is_err());
            prop_assert!(decode::<ToAgent>(&[&bytes[..], &[0]].concat()).is_err());
        }
    }
}
