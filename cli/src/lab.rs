//! A whole cloud on one machine: `trefoil up`, `trefoil down`, and `trefoil lab` to break it and look inside.
//!
//! With the simulated hypervisor everything is a process on loopback and no rights are needed. With libvirt each host
//! is a set of namespaces with a libvirtd of its own, each controller has a network namespace, and a switch in another
//! one joins them; the machine's own network carries none of it, and unix sockets lead in.
//!
//! `cloud` is what there is, written to `cloud.json`; `process` starts and ends processes by identity; `place` is the
//! namespaces that a command runs in; `switch` and `host` make them, `init` is the first process of a host. `act` is
//! what can be done to its members, `refound` the way out of a lost majority, `homes` where its machines run in truth; `up`, `down` and `hand` are the commands. Deliberately not here: anything that a real installation needs.

pub mod act;
mod cloud;
mod down;
mod hand;
pub mod homes;
mod host;
mod init;
pub mod member;
mod place;
pub mod process;
pub mod refound;
pub mod switch;
mod telling;
mod up;

pub use cloud::{Cloud, LabHypervisor, Placement, write_private};
pub use down::{DownArgs, down};
pub use hand::{LabCommand, lab};
pub use place::Place;
pub use up::{UpArgs, how_to_use, up};
