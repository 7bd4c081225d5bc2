//! Drills of a host: its power is cut, its cable is pulled, its agent hangs. Its machines must run elsewhere, and none of
//! those that may never run twice may do so.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context, Result};
use api::proto::Vm;
use nix::sys::signal::Signal;
use tokio::time::sleep;

use super::{
    ask,
    heal::Heal,
    quorum::whole,
    report::LossSeen,
    stage::Stage,
    timeline::{Micros, Run, StatusChange, Timeline},
};
use crate::lab::{act, process::ProcessId, switch};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hurt {
    Power,
    Cable,
    Agent,
}

/// Leases end after five seconds; with a failover in between and a machine under load it is not a minute.
const LOST: Duration = Duration::from_secs(60);
/// An image may have to be fetched, and emulated machines start slowly.
const ELSEWHERE: Duration = Duration::from_secs(180);
/// A host boots, its agent joins in, and puts aside what was given away.
const BACK: Duration = Duration::from_secs(120);
/// A lease of five seconds that was renewed at the last moment, and five more (issue: "declared ≤ 5 s after the last
/// renewal could have been valid").
const LOST_TARGET: Duration = Duration::from_secs(10);
const STARTED_TARGET: Duration = Duration::from_secs(15);
/// Lease and margin (ADR 0014): by then a machine that may never run twice has stopped.
const STOPPED_TARGET: Duration = Duration::from_millis(5_500);
/// What was on the wire when the cable was pulled has arrived by then.
const SETTLES: Duration = Duration::from_millis(200);

/// What was on the host that is hurt.
struct Scene {
    host: String,
    machines: Vec<Vm>,
}

pub async fn run(stage: &mut Stage, hurt: Hurt) -> Result<()> {
    let scene = busiest(stage).await?;
    let host = scene.host.clone();
    let ids: Vec<&str> = scene.machines.iter().map(|vm| vm.id.as_str()).collect();
    let what = match hurt {
        Hurt::Power => format!("the power of {host} is cut"),
        Hurt::Cable => format!("the network cable of {host} is pulled"),
        Hurt::Agent => format!("the agent of {host} is stopped (SIGSTOP)"),
    };
    let (_, real) = stage.begin_fault(&host, &format!("{what}; it runs {}", ids.join(", ")));
    if real {
        let proof = hurt_it(stage, hurt, &host).await?;
        let at = proof.at;
        lost(stage, &scene, at).await;
        elsewhere(stage, &scene, at).await;
        if hurt != Hurt::Power {
            stopped_there(stage, &scene, at);
        }
        sleep(stage.hold).await;
        prove(stage, hurt, &host, proof).await?;
    } else {
        sleep(stage.hold).await;
    }
    let healing = stage.record.now();
    stage.heal().await;
    if real {
        back(stage, &scene, healing).await;
    }
    whole(stage).await;
    Ok(())
}

/// The host that runs most machines which move when it is lost.
async fn busiest(stage: &Stage) -> Result<Scene> {
    let moves = |vm: &Vm| vm.status == "running" && matches!(&*vm.recovery, "exclusive" | "available");
    let machines: Vec<Vm> = ask::vms(&stage.client).await?.into_iter().filter(moves).collect();
    let on = |host: &str| machines.iter().filter(|vm| vm.node == host).count();
    let host =
        machines.iter().max_by_key(|vm| (on(&vm.node), std::cmp::Reverse(&vm.node))).context("no machine runs")?;
    let host = host.node.clone();
    Ok(Scene { machines: machines.into_iter().filter(|vm| vm.node == host).collect(), host })
}

/// What is compared at the end of the fault.
struct Proof {
    at: Micros,
    /// Bytes that the port had carried when the fault had settled.
    carried: u64,
    process: Option<ProcessId>,
}

async fn hurt_it(stage: &mut Stage, hurt: Hurt, name: &str) -> Result<Proof> {
    let cloud = stage.cloud()?;
    let host =
        cloud.hosts.iter().find(|host| host.name == name).context("the host is not one of this cloud's record")?;
    let (agent, boot) = (host.agent, host.boot);
    let mut proof = Proof { at: stage.record.now(), carried: 0, process: agent };
    match hurt {
        Hurt::Power => {
            proof.process = boot.map(|boot| boot.init).or(agent);
            stage.heals.push(Heal::Start(name.to_owned()));
            act::power_off(stage.cloud()?, name).await?;
        }
        Hurt::Cable => {
            stage.heals.push(Heal::Plug(name.to_owned()));
            act::cut(stage.cloud()?, name).await?;
            sleep(SETTLES).await;
            proof.carried = switch::carried(stage.cloud()?, name).await?;
        }
        Hurt::Agent => {
            let agent = agent.context("its agent does not run")?;
            stage.heals.push(Heal::Continue(name.to_owned(), agent));
            agent.signal(Signal::SIGSTOP)?;
        }
    }
    Ok(proof)
}

/// Whether the fault was there until now.
async fn prove(stage: &mut Stage, hurt: Hurt, name: &str, proof: Proof) -> Result<()> {
    let (holds, what) = match (hurt, proof.process) {
        (Hurt::Power, Some(process)) => {
            (!process.is_alive(), format!("process {}, the first of {name}, has ended", process.pid))
        }
        (Hurt::Cable, _) => {
            let since = switch::carried(stage.cloud()?, name).await?.saturating_sub(proof.carried);
            (since == 0, format!("the port of {name} carried {since} bytes while it was cut"))
        }
        (Hurt::Agent, Some(process)) => {
            let stat = fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap_or_default();
            let stopped = stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('T'));
            (stopped, format!("the kernel shows process {}, the agent of {name}, as stopped", process.pid))
        }
        (_, None) => (false, format!("no process of {name} is known")),
    };
    let list = if holds { &mut stage.findings.evidence } else { &mut stage.findings.doubts };
    list.push(if holds { what } else { format!("it is not so that {what}") });
    Ok(())
}

async fn lost(stage: &mut Stage, scene: &Scene, at: Micros) {
    let host = scene.host.as_str();
    let what = format!("{host} is declared lost");
    if let Some(lost) = stage.expect(&what, LOST, |seen| seen.node_became(host, "lost", at)).await {
        stage.measure("declared lost", lost - at, host, Some(LOST_TARGET));
    }
}

/// Each machine must run on another host: by that host's processes, and by what the cloud says.
async fn elsewhere(stage: &mut Stage, scene: &Scene, at: Micros) {
    let host = scene.host.as_str();
    for vm in &scene.machines {
        let id = vm.id.as_str();
        let what = format!("{id} runs on another host");
        if let Some(ran) = stage.expect(&what, ELSEWHERE, |seen| seen.ran_elsewhere(id, host, at)).await {
            stage.measure("its process runs elsewhere", ran - at, id, Some(STARTED_TARGET));
        }
        let said = |seen: &Timeline| {
            let runs = |s: &&StatusChange| s.vm == id && s.status == "running" && s.node != host;
            seen.statuses.iter().filter(runs).map(|s| s.at_micros).find(|when| *when >= at)
        };
        if let Some(ran) = stage.expect(&format!("the cloud says that {id} runs"), ELSEWHERE, said).await {
            stage.measure("the cloud says that it runs", ran - at, id, None);
        }
        let now = ask::vm(&stage.client, &vm.tenant, id).await;
        if let Some(loss) = now.ok().and_then(|now| now.loss) {
            let taken = (loss.data_from_millis > 0).then(|| loss.at_millis.saturating_sub(loss.data_from_millis));
            stage.losses.push(LossSeen { vm: id.to_owned(), window_millis: taken });
        }
    }
}

/// A host that lives on without the quorum must have stopped what may never run twice.
fn stopped_there(stage: &mut Stage, scene: &Scene, at: Micros) {
    for vm in scene.machines.iter().filter(|vm| vm.recovery == "exclusive") {
        let stopped = stage.record.see().stopped_on(&vm.id, &scene.host, at);
        match stopped {
            Some(stopped) => stage.measure("stopped on its cut-off host", stopped - at, &vm.id, Some(STOPPED_TARGET)),
            None => stage.findings.broken.push(format!("{} was not stopped on {}", vm.id, scene.host)),
        }
    }
}

/// The host is up, and has nothing left of what was given away.
async fn back(stage: &mut Stage, scene: &Scene, healing: Micros) {
    let host = scene.host.as_str();
    let what = format!("{host} is up again");
    if let Some(up) = stage.expect(&what, BACK, |seen| seen.node_became(host, "up", healing)).await {
        stage.measure("host up again after its healing", up - healing, host, None);
    }
    let ids: Vec<&str> = scene.machines.iter().map(|vm| vm.id.as_str()).collect();
    let none_left = |seen: &Timeline| {
        let last = |id: &str| seen.homes.iter().rev().find(|home| home.vm == id && home.host == host);
        ids.iter().all(|id| last(id).is_none_or(|home| home.run == Run::Off)).then_some(())
    };
    stage.expect(&format!("{host} has nothing left of what was given away"), BACK, none_left).await;
}

/// Where each machine should run, it runs, and nowhere else: asked when all is over.
pub async fn once_each(stage: &mut Stage) -> Result<()> {
    if stage.cloud()?.hosts.is_empty() {
        return Ok(());
    }
    let vms = ask::vms(&stage.client).await?;
    for vm in vms.iter().filter(|vm| vm.status == "running") {
        let (id, node) = (vm.id.as_str(), vm.node.as_str());
        let only_there = |seen: &Timeline| {
            let mut hosts: BTreeMap<&str, Run> = BTreeMap::new();
            for home in seen.homes.iter().filter(|home| home.vm == id) {
                hosts.insert(&home.host, home.run);
            }
            hosts.retain(|_, run| *run != Run::Off);
            (hosts.len() == 1 && hosts.get(node) == Some(&Run::Running)).then_some(())
        };
        stage.expect(&format!("{id} runs on {node} alone"), BACK, only_there).await;
    }
    Ok(())
}
