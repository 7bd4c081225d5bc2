//! What the quorum has been through: its cluster epoch, its feature level, and what is still open after a refounding.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{NodeId, Phase, Timestamp, VmId};

/// Log indices that belong to one second of the wall clock: far more than any log grows in one. A quorum that was
/// refounded in second `E` begins its log at `E` times this, and so above every index that an earlier one gave out.
pub const INDICES_PER_SECOND: u64 = 1 << 20;

/// One row; absent in a cloud that was never raised or refounded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quorum {
    /// The Unix second in which this quorum was made from the remains of another; 0 when it is the first.
    pub epoch: u64,
    /// What may be proposed: see [`crate::level`].
    pub level: u32,
    pub refounding: Option<Refounding>,
}

impl Quorum {
    /// The number of its table, and the only key in it is 0.
    pub const TABLE: u8 = 16;

    /// The feature level that an encoded row says, also one of a later version: such a row begins the same.
    pub fn level_of(row: &[u8]) -> Option<u32> {
        postcard::take_from_bytes::<(u64, u32)>(row).ok().map(|((_, level), _)| level)
    }

    pub(crate) const FIRST: Self = Self { epoch: 0, level: 1, refounding: None };
}

/// The cloud is being put together again: what is on the hosts may be newer than what the quorum knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refounding {
    pub at: Timestamp,
    /// The log index of the refounding: every token that a host holds from before is lower.
    pub index: u64,
    /// Machines up to this one may run where the quorum does not know of.
    pub floor: VmId,
    /// Hosts that have not said yet what they hold.
    pub awaited: BTreeSet<NodeId>,
    /// Machines that were found on hosts and that the quorum does not know: left as they are, and listed.
    pub orphans: BTreeMap<NodeId, BTreeMap<VmId, Held>>,
}

/// A machine as its host holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The placement by which it is there.
    pub epoch: u64,
    /// `Running`, `Suspended` or `Stopped`.
    pub phase: Phase,
}
