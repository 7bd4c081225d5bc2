//! Machines that wait for a host, so kept that a look costs as much as there is to do: those that need the same and were told the
//! same are one line, and when there is no room for its first, the others need not be asked.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, btree_set},
};

use crate::{Capacity, Recovery, Vm, VmId};

/// By priority, then age.
pub(crate) type Turn = (Reverse<u8>, VmId);

/// What decides whether a host has room for a machine.
pub(crate) type Need = (Capacity, Recovery);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// By what they need and why they wait, as they were told.
    lines: BTreeMap<(Need, String), BTreeSet<Turn>>,
}

impl Queue {
    pub(super) fn insert(&mut self, vm: &Vm) {
        self.lines.entry(line_of(vm)).or_default().insert((Reverse(vm.priority), vm.id));
    }

    pub(super) fn remove(&mut self, vm: &Vm) {
        super::forget(&mut self.lines, line_of(vm), (Reverse(vm.priority), vm.id));
    }

    /// In the order in which they are served.
    pub(crate) fn served(&self) -> Served<'_> {
        let mut served = Served { lines: self.lines.values().map(BTreeSet::iter).collect(), first: BTreeSet::new() };
        (0..served.lines.len()).for_each(|line| served.advance(line));
        served
    }
}

fn line_of(vm: &Vm) -> (Need, String) {
    ((vm.size, vm.recovery), vm.reason.clone())
}

pub(crate) struct Served<'a> {
    lines: Vec<btree_set::Iter<'a, Turn>>,
    /// Of each line that is not at its end.
    first: BTreeSet<(Turn, usize)>,
}

impl Served<'_> {
    fn advance(&mut self, line: usize) {
        self.first.extend(self.lines[line].next().map(|turn| (*turn, line)));
    }

    /// The next machine, and its line.
    pub fn next(&mut self) -> Option<(VmId, usize)> {
        let ((_, vm), line) = self.first.pop_first()?;
        self.advance(line);
        Some((vm, line))
    }

    /// Nobody else of this line is served.
    pub fn close(&mut self, line: usize) {
        self.first.retain(|(_, other)| *other != line);
    }
}
