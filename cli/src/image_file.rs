//! Looks into an image file before it is uploaded: what format it is, how large the disk in it is, what its digest is.
//!
//! The qcow2 header is read as in QEMU's docs/interop/qcow2.txt. A file that points at other files (a backing file,
//! external data) is refused: the cloud would get a part of a disk, or read a host's files for a guest.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use api::{Digest, error::ApiError};
use clap::ValueEnum;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    Qcow2,
    Raw,
}

impl ImageFormat {
    pub fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageFile {
    pub format: ImageFormat,
    pub size_bytes: u64,
    /// Of the disk that a guest sees.
    pub virtual_bytes: u64,
}

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// The header of version 2; version 3 has more, of which only the features matter here.
const HEADER_BYTES: usize = 104;
/// A disk above this is a mistake or an attack on whoever allocates for it.
const MAX_VIRTUAL_BYTES: u64 = 64 << 40;
const SECTOR: u64 = 512;

/// `asked`: what the caller says that it is; needed for a raw image, which has no mark of its own.
///
/// # Errors
/// When the file cannot be read, or is not an image that the cloud can keep.
pub fn inspect(path: &Path, asked: Option<ImageFormat>) -> Result<ImageFile, ApiError> {
    let mut header = [0; HEADER_BYTES];
    let (size_bytes, filled) = open(path)
        .and_then(|mut file| {
            let size = file.metadata()?.len();
            Ok((size, read_up_to(&mut file, &mut header)?))
        })
        .map_err(|e| ApiError::invalid(format!("cannot read {}: {e}", path.display())))?;
    judge(&header[..filled], size_bytes, asked)
        .map_err(|reason| ApiError::invalid(format!("{} {reason}", path.display())))
}

/// The digest of the whole file; `progress` is told how many bytes were read.
///
/// # Errors
/// When the file cannot be read.
pub fn digest(path: &Path, progress: impl Fn(u64)) -> Result<Digest, ApiError> {
    let failed = |e| ApiError::new("failed", format!("cannot read {}: {e}", path.display()));
    let mut file = open(path).map_err(failed)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut done = 0;
    loop {
        let filled = read_up_to(&mut file, &mut buffer).map_err(failed)?;
        if filled == 0 {
            return Ok(Digest(*hasher.finalize().as_bytes()));
        }
        hasher.update(&buffer[..filled]);
        done += filled as u64;
        progress(done);
    }
}

fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is not a regular file")) }
}

fn judge(header: &[u8], size_bytes: u64, asked: Option<ImageFormat>) -> Result<ImageFile, String> {
    let is_qcow2 = header.starts_with(&MAGIC);
    match (is_qcow2, asked) {
        (true, Some(ImageFormat::Raw)) => Err("is a qcow2 image; import it without --format raw".into()),
        (true, _) => qcow2(header, size_bytes),
        (false, Some(ImageFormat::Qcow2)) => Err("is not a qcow2 image".into()),
        (false, None) => Err("is not a qcow2 image; if it is a raw disk, say --format raw".into()),
        (false, Some(ImageFormat::Raw)) => raw(size_bytes),
    }
}

fn raw(size_bytes: u64) -> Result<ImageFile, String> {
    if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR) || size_bytes > MAX_VIRTUAL_BYTES {
        return Err(format!("has {size_bytes} bytes, but a disk is 512 to {MAX_VIRTUAL_BYTES} in whole sectors"));
    }
    Ok(ImageFile { format: ImageFormat::Raw, size_bytes, virtual_bytes: size_bytes })
}

fn qcow2(header: &[u8], size_bytes: u64) -> Result<ImageFile, String> {
    let long = |at: usize| header.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
    let word = |at: usize| header.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    let cut = || "is cut off in the header".to_owned();
    let version = word(4).ok_or_else(cut)?;
    let cluster_bits = word(20).ok_or_else(cut)?;
    let virtual_bytes = long(24).ok_or_else(cut)?;
    let (l1_entries, l1_offset) = (word(36).ok_or_else(cut)?, long(40).ok_or_else(cut)?);
    let features = if version == 3 { long(72).ok_or_else(cut)? } else { 0 };
    if !(2..=3).contains(&version) {
        return Err(format!("is qcow2 version {version}, but must be 2 or 3"));
    }
    if long(8).ok_or_else(cut)? != 0 {
        return Err("needs a backing file; flatten it with 'qemu-img convert -O qcow2' first".into());
    }
    if word(32).ok_or_else(cut)? != 0 {
        return Err("is encrypted".into());
    }
    if features & 4 != 0 {
        return Err("keeps its data in another file".into());
    }
    if features & 3 != 0 {
        return Err("was not closed or is marked corrupt; repair it with 'qemu-img check -r all' first".into());
    }
    let sane = (9..=21).contains(&cluster_bits) && virtual_bytes > 0 && virtual_bytes <= MAX_VIRTUAL_BYTES;
    let l1_end = l1_offset.checked_add(u64::from(l1_entries) * 8);
    // One entry of the first table maps a cluster of the second, with 8 bytes for each cluster of the disk.
    let needed = || virtual_bytes.div_ceil(1 << (2 * cluster_bits - 3));
    if !sane || l1_end.is_none_or(|end| end > size_bytes) || u64::from(l1_entries) < needed() {
        return Err("has a qcow2 header that makes no sense, or is cut off".into());
    }
    Ok(ImageFile { format: ImageFormat::Qcow2, size_bytes, virtual_bytes })
}

/// Fills the buffer unless the file ends before.
fn read_up_to(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header as `qemu-img create -f qcow2 x 1G` writes it.
    fn header() -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[7] = 3;
        bytes[23] = 16;
        bytes[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        bytes[39] = 2;
        bytes[40..48].copy_from_slice(&0x30000u64.to_be_bytes());
        bytes
    }

    #[test]
    fn a_qcow2_image_tells_its_disk() {
        let found = judge(&header(), 196_624, None).unwrap();
        assert_eq!(found, ImageFile { format: ImageFormat::Qcow2, size_bytes: 196_624, virtual_bytes: 1 << 30 });
    }

    #[test]
    fn a_broken_or_dangerous_image_is_refused_with_the_reason() {
        let with = |at: usize, value: u8| {
            let mut bytes = header();
            bytes[at] = value;
            judge(&bytes, 196_624, None).unwrap_err()
        };
        assert!(with(7, 9).contains("version 9"));
        assert!(with(15, 1).contains("backing file"));
        assert!(with(35, 2).contains("encrypted"));
        assert!(with(79, 4).contains("another file"));
        assert!(with(79, 2).contains("corrupt"));
        for (at, value) in [(23, 63), (23, 0), (24, 255), (39, 1), (40, 255)] {
            assert!(with(at, value).contains("makes no sense"), "byte {at}");
        }
        assert!(judge(&header()[..30], 30, None).unwrap_err().contains("cut off"));
        assert!(judge(&header(), 104, None).unwrap_err().contains("cut off"));
    }

    #[test]
    fn a_raw_disk_must_be_called_one() {
        assert!(judge(b"hello", 1024, None).unwrap_err().contains("--format raw"));
        assert_eq!(judge(b"hello", 1024, Some(ImageFormat::Raw)).unwrap().virtual_bytes, 1024);
        assert!(
            judge(b"hello", 1000, Some(ImageFormat::Raw)).is_err() && judge(b"", 0, Some(ImageFormat::Raw)).is_err()
        );
        assert!(judge(b"hello", 1024, Some(ImageFormat::Qcow2)).is_err());
        assert!(judge(&header(), 1024, Some(ImageFormat::Raw)).is_err());
    }

    #[test]
    fn only_a_file_can_be_an_image() {
        let dir = tempfile::tempdir().unwrap();
        assert!(inspect(dir.path(), None).unwrap_err().message.contains("not a regular file"));
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![1; 3 << 20]).unwrap();
        assert_eq!(digest(&path, |_| ()).unwrap(), Digest::of(&vec![1; 3 << 20]));
    }
}
