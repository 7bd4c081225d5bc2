//! Which cloud this host belongs to, and as what: written once by `join`, read at every start.
//!
//! ```text
//! DATA/member.json        cloud, node id, names, key of the heartbeats
//! DATA/identity.pem       private key and certificates; the membership counts only with it
//! DATA/controllers.json   the controllers as the quorum last named them
//! DATA/epoch.json         the highest cluster epoch that the host has obeyed
//! DATA/journal.json       see `journal`
//! DATA/guard.page         see `lease::page`
//! DATA/images/  DATA/vms/  DATA/quarantine/
//! ```

use std::{
    fs::{DirBuilder, File, TryLockError},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread::sleep,
    time::{Duration, Instant},
};

use api::{
    beat::BeatKey,
    tls::{Identity, TlsError},
};
use model::NodeId;
use serde::{Deserialize, Serialize};

use crate::durable;

/// A child that the last agent had just forked holds its lock until it execs; so long is waited for that.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    #[error("{} holds no membership: join first", .0.display())]
    NotJoined(PathBuf),
    #[error("{} belongs to a member already", .0.display())]
    Joined(PathBuf),
    #[error("another agent uses {}", .0.display())]
    InUse(PathBuf),
    #[error("{} is not a file of this version: {why}", path.display())]
    Malformed { path: PathBuf, why: String },
    #[error("the identity cannot be used")]
    Identity(#[from] TlsError),
    #[error("the data directory {} cannot be used", path.display())]
    Disk { path: PathBuf, source: io::Error },
}

pub struct Membership {
    pub cluster: String,
    pub node: NodeId,
    pub name: String,
    /// Where others reach the agent's data server.
    pub address: String,
    pub beat_key: BeatKey,
    pub identity: Identity,
}

/// As it is in the file.
#[derive(Serialize, Deserialize)]
struct Record {
    cluster: String,
    node: NodeId,
    name: String,
    address: String,
    beat_key: [u8; 32],
}

/// Of which cloud the directory's owner is a member; also while an agent holds the directory.
///
/// # Errors
/// `NotJoined`, or what is there cannot be read.
pub fn cluster_of(data: &Path) -> Result<String, MembershipError> {
    let record: Option<Record> = read(data, "member.json")?;
    record.map(|record| record.cluster).ok_or_else(|| MembershipError::NotJoined(data.to_owned()))
}

/// The data directory, held by this process until it ends.
pub struct DataDir {
    pub path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Makes the directory if it is missing.
    ///
    /// # Errors
    /// `InUse`, `Disk`.
    pub fn open(path: &Path) -> Result<Self, MembershipError> {
        let disk = |source| MembershipError::Disk { path: path.to_owned(), source };
        // Others may pass, for guests run as a user of their own; they may not look.
        DirBuilder::new().recursive(true).mode(0o711).create(path).map_err(disk)?;
        let lock = File::options().create(true).truncate(false).write(true).open(path.join("lock")).map_err(disk)?;
        let begun = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Self { path: path.to_owned(), _lock: lock }),
                Err(TryLockError::WouldBlock) if begun.elapsed() < LOCK_PATIENCE => sleep(LOCK_PATIENCE / 100),
                Err(TryLockError::WouldBlock) => return Err(MembershipError::InUse(path.to_owned())),
                Err(TryLockError::Error(source)) => return Err(disk(source)),
            }
        }
    }

    /// # Errors
    /// `Joined` when there is one; `Malformed` or `Identity` when what is there cannot be read.
    pub fn must_be_free(&self) -> Result<(), MembershipError> {
        if Identity::load(&self.path)?.is_some() { Err(MembershipError::Joined(self.path.clone())) } else { Ok(()) }
    }

    /// # Errors
    /// `NotJoined`, or what is there cannot be read.
    pub fn membership(&self) -> Result<Membership, MembershipError> {
        let missing = || MembershipError::NotJoined(self.path.clone());
        let identity = Identity::load(&self.path)?.ok_or_else(missing)?;
        let Record { cluster, node, name, address, beat_key } = read(&self.path, "member.json")?.ok_or_else(missing)?;
        Ok(Membership { cluster, node, name, address, beat_key: BeatKey(beat_key), identity })
    }

    /// The identity is written last: a crash before it leaves a directory that has not joined.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn save_membership(&self, member: &Membership) -> Result<(), MembershipError> {
        let record = Record {
            cluster: member.cluster.clone(),
            node: member.node,
            name: member.name.clone(),
            address: member.address.clone(),
            beat_key: member.beat_key.0,
        };
        self.write("member.json", &record)?;
        Ok(member.identity.save(&self.path)?)
    }

    /// The controllers as they were last named; empty when nobody named any.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn controllers(&self) -> Result<Vec<String>, MembershipError> {
        Ok(read(&self.path, "controllers.json")?.unwrap_or_default())
    }

    /// # Errors
    /// When the disk fails.
    pub fn save_controllers(&self, controllers: &[String]) -> Result<(), MembershipError> {
        self.write("controllers.json", &controllers)
    }

    fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<(), MembershipError> {
        let path = self.path.join(name);
        let bytes = serde_json::to_vec(value)
            .map_err(|error| MembershipError::Malformed { path: path.clone(), why: error.to_string() })?;
        durable::replace(&path, &bytes).map_err(|source| MembershipError::Disk { path, source })
    }
}

/// The highest cluster epoch that this host has obeyed. A quorum that was refounded has a higher one than those that it
/// replaces, and what is left of them must not be obeyed again, whatever it says.
pub struct EpochMark {
    path: PathBuf,
    highest: Mutex<u64>,
}

impl EpochMark {
    /// # Errors
    /// When it cannot be read: then it is not known which quorum counts.
    pub fn open(data: &Path) -> Result<Self, MembershipError> {
        let highest = read(data, "epoch.json")?.unwrap_or(0);
        Ok(Self { path: data.join("epoch.json"), highest: Mutex::new(highest) })
    }

    /// Remembers the epoch before anything is done for its quorum.
    ///
    /// # Errors
    /// The higher epoch that was obeyed before, or that the disk failed, in one sentence.
    pub fn admit(&self, epoch: u64) -> Result<(), String> {
        let mut highest = self.highest.lock().unwrap_or_else(PoisonError::into_inner);
        if epoch < *highest {
            return Err(format!(
                "it is of cluster epoch {epoch}, and this host obeys {highest}: its quorum was given up and must be stopped"
            ));
        }
        if epoch > *highest {
            let written = durable::replace(&self.path, epoch.to_string().as_bytes());
            written.map_err(|error| format!("{}: {error}", self.path.display()))?;
            *highest = epoch;
        }
        Ok(())
    }
}

fn read<T: for<'a> Deserialize<'a>>(data: &Path, name: &str) -> Result<Option<T>, MembershipError> {
    let path = data.join(name);
    let bytes = durable::read(&path).map_err(|source| MembershipError::Disk { path: path.clone(), source })?;
    let parse = |bytes: Vec<u8>| serde_json::from_slice(&bytes);
    bytes.map(parse).transpose().map_err(|error| MembershipError::Malformed { path, why: error.to_string() })
}

#[cfg(test)]
mod tests {
    use api::tls::CertificateAuthority;

    use super::*;

    #[test]
    fn a_membership_is_read_back_and_counts_only_when_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        assert!(matches!(data.membership(), Err(MembershipError::NotJoined(_))));
        let identity = CertificateAuthority::create("c").unwrap().issue("node-3").unwrap();
        let member = Membership {
            cluster: "c".into(),
            node: NodeId(3),
            name: "h3".into(),
            address: "10.0.0.3:7480".into(),
            beat_key: BeatKey([7; 32]),
            identity,
        };
        data.save_membership(&member).unwrap();
        let read = data.membership().unwrap();
        assert_eq!((read.cluster, read.node, read.name), (member.cluster, member.node, member.name));
        assert!(read.beat_key == member.beat_key && read.identity == member.identity);
        assert!(matches!(data.must_be_free(), Err(MembershipError::Joined(_))));
        std::fs::remove_file(dir.path().join("identity.pem")).unwrap();
        assert!(matches!(data.membership(), Err(MembershipError::NotJoined(_))));
        assert!(data.must_be_free().is_ok());
    }

    #[test]
    fn a_quorum_that_was_given_up_is_never_obeyed_again() {
        let dir = tempfile::tempdir().unwrap();
        let mark = EpochMark::open(dir.path()).unwrap();
        assert_eq!((mark.admit(0), mark.admit(1_800_000_000)), (Ok(()), Ok(())));
        // Also by the next agent of this host.
        for mark in [mark, EpochMark::open(dir.path()).unwrap()] {
            let refused = mark.admit(1_700_000_000).unwrap_err();
            assert!(refused.contains("epoch 1700000000, and this host obeys 1800000000"), "{refused}");
            assert_eq!(mark.admit(1_800_000_000), Ok(()));
        }
    }

    #[test]
    fn a_directory_has_one_agent() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataDir::open(dir.path()).unwrap();
        assert!(matches!(DataDir::open(dir.path()), Err(MembershipError::InUse(_))));
        drop(first);
        assert!(DataDir::open(dir.path()).is_ok());
    }
}
