//! What two hypervisors must do with a guest that moves between them: the suite for the four calls of a migration.
//!
//! After every step both sides are asked, and it is on at one of them at most.

use std::fs;

use model::VmId;

use super::{
    super::{GuestPower, GuestSpec, Hypervisor, HypervisorError, OffReason, job::Job, migration::Route},
    PATIENCE,
    increments::keep,
};

/// Two hosts, and the ways between them.
pub struct Pair<'a> {
    pub source: Side<'a>,
    pub destination: Side<'a>,
    pub vm: VmId,
    pub to_destination: &'a Route,
    pub to_source: &'a Route,
}

pub struct Side<'a> {
    /// Makes the implementation anew, as an agent does that starts again.
    pub open: &'a dyn Fn() -> Box<dyn Hypervisor>,
    /// The guest as this host would make it; the suite fills in the placement.
    pub spec: &'a dyn Fn(u64) -> GuestSpec,
}

const MOVED: GuestPower = GuestPower::Off(OffReason::Moved);

/// # Panics
/// When a promise is broken.
pub fn run(pair: &Pair) {
    let (here, there) = ((pair.source.open)(), (pair.destination.open)());
    let (here, there) = (&*here, &*there);
    let vm = pair.vm;
    let first = pair.source.at(vm, 10);
    here.make_disk(&first).expect("make the disk");
    here.start(&first).expect("start");
    here.cancel_migration(vm).expect("there is nothing to give up");
    it_stays_when_it_cannot_go(pair, here, there);
    it_can_be_given_up_at_the_last_moment(pair, here, there);
    it_moves(pair, here, there);
    it_comes_back_suspended(pair, here, there);
    it_goes_as_it_lies_when_it_is_off(pair, here, there);
    there.remove(vm).expect("remove");
    both(here, there, vm, [None, None]);
}

fn it_stays_when_it_cannot_go(pair: &Pair, here: &dyn Hypervisor, there: &dyn Hypervisor) {
    let vm = pair.vm;
    let spec = pair.destination.at(vm, 11);
    let to = there.prepare_migration(&spec).expect("prepare");
    assert_eq!(to.epoch, 11);
    assert_eq!(there.prepare_migration(&spec).expect("prepare what is prepared"), to);
    both(here, there, vm, [Some(GuestPower::Running), None]);
    let (cancelled, late) = (Job::new(PATIENCE), Job::new(std::time::Duration::ZERO));
    cancelled.cancel();
    for job in [cancelled, late] {
        let moved = here.migrate(vm, &to, pair.to_destination, &job);
        assert!(matches!(moved, Err(HypervisorError::Transient(_))), "it ends when it must: {moved:?}");
        super::wait("the destination has forgotten it", || power(there, vm).is_none());
        both(here, there, vm, [Some(GuestPower::Running), None]);
    }
    there.remove(vm).expect("give up at the destination");
    let moved = here.migrate(vm, &to, pair.to_destination, &Job::new(PATIENCE));
    assert!(moved.is_err(), "nothing is prepared there");
    both(here, there, vm, [Some(GuestPower::Running), None]);
    here.cancel_migration(vm).expect("give up at the source");
    both(here, there, vm, [Some(GuestPower::Running), None]);
}

fn it_can_be_given_up_at_the_last_moment(pair: &Pair, here: &dyn Hypervisor, there: &dyn Hypervisor) {
    let vm = pair.vm;
    let spec = pair.destination.at(vm, 12);
    let to = there.prepare_migration(&spec).expect("prepare");
    here.migrate(vm, &to, pair.to_destination, &Job::new(PATIENCE)).expect("migrate");
    both(here, there, vm, [Some(MOVED), Some(GuestPower::Arrived)]);
    there.remove(vm).expect("give up at the destination");
    here.cancel_migration(vm).expect("give up at the source");
    here.cancel_migration(vm).expect("give up what was given up");
    both(here, there, vm, [Some(GuestPower::Off(OffReason::ByAgent)), None]);
    here.start(&pair.source.at(vm, 10)).expect("it boots from its disk");
    both(here, there, vm, [Some(GuestPower::Running), None]);
}

fn it_moves(pair: &Pair, here: &dyn Hypervisor, there: &dyn Hypervisor) {
    let vm = pair.vm;
    let spec = pair.destination.at(vm, 13);
    let to = there.prepare_migration(&spec).expect("prepare");
    assert!(there.finish_migration(&spec, true).is_err(), "nothing has come yet");
    let full = here.back_up(vm, None, &Job::new(PATIENCE)).expect("back up before it goes");
    let full = keep(here, vm, &full, &to.disk.with_file_name("kept"));
    here.migrate(vm, &to, pair.to_destination, &Job::new(PATIENCE)).expect("migrate");
    let arrived = [Some(MOVED), Some(GuestPower::Arrived)];
    both(here, there, vm, arrived);
    here.migrate(vm, &to, pair.to_destination, &Job::new(PATIENCE)).expect("migrate what has moved");
    assert_eq!(there.prepare_migration(&spec).expect("prepare what has arrived"), to);
    both(&*(pair.source.open)(), &*(pair.destination.open)(), vm, arrived);
    for (what, result) in [
        ("resume", there.resume(vm)),
        ("suspend", there.suspend(vm)),
        ("reset", there.reset(vm)),
        ("press power", there.press_power(vm)),
        ("start", there.start(&spec)),
        ("back up", there.back_up(vm, None, &Job::new(PATIENCE)).map(drop)),
        ("finish under another placement", there.finish_migration(&pair.destination.at(vm, 14), true)),
        ("back up what has gone", here.back_up(vm, None, &Job::new(PATIENCE)).map(drop)),
    ] {
        assert!(matches!(result, Err(HypervisorError::Transient(_))), "{what}: {result:?}");
    }
    both(here, there, vm, arrived);
    there.finish_migration(&spec, true).expect("finish");
    there.finish_migration(&spec, true).expect("finish what is finished");
    both(here, there, vm, [Some(MOVED), Some(GuestPower::Running)]);
    assert_eq!(there.guests().expect("guests")[0].epoch, 13, "under its new placement");
    here.remove(vm).expect("remove what has moved");
    both(here, there, vm, [None, Some(GuestPower::Running)]);
    let backup = there.back_up(vm, Some(&full), &Job::new(PATIENCE)).expect("back up where it is now");
    assert_eq!(backup.parent, None, "what it wrote over there is not known here: all of it");
}

fn it_comes_back_suspended(pair: &Pair, here: &dyn Hypervisor, there: &dyn Hypervisor) {
    let vm = pair.vm;
    let spec = pair.source.at(vm, 15);
    there.suspend(vm).expect("suspend");
    let to = here.prepare_migration(&spec).expect("prepare");
    there.migrate(vm, &to, pair.to_source, &Job::new(PATIENCE)).expect("migrate what is suspended");
    both(here, there, vm, [Some(GuestPower::Arrived), Some(MOVED)]);
    here.finish_migration(&spec, false).expect("finish without running");
    both(here, there, vm, [Some(GuestPower::Suspended), Some(MOVED)]);
    there.remove(vm).expect("remove what has moved");
    here.resume(vm).expect("resume what was handed over");
    both(here, there, vm, [Some(GuestPower::Running), None]);
    here.power_off(vm).expect("switch off");
    here.start(&spec).expect("it boots from the disk that came");
    both(here, there, vm, [Some(GuestPower::Running), None]);
}

fn it_goes_as_it_lies_when_it_is_off(pair: &Pair, here: &dyn Hypervisor, there: &dyn Hypervisor) {
    let vm = pair.vm;
    assert_eq!(here.disk_at_rest(vm).expect("ask for the disk of what runs"), None, "it goes as it runs");
    assert!(here.let_go(vm).is_err(), "it is on");
    here.power_off(vm).expect("switch off");
    let off = GuestPower::Off(OffReason::ByAgent);
    for (epoch, given_up) in [(16, true), (17, false)] {
        let spec = pair.destination.at(vm, epoch);
        let to = there.prepare_migration(&spec).expect("prepare");
        let disk = here.disk_at_rest(vm).expect("ask for the disk").expect("it is off");
        let came = to.disk.with_extension("coming");
        fs::copy(&disk, &came).expect("the agents bring it");
        assert!(there.take_in(&pair.destination.at(vm, epoch + 1), &came).is_err(), "under another placement");
        both(here, there, vm, [Some(off), None]);
        there.take_in(&spec, &came).expect("take in");
        there.take_in(&spec, &came).expect("take in what was taken in");
        both(here, there, vm, [Some(off), Some(GuestPower::Arrived)]);
        here.let_go(vm).expect("let go");
        here.let_go(vm).expect("let go what has gone");
        assert!(here.disk_at_rest(vm).is_err() && there.disk_at_rest(vm).is_err(), "it is moving");
        for (what, result) in [
            ("start", there.start(&spec)),
            ("resume", there.resume(vm)),
            ("back up", there.back_up(vm, None, &Job::new(PATIENCE)).map(drop)),
            ("back up what has gone", here.back_up(vm, None, &Job::new(PATIENCE)).map(drop)),
        ] {
            assert!(matches!(result, Err(HypervisorError::Transient(_))), "{what}: {result:?}");
        }
        let arrived = [Some(MOVED), Some(GuestPower::Arrived)];
        both(&*(pair.source.open)(), &*(pair.destination.open)(), vm, arrived);
        if given_up {
            there.remove(vm).expect("give up at the destination");
            here.cancel_migration(vm).expect("give up at the source");
            both(here, there, vm, [Some(off), None]);
            continue;
        }
        there.finish_migration(&spec, true).expect("finish; whether it runs is for a start to say");
        there.finish_migration(&spec, false).expect("finish what is finished");
        both(here, there, vm, [Some(MOVED), Some(off)]);
        here.remove(vm).expect("remove what has moved");
        there.start(&spec).expect("it boots from the disk that came");
        both(here, there, vm, [None, Some(GuestPower::Running)]);
    }
}

impl Side<'_> {
    fn at(&self, vm: VmId, epoch: u64) -> GuestSpec {
        GuestSpec { epoch, ..(self.spec)(vm.0) }
    }
}

#[track_caller]
fn both(here: &dyn Hypervisor, there: &dyn Hypervisor, vm: VmId, expected: [Option<GuestPower>; 2]) {
    assert_eq!([power(here, vm), power(there, vm)], expected, "the first host, the second");
}

fn power(h: &dyn Hypervisor, vm: VmId) -> Option<GuestPower> {
    h.guests().expect("guests").iter().find(|guest| guest.vm == vm).map(|guest| guest.power)
}
