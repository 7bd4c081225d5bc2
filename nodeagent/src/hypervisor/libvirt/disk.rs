//! A guest's disk: a thin qcow2 file over the verified base image.
//!
//! There is no Rust library that writes qcow2 overlays, so `qemu-img` makes them: 25 to 60 ms. What it is given was
//! looked at first (`qcow2`), because QEMU follows whatever files a qcow2 header names.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{self, Path},
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
    let base = path::absolute(&spec.base).map_err(|e| failed("find", &spec.base, e))?;
    let format = match spec.base_format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => {
            // Images are checked when they are imported, and increments when they are fetched. Once more here.
            qcow2::chain_is(&base, &spec.base_parents)
                .map_err(|why| HypervisorError::Permanent(format!("the image {}: {why}", base.display())))?;
            "qcow2"
        }
    };
    let part = disk.with_extension("part");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
        .args([&base, &part])
        .arg(spec.size.disk_bytes.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(|e| HypervisorError::Transient(format!("cannot run qemu-img: {e}")))?;
    if !made.status.success() {
        let said = String::from_utf8_lossy(&made.stderr);
        return Err(HypervisorError::Transient(format!("qemu-img cannot make the disk: {}", said.trim())));
    }
    fs::rename(&part, disk).map_err(|e| failed("move", &part, e))
}

/// Bytes that a file takes on the host's disk; 0 when it is not there.
pub fn allocated_bytes(file: &Path) -> u64 {
    // POSIX counts blocks of 512 bytes whatever the file system's own are.
    fs::metadata(file).map_or(0, |m| m.blocks() * 512)
}
