//! A host: its guests, the guard that stops them at the end of a lease whatever the agent does, and the ground truth of
//! what runs. Power may go, the whole machine may freeze, the agent may hang or die.

use std::collections::{BTreeMap, BTreeSet};

use model::{
    Assignment, Capacity, Digest, NodeId, VmId,
    permit::{Permit, Verdict},
    steps::{FoundGuest, FoundPower, Step},
};

use crate::{
    agent::{Agent, Journal},
    coverage,
    dice::{Clock, MILLI},
    surroundings::{Landing, Surroundings},
};

#[derive(Clone, Debug)]
pub struct Guest {
    pub epoch: u64,
    pub power: FoundPower,
    /// Paused by the guard: it does not run, whatever its power says.
    pub stopped: bool,
    /// The host was told that it must not run twice.
    pub exclusive: bool,
    pub size: Capacity,
    pub address: Option<(u32, u32)>,
    /// It came as a disk, off, and was not handed over yet.
    pub at_rest: bool,
    /// For how many ticks it has run on this disk: what it wrote. A disk that was made anew has nothing.
    pub written: u64,
}

/// A step of the agent that is under way; its effect may come although the agent has died meanwhile.
struct Operation {
    due: u64,
    step: Step,
    assignment: Assignment,
    fails: bool,
    process: u64,
}

pub struct Host {
    pub id: NodeId,
    pub capacity: Capacity,
    pub clock: Clock,
    pub powered: bool,
    /// The whole machine stands still, guests too; its BOOTTIME goes on.
    pub frozen_until: u64,
    pub guests: BTreeMap<VmId, Guest>,
    pub networks: BTreeSet<u32>,
    pub images: BTreeSet<Digest>,
    /// What agent and guard share; lost with the power.
    pub page: Permit,
    operations: Vec<Operation>,
    pub journal: Journal,
    pub agent: Option<Agent>,
    pub agent_hung_until: u64,
    pub agent_starts_at: u64,
    pub failing_permille: u64,
    processes: u64,
}

impl Host {
    pub fn new(id: NodeId, around: &mut Surroundings) -> Self {
        let capacity = Capacity { vcpus: 4, memory_bytes: 2500 << 20, disk_bytes: 200 << 30 };
        Self {
            id,
            capacity,
            clock: Clock::new(around.now, &mut around.dice),
            powered: true,
            frozen_until: 0,
            guests: BTreeMap::new(),
            networks: BTreeSet::new(),
            images: BTreeSet::new(),
            page: Permit::default(),
            operations: Vec::new(),
            journal: Journal::default(),
            agent: None,
            agent_hung_until: 0,
            agent_starts_at: around.now,
            failing_permille: 0,
            processes: 0,
        }
    }

    pub fn is_live(&self, now: u64) -> bool {
        self.powered && now >= self.frozen_until
    }

    /// The ground truth: instructions of this guest are executed now.
    pub fn runs(&self, now: u64, guest: &Guest) -> bool {
        self.is_live(now) && guest.power == FoundPower::Running && !guest.stopped
    }

    /// Until when this host believes that it may go on, if that is not over.
    pub fn lease_in_force(&self, now: u64) -> bool {
        self.powered && self.clock.at(now) < self.page.until
    }

    pub fn tick(&mut self, around: &mut Surroundings) {
        if !self.is_live(around.now) {
            return;
        }
        self.guard(around);
        self.operate(around);
        self.land(around);
        // The guard finds what the operations have just started before anything else happens on the host.
        self.guard(around);
        self.write(around.now);
        if self.agent.is_none() && around.now >= self.agent_starts_at {
            self.processes += 1;
            self.agent = Some(Agent::start(self.id, self.processes, self.journal.clone(), self.page.clone()));
        }
        if around.now >= self.agent_hung_until
            && let Some(mut agent) = self.agent.take()
        {
            agent.tick(around, self);
            self.agent = Some(agent);
        }
    }

    /// `trefoil agent guard`, in its own process: it knows the page, the clock and the guests, and nothing else.
    fn guard(&mut self, around: &mut Surroundings) {
        let now = self.clock.at(around.now);
        for (vm, guest) in &mut self.guests {
            let process = matches!(guest.power, FoundPower::Running | FoundPower::Suspended | FoundPower::Arrived);
            if !process || guest.at_rest {
                continue;
            }
            let stopped = match self.page.verdict(*vm, Some(guest.epoch), now) {
                Verdict::Run => false,
                Verdict::Stop => true,
                Verdict::Leave => continue,
            };
            if stopped == guest.stopped {
                continue;
            }
            guest.stopped = stopped;
            around.coverage.count(if stopped { coverage::LEASE_LAPSED } else { coverage::LEASE_BACK_IN_TIME });
            let (id, vm, epoch) = (self.id, *vm, guest.epoch);
            let what = if stopped { "stops" } else { "lets go on" };
            around.story.tell(around.now, || format!("the guard of {id} {what} {vm} of epoch {epoch}"));
        }
    }

    /// Whatever runs writes to its disk.
    fn write(&mut self, now: u64) {
        let (powered, frozen_until) = (self.powered, self.frozen_until);
        let runs = |guest: &&mut Guest| guest.power == FoundPower::Running && !guest.stopped;
        for guest in self.guests.values_mut().filter(runs).filter(|_| powered && now >= frozen_until) {
            guest.written += 1;
        }
    }

    pub fn begin(&mut self, around: &mut Surroundings, step: Step, assignment: &Assignment, process: u64) {
        let due = around.now + MILLI + around.dice.delay(1200, 30_000, 80);
        let fails = around.dice.permille(self.failing_permille);
        self.operations.push(Operation { due, step, assignment: assignment.clone(), fails, process });
    }

    fn operate(&mut self, around: &mut Surroundings) {
        let (due, later) = std::mem::take(&mut self.operations).into_iter().partition(|op| op.due <= around.now);
        self.operations = later;
        let due: Vec<Operation> = due;
        for operation in due {
            let result = if operation.fails { Err(()) } else { self.perform(around, &operation) };
            if let Some(agent) = self.agent.as_mut().filter(|agent| agent.process == operation.process) {
                agent.done.push_back((operation.step, result));
            }
        }
    }

    fn perform(&mut self, around: &mut Surroundings, operation: &Operation) -> Result<(), ()> {
        let (id, now) = (self.id, around.now);
        around.story.tell(now, || format!("{id} has done: {}", operation.step));
        match &operation.step {
            Step::FetchImage(image) => drop(self.images.insert(image.digest)),
            Step::DropImage(digest) => drop(self.images.remove(digest)),
            Step::EnsureNetwork(wish) => drop(self.networks.insert(wish.vni)),
            Step::RemoveNetwork(vni) => drop(self.networks.remove(vni)),
            Step::MakeDisk(_) | Step::CheckDisk(_) => {}
            // Nobody asks for backups or rehearsals here, and reports never come this far.
            Step::BackUp { .. } | Step::Report(_) => {}
            Step::ReportImage(_) | Step::ReportBackup(_) | Step::ReportMove(_) => {}
            Step::Rehearse { .. } | Step::ReportRehearsal(_) => {}
            Step::PrepareMigration(vm) => {
                let wish = operation.assignment.vms.iter().find(|wish| wish.vm == *vm).ok_or(())?;
                around.doors.insert((self.id, *vm), wish.epoch);
            }
            Step::Migrate { vm, .. } => self.send(around, *vm, &operation.assignment)?,
            Step::FinishMigration { vm, run } => {
                let at_rest = self.guests.get(vm).is_some_and(|guest| guest.at_rest);
                let power = if *run { FoundPower::Running } else { FoundPower::Suspended };
                self.turn(*vm, FoundPower::Arrived, if at_rest { FoundPower::OffByAgent } else { power })?;
                self.guests.get_mut(vm).ok_or(())?.at_rest = false;
            }
            Step::CancelMigration(vm) => {
                if self.guests.get(vm).is_some_and(|guest| guest.power == FoundPower::Moved) {
                    self.guests.get_mut(vm).ok_or(())?.power = FoundPower::OffByAgent;
                }
            }
            Step::Start { vm, .. } => {
                let wish = operation.assignment.vms.iter().find(|wish| wish.vm == *vm).ok_or(())?;
                let disk = self.guests.get(vm).filter(|guest| guest.epoch == wish.epoch);
                let guest = Guest {
                    epoch: wish.epoch,
                    power: FoundPower::Running,
                    stopped: false,
                    at_rest: false,
                    written: disk.map_or(0, |disk| disk.written),
                    exclusive: model::permit::is_exclusive(wish),
                    size: wish.size,
                    address: wish.nics.first().map(|nic| (nic.vni, nic.ip.into())),
                };
                self.guests.insert(*vm, guest);
            }
            Step::Suspend(vm) => self.turn(*vm, FoundPower::Running, FoundPower::Suspended)?,
            Step::Resume(vm) => self.turn(*vm, FoundPower::Suspended, FoundPower::Running)?,
            Step::PressPower(vm) if around.dice.permille(700) => {
                self.turn(*vm, FoundPower::Running, FoundPower::OffByGuest)?;
            }
            Step::PressPower(_) => {}
            Step::PowerOff(vm) => {
                let guest = self.guests.get_mut(vm).ok_or(())?;
                (guest.power, guest.stopped) = (FoundPower::OffByAgent, false);
            }
            Step::Reset { vm, .. } => self.turn(*vm, FoundPower::Running, FoundPower::Running)?,
            Step::Remove(vm) => drop(self.guests.remove(vm)),
            Step::Quarantine { vm, .. } => {
                around.coverage.count(coverage::QUARANTINED);
                self.guests.remove(vm);
            }
        }
        Ok(())
    }

    /// What libvirt does: the guest is stopped here before all of it is there. Now and then the last answer is lost, and
    /// it goes on here although all of it is there too. One that is off goes as a disk, and may lose an answer as well.
    fn send(&mut self, around: &mut Surroundings, vm: VmId, assignment: &Assignment) -> Result<(), ()> {
        let wish = assignment.vms.iter().find(|wish| wish.vm == vm).ok_or(())?;
        let end = wish.moves.as_ref().ok_or(())?;
        let whole = |guest: &&mut Guest| {
            !matches!(guest.power, FoundPower::Arriving | FoundPower::Arrived | FoundPower::Moved) && !guest.stopped
        };
        let guest = self.guests.get_mut(&vm).filter(whole).ok_or(())?;
        let at_rest = !matches!(guest.power, FoundPower::Running | FoundPower::Suspended);
        let open = around.doors.get(&(end.node, vm)) == Some(&end.epoch);
        if guest.epoch != wish.epoch || !open || around.dice.permille(100) {
            return Err(());
        }
        let due = around.now + around.dice.delay(200, 20_000, 60);
        let arrived = Guest { epoch: end.epoch, power: FoundPower::Arrived, stopped: false, at_rest, ..guest.clone() };
        around.landings.push(Landing { due, to: end.node, vm, guest: arrived });
        if around.dice.permille(120) {
            around.coverage.count(coverage::ANSWER_LOST);
            return Err(());
        }
        guest.power = FoundPower::Moved;
        Ok(())
    }

    /// Guests from other hosts, if they are still let in.
    fn land(&mut self, around: &mut Surroundings) {
        let (now, id) = (around.now, self.id);
        let here = |landing: &Landing| landing.to == id && landing.due <= now;
        let (landed, later) = std::mem::take(&mut around.landings).into_iter().partition(here);
        around.landings = later;
        let landed: Vec<Landing> = landed;
        for Landing { vm, guest, .. } in landed {
            let let_in = around.doors.get(&(id, vm)) == Some(&guest.epoch);
            if let_in && !self.guests.contains_key(&vm) {
                around.story.tell(now, || format!("{vm} has come to {id} for epoch {}", guest.epoch));
                self.guests.insert(vm, guest);
            }
        }
    }

    /// A guest should not go any more. There are moments in which that comes too late.
    pub fn call_back(&mut self, around: &mut Surroundings, vm: VmId) {
        let goes =
            |operation: &&mut Operation| matches!(operation.step, Step::Migrate { vm: going, .. } if going == vm);
        let late = around.dice.permille(400);
        for operation in self.operations.iter_mut().filter(goes).filter(|_| !late) {
            (operation.due, operation.fails) = (around.now, true);
        }
    }

    fn turn(&mut self, vm: VmId, from: FoundPower, to: FoundPower) -> Result<(), ()> {
        let guest = self.guests.get_mut(&vm).filter(|guest| guest.power == from && !guest.stopped).ok_or(())?;
        guest.power = to;
        Ok(())
    }

    pub fn found(&self) -> BTreeMap<VmId, FoundGuest> {
        let found = |(vm, guest): (&VmId, &Guest)| (*vm, FoundGuest { epoch: guest.epoch, power: guest.power });
        self.guests.iter().map(found).collect()
    }

    pub fn crash_guest(&mut self, vm: VmId) {
        // One that has left, or came as a disk, has nothing here that could crash; one that is off stays known as it was.
        let process = |guest: &&mut Guest| guest.power != FoundPower::Moved && !guest.at_rest;
        if let Some(guest) = self.guests.get_mut(&vm).filter(process) {
            (guest.power, guest.stopped) = (FoundPower::Crashed, false);
        }
    }

    /// `kill -9`: half of what it had begun still takes effect.
    pub fn kill_agent(&mut self, around: &mut Surroundings, starts_at: u64) {
        if let Some(agent) = self.agent.take() {
            self.journal = agent.journal();
            agent.hang_up(around);
        }
        self.operations.retain(|_| around.dice.permille(500));
        around.doors.retain(|(host, _), _| *host != self.id);
        self.agent_starts_at = starts_at;
    }

    pub fn cut_power(&mut self, around: &mut Surroundings) {
        if let Some(agent) = self.agent.take() {
            self.journal = agent.journal();
            agent.lose_power();
        }
        self.powered = false;
        self.operations.clear();
        around.doors.retain(|(host, _), _| *host != self.id);
        self.networks.clear();
        self.page = Permit::default();
        let guests: Vec<VmId> = self.guests.keys().copied().collect();
        guests.into_iter().for_each(|vm| self.crash_guest(vm));
        let (id, now) = (self.id, around.now);
        around.story.tell(now, || format!("{id} loses power"));
    }

    pub fn power_on(&mut self, around: &mut Surroundings) {
        self.powered = true;
        self.clock.reboot(around.now);
        self.agent_starts_at = around.now + around.dice.between(500, 4000) * MILLI;
        (self.frozen_until, self.agent_hung_until) = (0, 0);
    }
}
