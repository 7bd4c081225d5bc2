//! Keeps the roster: looks for guests' processes, sees whether those that were stopped stand still, writes the guard's
//! sign and the list of what it stopped, and has it told. All of it may block, so nothing urgent is here.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use super::{Event, GLANCE_NANOS, Shared, THIS_PROGRAM, Teller, build, host::Timer, roomy, roster::Held};
use crate::{
    clock,
    hypervisor::qemu_process::{QemuProcess, find_all},
    lease::{
        Permit, Verdict,
        page::{Page, Stopped},
    },
};

/// While the lease lasts: a guest that was started is known within it, or at the latest when the lease ends.
const LOOK_MILLIS: u64 = 1_000;
/// While it does not: a guest that is started all the same runs for no longer than this.
const LAPSED_LOOK_MILLIS: u64 = 200;
/// The guard's sign is renewed so often.
const SIGN_MILLIS: i32 = 200;
/// A process with many threads takes a few milliseconds to stand still.
const UNSETTLED_MILLIS: i32 = 20;

pub struct LookOut {
    shared: Arc<Shared>,
    cluster: String,
    data: PathBuf,
    tell: Teller,
    wake: Timer,
    permit: Permit,
    build: u64,
    /// Stopped by a guard before this one and not seen yet: (pid, start).
    inherited: Vec<Stopped>,
    listed: Vec<Stopped>,
    /// Of which it was told that they stand still: (pid, start).
    told: BTreeSet<(u32, u64)>,
    looked_at: u64,
    blind: bool,
}

impl LookOut {
    pub fn new(shared: Arc<Shared>, cluster: String, data: PathBuf, tell: Teller, wake: Timer) -> Self {
        let inherited = shared.page.stopped();
        Self {
            shared,
            cluster,
            data,
            tell,
            wake,
            permit: roomy(),
            build: build(Path::new(THIS_PROGRAM)),
            listed: inherited.clone(),
            inherited,
            told: BTreeSet::new(),
            looked_at: 0,
            blind: false,
        }
    }

    /// Until the data directory's page is removed.
    pub fn run(mut self) {
        while self.page().is_linked() {
            let now = clock::boottime_nanos();
            self.shared.page.read(&mut self.permit);
            let lapsed = now + GLANCE_NANOS >= self.permit.until;
            let period = if lapsed { LAPSED_LOOK_MILLIS } else { LOOK_MILLIS };
            let acted = self.shared.acted.swap(false, Ordering::AcqRel);
            let due = now.saturating_sub(self.looked_at) >= period * 1_000_000;
            let needed = self.permit.guards_any() || !self.inherited.is_empty();
            if needed && (acted || due) {
                self.looked_at = now;
                self.look();
            }
            self.list_stopped();
            let settled = !self.permit.guards_any() || self.stands_still();
            if settled {
                self.shared.settled_at.store(now, Ordering::Release);
            }
            self.page().write_sign(process::id(), clock::boottime_nanos(), self.build);
            self.wake.heard_within(if settled { SIGN_MILLIS } else { UNSETTLED_MILLIS });
        }
    }

    fn page(&self) -> &Page {
        &self.shared.page
    }

    fn look(&mut self) {
        let found = match find_all(&self.cluster, &self.data) {
            Ok(found) => found,
            Err(error) => {
                if !std::mem::replace(&mut self.blind, true) {
                    let _ = self.tell.try_send(Event::Blind { why: error.to_string() });
                }
                return;
            }
        };
        self.blind = false;
        let known = self.shared.roster.snapshot();
        let held = |process: QemuProcess| {
            // Its placement may have been unreadable at the first look.
            let old = known.iter().find(|held| held.is(&process) && held.process.epoch == process.epoch);
            let stopped = || {
                let before = known.iter().any(|held| held.is(&process) && held.is_stopped());
                let is = |s: &Stopped| (s.pid, s.start_time) == (process.pid, process.start_time);
                before || self.inherited.iter().any(is)
            };
            let stopped = AtomicBool::new(stopped());
            old.cloned().unwrap_or_else(|| Arc::new(Held { process, stopped }))
        };
        let roster: Vec<Arc<Held>> = found.into_iter().map(held).collect();
        self.inherited.clear();
        self.shared.roster.replace(roster);
        // What is new is judged at once, and not at the deadline thread's next glance.
        self.shared.page.read(&mut self.permit);
        self.shared.roster.enforce(&self.permit, clock::boottime_nanos());
    }

    /// So that the next guard lets go on what this one stopped.
    fn list_stopped(&mut self) {
        let stopped: Vec<Stopped> = self
            .shared
            .roster
            .snapshot()
            .iter()
            .filter(|held| held.is_stopped())
            .map(|held| Stopped { pid: held.process.pid, start_time: held.process.start_time })
            .chain(self.inherited.iter().copied())
            .collect();
        if stopped != self.listed {
            self.page().write_stopped(&stopped);
            self.listed = stopped;
        }
    }

    /// Whether nothing runs that may not; tells what is new.
    fn stands_still(&mut self) -> bool {
        let now = clock::boottime_nanos();
        let roster = self.shared.roster.snapshot();
        let mut still = !self.blind;
        for held in &roster {
            let process = &held.process;
            let key = (process.pid, process.start_time);
            match held.verdict(&self.permit, now) {
                // One that has ended stands still too.
                Verdict::Stop if !process.is_paused().unwrap_or(true) => still = false,
                Verdict::Stop if self.told.insert(key) => {
                    let lapsed = now.checked_sub(self.permit.until).filter(|_| self.is_leased(process));
                    let after_lease = lapsed.map(Duration::from_nanos);
                    let _ = self.tell.try_send(Event::Stopped { vm: process.vm, pid: process.pid, after_lease });
                }
                Verdict::Run if self.told.remove(&key) => {
                    let _ = self.tell.try_send(Event::Continued { vm: process.vm, pid: process.pid });
                }
                Verdict::Stop | Verdict::Run | Verdict::Leave => {}
            }
        }
        self.told.retain(|key| roster.iter().any(|held| (held.process.pid, held.process.start_time) == *key));
        still
    }

    fn is_leased(&self, process: &QemuProcess) -> bool {
        self.permit.verdict(process.vm, process.epoch, 0) == Verdict::Run
    }
}
