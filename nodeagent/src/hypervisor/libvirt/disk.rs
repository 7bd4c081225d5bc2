//! A guest's disk: a thin qcow2 file over the verified base image.
//!
//! There is no Rust library that writes qcow2 overlays, so `qemu-img` makes them: 25 to 60 ms. What it is given was
//! looked at first, because QEMU follows whatever files a qcow2 header names.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::{
        ffi::OsStringExt,
        fs::{FileExt, MetadataExt},
    },
    path::{self, Path, PathBuf},
    process::{Command, Stdio},
};

use model::ImageFormat;

use super::super::{GuestSpec, HypervisorError, Result, guest_dir::failed};

/// Make the overlay, whole or not at all.
pub fn make_overlay(spec: &GuestSpec, disk: &Path) -> Result<()> {
    if spec.size.disk_bytes < spec.base_virtual_bytes {
        return Err(HypervisorError::Permanent(format!(
            "the image is a disk of {} bytes, the machine's has only {}",
            spec.base_virtual_bytes, spec.size.disk_bytes
        )));
    }
    let (base, format) = base(spec)?;
    let part = disk.with_extension("part");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", format, "-b"]).args([&base, &part]);
    run(create.arg(spec.size.disk_bytes.to_string()), "make the disk")?;
    fs::rename(&part, disk).map_err(|e| failed("move", &part, e))
}

/// An overlay from another host names the base by its path there. One that stands alone stays so.
pub fn stand_on_base(spec: &GuestSpec, disk: &Path) -> Result<()> {
    names_no_data_file(&header(disk)?)
        .map_err(|why| HypervisorError::Permanent(format!("the disk {}: {why}", disk.display())))?;
    if base_of(disk).is_none() {
        return Ok(());
    }
    let (base, format) = base(spec)?;
    // `-u`: only the name; the same bytes are there by digest.
    let mut rebase = Command::new("qemu-img");
    rebase.args(["rebase", "-q", "-u", "-f", "qcow2", "-F", format, "-b"]).args([&base, disk]);
    run(&mut rebase, "put the disk on its base")
}

/// The base by its full path, for an overlay's header, and its format.
fn base(spec: &GuestSpec) -> Result<(PathBuf, &'static str)> {
    let base = path::absolute(&spec.base).map_err(|e| failed("find", &spec.base, e))?;
    match spec.base_format {
        ImageFormat::Raw => Ok((base, "raw")),
        ImageFormat::Qcow2 => {
            refuse_references(&base)?;
            Ok((base, "qcow2"))
        }
    }
}

fn run(command: &mut Command, what: &str) -> Result<()> {
    let done = command.stdin(Stdio::null()).output();
    let done = done.map_err(|e| HypervisorError::Transient(format!("cannot run qemu-img: {e}")))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    Err(HypervisorError::Transient(format!("qemu-img cannot {what}: {}", said.trim())))
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

/// The base that an overlay stands on, by its own header; `None` when there is no overlay here or it stands alone.
pub fn base_of(disk: &Path) -> Option<PathBuf> {
    let file = File::open(disk).ok()?;
    let mut header = [0; 20];
    file.read_exact_at(&mut header, 0).ok()?;
    let offset = u64::from_be_bytes(header[8..16].try_into().ok()?);
    // QEMU writes at most 1023 bytes of name.
    let length = u32::from_be_bytes(header[16..20].try_into().ok()?).min(1023);
    if &header[..4] != QCOW2_MAGIC || offset == 0 {
        return None;
    }
    let mut name = vec![0; length as usize];
    file.read_exact_at(&mut name, offset).ok()?;
    Some(PathBuf::from(std::ffi::OsString::from_vec(name)))
}

const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// Images are checked when they are imported. Once more here, where a backing file or a data file named in the header
/// would let a guest read the host's files.
fn refuse_references(base: &Path) -> Result<()> {
    let header = header(base)?;
    stands_alone(&header).map_err(|why| HypervisorError::Permanent(format!("the image {}: {why}", base.display())))
}

type Header = [u8; 80];

/// Zeros where the file is shorter.
fn header(file: &Path) -> Result<Header> {
    let mut header = [0; 80];
    match File::open(file).and_then(|mut f| f.read_exact(&mut header)) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
        other => other.map_err(|e| failed("read", file, e))?,
    }
    Ok(header)
}

fn stands_alone(header: &Header) -> std::result::Result<(), &'static str> {
    names_no_data_file(header)?;
    if number(header, 8) != 0 { Err("names a backing file") } else { Ok(()) }
}

/// Fields of the qcow2 header, from QEMU's docs/interop/qcow2.txt.
fn names_no_data_file(header: &Header) -> std::result::Result<(), &'static str> {
    const EXTERNAL_DATA_FILE: u64 = 1 << 2;
    if &header[..4] != QCOW2_MAGIC {
        return Err("is not qcow2");
    }
    match number(header, 0) & 0xffff_ffff {
        // Its header ends after 72 bytes; what follows are no features.
        2 => Ok(()),
        3 if number(header, 72) & EXTERNAL_DATA_FILE != 0 => Err("names a data file"),
        3 => Ok(()),
        _ => Err("is of an unknown version of qcow2"),
    }
}

fn number(header: &Header, at: usize) -> u64 {
    u64::from_be_bytes(std::array::from_fn(|i| header[at + i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_images_without_references_are_bases() {
        let mut header = [0; 80];
        assert_eq!(stands_alone(&header), Err("is not qcow2"));
        header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        assert_eq!(stands_alone(&header), Ok(()));
        header[79] = 1 << 2;
        assert_eq!(stands_alone(&header), Err("names a data file"));
        header[7] = 2;
        assert_eq!(stands_alone(&header), Ok(()));
        header[15] = 1;
        assert_eq!(stands_alone(&header), Err("names a backing file"));
        header[7] = 9;
        assert_eq!(stands_alone(&header), Err("is of an unknown version of qcow2"));
    }
}
