//! The executor in a simulated host, against what the quorum would see.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{Mutex, atomic::Ordering},
    time::Instant,
};

use api::{session::FromAgent, tls::CertificateAuthority};
use model::{
    Capacity, ImageFormat, ImageWish, Mac, NetworkId, NetworkWish, NicWish, NodeId,
    command::{RehearsalReport, VmReport},
    telemetry::NodeStatus,
};
use storage::images::{Begun, ImageStore};
use tokio::task::JoinHandle;

use super::*;
use crate::{
    hypervisor::{
        GuestPower, Hypervisor, OffReason,
        simulated::{Simulated, SimulatedConfig},
    },
    lease::Leases,
    network::{Network, simulated::SimulatedNetwork},
    view::View,
};

mod increments;
mod lost_disk;
mod moody;
mod networks;
mod rehearsal;

use moody::{Mood, Moody};

const DEADLINE: Duration = Duration::from_secs(60);
const BASE: &[u8] = b"a base image";
const MAC: Mac = Mac([2, 84, 0, 0, 0, 1]);

/// A host with an executor, and everything that it reported.
struct World {
    dir: tempfile::TempDir,
    hypervisor: Arc<Moody>,
    network: Arc<SimulatedNetwork>,
    view: Arc<View>,
    leases: Arc<Leases>,
    assignment: watch::Sender<Option<Arc<Assignment>>>,
    incarnation: watch::Sender<u64>,
    reports: Arc<Mutex<Vec<VmReport>>>,
    rehearsals: Arc<Mutex<Vec<RehearsalReport>>>,
    tasks: Vec<JoinHandle<()>>,
}

fn hypervisor(dir: &Path) -> Arc<Moody> {
    let config = SimulatedConfig {
        dir: dir.to_owned(),
        cluster: "c".into(),
        host: "h1".into(),
        capacity: Capacity { vcpus: 8, memory_bytes: 8 << 30, disk_bytes: 80 << 30 },
        delay_permille: 0,
        failure_permille: 0,
        seed: 1,
        effects: None,
    };
    let inner = Simulated::open(config).unwrap();
    Arc::new(Moody::new(inner))
}

/// Into the host's image store.
fn store(dir: &Path, bytes: &[u8]) -> Digest {
    let store = ImageStore::open(dir, 0).unwrap();
    let digest = Digest::of(bytes);
    if let Begun::Writing(mut incoming) = store.begin(digest, bytes.len() as u64).unwrap() {
        incoming.write(bytes).unwrap();
        incoming.finish().unwrap();
    }
    digest
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        store(dir.path(), BASE);
        let mut world = Self {
            hypervisor: hypervisor(dir.path()),
            leases: Arc::new(Leases::open(dir.path()).unwrap()),
            dir,
            network: Arc::default(),
            view: Arc::default(),
            assignment: watch::Sender::new(None),
            incarnation: watch::Sender::new(1),
            reports: Arc::default(),
            rehearsals: Arc::default(),
            tasks: vec![],
        };
        world.start_agent();
        world
    }

    fn executor(&mut self) -> (Executor, Arc<Outbox>) {
        self.view = Arc::default();
        let host = Arc::new(Host {
            cluster: "c".into(),
            node: NodeId(1),
            identity: CertificateAuthority::create("c").unwrap().issue("node-1").unwrap(),
            data: self.dir.path().to_owned(),
            underlay: IpAddr::V4(Ipv4Addr::LOCALHOST),
            hypervisor: self.hypervisor.clone(),
            network: self.network.clone(),
            images: ImageStore::open(self.dir.path(), 0).unwrap(),
            view: self.view.clone(),
            leases: self.leases.clone(),
            arrivals: crate::relay::Arrivals::new(self.dir.path().join("moving"), None),
        });
        self.view.set_node(NodeStatus::default());
        let outbox = Arc::new(Outbox::default());
        (Executor::new(host, outbox.clone(), Journal::open(self.dir.path()).unwrap()), outbox)
    }

    fn start_agent(&mut self) {
        let (executor, outbox) = self.executor();
        let (assignments, incarnation) = (self.assignment.subscribe(), self.incarnation.subscribe());
        let (reports, rehearsals) = (self.reports.clone(), self.rehearsals.clone());
        self.tasks.push(tokio::spawn(async move { executor.run(assignments, incarnation).await.unwrap() }));
        self.tasks.push(tokio::spawn(async move {
            loop {
                let number = match outbox.next().await {
                    FromAgent::VmReports { number, reports: new } => {
                        reports.lock().unwrap().extend(new);
                        number
                    }
                    FromAgent::RehearsalReports { number, reports: new } => {
                        rehearsals.lock().unwrap().extend(new);
                        number
                    }
                    _ => continue,
                };
                outbox.reported(number);
            }
        }));
    }

    /// As `kill -9`: nothing is said or saved any more; the guests stay.
    async fn kill_agent(&mut self) {
        for task in self.tasks.drain(..) {
            task.abort();
            let _ = task.await;
        }
        self.assignment.send_replace(None);
        self.reports.lock().unwrap().clear();
    }

    fn wish(&self, generation: u64, vms: Vec<VmWish>) {
        self.assignment.send_replace(Some(assignment(generation, vms)));
    }

    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !condition(self) {
            assert!(
                begun.elapsed() < DEADLINE,
                "waited in vain for: {what}; reports: {:?}",
                self.reports.lock().unwrap()
            );
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn until_reported(&self, epoch: u64, phase: Phase) {
        self.until(&format!("a report of {phase:?} at epoch {epoch}"), |world| {
            world.last().is_some_and(|last| (last.epoch, last.phase) == (epoch, phase))
        })
        .await;
    }

    fn last(&self) -> Option<VmReport> {
        self.reports.lock().unwrap().last().cloned()
    }

    fn power(&self) -> Option<GuestPower> {
        self.hypervisor.inner.guests().unwrap().first().map(|guest| guest.power)
    }

    fn quarantined(&self) -> usize {
        std::fs::read_dir(self.dir.path().join("quarantine")).unwrap().count()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

fn assignment(generation: u64, vms: Vec<VmWish>) -> Arc<Assignment> {
    let networks = vms.iter().take(1).map(|_| network()).collect();
    let (cluster, node) = ("c".to_owned(), NodeId(1));
    let (images, rehearsals) = (vec![], vec![]);
    Arc::new(Assignment { cluster, node, incarnation: 1, generation, vms, networks, images, rehearsals, spared: None })
}

fn network() -> NetworkWish {
    NetworkWish {
        network: NetworkId(1),
        vni: 100,
        range: "10.0.0.0/24".parse().unwrap(),
        peers: vec![],
        leases: vec![],
    }
}

fn vm(epoch: u64, power: Power) -> VmWish {
    let size_bytes = BASE.len() as u64;
    VmWish {
        vm: VmId(1),
        epoch,
        request: model::RequestId::default(),
        attempt: 0,
        power,
        backup: None,
        moves: None,
        recovery: model::Recovery::default(),
        stop_grace_millis: 300,
        reboots: 0,
        tenant: "acme".into(),
        name: "web".into(),
        size: Capacity { vcpus: 1, memory_bytes: 1 << 20, disk_bytes: 1 << 20 },
        image: ImageWish {
            digest: Digest::of(BASE),
            format: ImageFormat::Raw,
            size_bytes,
            virtual_bytes: size_bytes,
            sources: vec![],
            parents: vec![],
        },
        nics: vec![NicWish { network: NetworkId(1), vni: 100, mac: MAC, ip: [10, 0, 0, 2].into() }],
        ssh_keys: vec![],
        user_data: String::new(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_lives_its_whole_life_here() {
    let world = World::new();
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    assert_eq!(world.view.status().map(|status| status.creating), Some(false));
    world.wish(2, vec![vm(7, Power::Suspended)]);
    world.until_reported(7, Phase::Suspended).await;
    world.wish(3, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    world.wish(4, vec![VmWish { reboots: 2, ..vm(7, Power::Running) }]);
    world.until("the reboot is reported", |world| world.last().is_some_and(|last| last.rebooted == 2)).await;
    assert_eq!(world.hypervisor.resets.load(Ordering::SeqCst), 1);
    world.hypervisor.inner.ignore_power_button(VmId(1)).unwrap();
    world.wish(5, vec![VmWish { reboots: 2, ..vm(7, Power::Stopped) }]);
    world.until_reported(7, Phase::Stopped).await;
    world.wish(6, vec![VmWish { reboots: 2, ..vm(7, Power::Running) }]);
    world.until_reported(7, Phase::Running).await;
    world.wish(7, vec![vm(7, Power::Absent)]);
    world.until_reported(7, Phase::Absent).await;
    world.wish(8, vec![]);
    let found = || world.network.found(&[]);
    let begun = Instant::now();
    while !found().await.unwrap().is_empty() {
        assert!(begun.elapsed() < DEADLINE, "waited in vain for: the network is removed");
        sleep(Duration::from_millis(10)).await;
    }
    assert_eq!((world.power(), world.quarantined()), (None, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_said_of_a_machine_while_it_is_being_started() {
    let world = World::new();
    world.hypervisor.set(Mood::Starting(VmId(1)));
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until("its start begins", |world| world.hypervisor.starts.load(Ordering::SeqCst) == 1).await;
    // It is off, as it should be now; but it will run. That the other one runs shows that the host was looked at since.
    let other = VmWish { vm: VmId(2), nics: vec![], ..vm(8, Power::Running) };
    world.wish(2, vec![vm(7, Power::Stopped), other]);
    world.until_reported(8, Phase::Running).await;
    assert!(world.reports.lock().unwrap().iter().all(|report| report.vm != VmId(1)), "{:?}", world.reports);
    world.hypervisor.set(Mood::Good);
    world.until_reported(7, Phase::Stopped).await;
    let guests = world.hypervisor.inner.guests().unwrap();
    let power = guests.iter().find(|guest| guest.vm == VmId(1)).map(|guest| guest.power);
    assert_eq!(power, Some(GuestPower::Off(OffReason::ByAgent)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_agent_adopts_what_runs_and_obeys_nothing_from_the_past() {
    let mut world = World::new();
    world.wish(5, vec![VmWish { reboots: 1, ..vm(7, Power::Running) }]);
    world.until_reported(7, Phase::Running).await;
    world.kill_agent().await;
    world.start_agent();
    world.until("the guest is seen", |world| world.view.status().is_some_and(|status| status.vms.len() == 1)).await;
    assert_eq!(world.last(), None, "nothing is said before the quorum has spoken");
    world.wish(5, vec![VmWish { reboots: 1, ..vm(7, Power::Running) }]);
    world.until_reported(7, Phase::Running).await;
    assert_eq!(world.last().map(|last| last.rebooted), Some(1));
    assert_eq!(world.hypervisor.starts.load(Ordering::SeqCst), 1, "it was started once, by the first agent");
    assert_eq!(world.hypervisor.resets.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_agent_obeys_nothing_from_the_past_and_nothing_for_others() {
    let mut world = World::new();
    world.wish(5, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    world.kill_agent().await;
    let (mut executor, _) = world.executor();
    let for_another = Arc::new(Assignment { node: NodeId(2), ..(*assignment(9, vec![])).clone() });
    let of_another = Arc::new(Assignment { cluster: "d".into(), ..(*assignment(9, vec![])).clone() });
    let refused = [assignment(4, vec![]), assignment(6, vec![vm(6, Power::Absent)]), for_another, of_another];
    for new in refused {
        executor.obey(new).unwrap();
        assert_eq!(executor.assignment, None);
    }
    executor.obey(assignment(5, vec![vm(7, Power::Running)])).unwrap();
    assert!(executor.assignment.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_placement_is_set_aside_before_the_new_one_is_made() {
    let world = World::new();
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    world.wish(2, vec![vm(9, Power::Running)]);
    world.until_reported(9, Phase::Running).await;
    assert_eq!(world.quarantined(), 1);
    world.wish(3, vec![]);
    world.until("a guest that nobody wants is set aside too", |world| world.quarantined() == 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_ends_a_copy_of_the_disk_and_does_not_fail_by_it() {
    let world = World::new();
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    world.wish(2, vec![vm(7, Power::Stopped)]);
    world.until_reported(7, Phase::Stopped).await;
    world.hypervisor.set(Mood::Copying(VmId(1)));
    let backup = Some(model::BackupWish { number: 1, parent: None });
    world.wish(3, vec![VmWish { backup, ..vm(7, Power::Stopped) }]);
    world.until("it is copied", |world| world.hypervisor.hung.load(Ordering::SeqCst) == 1).await;
    world.wish(4, vec![VmWish { backup, ..vm(7, Power::Running) }]);
    world.until_reported(7, Phase::Running).await;
    assert_eq!(world.hypervisor.starts.load(Ordering::SeqCst), 2, "it was not tried in vain");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_waits_for_a_stopped_guest_does_not_keep_it_from_being_set_aside() {
    let world = World::new();
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    world.hypervisor.set(Mood::Stopped(VmId(1)));
    world.wish(2, vec![vm(7, Power::Suspended)]);
    world.until("it waits", |world| world.hypervisor.hung.load(Ordering::SeqCst) == 1).await;
    let begun = Instant::now();
    world.wish(3, vec![]);
    world.until("it is set aside", |world| world.quarantined() == 1).await;
    assert!(begun.elapsed() < Duration::from_secs(20), "its process was ended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_went_down_by_itself_stays_down_and_one_that_crashed_comes_back() {
    let world = World::new();
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    world.hypervisor.inner.crash(VmId(1)).unwrap();
    world
        .until("the crashed guest was started again", |world| world.hypervisor.starts.load(Ordering::SeqCst) == 2)
        .await;
    world.until("it runs", |world| world.power() == Some(GuestPower::Running)).await;
    world.hypervisor.inner.shut_down_inside(VmId(1)).unwrap();
    world.until_reported(7, Phase::Stopped).await;
    assert_eq!(world.last().map(|last| last.retry), Some(false));
    assert_eq!(world.power(), Some(GuestPower::Off(OffReason::ByGuest)));
    // The quorum takes it as the owner's will; later the owner wants it back.
    world.wish(2, vec![vm(7, Power::Stopped)]);
    world
        .until("the stop was noted", |world| {
            let journal = std::fs::read_to_string(world.dir.path().join("journal.json")).unwrap_or_default();
            journal.contains("\"wished_off\":true")
        })
        .await;
    world.wish(3, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_cannot_be_made_is_reported_and_leaves_nothing() {
    let world = World::new();
    world.hypervisor.set(Mood::NoStart);
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Failed).await;
    let last = world.last().unwrap();
    assert_eq!((last.reason.as_str(), last.retry), ("start vm-1: no such machine type", false));
    assert!(!world.dir.path().join("vms/vm-1").exists(), "its disk was removed");
    world.hypervisor.set(Mood::Good);
    world.wish(2, vec![VmWish { attempt: 1, ..vm(7, Power::Running) }]);
    world.until_reported(7, Phase::Running).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_in_a_step_is_a_failure_like_another() {
    let world = World::new();
    world.hypervisor.set(Mood::Panics);
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Failed).await;
    assert!(world.last().is_some_and(|last| last.retry));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_hypervisor_is_down_nothing_is_said_about_guests() {
    let world = World::new();
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    world.hypervisor.set(Mood::Unreachable);
    world.wish(2, vec![vm(7, Power::Suspended)]);
    world.until("the view is empty", |world| world.view.status().is_none()).await;
    assert_eq!(world.last().map(|last| last.phase), Some(Phase::Running));
    world.hypervisor.set(Mood::Good);
    world.until_reported(7, Phase::Suspended).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_look_that_hangs_keeps_no_permit_from_being_settled() {
    let world = World::new();
    let exclusive = |incarnation: u64| {
        let wish = VmWish { recovery: model::Recovery::Exclusive, ..vm(7, Power::Stopped) };
        Arc::new(Assignment { incarnation, ..(*assignment(incarnation, vec![wish])).clone() })
    };
    world.hypervisor.set(Mood::LookHangs);
    world.assignment.send_replace(Some(exclusive(1)));
    let looks = || world.hypervisor.hung.load(Ordering::SeqCst);
    world.until("the look hangs", |_| looks() == 1).await;
    // Another leader, in the middle of it.
    for incarnation in [2, 3] {
        world.incarnation.send_replace(incarnation);
        world.assignment.send_replace(Some(exclusive(incarnation)));
        world.leases.granted(incarnation, u64::MAX);
        world.until("the permit is the new session's", |world| world.leases.permit().incarnation == incarnation).await;
    }
    assert_eq!(looks(), 1, "the look goes on, and no other is begun beside it");
    world.hypervisor.set(Mood::Good);
    world.until_reported(7, Phase::Stopped).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_new_session_everything_is_told_again() {
    let world = World::new();
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    world.incarnation.send_replace(2);
    world.until("it is reported twice", |world| world.reports.lock().unwrap().len() == 2).await;
}
