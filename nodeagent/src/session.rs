//! The agent's session with the leader: it finds the leader, says what the host is, hears what it should be, and
//! delivers reports.
//!
//! ```text
//!   for each controller: attach ──► refused: not the leader (it may name who is) ──► the next one
//!                          │
//!                          ├── Hello ──► Welcome{incarnation, where to beat, cluster epoch}
//!                          ├── Stock, when it is asked for
//!                          ├── reports ──► Reported
//!                          ◄── what is new of the assignment, whenever it changes
//!                          └── ended ──► start over, after a short pause
//! ```
//!
//! A lost session stops nothing on the host. Deliberately not here: what to do about an assignment.

use std::{
    fmt, future,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use api::{
    client::LEADER_KEY,
    proto::{Frame, node_session_client::NodeSessionClient},
    session::{FromAgent, MAX_ASSIGNMENT_FRAME_BYTES, NEWS_KEY, ToAgent, decode, encode},
    tls::{Identity, client_tls, connect_session},
};
use model::{Assignment, Held, Phase};
use tokio::{
    net::lookup_host,
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, metadata::MetadataValue};

use crate::{
    clock,
    hypervisor::{Guest, GuestPower, Hypervisor},
    membership::EpochMark,
    outbox::Outbox,
};

/// A controller has this long to accept a session: it commits an entry for it, which may have to wait for an election.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);
/// Between rounds over all controllers. An election takes about half a second; a failed round costs one refused call a
/// controller, so a short pause hurts nobody.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// After a session was lost a beat's answer tells within this who leads now. To ask each controller instead costs a handshake
/// each, and every host of the cloud asks at the same moment.
const NEWS: Duration = Duration::from_secs(1);
/// An answer of the last leader may come late. After this time the present one has answered another beat.
pub(crate) const SURE: Duration = Duration::from_millis(1500);
/// A session that ended sooner was no success: each costs the quorum a log entry, so they must not follow at once.
const SETTLED_MILLIS: u64 = 3_000;
/// An alert that is still true is repeated this often.
const ALERT_AGAIN_MILLIS: u64 = 60_000;
/// Frames under way to the controller: more would only make an answer later.
const FRAMES_UNDER_WAY: usize = 4;
/// A frame's own length field and tag.
const FRAME_OVERHEAD_BYTES: usize = 16;

/// Where what is heard goes. The newest value counts; nobody has to see them all.
#[derive(Clone)]
pub struct Heard {
    pub assignment: watch::Sender<Option<Arc<Assignment>>>,
    /// 0 before the first session.
    pub incarnation: watch::Sender<u64>,
    pub beat_targets: watch::Sender<Vec<String>>,
}

/// What the host says of itself when a session begins.
#[derive(Clone)]
pub struct Introduction {
    pub address: String,
    pub underlay: IpAddr,
    pub hypervisor: Arc<dyn Hypervisor>,
}

pub struct Session {
    pub identity: Identity,
    /// Controllers to try besides those that the quorum has named since.
    pub controllers: Vec<String>,
    pub introduction: Introduction,
    pub epoch: EpochMark,
    pub outbox: Arc<Outbox>,
    pub heard: Heard,
    /// The controller that said last that it leads, in its answer to a heartbeat.
    pub leader: watch::Receiver<Option<SocketAddr>>,
}

/// Why a session is over, or never began.
#[derive(Debug)]
enum End {
    /// Not the leader; who is, if it knows.
    Refused {
        leader: Option<String>,
        why: String,
    },
    Unreachable(String),
    /// It was welcomed before.
    Lost(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Refused { why, .. } | Self::Unreachable(why) | Self::Lost(why)) = self;
        f.write_str(why)
    }
}

impl Session {
    /// Keeps a session with the leader for as long as it is polled.
    pub async fn keep(mut self) {
        let mut pause = FIRST_PAUSE;
        let (mut lost_at, mut alert_at) = (clock::boottime_millis(), 0);
        loop {
            let begun = clock::boottime_millis();
            let led = self.round().await;
            let now = clock::boottime_millis();
            if led {
                (lost_at, alert_at) = (now, 0);
                self.leader.mark_unchanged();
                // Without news of who leads every controller is asked.
                let _ = timeout(NEWS, self.leader.changed()).await;
            }
            if led && now - begun >= SETTLED_MILLIS {
                pause = FIRST_PAUSE;
            } else if !led && pause == LONGEST_PAUSE && now >= alert_at {
                alert_at = now + ALERT_AGAIN_MILLIS;
                let seconds = (now - lost_at) / 1000;
                tracing::error!(seconds, "no controller accepts a session; guests run on, and nothing can be changed");
            }
            // The clock's low digits are as good as chance here: they only keep hosts from coming in step.
            let jitter = Duration::from_nanos(clock::boottime_nanos() % (pause.as_nanos() as u64 / 2));
            sleep(pause / 2 + jitter).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Tries each controller once, who is known to lead first; true when one of them was the leader.
    async fn round(&self) -> bool {
        let Some(hello) = self.hello().await else { return false };
        let mut candidates: Vec<String> = self.heard.beat_targets.borrow().clone();
        candidates.extend(self.controllers.iter().cloned());
        let mut tried: Vec<String> = Vec::new();
        let mut hint = self.leader.borrow().map(|leader| leader.to_string());
        while let Some(endpoint) = hint.take().or_else(|| candidates.pop()) {
            if tried.contains(&endpoint) {
                continue;
            }
            tried.push(endpoint.clone());
            match self.attach(&endpoint, &hello).await {
                End::Lost(why) => {
                    tracing::warn!(controller = endpoint, why, "the session with the leader was lost");
                    return true;
                }
                End::Refused { leader, why } => {
                    tracing::debug!(controller = endpoint, why, ?leader, "a controller refused the session");
                    hint = leader;
                }
                end @ End::Unreachable(_) => {
                    tracing::debug!(controller = endpoint, why = %end, "a controller cannot be reached");
                }
            }
        }
        false
    }

    /// One session from its beginning to its end.
    async fn attach(&self, endpoint: &str, hello: &FromAgent) -> End {
        let channel = match connect_session(endpoint, client_tls(&self.identity)) {
            Ok(channel) => channel,
            Err(error) => return End::Unreachable(error.to_string()),
        };
        let most_bytes = MAX_ASSIGNMENT_FRAME_BYTES + FRAME_OVERHEAD_BYTES;
        let mut client = NodeSessionClient::new(channel).max_decoding_message_size(most_bytes);
        let (tell, told) = mpsc::channel(FRAMES_UNDER_WAY);
        if tell.send(frame(hello)).await.is_err() {
            return End::Unreachable("the stream closed at once".into());
        }
        let mut call = Request::new(ReceiverStream::new(told));
        call.metadata_mut().insert(NEWS_KEY, MetadataValue::from_static("1"));
        let mut answers = match timeout(ATTACH_TIMEOUT, client.attach(call)).await {
            Err(_) => return End::Unreachable("no answer in time".into()),
            Ok(Err(status)) => return refused(&status),
            Ok(Ok(response)) => response.into_inner(),
        };
        let welcome = match timeout(ATTACH_TIMEOUT, next(&mut answers)).await {
            Err(_) => return End::Unreachable("no welcome in time".into()),
            Ok(Err(end)) => return end,
            Ok(Ok(welcome)) => welcome,
        };
        let ToAgent::Welcome { incarnation, epoch, take_stock, .. } = &welcome else {
            return End::Unreachable("it did not begin with a welcome".into());
        };
        if let Err(why) = self.epoch.admit(*epoch) {
            tracing::error!(controller = endpoint, why, "alert: a controller is not obeyed");
            return End::Refused { leader: None, why };
        }
        if *take_stock {
            let Some(stock) = self.stock().await else { return End::Unreachable("the guests cannot be told".into()) };
            if tell.send(frame(&stock)).await.is_err() {
                return End::Unreachable("the stream closed at once".into());
            }
        }
        tracing::info!(controller = endpoint, incarnation, "in session with the leader");
        self.hear(welcome, &mut None);
        self.outbox.reopen();
        tokio::select! {
            end = self.talk(&tell, &mut answers) => end,
            () = self.led_elsewhere(endpoint) => End::Lost("another controller leads, as it answers heartbeats".into()),
        }
    }

    /// Returns when another controller than this one has said so and goes on to.
    async fn led_elsewhere(&self, endpoint: &str) {
        let here = addresses(endpoint).await;
        let mut named = false;
        let targets = self.heard.beat_targets.borrow().clone();
        for target in targets {
            named |= addresses(&target).await.iter().any(|address| here.contains(address));
        }
        if !named {
            // Reached by an address that no heartbeat goes to: its answers come from another one.
            return future::pending().await;
        }
        let elsewhere = |leader: &Option<SocketAddr>| leader.is_some_and(|leader| !here.contains(&leader));
        let mut leader = self.leader.clone();
        loop {
            if leader.wait_for(elsewhere).await.is_err() {
                return future::pending().await;
            }
            sleep(SURE).await;
            if elsewhere(&leader.borrow()) {
                return;
            }
        }
    }

    async fn talk(&self, tell: &mpsc::Sender<Frame>, answers: &mut Streaming<Frame>) -> End {
        let mut assigned = None;
        loop {
            let deliver = async {
                let room = tell.reserve().await.ok()?;
                room.send(frame(&self.outbox.next().await));
                Some(())
            };
            tokio::select! {
                heard = next(answers) => match heard {
                    Ok(message) => self.hear(message, &mut assigned),
                    Err(End::Refused { why, .. } | End::Unreachable(why) | End::Lost(why)) => return End::Lost(why),
                },
                delivered = deliver => if delivered.is_none() {
                    return End::Lost("the stream was closed".into());
                },
            }
        }
    }

    /// `assigned`: what the news of this session stand on.
    fn hear(&self, message: ToAgent, assigned: &mut Option<Arc<Assignment>>) {
        match message {
            ToAgent::Welcome { incarnation, beat_targets, .. } => {
                self.heard.beat_targets.send_replace(beat_targets);
                self.heard.incarnation.send_replace(incarnation);
            }
            ToAgent::BeatTargets(targets) => drop(self.heard.beat_targets.send_replace(targets)),
            ToAgent::Assignment(whole) => self.assign(assigned, *whole),
            ToAgent::Reported { number } => self.outbox.reported(number),
            ToAgent::News(news) => self.assign(assigned, news.onto(assigned.as_deref())),
        }
    }

    fn assign(&self, assigned: &mut Option<Arc<Assignment>>, whole: Assignment) {
        *assigned = Some(whole.into());
        self.heard.assignment.send_replace(assigned.clone());
    }

    /// What this host holds, for a quorum that may know less.
    async fn stock(&self) -> Option<FromAgent> {
        let hypervisor = self.introduction.hypervisor.clone();
        let looked = tokio::task::spawn_blocking(move || hypervisor.guests()).await.ok()?;
        let guests =
            looked.inspect_err(|error| tracing::warn!(%error, "the guests of this host cannot be told")).ok()?;
        let phase = |power| {
            Some(match power {
                GuestPower::Running => Phase::Running,
                GuestPower::Suspended => Phase::Suspended,
                GuestPower::Off(_) => Phase::Stopped,
                // Not handed over to this host, as far as it knows: where it comes from, it is held.
                GuestPower::Arriving | GuestPower::Arrived => return None,
            })
        };
        let held = |guest: Guest| Some((guest.vm, Held { epoch: guest.epoch, phase: phase(guest.power)? }));
        Some(FromAgent::Stock(guests.into_iter().filter_map(held).collect()))
    }

    async fn hello(&self) -> Option<FromAgent> {
        let Introduction { address, underlay, hypervisor } = self.introduction.clone();
        let look = move || {
            let capacity =
                hypervisor.capacity().inspect_err(|error| tracing::warn!(%error, "the host's capacity cannot be told"));
            capacity.map(|capacity| (hypervisor.kind(), capacity))
        };
        let (hypervisor, capacity) = tokio::task::spawn_blocking(look).await.ok()?.ok()?;
        Some(FromAgent::Hello { version: env!("CARGO_PKG_VERSION").into(), address, underlay, hypervisor, capacity })
    }
}

async fn addresses(endpoint: &str) -> Vec<SocketAddr> {
    lookup_host(endpoint).await.map(Vec::from_iter).unwrap_or_default()
}

fn frame(message: &FromAgent) -> Frame {
    Frame { body: encode(message).into() }
}

async fn next(answers: &mut Streaming<Frame>) -> Result<ToAgent, End> {
    match answers.message().await {
        Ok(Some(frame)) => {
            decode(&frame.body).map_err(|error| End::Unreachable(format!("it sent what is no message: {error}")))
        }
        Ok(None) => Err(End::Unreachable("the controller closed the session".into())),
        Err(status) => Err(refused(&status)),
    }
}

fn refused(status: &Status) -> End {
    let leader = status.metadata().get(LEADER_KEY).and_then(|leader| leader.to_str().ok()).map(str::to_owned);
    End::Refused { leader, why: api::error::ApiError::from(status.clone()).to_string() }
}
