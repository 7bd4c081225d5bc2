//! What always holds, one named function each. The property tests check them after every entry, and
//! `trefoil quorum check` on a living cloud.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Capacity, Mac, Phase, Placement, State, Wanted};

/// A rule and what breaks it; `Err` is one sentence that names the row.
pub type Invariant = (&'static str, fn(&State) -> Result<(), String>);

pub const INVARIANTS: &[Invariant] = &[
    ("indexes equal what the rows say", indexes_are_true),
    ("an address is held once", addresses_are_unique),
    ("a node is promised no more than it has", promises_are_covered),
    ("a placed machine is on a node that exists", placements_exist),
    ("a machine moves between two nodes that exist", moves_have_two_ends),
    ("a machine without a node is nothing but failed", unplaced_have_no_phase),
    ("quotas are kept", quotas_are_kept),
    ("a machine is charged exactly while its host says it is there", meters_follow_phases),
    ("a backup stands on an older one of the same machine, or on nothing", chains_are_whole),
    ("a machine in transition has a deadline or waits for a node", transitions_end),
    ("the charged spans of a resource do not overlap", lines_do_not_overlap),
];

/// The rules that do not hold, each by its name and what breaks it.
pub fn broken(state: &State) -> impl Iterator<Item = (&'static str, String)> {
    INVARIANTS.iter().filter_map(|(name, rule)| rule(state).err().map(|what| (*name, what)))
}

/// The first rule that does not hold.
///
/// # Errors
/// The rule's name and what breaks it.
pub fn check(state: &State) -> Result<(), String> {
    broken(state).next().map_or(Ok(()), |(name, what)| Err(format!("{name}: {what}")))
}

fn indexes_are_true(state: &State) -> Result<(), String> {
    if state.rebuilt_index() == *state.kept_index() {
        Ok(())
    } else {
        Err("a kept index differs from a rebuilt one".into())
    }
}

fn addresses_are_unique(state: &State) -> Result<(), String> {
    let mut macs: BTreeSet<Mac> = BTreeSet::new();
    let mut ips = BTreeSet::new();
    for (vm, nic) in state.vms().values().flat_map(|vm| vm.nics.iter().map(move |nic| (vm.id, nic))) {
        let network = state
            .networks()
            .get(&nic.network)
            .ok_or_else(|| format!("{vm} is in {} which does not exist", nic.network))?;
        if !macs.insert(nic.mac) || !ips.insert((nic.network, nic.ip)) {
            return Err(format!("{vm} has {} and {} which another has too", nic.mac, nic.ip));
        }
        if !network.range.contains(nic.ip) || nic.ip <= network.range.gateway() || nic.ip >= network.range.broadcast() {
            return Err(format!("{vm} has {} outside of {}", nic.ip, network.range));
        }
    }
    let vnis: BTreeSet<u32> = state.networks().values().map(|network| network.vni).collect();
    if vnis.len() == state.networks().len() { Ok(()) } else { Err("two networks have one VNI".into()) }
}

fn promises_are_covered(state: &State) -> Result<(), String> {
    let mut sums: BTreeMap<_, Capacity> = BTreeMap::new();
    for vm in state.vms().values() {
        for node in vm.hosts() {
            let sum = sums.entry(node).or_default();
            *sum = sum.plus(vm.size);
        }
    }
    for rehearsal in state.images().values().filter_map(|image| image.rehearsal.as_ref()) {
        if let Some(placement) = rehearsal.placement {
            let sum = sums.entry(placement.node).or_default();
            *sum = sum.plus(rehearsal.size);
        }
    }
    for (node, sum) in sums {
        if sum != state.reserved(node) {
            return Err(format!("{node} has {sum:?} promised, the index says {:?}", state.reserved(node)));
        }
    }
    Ok(())
}

fn placements_exist(state: &State) -> Result<(), String> {
    let lost = state.vms().values().find(|vm| vm.placement.is_some_and(|p| !state.nodes().contains(&p.node)));
    lost.map_or(Ok(()), |vm| Err(format!("{} is on a node that does not exist", vm.id)))
}

fn moves_have_two_ends(state: &State) -> Result<(), String> {
    for vm in state.vms().values() {
        let Some(migration) = vm.migration else { continue };
        let Placement { node, epoch } = migration.other;
        let own = vm.placement.ok_or_else(|| format!("{} moves and has no node", vm.id))?;
        if own.node == node || own.epoch == epoch || !state.nodes().contains(&node) {
            return Err(format!("{} is on {} and moves to or from {node}", vm.id, own.node));
        }
        if vm.is_moving() && migration.left && migration.arrived {
            return Err(format!("{} has left and arrived, and was not handed over", vm.id));
        }
    }
    Ok(())
}

fn unplaced_have_no_phase(state: &State) -> Result<(), String> {
    let told = |vm: &&crate::Vm| vm.placement.is_none() && !matches!(vm.phase, None | Some(Phase::Failed));
    state.vms().values().find(told).map_or(Ok(()), |vm| Err(format!("{} has no node and is {:?}", vm.id, vm.phase)))
}

fn quotas_are_kept(state: &State) -> Result<(), String> {
    for tenant in state.tenants().values() {
        let mut held = Capacity::default();
        let mut count = 0;
        for vm in state.vms_of_tenant(tenant.id) {
            held = held.plus(vm.size);
            count += 1;
        }
        let usage = state.usage(tenant.id);
        if (usage.vms, usage.size) != (count, held) {
            return Err(format!("{} holds {count} machines, the index says {}", tenant.name, usage.vms));
        }
    }
    Ok(())
}

fn meters_follow_phases(state: &State) -> Result<(), String> {
    for vm in state.vms().values() {
        let there = matches!(vm.phase, Some(Phase::Running | Phase::Suspended | Phase::Stopped));
        let charged = there && !vm.ghost && vm.wanted != Wanted::Deleted;
        if state.meters().contains(&crate::Resource::Vm(vm.id)) != charged {
            return Err(format!("{} is {:?} and {}charged", vm.id, vm.phase, if charged { "not " } else { "" }));
        }
    }
    Ok(())
}

fn chains_are_whole(state: &State) -> Result<(), String> {
    for image in state.images().values() {
        let Some((of, id)) = image.backup.and_then(|of| Some((of, of.parent?))) else { continue };
        let parent = state.images().get(&id).ok_or_else(|| format!("{} stands on {id}, which is gone", image.id))?;
        let fits = parent.backup.is_some_and(|parent| parent.vm == of.vm);
        if !fits || parent.id >= image.id || parent.virtual_bytes != image.virtual_bytes {
            return Err(format!("{} stands on {id}, which is no older copy of its disk", image.id));
        }
    }
    Ok(())
}

fn transitions_end(state: &State) -> Result<(), String> {
    let stuck = |vm: &&crate::Vm| vm.in_transition() && !vm.ghost && vm.placement.is_some() && vm.deadline.is_none();
    state
        .vms()
        .values()
        .find(stuck)
        .map_or(Ok(()), |vm| Err(format!("{} is {} without a deadline", vm.id, vm.status())))
}

fn lines_do_not_overlap(state: &State) -> Result<(), String> {
    let mut ends = BTreeMap::new();
    for line in state.lines().values() {
        let end = ends.entry((line.tenant, line.resource)).or_default();
        if line.from < *end || line.from >= line.to {
            return Err(format!(
                "{} is charged from {} although it was charged until {}",
                line.resource, line.from.0, end.0
            ));
        }
        *end = line.to;
    }
    let open = state
        .meters()
        .values()
        .find(|meter| ends.get(&(meter.tenant, meter.resource)).is_some_and(|end| meter.since < *end));
    open.map_or(Ok(()), |meter| Err(format!("{} has a meter that began before its last line ended", meter.resource)))
}
