//! One run: clients work, the nemesis strikes and heals in turns, then everything must be there and agree, on the
//! controllers' disks too.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context;

use crate::{
    chance::Chance,
    checker::{Finding, log},
    cluster::{Cluster, OFTEN, Options, disks::Dump, switch::Switch},
    effect::{self, Effect},
    history::{self, Event, Recorder},
    nemesis::{self, Family, Fault, Outcome},
    report::{self, About, Report, Seen},
    workload::{Evidence, SETTLE, Shared, Site, TENANT, Workload},
};

/// A machine has three to live on, and one can be lost; of the smallest template four fit on each.
const HOSTS: usize = 3;
const OFFER: (u64, u64) = (4, 400 << 20);
/// Readings of two clocks one after the other differ by so much at the most.
const STEADY_MILLIS: u64 = 1;
/// Without faults, before the first, between two, and after the last.
const CALM: Duration = Duration::from_secs(2);

pub struct Plan {
    pub seconds: u64,
    pub seed: u64,
    pub families: Vec<Family>,
    pub workloads: Vec<&'static dyn Workload>,
    /// Where history, logs and report go.
    pub folder: PathBuf,
}

/// # Errors
/// When the harness fails; that is no verdict.
pub async fn run(plan: &Plan) -> anyhow::Result<Report> {
    std::fs::create_dir_all(&plan.folder)?;
    let (faults, mut skipped) = faults(plan);
    let isolated =
        faults.iter().any(|fault| matches!(fault, Fault::Host(_)) || Family::Partition.faults().contains(fault));
    let options = Options { controllers: 3, agents: HOSTS, offer: Some(OFFER), isolated, snapshot_every: OFTEN };
    let mut cluster = Cluster::start(&plan.folder.join("cluster"), options).await?;
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
    let outcomes = strike(&mut cluster, plan, &faults, &shared, began, &mut chance).await?;
    shared.end();
    for worker in workers {
        worker.await.context("a client panicked")?;
    }
    for workload in &plan.workloads {
        workload.finish(&Site { cluster: &cluster, shared: &shared }).await.context(workload.name())?;
    }
    let agree = cluster.hashes_agree(SETTLE).await;
    let seconds = began.elapsed().as_secs_f64();
    let (disks, about) = (cluster.disks(), about(plan, &cluster, isolated, began_unix_millis)?);
    cluster.stop().await?;
    let events = shared.recorder.finish()?;
    let dumps = tokio::task::spawn_blocking(move || disks.dump()).await??;
    let effects = effect::read(&effects, shared.recorder.began())?;
    let steady = shared.recorder.began_unix_millis().abs_diff(began_unix_millis) <= STEADY_MILLIS;
    if !steady {
        skipped
            .push("the bill beside the effect log: the wall clock of this machine was set during the run".to_owned());
    }
    let began_unix_millis = steady.then_some(began_unix_millis);
    let ended = Ended { seconds, began_unix_millis, events, effects, outcomes, skipped, agree, dumps };
    write_report(plan, about, ended)
}

/// What is left when all processes have ended.
struct Ended {
    seconds: f64,
    /// When the history's clock began; not known when the wall clock was set meanwhile.
    began_unix_millis: Option<u64>,
    events: Vec<Event>,
    effects: Vec<Effect>,
    outcomes: Vec<Outcome>,
    skipped: Vec<String>,
    agree: Result<(), String>,
    dumps: Vec<Dump>,
}

/// Judges, and writes everything into the folder: what clients could not know in `resolved.jsonl`, the history for other
/// checkers in `edn`, the report as JSON and as a page.
fn write_report(plan: &Plan, about: About, ended: Ended) -> anyhow::Result<Report> {
    let Ended { seconds, began_unix_millis, events, effects, outcomes, skipped, agree, dumps } = ended;
    let operations = history::operations(&events).map_err(anyhow::Error::msg)?;
    let resolved = log::resolve(&events, &dumps);
    let known = log::with_resolved(&operations, &resolved);
    let evidence = Evidence { operations: &known, effects: &effects, began_unix_millis };
    let undone = plan.workloads.iter().flat_map(|workload| workload.gaps(&evidence)).collect();
    let mut named: Vec<_> = plan.workloads.iter().flat_map(|workload| workload.judge(&evidence)).collect();
    named.push(("replicas: equal index, equal state", agree.map_or_else(Finding::Broken, |()| Finding::Holds)));
    named.push(("disks: one entry at an index, applied by a majority", log::matches(&dumps)));
    named.push(("disks: equal index, equal state", log::states(&dumps)));
    named.push(("disks: nothing acknowledged is missing", log::acknowledged(&events, &dumps)));
    let seen = Seen { seconds, operations: &operations, faults: outcomes, skipped, undone, resolved: &resolved };
    let report = report::judge(plan, about, seen, &named);
    let write = |name: &str, text: String| std::fs::write(plan.folder.join(name), text);
    let lines = resolved.iter().map(|resolved| Ok(serde_json::to_string(resolved)? + "\n"));
    write("resolved.jsonl", lines.collect::<anyhow::Result<String>>()?)?;
    history::edn::export(&plan.folder.join("edn"), &events)?;
    write("report.json", serde_json::to_string_pretty(&report)?)?;
    write("report.html", report::render(&report, &operations))?;
    Ok(report)
}

fn about(plan: &Plan, cluster: &Cluster, isolated: bool, began_unix_millis: u64) -> anyhow::Result<About> {
    let version = cluster.trefoil(&["--version"]).output()?;
    let kernel = Command::new("uname").arg("-sr").output()?;
    let said = |output: std::process::Output| String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let names: Vec<String> = plan.workloads.iter().map(|workload| workload.name().to_owned()).collect();
    let families: Vec<String> = plan.families.iter().map(|family| format!("{family:?}").to_lowercase()).collect();
    let command = format!(
        "make jepsen TIME={} SEED={} NEMESIS={} WORKLOAD={}",
        plan.seconds,
        plan.seed,
        families.join(","),
        names.join(",")
    );
    Ok(About {
        version: said(version),
        kernel: said(kernel),
        processors: std::thread::available_parallelism().map_or(0, usize::from),
        controllers: cluster.size(),
        isolated,
        began_unix_millis,
        command,
        workloads: names,
    })
}

/// The faults to go through in turn, and the families that this machine cannot do.
fn faults(plan: &Plan) -> (Vec<Fault>, Vec<String>) {
    let cuts = |family: &Family| matches!(family, Family::Partition | Family::Host);
    let obstacle = if plan.families.iter().any(cuts) { Switch::obstacle() } else { None };
    let possible = |family: &&Family| !cuts(family) || obstacle.is_none();
    let families: Vec<Family> = plan.families.iter().filter(possible).copied().collect();
    // One of each family in turn, so that a short run has some of all.
    let longest = families.iter().map(|family| family.faults().len()).max().unwrap_or(0);
    let faults = (0..longest).flat_map(|n| families.iter().filter_map(move |family| family.faults().get(n).copied()));
    (faults.collect(), obstacle.map(|why| format!("partition: {why}")).into_iter().collect())
}

/// Faults in turn until the time is over, each at least once if the time allows it.
async fn strike(
    cluster: &mut Cluster,
    plan: &Plan,
    faults: &[Fault],
    shared: &Shared,
    began: Instant,
    chance: &mut Chance,
) -> anyhow::Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    tokio::time::sleep(CALM).await;
    for (number, fault) in faults.iter().cycle().enumerate() {
        // One of each family comes first, however slow the machine is.
        let late = began.elapsed() + nemesis::HOLD + CALM > Duration::from_secs(plan.seconds);
        if late && number >= plan.families.len() {
            break;
        }
        let start = shared.recorder.now();
        let in_force = nemesis::inject(cluster, *fault, chance).await?;
        tokio::time::sleep(nemesis::HOLD).await;
        let mut outcome = in_force.heal(cluster, start, shared.recorder.now()).await?;
        cluster.settled(SETTLE).await.with_context(|| format!("after '{fault}'"))?;
        outcome.settled = shared.recorder.now();
        eprintln!(
            "{:>5.1} s  {:<16} {:<24} {}{}",
            began.elapsed().as_secs_f64(),
            fault,
            outcome.hit.join(" "),
            outcome.evidence,
            if outcome.doubt.is_empty() { String::new() } else { format!(" (does not count: {})", outcome.doubt) }
        );
        outcomes.push(outcome);
        tokio::time::sleep(CALM).await;
    }
    Ok(outcomes)
}
