//! Hosts with nothing behind them: each has joined, keeps a session with the leader and sends heartbeats. From [`Fleet::obey`] on
//! each says of every machine that it is given that it is as it should be.
//!
//! What the controllers do for them is real. Many hosts fit in one process because they start nothing, so the
//! cell tells what hosts cost the quorum, and nothing about agents.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::Context;
use futures::{StreamExt, TryStreamExt, stream};
use jepsen::cluster::{Cluster, PATIENCE};
use model::Capacity;
use serde::Serialize;
use tokio::{sync::watch, task::JoinSet};

use self::{beats::Ear, host::Host};
use super::until;

mod beats;
mod host;

/// Of each host, to each controller and second, as an agent does; but of all together no more than a thousand hosts send twice
/// over: what ten thousand cost is measured by itself.
const CALM: u64 = 2;
const CALM_TOGETHER: u64 = 4_000;
/// Hosts that join at the same time.
const AT_ONCE: usize = 32;
/// How often all hosts are looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// One controller under one rate of beats.
#[derive(Debug, Serialize)]
pub struct Listening {
    /// `leader` or `follower`.
    pub role: &'static str,
    pub asked_per_second: u64,
    pub answered_per_second: f64,
    /// Of one core, all that the controller did meanwhile.
    pub core: f64,
}

pub struct Fleet {
    hosts: Arc<Vec<Arc<Host>>>,
    ears: Vec<Arc<Ear>>,
    threads: Vec<JoinHandle<std::io::Result<()>>>,
    obey: watch::Sender<bool>,
    /// Who said last that it leads.
    leader: Arc<AtomicUsize>,
    /// Ends with the fleet.
    _sessions: JoinSet<()>,
}

impl Fleet {
    /// Hosts of this capacity, in session with the leader and silent.
    ///
    /// # Errors
    /// When one is not let in.
    pub async fn attach(cluster: &Cluster, hosts: usize, capacity: Capacity) -> anyhow::Result<Self> {
        let operator = cluster.client()?;
        let joining = stream::iter(0..hosts).map(|number| Host::join(&operator, number, capacity));
        let mut hosts: Vec<Arc<Host>> = joining.buffer_unordered(AT_ONCE).try_collect().await?;
        hosts.sort_by_key(|host| host.node);
        let (obey, obeyed) = watch::channel(false);
        let leader = Arc::new(AtomicUsize::new(cluster.leader().await.context("nobody leads")?));
        let controllers: Arc<Vec<String>> = Arc::new((0..cluster.size()).map(|c| cluster.address(c).into()).collect());
        let mut sessions = JoinSet::new();
        for host in &hosts {
            sessions.spawn(host.clone().keep_session(controllers.clone(), leader.clone(), obeyed.clone()));
        }
        let fleet =
            Self { hosts: Arc::new(hosts), ears: Vec::new(), threads: Vec::new(), obey, leader, _sessions: sessions };
        fleet.in_session(PATIENCE + Duration::from_millis(10) * fleet.hosts.len() as u32).await?;
        Ok(fleet)
    }

    /// Waits until every host is in session.
    ///
    /// # Errors
    /// When they are not within the patience.
    pub async fn in_session(&self, patience: Duration) -> anyhow::Result<()> {
        let all = || self.hosts.iter().all(|host| host.is_in_session());
        until("every host is in session", patience, LOOK_AGAIN, async || all()).await
    }

    /// Waits until no host is in the session any more in which it was.
    ///
    /// # Errors
    /// When they are not within the patience.
    pub async fn in_new_session(&self, patience: Duration, since: &[u64]) -> anyhow::Result<()> {
        let moved = || self.incarnations().iter().zip(since).all(|(now, before)| now > before);
        until("every host is in a new session", patience, LOOK_AGAIN, async || moved()).await?;
        self.in_session(patience).await
    }

    /// Of each host's last session.
    pub fn incarnations(&self) -> Vec<u64> {
        self.hosts.iter().map(|host| host.incarnation.load(Relaxed)).collect()
    }

    /// From now on each machine on these hosts is what it should be, and the quorum is told.
    pub fn obey(&self) {
        self.obey.send_replace(true);
    }

    /// Reports about machines that the quorum has acknowledged.
    pub fn reported(&self) -> usize {
        self.hosts.iter().map(|host| host.reported.load(Relaxed)).sum()
    }

    /// From now on each host beats at every controller.
    ///
    /// # Errors
    /// When a socket cannot be had.
    pub fn beat(&mut self, cluster: &Cluster) -> anyhow::Result<()> {
        for controller in 0..cluster.size() {
            let (target, hosts) = (cluster.address(controller).parse()?, self.hosts.clone());
            let (ear, leader) = (Arc::new(Ear { controller, ..Ear::default() }), self.leader.clone());
            ear.per_second.store((CALM * hosts.len() as u64).min(CALM_TOGETHER), Relaxed);
            self.ears.push(ear.clone());
            self.threads.push(std::thread::spawn(move || beats::beat_at(target, &hosts, &ear, &leader)));
        }
        Ok(())
    }

    /// How much of a core a controller takes while one of them hears so many beats a second, and the others as many as ever.
    ///
    /// # Errors
    /// When nobody leads, or most beats stay unanswered.
    pub async fn measure(&self, cluster: &Cluster, per_second: u64, time: Duration) -> anyhow::Result<[Listening; 2]> {
        let leader = cluster.leader().await.context("nobody leads")?;
        let follower = (leader + 1) % cluster.size();
        Ok([
            self.listening(cluster, leader, "leader", per_second, time).await?,
            self.listening(cluster, follower, "follower", per_second, time).await?,
        ])
    }

    async fn listening(
        &self,
        cluster: &Cluster,
        controller: usize,
        role: &'static str,
        per_second: u64,
        time: Duration,
    ) -> anyhow::Result<Listening> {
        let ear = &self.ears[controller];
        let calm = ear.per_second.swap(per_second, Relaxed);
        let (answered, cpu, began) = (ear.answered.load(Relaxed), cluster.cpu_time_of(controller), Instant::now());
        tokio::time::sleep(time).await;
        let seconds = began.elapsed().as_secs_f64();
        let answered = (ear.answered.load(Relaxed) - answered) as f64 / seconds;
        let used = cluster.cpu_time_of(controller).saturating_sub(cpu).as_secs_f64();
        ear.per_second.store(calm, Relaxed);
        anyhow::ensure!(
            answered * 2.0 > per_second as f64,
            "of {per_second} beats a second {answered:.0} were answered"
        );
        Ok(Listening { role, asked_per_second: per_second, answered_per_second: answered, core: used / seconds })
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.ears.iter().for_each(|ear| ear.stop.store(true, Relaxed));
        for thread in self.threads.drain(..) {
            // What it had to say was said when it mattered: no beat was answered.
            let _ = thread.join();
        }
    }
}
