//! Rehearsals of backups on a real libvirtd with real guests: what is proof of life, what is not, and that nothing stays.
//!
//! Needs root, libvirtd, QEMU and TREFOIL_TEST_IMAGE; without them it prints `skipped: reason`.
#![cfg(feature = "libvirt")]

use std::{process::Command, sync::Arc, thread, time::Duration};

use model::{ImageFormat, ImageId, Verdict, VmId};
use nodeagent::hypervisor::{
    GuestSpec, Hypervisor,
    domain_xml::rehearsal_name,
    job::Job,
    qemu_process,
    rehearsal::{Rehearsal, Rehearsed},
};

use host::{CLUSTER, Host, shell, wait};

#[path = "libvirt_host/host.rs"]
mod host;

const PATIENCE: Duration = Duration::from_secs(240);

fn rehearsal(host: &Host, limit: Duration, expect: &str) -> Rehearsal {
    let spec = GuestSpec { nics: vec![], ..host.spec(1) };
    Rehearsal { image: ImageId(4), spec, limit, expect: expect.into() }
}

fn domains(host: &Host) -> String {
    let listed = Command::new("virsh").args(["-q", "-c", &host.uri(), "list", "--all", "--name"]).output().unwrap();
    String::from_utf8_lossy(&listed.stdout).trim().to_owned()
}

#[track_caller]
fn check(host: &Host, rehearsed: &Rehearsed, verdict: Verdict, reason: &str) {
    println!("{rehearsed:?}");
    assert_eq!(rehearsed.verdict, verdict, "{rehearsed:?}");
    assert!(rehearsed.reason.contains(reason), "{rehearsed:?}");
    assert_eq!(domains(host), "", "its domain is gone");
    let left = std::fs::read_dir(host.agent_dir().join("rehearsals")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "and its files");
}

#[test]
fn a_guest_that_comes_up_is_told_from_one_that_does_not() {
    if std::env::var_os("TREFOIL_TEST_IMAGE").is_none() {
        return println!("skipped: TREFOIL_TEST_IMAGE names no image");
    }
    let Some(host) = Host::start(1) else { return };
    let h = host.open();
    let job = || Job::new(2 * PATIENCE);

    let good = h.rehearse(&rehearsal(&host, PATIENCE, ""), &job()).unwrap();
    check(&host, &good, Verdict::Booted, "its guest agent answered");
    let said = h.rehearse(&rehearsal(&host, PATIENCE, "TREFOIL-READY"), &job()).unwrap();
    check(&host, &said, Verdict::Booted, "TREFOIL-READY");

    // A disk that nothing can be booted from.
    let blank = host.dir.path().join("blank.raw");
    shell(&format!("truncate -s 45M {}", blank.display()));
    let mut nothing = rehearsal(&host, Duration::from_secs(15), "");
    (nothing.spec.base, nothing.spec.base_format) = (blank, ImageFormat::Raw);
    let nothing = h.rehearse(&nothing, &job()).unwrap();
    check(&host, &nothing, Verdict::Failed, "nothing was booted");

    // It boots, and nobody can tell: that is said, and not called well.
    let mute = h.rehearse(&rehearsal(&host, Duration::from_secs(2), "never said"), &job()).unwrap();
    assert_ne!(mute.verdict, Verdict::Booted);
}

#[test]
fn a_rehearsal_is_nobodys_guest_and_ends_with_its_agent_or_at_the_next_ones_look() {
    let Some(host) = Host::start(1) else { return };
    let h = Arc::new(host.open());
    let job = Arc::new(Job::new(PATIENCE));
    let begun = {
        let (h, job, rehearsal) = (h.clone(), job.clone(), rehearsal(&host, PATIENCE, "never said"));
        thread::spawn(move || h.rehearse(&rehearsal, &job))
    };
    let name = rehearsal_name(CLUSTER, ImageId(4));
    // A domain is listed while it is still being started, and a libvirtd that dies then ends it at its return; a question
    // about its disk is answered after the start only.
    let uri = host.uri();
    let started = || Command::new("virsh").args(["-q", "-c", &uri, "domblkstat", &name]).output().unwrap();
    wait("it is on", || domains(&host) == name && started().status.success());
    assert_eq!(h.guests().unwrap(), [], "it is no guest");
    let known = qemu_process::find_all(CLUSTER, &host.agent_dir()).unwrap();
    assert!(known.is_empty(), "the guard does not know it: {known:?}");
    let plugged = Command::new("virsh").args(["-q", "-c", &host.uri(), "domiflist", &name]).output().unwrap();
    assert!(plugged.status.success(), "{plugged:?}");
    assert_eq!(String::from_utf8_lossy(&plugged.stdout).trim(), "", "it is in no network");

    // libvirtd dies, and with it what it knows of whose the domain is; the next agent's first look clears it away.
    host.kill_libvirtd();
    host.start_libvirtd();
    assert_eq!(domains(&host), name, "it outlives libvirtd");
    job.cancel();
    assert!(begun.join().unwrap().is_err());
    let next = host.open();
    assert_eq!(next.guests().unwrap(), []);
    assert_eq!(domains(&host), "");
    assert_eq!(next.console_log(VmId(1), 100).unwrap(), b"");
}
