//! What a controller of this version leaves on its disk, kept as files: log, state tables and a snapshot. Every later
//! version reads them and comes to the same state. `UPDATE=1 cargo test -p storage --test golden` writes them anew, which
//! after a release means that an upgrade is broken.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc,
};

use model::State;
use storage::{
    failure,
    log::Log,
    plant::Remains,
    record::{self, Body, Membership, Position, Vote, Voters},
    snapshot::SnapshotStore,
    state::{Batch, StateStore},
};

#[path = "../../model/tests/golden/examples.rs"]
#[allow(dead_code, reason = "the golden test of the model needs more of it")]
mod examples;

const EXPECTED: &str = "EXPECTED";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/golden/controller")
}

fn at(index: usize) -> Position {
    Position { term: 1, leader: 1, index: index as u64 }
}

fn hex(hash: [u8; 16]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Half of the examples are in the tables and in a snapshot, the rest only in the log.
fn write(data: &Path) {
    let entries = examples::entries();
    let voters = Voters { sets: vec![[1].into()], addresses: [(1, "192.0.2.1:7470".into())].into() };
    let half = entries.len() / 2;
    {
        let log = Log::open(&data.join("raft-log"), failure::abort()).unwrap();
        let mut records = vec![(0, record::encode(at(0), Body::Membership(&voters)))];
        for (index, entry) in entries.iter().enumerate() {
            let bytes = postcard::to_stdvec(entry).unwrap();
            records.push((index as u64 + 1, record::encode(at(index + 1), Body::Entry(&bytes))));
        }
        let last = entries.len() + 1;
        records.push((last as u64, record::encode(at(last), Body::Blank)));
        let (done, durable) = mpsc::channel();
        log.append(records, Box::new(move |result| drop(done.send(result)))).unwrap();
        durable.recv().unwrap().unwrap();
        let (done, durable) = mpsc::channel();
        let vote = Vote { term: 1, candidate: 1, committed: true };
        log.save_vote(&vote, Box::new(move |result| drop(done.send(result)))).unwrap();
        durable.recv().unwrap().unwrap();
        let (tables, _) = StateStore::open(data, failure::abort()).unwrap();
        let mut state = State::default();
        for (index, entry) in entries.iter().take(half).enumerate() {
            let _ = state.apply(index as u64 + 1, entry);
        }
        let rows = state.drain_changes().into_iter().filter(|change| change.row.is_some()).collect();
        let membership = Some(Membership { at: Some(at(0)), voters });
        tables.write(&Batch { rows, applied: Some(at(half)), membership, hash: state.hash() }).unwrap();
        tables.flush().unwrap();
        SnapshotStore::open(&data.join("snapshots")).unwrap().build(&tables).unwrap();
        let mut whole = examples::state();
        whole.drain_changes();
        let expected = format!("tables {}\nlog {}\n", hex(state.hash()), hex(whole.hash()));
        fs::write(data.join(EXPECTED), expected).unwrap();
    }
    for folder in ["raft-log", "state-1"] {
        for entry in fs::read_dir(data.join(folder)).unwrap().flatten() {
            let name = entry.file_name().into_string().unwrap();
            // What RocksDB writes for people and for itself, and does not need.
            if name.starts_with("LOG") || name.starts_with("OPTIONS") || name == "LOCK" {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }
}

#[test]
fn what_this_version_left_on_a_disk_is_read_and_comes_to_the_same_state() {
    if std::env::var_os("UPDATE").is_some() {
        if golden().exists() {
            fs::remove_dir_all(golden()).unwrap();
        }
        // Elsewhere first: RocksDB writes its own path into some of the files.
        let place = tempfile::tempdir().unwrap();
        write(place.path());
        copy(place.path(), &golden());
    }
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("controller");
    copy(&golden(), &data);
    let expected = fs::read_to_string(data.join(EXPECTED)).unwrap();
    let expected: Vec<&str> = expected.lines().filter_map(|line| line.split_once(' ')).map(|(_, hash)| hash).collect();

    let remains = Remains::read(&data).unwrap();
    assert_eq!(hex(remains.state.hash()), expected[1], "the log, replayed on the tables");
    assert_eq!(remains.members.sets, vec![[1].into()]);
    let mut today = examples::state();
    today.drain_changes();
    assert_eq!(hex(today.hash()), expected[1], "the same entries, applied today");
    assert_eq!(remains.state.kept_index(), today.kept_index());

    let (tables, loaded) = StateStore::open(&data, failure::abort()).unwrap();
    assert_eq!(hex(loaded.state.hash()), expected[0], "the tables");
    let snapshot = SnapshotStore::open(&data.join("snapshots")).unwrap().current().expect("a snapshot is there");
    assert_eq!(hex(tables.install(&snapshot).unwrap().state.hash()), expected[0], "the snapshot, installed");
}
