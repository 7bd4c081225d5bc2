//! What a controller heard lately. Soft: never replicated, lost with the process, rebuilt within a few heartbeats.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{NodeId, Timestamp, VmId};

/// By node. Times are the leader's own, in the same clock as the `now` that `plan` is given.
#[derive(Clone, Debug, Default)]
pub struct Telemetry {
    pub nodes: BTreeMap<NodeId, Heard>,
    /// Since when this controller has been leader: silence is counted from here at the earliest.
    pub leader_since: Timestamp,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    pub last_beat: Timestamp,
    pub incarnation: u64,
    pub status: NodeStatus,
    pub vms: BTreeMap<VmId, VmStatus>,
}

/// A host's status as its heartbeats carry it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Used CPU in thousandths of all CPUs of the host.
    pub cpu_permille: u32,
    pub memory_used_bytes: u64,
    pub memory_total_bytes: u64,
    pub disk_used_bytes: u64,
    pub disk_total_bytes: u64,
}

/// One machine's status as heartbeats carry it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    pub vm: VmId,
    pub epoch: u64,
    pub phase: crate::Phase,
    /// CPU time used since it started.
    pub cpu_time_millis: u64,
    pub memory_used_bytes: u64,
    pub disk_used_bytes: u64,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    /// Set while it is being created.
    pub progress: Option<Progress>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// `fetch image`, `make disk`, `plug network`, `start`.
    pub step: String,
    /// 0 to 100, of the whole creation.
    pub percent: u8,
}
