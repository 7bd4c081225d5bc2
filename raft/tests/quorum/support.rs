//! A quorum in one process: every member has its own runtime, directory, certificate and port, speaks TLS to the
//! others over loopback, and is killed by dropping its runtime in the middle of what it does.

use std::{
    collections::BTreeMap,
    future::Future,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    time::{Duration, Instant},
};

use api::tls::{CertificateAuthority, server_tls};
use futures::future::BoxFuture;
use model::{Actor, Capacity, Command, ControllerId, OperatorCommand, Quota, RequestId, Role, command::Request};
use raft::{Committed, Proposal, ProposeError, Replica, ReplicaConfig, Timing};
use tokio::runtime::{Handle, Runtime};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

/// Generous: the machine that runs the tests may be busy with other things.
pub const SOON: Duration = Duration::from_secs(60);
/// Short enough that the tests see snapshots and purged logs.
pub const SNAPSHOT_EVERY: u64 = 200;

pub struct Quorum {
    authority: CertificateAuthority,
    directory: tempfile::TempDir,
    members: BTreeMap<u64, Member>,
    addresses: BTreeMap<u64, SocketAddr>,
    timing: Timing,
    /// Members of another cluster epoch than 0, and those that know less than this version.
    pub epochs: BTreeMap<u64, u64>,
    pub knows: BTreeMap<u64, u32>,
}

pub struct Member {
    pub replica: Replica,
    runtime: Runtime,
}

impl Quorum {
    /// One founder with the id 1, which leads.
    pub async fn found() -> Self {
        Self::found_with(Timing::NOISY).await
    }

    async fn found_with(timing: Timing) -> Self {
        // With `RUST_LOG=info` a failing test tells its story.
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        drop(tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init());
        let authority = CertificateAuthority::create("test").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (members, addresses) = (BTreeMap::new(), BTreeMap::new());
        let (epochs, knows) = (BTreeMap::new(), BTreeMap::new());
        let mut quorum = Self { authority, directory, members, addresses, timing, epochs, knows };
        quorum.start(1).await;
        let address = quorum.address(1);
        quorum.on(1, move |replica| async move { replica.initialize(&address).await }).await.unwrap();
        quorum
    }

    /// Members 1, 2 and 3, all voters.
    pub async fn of_three() -> Self {
        Self::of_three_with(Timing::NOISY).await
    }

    /// The same with other timers.
    pub async fn of_three_with(timing: Timing) -> Self {
        let mut quorum = Self::found_with(timing).await;
        for id in [2, 3] {
            quorum.join(id).await;
        }
        quorum
    }

    /// Starts a new member and makes it a voter.
    pub async fn join(&mut self, id: u64) {
        self.start(id).await;
        let address = self.address(id);
        let asked = *self.members.keys().next().unwrap();
        let added = self.on(asked, move |replica| async move {
            replica.add_learner(ControllerId(id), &address).await?;
            replica.promote(ControllerId(id)).await
        });
        added.await.unwrap();
    }

    /// Starts a member on what is in its directory, at the address that it had before, if it had one.
    pub async fn start(&mut self, id: u64) {
        let before = self.addresses.get(&id).copied();
        let listener = TcpListener::bind(before.unwrap_or(([127, 0, 0, 1], 0).into())).unwrap();
        listener.set_nonblocking(true).unwrap();
        self.addresses.insert(id, listener.local_addr().unwrap());
        let identity = self.identity(&ControllerId(id).to_string());
        let config = self.config(id, &identity);
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let opened = runtime.spawn(async move {
            let replica = Replica::open(config).await.unwrap();
            let server = Server::builder().tls_config(server_tls(&identity)).unwrap().add_service(replica.service());
            let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
            tokio::spawn(server.serve_with_incoming(incoming));
            replica
        });
        let replica = opened.await.unwrap();
        self.members.insert(id, Member { replica, runtime });
    }

    /// Ends it as a kill does: nothing is handed over, flushed or said.
    pub async fn kill(&mut self, id: u64) {
        let Member { replica, runtime } = self.members.remove(&id).unwrap();
        drop(replica);
        let ended = tokio::task::spawn_blocking(move || runtime.shutdown_timeout(SOON));
        ended.await.unwrap();
    }

    /// Loses its disk.
    pub fn wipe(&self, id: u64) {
        std::fs::remove_dir_all(self.data(id)).unwrap();
    }

    pub fn config(&self, id: u64, identity: &api::tls::Identity) -> ReplicaConfig {
        ReplicaConfig {
            id: ControllerId(id),
            data: self.data(id),
            tls: identity.clone().into(),
            timing: self.timing,
            epoch: self.epochs.get(&id).copied().unwrap_or(0),
            knows: self.knows.get(&id).copied().unwrap_or(model::level::LATEST),
            snapshot_every: SNAPSHOT_EVERY,
        }
    }

    /// A certificate of the same authority for somebody.
    pub fn identity(&self, name: &str) -> api::tls::Identity {
        self.authority.issue(name).unwrap()
    }

    pub fn data(&self, id: u64) -> PathBuf {
        self.directory.path().join(id.to_string())
    }

    pub fn address(&self, id: u64) -> String {
        self.addresses[&id].to_string()
    }

    pub fn replica(&self, id: u64) -> &Replica {
        &self.members[&id].replica
    }

    pub fn ids(&self) -> Vec<u64> {
        self.members.keys().copied().collect()
    }

    /// Runs something on a member's own runtime, so that its death ends it too.
    pub fn on<F, T>(&self, id: u64, work: impl FnOnce(Replica) -> F) -> BoxFuture<'static, T>
    where
        F: Future<Output = T> + Send + 'static,
        T: Send + 'static,
    {
        let member = &self.members[&id];
        let handle: Handle = member.runtime.handle().clone();
        let running = handle.spawn(work(member.replica.clone()));
        Box::pin(async move { running.await.unwrap() })
    }

    /// Who leads, as soon as a living member does.
    pub async fn leader(&self) -> u64 {
        let leads = || self.members.iter().find(|(_, m)| m.replica.is_leader()).map(|(id, _)| *id);
        eventually("a living member leads", || leads().is_some()).await;
        leads().unwrap()
    }

    pub async fn create_tenant(&self, id: u64, number: u64) -> Result<Committed, ProposeError> {
        self.on(id, move |replica| async move { replica.propose(tenant(number)).await }).await
    }

    pub async fn create_tenants(&self, id: u64, numbers: std::ops::Range<u64>) {
        let all = self.on(id, move |replica| async move {
            let each = numbers.map(|number| {
                let replica = replica.clone();
                async move { replica.propose(tenant(number)).await.unwrap() }
            });
            futures::future::join_all(each).await
        });
        for committed in all.await {
            assert!(committed.applied.is_ok(), "{committed:?}");
        }
    }

    /// Every member has applied what the most advanced one has, and is equal to it.
    pub async fn equal(&self) {
        let applied = |m: &Member| m.replica.read_indexed(|state, index| (index, state.tenants().len()));
        let same = || {
            let mut all = self.members.values().map(applied);
            let first = all.next().unwrap();
            all.all(|other| other == first)
        };
        eventually("all members have applied the same", same).await;
        let asked = self.leader().await;
        let deadline = Instant::now() + SOON;
        loop {
            let status = self.on(asked, |replica| async move { replica.survey().await }).await;
            assert!(status.hashes_agree, "{status:#?}");
            let hashes: Vec<_> = status.members.iter().filter(|m| m.reachable).map(|m| m.hash).collect();
            if hashes.len() == self.members.len() && hashes.iter().all(|h| h.is_some() && *h == hashes[0]) {
                return;
            }
            assert!(Instant::now() < deadline, "the hashes are of the same index: {status:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub fn tenants(&self, id: u64) -> usize {
        self.replica(id).read(|state| state.tenants().len())
    }
}

/// The members end before the directory that they write to.
impl Drop for Quorum {
    fn drop(&mut self) {
        for (_, Member { replica, runtime }) in std::mem::take(&mut self.members) {
            drop(replica);
            // A runtime may wait for its end only outside of another.
            let ended = std::thread::spawn(move || runtime.shutdown_timeout(SOON)).join();
            assert!(ended.is_ok() || std::thread::panicking(), "a member's runtime ends");
        }
    }
}

/// Creates tenant `t-number` under a request id that is its own.
pub fn tenant(number: u64) -> Proposal {
    Proposal {
        request: Some(Request { id: RequestId(u128::from(number) + 1), body: [7; 16] }),
        actor: Actor::User { name: "root".into(), role: Role::Operator },
        command: Command::Operator(OperatorCommand::CreateTenant {
            name: format!("t-{number}"),
            quota: Quota { vms: 1, size: Capacity::default(), networks: 1, image_bytes: 0 },
        }),
    }
}

pub async fn eventually(condition: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {condition}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
