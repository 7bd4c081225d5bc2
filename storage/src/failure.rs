//! What happens when the disk fails: the controller stops, loudly and at once.
//!
//! A failed write or sync is never retried. The kernel marks the pages of a failed sync clean, so that a second sync
//! succeeds without having written anything; only a restart, which reads what is really there, can be believed.

use std::{io::Write, path::PathBuf, sync::Arc};

use crate::record::BadRecord;

/// Called with the error before it is returned. The one for real use does not return.
pub type OnFailure = Arc<dyn Fn(&StorageError) + Send + Sync>;

/// Ends the process: what it acknowledged is on disk, and what is not on disk must not be acknowledged.
pub fn abort() -> OnFailure {
    Arc::new(|error| {
        tracing::error!(%error, "the disk failed; this controller stops so that it cannot acknowledge what is not stored");
        // Not `eprintln!`: where the log is on the disk that failed it would panic, and this process would go on.
        let _ = writeln!(std::io::stderr(), "storage failed: {error}; stopping");
        std::process::abort();
    })
}

/// What the world may do to stored data.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    #[error("RocksDB in {}: {message}", path.display())]
    Database { path: PathBuf, message: String },
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error(
        "log entry {index} is damaged: {reason}; this controller must come back under a new id with an empty directory"
    )]
    BadRecord { index: u64, reason: BadRecord },
    #[error("the log has no entry {0}, although it has later ones")]
    Hole(u64),
    #[error("{what} is damaged; this controller must come back under a new id with an empty directory")]
    Damaged { what: String },
    #[error("the state tables: {0}")]
    Rows(String),
    #[error("the state tables have flushed up to {flushed}, so the log may not be purged up to {wanted}")]
    PurgeTooFar { wanted: u64, flushed: u64 },
    #[error("the snapshot is refused: {0}")]
    BadSnapshot(String),
    #[error(
        "the cloud is at feature level {level} and this version of trefoil knows up to {known}: run a newer version here"
    )]
    TooNew { level: u32, known: u32 },
    #[error("the controller runs: its log is in use")]
    Running,
    #[error("the state at {index} is not kept: it can be had from {first} to {last}")]
    NotKept { index: u64, first: u64, last: u64 },
    #[error("the log's writer has stopped")]
    Stopped,
}

impl StorageError {
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
    pub(crate) fn database(path: impl Into<PathBuf>) -> impl FnOnce(rocksdb::Error) -> Self {
        let path = path.into();
        move |error| Self::Database { path, message: error.to_string() }
    }
    pub(crate) fn damaged(what: impl Into<String>) -> Self {
        Self::Damaged { what: what.into() }
    }
}
