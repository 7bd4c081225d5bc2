//! `trefoil agent`: joins a cloud once, then runs on the host and holds all the parts together.
//!
//! ```text
//!   session ── assignment ──► executor ── acts on ──► hypervisor, network, images
//!      ▲                        │   │
//!      └──────── outbox ◄───────┘   └── view ──► beats (UDP, to every controller)
//!   data server: images and consoles, for controllers and other agents
//!   samplers: load of the host, use of the guests, a summary every two minutes
//!   supervisor: keeps a guard at work, a process of its own that outlives this one
//! ```
//!
//! Each part is a task of its own, so that none waits for another's disk. The end of one ends the agent; its guests
//! run on, and the next agent finds them.

use std::{
    future::Future,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use api::{
    beat::BeatKey,
    client::{self, Joined},
    proto::node_data_server::NodeDataServer,
    tls::{Identity, make_key_and_csr, server_tls},
};
use model::{Capacity, NodeId};
use storage::images::ImageStore;
use tokio::{
    net::TcpListener,
    sync::watch,
    task::{JoinError, JoinSet, spawn_blocking},
    time::{MissedTickBehavior, interval, sleep},
};
use tonic::transport::{Server, server::TcpIncoming};

use crate::{
    beat::Beats,
    clock,
    data::DataService,
    executor::Executor,
    guard::supervisor::{GuardProgram, Supervisor},
    host::Host,
    hypervisor::{
        Hypervisor,
        simulated::{Simulated, SimulatedConfig},
    },
    journal::Journal,
    lease::Leases,
    membership::{DataDir, EpochMark, Membership},
    network::{Network, linux::LinuxNetwork, simulated::SimulatedNetwork},
    outbox::Outbox,
    relay::{self, Arrivals},
    session::{Heard, Introduction, Session},
    summary::Period,
    view::View,
};

/// Disk that images leave free, so that guests' disks can grow a little and the host can log.
pub const DEFAULT_IMAGE_RESERVE_BYTES: u64 = 1 << 30;
/// As long as a quorum may need to find a leader, several times over.
const JOIN_DEADLINE: Duration = Duration::from_secs(30);
const SAMPLE_PERIOD: Duration = Duration::from_secs(5);
/// How often simulated guests are held to what they may.
const GLANCE: Duration = Duration::from_millis(100);
/// Partial transfers that nobody took up again for so long are deleted.
const SWEEP_IDLE: Duration = Duration::from_secs(3600);
/// The largest message of a transfer: chunks are a fraction of it.
const MOST_MESSAGE_BYTES: usize = 4 << 20;
/// A peer that vanished is noticed within the sum of these.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Filled by `join`; holds identity, journal, images and guests.
    pub data: PathBuf,
    /// Where the data server listens.
    pub listen: SocketAddr,
    /// `host:port` at which others reach it; `None`: as it was said at the join.
    pub advertise: Option<String>,
    /// The address that VXLAN tunnels end at. With a real hypervisor a device of this host must have it.
    pub underlay: IpAddr,
    /// Controllers to try besides those that are known from the join and from the quorum.
    pub controllers: Vec<String>,
    pub hypervisor: HypervisorChoice,
    pub image_reserve_bytes: u64,
}

#[derive(Clone, Debug)]
pub enum HypervisorChoice {
    /// Guests by libvirt at `uri`, networks in the kernel. `limit`: offer at most this much.
    Libvirt { uri: String, limit: Option<Capacity>, guard: GuardProgram },
    /// Guests and networks on paper only. Thousandths: see `SimulatedConfig`.
    Simulated { capacity: Capacity, delay_permille: u64, failure_permille: u64, seed: u64, effects: Option<PathBuf> },
}

impl HypervisorChoice {
    /// Sockets of libvirt's are where all hosts have them, below `/run`; simulated guests need none.
    fn arrivals(&self, data: &std::path::Path, cluster: &str) -> Arrivals {
        match self {
            Self::Libvirt { uri, .. } => Arrivals::new(relay::socket_dir(cluster), relay::control_socket(uri)),
            Self::Simulated { .. } => Arrivals::new(data.join("moving"), None),
        }
    }
}

/// Becomes a member of the cloud that issued `token`. Gives the id that the host has there.
///
/// # Errors
/// When the directory belongs to a member already, the token is refused, or no controller answers.
pub async fn join(token: &str, name: &str, address: &str, data: &std::path::Path) -> Result<NodeId> {
    let dir = DataDir::open(data)?;
    dir.must_be_free()?;
    let request = make_key_and_csr()?;
    let joined = client::join(token, name, address, request.csr_der, JOIN_DEADLINE).await?;
    let Joined::Agent(reply) = joined else { bail!("the token is a controller's, not an agent's") };
    let text =
        |bytes: &[u8], what: &str| String::from_utf8(bytes.to_vec()).with_context(|| format!("the {what} is not text"));
    let identity = Identity {
        ca_pem: text(&reply.ca_pem, "authority's certificate")?,
        cert_pem: text(&reply.certificate_pem, "certificate")?,
        key_pem: request.key_pem,
    };
    let beat_key = BeatKey::from_bytes(&reply.beat_key).context("the key of the heartbeats has not 32 bytes")?;
    let node = NodeId(reply.id);
    let (name, address) = (name.to_owned(), address.to_owned());
    dir.save_controllers(&reply.controllers)?;
    dir.save_membership(&Membership { cluster: reply.cluster, node, name, address, beat_key, identity })?;
    Ok(node)
}

/// Runs until `shutdown`, or until something fails that a restart may cure.
///
/// # Errors
/// When the host has not joined, a part cannot be opened, or the disk fails.
pub async fn run(config: AgentConfig, shutdown: impl Future<Output = ()>) -> Result<()> {
    let dir = DataDir::open(&config.data)?;
    let member = dir.membership()?;
    let (hypervisor, network) = open_world(&config, &member).await?;
    run_in(config, dir, member, hypervisor, network, shutdown).await
}

/// As `run`, in a world that is given: tests bring their own.
///
/// # Errors
/// As `run`.
pub async fn run_in(
    config: AgentConfig,
    dir: DataDir,
    member: Membership,
    hypervisor: Arc<dyn Hypervisor>,
    network: Arc<dyn Network>,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let images = ImageStore::open(&dir.path, config.image_reserve_bytes)?;
    images.sweep(SWEEP_IDLE)?;
    let journal = Journal::open(&dir.path).context("the journal cannot be read")?;
    let known = dir.controllers()?;
    let leases = Arc::new(Leases::open(&dir.path).context("the page of the guard cannot be used")?);
    let view = Arc::new(View::default());
    let host = Arc::new(Host {
        cluster: member.cluster.clone(),
        node: member.node,
        identity: member.identity.clone(),
        data: config.data.clone(),
        underlay: config.underlay,
        hypervisor: hypervisor.clone(),
        network,
        images,
        view: view.clone(),
        leases: leases.clone(),
        arrivals: config.hypervisor.arrivals(&config.data, &member.cluster),
    });
    let outbox = Arc::new(Outbox::default());
    let heard = Heard {
        assignment: watch::Sender::new(None),
        incarnation: watch::Sender::new(0),
        beat_targets: watch::Sender::new(known.clone()),
    };
    let (leads, leader) = watch::channel(None);
    let session = Session {
        identity: member.identity.clone(),
        controllers: [config.controllers, known].concat(),
        introduction: Introduction {
            address: config.advertise.unwrap_or(member.address),
            underlay: config.underlay,
            hypervisor,
        },
        epoch: EpochMark::open(&config.data)?,
        outbox: outbox.clone(),
        heard: heard.clone(),
        leader,
    };
    let beats = Beats {
        node: member.node,
        key: member.beat_key,
        view,
        leases: leases.clone(),
        incarnation: heard.incarnation.subscribe(),
        targets: heard.beat_targets.subscribe(),
        leader: leads,
    };
    let executor = Executor::new(host.clone(), outbox.clone(), journal);
    let listener =
        TcpListener::bind(config.listen).await.with_context(|| format!("cannot listen on {}", config.listen))?;
    tracing::info!(node = %member.node, name = member.name, cluster = member.cluster, listen = %config.listen, "the agent runs");

    let mut parts = JoinSet::new();
    let (assignments, incarnation) = (heard.assignment.subscribe(), heard.incarnation.subscribe());
    parts.spawn(async move { executor.run(assignments, incarnation).await.context("the journal cannot be written") });
    parts.spawn(async move { beats.run().await.context("heartbeats cannot be sent") });
    parts.spawn(async move {
        session.keep().await;
        Ok(())
    });
    parts.spawn(remember_controllers(dir, heard.beat_targets.subscribe()));
    parts.spawn(sample_node(host.clone(), outbox));
    parts.spawn(sample_guests(host.clone()));
    parts.spawn(bound_consoles(host.clone()));
    match config.hypervisor {
        HypervisorChoice::Libvirt { guard, .. } => {
            let supervisor = Supervisor::new(config.data, guard, leases);
            parts.spawn(async move { supervisor.keep().await.context("the guard cannot be supervised") })
        }
        HypervisorChoice::Simulated { .. } => parts.spawn(guard_within(host.clone())),
    };
    parts.spawn(serve_data(host, listener));
    tokio::select! {
        () = shutdown => Ok(()),
        ended = parts.join_next() => Err(why_ended(ended)),
    }
}

/// Parts run for ever; one that ended has a reason to tell.
fn why_ended(part: Option<Result<Result<()>, JoinError>>) -> anyhow::Error {
    match part {
        Some(Ok(Err(error))) => error,
        Some(Err(panic)) => anyhow::Error::new(panic).context("a part of the agent ended by a mistake in it"),
        Some(Ok(Ok(()))) | None => anyhow!("a part of the agent ended without a reason"),
    }
}

/// Serves images and consoles to the rest of the cloud for as long as it is polled.
///
/// # Errors
/// When the certificates are not usable, or the listener fails.
pub async fn serve_data(host: Arc<Host>, listener: TcpListener) -> Result<()> {
    let service = NodeDataServer::new(DataService::new(host.clone())).max_decoding_message_size(MOST_MESSAGE_BYTES);
    Server::builder()
        .tls_config(server_tls(&host.identity))?
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(service)
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await
        .context("the data server failed")
}

async fn open_world(config: &AgentConfig, member: &Membership) -> Result<(Arc<dyn Hypervisor>, Arc<dyn Network>)> {
    match &config.hypervisor {
        HypervisorChoice::Libvirt { uri, limit, .. } => open_libvirt(config, member, uri.clone(), *limit).await,
        HypervisorChoice::Simulated { capacity, delay_permille, failure_permille, seed, effects } => {
            let simulated = SimulatedConfig {
                dir: config.data.clone(),
                cluster: member.cluster.clone(),
                host: member.name.clone(),
                capacity: *capacity,
                delay_permille: *delay_permille,
                failure_permille: *failure_permille,
                seed: *seed,
                effects: effects.clone(),
            };
            Ok((Arc::new(Simulated::open(simulated)?), Arc::new(SimulatedNetwork::new())))
        }
    }
}

#[cfg(feature = "libvirt")]
async fn open_libvirt(
    config: &AgentConfig,
    member: &Membership,
    uri: String,
    limit: Option<Capacity>,
) -> Result<(Arc<dyn Hypervisor>, Arc<dyn Network>)> {
    use crate::hypervisor::libvirt::{Libvirt, LibvirtConfig};
    let libvirt = LibvirtConfig { uri, dir: config.data.clone(), cluster: member.cluster.clone(), limit };
    let libvirt = spawn_blocking(move || Libvirt::open(libvirt)).await??;
    let network = LinuxNetwork::open(config.underlay).await?;
    Ok((Arc::new(libvirt), Arc::new(network)))
}

#[cfg(not(feature = "libvirt"))]
async fn open_libvirt(
    _: &AgentConfig,
    _: &Membership,
    _: String,
    _: Option<Capacity>,
) -> Result<(Arc<dyn Hypervisor>, Arc<dyn Network>)> {
    bail!("this build has no libvirt; it runs simulated guests only")
}

/// So that an agent that was away while the quorum changed still finds it.
async fn remember_controllers(dir: DataDir, mut targets: watch::Receiver<Vec<String>>) -> Result<()> {
    while targets.changed().await.is_ok() {
        let controllers = targets.borrow_and_update().clone();
        if !controllers.is_empty() {
            dir.save_controllers(&controllers)?;
        }
    }
    Ok(())
}

/// Guests on paper are no processes, and end with this one's word: no guard of its own could stop them.
async fn guard_within(host: Arc<Host>) -> Result<()> {
    loop {
        let (permit, now) = (host.leases.permit(), clock::boottime_nanos());
        host.leases.page().write_sign(std::process::id(), now, 0);
        let left = permit.until.checked_sub(now).map_or(GLANCE, Duration::from_nanos);
        let hypervisor = host.hypervisor.clone();
        spawn_blocking(move || hypervisor.enforce(&permit, now)).await??;
        sleep(left.min(GLANCE)).await;
    }
}

async fn sample_node(host: Arc<Host>, outbox: Arc<Outbox>) -> Result<()> {
    let mut tick = ticks();
    let mut period = Period::default();
    loop {
        tick.tick().await;
        let hypervisor = host.hypervisor.clone();
        match spawn_blocking(move || hypervisor.node_status()).await? {
            Ok(mut status) => {
                let sign = host.leases.page().sign().filter(|sign| sign.is_fresh(clock::boottime_nanos()));
                status.watchdog = sign.is_some_and(|sign| sign.watchdog);
                if let Some(summary) = period.add(clock::boottime_millis(), clock::wall(), &status) {
                    outbox.summary(summary);
                }
                host.view.set_node(status);
            }
            Err(error) => tracing::debug!(%error, "the load of this host cannot be seen"),
        }
    }
}

/// Apart from the load of the host: a guest that is stuck may hold this for half a minute.
async fn sample_guests(host: Arc<Host>) -> Result<()> {
    let mut tick = ticks();
    loop {
        tick.tick().await;
        let hypervisor = host.hypervisor.clone();
        match spawn_blocking(move || hypervisor.usage()).await? {
            Ok(usage) => host.view.set_usage(usage),
            Err(error) => tracing::debug!(%error, "the use of the guests cannot be seen"),
        }
    }
}

/// Apart from the use of the guests: while that waits for one that is stuck, the others go on writing.
async fn bound_consoles(host: Arc<Host>) -> Result<()> {
    let mut tick = ticks();
    loop {
        tick.tick().await;
        let hypervisor = host.hypervisor.clone();
        if let Err(error) = spawn_blocking(move || hypervisor.bound_consoles()).await? {
            tracing::warn!(%error, "the logs of the guests' consoles cannot be looked at");
        }
    }
}

fn ticks() -> tokio::time::Interval {
    let mut tick = interval(SAMPLE_PERIOD);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick
}

#[cfg(test)]
mod tests;
