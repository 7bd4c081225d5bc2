//! Guests that move between two real hosts, each with a libvirtd of its own, through sockets that the test joins.
//!
//! Skipped, with the reason, where `hypervisor_libvirt` is.
#![cfg(feature = "libvirt")]

use std::{
    fs,
    io::{self, Read, Write},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread,
};

use model::VmId;
use nodeagent::hypervisor::{
    contract::migration::{Pair, Side, run},
    migration::Route,
};

use host::Host;

#[path = "libvirt_host/host.rs"]
mod host;

#[test]
fn guests_move_between_hosts_as_the_contract_says() {
    let (Some(one), Some(two)) = (Host::start(1), Host::start(2)) else { return };
    let _joined = (join(&one, &two, VmId(17)), join(&two, &one, VmId(18)));
    let route = Route::new(Path::new("/run/moving"), VmId(17));
    let back = Route::new(Path::new("/run/moving"), VmId(18));
    run(&Pair {
        source: Side { open: &|| Box::new(one.open()), spec: &|vm| one.spec(vm) },
        destination: Side { open: &|| Box::new(two.open()), spec: &|vm| two.spec(vm) },
        vm: VmId(17),
        to_destination: &route,
        to_source: &back,
    });
}

/// The sockets of a route, on both sides: what is connected to on `source` is carried to `destination`.
fn join(source: &Host, destination: &Host, vm: VmId) {
    let folder = |host: &Host| host.dir.path().join("run/moving");
    for host in [source, destination] {
        fs::create_dir_all(folder(host)).unwrap();
    }
    let (from, to) = (Route::new(&folder(source), vm), Route::new(&folder(destination), vm));
    carry(from.control, destination.dir.path().join("run/libvirt/libvirt-sock"));
    carry(from.memory, to.memory);
    carry(from.disk, to.disk);
}

fn carry(from: PathBuf, to: PathBuf) {
    let listener = UnixListener::bind(&from).unwrap();
    // Ends with the process: a listener cannot be told to stop.
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(far) = UnixStream::connect(&to) else { continue };
            let (near_too, far_too) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            thread::spawn(move || pump(near, far));
            thread::spawn(move || pump(far_too, near_too));
        }
    });
}

fn pump(mut from: UnixStream, mut to: UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return to.shutdown(Shutdown::Write);
        }
        to.write_all(&buffer[..length])?;
    }
}
