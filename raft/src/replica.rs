//! The replica: opened, run, asked, stopped.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use model::{Command, ControllerId, NodeId, State, Timestamp};
use openraft::{BasicNode, Config, Instant as _, SnapshotPolicy, async_runtime::WatchReceiver, errors::RaftError};
use storage::{
    failure::{self, OnFailure, StorageError},
    log::Log,
    record::Position,
    snapshot::SnapshotStore,
    state::StateStore,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};

use crate::{
    clock::CloudClock,
    core::{Core, SharedCore},
    dialect::Raft,
    error::{MembershipError, OpenError, ProposeError, ReadError},
    feed::{Changes, Compacted},
    linear::{self, READ_QUEUE},
    log::LogAdapter,
    machine::Machine,
    membership::Change,
    peer::Peers,
    propose::{
        Committed, InFlight, Proposal,
        append::{self, APPEND_QUEUE},
        forward::{self, FORWARD_QUEUE},
    },
    serve::{self, PeerService},
    status::{Fenced, Leadership, QuorumStatus},
    succession::{self, BROKEN_STREAMS},
    watcher,
};

/// How a founder waits for its own election, and how long a stopping leader tries to hand over.
const FOUND_DEADLINE: Duration = Duration::from_secs(10);
const HAND_OVER_DEADLINE: Duration = Duration::from_secs(2);
/// A snapshot is verified and loaded within this by the receiver, after its last byte.
const INSTALL_MILLIS: u64 = 600_000;
/// Entries in one replicated batch; its bytes are bounded where the log is read.
const MAX_BATCH_ENTRIES: u64 = 1024;

pub struct ReplicaConfig {
    pub id: ControllerId,
    /// `raft-log`, `state-N`, `CURRENT` and `snapshots` are made in it.
    pub data: PathBuf,
    pub tls: PeerTls,
    pub timing: Timing,
    /// The cluster epoch that it belongs to: 0 unless the quorum was refounded. Members of another are not spoken with.
    pub epoch: u64,
    /// The highest feature level that it knows: `model::level::LATEST`, but for tests.
    pub knows: u32,
    /// Entries between two snapshots, and the entries kept behind one for members that were away for a while.
    pub snapshot_every: u64,
}

/// This controller's certificate, whose name must be `controller-N` of its id, and the authority that signed it.
#[derive(Clone)]
pub struct PeerTls {
    pub ca_pem: String,
    pub certificate_pem: String,
    pub key_pem: String,
}

impl From<api::tls::Identity> for PeerTls {
    fn from(identity: api::tls::Identity) -> Self {
        Self { ca_pem: identity.ca_pem, certificate_pem: identity.cert_pem, key_pem: identity.key_pem }
    }
}

impl ReplicaConfig {
    /// A restart replays at most about this many entries: well below a second of work.
    pub const SNAPSHOT_EVERY: u64 = 10_000;
}

/// How soon silence is an election. After a leader's death writes stop for about `election_max` plus a random time
/// between `election_min` and `election_max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    pub heartbeat_millis: u64,
    pub election_min_millis: u64,
    pub election_max_millis: u64,
}

impl Timing {
    /// Machines of their own whose disks sync within 15 ms at 99.9 %.
    pub const LAN: Self = Self { heartbeat_millis: 50, election_min_millis: 150, election_max_millis: 300 };
    /// Shared machines, slow disks.
    pub const NOISY: Self = Self { heartbeat_millis: 150, election_min_millis: 500, election_max_millis: 1000 };
}

impl Default for Timing {
    fn default() -> Self {
        Self::NOISY
    }
}

/// One member of the quorum. Cheap to clone; stops when [`Self::shutdown`] is called or the last clone is dropped.
#[derive(Clone)]
pub struct Replica {
    core: SharedCore,
    tasks: Arc<Tasks>,
}

/// The replica's own loops.
struct Tasks(Mutex<Vec<JoinHandle<()>>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Tasks {
    fn stop(&self) -> Vec<JoinHandle<()>> {
        let tasks: Vec<_> = self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect();
        tasks.iter().for_each(JoinHandle::abort);
        tasks
    }
}

impl Replica {
    /// Opens what is on disk, replays what was not flushed, and takes part again. A failing disk ends the process.
    ///
    /// # Errors
    /// When the directory is damaged or in use, or the configuration is not sound.
    pub async fn open(config: ReplicaConfig) -> Result<Self, OpenError> {
        Self::open_with(config, failure::abort()).await
    }

    /// As [`Self::open`], with another answer to a failing disk.
    pub(crate) async fn open_with(config: ReplicaConfig, on_failure: OnFailure) -> Result<Self, OpenError> {
        let settings = settings(&config)?;
        let fenced = watch::Sender::default();
        let peers = Peers::new(api::tls::client_tls(&checked_identity(&config)?), config.epoch, fenced.clone());
        let (data, failed, knows) = (config.data.clone(), on_failure.clone(), config.knows);
        let opened = tokio::task::spawn_blocking(move || open_storage(&data, &failed, knows)).await;
        let (log, tables, machine) = opened.map_err(|e| OpenError::Start(e.to_string()))??;
        let (epoch, behind) = machine.read(|state, _| (state.quorum().epoch, state.quorum().epoch > config.epoch));
        if behind {
            return Err(OpenError::Epoch { state: epoch, own: config.epoch });
        }
        let log = LogAdapter::new(log, tables);
        let id = config.id.0;
        let raft = Raft::new(id, Arc::new(settings), peers.clone(), log, machine.clone()).await;
        let raft = raft.map_err(|e| OpenError::Start(e.to_string()))?;
        let (reads, readers) = mpsc::channel(READ_QUEUE);
        let (appends, to_append) = mpsc::channel(APPEND_QUEUE);
        let (forwards, to_forward) = mpsc::channel(FORWARD_QUEUE);
        let (broken, to_look_at) = mpsc::channel(BROKEN_STREAMS);
        let core = Arc::new(Core {
            id,
            timing: config.timing,
            epoch: config.epoch,
            knows: config.knows,
            fenced,
            raft,
            machine,
            peers,
            on_failure,
            leadership: watch::Sender::default(),
            reads,
            appends,
            forwards,
            in_flight: InFlight::new(),
            clock: CloudClock::begin(),
            broken,
            contact: Mutex::new(None),
            stopping: watch::Sender::new(false),
        });
        let tasks = vec![
            tokio::spawn(linear::round_loop(core.clone(), readers)),
            tokio::spawn(append::append_loop(core.clone(), to_append)),
            tokio::spawn(forward::forward_loop(core.clone(), to_forward)),
            tokio::spawn(succession::succession_loop(core.clone(), to_look_at)),
            tokio::spawn(watcher::leadership_loop(core.clone())),
            tokio::spawn(watcher::failure_loop(core.clone())),
            tokio::spawn(watcher::compare_loop(core.clone())),
        ];
        Ok(Self { core, tasks: Arc::new(Tasks(Mutex::new(tasks))) })
    }

    /// What peers call; to be added to the controller's server.
    pub fn service(&self) -> PeerService {
        serve::service(self.core.clone())
    }

    pub fn id(&self) -> ControllerId {
        ControllerId(self.core.id)
    }

    /// False until it was founded or a leader has added it.
    pub async fn is_initialized(&self) -> bool {
        self.core.raft.is_initialized().await.unwrap_or(false)
    }

    /// Founds a quorum of this one member, which others reach at `address`. Returns when it leads.
    ///
    /// # Errors
    /// When it is in a quorum already, or does not come to lead.
    pub async fn initialize(&self, address: &str) -> Result<(), MembershipError> {
        let members = BTreeMap::from([(self.core.id, BasicNode { addr: address.into() })]);
        self.core.raft.initialize(members).await.map_err(|error| match error {
            RaftError::APIError(error) => MembershipError::Refused(error.to_string()),
            RaftError::Fatal(_) => MembershipError::Stopped,
        })?;
        let mut leadership = self.core.leadership.subscribe();
        let leads = tokio::time::timeout(FOUND_DEADLINE, leadership.wait_for(|now| now.leading)).await;
        match leads {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(MembershipError::Stopped),
            Err(_) => Err(MembershipError::Timeout("the founder does not lead yet".into())),
        }
    }

    /// Has the leader append it; returns when it was applied there. Any replica may be asked. With a request id it is
    /// tried again, through elections, for `propose::PROPOSE_DEADLINE`.
    ///
    /// # Errors
    /// See [`ProposeError`]: all but `Unknown` mean that nothing was proposed.
    pub async fn propose(&self, proposal: Proposal) -> Result<Committed, ProposeError> {
        self.core.propose(proposal).await
    }

    /// For planners: appended only if this replica still leads the term in which they planned.
    ///
    /// # Errors
    /// As [`Self::propose`]; `NotLeader` when the term is over or the quorum is lost.
    pub async fn propose_as_leader(&self, term: u64, command: Command) -> Result<Committed, ProposeError> {
        self.core.propose_as_leader(term, command).await
    }

    /// After this, [`Self::read`] sees everything that was acknowledged before it was called. Returns the index.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn linearize(&self) -> Result<u64, ReadError> {
        self.core.linearize().await
    }

    /// Asks a majority whether this replica still leads. When it does and has applied all that was in the log before
    /// the question: true. Another leader, no majority, or no answer in time: false.
    pub async fn confirm_leadership(&self) -> bool {
        let Some(index) = self.core.confirm().await else { return false };
        let mut applied = self.core.machine.watch_applied();
        let caught_up =
            tokio::time::timeout(crate::linear::READ_DEADLINE, applied.wait_for(|applied| *applied >= index));
        matches!(caught_up.await, Ok(Ok(_)))
    }

    /// Looks at this replica's state, which may be old: see [`Self::linearize`] and [`Self::stale_age`]. Applying
    /// waits meanwhile, so `f` should be short.
    pub fn read<T>(&self, f: impl FnOnce(&State) -> T) -> T {
        self.core.machine.read(|state, _| f(state))
    }

    /// As [`Self::read`], with the applied index that the state is of.
    pub fn read_indexed<T>(&self, f: impl FnOnce(&State, u64) -> T) -> T {
        self.core.machine.read(f)
    }

    /// The cloud's time, as this controller carries it on: not the wall clock's when that was stepped. Not to be asked for
    /// inside [`Self::read`].
    pub fn now(&self) -> Timestamp {
        self.core.now()
    }

    /// How long ago a quorum confirmed this leader, or this follower heard from a leader. `None`: never.
    pub fn stale_age(&self) -> Option<Duration> {
        if self.core.leadership_is_mine() {
            let metrics = self.core.raft.metrics();
            let metrics = metrics.borrow_watched();
            return metrics.last_quorum_acked.map(|at| at.elapsed());
        }
        self.core.last_contact().map(|at| at.elapsed())
    }

    /// Set for ever once a member of a later cluster epoch has spoken with this one: it may not take part any more.
    pub fn watch_fenced(&self) -> watch::Receiver<Option<Fenced>> {
        self.core.fenced.subscribe()
    }

    /// Becomes true when it is shut down: what goes on without an end of its own ends then.
    pub fn watch_stopping(&self) -> watch::Receiver<bool> {
        self.core.stopping.subscribe()
    }

    pub fn is_leader(&self) -> bool {
        self.core.leadership().leading
    }

    pub fn leadership(&self) -> Leadership {
        self.core.leadership()
    }

    pub fn watch_leadership(&self) -> watch::Receiver<Leadership> {
        self.core.leadership.subscribe()
    }

    /// The applied index; the state that [`Self::read`] shows is at least of it.
    pub fn watch_applied(&self) -> watch::Receiver<u64> {
        self.core.machine.watch_applied()
    }

    /// The changes after an index that are `wanted`, about `most` of them; the same on every replica.
    ///
    /// # Errors
    /// When they are not all kept any more.
    pub fn changes(
        &self,
        after: u64,
        most: usize,
        wanted: impl Fn(&model::state::Change) -> bool,
    ) -> Result<Changes, Compacted> {
        self.core.machine.changes(after, most, wanted)
    }

    /// See [`model::State::take_woken`]. Each is given out once.
    pub fn take_woken(&self) -> BTreeSet<NodeId> {
        self.core.machine.take_woken()
    }

    /// Id and address of every member, learners too.
    pub fn members(&self) -> BTreeMap<ControllerId, String> {
        self.core.members().into_iter().map(|(id, address)| (ControllerId(id), address)).collect()
    }

    /// What this replica knows, at once.
    pub fn status(&self) -> QuorumStatus {
        self.core.status()
    }

    /// What every member says, within a second.
    pub async fn survey(&self) -> QuorumStatus {
        self.core.survey().await
    }

    /// Makes a controller a member without a vote, and waits until it has caught up.
    ///
    /// # Errors
    /// See [`MembershipError`]. After `Timeout` it goes on catching up, and the same call waits on.
    pub async fn add_learner(&self, id: ControllerId, address: &str) -> Result<(), MembershipError> {
        self.core.change(Change::AddLearner { id, address: address.into() }).await
    }

    /// Gives a learner a vote.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn promote(&self, id: ControllerId) -> Result<(), MembershipError> {
        self.core.change(Change::Promote { id }).await
    }

    /// Takes a member out, for ever. Refused when the rest would have no reachable majority. A leader that is removed
    /// hands over first.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn remove(&self, id: ControllerId) -> Result<(), MembershipError> {
        self.core.change(Change::Remove { id }).await
    }

    /// Whether no change of members is half made: then a majority of [`Self::members`] that vote is enough.
    pub fn membership_is_settled(&self) -> bool {
        self.core.membership_is_settled()
    }

    /// As the leader: finishes a change of members that was left half made. Returns at once when there is none.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn settle_membership(&self) -> Result<(), MembershipError> {
        self.core.settle_membership().await
    }

    /// Makes a voter the leader.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn transfer(&self, to: ControllerId) -> Result<(), MembershipError> {
        self.core.change(Change::Transfer { to }).await
    }

    /// Hands leadership to the voter that is furthest, when this one leads.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn hand_over(&self) -> Result<(), MembershipError> {
        self.core.hand_over().await
    }

    /// Hands leadership over if it can, then stops. What was acknowledged is on disk already. May be called again.
    pub async fn shutdown(&self) {
        if self.core.leadership_is_mine() && self.core.voters().len() > 1 {
            // Between two memberships the rest may not be a majority of the earlier one, and nobody could lead.
            self.core.within_elections(|| self.core.membership_is_settled()).await;
            match tokio::time::timeout(HAND_OVER_DEADLINE, self.core.hand_over()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "leadership was not handed over"),
                Err(_) => tracing::warn!("leadership was not handed over in time"),
            }
        }
        self.core.stopping.send_replace(true);
        if let Err(error) = self.core.raft.shutdown().await {
            tracing::error!(%error, "consensus did not stop cleanly");
        }
        for task in self.tasks.stop() {
            // It was aborted, so how it ended says nothing.
            drop(task.await);
        }
        self.core.machine.flush().await;
    }
}

fn open_storage(
    data: &std::path::Path,
    on_failure: &OnFailure,
    knows: u32,
) -> Result<(Log, StateStore, Machine), OpenError> {
    let log = Log::open(&data.join("raft-log"), on_failure.clone())?;
    let (tables, loaded) = StateStore::open(data, on_failure.clone())?;
    let snapshots = SnapshotStore::open(&data.join("snapshots"))?;
    check_whole(&log, loaded.applied, &snapshots)?;
    let machine = Machine::new(loaded, tables.clone(), snapshots, on_failure.clone(), knows)?;
    Ok((log, tables, machine))
}

/// Refuses a directory of which a part was lost: its member would vote without what it has promised.
fn check_whole(log: &Log, applied: Option<Position>, snapshots: &SnapshotStore) -> Result<(), OpenError> {
    let damaged = |what: &str| Err(OpenError::Storage(StorageError::Damaged { what: what.into() }));
    if applied.is_some() && log.vote()?.is_none() {
        return damaged("the Raft log (it is empty and the state tables are not)");
    }
    let restorable = applied.max(snapshots.current().and_then(|snapshot| snapshot.manifest().applied));
    if log.purged()?.map(|p| p.index) > restorable.map(|p| p.index) {
        return damaged("the state tables (they are older than the beginning of the log)");
    }
    Ok(())
}

fn checked_identity(config: &ReplicaConfig) -> Result<api::tls::Identity, OpenError> {
    let PeerTls { ca_pem, certificate_pem, key_pem } = config.tls.clone();
    let identity = api::tls::Identity { ca_pem, cert_pem: certificate_pem, key_pem };
    let found = identity.name().map_err(|e| OpenError::Certificate(e.to_string()))?;
    if found == config.id.to_string() { Ok(identity) } else { Err(OpenError::Identity { expected: config.id, found }) }
}

/// The settings that safety and liveness need are not open to choice; `docs/adr/0002` has the reasons.
fn settings(config: &ReplicaConfig) -> Result<Config, OpenError> {
    let Timing { heartbeat_millis, election_min_millis, election_max_millis } = config.timing;
    let settings = Config {
        cluster_name: "trefoil".into(),
        heartbeat_interval: heartbeat_millis,
        election_timeout_min: election_min_millis,
        election_timeout_max: election_max_millis,
        enable_pre_vote: Some(true),
        // A leader that has lost its quorum goes quiet, so that a member which both sides hear may elect another.
        quorum_loss_probe_interval: Some(2 * election_max_millis),
        // A restarted leader is elected again: a term then stands for one life of a leader.
        enable_leader_restore: Some(false),
        install_snapshot_timeout: INSTALL_MILLIS,
        max_payload_entries: MAX_BATCH_ENTRIES,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_every),
        max_in_snapshot_log_to_keep: config.snapshot_every,
        // Entries are cheaper to send than a snapshot as long as the log has them.
        replication_lag_threshold: config.snapshot_every.saturating_mul(4),
        ..Config::default()
    };
    settings.validate().map_err(|e| OpenError::Timing(e.to_string()))
}
