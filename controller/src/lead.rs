//! The leader's loop: plan from the state and what was heard, propose, and again when either has changed.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use model::{Command, PlannerCommand, Telemetry, plan};
use raft::ProposeError;
use tokio::time::{Instant, sleep, timeout};

use crate::{
    core::{Core, boottime},
    keep,
};

/// Silence and deadlines are noticed without any entry, so the planners also run by the clock.
const TICK: Duration = Duration::from_millis(500);
/// A lease is shorter by the age of the last confirmation, which costs a round of heartbeats between controllers.
const CONFIRM: Duration = Duration::from_millis(200);
/// A busy log wakes the loop with every batch; one round in this time is enough.
const BREATH: Duration = Duration::from_millis(10);

/// Nodes are watched this often, also when a busy log wakes the loop more often: what is watched for takes seconds.
const WATCH: Duration = Duration::from_millis(100);

/// How soon this controller may step aside again: when its clock is right after all, each other one finds the same.
const NOT_AGAIN: Duration = Duration::from_mins(10);

/// Runs until the process ends; works only while this controller leads.
pub(crate) async fn lead(core: Arc<Core>) {
    let mut leadership = core.replica.watch_leadership();
    let mut stepped_aside = None;
    loop {
        let Ok(term) = leadership.wait_for(|leadership| leadership.leading).await.map(|leadership| leadership.term)
        else {
            return;
        };
        tracing::info!(term, "this controller leads");
        core.hear(Telemetry::lead);
        let term_ended = async {
            // An error means that the replica is gone, which ends the term as well.
            let _ = leadership.wait_for(|leadership| !leadership.leading || leadership.term != term).await;
        };
        tokio::select! {
            () = term_ended => tracing::info!(term, "this controller no longer leads"),
            () = plan_on(&core, term) => {}
            () = confirm(&core) => {}
            () = keep::keep(&core) => {}
            () = step_aside(&core, &mut stepped_aside) => {}
        }
    }
}

/// Asks again and again whether this controller still leads: the answers to heartbeats say how long ago that was so.
async fn confirm(core: &Core) {
    loop {
        let asked = boottime();
        if core.replica.confirm_leadership().await {
            core.hear(|ears| ears.confirmed = Some(asked));
        }
        sleep(CONFIRM).await;
    }
}

/// Hands leadership over when it is this machine's clock that drifts, because leases are counted on the leader's.
async fn step_aside(core: &Core, last: &mut Option<Instant>) {
    loop {
        sleep(TICK).await;
        let recently = last.is_some_and(|last| last.elapsed() < NOT_AGAIN);
        if recently || !core.hear(|ears| ears.own_clock_drifts()) {
            continue;
        }
        tracing::error!("alert: this machine's clock drifts from those of most nodes: another controller shall lead");
        *last = Some(Instant::now());
        if let Err(error) = core.replica.hand_over().await {
            tracing::warn!(%error, "leadership was not handed over");
            *last = None;
            sleep(NOT_AGAIN / 10).await;
        }
    }
}

async fn plan_on(core: &Core, term: u64) {
    let mut applied = core.replica.watch_applied();
    let mut watched = Instant::now() - WATCH;
    loop {
        applied.borrow_and_update();
        let watch = watched.elapsed() >= WATCH;
        if watch {
            watched = Instant::now();
        }
        let now = core.replica.now();
        let commands = core.replica.read(|state| {
            core.hear(|ears| match watch {
                true => plan::plan(state, ears, now),
                false => plan::work(state, ears, now),
            })
        });
        let proposed = join_all(commands.into_iter().map(|command| propose(core, term, command))).await;
        if proposed.iter().any(|done| !done) {
            sleep(TICK).await;
        }
        sleep(BREATH).await;
        // Time passing is as good a reason to plan as a change.
        let _ = timeout(TICK, applied.changed()).await;
    }
}

/// False when the quorum did not take it; the next round plans again from what is true then.
async fn propose(core: &Core, term: u64, command: Command) -> bool {
    let lost = match command {
        Command::Planner(PlannerCommand::DeclareLost { node, incarnation }) => Some((node, incarnation)),
        _ => None,
    };
    if let Some((node, incarnation)) = lost {
        // Before it is proposed, and under the lock that answers take: from here on the host is granted nothing.
        if !core.hear(|ears| ears.condemn(node, incarnation)) {
            return true;
        }
        tracing::error!(%node, incarnation, "alert: a node is lost: its lease has ended without a word from it");
    }
    match core.replica.propose_as_leader(term, command.clone()).await {
        Ok(committed) => {
            match committed.applied {
                Ok(_) => tracing::info!(index = committed.index, ?command, "planned"),
                Err(rejection) => {
                    tracing::debug!(index = committed.index, ?command, %rejection, "a plan was refused");
                    lost.iter().for_each(|(node, _)| core.hear(|ears| ears.spare(*node)));
                }
            }
            true
        }
        Err(ProposeError::NotLeader | ProposeError::NoQuorum) => false,
        Err(error) => {
            tracing::warn!(%error, ?command, "a plan was not committed");
            false
        }
    }
}
