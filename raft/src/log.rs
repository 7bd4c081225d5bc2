//! The Raft log as openraft wants it, on the one that storage keeps. Its last entries are kept in memory too.

use std::{
    fmt::Debug,
    io,
    ops::{Bound, Range, RangeBounds},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use openraft::{
    OptionalSend,
    storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage},
};
use storage::{
    failure::StorageError,
    log::{Done, Log},
    state::StateStore,
};
use tokio::sync::oneshot;

use crate::dialect::{self, Entry, LogId, TypeConfig, Vote};
use tail::Tail;

mod tail;

/// Read and sent to a follower at a time: well under a message's limit, and enough to fill a fast link.
const MAX_READ_BYTES: usize = 2 << 20;

/// The state tables are here because they say how far the log may be purged.
#[derive(Clone)]
pub struct LogAdapter {
    log: Log,
    tail: Arc<Mutex<Tail>>,
    tables: StateStore,
}

impl LogAdapter {
    pub fn new(log: Log, tables: StateStore) -> Self {
        Self { log, tail: Arc::default(), tables }
    }

    fn entries(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Entry>, io::Error> {
        if let Some(entries) = self.tail().read(&range, max_bytes) {
            return Ok(entries);
        }
        let records = self.log.read(range, max_bytes).map_err(io::Error::other)?;
        let damaged = || io::Error::other("a membership in the log is damaged");
        records.into_iter().map(|record| dialect::from_record(record).ok_or_else(damaged)).collect()
    }

    fn tail(&self) -> MutexGuard<'_, Tail> {
        // Nothing in there can panic halfway.
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands `write` what it has to call when it is durable, and waits for that.
    async fn durable(&self, write: impl FnOnce(&Log, Done) -> Result<(), StorageError>) -> io::Result<()> {
        let (done, synced) = oneshot::channel();
        write(&self.log, Box::new(move |result| drop(done.send(result)))).map_err(io::Error::other)?;
        let stopped = || io::Error::other("the log's writer has stopped");
        synced.await.map_err(|_| stopped())?.map_err(io::Error::other)
    }
}

impl RaftLogReader<TypeConfig> for LogAdapter {
    async fn try_get_log_entries<R>(&mut self, range: R) -> Result<Vec<Entry>, io::Error>
    where
        R: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let start = match range.start_bound() {
            Bound::Included(index) => *index,
            Bound::Excluded(index) => index.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(index) => index.saturating_add(1),
            Bound::Excluded(index) => *index,
            Bound::Unbounded => u64::MAX,
        };
        self.entries(start..end.max(start), usize::MAX)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.entries(start..end.max(start), MAX_READ_BYTES)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.log.vote().map_err(io::Error::other)?.map(dialect::from_stored_vote))
    }
}

impl RaftLogStorage<TypeConfig> for LogAdapter {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let last_purged_log_id = self.log.purged().map_err(io::Error::other)?.map(dialect::log_id);
        let last_log_id = self.log.last().map_err(io::Error::other)?.map(dialect::log_id);
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = dialect::to_stored_vote(vote);
        self.durable(|log, done| log.save_vote(&vote, done)).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.log.save_committed(committed.as_ref().map(dialect::position)).map_err(io::Error::other)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.log.committed().map_err(io::Error::other)?.map(dialect::log_id))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let done = Box::new(move |result: Result<(), _>| callback.io_completed(result.map_err(io::Error::other)));
        self.log.append(entries.iter().map(dialect::encode), done).map_err(io::Error::other)?;
        self.tail().append(entries);
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let from = last.map_or(0, |id| id.index + 1);
        self.tail().truncate_from(from);
        self.durable(|log, done| log.truncate_from(from, done)).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        self.tail().purge(upto.index);
        let (log, tables, upto) = (self.log.clone(), self.tables.clone(), dialect::position(&upto));
        // A flush may be needed, and it waits for the disk.
        let purge = move || log.purge(upto, tables.flush_to(upto.index)?);
        tokio::task::spawn_blocking(purge).await.map_err(io::Error::other)?.map_err(io::Error::other)
    }
}
