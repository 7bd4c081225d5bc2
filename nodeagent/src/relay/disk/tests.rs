//! That a disk comes as it went, or not at all.

use super::*;

/// Data, zeros longer than a chunk, and data at a place that is no multiple of one.
fn disk() -> Vec<u8> {
    [vec![7; CHUNK_BYTES + 5], vec![0; 3 * CHUNK_BYTES], vec![9; 11]].concat()
}

fn parts(bytes: &[u8]) -> Vec<Part> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, bytes).unwrap();
    let parts = std::sync::Mutex::new(Vec::new());
    let take = |part, done| {
        assert!(done <= bytes.len() as u64);
        parts.lock().unwrap().push(part);
        true
    };
    read(&mut File::open(&path).unwrap(), take).unwrap();
    parts.into_inner().unwrap()
}

/// What is written of it, and why not, if not.
fn written(size_bytes: u64, parts: Vec<Part>) -> (Vec<u8>, Result<(), String>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.coming");
    let (send, arrived) = mpsc::channel(parts.len().max(1));
    for part in parts {
        send.try_send(part).unwrap();
    }
    drop(send);
    let outcome = write(&path, size_bytes, arrived).map_err(|status| ApiError::from(status).code);
    (fs::read(&path).unwrap_or_default(), outcome)
}

#[test]
fn a_disk_comes_as_it_went_and_zeros_do_not_travel() {
    for bytes in [disk(), vec![], vec![1], vec![0; 2 * CHUNK_BYTES]] {
        let parts = parts(&bytes);
        let travelled: usize = parts.iter().map(|part| if let Part::Data(data) = part { data.len() } else { 0 }).sum();
        assert!(travelled <= bytes.iter().filter(|byte| **byte != 0).count() + 2 * CHUNK_BYTES, "{travelled}");
        assert_eq!(written(bytes.len() as u64, parts), (bytes, Ok(())));
    }
}

#[test]
fn what_is_not_whole_is_not_taken() {
    let (whole, length) = (parts(&disk()), disk().len() as u64);
    let refused = |what: &str, size_bytes: u64, parts: Vec<Part>, code: &str| {
        assert_eq!(written(size_bytes, parts).1, Err(code.to_owned()), "{what}");
    };
    refused("it broke off before its digest", length, whole[..whole.len() - 1].to_vec(), "unavailable");
    refused("it broke off in the middle", length, whole[..2].to_vec(), "unavailable");
    refused("a part is missing", length, [&whole[..2], &whole[3..]].concat(), "damaged");
    let mut changed = whole.clone();
    changed[0] = Part::Data(vec![8; CHUNK_BYTES].into());
    refused("a part is another", length, changed, "damaged");
    refused("it is shorter than was said", length + 1, whole.clone(), "damaged");
    refused("it is longer than was said", length - 1, whole.clone(), "invalid-argument");
    refused("a run of zeros that nobody would send", length, vec![Part::Zeros(u64::MAX)], "invalid-argument");
    refused("a second header", length, vec![Part::Header(DiskHeader::default())], "invalid-argument");
    refused("more than the host has room for", 1 << 60, whole, "no-room");
}
