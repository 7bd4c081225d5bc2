//! Closed loops of clients, each with one request at a time, and what they saw.

use std::{
    fmt,
    time::{Duration, Instant},
};

use anyhow::Context;
use hdrhistogram::Histogram;
use jepsen::chance::Chance;
use serde::Serialize;

use super::{KEYS, VALUE_BYTES, store::Store};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    Write,
    Read,
    /// Of what the asked member has, at once: the cost of a call and no more. Nothing that asks others can be faster.
    Stale,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::Stale => "stale",
        })
    }
}

/// One system, one operation, one number of clients.
#[derive(Debug, Serialize)]
pub struct Cell {
    pub system: String,
    pub operation: Operation,
    pub clients: usize,
    /// Of each round.
    pub per_second: Vec<f64>,
    pub p50_micros: u64,
    pub p99_micros: u64,
    pub p999_micros: u64,
    /// Of all members together, for each operation.
    pub server_cpu_micros: f64,
    pub operations: u64,
    pub errors: u64,
    #[serde(skip)]
    histogram: Histogram<u64>,
    #[serde(skip)]
    cpu: Duration,
}

/// Microseconds, up to a minute.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are constant")
}

/// A value that is another one each time, as a compressor would notice.
fn value(chance: &mut Chance) -> String {
    let mut text = String::with_capacity(VALUE_BYTES + 16);
    while text.len() < VALUE_BYTES {
        text.push_str(&format!("{:016x}", chance.number()));
    }
    text.truncate(VALUE_BYTES);
    text
}

/// Writes every key once.
///
/// # Errors
/// When a write fails.
pub async fn fill(stores: &[Store]) -> anyhow::Result<()> {
    let mut writers = Vec::new();
    for number in 0..16 {
        let mut store = stores[number % stores.len()].clone();
        writers.push(tokio::spawn(async move {
            let mut chance = Chance::new(number as u64);
            for key in (number..KEYS).step_by(16) {
                store.write(key, &value(&mut chance)).await.with_context(|| format!("writing key {key}"))?;
            }
            anyhow::Ok(())
        }));
    }
    for writer in writers {
        writer.await??;
    }
    Ok(())
}

impl Cell {
    pub fn new(system: &str, operation: Operation, clients: usize) -> Self {
        Self {
            system: system.to_owned(),
            operation,
            clients,
            per_second: Vec::new(),
            p50_micros: 0,
            p99_micros: 0,
            p999_micros: 0,
            server_cpu_micros: 0.0,
            operations: 0,
            errors: 0,
            histogram: histogram(),
            cpu: Duration::ZERO,
        }
    }

    /// Adds one round. `cpu` tells the CPU time that all servers have used so far.
    ///
    /// # Errors
    /// When more requests failed than succeeded: that would be no measurement.
    pub async fn measure(
        &mut self,
        stores: &[Store],
        time: Duration,
        cpu: impl Fn() -> Duration,
    ) -> anyhow::Result<()> {
        let cpu_before = cpu();
        let began = Instant::now();
        let clients: Vec<_> = (0..self.clients)
            .map(|client| {
                let store = stores[client % stores.len()].clone();
                let seed = (self.per_second.len() * 1000 + client) as u64;
                tokio::spawn(one_client(store, self.operation, began + time, Chance::new(seed)))
            })
            .collect();
        let (mut done, mut failed) = (0, 0);
        for client in clients {
            let (seen, errors) = client.await?;
            done += seen.len();
            failed += errors;
            self.histogram.add(&seen)?;
        }
        let elapsed = began.elapsed();
        anyhow::ensure!(done > failed, "{}: {failed} of {} requests failed", self.system, done + failed);
        self.cpu += cpu().saturating_sub(cpu_before);
        self.operations += done;
        self.errors += failed;
        self.per_second.push(done as f64 / elapsed.as_secs_f64());
        self.p50_micros = self.histogram.value_at_quantile(0.5);
        self.p99_micros = self.histogram.value_at_quantile(0.99);
        self.p999_micros = self.histogram.value_at_quantile(0.999);
        self.server_cpu_micros = self.cpu.as_micros() as f64 / self.operations as f64;
        Ok(())
    }

    /// Between the slowest and the fastest round, in hundredths of the median.
    pub fn spread_percent(&self) -> f64 {
        let most = self.per_second.iter().copied().fold(0.0, f64::max);
        let least = self.per_second.iter().copied().fold(most, f64::min);
        100.0 * (most - least) / self.throughput().max(f64::MIN_POSITIVE)
    }

    /// The median of the rounds.
    pub fn throughput(&self) -> f64 {
        let mut rounds = self.per_second.clone();
        rounds.sort_by(f64::total_cmp);
        rounds.get(rounds.len() / 2).copied().unwrap_or(0.0)
    }

    pub fn line(&self) -> String {
        format!("{} {:.0}/s p50 {:.2} ms", self.system, self.throughput(), self.p50_micros as f64 / 1000.0)
    }
}

/// One request after the other until `end`; how long each took, and how many failed.
pub async fn one_client(store: Store, operation: Operation, end: Instant, chance: Chance) -> (Histogram<u64>, u64) {
    paced_client(store, operation, end, chance, Duration::ZERO).await
}

/// The same, and no request sooner than `every` after the one before.
pub async fn paced_client(
    mut store: Store,
    operation: Operation,
    end: Instant,
    mut chance: Chance,
    every: Duration,
) -> (Histogram<u64>, u64) {
    let mut seen = histogram();
    let mut errors = 0;
    let mut next = Instant::now();
    while Instant::now() < end {
        if next > Instant::now() {
            tokio::time::sleep_until(next.into()).await;
        }
        next = Instant::now() + every;
        let key = chance.below(KEYS);
        let start = Instant::now();
        let outcome = match operation {
            Operation::Write => store.write(key, &value(&mut chance)).await,
            Operation::Read => store.read(key, false).await.map(|_| ()),
            Operation::Stale => store.read(key, true).await.map(|_| ()),
        };
        match outcome {
            Ok(()) => seen.saturating_record(u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)),
            Err(_) => errors += 1,
        }
    }
    (seen, errors)
}
