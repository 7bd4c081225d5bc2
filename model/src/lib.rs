//! The cloud as plain data: what it is, how it changes, what should happen next, what must always hold.
//!
//! Everything here is a pure function of its arguments. There is no IO, no clock, no randomness and no
//! waiting in this crate: time, chance and ids enter through [`Entry`], the one thing the log carries.
//!
//! Reading order: [`id`] and [`value`] (the words), [`noun`] (the things), [`command`] (every way they
//! change), [`state`] (all of them together), [`mod@apply`] (the only code that changes them), [`mod@assignment`]
//! and [`mod@steps`] (what a host should do about it), [`mod@plan`] (what should happen next), [`mod@bill`] and
//! [`mod@invariant`] (what it costs, what must hold).

#![forbid(unsafe_code)]
#![deny(clippy::float_arithmetic)]

pub mod apply;
pub mod assignment;
pub mod bill;
pub mod command;
pub mod id;
pub mod invariant;
pub mod lease;
pub mod level;
pub mod news;
pub mod noun;
pub mod permit;
pub mod plan;
pub mod setting;
pub mod state;
pub mod steps;
pub mod table;
pub mod telemetry;
pub mod value;

pub use apply::Applied;
pub use assignment::{Assignment, BackupWish, ImageWish, MoveEnd, NetworkWish, NicWish, Power, VmWish};
pub use command::{
    Actor, Command, Entry, NodeCommand, Noun, OperatorCommand, PlannerCommand, Rejection, Reply, Request, TenantCommand,
};
pub use id::{ControllerId, ImageId, NetworkId, NodeId, RequestId, TenantId, VmId};
pub use news::{Known, News};
pub use noun::*;
pub use state::State;
pub use telemetry::{Heard, Telemetry};
pub use value::{Capacity, Cidr, Digest, Mac, Overcommit, Timestamp};
