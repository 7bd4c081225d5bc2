//! Who may come in, and that bytes come through as they went in.

use super::*;

/// What the tests here need of it: whose it is, and under which placement.
pub fn spec() -> GuestSpec {
    GuestSpec {
        cluster: "c".into(),
        vm: VmId(1),
        epoch: 7,
        tenant: "acme".into(),
        hostname: "web".into(),
        size: model::Capacity { vcpus: 1, memory_bytes: 1 << 30, disk_bytes: 1 << 30 },
        base: "/images/base".into(),
        base_format: model::ImageFormat::Qcow2,
        base_virtual_bytes: 1 << 20,
        base_parents: vec![],
        nics: vec![],
        ssh_keys: vec![],
        user_data: String::new(),
    }
}

fn arrival() -> Arrival {
    let destination =
        Destination { epoch: 7, disk: "/d".into(), seed: "/s".into(), console: "/c".into(), bridges: vec![] };
    Arrival { source: NodeId(3), spec: spec(), destination }
}

#[test]
fn the_door_is_open_to_the_source_of_an_expected_guest_alone() {
    let arrivals = Arrivals::new("/run/x".into(), None);
    arrivals.expect(VmId(1), arrival());
    let find = |vm: &str, epoch, peer: Option<&str>| {
        let found = arrivals.find(vm, epoch, peer.map(String::from));
        found.map(|(_, arrival)| arrival.destination).map_err(|status| ApiError::from(status).code)
    };
    assert_eq!(find("vm-1", 7, Some("node-3")), Ok(arrival().destination));
    for (vm, epoch, peer, code) in [
        ("vm-1", 7, None, "unauthenticated"),
        ("vm-1", 7, Some("node-4"), "forbidden"),
        ("vm-1", 7, Some("controller-3"), "forbidden"),
        ("vm-1", 6, Some("node-3"), "not-found"),
        ("vm-2", 7, Some("node-3"), "not-found"),
        ("1", 7, Some("node-3"), "invalid-argument"),
    ] {
        assert_eq!(find(vm, epoch, peer), Err(code.to_owned()), "{vm} {epoch} {peer:?}");
    }
    arrivals.retain(&[(VmId(1), 7)].into());
    assert_eq!(arrivals.epochs(), [(VmId(1), 7)].into());
    arrivals.retain(&[(VmId(1), 8)].into());
    let closed = arrivals.find("vm-1", 7, Some("node-3".into())).unwrap_err();
    assert_eq!(ApiError::from(closed).code, "not-found");
    assert!(arrivals.socket(VmId(1), RelayChannel::Control).is_err(), "no libvirtd here");
    assert!(arrivals.socket(VmId(1), RelayChannel::Unspecified).is_err());
}

#[test]
fn a_uri_says_which_socket_libvirtd_has() {
    for (uri, socket) in [
        ("qemu:///system", Some("/run/libvirt/libvirt-sock")),
        ("qemu+unix:///system?socket=/x/sock", Some("/x/sock")),
        ("qemu+unix:///system?mode=direct&socket=/x/sock", Some("/x/sock")),
        ("qemu+tls://host/system", None),
        ("test:///default", None),
    ] {
        assert_eq!(control_socket(uri), socket.map(PathBuf::from), "{uri}");
    }
    assert!(socket_dir("demo").to_string_lossy().len() < 60, "a socket's path is short");
}
