//! Backups that are under way, and what became of others, as it is told.

use std::{sync::Arc, time::Duration};

use model::{
    VmId,
    command::{BackupMade, BackupReport},
    steps::{Step, Subject},
};

use super::{
    Executor,
    act::{Copied, Done as Outcome, Fault},
};
use crate::hypervisor::job::Job;

/// A copy of a large disk over a slow one takes hours; one that takes a day will never be done.
const BACKUP_LIMIT: Duration = Duration::from_secs(24 * 3600);

impl Executor {
    pub(super) fn begin_backup(&mut self, vm: VmId) -> Arc<Job> {
        let job = Arc::new(Job::new(BACKUP_LIMIT));
        self.copies.insert(vm, job.clone());
        job
    }

    /// Whether the step has to wait for a copy that is just told to end. A disk that is copied while its guest is off is locked, so
    /// a start would fail, and its owner does not wait for a copy, which may take hours. Once: what is left to do when all is
    /// copied locks nothing.
    pub(super) fn waits_for_copy(&mut self, step: &Step) -> bool {
        let Step::Start { vm, .. } = step else { return false };
        let copy = self.copies.remove(vm);
        copy.inspect(|job| job.cancel()).is_some()
    }

    /// Made or not, it is told once: whether to try again is for whoever asked for it.
    pub(super) fn note_backup(&mut self, vm: VmId, number: u32, result: Result<Outcome, Fault>) {
        let wish = self.assignment.iter().flat_map(|assignment| &assignment.vms).find(|wish| wish.vm == vm);
        let Some(epoch) = wish.map(|wish| wish.epoch) else { return };
        let (outcome, at) = match result.and_then(Outcome::copied) {
            Ok(Copied { made, at_millis }) => (Ok(made), at_millis),
            Err(fault) => {
                tracing::warn!(%vm, number, reason = fault.reason, "a backup failed");
                (Err(fault.reason), 0)
            }
        };
        self.failures.remove(&Subject::Backup(vm));
        self.backups.insert(vm, (BackupReport { vm, epoch, number, outcome }, at));
    }
}

/// As it is told now: how old the copy has become since it was made.
pub(super) fn aged(made: &BackupReport, more_millis: u64) -> BackupReport {
    let outcome = made.outcome.clone().map(|made| BackupMade { age_millis: more_millis, ..made });
    BackupReport { outcome, ..made.clone() }
}
