//! The Raft log: entries by index, the vote, how far it is committed and how far it is purged.
//!
//! One writer thread makes things durable: while it syncs, everything that is written meanwhile queues up and shares
//! the next sync. So a sync costs once per batch, whatever the load.
//!
//! ```text
//! append: encode, write (readable now) ──► queue ──► writer: one flush_wal(sync) for all that queued ──► callbacks
//! ```
//! Not synced on their own: `committed` (a hint for the restart) and a purge (the order within RocksDB's write-ahead log
//! puts it before whatever is synced next).

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use rocksdb::{ColumnFamily, DB, Direction, IteratorMode, ReadOptions, WriteBatch};

use crate::{
    database::{self, LOG_ENTRIES, LOG_META},
    directory,
    failure::{OnFailure, StorageError},
    record::{self, Position, Record, Vote},
    state::Flushed,
    wal,
};

const VOTE: &[u8] = b"vote";
const COMMITTED: &[u8] = b"committed";
const PURGED: &[u8] = b"purged";

/// Called once, on the writer's thread, when what it belongs to is durable or has failed.
pub type Done = Box<dyn FnOnce(Result<(), StorageError>) + Send>;

/// Cheap to clone; the directory is released when the last clone is dropped.
#[derive(Clone)]
pub struct Log {
    inner: Arc<Inner>,
}

struct Inner {
    table: Table,
    on_failure: OnFailure,
    /// `None` only while it is being dropped.
    queue: Option<mpsc::Sender<Done>>,
    writer: Option<JoinHandle<()>>,
}

/// The database and how its parts are read; shared with the writer thread and with the offline tool.
#[derive(Clone)]
pub(crate) struct Table {
    db: Arc<DB>,
    path: PathBuf,
}

impl Log {
    /// Opens or creates the log in `path` and reads every entry once, so that damage is found before this controller
    /// votes or acknowledges anything. The log is bounded by the snapshot interval, so this is quick.
    ///
    /// # Errors
    /// When the disk fails, or when anything but a torn tail is damaged or missing.
    pub fn open(path: &Path, on_failure: OnFailure) -> Result<Self, StorageError> {
        directory::create_directory(path)?;
        wal::check(path)?;
        let table = Table { db: Arc::new(database::open_log(path)?), path: path.into() };
        table.verify()?;
        let (queue, jobs) = mpsc::channel::<Done>();
        let (writer_table, writer_failure) = (table.clone(), on_failure.clone());
        let writer = std::thread::Builder::new()
            .name("raft-log".into())
            .spawn(move || write_loop(&writer_table, &jobs, &writer_failure))
            .map_err(StorageError::file(path))?;
        Ok(Self { inner: Arc::new(Inner { table, on_failure, queue: Some(queue), writer: Some(writer) }) })
    }

    /// Writes encoded records, which are readable when this returns and durable when `done` is called.
    ///
    /// # Errors
    /// When the disk fails, after the failure handler was called; `done` is then not called.
    pub fn append(&self, records: impl IntoIterator<Item = (u64, Vec<u8>)>, done: Done) -> Result<(), StorageError> {
        let mut batch = WriteBatch::default();
        let entries = self.inner.table.entries();
        for (index, bytes) in records {
            batch.put_cf(entries, index.to_be_bytes(), bytes);
        }
        self.write(batch)?;
        self.sync(done)
    }

    /// The entries of `range` in order, up to about `max_bytes` but at least one if there is one.
    ///
    /// # Errors
    /// When an entry is damaged or missing between others, or the disk fails.
    pub fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Record>, StorageError> {
        self.guard(self.inner.table.read(range, max_bytes))
    }

    /// The position of the last entry, or of the last purged one when none is left.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn last(&self) -> Result<Option<Position>, StorageError> {
        self.guard(self.inner.table.last())
    }

    /// The position of the last entry that was purged.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn purged(&self) -> Result<Option<Position>, StorageError> {
        self.guard(self.inner.table.meta(PURGED))
    }

    /// # Errors
    /// As [`Self::read`].
    pub fn vote(&self) -> Result<Option<Vote>, StorageError> {
        self.guard(self.inner.table.meta(VOTE))
    }

    /// Records the vote; durable when `done` is called.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn save_vote(&self, vote: &Vote, done: Done) -> Result<(), StorageError> {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.inner.table.meta_family(), VOTE, record::to_bytes(vote));
        self.write(batch)?;
        self.sync(done)
    }

    /// # Errors
    /// As [`Self::read`].
    pub fn committed(&self) -> Result<Option<Position>, StorageError> {
        self.guard(self.inner.table.meta(COMMITTED))
    }

    /// Remembers how far the log was known to be committed, for a quicker restart. Not synced.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn save_committed(&self, committed: Option<Position>) -> Result<(), StorageError> {
        let mut batch = WriteBatch::default();
        match committed {
            Some(position) => batch.put_cf(self.inner.table.meta_family(), COMMITTED, record::to_bytes(&position)),
            None => batch.delete_cf(self.inner.table.meta_family(), COMMITTED),
        }
        self.write(batch)
    }

    /// Deletes the entries from `index` on: they conflict with what the leader has. Durable when `done` is called, which
    /// is to be waited for: what takes their place may be in the state tables on disk before it is in the log's.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn truncate_from(&self, index: u64, done: Done) -> Result<(), StorageError> {
        let mut batch = WriteBatch::default();
        batch.delete_range_cf(self.inner.table.entries(), index.to_be_bytes(), u64::MAX.to_be_bytes());
        self.write(batch)?;
        self.sync(done)
    }

    /// Deletes the entries up to `upto`, which the state tables have on disk: `flushed` is the proof of it.
    ///
    /// # Errors
    /// When the proof does not reach that far (nothing is deleted), or the disk fails.
    pub fn purge(&self, upto: Position, flushed: Flushed) -> Result<(), StorageError> {
        if flushed.index() < upto.index {
            return Err(StorageError::PurgeTooFar { wanted: upto.index, flushed: flushed.index() });
        }
        let mut batch = WriteBatch::default();
        batch.put_cf(self.inner.table.meta_family(), PURGED, record::to_bytes(&upto));
        let end = upto.index.saturating_add(1);
        batch.delete_range_cf(self.inner.table.entries(), 0u64.to_be_bytes(), end.to_be_bytes());
        self.write(batch)
    }

    fn write(&self, batch: WriteBatch) -> Result<(), StorageError> {
        self.guard(self.inner.table.db.write(batch).map_err(StorageError::database(&self.inner.table.path)))
    }

    fn sync(&self, done: Done) -> Result<(), StorageError> {
        let queue = self.inner.queue.as_ref().ok_or(StorageError::Stopped)?;
        queue.send(done).map_err(|_| StorageError::Stopped)
    }

    fn guard<T>(&self, result: Result<T, StorageError>) -> Result<T, StorageError> {
        result.inspect_err(|error| (self.inner.on_failure)(error))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(writer) = self.writer.take()
            && writer.thread().id() != std::thread::current().id()
            && writer.join().is_err()
        {
            tracing::error!("the log's writer thread panicked");
        }
    }
}

impl Table {
    pub(crate) fn open_read_only(path: &Path) -> Result<Self, StorageError> {
        Ok(Self { db: Arc::new(database::open_log_read_only(path)?), path: path.into() })
    }

    pub(crate) fn vote(&self) -> Result<Option<Vote>, StorageError> {
        self.meta(VOTE)
    }

    pub(crate) fn committed(&self) -> Result<Option<Position>, StorageError> {
        self.meta(COMMITTED)
    }

    pub(crate) fn purged(&self) -> Result<Option<Position>, StorageError> {
        self.meta(PURGED)
    }

    pub(crate) fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Record>, StorageError> {
        let mut records: Vec<Record> = Vec::new();
        let mut bytes = 0;
        for item in self.scan(range) {
            let (record, size) = item?;
            if bytes + size > max_bytes && !records.is_empty() {
                break;
            }
            bytes += size;
            records.push(record);
        }
        Ok(records)
    }

    /// Every entry of `range` with its size, refusing damage and holes. Starts at the first that exists.
    pub(crate) fn scan(&self, range: Range<u64>) -> impl Iterator<Item = Result<(Record, usize), StorageError>> + '_ {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(range.end.to_be_bytes().to_vec());
        let from = range.start.to_be_bytes();
        let rows = self.db.iterator_cf_opt(self.entries(), options, IteratorMode::From(&from, Direction::Forward));
        let mut expected = None;
        rows.map(move |row| {
            let (key, value) = row.map_err(StorageError::database(&self.path))?;
            let index = index_of(&key)?;
            if let Some(expected) = expected.replace(index + 1)
                && expected != index
            {
                return Err(StorageError::Hole(expected));
            }
            let record = record::decode(index, &value).map_err(|reason| StorageError::BadRecord { index, reason })?;
            Ok((record, value.len()))
        })
    }

    /// Reads everything once: each entry intact, none missing, the first one right after what was purged.
    pub(crate) fn verify(&self) -> Result<(), StorageError> {
        self.vote()?;
        self.committed()?;
        let mut next = self.purged()?.map(|p| p.index + 1);
        for item in self.scan(0..u64::MAX) {
            let index = item?.0.position.index;
            match next {
                Some(expected) if expected != index => return Err(StorageError::Hole(expected)),
                // Nothing was ever purged: the log starts with the entry that founded the quorum.
                None if index != 0 => return Err(StorageError::Hole(0)),
                _ => next = Some(index + 1),
            }
        }
        Ok(())
    }

    pub(crate) fn last(&self) -> Result<Option<Position>, StorageError> {
        match self.db.iterator_cf(self.entries(), IteratorMode::End).next() {
            None => self.purged(),
            Some(row) => {
                let (key, value) = row.map_err(StorageError::database(&self.path))?;
                let index = index_of(&key)?;
                let record =
                    record::decode(index, &value).map_err(|reason| StorageError::BadRecord { index, reason })?;
                Ok(Some(record.position))
            }
        }
    }

    fn meta<T: serde::de::DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StorageError> {
        let value = self.db.get_pinned_cf(self.meta_family(), key).map_err(StorageError::database(&self.path))?;
        let damaged = || StorageError::damaged(format!("the log's '{}'", String::from_utf8_lossy(key)));
        value.map(|bytes| record::from_bytes(&bytes).ok_or_else(damaged)).transpose()
    }

    fn entries(&self) -> &ColumnFamily {
        self.db.cf_handle(LOG_ENTRIES).expect("opened with this column family")
    }

    fn meta_family(&self) -> &ColumnFamily {
        self.db.cf_handle(LOG_META).expect("opened with this column family")
    }
}

/// Group commit. Ends when the last [`Log`] is dropped.
fn write_loop(table: &Table, jobs: &mpsc::Receiver<Done>, on_failure: &OnFailure) {
    while let Ok(first) = jobs.recv() {
        let batch: Vec<Done> = std::iter::once(first).chain(jobs.try_iter()).collect();
        match table.db.flush_wal(true) {
            Ok(()) => batch.into_iter().for_each(|done| done(Ok(()))),
            Err(error) => {
                let message = error.to_string();
                let failure = || StorageError::Database { path: table.path.clone(), message: message.clone() };
                on_failure(&failure());
                batch.into_iter().for_each(|done| done(Err(failure())));
            }
        }
    }
}

fn index_of(key: &[u8]) -> Result<u64, StorageError> {
    let bytes = key.try_into().map_err(|_| StorageError::damaged("a key of the log"))?;
    Ok(u64::from_be_bytes(bytes))
}

#[cfg(test)]
mod tests;
