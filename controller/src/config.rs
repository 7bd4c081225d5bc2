//! What a controller remembers about itself besides its identity: `controller.toml` in its data directory.

use std::{io::Write, net::SocketAddr, path::Path};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Raft's timers. The election time must be well above what a disk sync and a scheduling gap take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Timing {
    /// Heartbeat 50 ms, election 150 to 300 ms: own disks, own cores.
    Lan,
    /// Heartbeat 150 ms, election 500 to 1000 ms: shared or busy machines.
    Noisy,
}

impl Timing {
    pub(crate) fn raft(self) -> raft::Timing {
        match self {
            Self::Lan => raft::Timing::LAN,
            Self::Noisy => raft::Timing::NOISY,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    pub id: u64,
    pub name: String,
    pub cluster: String,
    /// The cluster epoch of its quorum: the Unix second of its last refounding, 0 before the first.
    #[serde(default)]
    pub epoch: u64,
    /// Where it listens, TCP and UDP.
    pub listen: SocketAddr,
    /// `host:port` at which others reach it.
    pub advertise: String,
    pub timing: Timing,
    /// Log entries between snapshots.
    #[serde(default = "snapshot_every")]
    pub snapshot_every: u64,
}

pub(crate) fn snapshot_every() -> u64 {
    raft::ReplicaConfig::SNAPSHOT_EVERY
}

const FILE: &str = "controller.toml";

impl Config {
    pub fn load(data: &Path) -> Result<Self> {
        let path = data.join(FILE);
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("{} is not the data directory of a controller (init or join first)", data.display())
        })?;
        toml::from_str(&text).with_context(|| format!("{} is not valid", path.display()))
    }

    /// Written last: a directory without it was never finished and may be tried again.
    pub fn save(&self, data: &Path) -> Result<()> {
        let path = data.join(FILE);
        let mut file = std::fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        file.write_all(toml::to_string(self)?.as_bytes())?;
        file.sync_all()?;
        std::fs::File::open(data)?.sync_all()?;
        Ok(())
    }
}

/// A directory that no controller has used.
pub(crate) fn fresh(data: &Path) -> Result<()> {
    if data.join(FILE).exists() {
        bail!("{} belongs to a controller already", data.display());
    }
    for part in ["raft-log", "CURRENT", "snapshots"] {
        let left = data.join(part);
        if left.exists() {
            bail!("{} is left from another controller; give an empty directory", left.display());
        }
    }
    std::fs::create_dir_all(data).with_context(|| format!("cannot make {}", data.display()))
}

/// 32 bytes that nobody can guess.
pub(crate) fn random() -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("the machine gives no random bytes: {e}"))?;
    Ok(bytes)
}
