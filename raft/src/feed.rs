//! What changed lately, entry by entry: what watchers read. In memory, on every replica, the same on each.
//!
//! ```text
//!   apply: index, changed rows ──► window of the newest changes ──► any number of readers, each with a place of its own
//! ```
//! A reader is a number, not a queue: one that is slow costs nothing, and is told when the window has moved past it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError},
};

use model::{
    Noun, State, TenantId,
    state::{Change, Owner},
    table::RowChange,
};

/// Changes that are kept: a minute at a thousand a second, in about ten megabytes.
const KEPT: usize = 65_536;

/// The changes after an index, up to and with another: none between them is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// In the order of their indexes; those of one entry are never parted.
    pub changes: Vec<(u64, Change)>,
    pub upto: u64,
}

/// The window does not reach back so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// What came after this index is still kept.
    pub kept_after: u64,
}

pub struct Feed {
    window: Mutex<Window>,
    kept: usize,
}

struct Window {
    /// Every change after this index, up to `upto`, is in `changes`.
    after: u64,
    upto: u64,
    changes: VecDeque<(u64, Change)>,
    /// Whose a thing was, for when it is gone.
    owners: BTreeMap<(Noun, String), TenantId>,
}

impl Feed {
    pub fn new(state: &State, index: u64) -> Self {
        Self::keeping(KEPT, state, index)
    }

    fn keeping(kept: usize, state: &State, index: u64) -> Self {
        Self { window: Mutex::new(Window::empty(state, index)), kept }
    }

    /// A snapshot took the place of the state: what changed on the way to it is not known.
    pub fn begin_again(&self, state: &State, index: u64) {
        *self.lock() = Window::empty(state, index);
    }

    /// What the entries up to `upto` changed, in order.
    pub fn extend(&self, upto: u64, changes: Vec<(u64, Change)>) {
        let mut window = self.lock();
        for (index, mut change) in changes {
            window.settle_owner(&mut change);
            window.changes.push_back((index, change));
        }
        window.upto = upto;
        while window.changes.len() > self.kept {
            let Some((index, _)) = window.changes.pop_front() else { break };
            window.after = index;
            while window.changes.front().is_some_and(|(next, _)| *next == index) {
                window.changes.pop_front();
            }
        }
    }

    /// Up to about `most` changes after an index, of those that are `wanted`.
    ///
    /// # Errors
    /// When not all of them are kept any more.
    pub fn read(&self, after: u64, most: usize, wanted: impl Fn(&Change) -> bool) -> Result<Changes, Compacted> {
        let window = self.lock();
        if after < window.after {
            return Err(Compacted { kept_after: window.after });
        }
        let mut read = Changes { changes: Vec::new(), upto: window.upto.max(after) };
        let first = window.changes.partition_point(|(index, _)| *index <= after);
        let mut previous = after;
        for (index, change) in window.changes.range(first..) {
            if *index != previous && read.changes.len() >= most {
                read.upto = previous;
                break;
            }
            previous = *index;
            if wanted(change) {
                read.changes.push((*index, change.clone()));
            }
        }
        Ok(read)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a batch of entries changed.
#[derive(Default)]
pub struct Gathered {
    changes: Vec<(u64, Change)>,
    rows: Vec<RowChange>,
}

impl Gathered {
    /// To be called after each entry: what is told is told entry by entry, so that it is the same on every replica, whose
    /// batches differ.
    pub fn note(&mut self, index: u64, state: &mut State) {
        self.changes.extend(state.note_changes().into_iter().map(|change| (index, change)));
    }

    /// Takes out the rows that changed since the last time, each once and as it is now: the hash of the state covers them then.
    pub fn take_rows(&mut self, state: &mut State) {
        self.rows.append(&mut state.drain_changes());
    }

    pub fn into_parts(self) -> (Vec<RowChange>, Vec<(u64, Change)>) {
        (self.rows, self.changes)
    }
}

impl Window {
    fn empty(state: &State, index: u64) -> Self {
        let vms = state.vms().iter().map(|(id, vm)| ((Noun::Vm, id.to_string()), vm.tenant));
        let images = state.images().iter().map(|(id, image)| ((Noun::Image, id.to_string()), image.tenant));
        let networks = state.networks().iter().map(|(id, network)| ((Noun::Network, id.to_string()), network.tenant));
        let owners = vms.chain(images).chain(networks).collect();
        Self { after: index, upto: index, changes: VecDeque::new(), owners }
    }

    /// Remembers whose a thing is, or says whose it was.
    fn settle_owner(&mut self, change: &mut Change) {
        if !matches!(change.noun, Noun::Vm | Noun::Image | Noun::Network) {
            return;
        }
        let key = (change.noun, change.id.clone());
        match change.owner {
            Owner::Tenant(tenant) => drop(self.owners.insert(key, tenant)),
            Owner::Gone => change.owner = self.owners.remove(&key).map_or(Owner::Operators, Owner::Tenant),
            Owner::Everybody | Owner::Operators => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(id: &str) -> Change {
        Change { noun: Noun::Tag, id: id.into(), owner: Owner::Operators, present: true }
    }

    fn vm(owner: Owner, present: bool) -> Change {
        Change { noun: Noun::Vm, id: "vm-1".into(), owner, present }
    }

    fn ids(read: &Changes) -> Vec<&str> {
        read.changes.iter().map(|(_, change)| change.id.as_str()).collect()
    }

    #[test]
    fn a_reader_gets_each_change_once_from_where_it_was() {
        let feed = Feed::keeping(10, &State::default(), 5);
        feed.extend(9, vec![(6, tag("a")), (8, tag("b")), (8, tag("c")), (9, tag("d"))]);
        let all = feed.read(5, 100, |_| true).unwrap();
        assert_eq!((ids(&all), all.upto), (vec!["a", "b", "c", "d"], 9));
        let some = feed.read(5, 2, |_| true).unwrap();
        assert_eq!((ids(&some), some.upto), (vec!["a", "b", "c"], 8), "an entry is not parted");
        let rest = feed.read(some.upto, 2, |_| true).unwrap();
        assert_eq!((ids(&rest), rest.upto), (vec!["d"], 9));
        let wanted = feed.read(6, 100, |change| change.id == "d").unwrap();
        assert_eq!((ids(&wanted), wanted.upto), (vec!["d"], 9));
        let none = feed.read(12, 100, |_| true).unwrap();
        assert_eq!((ids(&none), none.upto), (vec![], 12), "who is ahead waits");
    }

    #[test]
    fn who_is_left_behind_is_told_so() {
        let feed = Feed::keeping(2, &State::default(), 5);
        assert_eq!(feed.read(4, 1, |_| true), Err(Compacted { kept_after: 5 }), "it is older than the start");
        feed.extend(8, vec![(6, tag("a")), (6, tag("b")), (7, tag("c")), (8, tag("d"))]);
        assert_eq!(feed.read(5, 1, |_| true), Err(Compacted { kept_after: 6 }));
        assert_eq!(ids(&feed.read(6, 9, |_| true).unwrap()), ["c", "d"]);
        feed.begin_again(&State::default(), 20);
        assert_eq!(feed.read(8, 1, |_| true), Err(Compacted { kept_after: 20 }));
    }

    #[test]
    fn what_is_gone_was_somebodys() {
        let feed = Feed::keeping(9, &State::default(), 0);
        let owner = Owner::Tenant(TenantId(3));
        feed.extend(2, vec![(1, vm(owner, true)), (2, vm(Owner::Gone, false))]);
        let seen = feed.read(0, 9, |change| change.owner == owner).unwrap();
        assert_eq!(seen.changes, [(1, vm(owner, true)), (2, vm(owner, false))]);
    }
}
