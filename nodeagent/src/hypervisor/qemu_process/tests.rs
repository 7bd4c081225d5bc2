//! Processes that carry a guest's arguments and do nothing: what is taken for ours, and what a signal does to it.
//! Real ones are in `tests/hypervisor_libvirt.rs`.

use std::{
    fs,
    process::{Child, Command, Stdio},
    thread,
};

use super::*;
use crate::hypervisor::domain_xml::domain_name;

const PATIENCE: Duration = Duration::from_secs(60);

/// A shell that waits for ever, with what libvirt gives QEMU behind it. Ends with the test.
struct Guest(Child);

impl Guest {
    fn start(name: &str, uuid: &str, disk: &Path) -> Self {
        let blockdev = format!(r#"{{"driver":"file","filename":"{}","node-name":"n"}}"#, disk.display());
        let mut command = Command::new("sh");
        command.args(["-c", "while read -r line; do :; done", "qemu"]);
        command.args(["-name", &format!("guest={name},debug-threads=on"), "-uuid", uuid, "-blockdev", &blockdev]);
        // Its input stays open for as long as the test holds it.
        Self(command.stdin(Stdio::piped()).spawn().unwrap())
    }

    fn of(cluster: &str, vm: u64, dir: &Path) -> Self {
        let disk = dir.canonicalize().unwrap().join(format!("vms/vm-{vm}/disk.qcow2"));
        Self::start(&domain_name(cluster, VmId(vm)), &domain_uuid(cluster, VmId(vm)), &disk)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Between fork and exec a child has no arguments of its own yet.
fn find(dir: &Path, count: usize) -> Vec<QemuProcess> {
    let start = Instant::now();
    loop {
        let found = find_all("demo", dir).unwrap();
        if found.len() == count {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "{found:?} instead of {count} processes");
        thread::sleep(Duration::from_millis(5));
    }
}

fn wait(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn only_guests_of_this_cloud_and_this_agent_are_found() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let disk = |vm: u64| dir.path().canonicalize().unwrap().join(format!("vms/vm-{vm}/disk.qcow2"));
    let _others = [
        Guest::of("another", 1, dir.path()),
        Guest::of("demo", 2, other.path()),
        Guest::start(&domain_name("demo", VmId(3)), &domain_uuid("demo", VmId(4)), &disk(3)),
        Guest::start(&domain_name("demo", VmId(5)), &domain_uuid("demo", VmId(5)), &disk(6)),
        Guest::start("vm-7", &domain_uuid("demo", VmId(7)), &disk(7)),
    ];
    let ours = [Guest::of("demo", 9, dir.path()), Guest::of("demo", 8, dir.path())];
    fs::create_dir_all(dir.path().join("vms/vm-8")).unwrap();
    fs::write(dir.path().join("vms/vm-8/guest.json"), r#"{"vm": 8, "epoch": 4242, "more": []}"#).unwrap();
    let found = find(dir.path(), 2);
    let seen: Vec<_> = found.iter().map(|p| (p.vm, p.epoch, p.pid)).collect();
    assert_eq!(seen, [(VmId(8), Some(4242), ours[1].0.id()), (VmId(9), None, ours[0].0.id())]);
    assert!(found.iter().all(|p| p.start_time > 0));
}

#[test]
fn a_process_is_paused_resumed_and_killed_and_its_successor_never_meant() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::of("demo", 1, dir.path());
    let found = find(dir.path(), 1);
    let process = &found[0];
    assert!(!process.is_paused().unwrap());
    process.pause().unwrap();
    process.pause().unwrap();
    wait("it is paused", || process.is_paused().unwrap());
    assert_eq!(find(dir.path(), 1)[0].start_time, process.start_time, "a paused one is found");
    process.resume().unwrap();
    wait("it is resumed", || !process.is_paused().unwrap());
    process.pause().unwrap();
    assert!(process.is_alive());
    process.kill().unwrap();
    assert!(process.ended_within(PATIENCE), "a paused process is killed too");
    assert!(find_all("demo", dir.path()).unwrap().is_empty(), "one that was not collected yet is gone all the same");
    guest.0.wait().unwrap();
    process.kill().expect("what has ended is killed already");
    for gone in [process.pause(), process.resume(), process.is_paused().map(drop)] {
        assert_eq!(gone.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
