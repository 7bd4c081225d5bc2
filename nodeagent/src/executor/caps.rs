//! How many steps may be under way at once: what takes long must leave room for what is quick.

use std::{collections::BTreeMap, mem::discriminant};

use model::steps::{Step, Subject};

/// Steps at once. A host's disk and libvirtd serve no more than a few at a time anyway.
const MOST_BUSY: usize = 16;
/// Of which image transfers: each uses the network and the disk to the full.
const MOST_FETCHES: usize = 3;
/// Backups: each reads a disk to its end, which may take hours.
const MOST_BACKUPS: usize = 3;
/// Rehearsals: each is a guest that boots, beside those that are paid for.
const MOST_REHEARSALS: usize = 2;

/// Whether the step may be begun beside those that are under way.
pub fn has_room(busy: &BTreeMap<Subject, Step>, step: &Step) -> bool {
    let most = match step {
        Step::FetchImage(_) => MOST_FETCHES,
        Step::BackUp { .. } => MOST_BACKUPS,
        Step::Rehearse { .. } => MOST_REHEARSALS,
        _ => MOST_BUSY,
    };
    let alike = busy.values().filter(|other| discriminant(*other) == discriminant(step)).count();
    busy.len() < MOST_BUSY && alike < most
}

#[cfg(test)]
mod tests {
    use model::VmId;

    use super::*;

    #[test]
    fn backups_leave_room_for_what_is_quick() {
        let back_up = |vm| Step::BackUp { vm: VmId(vm), number: 1, parent: None };
        let mut busy = BTreeMap::new();
        for vm in 0..100 {
            if has_room(&busy, &back_up(vm)) {
                busy.insert(Subject::Backup(VmId(vm)), back_up(vm));
            }
        }
        assert_eq!(busy.len(), MOST_BACKUPS);
        for vm in 0..100 {
            if has_room(&busy, &Step::PowerOff(VmId(vm))) {
                busy.insert(Subject::Vm(VmId(vm)), Step::PowerOff(VmId(vm)));
            }
        }
        assert_eq!(busy.len(), MOST_BUSY);
    }
}
