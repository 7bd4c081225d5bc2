//! Increments on a real libvirtd with a real guest: much smaller than a full copy, enough to make the machine again on
//! another host, and refused when a file of the chain is damaged or names what it should not.
//!
//! Needs root, libvirtd, QEMU and TREFOIL_TEST_IMAGE; without them it prints `skipped: reason`.
#![cfg(feature = "libvirt")]

use std::{fs, process::Command, time::Duration};

use model::{Consistency, VmId};
use nodeagent::hypervisor::{
    Backup, GuestPower, GuestSpec, Hypervisor, HypervisorError, OffReason, Parent, domain_xml::domain_name, job::Job,
    libvirt::Libvirt, qcow2,
};
use storage::images::{Held, ImageError, ImageStore};

use host::{CLUSTER, Host, shell, wait};

#[path = "libvirt_host/host.rs"]
mod host;

const PATIENCE: Duration = Duration::from_secs(180);
const VM: VmId = VmId(1);

fn back_up(h: &Libvirt, parent: Option<&Parent>) -> Backup {
    let backup = h.back_up(VM, parent, &Job::new(PATIENCE)).unwrap();
    println!("{backup:?}");
    backup
}

/// As the agent does with one.
fn keep(h: &Libvirt, store: &ImageStore, backup: &Backup) -> (Held, Parent) {
    let held = store.adopt(&backup.file).unwrap();
    h.backed_up(VM, held.digest).unwrap();
    let parent = Parent { digest: held.digest, file: store.verified(held.digest).unwrap() };
    (held, parent)
}

/// Has the guest run a line, by its agent, and waits until its console says that it did.
fn run_inside(host: &Host, h: &Libvirt, line: &str, said: &str) {
    let script = format!("{line}; sync; echo {said} > /dev/ttyS0");
    let call = format!(r#"{{"execute":"guest-exec","arguments":{{"path":"/bin/sh","arg":["-c","{script}"]}}}}"#);
    let mut virsh = Command::new("virsh");
    virsh.args(["-q", "-c", &host.uri(), "qemu-agent-command", &domain_name(CLUSTER, VM), &call]);
    wait("the guest's agent takes a command", || virsh.output().unwrap().status.success());
    wait(said, || String::from_utf8_lossy(&h.console_log(VM, 1 << 20).unwrap()).contains(said));
}

#[test]
fn a_machine_is_made_again_on_another_host_from_a_chain_of_increments() {
    if std::env::var_os("TREFOIL_TEST_IMAGE").is_none() {
        return println!("skipped: TREFOIL_TEST_IMAGE names no image");
    }
    let (Some(host), Some(other)) = (Host::start(1), Host::start(2)) else { return };
    let h = host.open();
    let store = ImageStore::open(&host.agent_dir(), 0).unwrap();
    h.make_disk(&host.spec(1)).unwrap();
    h.start(&host.spec(1)).unwrap();
    run_inside(&host, &h, "echo one > /data/one", "first-written");
    let mut full = back_up(&h, None);
    wait("the guest's agent answers", || {
        full = back_up(&h, None);
        full.consistency == Consistency::Frozen
    });
    let (full, parent) = keep(&h, &store, &full);
    run_inside(&host, &h, "echo two > /data/two; rm /data/one", "second-written");
    let second = back_up(&h, Some(&parent));
    assert_eq!((second.parent, second.consistency), (Some(full.digest), Consistency::Frozen));
    let (second, parent) = keep(&h, &store, &second);
    run_inside(&host, &h, "echo three > /data/three", "third-written");
    let (third, newest) = keep(&h, &store, &back_up(&h, Some(&parent)));
    for increment in [&second, &third] {
        assert!(increment.size_bytes * 4 < full.size_bytes, "{increment:?} is not much smaller than {full:?}");
    }

    // A guest that was killed left broken counts.
    host.kill_guest(VM);
    let crashed = GuestPower::Off(OffReason::Crashed);
    wait("the crash is seen", || h.guests().unwrap().iter().all(|guest| guest.power == crashed));
    h.start(&host.spec(1)).unwrap();
    assert_eq!(back_up(&h, Some(&newest)).parent, None, "a full copy after a crash");
    h.remove(VM).unwrap();

    let there = ImageStore::open(&other.agent_dir(), 0).unwrap();
    for held in [&full, &second, &third] {
        let came = other.dir.path().join("came");
        fs::copy(store.verified(held.digest).unwrap(), &came).unwrap();
        assert_eq!(there.adopt(&came).unwrap().digest, held.digest);
    }
    let o = other.open();
    let read =
        "#!/bin/sh\necho \"read: $(cat /data/two /data/three | tr '\\n' ' ')$(ls /data/one 2>&1)\" > /dev/ttyS0\n";
    let made_again = GuestSpec {
        user_data: read.into(),
        base: there.verified(third.digest).unwrap(),
        base_parents: vec![second.digest, full.digest],
        base_virtual_bytes: 1 << 30,
        ..other.spec(1)
    };
    o.make_disk(&made_again).unwrap();
    o.start(&made_again).unwrap();
    let console = || String::from_utf8_lossy(&o.console_log(VM, 1 << 20).unwrap()).into_owned();
    wait("the machine that was made again reads what was written", || console().contains("read: two three "));
    assert!(console().contains("/data/one: No such file"), "and does not find what was deleted: {}", console());
    let bases = o.bases().unwrap();
    assert!([&full, &second, &third].iter().all(|held| bases.iter().any(|b| b.ends_with(held.digest.to_string()))));
    o.remove(VM).unwrap();

    // A middle that is damaged is found, and one that names another file of the host is not followed.
    let middle = there.verified(second.digest).unwrap();
    shell(&format!("chmod u+w {0} && printf X | dd of={0} bs=1 seek=70000 conv=notrunc status=none", middle.display()));
    assert!(matches!(there.verified(second.digest), Err(ImageError::Damaged { .. })));
    assert!(!middle.exists(), "nobody comes to stand on it");
    assert!(matches!(o.make_disk(&made_again), Err(HypervisorError::Permanent(_))));
    fs::copy(store.verified(second.digest).unwrap(), &middle).unwrap();
    shell(&format!("chmod u+w {0} && qemu-img rebase -u -f qcow2 -F raw -b /etc/hostname {0}", middle.display()));
    assert!(qcow2::chain_is(&made_again.base, &made_again.base_parents).is_err());
    let error = o.make_disk(&made_again).unwrap_err();
    assert!(matches!(&error, HypervisorError::Permanent(why) if why.contains("/etc/hostname")), "{error}");
}
