//! The state tables on disk: the rows of the model's `State`, the position that they are of, the membership.
//!
//! One applied batch is one atomic write without a sync. The tables on disk are therefore of some earlier applied
//! position; the log is replayed from there, and never purged beyond it: [`Flushed`] is the only way to purge.
//!
//! `DATA/CURRENT` names the directory that counts. A received snapshot becomes a new directory beside it, is loaded
//! and checked, and only then named.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use model::{State, table::RowChange};
use rocksdb::{ColumnFamily, DB, FlushOptions, IteratorMode, WriteBatch, WriteOptions, checkpoint::Checkpoint};

use crate::{
    database::{self, STATE_META, STATE_ROWS},
    directory,
    failure::{OnFailure, StorageError},
    record::{self, Membership, Position},
    snapshot::Snapshot,
};

const APPLIED: &[u8] = b"applied";
const MEMBERSHIP: &[u8] = b"membership";
const HASH: &[u8] = b"hash";
const CURRENT: &str = "CURRENT";
const PREFIX: &str = "state-";

/// What one applied batch changed.
#[derive(Debug, Default)]
pub struct Batch {
    /// In the order of the changes: a later one of the same row counts.
    pub rows: Vec<RowChange>,
    pub applied: Option<Position>,
    /// Set when the batch changed it.
    pub membership: Option<Membership>,
    /// The hash of the state after the batch.
    pub hash: [u8; 16],
}

/// The tables, read back.
pub struct Loaded {
    pub state: State,
    pub applied: Option<Position>,
    pub membership: Membership,
}

/// Proof that the state tables have an index on disk. Only [`StateStore::flush_to`] makes one.
#[derive(Clone, Copy, Debug)]
pub struct Flushed(u64);

impl Flushed {
    pub fn index(self) -> u64 {
        self.0
    }
}

/// Cheap to clone; the directory is released when the last clone is dropped.
#[derive(Clone)]
pub struct StateStore {
    inner: Arc<Inner>,
}

struct Inner {
    data: PathBuf,
    on_failure: OnFailure,
    tables: RwLock<Arc<Tables>>,
    /// Next applied index after what is on disk for certain; 0 when nothing is.
    flushed_next: AtomicU64,
    /// Next applied index after what was written.
    written_next: AtomicU64,
    /// One flush at a time, so that what is believed flushed was written before that flush began.
    flushing: Mutex<()>,
}

/// One `state-N` directory.
pub(crate) struct Tables {
    db: DB,
    path: PathBuf,
    number: u64,
    /// Declared after `db`, because it acts after the database is closed.
    replaced: RemoveWhenReplaced,
}

/// Removes the directory of tables that an installed snapshot replaced, when nobody uses them any more: a snapshot of
/// the old ones may still be in the making.
struct RemoveWhenReplaced {
    path: PathBuf,
    replaced: AtomicBool,
}

impl Drop for RemoveWhenReplaced {
    fn drop(&mut self) {
        if self.replaced.load(Ordering::SeqCst)
            && let Err(error) = directory::remove_directory(&self.path)
        {
            tracing::warn!(%error, "old state tables could not be removed; the next start does it");
        }
    }
}

impl StateStore {
    /// Opens the tables that `DATA/CURRENT` names, or creates the first, and loads them. Leftovers of an interrupted
    /// installation are removed.
    ///
    /// # Errors
    /// When the disk fails, or when the tables are damaged or not of the hash that was stored with them.
    pub fn open(data: &Path, on_failure: OnFailure) -> Result<(Self, Loaded), StorageError> {
        directory::create_directory(data)?;
        let number = current_number(data)?;
        let number = match number {
            Some(number) => number,
            // It is written before the first tables are made, so tables without it have lost it.
            None if directory::entries(data)?.iter().any(|(name, _)| name.starts_with(PREFIX)) => {
                return Err(StorageError::damaged(format!("{CURRENT} (it is missing)")));
            }
            None => {
                write_current(data, 1)?;
                1
            }
        };
        remove_others(data, number)?;
        let tables = Tables::open(data, number)?;
        let loaded = tables.load()?;
        let next = next_index(loaded.applied);
        let inner = Inner {
            data: data.into(),
            on_failure,
            tables: RwLock::new(Arc::new(tables)),
            flushed_next: AtomicU64::new(next),
            written_next: AtomicU64::new(next),
            flushing: Mutex::new(()),
        };
        Ok((Self { inner: Arc::new(inner) }, loaded))
    }

    /// Writes what a batch changed, as a whole, without a sync.
    ///
    /// # Errors
    /// When the disk fails, after the failure handler was called.
    pub fn write(&self, batch: &Batch) -> Result<(), StorageError> {
        self.guard(self.tables().write(batch))?;
        self.inner.written_next.fetch_max(next_index(batch.applied), Ordering::SeqCst);
        Ok(())
    }

    /// Makes sure that everything up to `index` is on disk.
    ///
    /// # Errors
    /// When `index` was not written yet, or the disk fails.
    pub fn flush_to(&self, index: u64) -> Result<Flushed, StorageError> {
        if self.inner.flushed_next.load(Ordering::SeqCst) <= index {
            self.flush()?;
        }
        match self.inner.flushed_next.load(Ordering::SeqCst) {
            next if next > index => Ok(Flushed(next - 1)),
            next => Err(StorageError::PurgeTooFar { wanted: index, flushed: next.saturating_sub(1) }),
        }
    }

    /// Brings everything that was written to disk.
    ///
    /// # Errors
    /// When the disk fails, after the failure handler was called.
    pub fn flush(&self) -> Result<(), StorageError> {
        let _one_at_a_time = self.inner.flushing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let written = self.inner.written_next.load(Ordering::SeqCst);
        self.guard(self.tables().flush())?;
        self.inner.flushed_next.fetch_max(written, Ordering::SeqCst);
        Ok(())
    }

    /// Makes `path` a copy of the tables as they are now, by hard links, while they go on changing. Returns what it
    /// is of, read back from the copy itself.
    ///
    /// # Errors
    /// When the disk fails, after the failure handler was called.
    pub fn checkpoint(&self, path: &Path) -> Result<Marks, StorageError> {
        let marks = self.guard(self.tables().checkpoint(path))?;
        // It flushed the tables to link them, and the marks are read from what is on disk: a purge need not flush again.
        self.inner.flushed_next.fetch_max(next_index(marks.applied), Ordering::SeqCst);
        Ok(marks)
    }

    /// Replaces the tables by a received snapshot: a new directory, loaded and checked, then named in `DATA/CURRENT`.
    /// Until it is named a crash leaves the old tables; afterwards the new.
    ///
    /// # Errors
    /// When the snapshot does not load or the disk fails; the old tables still count then.
    pub fn install(&self, snapshot: &Snapshot) -> Result<Loaded, StorageError> {
        let number = self.tables().number + 1;
        let path = state_path(&self.inner.data, number);
        directory::remove_directory(&path)?;
        snapshot.link_into(&path)?;
        let tables = Tables::open(&self.inner.data, number)?;
        let loaded = tables.load()?;
        if loaded.applied != snapshot.manifest().applied {
            return Err(StorageError::BadSnapshot("its tables are of another position than it says".into()));
        }
        self.guard(write_current(&self.inner.data, number))?;
        let old = {
            let mut current = self.inner.tables.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            std::mem::replace(&mut *current, Arc::new(tables))
        };
        let next = next_index(loaded.applied);
        self.inner.written_next.store(next, Ordering::SeqCst);
        self.inner.flushed_next.store(next, Ordering::SeqCst);
        old.replaced.replaced.store(true, Ordering::SeqCst);
        Ok(loaded)
    }

    fn tables(&self) -> Arc<Tables> {
        self.inner.tables.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    fn guard<T>(&self, result: Result<T, StorageError>) -> Result<T, StorageError> {
        result.inspect_err(|error| (self.inner.on_failure)(error))
    }
}

/// What tables are of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marks {
    pub applied: Option<Position>,
    pub membership: Membership,
    pub hash: [u8; 16],
}

impl Tables {
    fn open(data: &Path, number: u64) -> Result<Self, StorageError> {
        let path = state_path(data, number);
        directory::create_directory(&path)?;
        Ok(Self::new(database::open_state(&path)?, path, number))
    }

    /// The tables of a stopped controller, or of a snapshot.
    pub(crate) fn open_read_only(path: &Path) -> Result<Self, StorageError> {
        Ok(Self::new(database::open_state_read_only(path)?, path.into(), 0))
    }

    fn new(db: DB, path: PathBuf, number: u64) -> Self {
        let replaced = RemoveWhenReplaced { path: path.clone(), replaced: AtomicBool::new(false) };
        Self { db, path, number, replaced }
    }

    pub(crate) fn load(&self) -> Result<Loaded, StorageError> {
        let marks = self.marks()?;
        if marks.applied.is_none() {
            return Ok(Loaded { state: State::default(), applied: None, membership: marks.membership });
        }
        // Before the rows: a newer version may have rows that cannot be read here.
        let level = self.level()?;
        if level > model::level::LATEST {
            return Err(StorageError::TooNew { level, known: model::level::LATEST });
        }
        let mut failed = None;
        let rows = self.rows().map_while(|row| row.map_err(|e| failed = Some(e)).ok());
        let state = State::load(rows).map_err(|e| StorageError::Rows(e.to_string()));
        if let Some(error) = failed {
            return Err(error);
        }
        let state = state?;
        if state.hash() != marks.hash {
            return Err(StorageError::Rows("they are not of the hash that was stored with them".into()));
        }
        Ok(Loaded { state, applied: marks.applied, membership: marks.membership })
    }

    /// The feature level of the rows.
    fn level(&self) -> Result<u32, StorageError> {
        let key = [&[model::Quorum::TABLE][..], &record::to_bytes(&0_u8)].concat();
        let row = self.db.get_pinned_cf(self.rows_family(), key).map_err(StorageError::database(&self.path))?;
        let level = row.map_or(Some(model::level::OLDEST), |row| model::Quorum::level_of(&row));
        level.ok_or_else(|| StorageError::damaged("the feature level in the state tables"))
    }

    /// Every row: table, key, value.
    pub(crate) fn rows(&self) -> impl Iterator<Item = Result<(u8, Vec<u8>, Vec<u8>), StorageError>> + '_ {
        self.db.iterator_cf(self.rows_family(), IteratorMode::Start).map(|row| {
            let (key, value) = row.map_err(StorageError::database(&self.path))?;
            let (table, key) = key.split_first().ok_or_else(|| StorageError::damaged("a key of the state tables"))?;
            Ok((*table, key.to_vec(), value.into_vec()))
        })
    }

    pub(crate) fn marks(&self) -> Result<Marks, StorageError> {
        Ok(Marks {
            applied: self.meta(APPLIED)?,
            membership: self.meta(MEMBERSHIP)?.unwrap_or_default(),
            hash: self.meta(HASH)?.unwrap_or_default(),
        })
    }

    fn write(&self, batch: &Batch) -> Result<(), StorageError> {
        let (rows, meta) = (self.rows_family(), self.meta_family());
        let mut out = WriteBatch::default();
        let mut key = Vec::new();
        for change in &batch.rows {
            key.clear();
            key.push(change.table);
            key.extend_from_slice(&change.key);
            match &change.row {
                Some(row) => out.put_cf(rows, &key, row),
                None => out.delete_cf(rows, &key),
            }
        }
        if let Some(applied) = &batch.applied {
            out.put_cf(meta, APPLIED, record::to_bytes(applied));
        }
        if let Some(membership) = &batch.membership {
            out.put_cf(meta, MEMBERSHIP, record::to_bytes(membership));
        }
        out.put_cf(meta, HASH, record::to_bytes(&batch.hash));
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        self.db.write_opt(out, &options).map_err(StorageError::database(&self.path))
    }

    fn flush(&self) -> Result<(), StorageError> {
        let mut options = FlushOptions::default();
        options.set_wait(true);
        self.db
            .flush_cfs_opt(&[&self.rows_family(), &self.meta_family()], &options)
            .map_err(StorageError::database(&self.path))
    }

    fn checkpoint(&self, path: &Path) -> Result<Marks, StorageError> {
        Checkpoint::new(&self.db)
            .and_then(|checkpoint| checkpoint.create_checkpoint(path))
            .map_err(StorageError::database(&self.path))?;
        Self::open_read_only(path)?.marks()
    }

    fn meta<T: serde::de::DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, StorageError> {
        let value = self.db.get_pinned_cf(self.meta_family(), key).map_err(StorageError::database(&self.path))?;
        let damaged = || StorageError::damaged(format!("the state tables' '{}'", String::from_utf8_lossy(key)));
        value.map(|bytes| record::from_bytes(&bytes).ok_or_else(damaged)).transpose()
    }

    fn rows_family(&self) -> &ColumnFamily {
        self.db.cf_handle(STATE_ROWS).expect("opened with this column family")
    }

    fn meta_family(&self) -> &ColumnFamily {
        self.db.cf_handle(STATE_META).expect("opened with this column family")
    }
}

/// The directory that `DATA/CURRENT` names, for reading a stopped controller.
pub(crate) fn current_path(data: &Path) -> Result<PathBuf, StorageError> {
    let number = current_number(data)?.ok_or_else(|| StorageError::damaged(format!("{CURRENT} (it is missing)")))?;
    Ok(state_path(data, number))
}

fn next_index(applied: Option<Position>) -> u64 {
    applied.map_or(0, |p| p.index + 1)
}

fn state_path(data: &Path, number: u64) -> PathBuf {
    data.join(format!("{PREFIX}{number}"))
}

fn current_number(data: &Path) -> Result<Option<u64>, StorageError> {
    let path = data.join(CURRENT);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StorageError::file(path)(error)),
    };
    let number = text.trim_end().strip_prefix(PREFIX).and_then(|n| n.parse().ok());
    number.map(Some).ok_or_else(|| StorageError::damaged(CURRENT))
}

fn write_current(data: &Path, number: u64) -> Result<(), StorageError> {
    directory::replace_file(&data.join(CURRENT), format!("{PREFIX}{number}\n").as_bytes())
}

fn remove_others(data: &Path, number: u64) -> Result<(), StorageError> {
    let keep = format!("{PREFIX}{number}");
    for (name, path) in directory::entries(data)? {
        if name.starts_with(PREFIX) && name != keep {
            directory::remove_directory(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
