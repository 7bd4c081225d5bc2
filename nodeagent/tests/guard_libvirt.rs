//! The guard against real QEMU processes while libvirtd hangs, and what becomes of a guest that it has stopped.
//!
//! Needs root, libvirtd and QEMU; without them it prints `skipped: reason`.
#![cfg(feature = "libvirt")]

use std::{
    fs,
    sync::{Arc, mpsc::channel},
    thread::{self, sleep},
    time::{Duration, Instant},
};

use model::VmId;
use nodeagent::{
    clock,
    hypervisor::{GuestPower, Hypervisor, OffReason, quarantine},
    lease::{Machine, Permit, Standing, page::Page},
};

use host::{CLUSTER, Host, wait};
use parts::{Process, join, state};

#[path = "libvirt_host/host.rs"]
mod host;
#[path = "guard_host/parts.rs"]
mod parts;

const SECOND: u64 = 1_000_000_000;
/// As `Host::spec` has it.
const EPOCH: u64 = 4242;

#[test]
fn guests_stop_with_libvirtd_hung_and_one_that_was_given_away_is_set_aside_at_once() {
    let Some(host) = Host::start(1) else { return };
    let h = Arc::new(host.open());
    for vm in [1, 2] {
        h.make_disk(&host.spec(vm)).unwrap();
        h.start(&host.spec(vm)).unwrap();
    }
    let processes = [1, 2].map(|vm| host.guest_process(VmId(vm)).expect("the guest's process"));
    let page = Page::open(&host.agent_dir()).unwrap();
    permit(&page, 60 * SECOND, [Standing::Leased, Standing::Leased]);
    join(CLUSTER, &host.agent_dir());
    let _guard = Process::guard(&host.agent_dir());
    wait("the guard works", || page.sign().is_some_and(|sign| sign.is_fresh(clock::boottime_nanos())));

    assert!(host.inside("kill -STOP $(cat /run/libvirtd.pid)").status().unwrap().success());
    let until = permit(&page, 2 * SECOND, [Standing::Leased, Standing::Leased]);
    let mut last_run = 0;
    wait("both are stopped", || {
        let now = clock::boottime_nanos();
        let all_stopped = processes.iter().all(|pid| is_stopped(*pid));
        last_run = if all_stopped { last_run } else { now };
        sleep(Duration::from_millis(2));
        all_stopped
    });
    assert!(last_run < until + SECOND, "seen to run {} ms after the end", (last_run - until) / 1_000_000);
    println!("last seen to run {:.1} ms after the end of the lease", (last_run as f64 - until as f64) / 1e6);
    assert!(host.inside("kill -CONT $(cat /run/libvirtd.pid)").status().unwrap().success());
    let powers = || h.guests().unwrap().iter().map(|guest| guest.power).collect::<Vec<_>>();
    assert_eq!(powers(), [GuestPower::Running; 2], "libvirt has not noticed");
    let (tell, told) = channel();
    let sampling = h.clone();
    thread::spawn(move || tell.send(sampling.usage().unwrap()));
    assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(vec![]), "nobody waits for an answer of theirs");
    let console = host.agent_dir().join("vms/vm-1/console.log");
    fs::write(&console, vec![b'x'; 5 << 20]).unwrap();
    h.bound_consoles().unwrap();
    assert_eq!(fs::metadata(&console).unwrap().len(), 0);

    permit(&page, 60 * SECOND, [Standing::Denied, Standing::Leased]);
    wait("the one that is still ours goes on", || !is_stopped(processes[1]));
    assert!(is_stopped(processes[0]));
    let begun = Instant::now();
    h.quarantine(VmId(1)).unwrap();
    println!("set aside after {} ms", begun.elapsed().as_millis());
    assert_eq!(host.guest_process(VmId(1)), None);
    let kept = quarantine::list(&host.agent_dir()).unwrap();
    assert_eq!(kept.iter().map(|kept| (kept.vm, kept.epoch)).collect::<Vec<_>>(), [(VmId(1), EPOCH)]);
    assert!(kept[0].path.join("disk.qcow2").exists() && kept[0].bytes > 0, "{kept:?}");

    permit(&page, 0, [Standing::Denied, Standing::Leased]);
    wait("it is stopped again", || is_stopped(processes[1]));
    h.power_off(VmId(2)).unwrap();
    assert_eq!(powers(), [GuestPower::Off(OffReason::ByAgent)]);
}

/// Gives the end of the lease.
fn permit(page: &Page, lasts: u64, standings: [Standing; 2]) -> u64 {
    let machine = |(vm, standing)| Machine { vm: VmId(vm), epoch: EPOCH, standing };
    let until = clock::boottime_nanos() + lasts;
    page.write(&Permit { incarnation: 1, until, machines: (1..).zip(standings).map(machine).collect() });
    until
}

fn is_stopped(pid: u32) -> bool {
    state(pid) == Some('T')
}
