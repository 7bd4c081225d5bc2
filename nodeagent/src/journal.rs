//! What the agent must still know after `kill -9`: the highest numbers that it obeyed, and what it did that cannot be
//! seen on the host. One small file, replaced as a whole before the effect that it speaks of.
//!
//! Deliberately not here: the assignment. A host that comes back does nothing until the quorum says what it should be
//! now; until then its guests stay as they are.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use model::{
    VmId,
    steps::{Memory, Seen},
};
use serde::{Deserialize, Serialize};

use crate::durable;

pub struct Journal {
    path: PathBuf,
    saved: Entries,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Entries {
    generation: u64,
    epochs: BTreeMap<VmId, u64>,
    vms: BTreeMap<VmId, KeptMemory>,
}

/// The part of `Memory` that outlives the process. The rest is found out again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KeptMemory {
    epoch: u64,
    rebooted: u32,
    wished_off: bool,
    begun: bool,
    existed: bool,
    /// Not in the files of the first version, whose machines were all seen by the time they existed.
    #[serde(default)]
    ran: bool,
    #[serde(default)]
    leaving: Option<u64>,
}

impl Journal {
    /// # Errors
    /// When the file cannot be read, or is not one that this version writes: a host that does not know what it obeyed
    /// must not guess.
    pub fn open(data: &Path) -> io::Result<Self> {
        let path = data.join("journal.json");
        let saved = match durable::read(&path)? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display())))?,
            None => Entries::default(),
        };
        Ok(Self { path, saved })
    }

    pub fn seen(&self) -> Seen {
        Seen { generation: self.saved.generation, epochs: self.saved.epochs.clone() }
    }

    pub fn memories(&self) -> BTreeMap<VmId, Memory> {
        let memory = |kept: &KeptMemory| Memory {
            epoch: kept.epoch,
            rebooted: kept.rebooted,
            wished_off: kept.wished_off,
            begun: kept.begun,
            existed: kept.existed,
            ran: kept.ran,
            leaving: kept.leaving,
            ..Memory::default()
        };
        self.saved.vms.iter().map(|(vm, kept)| (*vm, memory(kept))).collect()
    }

    /// Writes what changed; costs nothing when nothing did.
    ///
    /// # Errors
    /// When the disk fails. The agent stops then: it could not keep what it promises.
    pub fn save(&mut self, seen: &Seen, memories: &BTreeMap<VmId, Memory>) -> io::Result<()> {
        let kept = |memory: &Memory| KeptMemory {
            epoch: memory.epoch,
            rebooted: memory.rebooted,
            wished_off: memory.wished_off,
            begun: memory.begun,
            existed: memory.existed,
            ran: memory.ran,
            leaving: memory.leaving,
        };
        let entries = Entries {
            generation: seen.generation,
            epochs: seen.epochs.clone(),
            vms: memories.iter().map(|(vm, memory)| (*vm, kept(memory))).collect(),
        };
        if entries == self.saved {
            return Ok(());
        }
        let bytes = serde_json::to_vec(&entries).map_err(io::Error::other)?;
        durable::replace(&self.path, &bytes)?;
        self.saved = entries;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_saved_is_known_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        assert_eq!((journal.seen(), journal.memories()), (Seen::default(), BTreeMap::new()));
        let seen = Seen { generation: 9, epochs: [(VmId(1), 7)].into() };
        let memory = Memory {
            epoch: 7,
            rebooted: 2,
            wished_off: true,
            begun: true,
            existed: true,
            ran: true,
            leaving: Some(11),
            ..Memory::default()
        };
        let passing = Memory { disk_made: true, pressed_first_millis: Some(1), ..memory };
        journal.save(&seen, &[(VmId(1), passing)].into()).unwrap();
        // A crash in the middle of the next save leaves a file beside it, which counts for nothing.
        std::fs::write(dir.path().join("journal.new"), "{\"gen").unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        assert_eq!((journal.seen(), journal.memories()), (seen, [(VmId(1), memory)].into()));
    }

    #[test]
    fn a_journal_that_cannot_be_read_is_not_taken_as_empty() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("journal.json"), "{").unwrap();
        assert!(Journal::open(dir.path()).is_err());
    }
}
