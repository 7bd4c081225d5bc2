//! A simulated guest goes from one folder to another of the same machine: the source writes into the destination's
//! folder how far it is, as a real one's memory and disk would come through sockets.

use std::{fs, io, path::Path};

use model::VmId;

use super::{
    super::{
        GuestSpec, Hypervisor, HypervisorError, OffReason, Result,
        guest_dir::{GuestDirs, failed, remove_file, write_whole},
        job::Job,
        migration::Destination,
    },
    Simulated,
    effect::Effect,
    now_nanos,
    record::{Power, SimGuest, Why, read_kept},
};

/// A small guest and its disk took 1.5 to 3 s with libvirt on a busy host.
const MIGRATE_MILLIS: u64 = 2_000;

/// The file in the destination's folder, and what it says.
const ARRIVAL: &str = "arrival";
const UNDER_WAY: &[u8] = b"under way";
const COMPLETE: &[u8] = b"complete";

pub fn prepare(h: &Simulated, spec: &GuestSpec) -> Result<Destination> {
    h.make_disk(spec)?;
    let mut state = h.look()?;
    let guest = state.guests.get_mut(&spec.vm).ok_or_else(|| not_handed_over(spec.vm))?;
    guest.same_placement(spec)?;
    if guest.power == Power::Made {
        guest.expected = true;
        h.dirs.write(spec.vm, guest)?;
    }
    let paths = h.dirs.paths(spec.vm);
    let bridges = spec.nics.iter().map(|nic| (nic.mac, nic.bridge.clone())).collect();
    Ok(Destination { epoch: spec.epoch, disk: paths.disk, seed: paths.seed, console: paths.console, bridges })
}

pub fn migrate(h: &Simulated, vm: VmId, to: &Destination, job: &Job) -> Result<()> {
    let memory = {
        let mut state = h.look()?;
        if state.guests.get(&vm).is_some_and(|guest| guest.power == Power::Off(Why::Moved)) {
            return Ok(());
        }
        h.running(&mut state, vm)?.memory_bytes
    };
    let there = to.disk.parent().ok_or_else(|| unreachable("it has no folder"))?;
    if !read_kept(there).is_some_and(|guest| guest.expected && guest.epoch == to.epoch) {
        return Err(unreachable("it does not expect this guest under this placement"));
    }
    write_whole(&there.join(ARRIVAL), UNDER_WAY)?;
    let moved = h.work(job, memory, MIGRATE_MILLIS).and_then(|()| h.chance("moving the guest"));
    let moved = moved.and_then(|()| {
        let mut state = h.look()?;
        let guest = h.running(&mut state, vm)?;
        h.switch_off(guest, OffReason::Moved)
    });
    if let Err(e) = moved {
        remove_file(&there.join(ARRIVAL))?;
        return Err(e);
    }
    write_whole(&there.join(ARRIVAL), COMPLETE)
}

/// What its source says of a guest that is expected here.
pub fn note_arrival(dirs: &GuestDirs, guest: &mut SimGuest) -> Result<()> {
    if !guest.expected || !matches!(guest.power, Power::Made | Power::Arriving | Power::Arrived) {
        return Ok(());
    }
    let power = match read(&dirs.dir(guest.vm).join(ARRIVAL))?.as_deref() {
        Some(COMPLETE) => Power::Arrived,
        Some(_) => Power::Arriving,
        None => Power::Made,
    };
    if guest.power != power {
        guest.power = power;
        dirs.write(guest.vm, guest)?;
    }
    Ok(())
}

pub fn finish(h: &Simulated, spec: &GuestSpec, run: bool) -> Result<()> {
    let mut state = h.look()?;
    let guest = state.guests.get_mut(&spec.vm).ok_or_else(|| not_handed_over(spec.vm))?;
    guest.same_placement(spec)?;
    match guest.power {
        Power::On | Power::Suspended => return Ok(()),
        Power::Off(_) if !guest.expected => return Ok(()),
        Power::ArrivedOff => {
            *guest = SimGuest { power: Power::Off(Why::ByAgent), ..SimGuest::new(spec) };
            return h.dirs.write(spec.vm, guest);
        }
        Power::Arrived => {}
        _ => return Err(HypervisorError::Transient(format!("{} has not arrived here", spec.vm))),
    }
    guest.switch_on(spec, now_nanos());
    if !run {
        guest.power = Power::Suspended;
    }
    h.dirs.write(spec.vm, guest)?;
    if run {
        h.effects.append(guest, Effect::Start);
    }
    remove_file(&h.dirs.dir(spec.vm).join(ARRIVAL))
}

pub fn cancel(h: &Simulated, vm: VmId) -> Result<()> {
    let mut state = h.look()?;
    let Some(guest) = state.guests.get_mut(&vm) else { return Ok(()) };
    if guest.power == Power::Off(Why::Moved) {
        guest.power = Power::Off(Why::ByAgent);
        h.dirs.write(vm, guest)?;
    }
    Ok(())
}

pub fn not_handed_over(vm: VmId) -> HypervisorError {
    HypervisorError::Transient(format!("{vm} was not handed over to this host yet"))
}

fn unreachable(why: &str) -> HypervisorError {
    HypervisorError::Transient(format!("the destination cannot be reached: {why}"))
}

fn read(file: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(file) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("read", file, e)),
    }
}
