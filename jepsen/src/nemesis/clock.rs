//! Clocks that jump or go wrong on one controller, while all others are right.

use anyhow::Context;

use super::{Proof, Scene};
use crate::cluster::{Cluster, shim::Shim};

const HOUR_NANOS: i64 = 3_600_000_000_000;
/// A hundred times what the cloud allows for the drift of clocks: it must cost availability at most.
const RATE_PPM: i64 = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The leader's wall clock jumps an hour ahead, and back at the end.
    LeaderAhead,
    /// The leader's wall clock jumps an hour back, and ahead at the end.
    LeaderBehind,
    FollowerAhead,
    /// The leader's monotonic clocks go a tenth too fast.
    LeaderFast,
    /// A follower's monotonic clocks go a tenth too slowly.
    FollowerSlow,
}

impl Wrong {
    pub const ALL: [Self; 5] =
        [Self::LeaderAhead, Self::LeaderFast, Self::LeaderBehind, Self::FollowerSlow, Self::FollowerAhead];

    pub fn name(self) -> &'static str {
        match self {
            Self::LeaderAhead => "leader an hour ahead",
            Self::LeaderBehind => "leader an hour behind",
            Self::FollowerAhead => "follower hour ahead",
            Self::LeaderFast => "leader 10 % fast",
            Self::FollowerSlow => "follower 10 % slow",
        }
    }
}

/// What is to be undone.
pub struct Held {
    target: usize,
    read_before: i64,
}

/// # Errors
/// When the harness itself fails.
pub fn begin(cluster: &Cluster, wrong: Wrong, scene: &Scene, proof: &mut Proof) -> anyhow::Result<Option<Held>> {
    let (target, wall, monotonic) = match wrong {
        Wrong::LeaderAhead => (scene.leader_or_free(), HOUR_NANOS, 0),
        Wrong::LeaderBehind => (scene.leader_or_free(), -HOUR_NANOS, 0),
        Wrong::FollowerAhead => (scene.follower(), HOUR_NANOS, 0),
        Wrong::LeaderFast => (scene.leader_or_free(), 0, RATE_PPM),
        Wrong::FollowerSlow => (scene.follower(), 0, -RATE_PPM),
    };
    let Some(target) = target else { return Ok(None) };
    let read_before = shim(cluster, target)?.wrong_readings()?;
    shim(cluster, target)?.begin_skew(wall, monotonic)?;
    proof.targets.insert(target);
    proof.must_write = true;
    Ok(Some(Held { target, read_before }))
}

impl Held {
    /// # Errors
    /// When the harness itself fails.
    pub fn end(self, cluster: &Cluster, proof: &mut Proof) -> anyhow::Result<()> {
        let shim = shim(cluster, self.target)?;
        let read = shim.wrong_readings()? - self.read_before;
        shim.mend_clocks()?;
        proof.evidence = format!("the wrong clock was read {read} times");
        if read == 0 {
            proof.doubt("the wrong clock was never read");
        }
        Ok(())
    }
}

fn shim(cluster: &Cluster, controller: usize) -> anyhow::Result<&Shim> {
    cluster.shim(controller).context("the controllers were not started with a shim")
}
