//! How soon a change reaches all who watch.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::Context;
use jepsen::cluster::{Cluster, PATIENCE};
use serde::Serialize;
use tokio::sync::mpsc;

use super::{KEYS, TENANT, growth, load, store};

/// Watchers that share a connection: a server takes a bounded number of streams on each.
const A_CONNECTION: usize = 50;
/// Changes, one after the other has reached everybody.
const CHANGES: usize = 50;

#[derive(Debug, Serialize)]
pub struct Watching {
    pub watchers: usize,
    pub changes: usize,
    /// From the request that makes the change to each watcher's knowledge of it.
    pub p50_millis: f64,
    pub p99_millis: f64,
    /// The same to the last watcher's, median of the changes.
    pub all_millis: f64,
}

/// # Errors
/// When a watch ends, or a change does not reach everybody.
pub async fn measure(cluster: &Cluster, watchers: usize) -> anyhow::Result<Watching> {
    let mut writer = store::trefoil(cluster, 1)?.remove(0);
    let sent = Arc::new(Mutex::new(Instant::now()));
    let (tell, mut told) = mpsc::channel(watchers.max(1));
    let mut tasks = tokio::task::JoinSet::new();
    let (mut ready, mut client) = (Vec::new(), growth::client(cluster, 0)?);
    for number in 0..watchers {
        if number % A_CONNECTION == 0 {
            client = growth::client(cluster, number / A_CONNECTION)?;
        }
        let mut watch = client.watch(TENANT, None).await?;
        ready.push(watch.next().await?.revision);
        let (tell, sent) = (tell.clone(), sent.clone());
        tasks.spawn(async move {
            while let Ok(reply) = watch.next().await {
                for _ in reply.events.iter().filter(|event| event.kind == "tag") {
                    let began = *sent.lock().expect("nobody panics with it");
                    if tell.send(began.elapsed()).await.is_err() {
                        return;
                    }
                }
            }
        });
    }
    let (mut each, mut all) = (load::histogram(), load::histogram());
    for change in 0..CHANGES {
        *sent.lock().expect("nobody panics with it") = Instant::now();
        writer.write(change % KEYS, &format!("change {change}")).await?;
        let mut last = Duration::ZERO;
        for _ in 0..watchers {
            let next = tokio::time::timeout(PATIENCE, told.recv()).await.context("a change did not reach everybody")?;
            let took = next.context("every watch has ended")?;
            each.record(u64::try_from(took.as_micros())?)?;
            last = last.max(took);
        }
        all.record(u64::try_from(last.as_micros())?)?;
    }
    let millis = |micros: u64| micros as f64 / 1000.0;
    Ok(Watching {
        watchers,
        changes: CHANGES,
        p50_millis: millis(each.value_at_quantile(0.5)),
        p99_millis: millis(each.value_at_quantile(0.99)),
        all_millis: millis(all.value_at_quantile(0.5)),
    })
}
