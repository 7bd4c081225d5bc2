//! One step, carried out. Each ends well or with a reason; whether to try again is the executor's business.

use std::{panic::AssertUnwindSafe, path::PathBuf, sync::Arc, time::Duration};

use futures::FutureExt;
use model::{
    Assignment, Digest, ImageWish, VmId,
    assignment::RehearsalWish,
    command::BackupMade,
    steps::{IMAGE_IDLE_MILLIS, Step},
};
use storage::images::ImageError;
use tokio::task::spawn_blocking;

use super::moving;
use crate::{
    clock,
    host::Host,
    hypervisor::{
        GuestNic, GuestSpec, Hypervisor, HypervisorError, Parent,
        job::Job,
        qcow2,
        rehearsal::{Rehearsal, Rehearsed},
    },
    images::{self, TransferError},
};

/// Longest reason that goes into the log of the quorum.
const REASON_CHARS: usize = 300;

/// Why a step was not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub kind: FaultKind,
    pub reason: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// It says nothing about the step: a daemon restarts, another transfer is at it. Tried again, and not counted.
    NotNow,
    Transient,
    Permanent,
}

/// A copy of a disk, in the image store.
#[derive(Clone, Copy, Debug)]
pub struct Copied {
    pub made: BackupMade,
    /// The host's clock when the disk was so.
    pub at_millis: u64,
}

/// What a step gave.
#[derive(Debug)]
pub enum Done {
    Nothing,
    Copied(Copied),
    Rehearsed(Rehearsed),
}

impl Done {
    /// Of a backup.
    pub fn copied(self) -> Result<Copied, Fault> {
        if let Self::Copied(copied) = self { Ok(copied) } else { Err(mistake("a backup without bytes")) }
    }

    /// Of a rehearsal.
    pub fn rehearsed(self) -> Result<Rehearsed, Fault> {
        if let Self::Rehearsed(rehearsed) = self {
            Ok(rehearsed)
        } else {
            Err(mistake("a rehearsal without a verdict"))
        }
    }
}

/// Carries out a step; a panic in it is a fault like another. `job`: of what takes its time and can be ended.
pub async fn act(
    host: Arc<Host>,
    assignment: Arc<Assignment>,
    step: Step,
    job: Option<Arc<Job>>,
) -> Result<Done, Fault> {
    let name = step.to_string();
    let outcome = AssertUnwindSafe(perform(host, assignment, step, job)).catch_unwind().await;
    let outcome = outcome.unwrap_or_else(|_| Err(cut_short()));
    outcome.map_err(|Fault { kind, reason }| {
        let reason =
            reason.chars().map(|c| if c.is_control() { ' ' } else { c }).take(REASON_CHARS).collect::<String>();
        Fault { kind, reason: format!("{name}: {reason}") }
    })
}

async fn perform(
    host: Arc<Host>,
    assignment: Arc<Assignment>,
    step: Step,
    job: Option<Arc<Job>>,
) -> Result<Done, Fault> {
    check_lease(&host, &assignment, &step)?;
    let done = match step {
        Step::BackUp { vm, parent, .. } => {
            let job = job.ok_or_else(|| mistake("a backup without a job"))?;
            return back_up(host, vm, parent, job).await.map(Done::Copied);
        }
        Step::Rehearse { image, epoch } => {
            let wish = assignment.rehearsals.iter().find(|wish| (wish.image, wish.epoch) == (image, epoch)).cloned();
            let begun = wish.zip(job).ok_or_else(|| fault(FaultKind::NotNow, "the assignment no longer has it"));
            return rehearse(host, assignment.cluster.clone(), begun?).await.map(Done::Rehearsed);
        }
        Step::FetchImage(image) => fetch(&host, image).await,
        Step::DropImage(digest) => {
            let store = host.images.clone();
            let dropped = spawn_blocking(move || store.remove(digest, Duration::from_millis(IMAGE_IDLE_MILLIS))).await;
            dropped.map_err(|_| cut_short())?.map(drop).map_err(|error| fault(FaultKind::Transient, error))
        }
        Step::EnsureNetwork(wish) => {
            host.network.ensure(&wish, host.underlay).await.map_err(|error| fault(FaultKind::Transient, error))
        }
        Step::RemoveNetwork(vni) => host.network.remove(vni).await.map_err(|error| fault(FaultKind::Transient, error)),
        Step::MakeDisk(vm) => with_spec(host, assignment, vm, |hypervisor, spec| hypervisor.make_disk(spec)).await,
        Step::CheckDisk(vm) => hypervisor(host, move |hypervisor| hypervisor.check_disk(vm)).await,
        Step::Start { vm, .. } => with_spec(host, assignment, vm, |hypervisor, spec| hypervisor.start(spec)).await,
        Step::Suspend(vm) => hypervisor(host, move |hypervisor| hypervisor.suspend(vm)).await,
        Step::Resume(vm) => hypervisor(host, move |hypervisor| hypervisor.resume(vm)).await,
        Step::PressPower(vm) => hypervisor(host, move |hypervisor| hypervisor.press_power(vm)).await,
        Step::PowerOff(vm) => hypervisor(host, move |hypervisor| hypervisor.power_off(vm)).await,
        Step::Reset { vm, .. } => hypervisor(host, move |hypervisor| hypervisor.reset(vm)).await,
        Step::Remove(vm) => hypervisor(host, move |hypervisor| hypervisor.remove(vm)).await,
        Step::Quarantine { vm, .. } => hypervisor(host, move |hypervisor| hypervisor.quarantine(vm)).await,
        Step::PrepareMigration(vm) => moving::prepare(host, assignment, vm).await,
        Step::Migrate { vm, .. } => {
            let wish = assignment.vms.iter().find(|wish| wish.vm == vm);
            let end = wish.and_then(|wish| wish.moves.as_ref());
            let end = end.ok_or_else(|| fault(FaultKind::NotNow, "the assignment no longer moves it"))?;
            let job = job.ok_or_else(|| mistake("a move without a job"))?;
            let departed = moving::depart(host.clone(), end, vm, job).await;
            host.view.end_move(vm);
            departed
        }
        Step::FinishMigration { vm, run } => {
            with_spec(host, assignment, vm, move |hypervisor, spec| hypervisor.finish_migration(spec, run)).await
        }
        Step::CancelMigration(vm) => hypervisor(host, move |hypervisor| hypervisor.cancel_migration(vm)).await,
        // The executor delivers these itself.
        Step::Report(_) | Step::ReportMove(_) => Ok(()),
        Step::ReportImage(_) | Step::ReportBackup(_) | Step::ReportRehearsal(_) => Ok(()),
    };
    done.map(|()| Done::Nothing)
}

async fn back_up(host: Arc<Host>, vm: VmId, parent: Option<Digest>, job: Arc<Job>) -> Result<Copied, Fault> {
    let copied = spawn_blocking(move || {
        let at_millis = clock::boottime_millis();
        // One that is not here, or damaged, is none: the copy is a full one then.
        let parent = parent.and_then(|digest| Some(Parent { digest, file: host.images.verified(digest).ok()? }));
        let backup = host.hypervisor.back_up(vm, parent.as_ref(), &job).map_err(hypervisor_fault)?;
        let held = host.images.adopt(&backup.file).map_err(|error| fault(FaultKind::Transient, error))?;
        if let Err(error) = host.hypervisor.backed_up(vm, held.digest) {
            tracing::warn!(%vm, %error, "the next backup of it will be a full one");
        }
        let made = BackupMade {
            digest: held.digest,
            size_bytes: held.size_bytes,
            virtual_bytes: backup.virtual_bytes,
            age_millis: 0,
            consistency: backup.consistency,
            parent: backup.parent,
        };
        Ok(Copied { made, at_millis })
    });
    copied.await.map_err(|_| cut_short())?
}

/// The machine that the backup is of, as it would be made again; but in no network, and with nobody's keys.
async fn rehearse(
    host: Arc<Host>,
    cluster: String,
    (wish, job): (RehearsalWish, Arc<Job>),
) -> Result<Rehearsed, Fault> {
    let done = spawn_blocking(move || {
        let base = base(&host, &wish.base)?;
        let spec = GuestSpec {
            cluster,
            vm: wish.vm,
            epoch: wish.epoch,
            tenant: String::new(),
            hostname: format!("rehearsal-of-{}", wish.vm),
            size: wish.size,
            base,
            base_format: wish.base.format,
            base_parents: wish.base.parents.iter().map(|parent| parent.digest).collect(),
            base_virtual_bytes: wish.base.virtual_bytes,
            nics: vec![],
            ssh_keys: vec![],
            user_data: String::new(),
        };
        let (image, limit) = (wish.image, Duration::from_millis(wish.limit_millis));
        let rehearsal = Rehearsal { image, spec, limit, expect: wish.expect };
        host.hypervisor.rehearse(&rehearsal, &job).map_err(hypervisor_fault)
    });
    done.await.map_err(|_| cut_short())?
}

/// A guest that may not run is neither started nor spoken to: the guard has stopped its process, or is about to, and
/// libvirt would wait for an answer. It may still be switched off and set aside.
fn check_lease(host: &Host, assignment: &Assignment, step: &Step) -> Result<(), Fault> {
    let (Step::Start { vm, .. }
    | Step::Suspend(vm)
    | Step::Resume(vm)
    | Step::PressPower(vm)
    | Step::Reset { vm, .. }
    | Step::Migrate { vm, .. }
    | Step::FinishMigration { vm, .. }
    | Step::CancelMigration(vm)
    | Step::BackUp { vm, .. }) = step
    else {
        return Ok(());
    };
    let Some(wish) = assignment.vms.iter().find(|wish| wish.vm == *vm) else { return Ok(()) };
    host.leases.may_run(wish).map_err(|why| fault(FaultKind::NotNow, why))
}

async fn fetch(host: &Host, image: ImageWish) -> Result<(), Fault> {
    let (view, digest, size) = (host.view.clone(), image.digest, image.size_bytes);
    let progress = move |done| view.set_fetched(digest, done, size);
    let fetched = images::fetch(&host.images, &host.identity, &image, progress).await;
    host.view.end_fetch(digest);
    let file = fetched.map_err(|error| match error {
        TransferError::Store(ImageError::Busy(_)) => fault(FaultKind::NotNow, error),
        other => fault(FaultKind::Transient, other),
    })?;
    let Some(parent) = image.parents.first().map(|parent| parent.digest) else { return Ok(()) };
    let store = host.images.clone();
    let looked = spawn_blocking(move || {
        let unfit = qcow2::stands_on(&file, Some(parent)).err();
        // The right bytes, of what is no increment of what the quorum says: nobody may come to stand on it.
        unfit.inspect(|_| drop(store.remove(digest, Duration::ZERO)))
    });
    let unfit = looked.await.map_err(|_| cut_short())?;
    unfit.map_or(Ok(()), |why| Err(fault(FaultKind::Permanent, format!("image {digest} {why}"))))
}

/// Blocks: the image and all that it stands on, verified.
fn base(host: &Host, image: &ImageWish) -> Result<PathBuf, Fault> {
    for digest in image.parents.iter().map(|parent| parent.digest) {
        host.images.verified(digest).map_err(|error| fault(FaultKind::Transient, error))?;
        host.images.touch(digest);
    }
    let base = host.images.verified(image.digest).map_err(|error| fault(FaultKind::Transient, error))?;
    host.images.touch(image.digest);
    Ok(base)
}

async fn with_spec(
    host: Arc<Host>,
    assignment: Arc<Assignment>,
    vm: VmId,
    work: impl FnOnce(&dyn Hypervisor, &GuestSpec) -> Result<(), HypervisorError> + Send + 'static,
) -> Result<(), Fault> {
    let done = spawn_blocking(move || {
        let spec = spec(&host, &assignment, vm)?;
        work(&*host.hypervisor, &spec).map_err(hypervisor_fault)
    });
    done.await.map_err(|_| cut_short())?
}

async fn hypervisor(
    host: Arc<Host>,
    work: impl FnOnce(&dyn Hypervisor) -> Result<(), HypervisorError> + Send + 'static,
) -> Result<(), Fault> {
    spawn_blocking(move || work(&*host.hypervisor)).await.map_err(|_| cut_short())?.map_err(hypervisor_fault)
}

/// Blocks: the base is verified here once more, so that no guest stands on damaged bytes.
pub fn spec(host: &Host, assignment: &Assignment, vm: VmId) -> Result<GuestSpec, Fault> {
    let wish = assignment.vms.iter().find(|wish| wish.vm == vm);
    let wish = wish.ok_or_else(|| fault(FaultKind::NotNow, "the assignment no longer has it"))?;
    let base = base(host, &wish.image)?;
    let nic = |nic: &model::NicWish| GuestNic {
        network: nic.network,
        mac: nic.mac,
        bridge: host.network.bridge(nic.vni),
        mtu: host.network.mtu(),
    };
    Ok(GuestSpec {
        cluster: assignment.cluster.clone(),
        vm,
        epoch: wish.epoch,
        tenant: wish.tenant.clone(),
        hostname: wish.name.clone(),
        size: wish.size,
        base,
        base_format: wish.image.format,
        base_parents: wish.image.parents.iter().map(|parent| parent.digest).collect(),
        base_virtual_bytes: wish.image.virtual_bytes,
        nics: wish.nics.iter().map(nic).collect(),
        ssh_keys: wish.ssh_keys.clone(),
        user_data: wish.user_data.clone(),
    })
}

pub fn hypervisor_fault(error: HypervisorError) -> Fault {
    let kind = match error {
        HypervisorError::Unreachable(_) => FaultKind::NotNow,
        HypervisorError::Transient(_) => FaultKind::Transient,
        HypervisorError::Permanent(_) => FaultKind::Permanent,
    };
    fault(kind, error)
}

pub fn cut_short() -> Fault {
    mistake("a panic")
}

fn mistake(what: &str) -> Fault {
    fault(FaultKind::Transient, format!("the agent has a mistake in it: {what}"))
}

pub fn fault(kind: FaultKind, reason: impl ToString) -> Fault {
    Fault { kind, reason: reason.to_string() }
}
