//! The things a cloud is made of, one row type per noun. Rows are plain data; `apply` alone changes them.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::{Capacity, Cidr, ControllerId, Digest, ImageId, NetworkId, NodeId, TenantId, Timestamp, VmId};

pub use migration::{Migration, MigrationStage, MoveFailure};
pub use quorum::{Held, INDICES_PER_SECOND, Quorum, Refounding};
pub use rehearsal::{Rehearsal, Rehearsed, Verdict};
pub use vm::{Backups, Loss, Nic, Phase, Placement, Recovery, Status, Vm, Wanted};

mod migration;
mod quorum;
mod rehearsal;
mod vm;

/// What the cloud as a whole is called, and the counters that ids are minted from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Random, chosen at `controller init`; part of the names of domains and devices on the hosts.
    pub id: String,
    pub created_at: Timestamp,
    /// The latest time that any entry carried; time as `apply` knows it.
    pub now: Timestamp,
    /// The last id given out of each kind; ids are never given twice.
    pub last_tenant: u64,
    pub last_vm: u64,
    pub last_node: u64,
    pub last_network: u64,
    pub last_image: u64,
    pub last_controller: u64,
    pub last_mac: u32,
    pub last_vni: u32,
    pub last_line: u64,
    pub brake: Brake,
}

/// A member of the quorum, or one that was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Controller {
    pub id: ControllerId,
    pub name: String,
    /// `host:port`, TCP for gRPC and UDP for heartbeats.
    pub address: String,
    pub joined_at: Timestamp,
    pub removed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum JoinRole {
    Controller,
    Agent,
}

/// A one-time permission to join, kept as the digest of its secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    pub role: JoinRole,
    pub expires_at: Timestamp,
    /// What joined with it: `node-3`, `controller-2`.
    pub used_by: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum HypervisorKind {
    /// QEMU with hardware acceleration, found by starting a guest with it.
    Kvm,
    /// QEMU with software emulation.
    Qemu,
    /// No guests at all: delays and failures as a real one has, for tests and scale runs.
    Simulated,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum NodeState {
    /// Has a certificate, has not opened a session yet.
    Joined,
    Up,
    /// Not heard for longer than `node-silence-millis`: takes no new machines, keeps what it has.
    Silent,
    /// Its lease has ended without a word from it: what is on it may be given away. It comes back by a new session.
    Lost,
}

/// Whether what was on lost hosts is made again elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Brake {
    #[default]
    Armed,
    /// An operator said so.
    Disarmed,
    /// More hosts were lost at once than is believable: it is more likely that the quorum is cut off from them.
    Frozen { at: Timestamp, lost: u64 },
}

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    /// `host:port` of the agent's own gRPC server: images, consoles.
    pub address: String,
    /// The address that VXLAN tunnels end at.
    pub underlay: IpAddr,
    pub hypervisor: HypervisorKind,
    pub capacity: Capacity,
    pub state: NodeState,
    /// Takes no new machines because an operator said so.
    pub cordoned: bool,
    /// What it has is to go to other nodes, because an operator said so.
    pub draining: bool,
    /// An operator works on it: it may be away, and what is on it waits for it.
    pub maintenance: bool,
    /// Its clock runs off by more than a lease allows for: it takes no machine that must not run twice.
    pub clock_drifts: bool,
    /// Rises with every change of what the host should do; the agent refuses an older assignment.
    pub generation: u64,
    /// Rises with every start of the agent: reports and heartbeats of an earlier one are refused.
    pub incarnation: u64,
    /// Digest of the certificate that the agent shows.
    pub certificate: Digest,
    pub joined_at: Timestamp,
    pub changed_at: Timestamp,
    pub summary: Option<NodeSummary>,
}

/// What a host's status was over a period, recorded once a period.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSummary {
    pub from: Timestamp,
    pub to: Timestamp,
    pub samples: u32,
    /// Mean of used CPU over the period, in thousandths of the host's CPUs.
    pub cpu_permille_mean: u32,
    pub cpu_permille_max: u32,
    pub memory_used_bytes_max: u64,
    pub disk_used_bytes_max: u64,
}

/// The sizes on offer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    pub name: String,
    pub size: Capacity,
    /// Price weight in thousandths.
    pub weight_milli: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tenant {
    pub id: TenantId,
    pub name: String,
    pub quota: Quota,
    pub created_at: Timestamp,
}

/// The most that a tenant may hold at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    pub vms: u64,
    pub size: Capacity,
    pub networks: u64,
    pub image_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// May do everything, in every tenant.
    Operator,
    /// May do everything inside one tenant.
    Member(TenantId),
}

/// A person or a program that holds a token; the token itself is kept only as its digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    pub name: String,
    pub role: Role,
    pub token: Digest,
    pub created_at: Timestamp,
}

/// A tenant's layer-2 network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    pub id: NetworkId,
    pub tenant: TenantId,
    pub name: String,
    pub range: Cidr,
    /// VXLAN network identifier, never given out twice.
    pub vni: u32,
    pub created_at: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ImageFormat {
    Qcow2,
    Raw,
}

/// An image: its bytes are on the nodes, under their digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    pub id: ImageId,
    pub tenant: TenantId,
    pub name: String,
    pub format: ImageFormat,
    /// Length of the file.
    pub size_bytes: u64,
    /// Length of the disk that a guest sees.
    pub virtual_bytes: u64,
    pub digest: Digest,
    pub wanted_replicas: u32,
    pub replicas: BTreeMap<NodeId, ReplicaState>,
    /// Set on the disk of a machine as it was once.
    pub backup: Option<BackupOf>,
    /// Of a backup: it is being booted to see whether it does.
    pub rehearsal: Option<Rehearsal>,
    /// What the last rehearsal of it came to.
    pub rehearsed: Option<Rehearsed>,
    pub created_at: Timestamp,
}

/// Which machine's disk a backup is, and as of when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupOf {
    pub vm: VmId,
    pub taken_at: Timestamp,
    pub consistency: Consistency,
    /// The earlier backup of the machine that it stands on: it holds what was written since. `None`: it is a full one.
    pub parent: Option<ImageId>,
}

/// What a guest finds on a disk that was made from a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Consistency {
    /// It was off: its disk as it left it.
    Off,
    /// Its file systems were frozen at that moment.
    Frozen,
    /// As after a power failure at that moment: all that was synced, and a journal to replay.
    Crash,
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Off => "off",
            Self::Frozen => "frozen",
            Self::Crash => "crash",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaState {
    /// The node was asked to fetch it.
    Wanted,
    /// The node has it, synced and verified.
    Good,
    /// The node has lost it, or could not get it, at this time. It holds no copy, and another is asked first.
    Lost(Timestamp),
}

impl Image {
    /// The nodes that have a copy, or are to have one.
    pub fn keepers(&self) -> impl Iterator<Item = NodeId> {
        let kept = |state: &ReplicaState| matches!(state, ReplicaState::Wanted | ReplicaState::Good);
        self.replicas.iter().filter(move |(_, state)| kept(state)).map(|(node, _)| *node)
    }
}

/// What a retry of the same request is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    pub body: [u8; 16],
    pub at: Timestamp,
    pub outcome: crate::Applied,
}

/// A tenant's own small value, with a version to compare and set by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tag {
    pub value: String,
    /// The log index that wrote it.
    pub version: u64,
}

/// What is paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Resource {
    Vm(VmId),
    Image(ImageId),
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(id) => id.fmt(f),
            Self::Image(id) => id.fmt(f),
        }
    }
}

/// Use that is going on: a constant weight since a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meter {
    pub tenant: TenantId,
    pub resource: Resource,
    pub name: String,
    /// What the weight is for: `running`, `suspended`, `stopped`, `stored`.
    pub status: String,
    pub weight_milli: u64,
    pub since: Timestamp,
}

/// Use that ended: a constant weight over `from..to`. The amount follows from the price book and is not stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    pub tenant: TenantId,
    pub resource: Resource,
    pub name: String,
    pub status: String,
    pub weight_milli: u64,
    pub from: Timestamp,
    pub to: Timestamp,
}
