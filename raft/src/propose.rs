//! Proposing: bounded, forwarded to the leader, stamped by it, answered when it is applied.
//!
//! ```text
//! propose ─ permit ─┬─ this replica leads ─────────────► stamp, encode once, append ─► Committed
//!                   └─ another leads: queue ─► one call for all that queued ─► there: the same
//! ```
//! An error says exactly what is known: `NoQuorum`, `NotLeader` and `Overloaded` mean that nothing was proposed.
//! A request with an id is tried again here while its proposer waits, because the state machine knows it again.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures::future::join_all;
use model::{Actor, Applied, Command, ControllerId, Entry, Timestamp, command::Request};
use openraft::errors::ClientWriteError;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc, oneshot},
    time::Instant,
};

use crate::{
    core::{Core, SharedCore},
    dialect::{EncodedEntry, LeaderId},
    error::ProposeError,
    peer::CallError,
    wire::{self, Answer, Call},
};

/// How long a proposer waits before the outcome is called unknown: several elections.
pub const PROPOSE_DEADLINE: Duration = Duration::from_secs(5);
/// A machine's user data is bounded far below this by the model; a larger entry would stall replication.
pub const MAX_ENTRY_BYTES: usize = 1 << 20;
/// Memory that proposals on their way may take, in units of [`UNIT_BYTES`]: 64 MiB, or 8,192 small ones.
pub const IN_FLIGHT_UNITS: usize = 8192;
const UNIT_BYTES: usize = 8 << 10;
/// Proposals in one call to the leader.
const FORWARD_BATCH: usize = 256;
/// Bytes in one call to the leader, about: below what a message may have.
const FORWARD_BYTES: usize = 4 << 20;
/// Calls to the leader at a time: while these are on their way, what comes queues up and shares the next.
const FORWARD_CALLS: usize = 4;
/// Queued for forwarding; more than can be in flight would never be used.
pub const FORWARD_QUEUE: usize = IN_FLIGHT_UNITS;

/// What somebody wants in the log. The leader adds the time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    pub request: Option<Request>,
    pub actor: Actor,
    pub command: Command,
}

/// It is in the log for ever, and this is what it came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    pub index: u64,
    pub applied: Applied,
}

/// A proposal on its way to the leader.
pub struct Forward {
    leader: ControllerId,
    proposal: Proposal,
    bytes: usize,
    deadline: Instant,
    answer: oneshot::Sender<Attempt>,
}

/// What one attempt came to.
enum Attempt {
    Committed(Committed),
    /// Surely without effect; worth another attempt.
    NotProposed,
    /// May have had an effect.
    Unknown,
    /// Surely without effect; another attempt would end the same.
    Refused(ProposeError),
}

impl Core {
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose(&self, proposal: Proposal) -> Result<Committed, ProposeError> {
        let bytes = checked_size(&proposal)?;
        let _permit = self.permit(bytes)?;
        let deadline = Instant::now() + PROPOSE_DEADLINE;
        let mut unclear = false;
        loop {
            if self.stopping() {
                return Err(if unclear { ProposeError::Unknown } else { ProposeError::Stopped });
            }
            let seen = self.leadership();
            let attempt = match seen.leader {
                None => Attempt::NotProposed,
                Some(leader) if leader.0 == self.id => self.write(proposal.clone(), None, deadline).await,
                Some(leader) => self.forward(leader, proposal.clone(), bytes, deadline).await,
            };
            match attempt {
                Attempt::Committed(committed) => return Ok(committed),
                Attempt::Refused(_) if unclear => return Err(ProposeError::Unknown),
                Attempt::Refused(error) => return Err(error),
                Attempt::Unknown if proposal.request.is_none() => return Err(ProposeError::Unknown),
                Attempt::Unknown => unclear = true,
                Attempt::NotProposed => {}
            }
            if Instant::now() >= deadline {
                return Err(if unclear { ProposeError::Unknown } else { ProposeError::NoQuorum });
            }
            self.pause(seen).await;
        }
    }

    /// Only as the leader of `term`.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose_as_leader(&self, term: u64, command: Command) -> Result<Committed, ProposeError> {
        let proposal = Proposal { request: None, actor: Actor::System, command };
        let _permit = self.permit(checked_size(&proposal)?)?;
        let leader = LeaderId { term, node_id: self.id };
        match self.write(proposal, Some(leader), Instant::now() + PROPOSE_DEADLINE).await {
            Attempt::Committed(committed) => Ok(committed),
            Attempt::NotProposed => Err(ProposeError::NotLeader),
            Attempt::Unknown => Err(ProposeError::Unknown),
            Attempt::Refused(error) => Err(error),
        }
    }

    /// Answers a follower's call: as the leader or not at all, so that a call never goes round in circles.
    pub async fn propose_for_follower(
        &self,
        proposals: Vec<Proposal>,
        wait: Duration,
    ) -> Vec<Result<Committed, ProposeError>> {
        let deadline = Instant::now() + wait.min(PROPOSE_DEADLINE);
        join_all(proposals.into_iter().map(|proposal| async move {
            let _permit = self.permit(checked_size(&proposal)?)?;
            match self.write(proposal, None, deadline).await {
                Attempt::Committed(committed) => Ok(committed),
                Attempt::NotProposed => Err(ProposeError::NotLeader),
                Attempt::Unknown => Err(ProposeError::Unknown),
                Attempt::Refused(error) => Err(error),
            }
        }))
        .await
    }

    /// Appends to this replica's own log, if it leads.
    async fn write(&self, proposal: Proposal, leader: Option<LeaderId>, deadline: Instant) -> Attempt {
        let Proposal { request, actor, command } = proposal;
        let entry = Entry { at: self.stamp(), request, actor, command };
        let encoded = EncodedEntry(wire::to_bytes(&entry).into());
        let (responder, outcome) = openraft::impls::ProgressResponder::complete_only();
        let mut write = self.raft.write(encoded).responder(responder);
        if let Some(leader) = leader {
            write = write.with_leader(leader);
        }
        if write.await.is_err() {
            return Attempt::Refused(ProposeError::Stopped);
        }
        match tokio::time::timeout_at(deadline, outcome).await {
            Ok(Ok(Ok(response))) => match response.data.0 {
                Some(applied) => Attempt::Committed(Committed { index: response.log_id.index, applied }),
                None => Attempt::Unknown,
            },
            // openraft's promise: this one is given only before the entry was appended.
            Ok(Ok(Err(ClientWriteError::ForwardToLeader(_)))) => Attempt::NotProposed,
            Ok(Ok(Err(_)) | Err(_)) | Err(_) => Attempt::Unknown,
        }
    }

    async fn forward(&self, leader: ControllerId, proposal: Proposal, bytes: usize, deadline: Instant) -> Attempt {
        let (answer, outcome) = oneshot::channel();
        let forward = Forward { leader, proposal, bytes, deadline, answer };
        if self.forwards.send(forward).await.is_err() {
            return Attempt::Refused(ProposeError::Stopped);
        }
        match tokio::time::timeout_at(deadline, outcome).await {
            Ok(Ok(attempt)) => attempt,
            Ok(Err(_)) | Err(_) => Attempt::Unknown,
        }
    }

    /// Never goes back while this controller runs; `apply` keeps it from going back across leaders.
    fn stamp(&self) -> Timestamp {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        Timestamp(self.stamped.fetch_max(now, Ordering::SeqCst).max(now))
    }

    fn permit(&self, bytes: usize) -> Result<SemaphorePermit<'_>, ProposeError> {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).max(1);
        self.in_flight.try_acquire_many(units).map_err(|_| ProposeError::Overloaded)
    }
}

/// Takes what queued up for the leader and sends it in as few calls as keep it busy. Runs as long as the replica.
pub async fn forward_loop(core: SharedCore, mut queue: mpsc::Receiver<Forward>) {
    let calls = Arc::new(Semaphore::new(FORWARD_CALLS));
    let mut held: Option<Forward> = None;
    loop {
        let first = match held.take() {
            Some(first) => first,
            None => match queue.recv().await {
                Some(first) => first,
                None => return,
            },
        };
        let Ok(call) = calls.clone().acquire_owned().await else { return };
        let mut bytes = first.bytes;
        let mut batch = vec![first];
        while batch.len() < FORWARD_BATCH && bytes < FORWARD_BYTES {
            match queue.try_recv() {
                Ok(next) if next.leader == batch[0].leader => {
                    bytes += next.bytes;
                    batch.push(next);
                }
                Ok(other) => {
                    held = Some(other);
                    break;
                }
                Err(_) => break,
            }
        }
        tokio::spawn(send_batch(core.clone(), batch, call));
    }
}

async fn send_batch(core: SharedCore, batch: Vec<Forward>, _call: OwnedSemaphorePermit) {
    let leader = batch[0].leader;
    let until = batch.iter().map(|forward| forward.deadline).max().unwrap_or_else(Instant::now);
    let wait = until.saturating_duration_since(Instant::now());
    let (proposals, answers): (Vec<_>, Vec<_>) = batch.into_iter().map(|f| (f.proposal, f.answer)).unzip();
    let millis = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
    let outcome = core.call_leader(leader, &Call::Propose { proposals, millis }, wait).await;
    let attempts: Vec<Attempt> = match outcome {
        Ok(Answer::Propose(results)) if results.len() == answers.len() => {
            results.into_iter().map(Attempt::from_leader).collect()
        }
        Err(CallError::NotSent(_)) => answers.iter().map(|_| Attempt::NotProposed).collect(),
        Ok(_) | Err(CallError::Unclear(_)) => answers.iter().map(|_| Attempt::Unknown).collect(),
    };
    for (answer, attempt) in answers.into_iter().zip(attempts) {
        // Whoever does not wait any more has already called it unknown.
        drop(answer.send(attempt));
    }
}

impl Attempt {
    fn from_leader(result: Result<Committed, ProposeError>) -> Self {
        match result {
            Ok(committed) => Self::Committed(committed),
            Err(ProposeError::NotLeader | ProposeError::NoQuorum | ProposeError::Stopped) => Self::NotProposed,
            Err(ProposeError::Unknown) => Self::Unknown,
            Err(error @ (ProposeError::Overloaded | ProposeError::TooLarge { .. })) => Self::Refused(error),
        }
    }
}

fn checked_size(proposal: &Proposal) -> Result<usize, ProposeError> {
    let bytes = wire::to_bytes(proposal).len();
    if bytes > MAX_ENTRY_BYTES { Err(ProposeError::TooLarge { bytes, limit: MAX_ENTRY_BYTES }) } else { Ok(bytes) }
}
