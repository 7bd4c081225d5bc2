//! Feature levels: what every member of the quorum must understand before anybody says it.
//!
//! A controller knows the levels [`OLDEST`] to [`LATEST`]. The level of the cloud stands in its state and rises only by
//! a log entry ([`crate::OperatorCommand::RaiseLevel`]), after every member has said that it knows the new one. A
//! command of a higher level than the cloud's is never proposed, so that no member finds an entry in its log that it
//! cannot read; a controller that does not know the cloud's level does not start.
//!
//! | level | since | what it adds |
//! | --- | --- | --- |
//! | 1 | 0.1.0 | the beginning |
//! | 2 | 0.1.0 | refounding: a quorum made from a backup or from one survivor, and hosts that say what they hold |
//! | 3 | 0.1.0 | a change of tunnels alone gives a host's row no new generation |
//! | 4 | 0.1.0 | what could leave a machine with a second copy, a blank disk or too few backups is decided with more care |

use crate::{Command, NodeCommand, OperatorCommand, PlannerCommand};

/// The lowest level that this version can work at: its predecessor's.
pub const OLDEST: u32 = 1;
/// The highest level that this version knows.
pub const LATEST: u32 = 4;
/// From here on hosts whose tunnels alone change are woken, and their rows stay as they are.
pub(crate) const QUIET_TUNNELS: u32 = 3;
/// From here on: a host that does not hold a machine when the cloud was refounded does not make it anew, a move is not given up
/// while such a host is awaited, a machine that may still run on a lost host is not made exclusive, a backup on lost hosts alone
/// does not count as safe, and what hosts and tenants say in numbers and keys is bounded.
pub const CAREFUL: u32 = 4;

impl Command {
    /// The level at which it came to be.
    pub fn level(&self) -> u32 {
        match self {
            Self::Planner(PlannerCommand::Refound { .. })
            | Self::Node(NodeCommand::TakeStock { .. })
            | Self::Operator(OperatorCommand::EndRefounding) => 2,
            Self::Tenant(_) | Self::Operator(_) | Self::Node(_) | Self::Planner(_) => 1,
        }
    }
}
