//! Linearizable reads by read-index, many readers to a round.
//!
//! A round asks the leader for an index that no write acknowledged before the round is beyond; the leader confirms
//! with a quorum that it still leads. Readers who come while a round is on its way share the next one, which begins
//! after they came: that is what makes sharing correct. The reader then waits until its own replica has applied so far.

use std::time::Duration;

use openraft::ReadPolicy;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    core::{Core, SharedCore},
    error::ReadError,
    wire::{Answer, Call},
};

/// How long a reader waits in all.
pub const READ_DEADLINE: Duration = Duration::from_secs(5);
/// How long a round looks for a leader that has a quorum.
const ROUND_DEADLINE: Duration = Duration::from_secs(3);
/// How long one attempt within a round may take: a healthy one takes a round trip.
const ATTEMPT_DEADLINE: Duration = Duration::from_secs(1);
/// Readers that may wait for a round; each holds little memory.
pub const READ_QUEUE: usize = 65_536;

impl Core {
    /// # Errors
    /// See [`ReadError`].
    pub async fn linearize(&self) -> Result<u64, ReadError> {
        let deadline = Instant::now() + READ_DEADLINE;
        let index = self.read_index(deadline).await?;
        let mut applied = self.machine.watch_applied();
        match tokio::time::timeout_at(deadline, applied.wait_for(|applied| *applied >= index)).await {
            Ok(Ok(_)) => Ok(index),
            Ok(Err(_)) => Err(ReadError::Stopped),
            Err(_) => Err(ReadError::Timeout),
        }
    }

    /// An index from a round that begins now or later.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read_index(&self, deadline: Instant) -> Result<u64, ReadError> {
        let (answer, index) = oneshot::channel();
        let wait = async {
            self.reads.send(answer).await.map_err(|_| ReadError::Stopped)?;
            index.await.unwrap_or(Err(ReadError::Stopped))
        };
        tokio::time::timeout_at(deadline, wait).await.unwrap_or(Err(ReadError::NoQuorum))
    }

    async fn round(&self) -> Result<u64, ReadError> {
        let deadline = Instant::now() + ROUND_DEADLINE;
        loop {
            if self.stopping() {
                return Err(ReadError::Stopped);
            }
            let seen = self.leadership();
            let attempt = match seen.leader {
                None => None,
                Some(leader) if leader.0 == self.id => self.confirm().await,
                Some(leader) => match self.call_leader(leader, &Call::ReadIndex, ATTEMPT_DEADLINE).await {
                    Ok(Answer::ReadIndex(result)) => result.ok(),
                    Ok(_) | Err(_) => None,
                },
            };
            if let Some(index) = attempt {
                return Ok(index);
            }
            if Instant::now() >= deadline {
                return Err(ReadError::NoQuorum);
            }
            self.pause(seen).await;
        }
    }

    /// As the leader: still elected, confirmed by a quorum after this was called.
    pub async fn confirm(&self) -> Option<u64> {
        let confirmed = self.raft.get_read_log_id(ReadPolicy::ReadIndex);
        let (id, _) = tokio::time::timeout(ATTEMPT_DEADLINE, confirmed).await.ok()?.ok()?;
        Some(id.index())
    }
}

/// One round after the other, for whoever waits when it begins. Runs as long as the replica.
pub async fn round_loop(core: SharedCore, mut readers: mpsc::Receiver<oneshot::Sender<Result<u64, ReadError>>>) {
    while let Some(first) = readers.recv().await {
        let mut waiting = vec![first];
        while let Ok(next) = readers.try_recv() {
            waiting.push(next);
        }
        let result = core.round().await;
        for reader in waiting {
            // Whoever does not wait any more needs no answer.
            drop(reader.send(result.clone()));
        }
    }
}
