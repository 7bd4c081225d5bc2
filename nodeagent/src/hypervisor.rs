//! Machines on this host: the trait, and what both implementations speak of.
//!
//! Calls block; the executor runs them on blocking threads. Every call is idempotent: asking for what already is
//! succeeds. Deliberately not here: deciding anything, retrying, and the difference between wanted and found.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use model::{Capacity, Consistency, Digest, HypervisorKind, ImageFormat, Mac, NetworkId, VmId, telemetry::NodeStatus};

use crate::lease::Permit;
use job::Job;
use migration::{Destination, Route};
use rehearsal::{Rehearsal, Rehearsed};

pub mod contract;
pub mod domain_xml;
pub mod guest_dir;
pub mod job;
#[cfg(feature = "libvirt")]
pub mod libvirt;
pub mod migration;
pub mod moved_xml;
pub mod qcow2;
pub mod qemu_process;
pub mod quarantine;
pub mod rehearsal;
pub mod seed;
pub mod simulated;

/// What a guest is made from. Plain data, so that the domain XML is a pure function of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestSpec {
    /// The cloud's id, written into the domain's metadata.
    pub cluster: String,
    pub vm: VmId,
    /// Log index of the placement, written into the domain's metadata: the fencing token.
    pub epoch: u64,
    pub tenant: String,
    pub hostname: String,
    pub size: Capacity,
    /// The verified base image in this host's store, and what it is.
    pub base: PathBuf,
    pub base_format: ImageFormat,
    /// Of a base that is an increment: what it stands on, the nearest first; verified, and beside it.
    pub base_parents: Vec<Digest>,
    pub base_virtual_bytes: u64,
    pub nics: Vec<GuestNic>,
    pub ssh_keys: Vec<String>,
    pub user_data: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestNic {
    pub network: NetworkId,
    pub mac: Mac,
    /// The bridge on this host that the tap joins.
    pub bridge: String,
    pub mtu: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestPower {
    Running,
    Suspended,
    /// Its memory and disk are on their way to here. It runs elsewhere.
    Arriving,
    /// All of it is here, paused or off. It runs nowhere, and must not run here before the quorum has handed it over.
    Arrived,
    /// Defined but not running.
    Off(OffReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffReason {
    /// The guest shut itself down.
    ByGuest,
    /// This agent switched it off, or stopped it by ACPI because it was asked to.
    ByAgent,
    /// It crashed, its process was killed, or the host went down under it.
    Crashed,
    /// It went to another host, which has all of it.
    Moved,
    /// Defined, but not known to have run since it was asked to start: the agent died in between.
    Unknown,
}

/// A guest of this cloud that was found on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    pub vm: VmId,
    pub epoch: u64,
    pub power: GuestPower,
}

/// Use of one running guest; 0 where the hypervisor does not say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestUsage {
    pub cpu_time_millis: u64,
    pub memory_used_bytes: u64,
    pub disk_used_bytes: u64,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
}

/// A backup that an increment may be made of: in this host's store, with all that it stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    pub digest: Digest,
    pub file: PathBuf,
}

/// A guest's disk as it was at one moment: a qcow2 file that stands alone, or on its parent's, which it names by digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// In the guest's folder; for the caller to move away. The next backup replaces it.
    pub file: PathBuf,
    pub size_bytes: u64,
    /// Size of the disk that the guest sees.
    pub virtual_bytes: u64,
    pub consistency: Consistency,
    /// Of an increment: it holds what was written since this one.
    pub parent: Option<Digest>,
}

#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// The hypervisor's daemon cannot be reached just now; it says nothing about the guests.
    #[error("the hypervisor cannot be reached: {0}")]
    Unreachable(String),
    /// Trying again, here or elsewhere, may help.
    #[error("{0}")]
    Transient(String),
    /// It will fail the same way each time.
    #[error("{0}")]
    Permanent(String),
}

pub type Result<T> = std::result::Result<T, HypervisorError>;

pub trait Hypervisor: Send + Sync {
    /// What runs the guests, found by trying.
    fn kind(&self) -> HypervisorKind;
    /// CPUs, memory and disk that machines may have on this host.
    fn capacity(&self) -> Result<Capacity>;
    /// Use of the host now.
    fn node_status(&self) -> Result<NodeStatus>;
    /// Every guest of this cloud on this host, whatever agent made it: those that were started and not removed since.
    /// A disk that was made and never started is no guest; if it is still there when the agent starts again, it is
    /// removed, since nothing was ever written to it. Quick, and never waits for a guest.
    fn guests(&self) -> Result<Vec<Guest>>;
    /// Use of the running guests, without those that the guard has stopped. May wait for a guest that is stuck (30 s), or as
    /// long as one stands still that is stopped just then, so keep it apart from the heartbeat.
    fn usage(&self) -> Result<Vec<(VmId, GuestUsage)>>;
    /// Cut what guests have written to their consoles to what is kept of it. Waits for no guest. For hypervisors that write it
    /// to a file.
    fn bound_consoles(&self) -> Result<()> {
        Ok(())
    }
    /// Base images that disks here stand on, those set aside included: they must stay.
    fn bases(&self) -> Result<BTreeSet<PathBuf>>;
    /// Make the disk (an overlay on the base) and the seed, if they are not there. Refused while a disk of another
    /// placement is there, unless that is older and was never started: it gives way.
    fn make_disk(&self, spec: &GuestSpec) -> Result<()>;
    /// The disk of a machine that has run must be there. `Permanent` when it is not: what it held is lost, or must be
    /// brought back by a person.
    fn check_disk(&self, vm: VmId) -> Result<()>;
    /// Define it and switch it on. The disk must be there. A guest that is on stays as it is, and one that was asked to
    /// go off no longer counts as asked. Refused while a guest of another placement is there, or this one was not
    /// handed over. A first start that fails leaves no guest.
    fn start(&self, spec: &GuestSpec) -> Result<()>;
    /// Refused when it is off, or not all here.
    fn suspend(&self, vm: VmId) -> Result<()>;
    /// Refused when it is off, or not all here, or has arrived: that takes `finish_migration`.
    fn resume(&self, vm: VmId) -> Result<()>;
    /// Press the power button. Returns at once; the guest may take its time, or ignore it (while it boots, for one).
    /// A suspended guest is resumed first, because it could not hear it.
    fn press_power(&self, vm: VmId) -> Result<()>;
    /// Switch it off at once; its disk stays.
    fn power_off(&self, vm: VmId) -> Result<()>;
    /// Reset it: the same domain boots again. Refused when it is off.
    fn reset(&self, vm: VmId) -> Result<()>;
    /// Switch it off, undefine it, and remove disk and seed.
    fn remove(&self, vm: VmId) -> Result<()>;
    /// Copy a guest's disk as it is at one moment, while it goes on. Its file systems are frozen for that moment when its
    /// guest agent answers. Off, it is copied as it lies there. Whatever an earlier backup left that was cut short is
    /// cleared away first. Refused while it arrives. Only what was written since `parent`, when the hypervisor knows that:
    /// it often does not, and copies all.
    fn back_up(&self, vm: VmId, parent: Option<&Parent>, job: &Job) -> Result<Backup>;
    /// The bytes of the last backup have this digest: the next may be an increment of it.
    fn backed_up(&self, vm: VmId, digest: Digest) -> Result<()>;
    /// Boot a copy of a disk apart from everything, watch it until it is known whether it comes up, and leave nothing of
    /// it, whatever came of it. It is no guest: `guests` does not tell of it. An error says nothing about the disk.
    fn rehearse(&self, rehearsal: &Rehearsal, job: &Job) -> Result<Rehearsed>;
    /// On the destination: make what a guest needs that will arrive under `spec`'s placement. Its base must be here.
    /// What an earlier attempt at the same placement left is made anew, unless it has arrived.
    fn prepare_migration(&self, spec: &GuestSpec) -> Result<Destination>;
    /// On the source: move a running or suspended guest while it runs, memory and disk. Then it is off here (`Moved`)
    /// and has arrived there. After an error `guests` tells what became of it: it is on here in nearly every case, and
    /// off as moved when only the answer was lost. One that has moved stays so.
    fn migrate(&self, vm: VmId, to: &Destination, route: &Route, job: &Job) -> Result<()>;
    /// On the source: the disk of a guest that is off, a file that may be sent whole while nobody starts it; `None` when it
    /// is on, and can be moved as it runs. Refused when it has moved, or has come and was not handed over.
    fn disk_at_rest(&self, vm: VmId) -> Result<Option<PathBuf>>;
    /// On the destination, after `prepare_migration`: `disk` came whole and verified, in the guest's folder. It is the
    /// guest's from now on, which has then arrived, off. Refused under another placement. What is taken in stays so.
    fn take_in(&self, spec: &GuestSpec, disk: &Path) -> Result<()>;
    /// On the source, when the destination has taken in its disk: it is off here because it moved. Refused when it is on.
    fn let_go(&self, vm: VmId) -> Result<()>;
    /// On the destination, when the quorum has handed it over: what has arrived is a guest of this host from now on,
    /// running or suspended, or off when it came so. Refused while it is still arriving, or under another placement.
    fn finish_migration(&self, spec: &GuestSpec, run: bool) -> Result<()>;
    /// On the source, when the quorum has given the migration up: it goes on here, or stays off. One that has moved counts as switched
    /// off by this agent, and `start` boots it from its disk. (On the destination: `remove`.)
    fn cancel_migration(&self, vm: VmId) -> Result<()>;
    /// Switch off and undefine a guest that nobody wants here, and move its disk aside, kept and listed by the host:
    /// its data may be the only copy. (`guest_dir::GuestDirs::quarantined` lists them.)
    fn quarantine(&self, vm: VmId) -> Result<()>;
    /// End the guest if the guard has stopped its process, so that every call that waits for an answer of it fails. Its disk stays.
    /// Only for guests that are processes.
    fn end_if_stopped(&self, _vm: VmId) {}
    /// Stops what may not run, and lets go on what was stopped so and may. Only for guests that are no processes: a real
    /// one is stopped by the guard, behind the hypervisor's back, and still counts as running.
    fn enforce(&self, _permit: &Permit, _boottime_nanos: u64) -> Result<()> {
        Ok(())
    }
    /// The end of the serial console's log; empty when there is none.
    fn console_log(&self, vm: VmId, max_bytes: usize) -> Result<Vec<u8>>;
}
