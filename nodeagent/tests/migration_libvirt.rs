//! Guests that move between two real hosts, each with a libvirtd of its own: through sockets that the test joins, and
//! through the agents' own connection.
//!
//! Skipped, with the reason, where `hypervisor_libvirt` is.
#![cfg(feature = "libvirt")]

use std::{
    fs,
    io::{self, Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use api::{
    proto::node_data_client::NodeDataClient,
    tls::{CertificateAuthority, Identity},
};
use model::{NodeId, VmId};
use nodeagent::{
    agent::serve_data,
    hypervisor::{
        GuestPower, GuestSpec, Hypervisor, HypervisorError, OffReason,
        contract::migration::{Pair, Side, run},
        job::Job,
        libvirt::Libvirt,
        migration::Route,
    },
    network::simulated::SimulatedNetwork,
    relay::{self, Arrival, Arrivals, Departure},
};
use storage::images::ImageStore;
use tokio::{net::TcpListener, runtime::Runtime};
use tonic::transport::Channel;

use host::{CLUSTER, Host, wait};

#[path = "libvirt_host/host.rs"]
mod host;

const VM: VmId = VmId(17);
const PATIENCE: Duration = Duration::from_secs(180);
const MOVED: GuestPower = GuestPower::Off(OffReason::Moved);
/// Where libvirt and QEMU see the sockets, on every host.
const SOCKETS: &str = "/run/moving";

#[test]
fn guests_move_between_hosts_as_the_contract_says() {
    let (Some(one), Some(two)) = (Host::start(1), Host::start(2)) else { return };
    join(&one, &two, VM);
    join(&two, &one, VmId(18));
    let (route, back) = (Route::new(Path::new(SOCKETS), VM), Route::new(Path::new(SOCKETS), VmId(18)));
    run(&Pair {
        source: Side { open: &|| Box::new(one.open()), spec: &|vm| one.spec(vm) },
        destination: Side { open: &|| Box::new(two.open()), spec: &|vm| two.spec(vm) },
        vm: VM,
        to_destination: &route,
        to_source: &back,
    });
}

#[test]
fn a_booted_guest_goes_on_where_it_was_through_the_agents_own_connection() {
    if std::env::var_os("TREFOIL_TEST_IMAGE").is_none() {
        return println!("skipped: TREFOIL_TEST_IMAGE names no image");
    }
    let (Some(one), Some(two)) = (Host::start(1), Host::start(2)) else { return };
    let cloud = Cloud::new(one, two);
    let user_data = "#!/bin/sh\ni=0; while :; do i=$((i+1)); echo \"tick $i\" > /dev/ttyS0; sleep 0.1; done\n";
    let spec = GuestSpec { epoch: 10, user_data: user_data.into(), ..cloud.one.host.spec(VM.0) };
    let (here, there) = (&cloud.one.hypervisor, &cloud.two.hypervisor);
    here.make_disk(&spec).unwrap();
    here.start(&spec).unwrap();
    wait("the guest counts", || ticks(here).len() > 10);

    let expected = GuestSpec { epoch: 11, user_data: user_data.into(), ..cloud.two.host.spec(VM.0) };
    let departure = cloud.prepare(&cloud.one, &cloud.two, &expected);
    let (job, started) = (Job::new(PATIENCE), Instant::now());
    here.migrate(VM, &departure.destination, &cloud.route(), &job).unwrap();
    println!("migrated in {:?}, {:?}", started.elapsed(), job.progress());
    assert!(job.progress().done_bytes > 0, "it was counted");
    assert_eq!(cloud.powers(), [Some(MOVED), Some(GuestPower::Arrived)]);
    assert_eq!(ticks(there), Vec::<u64>::new(), "it does not run before it was handed over");
    there.finish_migration(&expected, true).unwrap();
    wait("the guest counts on", || ticks(there).len() > 10);
    let (before, after) = (ticks(here), ticks(there));
    let (last, first) = (before[before.len() - 1], after[0]);
    println!("the last count here: {last}, the first there: {first}");
    // One that was being written in that moment is torn.
    assert!(last < first && first <= last + 3, "nothing was lost and nothing ran twice: {last}, then {first}");
    here.remove(VM).unwrap();
    assert_eq!(cloud.powers(), [None, Some(GuestPower::Running)]);
}

#[test]
fn a_guest_that_is_off_boots_where_it_went_with_what_it_wrote() {
    if std::env::var_os("TREFOIL_TEST_IMAGE").is_none() {
        return println!("skipped: TREFOIL_TEST_IMAGE names no image");
    }
    let (Some(one), Some(two)) = (Host::start(1), Host::start(2)) else { return };
    let cloud = Cloud::new(one, two);
    let (here, there) = (&cloud.one.hypervisor, &cloud.two.hypervisor);
    let user_data = "#!/bin/sh\nif [ -f /data/note ]; then echo \"found $(cat /data/note)\" > /dev/ttyS0; else \
                     echo 4711 > /data/note; sync; echo written > /dev/ttyS0; fi\n";
    let spec = GuestSpec { epoch: 10, user_data: user_data.into(), ..cloud.one.host.spec(VM.0) };
    here.make_disk(&spec).unwrap();
    here.start(&spec).unwrap();
    let says = |h: &Libvirt, line: &str| {
        let console = String::from_utf8_lossy(&h.console_log(VM, 1 << 20).unwrap()).into_owned();
        // The prompt of its shell may stand before it.
        console.lines().any(|said| said.trim().ends_with(line))
    };
    wait("the guest has written", || says(here, "written"));
    here.power_off(VM).unwrap();

    let expected = GuestSpec { epoch: 11, user_data: user_data.into(), ..cloud.two.host.spec(VM.0) };
    // The first time it breaks off: nothing of it is there, and nothing is lost here.
    let client = cloud.expect(&cloud.one, &cloud.two, &expected);
    let disk = here.disk_at_rest(VM).unwrap().expect("it is off");
    let missing = disk.with_file_name("missing");
    let job = || Arc::new(Job::new(PATIENCE));
    let broken = cloud.runtime.block_on(relay::disk::send(client.clone(), VM, 11, missing, job()));
    assert!(broken.is_err(), "there is nothing to be read");
    assert_eq!(cloud.powers(), [Some(GuestPower::Off(OffReason::ByAgent)), None]);

    let (started, job) = (Instant::now(), job());
    cloud.runtime.block_on(relay::disk::send(client, VM, 11, disk, job.clone())).unwrap();
    println!("sent in {:?}, {:?}", started.elapsed(), job.progress());
    here.let_go(VM).unwrap();
    assert_eq!(cloud.powers(), [Some(MOVED), Some(GuestPower::Arrived)]);
    there.finish_migration(&expected, true).unwrap();
    here.remove(VM).unwrap();
    there.start(&expected).unwrap();
    wait("the guest finds what it wrote", || says(there, "found 4711"));
    assert!(!says(there, "written"), "it is the same disk");
    assert_eq!(cloud.powers(), [None, Some(GuestPower::Running)]);
}

/// What it is, and how it is done while a guest is on its way.
type Fault<'a> = (&'a str, &'a dyn Fn(Departure, &Job));

#[test]
fn whatever_breaks_in_the_middle_the_guest_stays_where_it_was() {
    let (Some(one), Some(two)) = (Host::start(1), Host::start(2)) else { return };
    let cloud = Cloud::new(one, two);
    let (here, there) = (&cloud.one.hypervisor, &cloud.two.hypervisor);
    let spec = GuestSpec { epoch: 10, ..cloud.one.host.spec(VM.0) };
    here.make_disk(&spec).unwrap();
    here.start(&spec).unwrap();
    let faults: [Fault; 4] = [
        ("the agents lose each other", &|departure, _| drop(departure)),
        ("the destination's libvirtd hangs, and the time is over", &|departure, job| {
            cloud.two.host.signal_libvirtd("STOP");
            job.cancel();
            drop(departure);
            cloud.two.host.signal_libvirtd("CONT");
        }),
        ("the destination's libvirtd is killed", &|departure, _| {
            cloud.two.host.kill_libvirtd();
            drop(departure);
            cloud.two.host.start_libvirtd();
        }),
        ("the source's libvirtd is killed", &|departure, _| {
            cloud.one.host.kill_libvirtd();
            drop(departure);
            cloud.one.host.start_libvirtd();
        }),
    ];
    for (epoch, (what, fault)) in (11..).zip(faults) {
        let expected = GuestSpec { epoch, ..cloud.two.host.spec(VM.0) };
        let departure = cloud.prepare(&cloud.one, &cloud.two, &expected);
        // However fast the machine is: it cannot have arrived before the fault.
        hold(&departure.route.memory);
        let destination = departure.destination.clone();
        let job = Job::new(PATIENCE);
        let moved = thread::scope(|scope| {
            let moving = scope.spawn(|| here.migrate(VM, &destination, &cloud.route(), &job));
            wait("bytes are on their way", || job.progress().total_bytes > 0 || moving.is_finished());
            fault(departure, &job);
            moving.join().unwrap()
        });
        println!("{what}: {moved:?} after {:?}", job.progress());
        let broke = matches!(moved, Err(HypervisorError::Transient(_) | HypervisorError::Unreachable(_)));
        assert!(broke, "{what}: it really broke: {moved:?}");
        here.cancel_migration(VM).unwrap();
        there.remove(VM).unwrap();
        assert_eq!(cloud.powers(), [Some(GuestPower::Running), None], "{what}");
        let processes = [&cloud.one, &cloud.two].map(|side| side.host.guest_process(VM).is_some());
        assert_eq!(processes, [true, false], "{what}: one process");
    }
}

/// The connection is cut after so many percent of the bytes, or a moment after the last. Each time the rule of the
/// hand-over decides: to the destination if the source says that it moved and the destination that it arrived, else not.
#[test]
fn wherever_the_connection_is_cut_the_guest_runs_on_one_side() {
    let (Some(one), Some(two)) = (Host::start(1), Host::start(2)) else { return };
    let cloud = Cloud::new(one, two);
    let (mut from, mut to) = (&cloud.one, &cloud.two);
    let mut here = GuestSpec { epoch: 10, ..from.host.spec(VM.0) };
    from.hypervisor.make_disk(&here).unwrap();
    from.hypervisor.start(&here).unwrap();
    let (mut went, mut stayed) = (0, 0);
    for (epoch, percent) in (11..).zip([0, 30, 60, 90, 97, 99, 100, 101]) {
        let there = GuestSpec { epoch, ..to.host.spec(VM.0) };
        let departure = cloud.prepare(from, to, &there);
        let (destination, job) = (departure.destination.clone(), Job::new(PATIENCE));
        if percent == 0 {
            hold(&departure.route.memory);
        }
        let moved = thread::scope(|scope| {
            let moving = scope.spawn(|| from.hypervisor.migrate(VM, &destination, &cloud.route(), &job));
            wait("so many bytes are there", || {
                let progress = job.progress();
                let far = progress.total_bytes > 0 && progress.done_bytes * 100 >= progress.total_bytes * percent;
                far || moving.is_finished()
            });
            drop(departure);
            moving.join().unwrap()
        });
        let powers = [from, to].map(Member::power);
        println!("cut at {percent} %: {moved:?}, {powers:?}");
        assert_ne!(powers[1], Some(GuestPower::Running), "it never runs there by itself");
        if powers == [Some(MOVED), Some(GuestPower::Arrived)] {
            to.hypervisor.finish_migration(&there, true).unwrap();
            from.hypervisor.remove(VM).unwrap();
            (from, to, here, went) = (to, from, there, went + 1);
        } else {
            assert!(moved.is_err(), "it says that it did not go");
            from.hypervisor.cancel_migration(VM).unwrap();
            to.hypervisor.remove(VM).unwrap();
            from.hypervisor.start(&here).unwrap();
            stayed += 1;
        }
        assert_eq!([from, to].map(Member::power), [Some(GuestPower::Running), None], "cut at {percent} %");
    }
    assert!(went > 0 && stayed > 0, "both came about: it went {went} times and stayed {stayed} times");
}

/// Counts that the guest wrote to its console here, whole lines only.
fn ticks(h: &Libvirt) -> Vec<u64> {
    let console = h.console_log(VM, 1 << 20).unwrap();
    let text = String::from_utf8_lossy(&console).into_owned();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().filter_map(|line| line.trim().strip_prefix("tick ")?.parse().ok()).collect()
}

/// Two hosts with agents' data servers, members of one cloud.
struct Cloud {
    runtime: Runtime,
    one: Member,
    two: Member,
}

struct Member {
    host: Host,
    hypervisor: Arc<Libvirt>,
    agent: Arc<nodeagent::host::Host>,
    address: String,
}

impl Cloud {
    fn new(one: Host, two: Host) -> Self {
        let runtime = Runtime::new().unwrap();
        let ca = CertificateAuthority::create(CLUSTER).unwrap();
        let [one, two] = [(one, 1), (two, 2)].map(|(host, number)| {
            let identity = ca.issue(&format!("node-{number}")).unwrap();
            runtime.block_on(Member::new(host, NodeId(number), identity))
        });
        Self { runtime, one, two }
    }

    /// What the quorum would ask of both sides.
    fn prepare(&self, from: &Member, to: &Member, spec: &GuestSpec) -> Departure {
        self.expect(from, to, spec);
        let agent = &from.agent;
        let opened = Departure::open(&agent.arrivals, &agent.identity, &to.address, VM, spec.epoch);
        self.runtime.block_on(opened).unwrap()
    }

    /// Only the destination's part; gives the way to it.
    fn expect(&self, from: &Member, to: &Member, spec: &GuestSpec) -> NodeDataClient<Channel> {
        let destination = to.hypervisor.prepare_migration(spec).unwrap();
        to.agent.arrivals.expect(VM, Arrival { source: from.agent.node, spec: spec.clone(), destination });
        let asked = relay::ask(&from.agent.identity, &to.address, VM, spec.epoch);
        self.runtime.block_on(asked).unwrap().0
    }

    /// As libvirt sees it: the agents here see the same sockets from outside the hosts.
    fn route(&self) -> Route {
        Route::new(Path::new(SOCKETS), VM)
    }

    fn powers(&self) -> [Option<GuestPower>; 2] {
        [&self.one, &self.two].map(Member::power)
    }
}

impl Member {
    async fn new(host: Host, node: NodeId, identity: Identity) -> Self {
        let root = host.dir.path();
        let sockets = root.join(SOCKETS.trim_start_matches('/'));
        fs::create_dir_all(&sockets).unwrap();
        let hypervisor = Arc::new(host.open());
        let agent = Arc::new(nodeagent::host::Host {
            cluster: CLUSTER.into(),
            node,
            identity,
            data: host.agent_dir(),
            leases: Arc::new(nodeagent::lease::Leases::open(&host.agent_dir()).unwrap()),
            underlay: IpAddr::V4(Ipv4Addr::LOCALHOST),
            hypervisor: hypervisor.clone(),
            network: Arc::new(SimulatedNetwork::new()),
            images: ImageStore::open(&host.agent_dir(), 0).unwrap(),
            view: Arc::default(),
            arrivals: Arrivals::new(sockets, Some(root.join("run/libvirt/libvirt-sock"))),
        });
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(serve_data(agent.clone(), listener));
        Self { host, hypervisor, agent, address }
    }

    fn power(&self) -> Option<GuestPower> {
        self.hypervisor.guests().unwrap().first().map(|guest| guest.power)
    }
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

/// Lets connections to this socket through, but nothing that the guest's host sends on them, until the other end closes.
fn hold(socket: &Path) {
    let behind = socket.with_extension("held");
    fs::rename(socket, &behind).unwrap();
    let listener = UnixListener::bind(socket).unwrap();
    // Ends with the process: a listener cannot be told to stop.
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            let Ok(mut far) = UnixStream::connect(&behind) else { continue };
            thread::spawn(move || {
                let _ = io::copy(&mut far, &mut &near);
                near.shutdown(Shutdown::Both)
            });
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
