//! Disks that are full, fail, are slow, lose their power, or have a flipped byte.
//!
//! A controller whose disk fails must stop by itself; one whose disk is damaged must refuse to start, and is replaced by
//! a new member on an empty disk.

use std::{
    fs::File,
    os::unix::{fs::FileExt, process::ExitStatusExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::sys::signal::Signal;

use super::{Proof, Scene, processes::kill_process};
use crate::cluster::{
    Cluster, PATIENCE,
    shim::{Lost, Shim, Syncs},
};

/// A controller that cannot write finds out at the next entry, and clients write all the time.
const NOTICE: Duration = Duration::from_secs(20);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// As a rotating disk under load: several to an election's timeout.
const SLOW_MICROS: i64 = 100_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// No write finds space any more, on the leader's disk.
    Full,
    /// The next sync of the leader's log fails; later ones only seem to succeed.
    FailingSync,
    /// Each sync of the leader's log takes long.
    SlowSync,
    /// The leader's host loses its power: what was not synced is gone.
    PowerCutLeader,
    /// All hosts lose their power at once.
    PowerCutAll,
    /// A byte in the middle of the log of a stopped follower.
    FlippedLog,
    /// A byte in the middle of the state tables of a stopped follower.
    FlippedTables,
}

impl Damage {
    pub const ALL: [Self; 7] = [
        Self::PowerCutAll,
        Self::FailingSync,
        Self::FlippedLog,
        Self::Full,
        Self::PowerCutLeader,
        Self::FlippedTables,
        Self::SlowSync,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full disk",
            Self::FailingSync => "failing sync",
            Self::SlowSync => "slow sync",
            Self::PowerCutLeader => "power cut of leader",
            Self::PowerCutAll => "power cut of all",
            Self::FlippedLog => "flipped byte in log",
            Self::FlippedTables => "flipped byte in tables",
        }
    }
}

/// What is to be undone.
pub enum Held {
    /// It stopped by itself, or is ended now.
    Failed(usize),
    Slow(usize),
    Powerless(Vec<usize>),
    /// It refused to start.
    Flipped(usize),
}

/// # Errors
/// When the harness itself fails.
pub async fn begin(
    cluster: &mut Cluster,
    damage: Damage,
    scene: &Scene,
    proof: &mut Proof,
) -> anyhow::Result<Option<Held>> {
    let target = match damage {
        Damage::FlippedLog | Damage::FlippedTables => scene.follower(),
        _ => scene.leader_or_free(),
    };
    let Some(target) = target else { return Ok(None) };
    let targets = if damage == Damage::PowerCutAll { scene.free.clone() } else { vec![target] };
    proof.targets.extend(&targets);
    proof.must_write = scene.leaves_majority(targets.len());
    let held = match damage {
        Damage::Full => {
            shim(cluster, target)?.set_full(true)?;
            stops(cluster, target, proof).await?;
            proof.evidence += &format!(", {} writes found no space", shim(cluster, target)?.refused_writes()?);
            Held::Failed(target)
        }
        Damage::FailingSync => {
            shim(cluster, target)?.set_syncs(Syncs::FailOnce, 0)?;
            stops(cluster, target, proof).await?;
            let (failed, after) = shim(cluster, target)?.failed_syncs()?;
            proof.evidence += &format!(", {failed} sync failed, {after} after it");
            if failed == 0 {
                proof.doubt("no sync failed");
            }
            Held::Failed(target)
        }
        Damage::SlowSync => {
            shim(cluster, target)?.set_syncs(Syncs::Slow, SLOW_MICROS)?;
            Held::Slow(target)
        }
        Damage::PowerCutLeader | Damage::PowerCutAll => {
            cut_power(cluster, &targets, proof)?;
            Held::Powerless(targets)
        }
        Damage::FlippedLog | Damage::FlippedTables => {
            flip(cluster, target, damage, proof).await?;
            Held::Flipped(target)
        }
    };
    Ok(Some(held))
}

impl Held {
    /// # Errors
    /// When the harness itself fails.
    pub async fn end(self, cluster: &mut Cluster, proof: &mut Proof) -> anyhow::Result<()> {
        match self {
            Self::Failed(target) => {
                shim(cluster, target)?.mend_disk()?;
                if cluster.should_run(target) {
                    cluster.kill(target)?;
                }
                cluster.restart(target)
            }
            Self::Slow(target) => {
                let slowed = shim(cluster, target)?.slowed_syncs()?;
                shim(cluster, target)?.mend_disk()?;
                proof.evidence = format!("{slowed} syncs took {} ms longer", SLOW_MICROS / 1000);
                if slowed == 0 {
                    proof.doubt("nothing was synced");
                }
                Ok(())
            }
            Self::Powerless(targets) => targets.into_iter().try_for_each(|target| cluster.restart(target)),
            Self::Flipped(target) => {
                if cluster.should_run(target) {
                    cluster.kill(target)?;
                }
                let (old, new) = (cluster.id(target), cluster.wipe_and_rejoin(target).await?);
                proof.evidence += &format!(", replaced: controller-{old} by controller-{new}");
                cluster.all_vote(PATIENCE).await
            }
        }
    }
}

fn shim(cluster: &Cluster, controller: usize) -> anyhow::Result<&Shim> {
    cluster.shim(controller).context("the controllers were not started with a shim")
}

/// It must notice and stop: a disk error is not retried.
async fn stops(cluster: &mut Cluster, target: usize, proof: &mut Proof) -> anyhow::Result<()> {
    let deadline = Instant::now() + NOTICE;
    while Instant::now() < deadline {
        if let Some(status) = cluster.ended(target) {
            proof.evidence = format!("it stopped by itself: {status}");
            if status.signal() != Some(Signal::SIGABRT as i32) {
                proof.doubt(format!("it ended with {status}, not by its own abort"));
            }
            return Ok(());
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    let shim = shim(cluster, target)?;
    if shim.failed_syncs()?.0 > 0 || shim.refused_writes()? > 0 {
        proof.broken = format!("{} went on for {} s with a disk that fails", cluster.name(target), NOTICE.as_secs());
    } else {
        proof.doubt("it wrote nothing, so nothing failed");
    }
    Ok(())
}

fn cut_power(cluster: &mut Cluster, targets: &[usize], proof: &mut Proof) -> anyhow::Result<()> {
    for target in targets {
        kill_process(cluster, *target, proof)?;
    }
    let mut all = Lost::default();
    for target in targets {
        let lost = shim(cluster, *target)?.lose_unsynced()?;
        all = Lost { bytes: all.bytes + lost.bytes, files: all.files + lost.files };
    }
    proof.evidence =
        format!("{} died of SIGKILL, {} unsynced bytes of {} files are gone", targets.len(), all.bytes, all.files);
    if all.bytes == 0 {
        proof.doubt("everything was synced, so nothing was lost");
    }
    Ok(())
}

/// Stopped politely, so that its tables are on disk; flipped; started. It must refuse.
async fn flip(cluster: &mut Cluster, target: usize, damage: Damage, proof: &mut Proof) -> anyhow::Result<()> {
    anyhow::ensure!(cluster.terminate(target)?, "SIGTERM did not end {}", cluster.name(target));
    let data = cluster.data(target);
    let file = match damage {
        Damage::FlippedLog => largest(&data.join("raft-log"), "log")?,
        _ => largest(&data.join(std::fs::read_to_string(data.join("CURRENT"))?.trim_end()), "sst")?,
    };
    let at = flip_byte(&file)?;
    let said_before = cluster.printed(target)?.len();
    cluster.restart(target)?;
    let deadline = Instant::now() + NOTICE;
    while Instant::now() < deadline {
        if let Some(status) = cluster.ended(target) {
            let said = cluster.printed(target)?.split_off(said_before);
            let why = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().to_owned();
            proof.evidence = format!("byte {at} of {}: it refused to start: {why}", named(&file));
            if status.success() {
                proof.doubt("it ended without an error");
            }
            return Ok(());
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    proof.broken = format!("{} runs with byte {at} of {} flipped", cluster.name(target), named(&file));
    Ok(())
}

fn flip_byte(file: &Path) -> anyhow::Result<u64> {
    let open = File::options().read(true).write(true).open(file)?;
    let at = open.metadata()?.len() / 2;
    let mut byte = [0];
    open.read_exact_at(&mut byte, at)?;
    open.write_all_at(&[byte[0] ^ 0x10], at)?;
    Ok(at)
}

fn largest(folder: &Path, extension: &str) -> anyhow::Result<PathBuf> {
    let entries = std::fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    let files =
        entries.into_iter().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == extension));
    let largest = files.max_by_key(|path| path.metadata().map_or(0, |about| about.len()));
    largest.with_context(|| format!("no file .{extension} in {}", folder.display()))
}

fn named(file: &Path) -> String {
    file.components().rev().take(2).map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join(" of ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_is_flipped_in_the_middle_of_the_largest_file() {
        let folder = std::env::temp_dir().join(format!("trefoil-flip-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("1.log"), [7; 10]).unwrap();
        std::fs::write(folder.join("2.log"), [7; 20]).unwrap();
        std::fs::write(folder.join("3.sst"), [7; 30]).unwrap();
        let file = largest(&folder, "log").unwrap();
        assert_eq!(flip_byte(&file).unwrap(), 10);
        let bytes = std::fs::read(folder.join("2.log")).unwrap();
        assert_eq!(bytes.iter().enumerate().filter(|(_, byte)| **byte != 7).collect::<Vec<_>>(), [(10, &0x17)]);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
