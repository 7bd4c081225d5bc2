//! Liveness: whenever a majority of controllers hear each other, a client that may talk to all controllers completes a
//! write within a stated bound, *while the fault stays*. Where no majority does, there are refusals and timeouts, and
//! no lies.
//!
//! A cluster that never completes a write passes every other checker. For three controllers all states of the links are
//! gone through, with each controller as the leader; for five, those that three cannot have.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context;
use serde::Serialize;
use tokio::task::JoinHandle;

use crate::{
    chance::Chance,
    checker::Finding,
    client::Client,
    cluster::{Cluster, OFTEN, Options},
    history::{self, Kind, Recorder},
    nemesis::links,
    report::describe,
    verdict::Verdict,
    workload::{Evidence, SETTLE, Shared, Site, TENANT, Worker, Workload, set},
};
use state::{BOUND, State};

pub mod state;

/// One attempt of a client, which then tries again.
const ATTEMPT: Duration = Duration::from_secs(1);
/// Between two attempts at a controller: seldom enough that the set of a whole matrix can be listed at its end.
const PAUSE: Duration = Duration::from_millis(100);
/// Once writes go on they must go on: several elections.
const GOES_ON: Duration = Duration::from_secs(4);
/// Without a write in this time the state counts as dead, not as late.
const DEAD: Duration = Duration::from_secs(30);
/// How long a state without a connected majority is held.
const REFUSED: Duration = Duration::from_secs(4);
/// Leadership goes where it should within so many attempts.
const TRANSFERS: usize = 5;
/// Refusals that a controller without a quorum may give.
const NO_QUORUM: [&str; 2] = ["no-quorum", "unavailable"];

pub struct Plan {
    pub states: Vec<State>,
    pub controllers: usize,
    /// Which controllers lead in turn.
    pub leaders: Vec<usize>,
    pub seed: u64,
    pub folder: PathBuf,
}

impl Plan {
    /// All states with each controller as the leader; or, if short, some of them with one.
    pub fn new(controllers: usize, short: bool, seed: u64, folder: &Path) -> Self {
        let states = match (controllers, short) {
            (5, _) => state::of_five(),
            (_, true) => state::selection(),
            (_, false) => state::of_three(),
        };
        // The states of five say themselves where the leader is.
        let leaders = if short || controllers == 5 { 1 } else { controllers };
        Self { states, controllers, leaders: (0..leaders).collect(), seed, folder: folder.to_owned() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verified {
    /// There is a connected majority, and a write was done within the bound, and again and again.
    Live,
    /// As before, but beyond the bound.
    Late,
    /// There is a connected majority, and no write was done.
    Dead,
    /// There is no connected majority; nothing was promised.
    Open,
    /// The state could not be brought about.
    Void,
}

#[derive(Debug, Serialize)]
pub struct Row {
    pub state: String,
    pub leader: String,
    pub majority: bool,
    pub verified: Verified,
    /// From the beginning of the fault to the first write that began after it and was acknowledged.
    pub first_millis: Option<u64>,
    /// The longest time without an acknowledged write while the fault was there.
    pub gap_millis: u64,
    pub writes: usize,
    /// How far the term has grown, until all agreed again.
    pub terms: u64,
    pub dropped: u64,
    pub doubt: String,
    #[serde(skip)]
    window: (u64, u64),
}

#[derive(Debug, Serialize)]
pub struct Report {
    pub verdict: Verdict,
    pub seed: u64,
    pub bound_millis: u128,
    pub rows: Vec<Row>,
    pub findings: Vec<(String, String)>,
}

/// Acknowledged writes, when they were begun and ended.
type Writes = Arc<Mutex<Vec<(u64, u64)>>>;

/// # Errors
/// When the harness fails; that is no verdict.
pub async fn run(plan: &Plan) -> anyhow::Result<Report> {
    std::fs::create_dir_all(&plan.folder)?;
    let options =
        Options { controllers: plan.controllers, agents: 0, offer: None, isolated: true, snapshot_every: OFTEN };
    let mut cluster = Cluster::start(&plan.folder.join("cluster"), options).await?;
    cluster.create_tenant(TENANT).await?;
    let shared = Shared::new(Recorder::new(Some(&plan.folder.join("history.jsonl")))?);
    let mut chance = Chance::new(plan.seed);
    let writes = Writes::default();
    let writers = start_writers(&cluster, &shared, &writes, &mut chance)?;
    let mut rows = Vec::new();
    for state in &plan.states {
        for leader in &plan.leaders {
            let row = hold(&mut cluster, state, *leader, &shared, &writes, &mut chance).await?;
            row.tell();
            rows.push(row);
        }
    }
    shared.end();
    for writer in writers {
        writer.await.context("a client panicked")?;
    }
    set::Elements.finish(&Site { cluster: &cluster, shared: &shared }).await?;
    let agree = cluster.hashes_agree(SETTLE).await;
    cluster.stop().await?;

    let operations = history::operations(&shared.recorder.finish()?).map_err(anyhow::Error::msg)?;
    let mut findings =
        set::Elements.judge(&Evidence { operations: &operations, effects: &[], began_unix_millis: None });
    findings.push(("replicas: equal index, equal state", agree.map_or_else(Finding::Broken, |()| Finding::Holds)));
    findings.push(("without a quorum: refusals and timeouts only", refusals(&rows, &operations)));
    findings.push(("with a connected majority: writes go on", liveness(&rows)));
    let gaps: Vec<String> = rows.iter().filter(|r| r.verified == Verified::Void).map(|r| r.doubt.clone()).collect();
    let verdict = Verdict::of(&findings.iter().map(|(_, finding)| finding.clone()).collect::<Vec<_>>(), &gaps);
    let findings = findings.iter().map(|(name, finding)| ((*name).to_owned(), describe(finding))).collect();
    let report = Report { verdict, seed: plan.seed, bound_millis: BOUND.as_millis(), rows, findings };
    std::fs::write(plan.folder.join("liveness.json"), serde_json::to_vec_pretty(&report)?)?;
    Ok(report)
}

/// One at each controller, so that one that never answers holds nobody back: a client that may talk to all.
fn start_writers(
    cluster: &Cluster,
    shared: &Arc<Shared>,
    writes: &Writes,
    chance: &mut Chance,
) -> anyhow::Result<Vec<JoinHandle<()>>> {
    let start = |controller| {
        let (name, endpoint) = (cluster.name(controller), cluster.endpoint(controller));
        let client = Client::new(name, &endpoint, cluster.access(), TENANT, ATTEMPT)?;
        let mut worker = Worker::new(shared, vec![client], chance.split());
        let (shared, writes) = (shared.clone(), writes.clone());
        Ok(tokio::spawn(async move {
            for count in 0.. {
                if shared.is_over() {
                    break;
                }
                let began = shared.recorder.now();
                if set::add(&mut worker, count).await {
                    let mut writes = writes.lock().unwrap_or_else(PoisonError::into_inner);
                    writes.push((began, shared.recorder.now()));
                }
                tokio::time::sleep(PAUSE).await;
            }
        }))
    };
    (0..cluster.size()).map(start).collect()
}

/// Brings the state about, holds it, and heals it.
async fn hold(
    cluster: &mut Cluster,
    state: &State,
    leader: usize,
    shared: &Shared,
    writes: &Writes,
    chance: &mut Chance,
) -> anyhow::Result<Row> {
    let mut doubt = String::new();
    if !led_by(cluster, leader).await? {
        doubt = format!("{} did not lead", cluster.name(leader));
    }
    let order: Vec<usize> =
        std::iter::once(leader).chain((0..cluster.size()).filter(|controller| *controller != leader)).collect();
    let majority = state.majority(cluster.size()).is_some();
    let (term_before, dropped_before) = (term(cluster).await, cluster.dropped()?);
    for (from, to) in &state.cuts {
        cluster.cut(order[*from], order[*to])?;
    }
    let flapping =
        state.flapping.map(|(a, b)| links::flap(cluster, (order[a], order[b]), chance.split())).transpose()?;
    let from = shared.recorder.now();
    if majority {
        wait_for_writes(writes, from).await
    } else {
        tokio::time::sleep(REFUSED).await
    }
    let to = shared.recorder.now();
    let dropped = cluster.dropped()? - dropped_before;
    if let Some(flapping) = flapping {
        flapping.stop().await?;
    }
    cluster.heal_links()?;
    cluster.settled(SETTLE).await.with_context(|| format!("after '{}'", state.name))?;
    // Not before: a controller that is cut off from some asks those too, and answers late.
    let terms = term(cluster).await.saturating_sub(term_before);

    if dropped == 0 && !(state.cuts.is_empty() && state.flapping.is_none()) {
        doubt = "no packet met a cut".to_owned();
    }
    let writes = writes.lock().unwrap_or_else(PoisonError::into_inner);
    let mut row = Row {
        state: state.name.clone(),
        leader: cluster.name(leader).to_owned(),
        majority,
        verified: Verified::Void,
        first_millis: None,
        gap_millis: 0,
        writes: 0,
        terms,
        dropped,
        doubt,
        window: (from, to),
    };
    row.judge(&writes);
    Ok(row)
}

impl Row {
    fn judge(&mut self, writes: &[(u64, u64)]) {
        let (from, to) = self.window;
        let mut ends: Vec<u64> =
            writes.iter().filter(|(began, ended)| *began >= from && *ended <= to).map(|(_, ended)| *ended).collect();
        ends.sort_unstable();
        self.writes = ends.len();
        self.first_millis = ends.first().map(|first| (first - from) / 1_000_000);
        let before = std::iter::once(from).chain(ends.iter().copied());
        let after = ends.iter().copied().chain(std::iter::once(to));
        self.gap_millis = before.zip(after).map(|(a, b)| (b - a) / 1_000_000).max().unwrap_or(0);
        self.verified = match (self.doubt.is_empty(), self.majority) {
            (false, _) => Verified::Void,
            (true, false) => Verified::Open,
            (true, true) if self.writes == 0 => Verified::Dead,
            (true, true) if u128::from(self.gap_millis) > BOUND.as_millis() => Verified::Late,
            (true, true) => Verified::Live,
        };
    }

    fn tell(&self) {
        let first = self.first_millis.map_or("-".to_owned(), |millis| millis.to_string());
        println!(
            "{:<28} {:<14} {:<9} {:<5} first {first:>6} ms  gap {:>6} ms  {:>4} writes  {} terms  {} dropped  {}",
            self.state,
            self.leader,
            if self.majority { "majority" } else { "-" },
            format!("{:?}", self.verified).to_lowercase(),
            self.gap_millis,
            self.writes,
            self.terms,
            self.dropped,
            self.doubt
        );
    }
}

async fn wait_for_writes(writes: &Writes, from: u64) {
    let deadline = Instant::now() + DEAD;
    let done = || writes.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().any(|(began, _)| *began >= from);
    while !done() && Instant::now() < deadline {
        tokio::time::sleep(PAUSE).await;
    }
    if done() {
        tokio::time::sleep(GOES_ON).await;
    }
}

/// True when it leads, after some persuasion.
async fn led_by(cluster: &mut Cluster, leader: usize) -> anyhow::Result<bool> {
    for _ in 0..TRANSFERS {
        cluster.settled(SETTLE).await?;
        if cluster.leader().await == Some(leader) {
            return Ok(true);
        }
        // It may be refused, or be overtaken by an election; then the next attempt sees who leads.
        drop(cluster.transfer_leader(leader).await);
    }
    Ok(cluster.leader().await == Some(leader))
}

/// The highest that any controller knows.
async fn term(cluster: &Cluster) -> u64 {
    let asked = (0..cluster.size()).map(|controller| cluster.status(controller));
    futures::future::join_all(asked).await.into_iter().flatten().map(|reply| reply.term).max().unwrap_or(0)
}

/// What was refused while no majority was connected must have been refused for that.
fn refusals(rows: &[Row], operations: &[history::Operation]) -> Finding {
    for row in rows.iter().filter(|row| !row.majority) {
        let within = operations.iter().filter(|o| o.start >= row.window.0 && o.start < row.window.1);
        for refused in within.filter(|o| o.outcome == Kind::Fail) {
            if !NO_QUORUM.iter().any(|code| refused.error.starts_with(code)) {
                return Finding::Broken(format!("in '{}' {} said: {}", row.state, refused.node, refused.error));
            }
        }
    }
    Finding::Holds
}

fn liveness(rows: &[Row]) -> Finding {
    let failed = |row: &&Row| matches!(row.verified, Verified::Dead | Verified::Late);
    let Some(worst) = rows.iter().filter(failed).max_by_key(|row| row.gap_millis) else { return Finding::Holds };
    Finding::Broken(format!(
        "in {} of {} states writes stopped for longer than {} ms; worst: '{}' with {} leading, {} ms",
        rows.iter().filter(failed).count(),
        rows.len(),
        BOUND.as_millis(),
        worst.state,
        worst.leader,
        worst.gap_millis
    ))
}

impl Report {
    /// For a terminal.
    pub fn print(&self, folder: &Path) {
        println!();
        for (promise, finding) in &self.findings {
            println!("{promise:<46} {finding}");
        }
        let with = |wanted: Verified| self.rows.iter().filter(|row| row.verified == wanted).count();
        let worst = self.rows.iter().filter(|row| row.majority).map(|row| row.gap_millis).max().unwrap_or(0);
        println!(
            "\n{} states: {} live, {} late, {} dead, {} without a connected majority, {} void; longest gap {worst} ms, \
             bound {} ms; seed {}; {}",
            self.rows.len(),
            with(Verified::Live),
            with(Verified::Late),
            with(Verified::Dead),
            with(Verified::Open),
            with(Verified::Void),
            self.bound_millis,
            self.seed,
            folder.display()
        );
        println!("{}", self.verdict);
    }
}
