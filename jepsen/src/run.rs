//! One run: clients work, the nemesis strikes and heals in turns, then everything must be there and agree, on the
//! controllers' disks too.

use std::{
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;

use crate::{
    chance::Chance,
    checker::{Finding, log},
    cluster::{Cluster, OFTEN, Options, disks::Dump},
    effect::{self, Effect},
    history::{self, Event, Recorder},
    nemesis::{self, Family, Fault, Outcome, Unsettled, core, round},
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
    pub controllers: usize,
    pub workloads: Vec<&'static dyn Workload>,
    /// Where history, logs and report go.
    pub folder: PathBuf,
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
    if plan.families.iter().filter(possible).any(|family| family.relays()) {
        cluster.relay_beats()?;
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
    let (disks, about) = (cluster.disks(), about(plan, &cluster, isolated, began_unix_millis)?);
    let recovered = unsettled.is_none();
    if recovered {
        cluster.stop().await?;
    } else {
        // One that did not recover is not asked to end, and may have ended already. Its disk may tell why, if it can be read.
        for controller in 0..cluster.size() {
            drop(cluster.kill(controller));
        }
    }
    let events = shared.recorder.finish()?;
    let dumps = match tokio::task::spawn_blocking(move || disks.dump()).await? {
        Err(error) if !recovered => {
            eprintln!("the disks were not read: {error:#}");
            Vec::new()
        }
        read => read?,
    };
    let effects = effect::read(&effects, shared.recorder.began())?;
    let steady = shared.recorder.began_unix_millis().abs_diff(began_unix_millis) <= STEADY_MILLIS;
    if !steady {
        skipped
            .push("the bill beside the effect log: the wall clock of this machine was set during the run".to_owned());
    }
    // Nor is the cloud's time that of this machine when a controller's clock was wrong.
    let stepped = outcomes.iter().any(|fault| matches!(fault.fault, Fault::Clock(_)));
    let began_unix_millis = (steady && !stepped).then_some(began_unix_millis);
    let ended = Ended { seconds, began_unix_millis, events, effects, outcomes, skipped, last, recovered, dumps };
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
    last: Vec<(&'static str, Finding)>,
    recovered: bool,
    dumps: Vec<Dump>,
}

/// Judges, and writes everything into the folder: what clients could not know in `resolved.jsonl`, the history for other
/// checkers in `edn`, the report as JSON and as a page.
fn write_report(plan: &Plan, about: About, ended: Ended) -> anyhow::Result<Report> {
    let Ended { seconds, began_unix_millis, events, effects, outcomes, skipped, last, recovered, dumps } = ended;
    let operations = history::operations(&events).map_err(anyhow::Error::msg)?;
    // Only of those who agree again it is certain that what is on none of their disks never happened.
    let resolved = log::resolve(&events, if recovered { &dumps } else { &[] });
    let known = log::with_resolved(&operations, &resolved);
    let evidence = Evidence { operations: &known, effects: &effects, began_unix_millis };
    let undone = plan.workloads.iter().flat_map(|workload| workload.gaps(&evidence)).collect();
    let mut named: Vec<_> = plan.workloads.iter().flat_map(|workload| workload.judge(&evidence)).collect();
    named.extend(last);
    let own = |name, of: fn(&Fault) -> bool| {
        let mut those = outcomes.iter().filter(|fault| of(&fault.fault)).peekable();
        those.peek()?;
        let broken = those.find(|fault| !fault.broken.is_empty());
        Some((name, broken.map_or(Finding::Holds, |fault| Finding::Broken(fault.broken.clone()))))
    };
    named.extend(own("disk: damage is refused", |fault| matches!(fault, Fault::Disk(_))));
    named.extend(own("beats: enough keep a host, old ones do not", |fault| matches!(fault, Fault::Beats(_))));
    if !dumps.is_empty() {
        named.push(("disks: one entry at an index, applied by a majority", log::matches(&dumps)));
        named.push(("disks: equal index, equal state", log::states(&dumps)));
        named.push(("disks: no vote is forgotten", log::votes(&dumps)));
    }
    if recovered {
        named.push(("disks: nothing acknowledged is missing", log::acknowledged(&events, &dumps)));
    }
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
