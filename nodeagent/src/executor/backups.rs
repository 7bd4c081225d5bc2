//! What became of backups, as it is told.

use model::{
    VmId,
    command::{BackupMade, BackupReport},
    steps::Subject,
};

use super::{
    Executor,
    act::{Copied, Done as Outcome, Fault},
};

impl Executor {
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
