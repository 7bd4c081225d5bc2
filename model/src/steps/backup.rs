//! A copy of a machine's disk: made once for each number that is asked for, and told whatever came of it.

use super::{Observed, Step, Subject};
use crate::{BackupWish, Power, VmWish};

/// A copy of the disk of a machine that is here, on or off, once for each number. A copy that failed is told as well: the
/// quorum decides about another.
pub(super) fn backup(generation: u64, wish: &VmWish, found: &Observed, out: &mut Vec<Step>) {
    let Some(BackupWish { number, parent }) = wish.backup else { return };
    let made = found.backups.get(&wish.vm).filter(|made| (made.epoch, made.number) == (wish.epoch, number));
    match made {
        Some(made) if found.told_backups.get(&wish.vm) != Some(&number) => out.push(Step::ReportBackup(made.clone())),
        Some(_) => {}
        None => {
            let here = found.guest(wish).is_some_and(|guest| guest.epoch == wish.epoch);
            if here && wish.power != Power::Absent && found.may_try(Subject::Backup(wish.vm), generation) {
                out.push(Step::BackUp { vm: wish.vm, number, parent });
            }
        }
    }
}
