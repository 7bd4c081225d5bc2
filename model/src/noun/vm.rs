//! A machine: what its owner wants, where it lives, what its host says, and what a person reads of it.

use std::{fmt, net::Ipv4Addr, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    Capacity, ImageId, Mac, Migration, MigrationStage, MoveFailure, NetworkId, NodeId, RequestId, TenantId, Timestamp,
    VmId,
};

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
    /// A second host that it goes to, or went from.
    pub migration: Option<Migration>,
    pub move_failure: Option<MoveFailure>,
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

/// What becomes of a machine when its host is lost, and what the host does with it when no leader answers any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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
    /// One of so many in a row is a full one; 0: as the cloud's setting says.
    pub full_every: u32,
    /// The one that is under way is to be a full one.
    pub full: bool,
}

impl Backups {
    /// The number of the one that is under way.
    pub fn pending(&self) -> Option<u32> {
        (self.asked != self.answered).then_some(self.asked)
    }
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
    /// On its way to another host; it goes on meanwhile.
    Migrating,
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
            Self::Migrating => "migrating",
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
            _ if self.is_moving() => Status::Migrating,
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

    pub fn is_moving(&self) -> bool {
        self.migration.is_some_and(|migration| migration.stage == MigrationStage::Moving)
    }

    /// The hosts that it has something on, or is to have.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = NodeId> {
        let other = self.migration.map(|migration| migration.other);
        self.placement.into_iter().chain(other).map(|placement| placement.node)
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
