//! What a run came to: promises, coverage and harness told apart, latencies in calm, under faults and while healing. Pure.
//!
//! `page` shows it to people, with `chart` as its pictures. Not here: how a promise is judged; see [`crate::checker`].

use std::path::Path;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::{
    checker::{Finding, log::Resolved},
    cluster::disks::Outcome as Came,
    history::{Function, Kind, Operation},
    nemesis::{Family, Outcome},
    run::Plan,
    verdict::Verdict,
    workload::idle,
};

mod chart;
mod page;

pub use page::render;

/// Writes that must have been acknowledged in calm for a run to count; a slow machine does them in seconds.
const ENOUGH: usize = 50;

/// What a run leaves beside its history.
#[derive(Debug, Serialize)]
pub struct Report {
    pub verdict: Verdict,
    pub about: About,
    pub seed: u64,
    pub seconds: f64,
    pub findings: Vec<(String, String)>,
    pub gaps: Vec<String>,
    /// Families that this machine cannot do, with the reason.
    pub skipped: Vec<String>,
    pub faults: Vec<Outcome>,
    pub operations: usize,
    pub acknowledged: usize,
    pub refused: usize,
    /// What clients could not know.
    pub unknown: usize,
    /// Of these, by what the controllers' disks say: it happened, and it did not.
    pub resolved: (usize, usize),
    pub latency: Vec<Latency>,
}

/// Where and with what it ran.
#[derive(Clone, Debug, Default, Serialize)]
pub struct About {
    /// What `trefoil --version` prints.
    pub version: String,
    pub kernel: String,
    pub processors: usize,
    pub controllers: usize,
    /// Whether each controller had a network host of its own.
    pub isolated: bool,
    pub began_unix_millis: u64,
    /// What to type to have it again.
    pub command: String,
    pub workloads: Vec<String>,
}

/// Latencies of acknowledged operations in one phase, milliseconds.
#[derive(Debug, Serialize)]
pub struct Latency {
    pub phase: String,
    pub count: u64,
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
    /// The longest time in the phase without an acknowledged write anywhere.
    pub longest_write_gap: f64,
}

/// What a run has seen.
pub struct Seen<'a> {
    pub seconds: f64,
    /// As clients saw them: what they could not know is unknown here.
    pub operations: &'a [Operation],
    pub faults: Vec<Outcome>,
    pub skipped: Vec<String>,
    /// What workloads did not see and should have.
    pub undone: Vec<String>,
    pub resolved: &'a [Resolved],
}

/// The verdict on what was found, and everything that belongs to it.
pub fn judge(plan: &Plan, about: About, seen: Seen<'_>, named: &[(&'static str, Finding)]) -> Report {
    let Seen { seconds, operations, mut faults, skipped, undone, resolved } = seen;
    for fault in &mut faults {
        fault.write_gap = write_gap(operations, (fault.began, fault.healed));
    }
    let mut gaps = gaps(plan, operations, &faults);
    gaps.extend(undone);
    let findings: Vec<Finding> = named.iter().map(|(_, finding)| finding.clone()).collect();
    let with = |kind: Kind| operations.iter().filter(|o| o.outcome == kind).count();
    let happened = resolved.iter().filter(|resolved| matches!(resolved.outcome, Came::Done(_))).count();
    Report {
        verdict: Verdict::of(&findings, &gaps),
        about,
        seed: plan.seed,
        seconds,
        findings: named.iter().map(|(name, finding)| ((*name).to_owned(), describe(finding))).collect(),
        gaps,
        skipped,
        operations: operations.len(),
        acknowledged: with(Kind::Ok),
        refused: with(Kind::Fail),
        unknown: with(Kind::Info),
        resolved: (happened, resolved.len() - happened),
        latency: phases(operations, &faults),
        faults,
    }
}

fn phases(operations: &[Operation], faults: &[Outcome]) -> Vec<Latency> {
    let before = faults.first().map_or(u64::MAX, |fault| fault.began);
    let calm = calm_windows(faults);
    vec![
        latency("before", operations, &[(0, before)]),
        latency("fault", operations, &faults.iter().map(|f| (f.began, f.healed)).collect::<Vec<_>>()),
        latency("healing", operations, &faults.iter().map(|f| (f.healed, f.settled)).collect::<Vec<_>>()),
        latency("after", operations, calm.get(1..).unwrap_or_default()),
    ]
}

/// For a report.
pub(crate) fn describe(finding: &Finding) -> String {
    match finding {
        Finding::Holds => "holds".into(),
        Finding::Broken(how) => format!("BROKEN: {how}"),
        Finding::Undecided(why) => format!("undecided: {why}"),
    }
}

/// Before the first fault, between two, and after the last.
fn calm_windows(faults: &[Outcome]) -> Vec<(u64, u64)> {
    let starts = std::iter::once(0).chain(faults.iter().map(|fault| fault.settled));
    let ends = faults.iter().map(|fault| fault.began).chain(std::iter::once(u64::MAX));
    starts.zip(ends).collect()
}

/// What the run should have done and did not.
fn gaps(plan: &Plan, operations: &[Operation], faults: &[Outcome]) -> Vec<String> {
    let mut gaps = Vec::new();
    let acknowledged: Vec<&Operation> = operations.iter().filter(|o| o.outcome == Kind::Ok).collect();
    let write = |o: &&&Operation| o.f.is_write();
    let within =
        |from: u64, to: u64| acknowledged.iter().filter(write).filter(|o| o.start >= from && o.end <= to).count();
    if calm_windows(faults).iter().map(|(from, to)| within(*from, *to)).sum::<usize>() < ENOUGH {
        gaps.push(format!("fewer than {ENOUGH} writes were acknowledged in calm"));
    }
    for fault in faults {
        if fault.doubt.is_empty() && fault.must_write && within(fault.began, fault.healed) == 0 {
            gaps.push(format!("no write was acknowledged during '{}'", fault.fault));
        }
    }
    if let Some(last) = faults.last()
        && within(last.settled, u64::MAX) == 0
    {
        gaps.push("no write was acknowledged after the last fault".into());
    }
    for family in &plan.families {
        let own = family.faults(plan.controllers);
        let really = faults.iter().any(|f| f.doubt.is_empty() && (own.contains(&f.fault) || *family == Family::Mix));
        if family.obstacle().is_none() && !really {
            gaps.push(format!("no fault of the family {family:?} really happened"));
        }
    }
    let spans: Vec<_> = faults.iter().filter(|f| f.must_write).map(|f| (f.began, f.healed)).collect();
    let quiet = (faults.first().map_or(u64::MAX, |f| f.began), faults.last().map_or(0, |f| f.settled));
    gaps.extend(plan.workloads.iter().flat_map(|workload| idle(*workload, operations, quiet, &spans)));
    gaps
}

/// Whether its time says something of the cloud: a watcher's is that of whom it waited for.
fn is_timed(operation: &Operation) -> bool {
    !matches!(operation.f, Function::Watch | Function::Final)
}

fn latency(phase: &str, operations: &[Operation], windows: &[(u64, u64)]) -> Latency {
    // Up to a minute in microseconds, three digits: enough for anything that a client waits for.
    let mut histogram: Histogram<u64> = Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are constant");
    let ended = |o: &&Operation| {
        o.outcome == Kind::Ok && is_timed(o) && windows.iter().any(|(from, to)| o.end >= *from && o.end < *to)
    };
    for operation in operations.iter().filter(ended) {
        histogram.saturating_record((operation.end - operation.start) / 1000);
    }
    let millis = |micros: u64| micros as f64 / 1000.0;
    Latency {
        phase: phase.to_owned(),
        count: histogram.len(),
        p50: millis(histogram.value_at_quantile(0.5)),
        p99: millis(histogram.value_at_quantile(0.99)),
        p999: millis(histogram.value_at_quantile(0.999)),
        max: millis(histogram.max()),
        longest_write_gap: windows.iter().map(|window| write_gap(operations, *window)).fold(0.0, f64::max),
    }
}

/// The longest time, in milliseconds, in which no write that ended in the window was acknowledged.
fn write_gap(operations: &[Operation], (from, to): (u64, u64)) -> f64 {
    let written = |o: &&Operation| o.outcome == Kind::Ok && o.f.is_write();
    let mut ends: Vec<u64> =
        operations.iter().filter(written).map(|o| o.end).filter(|e| *e >= from && *e < to).collect();
    ends.sort_unstable();
    let last = if to == u64::MAX { ends.last().copied().unwrap_or(from) } else { to };
    ends.push(last);
    let mut previous = from;
    let mut longest = 0;
    for end in ends {
        longest = longest.max(end.saturating_sub(previous));
        previous = end;
    }
    longest as f64 / 1_000_000.0
}

impl Report {
    /// For a terminal.
    pub fn print(&self, folder: &Path) {
        println!("\n{:<22}  {:<38} {:>12}", "fault", "hit", "write gap ms");
        for fault in &self.faults {
            println!("{:<22}  {:<38} {:>12.0}", fault.fault, fault.hit.join(" "), fault.write_gap);
        }
        println!();
        for (promise, finding) in &self.findings {
            println!("{promise:<52} {finding}");
        }
        for gap in &self.gaps {
            println!("{:<52} {gap}", "coverage");
        }
        for skipped in &self.skipped {
            println!("{:<52} {skipped}", "skipped");
        }
        println!();
        println!("{:<10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>14}", "ms", "ok", "p50", "p99", "p99.9", "max", "write gap");
        for l in &self.latency {
            println!(
                "{:<10}{:>10}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>14.1}",
                l.phase, l.count, l.p50, l.p99, l.p999, l.max, l.longest_write_gap
            );
        }
        let (happened, never) = self.resolved;
        println!();
        println!(
            "{} operations: {} acknowledged, {} refused, {} unknown (by the disks {happened} happened, {never} did not); \
             {} faults in {:.0} s; seed {}",
            self.operations,
            self.acknowledged,
            self.refused,
            self.unknown,
            self.faults.len(),
            self.seconds,
            self.seed
        );
        println!("{}", folder.join("report.html").display());
        println!("{}", self.verdict);
    }
}
