//! The guests' processes that are known, and what was done to each. The look-out keeps it; the deadline thread only
//! sends signals along it.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    hypervisor::qemu_process::QemuProcess,
    lease::{Permit, Verdict},
};

/// A process that is held, and whether the guard has stopped it.
pub struct Held {
    pub process: QemuProcess,
    pub stopped: AtomicBool,
}

impl Held {
    pub fn is(&self, other: &QemuProcess) -> bool {
        (self.process.pid, self.process.start_time) == (other.pid, other.start_time)
    }

    pub fn verdict(&self, permit: &Permit, now: u64) -> Verdict {
        permit.verdict(self.process.vm, self.process.epoch, now)
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

#[derive(Default)]
pub struct Roster {
    /// Held for as long as it takes to send the signals, or to exchange the list: nobody waits inside.
    held: Mutex<Vec<Arc<Held>>>,
}

impl Roster {
    /// Stops what may not run, and lets go on what was stopped here and may; true when something changed by it. A
    /// process that may not run is told so at each look: whoever lets it go on meanwhile has not won much.
    pub fn enforce(&self, permit: &Permit, now: u64) -> bool {
        let mut changed = false;
        for held in self.list().iter() {
            match held.verdict(permit, now) {
                // One that has ended takes no signal, and needs none.
                Verdict::Stop => {
                    let sent = held.process.pause().is_ok();
                    changed |= sent && !held.stopped.swap(true, Ordering::AcqRel);
                }
                Verdict::Run if held.is_stopped() => {
                    let _ = held.process.resume();
                    held.stopped.store(false, Ordering::Release);
                    changed = true;
                }
                Verdict::Run | Verdict::Leave => {}
            }
        }
        changed
    }

    pub fn snapshot(&self) -> Vec<Arc<Held>> {
        self.list().clone()
    }

    pub fn replace(&self, new: Vec<Arc<Held>>) {
        // The old ones are dropped after the lock is.
        let _old = std::mem::replace(&mut *self.list(), new);
    }

    fn list(&self) -> MutexGuard<'_, Vec<Arc<Held>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
