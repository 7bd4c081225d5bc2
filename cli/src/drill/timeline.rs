//! What was seen during a drill, on one monotonic clock, and what follows from it. Pure.
//!
//! Times are microseconds since the drill began. A change says what holds from then on, until the next change of the same
//! thing. Deliberately not here: looking (`truth`, `watch`, `load`), and whether it was good (`report`).

use std::collections::{BTreeMap, BTreeSet};

use hdrhistogram::Histogram;
use serde::Serialize;

pub use crate::lab::homes::Run;

pub type Micros = u64;

#[derive(Clone, Debug, Default, Serialize)]
pub struct Timeline {
    pub ended: Micros,
    pub phases: Vec<Phase>,
    pub marks: Vec<Mark>,
    /// As the controllers that answered said.
    pub leaders: Vec<LeaderChange>,
    /// As the quorum said.
    pub nodes: Vec<NodeChange>,
    /// As the quorum said.
    pub statuses: Vec<StatusChange>,
    /// In truth: as the hosts' processes were seen.
    pub homes: Vec<HomeChange>,
    pub looks: Looks,
    /// Of the background client, in the order in which they were begun.
    #[serde(skip)]
    pub answers: Vec<Answer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PhaseKind {
    Before,
    Fault,
    Healing,
    After,
}

#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    pub from_micros: Micros,
    pub kind: PhaseKind,
}

#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    pub at_micros: Micros,
    pub what: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LeaderChange {
    pub at_micros: Micros,
    /// 0: nobody who answered knew one.
    pub leader: u64,
    pub term: u64,
}

#[derive(Clone, Debug, Serialize)]
pub struct NodeChange {
    pub at_micros: Micros,
    pub node: String,
    pub state: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct StatusChange {
    pub at_micros: Micros,
    pub vm: String,
    pub status: String,
    pub node: String,
}

/// What a machine does on one host.
#[derive(Clone, Debug, Serialize)]
pub struct HomeChange {
    pub at_micros: Micros,
    pub vm: String,
    pub host: String,
    pub run: Run,
}

/// How well it was looked.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Looks {
    pub count: u64,
    pub longest_gap_micros: Micros,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Done,
    /// Proved not to have been carried out.
    Refused,
    /// No answer in time: of a write, nobody knows.
    Unanswered,
}

#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub began: Micros,
    pub took: Micros,
    pub write: bool,
    pub outcome: Outcome,
}

/// A span in which a machine did one thing on one host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stay {
    pub vm: String,
    pub host: String,
    pub run: Run,
    pub from: Micros,
    pub to: Micros,
}

/// Two hosts that ran one machine at the same time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Overlap {
    pub vm: String,
    pub hosts: [String; 2],
    pub from_micros: Micros,
    pub to_micros: Micros,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    pub done: u64,
    pub refused: u64,
    pub unanswered: u64,
    pub p50_micros: Micros,
    pub p99_micros: Micros,
    pub max_micros: Micros,
}

/// Above the clients' patience nothing is measured; three digits are more than a busy machine repeats.
const MOST_MICROS: Micros = 60_000_000;

impl Timeline {
    pub fn phase(&self, kind: PhaseKind) -> Option<(Micros, Micros)> {
        let index = self.phases.iter().position(|phase| phase.kind == kind)?;
        let to = self.phases.get(index + 1).map_or(self.ended, |next| next.from_micros);
        Some((self.phases[index].from_micros, to))
    }

    /// Every span in which a machine was on a host, paused or running.
    pub fn stays(&self) -> Vec<Stay> {
        let mut open: BTreeMap<(&str, &str), (Micros, Run)> = BTreeMap::new();
        let mut stays = Vec::new();
        let stay = |(vm, host): (&str, &str), run, from, to| Stay { vm: vm.into(), host: host.into(), run, from, to };
        for change in &self.homes {
            let key = (change.vm.as_str(), change.host.as_str());
            if let Some((from, run)) = open.insert(key, (change.at_micros, change.run))
                && run != Run::Off
            {
                stays.push(stay(key, run, from, change.at_micros));
            }
        }
        let on = open.into_iter().filter(|(_, (_, run))| *run != Run::Off);
        stays.extend(on.map(|(key, (from, run))| stay(key, run, from, self.ended.max(from))));
        stays.sort_by(|a, b| (a.from, &a.vm, &a.host).cmp(&(b.from, &b.vm, &b.host)));
        stays
    }

    /// Where one of these machines ran on two hosts at once.
    pub fn overlaps(&self, vms: &BTreeSet<String>) -> Vec<Overlap> {
        let stays = self.stays();
        let running: Vec<&Stay> = stays.iter().filter(|s| s.run == Run::Running && vms.contains(&s.vm)).collect();
        let mut found = Vec::new();
        for (index, one) in running.iter().enumerate() {
            for other in &running[index + 1..] {
                let (from, to) = (one.from.max(other.from), one.to.min(other.to));
                if one.vm == other.vm && one.host != other.host && from < to {
                    let hosts = [one.host.clone(), other.host.clone()];
                    found.push(Overlap { vm: one.vm.clone(), hosts, from_micros: from, to_micros: to });
                }
            }
        }
        found
    }

    /// When the machine began to run on another host than this one.
    pub fn ran_elsewhere(&self, vm: &str, than: &str, since: Micros) -> Option<Micros> {
        let elsewhere = |change: &&HomeChange| change.vm == vm && change.host != than && change.run == Run::Running;
        self.homes.iter().filter(elsewhere).map(|change| change.at_micros).find(|at| *at >= since)
    }

    /// When the machine stopped running on this host: paused or ended.
    pub fn stopped_on(&self, vm: &str, host: &str, since: Micros) -> Option<Micros> {
        let stopped = |change: &&HomeChange| change.vm == vm && change.host == host && change.run != Run::Running;
        self.homes.iter().filter(stopped).map(|change| change.at_micros).find(|at| *at >= since)
    }

    /// When the quorum said so of the node.
    pub fn node_became(&self, node: &str, state: &str, since: Micros) -> Option<Micros> {
        let changed = |change: &&NodeChange| change.node == node && change.state == state;
        self.nodes.iter().filter(changed).map(|change| change.at_micros).find(|at| *at >= since)
    }

    /// When another controller than this one was seen to lead, by a newer term.
    pub fn led_by_another(&self, than: u64, term: u64, since: Micros) -> Option<&LeaderChange> {
        let newer = |change: &&LeaderChange| change.leader != 0 && change.leader != than && change.term > term;
        self.leaders.iter().filter(newer).find(|change| change.at_micros >= since)
    }

    /// The first acknowledged write that was begun after `since`: when it was acknowledged.
    pub fn first_write_after(&self, since: Micros) -> Option<Micros> {
        let fresh = |a: &&Answer| a.write && a.outcome == Outcome::Done && a.began >= since;
        self.answers.iter().filter(fresh).map(|a| a.began + a.took).min()
    }

    /// The longest time in the span without a write that was acknowledged, the ends of the span included.
    pub fn longest_write_gap(&self, from: Micros, to: Micros) -> Micros {
        let done = self.answers.iter().filter(|a| a.write && a.outcome == Outcome::Done).map(|a| a.began + a.took);
        let mut times: Vec<Micros> = done.filter(|at| (from..=to).contains(at)).collect();
        times.extend([from, to]);
        times.sort_unstable();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }

    /// Of what was begun in the span.
    pub fn latency(&self, from: Micros, to: Micros, write: bool) -> Latency {
        let mut histogram = Histogram::<u64>::new_with_bounds(1, MOST_MICROS, 3).expect("the bounds are in order");
        let mut latency = Latency::default();
        for answer in self.answers.iter().filter(|a| a.write == write && (from..to).contains(&a.began)) {
            match answer.outcome {
                Outcome::Done => {
                    latency.done += 1;
                    histogram.saturating_record(answer.took);
                }
                Outcome::Refused => latency.refused += 1,
                Outcome::Unanswered => latency.unanswered += 1,
            }
        }
        if latency.done > 0 {
            latency.p50_micros = histogram.value_at_quantile(0.5);
            latency.p99_micros = histogram.value_at_quantile(0.99);
            latency.max_micros = histogram.max();
        }
        latency
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home(at_micros: Micros, host: &str, run: Run) -> HomeChange {
        HomeChange { at_micros, vm: "vm-1".into(), host: host.into(), run }
    }

    fn answer(began: Micros, took: Micros, outcome: Outcome) -> Answer {
        Answer { began, took, write: true, outcome }
    }

    #[test]
    fn a_paused_copy_beside_a_running_one_is_no_overlap_and_two_running_ones_are() {
        let homes = vec![home(0, "h1", Run::Running), home(5, "h1", Run::Paused), home(7, "h2", Run::Running)];
        let mut seen = Timeline { homes, ended: 20, ..Timeline::default() };
        let vms = BTreeSet::from(["vm-1".to_owned()]);
        assert_eq!(seen.overlaps(&vms), []);
        seen.homes.push(home(9, "h1", Run::Running));
        seen.homes.push(home(12, "h1", Run::Off));
        let overlaps = seen.overlaps(&vms);
        assert_eq!(overlaps.len(), 1);
        assert_eq!((overlaps[0].from_micros, overlaps[0].to_micros), (9, 12));
        assert_eq!(seen.overlaps(&BTreeSet::new()), [], "of a machine that may run twice it says nothing");
        assert_eq!((seen.ran_elsewhere("vm-1", "h1", 6), seen.stopped_on("vm-1", "h1", 6)), (Some(7), Some(12)));
    }

    #[test]
    fn a_stay_lasts_until_the_next_change_or_the_end() {
        let homes = vec![home(1, "h1", Run::Running), home(4, "h1", Run::Off), home(6, "h2", Run::Paused)];
        let seen = Timeline { homes, ended: 9, ..Timeline::default() };
        let stays = seen.stays();
        let spans: Vec<_> = stays.iter().map(|stay| (stay.host.as_str(), stay.run, stay.from, stay.to)).collect();
        assert_eq!(spans, [("h1", Run::Running, 1, 4), ("h2", Run::Paused, 6, 9)]);
    }

    #[test]
    fn a_gap_is_counted_also_at_the_ends_and_an_unanswered_write_ends_none() {
        let answers =
            vec![answer(10, 5, Outcome::Done), answer(20, 50, Outcome::Unanswered), answer(80, 10, Outcome::Done)];
        let seen = Timeline { answers, ..Timeline::default() };
        assert_eq!(seen.longest_write_gap(0, 100), 75);
        assert_eq!(seen.longest_write_gap(0, 300), 210);
        assert_eq!(seen.first_write_after(16), Some(90));
        let latency = seen.latency(0, 100, true);
        assert_eq!((latency.done, latency.unanswered, latency.max_micros), (2, 1, 10));
        assert_eq!(seen.latency(0, 100, false), Latency::default());
    }

    #[test]
    fn a_phase_ends_where_the_next_begins() {
        let phase = |from_micros, kind| Phase { from_micros, kind };
        let phases = vec![phase(0, PhaseKind::Before), phase(5, PhaseKind::Fault), phase(9, PhaseKind::Healing)];
        let seen = Timeline { phases, ended: 12, ..Timeline::default() };
        assert_eq!(seen.phase(PhaseKind::Fault), Some((5, 9)));
        assert_eq!(seen.phase(PhaseKind::Healing), Some((9, 12)));
        assert_eq!(seen.phase(PhaseKind::After), None);
    }

    #[test]
    fn only_a_newer_term_under_another_leader_is_a_new_leader() {
        let change = |at_micros, leader, term| LeaderChange { at_micros, leader, term };
        let leaders = vec![change(1, 2, 3), change(5, 0, 3), change(6, 2, 4), change(7, 3, 5)];
        let seen = Timeline { leaders, ..Timeline::default() };
        assert_eq!(seen.led_by_another(2, 3, 2).map(|change| change.at_micros), Some(7));
        assert_eq!(seen.led_by_another(3, 5, 0), None);
    }
}
