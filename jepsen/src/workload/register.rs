//! Registers on tags: linearizable reads, writes, and compare-and-set by the version that a tag had when it was read.
//!
//! Written values are unique, so that a lost or stale value cannot hide behind an equal one. A key is retired after
//! some hundred operations, so that a checker can decide it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{Asked, Evidence, PAUSE, Site, Worker, Workload};
use crate::{
    chance::Chance,
    checker::{self, Finding},
    client::{Answer, Client},
    history::Function,
};

/// With four keys in use, fewer than twelve clients at a key at any time.
const CLIENTS: usize = 6;
/// Keys in use at one time: few, so that clients meet on them.
const KEYS: u64 = 4;
/// Operations on a key before it is retired.
const OPERATIONS_PER_KEY: u64 = 300;

pub struct Registers;

impl Workload for Registers {
    fn name(&self) -> &'static str {
        "register"
    }

    fn needs(&self) -> &'static [Function] {
        &[Function::Read, Function::Write, Function::Cas]
    }

    fn start(&self, site: &Site<'_>, chance: &mut Chance) -> anyhow::Result<Vec<JoinHandle<()>>> {
        let numbers = Arc::new(Numbers::default());
        (0..CLIENTS).map(|_| Ok(tokio::spawn(work(site.worker(chance)?, numbers.clone())))).collect()
    }

    fn judge(&self, evidence: &Evidence<'_>) -> Vec<(&'static str, Finding)> {
        vec![
            ("register: linearizable", checker::register::check(evidence.operations)),
            ("register: indexes move forwards", checker::revision::check(evidence.operations)),
        ]
    }
}

/// Numbers that all register clients share.
#[derive(Default)]
struct Numbers {
    operations: AtomicU64,
    values: AtomicU64,
}

/// The value of a tag and its version, as this client last saw them; absent is version 0.
type Seen = (Value, u64);

/// Works until the run is over.
async fn work(mut worker: Worker, numbers: Arc<Numbers>) {
    let mut seen: HashMap<String, Seen> = HashMap::new();
    while !worker.shared.is_over() {
        let key = key(numbers.operations.fetch_add(1, Ordering::Relaxed));
        let mut client = worker.client();
        match worker.chance.below(10) {
            0..=3 => read(&mut worker, &mut client, &key, &mut seen).await,
            4..=6 => write(&mut worker, &mut client, &key, &numbers, &mut seen).await,
            _ => compare_and_set(&mut worker, &mut client, &key, &numbers, &mut seen).await,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// The key of the nth operation: `KEYS` generations of keys are in use side by side, and each is left at its end.
fn key(operation: u64) -> String {
    let slot = operation % KEYS;
    format!("register-{slot}-{}", operation / KEYS / OPERATIONS_PER_KEY)
}

async fn read(worker: &mut Worker, client: &mut Client, key: &str, seen: &mut HashMap<String, Seen>) {
    let asked = asked(Function::Read, key, Value::Null, client, String::new());
    worker.invoke(&asked);
    match client.get_tag(key).await {
        Answer::Ok(Some(tag)) => {
            let value = json!(tag.value);
            seen.insert(key.to_owned(), (value.clone(), tag.version));
            worker.ok(&asked, value, Some(tag.version));
        }
        Answer::Ok(None) => {
            seen.insert(key.to_owned(), (Value::Null, 0));
            worker.ok(&asked, Value::Null, Some(0));
        }
        Answer::Fail(why) => worker.fail(&asked, why),
        Answer::Info(why) => worker.info(&asked, why).await,
    }
}

async fn write(
    worker: &mut Worker,
    client: &mut Client,
    key: &str,
    numbers: &Numbers,
    seen: &mut HashMap<String, Seen>,
) {
    let value = new_value(numbers);
    let asked = asked(Function::Write, key, json!(value), client, Worker::request_id());
    worker.invoke(&asked);
    let answer = client.set_tag(&asked.req, key, &value, None).await;
    finish(worker, asked, answer, key, value, seen).await;
}

async fn compare_and_set(
    worker: &mut Worker,
    client: &mut Client,
    key: &str,
    numbers: &Numbers,
    seen: &mut HashMap<String, Seen>,
) {
    let (old, version) = seen.get(key).cloned().unwrap_or((Value::Null, 0));
    let value = new_value(numbers);
    let asked = asked(Function::Cas, key, json!([old, value]), client, Worker::request_id());
    worker.invoke(&asked);
    let answer = client.set_tag(&asked.req, key, &value, Some(version)).await;
    if matches!(answer, Answer::Fail(_)) {
        // It has another version now; without forgetting, this client would fail for ever.
        seen.remove(key);
    }
    finish(worker, asked, answer, key, value, seen).await;
}

async fn finish(
    worker: &mut Worker,
    asked: Asked,
    answer: Answer<u64>,
    key: &str,
    value: String,
    seen: &mut HashMap<String, Seen>,
) {
    match answer {
        Answer::Ok(version) => {
            seen.insert(key.to_owned(), (json!(value), version));
            let value = asked.value.clone();
            worker.ok(&asked, value, Some(version));
        }
        Answer::Fail(why) => worker.fail(&asked, why),
        Answer::Info(why) => worker.info(&asked, why).await,
    }
}

fn new_value(numbers: &Numbers) -> String {
    format!("v{}", numbers.values.fetch_add(1, Ordering::Relaxed))
}

fn asked(f: Function, key: &str, value: Value, client: &Client, req: String) -> Asked {
    Asked { f, key: key.to_owned(), value, node: client.name.clone(), req }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_shared_and_retired() {
        assert_eq!(key(0), key(KEYS));
        assert_ne!(key(0), key(1));
        assert_ne!(key(0), key(KEYS * OPERATIONS_PER_KEY));
    }
}
