//! What every call shares: the replica, what was heard, and how a proposal or a read becomes an answer or an error.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use api::{
    error::ApiError,
    proto::ReadAt,
    tls::{CertificateAuthority, Identity},
};
use model::{Actor, Command, ControllerId, Rejection, Reply, Request, State, Telemetry};
use nix::time::{ClockId, clock_gettime};
use raft::{Committed, Proposal, ProposeError, ReadError, Replica};
use tokio::sync::Semaphore;
use tonic::metadata::{Ascii, MetadataValue};

use crate::{bells::Bells, probe::Probes};

pub(crate) struct Core {
    pub replica: Replica,
    pub authority: CertificateAuthority,
    pub identity: Identity,
    pub ears: Mutex<Telemetry>,
    pub probes: Probes,
    pub bells: Bells,
    /// For what every host's session may have to do at the same moment: who waits for one waits behind none but sessions.
    pub turns: Semaphore,
    /// The last leader that was not this controller, and its address: ids are never given to another address.
    pub leader: Mutex<Option<(ControllerId, MetadataValue<Ascii>)>>,
}

/// How long an answer waits for this replica to apply what the quorum committed.
const CATCH_UP: Duration = Duration::from_secs(5);

/// Where a call's answer is from.
#[derive(Clone, Copy)]
pub(crate) enum Freshness {
    Linearizable,
    /// What was true at this index, or later.
    AtLeast(u64),
    Stale,
}

impl From<bool> for Freshness {
    fn from(stale: bool) -> Self {
        if stale { Self::Stale } else { Self::Linearizable }
    }
}

/// Assignments that are made at the same time: with half of the machine's threads the other half does all else.
fn turns() -> usize {
    std::thread::available_parallelism().map_or(1, |threads| threads.get().div_ceil(2))
}

impl Core {
    pub fn new(replica: Replica, authority: CertificateAuthority, identity: Identity) -> Self {
        Self {
            replica,
            authority,
            identity,
            ears: Mutex::default(),
            probes: Probes::default(),
            bells: Bells::default(),
            turns: Semaphore::new(turns()),
            leader: Mutex::default(),
        }
    }

    /// Reads the state as fresh as was asked for; the label says what it was.
    pub async fn read<T>(&self, freshness: Freshness, look: impl FnOnce(&State) -> T) -> Result<(T, ReadAt), ApiError> {
        match freshness {
            Freshness::Linearizable => self.linearize().await?,
            Freshness::AtLeast(index) => self.applied(index).await.map_err(|_| {
                ApiError::new("unavailable", format!("this controller has not come to log index {index} yet"))
            })?,
            Freshness::Stale => {}
        }
        let stale = matches!(freshness, Freshness::Stale);
        let age = if stale { self.replica.stale_age() } else { Some(Duration::ZERO) };
        let age_millis = age.map_or(u64::MAX, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        Ok(self.replica.read_indexed(|state, index| {
            (look(state), ReadAt { index, stale, age_millis, time_millis: state.now().0 })
        }))
    }

    pub async fn linearize(&self) -> Result<(), ApiError> {
        self.replica.linearize().await.map(|_| ()).map_err(read_error)
    }

    /// Makes a command from names and proposes it.
    ///
    /// `command` runs on this replica's state, which may be a little behind: what it does not find, or what the quorum
    /// then does not find, is looked for once more after a read-index round. A request that is remembered gets its
    /// first reply, even when the names in it mean nothing any more.
    pub async fn change<F>(&self, actor: &Actor, request: Request, command: F) -> Result<(u64, Reply), ApiError>
    where
        F: Fn(&State) -> Result<Command, ApiError>,
    {
        for fresh in [false, true] {
            if fresh {
                self.linearize().await?;
            }
            let (remembered, command) = self.replica.read_indexed(|state, index| {
                let seen = state
                    .requests()
                    .get(&request.id)
                    .map(|seen| (seen.body == request.body, seen.outcome.clone(), index));
                (seen, command(state))
            });
            match remembered {
                Some((true, outcome, index)) => return Ok((index, outcome?)),
                Some((false, ..)) => return Err(Rejection::RequestReused.into()),
                None => {}
            }
            let committed = match command {
                // What this replica has not applied yet may be why, or that it was done already.
                Err(_) if !fresh => continue,
                Err(error) => return Err(error),
                Ok(command) => self.propose(actor.clone(), Some(request), command).await?,
            };
            match committed.applied {
                Ok(reply) => return Ok((committed.index, reply)),
                Err(Rejection::NotFound { .. }) if !fresh => {}
                Err(rejection) => return Err(rejection.into()),
            }
        }
        Err(ApiError::internal("the second look at the state is always the last"))
    }

    pub async fn propose(
        &self,
        actor: Actor,
        request: Option<Request>,
        command: Command,
    ) -> Result<Committed, ApiError> {
        self.replica.propose(Proposal { request, actor, command }).await.map_err(propose_error)
    }

    /// Waits until this replica has applied `index`, so that an answer shows what was just changed.
    pub async fn applied(&self, index: u64) -> Result<(), ApiError> {
        let mut applied = self.replica.watch_applied();
        let caught_up = tokio::time::timeout(CATCH_UP, applied.wait_for(|at| *at >= index)).await;
        match caught_up {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(ApiError::new("unavailable", "this controller is stopping")),
            Err(_) => Err(ApiError::timeout("it is done, but this controller is too far behind to show it")),
        }
    }

    /// Where the controllers are, by the book: unlike the membership it is there from the first moment after a start.
    pub fn addresses(&self) -> Vec<String> {
        let listed = |state: &State| {
            state.controllers().values().filter(|row| !row.removed).map(|row| row.address.clone()).collect()
        };
        self.replica.read(listed)
    }

    /// The address of the leader that this controller follows, as metadata has it.
    pub fn leader_elsewhere(&self) -> Option<MetadataValue<Ascii>> {
        let leader = self.replica.leadership().leader.filter(|id| *id != self.replica.id())?;
        let mut known = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some((id, address)) if *id == leader => Some(address.clone()),
            _ => {
                let address: MetadataValue<Ascii> = self.replica.members().get(&leader)?.parse().ok()?;
                *known = Some((leader, address.clone()));
                Some(address)
            }
        }
    }

    /// What was heard, its clock set to now; the lock is held for look-ups only, never across a wait.
    pub fn hear<T>(&self, look: impl FnOnce(&mut Telemetry) -> T) -> T {
        let mut ears = self.ears.lock().unwrap_or_else(PoisonError::into_inner);
        ears.clock = boottime();
        look(&mut ears)
    }
}

/// Nanoseconds since this machine booted, sleep included: what leases and silence are counted in.
pub(crate) fn boottime() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every supported kernel has CLOCK_BOOTTIME");
    let seconds = u64::try_from(now.tv_sec()).unwrap_or(0);
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
}

/// Of a call in two steps whose first one is `done`: that nothing was changed is not true of it any more.
pub(crate) fn half_done(done: &str, error: ApiError) -> ApiError {
    if !error.is_retryable() {
        return error;
    }
    ApiError::timeout(format!(
        "{done}, but what follows from it is not confirmed ({}): asking again is safe",
        error.code
    ))
}

pub(crate) fn read_error(error: ReadError) -> ApiError {
    match error {
        ReadError::NoQuorum => ApiError::no_quorum(
            "no majority of the controllers answers, so a current answer cannot be given (try --stale)",
        ),
        ReadError::Timeout => ApiError::new("unavailable", "the quorum did not confirm the read in time"),
        ReadError::Stopped => ApiError::new("unavailable", "this controller is stopping"),
    }
}

pub(crate) fn propose_error(error: ProposeError) -> ApiError {
    match error {
        ProposeError::NoQuorum | ProposeError::NotLeader => {
            ApiError::no_quorum("no majority of the controllers answers; nothing was changed")
        }
        ProposeError::Unknown => ApiError::timeout(
            "the quorum did not confirm the change in time; it may or may not happen (repeat it with the same request id)",
        ),
        ProposeError::Overloaded => ApiError::overloaded("too many changes are under way; nothing was changed"),
        ProposeError::TooLarge { bytes, limit } => {
            ApiError::new("too-large", format!("the request has {bytes} bytes, at most {limit} are allowed"))
        }
        ProposeError::Level { needs, at } => ApiError::new(
            "level-too-low",
            format!("it needs feature level {needs}, and the cloud is at {at}: 'trefoil quorum upgrade' raises it"),
        ),
        ProposeError::Stopped => ApiError::new("unavailable", "this controller is stopping; nothing was changed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_half_done_is_not_called_undone() {
        let error = half_done("it is out", propose_error(ProposeError::NoQuorum));
        assert_eq!(error.code, "timeout");
        assert!(error.message.contains("it is out") && !error.message.contains("nothing was changed"), "{error}");
        assert_eq!(half_done("it is out", ApiError::not_found("x")).code, "not-found");
    }
}
