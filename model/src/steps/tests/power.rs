//! Off: the button, the plug, and whose doing it was.

use super::*;

#[test]
fn stopping_is_the_button_then_the_plug() {
    let mut wish = wish(vec![vm(1, 7, Power::Stopped)]);
    let running = with(ready(), 7, FoundPower::Running);
    check(&wish, &running, &["press power vm-1"]);
    let pressed = |first: u64, last: u64| {
        let at = |ago: u64| Some(1_000_000 - ago);
        Memory { epoch: 7, pressed_first_millis: at(first), pressed_last_millis: at(last), ..Memory::default() }
    };
    check(&wish, &remembering(running.clone(), pressed(9_999, 9_999)), &[]);
    check(&wish, &remembering(running.clone(), pressed(10_000, 10_000)), &["press power vm-1"]);
    check(&wish, &remembering(running.clone(), pressed(29_999, 1)), &[]);
    check(&wish, &remembering(running.clone(), pressed(30_000, 1)), &["power off vm-1"]);
    check(&wish, &with(ready(), 7, FoundPower::Suspended), &["resume vm-1"]);
    for off in [FoundPower::OffByGuest, FoundPower::OffByAgent, FoundPower::Crashed] {
        check(&wish, &with(ready(), 7, off), &["report vm-1 epoch 7 Stopped rebooted 0"]);
        // By the time this is read its owner may want it on again.
        let told = steps(&wish, &with(ready(), 7, off));
        assert!(told.iter().all(|step| matches!(step, Step::Report(report) if report.retry)), "{told:?}");
    }
    wish.vms[0].stop_grace_millis = 0;
    check(&wish, &running, &["power off vm-1"]);
    check(&wish, &with(ready(), 7, FoundPower::Suspended), &["power off vm-1"]);
}
