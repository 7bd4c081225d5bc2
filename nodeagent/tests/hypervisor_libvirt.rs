//! The hypervisor's contract against a real libvirtd, private to the test: in namespaces of its own, as a host is.
//!
//! Needs root, libvirtd and QEMU; without them it prints `skipped: reason`. With TREFOIL_TEST_IMAGE naming a bootable
//! qcow2 image whose guest obeys ACPI, that is tested too; otherwise the disk is blank and its machine only runs a BIOS.
#![cfg(feature = "libvirt")]

use std::{
    path::PathBuf,
    process::Command,
    sync::{Arc, mpsc::channel},
    thread,
    time::Duration,
};

use model::{Capacity, Consistency, HypervisorKind, ImageFormat, VmId};
use nodeagent::hypervisor::{
    GuestPower, GuestSpec, Hypervisor, HypervisorError, OffReason,
    contract::{Subject, run},
    domain_xml::{backup_xml, domain_name},
    job::Job,
    qemu_process,
};
use storage::images::ImageStore;

use host::{CLUSTER, Host, shell, wait};

#[path = "libvirt_host/host.rs"]
mod host;

const PATIENCE: Duration = Duration::from_secs(180);

#[test]
fn libvirt_keeps_the_contract() {
    let Some(host) = Host::start(1) else { return };
    let h = host.open();
    println!("kind found by trying: {:?}", h.kind());
    assert_ne!(h.kind(), HypervisorKind::Simulated);
    let image = std::env::var_os("TREFOIL_TEST_IMAGE").map(PathBuf::from);
    println!("image: {image:?}");
    let shut_down = |vm: VmId| {
        // Behind the agent's back, as the guest's own decision comes.
        let name = domain_name(CLUSTER, vm);
        let _ = Command::new("virsh").args(["-q", "-c", &host.uri(), "shutdown", &name, "--mode", "acpi"]).output();
    };
    let shut_down: &dyn Fn(VmId) = &shut_down;
    run(&Subject {
        open: &|| Box::new(host.open()),
        spec: host.spec(17),
        dir: host.agent_dir(),
        crash: &|vm| host.kill_guest(vm),
        shut_down_inside: image.is_some().then_some(shut_down),
        hears_power_button: image.is_some(),
    });
}

#[test]
fn a_kind_that_works_is_seen_to_work() {
    let Some(host) = Host::start(1) else { return };
    let h = host.open();
    assert_eq!(h.try_kind(HypervisorKind::Qemu).unwrap(), Ok(()), "software emulation works everywhere");
    println!("KVM: {:?}", h.try_kind(HypervisorKind::Kvm).unwrap());
    assert_eq!(powers(&h), [], "trials are no guests");
    host.kill_libvirtd();
    assert!(matches!(h.try_kind(HypervisorKind::Qemu), Err(HypervisorError::Unreachable(_))), "nobody was asked");
}

#[test]
fn a_guest_reads_its_seed_and_writes_to_its_console() {
    if std::env::var_os("TREFOIL_TEST_IMAGE").is_none() {
        return println!("skipped: TREFOIL_TEST_IMAGE names no image");
    }
    let Some(host) = Host::start(1) else { return };
    let h = host.open();
    let user_data = "#!/bin/sh\necho \"the seed of $(hostname) was read\" > /dev/ttyS0\n".into();
    let spec = GuestSpec { user_data, ..host.spec(1) };
    h.make_disk(&spec).unwrap();
    h.start(&spec).unwrap();
    wait("the guest has run its user data", || {
        let console = h.console_log(VmId(1), 1 << 20).unwrap();
        String::from_utf8_lossy(&console).contains("the seed of web-1 was read")
    });
    let usage = h.usage().unwrap();
    println!("usage: {usage:?}");
    assert!(usage[0].1.cpu_time_millis > 0 && usage[0].1.disk_used_bytes > 0, "{usage:?}");
    h.remove(VmId(1)).unwrap();
}

#[test]
fn a_backup_of_a_running_guest_boots_and_holds_what_was_synced() {
    if std::env::var_os("TREFOIL_TEST_IMAGE").is_none() {
        return println!("skipped: TREFOIL_TEST_IMAGE names no image");
    }
    let Some(host) = Host::start(1) else { return };
    let h = host.open();
    let write = "#!/bin/sh\necho the-word > /data/word; sync; echo \"word written\" > /dev/ttyS0\n";
    let spec = GuestSpec { user_data: write.into(), ..host.spec(1) };
    h.make_disk(&spec).unwrap();
    h.start(&spec).unwrap();
    let console = |vm| String::from_utf8_lossy(&h.console_log(vm, 1 << 20).unwrap()).into_owned();
    wait("the guest has written", || console(VmId(1)).contains("word written"));
    let mut backup = h.back_up(VmId(1), None, &Job::new(PATIENCE)).unwrap();
    wait("the guest's agent answers", || {
        backup = h.back_up(VmId(1), None, &Job::new(PATIENCE)).unwrap();
        backup.consistency == Consistency::Frozen
    });
    println!("{backup:?}");
    let store = ImageStore::open(&host.agent_dir(), 0).unwrap();
    let held = store.adopt(&backup.file).unwrap();
    assert_eq!(held.size_bytes, backup.size_bytes);
    assert_eq!(powers(&h), [GuestPower::Running], "it was thawed and runs on");

    // An agent that died while the guest was frozen for a backup.
    let mut freeze = Command::new("virsh");
    freeze.args(["-q", "-c", &host.uri(), "domfsfreeze"]).arg(domain_name(CLUSTER, VmId(1)));
    assert!(freeze.status().unwrap().success());
    let record = host.agent_dir().join("vms/vm-1/guest.json");
    let text = std::fs::read_to_string(&record).unwrap();
    assert!(text.contains("\"frozen\":false"), "{text}");
    std::fs::write(&record, text.replace("\"frozen\":false", "\"frozen\":true")).unwrap();
    assert_eq!(powers(&host.open()), [GuestPower::Running]);
    assert!(std::fs::read_to_string(&record).unwrap().contains("\"frozen\":false"), "the next agent thawed it");

    // A machine made from the image alone, after the first and its base are gone.
    h.remove(VmId(1)).unwrap();
    std::fs::rename(host.dir.path().join("base.qcow2"), host.dir.path().join("gone.qcow2")).unwrap();
    let read = "#!/bin/sh\necho \"read: $(cat /data/word)\" > /dev/ttyS0\n";
    let base = store.verified(held.digest).unwrap();
    let restored = GuestSpec { user_data: read.into(), base, base_virtual_bytes: backup.virtual_bytes, ..host.spec(2) };
    h.make_disk(&restored).unwrap();
    h.start(&restored).unwrap();
    wait("the restored guest reads the word", || console(VmId(2)).contains("read: the-word"));
}

#[test]
fn a_backup_whose_agent_and_libvirtd_died_is_in_nobodys_way() {
    let Some(host) = Host::start(1) else { return };
    let h = host.open();
    // Large enough that it is not done before the kill.
    let base = host.dir.path().join("large.raw");
    shell(&format!("head -c 600M /dev/urandom > {}", base.display()));
    let spec = GuestSpec { base, base_format: ImageFormat::Raw, base_virtual_bytes: 600 << 20, ..host.spec(1) };
    h.make_disk(&spec).unwrap();
    h.start(&spec).unwrap();
    // As an agent leaves it that was killed in the middle: the job runs on in QEMU.
    let part = host.agent_dir().join("vms/vm-1/backup.part");
    let xml = host.dir.path().join("backup.xml");
    std::fs::write(&xml, backup_xml(&part, None)).unwrap();
    let virsh = |words: &[&str]| {
        let done = Command::new("virsh").args(["-q", "-c", &host.uri()]).args(words).output().unwrap();
        assert!(done.status.success(), "{words:?}: {done:?}");
        String::from_utf8_lossy(&done.stdout).into_owned()
    };
    let name = domain_name(CLUSTER, VmId(1));
    virsh(&["backup-begin", &name, &xml.to_string_lossy()]);
    assert!(virsh(&["domjobinfo", &name]).contains("Backup"), "it is under way");
    host.kill_libvirtd();
    host.start_libvirtd();
    println!("after libvirtd's restart: {}", virsh(&["domjobinfo", &name]).trim());
    let next = Arc::new(host.open());
    // The guard has stopped the guest meanwhile, so its QEMU answers nothing.
    let found = qemu_process::find_all(CLUSTER, &host.agent_dir()).unwrap();
    found[0].pause().unwrap();
    wait("every thread of it stands still", || found[0].is_paused().unwrap());
    let (tell, told) = channel();
    let looking = next.clone();
    thread::spawn(move || tell.send(powers(&*looking)));
    let seen = told.recv_timeout(Duration::from_secs(10));
    found[0].resume().unwrap();
    assert_eq!(seen, Ok(vec![GuestPower::Running]), "the next agent's first look does not wait for it");
    assert!(part.exists());
    assert_eq!(powers(&*next), [GuestPower::Running]);
    assert!(!part.exists(), "the next agent's look clears it away");
    assert!(virsh(&["domjobinfo", &name]).contains("None"), "and its job");
    next.back_up(VmId(1), None, &Job::new(PATIENCE)).unwrap();
}

#[test]
fn a_guest_is_stopped_while_libvirtd_hangs() {
    let Some(host) = Host::start(1) else { return };
    let h = host.open();
    let spec = host.spec(1);
    h.make_disk(&spec).unwrap();
    h.start(&spec).unwrap();
    let found = qemu_process::find_all(CLUSTER, &host.agent_dir()).unwrap();
    let [process] = &found[..] else { panic!("one process: {found:?}") };
    assert_eq!(
        (process.vm, process.epoch, Some(process.pid)),
        (VmId(1), Some(spec.epoch), host.guest_process(VmId(1)))
    );
    assert!(qemu_process::find_all("another", &host.agent_dir()).unwrap().is_empty(), "another cloud's agent");
    host.signal_libvirtd("STOP");
    process.pause().unwrap();
    wait("every thread of it stands still", || process.is_paused().unwrap());
    process.resume().unwrap();
    wait("it runs again", || !process.is_paused().unwrap());
    process.pause().unwrap();
    process.kill().unwrap();
    wait("its process has ended", || !process.is_alive());
    host.signal_libvirtd("CONT");
    wait("libvirt sees it", || powers(&h) == [GuestPower::Off(OffReason::Crashed)]);
    assert!(qemu_process::find_all(CLUSTER, &host.agent_dir()).unwrap().is_empty());
}

#[test]
fn guests_outlive_libvirtd_and_are_found_after_the_host_was_down() {
    let Some(mut host) = Host::start(1) else { return };
    let h = host.open();
    let spec = host.spec(1);
    h.make_disk(&spec).unwrap();
    h.start(&spec).unwrap();
    let process = host.guest_process(VmId(1)).expect("the guest's process");

    host.kill_libvirtd();
    assert!(matches!(h.guests(), Err(HypervisorError::Unreachable(_))), "no libvirtd says nothing about guests");
    assert!(matches!(h.power_off(VmId(1)), Err(HypervisorError::Unreachable(_))));
    host.start_libvirtd();
    assert_eq!(powers(&h), [GuestPower::Running], "the same agent finds it again");
    assert_eq!(powers(&host.open()), [GuestPower::Running], "another agent finds it");
    assert_eq!(host.guest_process(VmId(1)), Some(process), "it is the same process");

    host.kill_libvirtd();
    host.kill_guest(VmId(1));
    host.start_libvirtd();
    // libvirtd answers before it has tried its guests' monitors: until then it says what it last knew.
    wait("libvirtd sees that it died unseen", || powers(&h) == [GuestPower::Off(OffReason::Crashed)]);
    h.start(&spec).unwrap();
    h.power_off(VmId(1)).unwrap();
    host.kill_libvirtd();
    host.start_libvirtd();
    assert_eq!(powers(&h), [GuestPower::Off(OffReason::ByAgent)], "libvirtd forgets why, the agent does not");

    h.start(&spec).unwrap();
    host.power_failure();
    assert!(matches!(h.guests(), Err(HypervisorError::Unreachable(_))));
    host.boot();
    assert_eq!(powers(&host.open()), [GuestPower::Off(OffReason::Crashed)], "the host went down under it");
    h.start(&spec).unwrap();
    assert_eq!(powers(&h), [GuestPower::Running]);
    h.remove(VmId(1)).unwrap();
}

#[test]
fn what_cannot_start_says_why_and_leaves_no_guest() {
    let Some(host) = Host::start(1) else { return };
    let h = host.open();
    let mut spec = host.spec(2);
    spec.nics[0].bridge = "no-such-bridge".into();
    h.make_disk(&spec).unwrap();
    let error = h.start(&spec).unwrap_err();
    assert!(matches!(&error, HypervisorError::Transient(why) if why.contains("no-such-bridge")), "{error}");
    assert_eq!(powers(&h), []);
    let absurd = GuestSpec { size: Capacity { vcpus: 100_000, ..spec.size }, ..host.spec(2) };
    let error = h.start(&absurd).unwrap_err();
    println!("absurd CPUs: {error:?}");
    assert_eq!(powers(&h), []);
    h.remove(VmId(2)).unwrap();

    // A base that would show the guest a file of the host.
    let evil = host.dir.path().join("evil.qcow2");
    shell(&format!("qemu-img create -q -f qcow2 -F raw -b /etc/hostname {} 1M", evil.display()));
    let error = h.make_disk(&GuestSpec { base: evil, ..host.spec(3) }).unwrap_err();
    assert!(matches!(&error, HypervisorError::Permanent(why) if why.contains("backing file")), "{error}");
}

fn powers(h: &dyn Hypervisor) -> Vec<GuestPower> {
    h.guests().unwrap().iter().map(|guest| guest.power).collect()
}
