//! Guests whose process the guard has stopped, behind libvirt's back. libvirt takes them for running, and whatever asks their
//! QEMU for something waits as long as they stand still: so they are not asked, and one that must end is ended without it.

use std::{collections::BTreeSet, time::Duration};

use model::VmId;

use super::{
    super::qemu_process::{self, QemuProcess},
    Libvirt,
};

/// A killed process is gone when the kernel has freed its memory: a third of a second for 2 GB.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// Those that stand still now.
pub fn vms(h: &Libvirt) -> BTreeSet<VmId> {
    processes(h).iter().map(|process| process.vm).collect()
}

/// A process that the guard has stopped does not hear that it should end: libvirt would wait for it, and for every
/// call that waits for an answer of it already.
pub fn end(h: &Libvirt, vm: VmId) {
    for process in processes(h).iter().filter(|process| process.vm == vm) {
        match process.kill() {
            Ok(()) => drop(process.ended_within(KILL_PATIENCE)),
            Err(error) => tracing::warn!(%vm, %error, "a stopped guest cannot be ended"),
        }
    }
}

fn processes(h: &Libvirt) -> Vec<QemuProcess> {
    let mut found = qemu_process::find_all(&h.cluster, h.dirs.root()).unwrap_or_else(|error| {
        tracing::warn!(%error, "guests' processes cannot be looked for");
        Vec::new()
    });
    found.retain(|process| process.is_paused().unwrap_or(false));
    found
}
