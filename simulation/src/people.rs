//! Owners and operators: they ask for anything at any time, and repeat a request when its answer does not come.

use model::{
    Actor, Command, Entry, NodeId, OperatorCommand, Recovery, RequestId, Role, TenantCommand, TenantId, VmId, Wanted,
    command::Request,
};

use crate::{
    cloud::Cloud,
    controller::{Flight, Landing},
    dice::{Dice, SECOND},
    quorum::CONTROLLERS,
};

/// More machines than three hosts of six can hold.
const MOST_MACHINES: usize = 16;
const PAUSE_MILLIS: u64 = 900;

#[derive(Default)]
pub struct People {
    next_at: u64,
    asked: u128,
    waiting: Vec<Waiting>,
}

struct Waiting {
    flight: Flight,
    through: usize,
}

impl People {
    pub fn tick(&mut self, cloud: &mut Cloud) {
        let mut again = Vec::new();
        self.waiting.retain_mut(|waiting| {
            let applied = cloud.controllers[waiting.through].applied;
            let landing = waiting.flight.fly(&mut cloud.around, waiting.through, applied);
            match landing {
                None => return true,
                Some(Landing::Unknown | Landing::NotLeader) => again.push(waiting.flight.entry.clone()),
                // A copy of a request that was answered long ago comes out of the network.
                Some(Landing::Applied(..)) if cloud.around.dice.permille(80) => {
                    again.push(waiting.flight.entry.clone());
                }
                Some(Landing::Applied(..)) => {}
            }
            false
        });
        again.into_iter().for_each(|entry| self.send(cloud, entry));
        if cloud.around.now < self.next_at {
            return;
        }
        self.next_at = cloud.around.now + cloud.around.dice.below(2 * PAUSE_MILLIS) * (SECOND / 1000);
        let Some(command) = choose(cloud) else { return };
        self.asked += 1;
        let request = Request { id: RequestId(self.asked), body: self.asked.to_le_bytes() };
        let actor = Actor::User { name: "root".into(), role: Role::Operator };
        self.send(cloud, Entry { at: Default::default(), request: Some(request), actor, command });
    }

    fn send(&mut self, cloud: &mut Cloud, mut entry: Entry) {
        let through = cloud.around.dice.below(CONTROLLERS as u64) as usize;
        entry.at = cloud.controllers[through].wall(cloud.around.now);
        let flight = Flight::start(&mut cloud.around, entry, None);
        self.waiting.push(Waiting { flight, through });
    }
}

fn choose(cloud: &mut Cloud) -> Option<Command> {
    let state = &cloud.around.quorum.state;
    let vms: Vec<VmId> = state.vms().iter().map(|(id, _)| *id).collect();
    let nodes: Vec<NodeId> = state.nodes().iter().map(|(id, _)| *id).collect();
    let brake = state.cluster().brake;
    let dice = &mut cloud.around.dice;
    if vms.len() < MOST_MACHINES && dice.permille(450) {
        return Some(Command::Tenant(create(cloud)));
    }
    let (vm, node) = (dice.pick(&vms)?, dice.pick(&nodes)?);
    let power =
        |wanted, stop_grace_millis| Some(Command::Tenant(TenantCommand::SetVmPower { vm, wanted, stop_grace_millis }));
    match dice.below(51) {
        0..=3 => Some(Command::Tenant(TenantCommand::DeleteVm { vm, force: dice.permille(400) })),
        4..=7 => power(Wanted::Suspended, 0),
        8..=11 => power(Wanted::Stopped, [0, 3000][dice.below(2) as usize]),
        12..=21 => power(Wanted::Running, 0),
        22..=25 => Some(Command::Tenant(TenantCommand::RebootVm { vm })),
        26..=27 => Some(Command::Operator(OperatorCommand::CordonNode { node, cordoned: dice.permille(400) })),
        28 => Some(Command::Operator(OperatorCommand::MaintainNode { node, maintenance: true })),
        29..=31 => Some(Command::Operator(OperatorCommand::MaintainNode { node, maintenance: false })),
        37 => {
            let (recovery, priority) = (recovery(dice), 1);
            Some(Command::Tenant(TenantCommand::SetVmRecovery { vm, recovery, priority }))
        }
        38 if dice.permille(300) => Some(Command::Operator(OperatorCommand::CancelMigration { vm })),
        50 => Some(Command::Operator(OperatorCommand::DrainNode { node })),
        // Most are refused: the machine does not run, or there is no room.
        38..=49 => Some(Command::Operator(OperatorCommand::MigrateVm { vm, to: node })),
        32 => Some(Command::Operator(OperatorCommand::ArmRecovery { armed: false })),
        33..=36 if brake != model::Brake::Armed => {
            Some(Command::Operator(OperatorCommand::ArmRecovery { armed: true }))
        }
        _ => None,
    }
}

fn create(cloud: &mut Cloud) -> TenantCommand {
    let (image, network) = Cloud::image_and_network();
    let name = format!("vm{}", cloud.around.dice.below(1_000_000_000));
    let recovery = recovery(&mut cloud.around.dice);
    TenantCommand::CreateVm {
        tenant: TenantId(1),
        name: format!("x{name}"),
        image,
        template: "small".into(),
        network,
        ssh_keys: Vec::new(),
        user_data: String::new(),
        recovery,
        priority: cloud.around.dice.below(3) as u8,
    }
}

fn recovery(dice: &mut Dice) -> Recovery {
    match dice.below(10) {
        0..=5 => Recovery::Exclusive,
        6..=7 => Recovery::Available,
        8 => Recovery::RestartInPlace,
        _ => Recovery::None,
    }
}
