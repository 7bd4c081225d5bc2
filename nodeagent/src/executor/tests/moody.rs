//! A simulated hypervisor that can be told to misbehave, and counts what cannot be seen afterwards.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use model::{Capacity, Digest, HypervisorKind, VmId, telemetry::NodeStatus};

use crate::hypervisor::{
    Backup, Guest, GuestSpec, GuestUsage, Hypervisor, HypervisorError, Parent,
    job::Job,
    migration::{Destination, Route},
    rehearsal::{Rehearsal, Rehearsed},
    simulated::Simulated,
};

pub struct Moody {
    pub inner: Simulated,
    mood: Mutex<Mood>,
    pub starts: AtomicU32,
    pub resets: AtomicU32,
    pub rehearsals: AtomicU32,
    /// Calls that have begun to hang.
    pub hung: AtomicU32,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Mood {
    Good,
    Unreachable,
    NoStart,
    Panics,
    /// A start of this one has begun and does not end.
    Starting(VmId),
    /// A look at the guests does not end.
    LookHangs,
    /// A copy of this one's disk goes on until it is cancelled, and the disk is locked meanwhile.
    Copying(VmId),
    /// The guard has stopped this one: to suspend it waits until its process is ended.
    Stopped(VmId),
}

type Hyper<T> = crate::hypervisor::Result<T>;

impl Moody {
    pub fn new(inner: Simulated) -> Self {
        let [starts, resets, rehearsals, hung] = [const { AtomicU32::new(0) }; 4];
        Self { inner, mood: Mutex::new(Mood::Good), starts, resets, rehearsals, hung }
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn mood(&self) -> Mood {
        *self.mood.lock().unwrap()
    }

    /// Bounded, because a test that has failed does not end before its threads do.
    fn hang_while(&self, mood: Mood) {
        if self.mood() == mood {
            self.hung.fetch_add(1, Ordering::SeqCst);
        }
        let begun = Instant::now();
        while self.mood() == mood && begun.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn check(&self) -> Hyper<()> {
        match self.mood() {
            Mood::Unreachable => Err(HypervisorError::Unreachable("the daemon is down".into())),
            _ => Ok(()),
        }
    }
}

impl Hypervisor for Moody {
    fn kind(&self) -> HypervisorKind {
        self.inner.kind()
    }
    fn capacity(&self) -> Hyper<Capacity> {
        self.inner.capacity()
    }
    fn node_status(&self) -> Hyper<NodeStatus> {
        self.inner.node_status()
    }
    fn guests(&self) -> Hyper<Vec<Guest>> {
        self.check()?;
        self.hang_while(Mood::LookHangs);
        self.inner.guests()
    }
    fn usage(&self) -> Hyper<Vec<(VmId, GuestUsage)>> {
        self.inner.usage()
    }
    fn bases(&self) -> Hyper<BTreeSet<PathBuf>> {
        self.inner.bases()
    }
    fn make_disk(&self, spec: &GuestSpec) -> Hyper<()> {
        self.check()?;
        self.inner.make_disk(spec)
    }
    fn check_disk(&self, vm: VmId) -> Hyper<()> {
        self.inner.check_disk(vm)
    }
    fn start(&self, spec: &GuestSpec) -> Hyper<()> {
        self.check()?;
        match self.mood() {
            Mood::NoStart => return Err(HypervisorError::Permanent("no such machine type".into())),
            Mood::Copying(vm) if vm == spec.vm => {
                self.starts.fetch_add(1, Ordering::SeqCst);
                return Err(HypervisorError::Transient("its disk is locked".into()));
            }
            Mood::Panics => panic!("a mistake in the hypervisor's code"),
            Mood::Good
            | Mood::Unreachable
            | Mood::Starting(_)
            | Mood::LookHangs
            | Mood::Copying(_)
            | Mood::Stopped(_) => {}
        }
        self.starts.fetch_add(1, Ordering::SeqCst);
        self.hang_while(Mood::Starting(spec.vm));
        self.inner.start(spec)
    }
    fn suspend(&self, vm: VmId) -> Hyper<()> {
        if self.mood() == Mood::Stopped(vm) {
            self.hang_while(Mood::Stopped(vm));
            return Err(HypervisorError::Transient("its process ended".into()));
        }
        self.inner.suspend(vm)
    }
    fn resume(&self, vm: VmId) -> Hyper<()> {
        self.inner.resume(vm)
    }
    fn press_power(&self, vm: VmId) -> Hyper<()> {
        self.inner.press_power(vm)
    }
    fn power_off(&self, vm: VmId) -> Hyper<()> {
        self.inner.power_off(vm)
    }
    fn reset(&self, vm: VmId) -> Hyper<()> {
        self.resets.fetch_add(1, Ordering::SeqCst);
        self.inner.reset(vm)
    }
    fn remove(&self, vm: VmId) -> Hyper<()> {
        self.inner.remove(vm)
    }
    fn back_up(&self, vm: VmId, parent: Option<&Parent>, job: &Job) -> Hyper<Backup> {
        if self.mood() == Mood::Copying(vm) {
            self.hung.fetch_add(1, Ordering::SeqCst);
            while job.must_end().is_none() {
                std::thread::sleep(Duration::from_millis(5));
            }
            self.set(Mood::Good);
        }
        if let Some(why) = job.must_end() {
            return Err(HypervisorError::Transient(why.into()));
        }
        self.inner.back_up(vm, parent, job)
    }
    fn backed_up(&self, vm: VmId, digest: Digest) -> Hyper<()> {
        self.inner.backed_up(vm, digest)
    }
    fn rehearse(&self, rehearsal: &Rehearsal, job: &Job) -> Hyper<Rehearsed> {
        self.rehearsals.fetch_add(1, Ordering::SeqCst);
        self.inner.rehearse(rehearsal, job)
    }
    fn prepare_migration(&self, spec: &GuestSpec) -> Hyper<Destination> {
        self.inner.prepare_migration(spec)
    }
    fn migrate(&self, vm: VmId, to: &Destination, route: &Route, job: &Job) -> Hyper<()> {
        self.inner.migrate(vm, to, route, job)
    }
    fn disk_at_rest(&self, vm: VmId) -> Hyper<Option<PathBuf>> {
        self.inner.disk_at_rest(vm)
    }
    fn take_in(&self, spec: &GuestSpec, disk: &Path) -> Hyper<()> {
        self.inner.take_in(spec, disk)
    }
    fn let_go(&self, vm: VmId) -> Hyper<()> {
        self.inner.let_go(vm)
    }
    fn finish_migration(&self, spec: &GuestSpec, run: bool) -> Hyper<()> {
        self.inner.finish_migration(spec, run)
    }
    fn cancel_migration(&self, vm: VmId) -> Hyper<()> {
        self.inner.cancel_migration(vm)
    }
    fn end_if_stopped(&self, vm: VmId) {
        if self.mood() == Mood::Stopped(vm) {
            self.set(Mood::Good);
        }
    }
    fn quarantine(&self, vm: VmId) -> Hyper<()> {
        self.inner.quarantine(vm)
    }
    fn console_log(&self, vm: VmId, max_bytes: usize) -> Hyper<Vec<u8>> {
        self.inner.console_log(vm, max_bytes)
    }
}
