//! Hosts that are hurt: their agents killed or stopped, their links cut, their power gone.
//!
//! Hosts are simulated, and so is their guard: what it would have stopped at the end of a lease counts as stopped then,
//! also while the agent is dead or stopped. What a real guard does is tested on real hosts.

use std::{
    fmt,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{Proof, Scene};
use crate::{
    chance::Chance,
    cluster::Cluster,
    effect::{self, Span},
};

/// A lease, its margin, and a failover of the controllers: a host that is still not given up after it never will be.
const GIVEN_UP: Duration = Duration::from_secs(20);
/// After it: its machines are started elsewhere while it is still gone.
const ELSEWHERE: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Harm {
    /// Its guests run on meanwhile, and nobody notices.
    KillAgent,
    /// SIGSTOP until the host is given up, then SIGCONT.
    StopAgent,
    /// From everybody, until it is given up.
    CutHost,
    /// Until it is given up; its guests end with it.
    CutPower,
    /// It and the leader, from everybody else, until those have another leader, and that has given it up: the one that it
    /// hears does not know that it leads no more.
    CutWithLeader,
}

impl Harm {
    pub const ALL: [Self; 5] = [Self::CutHost, Self::CutWithLeader, Self::KillAgent, Self::CutPower, Self::StopAgent];
}

impl fmt::Display for Harm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::KillAgent => "kill agent",
            Self::StopAgent => "stop agent",
            Self::CutHost => "cut host",
            Self::CutPower => "cut power",
            Self::CutWithLeader => "cut host and leader",
        })
    }
}

/// What is to be undone.
pub struct Held {
    harm: Harm,
    agent: usize,
    /// The controller that is cut off with it.
    with: Option<usize>,
    dropped_before: u64,
}

/// # Errors
/// When the harness itself fails.
pub fn begin(
    cluster: &mut Cluster,
    harm: Harm,
    scene: &Scene,
    proof: &mut Proof,
    chance: &mut Chance,
) -> anyhow::Result<Held> {
    let agent = busiest(cluster, chance)?;
    let with = (harm == Harm::CutWithLeader).then_some(scene.leader);
    let dropped_before = cluster.dropped()?;
    proof.must_write = true;
    match harm {
        Harm::KillAgent => {
            doubt_unless(cluster.kill_agent(agent)?, "it did not die of SIGKILL", proof);
            cluster.restart_agent(agent)?;
            proof.evidence = "died of SIGKILL, and came back at once".into();
        }
        Harm::CutPower => {
            doubt_unless(cluster.cut_power(agent)?, "it did not die of SIGKILL", proof);
            proof.evidence = "died of SIGKILL".into();
        }
        Harm::StopAgent => {
            doubt_unless(cluster.pause_agent(agent)?, "the kernel did not show it as stopped", proof);
            proof.evidence = "state T".into();
        }
        Harm::CutHost | Harm::CutWithLeader => cluster.cut_host(agent, with)?,
    }
    proof.targets.extend(with);
    Ok(Held { harm, agent, with, dropped_before })
}

impl Held {
    /// The name of the host.
    pub fn hit(&self, cluster: &Cluster) -> String {
        cluster.agent_name(self.agent).to_owned()
    }

    /// Waits until it has done what it is for, and undoes it.
    ///
    /// # Errors
    /// When the harness itself fails.
    pub async fn end(self, cluster: &mut Cluster, proof: &mut Proof) -> anyhow::Result<()> {
        if self.harm != Harm::KillAgent {
            let lost = given_up(cluster, self.agent, self.with).await;
            doubt_unless(lost, "the host was never given up", proof);
            tokio::time::sleep(ELSEWHERE).await;
        }
        match self.harm {
            Harm::KillAgent => {}
            Harm::CutPower => cluster.restart_agent(self.agent)?,
            Harm::StopAgent => cluster.resume_agent(self.agent)?,
            Harm::CutHost | Harm::CutWithLeader => {
                let dropped = cluster.dropped()? - self.dropped_before;
                cluster.heal_links()?;
                doubt_unless(dropped > 0, "no packet met the cut", proof);
                proof.evidence = format!("{dropped} packets dropped");
            }
        }
        if self.harm != Harm::KillAgent && proof.doubt.is_empty() {
            proof.evidence += ", given up";
        }
        Ok(())
    }
}

fn doubt_unless(so: bool, why: &str, proof: &mut Proof) {
    if !so {
        proof.doubt(why);
    }
}

/// Whether the quorum says so in time; one controller is not asked.
async fn given_up(cluster: &Cluster, agent: usize, but: Option<usize>) -> bool {
    let deadline = Instant::now() + GIVEN_UP;
    while Instant::now() < deadline {
        if cluster.host_state_but(agent, but).await == "lost" {
            return true;
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    false
}

/// The host on which most guests run; among equals, or when none runs, one by chance.
pub fn busiest(cluster: &Cluster, chance: &mut Chance) -> anyhow::Result<usize> {
    let spans = effect::spans(&effect::read(&cluster.effects(), 0)?);
    let on = |agent: usize| {
        let here = |span: &&Span| span.to == u64::MAX && span.host == cluster.agent_name(agent);
        spans.iter().filter(here).count()
    };
    let first = chance.below(cluster.agents());
    let agents = (0..cluster.agents()).map(|n| (first + n) % cluster.agents());
    Ok(agents.max_by_key(|agent| on(*agent)).unwrap_or(first))
}
