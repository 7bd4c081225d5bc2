//! The contract, and what only the simulation does: failures by seed, a control file, an effect log.

use std::fs;

use model::{ImageFormat, Mac, NetworkId};

use super::*;
use crate::{
    hypervisor::{
        GuestNic, GuestPower,
        contract::{Subject, migration, run},
    },
    lease::{Machine, Standing},
};

fn config(dir: &std::path::Path) -> SimulatedConfig {
    SimulatedConfig {
        dir: dir.into(),
        cluster: "demo".into(),
        host: "node-1".into(),
        capacity: Capacity { vcpus: 4, memory_bytes: 8 << 30, disk_bytes: 100 << 30 },
        delay_permille: 0,
        failure_permille: 0,
        seed: 7,
        effects: Some(dir.join("effects")),
    }
}

fn spec(vm: u64) -> GuestSpec {
    GuestSpec {
        cluster: "demo".into(),
        vm: VmId(vm),
        epoch: 10,
        tenant: "acme".into(),
        hostname: "web-1".into(),
        size: Capacity { vcpus: 1, memory_bytes: 96 << 20, disk_bytes: 1 << 30 },
        base: "/images/base".into(),
        base_format: ImageFormat::Qcow2,
        base_parents: vec![],
        base_virtual_bytes: 45 << 20,
        nics: vec![],
        ssh_keys: vec![],
        user_data: String::new(),
    }
}

#[test]
fn the_simulation_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let open = || Simulated::open(config(dir.path())).unwrap();
    let control = |what: &str, vm: VmId| {
        let part = dir.path().join("part");
        fs::write(&part, format!("{{\"{what}\": [\"{vm}\"]}}")).unwrap();
        fs::rename(part, dir.path().join(Control::FILE)).unwrap();
    };
    run(&Subject {
        open: &|| Box::new(open()),
        spec: spec(17),
        dir: dir.path().into(),
        crash: &|vm| control("crash", vm),
        shut_down_inside: Some(&|vm| control("shut_down", vm)),
        hears_power_button: true,
    });
    let effects = fs::read_to_string(dir.path().join("effects")).unwrap();
    let lines: Vec<serde_json::Value> = effects.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let started = lines.iter().find(|line| line["effect"] == "start").unwrap();
    assert_eq!((&started["host"], &started["vm"], &started["epoch"]), (&"node-1".into(), &"vm-17".into(), &10.into()));
    assert!(lines.is_sorted_by_key(|line| line["time_ns"].as_u64().unwrap()), "one clock: {effects}");
    for kind in ["start", "suspend", "resume", "stop", "remove"] {
        assert!(lines.iter().any(|line| line["effect"] == kind), "no {kind} in {effects}");
    }
}

#[test]
fn simulated_guests_move_as_the_contract_says() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let effects = one.path().join("effects");
    let open = |dir: &std::path::Path, host: &str| {
        Simulated::open(SimulatedConfig { host: host.into(), effects: Some(effects.clone()), ..config(dir) }).unwrap()
    };
    let route = Route::new(one.path(), VmId(17));
    migration::run(&migration::Pair {
        source: migration::Side { open: &|| Box::new(open(one.path(), "node-1")), spec: &spec },
        destination: migration::Side { open: &|| Box::new(open(two.path(), "node-2")), spec: &spec },
        vm: VmId(17),
        to_destination: &route,
        to_source: &route,
    });
    // Never on at two hosts, in the order in which it happened.
    let effects = fs::read_to_string(&effects).unwrap();
    let mut on = std::collections::BTreeSet::new();
    for line in effects.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()) {
        let host = line["host"].as_str().unwrap().to_owned();
        match line["effect"].as_str().unwrap() {
            "start" | "resume" => drop(on.insert(host)),
            _ => drop(on.remove(&host)),
        }
        assert!(on.len() <= 1, "{effects}");
    }
}

#[test]
fn a_guest_may_ignore_its_button_and_a_power_failure_ends_all() {
    let dir = tempfile::tempdir().unwrap();
    let h = Simulated::open(config(dir.path())).unwrap();
    for vm in [1, 2] {
        h.make_disk(&spec(vm)).unwrap();
        h.start(&spec(vm)).unwrap();
    }
    h.ignore_power_button(VmId(1)).unwrap();
    h.press_power(VmId(1)).unwrap();
    h.press_power(VmId(2)).unwrap();
    let powers = |h: &Simulated| h.guests().unwrap().iter().map(|g| g.power).collect::<Vec<_>>();
    assert_eq!(powers(&h), [GuestPower::Running, GuestPower::Off(OffReason::ByAgent)]);
    fs::write(dir.path().join(Control::FILE), "{\"power_failure\": true}").unwrap();
    assert_eq!(powers(&h), [GuestPower::Off(OffReason::Crashed), GuestPower::Off(OffReason::ByAgent)]);
    fs::write(dir.path().join(Control::FILE), "{\"crash\": [\"everything\"]}").unwrap();
    assert_eq!(h.guests().unwrap().len(), 2, "nonsense is dropped");
    assert!(!dir.path().join(Control::FILE).exists());
}

#[test]
fn guests_of_an_earlier_boot_of_the_machine_are_dead() {
    let dir = tempfile::tempdir().unwrap();
    let h = Simulated::open(config(dir.path())).unwrap();
    h.make_disk(&spec(1)).unwrap();
    h.start(&spec(1)).unwrap();
    h.change(VmId(1), |guest| guest.boot = "another".into()).unwrap();
    let found = Simulated::open(config(dir.path())).unwrap().guests().unwrap();
    assert_eq!(found[0].power, GuestPower::Off(OffReason::Crashed));
}

#[test]
fn failures_come_as_often_as_asked_and_the_seed_decides_which() {
    let failures = |seed| {
        let dir = tempfile::tempdir().unwrap();
        let config = SimulatedConfig { failure_permille: 300, seed, effects: None, ..config(dir.path()) };
        let h = Simulated::open(config).unwrap();
        (0..200).map(|vm| h.make_disk(&spec(vm)).is_err()).collect::<Vec<_>>()
    };
    assert_eq!(failures(1), failures(1));
    assert_ne!(failures(1), failures(2));
    let count = failures(1).iter().filter(|failed| **failed).count();
    assert!((30..90).contains(&count), "{count} of 200 at 30 %");
}

#[test]
fn whatever_it_backs_says_simulated() {
    let dir = tempfile::tempdir().unwrap();
    let h = Simulated::open(config(dir.path())).unwrap();
    h.make_disk(&spec(1)).unwrap();
    assert_eq!(h.kind(), HypervisorKind::Simulated);
    assert!(String::from_utf8(h.console_log(VmId(1), 1000).unwrap()).unwrap().contains("simulated"));
    assert_eq!(h.console_log(VmId(1), 3).unwrap().len(), 3);
    let status = h.node_status().unwrap();
    assert_eq!((status.cpu_permille, status.memory_total_bytes), (0, 8 << 30));
}

#[test]
fn from_outside_a_guest_is_on_until_the_power_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(outside::guests(dir.path()).unwrap(), []);
    let h = Simulated::open(config(dir.path())).unwrap();
    for vm in [1, 2] {
        h.make_disk(&spec(vm)).unwrap();
        h.start(&spec(vm)).unwrap();
    }
    h.suspend(VmId(2)).unwrap();
    let mut seen = outside::guests(dir.path()).unwrap();
    seen.sort_by_key(|seen| seen.vm);
    let on = |vm, paused| outside::Seen { vm: VmId(vm), paused };
    assert_eq!(seen, [on(1, false), on(2, true)]);
    drop(h);
    outside::cut_power(dir.path()).unwrap();
    assert_eq!(outside::guests(dir.path()).unwrap(), []);
    let found = Simulated::open(config(dir.path())).unwrap().guests().unwrap();
    assert!(found.iter().all(|guest| guest.power == GuestPower::Off(OffReason::Crashed)), "{found:?}");
}

#[test]
fn a_guest_that_may_not_run_has_stopped_at_the_end_of_the_lease_whoever_was_there_to_see_it() {
    let dir = tempfile::tempdir().unwrap();
    let h = Simulated::open(config(dir.path())).unwrap();
    let nic = GuestNic { network: NetworkId(1), mac: Mac([2, 0, 0, 0, 0, 9]), bridge: "tfb1".into(), mtu: 1450 };
    let spec = GuestSpec { nics: vec![nic], ..spec(1) };
    h.make_disk(&spec).unwrap();
    h.start(&spec).unwrap();
    let machines = vec![Machine { vm: VmId(1), epoch: 10, standing: Standing::Leased }];
    let until = clock::boottime_nanos();
    let permit = Permit { incarnation: 1, until, machines };
    let ended = now_nanos();
    h.enforce(&permit, until - 1).unwrap();
    // The agent is held up.
    let late = until + 60_000_000_000;
    h.enforce(&permit, late).unwrap();
    h.enforce(&Permit { until: late + 1, ..permit }, late).unwrap();
    let effects = fs::read_to_string(dir.path().join("effects")).unwrap();
    let lines: Vec<serde_json::Value> = effects.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kinds: Vec<_> = lines.iter().map(|line| line["effect"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["start", "pause", "continue"], "{effects}");
    let paused = lines[1]["time_ns"].as_u64().unwrap();
    assert!(paused <= ended && paused >= lines[0]["time_ns"].as_u64().unwrap(), "{effects}");
    assert_eq!(lines[0]["macs"], serde_json::json!(["02:00:00:00:00:09"]), "it has its address while it is on");
}
