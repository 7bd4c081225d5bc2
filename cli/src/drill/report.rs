//! What a drill showed, and the verdict. Pure: the same observations give the same report.
//!
//! Unknown is never green: without proof that the fault happened, or without having looked well enough, the verdict is
//! `unknown`. What broke is told before what is not known.

use std::{collections::BTreeSet, fmt};

use serde::Serialize;

use super::{
    kind::Kind,
    timeline::{Latency, Micros, Overlap, PhaseKind, Timeline},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Passed,
    /// It cannot be said: the fault is not proved, or nobody looked well enough.
    Unknown,
    Failed,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Passed => "passed",
            Self::Unknown => "unknown",
            Self::Failed => "failed",
        })
    }
}

/// What was found, a sentence each.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Findings {
    /// That the fault really happened, by somebody else's word than the drill's.
    pub evidence: Vec<String>,
    pub doubts: Vec<String>,
    /// What must always hold and did not.
    pub broken: Vec<String>,
    /// What should have come back and did not.
    pub unrecovered: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Measure {
    /// The same in each run, so that runs can be compared.
    pub name: &'static str,
    pub micros: Micros,
    /// What it is about: a machine, a host.
    pub of: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_micros: Option<Micros>,
}

/// What a machine lost when it was made again elsewhere.
#[derive(Clone, Debug, Serialize)]
pub struct LossSeen {
    pub vm: String,
    /// From its newest backup to the fault; `None`: it was made from its first image.
    pub window_millis: Option<u64>,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Surroundings {
    /// The directory of a cloud on one machine, or the controllers of a live one.
    pub cloud: String,
    pub live: bool,
    pub hypervisor: String,
    pub controllers: usize,
    pub hosts: usize,
    pub machines: usize,
    /// Processor and cores of this machine.
    pub machine: String,
    pub version: String,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct ClientSeen {
    pub writes_before: Latency,
    pub reads_before: Latency,
    /// From the fault until it was healed.
    pub writes_during: Latency,
    pub reads_during: Latency,
    /// The longest time from the fault to the end without an acknowledged write.
    pub write_gap_micros: Micros,
}

#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub drill: Kind,
    pub verdict: Verdict,
    pub began_at_millis: u64,
    /// Whom it met, and what was done.
    pub target: String,
    pub fault: String,
    pub surroundings: Surroundings,
    #[serde(flatten)]
    pub findings: Findings,
    pub measures: Vec<Measure>,
    pub losses: Vec<LossSeen>,
    pub client: ClientSeen,
    pub overlaps: Vec<Overlap>,
    /// Whether the machines' homes were read from the hosts' own processes.
    pub truth: bool,
    pub timeline: Timeline,
}

/// What a drill hands over when it is over.
#[derive(Clone, Debug)]
pub struct Observed {
    pub drill: Kind,
    pub began_at_millis: u64,
    pub target: String,
    pub fault: String,
    pub surroundings: Surroundings,
    pub findings: Findings,
    pub measures: Vec<Measure>,
    pub losses: Vec<LossSeen>,
    pub truth: bool,
    /// Machines that must never run twice.
    pub exclusive: BTreeSet<String>,
    pub timeline: Timeline,
}

/// Twenty looks a second: what a guest does in less than a tenth of a second is not proved either way.
const LOOKS_PER_SECOND: u64 = 20;

impl Report {
    pub fn of(seen: Observed) -> Self {
        let Observed { mut findings, timeline, exclusive, .. } = seen;
        let overlaps = timeline.overlaps(&exclusive);
        let client = client_seen(&timeline);
        for overlap in &overlaps {
            let [one, other] = &overlap.hosts;
            findings.broken.push(format!(
                "{} may never run twice and ran on {one} and {other} for {}",
                overlap.vm,
                seconds(overlap.to_micros - overlap.from_micros)
            ));
        }
        findings.doubts.extend(doubts(&findings, &timeline, &client, seen.truth));
        let mut report = Self {
            drill: seen.drill,
            verdict: judge(&findings),
            began_at_millis: seen.began_at_millis,
            target: seen.target,
            fault: seen.fault,
            surroundings: seen.surroundings,
            findings,
            measures: seen.measures,
            losses: seen.losses,
            client,
            overlaps,
            truth: seen.truth,
            timeline,
        };
        if report.timeline.phase(PhaseKind::Fault).is_some() {
            let (of, micros) = ("the background client".into(), report.client.write_gap_micros);
            report.measures.push(Measure { name: "longest time without a write", micros, of, target_micros: None });
        }
        report
    }
}

/// What broke or did not come back fails it, whatever else is not known.
pub fn judge(findings: &Findings) -> Verdict {
    match findings {
        Findings { broken, unrecovered, .. } if !broken.is_empty() || !unrecovered.is_empty() => Verdict::Failed,
        Findings { doubts, .. } if !doubts.is_empty() => Verdict::Unknown,
        Findings { .. } => Verdict::Passed,
    }
}

fn doubts(findings: &Findings, timeline: &Timeline, client: &ClientSeen, truth: bool) -> Vec<String> {
    let mut doubts = Vec::new();
    if findings.evidence.is_empty() {
        doubts.push("nothing proves that the fault happened".to_owned());
    }
    if client.writes_before.done == 0 || client.reads_before.done == 0 {
        doubts.push("the background client had no success before the fault, so its trouble would prove nothing".into());
    }
    let looks = timeline.looks;
    if truth && looks.count * 1_000_000 < LOOKS_PER_SECOND * timeline.ended {
        let rate = looks.count as f64 * 1e6 / timeline.ended.max(1) as f64;
        doubts.push(format!("the hosts were looked at {rate:.0} times a second instead of {LOOKS_PER_SECOND}"));
    }
    doubts
}

fn client_seen(timeline: &Timeline) -> ClientSeen {
    let before = timeline.phase(PhaseKind::Before).unwrap_or_default();
    let during = timeline.phase(PhaseKind::Fault).unwrap_or_default();
    let gap = timeline.phase(PhaseKind::Fault).map(|(from, _)| timeline.longest_write_gap(from, timeline.ended));
    ClientSeen {
        writes_before: timeline.latency(before.0, before.1, true),
        reads_before: timeline.latency(before.0, before.1, false),
        writes_during: timeline.latency(during.0, during.1, true),
        reads_during: timeline.latency(during.0, during.1, false),
        write_gap_micros: gap.unwrap_or(0),
    }
}

/// The same measure over several runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Distribution {
    pub name: &'static str,
    pub count: usize,
    pub p50_micros: Micros,
    pub p95_micros: Micros,
    pub max_micros: Micros,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_micros: Option<Micros>,
}

/// By name, in the order in which they were first measured.
pub fn distributions(reports: &[Report]) -> Vec<Distribution> {
    let mut found: Vec<(&'static str, Option<Micros>, Vec<Micros>)> = Vec::new();
    for measure in reports.iter().flat_map(|report| &report.measures) {
        match found.iter_mut().find(|(name, _, _)| *name == measure.name) {
            Some((_, _, values)) => values.push(measure.micros),
            None => found.push((measure.name, measure.target_micros, vec![measure.micros])),
        }
    }
    let distribution = |(name, target_micros, mut values): (_, _, Vec<Micros>)| {
        values.sort_unstable();
        // Nearest rank: every figure is one that was measured.
        let rank = |percent: usize| values[(values.len() * percent).div_ceil(100).max(1) - 1];
        let (p50_micros, p95_micros, max_micros) = (rank(50), rank(95), rank(100));
        Distribution { name, count: values.len(), p50_micros, p95_micros, max_micros, target_micros }
    };
    found.into_iter().map(distribution).collect()
}

/// The worst of several.
pub fn overall(reports: &[Report]) -> Verdict {
    // Of no run nothing is known.
    reports.iter().map(|report| report.verdict).max().unwrap_or(Verdict::Unknown)
}

pub fn seconds(micros: Micros) -> String {
    match micros {
        0..10_000 => format!("{:.1} ms", micros as f64 / 1e3),
        10_000..1_000_000 => format!("{} ms", micros / 1000),
        _ => format!("{:.2} s", micros as f64 / 1e6),
    }
}

#[cfg(test)]
pub mod tests {
    use super::{
        super::timeline::{Answer, HomeChange, Looks, Outcome, Phase, Run},
        *,
    };

    /// A host's power cut as it should be seen: a second before, two of fault, one after.
    pub fn observed() -> Observed {
        let phase = |from_micros, kind| Phase { from_micros, kind };
        let home = |at_micros, host: &str, run| HomeChange { at_micros, vm: "vm-1".into(), host: host.into(), run };
        let answer = |began, write| Answer { began, took: 2_000, write, outcome: Outcome::Done };
        let timeline = Timeline {
            ended: 4_000_000,
            phases: vec![
                phase(0, PhaseKind::Before),
                phase(1_000_000, PhaseKind::Fault),
                phase(3_000_000, PhaseKind::Healing),
            ],
            homes: vec![
                home(0, "h1", Run::Running),
                home(1_000_000, "h1", Run::Off),
                home(2_000_000, "h2", Run::Running),
            ],
            looks: Looks { count: 100, longest_gap_micros: 50_000 },
            answers: (0..40).flat_map(|n| [answer(n * 100_000, true), answer(n * 100_000, false)]).collect(),
            ..Timeline::default()
        };
        Observed {
            drill: Kind::NodePower,
            began_at_millis: 1,
            target: "h1".into(),
            fault: "the power of h1 was cut".into(),
            surroundings: Surroundings { hypervisor: "simulated".into(), ..Surroundings::default() },
            findings: Findings { evidence: vec!["its first process is gone".into()], ..Findings::default() },
            measures: vec![],
            losses: vec![LossSeen { vm: "vm-1".into(), window_millis: Some(90_000) }],
            truth: true,
            exclusive: BTreeSet::from(["vm-1".to_owned()]),
            timeline,
        }
    }

    #[test]
    fn all_well_passes_and_the_gap_without_writes_is_measured() {
        let report = Report::of(observed());
        assert_eq!((report.verdict, &report.findings.doubts), (Verdict::Passed, &vec![]));
        assert_eq!(report.client.write_gap_micros, 100_000);
        assert_eq!((report.client.writes_before.done, report.client.writes_during.done), (10, 20));
    }

    #[test]
    fn without_proof_of_the_fault_it_is_unknown() {
        let mut seen = observed();
        seen.findings.evidence.clear();
        assert_eq!(Report::of(seen).verdict, Verdict::Unknown);
    }

    #[test]
    fn who_looked_too_seldom_or_served_nobody_knows_nothing() {
        let mut seldom = observed();
        seldom.timeline.looks.count = 79;
        let mut idle = observed();
        idle.timeline.answers.retain(|answer| answer.began > 1_000_000);
        for seen in [seldom.clone(), idle] {
            assert_eq!(Report::of(seen).verdict, Verdict::Unknown);
        }
        // A live cloud's hosts are not looked at, and nothing is said about them.
        seldom.truth = false;
        assert_eq!(Report::of(seldom).verdict, Verdict::Passed);
    }

    #[test]
    fn a_machine_in_two_places_fails_it_even_when_the_fault_is_not_proved() {
        let mut seen = observed();
        seen.findings.evidence.clear();
        seen.timeline.homes.remove(1);
        let report = Report::of(seen);
        assert_eq!(report.verdict, Verdict::Failed);
        assert_eq!(report.findings.broken, ["vm-1 may never run twice and ran on h1 and h2 for 2.00 s"]);
        let mut seen = observed();
        seen.findings.unrecovered.push("h1 did not come back".into());
        assert_eq!(Report::of(seen).verdict, Verdict::Failed);
    }

    #[test]
    fn a_distribution_has_only_figures_that_were_measured() {
        let run = |micros| {
            let mut seen = observed();
            let measure = Measure { name: "declared lost", micros, of: "h1".into(), target_micros: Some(10) };
            seen.measures.push(measure);
            Report::of(seen)
        };
        let reports: Vec<Report> = (1..=20).rev().map(run).collect();
        let found = &distributions(&reports)[0];
        assert_eq!((found.count, found.p50_micros, found.p95_micros, found.max_micros), (20, 10, 19, 20));
        assert_eq!((overall(&reports), overall(&[])), (Verdict::Passed, Verdict::Unknown));
    }
}
