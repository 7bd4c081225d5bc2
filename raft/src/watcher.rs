//! What a replica keeps an eye on by itself: who leads, whether consensus still runs, whether the replicas are equal.

use std::{collections::BTreeSet, time::Duration};

use model::ControllerId;
use openraft::{ServerState, async_runtime::WatchReceiver, errors::Fatal};

use crate::{
    core::{Core, SharedCore},
    status::{HashAt, Leadership, MemberStatus, QuorumStatus, Report, Role, comparable, differences},
    wire::{Answer, Call},
};

/// How often the leader compares hashes: a difference is a bug or a lying disk, and should not stay unknown for long.
const COMPARE_INTERVAL: Duration = Duration::from_secs(5);
/// A member that does not report within this counts as unreachable.
const REPORT_DEADLINE: Duration = Duration::from_secs(1);
/// Consensus that ended without a word has so long to be seen as stopped on purpose.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Publishes who leads. `leading` follows when this leader has applied everything before its own first entry.
pub async fn leadership_loop(core: SharedCore) {
    let mut metrics = core.raft.server_metrics();
    loop {
        let now = seen(&core, &metrics.borrow_watched());
        publish(&core, now);
        let mine = now.leader == Some(ControllerId(core.id));
        if mine && !core.leadership().leading {
            tokio::select! {
                changed = metrics.changed() => if changed.is_err() { return },
                ready = caught_up(&core) => if ready { lead(&core, now.term) },
            }
        } else if metrics.changed().await.is_err() {
            return;
        }
    }
}

/// The disk of a replica whose consensus has failed is not to be believed.
pub async fn failure_loop(core: SharedCore) {
    let mut metrics = core.raft.metrics();
    loop {
        let state = metrics.borrow_watched().running_state.clone();
        if let Err(fatal) = state {
            let stopped = core.stopping() && matches!(fatal, Fatal::Stopped);
            if !stopped {
                tracing::error!(%fatal, "consensus has failed on this controller");
                let what = format!("consensus ({fatal}): what it has on disk");
                (core.on_failure)(&storage::failure::StorageError::Damaged { what });
            }
            return;
        }
        if metrics.changed().await.is_err() {
            // So it ends when it panicked: the process would live on as a member that takes no part, and nobody would start
            // it again. Where its runtime ends, this task does too, a moment later.
            tokio::time::sleep(LAST_WORDS).await;
            if !core.stopping() {
                tracing::error!("consensus has ended on this controller");
                let what = "consensus (it ended without a word): what it has on disk".to_owned();
                (core.on_failure)(&storage::failure::StorageError::Damaged { what });
            }
            return;
        }
    }
}

/// The leader compares the hashes of all members, again and again, and says once who does not answer any more.
pub async fn compare_loop(core: SharedCore) {
    let mut interval = tokio::time::interval(COMPARE_INTERVAL);
    let mut silent = BTreeSet::new();
    loop {
        interval.tick().await;
        if !core.leadership().leading {
            silent.clear();
            continue;
        }
        if core.members().len() > 1 {
            for member in core.survey().await.members {
                if !member.reachable && silent.insert(member.id) {
                    tracing::warn!(controller = %member.id, address = member.address, "alert: a controller does not answer");
                } else if member.reachable && silent.remove(&member.id) {
                    tracing::info!(controller = %member.id, "a controller answers again");
                }
            }
        }
    }
}

/// Waits for this leader's own first entry, which comes after everything of earlier terms.
async fn caught_up(core: &Core) -> bool {
    let Some(index) = core.confirm().await else {
        // Without a quorum now; it is asked again when this has been tried for a while.
        tokio::time::sleep(Duration::from_millis(core.timing.heartbeat_millis)).await;
        return false;
    };
    let mut applied = core.machine.watch_applied();
    applied.wait_for(|applied| *applied >= index).await.is_ok()
}

fn seen(core: &Core, metrics: &openraft::metrics::RaftServerMetrics<crate::dialect::TypeConfig>) -> Leadership {
    let mut leader = metrics.current_leader;
    if leader == Some(core.id) && metrics.state != ServerState::Leader {
        leader = None;
    }
    Leadership { leader: leader.map(ControllerId), term: metrics.vote.leader_id().term, leading: false }
}

fn publish(core: &Core, now: Leadership) {
    core.leadership.send_if_modified(|known| {
        if (known.leader, known.term) == (now.leader, now.term) {
            return false;
        }
        tracing::info!(leader = ?now.leader.map(|id| id.0), term = now.term, "leadership changed");
        *known = now;
        true
    });
}

fn lead(core: &Core, term: u64) {
    core.leadership.send_if_modified(|known| {
        let mine = known.leader == Some(ControllerId(core.id)) && known.term == term;
        let news = mine && !known.leading;
        known.leading |= mine;
        news
    });
}

impl Core {
    pub fn report(&self) -> Report {
        Report {
            applied: self.machine.applied(),
            hashes: self.machine.hashes(),
            matched: self.matched().into_iter().collect(),
            version: env!("CARGO_PKG_VERSION").into(),
            knows: self.knows,
        }
    }

    pub fn status(&self) -> QuorumStatus {
        let metrics = self.raft.metrics().borrow_watched().clone();
        let (leading, voters) = (self.leadership_is_mine(), self.certain_voters());
        let own = self.report();
        let leader = self.leadership().leader;
        let heard = self.last_contact().map(|at| at.elapsed());
        let lately = Duration::from_millis(2 * self.timing.election_max_millis);
        let member = |(id, address): (u64, String)| {
            let me = id == self.id;
            let led_by = leader == Some(ControllerId(id));
            MemberStatus {
                id: ControllerId(id),
                address,
                role: match () {
                    () if led_by => Role::Leader,
                    () if voters.contains(&id) => Role::Voter,
                    () => Role::Learner,
                },
                reachable: me
                    || if leading { self.reachable(id) } else { led_by && heard.is_some_and(|t| t <= lately) },
                matched: own.matched.iter().find(|(member, _)| *member == id).map(|(_, index)| *index),
                applied: me.then_some(own.applied),
                hash: if me { own.hashes.last().copied() } else { None },
                version: me.then(|| own.version.clone()),
                knows: me.then_some(own.knows),
            }
        };
        QuorumStatus {
            id: ControllerId(self.id),
            leader,
            term: metrics.current_term,
            last: metrics.last_log_index.unwrap_or(0),
            committed: metrics.local_committed.as_ref().map_or(0, |id| id.index),
            applied: own.applied,
            snapshot: metrics.snapshot.as_ref().map_or(0, |id| id.index),
            members: self.members().into_iter().map(member).collect(),
            hashes_agree: true,
        }
    }

    /// Asks every member and compares what they say. A difference is logged as an error.
    pub async fn survey(&self) -> QuorumStatus {
        let mut status = self.status();
        let ask = status.members.iter().map(|member| self.ask(member.id));
        let reports: Vec<Option<Report>> = futures::future::join_all(ask).await;
        let ours = self.machine.hashes();
        let matched = reports.iter().flatten().map(|r| &r.matched).max_by_key(|m| m.len()).cloned().unwrap_or_default();
        for (member, report) in status.members.iter_mut().zip(&reports) {
            member.reachable = report.is_some();
            member.applied = report.as_ref().map(|r| r.applied);
            member.version = report.as_ref().map(|r| r.version.clone());
            member.knows = report.as_ref().map(|r| r.knows);
            member.hash = report.as_ref().and_then(|r| comparable(&ours, &r.hashes));
            member.matched = matched.iter().find(|(id, _)| *id == member.id.0).map(|(_, index)| *index);
        }
        let said: Vec<(ControllerId, &[HashAt])> = status
            .members
            .iter()
            .zip(&reports)
            .filter_map(|(member, report)| report.as_ref().map(|r| (member.id, r.hashes.as_slice())))
            .collect();
        for (at, (a, hashes)) in said.iter().enumerate() {
            for (b, others) in &said[at + 1..] {
                if let Some(index) = differences(hashes, others).first() {
                    tracing::error!(index, %a, %b, "two controllers have different states at the same index");
                    status.hashes_agree = false;
                }
            }
        }
        status
    }

    async fn ask(&self, id: ControllerId) -> Option<Report> {
        if id.0 == self.id {
            return Some(self.report());
        }
        match self.call(id, &Call::Report, REPORT_DEADLINE).await {
            Ok(Answer::Report(report)) => Some(report),
            Ok(_) | Err(_) => None,
        }
    }
}
