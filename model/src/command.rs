//! Every way the cloud can change: a closed enum, grouped by who may ask, one sentence each.

use std::{fmt, net::IpAddr};

use serde::{Deserialize, Serialize};

use crate::{
    Capacity, Cidr, Consistency, ControllerId, Digest, Held, HypervisorKind, ImageFormat, ImageId, JoinRole, NetworkId,
    NodeId, NodeSummary, Phase, Quota, Recovery, RequestId, Role, TenantId, Timestamp, Verdict, VmId, Wanted,
};

pub use noun::Noun;

mod noun;

/// One log slot. The proposer stamps the time; the client chose the request id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub at: Timestamp,
    /// Set on what people ask for: a second entry with the same request has no effect and the first one's reply.
    pub request: Option<Request>,
    pub actor: Actor,
    pub command: Command,
}

/// Names what a client asked for, so that a retry is known as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub id: RequestId,
    /// First half of the BLAKE3 digest of the method's name and the encoded message: the same id with another body is refused.
    pub body: [u8; 16],
}

/// Who asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Actor {
    User {
        name: String,
        role: Role,
    },
    Node(NodeId),
    /// A controller itself: its planners, its quorum operations.
    System,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    Tenant(TenantCommand),
    Operator(OperatorCommand),
    Node(NodeCommand),
    Planner(PlannerCommand),
}

/// What a tenant's user may ask; an operator may ask it for any tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TenantCommand {
    /// A new machine; replies with its id before it has a host.
    CreateVm {
        tenant: TenantId,
        name: String,
        image: ImageId,
        template: String,
        network: NetworkId,
        ssh_keys: Vec<String>,
        user_data: String,
        recovery: Recovery,
        priority: u8,
    },
    /// What becomes of it when its host is lost.
    SetVmRecovery {
        vm: VmId,
        recovery: Recovery,
        priority: u8,
    },
    /// Run it, suspend it or stop it; what it is now does not matter.
    SetVmPower {
        vm: VmId,
        wanted: Wanted,
        stop_grace_millis: u64,
    },
    /// Copy its disk into an image while it runs; with `full` all of it, whatever is known of earlier copies.
    BackUpVm {
        vm: VmId,
        full: bool,
    },
    /// How often it is backed up (0: on demand only), how many backups are kept (0: all), and how many of them in a row
    /// have one full one (0: as the cloud's setting says).
    SetVmBackup {
        vm: VmId,
        every_millis: u64,
        keep: u32,
        full_every: u32,
    },
    /// Boot it again.
    RebootVm {
        vm: VmId,
    },
    /// Remove it; with `force` it is gone for its owner at once, even when its host cannot be reached.
    DeleteVm {
        vm: VmId,
        force: bool,
    },
    CreateNetwork {
        tenant: TenantId,
        name: String,
        range: Cidr,
    },
    /// Refused while a machine is in it.
    DeleteNetwork {
        network: NetworkId,
    },
    /// The bytes are already on `replicas`, synced and verified.
    ImportImage {
        tenant: TenantId,
        name: String,
        format: ImageFormat,
        size_bytes: u64,
        virtual_bytes: u64,
        digest: Digest,
        replicas: Vec<NodeId>,
    },
    /// Refused while a machine is made from it.
    DeleteImage {
        image: ImageId,
    },
    /// Write a tag; with `expected` only when its version is that (0: it does not exist).
    SetTag {
        tenant: TenantId,
        key: String,
        value: String,
        expected: Option<u64>,
    },
    DeleteTag {
        tenant: TenantId,
        key: String,
        expected: Option<u64>,
    },
    /// Boot a backup, apart from everything, to see whether it does. `expect`: what its console says then; empty: its
    /// guest agent answers, or it asks for a login.
    RehearseBackup {
        image: ImageId,
        limit_millis: u64,
        expect: String,
    },
    /// End a rehearsal that is under way.
    EndRehearsal {
        image: ImageId,
    },
}

/// What only an operator may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperatorCommand {
    CreateTenant {
        name: String,
        quota: Quota,
    },
    SetQuota {
        tenant: TenantId,
        quota: Quota,
    },
    /// Refused while it holds anything.
    DeleteTenant {
        tenant: TenantId,
    },
    CreateUser {
        name: String,
        role: Role,
        token: Digest,
    },
    DeleteUser {
        name: String,
    },
    CreateTemplate {
        name: String,
        size: Capacity,
        weight_milli: u64,
    },
    DeleteTemplate {
        name: String,
    },
    /// Names and ranges: `crate::setting::SETTINGS`.
    SetSetting {
        name: String,
        value: u64,
    },
    /// The price of weight 1 for an hour, in nano-units, from a time that has not passed.
    SetPrice {
        nano_per_hour: u64,
        from: Timestamp,
    },
    IssueJoinToken {
        token: Digest,
        role: JoinRole,
        valid_millis: u64,
    },
    CordonNode {
        node: NodeId,
        cordoned: bool,
    },
    /// Give it nothing new, and move away what is on it.
    DrainNode {
        node: NodeId,
    },
    /// It may be away: what is on it waits for it, and it takes nothing new.
    MaintainNode {
        node: NodeId,
        maintenance: bool,
    },
    /// Whether what was on lost hosts is made again elsewhere; arming also lets go a brake that froze.
    ArmRecovery {
        armed: bool,
    },
    /// Move a machine to that host, as it runs or while it is stopped. The entry's index is the epoch that it will have there.
    MigrateVm {
        vm: VmId,
        to: NodeId,
    },
    /// It stays where it is, if it was not handed over yet.
    CancelMigration {
        vm: VmId,
    },
    /// Forget a host; refused while it has machines, unless `force` says that it is gone for ever.
    RemoveNode {
        node: NodeId,
        force: bool,
    },
    /// From here on commands of this level may be proposed; every member knows it. Never lowered.
    RaiseLevel {
        level: u32,
    },
    /// Wait for no host any more that has not said what it holds, and set aside what nobody knows.
    EndRefounding,
}

/// What a host's agent says, through the controller that it is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeCommand {
    /// The agent started and opened a session; replies with its new incarnation.
    Attach { node: NodeId, address: String, underlay: IpAddr, hypervisor: HypervisorKind, capacity: Capacity },
    /// What became of machines. Refused as stale when the epoch or the incarnation is not the current one.
    ReportVms { node: NodeId, incarnation: u64, reports: Vec<VmReport> },
    /// What became of images that it was asked to keep.
    ReportImages { node: NodeId, incarnation: u64, reports: Vec<ImageReport> },
    /// What became of backups that were asked for.
    ReportBackups { node: NodeId, incarnation: u64, reports: Vec<BackupReport> },
    /// What became of moves that were asked for.
    ReportMoves { node: NodeId, incarnation: u64, reports: Vec<MoveReport> },
    /// The period summary.
    Summarise { node: NodeId, incarnation: u64, summary: NodeSummary },
    /// What became of rehearsals.
    ReportRehearsals { node: NodeId, incarnation: u64, reports: Vec<RehearsalReport> },
    /// Everything that it holds of this cloud, once after a refounding.
    TakeStock { node: NodeId, incarnation: u64, guests: Vec<(VmId, Held)> },
}

/// One machine, as its host found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmReport {
    pub vm: VmId,
    /// The placement that the report is about.
    pub epoch: u64,
    /// The attempt of the wish that it answers: a failure of an earlier one is old news.
    pub attempt: u32,
    pub phase: Phase,
    /// The last requested reboot that was carried out.
    pub rebooted: u32,
    /// Why it failed, or why it stopped.
    pub reason: String,
    /// With `Phase::Failed`: trying again on this or another host could help. With `Phase::Stopped`: the guest
    /// did not switch itself off, so it should be started again if it is wanted on.
    pub retry: bool,
}

/// One backup, made or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupReport {
    pub vm: VmId,
    /// The placement under which it was asked for.
    pub epoch: u64,
    pub number: u32,
    pub outcome: Result<BackupMade, String>,
}

/// Its bytes are on the host that says so, synced, verified and opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupMade {
    pub digest: Digest,
    pub size_bytes: u64,
    pub virtual_bytes: u64,
    /// How long ago, when this was written, the disk was as it is in it.
    pub age_millis: u64,
    pub consistency: Consistency,
    /// Of an increment: the backup that it stands on, by its bytes.
    pub parent: Option<Digest>,
}

/// What became of a rehearsal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RehearsalReport {
    pub image: ImageId,
    /// The placement under which it was asked for.
    pub epoch: u64,
    pub verdict: Verdict,
    pub took_millis: u64,
    pub reason: String,
}

/// One end of a move, as its host found it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveReport {
    pub vm: VmId,
    /// The placement that it will have when it is handed over: it names the move.
    pub epoch: u64,
    pub outcome: MoveOutcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MoveOutcome {
    /// By the source: it is off here because it left, and does not run here again unless the move is given up.
    Left,
    /// By the destination: all of it is here, paused or off, and does not run here before it is handed over.
    Arrived,
    /// By either: it will not come to anything.
    Failed(String),
    /// By the source: it was stopped before anything of it was made here. There is nothing that would have to go.
    Nothing,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageReport {
    pub digest: Digest,
    /// Held, synced and verified; or lost.
    pub good: bool,
}

/// What the leader's planners propose, and the bookkeeping of the quorum itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PlannerCommand {
    /// The first entry of a cloud: its name, its operator, its first controller, the templates on offer.
    Found { cluster: String, controller: String, address: String, operator: String, token: Digest },
    /// A controller shows its one-time token; replies with the id it will have.
    JoinController { token: Digest, name: String, address: String },
    /// It left the quorum; its id is never used again.
    RetireController { controller: ControllerId },
    /// A host shows its one-time token; replies with the id it will have.
    JoinNode { token: Digest, name: String },
    /// The certificate that was signed for a host.
    BindCertificate { node: NodeId, certificate: Digest },
    /// Give a machine to a host; capacity is checked again here.
    PlaceVm { vm: VmId, node: NodeId },
    /// Take a machine from a host that is to be emptied, to that one.
    MigrateVm { vm: VmId, to: NodeId },
    /// No host has room; says why. It stays first in line and is looked at again whenever planners run.
    DeferVm { vm: VmId, reason: String },
    /// Its back-off is over.
    RetryVm { vm: VmId },
    /// Its transition took longer than its deadline.
    ExpireVm { vm: VmId },
    /// Heard, or not heard for too long.
    SetNodeSilent { node: NodeId, incarnation: u64, silent: bool },
    /// Its lease has ended without a word: see `lease`. The proposer has stopped answering it before it proposed this.
    DeclareLost { node: NodeId, incarnation: u64 },
    /// Take a machine from a host that is lost.
    RecoverVm { vm: VmId, epoch: u64 },
    /// Its schedule says so.
    BackUpDueVm { vm: VmId },
    /// Ask a host to keep a copy of an image.
    AddReplica { image: ImageId, node: NodeId },
    /// Give a rehearsal to a host; capacity is checked again here.
    PlaceRehearsal { image: ImageId, node: NodeId },
    /// Nobody has said in time what became of it.
    ExpireRehearsal { image: ImageId },
    /// Its clock was measured: beyond what a lease allows for, or surely within it again.
    SetNodeClock { node: NodeId, drifts: bool },
    /// The first entry of a quorum that was made from a backup, or from what one controller had left.
    Refound { epoch: u64, controller: ControllerId, name: String, address: String, operator: Option<(String, Digest)> },
}

/// One line each, so that a plan can be read.
impl fmt::Display for PlannerCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Found { cluster, controller, .. } => write!(f, "found {cluster} on {controller}"),
            Self::JoinController { name, address, .. } => write!(f, "join controller {name} at {address}"),
            Self::RetireController { controller } => write!(f, "retire {controller}"),
            Self::JoinNode { name, .. } => write!(f, "join node {name}"),
            Self::BindCertificate { node, certificate } => write!(f, "bind certificate {certificate} to {node}"),
            Self::PlaceVm { vm, node } => write!(f, "place {vm} on {node}"),
            Self::MigrateVm { vm, to } => write!(f, "move {vm} to {to}"),
            Self::DeferVm { vm, reason } => write!(f, "defer {vm}: {reason}"),
            Self::RetryVm { vm } => write!(f, "retry {vm}"),
            Self::ExpireVm { vm } => write!(f, "expire {vm}"),
            Self::SetNodeSilent { node, incarnation, silent: true } => {
                write!(f, "{node} incarnation {incarnation} is silent")
            }
            Self::SetNodeSilent { node, incarnation, silent: false } => {
                write!(f, "{node} incarnation {incarnation} is heard")
            }
            Self::DeclareLost { node, incarnation } => write!(f, "{node} incarnation {incarnation} is lost"),
            Self::RecoverVm { vm, epoch } => write!(f, "recover {vm} from epoch {epoch}"),
            Self::BackUpDueVm { vm } => write!(f, "back up {vm}"),
            Self::PlaceRehearsal { image, node } => write!(f, "rehearse {image} on {node}"),
            Self::ExpireRehearsal { image } => write!(f, "give up the rehearsal of {image}"),
            Self::SetNodeClock { node, drifts: true } => write!(f, "the clock of {node} drifts"),
            Self::SetNodeClock { node, drifts: false } => write!(f, "the clock of {node} is fit again"),
            Self::AddReplica { image, node } => write!(f, "copy {image} to {node}"),
            Self::Refound { epoch, controller, .. } => write!(f, "refound in epoch {epoch} on {controller}"),
        }
    }
}

/// What a command that was accepted answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    Tenant(TenantId),
    Vm(VmId),
    Network(NetworkId),
    Image(ImageId),
    Node(NodeId),
    Controller(ControllerId),
    Incarnation(u64),
    /// The tag's new version.
    Version(u64),
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Tenant(id) => id.fmt(f),
            Self::Vm(id) => id.fmt(f),
            Self::Network(id) => id.fmt(f),
            Self::Image(id) => id.fmt(f),
            Self::Node(id) => id.fmt(f),
            Self::Controller(id) => id.fmt(f),
            Self::Incarnation(number) => write!(f, "incarnation {number}"),
            Self::Version(number) => write!(f, "version {number}"),
        }
    }
}

/// A refusal: nothing changed. Each prints as one sentence; `code` is stable across versions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Rejection {
    #[error("{noun} '{name}' does not exist")]
    NotFound { noun: Noun, name: String },
    #[error("{noun} '{name}' exists already")]
    Exists { noun: Noun, name: String },
    #[error("{field} is '{value}', but must be {allowed}")]
    Invalid { field: String, value: String, allowed: String },
    #[error("{noun} '{name}' is in use: {by}")]
    InUse { noun: Noun, name: String, by: String },
    #[error("the quota of {tenant} allows {limit} {what}, {used} are used and {asked} more were asked for")]
    Quota { tenant: String, what: String, limit: u64, used: u64, asked: u64 },
    #[error("{node} has no room: {reason}")]
    NoRoom { node: String, reason: String },
    #[error("the version of tag '{key}' is {actual}, not the expected {expected}")]
    Version { key: String, expected: u64, actual: u64 },
    #[error("the request id was used before with another request")]
    RequestReused,
    #[error("the join token is unknown, expired or used")]
    BadToken,
    #[error("{0} may not do this")]
    Forbidden(String),
    #[error("it is about an earlier state: {0}")]
    Stale(String),
    #[error("nothing is recovered from lost hosts now: {0}")]
    Halted(String),
    #[error("network '{network}' has no free address")]
    NoAddress { network: String },
}

impl Rejection {
    /// Stable across versions; programs match on it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "not-found",
            Self::Exists { .. } => "already-exists",
            Self::Invalid { .. } => "invalid-argument",
            Self::InUse { .. } => "in-use",
            Self::Quota { .. } => "quota-exceeded",
            Self::NoRoom { .. } => "no-room",
            Self::Version { .. } => "version-mismatch",
            Self::RequestReused => "request-reused",
            Self::BadToken => "bad-join-token",
            Self::Forbidden(_) => "forbidden",
            Self::Stale(_) => "stale",
            Self::Halted(_) => "recovery-halted",
            Self::NoAddress { .. } => "no-address",
        }
    }
}
