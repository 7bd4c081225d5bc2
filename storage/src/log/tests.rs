//! Durability and damage, on real files.

use std::{fs, path::Path, sync::mpsc::channel};

use super::*;
use crate::{
    failure::StorageError,
    record::{Body, Payload},
    state::{Batch, StateStore},
};

fn returning() -> OnFailure {
    Arc::new(|_| {})
}

fn at(index: u64) -> Position {
    Position { term: 1, leader: 1, index }
}

fn append(log: &Log, range: Range<u64>) {
    let (done, synced) = channel();
    let body = |index: u64| format!("entry number {index} with some length to it").into_bytes();
    let records = range.map(|index| (index, record::encode(at(index), Body::Entry(&body(index)))));
    log.append(records, Box::new(move |result| done.send(result).unwrap())).unwrap();
    synced.recv().unwrap().unwrap();
}

/// A log of one sync per entry, copied while it is open, as a killed process or a power cut leaves it.
fn killed_with(entries: u64) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let log = Log::open(&directory.path().join("running"), returning()).unwrap();
    for index in 0..entries {
        append(&log, index..index + 1);
    }
    let left = directory.path().join("left");
    fs::create_dir(&left).unwrap();
    for (name, path) in directory::entries(&directory.path().join("running")).unwrap() {
        if name != "LOCK" {
            fs::copy(path, left.join(name)).unwrap();
        }
    }
    directory
}

fn wal(path: &Path) -> std::path::PathBuf {
    let mut files = directory::entries(path).unwrap();
    files.retain(|(name, path)| name.ends_with(".log") && fs::metadata(path).unwrap().len() > 0);
    assert_eq!(files.len(), 1, "one write-ahead log is in use");
    files.pop().unwrap().1
}

fn last_index(path: &Path) -> Option<u64> {
    Log::open(path, returning()).unwrap().last().unwrap().map(|p| p.index)
}

#[test]
fn everything_acknowledged_is_there_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let vote = Vote { term: 7, candidate: 2, committed: false };
    {
        let log = Log::open(&path, returning()).unwrap();
        append(&log, 0..10);
        let (done, synced) = channel();
        log.save_vote(&vote, Box::new(move |result| done.send(result).unwrap())).unwrap();
        synced.recv().unwrap().unwrap();
        log.save_committed(Some(at(8))).unwrap();
        let (done, synced) = channel();
        log.truncate_from(9, Box::new(move |result| done.send(result).unwrap())).unwrap();
        synced.recv().unwrap().unwrap();
        append(&log, 9..12);
    }
    let log = Log::open(&path, returning()).unwrap();
    assert_eq!(log.last().unwrap(), Some(at(11)));
    assert_eq!(log.vote().unwrap(), Some(vote));
    assert_eq!(log.committed().unwrap(), Some(at(8)));
    let records = log.read(3..5, usize::MAX).unwrap();
    assert_eq!(records.iter().map(|r| r.position.index).collect::<Vec<_>>(), [3, 4]);
    assert!(matches!(&records[0].payload, Payload::Entry(bytes) if bytes.starts_with(b"entry number 3 ")));
    assert_eq!(log.read(0..12, 1).unwrap().len(), 1, "at least one entry, however small the limit");
}

#[test]
fn a_torn_tail_is_accepted_and_loses_only_what_was_torn() {
    let directory = killed_with(50);
    let left = directory.path().join("left");
    let file = wal(&left);
    let length = fs::metadata(&file).unwrap().len();
    fs::File::options().write(true).open(&file).unwrap().set_len(length - 20).unwrap();
    assert_eq!(last_index(&left), Some(48));
}

#[test]
fn a_flipped_byte_before_the_tail_is_refused() {
    let directory = killed_with(50);
    let left = directory.path().join("left");
    let file = wal(&left);
    let good = fs::read(&file).unwrap();
    // A record takes about a hundred bytes, so these hit every part of one; RocksDB alone would accept some of them.
    for at in (good.len() / 2..good.len() / 2 + 110).step_by(5) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x40;
        fs::write(&file, bytes).unwrap();
        let refused = Log::open(&left, returning()).map(|_| ());
        assert!(matches!(refused, Err(StorageError::Damaged { .. })), "at {at}: {refused:?}");
    }
    fs::write(&file, good).unwrap();
    assert_eq!(last_index(&left), Some(49));
}

#[test]
fn an_undamaged_copy_is_complete() {
    let directory = killed_with(50);
    assert_eq!(last_index(&directory.path().join("left")), Some(49));
}

#[test]
fn a_record_that_is_not_what_was_written_is_refused_at_start_and_when_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    {
        let log = Log::open(&path, returning()).unwrap();
        append(&log, 0..5);
        let mut bytes = record::encode(at(3), Body::Entry(b"other"));
        bytes[30] ^= 1;
        log.inner.table.db.put_cf(log.inner.table.entries(), 3u64.to_be_bytes(), bytes).unwrap();
        let read = log.read(0..5, usize::MAX);
        assert!(matches!(read, Err(StorageError::BadRecord { index: 3, .. })), "{read:?}");
    }
    let opened = Log::open(&path, returning()).map(|_| ());
    assert!(matches!(opened, Err(StorageError::BadRecord { index: 3, .. })), "{opened:?}");
}

#[test]
fn a_missing_record_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    {
        let log = Log::open(&path, returning()).unwrap();
        append(&log, 0..5);
        log.inner.table.db.delete_cf(log.inner.table.entries(), 2u64.to_be_bytes()).unwrap();
    }
    let opened = Log::open(&path, returning()).map(|_| ());
    assert!(matches!(opened, Err(StorageError::Hole(2))), "{opened:?}");
}

#[test]
fn the_log_is_purged_only_as_far_as_the_tables_are_on_disk() {
    let directory = tempfile::tempdir().unwrap();
    let log = Log::open(&directory.path().join("raft-log"), returning()).unwrap();
    append(&log, 0..10);
    let (tables, _) = StateStore::open(directory.path(), returning()).unwrap();
    tables.write(&Batch { applied: Some(at(6)), ..Batch::default() }).unwrap();
    assert!(matches!(tables.flush_to(7), Err(StorageError::PurgeTooFar { wanted: 7, flushed: 6 })));
    let flushed = tables.flush_to(6).unwrap();
    assert!(matches!(log.purge(at(7), flushed), Err(StorageError::PurgeTooFar { .. })));
    log.purge(at(6), flushed).unwrap();
    assert_eq!(log.purged().unwrap(), Some(at(6)));
    assert_eq!(log.read(0..100, usize::MAX).unwrap().len(), 3);
    drop(log);
    assert_eq!(last_index(&directory.path().join("raft-log")), Some(9));
}

#[test]
fn syncs_are_shared() {
    let directory = tempfile::tempdir().unwrap();
    let log = Log::open(&directory.path().join("log"), returning()).unwrap();
    let (done, synced) = channel();
    for index in 0..200 {
        let done = done.clone();
        let record = record::encode(at(index), Body::Blank);
        log.append([(index, record)], Box::new(move |result| done.send(result.is_ok()).unwrap())).unwrap();
    }
    drop(done);
    assert_eq!(synced.iter().filter(|ok| *ok).count(), 200);
}
