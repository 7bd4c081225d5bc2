//! When nothing goes wrong any more, everything that fits must run, and nothing may be left over.

use model::{
    Capacity, Command, Node, NodeId, NodeState, OperatorCommand, Phase, Status, TenantCommand, Vm, VmId, Wanted,
    steps::FoundPower,
};

use crate::{
    cloud::Cloud,
    coverage,
    dice::{MILLI, SECOND},
    faults,
};

/// Longer than any pause, deadline and stepped clock together: after this it would never settle.
const PATIENCE: u64 = 1500 * SECOND;
/// It must stay so, too.
const STAYS: u64 = 8 * SECOND;
/// People ask again for what failed.
const ASK_AGAIN: u64 = 30 * SECOND;
/// By then leases are back and everybody is heard: from here on nobody may be declared lost.
const GRACE: u64 = 15 * SECOND;

/// Ends every fault, and lets people take back what stands in the way.
pub fn heal(cloud: &mut Cloud) {
    let now = cloud.around.now;
    cloud.around.story.tell(now, || "from here on nothing goes wrong".into());
    faults::heal_all(cloud);
    (cloud.around.wires.loss_permille, cloud.around.wires.late_permille) = (0, 0);
    for controller in &mut cloud.controllers {
        (controller.running, controller.frozen_until, controller.wall_off) = (true, 0, 0);
        controller.lag = 50 * MILLI;
    }
    for host in cloud.hosts.values_mut() {
        (host.frozen_until, host.agent_hung_until, host.failing_permille) = (0, 0, 0);
        if !host.powered {
            host.power_on(&mut cloud.around);
        }
    }
}

fn take_back(cloud: &mut Cloud) {
    let nodes: Vec<NodeId> = cloud.around.quorum.state.nodes().iter().map(|(id, _)| *id).collect();
    for node in nodes {
        cloud.write(Command::Operator(OperatorCommand::CordonNode { node, cordoned: false }));
        cloud.write(Command::Operator(OperatorCommand::MaintainNode { node, maintenance: false }));
    }
    cloud.write(Command::Operator(OperatorCommand::ArmRecovery { armed: true }));
}

/// Waits until all is well, and that it stays so.
pub fn settle(cloud: &mut Cloud) {
    let began = cloud.around.now;
    let (mut well_since, mut lost, mut asked_at) = (None, None, began);
    let mut taken_back = false;
    while cloud.is_whole() {
        cloud.tick();
        let now = cloud.around.now;
        let able = cloud.around.quorum.leads(&cloud.around.wires, cloud.around.quorum.leader);
        if !taken_back && able && now >= began + SECOND {
            taken_back = true;
            take_back(cloud);
        }
        if now >= began + GRACE {
            let losses = cloud.around.coverage.of(coverage::NODE_LOST);
            if *lost.get_or_insert(losses) != losses {
                cloud.around.broken("a node is declared lost although nothing is wrong".into());
            }
        }
        if able && now >= asked_at + ASK_AGAIN {
            asked_at = now;
            ask_again(cloud);
        }
        match unsettled(cloud) {
            None if now >= *well_since.get_or_insert(now) + STAYS && now >= began + GRACE => break,
            None => {}
            Some(what) => {
                well_since = None;
                if now >= began + PATIENCE {
                    cloud.around.broken(format!("it does not come to rest: {what}"));
                }
            }
        }
    }
    if let Err(what) = cloud.around.quorum.ledger.agrees(&cloud.around.quorum.state) {
        cloud.around.broken(what);
    }
}

/// What owners have stopped runs again, wherever it was moved meanwhile, on the disk that it had.
pub fn start_what_is_stopped(cloud: &mut Cloud) {
    let written = |cloud: &Cloud, vm: VmId| {
        let placement = cloud.around.quorum.state.vms().get(&vm)?.placement?;
        let guest = cloud.hosts.get(&placement.node)?.guests.get(&vm)?;
        (guest.epoch == placement.epoch).then_some(guest.written)
    };
    let stopped = run_all_that_is(cloud, Status::Stopped);
    let before: Vec<(VmId, Option<u64>)> = stopped.into_iter().map(|vm| (vm, written(cloud, vm))).collect();
    settle(cloud);
    for (vm, before) in before {
        let after = written(cloud, vm);
        if before > after {
            cloud.around.broken(format!("{vm} had written {before:?} when it was started, and then has {after:?}"));
        }
    }
}

fn ask_again(cloud: &mut Cloud) {
    run_all_that_is(cloud, Status::Failed);
}

fn run_all_that_is(cloud: &mut Cloud, status: Status) -> Vec<VmId> {
    let fits = |vm: &&Vm| vm.status() == status;
    let vms: Vec<VmId> = cloud.around.quorum.state.vms().values().filter(fits).map(|vm| vm.id).collect();
    for vm in vms.iter().copied() {
        let wanted = Wanted::Running;
        cloud.write(Command::Tenant(TenantCommand::SetVmPower { vm, wanted, stop_grace_millis: 0 }));
    }
    vms
}

/// What is not as it should be yet, in one sentence.
fn unsettled(cloud: &Cloud) -> Option<String> {
    let state = &cloud.around.quorum.state;
    let last = cloud.around.quorum.last();
    if let Some(behind) = cloud.controllers.iter().find(|controller| controller.applied != last) {
        return Some(format!("controller {} has applied {} of {last}", behind.number, behind.applied));
    }
    if let Some(node) = state.nodes().values().find(|node| node.state != NodeState::Up) {
        return Some(format!("{} is {:?}", node.id, node.state));
    }
    state.vms().values().find_map(|vm| unsettled_machine(cloud, vm)).or_else(|| left_over(cloud))
}

fn unsettled_machine(cloud: &Cloud, vm: &Vm) -> Option<String> {
    let state = &cloud.around.quorum.state;
    let status = vm.status();
    let say = |why: &str| Some(format!("{} is {status} and {why}: {}", vm.id, vm.reason));
    if vm.ghost {
        return say("a ghost");
    }
    if vm.migration.is_some() {
        return say("not done with its move");
    }
    let fits = |node: &Node| {
        let room: Capacity = state.promisable(node).minus(state.reserved(node.id));
        vm.size.fits_in(room)
    };
    let Some(placement) = vm.placement else {
        return match status {
            Status::Stopped => None,
            Status::Pending if !state.nodes().values().any(fits) => None,
            Status::Pending => say("there is room for it"),
            _ => say("has no host"),
        };
    };
    let guest = cloud.hosts.get(&placement.node).and_then(|host| host.guests.get(&vm.id));
    let guest = guest.filter(|guest| guest.epoch == placement.epoch);
    let runs = |power: FoundPower| guest.is_some_and(|guest| guest.power == power && !guest.stopped);
    match status {
        Status::Running if runs(FoundPower::Running) && vm.rebooted == vm.reboots => None,
        Status::Suspended if runs(FoundPower::Suspended) => None,
        Status::Stopped if !runs(FoundPower::Running) && vm.phase == Some(Phase::Stopped) => None,
        _ => say("its host has something else"),
    }
}

fn left_over(cloud: &Cloud) -> Option<String> {
    let state = &cloud.around.quorum.state;
    for (id, host) in &cloud.hosts {
        for (vm, guest) in &host.guests {
            let placement = state.vms().get(vm).and_then(|vm| vm.placement);
            if !placement.is_some_and(|placement| placement.node == *id && placement.epoch == guest.epoch) {
                return Some(format!("{id} still has {vm} of epoch {}", guest.epoch));
            }
        }
    }
    None
}
