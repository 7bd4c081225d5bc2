//! Proposing: bounded, forwarded to the leader, stamped by it, answered when it is applied.
//!
//! ```text
//! propose ─ permit ─┬─ this replica leads: queue ─► one append for all that queued ─► Committed
//!                   └─ another leads: queue ─► one call for all that queued ─► there: the same
//! ```
//! Batches form by waiting for a turn, never for a clock: `append` has what happens on the leader, `forward` on the way
//! there.
//!
//! An error says exactly what is known: `NoQuorum`, `NotLeader` and `Overloaded` mean that nothing was proposed.
//! A request with an id is tried again here while its proposer waits, because the state machine knows it again.

use std::time::Duration;

use futures::future::join_all;
use model::{Actor, Applied, Command, Entry, OperatorCommand, Timestamp, command::Request};
use openraft::errors::ClientWriteError;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::Instant,
};

use crate::{
    core::Core,
    dialect::{EncodedEntry, LeaderId, Outcome, TypeConfig},
    error::ProposeError,
    wire,
};

pub mod append;
pub mod forward;

/// How long a proposer waits before the outcome is called unknown: several elections.
pub const PROPOSE_DEADLINE: Duration = Duration::from_secs(5);
/// A machine's user data is bounded far below this by the model; a larger entry would stall replication.
pub const MAX_ENTRY_BYTES: usize = 1 << 20;
/// Memory that proposals on their way may take, in units of [`UNIT_BYTES`]: 64 MiB, or 8,192 small ones, of people, and
/// the same of the cloud itself.
pub const IN_FLIGHT_UNITS: usize = 2 * UNITS_EACH;
const UNITS_EACH: usize = 8192;
const UNIT_BYTES: usize = 8 << 10;

/// What somebody wants in the log. The leader adds the time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    pub request: Option<Request>,
    pub actor: Actor,
    pub command: Command,
}

/// Room for what is on its way. People have their own: however much they ask for, hosts report and planners plan.
pub struct InFlight {
    people: Semaphore,
    cloud: Semaphore,
}

impl Proposal {
    /// An entry as it will stand in the log.
    fn stamped(self, at: Timestamp) -> EncodedEntry {
        let Self { request, actor, command } = self;
        EncodedEntry(wire::to_bytes(&Entry { at, request, actor, command }).into())
    }
}

/// It is in the log for ever, and this is what it came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    pub index: u64,
    pub applied: Applied,
}

/// What one attempt came to.
pub enum Attempt {
    Committed(Committed),
    /// Surely without effect; worth another attempt.
    NotProposed,
    /// May have had an effect.
    Unknown,
    /// Surely without effect; another attempt would end the same.
    Refused(ProposeError),
}

impl InFlight {
    pub fn new() -> Self {
        Self { people: Semaphore::new(UNITS_EACH), cloud: Semaphore::new(UNITS_EACH) }
    }

    /// At once or not at all: who is refused can come again, and knows that nothing was proposed.
    fn permit(&self, actor: &Actor, bytes: usize) -> Result<SemaphorePermit<'_>, ProposeError> {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).max(1);
        let room = match actor {
            Actor::User { .. } => &self.people,
            Actor::Node(_) | Actor::System => &self.cloud,
        };
        room.try_acquire_many(units).map_err(|_| ProposeError::Overloaded)
    }
}

impl Core {
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose(&self, proposal: Proposal) -> Result<Committed, ProposeError> {
        let bytes = checked_size(&proposal)?;
        let _permit = self.in_flight.permit(&proposal.actor, bytes)?;
        let deadline = Instant::now() + PROPOSE_DEADLINE;
        let mut unclear = false;
        loop {
            if self.stopping() {
                return Err(if unclear { ProposeError::Unknown } else { ProposeError::Stopped });
            }
            let seen = self.leadership();
            let attempt = match seen.leader {
                None => Attempt::NotProposed,
                Some(leader) if leader.0 == self.id => self.append(proposal.clone(), deadline).await,
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
            // Before the next attempt and not after it: one that begins too late would be broken off, and unclear.
            self.pause(seen).await;
            if Instant::now() >= deadline {
                return Err(if unclear { ProposeError::Unknown } else { ProposeError::NoQuorum });
            }
        }
    }

    /// Only as the leader of `term`: alone, because it has a condition of its own, and planners are few.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose_as_leader(&self, term: u64, command: Command) -> Result<Committed, ProposeError> {
        let proposal = Proposal { request: None, actor: Actor::System, command };
        let _permit = self.in_flight.permit(&proposal.actor, checked_size(&proposal)?)?;
        self.may_lead(&proposal.command)?;
        let leader = LeaderId { term, node_id: self.id };
        let (responder, answer) = openraft::impls::ProgressResponder::complete_only();
        let write = self.raft.write(proposal.stamped(self.now())).responder(responder).with_leader(leader);
        if write.await.is_err() {
            return Err(ProposeError::Stopped);
        }
        let attempt = match tokio::time::timeout(PROPOSE_DEADLINE, answer).await {
            Ok(Ok(Ok(response))) => Attempt::from_log(response.log_id.index, response.data),
            Ok(Ok(Err(error))) => Attempt::from_refusal(&error),
            Ok(Err(_)) | Err(_) => Attempt::Unknown,
        };
        attempt.outcome()
    }

    /// Answers a follower's call: as the leader or not at all, so that a call never goes round in circles.
    pub async fn propose_for_follower(
        &self,
        proposals: Vec<Proposal>,
        wait: Duration,
    ) -> Vec<Result<Committed, ProposeError>> {
        let deadline = Instant::now() + wait.min(PROPOSE_DEADLINE);
        join_all(proposals.into_iter().map(|proposal| async move {
            let _permit = self.in_flight.permit(&proposal.actor, checked_size(&proposal)?)?;
            self.append(proposal, deadline).await.outcome()
        }))
        .await
    }

    /// Refuses what some member might not understand, and everything when this leader's contact with a majority is over:
    /// nothing that is appended now can be answered, so it is said at once.
    pub(super) fn may_lead(&self, command: &Command) -> Result<(), ProposeError> {
        let at = self.machine.level();
        match command {
            Command::Operator(OperatorCommand::RaiseLevel { level }) if *level > self.knows => {
                Err(ProposeError::Level { needs: *level, at: self.knows })
            }
            other if other.level() > at => Err(ProposeError::Level { needs: other.level(), at }),
            _ if !self.has_quorum() => Err(ProposeError::NoQuorum),
            _ => Ok(()),
        }
    }
}

impl Attempt {
    pub fn from_log(index: u64, outcome: Outcome) -> Self {
        match outcome.0 {
            Some(applied) => Self::Committed(Committed { index, applied }),
            None => Self::Unknown,
        }
    }

    /// openraft's promise: that one forwards to the leader is said only before the entry was appended.
    pub fn from_refusal(error: &ClientWriteError<TypeConfig>) -> Self {
        if matches!(error, ClientWriteError::ForwardToLeader(_)) { Self::NotProposed } else { Self::Unknown }
    }

    pub fn from_leader(result: Result<Committed, ProposeError>) -> Self {
        match result {
            Ok(committed) => Self::Committed(committed),
            Err(ProposeError::NotLeader | ProposeError::Stopped) => Self::NotProposed,
            Err(ProposeError::Unknown) => Self::Unknown,
            Err(
                error @ (ProposeError::NoQuorum
                | ProposeError::Overloaded
                | ProposeError::TooLarge { .. }
                | ProposeError::Level { .. }),
            ) => Self::Refused(error),
        }
    }

    /// For a caller that does not try again.
    fn outcome(self) -> Result<Committed, ProposeError> {
        match self {
            Self::Committed(committed) => Ok(committed),
            Self::NotProposed => Err(ProposeError::NotLeader),
            Self::Unknown => Err(ProposeError::Unknown),
            Self::Refused(error) => Err(error),
        }
    }
}

fn checked_size(proposal: &Proposal) -> Result<usize, ProposeError> {
    let bytes = wire::size(proposal);
    if bytes > MAX_ENTRY_BYTES { Err(ProposeError::TooLarge { bytes, limit: MAX_ENTRY_BYTES }) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use model::{NodeId, Role};

    use super::*;

    #[test]
    fn what_people_ask_for_leaves_room_for_the_cloud_itself() {
        let in_flight = InFlight::new();
        let ann = Actor::User { name: "ann".into(), role: Role::Operator };
        let all: Vec<_> = (0..UNITS_EACH).map(|_| in_flight.permit(&ann, 100).unwrap()).collect();
        assert_eq!(in_flight.permit(&ann, 100).err(), Some(ProposeError::Overloaded));
        for actor in [Actor::System, Actor::Node(NodeId(1))] {
            assert!(in_flight.permit(&actor, MAX_ENTRY_BYTES).is_ok(), "{actor:?}");
        }
        drop(all);
        let _large = in_flight.permit(&Actor::System, UNITS_EACH * UNIT_BYTES).unwrap();
        assert_eq!(in_flight.permit(&Actor::Node(NodeId(1)), 1).err(), Some(ProposeError::Overloaded));
        assert!(in_flight.permit(&ann, MAX_ENTRY_BYTES).is_ok(), "nor the other way round");
    }
}
