//! What goes wrong, and for how long.

use std::collections::BTreeMap;

use model::{Command, NodeId, OperatorCommand, VmId};

use crate::{cloud::Cloud, coverage, dice::MILLI, quorum::CONTROLLERS, wires::Place};

/// About one fault in this time.
const PAUSE_MILLIS: u64 = 2500;

#[derive(Default)]
pub struct Faults {
    next_at: u64,
    heals: BTreeMap<(u64, u64), Heal>,
    number: u64,
}

#[derive(Clone)]
enum Heal {
    Mend(Vec<(Place, Place)>),
    PowerOn(NodeId),
    Restart(usize),
    Loss,
    Steps(NodeId),
}

impl Faults {
    pub fn tick(&mut self, cloud: &mut Cloud) {
        while let Some(first) = self.heals.first_entry() {
            if first.key().0 > cloud.around.now {
                break;
            }
            let heal = first.remove();
            mend(cloud, heal);
        }
        let now = cloud.around.now;
        if now >= self.next_at {
            self.next_at = now + cloud.around.dice.below(2 * PAUSE_MILLIS) * MILLI;
            self.strike(cloud);
        }
    }

    fn later(&mut self, cloud: &mut Cloud, least_millis: u64, most_millis: u64, heal: Heal) {
        self.number += 1;
        let at = cloud.around.now + cloud.around.dice.between(least_millis, most_millis) * MILLI;
        self.heals.insert((at, self.number), heal);
    }

    fn strike(&mut self, cloud: &mut Cloud) {
        let hosts: Vec<NodeId> = cloud.hosts.keys().copied().collect();
        let Some(host) = cloud.around.dice.pick(&hosts) else { return };
        let controller = cloud.around.dice.below(CONTROLLERS as u64) as usize;
        match cloud.around.dice.below(30) {
            0..=2 => self.cut_host(cloud, &[host], 25_000),
            3 => self.fail_steps(cloud, host),
            4 => {
                let all = cloud.around.dice.permille(500);
                let cut: Vec<NodeId> = hosts.into_iter().filter(|_| all || cloud.around.dice.permille(600)).collect();
                self.cut_host(cloud, &cut, 14_000);
            }
            5..=6 => self.cut_link(cloud, host, controller),
            7 => self.cut_controller(cloud),
            8..=9 => self.part(cloud, &hosts),
            10..=12 => transfer(cloud, controller),
            13..=14 => self.crash_controller(cloud, controller),
            15 => self.freeze_controller(cloud, controller),
            16 => self.lose_datagrams(cloud),
            17..=18 => kill_agent(cloud, host),
            19..=20 => hang_agent(cloud, host),
            21..=23 => self.cut_power(cloud, host),
            24 => freeze_host(cloud, host),
            25..=26 => crash_guest(cloud, host),
            27 => step_wall_clock(cloud, controller),
            28 => self.fail_steps(cloud, host),
            _ => replace_host(cloud, host),
        }
    }

    fn cut(&mut self, cloud: &mut Cloud, what: &str, links: Vec<(Place, Place)>, most_millis: u64) {
        let now = cloud.around.now;
        cloud.around.story.tell(now, || format!("cut: {what}"));
        links.iter().for_each(|(from, to)| cloud.around.wires.cut(*from, *to));
        self.later(cloud, 1000, most_millis, Heal::Mend(links));
    }

    /// From all controllers: both ways, or one way only.
    fn cut_host(&mut self, cloud: &mut Cloud, hosts: &[NodeId], most_millis: u64) {
        let way = cloud.around.dice.below(4);
        let controllers = (0..CONTROLLERS).map(Place::Controller);
        let pairs: Vec<(Place, Place)> =
            controllers.flat_map(|c| hosts.iter().map(move |host| (Place::Host(*host), c))).collect();
        let up = pairs.iter().copied().filter(|_| way != 0);
        let down = pairs.iter().map(|(host, c)| (*c, *host)).filter(|_| way != 1);
        if way < 2 {
            cloud.around.coverage.count(coverage::ONE_WAY_CUT);
        }
        let what = format!("{hosts:?} from all controllers, {}", ["only down", "only up", "", ""][way as usize]);
        self.cut(cloud, &what, up.chain(down).collect(), most_millis);
    }

    fn cut_link(&mut self, cloud: &mut Cloud, host: NodeId, controller: usize) {
        let (host, controller) = (Place::Host(host), Place::Controller(controller));
        let links = vec![(host, controller), (controller, host)];
        self.cut(cloud, &format!("{host:?} from {controller:?}"), links, 30_000);
    }

    /// The leader from the other controllers: its hosts may still hear it, and it does not know yet.
    fn cut_controller(&mut self, cloud: &mut Cloud) {
        let one = cloud.around.quorum.leader;
        let way = cloud.around.dice.below(3);
        let others = (0..CONTROLLERS).filter(|other| *other != one).map(Place::Controller);
        let one = Place::Controller(one);
        let mut links: Vec<(Place, Place)> = Vec::new();
        for other in others {
            if way != 1 {
                links.push((one, other));
            }
            if way != 0 {
                links.push((other, one));
            }
        }
        self.cut(cloud, &format!("the leader {one:?} from the others"), links, 20_000);
    }

    /// The leader and some hosts on one side, the other controllers and hosts on the other: it goes on answering its
    /// hosts until it knows that it leads no more, and the others cannot hear them.
    fn part(&mut self, cloud: &mut Cloud, hosts: &[NodeId]) {
        let leader = cloud.around.quorum.leader;
        let others = || (0..CONTROLLERS).filter(move |other| *other != leader).map(Place::Controller);
        let with_it: Vec<NodeId> = hosts.iter().copied().filter(|_| cloud.around.dice.permille(400)).collect();
        let places = with_it.iter().map(|host| Place::Host(*host)).chain([Place::Controller(leader)]);
        let links = places.flat_map(|place| others().flat_map(move |other| [(place, other), (other, place)]));
        self.cut(cloud, &format!("controller {leader} and {with_it:?} from the others"), links.collect(), 20_000);
    }

    fn crash_controller(&mut self, cloud: &mut Cloud, number: usize) {
        let now = cloud.around.now;
        let controller = &mut cloud.controllers[number];
        if !controller.running {
            return;
        }
        controller.restart(&mut cloud.around);
        controller.running = false;
        cloud.around.coverage.count(coverage::CONTROLLER_RESTARTED);
        cloud.around.story.tell(now, || format!("controller {number} is killed"));
        self.later(cloud, 200, 8000, Heal::Restart(number));
    }

    fn freeze_controller(&mut self, cloud: &mut Cloud, number: usize) {
        let now = cloud.around.now;
        cloud.controllers[number].frozen_until = now + cloud.around.dice.between(300, 9000) * MILLI;
        cloud.around.story.tell(now, || format!("controller {number} stands still"));
    }

    fn lose_datagrams(&mut self, cloud: &mut Cloud) {
        cloud.around.wires.loss_permille = cloud.around.dice.between(50, 500);
        cloud.around.wires.late_permille = cloud.around.dice.between(20, 300);
        let now = cloud.around.now;
        cloud.around.story.tell(now, || "datagrams are lost and late".into());
        self.later(cloud, 2000, 15_000, Heal::Loss);
    }

    fn cut_power(&mut self, cloud: &mut Cloud, host: NodeId) {
        let Some(host) = cloud.hosts.get_mut(&host).filter(|host| host.powered) else { return };
        host.cut_power(&mut cloud.around);
        cloud.around.coverage.count(coverage::POWER_CUT);
        let id = host.id;
        self.later(cloud, 2000, 40_000, Heal::PowerOn(id));
    }

    fn fail_steps(&mut self, cloud: &mut Cloud, id: NodeId) {
        let failing = cloud.around.dice.between(400, 980);
        if let Some(host) = cloud.hosts.get_mut(&id) {
            host.failing_permille = failing;
        }
        self.later(cloud, 3000, 25_000, Heal::Steps(id));
    }
}

/// What is still broken ends now.
pub fn heal_all(cloud: &mut Cloud) {
    let heals = std::mem::take(&mut cloud.faults.heals);
    heals.into_values().for_each(|heal| mend(cloud, heal));
    cloud.around.wires.mend_all();
}

fn mend(cloud: &mut Cloud, heal: Heal) {
    let now = cloud.around.now;
    match heal {
        Heal::Mend(links) => {
            cloud.around.story.tell(now, || format!("mended: {links:?}"));
            links.into_iter().for_each(|(from, to)| cloud.around.wires.mend(from, to));
        }
        Heal::PowerOn(id) => {
            if let Some(host) = cloud.hosts.get_mut(&id).filter(|host| !host.powered) {
                host.power_on(&mut cloud.around);
                cloud.around.story.tell(now, || format!("{id} has power again"));
            }
        }
        Heal::Restart(number) => cloud.controllers[number].running = true,
        Heal::Loss => (cloud.around.wires.loss_permille, cloud.around.wires.late_permille) = (0, 0),
        Heal::Steps(id) => {
            if let Some(host) = cloud.hosts.get_mut(&id) {
                host.failing_permille = 0;
            }
        }
    }
}

fn transfer(cloud: &mut Cloud, to: usize) {
    let able = cloud.around.quorum.reaches_majority(&cloud.around.wires, to);
    if able && to != cloud.around.quorum.leader {
        cloud.elect(to);
    }
}

fn kill_agent(cloud: &mut Cloud, id: NodeId) {
    let Some(host) = cloud.hosts.get_mut(&id).filter(|host| host.powered) else { return };
    let starts_at = cloud.around.now + cloud.around.dice.between(300, 12_000) * MILLI;
    host.kill_agent(&mut cloud.around, starts_at);
    cloud.around.coverage.count(coverage::AGENT_KILLED);
    let now = cloud.around.now;
    cloud.around.story.tell(now, || format!("the agent of {id} is killed"));
}

fn hang_agent(cloud: &mut Cloud, id: NodeId) {
    let Some(host) = cloud.hosts.get_mut(&id) else { return };
    host.agent_hung_until = cloud.around.now + cloud.around.dice.between(1000, 15_000) * MILLI;
    let now = cloud.around.now;
    cloud.around.story.tell(now, || format!("the agent of {id} hangs"));
}

fn freeze_host(cloud: &mut Cloud, id: NodeId) {
    let Some(host) = cloud.hosts.get_mut(&id) else { return };
    host.frozen_until = cloud.around.now + cloud.around.dice.between(1000, 12_000) * MILLI;
    let now = cloud.around.now;
    cloud.around.story.tell(now, || format!("{id} stands still"));
}

fn crash_guest(cloud: &mut Cloud, id: NodeId) {
    let Some(host) = cloud.hosts.get_mut(&id) else { return };
    let vms: Vec<VmId> = host.guests.keys().copied().collect();
    if let Some(vm) = cloud.around.dice.pick(&vms) {
        host.crash_guest(vm);
        cloud.around.coverage.count(coverage::GUEST_CRASHED);
        let now = cloud.around.now;
        cloud.around.story.tell(now, || format!("{vm} crashes on {id}"));
    }
}

fn step_wall_clock(cloud: &mut Cloud, number: usize) {
    cloud.controllers[number].wall_off = cloud.around.dice.below(60_000) as i64 - 30_000;
    cloud.around.coverage.count(coverage::WALL_STEPPED);
}

/// A host that has no power is given up for ever by its operator, and another one joins.
fn replace_host(cloud: &mut Cloud, id: NodeId) {
    let dead = cloud.hosts.get(&id).is_some_and(|host| !host.powered);
    let known = cloud.around.quorum.state.nodes().contains(&id);
    let leads = cloud.around.quorum.leads(&cloud.around.wires, cloud.around.quorum.leader);
    if dead && known && leads && id > NodeId(2) {
        cloud.hosts.remove(&id);
        cloud.write(Command::Operator(OperatorCommand::RemoveNode { node: id, force: true }));
        cloud.around.coverage.count(coverage::NODE_REMOVED);
        cloud.join_host();
    }
}
