//! What is done to the cluster, and the evidence that it was really done.

use std::{collections::BTreeSet, fmt, time::Duration};

use serde::Serialize;

use crate::{chance::Chance, cluster::Cluster};
use hosts::{Harm, Said};

pub mod hosts;

/// How long a fault lasts: several elections, and longer than a client's patience.
pub const HOLD: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// `kill -9`, and a restart at the end of the fault.
    KillLeader,
    KillFollower,
    /// All of them at once: the disks alone remember.
    KillAll,
    /// SIGSTOP, and SIGCONT at the end.
    PauseLeader,
    PauseFollower,
    /// Cut from all other controllers, in both directions.
    IsolateLeader,
    IsolateFollower,
    /// One link of three is cut: everybody still has a path.
    CutOneLink,
    /// The leader is heard but hears nobody.
    DeafLeader,
    Host(Harm),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::KillLeader => "kill leader",
            Self::KillFollower => "kill follower",
            Self::KillAll => "kill all",
            Self::PauseLeader => "pause leader",
            Self::PauseFollower => "pause follower",
            Self::IsolateLeader => "isolate leader",
            Self::IsolateFollower => "isolate follower",
            Self::CutOneLink => "cut one link",
            Self::DeafLeader => "deaf leader",
            Self::Host(harm) => return harm.fmt(f),
        })
    }
}

/// A family of faults, as the command line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Family {
    Kill,
    Pause,
    Partition,
    /// What happens to hosts rather than controllers.
    Host,
}

impl Family {
    pub fn faults(self) -> &'static [Fault] {
        match self {
            Self::Kill => &[Fault::KillLeader, Fault::KillFollower, Fault::KillAll],
            Self::Pause => &[Fault::PauseLeader, Fault::PauseFollower],
            Self::Partition => &[Fault::IsolateLeader, Fault::CutOneLink, Fault::DeafLeader, Fault::IsolateFollower],
            Self::Host => {
                const FAULTS: [Fault; 4] = [
                    Fault::Host(Harm::CutHost),
                    Fault::Host(Harm::KillAgent),
                    Fault::Host(Harm::CutPower),
                    Fault::Host(Harm::StopAgent),
                ];
                &FAULTS
            }
        }
    }
}

impl Fault {
    /// True when a connected majority of running controllers is left, so that writes must go on while it lasts.
    pub fn leaves_a_majority(self) -> bool {
        self != Self::KillAll
    }
}

/// What one fault did.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub fault: Fault,
    /// Names of the controllers that it hit.
    pub hit: Vec<String>,
    /// Nanoseconds since the run began.
    pub began: u64,
    pub healed: u64,
    /// When all controllers agreed on a leader again.
    pub settled: u64,
    /// The kernel's own word that it happened: an exit by SIGKILL, the state `T`, packets dropped.
    pub evidence: String,
    /// Empty, or why this fault does not count.
    pub doubt: String,
    /// Milliseconds: the longest time from its beginning to its healing without an acknowledged write anywhere.
    pub write_gap: f64,
}

/// A fault that is in force.
pub struct InForce {
    fault: Fault,
    targets: Vec<usize>,
    evidence: String,
    doubt: String,
    host: Option<hosts::Held>,
}

/// Does it now. The target is chosen by who leads; without a leader by chance, which `doubt` then tells.
///
/// # Errors
/// When the harness itself fails.
pub async fn inject(cluster: &mut Cluster, fault: Fault, chance: &mut Chance) -> anyhow::Result<InForce> {
    let leader = cluster.leader().await;
    let mut doubt = String::new();
    let chosen = leader.unwrap_or_else(|| {
        doubt = "no controller knew a leader".into();
        chance.below(cluster.size())
    });
    let others: Vec<usize> = (0..cluster.size()).filter(|member| *member != chosen).collect();
    let other = *chance.pick(&others);
    let targets = match fault {
        Fault::KillLeader | Fault::PauseLeader | Fault::IsolateLeader | Fault::DeafLeader => vec![chosen],
        Fault::KillFollower | Fault::PauseFollower | Fault::IsolateFollower => vec![other],
        Fault::KillAll => (0..cluster.size()).collect(),
        Fault::CutOneLink => vec![chosen, other],
        Fault::Host(_) => vec![],
    };
    let mut evidence = String::new();
    let mut host = None;
    match fault {
        Fault::KillLeader | Fault::KillFollower | Fault::KillAll => {
            let mut killed = 0;
            for target in &targets {
                killed += usize::from(cluster.kill(*target)?);
            }
            if killed < targets.len() {
                doubt = format!("only {killed} of {} died of SIGKILL", targets.len());
            }
            evidence = format!("{killed} died of SIGKILL");
        }
        Fault::PauseLeader | Fault::PauseFollower => {
            if !cluster.pause(targets[0])? {
                doubt = "the kernel did not show it as stopped".into();
            }
            evidence = "state T".into();
        }
        Fault::IsolateLeader | Fault::IsolateFollower => {
            for member in (0..cluster.size()).filter(|member| *member != targets[0]) {
                cluster.cut(member, targets[0])?;
                cluster.cut(targets[0], member)?;
            }
        }
        Fault::CutOneLink => {
            cluster.cut(targets[0], targets[1])?;
            cluster.cut(targets[1], targets[0])?;
        }
        Fault::DeafLeader => {
            for member in (0..cluster.size()).filter(|member| *member != targets[0]) {
                cluster.cut(member, targets[0])?;
            }
        }
        Fault::Host(harm) => {
            let mut said = Said::default();
            host = Some(hosts::begin(cluster, harm, chance, &mut said)?);
            (evidence, doubt) = (said.evidence, said.doubt);
        }
    }
    Ok(InForce { fault, targets, evidence, doubt, host })
}

impl InForce {
    /// Undoes it and says what it was.
    ///
    /// # Errors
    /// When the harness itself fails.
    pub async fn heal(mut self, cluster: &mut Cluster, began: u64, healed: u64) -> anyhow::Result<Outcome> {
        match self.fault {
            Fault::KillLeader | Fault::KillFollower | Fault::KillAll => {
                for target in &self.targets {
                    cluster.restart(*target)?;
                }
            }
            Fault::PauseLeader | Fault::PauseFollower => cluster.resume(self.targets[0])?,
            Fault::IsolateLeader | Fault::IsolateFollower | Fault::CutOneLink | Fault::DeafLeader => {
                let dropped = cluster.dropped()?;
                cluster.heal_links()?;
                self.evidence = format!("{dropped} packets dropped");
                if dropped == 0 {
                    self.doubt = "no packet met the cut".into();
                }
            }
            Fault::Host(_) => {}
        }
        let mut hit: BTreeSet<String> = self.targets.iter().map(|target| cluster.name(*target).to_owned()).collect();
        if let Some(host) = self.host {
            hit.insert(host.hit(cluster));
            let mut said = Said { evidence: self.evidence, doubt: self.doubt };
            host.end(cluster, &mut said).await?;
            (self.evidence, self.doubt) = (said.evidence, said.doubt);
        }
        Ok(Outcome {
            fault: self.fault,
            hit: hit.into_iter().collect(),
            began,
            healed,
            settled: healed,
            evidence: self.evidence,
            doubt: self.doubt,
            write_gap: 0.0,
        })
    }
}
