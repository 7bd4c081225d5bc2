//! What really happened in a run. A run in which nothing went wrong proves nothing.

use std::{collections::BTreeMap, fmt};

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage(BTreeMap<&'static str, u64>);

/// What has to happen somewhere over the seeds of a run.
pub const REQUIRED: &[&str] = &[
    AGENT_KILLED,
    ANSWER_LOST,
    BEAT_REPLAYED,
    BRAKE_FROZEN,
    CONTROLLER_RESTARTED,
    DEPOSED_GRANT,
    DEPOSED_PROPOSAL,
    GUEST_CRASHED,
    LEADER_CHANGED,
    LEASE_BACK_IN_TIME,
    LEASE_LAPSED,
    MACHINE_DEFERRED,
    MACHINE_DRAINED,
    MACHINE_EXPIRED,
    MACHINE_RECOVERED,
    MACHINE_RETRIED,
    MOVE_GIVEN_UP,
    MACHINE_MOVED,
    MACHINE_MOVED_OFF,
    MACHINE_MOVED_UNMADE,
    MACHINE_TWICE,
    NODE_LOST,
    NODE_REMOVED,
    NODE_RETURNED,
    NODE_SILENT,
    ONE_WAY_CUT,
    POWER_CUT,
    QUARANTINED,
    RECOVERY_HALTED,
    REPORT_STALE,
    REQUEST_REPEATED,
    STALE_ASSIGNMENT,
    WALL_STEPPED,
];

pub const AGENT_KILLED: &str = "agents killed";
pub const ANSWER_LOST: &str = "moves whose last answer was lost";
pub const BEAT_REPLAYED: &str = "beats refused as replayed";
pub const BRAKE_FROZEN: &str = "brake frozen";
pub const CONTROLLER_RESTARTED: &str = "controllers restarted";
pub const DEPOSED_GRANT: &str = "leases granted by a deposed leader";
pub const DEPOSED_PROPOSAL: &str = "proposals of a deposed leader refused";
pub const GUEST_CRASHED: &str = "guests crashed";
pub const LEADER_CHANGED: &str = "leaders changed";
pub const LEASE_BACK_IN_TIME: &str = "guests that a lease came back for";
pub const LEASE_LAPSED: &str = "guests stopped at a lease's end";
pub const MACHINE_DEFERRED: &str = "machines without room";
pub const MACHINE_DRAINED: &str = "machines sent away from drained nodes";
pub const MACHINE_EXPIRED: &str = "transitions given up";
pub const MACHINE_RECOVERED: &str = "machines taken from lost nodes";
pub const MACHINE_RETRIED: &str = "machines retried";
pub const MACHINE_MOVED: &str = "machines handed over";
pub const MACHINE_MOVED_OFF: &str = "machines handed over while they were stopped";
pub const MACHINE_MOVED_UNMADE: &str = "machines handed over before anything of them was made";
pub const MOVE_GIVEN_UP: &str = "moves given up";
pub const MOVE_OF_A_LOST_HOST: &str = "machines handed over although their host was lost";
pub const MACHINE_TWICE: &str = "available machines that ran twice";
pub const NODE_LOST: &str = "nodes declared lost";
pub const NODE_REMOVED: &str = "nodes removed for good";
pub const NODE_RETURNED: &str = "lost nodes that came back";
pub const NODE_SILENT: &str = "nodes fallen silent";
pub const ONE_WAY_CUT: &str = "one-way cuts";
pub const POWER_CUT: &str = "power cuts";
pub const QUARANTINED: &str = "stale guests set aside";
pub const RECOVERY_HALTED: &str = "recoveries refused";
pub const REPORT_STALE: &str = "reports refused as stale";
pub const REQUEST_REPEATED: &str = "requests repeated";
pub const STALE_ASSIGNMENT: &str = "assignments refused as stale";
pub const WALL_STEPPED: &str = "wall clocks stepped";
pub const ENTRIES: &str = "log entries";
pub const SIMULATED_SECONDS: &str = "simulated seconds";

impl Coverage {
    pub fn count(&mut self, what: &'static str) {
        self.add(what, 1);
    }

    pub fn add(&mut self, what: &'static str, times: u64) {
        *self.0.entry(what).or_default() += times;
    }

    pub fn of(&self, what: &str) -> u64 {
        self.0.get(what).copied().unwrap_or_default()
    }

    pub fn merge(&mut self, other: &Self) {
        other.0.iter().for_each(|(what, times)| self.add(what, *times));
    }

    /// What was required and never happened.
    pub fn missing(&self) -> Vec<&'static str> {
        REQUIRED.iter().copied().filter(|what| self.of(what) == 0).collect()
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(what, times)| writeln!(f, "{times:>9}  {what}"))
    }
}
