//! The state machine: the model's `State` in memory, its changed rows to disk, its hash for comparison.
//!
//! One applied chunk holds the write lock while it changes memory; the rows that it touched then go to disk in one
//! write, and only then its proposers are answered and the applied index moves.

use std::{
    collections::{BTreeSet, VecDeque},
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use futures::{Stream, TryStreamExt};
use model::{NodeId, State, Timestamp, state::Change};
use openraft::{
    EntryPayload, OptionalSend, RaftSnapshotBuilder,
    storage::{ApplyResponder, EntryResponder, RaftStateMachine},
};
use storage::{
    failure::OnFailure,
    record::{self, Position},
    snapshot::{self, SnapshotStore},
    state::{Batch, Loaded, StateStore},
};
use tokio::sync::watch;

use crate::{
    dialect::{self, Entry, Outcome, Snapshot, SnapshotMeta, StoredMembership, TypeConfig},
    feed::{Changes, Compacted, Feed, Gathered},
    status::HashAt,
};

/// Entries under one hold of the lock: some milliseconds, so that readers do not wait longer.
const CHUNK_ENTRIES: usize = 512;
/// A host's report of hundreds of machines is one entry and the work of hundreds; after a failover or a power cut all hosts have one.
const CHUNK_BYTES: usize = 128 << 10;
/// A hash is kept whenever the index is a multiple of this, so that replicas have hashes of the same indexes.
const HASH_EVERY: u64 = 256;
/// At 10,000 entries a second these cover three seconds of difference between two replicas.
const HASHES_KEPT: usize = 128;

/// Cheap to clone.
#[derive(Clone)]
pub struct Machine {
    shared: Arc<Shared>,
}

struct Shared {
    view: RwLock<View>,
    tables: StateStore,
    snapshots: SnapshotStore,
    hashes: Mutex<Hashes>,
    feed: Feed,
    woken: Mutex<BTreeSet<NodeId>>,
    applied: watch::Sender<u64>,
    /// The state's time in milliseconds and its feature level, for those who must not wait for the lock: what keeps this
    /// replica a member runs on few threads.
    now_millis: AtomicU64,
    level: AtomicU32,
    on_failure: OnFailure,
    /// The highest feature level that this version knows.
    knows: u32,
}

/// What belongs together at one applied index.
struct View {
    state: State,
    applied: Option<Position>,
    membership: StoredMembership,
}

#[derive(Default)]
struct Hashes {
    at_multiples: VecDeque<HashAt>,
    latest: Option<HashAt>,
}

impl Machine {
    /// # Errors
    /// When the stored membership is damaged, or the state is of a later version.
    pub fn new(
        loaded: Loaded,
        tables: StateStore,
        snapshots: SnapshotStore,
        on_failure: OnFailure,
        knows: u32,
    ) -> Result<Self, storage::failure::StorageError> {
        let hash = loaded.state.hash();
        let view = view(loaded, knows)?;
        let index = view.applied.map(|p| p.index);
        let hashes = Hashes { latest: index.map(|index| HashAt { index, hash }), ..Hashes::default() };
        let feed = Feed::new(&view.state, index.unwrap_or(0));
        let shared = Shared {
            view: RwLock::new(view),
            feed,
            woken: Mutex::default(),
            tables,
            snapshots,
            hashes: Mutex::new(hashes),
            applied: watch::Sender::new(index.unwrap_or(0)),
            now_millis: AtomicU64::default(),
            level: AtomicU32::default(),
            on_failure,
            knows,
        };
        let machine = Self { shared: Arc::new(shared) };
        machine.read(|state, _| machine.note(state));
        Ok(machine)
    }

    /// To be called while what `state` is of is held, for writing or before anybody else has it.
    fn note(&self, state: &State) {
        self.shared.now_millis.store(state.now().0, Ordering::Release);
        self.shared.level.store(state.quorum().level, Ordering::Release);
    }

    /// The state's time, without waiting for what is being applied.
    pub fn now(&self) -> Timestamp {
        Timestamp(self.shared.now_millis.load(Ordering::Acquire))
    }

    /// The state's feature level, without waiting for what is being applied.
    pub fn level(&self) -> u32 {
        self.shared.level.load(Ordering::Acquire)
    }

    /// The applied index, without waiting for what is being applied.
    pub fn applied(&self) -> u64 {
        *self.shared.applied.borrow()
    }

    pub fn read<T>(&self, f: impl FnOnce(&State, u64) -> T) -> T {
        let view = self.shared.view.read().unwrap_or_else(PoisonError::into_inner);
        f(&view.state, view.applied.map_or(0, |p| p.index))
    }

    pub fn watch_applied(&self) -> watch::Receiver<u64> {
        self.shared.applied.subscribe()
    }

    /// See [`Feed::read`].
    pub fn changes(&self, after: u64, most: usize, wanted: impl Fn(&Change) -> bool) -> Result<Changes, Compacted> {
        self.shared.feed.read(after, most, wanted)
    }

    pub fn take_woken(&self) -> BTreeSet<NodeId> {
        std::mem::take(&mut *self.woken())
    }

    fn woken(&self) -> MutexGuard<'_, BTreeSet<NodeId>> {
        self.shared.woken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The hashes that are still known, the latest included, in the order of their indexes.
    pub fn hashes(&self) -> Vec<HashAt> {
        let hashes = self.shared.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        let latest = hashes.latest.filter(|latest| hashes.at_multiples.back() != Some(latest));
        hashes.at_multiples.iter().copied().chain(latest).collect()
    }

    pub fn snapshots(&self) -> &SnapshotStore {
        &self.shared.snapshots
    }

    /// Brings the tables to disk, so that the next start replays nothing.
    pub async fn flush(&self) {
        let tables = self.shared.tables.clone();
        match tokio::task::spawn_blocking(move || tables.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the state tables were not flushed; the next start replays more"),
            Err(error) => tracing::warn!(%error, "the flush of the state tables did not finish"),
        }
    }

    /// Applies a chunk: memory under the lock, then disk, then answers.
    fn apply_chunk(&self, chunk: &mut Vec<EntryResponder<TypeConfig>>) -> io::Result<()> {
        let Some((last, _)) = chunk.last() else { return Ok(()) };
        let applied = dialect::position(&last.log_id);
        let mut batch = Batch { applied: Some(applied), ..Batch::default() };
        let mut answers: Vec<(ApplyResponder<TypeConfig>, Outcome)> = Vec::new();
        let mut hashes = Vec::new();
        let mut gathered = Gathered::default();
        {
            let mut view = self.shared.view.write().unwrap_or_else(PoisonError::into_inner);
            for (entry, responder) in chunk.drain(..) {
                let index = entry.log_id.index;
                let outcome = apply_entry(&mut view, entry, &mut batch)?;
                self.fail(understood(&view.state, self.shared.knows))?;
                gathered.note(index, &mut view.state);
                if index.is_multiple_of(HASH_EVERY) {
                    gathered.take_rows(&mut view.state);
                    hashes.push(HashAt { index, hash: view.state.hash() });
                }
                answers.extend(responder.map(|responder| (responder, outcome)));
            }
            gathered.take_rows(&mut view.state);
            batch.hash = view.state.hash();
            view.applied = Some(applied);
            self.note(&view.state);
            self.woken().append(&mut view.state.take_woken());
        }
        let (rows, changes) = gathered.into_parts();
        batch.rows = rows;
        self.shared.tables.write(&batch).map_err(io::Error::other)?;
        self.remember(hashes, HashAt { index: applied.index, hash: batch.hash });
        self.shared.feed.extend(applied.index, changes);
        self.shared.applied.send_replace(applied.index);
        for (responder, outcome) in answers {
            responder.send(outcome);
        }
        Ok(())
    }

    fn remember(&self, new: Vec<HashAt>, latest: HashAt) {
        let mut hashes = self.shared.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        hashes.at_multiples.extend(new);
        let excess = hashes.at_multiples.len().saturating_sub(HASHES_KEPT);
        hashes.at_multiples.drain(..excess);
        hashes.latest = Some(latest);
    }

    /// Nothing can be applied after this entry, so there is nothing to go on with.
    fn fail<T>(&self, result: Result<T, storage::failure::StorageError>) -> io::Result<T> {
        result.inspect_err(|error| (self.shared.on_failure)(error)).map_err(io::Error::other)
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotData = snapshot::Snapshot;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<dialect::LogId>, StoredMembership), io::Error> {
        let view = self.shared.view.read().unwrap_or_else(PoisonError::into_inner);
        Ok((view.applied.map(dialect::log_id), view.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let (mut chunk, mut bytes) = (Vec::new(), 0);
        while let Some(item) = entries.try_next().await? {
            if let EntryPayload::Normal(encoded) = &item.0.payload {
                bytes += encoded.0.len();
            }
            chunk.push(item);
            if chunk.len() >= CHUNK_ENTRIES || bytes >= CHUNK_BYTES {
                self.apply_chunk(&mut chunk)?;
                bytes = 0;
                // Heartbeats have been waiting for this thread.
                tokio::task::yield_now().await;
            }
        }
        self.apply_chunk(&mut chunk)
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, _meta: &SnapshotMeta, snapshot: snapshot::Snapshot) -> Result<(), io::Error> {
        let (tables, received) = (self.shared.tables.clone(), snapshot.clone());
        let installed =
            tokio::task::spawn_blocking(move || tables.install(&received)).await.map_err(io::Error::other)?;
        let loaded = self.fail(installed)?;
        self.shared.snapshots.adopt(&snapshot);
        let hash = loaded.state.hash();
        let new = self.fail(view(loaded, self.shared.knows))?;
        let index = new.applied.map_or(0, |p| p.index);
        self.shared.feed.begin_again(&new.state, index);
        let old = {
            let mut view = self.shared.view.write().unwrap_or_else(PoisonError::into_inner);
            self.note(&new.state);
            std::mem::replace(&mut *view, new)
        };
        // A million rows take a while to be given back, and nobody waits for it.
        drop(tokio::task::spawn_blocking(move || drop(old)));
        self.remember(Vec::new(), HashAt { index, hash });
        self.shared.applied.send_replace(index);
        tracing::info!(index, "installed a snapshot");
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        self.shared.snapshots.current().map(with_meta).transpose()
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Machine {
    type SnapshotData = snapshot::Snapshot;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let shared = self.shared.clone();
        let build = move || shared.snapshots.build(&shared.tables);
        let built = tokio::task::spawn_blocking(build).await.map_err(io::Error::other)?;
        with_meta(self.fail(built)?)
    }
}

/// A snapshot with what openraft wants to know of it.
pub fn with_meta(snapshot: snapshot::Snapshot) -> io::Result<Snapshot> {
    let manifest = snapshot.manifest();
    let damaged = || io::Error::other("the membership in a snapshot is damaged");
    let last_membership = dialect::from_stored_membership(manifest.membership.clone()).ok_or_else(damaged)?;
    let meta = SnapshotMeta { last_log_id: manifest.applied.map(dialect::log_id), last_membership };
    Ok(Snapshot { meta, snapshot })
}

fn view(loaded: Loaded, knows: u32) -> Result<View, storage::failure::StorageError> {
    understood(&loaded.state, knows)?;
    let what = "the membership in the state tables".to_owned();
    let membership =
        dialect::from_stored_membership(loaded.membership).ok_or(storage::failure::StorageError::Damaged { what })?;
    Ok(View { state: loaded.state, applied: loaded.applied, membership })
}

/// What comes after an entry that raised the level cannot be read by a version that does not know it.
fn understood(state: &State, known: u32) -> Result<(), storage::failure::StorageError> {
    let level = state.quorum().level;
    if level > known { Err(storage::failure::StorageError::TooNew { level, known }) } else { Ok(()) }
}

fn apply_entry(view: &mut View, entry: Entry, batch: &mut Batch) -> io::Result<Outcome> {
    let index = entry.log_id.index;
    match entry.payload {
        EntryPayload::Blank => Ok(Outcome(None)),
        EntryPayload::Membership(membership) => {
            view.membership = StoredMembership::new(Some(entry.log_id), membership);
            batch.membership = Some(dialect::to_stored_membership(&view.membership));
            Ok(Outcome(None))
        }
        EntryPayload::Normal(encoded) => {
            let reason = record::BadRecord::Body;
            let refused =
                || io::Error::other(storage::failure::StorageError::BadRecord { index, reason: reason.clone() });
            let decoded = crate::wire::decode::<model::Entry>(&encoded.0).ok_or_else(refused)?;
            Ok(Outcome(Some(view.state.apply(index, &decoded))))
        }
    }
}
