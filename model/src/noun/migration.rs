//! A machine's way from one host to another: the second host that it has something on, and what both have said.

use serde::{Deserialize, Serialize};

use crate::{Placement, Timestamp};

/// A second host that a machine has something on, beside the one that it is placed on. Room is kept for it on both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    pub stage: MigrationStage,
    /// The host that it goes to, or went from, with the placement that it will have or had there.
    pub other: Placement,
    /// The host that it goes from has said that it is off there, because it left: nobody runs it.
    pub left: bool,
    /// The host that it goes to has said that all of it is there.
    pub arrived: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationStage {
    /// Placed where it was; `other` is where it goes. Ends with both reports, or is given up.
    Moving,
    /// It stays where it was; `other` has still to say that nothing of it is left there.
    GivenUp,
    /// It is placed where it went; the host that it left, `other`, has still to say that nothing of it is left there.
    HandedOver,
}

/// The last move that came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveFailure {
    pub at: Timestamp,
    /// In a row.
    pub count: u32,
    pub reason: String,
}
