//! A guest that is off goes to another host as the file that its disk is. libvirt has no part in that: here it stays
//! defined until it is removed, and there it is defined when its disk has come.
//!
//! Deliberately not here: how the bytes travel (`relay::disk`).

use std::path::{Path, PathBuf};

use model::VmId;

use super::{
    super::{GuestPower, GuestSpec, HypervisorError, OffReason, Result},
    Libvirt, Record, Remembered, disk, lock, not_handed_over, other_placement,
};

pub fn disk(h: &Libvirt, vm: VmId) -> Result<Option<PathBuf>> {
    let domain = h.domain(vm)?.ok_or_else(|| HypervisorError::Transient(format!("{vm} is not on this host")))?;
    match h.observe(vm, &domain)? {
        GuestPower::Running | GuestPower::Suspended => Ok(None),
        GuestPower::Arriving | GuestPower::Arrived => Err(not_handed_over(vm)),
        GuestPower::Off(OffReason::Moved) => Err(HypervisorError::Transient(format!("{vm} has moved"))),
        GuestPower::Off(_) => Ok(Some(h.dirs.paths(vm).disk)),
    }
}

/// Nothing that QEMU opens for a guest may be named by bytes that came from elsewhere: the base is put in anew, by its
/// path here. It is remembered last, so that whatever is cut short has not arrived.
pub fn take_in(h: &Libvirt, spec: &GuestSpec, disk: &Path) -> Result<()> {
    let vm = spec.vm;
    match h.dirs.read::<Record>(vm)?.filter(|record| record.arriving) {
        Some(record) if record.epoch != spec.epoch => return Err(other_placement(spec, record.epoch)),
        Some(record) if record.remembered == Remembered::Arrived => return Ok(()),
        Some(_) => {}
        None => return Err(HypervisorError::Transient(format!("{vm} is not expected here"))),
    }
    disk::stand_on_base(spec, disk)?;
    disk::put_in_place(disk, &h.dirs.paths(vm).disk)?;
    h.define(spec)?;
    h.amend(vm, |record| record.remembered = Remembered::Arrived)
}

pub fn let_go(h: &Libvirt, vm: VmId) -> Result<()> {
    let domain = h.domain(vm)?.ok_or_else(|| HypervisorError::Transient(format!("{vm} is not on this host")))?;
    let _records = lock(&h.records);
    if domain.seen()?.is_on() {
        return Err(HypervisorError::Transient(format!("{vm} is on")));
    }
    let record = h.dirs.read::<Record>(vm)?;
    let record = record.ok_or_else(|| HypervisorError::Transient(format!("there is no record of {vm}")))?;
    h.dirs.write(vm, &Record { remembered: Remembered::Moved, ..record })
}
