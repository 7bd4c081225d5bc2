//! A simulated guest as it lies on disk.

use std::{
    fs,
    path::{Path, PathBuf},
};

use model::{Digest, Mac, VmId};
use serde::{Deserialize, Serialize};

use super::super::{Guest, GuestPower, GuestSpec, GuestUsage, HypervisorError, OffReason, Result};
use crate::clock::boot_id;

/// How busy a simulated guest keeps each of its CPUs: what an idle Linux guest was seen to use.
pub const BUSY_PERMILLE: u64 = 30;

/// Share of its memory that it uses, in percent.
const MEMORY_PERCENT: u64 = 60;

/// What its disk takes on the host, at most: an overlay into which little was written.
const DISK_BYTES: u64 = 64 << 20;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SimGuest {
    pub vm: VmId,
    pub epoch: u64,
    pub hostname: String,
    pub base: PathBuf,
    pub vcpus: u64,
    pub memory_bytes: u64,
    pub disk_bytes: u64,
    /// The addresses that it has while it is on.
    #[serde(default)]
    pub macs: Vec<Mac>,
    pub power: Power,
    /// Since when it has been on, on this machine's monotonic clock.
    pub on_since_nanos: u64,
    /// It heard the power button and will be off then.
    pub off_at_nanos: Option<u64>,
    pub ignores_button: bool,
    /// Made for a guest that will come from another host, and not handed over to this one yet.
    #[serde(default)]
    pub expected: bool,
    /// The backup since which it is known what was written, as long as no crash made that doubtful.
    #[serde(default)]
    pub since: Option<Digest>,
    /// Stopped because it may not run, as a process that got SIGSTOP: it still counts as on.
    #[serde(default)]
    pub held: bool,
    /// The start of the machine under which it runs: after another one, nothing of before runs on.
    pub boot: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Power {
    /// It has a disk, and was never started.
    Made,
    On,
    Suspended,
    /// It is on its way to here from another host.
    Arriving,
    Arrived,
    /// It came as a disk, off.
    ArrivedOff,
    Off(Why),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Why {
    ByGuest,
    ByAgent,
    Crashed,
    Moved,
    Unknown,
}

impl SimGuest {
    pub fn new(spec: &GuestSpec) -> Self {
        Self {
            vm: spec.vm,
            epoch: spec.epoch,
            hostname: spec.hostname.clone(),
            base: spec.base.clone(),
            vcpus: spec.size.vcpus,
            memory_bytes: spec.size.memory_bytes,
            disk_bytes: spec.size.disk_bytes,
            macs: spec.nics.iter().map(|nic| nic.mac).collect(),
            power: Power::Made,
            on_since_nanos: 0,
            off_at_nanos: None,
            ignores_button: false,
            expected: false,
            held: false,
            since: None,
            boot: boot_id(),
        }
    }

    pub fn is_on(&self) -> bool {
        matches!(self.power, Power::On | Power::Suspended)
    }

    /// It is on its way, or here and not handed over.
    pub fn is_coming(&self) -> bool {
        matches!(self.power, Power::Arriving | Power::Arrived | Power::ArrivedOff)
    }

    /// Size and name may have changed since the last time.
    pub fn switch_on(&mut self, spec: &GuestSpec, now_nanos: u64) {
        let ignores_button = self.ignores_button;
        let clean = matches!(self.power, Power::Off(Why::ByGuest | Why::ByAgent));
        let since = self.since.filter(|_| clean);
        *self = Self { power: Power::On, on_since_nanos: now_nanos, ignores_button, since, ..Self::new(spec) };
    }

    /// A disk that was never started is no guest.
    pub fn listed(&self) -> Option<Guest> {
        let (vm, epoch) = (self.vm, self.epoch);
        (self.power != Power::Made).then(|| Guest { vm, epoch, power: self.clone().into() })
    }

    /// A disk that an older placement made and never started: nothing was written to it.
    pub fn gives_way_to(&self, spec: &GuestSpec) -> bool {
        self.epoch < spec.epoch && self.power == Power::Made
    }

    pub fn same_placement(&self, spec: &GuestSpec) -> Result<()> {
        if self.epoch == spec.epoch {
            return Ok(());
        }
        let (vm, here, asked) = (self.vm, self.epoch, spec.epoch);
        Err(HypervisorError::Transient(format!("{vm} is here under placement {here}, not {asked}")))
    }

    pub fn usage(&self, now_nanos: u64) -> GuestUsage {
        let disk_used_bytes = DISK_BYTES.min(self.disk_bytes);
        if !self.is_on() {
            return GuestUsage { disk_used_bytes, ..GuestUsage::default() };
        }
        let on_millis = now_nanos.saturating_sub(self.on_since_nanos) / 1_000_000;
        GuestUsage {
            cpu_time_millis: on_millis * self.vcpus * BUSY_PERMILLE / 1000,
            memory_used_bytes: self.memory_bytes / 100 * MEMORY_PERCENT,
            disk_used_bytes,
            rx_bytes: 0,
            tx_bytes: 0,
        }
    }
}

/// The record in a folder of any kind; `None` when there is none that can be read.
pub fn read_kept(dir: &Path) -> Option<SimGuest> {
    serde_json::from_slice(&fs::read(dir.join("guest.json")).ok()?).ok()
}

impl From<SimGuest> for GuestPower {
    fn from(guest: SimGuest) -> Self {
        match guest.power {
            Power::On => Self::Running,
            Power::Suspended => Self::Suspended,
            Power::Arriving => Self::Arriving,
            Power::Arrived | Power::ArrivedOff => Self::Arrived,
            Power::Made => Self::Off(OffReason::Unknown),
            Power::Off(why) => Self::Off(why.into()),
        }
    }
}

impl From<OffReason> for Why {
    fn from(reason: OffReason) -> Self {
        match reason {
            OffReason::ByGuest => Self::ByGuest,
            OffReason::ByAgent => Self::ByAgent,
            OffReason::Crashed => Self::Crashed,
            OffReason::Moved => Self::Moved,
            OffReason::Unknown => Self::Unknown,
        }
    }
}

impl From<Why> for OffReason {
    fn from(why: Why) -> Self {
        match why {
            Why::ByGuest => Self::ByGuest,
            Why::ByAgent => Self::ByAgent,
            Why::Crashed => Self::Crashed,
            Why::Moved => Self::Moved,
            Why::Unknown => Self::Unknown,
        }
    }
}
