//! A whole agent against controllers that only play their part of the protocol.

use std::{
    net::Ipv4Addr,
    pin::Pin,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use api::{
    beat::{self, Ack, ReplayGuard, Verdict},
    client::LEADER_KEY,
    error::ApiError,
    proto::{
        Chunk, Frame, GetImageBytesRequest, GuestConsoleLogRequest, ListQuarantineRequest, PutImageHeader,
        PutImageRequest,
        node_data_client::NodeDataClient,
        node_session_server::{NodeSession, NodeSessionServer},
        put_image_request::Part,
    },
    session::{FromAgent, MAX_FRAME_BYTES, NEWS_KEY, ToAgent, decode, encode},
    tls::{CertificateAuthority, client_tls, client_tls_ca, connect},
};
use futures::{Stream, StreamExt};
use model::{Assignment, Digest, ImageFormat, ImageWish, News, Phase, Power, VmId, VmWish, news::Pieces};
use tokio::{net::UdpSocket, sync::mpsc, task::JoinHandle, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::*;

mod lease;

const DEADLINE: Duration = Duration::from_secs(60);
const BASE: &[u8] = b"the bytes of a base image";

async fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < DEADLINE, "waited in vain for: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Both sides of a controller that an agent sees: the session, and the socket for heartbeats.
#[derive(Clone)]
struct Controller(Arc<Played>);

struct Played {
    address: SocketAddr,
    leads: AtomicBool,
    grants: AtomicBool,
    acknowledges: AtomicBool,
    incarnation: AtomicU64,
    /// Whom it names when it does not lead.
    leader: Mutex<String>,
    targets: Mutex<Vec<String>>,
    assignment: Mutex<Assignment>,
    heard: Mutex<Vec<FromAgent>>,
    beats: Mutex<Vec<(Verdict, beat::Beat)>>,
    end: tokio::sync::Notify,
}

impl Controller {
    async fn start(ca: &CertificateAuthority, id: u64, assignment: Assignment) -> Self {
        let (listener, socket) = listen().await;
        let address = listener.local_addr().unwrap();
        let controller = Self(Arc::new(Played {
            address,
            leads: AtomicBool::new(true),
            grants: AtomicBool::new(false),
            acknowledges: AtomicBool::new(true),
            incarnation: AtomicU64::new(id * 100),
            leader: Mutex::default(),
            targets: Mutex::new(vec![address.to_string()]),
            assignment: Mutex::new(assignment),
            heard: Mutex::default(),
            beats: Mutex::default(),
            end: tokio::sync::Notify::new(),
        }));
        let tls = server_tls(&ca.issue(&format!("controller-{id}")).unwrap());
        let server = Server::builder().tls_config(tls).unwrap().add_service(NodeSessionServer::new(controller.clone()));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        tokio::spawn(controller.clone().listen(socket, ca.beat_key(NodeId(1)).unwrap()));
        controller
    }

    async fn listen(self, socket: UdpSocket, key: BeatKey) {
        let mut guard = ReplayGuard::new(self.0.incarnation.load(Ordering::SeqCst) + 7);
        let mut buffer = [0; 2000];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let Ok(beat) = beat::decode(&buffer[..length], &key) else { continue };
            let verdict = guard.check(&beat);
            let ack = Ack {
                node: beat.node,
                seq: beat.seq,
                nonce: guard.nonce(),
                boottime_nanos: beat.boottime_nanos,
                leader: self.0.leads.load(Ordering::SeqCst),
                grant: self.0.granted(),
            };
            self.0.beats.lock().unwrap().push((verdict, beat));
            socket.send_to(&beat::encode_ack(&ack, &key).unwrap(), from).await.unwrap();
        }
    }

    fn hellos(&self) -> usize {
        self.0.heard.lock().unwrap().iter().filter(|heard| matches!(heard, FromAgent::Hello { .. })).count()
    }

    /// The phases of the machine, as they were reported here.
    fn phases(&self) -> Vec<Phase> {
        let heard = self.0.heard.lock().unwrap();
        heard
            .iter()
            .flat_map(|heard| match heard {
                FromAgent::VmReports { reports, .. } => reports.iter().map(|report| report.phase).collect(),
                _ => vec![],
            })
            .collect()
    }
}

/// TCP and UDP at the same free port.
async fn listen() -> (TcpListener, UdpSocket) {
    loop {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        if let Ok(socket) = UdpSocket::bind(listener.local_addr().unwrap()).await {
            return (listener, socket);
        }
    }
}

fn all_new(whole: Assignment) -> News {
    let Assignment { cluster, node, incarnation, generation, vms, networks, images, rehearsals, spared } = whole;
    let vms = Pieces { gone: vec![], new: vms };
    let networks = Pieces { gone: vec![], new: networks };
    let images = Pieces { gone: vec![], new: images };
    News { cluster, node, incarnation, generation, vms, networks, images, rehearsals, spared }
}

#[tonic::async_trait]
impl NodeSession for Controller {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<Frame, Status>> + Send>>;

    async fn attach(&self, request: Request<Streaming<Frame>>) -> Result<Response<Self::AttachStream>, Status> {
        assert_eq!(api::tls::peer_identity(&request).as_deref(), Some("node-1"));
        let played = self.0.clone();
        if !played.leads.load(Ordering::SeqCst) {
            let mut status = Status::from(ApiError::new("unavailable", "this controller does not lead"));
            let leader = played.leader.lock().unwrap().parse().unwrap();
            status.metadata_mut().insert(LEADER_KEY, leader);
            return Err(status);
        }
        assert!(request.metadata().contains_key(NEWS_KEY));
        let mut up = request.into_inner();
        let (down, frames) = mpsc::channel(8);
        tokio::spawn(async move {
            let tell = |message: ToAgent| down.send(Ok(Frame { body: encode(&message).into() }));
            let incarnation = played.incarnation.fetch_add(1, Ordering::SeqCst);
            let beat_targets = played.targets.lock().unwrap().clone();
            tell(ToAgent::Welcome { incarnation, beat_targets, epoch: 0, take_stock: false }).await.unwrap();
            let assignment = Assignment { incarnation, ..played.assignment.lock().unwrap().clone() };
            tell(ToAgent::News(Box::new(all_new(assignment)))).await.unwrap();
            loop {
                let frame = tokio::select! {
                    frame = up.message() => frame,
                    () = played.end.notified() => return,
                };
                let Ok(Some(frame)) = frame else { return };
                let message: FromAgent = decode(&frame.body).unwrap();
                let number = match &message {
                    FromAgent::VmReports { number, .. } | FromAgent::ImageReports { number, .. } => Some(*number),
                    _ => None,
                };
                played.heard.lock().unwrap().push(message);
                if let Some(number) = number
                    && played.acknowledges.load(Ordering::SeqCst)
                {
                    let _ = tell(ToAgent::Reported { number }).await;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(frames))))
    }
}

fn base(sources: Vec<String>) -> ImageWish {
    let size_bytes = BASE.len() as u64;
    let (digest, format) = (Digest::of(BASE), ImageFormat::Raw);
    ImageWish { digest, format, size_bytes, virtual_bytes: size_bytes, sources, parents: vec![] }
}

fn assignment(sources: Vec<String>) -> Assignment {
    let vm = VmWish {
        vm: VmId(1),
        epoch: 7,
        request: model::RequestId::default(),
        attempt: 0,
        power: Power::Running,
        backup: None,
        moves: None,
        recovery: model::Recovery::default(),
        stop_grace_millis: 0,
        reboots: 0,
        tenant: "acme".into(),
        name: "web".into(),
        size: Capacity { vcpus: 1, memory_bytes: 1 << 20, disk_bytes: 1 << 20 },
        image: base(sources),
        nics: vec![],
        ssh_keys: vec![],
        user_data: String::new(),
    };
    let (cluster, node) = ("c".to_owned(), NodeId(1));
    let (vms, networks, images, rehearsals) = (vec![vm], vec![], vec![], vec![]);
    Assignment { cluster, node, incarnation: 0, generation: 3, vms, networks, images, rehearsals, spared: None }
}

/// A data server of another host that holds the base image, and its address.
async fn other_host(ca: &CertificateAuthority, dir: &std::path::Path, bytes: Option<&[u8]>) -> (Arc<Host>, String) {
    let images = ImageStore::open(dir, 0).unwrap();
    if let Some(bytes) = bytes
        && let storage::images::Begun::Writing(mut incoming) =
            images.begin(Digest::of(bytes), bytes.len() as u64).unwrap()
    {
        incoming.write(bytes).unwrap();
        incoming.finish().unwrap();
    }
    let simulated = SimulatedConfig {
        dir: dir.to_owned(),
        cluster: "c".into(),
        host: "h2".into(),
        capacity: Capacity::default(),
        delay_permille: 0,
        failure_permille: 0,
        seed: 1,
        effects: None,
    };
    let host = Arc::new(Host {
        cluster: "c".into(),
        node: NodeId(2),
        identity: ca.issue("node-2").unwrap(),
        data: dir.to_owned(),
        underlay: IpAddr::V4(Ipv4Addr::LOCALHOST),
        hypervisor: Arc::new(Simulated::open(simulated).unwrap()),
        network: Arc::new(SimulatedNetwork::new()),
        images,
        view: Arc::default(),
        leases: Arc::new(Leases::open(dir).unwrap()),
        arrivals: Arrivals::new(dir.join("moving"), None),
    });
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(serve_data(host.clone(), listener));
    (host, address)
}

/// An agent that is member node-1 and knows these controllers.
fn start_agent(
    ca: &CertificateAuthority,
    dir: &std::path::Path,
    controllers: &[&Controller],
) -> JoinHandle<Result<()>> {
    let data = DataDir::open(dir).unwrap();
    let member = Membership {
        cluster: "c".into(),
        node: NodeId(1),
        name: "h1".into(),
        address: "127.0.0.1:7480".into(),
        beat_key: ca.beat_key(NodeId(1)).unwrap(),
        identity: ca.issue("node-1").unwrap(),
    };
    data.save_membership(&member).unwrap();
    drop(data);
    let config = AgentConfig {
        data: dir.to_owned(),
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        advertise: None,
        underlay: IpAddr::V4(Ipv4Addr::LOCALHOST),
        controllers: controllers.iter().map(|controller| controller.0.address.to_string()).collect(),
        hypervisor: HypervisorChoice::Simulated {
            capacity: Capacity { vcpus: 8, memory_bytes: 8 << 30, disk_bytes: 80 << 30 },
            delay_permille: 0,
            failure_permille: 0,
            seed: 1,
            effects: Some(dir.join("effects")),
        },
        image_reserve_bytes: 0,
    };
    tokio::spawn(run(config, std::future::pending()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_finds_the_leader_fetches_runs_and_tells_again_what_was_not_acknowledged() {
    let ca = CertificateAuthority::create("c").unwrap();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (_, good) = other_host(&ca, dirs[1].path(), Some(BASE)).await;
    let (_, empty) = other_host(&ca, dirs[2].path(), None).await;
    let wish = assignment(vec!["127.0.0.1:1".into(), empty, good]);
    let first = Controller::start(&ca, 1, wish.clone()).await;
    let second = Controller::start(&ca, 2, wish).await;
    first.0.acknowledges.store(false, Ordering::SeqCst);
    second.0.leads.store(false, Ordering::SeqCst);
    *second.0.leader.lock().unwrap() = first.0.address.to_string();
    *first.0.targets.lock().unwrap() = vec![first.0.address.to_string(), second.0.address.to_string()];
    // It knows only the one that does not lead.
    let agent = start_agent(&ca, dirs[0].path(), &[&second]);
    until("the first leader hears that it runs", || first.phases() == [Phase::Running]).await;
    assert!(matches!(first.0.heard.lock().unwrap()[0], FromAgent::Hello { .. }));
    assert!(dirs[0].path().join(format!("images/{}", Digest::of(BASE))).exists());

    // The leader changes before it acknowledged anything.
    *first.0.leader.lock().unwrap() = second.0.address.to_string();
    first.0.leads.store(false, Ordering::SeqCst);
    second.0.leads.store(true, Ordering::SeqCst);
    first.0.end.notify_one();
    until("the second leader hears that it runs", || second.phases().contains(&Phase::Running)).await;
    assert_eq!((first.hellos(), second.hellos()), (1, 1));
    agent.abort();
}

/// As when the leader's machine lost its power: nothing ends the stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_leaves_a_silent_leader_when_another_one_answers_its_heartbeats() {
    let ca = CertificateAuthority::create("c").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let first = Controller::start(&ca, 1, assignment(vec![])).await;
    let second = Controller::start(&ca, 2, assignment(vec![])).await;
    second.0.leads.store(false, Ordering::SeqCst);
    *second.0.leader.lock().unwrap() = first.0.address.to_string();
    *first.0.targets.lock().unwrap() = vec![first.0.address.to_string(), second.0.address.to_string()];
    let agent = start_agent(&ca, dir.path(), &[&first, &second]);
    until("it is in session with the first", || first.hellos() == 1).await;
    until("it beats at the second", || !second.0.beats.lock().unwrap().is_empty()).await;
    first.0.leads.store(false, Ordering::SeqCst);
    second.0.leads.store(true, Ordering::SeqCst);
    until("it is in session with the second", || second.hellos() == 1).await;
    sleep(2 * crate::session::SURE).await;
    assert_eq!((first.hellos(), second.hellos()), (1, 1), "and stays there");
    agent.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_assignment_that_is_larger_than_what_agents_may_send_is_obeyed() {
    let ca = CertificateAuthority::create("c").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut wish = assignment(vec![]);
    wish.vms[0].power = Power::Stopped;
    wish.vms[0].user_data = "#".repeat(MAX_FRAME_BYTES + 1);
    let controller = Controller::start(&ca, 1, wish).await;
    let agent = start_agent(&ca, dir.path(), &[&controller]);
    until("it says that it is stopped", || controller.phases() == [Phase::Stopped]).await;
    agent.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_are_proven_and_carry_the_status() {
    let ca = CertificateAuthority::create("c").unwrap();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (_, source) = other_host(&ca, dirs[1].path(), Some(BASE)).await;
    let controller = Controller::start(&ca, 1, assignment(vec![source])).await;
    let agent = start_agent(&ca, dirs[0].path(), &[&controller]);
    let beats = &controller.0.beats;
    until("a proven beat says that the machine runs", || {
        beats.lock().unwrap().iter().any(|(verdict, beat)| {
            let runs = |vm: &model::telemetry::VmStatus| (vm.vm, vm.epoch, vm.phase) == (VmId(1), 7, Phase::Running);
            let proven = *verdict == Verdict::Fresh && beat.incarnation == 100;
            proven && beat.status.as_ref().is_some_and(|status| status.vms.iter().any(runs))
        })
    })
    .await;
    assert!(beats.lock().unwrap().iter().all(|(verdict, _)| *verdict != Verdict::Replayed));
    agent.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_agent_remembers_the_controllers_that_the_quorum_named() {
    let ca = CertificateAuthority::create("c").unwrap();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (_, source) = other_host(&ca, dirs[1].path(), Some(BASE)).await;
    let controller = Controller::start(&ca, 1, assignment(vec![source])).await;
    let agent = start_agent(&ca, dirs[0].path(), &[&controller]);
    until("it runs", || controller.phases() == [Phase::Running]).await;
    let saved = dirs[0].path().join("controllers.json");
    until("the controllers are saved", || saved.exists()).await;
    agent.abort();
    let _ = agent.await;
    let (greeted, told) = (controller.hellos(), controller.phases().len());
    let agent = start_agent(&ca, dirs[0].path(), &[]);
    until("the next agent finds it", || agent.is_finished() || controller.hellos() > greeted).await;
    assert!(!agent.is_finished(), "{:?}", agent.await);
    until("it is told again by the next agent", || agent.is_finished() || controller.phases().len() > told).await;
    assert!(controller.phases().iter().all(|phase| *phase == Phase::Running));
    agent.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_are_put_and_read_by_parts_of_the_cloud_only() {
    let ca = CertificateAuthority::create("c").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (host, address) = other_host(&ca, dir.path(), None).await;
    let client = |name: &str| NodeDataClient::new(connect(&address, client_tls(&ca.issue(name).unwrap())).unwrap());
    let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let digest = Digest::of(&bytes);
    let header = |digest: Digest, size_bytes: usize| {
        let header = PutImageHeader { digest: digest.to_string(), size_bytes: size_bytes as u64 };
        PutImageRequest { part: Some(Part::Header(header)) }
    };
    let data = |bytes: &[u8]| PutImageRequest { part: Some(Part::Data(bytes.to_vec().into())) };
    let put = |messages: Vec<PutImageRequest>| {
        let mut controller = client("controller-1");
        async move { controller.put_image(tokio_stream::iter(messages)).await.map_err(ApiError::from) }
    };
    let chunks = || bytes.chunks(1_000_000).map(data);

    let code = |refused: Result<_, ApiError>| refused.map(drop).unwrap_err().code;
    assert_eq!(code(put(vec![data(b"x")]).await), "invalid-argument", "the header is missing");
    assert_eq!(code(put(vec![header(digest, bytes.len()), data(b"x")]).await), "invalid-argument", "bytes are missing");
    let wrong = [vec![header(Digest::of(b"else"), bytes.len())], chunks().collect()].concat();
    assert_eq!(code(put(wrong).await), "invalid-argument", "other bytes than announced");
    assert_eq!(host.images.list().unwrap(), []);

    let whole: Vec<_> = [vec![header(digest, bytes.len())], chunks().collect()].concat();
    put(whole.clone()).await.unwrap();
    put(whole).await.unwrap();
    let request = |offset| GetImageBytesRequest { digest: digest.to_string(), offset };
    let stream = client("node-1").get_image_bytes(request(1_000_001)).await.unwrap().into_inner();
    let read: Vec<u8> = stream.map(|chunk: Result<Chunk, _>| chunk.unwrap().data.to_vec()).concat().await;
    assert!(read == bytes[1_000_001..]);

    let denied = client("user-1").get_image_bytes(request(0)).await.unwrap_err();
    assert_eq!(ApiError::from(denied).code, "forbidden");
    let mut nobody = NodeDataClient::new(connect(&address, client_tls_ca(&ca.ca_pem)).unwrap());
    let console = GuestConsoleLogRequest { vm: "vm-1".into(), max_bytes: 10 };
    assert_eq!(ApiError::from(nobody.guest_console_log(console.clone()).await.unwrap_err()).code, "unauthenticated");
    assert!(client("controller-1").guest_console_log(console).await.is_ok());
    std::fs::create_dir_all(dir.path().join("quarantine/vm-17-4242-1767225600")).unwrap();
    let quarantine = ListQuarantineRequest {};
    assert_eq!(ApiError::from(nobody.list_quarantine(quarantine).await.unwrap_err()).code, "unauthenticated");
    let listed = client("controller-1").list_quarantine(quarantine).await.unwrap().into_inner().entries;
    let named: Vec<_> = listed.iter().map(|e| (&*e.vm, e.epoch, e.since_seconds)).collect();
    assert_eq!(named, [("vm-17", 4242, 1_767_225_600)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_goes_on_with_the_next_source_where_the_last_one_broke_off() {
    let ca = CertificateAuthority::create("c").unwrap();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let bytes: Vec<u8> = (0..2_000_000u32).map(|i| (i % 241) as u8).collect();
    let (bad, bad_address) = other_host(&ca, dirs[0].path(), Some(&bytes)).await;
    let (_, good_address) = other_host(&ca, dirs[1].path(), Some(&bytes)).await;
    let here = ImageStore::open(dirs[2].path(), 0).unwrap();
    let identity = ca.issue("node-1").unwrap();
    // The first source's copy rots; it notices by itself and gives nothing.
    let digest = Digest::of(&bytes);
    let file = dirs[0].path().join(format!("images/{digest}"));
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, vec![0; bytes.len()]).unwrap();
    let mut wish = ImageWish { digest, size_bytes: bytes.len() as u64, ..base(vec![bad_address]) };
    let failed = crate::images::fetch(&here, &identity, &wish, |_| {}).await.unwrap_err();
    assert!(failed.to_string().contains("damaged"), "{failed}");
    assert_eq!(bad.images.list().unwrap(), []);
    // A part is here already.
    std::fs::write(dirs[2].path().join(format!("images/{digest}.partial")), &bytes[..700_000]).unwrap();
    wish.sources.push(good_address);
    let progress = Arc::new(Mutex::new(Vec::new()));
    let seen = progress.clone();
    crate::images::fetch(&here, &identity, &wish, move |done| seen.lock().unwrap().push(done)).await.unwrap();
    assert!(progress.lock().unwrap().iter().all(|done| *done > 700_000), "what was here was not fetched again");
    assert!(here.verified(digest).is_ok());
    // Nobody has it, and nobody is asked for it.
    let nowhere = ImageWish { digest: Digest::of(b"nowhere"), ..base(vec![]) };
    let failed = crate::images::fetch(&here, &identity, &nowhere, |_| {}).await.unwrap_err();
    assert_eq!(failed.to_string(), "no host has a good copy");
}
