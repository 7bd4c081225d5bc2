//! A guest's disk: a thin qcow2 file over the verified base image.
//!
//! There is no Rust library that writes qcow2 overlays, so `qemu-img` makes them: 25 to 60 ms. What it is given was
//! looked at first (`qcow2`), because QEMU follows whatever files a qcow2 header names.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{self, Path, PathBuf},
    process::{Command, Stdio},
};

use model::ImageFormat;

use super::super::{GuestSpec, HypervisorError, Result, guest_dir::failed, qcow2};

/// Make the overlay, whole or not at all.
pub fn make_overlay(spec: &GuestSpec, disk: &Path) -> Result<()> {
    if spec.size.disk_bytes < spec.base_virtual_bytes {
        return Err(HypervisorError::Permanent(format!(
            "the image is a disk of {} bytes, the machine's has only {}",
            spec.base_virtual_bytes, spec.size.disk_bytes
        )));
    }
    let (base, format) = base(spec)?;
    let (part, size) = (disk.with_extension("part"), spec.size.disk_bytes.to_string());
    let create = ["create", "-q", "-f", "qcow2", "-F", format, "-b"];
    qemu_img(&create, &[base.as_os_str(), part.as_os_str(), OsStr::new(&size)])?;
    put_in_place(&part, disk)
}

/// Gives a file that is complete its name, and returns when both are on the disk.
pub fn put_in_place(part: &Path, path: &Path) -> Result<()> {
    File::open(part).and_then(|file| file.sync_all()).map_err(|e| failed("sync", part, e))?;
    fs::rename(part, path).map_err(|e| failed("move", part, e))?;
    let dir = path.parent().unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| failed("sync", dir, e))
}

/// An overlay from another host names the base by its path there. One that stands alone stays so.
pub fn stand_on_base(spec: &GuestSpec, disk: &Path) -> Result<()> {
    let named = qcow2::backing(disk);
    if named.map_err(|why| HypervisorError::Permanent(format!("the disk {}: {why}", disk.display())))?.is_none() {
        return Ok(());
    }
    let (base, format) = base(spec)?;
    rename_backing(disk, base.as_os_str(), format)
}

/// Only the name: that the same bytes are there is for the caller to know.
pub fn rename_backing(file: &Path, name: &OsStr, format: &str) -> Result<()> {
    let rebase = ["rebase", "-q", "-u", "-f", "qcow2", "-F", format, "-b"];
    qemu_img(&rebase, &[name, file.as_os_str()]).map(drop)
}

/// The base by its full path, for an overlay's header, and its format.
fn base(spec: &GuestSpec) -> Result<(PathBuf, &'static str)> {
    let base = path::absolute(&spec.base).map_err(|e| failed("find", &spec.base, e))?;
    match spec.base_format {
        ImageFormat::Raw => Ok((base, "raw")),
        ImageFormat::Qcow2 => {
            // Images are checked when they are imported, and increments when they are fetched. Once more here.
            qcow2::chain_is(&base, &spec.base_parents)
                .map_err(|why| HypervisorError::Permanent(format!("the image {}: {why}", base.display())))?;
            Ok((base, "qcow2"))
        }
    }
}

/// What it prints.
pub fn qemu_img(arguments: &[&str], files: &[&OsStr]) -> Result<Vec<u8>> {
    let done = Command::new("qemu-img").args(arguments).args(files).stdin(Stdio::null()).output();
    let done = done.map_err(|e| HypervisorError::Transient(format!("cannot run qemu-img: {e}")))?;
    if done.status.success() {
        return Ok(done.stdout);
    }
    let said = String::from_utf8_lossy(&done.stderr);
    Err(HypervisorError::Transient(format!("qemu-img {}: {}", arguments[0], said.trim())))
}

pub fn must_be_there(disk: &Path) -> Result<()> {
    match disk.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => Err(HypervisorError::Permanent(format!("its disk is gone: {}", disk.display()))),
        Err(e) => Err(failed("look at", disk, e)),
    }
}

/// Bytes that a file takes on the host's disk; 0 when it is not there.
pub fn allocated_bytes(file: &Path) -> u64 {
    // POSIX counts blocks of 512 bytes whatever the file system's own are.
    fs::metadata(file).map_or(0, |m| m.blocks() * 512)
}
