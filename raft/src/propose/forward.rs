//! On a follower: what is proposed while calls to the leader are on their way shares the next one.

use std::sync::Arc;

use model::ControllerId;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, timeout_at},
};

use super::{Attempt, IN_FLIGHT_UNITS, Proposal};
use crate::{
    core::{Core, SharedCore},
    error::ProposeError,
    peer::CallError,
    wire::{Answer, Call},
};

/// Proposals in one call to the leader.
const FORWARD_BATCH: usize = 256;
/// Bytes in one call to the leader, about: below what a message may have.
const FORWARD_BYTES: usize = 4 << 20;
/// Calls to the leader at a time: one in the batch that the leader has under way, one that waits there for the next.
const FORWARD_CALLS: usize = 2;
/// Queued for forwarding; more than can be in flight would never be used.
pub const FORWARD_QUEUE: usize = IN_FLIGHT_UNITS;

/// A proposal on its way to the leader.
pub struct Forward {
    leader: ControllerId,
    proposal: Proposal,
    bytes: usize,
    deadline: Instant,
    answer: oneshot::Sender<Attempt>,
}

impl Core {
    pub(super) async fn forward(
        &self,
        leader: ControllerId,
        proposal: Proposal,
        bytes: usize,
        deadline: Instant,
    ) -> Attempt {
        let (answer, outcome) = oneshot::channel();
        let forward = Forward { leader, proposal, bytes, deadline, answer };
        match timeout_at(deadline, self.forwards.send(forward)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Attempt::Refused(ProposeError::Stopped),
            Err(_) => return Attempt::NotProposed,
        }
        match timeout_at(deadline, outcome).await {
            Ok(Ok(attempt)) => attempt,
            Ok(Err(_)) | Err(_) => Attempt::Unknown,
        }
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

async fn send_batch(core: SharedCore, mut batch: Vec<Forward>, _call: OwnedSemaphorePermit) {
    // Who does not wait any more has called it unknown; it need not be done.
    batch.retain(|forward| !forward.answer.is_closed());
    let Some(leader) = batch.first().map(|forward| forward.leader) else { return };
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
