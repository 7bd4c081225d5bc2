//! A cloud with many machines and many hosts: what a list costs, how soon a burst of machines has hosts, and what
//! the hosts' beats cost each controller.

use std::{
    collections::HashSet,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use api::{
    client::{Client, new_request_id},
    proto::{CreateVmRequest, ListVmsRequest, MaintainNodeRequest},
};
use hdrhistogram::Histogram;
use jepsen::{
    chance::Chance,
    cluster::{Cluster, Options, PATIENCE},
};
use model::Capacity;
use serde::Serialize;

use super::{
    Settings, TENANT, failover,
    fleet::{Fleet, Listening},
    load::{self, Operation},
    store, watchers,
};

/// Machines that are created at the same time.
const CREATORS: usize = 64;
/// Clients that write while lists are read.
const WRITERS: usize = 16;
/// How often each of them writes: 500 writes a second together, as ten thousand machines that each change every twenty seconds,
/// and as often as it is answered, which takes all of both cores.
const PACES: [Duration; 2] = [Duration::from_millis(32), Duration::ZERO];
const SHORT_PAGE: u32 = 100;
/// Whole lists; ten times as many short pages.
const LISTS: usize = 40;
/// Beats of a thousand hosts, and of ten thousand.
const BEATS: [u64; 2] = [2_000, 20_000];
/// Room for every machine twice over.
const ROOM: u64 = 2;
const MACHINE: Capacity = Capacity { vcpus: 1, memory_bytes: 64 << 20, disk_bytes: 1 << 20 };

#[derive(Debug, Serialize)]
pub struct Growth {
    pub machines: usize,
    pub hosts: usize,
    /// Machines accepted a second.
    pub created_per_second: f64,
    /// Beside each of [`PACES`].
    pub lists: Vec<Lists>,
    /// Placements committed a second, until the last machine had a host.
    pub placed_per_second: f64,
    pub listening: Vec<Listening>,
    pub watching: watchers::Watching,
    pub joining: failover::Joining,
    pub resident_mib: f64,
}

#[derive(Debug, Serialize)]
pub struct Lists {
    /// That went on meanwhile.
    pub writes_per_second: f64,
    pub whole_millis: Quantiles,
    pub page_millis: Quantiles,
}

#[derive(Debug, Serialize)]
pub struct Quantiles {
    pub p50: f64,
    pub p99: f64,
}

impl Quantiles {
    fn of(micros: &Histogram<u64>) -> Self {
        let millis = |quantile| micros.value_at_quantile(quantile) as f64 / 1000.0;
        Self { p50: millis(0.5), p99: millis(0.99) }
    }
}

/// # Errors
/// When the cloud does not come up or refuses.
pub async fn measure(root: &Path, settings: &Settings) -> anyhow::Result<Growth> {
    // One host takes the image and has no room for a machine.
    let options =
        Options { controllers: 3, agents: 1, offer: Some((1, 1 << 20)), isolated: false, snapshot_every: None };
    let mut cluster = Cluster::start(root, options).await?;
    let grown = grow(&mut cluster, root, settings).await;
    cluster.stop().await?;
    grown
}

async fn grow(cluster: &mut Cluster, root: &Path, settings: &Settings) -> anyhow::Result<Growth> {
    let (machines, hosts) = (settings.grown, settings.hosts);
    prepare(cluster, root, machines)?;
    let clients: Vec<Client> = (0..3).map(|number| client(cluster, number)).collect::<Result<_, _>>()?;
    let each = ROOM * machines.div_ceil(hosts) as u64;
    let capacity = Capacity {
        vcpus: each,
        memory_bytes: each * MACHINE.memory_bytes,
        disk_bytes: each * (MACHINE.disk_bytes + (1 << 30)),
    };
    let mut fleet = Fleet::attach(cluster, hosts, capacity).await?;
    fleet.beat(cluster)?;
    maintain(&clients, &fleet, true).await?;
    let created_per_second = create(&clients, machines).await?;
    eprintln!("  {machines} machines: {created_per_second:.0} created a second");
    let mut lists = Vec::new();
    for every in PACES {
        let read = read_lists(cluster, &clients, machines, every).await?;
        eprintln!("  list p99 {:.1} ms, page p99 {:.2} ms", read.whole_millis.p99, read.page_millis.p99);
        lists.push(read);
    }
    let watching = watchers::measure(cluster, settings.watchers).await?;
    eprintln!("  {} watchers: p99 {:.1} ms", watching.watchers, watching.p99_millis);
    let placed_per_second = place(&clients, &fleet, machines).await?;
    eprintln!("  {placed_per_second:.0} placed a second");
    let (mut listening, time) = (Vec::new(), Duration::from_secs_f64(settings.seconds));
    for per_second in BEATS {
        listening.extend(fleet.measure(cluster, per_second, time).await?);
    }
    let resident_mib = cluster.resident_bytes() as f64 / 1_048_576.0;
    let joining = failover::join_anew(cluster).await?;
    eprintln!("  a new member after {:.1} s, at most {:.0} ms without a write", joining.seconds, joining.gap_millis);
    Ok(Growth {
        machines,
        hosts,
        created_per_second,
        lists,
        placed_per_second,
        listening,
        watching,
        joining,
        resident_mib,
    })
}

/// Speaks to one controller only.
pub fn client(cluster: &Cluster, number: usize) -> anyhow::Result<Client> {
    let access = cluster.access();
    Ok(Client::new(&[cluster.endpoint(number % cluster.size())], &access.ca_pem, &access.token)?)
}

/// A tenant with room for all machines, and what they are made of.
fn prepare(cluster: &Cluster, root: &Path, machines: usize) -> anyhow::Result<()> {
    let image = root.join("disk.raw");
    std::fs::write(&image, vec![7; 64 << 10])?;
    let (image, machines) = (image.display().to_string(), machines.to_string());
    let (vcpus, memory, disk) =
        (MACHINE.vcpus.to_string(), MACHINE.memory_bytes.to_string(), MACHINE.disk_bytes.to_string());
    let commands: [&[&str]; 5] = [
        &[
            "tenant", "create", TENANT, "--vms", &machines, "--vcpus", "1000000", "--memory", "1000TiB", "--disk",
            "1000TiB",
        ],
        &["network", "create", "lan", "--tenant", TENANT, "--range", "10.0.0.0/14"],
        &["image", "import", &image, "--name", "disk", "--format", "raw", "--tenant", TENANT],
        &["template", "create", "small", "--vcpus", &vcpus, "--memory", &memory, "--disk", &disk],
        // The hosts of this cloud are silent together at its end, and nobody is to be told.
        &["setting", "set", "brake-count", "1"],
    ];
    for command in commands {
        let output = cluster.trefoil(command).output()?;
        anyhow::ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Machines accepted a second.
async fn create(clients: &[Client], machines: usize) -> anyhow::Result<f64> {
    let began = Instant::now();
    let mut creators = tokio::task::JoinSet::new();
    for creator in 0..CREATORS {
        let client = clients[creator % clients.len()].clone();
        creators.spawn(async move {
            for number in (creator..machines).step_by(CREATORS) {
                let machine = CreateVmRequest {
                    tenant: TENANT.into(),
                    name: format!("m{number}"),
                    image: "disk".into(),
                    template: "small".into(),
                    network: "lan".into(),
                    ..CreateVmRequest::default()
                };
                client
                    .mutate(new_request_id(), machine, async |mut stub, request| stub.create_vm(request).await)
                    .await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = creators.join_next().await {
        done??;
    }
    Ok(machines as f64 / began.elapsed().as_secs_f64())
}

/// The whole list and a short page of it, beside writers who each write once in `every`.
async fn read_lists(cluster: &Cluster, clients: &[Client], machines: usize, every: Duration) -> anyhow::Result<Lists> {
    let stores = store::clients(cluster, WRITERS.min(6))?;
    load::fill(&stores).await?;
    let mut writers = tokio::task::JoinSet::new();
    let began = Instant::now();
    let until = began + Duration::from_secs(3600);
    for number in 0..WRITERS {
        let (store, chance) = (stores[number % stores.len()].clone(), Chance::new(number as u64));
        writers.spawn(load::paced_client(store, Operation::Write, until, chance, every));
    }
    let before = applied(cluster).await?;
    let (mut whole, mut short) = (load::histogram(), load::histogram());
    let asked = ListVmsRequest { tenant: TENANT.into(), ..ListVmsRequest::default() };
    for round in 0..LISTS {
        let client = &clients[round % clients.len()];
        let start = Instant::now();
        let found = client.all_vms(asked.clone()).await?.vms;
        whole.record(u64::try_from(start.elapsed().as_micros())?)?;
        anyhow::ensure!(found.len() == machines, "{} of {machines} machines are listed", found.len());
        for page in 0..10 {
            let after = found[(round * 10 + page) * machines / (LISTS * 10)].id.clone();
            let asked = ListVmsRequest { limit: SHORT_PAGE, after, ..asked.clone() };
            let start = Instant::now();
            client.read(asked, async |mut stub, request| stub.list_vms(request).await).await?;
            short.record(u64::try_from(start.elapsed().as_micros())?)?;
        }
    }
    let writes_per_second = (applied(cluster).await? - before) as f64 / began.elapsed().as_secs_f64();
    writers.shutdown().await;
    Ok(Lists { writes_per_second, whole_millis: Quantiles::of(&whole), page_millis: Quantiles::of(&short) })
}

async fn applied(cluster: &Cluster) -> anyhow::Result<u64> {
    let status = cluster.status(0).await.context("a controller does not answer")?;
    Ok(status.controllers.iter().map(|member| member.applied_index).max().unwrap_or(0))
}

/// No host takes machines, or each does.
async fn maintain(clients: &[Client], fleet: &Fleet, maintenance: bool) -> anyhow::Result<()> {
    let changes = fleet.names().enumerate().map(|(number, name)| {
        let client = &clients[number % clients.len()];
        let asked = MaintainNodeRequest { name, maintenance };
        client.mutate(new_request_id(), asked, async |mut stub, request| stub.maintain_node(request).await)
    });
    futures::future::try_join_all(changes).await?;
    Ok(())
}

/// Hosts given to machines a second, from the first to the last.
async fn place(clients: &[Client], fleet: &Fleet, machines: usize) -> anyhow::Result<f64> {
    let mut watch = clients[0].watch(TENANT, None).await?;
    watch.next().await?;
    let told = async {
        let (mut placed, mut first) = (HashSet::new(), None);
        while placed.len() < machines {
            let told = watch.next().await?;
            placed.extend(told.events.into_iter().filter(|event| event.kind == "vm").map(|event| event.id));
            if !placed.is_empty() {
                first.get_or_insert_with(Instant::now);
            }
        }
        anyhow::Ok(machines as f64 / first.map_or(f64::INFINITY, |first| first.elapsed().as_secs_f64()))
    };
    let (lifted, told) = tokio::join!(maintain(clients, fleet, false), tokio::time::timeout(4 * PATIENCE, told));
    lifted?;
    told.context("not every machine was given a host")?
}
