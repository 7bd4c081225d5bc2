//! Which node is the idlest that has room, asked for many machines in one plan.
//!
//! The nodes are ranked once a plan, at the first question, and each promise moves one of them; so a burst of machines
//! costs the number of nodes once and not for each machine.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map},
    iter::Peekable,
};

use super::share;
use crate::{Capacity, Node, NodeId, NodeState, Rejection, State, Telemetry, setting, telemetry::Heard};

/// Nodes whose load differs by less than this, a weight, count as equally idle, and the one with fewest machines is
/// taken: samples of use vary by as much on an idle host, and following them would pile machines up.
const NOISE_PERMILLE: u64 = 50;

/// What the nodes hold, with what this plan has promised besides.
pub(super) struct Idlest<'a> {
    state: &'a State,
    telemetry: &'a Telemetry,
    ranked: Option<Ranked<'a>>,
    promised: bool,
}

struct Ranked<'a> {
    weights: [u64; 3],
    noise: u64,
    /// In the order of their nodes' ids, so that of equal ones the first comes first.
    seats: Vec<Seat<'a>>,
    order: Option<Order>,
}

/// Made for the first machine for which there is room: a look in vain costs a walk along the seats.
struct Order {
    by_load: BTreeSet<(u64, Place)>,
    /// By load in steps of the noise; within a step by machines, then load.
    bands: BTreeMap<u64, BTreeSet<(usize, u64, Place)>>,
}

/// Of a seat among the seats.
type Place = usize;

/// A node that may be given machines at all.
struct Seat<'a> {
    node: &'a Node,
    /// What may be promised on it, and what is.
    room: Capacity,
    promised: Capacity,
    /// Used CPU, memory and disk, in thousandths.
    used: [u64; 3],
    /// As in `Index::coming`.
    soon: Capacity,
    /// Promised by this plan.
    extra: Capacity,
    machines: usize,
    load: u64,
}

impl<'a> Idlest<'a> {
    pub fn new(state: &'a State, telemetry: &'a Telemetry) -> Self {
        Self { state, telemetry, ranked: None, promised: false }
    }

    /// True when this plan has given something to a node.
    pub fn has_promised(&self) -> bool {
        self.promised
    }

    /// The idlest node on which `size` fits and that `room` does not refuse, asked with what this plan promises there
    /// besides.
    ///
    /// # Errors
    /// Why none has room, in a sentence.
    pub fn with_room(
        &mut self,
        size: Capacity,
        room: impl Fn(&Node, Capacity) -> Result<(), Rejection>,
    ) -> Result<NodeId, String> {
        let found = self.if_room(size, &room);
        let ranked = self.ranked.as_ref();
        found.ok_or_else(|| ranked.map_or_else(String::new, |ranked| ranked.why_none(self.state, &room)))
    }

    /// As [`Self::with_room`], for who does not tell anybody why: to find the reasons, each node is asked.
    pub fn if_room(
        &mut self,
        size: Capacity,
        room: impl Fn(&Node, Capacity) -> Result<(), Rejection>,
    ) -> Option<NodeId> {
        self.ranked.get_or_insert_with(|| Ranked::of(self.state, self.telemetry)).idlest(size, &room)
    }

    /// `size` goes to `node`.
    pub fn promise(&mut self, node: NodeId, size: Capacity) {
        self.promised = true;
        if let Some(ranked) = &mut self.ranked {
            ranked.promise(node, size);
        }
    }
}

impl<'a> Ranked<'a> {
    fn of(state: &'a State, telemetry: &Telemetry) -> Self {
        let weights =
            [setting::WEIGHT_CPU, setting::WEIGHT_MEMORY, setting::WEIGHT_DISK].map(|name| state.setting(name));
        let overcommit = state.overcommit();
        let index = &state.index;
        let (mut heard, mut reserved) = (Beside::new(&telemetry.nodes), Beside::new(&index.reserved));
        let (mut coming, mut machines) = (Beside::new(&index.coming), Beside::new(&index.vms_by_node));
        let open = state.nodes().values().filter(|node| takes_machines(node));
        let seats: Vec<Seat> = open
            .map(|node| {
                let mut seat = Seat {
                    node,
                    room: overcommit.of(node.capacity),
                    promised: reserved.get(node.id).copied().unwrap_or_default(),
                    used: used_permille(heard.get(node.id)),
                    soon: coming.get(node.id).copied().unwrap_or_default(),
                    extra: Capacity::default(),
                    machines: machines.get(node.id).map_or(0, BTreeSet::len),
                    load: 0,
                };
                seat.load = seat.weigh(weights);
                seat
            })
            .collect();
        let noise = weights.iter().map(|weight| weight.saturating_mul(NOISE_PERMILLE)).fold(0, u64::saturating_add);
        Self { weights, noise, seats, order: None }
    }

    fn idlest(&mut self, size: Capacity, room: impl Fn(&Node, Capacity) -> Result<(), Rejection>) -> Option<NodeId> {
        let takes = |place: Place| {
            let seat = &self.seats[place];
            size.fits_in(seat.room.minus(seat.promised)) && room(seat.node, seat.extra).is_ok()
        };
        let width = self.noise.max(1);
        let order = match &mut self.order {
            Some(order) => order,
            none if (0..self.seats.len()).any(takes) => none.insert(Order::of(&self.seats, width)),
            _ => return None,
        };
        let (least, _) = order.by_load.iter().find(|(_, place)| takes(*place))?;
        let most = least.saturating_add(self.noise);
        let alike = order.bands.range(least / width..=most / width);
        let first = |seats: &BTreeSet<(usize, u64, Place)>| {
            seats.iter().find(|(_, load, place)| (*least..=most).contains(load) && takes(*place)).copied()
        };
        alike.filter_map(|(_, seats)| first(seats)).min().map(|(.., place)| self.seats[place].node.id)
    }

    fn place_of(&self, node: NodeId) -> Option<Place> {
        self.seats.binary_search_by_key(&node, |seat| seat.node.id).ok()
    }

    fn why_none(&self, state: &State, room: impl Fn(&Node, Capacity) -> Result<(), Rejection>) -> String {
        let mut refusals: BTreeMap<String, u32> = BTreeMap::new();
        for node in state.nodes().values() {
            let extra = self.place_of(node.id).map_or(Capacity::default(), |place| self.seats[place].extra);
            if let Err(Rejection::NoRoom { reason, .. }) = room(node, extra) {
                *refusals.entry(reason).or_default() += 1;
            }
        }
        let why: Vec<String> = refusals.iter().map(|(reason, count)| format!("{count} × {reason}")).collect();
        if why.is_empty() { "no node has joined yet".into() } else { format!("no node has room: {}", why.join(", ")) }
    }

    fn promise(&mut self, node: NodeId, size: Capacity) {
        let width = self.noise.max(1);
        let Some(place) = self.place_of(node) else { return };
        let seat = &mut self.seats[place];
        let before = (seat.load, seat.machines);
        for sum in [&mut seat.promised, &mut seat.soon, &mut seat.extra] {
            *sum = sum.plus(size);
        }
        seat.machines += 1;
        seat.load = seat.weigh(self.weights);
        let Some(order) = &mut self.order else { return };
        order.by_load.remove(&(before.0, place));
        if let Some(band) = order.bands.get_mut(&(before.0 / width)) {
            band.remove(&(before.1, before.0, place));
        }
        order.by_load.insert((seat.load, place));
        order.bands.entry(seat.load / width).or_default().insert((seat.machines, seat.load, place));
    }
}

impl Order {
    fn of(seats: &[Seat], width: u64) -> Self {
        let by_load = (0..).zip(seats).map(|(place, seat)| (seat.load, place)).collect();
        let mut bands: BTreeMap<u64, Vec<(usize, u64, Place)>> = BTreeMap::new();
        for (place, seat) in (0..).zip(seats) {
            bands.entry(seat.load / width).or_default().push((seat.machines, seat.load, place));
        }
        let bands = bands.into_iter().map(|(band, seats)| (band, seats.into_iter().collect())).collect();
        Self { by_load, bands }
    }
}

/// A map that is asked for rising nodes and walks along: a search from its top for each would cost more than all the rest of
/// ranking.
struct Beside<'a, T>(Peekable<btree_map::Iter<'a, NodeId, T>>);

impl<'a, T> Beside<'a, T> {
    fn new(map: &'a BTreeMap<NodeId, T>) -> Self {
        Self(map.iter().peekable())
    }

    fn get(&mut self, node: NodeId) -> Option<&'a T> {
        while self.0.next_if(|(id, _)| **id < node).is_some() {}
        self.0.next_if(|(id, _)| **id == node).map(|(_, value)| value)
    }
}

impl Seat<'_> {
    /// Weighted use, in thousandths: of each resource what is used and about to be used, or what is promised, whichever
    /// is more.
    fn weigh(&self, weights: [u64; 3]) -> u64 {
        let of = |size: Capacity| [size.vcpus, size.memory_bytes, size.disk_bytes];
        let (soon, promised, room) = (of(self.soon), of(self.promised), of(self.room));
        let load = |n: usize| self.used[n].saturating_add(share(soon[n], room[n])).max(share(promised[n], room[n]));
        (0..3).map(|n| load(n).saturating_mul(weights[n])).fold(0, u64::saturating_add)
    }
}

/// Whether a node may be given any machine; `State::has_room` says why not.
pub(super) fn takes_machines(node: &Node) -> bool {
    node.state == NodeState::Up && !node.cordoned && !node.maintenance
}

fn used_permille(heard: Option<&Heard>) -> [u64; 3] {
    // A node that has not told its use yet counts as busy: it must not draw everything to itself.
    let told = heard.map(|heard| &heard.status).filter(|status| status.memory_total_bytes > 0);
    told.map_or([1000; 3], |used| {
        let memory = share(used.memory_used_bytes, used.memory_total_bytes);
        [u64::from(used.cpu_permille), memory, share(used.disk_used_bytes, used.disk_total_bytes)]
    })
}
