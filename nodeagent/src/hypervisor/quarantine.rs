//! What was set aside on this host, for people to look through: disks of machines that were given away or that nobody
//! wants here. Nothing is ever deleted from it by the agent.

use std::{fs, io, os::unix::fs::MetadataExt, path::Path, path::PathBuf};

use model::VmId;

/// Listed at most: an answer stays well within one message, and nobody reads further.
const MOST: usize = 10_000;
/// `st_blocks` counts in these, whatever the file system's own are.
const BLOCK_BYTES: u64 = 512;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    pub vm: VmId,
    pub epoch: u64,
    /// What it takes on this host's disk.
    pub bytes: u64,
    pub path: PathBuf,
    /// Unix time.
    pub since_seconds: u64,
}

/// In order of machine, placement and time; what is not named as `GuestDirs::quarantine` names it is left out. `data`: as
/// `GuestDirs::open` had it.
///
/// # Errors
/// When the folder cannot be read; without one there is nothing.
pub fn list(data: &Path) -> io::Result<Vec<SetAside>> {
    let entries = match fs::read_dir(data.join("quarantine")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries.take(MOST) {
        let path = entry?.path();
        let Some((vm, epoch, since_seconds)) = path.file_name().and_then(|name| parse(name.to_str()?)) else {
            continue;
        };
        found.push(SetAside { vm, epoch, bytes: size(&path), path, since_seconds });
    }
    found.sort_unstable_by_key(|entry| (entry.vm, entry.epoch, entry.since_seconds));
    Ok(found)
}

/// `vm-17-4242-1767225600`.
fn parse(name: &str) -> Option<(VmId, u64, u64)> {
    let (rest, since) = name.rsplit_once('-')?;
    let (vm, epoch) = rest.rsplit_once('-')?;
    Some((vm.parse().ok()?, epoch.parse().ok()?, since.parse().ok()?))
}

/// The folder is flat. A file that goes away meanwhile takes nothing.
fn size(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter_map(|file| Some(file.metadata().ok()?.blocks() * BLOCK_BYTES)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::guest_dir::GuestDirs;

    #[test]
    fn what_was_set_aside_is_listed_with_what_it_takes() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(list(dir.path()).unwrap(), []);
        let dirs = GuestDirs::open(dir.path()).unwrap();
        for (vm, epoch) in [(VmId(17), 4242), (VmId(3), 7)] {
            dirs.create(vm).unwrap();
            fs::write(dirs.paths(vm).disk, vec![1; 100_000]).unwrap();
            dirs.quarantine(vm, epoch).unwrap();
        }
        fs::create_dir(dir.path().join("quarantine/something else")).unwrap();
        let listed = list(dir.path()).unwrap();
        let named: Vec<_> = listed.iter().map(|entry| (entry.vm, entry.epoch)).collect();
        assert_eq!(named, [(VmId(3), 7), (VmId(17), 4242)]);
        assert!(listed.iter().all(|e| e.bytes >= 100_000 && e.since_seconds > 1_700_000_000 && e.path.is_dir()));
    }
}
