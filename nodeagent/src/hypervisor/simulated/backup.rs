//! A backup of a disk that exists only on paper: the header of an empty qcow2 file of its size, and whose it is.

use model::{Consistency, VmId};

use super::{
    super::{
        Backup, HypervisorError, Result,
        guest_dir::{GuestDirs, remove_file, write_whole},
        job::Job,
    },
    Simulated, now_nanos,
    record::{Power, SimGuest, Why},
};

/// What the disk of a small guest took with libvirt on a busy host.
const BACKUP_MILLIS: u64 = 450;

pub fn back_up(h: &Simulated, vm: VmId, job: &Job) -> Result<Backup> {
    let absent = || HypervisorError::Transient(format!("{vm} is not on this host"));
    let guest = h.look()?.guests.get(&vm).filter(|guest| guest.power != Power::Made).cloned().ok_or_else(absent)?;
    if guest.is_coming() || guest.power == Power::Off(Why::Moved) {
        return Err(HypervisorError::Transient(format!("{vm} is moving between hosts")));
    }
    clear(&h.dirs, vm)?;
    h.work(job, guest.usage(now_nanos()).disk_used_bytes, BACKUP_MILLIS)?;
    h.chance("backing up the guest")?;
    let file = h.dirs.backup(vm);
    let bytes = image(&guest);
    write_whole(&file, &bytes)?;
    let consistency = if guest.is_on() { Consistency::Frozen } else { Consistency::Off };
    Ok(Backup { file, size_bytes: bytes.len() as u64, virtual_bytes: guest.disk_bytes, consistency })
}

/// Removes what an earlier one left.
pub fn clear(dirs: &GuestDirs, vm: VmId) -> Result<()> {
    let file = dirs.backup(vm);
    remove_file(&file.with_extension("part"))?;
    remove_file(&file)
}

/// Fields of the qcow2 header, from QEMU's docs/interop/qcow2.txt; then a sentence, which makes each one different.
pub fn image(guest: &SimGuest) -> Vec<u8> {
    let mut header = vec![0; 104];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[20..24].copy_from_slice(&16u32.to_be_bytes());
    header[24..32].copy_from_slice(&guest.disk_bytes.to_be_bytes());
    header[100..104].copy_from_slice(&104u32.to_be_bytes());
    header.extend(format!("simulated disk of {} at {}, {}\n", guest.vm, guest.epoch, now_nanos()).bytes());
    header
}
