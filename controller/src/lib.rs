//! The server: eyes, ears and a voice for the replicated state.
//!
//! `found`, `enrol` and `run` are the three things a person does with a controller, `refound` what is done when all but
//! a backup or one of them is lost, `dump` shows what a stopped one has on its disk. `core` is what all calls share;
//! `service` answers people and programs, `admit` lets controllers and agents in, `session` and `hear` speak with
//! agents, `lead` and `keep` are the leader's loops. Nothing here decides what the cloud should be: that is `model`.

#![forbid(unsafe_code)]

mod access;
mod admit;
mod bells;
mod config;
mod core;
mod door;
mod dump;
mod enrol;
#[cfg(test)]
mod fixture;
mod found;
mod gate;
mod hear;
mod keep;
mod lead;
mod name;
mod probe;
mod refound;
mod replicas;
mod run;
mod service;
mod session;
mod view;

pub use config::Timing;
pub use dump::{DumpArgs, dump};
pub use enrol::{JoinArgs, join};
pub use found::{InitArgs, InitOutcome, init};
pub use refound::{RecoverArgs, Survivor, recover, restore, survivor};
pub use run::{RunArgs, run};
