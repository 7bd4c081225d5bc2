//! The parts of a simulated cloud together, and one tick of it.

use std::{collections::BTreeMap, net::Ipv4Addr};

use model::{
    Actor, Capacity, Cidr, Command, Digest, Entry, ImageFormat, ImageId, JoinRole, NetworkId, NodeId, OperatorCommand,
    PlannerCommand, Quota, Role, TenantCommand, TenantId, level, setting,
};

use crate::{
    Outcome, TICK,
    controller::Controller,
    coverage::{self, Coverage},
    dice::{Dice, MILLI, SECOND},
    faults::Faults,
    host::Host,
    people::People,
    quorum::{CONTROLLERS, Quorum},
    surroundings::{Story, Surroundings},
    truth,
    wires::{Packet, Place, Wires},
};

pub const HOSTS: u64 = 6;
const GIB: u64 = 1 << 30;

pub struct Cloud {
    pub around: Surroundings,
    pub controllers: Vec<Controller>,
    pub hosts: BTreeMap<NodeId, Host>,
    pub people: People,
    pub faults: Faults,
}

impl Cloud {
    pub fn new(seed: u64, tell: bool) -> Self {
        let mut around = Surroundings {
            now: SECOND,
            dice: Dice::new(seed),
            wires: Wires::default(),
            quorum: Quorum::new(),
            coverage: Coverage::default(),
            story: Story { wanted: tell, lines: Vec::new() },
            doors: BTreeMap::new(),
            landings: Vec::new(),
        };
        let controllers = (0..CONTROLLERS).map(|number| Controller::new(number, &mut around)).collect();
        Self { around, controllers, hosts: BTreeMap::new(), people: People::default(), faults: Faults::default() }
    }

    pub fn is_whole(&self) -> bool {
        self.around.quorum.broken.is_none()
    }

    /// A young cloud: hosts that have not attached yet, a tenant, a network, an image.
    pub fn found(&mut self) {
        self.elect(0);
        self.write(Command::Planner(PlannerCommand::Found {
            cluster: "cloud".into(),
            controller: "one".into(),
            address: "192.0.2.1:7470".into(),
            operator: "root".into(),
            token: Digest([9; 32]),
        }));
        let level = if self.around.dice.permille(500) { level::LATEST } else { level::OLDEST };
        self.order(OperatorCommand::RaiseLevel { level });
        // Short, so that much happens in little time; the rest is as delivered.
        for (name, value) in [
            (setting::CREATE_DEADLINE, 30_000),
            (setting::CHANGE_DEADLINE, 20_000),
            (setting::DELETE_DEADLINE, 15_000),
            (setting::BRAKE_WINDOW, 45_000),
        ] {
            self.order(OperatorCommand::SetSetting { name: name.into(), value });
        }
        let much = Capacity { vcpus: 1000, memory_bytes: 1000 * GIB, disk_bytes: 10_000 * GIB };
        let quota = Quota { vms: 1000, size: much, networks: 10, image_bytes: 100 * GIB };
        self.order(OperatorCommand::CreateTenant { name: "acme".into(), quota });
        let size = Capacity { vcpus: 1, memory_bytes: GIB / 2, disk_bytes: GIB };
        self.order(OperatorCommand::CreateTemplate { name: "small".into(), size, weight_milli: 1000 });
        (0..HOSTS).for_each(|_| self.join_host());
        let range = Cidr { first: Ipv4Addr::new(10, 0, 0, 0), prefix: 24 };
        let tenant = TenantId(1);
        self.write(Command::Tenant(TenantCommand::CreateNetwork { tenant, name: "lan".into(), range }));
        let digest = Digest([5; 32]);
        self.write(Command::Tenant(TenantCommand::ImportImage {
            tenant,
            name: "debian".into(),
            format: ImageFormat::Qcow2,
            size_bytes: GIB,
            virtual_bytes: GIB,
            digest,
            replicas: vec![NodeId(1), NodeId(2)],
        }));
        for id in [NodeId(1), NodeId(2)] {
            self.hosts.get_mut(&id).expect("it has just joined").images.insert(digest);
        }
    }

    pub fn join_host(&mut self) {
        let number = self.around.quorum.state.cluster().last_node + 1;
        let token = Digest([u8::try_from(number).unwrap_or(255); 32]);
        self.order(OperatorCommand::IssueJoinToken { token, role: JoinRole::Agent, valid_millis: 600_000 });
        self.write(Command::Planner(PlannerCommand::JoinNode { token, name: format!("host{number}") }));
        let id = NodeId(number);
        let host = Host::new(id, &mut self.around);
        self.hosts.insert(id, host);
    }

    fn order(&mut self, command: OperatorCommand) {
        self.write(Command::Operator(command));
    }

    /// Straight into the log, as if a leader had taken it at once.
    pub fn write(&mut self, command: Command) {
        let at = self.controllers[self.around.quorum.leader].wall(self.around.now);
        let actor = match command {
            Command::Planner(_) => Actor::System,
            _ => Actor::User { name: "root".into(), role: Role::Operator },
        };
        let entry = Entry { at, request: None, actor, command };
        let index = self.around.quorum.append(self.around.now, entry, &mut self.around.coverage);
        let slot = self.around.quorum.slot(index);
        if let Some(Err(refusal)) = &slot.outcome {
            let what = format!("what founds or heals the cloud was refused: {refusal}");
            self.around.broken(what);
        }
    }

    pub fn image_and_network() -> (ImageId, NetworkId) {
        (ImageId(1), NetworkId(1))
    }

    pub fn make_trouble(&mut self) {
        let mut faults = std::mem::take(&mut self.faults);
        faults.tick(self);
        self.faults = faults;
        let mut people = std::mem::take(&mut self.people);
        people.tick(self);
        self.people = people;
    }

    pub fn tick(&mut self) {
        self.around.now += TICK;
        let now = self.around.now;
        for controller in &self.controllers {
            self.around.quorum.awake[controller.number] = controller.is_awake(now);
        }
        self.lead();
        while let Some((to, packet)) = self.around.wires.arrived(now) {
            self.receive(to, packet);
        }
        self.controllers.iter_mut().for_each(|controller| controller.tick(&mut self.around));
        self.hosts.values_mut().for_each(|host| host.tick(&mut self.around));
        self.around.wires.sweep();
        truth::look(self);
    }

    /// A leader without a majority is replaced after an election's time.
    fn lead(&mut self) {
        let Surroundings { now, dice, wires, quorum, .. } = &mut self.around;
        if quorum.leads(wires, quorum.leader) {
            quorum.headless_since = None;
            return;
        }
        let since = *quorum.headless_since.get_or_insert(*now);
        if *now < since + (600 + dice.below(1000)) * MILLI {
            return;
        }
        let able: Vec<usize> = (0..CONTROLLERS).filter(|number| quorum.reaches_majority(wires, *number)).collect();
        if let Some(next) = dice.pick(&able) {
            self.elect(next);
        }
    }

    /// A new term begins. The one that led hears of it in its own time; until then it goes on as before.
    pub fn elect(&mut self, next: usize) {
        let now = self.around.now;
        let old = self.around.quorum.leader;
        self.around.quorum.elect(now, next);
        let term = self.around.quorum.term;
        self.around.story.tell(now, || format!("controller {next} is elected for term {term}"));
        if old != next {
            self.around.coverage.count(coverage::LEADER_CHANGED);
            let cut_off = !self.around.wires.is_open_both_ways(Place::Controller(old), Place::Controller(next));
            let long_permille = if cut_off { 900 } else { 200 };
            let learns = now + self.around.dice.delay(1500, 15_000, long_permille);
            self.controllers[old].notify(learns, None);
        }
        let learns = now + self.around.dice.delay(200, 2000, 30);
        self.controllers[next].forget_notices();
        self.controllers[next].notify(learns, Some(term));
    }

    fn receive(&mut self, to: Place, packet: Packet) {
        let now = self.around.now;
        match (to, packet) {
            (Place::Controller(number), Packet::Beat(beat)) => {
                self.controllers[number].receive(&mut self.around, &beat);
            }
            (Place::Host(id), packet) => {
                let Some(host) = self.hosts.get_mut(&id).filter(|host| host.powered) else { return };
                let awake_at = host.agent_hung_until.max(host.frozen_until);
                if awake_at > now {
                    // It waits in the socket's buffer.
                    return self.around.wires.deliver_at(awake_at, to, packet);
                }
                let Some(mut agent) = host.agent.take() else { return };
                match packet {
                    Packet::Ack(from, ack) => agent.hear_ack(from, &ack, host),
                    Packet::Echo(assignment) => agent.obey(&mut self.around, host, *assignment),
                    Packet::Beat(_) => {}
                }
                host.agent = Some(agent);
            }
            (Place::Controller(_), _) => {}
        }
    }

    pub fn finish(mut self, seed: u64) -> Outcome {
        self.around.coverage.add(coverage::SIMULATED_SECONDS, self.around.now / SECOND);
        let Surroundings { coverage, story, quorum, .. } = self.around;
        let mut digest = quorum.state.hash();
        let ends = quorum.log.len() as u64 ^ self.around.now;
        digest.iter_mut().zip(ends.to_le_bytes()).for_each(|(byte, other)| *byte ^= other);
        Outcome { seed, coverage, broken: quorum.broken, story: story.lines, digest }
    }
}
