//! One run: clients work, the nemesis strikes and heals in turns, then everything must be there and agree.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::{
    chance::Chance,
    checker::Finding,
    cluster::{Cluster, OFTEN, Options},
    effect::{self, Effect},
    history::{self, Kind, Operation, Recorder},
    nemesis::{self, Family, Fault, Outcome, Unsettled, core, round},
    verdict::Verdict,
    workload::{Evidence, SETTLE, Shared, Site, TENANT, Workload, idle},
};

/// A machine has three to live on, and one can be lost; of the smallest template four fit on each.
const HOSTS: usize = 3;
const OFFER: (u64, u64) = (4, 400 << 20);
/// Readings of two clocks one after the other differ by so much at the most.
const STEADY_MILLIS: u64 = 1;
/// Without faults, before the first, between two, and after the last.
const CALM: Duration = Duration::from_secs(2);
/// Writes that must have been acknowledged in calm for a run to count; a slow machine does them in seconds.
const ENOUGH: usize = 50;

pub struct Plan {
    pub seconds: u64,
    pub seed: u64,
    pub families: Vec<Family>,
    pub controllers: usize,
    pub workloads: Vec<&'static dyn Workload>,
    /// Where history, logs and report go.
    pub folder: PathBuf,
}

/// What a run leaves beside its history.
#[derive(Debug, Serialize)]
pub struct Report {
    pub verdict: Verdict,
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
    pub unknown: usize,
    pub latency: Vec<Latency>,
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

/// # Errors
/// When the harness fails; that is no verdict.
pub async fn run(plan: &Plan) -> anyhow::Result<Report> {
    std::fs::create_dir_all(&plan.folder)?;
    let (turns, mut skipped) = turns(plan);
    let possible = |family: &&Family| family.obstacle().is_none();
    let isolated = plan.families.iter().filter(possible).any(|family| family.isolates());
    let options =
        Options { controllers: plan.controllers, agents: HOSTS, offer: Some(OFFER), isolated, snapshot_every: OFTEN };
    let mut cluster = Cluster::start(&plan.folder.join("cluster"), options).await?;
    if plan.families.iter().filter(possible).any(|family| family.preloads()) {
        cluster.preload().await?;
    }
    cluster.create_tenant(TENANT).await?;

    let recorder = Recorder::new(Some(&plan.folder.join("history.jsonl")))?;
    let began_unix_millis = recorder.began_unix_millis();
    let shared = Shared::new(recorder);
    let effects = cluster.effects();
    for workload in &plan.workloads {
        workload.prepare(&Site { cluster: &cluster, shared: &shared }).await.context(workload.name())?;
    }
    let began = Instant::now();
    let mut chance = Chance::new(plan.seed);
    let mut workers = Vec::new();
    for workload in &plan.workloads {
        workers.extend(workload.start(&Site { cluster: &cluster, shared: &shared }, &mut chance)?);
    }
    let mut outcomes = Vec::new();
    let struck = strike(&mut cluster, plan, &turns, (&shared, began), &mut chance, &mut outcomes).await;
    let unsettled = match struck {
        Ok(()) => None,
        Err(error) => Some(error.downcast::<Unsettled>()?),
    };
    shared.end();
    for worker in workers {
        worker.await.context("a client panicked")?;
    }
    let unsettled = match unsettled {
        None => finish(&cluster, plan, &shared).await?,
        some => some,
    };
    let mut last = Vec::new();
    if unsettled.is_none() {
        let agree = cluster.hashes_agree(SETTLE).await;
        last.push(("replicas: equal index, equal state", agree.map_or_else(Finding::Broken, |()| Finding::Holds)));
    }
    let recovered = unsettled.as_ref().map_or(Finding::Holds, |why| Finding::Broken(why.to_string()));
    last.push(("recovery: who is healed agrees and answers", recovered));
    let seconds = began.elapsed().as_secs_f64();
    // One that did not recover is not asked to end.
    if unsettled.is_none() {
        cluster.stop().await?;
    }

    let operations = history::operations(&shared.recorder.finish()?).map_err(anyhow::Error::msg)?;
    let effects = effect::read(&effects, shared.recorder.began())?;
    let steady = shared.recorder.began_unix_millis().abs_diff(began_unix_millis) <= STEADY_MILLIS;
    if !steady {
        skipped
            .push("the bill beside the effect log: the wall clock of this machine was set during the run".to_owned());
    }
    let witness = (&effects[..], steady.then_some(began_unix_millis));
    let report = judge(plan, seconds, &operations, witness, outcomes, skipped, last);
    std::fs::write(plan.folder.join("report.json"), serde_json::to_vec_pretty(&report)?)?;
    Ok(report)
}

/// Asks everybody at the end; who does not answer, if anybody does not.
async fn finish(cluster: &Cluster, plan: &Plan, shared: &Arc<Shared>) -> anyhow::Result<Option<Unsettled>> {
    for workload in &plan.workloads {
        if let Err(error) = workload.finish(&Site { cluster, shared }).await {
            return Ok(Some(error.downcast::<Unsettled>().with_context(|| workload.name())?));
        }
    }
    Ok(None)
}

/// What happens in one turn.
#[derive(Clone, Copy)]
enum Turn {
    One(Fault),
    /// Several at once, chosen by chance when it comes.
    Mix,
}

/// What to go through in turn, and what this machine cannot do.
fn turns(plan: &Plan) -> (Vec<Turn>, Vec<String>) {
    let mut skipped = Vec::new();
    let mut lists: Vec<Vec<Turn>> = Vec::new();
    for family in &plan.families {
        if let Some(why) = family.obstacle() {
            skipped.push(format!("{family:?}: {why}"));
            continue;
        }
        let mut list = Vec::new();
        for fault in family.faults(plan.controllers) {
            match fault.obstacle() {
                Some(why) => skipped.push(format!("{fault}: {why}")),
                None => list.push(Turn::One(fault)),
            }
        }
        lists.push(if *family == Family::Mix { vec![Turn::Mix] } else { list });
    }
    // One of each family in turn, so that a short run has some of all.
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    let turns = (0..longest).flat_map(|n| lists.iter().filter_map(move |list| list.get(n).copied())).collect();
    (turns, skipped)
}

/// Faults in turn until the time is over, then the end of [`nemesis::core`].
async fn strike(
    cluster: &mut Cluster,
    plan: &Plan,
    turns: &[Turn],
    (shared, began): (&Shared, Instant),
    chance: &mut Chance,
    outcomes: &mut Vec<Outcome>,
) -> anyhow::Result<()> {
    let now = || shared.recorder.now();
    tokio::time::sleep(CALM).await;
    for (number, turn) in turns.iter().cycle().enumerate() {
        // One of each family comes first, however slow the machine is.
        let late = began.elapsed() + 2 * (nemesis::HOLD + CALM) > Duration::from_secs(plan.seconds);
        if late && number >= plan.families.len() {
            break;
        }
        let faults = match turn {
            Turn::One(fault) => vec![*fault],
            Turn::Mix => round::mix(cluster.size(), chance),
        };
        let done = round::round(cluster, &faults, now, chance).await?;
        done.iter().for_each(|outcome| tell(outcome, began));
        outcomes.extend(done);
        tokio::time::sleep(CALM).await;
    }
    let last = core::heal_majority_first(cluster, now, chance).await?;
    tell(&last, began);
    outcomes.push(last);
    tokio::time::sleep(CALM).await;
    Ok(())
}

fn tell(outcome: &Outcome, began: Instant) {
    eprintln!(
        "{:>5.1} s  {:<22} {:<24} {}{}",
        began.elapsed().as_secs_f64(),
        outcome.fault,
        outcome.hit.join(" "),
        outcome.evidence,
        if outcome.doubt.is_empty() { String::new() } else { format!(" (does not count: {})", outcome.doubt) }
    );
}

fn judge(
    plan: &Plan,
    seconds: f64,
    operations: &[Operation],
    (effects, began_unix_millis): (&[Effect], Option<u64>),
    mut faults: Vec<Outcome>,
    skipped: Vec<String>,
    last: Vec<(&'static str, Finding)>,
) -> Report {
    let evidence = Evidence { operations, effects, began_unix_millis };
    let mut named: Vec<_> = plan.workloads.iter().flat_map(|workload| workload.judge(&evidence)).collect();
    named.extend(last);
    if faults.iter().any(|fault| matches!(fault.fault, Fault::Disk(_))) {
        let broken = faults.iter().find(|fault| !fault.broken.is_empty());
        let finding = broken.map_or(Finding::Holds, |fault| Finding::Broken(fault.broken.clone()));
        named.push(("disk: damage is refused", finding));
    }
    for fault in &mut faults {
        fault.write_gap = write_gap(operations, (fault.began, fault.healed));
    }
    let mut gaps = gaps(plan, operations, &faults);
    gaps.extend(plan.workloads.iter().flat_map(|workload| workload.gaps(&evidence)));
    let findings: Vec<Finding> = named.iter().map(|(_, finding)| finding.clone()).collect();
    let with = |kind: Kind| operations.iter().filter(|o| o.outcome == kind).count();
    let latency = vec![
        latency("calm", operations, &calm_windows(&faults)),
        latency("fault", operations, &faults.iter().map(|f| (f.began, f.healed)).collect::<Vec<_>>()),
        latency("healing", operations, &faults.iter().map(|f| (f.healed, f.settled)).collect::<Vec<_>>()),
    ];
    Report {
        verdict: Verdict::of(&findings, &gaps),
        seed: plan.seed,
        seconds,
        findings: named.iter().map(|(name, finding)| ((*name).to_owned(), describe(finding))).collect(),
        gaps,
        skipped,
        operations: operations.len(),
        acknowledged: with(Kind::Ok),
        refused: with(Kind::Fail),
        unknown: with(Kind::Info),
        faults,
        latency,
    }
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

fn latency(phase: &str, operations: &[Operation], windows: &[(u64, u64)]) -> Latency {
    // Up to a minute in microseconds, three digits: enough for anything that a client waits for.
    let mut histogram: Histogram<u64> = Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are constant");
    let ended =
        |o: &&Operation| o.outcome == Kind::Ok && windows.iter().any(|(from, to)| o.end >= *from && o.end < *to);
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
            println!("{promise:<44} {finding}");
        }
        for gap in &self.gaps {
            println!("{:<44} {gap}", "coverage");
        }
        for skipped in &self.skipped {
            println!("{:<44} {skipped}", "skipped");
        }
        println!();
        println!("{:<10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>14}", "ms", "ok", "p50", "p99", "p99.9", "max", "write gap");
        for l in &self.latency {
            println!(
                "{:<10}{:>10}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>14.1}",
                l.phase, l.count, l.p50, l.p99, l.p999, l.max, l.longest_write_gap
            );
        }
        println!();
        println!(
            "{} operations: {} acknowledged, {} refused, {} unknown; {} faults in {:.0} s; seed {}; {}",
            self.operations,
            self.acknowledged,
            self.refused,
            self.unknown,
            self.faults.len(),
            self.seconds,
            self.seed,
            folder.display()
        );
        println!("{}", self.verdict);
    }
}
