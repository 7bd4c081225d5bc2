//! Heartbeats, and nothing else, that are lost, doubled, out of order, late, or played again: [`crate::cluster::relay`] does it.
//!
//! Two things must hold. While enough of them arrive no host is given up. And what is old keeps nobody alive: a host whose
//! beats do not arrive is given up and its machines run elsewhere, whatever is played again at controllers and host; the
//! effect log shows whether it prolonged a lease.

use std::{
    fmt,
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{Proof, Scene, background::Background, hosts::busiest, processes};
use crate::{
    chance::Chance,
    cluster::{
        Cluster,
        relay::{Counts, Way},
    },
    effect::{self, Span},
    history::monotonic_nanos,
};

/// Of the beats to each controller one in so many comes: two come at most 3.5 s apart, and a lease is five.
const ONE_OF: usize = 4;
/// A second copy comes within this: while beats that were sent later come too.
const TWICE_WITHIN: Duration = Duration::from_secs(2);
/// Beats and answers overtake each other by this much at the most; there and back in less than a lease.
const SHUFFLED_WITHIN: Duration = Duration::from_millis(1500);
/// Answers that still come when their beat was sent so long ago. Less than a lease, so that it never ends by this alone; and
/// more than the margin by which a leader waits longer, so that a lease that was counted from here would be too long.
const ANSWERS_LATE: Duration = Duration::from_millis(3500);
/// Between two old beats, and two old answers, at each controller: some thirty times as often as the host itself beats.
const REPLAY_PAUSE: Duration = Duration::from_millis(15);
/// Enough for a host to be given up wrongly, after the time for which every fault is held.
const BEARS: Duration = Duration::from_secs(8);
/// As long as a cloud may take to agree after anything else.
const GIVEN_UP: Duration = Duration::from_secs(30);
/// A leader counts a host's silence from its own election, and needs a lease and a margin for it: one that has led for twice
/// as long had the time.
const LED_FOR: Duration = Duration::from_secs(11);
/// After it is given up: its machines are started elsewhere.
const ELSEWHERE: Duration = Duration::from_secs(10);
/// So long a host that comes back hears, and is heard beside, what is old.
const RETURN: Duration = Duration::from_secs(3);
/// A host that got no answer for as long may be given up.
const LEASE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(100);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Twist {
    /// Most beats of every host.
    Lost,
    /// All of every host, and all answers.
    Doubled,
    /// All of every host, and all answers.
    Reordered,
    /// A host hears that it may go on when it already knows nearly nothing any more; then it is cut off while such answers
    /// are still under way.
    LateAnswers,
    /// A host is cut off, and its beats of earlier come to every controller again and again, and earlier answers to it.
    Replayed,
    /// The same, and whoever leads then has never heard the host: the leader is killed and comes back as another process.
    ReplayedToNewLeader,
}

impl Twist {
    pub const ALL: [Self; 6] =
        [Self::LateAnswers, Self::Replayed, Self::Lost, Self::ReplayedToNewLeader, Self::Reordered, Self::Doubled];

    pub fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost beats",
            Self::Doubled => "doubled beats",
            Self::Reordered => "reordered beats",
            Self::LateAnswers => "late answers",
            Self::Replayed => "replayed beats",
            Self::ReplayedToNewLeader => "replayed to new leader",
        }
    }

    /// Whether every host still gets enough, so that none may be given up.
    fn bears(self) -> bool {
        matches!(self, Self::Lost | Self::Doubled | Self::Reordered)
    }
}

impl fmt::Display for Twist {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What is to be undone.
pub struct Held {
    twist: Twist,
    /// The host that is hurt, if not all are.
    agent: usize,
    /// What runs there; and since when it should run elsewhere.
    machines: Vec<String>,
    since: u64,
    before: Counts,
    replay: Option<Background>,
}

/// # Errors
/// When the harness itself fails.
pub fn begin(
    cluster: &mut Cluster,
    twist: Twist,
    scene: &Scene,
    proof: &mut Proof,
    chance: &mut Chance,
) -> anyhow::Result<Held> {
    let relay = cluster.relay()?;
    let (agent, before) = (busiest(cluster, chance)?, relay.counts());
    let mut held = Held { twist, agent, machines: Vec::new(), since: monotonic_nanos(), before, replay: None };
    proof.must_write = true;
    relay.forget_silence();
    match twist {
        Twist::Lost => treat_all(cluster, Way::OneOf(ONE_OF), Way::Open)?,
        Twist::Doubled => treat_all(cluster, Way::Twice(TWICE_WITHIN), Way::Twice(TWICE_WITHIN))?,
        Twist::Reordered => treat_all(cluster, Way::Shuffled(SHUFFLED_WITHIN), Way::Shuffled(SHUFFLED_WITHIN))?,
        Twist::LateAnswers => relay.treat(cluster.agent_ip(agent)?, Way::Open, Way::Late(ANSWERS_LATE)),
        Twist::Replayed | Twist::ReplayedToNewLeader => {
            held.cut_off(cluster, Way::Shut)?;
            held.replay = Some(replay(cluster, agent, chance.split())?);
        }
    }
    if twist == Twist::ReplayedToNewLeader {
        processes::kill_process(cluster, scene.leader, proof)?;
        cluster.restart(scene.leader)?;
        proof.targets.insert(scene.leader);
    }
    Ok(held)
}

impl Held {
    /// Names of the hosts.
    pub fn hit(&self, cluster: &Cluster) -> Vec<String> {
        let all = 0..cluster.agents();
        all.filter(|agent| self.twist.bears() || *agent == self.agent)
            .map(|a| cluster.agent_name(a).to_owned())
            .collect()
    }

    /// Waits until it has done what it is for, and undoes it.
    ///
    /// # Errors
    /// When the harness itself fails.
    pub async fn end(mut self, cluster: &mut Cluster, proof: &mut Proof) -> anyhow::Result<()> {
        if self.twist == Twist::LateAnswers {
            self.cut_off(cluster, Way::Late(ANSWERS_LATE))?;
        }
        if self.twist.bears() {
            self.all_stay(cluster, proof).await?
        } else {
            self.goes(cluster, proof).await?
        }
        treat_all(cluster, Way::Open, Way::Open)?;
        cluster.heal_links()?;
        if let Some(replay) = self.replay.take() {
            tokio::time::sleep(RETURN).await;
            replay.stop().await?;
        }
        let counts = cluster.relay()?.counts().since(self.before);
        let (done, what) = self.done(counts);
        proof.evidence = what + &proof.evidence;
        if done == 0 {
            proof.doubt("no heartbeat met it");
        }
        Ok(())
    }

    /// How often it happened, and in words.
    fn done(&self, counts: Counts) -> (u64, String) {
        let Counts { passed, lost, doubled, delayed, beats_replayed, answers_replayed } = counts;
        match self.twist {
            Twist::Lost => (lost, format!("{lost} lost, {passed} passed")),
            Twist::Doubled => (doubled, format!("{doubled} doubled")),
            Twist::Reordered | Twist::LateAnswers => (delayed, format!("{delayed} delayed")),
            Twist::Replayed | Twist::ReplayedToNewLeader => (
                beats_replayed.min(answers_replayed),
                format!("{beats_replayed} beats and {answers_replayed} answers replayed, {lost} lost"),
            ),
        }
    }

    /// The host's connections are cut, and its beats do not come.
    fn cut_off(&mut self, cluster: &Cluster, answers: Way) -> anyhow::Result<()> {
        cluster.relay()?.treat(cluster.agent_ip(self.agent)?, Way::Shut, answers);
        cluster.cut_streams(self.agent)?;
        self.since = monotonic_nanos();
        let spans = effect::spans(&effect::read(&cluster.effects(), 0)?);
        let here = |span: &&Span| span.to == u64::MAX && span.host == cluster.agent_name(self.agent);
        self.machines = spans.iter().filter(here).map(|span| span.vm.clone()).collect();
        Ok(())
    }

    /// No host is given up while its beats come often enough.
    async fn all_stay(&self, cluster: &Cluster, proof: &mut Proof) -> anyhow::Result<()> {
        let deadline = Instant::now() + BEARS;
        while Instant::now() < deadline {
            for agent in 0..cluster.agents() {
                if cluster.host_state(agent).await == "lost" {
                    let (name, silence) = (cluster.agent_name(agent), cluster.relay()?.longest_silence());
                    if silence < LEASE {
                        let longest = silence.as_millis();
                        proof.broken =
                            format!("{name} was given up, and each controller had answered it every {longest} ms");
                    } else {
                        proof.doubt(format!("{name} was given up after {} s without an answer", silence.as_secs()));
                    }
                    return Ok(());
                }
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    /// The host is given up, and what ran on it runs elsewhere.
    async fn goes(&self, cluster: &Cluster, proof: &mut Proof) -> anyhow::Result<()> {
        let name = cluster.agent_name(self.agent);
        let (deadline, mut led) = (Instant::now() + GIVEN_UP, Led::new());
        while cluster.host_state(self.agent).await != "lost" {
            led.look(cluster).await;
            if Instant::now() > deadline && led.since.elapsed() > LED_FOR {
                let within = GIVEN_UP.as_secs();
                proof.broken = format!("{name} was cut off, and not given up within {within} s of '{}'", self.twist);
                return Ok(());
            }
            if Instant::now() > deadline + GIVEN_UP {
                proof.doubt("no controller led for as long as it takes to give up a host");
                return Ok(());
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let lost = Duration::from_nanos(monotonic_nanos() - self.since);
        let deadline = Instant::now() + ELSEWHERE;
        let mut moved = 0;
        while moved == 0 && Instant::now() < deadline {
            tokio::time::sleep(LOOK_AGAIN).await;
            let spans = effect::spans(&effect::read(&cluster.effects(), 0)?);
            let elsewhere = |vm: &&String| {
                let begun = |span: &Span| span.from > self.since && span.host != name;
                spans.iter().any(|span| span.vm == **vm && begun(span))
            };
            moved = self.machines.iter().filter(elsewhere).count();
        }
        if moved == 0 {
            proof.doubt(format!("none of its {} machines ran elsewhere", self.machines.len()));
        }
        proof.evidence = format!(
            ", given up after {:.1} s, {moved} of {} at once elsewhere",
            lost.as_secs_f64(),
            self.machines.len()
        );
        Ok(())
    }
}

/// Since when one controller has led.
struct Led {
    now: Option<(u64, u64)>,
    since: Instant,
}

impl Led {
    fn new() -> Self {
        Self { now: None, since: Instant::now() }
    }

    async fn look(&mut self, cluster: &Cluster) {
        let said = futures::future::join_all((0..cluster.size()).map(|member| cluster.status(member))).await;
        let now = said.into_iter().flatten().map(|status| (status.term, status.leader)).max();
        if now != self.now || now.is_none_or(|(_, leader)| leader == 0) {
            *self = Self { now, since: Instant::now() };
        }
    }
}

fn treat_all(cluster: &Cluster, beats: Way, answers: Way) -> anyhow::Result<()> {
    let relay = cluster.relay()?;
    for agent in 0..cluster.agents() {
        relay.treat(cluster.agent_ip(agent)?, beats, answers);
    }
    Ok(())
}

fn replay(cluster: &Cluster, agent: usize, chance: Chance) -> anyhow::Result<Background> {
    let (relay, host) = (cluster.relay()?, cluster.agent_ip(agent)?);
    let mut chance = chance;
    Ok(Background::start(move || {
        let (relay, mut chance) = (relay.clone(), chance.split());
        async move {
            relay.replay(host, &mut chance).await;
            tokio::time::sleep(REPLAY_PAUSE).await;
            Ok(())
        }
    }))
}
