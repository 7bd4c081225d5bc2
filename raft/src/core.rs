//! What the parts of a replica share.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use model::{ControllerId, Timestamp};
use openraft::{Instant as _, async_runtime::WatchReceiver};
use storage::failure::OnFailure;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    clock::CloudClock,
    dialect::Raft,
    error::ReadError,
    machine::Machine,
    peer::{CallError, Peers},
    propose::{InFlight, append::Append, forward::Forward},
    replica::Timing,
    status::{Fenced, Leadership},
    wire::{Answer, Call},
};

pub struct Core {
    pub id: u64,
    pub timing: Timing,
    pub epoch: u64,
    /// The highest feature level that this version knows.
    pub knows: u32,
    pub fenced: watch::Sender<Option<Fenced>>,
    pub raft: Raft,
    pub machine: Machine,
    pub peers: Peers,
    pub on_failure: OnFailure,
    pub leadership: watch::Sender<Leadership>,
    /// Who waits for the next read-index round.
    pub reads: mpsc::Sender<oneshot::Sender<Result<u64, ReadError>>>,
    /// What waits for its turn in this replica's own log.
    pub appends: mpsc::Sender<Append>,
    /// What goes to the leader.
    pub forwards: mpsc::Sender<Forward>,
    pub in_flight: InFlight,
    pub clock: CloudClock,
    /// From whom a stream of entries has broken.
    pub broken: mpsc::Sender<ControllerId>,
    /// When this replica last heard from a leader that it follows.
    pub contact: Mutex<Option<Instant>>,
    pub stopping: watch::Sender<bool>,
}

/// How often a caller looks again for a leader that it could not reach: a fraction of an election.
const PAUSE: Duration = Duration::from_millis(25);

/// A machine with too much to do may not run a process for so long.
const BUSY: Duration = Duration::from_millis(500);

/// A leader that handed over still answers what it had taken; one that died does not.
const DEPOSED_GRACE: Duration = Duration::from_millis(250);

impl Core {
    pub fn leadership(&self) -> Leadership {
        *self.leadership.borrow()
    }

    /// The cloud's time, as an entry that is made now would carry it.
    pub fn now(&self) -> Timestamp {
        self.clock.read(self.machine.now())
    }

    pub fn stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Every member and its address.
    pub fn members(&self) -> BTreeMap<u64, String> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().nodes().map(|(id, node)| (*id, node.addr.clone())).collect()
    }

    /// Calls another member at the address that the membership has for it.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(&self, id: ControllerId, call: &Call, deadline: Duration) -> Result<Answer, CallError> {
        match self.members().get(&id.0) {
            Some(address) => self.peers.call(id.0, address, call, deadline).await,
            None => Err(CallError::NotSent(tonic::Status::not_found("it is not a member"))),
        }
    }

    /// Calls the leader, but not for long after another one is known: the old one may never answer.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call_leader(
        &self,
        leader: ControllerId,
        call: &Call,
        deadline: Duration,
    ) -> Result<Answer, CallError> {
        let mut leadership = self.leadership.subscribe();
        let deposed = async {
            let another = leadership.wait_for(|now| now.leader.is_some_and(|id| id != leader)).await;
            // Without a sender this replica is gone, and so is whoever waits.
            drop(another);
            tokio::time::sleep(DEPOSED_GRACE).await;
        };
        tokio::select! {
            outcome = self.call(leader, call, deadline) => outcome,
            () = deposed => Err(CallError::Unclear(tonic::Status::aborted("another controller leads now"))),
        }
    }

    /// Waits until the leader is another one than it was in `seen`, or for a short time.
    pub async fn pause(&self, seen: Leadership) {
        let mut leadership = self.leadership.subscribe();
        let changed = leadership.wait_for(|now| (now.leader, now.term) != (seen.leader, seen.term));
        drop(tokio::time::timeout(PAUSE, changed).await);
    }

    /// As the leader: whether a majority answered lately. A leader that has just begun has it. Shorter silence is the
    /// proposer's to wait out: openraft refuses for as long, and takes proposals again by itself.
    pub fn has_quorum(&self) -> bool {
        let lately = Duration::from_millis(2 * self.timing.election_max_millis) + BUSY;
        let acknowledged = self.raft.metrics().borrow_watched().last_quorum_acked;
        acknowledged.is_none_or(|at| at.elapsed() <= lately) || self.voters().len() == 1
    }

    pub fn heard_from_leader(&self) {
        *self.contact.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    pub fn last_contact(&self) -> Option<Instant> {
        *self.contact.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub type SharedCore = Arc<Core>;
