//! Reading what a stopped controller left, for the offline tool: nothing is opened for writing, nothing is repaired.

use std::path::Path;

use model::{Entry, State};

use crate::{
    failure::StorageError,
    log::Table,
    record::{self, Membership, Payload, Position, Record, Vote, Voters},
    state::{self, Marks, Tables},
};

/// How far the log goes, without its entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSummary {
    pub vote: Option<Vote>,
    pub committed: Option<Position>,
    pub purged: Option<Position>,
}

/// One entry of the log, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    pub position: Position,
    pub content: Content,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Blank,
    Entry(Entry),
    Membership(Voters),
}

/// The log under a stopped controller's data directory.
pub struct LogDump {
    table: Table,
}

impl LogDump {
    /// # Errors
    /// When there is no log or it cannot be read. A running controller's log may be read, but is already old.
    pub fn open(data: &Path) -> Result<Self, StorageError> {
        Ok(Self { table: Table::open_read_only(&data.join("raft-log"))? })
    }

    /// # Errors
    /// When it is damaged.
    pub fn summary(&self) -> Result<LogSummary, StorageError> {
        Ok(LogSummary { vote: self.table.vote()?, committed: self.table.committed()?, purged: self.table.purged()? })
    }

    /// Every entry from `index` on. A damaged one is an `Err` and the walk goes on behind it.
    pub fn slots(&self, index: u64) -> impl Iterator<Item = Result<Slot, StorageError>> + '_ {
        self.table.scan(index..u64::MAX).map(|item| decode(item?.0))
    }
}

/// The state under a stopped controller's data directory, loaded and checked against its stored hash.
///
/// # Errors
/// When it is missing or damaged.
pub fn state(data: &Path) -> Result<(State, Option<Position>, Membership), StorageError> {
    let loaded = Tables::open_read_only(&state::current_path(data)?)?.load()?;
    Ok((loaded.state, loaded.applied, loaded.membership))
}

/// What the tables say they are of, without loading them.
///
/// # Errors
/// When they are missing or damaged.
pub fn marks(data: &Path) -> Result<Marks, StorageError> {
    Tables::open_read_only(&state::current_path(data)?)?.marks()
}

/// The raw rows: table, key, value.
///
/// # Errors
/// When they are missing or damaged.
pub fn rows(data: &Path, mut each: impl FnMut(u8, &[u8], &[u8])) -> Result<(), StorageError> {
    let tables = Tables::open_read_only(&state::current_path(data)?)?;
    for row in tables.rows() {
        let (table, key, value) = row?;
        each(table, &key, &value);
    }
    Ok(())
}

fn decode(record: Record) -> Result<Slot, StorageError> {
    let position = record.position;
    let content = match record.payload {
        Payload::Blank => Content::Blank,
        Payload::Membership(voters) => Content::Membership(voters),
        Payload::Entry(bytes) => {
            let reason = record::BadRecord::Body;
            let entry = record::from_bytes(&bytes).ok_or(StorageError::BadRecord { index: position.index, reason })?;
            Content::Entry(entry)
        }
    };
    Ok(Slot { position, content })
}
