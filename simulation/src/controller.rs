//! A controller: a replica that lags, ears that hear beats, and, while it believes that it leads, the loop that plans,
//! the round that confirms, and the sessions with agents. Everything that decides is `model`'s; this is what
//! `controller/src/lead.rs`, `hear.rs` and `session.rs` do around it.

use std::collections::{BTreeMap, BTreeSet};

use model::{
    Actor, Applied, Command, Entry, NodeId, PlannerCommand, State, Telemetry, Timestamp, invariant, plan,
    table::RowChange,
};

use crate::{
    coverage,
    dice::{Clock, MILLI, SECOND},
    session::Session,
    surroundings::Surroundings,
    wires::{Ack, Beat, Packet, Place},
};

/// As in `controller/src/lead.rs`.
const PLAN_PERIOD: u64 = 500 * MILLI;
const CONFIRM_PERIOD: u64 = 200 * MILLI;
/// As in `raft/src/propose.rs`: from then on the outcome is called unknown.
const PROPOSE_DEADLINE: u64 = 5 * SECOND;

pub struct Controller {
    pub number: usize,
    pub clock: Clock,
    /// How far its wall clock is off, in milliseconds.
    pub wall_off: i64,
    pub state: State,
    pub applied: u64,
    /// At which index a host's tunnels changed last.
    pub(crate) woken: BTreeMap<NodeId, u64>,
    /// What the database holds.
    rows: BTreeMap<(u8, Vec<u8>), Vec<u8>>,
    /// How far behind the leader's log it applies.
    pub lag: u64,
    pub running: bool,
    pub frozen_until: u64,
    /// The term in which it believes to lead.
    pub leads: Option<u64>,
    /// Terms that it will hear of: from when on, and whether it leads then.
    notices: BTreeMap<u64, Option<u64>>,
    pub ears: Telemetry,
    /// Of this process; a beat that repeats it was sent since, and is believed once.
    nonce: u64,
    believed: BTreeSet<(NodeId, u64, u64)>,
    round: Option<Round>,
    next_round: u64,
    plans: Vec<Flight>,
    next_plan: u64,
    planned_at_index: u64,
    pub sessions: BTreeMap<u64, Session>,
    /// Proposals whose proposer no longer waits: they are on their way all the same.
    pub(crate) orphans: Vec<Flight>,
}

/// A question to the majority whether this controller still leads.
struct Round {
    /// On its own clock.
    asked: u64,
    /// The end of the log then, if it did lead.
    index: Option<u64>,
    polled_at: u64,
    polled: bool,
    answered_at: u64,
    given_up_at: u64,
}

/// A proposal on its way.
pub struct Flight {
    pub entry: Entry,
    /// Only as the leader of this term; otherwise by whoever leads.
    term: Option<u64>,
    append_at: u64,
    deadline: u64,
    index: Option<u64>,
    answer_lost: bool,
}

pub enum Landing {
    Applied(Applied),
    NotLeader,
    Unknown,
}

impl Flight {
    pub fn start(around: &mut Surroundings, entry: Entry, term: Option<u64>) -> Self {
        let now = around.now;
        Self {
            entry,
            term,
            append_at: now + around.dice.delay(40, 4000, 25),
            deadline: now + PROPOSE_DEADLINE,
            index: None,
            answer_lost: around.dice.permille(15),
        }
    }

    /// `None` while it is under way. `applied`: how far the proposer's own replica is.
    pub fn fly(&mut self, around: &mut Surroundings, from: usize, applied: u64) -> Option<Landing> {
        if let Some(index) = self.index {
            let outcome = around.quorum.slot(index).outcome.clone();
            return match outcome {
                Some(outcome) if applied >= index && !self.answer_lost => Some(Landing::Applied(outcome)),
                _ => (around.now >= self.deadline).then_some(Landing::Unknown),
            };
        }
        if around.now < self.append_at {
            return None;
        }
        let leader = around.quorum.leader;
        let may = match self.term {
            Some(term) => leader == from && around.quorum.term == term,
            None => around.wires.is_open_both_ways(Place::Controller(from), Place::Controller(leader)),
        };
        if may && around.quorum.leads(&around.wires, leader) {
            self.index = Some(around.quorum.append(around.now, self.entry.clone(), &mut around.coverage));
            let text = format!("entry {} by controller {}: {}", around.quorum.last(), from, told(&self.entry));
            around.story.tell(around.now, || text);
            return None;
        }
        if self.term.is_some() && !may {
            around.coverage.count(coverage::DEPOSED_PROPOSAL);
            return Some(Landing::NotLeader);
        }
        (around.now >= self.deadline).then_some(Landing::NotLeader)
    }
}

/// One line, without what nobody reads.
fn told(entry: &Entry) -> String {
    match &entry.command {
        Command::Planner(command) => command.to_string(),
        Command::Node(command) => format!("{command:?}"),
        command => format!("{command:?}"),
    }
}

impl Controller {
    pub fn new(number: usize, around: &mut Surroundings) -> Self {
        let clock = Clock::new(around.now, &mut around.dice);
        Self {
            number,
            clock,
            wall_off: around.dice.below(2000) as i64 - 1000,
            state: State::default(),
            applied: 0,
            woken: BTreeMap::new(),
            rows: BTreeMap::new(),
            lag: 0,
            running: true,
            frozen_until: 0,
            leads: None,
            notices: BTreeMap::new(),
            ears: Telemetry::default(),
            nonce: around.dice.roll() | 1,
            believed: BTreeSet::new(),
            round: None,
            next_round: 0,
            plans: Vec::new(),
            next_plan: 0,
            planned_at_index: 0,
            sessions: BTreeMap::new(),
            orphans: Vec::new(),
        }
    }

    pub fn wall(&self, now: u64) -> Timestamp {
        Timestamp((1_000_000_000 + (now / MILLI) as i64 + self.wall_off) as u64)
    }

    pub fn is_awake(&self, now: u64) -> bool {
        self.running && now >= self.frozen_until
    }

    /// It will hear at `at` that it leads, or leads no more.
    pub fn notify(&mut self, at: u64, leads: Option<u64>) {
        self.notices.insert(at, leads);
    }

    pub fn forget_notices(&mut self) {
        self.notices.clear();
    }

    pub fn tick(&mut self, around: &mut Surroundings) {
        if !self.is_awake(around.now) {
            return;
        }
        self.apply(around);
        self.heed_notices(around);
        if self.leads.is_some() {
            self.confirm(around);
            self.plan(around);
        }
        self.serve(around);
        let (number, applied) = (self.number, self.applied);
        self.orphans.retain_mut(|flight| flight.fly(around, number, applied).is_none());
    }

    /// Ends like `kill -9`, and begins again with what the database holds.
    pub fn restart(&mut self, around: &mut Surroundings) {
        let rows = self.rows.iter().map(|((table, key), row)| (*table, key.clone(), row.clone()));
        match State::load(rows) {
            Ok(state) if state.hash() == self.state.hash() => self.state = state,
            Ok(_) => around.broken(format!("controller {} loads another state than it stored", self.number)),
            Err(error) => around.broken(format!("controller {} cannot load what it stored: {error}", self.number)),
        }
        for (stream, _) in std::mem::take(&mut self.sessions) {
            around.wires.close(around.now, stream, Place::Controller(self.number));
        }
        around.quorum.seated &= around.quorum.leader != self.number;
        (self.leads, self.round) = (None, None);
        self.notices.clear();
        self.plans.clear();
        self.orphans.clear();
        self.ears = Telemetry::default();
        self.nonce = around.dice.roll() | 1;
        self.believed.clear();
    }

    fn apply(&mut self, around: &mut Surroundings) {
        let me = Place::Controller(self.number);
        let leader = Place::Controller(around.quorum.leader);
        if !around.wires.is_open_both_ways(me, leader) {
            return;
        }
        let before = self.applied;
        while self.applied < around.quorum.last() {
            let index = self.applied + 1;
            let slot = around.quorum.slot(index);
            let lag = if self.number == around.quorum.leader { 0 } else { self.lag };
            if slot.appended_at + lag > around.now {
                break;
            }
            let (entry, expected, hash) = (slot.entry.clone(), slot.outcome.clone(), slot.hash);
            if let Some(entry) = entry {
                let outcome = self.state.apply(index, &entry);
                for RowChange { table, key, row } in self.state.drain_changes() {
                    match row {
                        Some(row) => self.rows.insert((table, key), row),
                        None => self.rows.remove(&(table, key)),
                    };
                }
                if Some(outcome) != expected {
                    around.broken(format!("controller {} answers entry {index} differently", self.number));
                }
            }
            if self.state.hash() != hash {
                around.broken(format!("controller {} has another hash at index {index}", self.number));
            }
            self.woken.extend(self.state.take_woken().into_iter().map(|node| (node, index)));
            self.applied = index;
        }
        if self.applied != before
            && let Err(what) = invariant::check(&self.state)
        {
            around.broken(format!("controller {} at index {}: {what}", self.number, self.applied));
        }
    }

    fn heed_notices(&mut self, around: &mut Surroundings) {
        while let Some(first) = self.notices.first_entry() {
            if *first.key() > around.now {
                return;
            }
            let leads = first.remove();
            if leads == self.leads {
                continue;
            }
            let (number, now) = (self.number, around.now);
            around.story.tell(now, || match leads {
                Some(term) => format!("controller {number} leads term {term}"),
                None => format!("controller {number} learns that it leads no more"),
            });
            self.leads = leads;
            (self.round, self.next_round) = (None, now);
            self.orphans.append(&mut self.plans);
            if leads.is_some() {
                self.hear(now, Telemetry::lead);
            } else {
                for (stream, session) in std::mem::take(&mut self.sessions) {
                    self.orphans.extend(session.left_behind());
                    around.wires.close(now, stream, Place::Controller(number));
                }
            }
        }
    }

    pub fn hear<T>(&mut self, now: u64, look: impl FnOnce(&mut Telemetry) -> T) -> T {
        self.ears.clock = self.clock.at(now);
        look(&mut self.ears)
    }

    fn confirm(&mut self, around: &mut Surroundings) {
        let (now, number, applied) = (around.now, self.number, self.applied);
        let Some(round) = &mut self.round else {
            if now >= self.next_round {
                let leads = around.quorum.leader == number && Some(around.quorum.term) == self.leads;
                let polled_at = now + around.dice.delay(30, 2000, 15);
                self.round = Some(Round {
                    asked: self.clock.at(now),
                    index: leads.then_some(around.quorum.last()),
                    polled_at,
                    polled: false,
                    answered_at: polled_at + around.dice.delay(30, 2000, 15),
                    given_up_at: now + PROPOSE_DEADLINE,
                });
            }
            return;
        };
        if !round.polled && now >= round.polled_at {
            round.polled = true;
            let leads = Some(around.quorum.term) == self.leads && around.quorum.leads(&around.wires, number);
            round.index = round.index.filter(|_| leads);
        }
        let confirmed = round.polled && now >= round.answered_at && round.index.is_some_and(|index| applied >= index);
        let failed = round.polled && now >= round.answered_at && round.index.is_none();
        if confirmed {
            let asked = round.asked;
            self.hear(now, |ears| ears.confirmed = Some(asked));
        }
        if confirmed || failed || self.round.as_ref().is_some_and(|round| now >= round.given_up_at) {
            (self.round, self.next_round) = (None, now + CONFIRM_PERIOD);
        }
    }

    fn plan(&mut self, around: &mut Surroundings) {
        let (number, applied, now) = (self.number, self.applied, around.now);
        let mut spared = Vec::new();
        let mut failed = false;
        self.plans.retain_mut(|flight| {
            let landing = flight.fly(around, number, applied);
            if let (Some(Landing::Applied(Err(_))), Command::Planner(PlannerCommand::DeclareLost { node, .. })) =
                (&landing, &flight.entry.command)
            {
                spared.push(*node);
            }
            failed |= matches!(landing, Some(Landing::NotLeader | Landing::Unknown));
            landing.is_none()
        });
        spared.into_iter().for_each(|node| self.hear(now, |ears| ears.spare(node)));
        if failed {
            self.next_plan = now + PLAN_PERIOD;
            self.planned_at_index = applied;
        }
        if !self.plans.is_empty() || (now < self.next_plan && applied == self.planned_at_index) {
            return;
        }
        (self.next_plan, self.planned_at_index) = (now + PLAN_PERIOD, applied);
        let at = self.wall(now);
        let heard = self.hear(now, |ears| ears.clone());
        for command in plan::plan(&self.state, &heard, at) {
            if let Command::Planner(PlannerCommand::DeclareLost { node, incarnation }) = command
                && !self.hear(now, |ears| ears.condemn(node, incarnation))
            {
                continue;
            }
            let entry = Entry { at, request: None, actor: Actor::System, command };
            self.plans.push(Flight::start(around, entry, self.leads));
        }
    }

    /// A beat arrived.
    pub fn receive(&mut self, around: &mut Surroundings, beat: &Beat) {
        if !self.is_awake(around.now) || !self.state.nodes().contains(&beat.node) {
            return;
        }
        let (now, leader) = (around.now, self.leads.is_some());
        let mut grant = None;
        if beat.nonce == self.nonce {
            if !self.believed.insert((beat.node, beat.incarnation, beat.seq)) {
                return around.coverage.count(coverage::BEAT_REPLAYED);
            }
            let standing = leader && self.state.has_standing(beat.node, beat.incarnation);
            grant = self.hear(now, |ears| {
                ears.nodes.entry(beat.node).or_default().status = beat.status.clone();
                ears.compare_clocks(beat.node, beat.incarnation, beat.boottime_nanos);
                ears.believe(beat.node, beat.incarnation, beat.unanswered_millis, standing)
            });
        }
        if grant.is_some() && around.quorum.leader != self.number {
            around.coverage.count(coverage::DEPOSED_GRANT);
        }
        let (nonce, me) = (self.nonce, Place::Controller(self.number));
        let ack = Ack { node: beat.node, seq: beat.seq, nonce, boottime_nanos: beat.boottime_nanos, grant };
        let (to, from) = (Place::Host(beat.node), self.number);
        around.wires.send(now, &mut around.dice, me, to, || Packet::Ack(from, ack.clone()));
    }

    pub fn knows(&self, node: NodeId) -> bool {
        self.state.nodes().contains(&node)
    }
}
