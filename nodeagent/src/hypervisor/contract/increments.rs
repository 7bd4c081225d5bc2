//! Backups that hold what was written since the last one: where it is known, and a full copy wherever it is not.

use std::{fs, path::Path};

use model::{Digest, VmId};

use super::{PATIENCE, Subject};
use crate::hypervisor::{Backup, Hypervisor, Parent, job::Job, qcow2};

/// Takes the file away as an image store does, and tells the hypervisor what it is called there.
pub fn keep(h: &dyn Hypervisor, vm: VmId, backup: &Backup, store: &Path) -> Parent {
    fs::create_dir_all(store).expect("a folder");
    let digest = Digest::of(&fs::read(&backup.file).expect("the backup"));
    let file = store.join(digest.to_string());
    fs::rename(&backup.file, &file).expect("move the backup");
    h.backed_up(vm, digest).expect("hear its name");
    Parent { digest, file }
}

/// The newest of a chain.
pub fn it_is_known_what_was_written(subject: &Subject, h: &dyn Hypervisor) -> Parent {
    let (vm, store) = (subject.spec.vm, subject.dir.join("kept"));
    let job = || Job::new(PATIENCE);
    let full = h.back_up(vm, None, &job()).expect("back up");
    assert_eq!(full.parent, None);
    qcow2::stands_on(&full.file, None).expect("a full copy stands alone");
    let full = keep(h, vm, &full, &store);
    let unknown = Parent { digest: Digest([7; 32]), ..full.clone() };
    let copied = h.back_up(vm, Some(&unknown), &job()).expect("back up since what nobody knows");
    assert_eq!(copied.parent, None, "all of it");
    // That one went nowhere: what is known is since the one before.
    let first = h.back_up(vm, Some(&full), &job()).expect("back up what was written since");
    assert_eq!((first.parent, first.virtual_bytes), (Some(full.digest), subject.spec.size.disk_bytes));
    qcow2::stands_on(&first.file, Some(full.digest)).expect("it names its parent alone");
    let first = keep(h, vm, &first, &store);
    assert_eq!(h.back_up(vm, Some(&full), &job()).expect("back up").parent, None, "known is since the newest alone");
    // An agent that died meanwhile.
    let second = (subject.open)().back_up(vm, Some(&first), &job()).expect("another agent knows it");
    assert_eq!(second.parent, Some(first.digest));
    let second = keep(h, vm, &second, &store);
    qcow2::chain_is(&second.file, &[first.digest, full.digest]).expect("a chain");
    second
}

pub fn nothing_is_known_after_a_crash(subject: &Subject, h: &dyn Hypervisor, newest: &Parent) {
    let vm = subject.spec.vm;
    let copied = h.back_up(vm, Some(newest), &Job::new(PATIENCE)).expect("back up after a crash");
    assert_eq!(copied.parent, None, "all of it");
    let full = keep(h, vm, &copied, &subject.dir.join("kept"));
    let next = h.back_up(vm, Some(&full), &Job::new(PATIENCE)).expect("back up again");
    assert_eq!(next.parent, Some(full.digest), "what the crash left is in nobody's way");
}
