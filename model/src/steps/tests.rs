//! Steps at their edges, and a small world in which they must always come to rest.

use std::net::Ipv4Addr;

use proptest::prelude::*;

use super::*;
use crate::{Capacity, ImageFormat, ImageWish, Mac, NetworkId, NetworkWish, NicWish, NodeId};

mod backup;
mod moving;
mod power;

fn image(n: u8) -> ImageWish {
    ImageWish {
        digest: Digest([n; 32]),
        format: ImageFormat::Raw,
        size_bytes: 1,
        virtual_bytes: 1,
        sources: vec![],
        parents: vec![],
    }
}

fn vm(id: u64, epoch: u64, power: Power) -> VmWish {
    VmWish {
        vm: VmId(id),
        epoch,
        request: crate::RequestId::default(),
        attempt: 0,
        power,
        backup: None,
        moves: None,
        recovery: Recovery::default(),
        stop_grace_millis: 30_000,
        reboots: 0,
        tenant: "acme".into(),
        name: "web".into(),
        size: Capacity::default(),
        image: image(1),
        nics: vec![NicWish { network: NetworkId(1), vni: 100, mac: Mac::default(), ip: Ipv4Addr::LOCALHOST }],
        ssh_keys: vec![],
        user_data: String::new(),
    }
}

fn network(vni: u32) -> NetworkWish {
    NetworkWish { network: NetworkId(1), vni, range: "10.0.0.0/24".parse().unwrap(), peers: vec![], leases: vec![] }
}

fn wish(vms: Vec<VmWish>) -> Assignment {
    let networks = if vms.is_empty() { vec![] } else { vec![network(100)] };
    let (cluster, node, images, rehearsals) = ("c".into(), NodeId(1), vec![], vec![]);
    Assignment { cluster, node, incarnation: 1, generation: 5, vms, networks, images, rehearsals, spared: None }
}

/// A host on which image and network are there.
fn ready() -> Observed {
    Observed {
        now_millis: 1_000_000,
        networks: [(100, true)].into(),
        images: [(image(1).digest, 0)].into(),
        ..Observed::default()
    }
}

fn with(mut found: Observed, epoch: u64, power: FoundPower) -> Observed {
    found.guests.insert(VmId(1), FoundGuest { epoch, power });
    found
}

fn remembering(mut found: Observed, memory: Memory) -> Observed {
    found.memories.insert(VmId(1), memory);
    found
}

fn failing(mut found: Observed, subject: Subject, count: u32, permanent: bool) -> Observed {
    let failure = Failure { count, not_before_millis: 0, permanent, generation: 5, reason: "no luck".into() };
    found.failures.insert(subject, failure);
    found
}

/// What the steps are, one line each.
fn check(wish: &Assignment, found: &Observed, expected: &[&str]) {
    let lines: Vec<String> = steps(wish, found).iter().map(ToString::to_string).collect();
    assert_eq!(lines, expected);
}

#[test]
fn a_new_machine_gets_its_image_and_network_then_a_disk_then_starts() {
    let wish = wish(vec![vm(1, 7, Power::Running)]);
    let fetch = format!("fetch image {}", image(1).digest);
    check(&wish, &Observed::default(), &["ensure network net-1 vni 100", &fetch]);
    check(&wish, &ready(), &["make disk vm-1"]);
    let made = remembering(ready(), Memory { epoch: 7, disk_made: true, ..Memory::default() });
    check(&wish, &made, &["start vm-1"]);
    let bare = Observed { networks: [(100, false)].into(), ..made };
    check(&wish, &bare, &["ensure network net-1 vni 100"]);
    let started = remembering(with(ready(), 7, FoundPower::Running), Memory { epoch: 7, ..Memory::default() });
    check(&wish, &started, &["report vm-1 epoch 7 Running rebooted 0"]);
}

#[test]
fn a_disk_of_an_earlier_placement_is_not_this_ones() {
    let found = remembering(ready(), Memory { epoch: 6, disk_made: true, ..Memory::default() });
    check(&wish(vec![vm(1, 7, Power::Running)]), &found, &["make disk vm-1"]);
}

#[test]
fn a_machine_that_has_run_never_gets_another_disk() {
    let wish = wish(vec![vm(1, 7, Power::Running)]);
    let ran = Memory { epoch: 7, ran: true, existed: true, ..Memory::default() };
    check(&wish, &remembering(ready(), ran), &["check disk vm-1"]);
    check(&wish, &with(ready(), 7, FoundPower::OffByAgent), &["check disk vm-1"]);
    let failed = failing(remembering(ready(), ran), Subject::Vm(VmId(1)), 1, true);
    check(&wish, &failed, &["report vm-1 epoch 7 Failed rebooted 0: no luck"]);
    // Wished off before its first start, it came to be without a disk.
    let never = Memory { ran: false, ..ran };
    check(&wish, &remembering(ready(), never), &["make disk vm-1"]);
}

#[test]
fn a_guest_of_an_older_epoch_is_kept_aside_and_one_of_a_newer_epoch_is_let_alone() {
    let wish = wish(vec![vm(1, 7, Power::Running)]);
    check(&wish, &with(ready(), 6, FoundPower::Running), &["quarantine vm-1 epoch 6"]);
    check(&wish, &with(ready(), 8, FoundPower::Running), &[]);
}

#[test]
fn a_guest_in_no_wish_is_kept_aside_and_its_networks_go_after_it() {
    let nothing = wish(vec![]);
    check(&nothing, &with(ready(), 6, FoundPower::Running), &["quarantine vm-1 epoch 6"]);
    check(&nothing, &ready(), &["remove network vni 100"]);
}

#[test]
fn absent_removes_even_an_older_epoch_and_is_reported_when_nothing_is_left() {
    let wish = wish(vec![vm(1, 7, Power::Absent)]);
    check(&wish, &with(ready(), 6, FoundPower::Running), &["remove vm-1"]);
    check(&wish, &ready(), &["remove vm-1"]);
    let removed = remembering(ready(), Memory { epoch: 7, removed: true, ..Memory::default() });
    check(&wish, &removed, &["report vm-1 epoch 7 Absent rebooted 0"]);
}

#[test]
fn a_guest_that_switched_itself_off_is_reported_and_not_started() {
    let wish = wish(vec![vm(1, 7, Power::Running)]);
    let off = with(ready(), 7, FoundPower::OffByGuest);
    let line = "report vm-1 epoch 7 Stopped rebooted 0: the guest switched itself off";
    check(&wish, &off, &[line]);
    let Some(Step::Report(report)) = steps(&wish, &off).pop() else { panic!("no report") };
    assert!(!report.retry);
    // Its owner knew that it was off, and wants it on now.
    let known = Memory { epoch: 7, disk_made: true, wished_off: true, ..Memory::default() };
    check(&wish, &remembering(off, known), &["start vm-1"]);
}

#[test]
fn a_guest_that_crashed_is_started_again_and_given_up_after_some_failures() {
    let wish = wish(vec![vm(1, 7, Power::Running)]);
    let memory = Memory { epoch: 7, disk_made: true, existed: true, ..Memory::default() };
    let found = remembering(with(ready(), 7, FoundPower::Crashed), memory);
    check(&wish, &found, &["start vm-1 after a crash"]);
    let found = failing(found, Subject::Vm(VmId(1)), FAILURES_BEFORE_REPORT, false);
    check(&wish, &found, &["report vm-1 epoch 7 Failed rebooted 0: no luck"]);
}

#[test]
fn what_failed_is_left_alone_until_another_attempt_is_asked_for() {
    let mut wish = wish(vec![vm(1, 7, Power::Running)]);
    let memory = Memory { epoch: 7, disk_made: true, existed: true, ..Memory::default() };
    let mut found = failing(remembering(ready(), memory), Subject::Vm(VmId(1)), FAILURES_BEFORE_REPORT, false);
    let Some(Step::Report(report)) = steps(&wish, &found).pop() else { panic!("no report") };
    assert!(report.retry);
    found.told.insert(VmId(1), Told { attempt: 0, power: Power::Running, report });
    check(&wish, &found, &[]);
    found.failures.clear();
    check(&wish, &found, &[]);
    wish.vms[0].attempt = 1;
    check(&wish, &found, &["start vm-1"]);
}

#[test]
fn a_wish_that_needs_nothing_done_is_answered_too() {
    let mut wish = wish(vec![vm(1, 7, Power::Running)]);
    let mut found = remembering(with(ready(), 7, FoundPower::Running), Memory { epoch: 7, ..Memory::default() });
    let Some(Step::Report(report)) = steps(&wish, &found).pop() else { panic!("no report") };
    // It was asked to stop and to run again before it did anything.
    found.told.insert(VmId(1), Told { attempt: 0, power: Power::Stopped, report });
    check(&wish, &found, &["report vm-1 epoch 7 Running rebooted 0"]);
    found.told.get_mut(&VmId(1)).unwrap().power = Power::Running;
    check(&wish, &found, &[]);
    wish.vms[0].attempt = 1;
    check(&wish, &found, &["report vm-1 epoch 7 Running rebooted 0"]);
}

#[test]
fn of_a_machine_that_never_came_to_be_nothing_is_left_when_it_is_given_up() {
    let wish = wish(vec![vm(1, 7, Power::Running)]);
    let memory = Memory { epoch: 7, begun: true, ..Memory::default() };
    let found = failing(remembering(ready(), memory), Subject::Vm(VmId(1)), 1, true);
    check(&wish, &found, &["remove vm-1"]);
    let found = remembering(found, Memory { removed: true, begun: false, ..memory });
    check(&wish, &found, &["report vm-1 epoch 7 Failed rebooted 0: no luck"]);
    let Some(Step::Report(report)) = steps(&wish, &found).pop() else { panic!("no report") };
    assert!(!report.retry);
}

#[test]
fn clearing_up_after_a_failure_does_not_touch_what_an_older_placement_left() {
    let found = failing(with(ready(), 6, FoundPower::Running), Subject::Vm(VmId(1)), 1, true);
    check(&wish(vec![vm(1, 7, Power::Running)]), &found, &["report vm-1 epoch 7 Failed rebooted 0: no luck"]);
}

#[test]
fn a_machine_fails_with_the_reason_of_what_it_waits_for() {
    let wish = wish(vec![vm(1, 7, Power::Running)]);
    for (subject, missing) in [
        (Subject::Image(image(1).digest), Observed { images: BTreeMap::new(), ..ready() }),
        (Subject::Network(100), Observed { networks: BTreeMap::new(), ..ready() }),
    ] {
        let found = failing(missing, subject, FAILURES_BEFORE_REPORT, false);
        let lines: Vec<String> = steps(&wish, &found).iter().map(ToString::to_string).collect();
        assert!(lines.contains(&"report vm-1 epoch 7 Failed rebooted 0: no luck".to_owned()), "{lines:?}");
    }
}

#[test]
fn a_pause_after_a_failure_is_kept_and_a_permanent_failure_waits_for_another_assignment() {
    let mut wish = wish(vec![vm(1, 7, Power::Absent)]);
    let mut found = failing(ready(), Subject::Vm(VmId(1)), 1, false);
    check(&wish, &found, &["remove vm-1"]);
    found.failures.get_mut(&Subject::Vm(VmId(1))).unwrap().not_before_millis = found.now_millis + 1;
    check(&wish, &found, &[]);
    let found = failing(ready(), Subject::Vm(VmId(1)), 1, true);
    check(&wish, &found, &["report vm-1 epoch 7 Failed rebooted 0: no luck"]);
    wish.generation += 1;
    check(&wish, &found, &["remove vm-1", "report vm-1 epoch 7 Failed rebooted 0: no luck"]);
}

#[test]
fn a_reboot_is_done_once_and_a_start_does_all_that_were_asked_for() {
    let mut wish = wish(vec![vm(1, 7, Power::Running)]);
    wish.vms[0].reboots = 3;
    let done = |rebooted| Memory { epoch: 7, disk_made: true, rebooted, ..Memory::default() };
    let running = with(ready(), 7, FoundPower::Running);
    check(&wish, &remembering(running.clone(), done(1)), &["reset vm-1 for reboot 3"]);
    check(&wish, &remembering(running.clone(), done(3)), &["report vm-1 epoch 7 Running rebooted 3"]);
    // Nobody remembers it: it is taken as it is.
    check(&wish, &running, &["report vm-1 epoch 7 Running rebooted 3"]);
    let off = remembering(with(ready(), 7, FoundPower::OffByGuest), done(1));
    assert_eq!(steps(&wish, &off), [Step::Start { vm: VmId(1), reboots: 3, after_crash: false }]);
}

#[test]
fn an_unwanted_blob_goes_when_it_is_idle_and_nothing_stands_on_it() {
    let nothing = wish(vec![]);
    let digest = image(9).digest;
    let idle = Observed { images: [(digest, IMAGE_IDLE_MILLIS)].into(), ..Observed::default() };
    check(&nothing, &idle, &[&format!("drop image {digest}")]);
    check(&nothing, &Observed { images: [(digest, IMAGE_IDLE_MILLIS - 1)].into(), ..Observed::default() }, &[]);
    check(&nothing, &Observed { pinned_images: [digest].into(), ..idle.clone() }, &[]);
    check(&Assignment { images: vec![image(9)], ..nothing.clone() }, &idle, &[&format!("report image {digest} good")]);
}

#[test]
fn a_replica_is_reported_when_it_is_good_and_when_it_is_lost() {
    let keep = Assignment { images: vec![image(9)], ..wish(vec![]) };
    let digest = image(9).digest;
    let lost = Observed { told_images: [(digest, true)].into(), ..Observed::default() };
    check(&keep, &lost, &[&format!("fetch image {digest}"), &format!("report image {digest} lost")]);
    check(&keep, &Observed::default(), &[&format!("fetch image {digest}")]);
    let given_up = failing(Observed::default(), Subject::Image(digest), FAILURES_BEFORE_REPORT, false);
    check(&keep, &given_up, &[&format!("fetch image {digest}"), &format!("report image {digest} lost")]);
}

#[test]
fn an_assignment_from_the_past_is_refused() {
    let seen = Seen { generation: 5, epochs: [(VmId(1), 7)].into() };
    let new = wish(vec![vm(1, 7, Power::Running)]);
    assert_eq!(accept(&seen, &new), Ok(()));
    let stale = accept(&seen, &Assignment { generation: 4, ..new.clone() }).unwrap_err();
    assert_eq!(stale.to_string(), "assignment 4 is older than assignment 5, which this host has obeyed");
    let stale = accept(&seen, &Assignment { generation: 6, ..wish(vec![vm(1, 6, Power::Running)]) }).unwrap_err();
    assert_eq!(stale, Stale::Epoch { generation: 6, vm: VmId(1), seen: 7, new: 6 });
}

/// A host that does what it is told, except that the first few steps fail.
struct World {
    found: Observed,
    wish: Assignment,
    failures_left: u32,
    kept_aside: Vec<(VmId, u64)>,
    resets: BTreeMap<VmId, u32>,
}

impl World {
    /// Looks, acts on everything, and lets time pass; false when there was nothing to do.
    fn round(&mut self) -> bool {
        self.found.now_millis += 5_000;
        let todo = steps(&self.wish, &self.found);
        for step in &todo {
            match step.subject() {
                Some(subject) if self.failures_left > 0 => {
                    self.failures_left -= 1;
                    let known = self.found.failures.get(&subject).map_or(0, |failure| failure.count);
                    let reason = "no luck".to_owned();
                    let failure =
                        Failure { count: known + 1, not_before_millis: 0, permanent: false, generation: 5, reason };
                    self.found.failures.insert(subject, failure);
                }
                subject => {
                    // Clearing up is no success of what failed.
                    if !matches!(step, Step::Remove(_)) {
                        subject.map(|subject| self.found.failures.remove(&subject));
                    }
                    self.act(step);
                }
            }
        }
        let waiting = self.found.memories.values().any(|memory| memory.pressed_first_millis.is_some());
        !todo.is_empty() || waiting
    }

    fn act(&mut self, step: &Step) {
        let found = &mut self.found;
        let epochs: BTreeMap<VmId, u64> = self.wish.vms.iter().map(|wish| (wish.vm, wish.epoch)).collect();
        let epoch = |vm: &VmId| epochs[vm];
        match step {
            Step::FetchImage(image) => drop(found.images.insert(image.digest, 0)),
            Step::DropImage(digest) => drop(found.images.remove(digest)),
            Step::EnsureNetwork(network) => drop(found.networks.insert(network.vni, true)),
            Step::RemoveNetwork(vni) => {
                assert!(found.guests.keys().all(|vm| epochs.contains_key(vm)), "a guest may be plugged into it");
                found.networks.remove(vni);
            }
            Step::MakeDisk(vm) => {
                let memory = self.memory(*vm, epoch(vm));
                assert!(!memory.ran, "a machine that has run gets no blank disk");
                (memory.begun, memory.disk_made, memory.removed) = (true, true, false);
            }
            Step::CheckDisk(vm) => self.memory(*vm, epoch(vm)).disk_made = true,
            Step::Start { vm, reboots, .. } => {
                assert!(found.images.contains_key(&image(1).digest) && found.networks.get(&100) == Some(&true));
                found.guests.insert(*vm, FoundGuest { epoch: epoch(vm), power: FoundPower::Running });
                let memory = self.memory(*vm, epoch(vm));
                assert!(memory.disk_made, "a guest needs a disk");
                (memory.rebooted, memory.wished_off, memory.removed) = (*reboots, false, false);
                (memory.existed, memory.ran) = (true, true);
            }
            Step::Suspend(vm) => self.power(*vm, FoundPower::Suspended),
            Step::Resume(vm) => self.power(*vm, FoundPower::Running),
            Step::PressPower(vm) => {
                let now = found.now_millis;
                let memory = self.memory(*vm, epoch(vm));
                memory.pressed_first_millis.get_or_insert(now);
                memory.pressed_last_millis = Some(now);
                // Guests with an odd number ignore the button.
                if vm.0 % 2 == 0 {
                    self.power(*vm, FoundPower::OffByAgent);
                }
            }
            Step::PowerOff(vm) | Step::CancelMigration(vm) => self.power(*vm, FoundPower::OffByAgent),
            Step::FinishMigration { vm, run: true } => self.power(*vm, FoundPower::Running),
            Step::FinishMigration { vm, run: false } => self.power(*vm, FoundPower::Suspended),
            Step::PrepareMigration(_) | Step::Migrate { .. } | Step::ReportMove(_) => panic!("nothing moves: {step}"),
            Step::Reset { vm, reboots } => {
                *self.resets.entry(*vm).or_default() += 1;
                self.memory(*vm, epoch(vm)).rebooted = *reboots;
            }
            Step::Remove(vm) => {
                found.guests.remove(vm);
                let memory = self.memory(*vm, epoch(vm));
                (memory.removed, memory.begun, memory.disk_made, memory.ran) = (true, false, false, false);
            }
            Step::Quarantine { vm, epoch } => {
                found.guests.remove(vm);
                self.kept_aside.push((*vm, *epoch));
            }
            Step::Report(report) => self.hear(report),
            Step::ReportImage(report) => drop(found.told_images.insert(report.digest, report.good)),
            Step::BackUp { vm, number, .. } => {
                let (vm, epoch, outcome) = (*vm, epoch(vm), Err("no space".into()));
                found.backups.insert(vm, BackupReport { vm, epoch, number: *number, outcome });
            }
            Step::ReportBackup(report) => drop(found.told_backups.insert(report.vm, report.number)),
            Step::Rehearse { .. } | Step::ReportRehearsal(_) => unreachable!("no rehearsal is wished here"),
        }
    }

    /// The quorum's part: try again what failed, and take a guest's own end as the owner's will.
    fn hear(&mut self, report: &VmReport) {
        let wish = self.wish.vms.iter_mut().find(|wish| wish.vm == report.vm).unwrap();
        let told = Told { attempt: wish.attempt, power: wish.power, report: report.clone() };
        self.found.told.insert(report.vm, told);
        if report.phase == Phase::Failed {
            wish.attempt += 1;
            self.found.failures.clear();
        } else if report.phase == Phase::Stopped && wish.power != Power::Stopped {
            wish.power = Power::Stopped;
        }
    }

    fn power(&mut self, vm: VmId, power: FoundPower) {
        self.found.guests.get_mut(&vm).expect("it is told to a guest that is here").power = power;
        if power == FoundPower::OffByAgent
            && let Some(memory) = self.found.memories.get_mut(&vm)
        {
            (memory.pressed_first_millis, memory.pressed_last_millis) = (None, None);
        }
    }

    fn memory(&mut self, vm: VmId, epoch: u64) -> &mut Memory {
        let guest = self.found.guests.get(&vm).is_some_and(|guest| guest.epoch == epoch);
        let reboots = self.wish.vms.iter().find(|wish| wish.vm == vm).map_or(0, |wish| wish.reboots);
        let memory = self.found.memories.entry(vm).or_default();
        if memory.epoch != epoch {
            let rebooted = if guest { reboots } else { 0 };
            *memory = Memory { epoch, existed: guest, ran: guest, rebooted, ..Memory::default() };
        }
        memory
    }

    /// The host is what the assignment says.
    fn check_wish(&self) {
        for wish in &self.wish.vms {
            let guest = self.found.guests.get(&wish.vm);
            assert!(guest.is_none_or(|guest| guest.epoch == wish.epoch));
            let power = guest.map(|guest| guest.power);
            let good = match wish.power {
                Power::Running => power == Some(FoundPower::Running),
                Power::Suspended => power == Some(FoundPower::Suspended),
                Power::Stopped => !matches!(power, Some(FoundPower::Running | FoundPower::Suspended)),
                Power::Absent | Power::Arriving => power.is_none(),
            };
            assert!(good, "{} is {power:?}, wished {:?}", wish.vm, wish.power);
            assert_ne!(self.found.told.get(&wish.vm).map(|told| told.report.phase), Some(Phase::Failed));
        }
        for vm in self.found.guests.keys() {
            assert!(self.wish.vms.iter().any(|wish| wish.vm == *vm), "{vm} is in no wish");
        }
        let wanted: Vec<u32> = self.wish.networks.iter().map(|network| network.vni).collect();
        assert_eq!(self.found.networks.keys().copied().collect::<Vec<_>>(), wanted);
    }
}

fn power() -> impl Strategy<Value = Power> {
    prop_oneof![Just(Power::Running), Just(Power::Suspended), Just(Power::Stopped), Just(Power::Absent)]
}

fn found_power() -> impl Strategy<Value = FoundPower> {
    use FoundPower::{Arrived, Crashed, Moved, OffByAgent, OffByGuest, Running, Suspended};
    let on = prop_oneof![Just(Running), Just(Suspended), Just(Arrived)];
    prop_oneof![on, Just(Moved), Just(OffByGuest), Just(OffByAgent), Just(Crashed)]
}

proptest! {
    #[test]
    fn the_steps_come_to_rest_at_the_wish(
        wishes in proptest::collection::btree_map(0u64..6, (2u64..4, power(), 0u32..3, 0u64..40_000), 0..6),
        guests in proptest::collection::btree_map(0u64..6, (1u64..4, found_power()), 0..6),
        networks in proptest::collection::btree_map(prop_oneof![Just(100u32), Just(999)], any::<bool>(), 0..3),
        failures_left in 0u32..30,
    ) {
        let mut vms = Vec::new();
        for (id, (epoch, power, reboots, grace)) in wishes {
            // `accept` refuses a wish that is older than a guest.
            let epoch = guests.get(&id).map_or(epoch, |(found, _)| epoch.max(*found));
            vms.push(VmWish { reboots, stop_grace_millis: grace, ..vm(id, epoch, power) });
        }
        let guests: BTreeMap<_, _> =
            guests.into_iter().map(|(id, (epoch, power))| (VmId(id), FoundGuest { epoch, power })).collect();
        let unwished: BTreeSet<_> = guests.iter().filter(|(id, guest)| {
            vms.iter().find(|wish| wish.vm == **id).is_none_or(|wish| wish.power != Power::Absent && wish.epoch > guest.epoch)
        }).map(|(id, guest)| (*id, guest.epoch)).collect();
        let found = Observed { now_millis: 1, guests, networks, ..Observed::default() };
        let mut world = World { found, wish: wish(vms), failures_left, kept_aside: vec![], resets: BTreeMap::new() };
        let rested = (0..200).any(|_| !world.round());
        prop_assert!(rested, "still busy: {:?}", steps(&world.wish, &world.found));
        prop_assert_eq!(steps(&world.wish, &world.found), vec![]);
        world.check_wish();
        prop_assert_eq!(world.kept_aside.into_iter().collect::<BTreeSet<_>>(), unwished, "exactly the unwished are kept aside");
        prop_assert!(world.resets.values().all(|n| *n <= 1));
    }
}
