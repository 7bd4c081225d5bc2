//! Who is in the quorum: joining, voting, leaving, handing leadership over. Done by the leader; asked of anybody.
//!
//! ```text
//!  add_learner ──► learner, catching up ──► promote ──► voter ──► remove ──► gone for ever (a new id comes back)
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use model::ControllerId;
use openraft::{
    BasicNode, ChangeMembers, Instant as _, ServerState,
    async_runtime::WatchReceiver,
    errors::{ClientWriteError, RaftError},
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{
    core::Core,
    dialect::TypeConfig,
    error::MembershipError,
    peer::CallError,
    wire::{Answer, Call},
};

/// A learner that has not caught up by then goes on catching up; the operator asks again.
const CATCH_UP_DEADLINE: Duration = Duration::from_secs(60);
/// One change is one or two entries; longer means that the quorum is gone.
const CHANGE_DEADLINE: Duration = Duration::from_secs(10);
/// Handing over takes an election without its timeouts.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(5);
/// A learner this close to the end of the log has caught up: replication brings the rest.
const CAUGHT_UP_ENTRIES: u64 = 100;
/// How often progress is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// What is to change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    AddLearner { id: ControllerId, address: String },
    Promote { id: ControllerId },
    Remove { id: ControllerId },
    Transfer { to: ControllerId },
}

impl Change {
    fn deadline(&self) -> Duration {
        match self {
            Self::AddLearner { .. } => CHANGE_DEADLINE + CATCH_UP_DEADLINE,
            Self::Promote { .. } | Self::Remove { .. } => CHANGE_DEADLINE,
            Self::Transfer { .. } => TRANSFER_DEADLINE,
        }
    }
}

impl Core {
    /// Has the leader, whoever it is, make the change.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn change(&self, change: Change) -> Result<(), MembershipError> {
        let deadline = Instant::now() + change.deadline();
        loop {
            if self.stopping() {
                return Err(MembershipError::Stopped);
            }
            let seen = self.leadership();
            let result = match seen.leader {
                None => Err(MembershipError::NoQuorum),
                // A leader that leaves hands over first, and its successor removes it.
                Some(leader) if leader.0 == self.id && change == (Change::Remove { id: leader }) => {
                    match self.hand_over().await {
                        Ok(()) => Err(MembershipError::NoQuorum),
                        Err(error) => return Err(error),
                    }
                }
                Some(leader) if leader.0 == self.id => self.change_as_leader(change.clone()).await,
                Some(leader) => {
                    let wait = deadline.saturating_duration_since(Instant::now());
                    match self.call(leader, &Call::Change(change.clone()), wait).await {
                        Ok(Answer::Change(result)) => result,
                        Err(CallError::NotSent(_)) => Err(MembershipError::NoQuorum),
                        Ok(_) | Err(CallError::Unclear(_)) => return Err(MembershipError::Unknown),
                    }
                }
            };
            if result != Err(MembershipError::NoQuorum) || Instant::now() >= deadline {
                return result;
            }
            self.pause(seen).await;
        }
    }

    /// As the leader, or `NoQuorum`.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn change_as_leader(&self, change: Change) -> Result<(), MembershipError> {
        match change {
            Change::AddLearner { id, address } => self.add_learner(id, address).await,
            Change::Promote { id } => self.promote(id).await,
            Change::Remove { id } if id.0 == self.id => {
                // The caller asks again, and then asks the successor.
                self.hand_over().await?;
                Err(MembershipError::NoQuorum)
            }
            Change::Remove { id } => self.remove(id).await,
            Change::Transfer { to } => self.transfer(to).await,
        }
    }

    async fn add_learner(&self, id: ControllerId, address: String) -> Result<(), MembershipError> {
        match self.members().get(&id.0) {
            Some(known) if *known == address => {}
            Some(known) => {
                return Err(MembershipError::Refused(format!("{id} is a member already, at {known}")));
            }
            None => {
                let nodes = BTreeMap::from([(id.0, BasicNode { addr: address })]);
                self.commit(ChangeMembers::AddNodes(nodes)).await?;
            }
        }
        self.wait_until_caught_up(id).await
    }

    async fn promote(&self, id: ControllerId) -> Result<(), MembershipError> {
        if !self.members().contains_key(&id.0) {
            return Err(MembershipError::NotFound(id));
        }
        if self.voters().contains(&id.0) {
            // It may vote in only one of two memberships, because a change is half made: its own promotion or its removal.
            self.settle_membership().await?;
            self.within_elections(|| self.membership_is_settled()).await;
            return match self.certain_voters().contains(&id.0) {
                true => Ok(()),
                false => Err(MembershipError::Refused("another change of the members is under way".into())),
            };
        }
        self.wait_until_caught_up(id).await?;
        self.commit(ChangeMembers::AddVoterIds([id.0].into())).await
    }

    async fn remove(&self, id: ControllerId) -> Result<(), MembershipError> {
        if !self.members().contains_key(&id.0) {
            return Err(MembershipError::NotFound(id));
        }
        let voters = self.voters();
        if !voters.contains(&id.0) {
            return self.commit(ChangeMembers::RemoveNodes([id.0].into())).await;
        }
        let rest: BTreeSet<u64> = voters.into_iter().filter(|voter| *voter != id.0).collect();
        let reachable = || rest.iter().filter(|voter| self.reachable(**voter)).count();
        if !self.within_elections(|| reachable() > rest.len() / 2).await {
            return Err(MembershipError::Refused(format!(
                "without {id} only {} of {} voters could be reached, which is no majority",
                reachable(),
                rest.len()
            )));
        }
        self.commit(ChangeMembers::RemoveVoters([id.0].into())).await
    }

    async fn transfer(&self, to: ControllerId) -> Result<(), MembershipError> {
        if !self.voters().contains(&to.0) {
            return Err(MembershipError::NotFound(to));
        }
        if !self.leadership_is_mine() {
            return Err(MembershipError::NoQuorum);
        }
        if to.0 == self.id {
            return Ok(());
        }
        let deadline = Instant::now() + TRANSFER_DEADLINE;
        while Instant::now() < deadline {
            self.raft.trigger().transfer_leader(to.0).await.map_err(|_| MembershipError::Stopped)?;
            // An attempt is lost when the receiver has not yet written the last entry; the next one finds it written.
            let attempt = Instant::now() + Duration::from_millis(self.timing.election_max_millis);
            while Instant::now() < attempt {
                if self.raft.current_leader().await == Some(to.0) {
                    return Ok(());
                }
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        }
        Err(MembershipError::Timeout(format!("{to} did not take over")))
    }

    /// Hands leadership to the voter that has the most of the log and was heard lately.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn hand_over(&self) -> Result<(), MembershipError> {
        let best = || {
            let matched = self.matched();
            let others = self.voters().into_iter().filter(|id| *id != self.id && self.reachable(*id));
            others.max_by_key(|id| matched.get(id).copied())
        };
        self.within_elections(|| best().is_some()).await;
        let Some(best) = best() else {
            return Err(MembershipError::Refused("no other voter can be reached".into()));
        };
        self.transfer(ControllerId(best)).await
    }

    /// Waits a little for something that a new leader finds out with its first heartbeats.
    pub async fn within_elections(&self, holds: impl Fn() -> bool) -> bool {
        let deadline = Instant::now() + Duration::from_millis(2 * self.timing.election_max_millis);
        while !holds() {
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        true
    }

    pub fn leadership_is_mine(&self) -> bool {
        self.raft.server_metrics().borrow_watched().state == ServerState::Leader
    }

    /// False until the last of the two entries of a change is committed: until then a majority of the voters before it and one
    /// of those after it are needed.
    pub fn membership_is_settled(&self) -> bool {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let (now, committed) = (&metrics.membership_config, &metrics.committed_membership_config);
        now.membership().get_joint_config().len() <= 1 && now.log_id() == committed.log_id()
    }

    /// Whose votes count for certain. While a change is half made, a member that votes only before or only after it replaces
    /// nobody: to call it a voter would promise that another may fail.
    pub fn certain_voters(&self) -> BTreeSet<u64> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.committed_membership_config.membership();
        let in_all = |id: &u64| membership.get_joint_config().iter().all(|voters| voters.contains(id));
        membership.voter_ids().filter(in_all).collect()
    }

    /// As the leader: makes the second entry of a change whose maker is gone. Who makes it is the one that asked for the
    /// change, so one that died or was deposed in between leaves it undone, and openraft does not do it by itself.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn settle_membership(&self) -> Result<(), MembershipError> {
        let between = || {
            let metrics = self.raft.server_metrics();
            let metrics = metrics.borrow_watched();
            let joint = metrics.membership_config.membership().get_joint_config().len() > 1;
            joint.then(|| metrics.membership_config.log_id().map(|id| id.index()))
        };
        let Some(first) = between() else { return Ok(()) };
        // Whoever is making the change has this long for its second entry, which is milliseconds of work.
        tokio::time::sleep(Duration::from_millis(2 * self.timing.election_max_millis)).await;
        if between() != Some(first) || !self.leadership_is_mine() {
            return Ok(());
        }
        tracing::warn!("a change of the quorum's members was left half made: it is finished now");
        self.commit(ChangeMembers::AddVoterIds(BTreeSet::new())).await
    }

    pub fn voters(&self) -> BTreeSet<u64> {
        self.raft.server_metrics().borrow_watched().membership_config.voter_ids().collect()
    }

    /// As the leader: how far each member's log is known to agree with this one.
    pub fn matched(&self) -> BTreeMap<u64, u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let replication = metrics.replication.iter().flatten();
        replication.filter_map(|(id, at)| at.as_ref().map(|at| (*id, at.index))).collect()
    }

    /// As the leader: whether it answered within the last elections' time. This replica always did.
    pub fn reachable(&self, id: u64) -> bool {
        if id == self.id {
            return true;
        }
        let lately = Duration::from_millis(2 * self.timing.election_max_millis);
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let heard = metrics.heartbeat.as_ref().and_then(|all| all.get(&id).copied().flatten());
        heard.is_some_and(|at| at.elapsed() <= lately)
    }

    async fn wait_until_caught_up(&self, id: ControllerId) -> Result<(), MembershipError> {
        let deadline = Instant::now() + CATCH_UP_DEADLINE;
        loop {
            if !self.leadership_is_mine() {
                return Err(MembershipError::NoQuorum);
            }
            let last = self.raft.metrics().borrow_watched().last_log_index.unwrap_or(0);
            match self.matched().get(&id.0) {
                Some(matched) if matched + CAUGHT_UP_ENTRIES >= last => return Ok(()),
                _ if Instant::now() >= deadline => {
                    return Err(MembershipError::Timeout(format!("{id} has not caught up yet")));
                }
                _ => tokio::time::sleep(LOOK_INTERVAL).await,
            }
        }
    }

    async fn commit(&self, change: ChangeMembers<u64, BasicNode>) -> Result<(), MembershipError> {
        let write = self.raft.change_membership(change, false);
        match tokio::time::timeout(CHANGE_DEADLINE, write).await {
            Err(_) => Err(MembershipError::Unknown),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(refused(error)),
        }
    }
}

fn refused(error: RaftError<TypeConfig, ClientWriteError<TypeConfig>>) -> MembershipError {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(_)) => MembershipError::NoQuorum,
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => MembershipError::Unknown,
        RaftError::APIError(other) => MembershipError::Refused(other.to_string()),
        RaftError::Fatal(_) => MembershipError::Stopped,
    }
}
