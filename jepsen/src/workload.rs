//! What clients do while the cluster is hurt. Each client is a task with an endless stream of operations; where one
//! ends without an answer, a new process number takes its place, as the old one might still be at it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use serde_json::Value;

use crate::{
    chance::Chance,
    client::Client,
    history::{Event, Function, Kind, Recorder},
};

pub mod register;
pub mod set;

/// Between two operations of one client: some hundred operations a second in all leave the processors to the cluster.
const PAUSE: Duration = Duration::from_millis(4);
/// After an attempt that no controller answered: a dead one refuses at once, and would fill the history.
const PAUSE_AFTER_SILENCE: Duration = Duration::from_millis(100);

/// What every client of a run shares.
pub struct Shared {
    pub recorder: Recorder,
    processes: AtomicU64,
    over: AtomicBool,
}

impl Shared {
    pub fn new(recorder: Recorder) -> Arc<Self> {
        Arc::new(Self { recorder, processes: AtomicU64::new(0), over: AtomicBool::new(false) })
    }

    /// A process number that was never used before.
    fn process(&self) -> u64 {
        self.processes.fetch_add(1, Ordering::Relaxed)
    }

    /// Clients end after the operation they are at.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// One client: a process number, a connection to every controller, and its own choices.
pub struct Worker {
    shared: Arc<Shared>,
    clients: Vec<Client>,
    chance: Chance,
    process: u64,
}

/// An operation about to be made.
struct Asked {
    f: Function,
    key: String,
    value: Value,
    node: String,
    req: String,
}

impl Worker {
    pub fn new(shared: &Arc<Shared>, clients: Vec<Client>, chance: Chance) -> Self {
        Self { process: shared.process(), shared: shared.clone(), clients, chance }
    }

    /// A controller by chance.
    fn client(&mut self) -> Client {
        self.chance.pick(&self.clients).clone()
    }

    fn request_id() -> String {
        uuid::Uuid::now_v7().to_string()
    }

    fn invoke(&self, asked: &Asked) {
        self.record(asked, Kind::Invoke, asked.value.clone(), None, String::new());
    }

    fn ok(&self, asked: &Asked, value: Value, rev: Option<u64>) {
        self.record(asked, Kind::Ok, value, rev, String::new());
    }

    fn fail(&self, asked: &Asked, why: String) {
        self.record(asked, Kind::Fail, asked.value.clone(), None, why);
    }

    /// The process ends; the worker goes on as another.
    async fn info(&mut self, asked: &Asked, why: String) {
        self.record(asked, Kind::Info, asked.value.clone(), None, why);
        self.process = self.shared.process();
        tokio::time::sleep(PAUSE_AFTER_SILENCE).await;
    }

    fn record(&self, asked: &Asked, kind: Kind, value: Value, rev: Option<u64>, error: String) {
        self.shared.recorder.record(Event {
            process: self.process,
            kind,
            f: asked.f,
            key: asked.key.clone(),
            value,
            time: 0,
            node: asked.node.clone(),
            req: asked.req.clone(),
            rev,
            error,
        });
    }
}
