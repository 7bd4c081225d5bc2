//! Where the controllers' CPU time goes while clients write: the functions at the top of a flame graph, each with its own
//! time only, as `perf` samples them.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use jepsen::{chance::Chance, cluster::Cluster};
use serde::Serialize;
use tokio::task::{JoinSet, spawn_blocking};

use super::{
    load::{self, Operation},
    store::Store,
};

/// Clients that write meanwhile.
pub const WRITERS: usize = 64;
/// Samples a second: not a round number, so that it beats with no clock of the program.
const HERTZ: &str = "499";
/// Functions that are told.
const MOST: usize = 16;
const NAME_CHARS: usize = 88;

#[derive(Debug, PartialEq, Serialize)]
pub struct Hot {
    /// Of the CPU time of all members together.
    pub percent: f64,
    /// As the symbol table has it; the kernel's with `[k]` before it.
    pub function: String,
}

/// Why it cannot be measured here, if it cannot.
pub fn obstacle() -> Option<String> {
    let tried = Command::new("perf").args(["stat", "-e", "task-clock", "true"]).output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Some(format!("perf may not look: {}", said.lines().find(|line| !line.is_empty()).unwrap_or_default()))
        }
        Err(error) => Some(format!("perf (package linux-perf) does not run: {error}")),
    }
}

/// # Errors
/// When `perf` fails.
pub async fn measure(cluster: &Cluster, stores: &[Store], root: &Path, time: Duration) -> anyhow::Result<Vec<Hot>> {
    let mut writers = JoinSet::new();
    let end = Instant::now() + 2 * time;
    for number in 0..WRITERS {
        let store = stores[number % stores.len()].clone();
        writers.spawn(load::one_client(store, Operation::Write, end, Chance::new(number as u64)));
    }
    let members: Vec<String> = (0..cluster.size()).filter_map(|n| Some(cluster.pid(n)?.to_string())).collect();
    let (samples, seconds) = (root.join("perf.data"), time.as_secs_f64().to_string());
    let text = spawn_blocking(move || {
        let file = samples.display().to_string();
        perf(&["record", "-q", "-F", HERTZ, "-p", &members.join(","), "-o", &file, "--", "sleep", &seconds])?;
        perf(&["report", "--stdio", "-q", "--sort", "symbol", "--percent-limit", "0.3", "-i", &file])
    });
    let text = text.await??;
    writers.shutdown().await;
    Ok(hottest(&text))
}

fn perf(words: &[&str]) -> anyhow::Result<String> {
    let output = Command::new("perf").args(words).output().context("running perf")?;
    ensure!(output.status.success(), "perf {}: {}", words[0], String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// From lines like `  7.12%  [k] _raw_spin_unlock_irqrestore`.
fn hottest(report: &str) -> Vec<Hot> {
    let line = |line: &str| {
        let (percent, symbol) = line.trim().split_once('%')?;
        let function = symbol.trim().trim_start_matches("[.] ").chars().take(NAME_CHARS).collect();
        Some(Hot { percent: percent.parse().ok()?, function })
    };
    report.lines().filter_map(line).take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let report = "\n     7.12%  [k] finish_task_switch\n     0.50%  [.] <a as b>::c\n\n# a comment\n";
        let hot = |percent, function: &str| Hot { percent, function: function.into() };
        assert_eq!(hottest(report), [hot(7.12, "[k] finish_task_switch"), hot(0.5, "<a as b>::c")]);
    }
}
