//! The network between controllers and hosts: links that are cut in one direction or both, datagrams that are lost,
//! late, out of order or doubled, and streams that keep their order and stall while a link is cut.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use model::{
    Assignment, Capacity, News, NodeId,
    command::{ImageReport, MoveReport, VmReport},
    lease::Grant,
    telemetry::NodeStatus,
};

use crate::dice::{Dice, MILLI, SECOND};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Controller(usize),
    Host(NodeId),
}

/// A heartbeat: of `api::beat`, what matters here.
#[derive(Clone)]
pub struct Beat {
    pub node: NodeId,
    pub incarnation: u64,
    pub seq: u64,
    pub boottime_nanos: u64,
    /// Of the controller's process, as its last answer told it.
    pub nonce: u64,
    pub unanswered_millis: u64,
    pub status: NodeStatus,
}

#[derive(Clone)]
pub struct Ack {
    pub node: NodeId,
    pub seq: u64,
    pub boottime_nanos: u64,
    pub nonce: u64,
    pub grant: Option<Grant>,
}

pub enum Packet {
    Beat(Beat),
    /// From this controller.
    Ack(usize, Ack),
    /// An assignment that was sent in some session, once more: agents must refuse what is older than they have obeyed,
    /// however it comes.
    Echo(Box<Assignment>),
}

pub enum Up {
    Hello(Capacity),
    Vms(u64, Vec<VmReport>),
    Images(u64, Vec<ImageReport>),
    Moves(u64, Vec<MoveReport>),
}

pub enum Down {
    Refused,
    Welcome(u64),
    News(Box<News>),
    Reported(u64),
}

/// A session's stream. Each end knows only by itself whether it is open.
pub struct Stream {
    pub host: NodeId,
    pub controller: usize,
    up: VecDeque<(u64, Up)>,
    down: VecDeque<(u64, Down)>,
    host_closed: Option<u64>,
    controller_closed: Option<u64>,
}

/// An end that hears nothing of the other one's closing takes this long to notice.
const KEEPALIVE: u64 = 20 * SECOND;

#[derive(Default)]
pub struct Wires {
    cut: BTreeSet<(Place, Place)>,
    /// Thousandths of datagrams that are lost, on top of those that meet a cut link.
    pub loss_permille: u64,
    /// Thousandths of datagrams that take seconds.
    pub late_permille: u64,
    packets: BTreeMap<(u64, u64), (Place, Packet)>,
    streams: BTreeMap<u64, Stream>,
    sent: u64,
}

impl Wires {
    pub fn cut(&mut self, from: Place, to: Place) {
        self.cut.insert((from, to));
    }

    pub fn mend(&mut self, from: Place, to: Place) {
        self.cut.remove(&(from, to));
    }

    pub fn mend_all(&mut self) {
        self.cut.clear();
    }

    pub fn is_open(&self, from: Place, to: Place) -> bool {
        from == to || !self.cut.contains(&(from, to))
    }

    pub fn is_open_both_ways(&self, one: Place, other: Place) -> bool {
        self.is_open(one, other) && self.is_open(other, one)
    }

    /// A datagram.
    pub fn send(&mut self, now: u64, dice: &mut Dice, from: Place, to: Place, make: impl Fn() -> Packet) {
        if !self.is_open(from, to) {
            return;
        }
        let copies = if dice.permille(20) { 2 } else { 1 };
        for _ in 0..copies {
            if !dice.permille(self.loss_permille) {
                let due = now + dice.delay(60, 7000, self.late_permille);
                self.deliver_at(due, to, make());
            }
        }
    }

    pub fn deliver_at(&mut self, due: u64, to: Place, packet: Packet) {
        self.sent += 1;
        self.packets.insert((due, self.sent), (to, packet));
    }

    /// The next datagram that arrives by `now`.
    pub fn arrived(&mut self, now: u64) -> Option<(Place, Packet)> {
        let first = self.packets.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    pub fn open_stream(&mut self, host: NodeId, controller: usize) -> u64 {
        self.sent += 1;
        let stream = Stream {
            host,
            controller,
            up: VecDeque::new(),
            down: VecDeque::new(),
            host_closed: None,
            controller_closed: None,
        };
        self.streams.insert(self.sent, stream);
        self.sent
    }

    pub fn say_up(&mut self, now: u64, dice: &mut Dice, stream: u64, message: Up) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.up.push_back((now + dice.delay(60, 3000, 15), message));
        }
    }

    pub fn say_down(&mut self, now: u64, dice: &mut Dice, stream: u64, message: Down) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.down.push_back((now + dice.delay(60, 3000, 15), message));
        }
    }

    /// The next message for the controller's end.
    pub fn next_up(&mut self, now: u64, id: u64) -> Option<Up> {
        let stream = self.streams.get_mut(&id)?;
        let open = !self.cut.contains(&(Place::Host(stream.host), Place::Controller(stream.controller)));
        let due = stream.up.front().is_some_and(|(due, _)| *due <= now);
        if open && due { stream.up.pop_front().map(|(_, message)| message) } else { None }
    }

    /// The next message for the host's end.
    pub fn next_down(&mut self, now: u64, id: u64) -> Option<Down> {
        let stream = self.streams.get_mut(&id)?;
        let open = !self.cut.contains(&(Place::Controller(stream.controller), Place::Host(stream.host)));
        let due = stream.down.front().is_some_and(|(due, _)| *due <= now);
        if open && due { stream.down.pop_front().map(|(_, message)| message) } else { None }
    }

    pub fn close(&mut self, now: u64, id: u64, by: Place) {
        if let Some(stream) = self.streams.get_mut(&id) {
            let end =
                if matches!(by, Place::Host(_)) { &mut stream.host_closed } else { &mut stream.controller_closed };
            end.get_or_insert(now);
        }
    }

    /// Whether this end has noticed that the other one is gone and has nothing more to say.
    pub fn is_over(&self, now: u64, id: u64, for_whom: Place) -> bool {
        let Some(stream) = self.streams.get(&id) else { return true };
        let (host, controller) = (Place::Host(stream.host), Place::Controller(stream.controller));
        let (closed, from, left) = match for_whom {
            Place::Host(_) => (stream.controller_closed, controller, stream.down.len()),
            Place::Controller(_) => (stream.host_closed, host, stream.up.len()),
        };
        let to = if from == host { controller } else { host };
        let told = |at: u64| now >= at + 50 * MILLI && left == 0 && self.is_open(from, to);
        closed.is_some_and(|at| told(at) || now >= at + KEEPALIVE)
    }

    /// Streams whose controller's end was not taken up yet.
    pub fn streams_to(&self, controller: usize) -> Vec<(u64, NodeId)> {
        let to = self.streams.iter().filter(|(_, s)| s.controller == controller && s.controller_closed.is_none());
        to.map(|(id, stream)| (*id, stream.host)).collect()
    }

    /// Forgets what both ends have closed.
    pub fn sweep(&mut self) {
        self.streams.retain(|_, stream| stream.host_closed.is_none() || stream.controller_closed.is_none());
    }
}
