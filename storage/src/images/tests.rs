//! Blobs survive torn writes, resumed transfers and flipped bytes.

use super::*;

fn blob(len: usize) -> (Vec<u8>, Digest) {
    let bytes: Vec<u8> = (0..len).map(|i| (i * 31 % 251) as u8).collect();
    let digest = Digest::of(&bytes);
    (bytes, digest)
}

fn store() -> (tempfile::TempDir, ImageStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path(), 0).unwrap();
    (dir, store)
}

fn writing(store: &ImageStore, digest: Digest, size: usize) -> Incoming {
    match store.begin(digest, size as u64).unwrap() {
        Begun::Writing(incoming) => incoming,
        Begun::Held(path) => panic!("{} is there already", path.display()),
    }
}

fn put(store: &ImageStore, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let mut incoming = writing(store, digest, bytes.len());
    incoming.write(bytes).unwrap();
    incoming.finish().unwrap();
    digest
}

#[test]
fn what_was_written_is_read_back_and_written_only_once() {
    let (_dir, store) = store();
    let (bytes, _) = blob(700_000);
    let digest = put(&store, &bytes);
    let (mut file, size) = store.read(digest).unwrap();
    let mut read = Vec::new();
    file.read_to_end(&mut read).unwrap();
    assert_eq!((read, size), (bytes, 700_000));
    assert!(matches!(store.begin(digest, 700_000), Ok(Begun::Held(_))));
    assert_eq!(store.list().unwrap().iter().map(|held| held.digest).collect::<Vec<_>>(), [digest]);
}

#[test]
fn an_empty_blob_is_a_blob() {
    let (_dir, store) = store();
    let digest = put(&store, &[]);
    assert_eq!(store.read(digest).unwrap().1, 0);
}

#[test]
fn a_transfer_that_broke_off_goes_on_where_it_ended() {
    let (dir, store) = store();
    let (bytes, digest) = blob(500_000);
    let mut incoming = writing(&store, digest, bytes.len());
    incoming.write(&bytes[..123_456]).unwrap();
    drop(incoming);
    // Another process, as after a crash.
    let store = ImageStore::open(dir.path(), 0).unwrap();
    let mut incoming = writing(&store, digest, bytes.len());
    assert_eq!(incoming.offset(), 123_456);
    incoming.write(&bytes[123_456..]).unwrap();
    incoming.finish().unwrap();
    assert!(store.verified(digest).is_ok());
}

#[test]
fn a_torn_partial_is_discarded_when_it_does_not_hash_right_and_the_next_attempt_starts_at_zero() {
    let (dir, store) = store();
    let (bytes, digest) = blob(50_000);
    fs::write(dir.path().join(format!("images/{digest}.partial")), vec![0; 10_000]).unwrap();
    let mut incoming = writing(&store, digest, bytes.len());
    assert_eq!(incoming.offset(), 10_000);
    incoming.write(&bytes[10_000..]).unwrap();
    assert!(matches!(incoming.finish(), Err(ImageError::Damaged { .. })));
    assert!(matches!(store.verified(digest), Err(ImageError::Missing(_))));
    let mut incoming = writing(&store, digest, bytes.len());
    assert_eq!(incoming.offset(), 0);
    incoming.write(&bytes).unwrap();
    incoming.finish().unwrap();
}

#[test]
fn a_partial_that_is_too_long_starts_at_zero() {
    let (dir, store) = store();
    let (bytes, digest) = blob(100);
    fs::write(dir.path().join(format!("images/{digest}.partial")), vec![0; 101]).unwrap();
    assert_eq!(writing(&store, digest, bytes.len()).offset(), 0);
}

#[test]
fn an_unfinished_blob_is_not_a_blob() {
    let (_dir, store) = store();
    let (bytes, digest) = blob(1_000);
    let mut incoming = writing(&store, digest, bytes.len());
    incoming.write(&bytes[..999]).unwrap();
    assert!(matches!(incoming.finish(), Err(ImageError::Length { wanted: 1_000, found: 999, .. })));
    assert!(matches!(store.read(digest), Err(ImageError::Missing(_))));
    assert_eq!(store.list().unwrap(), []);
    // The bytes that came are kept.
    assert_eq!(writing(&store, digest, bytes.len()).offset(), 999);
}

#[test]
fn more_bytes_than_announced_are_refused() {
    let (_dir, store) = store();
    let (bytes, digest) = blob(1_000);
    let mut incoming = writing(&store, digest, 999);
    assert!(matches!(incoming.write(&bytes), Err(ImageError::Length { .. })));
}

#[test]
fn a_flipped_byte_is_found_by_this_process_and_by_the_next() {
    let (dir, store) = store();
    let (bytes, _) = blob(300_000);
    let digest = put(&store, &bytes);
    let flip = || {
        let path = dir.path().join(format!("images/{digest}"));
        let mut damaged = bytes.clone();
        damaged[150_000] ^= 1;
        fs::remove_file(&path).unwrap();
        fs::write(&path, damaged).unwrap();
    };
    flip();
    assert!(matches!(store.read(digest), Err(ImageError::Damaged { .. })));
    assert!(matches!(store.read(digest), Err(ImageError::Missing(_))), "the damaged file is gone");
    put(&store, &bytes);
    flip();
    let next = ImageStore::open(dir.path(), 0).unwrap();
    assert!(matches!(next.read(digest), Err(ImageError::Damaged { .. })));
}

#[test]
fn one_writer_at_a_time() {
    let (_dir, store) = store();
    let (bytes, digest) = blob(10);
    let first = writing(&store, digest, bytes.len());
    assert!(matches!(store.begin(digest, 10), Err(ImageError::Busy(_))));
    drop(first);
    assert_eq!(writing(&store, digest, bytes.len()).offset(), 0);
}

#[test]
fn a_blob_that_was_used_is_not_idle() {
    let (dir, store) = store();
    let (bytes, digest) = blob(10);
    put(&store, &bytes);
    let hour = Duration::from_secs(3600);
    assert!(!store.remove(digest, hour).unwrap(), "written just now");
    let old = SystemTime::now() - 2 * hour;
    File::options().read(true).open(dir.path().join(format!("images/{digest}"))).unwrap().set_modified(old).unwrap();
    let store = ImageStore::open(dir.path(), 0).unwrap();
    assert!(store.list().unwrap()[0].idle >= hour);
    store.read(digest).unwrap();
    assert!(!store.remove(digest, hour).unwrap(), "read just now");
    let store = ImageStore::open(dir.path(), 0).unwrap();
    assert!(store.remove(digest, hour).unwrap());
    assert_eq!(store.list().unwrap(), []);
    assert!(store.remove(digest, hour).unwrap(), "what is gone is gone");
}

#[test]
fn leftovers_are_swept_but_not_what_is_being_written() {
    let (dir, store) = store();
    let (_, digest) = blob(10);
    let (_, other) = blob(11);
    let incoming = writing(&store, digest, 10);
    drop(writing(&store, other, 11));
    store.sweep(Duration::ZERO).unwrap();
    let names: Vec<_> = fs::read_dir(dir.path().join("images")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, [format!("{digest}.partial").as_str()]);
    drop(incoming);
}

#[test]
fn a_file_of_this_host_is_taken_in_whole() {
    let (dir, store) = store();
    let (bytes, digest) = blob(700_000);
    let file = dir.path().join("made-here");
    for _ in 0..2 {
        fs::write(&file, &bytes).unwrap();
        let held = store.adopt(&file).unwrap();
        assert_eq!((held.digest, held.size_bytes), (digest, 700_000));
        assert!(!file.exists(), "it was moved");
        assert_eq!(fs::read(store.verified(digest).unwrap()).unwrap(), bytes);
    }
    assert_eq!(store.list().unwrap().len(), 1);
    assert!(matches!(store.adopt(&file), Err(ImageError::Io { .. })), "there is none any more");
    let other = tempfile::Builder::new().tempdir_in("/dev/shm").unwrap();
    let file = other.path().join("made-elsewhere");
    fs::write(&file, b"on another file system, where there is one").unwrap();
    let held = store.adopt(&file).unwrap();
    assert!(!file.exists() && store.verified(held.digest).is_ok());
}

#[test]
fn a_file_that_another_transfer_writes_is_left_alone() {
    let (dir, store) = store();
    let (bytes, digest) = blob(1000);
    let _writer = writing(&store, digest, 1000);
    let file = dir.path().join("made-here");
    fs::write(&file, &bytes).unwrap();
    assert!(matches!(store.adopt(&file), Err(ImageError::Busy(_))));
    assert!(file.exists());
}

#[test]
fn the_reserve_is_kept_free() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path(), u64::MAX).unwrap();
    let (_, digest) = blob(10);
    assert!(matches!(store.begin(digest, 10), Err(ImageError::NoRoom { .. })));
}
