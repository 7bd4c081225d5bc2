//! Guests by libvirt: persistent domains, so that a host that comes back finds them, and everything about a guest's
//! disk in one folder.
//!
//! A guest is removed or set aside in the order switch off, move its folder, undefine: whatever is cut short leaves a
//! domain that is listed and dealt with again. Deliberately not here: events. The agent looks often enough, and
//! looking is what survives restarts of either side.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, OnceLock, atomic::AtomicBool},
};

use model::{Capacity, Digest, HypervisorKind, VmId, telemetry::NodeStatus};
use virt::sys;

use super::{
    Backup, Guest, GuestPower, GuestSpec, GuestUsage, Hypervisor, HypervisorError, Parent, Result,
    domain_xml::{Mark, domain_uuid, domain_xml, name_prefix},
    guest_dir::{GuestDirs, write_whole},
    job::Job,
    migration::{Destination, Route},
    qcow2,
    rehearsal::{Rehearsal, Rehearsed},
    seed::seed_image,
};

mod at_rest;
mod backup;
mod connection;
mod disk;
mod domain_job;
mod handle;
mod host;
mod increment;
mod migration;
mod power;
mod probe;
mod rehearsal;
mod stopped;
mod usage;

use connection::{Connection, is_missing};
use handle::Handle;
use power::{Record, Remembered, Seen};

#[derive(Clone, Debug)]
pub struct LibvirtConfig {
    /// `qemu:///system`, or `qemu+unix:///system?socket=PATH` for one of several on a machine.
    pub uri: String,
    /// Holds `vms` and `quarantine`; the user that guests run as must be able to pass through it.
    pub dir: PathBuf,
    pub cluster: String,
    /// Offer at most this much, whatever the host has; several hosts on one machine share it so.
    pub limit: Option<Capacity>,
}

pub struct Libvirt {
    cluster: String,
    limit: Option<Capacity>,
    dirs: GuestDirs,
    connection: Connection,
    kind: OnceLock<HypervisorKind>,
    trial: Mutex<()>,
    /// Held while a record and what libvirt says must agree: never across a call that can take long.
    records: Mutex<()>,
    cpu: Mutex<host::CpuTicks>,
    /// Folders that were there when this agent started; looked at once, when libvirt first answers.
    found_at_start: Mutex<Vec<VmId>>,
    /// What earlier agents rehearsed was looked for.
    rehearsals_cleared: AtomicBool,
}

impl Libvirt {
    /// Does not need libvirtd yet.
    ///
    /// # Errors
    /// When the folders cannot be made, or a name cannot be told to libvirt.
    pub fn open(config: LibvirtConfig) -> Result<Self> {
        let dirs = GuestDirs::open(&config.dir)?;
        Ok(Self {
            cluster: config.cluster,
            limit: config.limit,
            connection: Connection::new(&config.uri)?,
            kind: OnceLock::new(),
            trial: Mutex::new(()),
            records: Mutex::new(()),
            cpu: Mutex::new(host::cpu_ticks()?),
            found_at_start: Mutex::new(dirs.vms()?),
            rehearsals_cleared: AtomicBool::new(false),
            dirs,
        })
    }

    /// Does a guest of this kind make progress here? `Ok(Err(why))` when it does not. Takes 4 s at most.
    ///
    /// # Errors
    /// When libvirtd could not be asked, which says nothing about the kind.
    pub fn try_kind(&self, kind: HypervisorKind) -> Result<std::result::Result<(), String>> {
        probe::try_kind(&self.connection, &self.cluster, self.dirs.root(), kind)
    }

    /// Tried once in a boot of the machine; an answer that could not be had is asked for again. An agent that is started
    /// again must have its session back within the lease, and the trial of a KVM that does not work takes most of it.
    fn proven_kind(&self) -> Result<HypervisorKind> {
        let _one_at_a_time = lock(&self.trial);
        if let Some(kind) = self.kind.get() {
            return Ok(*kind);
        }
        if let Some(kind) = probe::remembered(self.dirs.root()) {
            return Ok(*self.kind.get_or_init(|| kind));
        }
        let kind = match self.try_kind(HypervisorKind::Kvm)? {
            Ok(()) => HypervisorKind::Kvm,
            Err(why) => {
                tracing::info!(why, "KVM does not work here, guests run by software emulation");
                HypervisorKind::Qemu
            }
        };
        tracing::info!(?kind, "the kind of hypervisor was found by trying");
        probe::remember(self.dirs.root(), kind)?;
        Ok(*self.kind.get_or_init(|| kind))
    }

    fn domain(&self, vm: VmId) -> Result<Option<Handle<'_>>> {
        let connect = self.connection.get()?;
        match connect.lookup_domain_by_uuid_string(&domain_uuid(&self.cluster, vm)) {
            Ok(domain) => Ok(Some(Handle { connection: &self.connection, connect, domain })),
            Err(e) if is_missing(&e) => Ok(None),
            Err(e) => Err(self.connection.explain(&connect, &format!("looking for {vm}"), e)),
        }
    }

    /// The domain of a guest that must be on, and all here.
    fn running(&self, vm: VmId) -> Result<(Handle<'_>, Seen)> {
        let off = || HypervisorError::Transient(format!("{vm} is not running here"));
        let domain = self.domain(vm)?.ok_or_else(off)?;
        let seen = domain.seen()?;
        if !seen.is_on() {
            return Err(off());
        }
        if seen != Seen::Running && self.arrives(vm)? {
            return Err(not_handed_over(vm));
        }
        Ok((domain, seen))
    }

    /// It was prepared to come from another host, and was not handed over.
    fn arrives(&self, vm: VmId) -> Result<bool> {
        Ok(self.dirs.read::<Record>(vm)?.is_some_and(|record| record.arriving))
    }

    /// Every domain that carries this cloud's mark. One that goes away meanwhile is left out.
    fn marked(&self) -> Result<Vec<(Handle<'_>, Mark)>> {
        let connect = self.connection.get()?;
        let prefix = name_prefix(&self.cluster);
        let listed = connect.list_all_domains(0).map_err(|e| self.connection.explain(&connect, "listing guests", e))?;
        let mut marked = Vec::new();
        for domain in listed {
            if !domain.name().is_ok_and(|name| name.starts_with(&prefix)) {
                continue;
            }
            let handle = Handle { connection: &self.connection, connect: connect.clone(), domain };
            if let Some(mark) = handle.mark()?.filter(|mark| mark.cluster == self.cluster) {
                marked.push((handle, mark));
            }
        }
        Ok(marked)
    }

    /// A guest's power, remembered when it is news.
    fn observe(&self, vm: VmId, domain: &Handle) -> Result<GuestPower> {
        let record: Option<Record> = self.dirs.read(vm)?;
        if record.as_ref().is_some_and(|record| record.arriving)
            && let Some(power) = migration::arrival(domain)?
        {
            return Ok(power);
        }
        let (power, news) = power::settle(record.as_ref(), domain.seen()?);
        if news.is_none() {
            return Ok(power);
        }
        // Once more where nobody can start or stop it between the two looks.
        let _records = lock(&self.records);
        let record: Option<Record> = self.dirs.read(vm)?;
        let (power, news) = power::settle(record.as_ref(), domain.seen()?);
        if let (Some(mut record), Some(remembered)) = (record, news) {
            record.remembered = remembered;
            self.dirs.write(vm, &record)?;
        }
        Ok(power)
    }

    /// What a killed agent left between making a disk and its first start, or between moving a folder and forgetting it.
    fn sweep(&self, guests: &[Guest]) {
        rehearsal::clear_once(self);
        let found = std::mem::take(&mut *lock(&self.found_at_start));
        let stopped = if found.is_empty() { BTreeSet::new() } else { stopped::vms(self) };
        for vm in found {
            if guests.iter().any(|guest| guest.vm == vm) {
                // Its QEMU would keep this look waiting until it goes on: it is left to a later one.
                if stopped.contains(&vm) {
                    lock(&self.found_at_start).push(vm);
                } else if let Err(e) = backup::clear(self, vm) {
                    tracing::warn!(%vm, error = %e, "cannot clear away what was under way when the last agent ended");
                }
                continue;
            }
            let swept = match self.dirs.read::<Record>(vm) {
                Ok(Some(record)) if record.remembered == Remembered::Asked => self.dirs.remove(vm),
                Ok(record) => self.dirs.quarantine(vm, record.map_or(0, |r| r.epoch)),
                Err(e) => Err(e),
            };
            match swept {
                Ok(()) => tracing::info!(%vm, "cleared away a disk that no guest has"),
                Err(e) => tracing::warn!(%vm, error = %e, "cannot clear away a disk that no guest has"),
            }
        }
    }

    /// Switch off, do something about the folder, undefine.
    fn abolish(&self, vm: VmId, folder: impl FnOnce(&GuestDirs) -> Result<()>) -> Result<()> {
        let domain = self.domain(vm)?;
        if let Some(domain) = &domain {
            stopped::end(self, vm);
            domain.destroy()?;
        }
        folder(&self.dirs)?;
        domain.map_or(Ok(()), |domain| domain.undefine())
    }

    fn define(&self, spec: &GuestSpec) -> Result<Handle<'_>> {
        let xml = domain_xml(spec, &self.dirs.paths(spec.vm), self.proven_kind()?);
        let connect = self.connection.get()?;
        match connect.define_domain_xml(&xml) {
            Ok(domain) => Ok(Handle { connection: &self.connection, connect, domain }),
            Err(e) => Err(self.connection.explain(&connect, &format!("defining {}", spec.vm), e)),
        }
    }

    /// A disk that an older placement made and never started gives way: nothing was written to it.
    fn clear_unused(&self, spec: &GuestSpec) -> Result<()> {
        let record: Option<Record> = self.dirs.read(spec.vm)?;
        let unused = |r: Record| r.epoch < spec.epoch && r.remembered == Remembered::Asked;
        if record.is_some_and(unused) && self.domain(spec.vm)?.is_none() {
            self.dirs.remove(spec.vm)?;
        }
        Ok(())
    }

    /// The record of this placement, made if there is none.
    fn claim(&self, spec: &GuestSpec) -> Result<()> {
        let _records = lock(&self.records);
        match self.dirs.read::<Record>(spec.vm)? {
            Some(record) if record.epoch != spec.epoch => Err(other_placement(spec, record.epoch)),
            Some(_) => Ok(()),
            None => {
                self.dirs.create(spec.vm)?;
                self.dirs.write(spec.vm, &Record::new(spec))
            }
        }
    }
}

impl Hypervisor for Libvirt {
    fn kind(&self) -> HypervisorKind {
        self.proven_kind().unwrap_or_else(|e| {
            tracing::warn!(error = %e, "the hypervisor could not be tried");
            HypervisorKind::Qemu
        })
    }

    fn capacity(&self) -> Result<Capacity> {
        let found = host::capacity(self.dirs.root())?;
        Ok(self.limit.map_or(found, |limit| Capacity {
            vcpus: found.vcpus.min(limit.vcpus),
            memory_bytes: found.memory_bytes.min(limit.memory_bytes),
            disk_bytes: found.disk_bytes.min(limit.disk_bytes),
        }))
    }

    fn node_status(&self) -> Result<NodeStatus> {
        let now = host::cpu_ticks()?;
        let earlier = std::mem::replace(&mut *lock(&self.cpu), now);
        host::status(self.dirs.root(), earlier, now)
    }

    fn guests(&self) -> Result<Vec<Guest>> {
        let mut guests = Vec::new();
        for (domain, mark) in self.marked()? {
            match self.observe(mark.vm, &domain) {
                Ok(power) => guests.push(Guest { vm: mark.vm, epoch: mark.epoch, power }),
                Err(e) if self.domain(mark.vm)?.is_some() => return Err(e),
                Err(_) => {}
            }
        }
        guests.sort_unstable_by_key(|guest| guest.vm);
        self.sweep(&guests);
        Ok(guests)
    }

    fn usage(&self) -> Result<Vec<(VmId, GuestUsage)>> {
        let mut all = Vec::new();
        let stopped = stopped::vms(self);
        for (domain, mark) in self.marked()? {
            if !stopped.contains(&mark.vm) && domain.seen().is_ok_and(Seen::is_on) {
                let macs = self.dirs.read::<Record>(mark.vm)?.map_or_else(Vec::new, |record| record.macs);
                all.push((mark.vm, usage::of(&domain.domain, &self.dirs.paths(mark.vm).disk, &macs)));
            }
        }
        Ok(all)
    }

    fn bound_consoles(&self) -> Result<()> {
        for vm in self.dirs.vms()? {
            if let Err(e) = self.dirs.bound_console(vm) {
                tracing::warn!(%vm, error = %e, "the console's log grows beyond its bound");
            }
        }
        Ok(())
    }

    fn bases(&self) -> Result<BTreeSet<PathBuf>> {
        Ok(self.dirs.all()?.iter().flat_map(|dir| qcow2::files_under(&dir.join("disk.qcow2"))).collect())
    }

    fn make_disk(&self, spec: &GuestSpec) -> Result<()> {
        self.clear_unused(spec)?;
        self.claim(spec)?;
        let paths = self.dirs.paths(spec.vm);
        if !paths.seed.exists() {
            write_whole(&paths.seed, &seed_image(spec)?)?;
        }
        if paths.disk.exists() { Ok(()) } else { disk::make_overlay(spec, &paths.disk) }
    }

    fn check_disk(&self, vm: VmId) -> Result<()> {
        disk::must_be_there(&self.dirs.paths(vm).disk)
    }

    fn start(&self, spec: &GuestSpec) -> Result<()> {
        let vm = spec.vm;
        let found = self.domain(vm)?;
        if let Some(domain) = &found {
            if let Some(mark) = domain.mark()?.filter(|mark| mark.epoch != spec.epoch) {
                return Err(other_placement(spec, mark.epoch));
            }
            let seen = domain.seen()?;
            migration::must_not_be_coming(self, vm, seen)?;
            if seen.is_on() {
                return self.amend(vm, |record| record.stopping = false);
            }
            // A crashed guest can have a process still.
            domain.destroy()?;
        }
        if !self.dirs.paths(vm).disk.exists() {
            return Err(HypervisorError::Transient(format!("{vm} has no disk here")));
        }
        self.claim(spec)?;
        self.amend(vm, |record| *record = Record { since: record.since.take(), ..Record::new(spec) })?;
        let domain = self.define(spec)?;
        if let Err(e) = domain.create() {
            if found.is_none()
                && let Err(e) = domain.undefine()
            {
                tracing::warn!(%vm, error = %e, "a guest that did not start stays defined");
            }
            return Err(e);
        }
        self.amend(vm, |record| record.remembered = Remembered::On)
    }

    fn suspend(&self, vm: VmId) -> Result<()> {
        match self.running(vm)? {
            (_, Seen::Suspended) => Ok(()),
            (domain, _) => domain.call("suspending", |d| d.suspend().map(drop)),
        }
    }

    fn resume(&self, vm: VmId) -> Result<()> {
        match self.running(vm)? {
            (domain, Seen::Suspended) => domain.call("resuming", |d| d.resume().map(drop)),
            _ => Ok(()),
        }
    }

    fn press_power(&self, vm: VmId) -> Result<()> {
        let Some(domain) = self.domain(vm)? else { return Ok(()) };
        let seen = domain.seen()?;
        if !seen.is_on() {
            return Ok(());
        }
        if seen == Seen::Suspended {
            self.resume(vm)?;
        }
        self.amend(vm, |record| record.stopping = true)?;
        match domain.call("pressing the power button of", |d| d.shutdown_flags(sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN))
        {
            Err(_) if !domain.seen()?.is_on() => Ok(()),
            other => other,
        }
    }

    fn power_off(&self, vm: VmId) -> Result<()> {
        let Some(domain) = self.domain(vm)? else { return Ok(()) };
        if !domain.seen()?.is_on() {
            return Ok(());
        }
        self.amend(vm, |record| record.stopping = true)?;
        stopped::end(self, vm);
        domain.destroy()
    }

    fn reset(&self, vm: VmId) -> Result<()> {
        let (domain, seen) = self.running(vm)?;
        domain.call("resetting", |d| d.reset().map(drop))?;
        if seen == Seen::Suspended { domain.call("resuming", |d| d.resume().map(drop)) } else { Ok(()) }
    }

    fn remove(&self, vm: VmId) -> Result<()> {
        self.abolish(vm, |dirs| dirs.remove(vm))
    }

    fn back_up(&self, vm: VmId, parent: Option<&Parent>, job: &Job) -> Result<Backup> {
        backup::back_up(self, vm, parent, job)
    }

    fn backed_up(&self, vm: VmId, digest: Digest) -> Result<()> {
        increment::keep(self, vm, digest)
    }

    fn rehearse(&self, rehearsal: &Rehearsal, job: &Job) -> Result<Rehearsed> {
        rehearsal::rehearse(self, rehearsal, job)
    }

    fn prepare_migration(&self, spec: &GuestSpec) -> Result<Destination> {
        migration::prepare(self, spec)
    }

    fn migrate(&self, vm: VmId, to: &Destination, route: &Route, job: &Job) -> Result<()> {
        migration::migrate(self, vm, to, route, job)
    }

    fn disk_at_rest(&self, vm: VmId) -> Result<Option<PathBuf>> {
        at_rest::disk(self, vm)
    }

    fn take_in(&self, spec: &GuestSpec, disk: &Path) -> Result<()> {
        at_rest::take_in(self, spec, disk)
    }

    fn let_go(&self, vm: VmId) -> Result<()> {
        at_rest::let_go(self, vm)
    }

    fn finish_migration(&self, spec: &GuestSpec, run: bool) -> Result<()> {
        migration::finish(self, spec, run)
    }

    fn cancel_migration(&self, vm: VmId) -> Result<()> {
        migration::cancel(self, vm)
    }

    fn quarantine(&self, vm: VmId) -> Result<()> {
        let recorded = self.dirs.read::<Record>(vm)?.map(|record| record.epoch);
        let marked = || Ok(self.domain(vm)?.map(|domain| domain.mark()).transpose()?.flatten().map(|mark| mark.epoch));
        let epoch = recorded.map_or_else(marked, |epoch| Ok(Some(epoch)))?;
        self.abolish(vm, |dirs| dirs.quarantine(vm, epoch.unwrap_or(0)))
    }

    fn end_if_stopped(&self, vm: VmId) {
        stopped::end(self, vm);
    }

    fn console_log(&self, vm: VmId, max_bytes: usize) -> Result<Vec<u8>> {
        self.dirs.console_tail(vm, max_bytes)
    }
}

fn not_handed_over(vm: VmId) -> HypervisorError {
    HypervisorError::Transient(format!("{vm} was not handed over to this host yet"))
}

fn other_placement(spec: &GuestSpec, here: u64) -> HypervisorError {
    HypervisorError::Transient(format!("{} is here under placement {here}, not {}", spec.vm, spec.epoch))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is consistent between any two statements, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
