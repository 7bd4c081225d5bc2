//! A guest goes to another host while it runs: libvirt's own migration, from daemon to daemon, with a copy of its disk.
//!
//! All of it goes through unix sockets that the agents join, so that no hypervisor listens on a network. It ends paused
//! on the destination (`super::super::migration` says why). What libvirt says there while it comes, as was seen:
//!
//! ```text
//! paused (starting up), paused (migrating)       transient      Arriving
//! paused (user)                                  persistent     Arrived: made persistent in its last step
//! ```
//! Only what the overlay holds is copied, onto an overlay on the same base.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use model::VmId;
use virt::{
    domain::{DomainPausedReason, DomainState, DomainStateReason, DomainStateReasonEnum, MigrateParameters},
    sys,
};

use super::{
    super::{
        GuestPower, GuestSpec, Hypervisor, HypervisorError, Result,
        guest_dir::remove_file,
        job::Job,
        migration::{Destination, Route},
        moved_xml::moved_xml,
    },
    Libvirt, Record, Remembered, Seen, backup, domain_job,
    handle::Handle,
    increment, lock, not_handed_over, other_placement,
};

/// A job that must end is told so this often: there are moments when libvirt cannot end it, and passes them by.
const TELL_AGAIN: Duration = Duration::from_secs(1);

const FLAGS: u32 = sys::VIR_MIGRATE_LIVE
    | sys::VIR_MIGRATE_PEER2PEER
    | sys::VIR_MIGRATE_PERSIST_DEST
    | sys::VIR_MIGRATE_PAUSED
    | sys::VIR_MIGRATE_NON_SHARED_INC
    // A guest that cannot be started again after an I/O error in the middle is worse than one that stays.
    | sys::VIR_MIGRATE_ABORT_ON_ERROR
    // A guest that writes memory faster than the network carries it is slowed down until it can go.
    | sys::VIR_MIGRATE_AUTO_CONVERGE;

/// How far a guest is that comes to this host; `None` when it is no longer coming.
pub fn arrival(domain: &Handle) -> Result<Option<GuestPower>> {
    if !matches!(domain.seen()?, Seen::Starting | Seen::Suspended) {
        return Ok(None);
    }
    let persistent = domain.call("looking at", |d| d.is_persistent())?;
    Ok(Some(if persistent { GuestPower::Arrived } else { GuestPower::Arriving }))
}

/// What has come and was not handed over is not switched on.
pub fn must_not_be_coming(h: &Libvirt, vm: VmId, seen: Seen) -> Result<()> {
    let record = h.dirs.read::<Record>(vm)?.filter(|record| record.arriving);
    let paused = seen.is_on() && seen != Seen::Running;
    let coming = |record: Record| paused || record.remembered == Remembered::Arrived;
    if record.is_some_and(coming) { Err(not_handed_over(vm)) } else { Ok(()) }
}

pub fn prepare(h: &Libvirt, spec: &GuestSpec) -> Result<Destination> {
    let vm = spec.vm;
    match h.domain(vm)? {
        Some(domain) => {
            if let Some(mark) = domain.mark()?.filter(|mark| mark.epoch != spec.epoch) {
                return Err(other_placement(spec, mark.epoch));
            }
        }
        // What an earlier attempt wrote into the disk would stay in it where the next one writes nothing.
        None if h.dirs.read::<Record>(vm)?.is_some_and(|record| record.arriving && record.epoch == spec.epoch) => {
            remove_file(&h.dirs.paths(vm).disk)?;
            h.make_disk(spec)?;
        }
        None => {
            h.make_disk(spec)?;
            h.amend(vm, |record| record.arriving = true)?;
        }
    }
    let paths = h.dirs.paths(vm);
    let bridges = spec.nics.iter().map(|nic| (nic.mac, nic.bridge.clone())).collect();
    Ok(Destination { epoch: spec.epoch, disk: paths.disk, seed: paths.seed, console: paths.console, bridges })
}

pub fn migrate(h: &Libvirt, vm: VmId, to: &Destination, route: &Route, job: &Job) -> Result<()> {
    let domain = h.domain(vm)?.ok_or_else(|| HypervisorError::Transient(format!("{vm} is not on this host")))?;
    if h.observe(vm, &domain)? == MOVED {
        return Ok(());
    }
    h.running(vm)?;
    backup::clear(h, vm)?;
    increment::forget(h, vm, &domain)?;
    if let Some(why) = job.must_end() {
        return Err(HypervisorError::Transient(why.into()));
    }
    let here = h.dirs.paths(vm);
    let described = |flags| {
        let flags = flags | sys::VIR_DOMAIN_XML_MIGRATABLE | sys::VIR_DOMAIN_XML_SECURE;
        moved_xml(&domain.call("describing", |d| d.xml_desc(flags))?, &here, to)
    };
    let socket = |path: &std::path::Path| path.to_string_lossy().replace('\0', "");
    let parameters = MigrateParameters {
        dest_xml: Some(described(0)?),
        persist_xml: Some(described(sys::VIR_DOMAIN_XML_INACTIVE)?),
        uri: Some(format!("unix://{}", socket(&route.memory))),
        disks_uri: Some(format!("unix://{}", socket(&route.disk))),
        ..MigrateParameters::default()
    };
    let destination = format!("qemu+unix:///system?socket={}", socket(&route.control));
    let over = AtomicBool::new(false);
    let moved = thread::scope(|scope| {
        scope.spawn(|| attend(&domain, job, &over));
        let moved = domain.call("moving", |d| d.migrate_to_uri3(Some(&destination), parameters, FLAGS));
        over.store(true, Ordering::Relaxed);
        moved
    });
    // Remembered before anybody is told: libvirtd forgets why a guest is off. That also says whether it moved, when
    // only the answer was lost.
    match h.observe(vm, &domain) {
        Ok(MOVED) => Ok(()),
        Ok(_) => {
            Err(moved.err().map_or_else(|| HypervisorError::Transient("it did not move".into()), |e| late(job, e)))
        }
        Err(e) => Err(moved.err().unwrap_or(e)),
    }
}

const MOVED: GuestPower = GuestPower::Off(super::super::OffReason::Moved);

/// Counts, and ends the job when it must.
fn attend(domain: &Handle, job: &Job, over: &AtomicBool) {
    let mut told = None::<Instant>;
    while !over.load(Ordering::Relaxed) {
        if let Ok(Some(stats)) = domain_job::running(domain) {
            job.note(stats.done_bytes, stats.total_bytes);
        }
        if job.must_end().is_some() && told.is_none_or(|at| at.elapsed() >= TELL_AGAIN) {
            match domain_job::abort(&domain.domain) {
                Ok(()) => told = Some(Instant::now()),
                // It has not begun yet, or is in its last step.
                Err(e) => tracing::debug!(error = e.message(), "a migration could not be ended just now"),
            }
        }
        thread::sleep(domain_job::GLANCE);
    }
}

/// Why it failed: because it had to end, when it had to.
fn late(job: &Job, error: HypervisorError) -> HypervisorError {
    job.must_end().map_or(error, |why| HypervisorError::Transient(why.into()))
}

pub fn finish(h: &Libvirt, spec: &GuestSpec, run: bool) -> Result<()> {
    let vm = spec.vm;
    let absent = || HypervisorError::Transient(format!("{vm} has not arrived here"));
    let domain = h.domain(vm)?.ok_or_else(absent)?;
    if let Some(mark) = domain.mark()?.filter(|mark| mark.epoch != spec.epoch) {
        return Err(other_placement(spec, mark.epoch));
    }
    let record = h.dirs.read::<Record>(vm)?;
    match record.as_ref().map(|record| (record.arriving, record.remembered)) {
        Some((true, Remembered::Arrived)) => {
            return h.amend(vm, |record| (record.arriving, record.remembered) = (false, Remembered::OffByAgent));
        }
        // Taken over already: whether it is on since is for others to say.
        Some((false, _)) => return Ok(()),
        _ => {}
    }
    if h.arrives(vm)? {
        match arrival(&domain)? {
            Some(GuestPower::Arrived) if run => domain.call("resuming", |d| d.resume().map(drop))?,
            Some(GuestPower::Arrived) => {}
            Some(_) => return Err(HypervisorError::Transient(format!("{vm} is still arriving"))),
            None => {}
        }
        h.amend(vm, |record| (record.arriving, record.remembered) = (false, Remembered::On))?;
    }
    if domain.seen()?.is_on() { Ok(()) } else { Err(absent()) }
}

pub fn cancel(h: &Libvirt, vm: VmId) -> Result<()> {
    let Some(domain) = h.domain(vm)? else { return Ok(()) };
    domain_job::end(&domain)?;
    // A source whose libvirtd restarted in the last moment stays paused until somebody decides.
    if left_paused(&domain)? && !h.arrives(vm)? {
        domain.call("resuming", |d| d.resume().map(drop))?;
    }
    // Settled first, if nobody has looked since it went off.
    h.observe(vm, &domain)?;
    let _records = lock(&h.records);
    if let Some(mut record) = h.dirs.read::<Record>(vm)?.filter(|record| record.remembered == Remembered::Moved) {
        record.remembered = Remembered::OffByAgent;
        h.dirs.write(vm, &record)?;
    }
    Ok(())
}

fn left_paused(domain: &Handle) -> Result<bool> {
    let (state, reason) = domain.call("looking at", |d| d.state())?;
    let by_migration = match reason {
        DomainStateReasonEnum::Known(DomainStateReason::Paused(reason)) => {
            matches!(reason.known(), Some(DomainPausedReason::Migration | DomainPausedReason::PostCopy))
        }
        _ => false,
    };
    Ok(state.known() == Some(DomainState::Paused) && by_migration)
}
