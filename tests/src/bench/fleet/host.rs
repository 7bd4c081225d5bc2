//! One host: how it becomes a member, and its session with the leader, which it finds again as an agent does.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, bail};
use api::{
    beat::BeatKey,
    client::{self, Client, Joined, LEADER_KEY, new_request_id},
    proto::{Frame, IssueJoinTokenRequest, node_session_client::NodeSessionClient},
    session::{FromAgent, MAX_FRAME_BYTES, NEWS_KEY, ToAgent, decode, encode},
    tls::{Identity, client_tls, connect_session, make_key_and_csr},
};
use jepsen::{chance::Chance, cluster::PATIENCE};
use model::{
    Capacity, HypervisorKind, NodeId, Phase, VmId,
    assignment::{Power, VmWish},
    command::VmReport,
};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, metadata::MetadataValue};

/// As an agent has them.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const FRAMES_UNDER_WAY: usize = 4;
const BEAT: Duration = Duration::from_nanos(model::lease::BEAT_NANOS);

pub struct Host {
    number: usize,
    pub node: NodeId,
    pub key: BeatKey,
    identity: Identity,
    hello: FromAgent,
    /// Of its last session.
    pub incarnation: AtomicU64,
    in_session: AtomicBool,
    pub reported: AtomicUsize,
}

pub fn name(number: usize) -> String {
    format!("beat-{number}")
}

/// What is known of the machines here, and on its way to the quorum.
#[derive(Default)]
struct Machines {
    /// Epoch, attempt and phase that were reported last.
    known: BTreeMap<VmId, (u64, u32, Phase)>,
    waiting: BTreeMap<VmId, VmReport>,
    number: u64,
    /// Machines in each frame that is not acknowledged.
    under_way: BTreeMap<u64, Vec<VmId>>,
}

impl Host {
    /// Makes it a member of the cloud.
    pub async fn join(operator: &Client, number: usize, capacity: Capacity) -> anyhow::Result<Arc<Self>> {
        // Loopback addresses on which nobody listens: a controller that looks after a host leaves nothing.
        let ip = format!("127.9.{}.{}", number / 250, number % 250 + 1);
        let address = format!("{ip}:7471");
        let request = make_key_and_csr()?;
        let asked = IssueJoinTokenRequest { role: "agent".into(), valid_millis: 600_000 };
        let issued =
            operator.mutate(new_request_id(), asked, async |mut stub, request| stub.issue_join_token(request).await);
        let token = issued.await?.token;
        let joined = client::join(&token, &name(number), &address, request.csr_der, PATIENCE).await?;
        let Joined::Agent(reply) = joined else { bail!("the token is no agent's") };
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec());
        let identity = Identity {
            ca_pem: text(&reply.ca_pem)?,
            cert_pem: text(&reply.certificate_pem)?,
            key_pem: request.key_pem,
        };
        let underlay: IpAddr = ip.parse()?;
        let hello = FromAgent::Hello {
            version: env!("CARGO_PKG_VERSION").into(),
            address,
            underlay,
            hypervisor: HypervisorKind::Simulated,
            capacity,
        };
        Ok(Arc::new(Self {
            number,
            node: NodeId(reply.id),
            key: BeatKey::from_bytes(&reply.beat_key).context("a beat key has 32 bytes")?,
            identity,
            hello,
            incarnation: AtomicU64::new(0),
            in_session: AtomicBool::new(false),
            reported: AtomicUsize::new(0),
        }))
    }

    pub fn is_in_session(&self) -> bool {
        self.in_session.load(Relaxed)
    }

    /// Never ends.
    pub async fn keep_session(
        self: Arc<Self>,
        controllers: Arc<Vec<String>>,
        leader: Arc<AtomicUsize>,
        obeyed: watch::Receiver<bool>,
    ) {
        let mut chance = Chance::new(self.number as u64);
        let (mut pause, mut machines) = (FIRST_PAUSE, Machines::default());
        loop {
            let mut hint = Some(controllers[leader.load(Relaxed)].clone());
            for _ in 0..controllers.len() {
                let Some(endpoint) = hint.take() else { break };
                hint = self.session(&endpoint, &mut machines, obeyed.clone()).await;
                if self.in_session.swap(false, Relaxed) {
                    pause = FIRST_PAUSE;
                    // As long as the answer to its next beat takes to come.
                    sleep(BEAT.mul_f64(chance.below(1000) as f64 / 1000.0)).await;
                }
            }
            let jitter = Duration::from_micros(chance.below(pause.as_micros() as usize) as u64);
            sleep(pause / 2 + jitter).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One attempt, and the session when it succeeds. Who leads, when another does.
    async fn session(
        &self,
        endpoint: &str,
        machines: &mut Machines,
        mut obeyed: watch::Receiver<bool>,
    ) -> Option<String> {
        let channel = connect_session(endpoint, client_tls(&self.identity)).ok()?;
        let mut client = NodeSessionClient::new(channel).max_decoding_message_size(2 * MAX_FRAME_BYTES);
        let (tell, told) = mpsc::channel(FRAMES_UNDER_WAY);
        tell.send(Frame { body: encode(&self.hello).into() }).await.ok()?;
        let mut call = Request::new(ReceiverStream::new(told));
        call.metadata_mut().insert(NEWS_KEY, MetadataValue::from_static("1"));
        let attached = timeout(ATTACH_TIMEOUT, client.attach(call)).await.ok()?;
        let mut answers = match attached {
            Ok(answers) => answers.into_inner(),
            Err(status) => return Some(status.metadata().get(LEADER_KEY)?.to_str().ok()?.to_owned()),
        };
        machines.begin_again();
        loop {
            let obeys = *obeyed.borrow_and_update();
            let frame = tokio::select! {
                frame = answers.message() => frame.ok()??,
                room = tell.reserve(), if obeys && !machines.waiting.is_empty() => {
                    room.ok()?.send(Frame { body: encode(&machines.next()).into() });
                    continue;
                }
                changed = obeyed.changed(), if !obeys => {
                    changed.ok()?;
                    continue;
                }
            };
            match decode(&frame.body).ok()? {
                ToAgent::Welcome { incarnation, .. } => {
                    self.incarnation.store(incarnation, Relaxed);
                    self.in_session.store(true, Relaxed);
                }
                ToAgent::News(news) => machines.hear(&news.vms.new),
                ToAgent::Reported { number } => {
                    let done: usize =
                        machines.under_way.extract_if(..=number, |_, _| true).map(|(_, vms)| vms.len()).sum();
                    self.reported.fetch_add(done, Relaxed);
                }
                ToAgent::BeatTargets(_) | ToAgent::Assignment(_) => {}
            }
        }
    }
}

impl Machines {
    /// What was not acknowledged is told again in a new session.
    fn begin_again(&mut self) {
        let told = self.under_way.values().flatten().chain(self.waiting.keys());
        for vm in told {
            self.known.remove(vm);
        }
        self.under_way.clear();
        self.waiting.clear();
    }

    /// Reports about machines that are wished otherwise than they were reported.
    fn hear(&mut self, wishes: &[VmWish]) {
        for wish in wishes {
            let Some(phase) = as_wished(wish) else { continue };
            let now = (wish.epoch, wish.attempt, phase);
            if self.known.insert(wish.vm, now) != Some(now) {
                let report = VmReport {
                    vm: wish.vm,
                    epoch: wish.epoch,
                    attempt: wish.attempt,
                    phase,
                    rebooted: wish.reboots,
                    reason: String::new(),
                    retry: false,
                };
                self.waiting.insert(wish.vm, report);
            }
        }
    }

    fn next(&mut self) -> FromAgent {
        let reports: Vec<VmReport> = std::mem::take(&mut self.waiting).into_values().collect();
        self.number += 1;
        self.under_way.insert(self.number, reports.iter().map(|report| report.vm).collect());
        FromAgent::VmReports { number: self.number, reports }
    }
}

/// What it is once it is as wished; machines do not move or go away here.
fn as_wished(wish: &VmWish) -> Option<Phase> {
    match wish.power {
        Power::Running => Some(Phase::Running),
        Power::Suspended => Some(Phase::Suspended),
        Power::Stopped => Some(Phase::Stopped),
        Power::Arriving | Power::Absent => None,
    }
}
