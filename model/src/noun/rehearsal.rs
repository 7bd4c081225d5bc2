//! Rehearsals of a restore: a backup is booted on a host, apart from everything, watched until it has come up, and
//! removed. A rehearsal is no machine: nobody owns, names or pays for it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Capacity, Placement, RequestId, Timestamp};

/// One that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rehearsal {
    /// What its host sets aside for it: the size of the machine that the backup is of.
    pub size: Capacity,
    /// How long the guest may take to come up.
    pub limit_millis: u64,
    /// The text on its console that says that it has; empty: its guest agent or a login prompt.
    pub expect: String,
    /// `None` while no host has room. The epoch is the log index of the placement: what an earlier host says is old news.
    pub placement: Option<Placement>,
    /// It is given up then, whatever its host says.
    pub deadline: Timestamp,
    /// Whoever asked for it, for the host's log.
    pub request: RequestId,
}

/// What the last one came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rehearsed {
    pub at: Timestamp,
    pub verdict: Verdict,
    /// From power-on to the verdict.
    pub took_millis: u64,
    /// One sentence: what it was seen by, or what went wrong.
    pub reason: String,
}

/// Whether a machine made from the backup comes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// Programs of its own were seen to run.
    Booted,
    /// It was seen to fail.
    Failed,
    /// Neither was seen.
    Unknown,
}

/// In the words that people read.
impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Booted => "ok",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        })
    }
}
