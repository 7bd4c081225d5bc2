//! A backup of a disk that exists only on paper: the header of an empty qcow2 file of its size, what it stands on, and whose
//! it is. Since when it is known what the guest wrote is kept as real ones keep it: over a stop, not over a crash or a move.

use model::{Consistency, Digest, VmId};

use super::{
    super::{
        Backup, HypervisorError, Parent, Result,
        guest_dir::{GuestDirs, remove_file, write_whole},
        job::Job,
    },
    Simulated, now_nanos,
    record::{Power, SimGuest, Why},
};

/// What the disk of a small guest took with libvirt on a busy host.
const BACKUP_MILLIS: u64 = 450;

pub fn back_up(h: &Simulated, vm: VmId, parent: Option<&Parent>, job: &Job) -> Result<Backup> {
    let absent = || HypervisorError::Transient(format!("{vm} is not on this host"));
    let guest = h.look()?.guests.get(&vm).filter(|guest| guest.power != Power::Made).cloned().ok_or_else(absent)?;
    if guest.is_coming() || guest.power == Power::Off(Why::Moved) {
        return Err(HypervisorError::Transient(format!("{vm} is moving between hosts")));
    }
    clear(&h.dirs, vm)?;
    h.work(job, guest.usage(now_nanos()).disk_used_bytes, BACKUP_MILLIS)?;
    h.chance("backing up the guest")?;
    let file = h.dirs.backup(vm);
    let parent = parent.map(|parent| parent.digest).filter(|digest| guest.is_on() && guest.since == Some(*digest));
    let bytes = image(&guest, parent);
    write_whole(&file, &bytes)?;
    let consistency = if guest.is_on() { Consistency::Frozen } else { Consistency::Off };
    Ok(Backup { file, size_bytes: bytes.len() as u64, virtual_bytes: guest.disk_bytes, consistency, parent })
}

/// Removes what an earlier one left.
pub fn clear(dirs: &GuestDirs, vm: VmId) -> Result<()> {
    let file = dirs.backup(vm);
    remove_file(&file.with_extension("part"))?;
    remove_file(&file)
}

/// Only of a guest that is on: one that is off has nobody who counts.
pub fn keep(h: &Simulated, vm: VmId, digest: Digest) -> Result<()> {
    h.change(vm, |guest| guest.since = guest.is_on().then_some(digest).or(guest.since))
}

/// Fields of the qcow2 header, from QEMU's docs/interop/qcow2.txt; then a sentence, which makes each one different.
pub fn image(guest: &SimGuest, parent: Option<Digest>) -> Vec<u8> {
    let mut header = vec![0; 104];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[20..24].copy_from_slice(&16u32.to_be_bytes());
    header[24..32].copy_from_slice(&guest.disk_bytes.to_be_bytes());
    header[100..104].copy_from_slice(&104u32.to_be_bytes());
    if let Some(parent) = parent.map(|digest| digest.to_string()) {
        header[8..16].copy_from_slice(&104u64.to_be_bytes());
        header[16..20].copy_from_slice(&(parent.len() as u32).to_be_bytes());
        header.extend(parent.bytes());
    }
    header.extend(format!("simulated disk of {} at {}, {}\n", guest.vm, guest.epoch, now_nanos()).bytes());
    header
}
