//! A snapshot is complete and intact, or it is not a snapshot.

use super::*;
use crate::{failure::OnFailure, state::Batch};

fn returning() -> OnFailure {
    Arc::new(|_| {})
}

fn built(data: &Path, indexes: &[u64]) -> (StateStore, SnapshotStore, Snapshot) {
    let (tables, loaded) = StateStore::open(data, returning()).unwrap();
    let store = SnapshotStore::open(&data.join("snapshots")).unwrap();
    let mut last = None;
    let mut state = loaded.state;
    for index in indexes {
        let applied = Position { term: 1, leader: 1, index: *index };
        let rows = state.drain_changes();
        tables.write(&Batch { rows, applied: Some(applied), membership: None, hash: state.hash() }).unwrap();
        last = Some(store.build(&tables).unwrap());
    }
    (tables, store, last.unwrap())
}

fn bytes_of(snapshot: &Snapshot) -> Vec<u8> {
    snapshot.chunks().flat_map(|chunk| chunk.unwrap()).collect()
}

fn names(data: &Path) -> Vec<String> {
    directory::entries(&data.join("snapshots")).unwrap().into_iter().map(|(name, _)| name).collect()
}

#[test]
fn only_the_newest_is_kept_and_a_restart_finds_it() {
    let data = tempfile::tempdir().unwrap();
    let (tables, store, snapshot) = built(data.path(), &[3, 7]);
    assert_eq!(names(data.path()).len(), 1);
    let manifest = snapshot.manifest().clone();
    assert_eq!(manifest.applied.map(|p| p.index), Some(7));
    drop((tables, store, snapshot));
    fs::create_dir(data.path().join("snapshots/building-99")).unwrap();
    fs::create_dir(data.path().join("snapshots/snapshot-50-98")).unwrap();
    let store = SnapshotStore::open(&data.path().join("snapshots")).unwrap();
    assert_eq!(store.current().unwrap().manifest(), &manifest);
    assert_eq!(names(data.path()).len(), 1, "leftovers are removed: {:?}", names(data.path()));
}

#[test]
fn one_that_is_being_read_outlives_its_successor() {
    let data = tempfile::tempdir().unwrap();
    let (tables, store, old) = built(data.path(), &[3]);
    let applied = Some(Position { term: 1, leader: 1, index: 4 });
    tables.write(&Batch { applied, hash: old.manifest().hash, ..Batch::default() }).unwrap();
    let new = store.build(&tables).unwrap();
    assert!(!bytes_of(&old).is_empty());
    drop(old);
    assert_eq!(names(data.path()).len(), 1);
    assert_eq!(store.current().unwrap().manifest(), new.manifest());
}

#[test]
fn damage_on_the_way_is_noticed_and_leaves_nothing() {
    let data = tempfile::tempdir().unwrap();
    let (_tables, _store, snapshot) = built(&data.path().join("from"), &[3]);
    let to = data.path().join("to");
    let store = SnapshotStore::open(&to.join("snapshots")).unwrap();
    let good = bytes_of(&snapshot);

    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    let mut incoming = store.receive(snapshot.manifest().clone()).unwrap();
    let result = incoming.write(&flipped).and_then(|()| incoming.finish().map(|_| ()));
    assert!(matches!(result, Err(StorageError::BadSnapshot(_))), "{result:?}");

    let mut incoming = store.receive(snapshot.manifest().clone()).unwrap();
    incoming.write(&good[..good.len() - 1]).unwrap();
    assert!(matches!(incoming.finish(), Err(StorageError::BadSnapshot(_))));

    let mut incoming = store.receive(snapshot.manifest().clone()).unwrap();
    incoming.write(&good).unwrap();
    assert!(matches!(incoming.write(b"x"), Err(StorageError::BadSnapshot(_))));
    drop(incoming);
    assert_eq!(names(&to), Vec::<String>::new());
}

#[test]
fn a_manifest_may_name_only_files_of_a_snapshot() {
    let data = tempfile::tempdir().unwrap();
    let store = SnapshotStore::open(&data.path().join("snapshots")).unwrap();
    for name in ["../x.sst", "/etc/x.sst", "a/b.sst", "LOCK", "", "x.sst\0"] {
        let file = FileEntry { name: name.into(), size: 1, digest: [0; 32] };
        let manifest = Manifest { applied: None, membership: Membership::default(), hash: [0; 16], files: vec![file] };
        assert!(matches!(store.receive(manifest), Err(StorageError::BadSnapshot(_))), "{name:?}");
    }
}

#[test]
fn one_that_does_not_fit_is_refused_before_its_first_byte() {
    let data = tempfile::tempdir().unwrap();
    let (_tables, store, snapshot) = built(data.path(), &[3]);
    let mut manifest = snapshot.manifest().clone();
    manifest.files[0].size = u64::MAX / 2;
    let refused = store.receive(manifest).err().expect("no disk has room for it").to_string();
    assert!(refused.contains("are free"), "{refused}");
    assert_eq!(names(data.path()).len(), 1, "nothing was begun");
}

#[test]
fn what_does_not_belong_there_costs_no_snapshot() {
    let data = tempfile::tempdir().unwrap();
    let (tables, store, snapshot) = built(data.path(), &[3]);
    let manifest = snapshot.manifest().clone();
    drop((tables, store, snapshot));
    let stray = data.path().join("snapshots/zzz");
    fs::write(&stray, "not a directory").unwrap();
    assert!(SnapshotStore::open(&data.path().join("snapshots")).is_err());
    fs::remove_file(stray).unwrap();
    let store = SnapshotStore::open(&data.path().join("snapshots")).unwrap();
    assert_eq!(store.current().unwrap().manifest(), &manifest);
}
