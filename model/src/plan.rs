//! What should happen next, as commands for the leader to propose. Planners may be wrong about the present; `apply` never is.
//!
//! Each is a small pure function; none remembers anything. Work is found through the state's indexes, and each
//! planner proposes at most a batch, so that a burst neither floods the log nor delays the others.

use std::collections::BTreeMap;

use crate::{
    Capacity, Command, ImageId, Node, NodeId, NodeState, PlannerCommand, ReplicaState, State, Telemetry, Timestamp, Vm,
    setting, telemetry::Fitness,
};

pub mod moves;
mod rehearsal;

/// What one planner proposes at once: enough to keep the log busy, few enough to re-plan on fresh facts soon.
const BATCH: usize = 256;

/// Nodes whose load differs by less than this, a weight, count as equally idle, and the one with fewest machines is
/// taken: samples of use vary by as much on an idle host, and following them would pile machines up.
const NOISE_PERMILLE: u64 = 50;

/// A node that lost its copy of an image, or could not get it, is asked again after this time when no other can hold
/// it: whatever ailed it (a full disk, a bad one) has had time to be seen to.
const REPLICA_PAUSE_MILLIS: u64 = 10 * 60_000;

/// Everything that should be proposed at `now` (the leader's wall clock).
pub fn plan(state: &State, telemetry: &Telemetry, now: Timestamp) -> Vec<Command> {
    let mut commands = silence(state, telemetry);
    commands.extend(clocks(state, telemetry));
    commands.extend(recover(state));
    commands.extend(due(state, now));
    let mut promised = Promised::new();
    commands.extend(place(state, telemetry, &mut promised));
    commands.extend(moves::drain(state, telemetry, now, &mut promised));
    // Room that this plan gives to machines is not known to be taken yet, and machines come first.
    commands.extend(rehearsal::rehearse(state, telemetry, now, promised.is_empty()));
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
    let judge = |node: &Node| match telemetry.nodes.get(&node.id)?.drift.fitness() {
        Fitness::Unfit if !node.clock_drifts => Some(PlannerCommand::SetNodeClock { node: node.id, drifts: true }),
        Fitness::Fit if node.clock_drifts => Some(PlannerCommand::SetNodeClock { node: node.id, drifts: false }),
        Fitness::Unfit | Fitness::Fit | Fitness::Open => None,
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

/// What a plan itself gives to a node, and to how many machines.
type Promised = BTreeMap<NodeId, (Capacity, usize)>;

/// The idlest node with room for each machine that waits, oldest first; or the reason why there is none.
fn place(state: &State, telemetry: &Telemetry, promised: &mut Promised) -> Vec<PlannerCommand> {
    if state.index.unplaced.is_empty() {
        return Vec::new();
    }
    let coming = coming(state);
    let mut commands = Vec::new();
    for vm in state.index.unplaced.iter().take(BATCH).filter_map(|(_, id)| state.vms().get(id)) {
        let room = |node: &Node, extra: Capacity| state.may_hold(node, vm, vm.size.plus(extra));
        let open = state.may_be_elsewhere(vm.id).map_or(Ok(()), Err);
        match open.and_then(|()| idlest(state, telemetry, &coming, promised, room)) {
            Ok(node) => {
                let (extra, machines) = promised.entry(node).or_default();
                *extra = extra.plus(vm.size);
                *machines += 1;
                commands.push(PlannerCommand::PlaceVm { vm: vm.id, node });
            }
            Err(reason) if reason != vm.reason => commands.push(PlannerCommand::DeferVm { vm: vm.id, reason }),
            Err(_) => {}
        }
    }
    commands
}

/// What each node is creating just now: promised already, and not yet in the use that it reports.
fn coming(state: &State) -> BTreeMap<NodeId, Capacity> {
    let mut coming: BTreeMap<NodeId, Capacity> = BTreeMap::new();
    for vm in state.index.due.iter().filter_map(|(_, id)| state.vms().get(id)).filter(|vm| vm.phase.is_none()) {
        if let Some(placement) = vm.placement {
            let sum = coming.entry(placement.node).or_default();
            *sum = sum.plus(vm.size);
        }
    }
    coming
}

fn idlest(
    state: &State,
    telemetry: &Telemetry,
    coming: &BTreeMap<NodeId, Capacity>,
    promised: &Promised,
    room: impl Fn(&Node, Capacity) -> Result<(), crate::Rejection>,
) -> Result<NodeId, String> {
    let mut refusals: BTreeMap<String, u32> = BTreeMap::new();
    let mut open: Vec<(u64, usize, NodeId)> = Vec::new();
    for node in state.nodes().values() {
        let (extra, more) = promised.get(&node.id).copied().unwrap_or_default();
        if let Err(refusal) = room(node, extra) {
            let crate::Rejection::NoRoom { reason, .. } = refusal else { continue };
            *refusals.entry(reason).or_default() += 1;
            continue;
        }
        let coming = coming.get(&node.id).copied().unwrap_or_default();
        let load = load_permille(state, telemetry, node, coming, extra);
        open.push((load, state.vm_count_on_node(node.id) + more, node.id));
    }
    let weights =
        [setting::WEIGHT_CPU, setting::WEIGHT_MEMORY, setting::WEIGHT_DISK].map(|weight| state.setting(weight));
    let noise = weights.iter().fold(0, |sum: u64, weight| sum.saturating_add(weight.saturating_mul(NOISE_PERMILLE)));
    let least = open.iter().map(|(load, ..)| *load).min().unwrap_or_default();
    let idle = open.iter().filter(|(load, ..)| *load <= least.saturating_add(noise));
    idle.min_by_key(|(load, machines, node)| (*machines, *load, *node)).map(|(.., node)| *node).ok_or_else(|| {
        let why: Vec<String> = refusals.iter().map(|(reason, count)| format!("{count} × {reason}")).collect();
        match why.is_empty() {
            true => "no node has joined yet".into(),
            false => format!("no node has room: {}", why.join(", ")),
        }
    })
}

/// In thousandths.
fn share(part: u64, whole: u64) -> u64 {
    u64::try_from(u128::from(part) * 1000 / u128::from(whole.max(1))).unwrap_or(u64::MAX)
}

/// Weighted use, in thousandths: of each resource what is used and about to be used, or what is promised, whichever is
/// more. `coming` is promised already, `extra` by this very plan.
fn load_permille(state: &State, telemetry: &Telemetry, node: &Node, coming: Capacity, extra: Capacity) -> u64 {
    let room = state.promisable(node);
    let promised = state.reserved(node.id).plus(extra);
    let soon = coming.plus(extra);
    // A node that has not told its use yet counts as busy: it must not draw everything to itself.
    let told = telemetry.nodes.get(&node.id).map(|heard| &heard.status).filter(|status| status.memory_total_bytes > 0);
    let (used_cpu, used_memory, used_disk) = told.map_or((1000, 1000, 1000), |used| {
        let memory = share(used.memory_used_bytes, used.memory_total_bytes);
        (u64::from(used.cpu_permille), memory, share(used.disk_used_bytes, used.disk_total_bytes))
    });
    let load = |used: u64, soon: u64, promised: u64, room: u64| {
        used.saturating_add(share(soon, room)).max(share(promised, room))
    };
    let cpu = load(used_cpu, soon.vcpus, promised.vcpus, room.vcpus);
    let memory = load(used_memory, soon.memory_bytes, promised.memory_bytes, room.memory_bytes);
    let disk = load(used_disk, soon.disk_bytes, promised.disk_bytes, room.disk_bytes);
    [(cpu, setting::WEIGHT_CPU), (memory, setting::WEIGHT_MEMORY), (disk, setting::WEIGHT_DISK)]
        .into_iter()
        .map(|(permille, weight)| permille.saturating_mul(state.setting(weight)))
        .fold(0, u64::saturating_add)
}

/// Another copy of each image that has too few, on the node with the most free disk. One that lost its copy comes
/// after all others, and not before its pause is over.
fn replicate(state: &State, telemetry: &Telemetry, now: Timestamp) -> Vec<PlannerCommand> {
    let judge = |id: &ImageId| {
        let image = state.images().get(id)?;
        let sound = |(node, replica): (&NodeId, &ReplicaState)| {
            *replica == ReplicaState::Good && state.nodes().get(node).is_some_and(|node| node.state == NodeState::Up)
        };
        image.replicas.iter().any(sound).then_some(())?;
        let rank = |node: &Node| match image.replicas.get(&node.id) {
            _ if node.state != NodeState::Up => None,
            None => Some((true, free_disk(telemetry, node), std::cmp::Reverse(node.id))),
            Some(ReplicaState::Lost(at)) if now.millis_since(*at) >= REPLICA_PAUSE_MILLIS => {
                Some((false, free_disk(telemetry, node), std::cmp::Reverse(node.id)))
            }
            Some(_) => None,
        };
        let (.., std::cmp::Reverse(node)) = state.nodes().values().filter_map(rank).max()?;
        Some(PlannerCommand::AddReplica { image: *id, node })
    };
    state.index.thin_images.iter().take(BATCH).filter_map(judge).collect()
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
