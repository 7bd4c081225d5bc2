//! Heartbeats: a small datagram to every controller each half second, the host's status in it every few seconds, and
//! more often while a machine is being created.
//!
//! Every controller is told, so that a new leader is warm. Controllers answer with a nonce that only the next beat
//! can repeat. Deliberately not here: what follows from silence; the quorum decides that.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use api::beat::{Beat, BeatKey, MAX_DATAGRAM_BYTES, StatusPart, decode_ack, encode, split_status};
use model::NodeId;
use tokio::{
    net::{UdpSocket, lookup_host},
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{clock, view::View};

const PERIOD: Duration = Duration::from_millis(500);
const STATUS_PERIOD_MILLIS: u64 = 5_000;
/// Addresses are usually numbers; a name server that hangs must not hold the beats.
const LOOKUP_TIMEOUT: Duration = Duration::from_millis(300);
/// Silence of all controllers that is worth an alert: ten beats.
const ALERT_MILLIS: u64 = 5_000;
/// Quorums have at most seven members; more targets than this are a mistake, and would be a flood.
const MOST_TARGETS: usize = 16;

pub struct Beats {
    pub node: NodeId,
    pub key: BeatKey,
    pub view: Arc<View>,
    pub incarnation: watch::Receiver<u64>,
    pub targets: watch::Receiver<Vec<String>>,
}

struct Target {
    address: SocketAddr,
    nonce: u64,
    /// The highest beat that it answered: an older answer is late or replayed.
    answered: u64,
    /// When the last such answer came, or when it was first beaten to.
    answered_at: u64,
}

struct Sockets {
    v4: UdpSocket,
    /// Hosts without IPv6 have none.
    v6: Option<UdpSocket>,
}

impl Beats {
    /// Beats for as long as it is polled.
    ///
    /// # Errors
    /// When no socket can be had.
    pub async fn run(mut self) -> io::Result<()> {
        let sockets = Sockets::open().await?;
        let mut targets = Vec::new();
        let mut tick = interval(PERIOD);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let (mut seq, mut status_at, mut names) = (0, 0, Vec::new());
        let mut contact = Contact { heard_at: clock::boottime_millis(), lost: false };
        let mut buffer = [0; MAX_DATAGRAM_BYTES + 1];
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    // Cloned so that no lock is held while names are looked up.
                    let wanted = self.targets.borrow_and_update().clone();
                    if wanted != names || targets.len() < names.len() {
                        targets = resolve(&wanted, targets).await;
                        names = wanted;
                    }
                    contact.check(!targets.is_empty());
                    let parts = self.parts(&mut status_at);
                    for part in parts {
                        seq += 1;
                        self.send(&sockets, &targets, seq, &part).await;
                    }
                }
                (length, from) = sockets.receive(&mut buffer) => {
                    if self.hear(&buffer[..length], from, seq, &mut targets) {
                        contact.heard();
                    }
                }
            }
        }
    }

    /// What goes into this tick's datagrams, one each.
    fn parts(&self, status_at: &mut u64) -> Vec<Option<StatusPart>> {
        let now = clock::boottime_millis();
        let due = now.saturating_sub(*status_at) >= STATUS_PERIOD_MILLIS;
        match self.view.status() {
            Some(status) if due || status.creating => {
                *status_at = now;
                split_status(&status.node, &status.vms).into_iter().map(Some).collect()
            }
            _ => vec![None],
        }
    }

    async fn send(&self, sockets: &Sockets, targets: &[Target], seq: u64, status: &Option<StatusPart>) {
        for target in targets {
            let beat = Beat {
                node: self.node,
                incarnation: *self.incarnation.borrow(),
                seq,
                boottime_nanos: clock::boottime_nanos(),
                nonce: target.nonce,
                unanswered_millis: clock::boottime_millis().saturating_sub(target.answered_at),
                status: status.clone(),
            };
            let sent = match encode(&beat, &self.key) {
                Ok(datagram) => sockets.send(&datagram, target.address).await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = sent {
                tracing::debug!(controller = %target.address, error, "a heartbeat was not sent");
            }
        }
    }

    /// True when it is an answer to a beat of this process.
    fn hear(&self, datagram: &[u8], from: SocketAddr, last_seq: u64, targets: &mut [Target]) -> bool {
        let Ok(ack) = decode_ack(datagram, &self.key) else { return false };
        let Some(target) = targets.iter_mut().find(|target| same_host(target.address, from)) else { return false };
        let answers = ack.node == self.node && (target.answered + 1..=last_seq).contains(&ack.seq);
        if answers {
            (target.nonce, target.answered, target.answered_at) = (ack.nonce, ack.seq, clock::boottime_millis());
        }
        answers
    }
}

struct Contact {
    heard_at: u64,
    lost: bool,
}

impl Contact {
    fn heard(&mut self) {
        self.heard_at = clock::boottime_millis();
        if std::mem::take(&mut self.lost) {
            tracing::info!("a controller answers heartbeats again");
        }
    }

    fn check(&mut self, has_targets: bool) {
        let silent = clock::boottime_millis().saturating_sub(self.heard_at) >= ALERT_MILLIS;
        if has_targets && silent && !std::mem::replace(&mut self.lost, true) {
            tracing::warn!("no controller answers heartbeats");
        }
    }
}

impl Sockets {
    async fn open() -> io::Result<Self> {
        let v4 = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
        Ok(Self { v4, v6: UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).await.ok() })
    }

    async fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<usize> {
        match (&self.v6, to.is_ipv6()) {
            (Some(v6), true) => v6.send_to(datagram, to).await,
            (None, true) => Err(io::ErrorKind::AddrNotAvailable.into()),
            (_, false) => self.v4.send_to(datagram, to).await,
        }
    }

    /// The next datagram from anybody. An error of one earlier send (nobody listens there) is no reason to stop.
    async fn receive(&self, buffer: &mut [u8]) -> (usize, SocketAddr) {
        loop {
            let v6_readable = async {
                match &self.v6 {
                    Some(v6) => v6.readable().await,
                    None => std::future::pending().await,
                }
            };
            let socket = tokio::select! {
                _ = self.v4.readable() => &self.v4,
                _ = v6_readable => self.v6.as_ref().unwrap_or(&self.v4),
            };
            if let Ok(received) = socket.try_recv_from(buffer) {
                return received;
            }
        }
    }
}

/// Addresses for names; what is known of a controller that stays is kept.
async fn resolve(names: &[String], known: Vec<Target>) -> Vec<Target> {
    let mut targets: Vec<Target> = Vec::new();
    for name in names.iter().filter(|name| !name.starts_with("unix:")).take(MOST_TARGETS) {
        let address = match name.parse() {
            Ok(address) => Some(address),
            Err(_) => match timeout(LOOKUP_TIMEOUT, lookup_host(name.as_str())).await {
                Ok(Ok(mut found)) => found.next(),
                _ => None,
            },
        };
        let Some(address) = address else {
            tracing::debug!(controller = name, "the controller's name is not known just now");
            continue;
        };
        if targets.iter().all(|target| target.address != address) {
            let old = known.iter().find(|target| target.address == address);
            let fresh = || (0, 0, clock::boottime_millis());
            let (nonce, answered, answered_at) =
                old.map_or_else(fresh, |old| (old.nonce, old.answered, old.answered_at));
            targets.push(Target { address, nonce, answered, answered_at });
        }
    }
    targets
}

fn same_host(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.ip().to_canonical() == b.ip().to_canonical()
}
