//! A disk that fails when it is told to: a shim, preloaded into a controller, whose next sync of the Raft log fails once.
//!
//! Afterwards every sync of the log is said to have succeeded and does nothing, as the kernel does with pages that it
//! marked clean: whoever tries again is deceived, and the shim counts it. Deliberately not here: torn writes and power
//! cuts; the tests of `storage` have them.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Command,
};

const SHIM: &str = include_str!("disk_fault/shim.c");
/// What the Raft log's files have in their path, and no other file of a controller.
const LOG_FILES: &str = "raft-log/";

/// One controller's disk.
pub struct DiskFault {
    shim: PathBuf,
    /// While it exists the next sync fails, and it is renamed.
    ask: PathBuf,
}

impl DiskFault {
    /// Compiles the shim into `folder`.
    ///
    /// # Errors
    /// Why it cannot be had on this machine.
    pub fn prepare(folder: &Path) -> Result<PathBuf, String> {
        let (source, shim) = (folder.join("shim.c"), folder.join("shim.so"));
        std::fs::write(&source, SHIM).map_err(|error| error.to_string())?;
        let arguments = [OsStr::new("-shared"), "-fPIC".as_ref(), "-O1".as_ref(), "-o".as_ref(), shim.as_os_str()];
        let compiled = Command::new("cc").args(arguments).arg(&source).output();
        let compiled = compiled.map_err(|error| format!("no C compiler 'cc': {error}"))?;
        if compiled.status.success() { Ok(shim) } else { Err(String::from_utf8_lossy(&compiled.stderr).into_owned()) }
    }

    pub fn new(shim: &Path, folder: &Path, name: &str) -> Self {
        Self { shim: shim.to_owned(), ask: folder.join(format!("{name}.fail")) }
    }

    /// What a controller needs in its environment to have this disk.
    pub fn environment(&self) -> [(&str, &OsStr); 3] {
        [
            ("LD_PRELOAD", self.shim.as_os_str()),
            ("DISK_FAULT_ASK", self.ask.as_os_str()),
            ("DISK_FAULT_FILES", LOG_FILES.as_ref()),
        ]
    }

    /// From now on the next sync fails.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn strike(&self) -> std::io::Result<()> {
        std::fs::write(&self.ask, "")
    }

    /// Whether a sync has failed, and how many were tried after it.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn seen(&self) -> std::io::Result<Option<u64>> {
        match std::fs::metadata(self.ask.with_extension("fail.done")) {
            Ok(file) => Ok(Some(file.len())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A disk as good as new, for the next life of the controller.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn mend(&self) -> std::io::Result<()> {
        std::fs::remove_file(self.ask.with_extension("fail.done"))
    }
}
