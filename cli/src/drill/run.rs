//! One drill from its preconditions to its report, and several in a row. Always heals: also after an error, and when a
//! person stops it.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::Result;
use api::{
    client::Client,
    error::ApiError,
    proto::{QuorumCheckRequest, Vm},
};
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    RunArgs,
    ask::{self, ask},
    backup, check, clock,
    heal::Heal,
    host::{self, Hurt},
    kind::Kind,
    load, majority, quorum,
    record::Record,
    report::{Findings, Observed, Report, Surroundings},
    scene,
    stage::Stage,
    timeline::{Outcome, PhaseKind, Timeline},
    truth, watch,
};
use crate::{arguments::Global, commands::asked_to_end, config::Config, lab::Cloud, moment::now_millis};

/// What the client does when nothing is wrong: as much as is compared with what comes.
const BEFORE: Duration = Duration::from_secs(3);
/// To connect to each controller takes milliseconds; on a machine that is overloaded, seconds.
const WARM: Duration = Duration::from_secs(60);
/// What comes late is seen too.
const AFTER: Duration = Duration::from_secs(2);
/// Observers end at their next look; a request of theirs may be under way.
const LAST_LOOK: Duration = Duration::from_secs(5);
/// While runs follow each other, for what the last one left to settle.
const SETTLE: Duration = Duration::from_secs(120);

/// Plays it as often as asked; the reports, and what could not be removed of what was made for it.
///
/// # Errors
/// When it may not run: then nothing was done to the cloud that is not removed again.
pub async fn all(args: &RunArgs, global: &Global) -> Result<(Vec<Report>, Vec<String>)> {
    let cloud = if args.how.live { None } else { Some(Cloud::load(&args.how.placement.dir).map_err(no_cloud)?) };
    check::kind(args.kind, cloud.as_ref())?;
    let client = match &cloud {
        Some(cloud) => cloud.client()?,
        None => {
            let config = Config::load(global)?;
            Client::new(&config.endpoints, &config.ca_pem, &config.token)?
        }
    }
    .with_deadline(global.timeout);
    check::health(args.kind, &client).await?;
    let tenant = if args.how.live { Config::load(global)?.tenant } else { scene::TENANT.to_owned() };
    let only = if args.how.live { check::allowed(args.kind, &client, &tenant).await? } else { None };
    if args.how.image.is_none() {
        check::machines(args.kind, &client).await?;
    }

    let mut undo = Vec::new();
    let play = async {
        prepare(args, &cloud, &client, &tenant, &mut undo).await?;
        let mut reports = Vec::new();
        for number in 1..=args.how.times {
            if args.how.times > 1 {
                eprintln!("── run {number} of {}", args.how.times);
            }
            let (report, stopped) = one(args, &client, &tenant, only.as_ref()).await?;
            reports.push(report);
            if stopped {
                break;
            }
            if number < args.how.times {
                tokio::select! {
                    settled = settled(args.kind, &client) => settled?,
                    () = asked_to_end()? => break,
                }
            }
        }
        Ok::<_, anyhow::Error>(reports)
    };
    let reports = play.await;
    let left = scene::remove(&client, undo).await;
    Ok((reports?, left))
}

fn no_cloud(error: anyhow::Error) -> ApiError {
    check::refused(format!("{error:#}: `trefoil up` makes one; --live drills another"))
}

async fn prepare(
    args: &RunArgs,
    cloud: &Option<Cloud>,
    client: &Client,
    tenant: &str,
    undo: &mut Vec<Heal>,
) -> Result<()> {
    let Some(cloud) = cloud else {
        undo.extend(load::keys().map(|key| Heal::DeleteTag { tenant: tenant.to_owned(), key }));
        return Ok(());
    };
    scene::tenant(client, undo).await?;
    let Some(image) = &args.how.image else { return Ok(()) };
    let machines = args.how.machines.map_or(cloud.hosts.len(), usize::from);
    eprintln!("making {machines} machines of the drill's own, each backed up");
    let own = scene::Own { image, machines, recovery: args.how.recovery.name() };
    tokio::select! {
        made = scene::machines(client, &own, undo) => made,
        () = asked_to_end()? => anyhow::bail!("stopped before the drill began"),
    }
}

/// After a run the next one must find the cloud as well as the first one did.
async fn settled(kind: Kind, client: &Client) -> Result<()> {
    let asked = tokio::time::Instant::now();
    loop {
        let well = async {
            check::health(kind, client).await?;
            check::machines(kind, client).await
        };
        match well.await {
            Ok(()) => return Ok(()),
            Err(error) if asked.elapsed() > SETTLE => return Err(error.into()),
            Err(_) => sleep(Duration::from_millis(500)).await,
        }
    }
}

/// The report, and whether a person stopped it.
async fn one(args: &RunArgs, client: &Client, tenant: &str, only: Option<&Vm>) -> Result<(Report, bool)> {
    let (began_at_millis, record) = (now_millis(), Arc::new(Record::begin()));
    // The run before this one has started processes: the record is read again.
    let cloud = if args.how.live { None } else { Some(Cloud::load(&args.how.placement.dir)?) };
    let (surroundings, exclusive) = look_around(args, cloud.as_ref(), client).await?;
    let eyes = cloud.as_ref().map(|cloud| truth::watch(cloud, record.clone())).transpose()?;
    let mut observers = vec![watch::start(client, &record), load::start(client, tenant, &record)];
    let mut stage = Stage {
        cloud,
        client: client.clone(),
        record: record.clone(),
        hold: args.how.hold,
        rehearsal: args.rehearsal,
        heals: Vec::new(),
        target: String::new(),
        fault: String::new(),
        findings: Findings::default(),
        measures: Vec::new(),
        losses: Vec::new(),
    };
    let interrupt = asked_to_end()?;
    let stopped = tokio::select! {
        outcome = act(&mut stage, args.kind, only) => {
            if let Err(error) = outcome {
                stage.say(&format!("the drill broke off: {error:#}"));
                stage.findings.unrecovered.push(format!("the drill broke off: {error:#}"));
            }
            false
        }
        () = interrupt => true,
    };
    if stopped {
        stage.say("stopped by a person; healing");
        stage.findings.doubts.push("it was stopped before its end".into());
    }
    stage.heal().await;
    let truth = eyes.is_some();
    if !stopped {
        after(&mut stage, truth).await;
    }
    record.end();
    for observer in &mut observers {
        // One that still waits for an answer has nothing more to say.
        let _ = timeout(LAST_LOOK, ended(observer)).await;
    }
    if let Some(eyes) = eyes {
        let _ = eyes.join();
    }
    let (timeline, broken) = record.close();
    stage.findings.broken.extend(broken);
    let Stage { target, fault, findings, measures, losses, .. } = stage;
    let seen = Observed {
        drill: args.kind,
        began_at_millis,
        target,
        fault,
        surroundings,
        findings,
        measures,
        losses,
        truth,
        exclusive,
        timeline,
    };
    Ok((Report::of(seen), stopped))
}

async fn act(stage: &mut Stage, kind: Kind, only: Option<&Vm>) -> Result<()> {
    let warm = |seen: &Timeline| seen.answers.iter().any(|a| !a.write && a.outcome == Outcome::Done).then_some(());
    stage.expect(&format!("{}: all is well, the background client works", kind.name()), WARM, warm).await;
    stage.record.ready();
    sleep(BEFORE).await;
    match kind {
        Kind::LeaderKill => quorum::leader_kill(stage).await,
        Kind::LeaderTransfer => quorum::leader_transfer(stage).await,
        Kind::ControllerWipe => quorum::controller_wipe(stage).await,
        Kind::DiskFull => quorum::disk_full(stage).await,
        Kind::NodePower => host::run(stage, Hurt::Power).await,
        Kind::NodePartition => host::run(stage, Hurt::Cable).await,
        Kind::AgentHang => host::run(stage, Hurt::Agent).await,
        Kind::BackupRestore => backup::run(stage, only).await,
        Kind::LostMajority => majority::lost_majority(stage).await,
        Kind::ClockStep => clock::clock_step(stage).await,
    }
}

/// All is healed: does everything hold?
async fn after(stage: &mut Stage, truth: bool) {
    stage.record.enter(PhaseKind::After);
    if truth && let Err(error) = host::once_each(stage).await {
        stage.findings.unrecovered.push(format!("where the machines run is not known: {error:#}"));
    }
    sleep(AFTER).await;
    match ask!(stage.client, quorum_check, QuorumCheckRequest {}) {
        Ok(checked) => {
            let broken = checked.broken.iter().map(|broken| format!("{}: {}", broken.rule, broken.sentence));
            stage.findings.broken.extend(broken);
            stage.say(&format!(
                "quorum check: {} of {} rules hold",
                checked.rules as usize - checked.broken.len(),
                checked.rules
            ));
        }
        Err(error) => stage.findings.unrecovered.push(format!("the rules could not be checked: {error}")),
    }
}

async fn ended(tasks: &mut JoinSet<()>) {
    while tasks.join_next().await.is_some() {}
}

async fn look_around(
    args: &RunArgs,
    cloud: Option<&Cloud>,
    client: &Client,
) -> Result<(Surroundings, BTreeSet<String>)> {
    let vms = ask::vms(client).await?;
    let nodes = ask::nodes(client).await?;
    let exclusive = vms.iter().filter(|vm| vm.recovery == "exclusive").map(|vm| vm.id.clone()).collect();
    let mut kinds: Vec<String> = nodes.iter().map(|node| node.hypervisor.clone()).collect();
    kinds.sort_unstable();
    kinds.dedup();
    let surroundings = Surroundings {
        cloud: cloud.map_or_else(|| "a live cloud".into(), |cloud| cloud.dir.display().to_string()),
        live: args.how.live,
        hypervisor: kinds.join(", "),
        controllers: client.endpoints(),
        hosts: nodes.len(),
        machines: vms.len(),
        machine: machine(),
        version: env!("CARGO_PKG_VERSION").into(),
    };
    Ok((surroundings, exclusive))
}

/// What this runs on, for whoever compares figures.
fn machine() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{cores} cores of {}", model.map_or("an unknown processor", |(_, name)| name))
}
