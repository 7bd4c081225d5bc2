//! Is there an order in which one register explains everything that clients of one key saw?
//!
//! The algorithm of Wing and Gong (1993) with the memory of Lowe (2017): calls are tried in turn, each at a point
//! between its start and its end; a set of operations already taken together with the register's value is never
//! tried twice. Operations with unknown outcome may be taken at any later point, or never.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use super::Finding;
use crate::history::{Function, Kind, Operation};

/// Steps after which one key is given up: some seconds of one core. A key is retired after some hundred operations
/// by at most twelve processes, which takes a few thousand steps when the promise holds.
pub const STEP_BUDGET: u64 = 20_000_000;

/// The value of a register: an index into the values of this history; `ABSENT` before the first write.
type Content = u32;
const ABSENT: Content = 0;

#[derive(Clone, Copy, Debug)]
enum Action {
    Read(Content),
    Write(Content),
    Cas(Content, Content),
}

impl Action {
    /// The register's value afterwards, or `None` when the action could not have given the answer it gave.
    fn apply(self, content: Content) -> Option<Content> {
        match self {
            Self::Read(seen) => (seen == content).then_some(content),
            Self::Write(new) => Some(new),
            Self::Cas(old, new) => (old == content).then_some(new),
        }
    }
}

struct Call {
    action: Action,
    start: u64,
    /// `u64::MAX` when the outcome is unknown.
    end: u64,
}

/// Checks every key by itself.
pub fn check(operations: &[Operation]) -> Finding {
    let mut by_key: HashMap<&str, Vec<&Operation>> = HashMap::new();
    for operation in operations {
        if matches!(operation.f, Function::Read | Function::Write | Function::Cas) {
            by_key.entry(&operation.key).or_default().push(operation);
        }
    }
    let mut keys: Vec<_> = by_key.into_iter().collect();
    keys.sort_by_key(|(key, _)| *key);
    keys.into_iter().fold(Finding::Holds, |finding, (key, operations)| finding.and(check_key(key, &operations)))
}

fn check_key(key: &str, operations: &[&Operation]) -> Finding {
    let calls = calls(operations);
    match linearizable(&calls, STEP_BUDGET) {
        Some(true) => Finding::Holds,
        Some(false) => Finding::Broken(format!(
            "key '{key}': no order of its {} operations explains what clients saw",
            operations.len()
        )),
        None => Finding::Undecided(format!("key '{key}': not decided within {STEP_BUDGET} steps")),
    }
}

/// The operations that constrain the order. An unknown write whose value nobody ever saw is left out: whatever order
/// has it, also has it without.
fn calls(operations: &[&Operation]) -> Vec<Call> {
    let mut calls = possible_calls(operations);
    let seen: HashSet<Content> = calls
        .iter()
        .filter_map(|call| match call.action {
            Action::Read(content) | Action::Cas(content, _) => Some(content),
            Action::Write(_) => None,
        })
        .collect();
    calls.retain(|call| match call.action {
        Action::Write(new) | Action::Cas(_, new) => call.end != u64::MAX || seen.contains(&new),
        Action::Read(_) => true,
    });
    calls
}

/// A failed operation did not happen, and an unknown read says nothing; all others may have.
fn possible_calls(operations: &[&Operation]) -> Vec<Call> {
    let mut values = Values::default();
    let mut calls = Vec::new();
    for operation in operations {
        let end = match operation.outcome {
            Kind::Ok => operation.end,
            Kind::Info if operation.f != Function::Read => u64::MAX,
            _ => continue,
        };
        let action = match operation.f {
            Function::Read => Action::Read(values.content(&operation.answered)),
            Function::Write => Action::Write(values.content(&operation.asked)),
            Function::Cas => Action::Cas(values.content(&operation.asked[0]), values.content(&operation.asked[1])),
            _ => continue,
        };
        calls.push(Call { action, start: operation.start, end });
    }
    calls.sort_by_key(|call| call.start);
    calls
}

#[derive(Default)]
struct Values(HashMap<String, Content>);

impl Values {
    fn content(&mut self, value: &Value) -> Content {
        if value.is_null() {
            return ABSENT;
        }
        let next = u32::try_from(self.0.len() + 1).unwrap_or(u32::MAX);
        *self.0.entry(value.to_string()).or_insert(next)
    }
}

/// A call's start or end in the order of time, in a doubly linked list, so that taking a call out and putting it
/// back costs the same whatever the length.
#[derive(Clone, Copy)]
struct Entry {
    call: usize,
    is_end: bool,
    previous: usize,
    next: usize,
}

struct Timeline {
    entries: Vec<Entry>,
    /// Position of each call's start and end.
    starts: Vec<usize>,
    ends: Vec<Option<usize>>,
    /// Calls with a known end that are still in the list.
    ends_left: usize,
}

const HEAD: usize = 0;
/// After the last entry.
const NOWHERE: usize = usize::MAX;

impl Timeline {
    fn new(calls: &[Call]) -> Self {
        let mut points: Vec<(u64, bool, usize)> = Vec::new();
        for (call, Call { start, end, .. }) in calls.iter().enumerate() {
            points.push((*start, false, call));
            if *end != u64::MAX {
                points.push((*end, true, call));
            }
        }
        // At the same instant a start comes before an end: they overlap, which allows more orders, never fewer.
        points.sort_unstable();
        let mut timeline = Self {
            entries: vec![Entry { call: NOWHERE, is_end: false, previous: NOWHERE, next: NOWHERE }],
            starts: vec![0; calls.len()],
            ends: vec![None; calls.len()],
            ends_left: 0,
        };
        for (_, is_end, call) in points {
            let position = timeline.entries.len();
            timeline.entries[position - 1].next = position;
            timeline.entries.push(Entry { call, is_end, previous: position - 1, next: NOWHERE });
            if is_end {
                timeline.ends[call] = Some(position);
                timeline.ends_left += 1;
            } else {
                timeline.starts[call] = position;
            }
        }
        timeline
    }

    fn first(&self) -> usize {
        self.entries[HEAD].next
    }

    fn unlink(&mut self, position: usize) {
        let Entry { previous, next, .. } = self.entries[position];
        self.entries[previous].next = next;
        if next != NOWHERE {
            self.entries[next].previous = previous;
        }
    }

    fn relink(&mut self, position: usize) {
        let Entry { previous, next, .. } = self.entries[position];
        self.entries[previous].next = position;
        if next != NOWHERE {
            self.entries[next].previous = position;
        }
    }

    fn take(&mut self, call: usize) {
        self.unlink(self.starts[call]);
        if let Some(end) = self.ends[call] {
            self.unlink(end);
            self.ends_left -= 1;
        }
    }

    /// Undoes the latest `take`.
    fn put_back(&mut self, call: usize) {
        if let Some(end) = self.ends[call] {
            self.relink(end);
            self.ends_left += 1;
        }
        self.relink(self.starts[call]);
    }
}

/// `None` when the budget of steps was not enough.
fn linearizable(calls: &[Call], budget: u64) -> Option<bool> {
    let mut timeline = Timeline::new(calls);
    let mut taken = vec![0_u64; calls.len().div_ceil(64)];
    let mut tried: HashSet<(Vec<u64>, Content)> = HashSet::new();
    let mut path: Vec<(usize, Content)> = Vec::new();
    let mut content = ABSENT;
    let mut position = timeline.first();
    for _ in 0..budget {
        if timeline.ends_left == 0 {
            return Some(true);
        }
        if position != NOWHERE && !timeline.entries[position].is_end {
            let call = timeline.entries[position].call;
            if let Some(after) = calls[call].action.apply(content) {
                taken[call / 64] |= 1 << (call % 64);
                if tried.insert((taken.clone(), after)) {
                    path.push((call, content));
                    content = after;
                    timeline.take(call);
                    position = timeline.first();
                    continue;
                }
                taken[call / 64] &= !(1 << (call % 64));
            }
            position = timeline.entries[position].next;
        } else {
            // This call had ended before the next one to try began: an earlier choice was wrong.
            let Some((call, before)) = path.pop() else { return Some(false) };
            timeline.put_back(call);
            taken[call / 64] &= !(1 << (call % 64));
            content = before;
            position = timeline.entries[timeline.starts[call]].next;
        }
    }
    None
}

#[cfg(test)]
mod tests;
