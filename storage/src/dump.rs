//! Reading what a stopped controller left, for the offline tool: nothing is opened for writing, nothing is repaired.

use std::{fs::File, path::Path};

use model::{Entry, State};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};

use crate::{
    failure::StorageError,
    log::Table,
    record::{self, Membership, Payload, Position, Record, Vote, Voters},
    state::{self, Tables},
    wal,
};

const LOG: &str = "raft-log";

/// How far the log goes, without its entries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSummary {
    pub vote: Option<Vote>,
    pub committed: Option<Position>,
    pub purged: Option<Position>,
    /// Of the last entry, or of the last purged one when none is left.
    pub last: Option<Position>,
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
    /// Nobody may begin to write while it is read.
    _stopped: Stopped,
}

impl LogDump {
    /// Reads every entry once, as a start would.
    ///
    /// # Errors
    /// When the controller runs, when there is no log, or when anything but a torn tail is damaged.
    pub fn open(data: &Path) -> Result<Self, StorageError> {
        let path = data.join(LOG);
        let stopped = Stopped::hold(&path)?;
        wal::check(&path)?;
        let table = Table::open_read_only(&path)?;
        table.verify()?;
        Ok(Self { table, _stopped: stopped })
    }

    /// # Errors
    /// When it is damaged.
    pub fn summary(&self) -> Result<LogSummary, StorageError> {
        let (vote, committed) = (self.table.vote()?, self.table.committed()?);
        Ok(LogSummary { vote, committed, purged: self.table.purged()?, last: self.table.last()? })
    }

    /// Every entry from `index` on.
    pub fn slots(&self, index: u64) -> impl Iterator<Item = Result<Slot, StorageError>> + '_ {
        self.table.scan(index..u64::MAX).map(|item| decode(item?.0))
    }

    /// The tables brought forward by the log to `index`, whose entries are taken as agreed; with where they stood.
    ///
    /// # Errors
    /// When the tables are beyond it or the log ends before it, when either is damaged, or of a later version.
    pub fn state_at(&self, data: &Path, index: u64) -> Result<State, StorageError> {
        let (mut state, applied, _) = self::state(data)?;
        let next = applied.map_or(0, |position| position.index + 1);
        let last = self.table.last()?.map_or(0, |position| position.index);
        if index + 1 < next || index > last.max(next.saturating_sub(1)) {
            return Err(StorageError::NotKept { index, first: next.saturating_sub(1), last });
        }
        if self.table.purged()?.is_some_and(|purged| purged.index >= next) {
            return Err(StorageError::damaged("the state tables (they are older than the beginning of the log)"));
        }
        for slot in self.slots(next) {
            let Slot { position, content } = slot?;
            if position.index > index {
                break;
            }
            if let Content::Entry(entry) = content {
                // Refused or not, it is what every replica makes of it.
                let _ = state.apply(position.index, &entry);
            }
            state.drain_changes();
        }
        Ok(state)
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

/// A lock for readers on the file that a running controller has locked for itself: RocksDB's own, which is an `fcntl`
/// lock and so ends with the process that holds it. It changes nothing on disk; a controller that is started meanwhile
/// says that its log is in use.
struct Stopped {
    _lock: Option<File>,
}

impl Stopped {
    fn hold(log: &Path) -> Result<Self, StorageError> {
        let path = log.join("LOCK");
        let file = match File::open(&path) {
            Ok(file) => file,
            // A copy of a directory may be without it; nobody runs on it then.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self { _lock: None }),
            Err(error) => return Err(StorageError::file(path)(error)),
        };
        let whole = libc::flock {
            l_type: libc::F_RDLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        match fcntl(&file, FcntlArg::F_SETLK(&whole)) {
            Ok(_) => Ok(Self { _lock: Some(file) }),
            Err(Errno::EACCES | Errno::EAGAIN) => Err(StorageError::Running),
            Err(error) => Err(StorageError::file(path)(error.into())),
        }
    }
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
