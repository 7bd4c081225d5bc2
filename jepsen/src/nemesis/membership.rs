//! Who the controllers are changes while clients work: leadership is handed over, members come and go, binaries are
//! exchanged one by one.

use std::time::{Duration, Instant};

use anyhow::Context;

use super::{Proof, Scene};
use crate::cluster::{Cluster, PATIENCE};

/// Handing over takes one election without its timeouts.
const HANDED_OVER: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// New members in a quorum that grows, so that it can lose one more.
const NEW_MEMBERS: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Leadership goes to a follower.
    Transfer,
    /// Two more controllers, which leave again at the end.
    Grow,
    /// A follower is removed for ever; at the end its host comes back as a new member.
    RemoveFollower,
    RemoveLeader,
    /// Each is ended politely and started with the other binary, if there is one.
    Upgrade,
}

impl Change {
    /// [`Self::Upgrade`] is a family of its own.
    pub const ALL: [Self; 4] = [Self::Transfer, Self::Grow, Self::RemoveLeader, Self::RemoveFollower];

    pub fn name(self) -> &'static str {
        match self {
            Self::Transfer => "transfer",
            Self::Grow => "grow",
            Self::RemoveFollower => "remove follower",
            Self::RemoveLeader => "remove leader",
            Self::Upgrade => "upgrade",
        }
    }
}

/// What is to be undone.
pub enum Held {
    Nothing,
    Grown,
    Removed(usize),
}

/// # Errors
/// When the harness itself fails, or the cloud refuses.
pub async fn begin(
    cluster: &mut Cluster,
    change: Change,
    scene: &Scene,
    proof: &mut Proof,
) -> anyhow::Result<Option<Held>> {
    proof.must_write = true;
    match change {
        Change::Transfer => transfer(cluster, scene, proof).await,
        Change::Grow => {
            for _ in 0..NEW_MEMBERS {
                let new = cluster.add_controller().await?;
                proof.targets.insert(new);
            }
            cluster.all_vote(PATIENCE).await?;
            proof.evidence = format!("{} vote", cluster.size());
            Ok(Some(Held::Grown))
        }
        Change::RemoveFollower | Change::RemoveLeader => {
            let target = if change == Change::RemoveLeader { Some(scene.leader) } else { scene.follower() };
            let Some(target) = target.filter(|target| scene.free.contains(target)) else { return Ok(None) };
            let id = cluster.id(target);
            proof.targets.insert(target);
            cluster.remove_controller(target).await?;
            gone(cluster, id).await?;
            proof.evidence = format!("no controller lists controller-{id}");
            Ok(Some(Held::Removed(target)))
        }
        Change::Upgrade => {
            let other = cluster.exchange_binary();
            for controller in 0..cluster.size() {
                let before = cluster.pid(controller);
                anyhow::ensure!(cluster.terminate(controller)?, "SIGTERM did not end {}", cluster.name(controller));
                cluster.restart(controller)?;
                cluster.settled(PATIENCE).await?;
                proof.targets.insert(controller);
                if cluster.pid(controller) == before {
                    proof.doubt("a process is the same");
                }
            }
            proof.evidence = match other {
                Some(binary) => format!("{} runs everywhere now", binary.display()),
                None => "every process is another one, of the same binary".to_owned(),
            };
            Ok(Some(Held::Nothing))
        }
    }
}

async fn transfer(cluster: &Cluster, scene: &Scene, proof: &mut Proof) -> anyhow::Result<Option<Held>> {
    let Some(target) = scene.follower() else { return Ok(None) };
    proof.targets.insert(target);
    if let Err(error) = cluster.transfer_leader(target).await {
        // Under other faults it may fail; then nothing happened.
        proof.doubt(format!("{error:#}"));
        return Ok(Some(Held::Nothing));
    }
    let deadline = Instant::now() + HANDED_OVER;
    while cluster.leader().await != Some(target) {
        if Instant::now() > deadline {
            proof.doubt(format!("{} did not lead", cluster.name(target)));
            return Ok(Some(Held::Nothing));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    proof.evidence = format!("{} leads", cluster.name(target));
    Ok(Some(Held::Nothing))
}

/// Waits until who leads has no member of this id.
async fn gone(cluster: &Cluster, id: u64) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if let Some(leader) = cluster.leader().await
            && cluster.id(leader) != id
            && let Some(status) = cluster.status(leader).await
            && status.controllers.iter().all(|member| member.id != id)
        {
            return Ok(());
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    anyhow::bail!("controller-{id} was removed and is still a member")
}

impl Held {
    /// # Errors
    /// When the harness itself fails, or the cloud refuses.
    pub async fn end(self, cluster: &mut Cluster) -> anyhow::Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Grown => {
                for _ in 0..NEW_MEMBERS {
                    cluster.dismiss_last().await.context("a new member leaves")?;
                }
                Ok(())
            }
            Self::Removed(target) => {
                // It may have ended by itself when it learnt that it was removed.
                if cluster.should_run(target) && cluster.ended(target).is_none() {
                    cluster.kill(target)?;
                }
                cluster.rejoin(target).await?;
                cluster.all_vote(PATIENCE).await
            }
        }
    }
}
