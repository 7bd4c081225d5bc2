//! The agent of a host: beats, its end of the session, the outbox. What it remembers and how it goes from wishes to
//! steps is in `executor.rs`. As `nodeagent/` does it, with every decision left to `model`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use model::{
    Assignment, Digest, NodeId, VmId,
    command::{ImageReport, MoveReport, VmReport},
    lease::{BEAT_NANOS, LEASE_NANOS},
    permit::{Keeper, Permit},
    steps::{Failure, Memory, Seen, Step, Subject, Told},
    telemetry::NodeStatus,
};

use crate::{
    dice::{MILLI, SECOND},
    host::Host,
    quorum::CONTROLLERS,
    surroundings::Surroundings,
    wires::{Ack, Beat, Down, Packet, Place, Up},
};

const ATTACH_TIMEOUT: u64 = 5 * SECOND;

/// What survives the process.
#[derive(Clone, Debug, Default)]
pub struct Journal {
    pub seen: Seen,
    pub memories: BTreeMap<VmId, Memory>,
}

pub struct Agent {
    pub(crate) id: NodeId,
    pub process: u64,
    pub(crate) keeper: Keeper,
    incarnation: u64,
    targets: [Target; CONTROLLERS],
    seq: u64,
    next_beat: u64,
    stream: Option<u64>,
    /// What the news of this stream stand on.
    assigned: Option<Assignment>,
    welcomed: bool,
    dialled_at: u64,
    next_dial: u64,
    next_controller: usize,
    vms: BTreeMap<VmId, (VmReport, Option<u64>)>,
    images: BTreeMap<Digest, (ImageReport, Option<u64>)>,
    moves: BTreeMap<VmId, (MoveReport, Option<u64>)>,
    number: u64,
    pub(crate) assignment: Option<Assignment>,
    pub(crate) seen: Seen,
    pub(crate) memories: BTreeMap<VmId, Memory>,
    pub(crate) failures: BTreeMap<Subject, Failure>,
    pub(crate) told: BTreeMap<VmId, Told>,
    pub(crate) told_images: BTreeMap<Digest, bool>,
    pub(crate) told_moves: BTreeMap<VmId, MoveReport>,
    pub(crate) moves_failed: BTreeMap<VmId, (u64, String)>,
    pub(crate) going: BTreeMap<VmId, u64>,
    pub(crate) busy: BTreeSet<Subject>,
    pub done: VecDeque<(Step, Result<(), ()>)>,
    pub(crate) next_look: u64,
}

#[derive(Default)]
struct Target {
    nonce: u64,
    answered: u64,
    answered_at: u64,
    sent: VecDeque<Sent>,
}

#[derive(Clone, Copy)]
struct Sent {
    seq: u64,
    at: u64,
    incarnation: u64,
}

impl Agent {
    pub fn start(id: NodeId, process: u64, journal: Journal, page: Permit) -> Self {
        // Of a memory, only this part outlives the process.
        let kept = |memory: &Memory| Memory {
            epoch: memory.epoch,
            rebooted: memory.rebooted,
            wished_off: memory.wished_off,
            begun: memory.begun,
            existed: memory.existed,
            ran: memory.ran,
            leaving: memory.leaving,
            ..Memory::default()
        };
        Self {
            id,
            process,
            keeper: Keeper::resume(page),
            incarnation: 0,
            targets: Default::default(),
            seq: 0,
            next_beat: 0,
            stream: None,
            assigned: None,
            welcomed: false,
            dialled_at: 0,
            next_dial: 0,
            next_controller: 0,
            vms: BTreeMap::new(),
            images: BTreeMap::new(),
            moves: BTreeMap::new(),
            number: 0,
            assignment: None,
            seen: journal.seen,
            memories: journal.memories.iter().map(|(vm, memory)| (*vm, kept(memory))).collect(),
            failures: BTreeMap::new(),
            told: BTreeMap::new(),
            told_images: BTreeMap::new(),
            told_moves: BTreeMap::new(),
            moves_failed: BTreeMap::new(),
            going: BTreeMap::new(),
            busy: BTreeSet::new(),
            done: VecDeque::new(),
            next_look: 0,
        }
    }

    /// What is on the disk at this moment: it is written before every effect that it speaks of.
    pub fn journal(&self) -> Journal {
        Journal { seen: self.seen.clone(), memories: self.memories.clone() }
    }

    /// The process died, and its kernel closes what it had open.
    pub fn hang_up(&self, around: &mut Surroundings) {
        if let Some(stream) = self.stream {
            around.wires.close(around.now, stream, Place::Host(self.id));
        }
    }

    /// Nobody closes anything: the controller finds out in its time.
    pub fn lose_power(self) {}

    pub fn tick(&mut self, around: &mut Surroundings, host: &mut Host) {
        self.talk(around, host);
        self.beat(around, host);
        self.execute(around, host);
        self.deliver(around);
    }

    fn beat(&mut self, around: &mut Surroundings, host: &Host) {
        let clock = host.clock.at(around.now);
        if clock < self.next_beat {
            return;
        }
        self.next_beat = clock + BEAT_NANOS;
        self.seq += 1;
        let status = self.status(host);
        for (number, target) in self.targets.iter_mut().enumerate() {
            if target.answered_at == 0 {
                target.answered_at = clock;
            }
            let sent = Sent { seq: self.seq, at: clock, incarnation: self.incarnation };
            target.sent.retain(|old| clock.saturating_sub(old.at) <= LEASE_NANOS);
            target.sent.push_back(sent);
            let beat = Beat {
                node: self.id,
                incarnation: sent.incarnation,
                seq: sent.seq,
                boottime_nanos: sent.at,
                nonce: target.nonce,
                unanswered_millis: (clock - target.answered_at) / MILLI,
                status: status.clone(),
            };
            let (from, to) = (Place::Host(self.id), Place::Controller(number));
            around.wires.send(around.now, &mut around.dice, from, to, || Packet::Beat(beat.clone()));
        }
    }

    fn status(&self, host: &Host) -> NodeStatus {
        let used = host.guests.values().map(|guest| guest.size.memory_bytes).sum();
        NodeStatus {
            cpu_permille: 100,
            memory_used_bytes: used,
            memory_total_bytes: host.capacity.memory_bytes,
            disk_used_bytes: 0,
            disk_total_bytes: host.capacity.disk_bytes,
            watchdog: false,
        }
    }

    /// An answer grants by the beat that this process sent to that controller, not by what it says.
    pub fn hear_ack(&mut self, from: usize, ack: &Ack, host: &mut Host) {
        let target = &mut self.targets[from];
        let sent = target.sent.iter().find(|sent| (sent.seq, sent.at) == (ack.seq, ack.boottime_nanos)).copied();
        if let (Some(grant), Some(sent)) = (ack.grant, sent)
            && sent.incarnation == self.incarnation
            && self.keeper.granted(self.incarnation, grant.until(sent.at))
        {
            host.page = self.keeper.force().clone();
        }
        if (target.answered + 1..=self.seq).contains(&ack.seq) {
            (target.nonce, target.answered) = (ack.nonce, ack.seq);
            target.answered_at = sent.map_or(target.answered_at, |sent| sent.at);
        }
    }

    fn talk(&mut self, around: &mut Surroundings, host: &mut Host) {
        let now = around.now;
        let Some(stream) = self.stream else {
            if now >= self.next_dial {
                let controller = self.next_controller;
                self.next_controller = (controller + 1) % CONTROLLERS;
                let stream = around.wires.open_stream(self.id, controller);
                around.wires.say_up(now, &mut around.dice, stream, Up::Hello(host.capacity));
                (self.stream, self.welcomed, self.dialled_at) = (Some(stream), false, now);
            }
            return;
        };
        while let Some(message) = around.wires.next_down(now, stream) {
            match message {
                Down::Refused => return self.end_session(around),
                Down::Welcome(incarnation) => {
                    self.welcomed = true;
                    self.incarnation = incarnation;
                    self.next_beat = 0;
                    self.vms.values_mut().for_each(|letter| letter.1 = None);
                    self.images.values_mut().for_each(|letter| letter.1 = None);
                    self.moves.values_mut().for_each(|letter| letter.1 = None);
                    self.forget_told();
                }
                Down::News(news) => {
                    let whole = news.onto(self.assigned.as_ref());
                    self.assigned = Some(whole.clone());
                    self.obey(around, host, whole);
                }
                Down::Reported(number) => {
                    self.vms.retain(|_, letter| letter.1.is_none_or(|sent| sent > number));
                    self.images.retain(|_, letter| letter.1.is_none_or(|sent| sent > number));
                    self.moves.retain(|_, letter| letter.1.is_none_or(|sent| sent > number));
                }
            }
        }
        let unanswered = !self.welcomed && now >= self.dialled_at + ATTACH_TIMEOUT;
        if unanswered || around.wires.is_over(now, stream, Place::Host(self.id)) {
            self.end_session(around);
        }
    }

    fn end_session(&mut self, around: &mut Surroundings) {
        self.hang_up(around);
        (self.stream, self.assigned) = (None, None);
        self.next_dial = around.now + around.dice.between(50, 1500) * MILLI;
    }

    pub(crate) fn post(&mut self, report: VmReport) {
        self.vms.insert(report.vm, (report, None));
    }

    pub(crate) fn post_move(&mut self, report: MoveReport) {
        self.moves.insert(report.vm, (report, None));
    }

    pub(crate) fn post_image(&mut self, report: ImageReport) {
        self.images.insert(report.digest, (report, None));
    }

    fn deliver(&mut self, around: &mut Surroundings) {
        let Some(stream) = self.stream.filter(|_| self.welcomed) else { return };
        let number = self.number + 1;
        let reports: Vec<VmReport> = unsent(self.vms.values_mut(), number);
        if !reports.is_empty() {
            self.number = number;
            return around.wires.say_up(around.now, &mut around.dice, stream, Up::Vms(number, reports));
        }
        let reports: Vec<ImageReport> = unsent(self.images.values_mut(), number);
        if !reports.is_empty() {
            self.number = number;
            return around.wires.say_up(around.now, &mut around.dice, stream, Up::Images(number, reports));
        }
        let reports: Vec<MoveReport> = unsent(self.moves.values_mut(), number);
        if !reports.is_empty() {
            self.number = number;
            around.wires.say_up(around.now, &mut around.dice, stream, Up::Moves(number, reports));
        }
    }
}

fn unsent<'a, T: Clone + 'a>(letters: impl Iterator<Item = &'a mut (T, Option<u64>)>, number: u64) -> Vec<T> {
    let take = |letter: &mut (T, Option<u64>)| {
        letter.1 = Some(number);
        letter.0.clone()
    };
    letters.filter(|letter| letter.1.is_none()).map(take).collect()
}
