//! Measurements of a real three-controller cloud, beside a three-member etcd on the same disk in the same minutes, and
//! of machines beside plain libvirt on the same host.
//!
//! Absolute figures tell about the machine; the ratios tell about the code. Each cell is measured in several rounds,
//! the two systems in turn, so that what else the machine does falls on both.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context;
use jepsen::cluster::{Cluster, Options};
use serde::Serialize;

use self::{
    etcd::Etcd,
    load::{Cell, Operation},
    store::Store,
};

pub mod disk;
pub mod etcd;
pub mod failover;
pub mod fleet;
pub mod growth;
pub mod load;
pub mod machines;
pub mod profile;
pub mod store;
pub mod table;
pub mod watchers;

/// Clients at the same time, unless others are asked for.
const CLIENTS: [usize; 4] = [1, 16, 64, 256];
/// Connections that they share, two to each member: a client program has one or a few, not one a request.
const CONNECTIONS: usize = 6;
/// Between two looks at what a server is waited for.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Different keys, written before the first measurement.
pub const KEYS: usize = 1000;
pub const VALUE_BYTES: usize = 256;
pub const TENANT: &str = "bench";
/// The systems, as table and JSON name them.
pub const TREFOIL: &str = "trefoil";
pub const ETCD: &str = "etcd";
pub const ETCD_TLS: &str = "etcd+tls";

#[derive(Debug, clap::Args)]
pub struct Settings {
    /// Seconds of one measurement.
    #[arg(long, default_value_t = 3.0)]
    pub seconds: f64,
    /// Measurements of each cell and system.
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Clients at the same time; one cell of the table each.
    #[arg(long, value_delimiter = ',', default_values_t = CLIENTS)]
    pub clients: Vec<usize>,
    /// What they do.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = [Operation::Write, Operation::Read, Operation::Stale])]
    pub operations: Vec<Operation>,
    /// How often the leader is killed.
    #[arg(long, default_value_t = 20)]
    pub kills: usize,
    /// Machines created on a real host, each beside one of plain libvirt.
    #[arg(long, default_value_t = 12)]
    pub machines: usize,
    /// Machines of the cloud whose lists, placements and heartbeats are measured; 0 leaves it out.
    #[arg(long, default_value_t = 20_000)]
    pub grown: usize,
    /// Its hosts, which only beat.
    #[arg(long, default_value_t = 100)]
    pub hosts: usize,
    /// Who watch it at the same time.
    #[arg(long, default_value_t = 1_000)]
    pub watchers: usize,
    /// Where the servers keep their data: on the disk that is to be measured. By default beside this program.
    #[arg(long)]
    pub data: Option<PathBuf>,
    /// Where the JSON goes.
    #[arg(long, default_value = "bench.json")]
    pub json: PathBuf,
}

#[derive(Debug, Serialize)]
pub struct Results {
    pub disk: disk::SyncRate,
    pub cells: Vec<Cell>,
    /// Where the members' CPU time goes while [`profile::WRITERS`] clients write.
    pub hot: Vec<profile::Hot>,
    pub steady: Steady,
    pub failover: Vec<failover::Gaps>,
    pub handovers: Option<failover::Handovers>,
    pub growth: Option<growth::Growth>,
    pub creation: Option<machines::Creation>,
    pub memory: Vec<Memory>,
    /// What could not be measured here, and why.
    pub skipped: Vec<String>,
    /// What went wrong; everything else was measured.
    pub failed: Vec<String>,
    /// Load average of the machine at start and end: what else was going on.
    pub load_average: [f64; 2],
}

/// Whether anybody took the leader for dead while it was only busy.
#[derive(Debug, Serialize)]
pub struct Steady {
    /// Of all the load, that of the peers too.
    pub minutes: f64,
    pub elections: u64,
}

#[derive(Debug, Serialize)]
pub struct Memory {
    pub system: &'static str,
    /// Mean over the members after all measurements, in MiB.
    pub resident_mib: f64,
}

/// # Errors
/// When a server does not start or stops by itself.
pub async fn run(settings: &Settings) -> anyhow::Result<Results> {
    let root = match &settings.data {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name(format!("bench-{}", std::process::id())),
    };
    std::fs::create_dir_all(&root)?;
    let results = measure(settings, &root).await;
    std::fs::remove_dir_all(&root).with_context(|| format!("removing {}", root.display()))?;
    results
}

async fn measure(settings: &Settings, root: &std::path::Path) -> anyhow::Result<Results> {
    let before = load_average();
    let (mut skipped, mut failed) = (Vec::new(), Vec::new());
    let options = Options { controllers: 3, agents: 0, offer: None, isolated: false, snapshot_every: None };
    let mut cluster = Cluster::start(&root.join("t"), options).await?;
    cluster.create_tenant(TENANT).await?;
    let mut peers: Vec<(&'static str, Etcd)> = Vec::new();
    match Etcd::obstacle() {
        None => {
            peers.push((ETCD, Etcd::start(&root.join("e"), false).await?));
            peers.push((ETCD_TLS, Etcd::start(&root.join("s"), true).await?));
        }
        Some(why) => skipped.push(format!("etcd: {why}")),
    }
    let (began, term) = (Instant::now(), cluster.status(0).await.context("a controller does not answer")?.term);
    let (disk, cells) = measure_load(settings, root, &cluster, &peers).await?;
    let mut hot = Vec::new();
    match profile::obstacle() {
        None => {
            let stores = store::clients(&cluster, CONNECTIONS)?;
            let time = Duration::from_secs_f64(settings.seconds);
            let measured = profile::measure(&cluster, &stores, root, time).await;
            hot.extend(kept("the profile", measured, &mut failed).into_iter().flatten());
        }
        Some(why) => skipped.push(format!("the profile: {why}")),
    }
    let now = cluster.status(0).await.context("a controller does not answer")?.term;
    let steady = Steady { minutes: began.elapsed().as_secs_f64() / 60.0, elections: now - term };
    let mib = |bytes: u64| bytes as f64 / 1_048_576.0;
    let mut memory = vec![Memory { system: TREFOIL, resident_mib: mib(cluster.resident_bytes()) }];
    memory.extend(peers.iter().map(|(system, etcd)| Memory { system, resident_mib: mib(etcd.resident_bytes()) }));
    // Failover is a matter of timers, not of TLS: one etcd is enough, and nothing else runs beside.
    peers.truncate(1);
    let (mut failover, mut handovers) = (Vec::new(), None);
    if settings.kills > 0 {
        handovers = kept("handovers", failover::handovers(&mut cluster, settings.kills).await, &mut failed);
        failover.extend(kept("killed leaders", failover::trefoil(&mut cluster, settings.kills).await, &mut failed));
    }
    cluster.stop().await?;
    if settings.kills > 0 {
        for (_, etcd) in &mut peers {
            failover.push(failover::etcd(etcd, settings.kills).await?);
        }
    }
    drop(peers);
    let growth = match settings.grown {
        0 => None,
        _ => kept("the larger cloud", growth::measure(&root.join("g"), settings).await, &mut failed),
    };
    let creation = match machines::obstacle() {
        None if settings.machines > 0 => {
            kept("machines beside libvirt", machines::measure(settings.machines).await, &mut failed)
        }
        None => None,
        Some(why) => {
            skipped.push(format!("vm create: {why}"));
            None
        }
    };
    let load_average = [before, load_average()];
    Ok(Results {
        disk,
        cells,
        hot,
        steady,
        failover,
        handovers,
        growth,
        creation,
        memory,
        skipped,
        failed,
        load_average,
    })
}

/// A part that failed leaves what the others measured.
fn kept<T>(what: &str, measured: anyhow::Result<T>, failed: &mut Vec<String>) -> Option<T> {
    measured.inspect_err(|error| failed.push(format!("{what}: {error:#}"))).ok()
}

/// Every operation at every number of clients, all systems in turn.
async fn measure_load(
    settings: &Settings,
    root: &std::path::Path,
    cluster: &Cluster,
    peers: &[(&'static str, Etcd)],
) -> anyhow::Result<(disk::SyncRate, Vec<Cell>)> {
    let mut systems = vec![(TREFOIL, store::clients(cluster, CONNECTIONS)?)];
    for (name, etcd) in peers {
        systems.push((name, etcd.stores(CONNECTIONS)?));
    }
    for (name, stores) in &systems {
        load::fill(stores).await.with_context(|| format!("filling {name}"))?;
    }
    let cpu_time = |system: usize| match system {
        0 => cluster.cpu_time(),
        peer => peers[peer - 1].1.cpu_time(),
    };
    let mut sync = disk::SyncRate::default();
    let mut cells = Vec::new();
    let time = Duration::from_secs_f64(settings.seconds);
    for operation in settings.operations.iter().copied() {
        for clients in settings.clients.iter().copied() {
            let mut rows: Vec<Cell> = systems.iter().map(|(name, _)| Cell::new(name, operation, clients)).collect();
            for round in 0..settings.rounds {
                sync.measure(root, Duration::from_millis(300))?;
                // Who goes first changes from round to round.
                for turn in 0..systems.len() {
                    let index = (turn + round) % systems.len();
                    rows[index].measure(&systems[index].1, time, || cpu_time(index)).await?;
                }
            }
            eprintln!("  {operation} at {clients}: {}", rows.iter().map(Cell::line).collect::<Vec<_>>().join("; "));
            cells.extend(rows);
        }
    }
    Ok((sync, cells))
}

/// Of the last minute.
fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

/// Waits for a named condition.
///
/// # Errors
/// When it is not true within the patience.
pub async fn until<F: AsyncFnMut() -> bool>(
    what: &str,
    patience: Duration,
    look_again: Duration,
    mut holds: F,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + patience;
    while !holds().await {
        anyhow::ensure!(Instant::now() < deadline, "waited {patience:?} in vain for: {what}");
        tokio::time::sleep(look_again).await;
    }
    Ok(())
}

/// One connection to one member, as the load uses it.
pub type Stores = Vec<Store>;
