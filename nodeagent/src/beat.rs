//! Heartbeats: a small datagram to every controller each half second, the host's status in it every few seconds, and
//! more often while a machine is being created.
//!
//! Every controller is told, so that a new leader is warm. Controllers answer with a nonce that only the next beat
//! can repeat; a leader's answer may carry a grant, by which the host's lease is counted from the *send* of that beat.
//! Deliberately not here: what follows from silence; the quorum decides that.

use std::{
    collections::VecDeque,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use api::beat::{Ack, Beat, BeatKey, MAX_DATAGRAM_BYTES, StatusPart, decode_ack, encode, split_status};
use model::{
    NodeId,
    lease::{BEAT_NANOS, LEASE_NANOS},
};
use tokio::{
    net::{UdpSocket, lookup_host},
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{clock, lease::Leases, view::View};

const PERIOD: Duration = Duration::from_nanos(BEAT_NANOS);
const NANOS_PER_MILLI: u64 = 1_000_000;
const STATUS_PERIOD_MILLIS: u64 = 5_000;
/// Addresses are usually numbers; a name server that hangs must not hold the beats.
const LOOKUP_TIMEOUT: Duration = Duration::from_millis(300);
/// Silence of all controllers that is worth an alert: ten beats.
const ALERT_MILLIS: u64 = 5_000;
/// Quorums have at most seven members; more targets than this are a mistake, and would be a flood.
const MOST_TARGETS: usize = 16;
/// Beats whose answer could still be worth something. A lease is ten ticks; each sends a datagram for every dozen
/// machines or so, and a host that sends more than fits gets its grant by the last ones.
const MOST_SENT: usize = 1024;

pub struct Beats {
    pub node: NodeId,
    pub key: BeatKey,
    pub view: Arc<View>,
    pub leases: Arc<Leases>,
    pub incarnation: watch::Receiver<u64>,
    pub targets: watch::Receiver<Vec<String>>,
    /// Told with each answer of a controller that leads.
    pub leader: watch::Sender<Option<SocketAddr>>,
}

struct Target {
    /// As the quorum has it.
    name: String,
    /// What the name stood for when it was last known.
    address: SocketAddr,
    nonce: u64,
    /// The highest beat that it answered: an older answer is late or replayed.
    answered: u64,
    /// When the last beat that it answered within a lease's time was sent, or when it was first beaten to. Not when the
    /// answer came: one that comes too late for a lease must not look like one that came. Nanoseconds, as in `sent`.
    answered_at: u64,
    sent: VecDeque<Sent>,
}

/// A beat as this process sent it to one controller: an answer is believed by this, not by what it repeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sent {
    seq: u64,
    at: u64,
    incarnation: u64,
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
        let mut incarnation = self.incarnation.clone();
        loop {
            tokio::select! {
                // A lease of the new incarnation begins with the first beat that carries it.
                Ok(()) = incarnation.changed() => tick.reset_immediately(),
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
                        self.send(&sockets, &mut targets, seq, &part).await;
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

    async fn send(&self, sockets: &Sockets, targets: &mut [Target], seq: u64, status: &Option<StatusPart>) {
        for target in targets {
            let sent = Sent { seq, at: clock::boottime_nanos(), incarnation: *self.incarnation.borrow() };
            target.note(sent);
            let beat = Beat {
                node: self.node,
                incarnation: sent.incarnation,
                seq,
                boottime_nanos: sent.at,
                nonce: target.nonce,
                unanswered_millis: sent.at.saturating_sub(target.answered_at) / NANOS_PER_MILLI,
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
        if ack.node != self.node {
            return false;
        }
        if let Some((incarnation, until)) = target.granted(&ack, *self.incarnation.borrow()) {
            self.leases.granted(incarnation, until);
        }
        let answers = (target.answered + 1..=last_seq).contains(&ack.seq);
        if answers {
            target.answer(&ack);
            if ack.leader {
                self.leader.send_replace(Some(target.address));
            }
        }
        answers
    }
}

impl Target {
    fn new(name: &str, address: SocketAddr) -> Self {
        let answered_at = clock::boottime_nanos();
        Self { name: name.into(), address, nonce: 0, answered: 0, answered_at, sent: VecDeque::new() }
    }

    fn note(&mut self, sent: Sent) {
        while self.sent.len() >= MOST_SENT
            || self.sent.front().is_some_and(|old| sent.at.saturating_sub(old.at) > LEASE_NANOS)
        {
            self.sent.pop_front();
        }
        self.sent.push_back(sent);
    }

    fn answer(&mut self, ack: &Ack) {
        (self.nonce, self.answered) = (ack.nonce, ack.seq);
        if let Some(sent) = self.sent.iter().find(|sent| sent.seq == ack.seq) {
            self.answered_at = sent.at;
        }
    }

    /// The incarnation and the end of the lease that an answer grants: it must repeat exactly a beat that this process
    /// sent to that controller, in the incarnation that the host still has.
    fn granted(&self, ack: &Ack, current: u64) -> Option<(u64, u64)> {
        let grant = ack.grant?;
        let sent = self.sent.iter().find(|sent| (sent.seq, sent.at) == (ack.seq, ack.boottime_nanos))?;
        (sent.incarnation == current).then(|| (current, grant.until(sent.at)))
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

/// Addresses for names; what is known of a controller that stays is kept. So is its address when the name is not known just
/// now: a name server that is down must not end the lease.
async fn resolve(names: &[String], mut known: Vec<Target>) -> Vec<Target> {
    let mut targets: Vec<Target> = Vec::new();
    for name in names.iter().filter(|name| !name.starts_with("unix:")).take(MOST_TARGETS) {
        let address = match name.parse() {
            Ok(address) => Some(address),
            Err(_) => match timeout(LOOKUP_TIMEOUT, lookup_host(name.as_str())).await {
                Ok(Ok(mut found)) => found.next(),
                _ => None,
            },
        };
        let last_known = || known.iter().find(|target| target.name == *name).map(|target| target.address);
        let Some(address) = address.or_else(last_known) else {
            tracing::debug!(controller = name, "the controller's name is not known just now");
            continue;
        };
        if targets.iter().all(|target| target.address != address) {
            let old = known.iter().position(|target| target.address == address);
            let target = old.map_or_else(|| Target::new(name, address), |old| known.swap_remove(old));
            targets.push(Target { name: name.clone(), ..target });
        }
    }
    targets
}

fn same_host(a: SocketAddr, b: SocketAddr) -> bool {
    a.port() == b.port() && a.ip().to_canonical() == b.ip().to_canonical()
}

#[cfg(test)]
mod tests {
    use model::lease::Grant;

    use super::*;

    #[test]
    fn an_answer_grants_by_what_was_sent_and_not_by_what_it_says() {
        let mut target = Target::new("c1:7470", SocketAddr::from(([127, 0, 0, 1], 7470)));
        target.note(Sent { seq: 1, at: 1000, incarnation: 4 });
        target.note(Sent { seq: 2, at: 2000, incarnation: 5 });
        let grant = Some(Grant { age_nanos: 7 });
        let ack = |seq, boottime_nanos| Ack { node: NodeId(1), seq, nonce: 9, boottime_nanos, leader: true, grant };
        assert_eq!(target.granted(&ack(2, 2000), 5), Some((5, 2000 + LEASE_NANOS - 7)), "from the send, less the age");
        assert_eq!(target.granted(&ack(1, 1000), 5), None, "of an incarnation that the host no longer has");
        assert_eq!(target.granted(&ack(2, 9000), 5), None, "a time that was never sent");
        assert_eq!(target.granted(&ack(3, 2000), 5), None, "a beat that was never sent");
        assert_eq!(target.granted(&Ack { grant: None, ..ack(2, 2000) }, 5), None, "no grant");
        target.note(Sent { seq: 3, at: 2001 + LEASE_NANOS, incarnation: 5 });
        assert_eq!(target.sent.len(), 1, "answers to older ones would grant nothing any more");
    }

    #[test]
    fn a_controller_whose_answers_come_too_late_for_a_lease_does_not_answer() {
        let mut target = Target::new("c1:7470", SocketAddr::from(([127, 0, 0, 1], 7470)));
        let second = 1_000_000_000;
        let ack = |seq, nonce| Ack { node: NodeId(1), seq, nonce, boottime_nanos: 0, leader: true, grant: None };
        for seq in 1..=7 {
            target.note(Sent { seq, at: seq * second, incarnation: 1 });
        }
        target.answer(&ack(6, 9));
        assert_eq!((target.answered_at, target.nonce), (6 * second, 9), "counted from the send");
        target.note(Sent { seq: 8, at: 13 * second, incarnation: 1 });
        target.answer(&ack(7, 10));
        assert_eq!(
            (target.answered_at, target.nonce, target.answered),
            (6 * second, 10, 7),
            "it is there, and too late"
        );
    }

    #[tokio::test]
    async fn a_controller_whose_name_is_not_known_just_now_is_beaten_to_where_it_was() {
        let address = SocketAddr::from(([192, 0, 2, 1], 7470));
        // RFC 6761: a name that nobody ever has.
        let name = "controller.invalid:7470".to_owned();
        let mut target = Target::new(&name, address);
        target.nonce = 9;
        let other = "192.0.2.2:7470".to_owned();
        let targets = resolve(&[other, name.clone()], vec![target]).await;
        let known: Vec<_> = targets.iter().map(|target| (target.address.ip().to_string(), target.nonce)).collect();
        assert_eq!(known, [("192.0.2.2".into(), 0), ("192.0.2.1".into(), 9)]);
        assert!(resolve(&[name], vec![]).await.is_empty(), "one that was never known");
    }
}
