//! What every part of a simulated cloud stands in: true time, chance, the network, the log, and what is written down.

use std::collections::BTreeMap;

use model::{NodeId, VmId};

use crate::{coverage::Coverage, dice::Dice, host::Guest, quorum::Quorum, wires::Wires};

pub struct Surroundings {
    /// True time in nanoseconds; nobody in the cloud can read it.
    pub now: u64,
    pub dice: Dice,
    pub wires: Wires,
    pub quorum: Quorum,
    pub coverage: Coverage,
    pub story: Story,
    /// Which guest each host lets in, under which placement.
    pub doors: BTreeMap<(NodeId, VmId), u64>,
    pub landings: Vec<Landing>,
}

/// A guest whose memory and disk are all with another host, which notices at `due`.
pub struct Landing {
    pub due: u64,
    pub to: NodeId,
    pub vm: VmId,
    pub guest: Guest,
}

impl Surroundings {
    /// Something is that must not be; the first one counts.
    pub fn broken(&mut self, what: String) {
        self.quorum.broken.get_or_insert(what);
    }
}

/// What happened, in lines for people, when somebody wants to read it; and always a digest of it.
#[derive(Default)]
pub struct Story {
    pub wanted: bool,
    pub lines: Vec<String>,
}

impl Story {
    pub fn tell(&mut self, now: u64, line: impl FnOnce() -> String) {
        if self.wanted {
            self.lines.push(format!("{:>8}.{:01} {}", now / 1_000_000_000, now / 100_000_000 % 10, line()));
        }
    }
}
