//! What the machines of a cloud on this machine do in truth, many times a second, by the monotonic clock: a thread of its
//! own, so that nothing that waits holds it up. What is looked at is in `lab::homes`.

use std::{
    process::{Command, Stdio},
    sync::Arc,
    thread::JoinHandle,
    time::Instant,
};

use super::{
    record::Record,
    timeline::{HomeChange, Looks},
};
use crate::lab::{
    Cloud,
    homes::{Eyes, Homes, LOOK_EVERY, changes},
};

/// Looks until the record is over.
///
/// # Errors
/// When no thread can be started.
pub fn watch(cloud: &Cloud, record: Arc<Record>) -> std::io::Result<JoinHandle<()>> {
    let mut eyes = Eyes::of(cloud);
    std::thread::Builder::new().name("truth".into()).spawn(move || {
        look_first();
        let mut before = Homes::new();
        let mut last = Instant::now();
        while !record.is_over() {
            let looked = Instant::now();
            let now = eyes.look();
            let (at_micros, gap) = (record.at(looked), record.at(looked) - record.at(last));
            let mut timeline = record.see();
            for (vm, host, run) in changes(&before, &now) {
                timeline.homes.push(HomeChange { at_micros, vm: vm.into(), host: host.into(), run });
            }
            let Looks { count, longest_gap_micros } = timeline.looks;
            timeline.looks = Looks { count: count + 1, longest_gap_micros: longest_gap_micros.max(gap) };
            drop(timeline);
            (before, last) = (now, looked);
            std::thread::sleep(LOOK_EVERY.saturating_sub(looked.elapsed()));
        }
    })
}

/// Who looks must not wait for those who are looked at. Without the right to it, it is looked as often as the machine
/// allows, and the report says how often that was.
fn look_first() {
    let thread = nix::unistd::gettid().to_string();
    let mut renice = Command::new("renice");
    let _ = renice.args(["-n", "-15", "-p", &thread]).stdout(Stdio::null()).stderr(Stdio::null()).status();
}
