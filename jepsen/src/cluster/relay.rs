//! What stands on the way of heartbeats, and of nothing else: it loses, doubles, delays and plays again what agents send to
//! controllers, and what these answer.
//!
//! ```text
//!   agent ── beat ──► controller's host :PORT ─nft─► front :PORT + 1 ──► back ── loopback ──► controller :PORT
//!         ◄─ from :PORT ─nft─ front ◄──────────────────────── back ◄──────── answer ──────┘
//! ```
//!
//! On the host of each controller two rules turn the port of datagrams that come over the switch, and turn it back in what
//! goes out. Neither end is told: names, keys and addresses are what they are without it. A host that is cut off from the
//! switch is cut off from here too; what is played again from here still reaches the controllers.
//!
//! Deliberately not here: what a datagram says. It could not be forged without the host's key; that is the point.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Serialize;
use tokio::{net::UdpSocket, task::JoinHandle};

use super::switch::Switch;
use crate::chance::Chance;

/// Longer than any heartbeat.
const BUFFER_BYTES: usize = 2048;
/// Of each host, in either direction: what five controllers hear in five minutes at two beats a second, 5 MB at the most.
const REMEMBERED: usize = 3000;

/// What becomes of datagrams in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// Each comes once and at once.
    #[default]
    Open,
    /// None comes.
    Shut,
    /// Of so many in a row one comes, by chance which.
    OneOf(usize),
    /// Each comes at once, and once more within this time.
    Twice(Duration),
    /// Each comes after a time of its own below this one: not in the order in which it was sent.
    Shuffled(Duration),
    /// Each comes after this time.
    Late(Duration),
}

/// How many datagrams met what, both directions together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    pub passed: u64,
    pub lost: u64,
    pub doubled: u64,
    pub delayed: u64,
    /// Beats of earlier, given to a controller.
    pub beats_replayed: u64,
    /// Answers of earlier, given to an agent.
    pub answers_replayed: u64,
}

/// Ends with the run: its sockets are in namespaces that end then too.
pub struct Relay {
    /// One for each agent at each controller.
    lanes: Vec<Arc<Lane>>,
    tally: Arc<Tally>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Tally {
    passed: AtomicU64,
    lost: AtomicU64,
    doubled: AtomicU64,
    delayed: AtomicU64,
    beats_replayed: AtomicU64,
    answers_replayed: AtomicU64,
    /// By host: beats of it to any controller, and answers to it of any.
    memory: Mutex<BTreeMap<IpAddr, (Memory, Memory)>>,
}

type Memory = VecDeque<Vec<u8>>;

/// Between one agent and one controller.
struct Lane {
    agent: IpAddr,
    /// Where agents believe the controller is; shared with the other lanes to it.
    front: Arc<UdpSocket>,
    /// Connected to the controller.
    back: UdpSocket,
    state: Mutex<State>,
    tally: Arc<Tally>,
}

struct State {
    beats: Direction,
    answers: Direction,
    /// Where the agent's process sends from; another one after each start.
    agent: Option<SocketAddr>,
    /// When the agent was last given an answer, and the longest time between two.
    answered: Instant,
    longest: Duration,
}

struct Direction {
    way: Way,
    /// How many of a row of [`Way::OneOf`] are still to come, and whether the one has.
    row: (usize, bool),
    chance: Chance,
}

/// What is done with one datagram.
struct Fate {
    at_once: bool,
    later: Option<Duration>,
}

impl Relay {
    /// From now on all beats between these hosts go through it, unchanged. `port`: of the controllers, the next one must be
    /// free there.
    ///
    /// # Errors
    /// When a rule or a socket is refused.
    pub fn start(switch: &Switch, controllers: &[usize], agents: &[usize], port: u16) -> anyhow::Result<Self> {
        let tally = Arc::new(Tally::default());
        let mut relay = Self { lanes: Vec::new(), tally: tally.clone(), tasks: Vec::new() };
        for controller in controllers {
            let front = Arc::new(UdpSocket::from_std(switch.socket(*controller, port + 1)?)?);
            let mut lanes = Vec::new();
            for agent in agents {
                let back = switch.socket(*controller, 0)?;
                back.connect((switch.ip(*controller), port))?;
                let (back, agent) = (UdpSocket::from_std(back)?, switch.ip(*agent).parse()?);
                let state = Mutex::new(State::new(relay.lanes.len() + lanes.len()));
                lanes.push(Arc::new(Lane { agent, front: front.clone(), back, state, tally: tally.clone() }));
            }
            relay.tasks.push(tokio::spawn(hear_agents(front, lanes.clone())));
            relay.tasks.extend(lanes.iter().map(|lane| tokio::spawn(hear_controller(lane.clone()))));
            relay.lanes.extend(lanes);
            switch.turn_port(*controller, port, port + 1)?;
        }
        Ok(relay)
    }

    /// What becomes of the beats of this host, and of the answers to it, from now on.
    pub fn treat(&self, host: IpAddr, beats: Way, answers: Way) {
        for lane in self.of(host) {
            let mut state = lane.state();
            (state.beats.way, state.answers.way) = (beats, answers);
        }
    }

    pub fn counts(&self) -> Counts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Counts {
            passed: read(&self.tally.passed),
            lost: read(&self.tally.lost),
            doubled: read(&self.tally.doubled),
            delayed: read(&self.tally.delayed),
            beats_replayed: read(&self.tally.beats_replayed),
            answers_replayed: read(&self.tally.answers_replayed),
        }
    }

    /// A beat of this host that came earlier, to any controller, is given to each of them again; and an answer that it had
    /// earlier, from any, is given to it again by each. What is treated otherwise meanwhile is not this.
    pub async fn replay(&self, host: IpAddr, chance: &mut Chance) {
        for lane in self.of(host) {
            let (beat, answer) = self.tally.recall(host, chance);
            if let Some(beat) = beat
                && lane.back.send(&beat).await.is_ok()
            {
                self.tally.beats_replayed.fetch_add(1, Ordering::Relaxed);
            }
            let agent = lane.state().agent;
            if let (Some(answer), Some(agent)) = (answer, agent)
                && lane.front.send_to(&answer, agent).await.is_ok()
            {
                self.tally.answers_replayed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// From now on [`Self::longest_silence`] counts.
    pub fn forget_silence(&self) {
        for lane in &self.lanes {
            let mut state = lane.state();
            (state.answered, state.longest) = (Instant::now(), Duration::ZERO);
        }
    }

    /// The longest time in which a host was given no answer by some controller.
    pub fn longest_silence(&self) -> Duration {
        let silence = |lane: &Arc<Lane>| {
            let state = lane.state();
            state.longest.max(state.answered.elapsed())
        };
        self.lanes.iter().map(silence).max().unwrap_or(Duration::MAX)
    }

    fn of(&self, host: IpAddr) -> impl Iterator<Item = &Arc<Lane>> {
        self.lanes.iter().filter(move |lane| lane.agent == host)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Counts {
    /// What was counted between the two.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            passed: self.passed - earlier.passed,
            lost: self.lost - earlier.lost,
            doubled: self.doubled - earlier.doubled,
            delayed: self.delayed - earlier.delayed,
            beats_replayed: self.beats_replayed - earlier.beats_replayed,
            answers_replayed: self.answers_replayed - earlier.answers_replayed,
        }
    }
}

impl Tally {
    fn remember(&self, host: IpAddr, datagram: &[u8], is_beat: bool) {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let (beats, answers) = memory.entry(host).or_default();
        let these = if is_beat { beats } else { answers };
        if these.len() >= REMEMBERED {
            these.pop_front();
        }
        these.push_back(datagram.to_owned());
    }

    /// A beat and an answer by chance, as old as may be.
    fn recall(&self, host: IpAddr, chance: &mut Chance) -> (Option<Vec<u8>>, Option<Vec<u8>>) {
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((beats, answers)) = memory.get(&host) else { return (None, None) };
        let mut any = |these: &Memory| these.get(chance.below(these.len())).cloned();
        (any(beats), any(answers))
    }

    fn note(&self, fate: &Fate) {
        let count = match (fate.at_once, fate.later) {
            (true, None) => &self.passed,
            (true, Some(_)) => &self.doubled,
            (false, Some(_)) => &self.delayed,
            (false, None) => &self.lost,
        };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

impl Fate {
    /// Whether it can be played *again*; what never came would be late.
    fn comes(&self) -> bool {
        self.at_once || self.later.is_some()
    }
}

impl State {
    /// `number`: of the lane. Which of several beats comes is by chance, and the same each time.
    fn new(number: usize) -> Self {
        let mut chance = Chance::new(number as u64);
        let mut direction = || Direction { way: Way::Open, row: (0, false), chance: chance.split() };
        Self {
            beats: direction(),
            answers: direction(),
            agent: None,
            answered: Instant::now(),
            longest: Duration::ZERO,
        }
    }
}

impl Direction {
    fn fate(&mut self) -> Fate {
        let mut some = |most: Duration| most.mul_f64(self.chance.below(1000) as f64 / 1000.0);
        match self.way {
            Way::Open => Fate { at_once: true, later: None },
            Way::Shut => Fate { at_once: false, later: None },
            Way::OneOf(many) => Fate { at_once: self.is_the_one(many), later: None },
            Way::Twice(most) => Fate { at_once: true, later: Some(some(most)) },
            Way::Shuffled(most) => Fate { at_once: false, later: Some(some(most)) },
            Way::Late(time) => Fate { at_once: false, later: Some(time) },
        }
    }

    fn is_the_one(&mut self, many: usize) -> bool {
        if self.row.0 == 0 {
            self.row = (many, false);
        }
        let (left, had) = self.row;
        let is = !had && self.chance.below(left) == 0;
        self.row = (left - 1, had || is);
        is
    }
}

impl Lane {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn beat(self: Arc<Self>, from: SocketAddr, datagram: &[u8]) {
        let fate = {
            let mut state = self.state();
            state.agent = Some(from);
            state.beats.fate()
        };
        self.tally.note(&fate);
        if fate.comes() {
            self.tally.remember(self.agent, datagram, true);
        }
        if fate.at_once {
            // A controller that does not run hears nothing, as without a relay.
            let _ = self.back.send(datagram).await;
        }
        if let Some(time) = fate.later {
            let datagram = datagram.to_owned();
            tokio::spawn(async move {
                tokio::time::sleep(time).await;
                let _ = self.back.send(&datagram).await;
            });
        }
    }

    async fn answer(self: Arc<Self>, datagram: &[u8]) {
        let fate = self.state().answers.fate();
        self.tally.note(&fate);
        if fate.comes() {
            self.tally.remember(self.agent, datagram, false);
        }
        if fate.at_once {
            self.give(datagram).await;
        }
        if let Some(time) = fate.later {
            let datagram = datagram.to_owned();
            tokio::spawn(async move {
                tokio::time::sleep(time).await;
                self.give(&datagram).await;
            });
        }
    }

    async fn give(&self, answer: &[u8]) {
        let agent = self.state().agent;
        if let Some(agent) = agent
            && self.front.send_to(answer, agent).await.is_ok()
        {
            let mut state = self.state();
            let silence = state.answered.elapsed();
            (state.longest, state.answered) = (state.longest.max(silence), Instant::now());
        }
    }
}

async fn hear_agents(front: Arc<UdpSocket>, lanes: Vec<Arc<Lane>>) {
    let mut buffer = [0; BUFFER_BYTES];
    loop {
        let (length, from) = match front.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) if passes(&error) => continue,
            Err(_) => return,
        };
        if let Some(lane) = lanes.iter().find(|lane| lane.agent == from.ip()) {
            lane.clone().beat(from, &buffer[..length]).await;
        }
    }
}

async fn hear_controller(lane: Arc<Lane>) {
    let mut buffer = [0; BUFFER_BYTES];
    loop {
        match lane.back.recv(&mut buffer).await {
            Ok(length) => lane.clone().answer(&buffer[..length]).await,
            Err(error) if passes(&error) => {}
            Err(_) => return,
        }
    }
}

/// An earlier datagram met a process that does not run; each is told of once.
fn passes(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::HostUnreachable | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests;
