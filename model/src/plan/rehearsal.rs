//! Which host rehearses a backup, and when one is given up.

use std::cmp::Reverse;

use super::BATCH;
use crate::{Image, Node, NodeId, PlannerCommand, Rehearsal, State, Telemetry, Timestamp};

/// One a plan gets its place: the next plan knows what it took.
pub(super) fn rehearse(
    state: &State,
    telemetry: &Telemetry,
    now: Timestamp,
    mut may_place: bool,
) -> Vec<PlannerCommand> {
    let mut commands = Vec::new();
    let under_way = state.rehearsing().filter_map(|image| Some((image, image.rehearsal.as_ref()?)));
    for (image, rehearsal) in under_way.take(BATCH) {
        if rehearsal.deadline <= now {
            commands.push(PlannerCommand::ExpireRehearsal { image: image.id });
        } else if may_place
            && state.wants_place(rehearsal)
            && let Some(node) = place(state, telemetry, image, rehearsal)
        {
            may_place = false;
            commands.push(PlannerCommand::PlaceRehearsal { image: image.id, node });
        }
    }
    commands
}

/// Of the nodes with room: one that has the bytes, rather not the machine's own, with few machines.
fn place(state: &State, telemetry: &Telemetry, image: &Image, rehearsal: &Rehearsal) -> Option<NodeId> {
    let of = image.backup.and_then(|of| state.vms().get(&of.vm)).and_then(|vm| vm.placement);
    let rank = |node: &Node| {
        let holds = state.holds_chain(node.id, image);
        let own = of.is_some_and(|placement| placement.node == node.id);
        let cpu = telemetry.nodes.get(&node.id).map_or(1000, |heard| heard.status.cpu_permille);
        let rank = (holds, !own, Reverse(cpu), Reverse(state.vm_count_on_node(node.id)), Reverse(node.id));
        state.has_room(node, rehearsal.size).ok().map(|()| rank)
    };
    state.nodes().values().filter_map(rank).max().map(|(.., Reverse(node))| node)
}
