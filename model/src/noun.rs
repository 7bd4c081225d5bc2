//! The things a cloud is made of, one row type per noun. Rows are plain data; `apply` alone changes them.

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use crate::{
    Capacity, Cidr, ControllerId, Digest, ImageId, Mac, NetworkId, NodeId, RequestId, TenantId, Timestamp, VmId,
};

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

/// What becomes of a machine when its host is lost, and what the host does with it when no leader answers any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Recovery {
    /// Paused by its host when the lease ends, then made again elsewhere: never two run.
    Exclusive,
    /// Goes on while its host is cut off, for a lost quorum must not stop a cloud; made again elsewhere, where its
    /// addresses then are. The stale copy is switched off and kept aside when the host is back.
    #[default]
    Available,
    /// Stays with its host, which starts it again when it is back.
    RestartInPlace,
    /// Stays with its host, and stays off when it went down with it.
    None,
}

impl Recovery {
    /// Whether it is made again on another host.
    pub fn moves(self) -> bool {
        matches!(self, Self::Exclusive | Self::Available)
    }
}

/// In the words that people type.
impl fmt::Display for Recovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Exclusive => "exclusive",
            Self::Available => "available",
            Self::RestartInPlace => "restart-in-place",
            Self::None => "none",
        })
    }
}

impl FromStr for Recovery {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Exclusive, Self::Available, Self::RestartInPlace, Self::None];
        let found = all.into_iter().find(|recovery| recovery.to_string() == text);
        let allowed = "exclusive, available, restart-in-place or none";
        found.ok_or_else(|| format!("recovery is '{text}', but must be {allowed}"))
    }
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
    /// An operator works on it: it may be away, and what is on it waits for it.
    pub maintenance: bool,
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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    pub created_at: Timestamp,
}

/// Which machine's disk a backup is, and as of when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupOf {
    pub vm: VmId,
    pub taken_at: Timestamp,
    pub consistency: Consistency,
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

/// The backups of one machine: how often, and what was asked for last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backups {
    /// Taken this often; 0: only on demand.
    pub every_millis: u64,
    /// The newest so many are kept; 0: all.
    pub keep: u32,
    /// Counts what was asked for.
    pub asked: u32,
    /// The last that came to something.
    pub answered: u32,
    pub due_at: Option<Timestamp>,
    /// Why the last one failed; empty when it did not.
    pub reason: String,
}

impl Backups {
    /// The number of the one that is under way.
    pub fn pending(&self) -> Option<u32> {
        (self.asked != self.answered).then_some(self.asked)
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

/// What the owner wants a machine to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Wanted {
    Running,
    Suspended,
    Stopped,
    Deleted,
}

/// What a host said a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    Running,
    Suspended,
    Stopped,
    /// Neither a domain nor a disk of it is left on the host.
    Absent,
    /// Nobody knows: its host is lost, and it waits for it.
    Lost,
    /// The host could not do what was asked; the reason is beside it.
    Failed,
}

/// Where a machine lives. The epoch is the log index of the placement: unique, ordered, and the fencing token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    pub node: NodeId,
    pub epoch: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    pub network: NetworkId,
    pub mac: Mac,
    pub ip: Ipv4Addr,
}

/// What the last recovery cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loss {
    /// The host that was lost.
    pub node: NodeId,
    pub at: Timestamp,
    /// When the backup was taken that it was made from again; `None`: from its first image, so all that it wrote is lost.
    pub data_from: Option<Timestamp>,
}

/// A virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    pub id: VmId,
    pub tenant: TenantId,
    pub name: String,
    pub template: String,
    pub image: ImageId,
    /// Copied from the template at creation: a later change of the template does not change the machine.
    pub size: Capacity,
    pub weight_milli: u64,
    pub nics: Vec<Nic>,
    pub ssh_keys: Vec<String>,
    pub user_data: String,
    pub wanted: Wanted,
    pub recovery: Recovery,
    /// When room is short, a higher one is placed first.
    pub priority: u8,
    pub loss: Option<Loss>,
    pub backups: Backups,
    /// The backup that its disk is made from after a recovery, rather than its image.
    pub restored_from: Option<ImageId>,
    /// How long ACPI shutdown may take before the machine is switched off; 0 switches it off at once.
    pub stop_grace_millis: u64,
    /// Rises with each requested reboot.
    pub reboots: u32,
    pub placement: Option<Placement>,
    /// The last that the host of the current placement reported; `None` while it is being created there.
    pub phase: Option<Phase>,
    /// It has run under its current placement: its disk there holds data, so it may not simply be made anew elsewhere.
    pub existed: bool,
    /// The value of `reboots` that the host has carried out.
    pub rebooted: u32,
    /// Why it is pending, failed or stopped.
    pub reason: String,
    /// Failures since the last success or request of the owner.
    pub attempts: u32,
    /// Rises each time the host should try again what failed; never falls.
    pub tries: u32,
    /// When a failed or unplaced machine is tried again.
    pub retry_at: Option<Timestamp>,
    /// When the present transition is given up; `None` at rest.
    pub deadline: Option<Timestamp>,
    /// What its owner asked for last; the host's log names it with every step that it takes for it.
    pub request: RequestId,
    /// Gone for its owner, kept until its host has said that nothing is left.
    pub ghost: bool,
    pub created_at: Timestamp,
    pub changed_at: Timestamp,
}

/// What a retry of the same request is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remembered {
    pub body: [u8; 16],
    pub at: Timestamp,
    pub outcome: crate::Applied,
}

/// What a person reads. Derived, never stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Status {
    /// No host yet; the reason is beside it.
    Pending,
    Creating,
    Running,
    Suspending,
    Suspended,
    Resuming,
    Stopping,
    Stopped,
    Starting,
    Rebooting,
    Deleting,
    /// Given up for now or for good; the reason is beside it, and it can always be deleted.
    Failed,
    /// Its host is lost, and it waits for it.
    Lost,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pending => "pending",
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Suspending => "suspending",
            Self::Suspended => "suspended",
            Self::Resuming => "resuming",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Rebooting => "rebooting",
            Self::Deleting => "deleting",
            Self::Failed => "failed",
            Self::Lost => "lost",
        })
    }
}

impl Vm {
    pub fn status(&self) -> Status {
        match (self.wanted, self.phase) {
            (Wanted::Deleted, _) => Status::Deleting,
            (_, Some(Phase::Failed)) => Status::Failed,
            (_, Some(Phase::Lost)) => Status::Lost,
            (Wanted::Stopped, _) if self.placement.is_none() => Status::Stopped,
            _ if self.placement.is_none() => Status::Pending,
            (_, None | Some(Phase::Absent)) => Status::Creating,
            (Wanted::Running, Some(Phase::Running)) if self.rebooted != self.reboots => Status::Rebooting,
            (Wanted::Running, Some(Phase::Running)) => Status::Running,
            (Wanted::Running, Some(Phase::Suspended)) => Status::Resuming,
            (Wanted::Running, Some(Phase::Stopped)) => Status::Starting,
            (Wanted::Suspended, Some(Phase::Suspended)) => Status::Suspended,
            (Wanted::Suspended, Some(_)) => Status::Suspending,
            (Wanted::Stopped, Some(Phase::Stopped)) => Status::Stopped,
            (Wanted::Stopped, Some(_)) => Status::Stopping,
        }
    }

    /// True when it has no host and should have one now.
    pub(crate) fn wants_host(&self) -> bool {
        self.placement.is_none()
            && matches!(self.wanted, Wanted::Running | Wanted::Suspended)
            && self.phase != Some(Phase::Failed)
            && self.retry_at.is_none()
    }

    /// What its disk is made from.
    pub fn base(&self) -> ImageId {
        self.restored_from.unwrap_or(self.image)
    }

    /// The times at which a planner should look at it again.
    pub(crate) fn due_times(&self) -> impl Iterator<Item = Timestamp> {
        self.deadline.into_iter().chain(self.retry_at).chain(self.backups.due_at)
    }

    /// True while something should still happen to it without anybody asking again.
    pub fn in_transition(&self) -> bool {
        !matches!(self.status(), Status::Running | Status::Suspended | Status::Stopped | Status::Failed | Status::Lost)
    }
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
