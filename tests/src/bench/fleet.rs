//! Hosts that only beat: each has joined, holds a session with the leader and sends heartbeats, and starts nothing.
//!
//! What the controllers do for them is real. Many hosts fit in one process because nothing is behind them, so the
//! cell tells what hosts cost the quorum, and nothing about agents.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use api::{
    beat::{self, Beat, BeatKey, MAX_DATAGRAM_BYTES, StatusPart},
    client::{self, Joined},
    proto::{Frame, node_session_client::NodeSessionClient},
    session::{FromAgent, MAX_FRAME_BYTES, ToAgent, decode, encode},
    tls::{Identity, client_tls, connect, make_key_and_csr},
};
use jepsen::cluster::{Cluster, PATIENCE};
use model::{Capacity, HypervisorKind, NodeId, telemetry::NodeStatus};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::LOOK_AGAIN;

/// Of all hosts together, to each controller: each beats twice a second.
const CALM: u64 = 2;
/// Beats are sent in bursts this far apart; on a real network they come evenly, which costs more wake-ups.
const BURST: Duration = Duration::from_millis(2);
/// One beat in so many tells the host's status.
const STATUS_EVERY: u64 = 10;

/// One controller under one rate of beats.
#[derive(Debug, Serialize)]
pub struct Listening {
    /// `leader` or `follower`.
    pub role: &'static str,
    pub asked_per_second: u64,
    pub answered_per_second: f64,
    /// Of one core, all that the controller did meanwhile.
    pub core: f64,
}

struct Host {
    node: NodeId,
    key: BeatKey,
    incarnation: u64,
}

/// What the thread that beats at one controller is told, and tells.
#[derive(Default)]
struct Ear {
    per_second: AtomicU64,
    answered: AtomicU64,
    stop: AtomicBool,
}

pub struct Fleet {
    hosts: Arc<Vec<Host>>,
    ears: Vec<Arc<Ear>>,
    threads: Vec<JoinHandle<std::io::Result<()>>>,
    /// A session lasts as long as what it could be told with.
    sessions: Vec<mpsc::Sender<Frame>>,
}

impl Fleet {
    /// Hosts of this capacity, in session with the leader and silent.
    ///
    /// # Errors
    /// When one is not let in.
    pub async fn attach(cluster: &Cluster, hosts: usize, capacity: Capacity) -> anyhow::Result<Self> {
        let (mut known, mut sessions) = (Vec::new(), Vec::new());
        for number in 0..hosts {
            // Loopback addresses on which nobody listens: a controller that looks after a host leaves nothing.
            let ip = format!("127.9.{}.{}", number / 250, number % 250 + 1);
            let address = format!("{ip}:7471");
            let request = make_key_and_csr()?;
            let token = cluster.join_token("agent").await?;
            let joined = client::join(&token, &name(number), &address, request.csr_der, PATIENCE).await?;
            let Joined::Agent(reply) = joined else { bail!("the token is no agent's") };
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec());
            let identity = Identity {
                ca_pem: text(&reply.ca_pem)?,
                cert_pem: text(&reply.certificate_pem)?,
                key_pem: request.key_pem,
            };
            let hello = FromAgent::Hello {
                version: env!("CARGO_PKG_VERSION").into(),
                address,
                underlay: ip.parse()?,
                hypervisor: HypervisorKind::Simulated,
                capacity,
            };
            let (session, incarnation) = session(cluster, &identity, &hello).await?;
            let key = BeatKey::from_bytes(&reply.beat_key).context("a beat key has 32 bytes")?;
            known.push(Host { node: NodeId(reply.id), key, incarnation });
            sessions.push(session);
        }
        Ok(Self { hosts: Arc::new(known), ears: Vec::new(), threads: Vec::new(), sessions })
    }

    /// Of all hosts.
    pub fn names(&self) -> impl Iterator<Item = String> {
        (0..self.hosts.len()).map(name)
    }

    /// From now on each host beats twice a second at every controller.
    ///
    /// # Errors
    /// When a socket cannot be had.
    pub fn beat(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        for controller in 0..cluster.size() {
            let (target, hosts) = (cluster.address(controller).parse()?, self.hosts.clone());
            let ear = Arc::new(Ear::default());
            ear.per_second.store(CALM * hosts.len() as u64, Relaxed);
            self.ears.push(ear.clone());
            self.threads.push(std::thread::spawn(move || beat_at(target, &hosts, &ear)));
        }
        Ok(())
    }

    /// How much of a core a controller takes while one of them hears so many beats a second, and the others as many as ever.
    ///
    /// # Errors
    /// When nobody leads, or most beats stay unanswered.
    pub async fn measure(&self, cluster: &Cluster, per_second: u64, time: Duration) -> anyhow::Result<[Listening; 2]> {
        let leader = cluster.leader().await.context("nobody leads")?;
        let follower = (leader + 1) % cluster.size();
        Ok([
            self.listening(cluster, leader, "leader", per_second, time).await?,
            self.listening(cluster, follower, "follower", per_second, time).await?,
        ])
    }

    async fn listening(
        &self,
        cluster: &Cluster,
        controller: usize,
        role: &'static str,
        per_second: u64,
        time: Duration,
    ) -> anyhow::Result<Listening> {
        let ear = &self.ears[controller];
        let calm = ear.per_second.swap(per_second, Relaxed);
        let (answered, cpu, began) = (ear.answered.load(Relaxed), cluster.cpu_time_of(controller), Instant::now());
        tokio::time::sleep(time).await;
        let seconds = began.elapsed().as_secs_f64();
        let answered = (ear.answered.load(Relaxed) - answered) as f64 / seconds;
        let used = cluster.cpu_time_of(controller).saturating_sub(cpu).as_secs_f64();
        ear.per_second.store(calm, Relaxed);
        anyhow::ensure!(
            answered * 2.0 > per_second as f64,
            "of {per_second} beats a second {answered:.0} were answered"
        );
        Ok(Listening { role, asked_per_second: per_second, answered_per_second: answered, core: used / seconds })
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.ears.iter().for_each(|ear| ear.stop.store(true, Relaxed));
        for thread in self.threads.drain(..) {
            // What it had to say was said when it mattered: no beat was answered.
            let _ = thread.join();
        }
        self.sessions.clear();
    }
}

fn name(number: usize) -> String {
    format!("beat-{number}")
}

/// With whoever leads; another may before the session is open.
async fn session(
    cluster: &Cluster,
    identity: &Identity,
    hello: &FromAgent,
) -> anyhow::Result<(mpsc::Sender<Frame>, u64)> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let leader = cluster.leader().await.context("nobody leads")?;
        match open_session(cluster.address(leader), identity, hello).await {
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(LOOK_AGAIN).await,
            opened => return opened,
        }
    }
}

/// Opens a session with the leader and reads whatever comes; the incarnation that it was given.
async fn open_session(
    leader: &str,
    identity: &Identity,
    hello: &FromAgent,
) -> anyhow::Result<(mpsc::Sender<Frame>, u64)> {
    let channel = connect(leader, client_tls(identity))?;
    let mut client = NodeSessionClient::new(channel).max_decoding_message_size(2 * MAX_FRAME_BYTES);
    let (tell, told) = mpsc::channel(1);
    tell.send(Frame { body: encode(hello).into() }).await?;
    let mut answers = client.attach(ReceiverStream::new(told)).await?.into_inner();
    let first = answers.message().await?.context("no welcome")?;
    let ToAgent::Welcome { incarnation, .. } = decode(&first.body)? else { bail!("the first word was no welcome") };
    tokio::spawn(async move { while let Ok(Some(_)) = answers.message().await {} });
    Ok((tell, incarnation))
}

/// Beats of all hosts in turn at one controller, and its answers, until told to stop.
fn beat_at(target: SocketAddr, hosts: &[Host], ear: &Ear) -> std::io::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(target)?;
    socket.set_nonblocking(true)?;
    let mut answer = [0; MAX_DATAGRAM_BYTES];
    let (mut turn, mut nonce, mut owed, mut last) = (0_u64, 0, 0.0, Instant::now());
    while !ear.stop.load(Relaxed) {
        let now = Instant::now();
        owed += now.duration_since(last).as_secs_f64() * ear.per_second.load(Relaxed) as f64;
        last = now;
        while owed >= 1.0 {
            owed -= 1.0;
            let host = &hosts[turn as usize % hosts.len()];
            let datagram = next_beat(host, turn / hosts.len() as u64 + 1, nonce);
            turn += 1;
            // A full socket loses datagrams, as a network does.
            let _ = socket.send(&datagram);
        }
        while let Ok(length) = socket.recv(&mut answer) {
            ear.answered.fetch_add(1, Relaxed);
            if nonce == 0
                && let Some((_, node)) = beat::decode_header(&answer[..length])
                && let Some(host) = hosts.iter().find(|host| host.node == node)
                && let Ok(ack) = beat::decode_ack(&answer[..length], &host.key)
            {
                nonce = ack.nonce;
            }
        }
        std::thread::sleep(BURST);
    }
    Ok(())
}

fn next_beat(host: &Host, seq: u64, nonce: u64) -> Vec<u8> {
    let idle = NodeStatus {
        cpu_permille: 50,
        memory_used_bytes: 1 << 30,
        memory_total_bytes: 64 << 30,
        disk_used_bytes: 1 << 30,
        disk_total_bytes: 1 << 40,
        watchdog: false,
    };
    let status = (seq % STATUS_EVERY == 1 || seq < STATUS_EVERY).then(|| StatusPart {
        node: idle,
        part: 0,
        parts: 1,
        vms: Vec::new(),
    });
    let boottime = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    let message = Beat {
        node: host.node,
        incarnation: host.incarnation,
        seq,
        boottime_nanos: u64::try_from(boottime.as_nanos()).unwrap_or(u64::MAX),
        nonce,
        unanswered_millis: 0,
        status,
    };
    beat::encode(&message, &host.key).expect("a beat with one short status fits")
}
