//! Both ends of a move.

use super::*;
use crate::{
    MoveEnd,
    command::{MoveOutcome, MoveReport},
};

const LEFT: &str = "report vm-1 has left for epoch 9";
const ARRIVED: &str = "report vm-1 has arrived for epoch 9";

fn end() -> Option<MoveEnd> {
    Some(MoveEnd { node: NodeId(2), address: "192.0.2.2:7480".into(), epoch: 9 })
}

/// The wish of the source.
fn going() -> Assignment {
    wish(vec![VmWish { moves: end(), ..vm(1, 7, Power::Running) }])
}

/// The wish of the destination.
fn coming() -> Assignment {
    wish(vec![VmWish { moves: end(), ..vm(1, 9, Power::Arriving) }])
}

fn told(mut found: Observed) -> Observed {
    let (phase, reason) = (Phase::Running, String::new());
    let report = VmReport { vm: VmId(1), epoch: 7, attempt: 0, phase, rebooted: 0, reason, retry: false };
    found.told.insert(VmId(1), Told { attempt: 0, power: Power::Running, report });
    found
}

fn tried(found: Observed) -> Observed {
    remembering(found, Memory { epoch: 7, ran: true, existed: true, leaving: Some(9), ..Memory::default() })
}

#[test]
fn it_goes_once_and_is_told_to_have_left_only_when_it_has() {
    let running = told(with(ready(), 7, FoundPower::Running));
    check(&going(), &running, &["send vm-1 away, for epoch 9"]);
    let mut under_way = tried(running.clone());
    under_way.leaving.insert(VmId(1));
    check(&going(), &under_way, &[]);
    let moved = told(tried(with(ready(), 7, FoundPower::Moved)));
    check(&going(), &moved, &[LEFT]);
    let report = MoveReport { vm: VmId(1), epoch: 9, outcome: MoveOutcome::Left };
    check(&going(), &Observed { told_moves: [(VmId(1), report)].into(), ..moved }, &[]);
}

/// The wish of the source for a machine that its owner has stopped.
fn stopped_goes() -> Assignment {
    wish(vec![VmWish { moves: end(), ..vm(1, 7, Power::Stopped) }])
}

fn told_off(mut found: Observed) -> Observed {
    let (phase, reason, retry) = (Phase::Stopped, String::new(), true);
    let report = VmReport { vm: VmId(1), epoch: 7, attempt: 0, phase, rebooted: 0, reason, retry };
    found.told.insert(VmId(1), Told { attempt: 0, power: Power::Stopped, report });
    found
}

#[test]
fn what_is_wished_stopped_goes_when_it_is_off_and_not_before() {
    for power in [FoundPower::OffByAgent, FoundPower::OffByGuest, FoundPower::Crashed] {
        check(&stopped_goes(), &told_off(with(ready(), 7, power)), &["send vm-1 away, for epoch 9"]);
    }
    check(&stopped_goes(), &told_off(with(ready(), 7, FoundPower::Running)), &["press power vm-1"]);
    check(&stopped_goes(), &told_off(tried(with(ready(), 7, FoundPower::Moved))), &[LEFT]);
    let failed = "report vm-1 has not moved for epoch 9: its agent began anew while it moved";
    check(&stopped_goes(), &told_off(tried(with(ready(), 7, FoundPower::OffByAgent))), &[failed]);
}

/// Its owner may want it on again, and nobody has heard yet that it is off.
#[test]
fn what_switched_itself_off_is_told_and_not_sent() {
    let off = told(with(ready(), 7, FoundPower::OffByGuest));
    check(&going(), &off, &["report vm-1 epoch 7 Stopped rebooted 0: the guest switched itself off"]);
}

#[test]
fn where_nothing_was_ever_made_there_is_nothing_that_could_leave() {
    let nothing = "report nothing is here of vm-1 that could leave for epoch 9";
    check(&stopped_goes(), &told_off(ready()), &[nothing]);
    // Its first start may still be under way.
    let begun = Memory { epoch: 7, begun: true, existed: true, ..Memory::default() };
    check(&stopped_goes(), &told_off(remembering(ready(), begun)), &["remove vm-1"]);
    let removed = Memory { begun: false, removed: true, ..begun };
    check(&stopped_goes(), &told_off(remembering(ready(), removed)), &[nothing]);
    check(&stopped_goes(), &told_off(with(ready(), 6, FoundPower::OffByAgent)), &["quarantine vm-1 epoch 6"]);
}

#[test]
fn what_a_machine_wrote_and_is_gone_is_no_machine_that_never_was() {
    let ran = Memory { epoch: 7, ran: true, existed: true, ..Memory::default() };
    let lost = "report vm-1 has not moved for epoch 9: it has run, and nothing of it is found here";
    check(&stopped_goes(), &told_off(remembering(ready(), ran)), &[lost]);
}

#[test]
fn a_second_try_is_another_move() {
    let running = told(tried(with(ready(), 7, FoundPower::Running)));
    let new = "report vm-1 has not moved for epoch 9: its agent began anew while it moved";
    check(&going(), &running, &[new]);
    let failed = Observed { moves_failed: [(VmId(1), (9, "no route".into()))].into(), ..running.clone() };
    check(&going(), &failed, &["report vm-1 has not moved for epoch 9: no route"]);
    let older = Observed { moves_failed: [(VmId(1), (8, "no route".into()))].into(), ..running };
    check(&going(), &older, &[new]);
}

#[test]
fn what_left_in_an_earlier_move_is_brought_back_before_it_goes_again() {
    let earlier = Memory { epoch: 7, ran: true, existed: true, leaving: Some(8), ..Memory::default() };
    for power in [FoundPower::Moved, FoundPower::Running] {
        check(&going(), &told(remembering(with(ready(), 7, power), earlier)), &["keep vm-1 here"]);
    }
    // Nobody remembers in which move it left.
    check(&going(), &told(with(ready(), 7, FoundPower::Moved)), &["keep vm-1 here"]);
}

/// The host lost its power after the guest had left, and has forgotten why it is off.
#[test]
fn what_may_have_left_is_not_started_before_the_move_is_given_up() {
    let gone = Memory { epoch: 7, ran: true, existed: true, disk_made: true, leaving: Some(9), ..Memory::default() };
    let failed = "report vm-1 has not moved for epoch 9: its agent began anew while it moved";
    for power in [FoundPower::Crashed, FoundPower::OffByAgent] {
        let off = told(remembering(with(ready(), 7, power), gone));
        check(&going(), &off, &[failed]);
        check(&wish(vec![vm(1, 7, Power::Running)]), &off, &["keep vm-1 here"]);
    }
    check(&going(), &told(remembering(ready(), gone)), &[]);
}

#[test]
fn what_is_given_up_goes_on_or_boots_where_it_was() {
    let stays = wish(vec![vm(1, 7, Power::Running)]);
    for power in [FoundPower::Moved, FoundPower::Running, FoundPower::Suspended] {
        check(&stays, &told(tried(with(ready(), 7, power))), &["keep vm-1 here"]);
    }
    let kept = Memory { epoch: 7, ran: true, existed: true, disk_made: true, ..Memory::default() };
    check(&stays, &told(remembering(with(ready(), 7, FoundPower::OffByAgent), kept)), &["start vm-1"]);
}

#[test]
fn a_guest_is_let_in_when_all_that_it_needs_is_here() {
    let fetch = format!("fetch image {}", image(1).digest);
    check(&coming(), &Observed::default(), &["ensure network net-1 vni 100", &fetch]);
    check(&coming(), &ready(), &["prepare for vm-1 to come"]);
    check(&coming(), &Observed { expected: [(VmId(1), 8)].into(), ..ready() }, &["prepare for vm-1 to come"]);
    let expected = Observed { expected: [(VmId(1), 9)].into(), ..ready() };
    check(&coming(), &expected, &[]);
    check(&coming(), &with(expected.clone(), 9, FoundPower::Arriving), &[]);
    check(&coming(), &with(expected.clone(), 9, FoundPower::Arrived), &[ARRIVED]);
    check(&coming(), &with(expected.clone(), 7, FoundPower::Crashed), &["quarantine vm-1 epoch 7"]);
    let down = "report vm-1 has not moved for epoch 9: what had come went down before it was handed over";
    check(&coming(), &with(expected, 9, FoundPower::Crashed), &[down]);
    let failing = failing(ready(), Subject::Vm(VmId(1)), FAILURES_BEFORE_REPORT, false);
    check(&coming(), &failing, &["report vm-1 has not moved for epoch 9: no luck"]);
}

#[test]
fn what_has_arrived_goes_on_only_when_it_was_handed_over() {
    let arrived = with(ready(), 9, FoundPower::Arrived);
    check(&wish(vec![vm(1, 9, Power::Running)]), &arrived, &["let vm-1 go on here"]);
    for power in [Power::Suspended, Power::Stopped] {
        let over = wish(vec![vm(1, 9, power)]);
        let lines: Vec<String> = steps(&over, &arrived).iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["take vm-1 over as it is"]);
    }
    check(&wish(vec![vm(1, 9, Power::Absent)]), &arrived, &["remove vm-1"]);
    check(&wish(vec![]), &arrived, &["quarantine vm-1 epoch 9"]);
}
