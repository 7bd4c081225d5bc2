//! The tables come back as they were flushed, and never half.

use std::collections::BTreeMap;

use model::{Actor, Command, Entry, State, TenantCommand, Timestamp};

use super::*;
use crate::{record::Voters, snapshot::SnapshotStore};

fn returning() -> OnFailure {
    Arc::new(|_| {})
}

fn at(index: u64) -> Position {
    Position { term: 1, leader: 1, index }
}

/// Applies `entries` and writes what they changed, as one batch.
fn apply(state: &mut State, store: &StateStore, indexes: std::ops::RangeInclusive<u64>) {
    let last = *indexes.end();
    for index in indexes {
        let command = TenantCommand::SetTag {
            tenant: model::TenantId(1),
            key: format!("key-{index}"),
            value: "value".repeat(20),
            expected: None,
        };
        let entry = Entry {
            at: Timestamp(1_000 + index),
            request: None,
            actor: Actor::System,
            command: Command::Tenant(command),
        };
        // Refused or not, the time moves, which is a change like any other.
        drop(state.apply(index, &entry));
    }
    let rows = state.drain_changes();
    let batch = Batch { rows, applied: Some(at(last)), membership: None, hash: state.hash() };
    store.write(&batch).unwrap();
}

#[test]
fn a_restart_loads_what_was_written() {
    let data = tempfile::tempdir().unwrap();
    let hash = {
        let (store, loaded) = StateStore::open(data.path(), returning()).unwrap();
        assert_eq!(loaded.applied, None);
        let mut state = loaded.state;
        apply(&mut state, &store, 1..=20);
        let membership = Membership {
            at: Some(at(2)),
            voters: Voters { sets: vec![[1].into()], addresses: BTreeMap::from([(1, "a:1".into())]) },
        };
        let batch =
            Batch { membership: Some(membership), applied: Some(at(21)), hash: state.hash(), ..Batch::default() };
        store.write(&batch).unwrap();
        store.flush().unwrap();
        state.hash()
    };
    let (_store, loaded) = StateStore::open(data.path(), returning()).unwrap();
    assert_eq!(loaded.applied, Some(at(21)));
    assert_eq!(loaded.membership.at, Some(at(2)));
    assert_eq!(loaded.state.hash(), hash);
}

#[test]
fn an_unflushed_batch_is_absent_as_a_whole_after_a_kill() {
    let data = tempfile::tempdir().unwrap();
    let (store, loaded) = StateStore::open(&data.path().join("running"), returning()).unwrap();
    let mut state = loaded.state;
    apply(&mut state, &store, 1..=5);
    store.flush().unwrap();
    let flushed = state.hash();
    apply(&mut state, &store, 6..=9);
    copy(&data.path().join("running"), &data.path().join("left"));
    let (_left, loaded) = StateStore::open(&data.path().join("left"), returning()).unwrap();
    assert_eq!((loaded.applied, loaded.state.hash()), (Some(at(5)), flushed));
}

#[test]
fn rows_that_are_not_of_their_hash_are_refused() {
    let data = tempfile::tempdir().unwrap();
    {
        let (store, loaded) = StateStore::open(data.path(), returning()).unwrap();
        let mut state = loaded.state;
        apply(&mut state, &store, 1..=5);
        store.write(&Batch { applied: Some(at(6)), hash: [9; 16], ..Batch::default() }).unwrap();
    }
    let opened = StateStore::open(data.path(), returning()).map(|_| ());
    assert!(matches!(opened, Err(StorageError::Rows(_))), "{opened:?}");
}

#[test]
fn an_installation_that_was_interrupted_leaves_the_old_tables() {
    let data = tempfile::tempdir().unwrap();
    let hash = {
        let (store, loaded) = StateStore::open(data.path(), returning()).unwrap();
        let mut state = loaded.state;
        apply(&mut state, &store, 1..=5);
        store.flush().unwrap();
        state.hash()
    };
    fs::create_dir(data.path().join("state-2")).unwrap();
    fs::write(data.path().join("state-2/CURRENT"), b"half").unwrap();
    let (_store, loaded) = StateStore::open(data.path(), returning()).unwrap();
    assert_eq!(loaded.state.hash(), hash);
    assert!(!data.path().join("state-2").exists());
}

#[test]
fn an_installed_snapshot_is_the_state_that_it_was_built_from() {
    let data = tempfile::tempdir().unwrap();
    let (leader, loaded) = StateStore::open(&data.path().join("leader"), returning()).unwrap();
    let snapshots = SnapshotStore::open(&data.path().join("leader/snapshots")).unwrap();
    let mut state = loaded.state;
    apply(&mut state, &leader, 1..=300);
    let snapshot = snapshots.build(&leader).unwrap();
    let hash = state.hash();
    apply(&mut state, &leader, 301..=310);

    let (follower, mut loaded) = StateStore::open(&data.path().join("follower"), returning()).unwrap();
    apply(&mut loaded.state, &follower, 1..=3);
    let received = SnapshotStore::open(&data.path().join("follower/snapshots")).unwrap();
    let mut incoming = received.receive(snapshot.manifest().clone()).unwrap();
    for chunk in snapshot.chunks() {
        // In pieces that have nothing to do with the files.
        for piece in chunk.unwrap().chunks(777) {
            incoming.write(piece).unwrap();
        }
    }
    let arrived = incoming.finish().unwrap();
    let installed = follower.install(&arrived).unwrap();
    received.adopt(&arrived);
    assert_eq!((installed.applied, installed.state.hash()), (Some(at(300)), hash));
    assert!(!data.path().join("follower/state-1").exists(), "the replaced tables are gone");

    let mut state = installed.state;
    apply(&mut state, &follower, 301..=305);
    follower.flush().unwrap();
    drop(follower);
    let (_again, loaded) = StateStore::open(&data.path().join("follower"), returning()).unwrap();
    assert_eq!((loaded.applied, loaded.state.hash()), (Some(at(305)), state.hash()));
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for (name, path) in directory::entries(from).unwrap() {
        if path.is_dir() {
            copy(&path, &to.join(name));
        } else if name != "LOCK" {
            fs::copy(path, to.join(name)).unwrap();
        }
    }
}
