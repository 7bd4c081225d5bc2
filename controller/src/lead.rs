//! The leader's loops: plan from the state and what was heard, propose, and again when either has changed.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use model::{Command, PlannerCommand, State, Telemetry, Timestamp, plan};
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
/// A busy log wakes the loops with every batch; one round in this time is enough.
const BREATH: Duration = Duration::from_millis(10);
/// A look in vain costs the more the more hosts there are, where machines wait for room that none has: looking takes this part
/// of the time, and not more.
const IN_VAIN: u32 = 10;
/// Of a long plan this many commands are in the log's queue together, so that what others ask for waits for these at most.
const AT_ONCE: usize = 1024;

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
            () = watch(&core, term) => {}
            () = work(&core, term) => {}
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

/// Hosts, and what must not wait for the placements of a burst.
async fn watch(core: &Core, term: u64) {
    let mut watched = Instant::now() - WATCH;
    let look = |state: &State, ears: &Telemetry, now| {
        let mut commands = plan::press(state, now);
        if watched.elapsed() >= WATCH {
            watched = Instant::now();
            commands.extend(plan::watch(state, ears));
        }
        commands
    };
    plan_on(core, term, look).await;
}

async fn work(core: &Core, term: u64) {
    plan_on(core, term, plan::work).await;
}

async fn plan_on(core: &Core, term: u64, mut look: impl FnMut(&State, &Telemetry, Timestamp) -> Vec<Command>) {
    let mut applied = core.replica.watch_applied();
    loop {
        applied.borrow_and_update();
        let (now, began) = (core.replica.now(), Instant::now());
        let mut commands = core.replica.read(|state| core.hear(|ears| look(state, ears, now)));
        let in_vain = if commands.is_empty() { began.elapsed() } else { Duration::ZERO };
        while !commands.is_empty() {
            let later = commands.split_off(commands.len().min(AT_ONCE));
            let proposed = join_all(commands.into_iter().map(|command| propose(core, term, command))).await;
            commands = later;
            if proposed.iter().any(|done| !done) {
                sleep(TICK).await;
                break;
            }
        }
        // Whoever was stopped in the middle of a look has looked long, and is needed soon.
        sleep(BREATH.max(IN_VAIN * in_vain).min(TICK)).await;
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
