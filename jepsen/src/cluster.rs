//! Real controllers and agents, each a process of the released binary, on loopback or each on a host of its own.
//!
//! Not here: what a test wants of them. Only one cluster runs at a time on a machine, held by a lock: two of them
//! on two cores would test the scheduler of the kernel.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use api::{
    client::{Client, new_request_id},
    proto::{
        CreateTenantRequest, IssueJoinTokenRequest, ListRequest, QuorumStatusReply, QuorumStatusRequest,
        trefoil_client::TrefoilClient,
    },
};
use nix::fcntl::Flock;
use tonic::transport::Channel;

use self::{
    process::Process,
    relay::Relay,
    shim::Shim,
    switch::{Link, Switch},
};

pub mod disks;
mod host;
mod launch;
mod member;
pub mod process;
pub mod relay;
pub mod shim;
pub mod switch;

pub use launch::{binary, free_port};

/// How long one question to one controller may take while looking for the state of the cluster.
const ASK: Duration = Duration::from_millis(700);
/// How often a condition is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// A cluster on a busy machine starts in seconds; a minute means that it will not.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a client needs to be let in.
#[derive(Clone, Debug)]
pub struct Access {
    pub ca_pem: String,
    pub token: String,
}

/// What to start.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub controllers: usize,
    /// Agents with the simulated hypervisor.
    pub agents: usize,
    /// What each of them offers: CPUs and bytes of memory; `None` is a middling server.
    pub offer: Option<(u64, u64)>,
    /// Each on a network host of its own, so that links can be cut.
    pub isolated: bool,
    /// Log entries between snapshots; `None` is the product's own choice.
    pub snapshot_every: Option<u64>,
}

/// Small, so that snapshots are made, sent and installed in a run of a minute.
pub const OFTEN: Option<u64> = Some(500);

struct Member {
    /// Which host of the switch it lives on.
    host: usize,
    id: u64,
    name: String,
    address: String,
    data: PathBuf,
    process: Option<Process>,
    /// Between the process and its disk and clocks, if there is one.
    shim: Option<Shim>,
}

pub struct Cluster {
    binary: PathBuf,
    root: PathBuf,
    controllers: Vec<Member>,
    agents: Vec<Member>,
    access: Access,
    switch: Option<Switch>,
    /// On the way of heartbeats, if anything is.
    relay: Option<Arc<Relay>>,
    /// Another release of it, to exchange it for.
    other_binary: Option<PathBuf>,
    snapshot_every: Option<u64>,
    offer: Option<(u64, u64)>,
    _turn: Flock<File>,
}

type Stub = TrefoilClient<Channel>;

impl Cluster {
    /// Starts everything under a new folder in `root` and waits until the controllers agree on a leader and all
    /// agents are up.
    ///
    /// # Errors
    /// When it does not come up; the sentence names the log to read.
    pub async fn start(root: &Path, options: Options) -> anyhow::Result<Self> {
        let turn = tokio::task::spawn_blocking(launch::take_turn).await??;
        std::fs::create_dir_all(root)?;
        let switch = if options.isolated { Some(Switch::new(options.controllers + options.agents)?) } else { None };
        let mut cluster = Self {
            binary: binary()?,
            other_binary: std::env::var_os("TREFOIL_OTHER_BIN").map(PathBuf::from),
            root: root.to_owned(),
            controllers: Vec::new(),
            agents: Vec::new(),
            access: Access { ca_pem: String::new(), token: String::new() },
            switch,
            relay: None,
            snapshot_every: options.snapshot_every,
            offer: options.offer,
            _turn: turn,
        };
        cluster.found()?;
        while cluster.controllers.len() < options.controllers {
            cluster.add_controller().await?;
        }
        while cluster.agents.len() < options.agents {
            cluster.add_agent().await?;
        }
        cluster.settled(PATIENCE).await?;
        Ok(cluster)
    }

    pub fn size(&self) -> usize {
        self.controllers.len()
    }

    pub fn access(&self) -> &Access {
        &self.access
    }

    pub fn name(&self, controller: usize) -> &str {
        &self.controllers[controller].name
    }

    /// Its id in the quorum.
    pub fn id(&self, controller: usize) -> u64 {
        self.controllers[controller].id
    }

    /// Where clients reach it whatever links are cut.
    pub fn endpoint(&self, controller: usize) -> String {
        let member = &self.controllers[controller];
        if self.switch.is_some() {
            format!("unix:{}", member.data.join("api.sock").display())
        } else {
            member.address.clone()
        }
    }

    pub fn endpoints(&self) -> Vec<String> {
        (0..self.size()).map(|controller| self.endpoint(controller)).collect()
    }

    /// `host:port`, TCP and UDP.
    pub fn address(&self, controller: usize) -> &str {
        &self.controllers[controller].address
    }

    pub fn data(&self, controller: usize) -> &Path {
        &self.controllers[controller].data
    }

    pub fn pid(&self, controller: usize) -> Option<u32> {
        self.controllers[controller].process.as_ref().map(Process::pid)
    }

    /// CPU time of all controllers so far.
    pub fn cpu_time(&self) -> Duration {
        self.controllers.iter().filter_map(|m| m.process.as_ref()?.cpu_time()).sum()
    }

    /// CPU time of one of them so far; none while it does not run.
    pub fn cpu_time_of(&self, controller: usize) -> Duration {
        self.controllers[controller].process.as_ref().and_then(Process::cpu_time).unwrap_or_default()
    }

    /// Mean over the controllers.
    pub fn resident_bytes(&self) -> u64 {
        let sizes: Vec<u64> = self.controllers.iter().filter_map(|m| m.process.as_ref()?.resident_bytes()).collect();
        sizes.iter().sum::<u64>() / sizes.len().max(1) as u64
    }

    /// `kill -9`; true when that is how it ended.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self, controller: usize) -> anyhow::Result<bool> {
        let mut process = self.controllers[controller].process.take().context("it does not run")?;
        Ok(process.kill()?)
    }

    /// SIGTERM; true when it left by itself in time.
    ///
    /// # Errors
    /// When it does not run.
    pub fn terminate(&mut self, controller: usize) -> anyhow::Result<bool> {
        let mut process = self.controllers[controller].process.take().context("it does not run")?;
        Ok(process.stop(Duration::from_secs(20))?)
    }

    /// # Errors
    /// When the binary cannot be started.
    pub fn restart(&mut self, controller: usize) -> anyhow::Result<()> {
        self.run_controller(controller)
    }

    /// How it ended by itself, if it did; it can be started again then.
    pub fn ended(&mut self, controller: usize) -> Option<ExitStatus> {
        let member = &mut self.controllers[controller];
        let status = member.process.as_mut()?.ended()?;
        member.process = None;
        Some(status)
    }

    /// What it has printed so far, in all its lives.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn printed(&self, controller: usize) -> std::io::Result<String> {
        std::fs::read_to_string(self.root.join(format!("{}.log", self.controllers[controller].name)))
    }

    /// SIGSTOP; true when the kernel shows it as stopped.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pause(&self, controller: usize) -> anyhow::Result<bool> {
        Ok(self.controllers[controller].process.as_ref().context("it does not run")?.pause()?)
    }

    /// # Errors
    /// When it does not run.
    pub fn resume(&self, controller: usize) -> anyhow::Result<()> {
        Ok(self.controllers[controller].process.as_ref().context("it does not run")?.resume()?)
    }

    /// # Errors
    /// When it does not run.
    pub fn kill_agent(&mut self, agent: usize) -> anyhow::Result<bool> {
        let mut process = self.agents[agent].process.take().context("it does not run")?;
        Ok(process.kill()?)
    }

    /// SIGSTOP; true when the kernel shows it as stopped.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pause_agent(&self, agent: usize) -> anyhow::Result<bool> {
        Ok(self.agents[agent].process.as_ref().context("it does not run")?.pause()?)
    }

    /// # Errors
    /// When it does not run.
    pub fn resume_agent(&self, agent: usize) -> anyhow::Result<()> {
        Ok(self.agents[agent].process.as_ref().context("it does not run")?.resume()?)
    }

    /// # Errors
    /// When the binary cannot be started.
    pub fn restart_agent(&mut self, agent: usize) -> anyhow::Result<()> {
        self.run_agent(agent)
    }

    /// From now on `to` hears nothing from `from`; both are controllers.
    ///
    /// # Errors
    /// When the cluster is not on hosts of its own.
    pub fn cut(&self, from: usize, to: usize) -> anyhow::Result<()> {
        self.link(from, to)?.cut()
    }

    /// What `to` hears from `from`; both are controllers.
    ///
    /// # Errors
    /// When the cluster is not on hosts of its own.
    pub fn link(&self, from: usize, to: usize) -> anyhow::Result<Link> {
        let hosts = (self.controllers[from].host, self.controllers[to].host);
        Ok(self.switch.as_ref().context("links can be cut only between hosts")?.link(hosts.0, hosts.1))
    }

    /// Whether what a controller sends is delayed.
    ///
    /// # Errors
    /// When the cluster is not on hosts of its own, or the kernel cannot.
    pub fn delay(&self, controller: usize, on: bool) -> anyhow::Result<()> {
        let host = self.controllers[controller].host;
        self.switch.as_ref().context("packets can be delayed only between hosts")?.delay(host, on)
    }

    /// Packets that all cuts together have dropped.
    ///
    /// # Errors
    /// When the cluster is not on hosts of its own.
    pub fn dropped(&self) -> anyhow::Result<u64> {
        self.switch.as_ref().context("links can be cut only between hosts")?.dropped()
    }

    /// # Errors
    /// When the cluster is not on hosts of its own.
    pub fn heal_links(&self) -> anyhow::Result<()> {
        self.switch.as_ref().context("links can be cut only between hosts")?.heal()
    }

    /// Ends every process, politely, and gives back the machine.
    ///
    /// # Errors
    /// When a process had to be killed.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        let mut stubborn = Vec::new();
        for member in self.agents.iter_mut().chain(self.controllers.iter_mut()) {
            if let Some(mut process) = member.process.take()
                && !process.stop(Duration::from_secs(20))?
            {
                stubborn.push(member.name.clone());
            }
        }
        anyhow::ensure!(stubborn.is_empty(), "SIGTERM did not end {} well; the log says how", stubborn.join(", "));
        Ok(())
    }
}

/// What the cluster says of itself.
impl Cluster {
    /// What one controller says of the quorum; `None` when it does not answer soon.
    pub async fn status(&self, controller: usize) -> Option<QuorumStatusReply> {
        let client = self.client_of(&[self.endpoint(controller)]).ok()?;
        let request = client.request(None, QuorumStatusRequest {}, ASK);
        let mut stub = client.stub(0);
        Some(tokio::time::timeout(ASK, stub.quorum_status(request)).await.ok()?.ok()?.into_inner())
    }

    /// The leader, as the running controller with the highest term that answers says.
    pub async fn leader(&self) -> Option<usize> {
        let running = (0..self.size()).filter(|controller| self.controllers[*controller].process.is_some());
        let replies = futures::future::join_all(running.map(|controller| self.status(controller))).await;
        let known = replies.into_iter().flatten().filter(|reply| reply.leader != 0);
        let newest = known.max_by_key(|reply| reply.term)?;
        self.controllers.iter().position(|member| member.id == newest.leader)
    }

    /// Waits until every running controller answers, all name the same leader, and all agents are up.
    ///
    /// # Errors
    /// When they do not within the patience.
    pub async fn settled(&mut self, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        let running: Vec<usize> = (0..self.size()).filter(|c| self.controllers[*c].process.is_some()).collect();
        loop {
            self.settled_among(&running, deadline.saturating_duration_since(Instant::now())).await?;
            if self.agents_up().await {
                return Ok(());
            }
            anyhow::ensure!(Instant::now() < deadline, "not all agents were up within {patience:?}");
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until each of these controllers answers and all name the same leader, whatever the others do.
    ///
    /// # Errors
    /// When they do not within the patience.
    pub async fn settled_among(&mut self, members: &[usize], patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let gone = self.gone();
            anyhow::ensure!(gone.is_empty(), "ended by itself: {}", gone.join(", "));
            let replies = futures::future::join_all(members.iter().map(|controller| self.status(*controller))).await;
            let known: Vec<_> = replies.into_iter().flatten().collect();
            let one = known.iter().all(|r| r.leader != 0 && r.leader == known[0].leader && r.term == known[0].term);
            if known.len() == members.len() && one {
                return Ok(());
            }
            if Instant::now() > deadline {
                let seen: Vec<_> = known.iter().map(|r| (r.answered_by, r.leader, r.term)).collect();
                bail!(
                    "controllers did not agree within {patience:?}; (who, leader, term): {seen:?}; logs in {}",
                    self.root.display()
                );
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Waits until all controllers that run have applied the same index, and compares the hash of the state there.
    ///
    /// # Errors
    /// With a sentence when two of them differ, or when no common index was found.
    pub async fn hashes_agree(&self, patience: Duration) -> Result<(), String> {
        let deadline = Instant::now() + patience;
        let running = self.controllers.iter().filter(|member| member.process.is_some()).count();
        while Instant::now() < deadline {
            for controller in 0..self.size() {
                let Some(reply) = self.status(controller).await else { continue };
                if !reply.hashes_agree {
                    return Err(format!("{} says that the state hashes differ", self.name(controller)));
                }
                let members: Vec<_> =
                    reply.controllers.iter().filter(|c| c.role != "unreachable" && c.hash_index > 0).collect();
                let same = members.iter().all(|c| c.hash_index == members[0].hash_index);
                if same && members.len() >= running {
                    if members.iter().all(|c| c.hash == members[0].hash) {
                        return Ok(());
                    }
                    return Err(format!("at index {} the state hashes differ", members[0].hash_index));
                }
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Err("no index was found at which all controllers have published a state hash".into())
    }

    async fn agents_up(&self) -> bool {
        if self.agents.is_empty() {
            return true;
        }
        let Ok(client) = self.client() else { return false };
        let client = client.with_deadline(Duration::from_secs(2));
        let list = ListRequest { limit: 1000, ..Default::default() };
        let nodes = client.read(list, |mut stub, request| async move { stub.list_nodes(request).await }).await;
        nodes.is_ok_and(|reply| {
            let up = |member: &Member| reply.nodes.iter().any(|node| node.name == member.name && node.state == "up");
            self.agents.iter().filter(|member| member.process.is_some()).all(up)
        })
    }

    /// Names of processes that should run and do not.
    fn gone(&mut self) -> Vec<String> {
        let members = self.controllers.iter_mut().chain(self.agents.iter_mut());
        let gone = members.filter_map(|member| {
            let process = member.process.as_mut()?;
            (!process.is_running()).then(|| format!("{} ({})", member.name, process.log.display()))
        });
        gone.collect()
    }
}

/// Talking to it as an operator.
impl Cluster {
    /// A client that knows every controller and retries.
    ///
    /// # Errors
    /// When an endpoint is malformed.
    pub fn client(&self) -> anyhow::Result<Client> {
        self.client_of(&self.endpoints())
    }

    fn client_of(&self, endpoints: &[String]) -> anyhow::Result<Client> {
        Ok(Client::new(endpoints, &self.access.ca_pem, &self.access.token)?)
    }

    /// # Errors
    /// When the cloud refuses.
    pub async fn create_tenant(&self, name: &str) -> anyhow::Result<()> {
        let tenant = CreateTenantRequest { name: name.to_owned(), quota: None };
        let call = |mut stub: Stub, request| async move { stub.create_tenant(request).await };
        self.client()?.mutate(new_request_id(), tenant, call).await?;
        Ok(())
    }

    /// A one-time token; role is `controller` or `agent`.
    ///
    /// # Errors
    /// When the cloud refuses.
    pub async fn join_token(&self, role: &str) -> anyhow::Result<String> {
        let asked = IssueJoinTokenRequest { role: role.to_owned(), valid_millis: 600_000 };
        let call = |mut stub: Stub, request| async move { stub.issue_join_token(request).await };
        Ok(self.client()?.mutate(new_request_id(), asked, call).await?.token)
    }

    /// The command line as this cloud's operator, whatever the machine's own configuration says.
    pub fn trefoil(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .env("TREFOIL_ENDPOINTS", self.endpoints().join(","))
            .env("TREFOIL_TOKEN", &self.access.token)
            .env("TREFOIL_CA", self.root.join("ca.pem"))
            .env("TREFOIL_CONFIG", "/dev/null")
            .args(arguments);
        command
    }
}
