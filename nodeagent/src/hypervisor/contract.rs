//! What every hypervisor must do, as one suite that runs against each implementation.
//!
//! It panics with the name of the broken promise. Conditions are waited for by name, with generous deadlines, because
//! the hosts that run it are busy.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use model::{Consistency, ImageId, Verdict, VmId};

use super::{GuestPower, GuestSpec, Hypervisor, HypervisorError, OffReason, job::Job, rehearsal::Rehearsal};

mod increments;
pub mod migration;

/// A guest under software emulation on a busy host boots in half a minute; shutting down takes some seconds more.
const PATIENCE: Duration = Duration::from_secs(180);
const GLANCE: Duration = Duration::from_millis(50);
/// A guest that is still booting does not hear the button, so it is pressed again.
const PRESS_AGAIN: Duration = Duration::from_secs(1);

/// What the suite is run against.
pub struct Subject<'a> {
    /// Makes the implementation anew, as an agent does that starts again. Where an older one still lives, the new one
    /// only looks: two agents on one folder are not promised anything.
    pub open: &'a dyn Fn() -> Box<dyn Hypervisor>,
    pub spec: GuestSpec,
    /// The implementation's folder.
    pub dir: PathBuf,
    /// Ends the guest as a crash does.
    pub crash: &'a dyn Fn(VmId),
    /// Makes the guest shut itself down; may be called again and again until it has.
    pub shut_down_inside: Option<&'a dyn Fn(VmId)>,
    /// The guest has an operating system that obeys the power button.
    pub hears_power_button: bool,
}

/// # Panics
/// When a promise is broken.
pub fn run(subject: &Subject) {
    let h = (subject.open)();
    nothing_is_there_yet(subject, &*h);
    a_disk_alone_is_no_guest(subject);
    let h = (subject.open)();
    it_starts_once(subject, &*h);
    it_is_suspended_and_resumed(subject, &*h);
    drop(h);
    // An agent that died while its guest ran.
    let h = (subject.open)();
    assert_eq!(power(&*h, subject), Some(GuestPower::Running), "another agent finds it running");
    usage_and_capacity_are_told(subject, &*h);
    it_is_backed_up_while_it_runs(subject, &*h);
    let newest = increments::it_is_known_what_was_written(subject, &*h);
    drop(h);
    what_a_dead_agent_left_of_a_backup_is_cleared(subject);
    a_rehearsal_leaves_nothing(subject);
    let h = (subject.open)();
    it_is_switched_off_and_on(subject, &*h);
    a_crash_is_seen_as_one(subject, &*h);
    increments::nothing_is_known_after_a_crash(subject, &*h, &newest);
    if subject.hears_power_button {
        the_button_is_obeyed(subject, &*h);
    }
    if subject.shut_down_inside.is_some() {
        its_own_shutdown_is_told_apart(subject, &*h);
    }
    removal_leaves_nothing(subject, &*h);
    a_disk_that_vanished_is_missed(subject, &*h);
    quarantine_keeps_the_disk(subject, &*h);
}

fn nothing_is_there_yet(subject: &Subject, h: &dyn Hypervisor) {
    let vm = subject.spec.vm;
    assert_eq!(h.guests().expect("guests of an empty host"), vec![]);
    assert_eq!(h.usage().expect("usage of an empty host"), vec![]);
    h.press_power(vm).expect("what is not there is off already");
    h.power_off(vm).expect("what is not there is off already");
    h.remove(vm).expect("what is not there is removed already");
    h.quarantine(vm).expect("what is not there is nobody's");
    assert_eq!(h.console_log(vm, 100).expect("console of no guest"), b"");
    for (what, result) in [
        ("suspend", h.suspend(vm)),
        ("resume", h.resume(vm)),
        ("reset", h.reset(vm)),
        ("start without a disk", h.start(&subject.spec)),
    ] {
        assert!(matches!(result, Err(HypervisorError::Transient(_))), "{what}: {result:?}");
    }
}

fn a_disk_alone_is_no_guest(subject: &Subject) {
    let folder = subject.dir.join("vms").join(subject.spec.vm.to_string());
    let h = (subject.open)();
    h.make_disk(&subject.spec).expect("make the disk");
    h.make_disk(&subject.spec).expect("make the disk that is there");
    assert_eq!(h.guests().expect("guests"), vec![], "it was not started yet");
    assert!(h.bases().expect("bases").contains(&subject.spec.base), "its base is in use");
    drop(h);
    // An agent that died before the first start.
    let h = (subject.open)();
    assert_eq!(h.guests().expect("guests"), vec![]);
    assert!(!folder.exists(), "a disk that was never used is cleared away at the next start of the agent");
    h.make_disk(&subject.spec).expect("make it again");
    let newer = GuestSpec { epoch: subject.spec.epoch + 1, ..subject.spec.clone() };
    h.make_disk(&newer).expect("a disk that was never used gives way to a newer placement");
    assert!(h.make_disk(&subject.spec).is_err(), "but not to an older one");
    let huge = GuestSpec { base_virtual_bytes: u64::MAX, vm: VmId(subject.spec.vm.0 + 1), ..subject.spec.clone() };
    assert!(matches!(h.make_disk(&huge), Err(HypervisorError::Permanent(_))), "an image larger than the disk");
    h.remove(huge.vm).expect("remove what could not be made");
    h.remove(subject.spec.vm).expect("remove a disk without a guest");
    assert!(!folder.exists(), "nothing is left");
}

fn it_starts_once(subject: &Subject, h: &dyn Hypervisor) {
    let spec = &subject.spec;
    h.make_disk(spec).expect("make the disk");
    h.start(spec).expect("start");
    h.start(spec).expect("start what runs");
    let guests = h.guests().expect("guests");
    assert_eq!(guests.len(), 1, "one guest: {guests:?}");
    assert_eq!((guests[0].vm, guests[0].epoch, guests[0].power), (spec.vm, spec.epoch, GuestPower::Running));
    let newer = GuestSpec { epoch: spec.epoch + 1, ..spec.clone() };
    assert!(h.start(&newer).is_err(), "another placement does not take a running guest over");
    assert!(h.make_disk(&newer).is_err(), "another placement does not take a disk over");
    h.resume(spec.vm).expect("resume what runs");
}

fn it_is_suspended_and_resumed(subject: &Subject, h: &dyn Hypervisor) {
    let vm = subject.spec.vm;
    h.suspend(vm).expect("suspend");
    h.suspend(vm).expect("suspend what is suspended");
    assert_eq!(power(h, subject), Some(GuestPower::Suspended));
    h.start(&subject.spec).expect("start what is on");
    assert_eq!(power(h, subject), Some(GuestPower::Suspended), "a start does not resume");
    let again = (subject.open)();
    assert_eq!(power(&*again, subject), Some(GuestPower::Suspended), "another agent finds it suspended");
    h.reset(vm).expect("reset what is suspended");
    assert_eq!(power(h, subject), Some(GuestPower::Running), "it boots again");
    h.suspend(vm).expect("suspend");
    h.resume(vm).expect("resume");
    assert_eq!(power(h, subject), Some(GuestPower::Running));
}

fn usage_and_capacity_are_told(subject: &Subject, h: &dyn Hypervisor) {
    let usage = h.usage().expect("usage");
    assert_eq!(usage.len(), 1, "usage of the one that runs: {usage:?}");
    assert_eq!(usage[0].0, subject.spec.vm);
    assert!(usage[0].1.memory_used_bytes > 0 && usage[0].1.disk_used_bytes > 0, "{usage:?}");
    let capacity = h.capacity().expect("capacity");
    assert!(capacity.vcpus > 0 && capacity.memory_bytes > 0 && capacity.disk_bytes > 0, "{capacity:?}");
    let status = h.node_status().expect("status of the host");
    assert!(status.cpu_permille <= 1000, "{status:?}");
    assert!(status.memory_used_bytes <= status.memory_total_bytes, "{status:?}");
    assert!(status.disk_used_bytes <= status.disk_total_bytes && status.disk_total_bytes > 0, "{status:?}");
}

fn it_is_backed_up_while_it_runs(subject: &Subject, h: &dyn Hypervisor) {
    let vm = subject.spec.vm;
    let job = Job::new(PATIENCE);
    let backup = h.back_up(vm, None, &job).expect("back up");
    assert_ne!(backup.consistency, Consistency::Off);
    assert_eq!(backup.virtual_bytes, subject.spec.size.disk_bytes, "it is as large as the guest's disk");
    assert_eq!(fs::metadata(&backup.file).expect("the backup").len(), backup.size_bytes);
    let progress = job.progress();
    assert!(progress.done_bytes <= progress.total_bytes, "{progress:?}");
    let cancelled = Job::new(PATIENCE);
    cancelled.cancel();
    for job in [cancelled, Job::new(Duration::ZERO)] {
        let result = h.back_up(vm, None, &job);
        assert!(matches!(result, Err(HypervisorError::Transient(_))), "it ends when it must: {result:?}");
        assert_eq!(backup_files(subject), Vec::<String>::new(), "and leaves nothing");
    }
    let again = h.back_up(vm, None, &Job::new(PATIENCE)).expect("one that was cancelled is in nobody's way");
    assert_eq!(again.file, backup.file);
    assert_eq!(power(h, subject), Some(GuestPower::Running), "it runs on");
    let absent = h.back_up(VmId(vm.0 + 1), None, &Job::new(PATIENCE));
    assert!(matches!(absent, Err(HypervisorError::Transient(_))), "{absent:?}");
}

fn what_a_dead_agent_left_of_a_backup_is_cleared(subject: &Subject) {
    let folder = subject.dir.join("vms").join(subject.spec.vm.to_string());
    fs::write(folder.join("backup.part"), "torn").expect("the folder of the guest");
    let h = (subject.open)();
    h.guests().expect("guests");
    assert_eq!(backup_files(subject), Vec::<String>::new());
}

/// Whatever comes of it; in these tests a disk may be blank. The guest of which it is a copy runs on.
fn a_rehearsal_leaves_nothing(subject: &Subject) {
    let h = (subject.open)();
    let before = h.guests().expect("guests");
    let spec = GuestSpec { nics: vec![], ..subject.spec.clone() };
    let short = Duration::from_secs(1);
    let expect = "what no console says".into();
    let rehearsal = Rehearsal { image: ImageId(4), spec, limit: short, expect };
    let rehearsed = h.rehearse(&rehearsal, &Job::new(PATIENCE)).expect("rehearse");
    assert_ne!(rehearsed.verdict, Verdict::Booted, "{rehearsed:?}");
    assert!(rehearsed.took >= short && !rehearsed.reason.is_empty(), "{rehearsed:?}");
    let cancelled = Job::new(PATIENCE);
    cancelled.cancel();
    let long = Rehearsal { limit: PATIENCE, ..rehearsal.clone() };
    assert!(h.rehearse(&long, &cancelled).is_err(), "it was cancelled");
    assert_eq!(h.guests().expect("guests"), before, "a rehearsal is no guest");
    let left = fs::read_dir(subject.dir.join("rehearsals")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "files are left of a rehearsal");
}

fn backup_files(subject: &Subject) -> Vec<String> {
    let folder = subject.dir.join("vms").join(subject.spec.vm.to_string());
    let files = fs::read_dir(folder).expect("the folder of the guest");
    let names = files.map(|file| file.expect("an entry").file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("backup")).collect()
}

fn it_is_switched_off_and_on(subject: &Subject, h: &dyn Hypervisor) {
    let vm = subject.spec.vm;
    h.power_off(vm).expect("switch off");
    h.power_off(vm).expect("switch off what is off");
    assert_eq!(power(h, subject), Some(GuestPower::Off(OffReason::ByAgent)));
    h.press_power(vm).expect("press the button of what is off");
    assert_eq!(h.usage().expect("usage"), vec![], "nothing runs");
    assert!(h.suspend(vm).is_err() && h.resume(vm).is_err() && h.reset(vm).is_err(), "it is off");
    let again = (subject.open)();
    assert_eq!(power(&*again, subject), Some(GuestPower::Off(OffReason::ByAgent)), "another agent knows why it is off");
    drop(again);
    let backup = h.back_up(vm, None, &Job::new(PATIENCE)).expect("back up what is off");
    assert_eq!(backup.consistency, Consistency::Off);
    assert_eq!(backup.virtual_bytes, subject.spec.size.disk_bytes);
    h.make_disk(&subject.spec).expect("its disk is there");
    h.check_disk(vm).expect("its disk is there");
    h.start(&subject.spec).expect("start again");
    assert_eq!(power(h, subject), Some(GuestPower::Running));
    h.reset(vm).expect("reset");
    assert_eq!(power(h, subject), Some(GuestPower::Running));
}

fn a_crash_is_seen_as_one(subject: &Subject, h: &dyn Hypervisor) {
    (subject.crash)(subject.spec.vm);
    wait("the crash is seen", || power(h, subject) == Some(GuestPower::Off(OffReason::Crashed)));
    let again = (subject.open)();
    assert_eq!(power(&*again, subject), Some(GuestPower::Off(OffReason::Crashed)), "another agent knows of the crash");
    h.start(&subject.spec).expect("start after a crash");
    assert_eq!(power(h, subject), Some(GuestPower::Running));
}

fn the_button_is_obeyed(subject: &Subject, h: &dyn Hypervisor) {
    let vm = subject.spec.vm;
    h.suspend(vm).expect("suspend");
    let mut pressed = None::<Instant>;
    wait("the guest obeys its power button", || {
        if pressed.is_none_or(|at| at.elapsed() > PRESS_AGAIN) {
            h.press_power(vm).expect("press");
            pressed = Some(Instant::now());
        }
        matches!(power(h, subject), Some(GuestPower::Off(_)))
    });
    assert_eq!(power(h, subject), Some(GuestPower::Off(OffReason::ByAgent)), "because it was asked to");
    h.start(&subject.spec).expect("start again");
}

fn its_own_shutdown_is_told_apart(subject: &Subject, h: &dyn Hypervisor) {
    let Some(shut_down) = subject.shut_down_inside else { return };
    let mut asked = None::<Instant>;
    wait("the guest shuts itself down", || {
        if asked.is_none_or(|at| at.elapsed() > PRESS_AGAIN) {
            shut_down(subject.spec.vm);
            asked = Some(Instant::now());
        }
        matches!(power(h, subject), Some(GuestPower::Off(_)))
    });
    assert_eq!(power(h, subject), Some(GuestPower::Off(OffReason::ByGuest)));
    let again = (subject.open)();
    assert_eq!(power(&*again, subject), Some(GuestPower::Off(OffReason::ByGuest)), "another agent knows why it is off");
    h.start(&subject.spec).expect("start again");
}

fn removal_leaves_nothing(subject: &Subject, h: &dyn Hypervisor) {
    let vm = subject.spec.vm;
    h.remove(vm).expect("remove");
    h.remove(vm).expect("remove what is gone");
    assert_eq!(h.guests().expect("guests"), vec![]);
    let left: Vec<_> = fs::read_dir(subject.dir.join("vms")).expect("the folder of guests").collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(h.bases().expect("bases").is_empty(), "no disk is left");
}

fn a_disk_that_vanished_is_missed(subject: &Subject, h: &dyn Hypervisor) {
    let vm = subject.spec.vm;
    h.make_disk(&subject.spec).expect("make the disk");
    h.start(&subject.spec).expect("start");
    h.power_off(vm).expect("switch off");
    h.check_disk(vm).expect("its disk is there");
    let folder = subject.dir.join("vms").join(vm.to_string());
    fs::remove_dir_all(&folder).expect("somebody removes its folder");
    let missing = h.check_disk(vm);
    assert!(matches!(missing, Err(HypervisorError::Permanent(_))), "{missing:?}");
    assert!(h.start(&subject.spec).is_err(), "it does not start without its disk");
    h.remove(vm).expect("what is left of it can be removed");
    assert_eq!(h.guests().expect("guests"), vec![]);
}

fn quarantine_keeps_the_disk(subject: &Subject, h: &dyn Hypervisor) {
    let (vm, epoch) = (subject.spec.vm, subject.spec.epoch);
    h.make_disk(&subject.spec).expect("make the disk");
    h.start(&subject.spec).expect("start");
    h.quarantine(vm).expect("quarantine");
    h.quarantine(vm).expect("quarantine what is set aside");
    assert_eq!(h.guests().expect("guests"), vec![]);
    let kept: Vec<_> = fs::read_dir(subject.dir.join("quarantine"))
        .expect("the folder of what was set aside")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    assert_eq!(kept.len(), 1, "{kept:?}");
    let name = kept[0].file_name().unwrap_or_default().to_string_lossy().into_owned();
    assert!(name.starts_with(&format!("{vm}-{epoch}-")), "{name}");
    assert!(fs::read_dir(&kept[0]).is_ok_and(|mut files| files.next().is_some()), "its files are kept");
    assert!(h.bases().expect("bases").contains(&subject.spec.base), "its base is still in use");
    let newer = GuestSpec { epoch: epoch + 1, ..subject.spec.clone() };
    h.make_disk(&newer).expect("a newer placement starts afresh");
    h.start(&newer).expect("a newer placement starts");
    h.remove(vm).expect("remove");
}

fn power(h: &dyn Hypervisor, subject: &Subject) -> Option<GuestPower> {
    h.guests().expect("guests").iter().find(|guest| guest.vm == subject.spec.vm).map(|guest| guest.power)
}

#[track_caller]
fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        thread::sleep(GLANCE);
    }
}
