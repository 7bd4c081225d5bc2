//! What a qcow2 file says that it stands on, read from its header before any program follows it: QEMU opens whatever
//! files a header names, so one that names others would let a guest read the host's.
//!
//! An image stands alone, or is an increment of a machine's backup: then it names its parent by the parent's digest,
//! which is a file beside it in every host's store, and nothing else. Deliberately not here: the guests' data.

use std::{
    fs::File,
    io, iter,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use model::{Digest, setting};

const MAGIC: &[u8] = b"QFI\xfb";
/// QEMU writes at most 1023 bytes of name.
const MOST_NAME_BYTES: u32 = 1023;
/// The longest chain, and the guest's own disk on it.
const MOST_FILES: usize = setting::MOST_FULL_EVERY as usize + 1;

/// Why a file may not be opened as what it is said to be.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    #[error("{0}")]
    Header(&'static str),
    #[error("names the backing file '{found}', but must name {wanted}")]
    Parent { found: String, wanted: String },
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Whether the file names its parent, by digest, as its only reference; or nothing, when it has none.
///
/// # Errors
/// When it is no qcow2 file of a known kind, or says anything else.
pub fn stands_on(file: &Path, parent: Option<Digest>) -> Result<(), Unfit> {
    match (backing(file)?, parent.map(|digest| digest.to_string())) {
        (None, None) => Ok(()),
        (Some(found), Some(wanted)) if found == wanted => Ok(()),
        (Some(_), None) => Err(Unfit::Header("names a backing file")),
        (found, Some(wanted)) => Err(Unfit::Parent { found: found.unwrap_or_default(), wanted }),
    }
}

/// The same for an image and all that it stands on, which lie beside it.
///
/// # Errors
/// As `stands_on`, of the first that is not as it should be.
pub fn chain_is(image: &Path, parents: &[Digest]) -> Result<(), Unfit> {
    let files =
        iter::once(image.to_owned()).chain(parents.iter().map(|digest| image.with_file_name(digest.to_string())));
    let named = parents.iter().copied().map(Some).chain([None]);
    files.zip(named).try_for_each(|(file, parent)| stands_on(&file, parent))
}

/// What a disk stands on, and what that stands on, by their own headers; empty when it stands alone.
pub fn files_under(disk: &Path) -> Vec<PathBuf> {
    let below = |file: &Path| {
        let name = backing(file).ok()??;
        Some(file.parent()?.join(name))
    };
    iter::successors(below(disk), |file| below(file)).take(MOST_FILES).collect()
}

/// What the file itself names as its backing file.
///
/// # Errors
/// When it is no qcow2 file of a known kind, or keeps its data elsewhere.
pub fn backing(file: &Path) -> Result<Option<String>, Unfit> {
    let file = File::open(file)?;
    // Version 2 headers end after 72 bytes; what follows in such a file are not features.
    let mut header = [0; 80];
    read_at_most(&file, &mut header)?;
    let Some((offset, length)) = name_in(&header).map_err(Unfit::Header)? else { return Ok(None) };
    let mut name = vec![0; length.min(MOST_NAME_BYTES) as usize];
    file.read_exact_at(&mut name, offset)?;
    Ok(Some(String::from_utf8_lossy(&name).into_owned()))
}

/// A file may be shorter.
fn read_at_most(file: &File, buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], filled as u64)? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(())
}

/// Where the name of the backing file is, and how long. Fields of the qcow2 header, from QEMU's docs/interop/qcow2.txt.
fn name_in(header: &[u8; 80]) -> Result<Option<(u64, u32)>, &'static str> {
    let number = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| header[at + i]));
    const EXTERNAL_DATA_FILE: u64 = 1 << 2;
    if &header[..4] != MAGIC {
        return Err("is not qcow2");
    }
    let version = number(0) & 0xffff_ffff;
    let length = (number(16) >> 32) as u32;
    match version {
        3 if number(72) & EXTERNAL_DATA_FILE != 0 => Err("names a data file"),
        2 | 3 => Ok((number(8) != 0).then_some((number(8), length))),
        _ => Err("is of an unknown version of qcow2"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn header(version: u8, name: &str) -> Vec<u8> {
        let mut bytes = vec![0; 104];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\0");
        bytes[7] = version;
        if !name.is_empty() {
            bytes[15] = 104;
            bytes[19] = u8::try_from(name.len()).unwrap();
            bytes.extend(name.bytes());
        }
        bytes
    }

    #[test]
    fn only_the_parent_that_is_known_may_be_named_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("image");
        let judge = |bytes: &[u8], parent| {
            fs::write(&file, bytes).unwrap();
            stands_on(&file, parent).map_err(|unfit| unfit.to_string())
        };
        let parent = Digest([7; 32]);
        let name = parent.to_string();
        assert_eq!(judge(b"raw", None), Err("is not qcow2".into()));
        assert_eq!(judge(&header(3, ""), None), Ok(()));
        assert_eq!(judge(&header(2, ""), None), Ok(()));
        assert_eq!(judge(&header(9, ""), None), Err("is of an unknown version of qcow2".into()));
        let mut data_file = header(3, "");
        data_file[79] = 1 << 2;
        assert_eq!(judge(&data_file, None), Err("names a data file".into()));
        data_file[7] = 2;
        assert_eq!(judge(&data_file, None), Ok(()), "version 2 has no features");
        for version in [2, 3] {
            assert_eq!(judge(&header(version, "/etc/shadow"), None), Err("names a backing file".into()));
            assert_eq!(judge(&header(version, &name), Some(parent)), Ok(()));
            for other in ["/etc/shadow", "json:{}", &Digest([8; 32]).to_string(), &format!("./{name}"), ""] {
                let said = judge(&header(version, other), Some(parent)).unwrap_err();
                assert!(said.ends_with(&format!("but must name {name}")), "{said}");
            }
        }
        assert!(judge(&[&header(3, "x")[..96], &[0xff; 8]].concat(), None).is_err(), "a name beyond its end");
    }

    #[test]
    fn a_chain_is_followed_to_its_end_and_refused_in_its_middle() {
        let dir = tempfile::tempdir().unwrap();
        let at = |n: u8| dir.path().join(Digest([n; 32]).to_string());
        let named = |n: u8| Digest([n; 32]).to_string();
        fs::write(at(1), header(3, "")).unwrap();
        fs::write(at(2), header(3, &named(1))).unwrap();
        fs::write(at(3), header(3, &named(2))).unwrap();
        let disk = dir.path().join("disk.qcow2");
        fs::write(&disk, header(3, &named(3))).unwrap();
        assert_eq!(files_under(&disk), [at(3), at(2), at(1)]);
        let (one, two) = (Digest([1; 32]), Digest([2; 32]));
        assert!(chain_is(&at(3), &[two, one]).is_ok());
        assert!(
            chain_is(&at(3), &[two]).is_err() && chain_is(&at(3), &[one]).is_err() && chain_is(&at(3), &[]).is_err()
        );
        fs::write(at(2), header(3, "/etc/shadow")).unwrap();
        assert!(chain_is(&at(3), &[two, one]).is_err(), "its middle");
        fs::write(at(1), header(3, &named(3))).unwrap();
        fs::write(at(2), header(3, &named(1))).unwrap();
        assert_eq!(files_under(&disk).len(), MOST_FILES, "a ring has an end");
    }
}
