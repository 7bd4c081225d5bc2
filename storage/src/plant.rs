//! Beginning a quorum from what is left of another: reading the remains of a stopped controller, and planting a state as
//! the whole of a new one.
//!
//! A planted directory holds the state at a position of its own and a log that was purged up to there, as if everything
//! before had been snapshot and forgotten. Whoever opens it is the only voter. What the remains hold stays as it is; their
//! log is opened as a controller opens it, which writes files of the database, so it must be done as the controller's user.

use std::{path::Path, sync::mpsc};

use model::State;

use crate::{
    dump,
    failure::{self, StorageError},
    log::Log,
    record::{self, BadRecord, Membership, Payload, Position, Vote, Voters},
    state::{Batch, StateStore},
};

/// Entries read at a time.
const CHUNK_BYTES: usize = 4 << 20;

/// What a controller that has stopped still knows, its whole log taken as committed.
pub struct Remains {
    pub state: State,
    /// Of the last entry of the log.
    pub last: Position,
    /// What it is known to have in common with a majority.
    pub applied: Option<Position>,
    pub members: Voters,
}

impl Remains {
    /// # Errors
    /// When the controller runs, when it was never in a quorum, or when anything of what it left is damaged.
    pub fn read(data: &Path) -> Result<Self, StorageError> {
        // It takes the lock, and reads and checks every entry.
        let log = Log::open(&data.join("raft-log"), failure::abort())?;
        let (mut state, applied, Membership { voters: mut members, .. }) = dump::state(data)?;
        let mut last = applied;
        let mut next = applied.map_or(0, |position| position.index + 1);
        let hole = |purged: Position| purged.index >= next;
        if log.purged()?.is_some_and(hole) {
            return Err(StorageError::damaged("the state tables (they are older than the beginning of the log)"));
        }
        loop {
            let records = log.read(next..u64::MAX, CHUNK_BYTES)?;
            let Some(end) = records.last().map(|record| record.position) else { break };
            for record in records {
                match record.payload {
                    Payload::Blank => {}
                    Payload::Membership(voters) => members = voters,
                    Payload::Entry(bytes) => {
                        let index = record.position.index;
                        let unreadable = || StorageError::BadRecord { index, reason: BadRecord::Body };
                        // Refused or not, it is what every replica makes of it.
                        let _ = state.apply(index, &record::from_bytes(&bytes).ok_or_else(unreadable)?);
                    }
                }
            }
            (last, next) = (Some(end), end.index + 1);
        }
        state.drain_changes();
        let never = || StorageError::damaged("the Raft log (it was never in a quorum)");
        Ok(Self { state, last: last.ok_or_else(never)?, applied, members })
    }
}

/// Makes `data` the directory of a controller that is alone in its quorum and starts from `state`, as of `start`.
///
/// # Errors
/// When there is a state or a log in it, or the disk fails.
pub fn plant(data: &Path, state: &State, start: Position, address: &str) -> Result<(), StorageError> {
    let log = Log::open(&data.join("raft-log"), failure::abort())?;
    let (tables, loaded) = StateStore::open(data, failure::abort())?;
    if loaded.applied.is_some() || log.vote()?.is_some() || log.last()?.is_some() {
        return Err(StorageError::damaged(format!("{} (it is not empty)", data.display())));
    }
    let voters = Voters { sets: vec![[start.leader].into()], addresses: [(start.leader, address.to_owned())].into() };
    tables.write(&Batch {
        rows: state.rows().collect(),
        applied: Some(start),
        membership: Some(Membership { at: Some(start), voters }),
        hash: state.hash(),
    })?;
    let flushed = tables.flush_to(start.index)?;
    log.purge(start, flushed)?;
    let (done, durable) = mpsc::channel();
    let told = Box::new(move |result| drop(done.send(result)));
    log.save_vote(&Vote { term: start.term, candidate: start.leader, committed: false }, told)?;
    durable.recv().unwrap_or(Err(StorageError::Stopped))
}
