//! Which machines should go to which node: one that somebody wants to move, all of a node that is to be emptied, and
//! those that would even out what the nodes are promised.
//!
//! Deliberately not here: whether it is done. `apply` checks each move again, and the hosts carry it out.

use std::collections::{BTreeMap, BTreeSet};

use super::{Idlest, idlest::takes_machines, share};
use crate::{
    Capacity, Node, NodeId, NodeState, PlannerCommand, Recovery, Rejection, State, Status, Telemetry, Timestamp, Vm,
    setting,
};

/// A move that failed is tried again after this time, twice as long after each further failure: whatever ailed it is
/// mostly over by then, and nobody is served by a guest that is copied over and over.
const FIRST_PAUSE_MILLIS: u64 = 15_000;
const LONGEST_PAUSE_MILLIS: u64 = 10 * 60_000;
/// A move has to even out at least this much, in thousandths of a node, to be worth its copying. So what was evened out
/// is left alone, and nothing goes to and fro.
const LEAST_GAIN_PERMILLE: u64 = 50;
/// Moves that are suggested at once: after them there is a new state to judge by.
const MOST_SUGGESTED: usize = 16;

/// In which of its two ways somebody wants a machine to be moved, if that matters to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// While it runs, or is suspended with its memory.
    Live,
    /// While it is stopped: its disk is all there is of it.
    Offline,
}

/// Whether a machine would be moved just now in the manner that somebody wants. Nothing is done to it for that: whether it
/// may be stopped is for its owner to say.
///
/// # Errors
/// What would have to be done first.
pub fn would_go(vm: &Vm, manner: Manner) -> Result<(), Rejection> {
    let refuse = |what: &str| Err(Rejection::Stale(format!("{} is {}: {what}", vm.name, vm.status())));
    match (manner, vm.status()) {
        (Manner::Live, Status::Stopped) => refuse("start it to move it live, or move it offline"),
        (Manner::Offline, Status::Running | Status::Suspended) => refuse("stop it to move it offline, or move it live"),
        // Whether it can be moved at all is another question.
        _ => Ok(()),
    }
}

/// The node that a machine would best be moved to.
///
/// # Errors
/// Why it cannot be moved, or to none.
pub fn destination(state: &State, telemetry: &Telemetry, vm: &Vm) -> Result<NodeId, Rejection> {
    state.may_leave(vm)?;
    best(state, &mut Idlest::new(state, telemetry), vm).map_err(Rejection::Stale)
}

fn best(state: &State, idlest: &mut Idlest, vm: &Vm) -> Result<NodeId, String> {
    idlest.with_room(vm.size, |node, extra| state.may_move_to(vm, node.id, extra))
}

/// What goes next from the nodes that are to be emptied. Each sends and takes a few at a time.
pub(super) fn drain(state: &State, now: Timestamp, idlest: &mut Idlest) -> Vec<PlannerCommand> {
    let mut chosen: BTreeMap<NodeId, usize> = BTreeMap::new();
    let mut commands = Vec::new();
    let most = usize::try_from(state.setting(setting::MOVES_AT_ONCE)).unwrap_or(usize::MAX);
    for node in state.nodes().values().filter(|node| node.draining && node.state == NodeState::Up) {
        let mut under_way = state.vms_on_node(node.id).filter(|vm| vm.is_moving()).count();
        // What found no room in this plan finds none later in it: room only shrinks.
        let mut refused: BTreeSet<(Capacity, Recovery)> = BTreeSet::new();
        for vm in state.vms_on_node(node.id) {
            if under_way >= most {
                break;
            }
            let need = (vm.size, vm.recovery);
            if state.may_leave(vm).is_err() || pause_ends(vm) > now || refused.contains(&need) {
                continue;
            }
            let room = |node: &Node, extra: Capacity| {
                let under_way = state.others_on_node(node.id).filter(|vm| vm.is_moving()).count();
                if under_way + chosen.get(&node.id).copied().unwrap_or_default() >= most {
                    let reason = "as many machines are on their way to it as may be at once".into();
                    return Err(Rejection::NoRoom { node: node.name.clone(), reason });
                }
                state.may_move_to(vm, node.id, extra)
            };
            let Some(to) = idlest.if_room(vm.size, room) else {
                refused.insert(need);
                continue;
            };
            *chosen.entry(to).or_default() += 1;
            idlest.promise(to, vm.size);
            under_way += 1;
            commands.push(PlannerCommand::MigrateVm { vm: vm.id, to });
        }
    }
    commands
}

fn pause_ends(vm: &Vm) -> Timestamp {
    vm.move_failure.as_ref().map_or(Timestamp(0), |failure| {
        let pause = FIRST_PAUSE_MILLIS << failure.count.saturating_sub(1).min(10);
        failure.at.plus_millis(pause.min(LONGEST_PAUSE_MILLIS))
    })
}

/// A machine that is still on a node that is to be emptied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left<'a> {
    pub vm: &'a Vm,
    pub goes: Goes,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goes {
    /// It is on its way.
    Now,
    /// By itself, when this is over.
    Later(String),
    /// Not before a person has done something about it.
    Never(String),
}

/// What is still on a node, and why.
pub fn left_on<'a>(state: &'a State, telemetry: &Telemetry, node: NodeId, now: Timestamp) -> Vec<Left<'a>> {
    let mut idlest = Idlest::new(state, telemetry);
    state.vms_on_node(node).map(|vm| Left { vm, goes: goes(state, &mut idlest, vm, now) }).collect()
}

fn goes(state: &State, idlest: &mut Idlest, vm: &Vm, now: Timestamp) -> Goes {
    if vm.is_moving() {
        return Goes::Now;
    }
    if let Err(refusal) = state.may_leave(vm) {
        return match vm.status() {
            Status::Failed if vm.retry_at.is_none() => Goes::Never(format!("it has failed: {}", vm.reason)),
            Status::Lost => Goes::Never("its node is lost".into()),
            _ => Goes::Later(refusal.to_string()),
        };
    }
    let failed = vm.move_failure.as_ref().filter(|_| pause_ends(vm) > now);
    if let Some(failure) = failed {
        let seconds = pause_ends(vm).millis_since(now).div_ceil(1000);
        return Goes::Later(format!("tried again in {seconds} s, for it failed: {}", failure.reason));
    }
    match best(state, idlest, vm) {
        Ok(_) => Goes::Later("it waits for its turn".into()),
        Err(why) => Goes::Later(why),
    }
}

/// A move that would even out what two nodes are promised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suggestion {
    pub vm: crate::VmId,
    pub from: NodeId,
    pub to: NodeId,
    /// By how much the fuller of the two is relieved, in thousandths of a node.
    pub gain_permille: u64,
}

/// The best moves first, each judged as if those before it had been made. By what is promised, not by what is used just
/// now: that changes from one moment to the next, and a copy takes minutes.
pub fn rebalance(state: &State) -> Vec<Suggestion> {
    let taking_part = state.nodes().values().filter(|node| takes_machines(node));
    let mut held: BTreeMap<NodeId, Capacity> = taking_part.map(|node| (node.id, will_hold(state, node.id))).collect();
    let mut suggested: Vec<Suggestion> = Vec::new();
    while suggested.len() < MOST_SUGGESTED {
        let Some((next, size)) = best_relief(state, &held, &suggested) else { break };
        held.entry(next.from).and_modify(|sum| *sum = sum.minus(size));
        held.entry(next.to).and_modify(|sum| *sum = sum.plus(size));
        suggested.push(next);
    }
    suggested
}

/// What it is promised when all that moves has moved: otherwise the same relief would be sought twice.
fn will_hold(state: &State, node: NodeId) -> Capacity {
    let leaving = state.vms_on_node(node).filter(|vm| vm.is_moving());
    let left = state.others_on_node(node).filter(|vm| !vm.is_moving());
    leaving.chain(left).fold(state.reserved(node), |sum, vm| sum.minus(vm.size))
}

/// The best move from the fullest node to the emptiest.
fn best_relief(
    state: &State,
    held: &BTreeMap<NodeId, Capacity>,
    before: &[Suggestion],
) -> Option<(Suggestion, Capacity)> {
    let fill = |id: &NodeId, sum: Capacity| state.nodes().get(id).map_or(0, |node| fill_permille(state, node, sum));
    let from = held.iter().max_by_key(|(id, sum)| fill(id, **sum)).map(|(id, sum)| (*id, *sum))?;
    let to = held.iter().min_by_key(|(id, sum)| fill(id, **sum)).map(|(id, sum)| (*id, *sum))?;
    let extra = to.1.minus(state.reserved(to.0));
    let relief = |vm: &Vm| {
        let again = before.iter().any(|earlier| earlier.vm == vm.id);
        if again || state.may_move_to(vm, to.0, extra).is_err() {
            return None;
        }
        let after = fill(&from.0, from.1.minus(vm.size)).max(fill(&to.0, to.1.plus(vm.size)));
        let gain_permille = fill(&from.0, from.1).saturating_sub(after);
        let suggestion = Suggestion { vm: vm.id, from: from.0, to: to.0, gain_permille };
        (gain_permille >= LEAST_GAIN_PERMILLE).then_some((suggestion, vm.size))
    };
    let candidates = state.vms_on_node(from.0).filter_map(relief);
    candidates.max_by_key(|(suggestion, _)| (suggestion.gain_permille, std::cmp::Reverse(suggestion.vm)))
}

/// The fullest of a node's resources, by what is promised.
fn fill_permille(state: &State, node: &Node, held: Capacity) -> u64 {
    let room = state.promisable(node);
    let shares = [
        share(held.vcpus, room.vcpus),
        share(held.memory_bytes, room.memory_bytes),
        share(held.disk_bytes, room.disk_bytes),
    ];
    shares.into_iter().max().unwrap_or_default()
}
