//! One thing that a host can do about its assignment: data, and one line when printed.

use std::fmt;

use crate::{
    Digest, ImageId, ImageWish, NetworkWish, VmId,
    command::{BackupReport, ImageReport, MoveOutcome, MoveReport, RehearsalReport, VmReport},
};

/// One thing to do. Each prints as one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Get the bytes from one of the sources, verified.
    FetchImage(ImageWish),
    /// Delete a blob that nobody wants.
    DropImage(Digest),
    /// Make the network as wished, or mend it.
    EnsureNetwork(NetworkWish),
    /// Remove a network that nobody wants.
    RemoveNetwork(u32),
    /// Make the overlay and the seed.
    MakeDisk(VmId),
    /// See that the disk of a machine that has run is there.
    CheckDisk(VmId),
    /// Define it and switch it on; carries out all reboots up to `reboots`.
    Start {
        vm: VmId,
        reboots: u32,
        after_crash: bool,
    },
    Suspend(VmId),
    Resume(VmId),
    /// Ask the guest to switch itself off.
    PressPower(VmId),
    /// Switch it off at once.
    PowerOff(VmId),
    /// Boot it again; carries out all reboots up to `reboots`.
    Reset {
        vm: VmId,
        reboots: u32,
    },
    /// Leave neither domain nor disk.
    Remove(VmId),
    /// Switch off and undefine a guest that nobody wants here; keep its disk aside.
    Quarantine {
        vm: VmId,
        epoch: u64,
    },
    /// Make what a guest needs that comes from another host, and let it in.
    PrepareMigration(VmId),
    /// Send it to the other end of its move: as it runs, or its disk when it is off.
    Migrate {
        vm: VmId,
        epoch: u64,
    },
    /// Take over what has arrived and was handed over to this host, and let it go on if it should run.
    FinishMigration {
        vm: VmId,
        run: bool,
    },
    /// It stays here after all.
    CancelMigration(VmId),
    /// Copy a machine's disk into an image; what was written since the parent is enough.
    BackUp {
        vm: VmId,
        number: u32,
        parent: Option<Digest>,
    },
    /// Tell the quorum what became of a backup.
    ReportBackup(BackupReport),
    /// Boot a backup, apart from everything, see whether it does, and leave nothing of it.
    Rehearse {
        image: ImageId,
        epoch: u64,
    },
    /// Tell the quorum what became of a rehearsal.
    ReportRehearsal(RehearsalReport),
    /// Tell the quorum what became of a move.
    ReportMove(MoveReport),
    /// Tell the quorum what became of a machine.
    Report(VmReport),
    /// Tell the quorum what became of a replica.
    ReportImage(ImageReport),
}

impl Step {
    /// What it is about; `None` for a report, which never waits.
    pub fn subject(&self) -> Option<Subject> {
        match self {
            Self::FetchImage(image) => Some(Subject::Image(image.digest)),
            Self::DropImage(digest) => Some(Subject::Image(*digest)),
            Self::EnsureNetwork(network) => Some(Subject::Network(network.vni)),
            Self::RemoveNetwork(vni) => Some(Subject::Network(*vni)),
            Self::MakeDisk(vm)
            | Self::CheckDisk(vm)
            | Self::Start { vm, .. }
            | Self::Suspend(vm)
            | Self::Resume(vm)
            | Self::PressPower(vm)
            | Self::PowerOff(vm)
            | Self::Reset { vm, .. }
            | Self::Remove(vm)
            | Self::PrepareMigration(vm)
            | Self::Migrate { vm, .. }
            | Self::FinishMigration { vm, .. }
            | Self::CancelMigration(vm)
            | Self::Quarantine { vm, .. } => Some(Subject::Vm(*vm)),
            Self::BackUp { vm, .. } => Some(Subject::Backup(*vm)),
            Self::Rehearse { image, .. } => Some(Subject::Rehearsal(*image)),
            Self::Report(_) | Self::ReportMove(_) => None,
            Self::ReportImage(_) | Self::ReportBackup(_) | Self::ReportRehearsal(_) => None,
        }
    }

    /// The machine that runs, or goes on, at some moment while this is carried out.
    pub fn sets_going(&self) -> Option<VmId> {
        match self {
            Self::Start { vm, .. } | Self::FinishMigration { vm, .. } | Self::Resume(vm) => Some(*vm),
            _ => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FetchImage(image) => write!(f, "fetch image {}", image.digest),
            Self::DropImage(digest) => write!(f, "drop image {digest}"),
            Self::EnsureNetwork(wish) => write!(f, "ensure network {} vni {}", wish.network, wish.vni),
            Self::RemoveNetwork(vni) => write!(f, "remove network vni {vni}"),
            Self::MakeDisk(vm) => write!(f, "make disk {vm}"),
            Self::CheckDisk(vm) => write!(f, "check disk {vm}"),
            Self::Start { vm, after_crash: false, .. } => write!(f, "start {vm}"),
            Self::Start { vm, after_crash: true, .. } => write!(f, "start {vm} after a crash"),
            Self::Suspend(vm) => write!(f, "suspend {vm}"),
            Self::Resume(vm) => write!(f, "resume {vm}"),
            Self::PressPower(vm) => write!(f, "press power {vm}"),
            Self::PowerOff(vm) => write!(f, "power off {vm}"),
            Self::Reset { vm, reboots } => write!(f, "reset {vm} for reboot {reboots}"),
            Self::Remove(vm) => write!(f, "remove {vm}"),
            Self::Quarantine { vm, epoch } => write!(f, "quarantine {vm} epoch {epoch}"),
            Self::PrepareMigration(vm) => write!(f, "prepare for {vm} to come"),
            Self::Migrate { vm, epoch } => write!(f, "send {vm} away, for epoch {epoch}"),
            Self::FinishMigration { vm, run: true } => write!(f, "let {vm} go on here"),
            Self::FinishMigration { vm, run: false } => write!(f, "take {vm} over as it is"),
            Self::CancelMigration(vm) => write!(f, "keep {vm} here"),
            Self::ReportMove(report) => match &report.outcome {
                MoveOutcome::Left => write!(f, "report {} has left for epoch {}", report.vm, report.epoch),
                MoveOutcome::Arrived => write!(f, "report {} has arrived for epoch {}", report.vm, report.epoch),
                MoveOutcome::Failed(reason) => {
                    write!(f, "report {} has not moved for epoch {}: {reason}", report.vm, report.epoch)
                }
                MoveOutcome::Nothing => {
                    write!(f, "report nothing is here of {} that could leave for epoch {}", report.vm, report.epoch)
                }
            },
            Self::BackUp { vm, number, parent: None } => write!(f, "back up {vm}, number {number}"),
            Self::BackUp { vm, number, parent: Some(parent) } => {
                write!(f, "back up {vm}, number {number}, since {:.8}", parent.to_string())
            }
            Self::ReportBackup(report) => match &report.outcome {
                Ok(made) => write!(f, "report backup {} of {}: {}", report.number, report.vm, made.digest),
                Err(reason) => write!(f, "report backup {} of {} failed: {reason}", report.number, report.vm),
            },
            Self::Rehearse { image, epoch } => write!(f, "rehearse {image} epoch {epoch}"),
            Self::ReportRehearsal(report) => {
                write!(f, "report rehearsal of {}: {}: {}", report.image, report.verdict, report.reason)
            }
            Self::Report(report) => {
                write!(
                    f,
                    "report {} epoch {} {:?} rebooted {}",
                    report.vm, report.epoch, report.phase, report.rebooted
                )?;
                if report.reason.is_empty() { Ok(()) } else { write!(f, ": {}", report.reason) }
            }
            Self::ReportImage(report) if report.good => write!(f, "report image {} good", report.digest),
            Self::ReportImage(report) => write!(f, "report image {} lost", report.digest),
        }
    }
}

/// What a step is about: one step at a time for each, and failures are counted for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    Vm(VmId),
    Network(u32),
    Image(Digest),
    /// Apart from the machine itself: what its owner wants of it does not wait for a copy of its disk.
    Backup(VmId),
    Rehearsal(ImageId),
}
