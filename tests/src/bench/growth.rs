//! A cloud with many machines and many hosts: what a list costs, how soon a burst of machines has hosts, what
//! the hosts' beats cost each controller, and how soon all is well again after a controller went down.

use std::{
    collections::HashSet,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use api::{
    client::{Client, new_request_id},
    proto::{CreateNetworkRequest, CreateVmRequest, ListVmsRequest, Setting},
};
use futures::{StreamExt, TryStreamExt, stream};
use hdrhistogram::Histogram;
use jepsen::{
    chance::Chance,
    cluster::{Cluster, Options, PATIENCE},
};
use model::{Capacity, setting::OVERCOMMIT_CPU};
use serde::Serialize;

use super::{
    LOOK_AGAIN, Settings, TENANT, failover,
    fleet::{Fleet, Listening},
    load::{self, Operation},
    store, until, watchers,
};

/// Machines that are created at the same time.
const CREATORS: usize = 64;
/// Clients that write while lists are read.
const WRITERS: usize = 16;
/// How often each of them writes: 500 writes a second together, as ten thousand machines that each change every twenty seconds,
/// and as often as it is answered, which takes all of both cores.
const PACES: [Duration; 2] = [Duration::from_millis(32), Duration::ZERO];
const SHORT_PAGE: u32 = 100;
/// Fewer entries in this time are no burst.
const A_WHILE: Duration = Duration::from_millis(500);
const FEW: u64 = 50;
/// Whole lists, fewer of them when they are very long; and short pages.
const LISTS: usize = 40;
const LISTED_ROWS: usize = LISTS * 20_000;
const PAGES: usize = 10 * LISTS;
/// Of each host. With the first of these thousandths promised no machine fits on it, with the second hundreds do: so all machines
/// wait until one change, and are given hosts from then on.
const VCPUS: u64 = 9;
const CLOSED: u64 = 100;
const OPEN: u64 = 64_000;
/// Machines of one network: their hosts have tunnels to each other.
const A_NETWORK: usize = 100;
/// Beats of a thousand hosts, and of ten thousand.
const BEATS: [u64; 2] = [2_000, 20_000];
/// Room for every machine twice over.
const ROOM: u64 = 2;
const MACHINE: Capacity = Capacity { vcpus: 1, memory_bytes: 64 << 20, disk_bytes: 1 << 20 };

#[derive(Debug, Serialize)]
pub struct Growth {
    pub machines: usize,
    pub hosts: usize,
    /// Hosts that became members and opened a session, a second.
    pub joined_per_second: f64,
    /// Machines accepted a second.
    pub created_per_second: f64,
    /// Beside each of [`PACES`].
    pub lists: Vec<Lists>,
    /// Placements committed a second, until the last machine had a host.
    pub placed_per_second: f64,
    /// Machines whose hosts said that they run, committed a second.
    pub ran_per_second: f64,
    pub listening: Vec<Listening>,
    pub watching: watchers::Watching,
    /// A follower is killed and started again, until it has applied what the others had by then.
    pub restart_seconds: f64,
    pub failover: Failover,
    pub joining: failover::Joining,
    pub resident_mib: f64,
}

/// The leader is killed, with all hosts in session.
#[derive(Debug, Serialize)]
pub struct Failover {
    pub write_millis: f64,
    /// Until the last host was in session with the next leader.
    pub sessions_seconds: f64,
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
    create_networks(&clients[0], machines.div_ceil(A_NETWORK)).await?;
    let each = ROOM * machines.div_ceil(hosts) as u64;
    anyhow::ensure!(each <= VCPUS * OPEN / 1000, "{machines} machines need more than {hosts} hosts");
    let capacity = Capacity {
        vcpus: VCPUS,
        memory_bytes: each * MACHINE.memory_bytes,
        disk_bytes: each * (MACHINE.disk_bytes + (1 << 30)),
    };
    let began = Instant::now();
    let mut fleet = Fleet::attach(cluster, hosts, capacity).await?;
    let joined_per_second = hosts as f64 / began.elapsed().as_secs_f64();
    eprintln!("  {hosts} hosts: {joined_per_second:.0} joined a second");
    fleet.beat(cluster)?;
    let created_per_second = create(&clients, machines).await?;
    eprintln!("  {machines} machines: {created_per_second:.0} created a second");
    at_rest(cluster).await?;
    let mut lists = Vec::new();
    for every in PACES {
        let read = read_lists(cluster, &clients, machines, every).await?;
        eprintln!("  list p99 {:.1} ms, page p99 {:.2} ms", read.whole_millis.p99, read.page_millis.p99);
        lists.push(read);
    }
    let watching = watchers::measure(cluster, settings.watchers).await?;
    eprintln!("  {} watchers: p99 {:.1} ms", watching.watchers, watching.p99_millis);
    let restart_seconds = restart(cluster).await?;
    eprintln!("  a follower is back after {restart_seconds:.1} s");
    let placed_per_second = place(&clients[0], machines).await?;
    eprintln!("  {placed_per_second:.0} placed a second");
    let ran_per_second = run(&fleet, machines).await?;
    eprintln!("  {ran_per_second:.0} said to run a second");
    let (mut listening, time) = (Vec::new(), Duration::from_secs_f64(settings.seconds));
    for per_second in BEATS {
        listening.extend(fleet.measure(cluster, per_second, time).await?);
    }
    let resident_mib = cluster.resident_bytes() as f64 / 1_048_576.0;
    let failover = fail_over(cluster, &fleet).await?;
    let (write, session) = (failover.write_millis, failover.sessions_seconds);
    eprintln!("  leader killed: next write after {write:.0} ms, last host in session after {session:.1} s");
    let joining = failover::join_anew(cluster).await?;
    let (seconds, gap) = (joining.seconds, joining.gap_millis);
    eprintln!("  a member with an empty disk joins in {seconds:.1} s; longest time without a write {gap:.0} ms");
    Ok(Growth {
        machines,
        hosts,
        joined_per_second,
        created_per_second,
        lists,
        placed_per_second,
        ran_per_second,
        listening,
        watching,
        restart_seconds,
        failover,
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
    let (image, networks) = (image.display().to_string(), machines.div_ceil(A_NETWORK).to_string());
    let machines = machines.to_string();
    let (vcpus, memory, disk) =
        (MACHINE.vcpus.to_string(), MACHINE.memory_bytes.to_string(), MACHINE.disk_bytes.to_string());
    let closed = CLOSED.to_string();
    let commands: [&[&str]; 6] = [
        &[
            "tenant",
            "create",
            TENANT,
            "--vms",
            &machines,
            "--vcpus",
            &machines,
            "--memory",
            "1000TiB",
            "--disk",
            "1000TiB",
            "--networks",
            &networks,
        ],
        &["image", "import", &image, "--name", "disk", "--format", "raw", "--tenant", TENANT],
        &["template", "create", "small", "--vcpus", &vcpus, "--memory", &memory, "--disk", &disk],
        // The hosts of this cloud are silent together at its end, and nobody is to be told.
        &["setting", "set", "brake-count", "1"],
        &["setting", "set", OVERCOMMIT_CPU, &closed],
        // Thousands of hosts that share two cores with the controllers beat less often, and are late.
        &["setting", "set", "node-silence-millis", "60000"],
    ];
    for command in commands {
        let output = cluster.trefoil(command).output()?;
        anyhow::ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

async fn create_networks(client: &Client, networks: usize) -> anyhow::Result<()> {
    let create = |number| {
        let asked = CreateNetworkRequest {
            tenant: TENANT.into(),
            name: network(number),
            range: format!("10.{}.{}.0/24", number / 256 % 256, number % 256),
        };
        client.mutate(new_request_id(), asked, async |mut stub, request| stub.create_network(request).await)
    };
    stream::iter(0..networks).map(create).buffer_unordered(CREATORS).try_for_each(async |_| Ok(())).await?;
    Ok(())
}

fn network(number: usize) -> String {
    format!("lan-{number}")
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
                    network: network(number / A_NETWORK),
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
    let (mut ids, lists) = (Vec::with_capacity(machines), (LISTED_ROWS / machines).clamp(2, LISTS));
    for round in 0..lists {
        let client = &clients[round % clients.len()];
        let start = Instant::now();
        ids.clear();
        client.each_vms(asked.clone(), |vms| ids.extend(vms.into_iter().map(|vm| vm.id))).await?;
        whole.record(u64::try_from(start.elapsed().as_micros())?)?;
        anyhow::ensure!(ids.len() == machines, "{} of {machines} machines are listed", ids.len());
    }
    for page in 0..PAGES {
        let client = &clients[page % clients.len()];
        let asked = ListVmsRequest { limit: SHORT_PAGE, after: ids[page * machines / PAGES].clone(), ..asked.clone() };
        let start = Instant::now();
        client.read(asked, async |mut stub, request| stub.list_vms(request).await).await?;
        short.record(u64::try_from(start.elapsed().as_micros())?)?;
    }
    let writes_per_second = (applied(cluster).await? - before) as f64 / began.elapsed().as_secs_f64();
    writers.shutdown().await;
    Ok(Lists { writes_per_second, whole_millis: Quantiles::of(&whole), page_millis: Quantiles::of(&short) })
}

/// Every machine that was created is told in an entry of its own that there is no room for it: these are not to be measured.
async fn at_rest(cluster: &Cluster) -> anyhow::Result<()> {
    let quiet = async || {
        let before = applied(cluster).await;
        tokio::time::sleep(A_WHILE).await;
        matches!((before, applied(cluster).await), (Ok(before), Ok(now)) if now - before < FEW)
    };
    until("the log is at rest", 10 * PATIENCE, LOOK_AGAIN, quiet).await
}

async fn applied(cluster: &Cluster) -> anyhow::Result<u64> {
    let status = cluster.status(0).await.context("a controller does not answer")?;
    Ok(status.controllers.iter().map(|member| member.applied_index).max().unwrap_or(0))
}

/// Hosts given to machines a second, from the change that makes room for them to the last.
async fn place(client: &Client, machines: usize) -> anyhow::Result<f64> {
    let mut watch = client.watch(TENANT, None).await?;
    watch.next().await?;
    let began = Instant::now();
    let asked = Setting { name: OVERCOMMIT_CPU.into(), value: OPEN, ..Setting::default() };
    client.mutate(new_request_id(), asked, async |mut stub, request| stub.set_setting(request).await).await?;
    let told = async {
        let mut placed = HashSet::new();
        while placed.len() < machines {
            match watch.next().await {
                Ok(told) => {
                    placed.extend(told.events.into_iter().filter(|event| event.kind == "vm").map(|event| event.id))
                }
                // This program shares its cores with all that it watches, and may not follow.
                Err(error) if error.code == "compacted" => {
                    watch = client.watch(TENANT, None).await?;
                    watch.next().await?;
                    let asked = ListVmsRequest { tenant: TENANT.into(), ..ListVmsRequest::default() };
                    let all = client.all_vms(asked).await?.vms;
                    placed.extend(all.into_iter().filter(|vm| !vm.node.is_empty()).map(|vm| vm.id));
                }
                Err(error) => return Err(error.into()),
            }
        }
        anyhow::Ok(machines as f64 / began.elapsed().as_secs_f64())
    };
    tokio::time::timeout(patience(machines), told).await.context("not every machine was given a host")?
}

/// Machines said to run a second.
async fn run(fleet: &Fleet, machines: usize) -> anyhow::Result<f64> {
    let began = Instant::now();
    fleet.obey();
    let all = async || fleet.reported() >= machines;
    until("every machine is said to run", patience(machines), LOOK_AGAIN, all).await?;
    Ok(machines as f64 / began.elapsed().as_secs_f64())
}

/// A thousand a second are few.
fn patience(machines: usize) -> Duration {
    4 * PATIENCE + Duration::from_millis(machines as u64)
}

/// Seconds from the start of a follower that was killed until it is where the others are.
async fn restart(cluster: &mut Cluster) -> anyhow::Result<f64> {
    let leader = cluster.leader().await.context("nobody leads")?;
    let follower = (leader + 1) % cluster.size();
    cluster.kill(follower)?;
    let (reached, began) = (applied_by(cluster, leader).await?, Instant::now());
    cluster.restart(follower)?;
    let caught_up = async || applied_by(cluster, follower).await.is_ok_and(|index| index >= reached);
    until("a follower that was started again is where the others are", 4 * PATIENCE, LOOK_AGAIN, caught_up).await?;
    Ok(began.elapsed().as_secs_f64())
}

async fn applied_by(cluster: &Cluster, controller: usize) -> anyhow::Result<u64> {
    let status = cluster.status(controller).await.context("a controller does not answer")?;
    let member = status.controllers.iter().find(|member| member.id == status.answered_by);
    Ok(member.context("a controller does not know itself")?.applied_index)
}

async fn fail_over(cluster: &mut Cluster, fleet: &Fleet) -> anyhow::Result<Failover> {
    let (before, began) = (fleet.incarnations(), Instant::now());
    let write_millis = failover::kill_leader(cluster).await?;
    fleet.in_new_session(4 * PATIENCE, &before).await?;
    let sessions_seconds = began.elapsed().as_secs_f64();
    cluster.settled(4 * PATIENCE).await?;
    // Who was killed has all that was written meanwhile, or the next member that goes down would take the quorum along.
    let leader = cluster.leader().await.context("nobody leads")?;
    let reached = applied_by(cluster, leader).await?;
    for controller in 0..cluster.size() {
        let caught_up = async || applied_by(cluster, controller).await.is_ok_and(|index| index >= reached);
        until("all members are where the leader was", 4 * PATIENCE, LOOK_AGAIN, caught_up).await?;
    }
    Ok(Failover { write_millis, sessions_seconds })
}
