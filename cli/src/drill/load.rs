//! The background client: it writes and reads as a user would, and remembers what each attempt came to.
//!
//! Four workers, two that write one tag each and two that read it linearizably, each one request every 20 ms or as fast as answers
//! come. A request goes from controller to controller for two seconds, as every client of this program does, and counts
//! as unanswered then. A read must show at least the newest version that was acknowledged before it began: that is
//! checked here, for every read.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use api::{
    client::Client,
    error::{ApiError, ErrorKind},
    proto::GetTagRequest,
};
use tokio::task::JoinSet;

use super::{
    ask::{ask, set_tag},
    record::Record,
    timeline::{Answer, Outcome},
};

const PAIRS: usize = 2;
const EVERY: Duration = Duration::from_millis(20);
/// Longer than any failover on a machine that is not in trouble, and as long as a person waits.
const PATIENCE: Duration = Duration::from_secs(2);

/// The tags that it writes; whoever prepared the tenant removes them.
pub fn keys() -> impl Iterator<Item = String> {
    (0..PAIRS).map(|pair| format!("drill-client-{pair}"))
}

/// Works until the record is over.
pub fn start(client: &Client, tenant: &str, record: &Arc<Record>) -> JoinSet<()> {
    let mut workers = JoinSet::new();
    for key in keys() {
        let newest = Arc::new(AtomicU64::new(0));
        for write in [true, false] {
            let client = client.clone().with_deadline(PATIENCE);
            let worker = Worker { client, tenant: tenant.into(), key: key.clone(), newest: newest.clone(), write };
            workers.spawn(worker.work(record.clone()));
        }
    }
    workers
}

struct Worker {
    client: Client,
    tenant: String,
    key: String,
    /// The newest version that was acknowledged.
    newest: Arc<AtomicU64>,
    write: bool,
}

impl Worker {
    async fn work(self, record: Arc<Record>) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !record.is_over() {
            ticks.tick().await;
            let began = Instant::now();
            let outcome = if self.write { self.write().await } else { self.read(&record).await };
            let at = record.at(began);
            let took = record.now() - at;
            record.see().answers.push(Answer { began: at, took, write: self.write, outcome });
        }
    }

    async fn write(&self) -> Outcome {
        match set_tag(&self.client, &self.tenant, &self.key, "drill").await {
            Ok(version) => {
                self.newest.fetch_max(version, Ordering::SeqCst);
                Outcome::Done
            }
            Err(error) => outcome(&error),
        }
    }

    async fn read(&self, record: &Record) -> Outcome {
        let least = self.newest.load(Ordering::SeqCst);
        let body = GetTagRequest { tenant: self.tenant.clone(), key: self.key.clone(), stale: false };
        match ask!(self.client, get_tag, body) {
            Ok(tag) => {
                if tag.version < least {
                    record.broke(format!(
                        "a read of {} showed version {} after version {least} was acknowledged",
                        self.key, tag.version
                    ));
                }
                Outcome::Done
            }
            // Before the first write.
            Err(error) if error.kind == ErrorKind::NotFound && least == 0 => Outcome::Done,
            Err(error) => {
                if error.kind == ErrorKind::NotFound {
                    record
                        .broke(format!("a read did not find {} after its version {least} was acknowledged", self.key));
                }
                outcome(&error)
            }
        }
    }
}

fn outcome(error: &ApiError) -> Outcome {
    if error.kind == ErrorKind::Unknown { Outcome::Unanswered } else { Outcome::Refused }
}
