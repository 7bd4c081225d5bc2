//! A whole cloud in one thread, from one seed: many hosts, lagging replicas, changing leaders, a network that loses,
//! delays, reorders and doubles, clocks that drift and step, machines that die, and people who ask for things.
//!
//! ```text
//!   seed ─► dice ─► faults, people ─► 3 controllers: State::apply, plan, Telemetry  ┐
//!                                       ▲ │ beats, sessions                         ├─► after every tick: the truth
//!                                       │ ▼                                         │   after the faults: all is well
//!                                     hosts: accept, steps, permit, the guard       ┘
//! ```
//!
//! The functions that decide are the product's own, unchanged: everything of `model`. What is simulated is what they
//! stand in. The same seed is the same run to the last bit, so a failure is replayed with its
//! story told.
//!
//! Deliberately not here: consensus. One log in one order is taken as given; see `quorum`. Real processes under faults
//! are `jepsen/`. `scale` is apart: no faults, but a million machines.

pub mod calm;
pub mod cloud;
pub mod coverage;
pub mod dice;
pub mod scale;

mod agent;
mod controller;
mod executor;
mod faults;
mod host;
mod ledger;
mod people;
mod quorum;
mod session;
mod surroundings;
mod truth;
mod wires;

use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use cloud::Cloud;
use coverage::Coverage;
use dice::{MILLI, SECOND};

/// True time between two looks at everything. A guard acts within a tick, far below the margin of a lease.
const TICK: u64 = 100 * MILLI;
/// How long things go wrong: long enough for a host to be lost, to come back and to be lost again.
const TROUBLE: u64 = 120 * SECOND;

pub struct Outcome {
    pub seed: u64,
    pub coverage: Coverage,
    /// What was not as it must be, in one sentence.
    pub broken: Option<String>,
    /// What happened, line by line, if that was asked for.
    pub story: Vec<String>,
    /// Of everything that was decided: equal for equal seeds.
    pub digest: [u8; 16],
}

/// Plays a seed; `tell` also writes down what happens.
pub fn run(seed: u64, tell: bool) -> Outcome {
    let mut cloud = Cloud::new(seed, tell);
    cloud.found();
    while cloud.around.now < TROUBLE && cloud.is_whole() {
        cloud.make_trouble();
        cloud.tick();
    }
    if cloud.is_whole() {
        calm::heal(&mut cloud);
        calm::settle(&mut cloud);
    }
    if cloud.is_whole() {
        calm::start_what_is_stopped(&mut cloud);
    }
    cloud.finish(seed)
}

/// Plays many seeds on all processors, in order of seed. Above one that fails no more are begun.
pub fn run_all(seeds: Range<u64>) -> Vec<Outcome> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (next, end) = (AtomicU64::new(seeds.start), AtomicU64::new(seeds.end));
    let play = || {
        let mut outcomes = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::SeqCst);
            if seed >= end.load(Ordering::SeqCst) {
                return outcomes;
            }
            let outcome = run(seed, false);
            if outcome.broken.is_some() {
                end.fetch_min(seed, Ordering::SeqCst);
            }
            outcomes.push(outcome);
        }
    };
    let mut outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let players: Vec<_> = (0..threads).map(|_| scope.spawn(play)).collect();
        players.into_iter().flat_map(|player| player.join().expect("a player does not panic")).collect()
    });
    outcomes.sort_by_key(|outcome| outcome.seed);
    outcomes
}
