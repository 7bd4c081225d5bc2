//! What two hosts tell each other when a guest moves from one to the other, and the sockets that it moves through.
//!
//! ```text
//!  source                                        quorum                      destination
//!  Running                                                                   prepare_migration: disk, seed
//!  migrate ──── disk and memory, through three unix sockets ───────────────▶ Arriving
//!  Off(Moved)  ── told ──▶        both were told: hand over       ◀── told ─ Arrived: complete, paused
//!  remove                          (or neither: give it up)                  finish_migration: Running
//! ```
//! One that is off goes as a file: `disk_at_rest`, the agents' own connection, `take_in`, `let_go`; the rest is the same.
//!
//! The guest runs on one side at any instant, whatever fails: libvirt stops it on the source before the destination has
//! all of it, and the destination never runs it before the quorum has handed it over. That is why it arrives paused.
//! Without that, libvirt itself leaves a gap: when the connection breaks just after the destination was told to go on,
//! the source goes on too. A migration is given up with `cancel_migration` on the source and `remove` on the
//! destination, in any order, at any time before the hand-over.
//!
//! Deliberately not here: deciding any of it, and how the sockets of two hosts are joined (`relay`).

use std::path::{Path, PathBuf};

use model::{Mac, VmId};

/// What the source must know of the destination: where the guest's files will be there, and under which placement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    pub epoch: u64,
    pub disk: PathBuf,
    pub seed: PathBuf,
    pub console: PathBuf,
    /// The bridge that each network card joins there.
    pub bridges: Vec<(Mac, String)>,
}

/// Unix sockets with the same paths on both hosts. On the destination the hypervisor listens on `memory` and `disk`; on
/// the source the agent listens on all three, and carries what comes to the other host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Leads to the destination's libvirtd.
    pub control: PathBuf,
    pub memory: PathBuf,
    pub disk: PathBuf,
}

impl Route {
    /// `dir` must be the same on all hosts of a cloud, short (a socket's path has 107 bytes at most), and closed to
    /// other users: who can open these sockets has the guest.
    pub fn new(dir: &Path, vm: VmId) -> Self {
        let socket = |channel| dir.join(format!("{vm}.{channel}"));
        Self { control: socket("control"), memory: socket("memory"), disk: socket("disk") }
    }
}
