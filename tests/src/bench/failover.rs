//! How long nobody's writes are acknowledged after `kill -9` of the leader, and while it hands over.
//!
//! Clients try every member every few milliseconds, each attempt on its own, as many clients together would; the
//! figure is the time from the kill to the first acknowledgement of a write that was begun after it. A handover is
//! polite: there the figure is the longest time between two acknowledgements, and no attempt may fail.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use jepsen::cluster::{Cluster, PATIENCE};
use serde::Serialize;

use super::{
    LOOK_AGAIN,
    etcd::Etcd,
    store::{self, Store},
    until,
};

/// Between two attempts at one member.
const EVERY: Duration = Duration::from_millis(5);
/// After a restart the cluster rests, so that each kill meets a healthy one.
const REST: Duration = Duration::from_millis(500);

#[derive(Debug, Serialize)]
pub struct Gaps {
    pub system: &'static str,
    /// Milliseconds, in the order of the kills.
    pub millis: Vec<f64>,
}

impl Gaps {
    /// The value below which this part of the kills lies.
    pub fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.millis.clone();
        sorted.sort_by(f64::total_cmp);
        let position = ((sorted.len() as f64 * part).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
        sorted.get(position).copied().unwrap_or(f64::NAN)
    }
}

/// The leader hands over.
#[derive(Debug, Serialize)]
pub struct Handovers {
    pub gaps: Gaps,
    /// The same in as many stretches of the same length without a handover.
    pub calm: Gaps,
    pub attempts: usize,
    pub failed: usize,
}

/// # Errors
/// When the cluster does not follow the new leader.
pub async fn handovers(cluster: &mut Cluster, times: usize) -> anyhow::Result<Handovers> {
    let stores = store::trefoil(cluster, cluster.size())?;
    connect(&stores).await?;
    let mut all = Handovers {
        gaps: Gaps { system: "trefoil", millis: Vec::new() },
        calm: Gaps { system: "calm", millis: Vec::new() },
        attempts: 0,
        failed: 0,
    };
    for _ in 0..times {
        let leader = cluster.leader().await.context("no leader to hand over")?;
        let next = (leader + 1) % cluster.size();
        for handover in [false, true] {
            let during = async {
                let transferred = if handover { cluster.transfer_leader(next).await } else { Ok(()) };
                tokio::time::sleep(REST).await;
                transferred
            };
            let (gap, attempts, failed) = longest_gap(&stores, during).await?;
            let gaps = if handover { &mut all.gaps } else { &mut all.calm };
            gaps.millis.push(gap);
            all.attempts += attempts;
            all.failed += failed;
        }
        cluster.settled(PATIENCE).await?;
    }
    Ok(all)
}

/// Milliseconds of the longest time between two acknowledgements while something is done, and how many attempts there
/// were, and failed.
async fn longest_gap(
    stores: &[Store],
    during: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<(f64, usize, usize)> {
    let mut ticks = tokio::time::interval(EVERY);
    let mut attempts = tokio::task::JoinSet::new();
    let mut during = std::pin::pin!(during);
    loop {
        tokio::select! {
            done = &mut during => break done?,
            _ = ticks.tick() => for store in stores {
                let mut store = store.clone();
                attempts.spawn(async move { store.write(0, "during").await.map(|()| Instant::now()) });
            },
        }
    }
    let answers = attempts.join_all().await;
    let all = answers.len();
    let times: Vec<Instant> = answers.into_iter().flatten().collect();
    let failed = all - times.len();
    Ok((longest_between(times)?, all, failed))
}

/// In milliseconds.
fn longest_between(mut times: Vec<Instant>) -> anyhow::Result<f64> {
    times.sort_unstable();
    let gaps = times.windows(2).map(|pair| pair[1].duration_since(pair[0]));
    Ok(gaps.max().context("hardly a write was acknowledged")?.as_secs_f64() * 1000.0)
}

/// A follower's disk is lost, and a new member takes its place, from a snapshot.
#[derive(Debug, Serialize)]
pub struct Joining {
    /// Until it votes and all agree.
    pub seconds: f64,
    /// The longest time between two acknowledged writes meanwhile.
    pub gap_millis: f64,
}

/// # Errors
/// When the new member does not join.
pub async fn join_anew(cluster: &mut Cluster) -> anyhow::Result<Joining> {
    let leader = cluster.leader().await.context("no leader")?;
    let lost = (leader + 1) % cluster.size();
    let mut stores = store::trefoil(cluster, cluster.size())?;
    stores.remove(lost);
    connect(&stores).await?;
    // Tasks of their own: what the members are started with waits for programs.
    let joined = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = stores.into_iter().map(|store| tokio::spawn(write_until(store, joined.clone()))).collect();
    cluster.kill(lost)?;
    let began = Instant::now();
    cluster.wipe_and_rejoin(lost).await?;
    cluster.settled(PATIENCE).await?;
    let seconds = began.elapsed().as_secs_f64();
    joined.store(true, Ordering::Relaxed);
    let mut times = Vec::new();
    for writer in writers {
        times.extend(writer.await?);
    }
    Ok(Joining { seconds, gap_millis: longest_between(times)? })
}

/// When each write was acknowledged, one after the other.
async fn write_until(mut store: Store, done: Arc<AtomicBool>) -> Vec<Instant> {
    let mut times = Vec::new();
    while !done.load(Ordering::Relaxed) {
        if store.write(0, "during").await.is_ok() {
            times.push(Instant::now());
        }
        tokio::time::sleep(EVERY).await;
    }
    times
}

/// # Errors
/// When the cluster does not come back.
pub async fn trefoil(cluster: &mut Cluster, kills: usize) -> anyhow::Result<Gaps> {
    let mut millis = Vec::new();
    for _ in 0..kills {
        millis.push(kill_leader(cluster).await?);
        cluster.settled(PATIENCE).await?;
        tokio::time::sleep(REST).await;
    }
    Ok(Gaps { system: "trefoil", millis })
}

/// Milliseconds from the kill to the first acknowledged write; the controller is started again then.
///
/// # Errors
/// When nobody leads.
pub async fn kill_leader(cluster: &mut Cluster) -> anyhow::Result<f64> {
    let stores = store::trefoil(cluster, cluster.size())?;
    connect(&stores).await?;
    let leader = cluster.leader().await.context("no leader to kill")?;
    let killed = Instant::now();
    cluster.kill(leader)?;
    let millis = first_acknowledgement(&stores, killed).await?;
    cluster.restart(leader)?;
    Ok(millis)
}

/// # Errors
/// When etcd does not come back.
pub async fn etcd(etcd: &mut Etcd, kills: usize) -> anyhow::Result<Gaps> {
    let mut millis = Vec::new();
    for _ in 0..kills {
        let stores = etcd.stores(3)?;
        connect(&stores).await?;
        let leader = etcd.leader().await.context("no leader to kill")?;
        let killed = Instant::now();
        etcd.kill(leader)?;
        millis.push(first_acknowledgement(&stores, killed).await?);
        etcd.restart(leader)?;
        let again = etcd.stores(3)?;
        until("every etcd member writes", PATIENCE, LOOK_AGAIN, async || connect(&again).await.is_ok()).await?;
        tokio::time::sleep(REST).await;
    }
    Ok(Gaps { system: "etcd", millis })
}

/// One write through each connection, so that none is made during the measurement.
async fn connect(stores: &[Store]) -> anyhow::Result<()> {
    for store in stores {
        store.clone().write(0, "ready").await?;
    }
    Ok(())
}

/// Milliseconds from `since` to the first acknowledged write through any connection.
async fn first_acknowledgement(stores: &[Store], since: Instant) -> anyhow::Result<f64> {
    let (heard, mut first) = tokio::sync::mpsc::unbounded_channel();
    let mut ticks = tokio::time::interval(EVERY);
    let mut attempts = tokio::task::JoinSet::new();
    let deadline = since + PATIENCE;
    loop {
        tokio::select! {
            Some(at) = first.recv() => return Ok(Instant::duration_since(&at, since).as_secs_f64() * 1000.0),
            _ = ticks.tick() => {
                anyhow::ensure!(Instant::now() < deadline, "no write was acknowledged within {PATIENCE:?}");
                for store in stores {
                    let (mut store, heard) = (store.clone(), heard.clone());
                    attempts.spawn(async move {
                        if store.write(0, "after").await.is_ok() {
                            // The first one counts; who hears nothing any more is late.
                            let _ = heard.send(Instant::now());
                        }
                    });
                }
            }
        }
    }
}
