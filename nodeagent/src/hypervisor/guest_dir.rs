//! What a guest leaves on the host's disk: one folder each, a small record in it, and the folder of what was set aside.
//!
//! ```text
//! DIR/vms/vm-17/          disk.qcow2  seed.img  console.log  guest.json  (backup.qcow2)
//! DIR/rehearsals/img-4/   as long as a backup is rehearsed
//! DIR/quarantine/vm-17-4242-1767225600/      the same, moved here with placement and time
//! ```
//! Records are replaced whole and synced. Deliberately not here: what a record means; each hypervisor has its own.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use model::VmId;
use serde::{Serialize, de::DeserializeOwned};

use super::{HypervisorError, Result, domain_xml::DomainPaths};
use crate::durable;

/// A guest can write to its console for ever. Beyond this the older part is dropped.
const MAX_CONSOLE_BYTES: u64 = 4 << 20;

/// What is kept of the older part.
const KEPT_CONSOLE_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub struct GuestDirs {
    root: PathBuf,
}

impl GuestDirs {
    /// # Errors
    /// When the folder cannot be made, or its path is not UTF-8 and so cannot be told to a hypervisor.
    pub fn open(root: &Path) -> Result<Self> {
        for dir in [root.join("vms"), root.join("quarantine")] {
            // Others may pass, for hypervisors run guests as a user of their own; they may not look.
            DirBuilder::new().recursive(true).mode(0o711).create(&dir).map_err(|e| failed("make", &dir, e))?;
        }
        let root = root.canonicalize().map_err(|e| failed("find", root, e))?;
        if root.to_str().is_none() {
            return Err(HypervisorError::Permanent(format!("the path {} is not UTF-8", root.display())));
        }
        let dirs = Self { root };
        dirs.finish_removals()?;
        Ok(dirs)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn dir(&self, vm: VmId) -> PathBuf {
        self.root.join("vms").join(vm.to_string())
    }

    pub fn paths(&self, vm: VmId) -> DomainPaths {
        let dir = self.dir(vm);
        DomainPaths { disk: dir.join("disk.qcow2"), seed: dir.join("seed.img"), console: dir.join("console.log") }
    }

    /// Where a backup is made, before it goes into the image store.
    pub fn backup(&self, vm: VmId) -> PathBuf {
        self.dir(vm).join("backup.qcow2")
    }

    /// Where backups are rehearsed.
    pub fn rehearsals(&self) -> PathBuf {
        self.root.join("rehearsals")
    }

    pub fn create(&self, vm: VmId) -> Result<()> {
        let dir = self.dir(vm);
        DirBuilder::new().recursive(true).mode(0o711).create(&dir).map_err(|e| failed("make", &dir, e))
    }

    /// The machines that have a folder, whatever is in it.
    pub fn vms(&self) -> Result<Vec<VmId>> {
        let mut vms: Vec<_> = names(&self.root.join("vms"))?.iter().filter_map(|name| name.parse().ok()).collect();
        vms.sort_unstable();
        Ok(vms)
    }

    /// What was set aside, as `vm-17-4242-1767225600`: machine, placement, Unix time.
    pub fn quarantined(&self) -> Result<Vec<String>> {
        let mut names = names(&self.root.join("quarantine"))?;
        names.sort_unstable();
        Ok(names)
    }

    /// The folders of all guests, those set aside included.
    pub fn all(&self) -> Result<Vec<PathBuf>> {
        let vms = self.vms()?.into_iter().map(|vm| self.dir(vm));
        Ok(vms.chain(self.quarantined()?.iter().map(|name| self.root.join("quarantine").join(name))).collect())
    }

    /// `None` when there is no record, or only one that a power failure has torn.
    pub fn read<T: DeserializeOwned>(&self, vm: VmId) -> Result<Option<T>> {
        let path = self.record(vm);
        match fs::read(&path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes)
                .inspect_err(|e| tracing::warn!(%vm, error = %e, "the record of a guest is unreadable"))
                .ok()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed("read", &path, e)),
        }
    }

    pub fn write<T: Serialize>(&self, vm: VmId, record: &T) -> Result<()> {
        let bytes = serde_json::to_vec(record).map_err(|e| HypervisorError::Permanent(e.to_string()))?;
        // The quorum may have been told what it says: it outlives a loss of power.
        let path = self.record(vm);
        durable::replace(&path, &bytes).map_err(|e| failed("write", &path, e))
    }

    /// Remove everything of a machine. A removal that is cut short is finished at the next start.
    pub fn remove(&self, vm: VmId) -> Result<()> {
        let gone = self.root.join("vms").join(format!(".gone-{vm}"));
        remove_tree(&gone)?;
        rename(&self.dir(vm), &gone)?;
        remove_tree(&gone)
    }

    /// Set everything of a machine aside.
    pub fn quarantine(&self, vm: VmId, epoch: u64) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        rename(&self.dir(vm), &self.root.join("quarantine").join(format!("{vm}-{epoch}-{now}")))
    }

    /// The end of the console's log, across the part that was dropped from it.
    pub fn console_tail(&self, vm: VmId, max_bytes: usize) -> Result<Vec<u8>> {
        let path = self.paths(vm).console;
        let mut tail = read_tail(&path, max_bytes)?;
        if tail.len() < max_bytes {
            let mut older = read_tail(&older(&path), max_bytes - tail.len())?;
            older.append(&mut tail);
            tail = older;
        }
        Ok(tail)
    }

    /// Keep the console's log within its bound. Its writer appends, so it may be cut at any time; what is written in
    /// that moment may be lost.
    pub fn bound_console(&self, vm: VmId) -> Result<()> {
        let path = self.paths(vm).console;
        if fs::metadata(&path).map_or(0, |m| m.len()) <= MAX_CONSOLE_BYTES {
            return Ok(());
        }
        write_whole(&older(&path), &read_tail(&path, KEPT_CONSOLE_BYTES)?)?;
        File::options().write(true).open(&path).and_then(|f| f.set_len(0)).map_err(|e| failed("cut", &path, e))
    }

    fn record(&self, vm: VmId) -> PathBuf {
        self.dir(vm).join("guest.json")
    }

    fn finish_removals(&self) -> Result<()> {
        let vms = self.root.join("vms");
        names(&vms)?.iter().filter(|n| n.starts_with(".gone-")).try_for_each(|n| remove_tree(&vms.join(n)))
    }
}

/// Readers see the old file or the new one. Not synced: seeds are made anew, and a console's end is nobody's promise.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let part = path.with_extension("part");
    // Seeds and consoles hold secrets of the owner.
    let write = || -> io::Result<()> {
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&part)?.write_all(bytes)?;
        fs::rename(&part, path)
    };
    write().map_err(|e| failed("write", path, e))
}

pub(super) fn failed(what: &str, path: &Path, error: io::Error) -> HypervisorError {
    HypervisorError::Transient(format!("cannot {what} {}: {error}", path.display()))
}

fn names(dir: &Path) -> Result<Vec<String>> {
    let list = || -> io::Result<_> {
        fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    list().map_err(|e| failed("list", dir, e))
}

fn older(console: &Path) -> PathBuf {
    console.with_extension("log.older")
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    match fs::rename(from, to) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("move", from, e)),
        _ => Ok(()),
    }
}

pub(super) fn remove_file(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", file, e)),
        _ => Ok(()),
    }
}

fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("remove", dir, e)),
        _ => Ok(()),
    }
}

fn read_tail(path: &Path, max_bytes: usize) -> Result<Vec<u8>> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(max_bytes as u64)))?;
        let mut tail = Vec::new();
        file.take(max_bytes as u64).read_to_end(&mut tail)?;
        Ok(tail)
    };
    match read() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        other => other.map_err(|e| failed("read", path, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removal_that_was_cut_short_is_finished() {
        let root = tempfile::tempdir().unwrap();
        let dirs = GuestDirs::open(root.path()).unwrap();
        dirs.create(VmId(1)).unwrap();
        fs::rename(dirs.dir(VmId(1)), root.path().join("vms/.gone-vm-1")).unwrap();
        assert_eq!(GuestDirs::open(root.path()).unwrap().vms().unwrap(), vec![]);
        assert_eq!(names(&root.path().join("vms")).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn a_torn_record_counts_as_none() {
        let root = tempfile::tempdir().unwrap();
        let dirs = GuestDirs::open(root.path()).unwrap();
        dirs.create(VmId(1)).unwrap();
        assert_eq!(dirs.read::<u64>(VmId(1)).unwrap(), None);
        dirs.write(VmId(1), &7u64).unwrap();
        assert_eq!(dirs.read::<u64>(VmId(1)).unwrap(), Some(7));
        fs::write(dirs.dir(VmId(1)).join("guest.json"), "").unwrap();
        assert_eq!(dirs.read::<u64>(VmId(1)).unwrap(), None);
    }

    #[test]
    fn the_console_is_bounded_and_its_end_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let dirs = GuestDirs::open(root.path()).unwrap();
        dirs.create(VmId(1)).unwrap();
        assert_eq!(dirs.console_tail(VmId(1), 10).unwrap(), b"");
        let console = dirs.paths(VmId(1)).console;
        fs::write(&console, [vec![b'x'; MAX_CONSOLE_BYTES as usize], b"the end".to_vec()].concat()).unwrap();
        dirs.bound_console(VmId(1)).unwrap();
        assert_eq!(fs::metadata(&console).unwrap().len(), 0);
        fs::write(&console, " and more").unwrap();
        assert_eq!(dirs.console_tail(VmId(1), 12).unwrap(), b"end and more");
        assert_eq!(dirs.console_tail(VmId(1), 4).unwrap(), b"more");
    }
}
