//! What clients do while the cluster is hurt. Each client is a task with an endless stream of operations; where one
//! ends without an answer, a new process number takes its place, as the old one might still be at it.
//!
//! All workloads run together on one cluster, so that each fault is paid for once. What each of them promises is judged
//! from the history alone, in [`crate::checker`].

use std::{
    future::ready,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::bail;
use futures::future::LocalBoxFuture;
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::{
    chance::Chance,
    checker::Finding,
    client::{Answer, Client},
    cluster::Cluster,
    effect::Effect,
    history::{Event, Function, Kind, Operation, Recorder},
    nemesis::Unsettled,
};

pub mod images;
pub mod machines;
pub mod networks;
pub mod register;
pub mod set;
pub mod watch;

/// Every workload that there is.
pub const ALL: &[&dyn Workload] = &[
    &register::Registers,
    &set::Elements,
    &watch::Watchers,
    &machines::Machines,
    &networks::Networks,
    &images::Images,
];

/// The tenant in which all of them work.
pub const TENANT: &str = "jepsen";
/// After a fault the controllers must agree again, and answer, within this time.
pub const SETTLE: Duration = Duration::from_secs(30);
/// A client gives up waiting after this: a failover takes less, so most operations of a fault still end well.
const CLIENT_PATIENCE: Duration = Duration::from_secs(2);
/// Between two operations of one client: some hundred operations a second in all leave the processors to the cluster.
const PAUSE: Duration = Duration::from_millis(4);
/// After an attempt that no controller answered: a dead one refuses at once, and would fill the history.
const PAUSE_AFTER_SILENCE: Duration = Duration::from_millis(100);

/// One kind of clients, and what must be true of what they saw.
pub trait Workload: Sync {
    fn name(&self) -> &'static str;

    /// What must have been acknowledged at least once for a run to count.
    fn needs(&self) -> &'static [Function];

    /// Makes what its clients need, before the first fault.
    fn prepare<'a>(&'a self, _site: &'a Site<'a>) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        Box::pin(ready(Ok(())))
    }

    /// Starts its clients. They end when the run is over.
    ///
    /// # Errors
    /// When there can be no client.
    fn start(&self, site: &Site<'_>, chance: &mut Chance) -> anyhow::Result<Vec<JoinHandle<()>>>;

    /// Asks every controller, and whom else it concerns, after everything was healed. What they say goes into the
    /// history as [`Function::Final`].
    fn finish<'a>(&'a self, _site: &'a Site<'a>) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        Box::pin(ready(Ok(())))
    }

    /// What did not happen, and should have for its promises to be worth something.
    fn gaps(&self, _evidence: &Evidence<'_>) -> Vec<String> {
        Vec::new()
    }

    /// Each promise with what is known of it.
    fn judge(&self, evidence: &Evidence<'_>) -> Vec<(&'static str, Finding)>;
}

/// When a workload did too little to be judged. `quiet`: the beginning of the first fault, and when all was well after
/// the last; `during`: faults in which clients should have been served.
pub fn idle(
    workload: &dyn Workload,
    operations: &[Operation],
    quiet: (u64, u64),
    during: &[(u64, u64)],
) -> Vec<String> {
    let done: Vec<&Operation> =
        operations.iter().filter(|o| o.outcome == Kind::Ok && workload.needs().contains(&o.f)).collect();
    let within = |(from, to): (u64, u64)| done.iter().any(|o| o.start >= from && o.end <= to);
    let name = workload.name();
    let mut gaps = Vec::new();
    for f in workload.needs().iter().filter(|f| !done.iter().any(|o| o.f == **f)) {
        gaps.push(format!("{name}: no {f:?} was ever acknowledged"));
    }
    if !within((0, quiet.0)) {
        gaps.push(format!("{name}: nothing was acknowledged before the first fault"));
    }
    if !during.is_empty() && !during.iter().any(|fault| within(*fault)) {
        gaps.push(format!("{name}: nothing was acknowledged during any fault"));
    }
    if !within((quiet.1, u64::MAX)) {
        gaps.push(format!("{name}: nothing was acknowledged after the last fault"));
    }
    gaps
}

/// What a run leaves to be judged.
pub struct Evidence<'a> {
    pub operations: &'a [Operation],
    /// What hosts did, on the history's clock.
    pub effects: &'a [Effect],
    /// When that clock began, in milliseconds since the Unix epoch; `None` when a wall clock was set during the run.
    pub began_unix_millis: Option<u64>,
}

/// Where clients work.
pub struct Site<'a> {
    pub cluster: &'a Cluster,
    pub shared: &'a Arc<Shared>,
}

impl Site<'_> {
    /// A client of each controller.
    ///
    /// # Errors
    /// When an endpoint or the token cannot be one.
    pub fn clients(&self) -> anyhow::Result<Vec<Client>> {
        let client = |member| {
            let (name, endpoint) = (self.cluster.name(member), self.cluster.endpoint(member));
            Client::new(name, &endpoint, self.cluster.access(), TENANT, CLIENT_PATIENCE)
        };
        (0..self.cluster.size()).map(client).collect()
    }

    /// # Errors
    /// As `clients`.
    pub fn worker(&self, chance: &mut Chance) -> anyhow::Result<Worker> {
        Ok(Worker::new(self.shared, self.clients()?, chance.split()))
    }

    /// Something that must be done, with a request id, by whichever controller does it.
    ///
    /// # Errors
    /// When none does in time.
    async fn once(&self, what: impl AsyncFn(&Client, &str) -> Answer<()>) -> anyhow::Result<()> {
        let (clients, id, deadline) = (self.clients()?, Worker::request_id(), Instant::now() + SETTLE);
        for client in clients.iter().cycle() {
            match what(client, &id).await {
                Answer::Ok(()) => break,
                Answer::Fail(why) | Answer::Info(why) if Instant::now() > deadline => bail!("{}: {why}", client.name),
                _ => tokio::time::sleep(PAUSE_AFTER_SILENCE).await,
            }
        }
        Ok(())
    }

    /// What each controller answers after everything was healed, under this key in the history.
    ///
    /// # Errors
    /// When one of them does not answer in time.
    async fn ask_all(&self, key: &str, ask: impl AsyncFn(&mut Client) -> Answer<Value>) -> anyhow::Result<()> {
        for mut client in self.clients()? {
            let worker = Worker::new(self.shared, Vec::new(), Chance::new(0));
            let (key, node) = (key.to_owned(), client.name.clone());
            let asked = Asked { f: Function::Final, key, value: Value::Null, node, req: String::new() };
            worker.invoke(&asked);
            let deadline = Instant::now() + SETTLE;
            loop {
                match ask(&mut client).await {
                    Answer::Ok(value) => break worker.ok(&asked, value, None),
                    Answer::Fail(why) | Answer::Info(why) if Instant::now() > deadline => {
                        let what = format!("{} does not answer for '{}' after everything", client.name, asked.key);
                        return Err(Unsettled(format!("{what} was healed: {why}")).into());
                    }
                    _ => tokio::time::sleep(PAUSE_AFTER_SILENCE).await,
                }
            }
        }
        Ok(())
    }
}

/// Of each controller or host, by name: what it said at the end under this key.
fn finals<'a>(operations: &'a [Operation], key: &str) -> Vec<(&'a str, &'a Value)> {
    let said = operations.iter().filter(|o| o.f == Function::Final && o.key == key && o.outcome == Kind::Ok);
    said.map(|o| (o.node.as_str(), &o.answered)).collect()
}

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

    pub fn is_over(&self) -> bool {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checker::trial;

    #[test]
    fn a_workload_that_was_idle_before_during_or_after_the_faults_is_a_gap() {
        let did = |f, at| trial::operation(f, "k", json!(null), Kind::Ok, at, at + 1);
        let all = [did(Function::Add, 1), did(Function::List, 15), did(Function::Add, 35)];
        let gaps = |done: &[Operation]| idle(&set::Elements, done, (10, 30), &[(10, 20)]);
        assert_eq!(gaps(&all), [""; 0]);
        for missing in 0..all.len() {
            let rest: Vec<Operation> =
                all.iter().enumerate().filter(|(n, _)| *n != missing).map(|(_, o)| o.clone()).collect();
            assert!(!gaps(&rest).is_empty(), "without the one at {}", all[missing].start);
        }
    }
}
