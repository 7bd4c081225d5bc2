//! What should happen next, as commands for the leader to propose. Planners may be wrong about the present; `apply` never is.
//!
//! Each is a small pure function; none remembers anything. Work is found through the state's indexes, and each
//! planner proposes at most a batch, so that a burst neither floods the log nor delays the others.

use std::collections::BTreeMap;

use crate::{
    Capacity, Command, ImageId, Node, NodeId, NodeState, PlannerCommand, Recovery, ReplicaState, State, Telemetry,
    Timestamp, Vm, setting, telemetry::Fitness,
};

mod idlest;
pub mod moves;
mod rehearsal;

use idlest::Idlest;

/// What one planner proposes at once: enough to keep the log busy, few enough to re-plan on fresh facts soon.
const BATCH: usize = 256;

/// Machines that one plan places: so many that ranking ten thousand nodes, once a plan, costs less than they do.
const PLACED: usize = 8192;
/// Machines that wait whom one plan looks at.
const LOOKED_AT: usize = 2 * PLACED;

/// The golden ratio of 2^64: multiples of it, taken modulo anything, fall everywhere.
const SCATTER: u64 = 0x9e37_79b9_7f4a_7c15;

/// A node that lost its copy of an image, or could not get it, is asked again after this time when no other can hold
/// it: whatever ailed it (a full disk, a bad one) has had time to be seen to.
const REPLICA_PAUSE_MILLIS: u64 = 10 * 60_000;

/// A clock is blamed when it has been wrong for so long: whether the other nodes' are too, which makes it the leader's own, is
/// known within twenty seconds of the first.
const BLAMED_AFTER_NANOS: u64 = 30 * 1_000_000_000;
/// And for so long when they are. A leader whose clock drifts has handed over by then; when this one has not, or has been
/// made leader again, other controllers saw the same.
const ALL_BLAMED_AFTER_NANOS: u64 = 10 * BLAMED_AFTER_NANOS;

/// Everything that should be proposed at `now` (the leader's wall clock).
pub fn plan(state: &State, telemetry: &Telemetry, now: Timestamp) -> Vec<Command> {
    let mut commands = watch(state, telemetry);
    commands.extend(press(state, now));
    commands.extend(work(state, telemetry, now));
    commands
}

/// What follows from who was heard and who was not. Looks at every node.
pub fn watch(state: &State, telemetry: &Telemetry) -> Vec<Command> {
    let mut commands = silence(state, telemetry);
    commands.extend(clocks(state, telemetry));
    commands.into_iter().map(Command::Planner).collect()
}

/// What must not wait for other work: machines on lost nodes, and deadlines. Looks at those only.
pub fn press(state: &State, now: Timestamp) -> Vec<Command> {
    let mut commands = recover(state);
    commands.extend(due(state, now));
    commands.into_iter().map(Command::Planner).collect()
}

/// What else there is to do. Looks at what waits only.
pub fn work(state: &State, telemetry: &Telemetry, now: Timestamp) -> Vec<Command> {
    let mut idlest = Idlest::new(state, telemetry);
    let mut commands = place(state, &mut idlest);
    commands.extend(moves::drain(state, now, &mut idlest));
    // Room that this plan gives to machines is not known to be taken yet, and machines come first.
    commands.extend(rehearsal::rehearse(state, telemetry, now, !idlest.has_promised()));
    commands.extend(replicate(state, telemetry, now));
    commands.into_iter().map(Command::Planner).collect()
}

/// Nodes that fell silent, those that are heard again, and those whose lease has ended without a word.
fn silence(state: &State, telemetry: &Telemetry) -> Vec<PlannerCommand> {
    let limit = state.setting(setting::NODE_SILENCE).saturating_mul(1_000_000);
    let judge = |node: &Node| {
        let Node { id, incarnation, state, .. } = *node;
        if matches!(state, NodeState::Joined | NodeState::Lost) {
            return None;
        }
        let heard = telemetry.nodes.get(&id);
        let last = heard.map_or(0, |heard| heard.at);
        // A new leader gives everybody the whole time before it judges.
        let silent = telemetry.clock.saturating_sub(last.max(telemetry.leader_since)) > limit;
        // One that is condemned has no lease until it is known what the quorum said.
        let condemned = heard.is_some_and(|heard| heard.condemned == Some(incarnation));
        if (silent || condemned) && telemetry.may_give_away(id) {
            return Some(PlannerCommand::DeclareLost { node: id, incarnation });
        }
        let heard = telemetry.clock.saturating_sub(last) <= limit;
        match state {
            NodeState::Up if silent => Some(PlannerCommand::SetNodeSilent { node: id, incarnation, silent: true }),
            NodeState::Silent if heard => Some(PlannerCommand::SetNodeSilent { node: id, incarnation, silent: false }),
            _ => None,
        }
    };
    state.nodes().values().filter_map(judge).take(BATCH).collect()
}

/// Nodes on whose clock no lease may be counted any more, or may again.
fn clocks(state: &State, telemetry: &Telemetry) -> Vec<PlannerCommand> {
    let patience = if telemetry.own_clock_drifts() { ALL_BLAMED_AFTER_NANOS } else { BLAMED_AFTER_NANOS };
    let judge = |node: &Node| {
        let drift = &telemetry.nodes.get(&node.id)?.drift;
        let unfit = drift.unfit_since().is_some_and(|since| telemetry.clock.saturating_sub(since) > patience);
        let drifts = unfit || (node.clock_drifts && drift.fitness() != Fitness::Fit);
        (drifts != node.clock_drifts).then_some(PlannerCommand::SetNodeClock { node: node.id, drifts })
    };
    state.nodes().values().filter_map(judge).take(BATCH).collect()
}

/// What is on lost nodes and may be taken from them.
fn recover(state: &State) -> Vec<PlannerCommand> {
    let lost = state.index.lost_nodes.iter().filter_map(|id| state.nodes().get(id));
    let taken =
        lost.filter(|node| state.recovery_is_halted(node).is_none()).flat_map(|node| state.vms_on_node(node.id));
    let take = |vm: &Vm| Some(PlannerCommand::RecoverVm { vm: vm.id, epoch: vm.placement?.epoch });
    taken.filter(|vm| state.is_recoverable(vm)).filter_map(take).take(BATCH).collect()
}

/// Deadlines that passed and back-offs that ended.
fn due(state: &State, now: Timestamp) -> Vec<PlannerCommand> {
    let passed = state.index.due.iter().take_while(|(at, _)| *at <= now).take(BATCH);
    let judge = |(at, vm): &(Timestamp, crate::VmId)| {
        let row = state.vms().get(vm)?;
        Some(if row.deadline == Some(*at) {
            PlannerCommand::ExpireVm { vm: *vm }
        } else if row.retry_at == Some(*at) {
            PlannerCommand::RetryVm { vm: *vm }
        } else {
            PlannerCommand::BackUpDueVm { vm: *vm }
        })
    };
    passed.filter_map(judge).collect()
}

/// The idlest node with room for each machine that waits, oldest first; or the reason why there is none.
fn place(state: &State, idlest: &mut Idlest) -> Vec<PlannerCommand> {
    // What found no room in this plan finds none later in it: room only shrinks.
    let mut refused: BTreeMap<(Capacity, Recovery), String> = BTreeMap::new();
    let mut commands = Vec::new();
    let mut served = state.index.unplaced.served();
    for _ in 0..LOOKED_AT {
        let Some((id, line)) = served.next().filter(|_| commands.len() < PLACED) else { break };
        let Some(vm) = state.vms().get(&id) else { continue };
        let need = (vm.size, vm.recovery);
        let elsewhere = state.may_be_elsewhere(id);
        let found = match (&elsewhere, refused.get(&need)) {
            (Some(reason), _) | (None, Some(reason)) => Err(reason.clone()),
            (None, None) => {
                let room = |node: &Node, extra: Capacity| state.may_hold(node, vm, vm.size.plus(extra));
                idlest.with_room(vm.size, room).inspect_err(|reason| drop(refused.insert(need, reason.clone())))
            }
        };
        match found {
            Ok(node) => {
                idlest.promise(node, vm.size);
                commands.push(PlannerCommand::PlaceVm { vm: id, node });
            }
            Err(reason) if reason != vm.reason => commands.push(PlannerCommand::DeferVm { vm: id, reason }),
            // Who stands behind it needs the same, and knows it.
            Err(_) if elsewhere.is_none() => served.close(line),
            Err(_) => {}
        }
    }
    commands
}

/// In thousandths.
fn share(part: u64, whole: u64) -> u64 {
    let whole = whole.max(1);
    // Nine of these for each host and plan, and dividing 128 bits takes several times as long.
    match part.checked_mul(1000) {
        Some(part) => part / whole,
        None => u64::try_from(u128::from(part) * 1000 / u128::from(whole)).unwrap_or(u64::MAX),
    }
}

/// Another copy of each image that has too few, on a node that has what it stands on, then on that with the most free
/// disk. One that lost its copy comes after all others, and not before its pause is over.
fn replicate(state: &State, telemetry: &Telemetry, now: Timestamp) -> Vec<PlannerCommand> {
    let judge = |id: &ImageId| {
        let image = state.images().get(id)?;
        let sound = |(node, replica): (&NodeId, &ReplicaState)| {
            *replica == ReplicaState::Good && state.nodes().get(node).is_some_and(|node| node.state == NodeState::Up)
        };
        image.replicas.iter().any(sound).then_some(())?;
        let parent = image.backup.and_then(|of| state.images().get(&of.parent?));
        let rank = |node: &Node| {
            let beside = parent.is_none_or(|parent| parent.keepers().any(|keeper| keeper == node.id));
            let rank = |first| Some((first, beside, free_disk(telemetry, node), std::cmp::Reverse(node.id)));
            match image.replicas.get(&node.id) {
                _ if node.state != NodeState::Up => None,
                None => rank(true),
                Some(ReplicaState::Lost(at)) if now.millis_since(*at) >= REPLICA_PAUSE_MILLIS => rank(false),
                Some(_) => None,
            }
        };
        let (.., std::cmp::Reverse(node)) = state.nodes().values().filter_map(rank).max()?;
        Some(PlannerCommand::AddReplica { image: *id, node })
    };
    // Of some nothing can be done: there are fewer hosts than copies wanted, or who had the only one is gone. So that they do not
    // stand before the others for ever, looks begin elsewhere as time goes on.
    let thin = &state.index.thin_images;
    let first = if thin.len() > BATCH {
        ImageId(now.0.wrapping_mul(SCATTER) % (state.cluster().last_image + 1))
    } else {
        ImageId(0)
    };
    thin.range(first..).chain(thin.range(..first)).take(BATCH).filter_map(judge).collect()
}

/// The nodes that should receive a new image, best first: up, and with the most free disk for its size.
pub fn image_targets(state: &State, telemetry: &Telemetry, size_bytes: u64) -> Vec<NodeId> {
    let mut nodes: Vec<&Node> = state.nodes().values().filter(|node| node.state == NodeState::Up).collect();
    nodes.retain(|node| free_disk(telemetry, node) > size_bytes);
    nodes.sort_by_key(|node| (std::cmp::Reverse(free_disk(telemetry, node)), node.id));
    nodes.into_iter().map(|node| node.id).collect()
}

fn free_disk(telemetry: &Telemetry, node: &Node) -> u64 {
    match telemetry.nodes.get(&node.id) {
        Some(heard) if heard.status.disk_total_bytes > 0 => {
            heard.status.disk_total_bytes.saturating_sub(heard.status.disk_used_bytes)
        }
        _ => node.capacity.disk_bytes,
    }
}
