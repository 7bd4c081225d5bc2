//! On the leader: what is proposed while a batch is on its way to the disks goes into the next one.
//!
//! A batch costs the same whatever is in it: one sync on each member, one message to each follower, one write to the
//! state tables. Without turns, openraft would append each proposal as it comes, in batches of a few; with them a batch
//! is as large as the load, and a lone proposal still goes at once.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::{Instant, timeout, timeout_at},
};

use super::{Attempt, IN_FLIGHT_UNITS, PROPOSE_DEADLINE, Proposal};
use crate::{
    core::{Core, SharedCore},
    error::ProposeError,
};

/// Batches on their way: while one is synced the next one fills.
const BATCHES: usize = 1;
/// Proposals in one batch; its bytes are bounded by the permits of what is in flight.
const BATCH_ENTRIES: usize = 1024;
/// Queued for the next batch; more than can be in flight would never be used.
pub const APPEND_QUEUE: usize = IN_FLIGHT_UNITS;

/// A proposal that waits for its turn.
pub struct Append {
    proposal: Proposal,
    answer: oneshot::Sender<Attempt>,
}

impl Core {
    /// Appends to this replica's own log, if it leads.
    pub(super) async fn append(&self, proposal: Proposal, deadline: Instant) -> Attempt {
        if let Err(refusal) = self.may_lead(&proposal.command) {
            return Attempt::Refused(refusal);
        }
        let (answer, outcome) = oneshot::channel();
        match timeout_at(deadline, self.appends.send(Append { proposal, answer })).await {
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

/// One batch after the other, for whoever waits when its turn comes. Runs as long as the replica.
pub async fn append_loop(core: SharedCore, mut queue: mpsc::Receiver<Append>) {
    let turns = Arc::new(Semaphore::new(BATCHES));
    while let Some(first) = queue.recv().await {
        let turn = tokio::select! {
            turn = turns.clone().acquire_owned() => turn.ok(),
            () = quorum_lost(&core) => None,
        };
        let mut batch = vec![first];
        while batch.len() < BATCH_ENTRIES
            && let Ok(next) = queue.try_recv()
        {
            batch.push(next);
        }
        let Some(turn) = turn else {
            // The batch under way may wait for its answers in vain; these were not appended, and are told so.
            for append in batch {
                drop(append.answer.send(Attempt::Refused(ProposeError::NoQuorum)));
            }
            continue;
        };
        // Who does not wait any more has called it unknown; it need not be done.
        batch.retain(|append| !append.answer.is_closed());
        tokio::spawn(append_batch(core.clone(), batch, turn));
    }
}

/// Ends when this replica leads and its contact with a majority is over.
async fn quorum_lost(core: &Core) {
    while !core.leadership_is_mine() || core.has_quorum() {
        tokio::time::sleep(Duration::from_millis(core.timing.heartbeat_millis)).await;
    }
}

/// The turn ends with the answers, with this replica's leadership, or with everybody's patience: without a quorum the
/// answers may never come.
async fn append_batch(core: SharedCore, batch: Vec<Append>, turn: OwnedSemaphorePermit) {
    let mut leadership = core.leadership.subscribe();
    let (proposals, answers): (Vec<_>, Vec<_>) =
        batch.into_iter().map(|append| (append.proposal, append.answer)).unzip();
    let answered = async {
        // One time for the whole batch.
        let now = core.now();
        let entries: Vec<_> = proposals.into_iter().map(|proposal| proposal.stamped(now)).collect();
        let Ok(mut outcomes) = core.raft.client_write_many(entries).await else {
            for answer in answers {
                drop(answer.send(Attempt::Refused(ProposeError::Stopped)));
            }
            return;
        };
        for answer in answers {
            let attempt = match outcomes.next().await {
                Some(Ok(Ok(response))) => Attempt::from_log(response.log_id.index, response.response),
                Some(Ok(Err(error))) => Attempt::from_refusal(&error),
                Some(Err(_)) | None => Attempt::Unknown,
            };
            drop(answer.send(attempt));
        }
    };
    tokio::pin!(answered);
    let deposed = leadership.wait_for(|now| now.leader.is_none_or(|leader| leader.0 != core.id));
    tokio::select! {
        () = &mut answered => return,
        // By then nobody waits for these answers. Without a sender this replica is gone, and so is whoever waits.
        _ = timeout(PROPOSE_DEADLINE, deposed) => drop(turn),
    }
    answered.await;
}
