//! What the cloud keeps on disk. The only crate that knows RocksDB.
//!
//! A controller's data directory:
//! ```text
//! DATA/raft-log/    the Raft log: synced before it is acknowledged              [`log`]
//! DATA/state-N/     the state tables: one write per applied batch, no sync      [`state`]
//! DATA/CURRENT      which N counts; replaced by rename when a snapshot is installed
//! DATA/snapshots/   the last snapshot: hard links into the state tables         [`snapshot`]
//! ```
//! The log is the durable part. The tables lag behind it on disk by what has not been flushed; after a crash that is
//! replayed, so the log is never purged beyond what the tables have flushed ([`state::Flushed`] is the proof).
//!
//! A disk error is not retried: after a failed sync the kernel calls the pages clean ([`failure`]).
//!
//! Deliberately not here: consensus (no openraft type), what the rows mean (model), waiting (no async).

pub mod images;

#[cfg(feature = "rocksdb")]
pub mod dump;
#[cfg(feature = "rocksdb")]
pub mod failure;
#[cfg(feature = "rocksdb")]
pub mod log;
#[cfg(feature = "rocksdb")]
pub mod plant;
#[cfg(feature = "rocksdb")]
pub mod record;
#[cfg(feature = "rocksdb")]
pub mod snapshot;
#[cfg(feature = "rocksdb")]
pub mod state;

#[cfg(feature = "rocksdb")]
mod database;
#[cfg(feature = "rocksdb")]
mod directory;
#[cfg(feature = "rocksdb")]
mod wal;
