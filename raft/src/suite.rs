//! openraft's own suite for storage, run on ours.

use std::sync::Arc;

use openraft::{
    StorageError,
    testing::log::{StoreBuilder, Suite},
};
use storage::{
    log::Log,
    record::Position,
    snapshot::SnapshotStore,
    state::{Batch, StateStore},
};

use crate::{dialect::TypeConfig, log::LogAdapter, machine::Machine};

struct Builder;

impl StoreBuilder<TypeConfig, LogAdapter, Machine, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, LogAdapter, Machine), StorageError<TypeConfig>> {
        let directory = tempfile::tempdir().unwrap();
        let on_failure: storage::failure::OnFailure = Arc::new(|_| {});
        let log = Log::open(&directory.path().join("raft-log"), on_failure.clone()).unwrap();
        let (tables, loaded) = StateStore::open(directory.path(), on_failure.clone()).unwrap();
        let snapshots = SnapshotStore::open(&directory.path().join("snapshots")).unwrap();
        let machine = Machine::new(loaded, tables, snapshots, on_failure.clone(), model::level::LATEST).unwrap();
        // The suite purges logs that it never applied, so the log is shown tables that have everything on disk.
        let (ahead, _) = StateStore::open(&directory.path().join("ahead"), on_failure).unwrap();
        let applied = Some(Position { term: 1, leader: 1, index: 1_000_000 });
        ahead.write(&Batch { applied, ..Batch::default() }).unwrap();
        Ok((directory, LogAdapter::new(log, ahead), machine))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_keeps_the_promises_that_openraft_counts_on() {
    Suite::test_all(Builder).await.unwrap();
}
