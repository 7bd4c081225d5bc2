//! Processes that are killed, stopped, or hardly run.

use std::{fmt, time::Duration};

use anyhow::Context;
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};

use super::{Proof, Scene, background::Background};
use crate::cluster::Cluster;

/// A slow process is stopped for so long, then runs for so long: a tenth of a processor, in pieces so long that a
/// heartbeat's interval fits into the pause, and an election's timeout does not.
const STOPPED: Duration = Duration::from_millis(180);
const RUNNING: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whom {
    Leader,
    Follower,
    /// The leader among them.
    AllButOne,
    All,
}

impl fmt::Display for Whom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Leader => "leader",
            Self::Follower => "follower",
            Self::AllButOne => "all but one",
            Self::All => "all",
        })
    }
}

/// What is to be undone.
pub enum Held {
    Killed(Vec<usize>),
    Paused(Vec<usize>),
    Slowed(Background),
}

/// # Errors
/// When the harness itself fails.
pub fn kill_process(cluster: &mut Cluster, target: usize, proof: &mut Proof) -> anyhow::Result<()> {
    if !cluster.kill(target)? {
        proof.doubt(format!("{} did not die of SIGKILL", cluster.name(target)));
    }
    Ok(())
}

/// # Errors
/// When the harness itself fails.
pub fn kill(cluster: &mut Cluster, whom: Whom, scene: &Scene, proof: &mut Proof) -> anyhow::Result<Option<Held>> {
    let Some(targets) = choose(whom, scene, proof) else { return Ok(None) };
    for target in &targets {
        kill_process(cluster, *target, proof)?;
    }
    proof.evidence = format!("{} died of SIGKILL", targets.len());
    Ok(Some(Held::Killed(targets)))
}

/// # Errors
/// When the harness itself fails.
pub fn pause(cluster: &mut Cluster, whom: Whom, scene: &Scene, proof: &mut Proof) -> anyhow::Result<Option<Held>> {
    let Some(targets) = choose(whom, scene, proof) else { return Ok(None) };
    for target in &targets {
        if !cluster.pause(*target)? {
            proof.doubt(format!("the kernel did not show {} as stopped", cluster.name(*target)));
        }
    }
    proof.evidence = format!("state T of {}", targets.len());
    Ok(Some(Held::Paused(targets)))
}

/// # Errors
/// When the harness itself fails.
pub fn slow(cluster: &mut Cluster, whom: Whom, scene: &Scene, proof: &mut Proof) -> anyhow::Result<Option<Held>> {
    let Some(targets) = choose(whom, scene, proof) else { return Ok(None) };
    let target = targets[0];
    let pid = cluster.pid(target).context("it does not run")?;
    let pid = Pid::from_raw(i32::try_from(pid)?);
    // The child is not waited for while the fault is in force, so its number stays its own.
    Ok(Some(Held::Slowed(Background::start(move || async move {
        signal::kill(pid, Signal::SIGSTOP)?;
        tokio::time::sleep(STOPPED).await;
        signal::kill(pid, Signal::SIGCONT)?;
        tokio::time::sleep(RUNNING).await;
        Ok(())
    }))))
}

impl Held {
    /// # Errors
    /// When the harness itself fails.
    pub async fn end(self, cluster: &mut Cluster, proof: &mut Proof) -> anyhow::Result<()> {
        match self {
            Self::Killed(targets) => targets.into_iter().try_for_each(|target| cluster.restart(target)),
            Self::Paused(targets) => targets.into_iter().try_for_each(|target| cluster.resume(target)),
            Self::Slowed(background) => {
                let turns = background.stop().await?;
                proof.evidence = format!("stopped {turns} times for {} ms", STOPPED.as_millis());
                if turns == 0 {
                    proof.doubt("it was never stopped");
                }
                Ok(())
            }
        }
    }
}

fn choose(whom: Whom, scene: &Scene, proof: &mut Proof) -> Option<Vec<usize>> {
    let targets = match whom {
        Whom::Leader => vec![scene.leader_or_free()?],
        Whom::Follower => vec![scene.follower()?],
        Whom::AllButOne => scene.free.iter().copied().take(scene.size - 1).collect(),
        Whom::All => scene.free.clone(),
    };
    proof.targets.extend(&targets);
    proof.must_write = scene.leaves_majority(targets.len());
    Some(targets)
}
