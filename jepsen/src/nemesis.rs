//! What is done to the cluster, and the evidence that it was really done.
//!
//! A family of faults is a file of [`processes`], [`links`], [`disk`], [`clock`], [`membership`], [`hosts`] and [`beats`]: each
//! begins a fault and gives back what ends it. [`round`] holds one fault for a time, or several at once; [`core`] is the end of
//! a run, where a connected majority is healed while the rest stays broken.

use std::{collections::BTreeSet, fmt, time::Duration};

use serde::{Serialize, Serializer};

use crate::{
    chance::Chance,
    cluster::{Cluster, shim::Shim, switch::Switch},
    workload::SETTLE,
};
use beats::Twist;
use clock::Wrong;
use disk::Damage;
use hosts::Harm;
use links::Shape;
use membership::Change;
use processes::Whom;

pub mod background;
pub mod beats;
pub mod clock;
pub mod core;
pub mod disk;
pub mod hosts;
pub mod links;
pub mod membership;
pub mod processes;
pub mod round;

/// How long a fault lasts: several elections, and longer than a client's patience.
pub const HOLD: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `kill -9`, and a restart at the end of the fault.
    Kill(Whom),
    /// SIGSTOP, and SIGCONT at the end.
    Pause(Whom),
    /// Stopped most of the time, again and again.
    Slow(Whom),
    Links(Shape),
    Disk(Damage),
    Clock(Wrong),
    Membership(Change),
    Host(Harm),
    Beats(Twist),
    /// At the end of a run, see [`core`].
    AllButMajority,
}

/// A family of faults, as the command line names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Family {
    /// kill -9 of the leader, a follower, all but one, all.
    Kill,
    /// SIGSTOP of the same, and slow processes.
    Pause,
    /// Links that carry nothing in either direction.
    Partition,
    /// Links that carry something: one way only, with loss, on and off, late.
    Link,
    /// Full, failing, slow, without power, with a flipped byte.
    Disk,
    /// Clocks that jump or go wrong on one controller.
    Clock,
    /// Leadership handed over, controllers added and removed.
    Membership,
    /// All controllers exchanged for another binary, one by one.
    Upgrade,
    /// What happens to hosts rather than controllers.
    Host,
    /// Heartbeats lost, doubled, out of order, late, and played again.
    Beats,
    /// Several faults of any family at once, by chance.
    Mix,
}

impl Family {
    /// What it has for a quorum of this size.
    pub fn faults(self, controllers: usize) -> Vec<Fault> {
        match self {
            Self::Kill => [Whom::Leader, Whom::Follower, Whom::AllButOne, Whom::All].map(Fault::Kill).to_vec(),
            Self::Pause => {
                let paused = [Whom::Leader, Whom::Follower, Whom::AllButOne, Whom::All].map(Fault::Pause);
                [&paused[..], &[Whom::Leader, Whom::Follower].map(Fault::Slow)].concat()
            }
            Self::Partition => Shape::cuts(controllers).into_iter().map(Fault::Links).collect(),
            Self::Link => Shape::WEAK.map(Fault::Links).to_vec(),
            Self::Disk => Damage::ALL.map(Fault::Disk).to_vec(),
            Self::Clock => Wrong::ALL.map(Fault::Clock).to_vec(),
            Self::Membership => Change::ALL.map(Fault::Membership).to_vec(),
            Self::Upgrade => vec![Fault::Membership(Change::Upgrade)],
            Self::Host => Harm::ALL.map(Fault::Host).to_vec(),
            Self::Beats => Twist::ALL.map(Fault::Beats).to_vec(),
            Self::Mix => Vec::new(),
        }
    }

    /// Why this machine cannot do any of it, if it cannot.
    pub fn obstacle(self) -> Option<String> {
        match self {
            Self::Partition | Self::Link | Self::Host => Switch::obstacle(),
            Self::Beats => Switch::turn_obstacle(),
            Self::Disk | Self::Clock => Shim::obstacle(),
            Self::Mix => Switch::obstacle().or_else(Shim::obstacle),
            Self::Kill | Self::Pause | Self::Membership | Self::Upgrade => None,
        }
    }

    /// Whether it needs controllers on hosts of their own.
    pub fn isolates(self) -> bool {
        matches!(self, Self::Partition | Self::Link | Self::Host | Self::Beats | Self::Mix)
    }

    /// Whether it needs something on the way of heartbeats.
    pub fn relays(self) -> bool {
        self == Self::Beats
    }

    /// Whether it needs something between a controller and its disk or clocks.
    pub fn preloads(self) -> bool {
        matches!(self, Self::Disk | Self::Clock | Self::Mix)
    }
}

impl Fault {
    /// Why this machine cannot do it, where it can do others of the family.
    pub fn obstacle(self) -> Option<String> {
        match self {
            Self::Links(Shape::Late) => Switch::delay_obstacle(),
            _ => None,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(whom) => f.pad(&format!("kill {whom}")),
            Self::Pause(whom) => f.pad(&format!("pause {whom}")),
            Self::Slow(whom) => f.pad(&format!("slow {whom}")),
            Self::Links(shape) => f.pad(shape.name()),
            Self::Disk(damage) => f.pad(damage.name()),
            Self::Clock(wrong) => f.pad(wrong.name()),
            Self::Membership(change) => f.pad(change.name()),
            Self::Host(harm) => harm.fmt(f),
            Self::Beats(twist) => twist.fmt(f),
            Self::AllButMajority => f.pad("all but a majority"),
        }
    }
}

impl Serialize for Fault {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_string().replace(' ', "-"))
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
    /// True when a connected majority of running controllers was left, so that writes must have gone on.
    pub must_write: bool,
    /// Empty, or the promise about the fault itself that was broken: damage that was not refused.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub broken: String,
    /// Milliseconds: the longest time from its beginning to its healing without an acknowledged write anywhere.
    pub write_gap: f64,
}

/// After everything was healed, the controllers do not agree, one has ended by itself, or one does not answer as it
/// should: a broken promise, and no failure of the harness.
#[derive(Debug)]
pub struct Unsettled(pub String);

impl fmt::Display for Unsettled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unsettled {}

/// Waits until those that were healed agree again.
///
/// # Errors
/// [`Unsettled`], when they do not.
async fn settled(cluster: &mut Cluster, members: Option<&[usize]>, after: &str) -> anyhow::Result<()> {
    let settled = match members {
        Some(members) => cluster.settled_among(members, SETTLE).await,
        None => cluster.settled(SETTLE).await,
    };
    settled.map_err(|error| Unsettled(format!("after {after}: {error:#}")).into())
}

/// What a fault has to say for itself, known in part when it begins and in whole when it ends.
#[derive(Clone, Debug, Default)]
pub struct Proof {
    pub targets: BTreeSet<usize>,
    pub evidence: String,
    /// Empty, or why this fault does not count.
    pub doubt: String,
    pub must_write: bool,
    /// Empty, or the promise that was broken.
    pub broken: String,
}

impl Proof {
    pub fn doubt(&mut self, why: impl Into<String>) {
        if self.doubt.is_empty() {
            self.doubt = why.into();
        }
    }
}

/// Who may be hit, as the cluster is now.
pub struct Scene {
    pub size: usize,
    pub leader: usize,
    /// False when nobody led, and `leader` was chosen by chance.
    pub led: bool,
    /// Controllers that no other fault has taken, in an order by chance, the leader first if it is among them.
    pub free: Vec<usize>,
}

impl Scene {
    pub async fn look(cluster: &Cluster, taken: &BTreeSet<usize>, chance: &mut Chance) -> Self {
        let size = cluster.size();
        let found = cluster.leader().await;
        let leader = found.unwrap_or_else(|| chance.below(size));
        let mut free: Vec<usize> = chance.shuffle((0..size).collect());
        free.retain(|controller| !taken.contains(controller));
        free.sort_by_key(|controller| *controller != leader);
        Self { size, leader, led: found.is_some(), free }
    }

    /// A controller that is free and does not lead.
    pub fn follower(&self) -> Option<usize> {
        self.free.iter().copied().find(|controller| *controller != self.leader)
    }

    /// The leader, or when another fault has it somebody who is free.
    pub fn leader_or_free(&self) -> Option<usize> {
        self.free.first().copied()
    }

    /// Whether those that are left, when these are gone, are a majority.
    pub fn leaves_majority(&self, gone: usize) -> bool {
        gone < self.size.div_ceil(2)
    }
}

enum Held {
    Processes(processes::Held),
    Links(links::Held),
    Disk(disk::Held),
    Clock(clock::Held),
    Membership(membership::Held),
    Host(hosts::Held),
    Beats(beats::Held),
}

/// A fault that is in force.
pub struct InForce {
    fault: Fault,
    proof: Proof,
    held: Held,
}

/// Does it now, to controllers that are not taken; `None` when there is none left for it.
///
/// # Errors
/// When the harness itself fails.
pub async fn begin(
    cluster: &mut Cluster,
    fault: Fault,
    taken: &BTreeSet<usize>,
    chance: &mut Chance,
) -> anyhow::Result<Option<InForce>> {
    let scene = Scene::look(cluster, taken, chance).await;
    let mut proof = Proof::default();
    if !scene.led {
        proof.doubt("no controller knew a leader");
    }
    let held = match fault {
        Fault::Kill(whom) => processes::kill(cluster, whom, &scene, &mut proof)?.map(Held::Processes),
        Fault::Pause(whom) => processes::pause(cluster, whom, &scene, &mut proof)?.map(Held::Processes),
        Fault::Slow(whom) => processes::slow(cluster, whom, &scene, &mut proof)?.map(Held::Processes),
        Fault::Links(shape) => Some(Held::Links(links::begin(cluster, shape, &scene, &mut proof, chance)?)),
        Fault::Disk(damage) => disk::begin(cluster, damage, &scene, &mut proof).await?.map(Held::Disk),
        Fault::Clock(wrong) => clock::begin(cluster, wrong, &scene, &mut proof)?.map(Held::Clock),
        Fault::Membership(change) => {
            membership::begin(cluster, change, &scene, &mut proof).await?.map(Held::Membership)
        }
        Fault::Host(harm) => Some(Held::Host(hosts::begin(cluster, harm, &scene, &mut proof, chance)?)),
        Fault::Beats(twist) => Some(Held::Beats(beats::begin(cluster, twist, &scene, &mut proof, chance)?)),
        // It is no fault that is held, but a way to end.
        Fault::AllButMajority => None,
    };
    Ok(held.map(|held| InForce { fault, proof, held }))
}

impl InForce {
    /// The controllers whose processes it has; another fault leaves them alone.
    pub fn taken(&self) -> BTreeSet<usize> {
        match self.held {
            Held::Links(_) | Held::Host(_) | Held::Beats(_) => BTreeSet::new(),
            _ => self.proof.targets.clone(),
        }
    }

    /// Undoes it and says what it was.
    ///
    /// # Errors
    /// When the harness itself fails.
    pub async fn heal(mut self, cluster: &mut Cluster, began: u64, healed: u64) -> anyhow::Result<Outcome> {
        let mut hit: Vec<String> = self.proof.targets.iter().map(|target| cluster.name(*target).to_owned()).collect();
        let proof = &mut self.proof;
        match self.held {
            Held::Processes(held) => held.end(cluster, proof).await?,
            Held::Links(held) => held.end(cluster, proof).await?,
            Held::Disk(held) => held.end(cluster, proof).await?,
            Held::Clock(held) => held.end(cluster, proof)?,
            Held::Membership(held) => held.end(cluster).await?,
            Held::Host(held) => {
                hit.push(held.hit(cluster));
                held.end(cluster, proof).await?;
            }
            Held::Beats(held) => {
                hit.extend(held.hit(cluster));
                held.end(cluster, proof).await?;
            }
        }
        Ok(Outcome {
            fault: self.fault,
            hit,
            began,
            healed,
            settled: healed,
            evidence: self.proof.evidence,
            doubt: self.proof.doubt,
            must_write: self.proof.must_write,
            broken: self.proof.broken,
            write_gap: 0.0,
        })
    }
}
