//! The disk of a simulated guest that is off, on its way to another host. It holds nothing but a sentence, which is
//! written when it first goes and is carried along from then on, so that a test can see whose disk came.

use std::{
    fs,
    path::{Path, PathBuf},
};

use model::VmId;

use super::{
    super::{
        GuestSpec, HypervisorError, OffReason, Result,
        guest_dir::{failed, write_whole},
    },
    Simulated, backup,
    migration::not_handed_over,
    not_running,
    record::{Power, Why},
};

pub fn disk(h: &Simulated, vm: VmId) -> Result<Option<PathBuf>> {
    let state = h.look()?;
    let guest = state.guests.get(&vm).ok_or_else(|| not_running(vm))?;
    match guest.power {
        Power::On | Power::Suspended => return Ok(None),
        Power::Off(Why::Moved) => return Err(HypervisorError::Transient(format!("{vm} has moved"))),
        Power::Off(_) => {}
        Power::Made | Power::Arriving | Power::Arrived | Power::ArrivedOff => return Err(not_handed_over(vm)),
    }
    let disk = h.dirs.paths(vm).disk;
    if !disk.exists() {
        write_whole(&disk, &backup::image(guest, None))?;
    }
    Ok(Some(disk))
}

pub fn take_in(h: &Simulated, spec: &GuestSpec, disk: &Path) -> Result<()> {
    h.chance("taking in the disk")?;
    let mut state = h.look()?;
    let guest = state.guests.get_mut(&spec.vm).ok_or_else(|| not_handed_over(spec.vm))?;
    guest.same_placement(spec)?;
    match guest.power {
        Power::ArrivedOff => return Ok(()),
        Power::Made if guest.expected => {}
        _ => return Err(HypervisorError::Transient(format!("{} is not expected here", spec.vm))),
    }
    let place = h.dirs.paths(spec.vm).disk;
    fs::rename(disk, &place).map_err(|e| failed("move", disk, e))?;
    guest.power = Power::ArrivedOff;
    h.dirs.write(spec.vm, guest)
}

pub fn let_go(h: &Simulated, vm: VmId) -> Result<()> {
    let mut state = h.look()?;
    let guest = state.guests.get_mut(&vm).ok_or_else(|| not_running(vm))?;
    match guest.power {
        Power::Off(_) => guest.power = Power::Off(OffReason::Moved.into()),
        _ => return Err(HypervisorError::Transient(format!("{vm} is not off"))),
    }
    h.dirs.write(vm, guest)
}
