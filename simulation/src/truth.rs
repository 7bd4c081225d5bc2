//! What is true on the hosts, asked after every tick, whatever anybody believes.

use std::collections::{BTreeMap, BTreeSet};

use model::{Capacity, MigrationStage, NodeId, NodeState, Placement, VmId, Wanted, level};

use crate::{cloud::Cloud, coverage, host::Guest};

pub fn look(cloud: &mut Cloud) {
    let rules = [
        no_exclusive_machine_runs_twice,
        no_lease_outlives_its_host,
        hosts_hold_what_they_can,
        good_clocks_are_believed,
        what_a_machine_wrote_goes_with_it,
    ];
    for rule in rules {
        if let Err(what) = rule(cloud) {
            cloud.around.broken(what);
        }
    }
    count_copies(cloud);
}

fn running(cloud: &Cloud) -> impl Iterator<Item = (NodeId, VmId, &Guest)> {
    let now = cloud.around.now;
    cloud.hosts.iter().flat_map(move |(id, host)| {
        let runs = host.guests.iter().filter(move |(_, guest)| host.runs(now, guest));
        runs.map(move |(vm, guest)| (*id, *vm, guest))
    })
}

/// The promise: a machine that must not run twice does not, at any instant; nor does another under its address.
fn no_exclusive_machine_runs_twice(cloud: &Cloud) -> Result<(), String> {
    let mut hosts: BTreeMap<VmId, (NodeId, u64)> = BTreeMap::new();
    let mut addresses: BTreeMap<(u32, u32), VmId> = BTreeMap::new();
    // Nor does one that was available, ran twice, and must not any more: at lower levels nobody sees to that.
    let exclusive: BTreeSet<VmId> = running(cloud).filter(|(.., guest)| guest.exclusive).map(|(_, vm, _)| vm).collect();
    let careful = cloud.around.quorum.state.quorum().level >= level::CAREFUL;
    let others = running(cloud).filter(|(_, vm, guest)| careful && !guest.exclusive && exclusive.contains(vm));
    if let Some((host, vm, guest)) = others.into_iter().next() {
        return Err(format!("{vm} is exclusive, and runs on {host} as available at epoch {}", guest.epoch));
    }
    for (host, vm, guest) in running(cloud).filter(|(.., guest)| guest.exclusive) {
        if let Some((other, epoch)) = hosts.insert(vm, (host, guest.epoch)) {
            return Err(format!("{vm} runs on {other} at epoch {epoch} and on {host} at epoch {}", guest.epoch));
        }
        if let Some(other) = guest.address.and_then(|address| addresses.insert(address, vm)) {
            return Err(format!("{vm} on {host} runs under the address of {other}"));
        }
    }
    Ok(())
}

/// Whoever is declared lost has no lease, not even for a moment.
fn no_lease_outlives_its_host(cloud: &Cloud) -> Result<(), String> {
    for node in cloud.around.quorum.state.nodes().values().filter(|node| node.state == NodeState::Lost) {
        if cloud.hosts.get(&node.id).is_some_and(|host| host.lease_in_force(cloud.around.now)) {
            return Err(format!("{} is declared lost and has a lease in force", node.id));
        }
    }
    Ok(())
}

/// Every clock here runs within the bound, whatever is done to the beats.
fn good_clocks_are_believed(cloud: &Cloud) -> Result<(), String> {
    let blamed = cloud.around.quorum.state.nodes().values().find(|node| node.clock_drifts);
    blamed.map_or(Ok(()), |node| Err(format!("the clock of {} is said to drift", node.id)))?;
    let doubter = cloud.controllers.iter().position(|controller| controller.ears.own_clock_drifts());
    doubter.map_or(Ok(()), |number| Err(format!("controller {number} blames its own clock")))
}

/// The guests of current placements fit into their host. Stale ones may be beside them until they are set aside.
fn hosts_hold_what_they_can(cloud: &Cloud) -> Result<(), String> {
    let state = &cloud.around.quorum.state;
    for (id, host) in &cloud.hosts {
        let Some(node) = state.nodes().get(id) else { continue };
        let placed = |vm: &VmId, guest: &Guest| {
            let here = Placement { node: *id, epoch: guest.epoch };
            let row = state.vms().get(vm);
            let other = row.and_then(|vm| vm.migration).map(|migration| migration.other);
            row.and_then(|vm| vm.placement) == Some(here) || other == Some(here)
        };
        let sizes = host.guests.iter().filter(|(vm, guest)| placed(vm, guest)).map(|(_, guest)| guest.size);
        let used = sizes.fold(Capacity::default(), Capacity::plus);
        if !used.fits_in(state.promisable(node)) {
            return Err(format!("the guests of {id} take {used:?}, more than it may promise"));
        }
    }
    Ok(())
}

/// Whoever has a machine from another host has all that it wrote there, and never loses it again.
fn what_a_machine_wrote_goes_with_it(cloud: &Cloud) -> Result<(), String> {
    for vm in cloud.around.quorum.state.vms().values() {
        let (Some(here), Some(migration)) = (vm.placement, vm.migration) else { continue };
        // Of one that is being deleted either host may be the first to have nothing left.
        if migration.stage != MigrationStage::HandedOver || vm.wanted == Wanted::Deleted {
            continue;
        }
        let written = |placement: Placement| {
            let guest = cloud.hosts.get(&placement.node)?.guests.get(&vm.id)?;
            (guest.epoch == placement.epoch).then_some(guest.written)
        };
        let Some(left) = written(migration.other) else { continue };
        let have = written(here);
        if have.unwrap_or_default() < left {
            return Err(format!("{} wrote {left} on {}, and {} has {have:?}", vm.id, migration.other.node, here.node));
        }
    }
    Ok(())
}

/// An available machine may run twice while its host is cut off; that this happens shows that the others could.
fn count_copies(cloud: &mut Cloud) {
    let mut copies: BTreeMap<VmId, u64> = BTreeMap::new();
    running(cloud).for_each(|(_, vm, _)| *copies.entry(vm).or_default() += 1);
    let twice = copies.values().filter(|copies| **copies > 1).count() as u64;
    if twice > 0 {
        cloud.around.coverage.add(coverage::MACHINE_TWICE, twice);
    }
}
