//! What the controllers' disks say after a run, against each other and against what clients were told: an oracle that
//! does not believe the API.
//!
//! It also resolves what clients could not know: a request is in the state's memory of requests, or it never happened.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::Finding;
use crate::{
    cluster::disks::{Dump, Outcome},
    history::{Event, Function, Kind, Operation},
};

/// The same index is the same entry on every controller that has it, and what was applied is on a majority.
pub fn matches(dumps: &[Dump]) -> Finding {
    if dumps.is_empty() {
        return Finding::Undecided("no controller's disk was read".into());
    }
    for (number, one) in dumps.iter().enumerate() {
        for other in &dumps[number + 1..] {
            for (index, entry) in &one.entries {
                if other.entries.get(index).is_some_and(|found| found != entry) && *index <= agreed(dumps) {
                    let (one, other) = (&one.controller, &other.controller);
                    return Finding::Broken(format!("{one} and {other} have different entries at index {index}"));
                }
            }
        }
        let with = dumps.iter().filter(|dump| dump.last >= one.applied).count();
        if with * 2 <= dumps.len() {
            return Finding::Broken(format!(
                "{} has applied index {}, which only {with} of {} have in their logs",
                one.controller,
                one.applied,
                dumps.len()
            ));
        }
    }
    Finding::Holds
}

/// Who takes an entry has voted in its term, or in a later one, and still knows it: it could vote twice otherwise.
pub fn votes(dumps: &[Dump]) -> Finding {
    let forgot = dumps.iter().find(|dump| dump.terms.1 < dump.terms.0);
    if let Some(Dump { controller, terms: (entry, vote), .. }) = forgot {
        return Finding::Broken(format!(
            "{controller} has an entry of term {entry}, and its last vote is of term {vote}"
        ));
    }
    match dumps.iter().any(|dump| dump.terms.0 > 0) {
        true => Finding::Holds,
        false => Finding::Undecided("no controller's disk has an entry".into()),
    }
}

/// Equal index, equal hash of the state.
pub fn states(dumps: &[Dump]) -> Finding {
    let mut seen: BTreeMap<u64, (&str, &str)> = BTreeMap::new();
    let mut compared = 0;
    for dump in dumps {
        for (index, hash) in &dump.hashes {
            match seen.get(index) {
                None => drop(seen.insert(*index, (hash, &dump.controller))),
                Some((same, _)) if same == hash => compared += 1,
                Some((_, other)) => {
                    return Finding::Broken(format!(
                        "{} and {other} have different states at index {index}",
                        dump.controller
                    ));
                }
            }
        }
    }
    match compared {
        0 => Finding::Undecided("no two disks have the state of one index".into()),
        _ => Finding::Holds,
    }
}

/// Every acknowledged write of a tag is in the memory of requests of each controller that has applied so far, and at the index
/// that was answered where the log still has it.
pub fn acknowledged(events: &[Event], dumps: &[Dump]) -> Finding {
    let ended = events.iter().filter(|event| event.kind == Kind::Ok && !event.req.is_empty() && of_tags(event.f));
    let mut looked_at = false;
    for event in ended {
        for dump in dumps {
            let Some(rev) = event.rev.filter(|rev| *rev <= dump.applied) else { continue };
            looked_at = true;
            if !dump.requests.contains_key(&event.req) {
                return Finding::Broken(format!(
                    "request '{}' was acknowledged at index {rev}, and {} knows nothing of it",
                    event.req, dump.controller
                ));
            }
            if rev > dump.purged
                && dump.entries.get(&rev).and_then(|entry| entry["request"].as_str()) != Some(&event.req)
            {
                return Finding::Broken(format!(
                    "request '{}' was acknowledged at index {rev}, where {} has another entry",
                    event.req, dump.controller
                ));
            }
        }
    }
    if looked_at { Finding::Holds } else { Finding::Undecided("no acknowledged request names an index".into()) }
}

/// Up to here every entry is applied somewhere: what is behind it may have been one leader's alone.
fn agreed(dumps: &[Dump]) -> u64 {
    dumps.iter().map(|dump| dump.applied).max().unwrap_or(0)
}

/// What became of an operation of which the client heard nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Resolved {
    pub process: u64,
    /// When it was asked for, in nanoseconds since the run began.
    pub start: u64,
    pub request: String,
    pub outcome: Outcome,
}

/// Of every request that ended unknown: what it came to, by the disk that has applied the most. A request of which
/// neither a log nor that state knows anything never happened, and cannot any more: its sender is gone.
pub fn resolve(events: &[Event], dumps: &[Dump]) -> Vec<Resolved> {
    let Some(newest) = dumps.iter().max_by_key(|dump| dump.applied) else { return Vec::new() };
    let logged: BTreeSet<&str> = dumps.iter().flat_map(Dump::logged).collect();
    let mut open: BTreeMap<u64, &Event> = BTreeMap::new();
    for event in events {
        match event.kind {
            Kind::Invoke => drop(open.insert(event.process, event)),
            Kind::Ok | Kind::Fail => drop(open.remove(&event.process)),
            Kind::Info => {}
        }
    }
    let unknown = open.into_values().filter(|event| !event.req.is_empty());
    let resolved = unknown.filter_map(|event| {
        let outcome = match newest.requests.get(&event.req) {
            Some(outcome) => outcome.clone(),
            None if logged.contains(event.req.as_str()) => return None,
            None => Outcome::Refused("it is in no log".into()),
        };
        Some(Resolved { process: event.process, start: event.time, request: event.req.clone(), outcome })
    });
    resolved.collect()
}

/// What is answered with the index of the entry that did it, and with nothing else that a client could not know.
fn of_tags(f: Function) -> bool {
    matches!(f, Function::Write | Function::Cas | Function::Add)
}

/// The operations with what is known by now of those on tags. When an unknown one was done stays open: at any time after it was asked
/// for.
pub fn with_resolved(operations: &[Operation], resolved: &[Resolved]) -> Vec<Operation> {
    let known: BTreeMap<(u64, u64), &Outcome> =
        resolved.iter().map(|resolved| ((resolved.process, resolved.start), &resolved.outcome)).collect();
    let settle = |operation: &Operation| {
        if !of_tags(operation.f) {
            return operation.clone();
        }
        let mut operation = operation.clone();
        match known.get(&(operation.process, operation.start)) {
            Some(Outcome::Done(rev)) if operation.outcome == Kind::Info => {
                operation.outcome = Kind::Ok;
                operation.rev = *rev;
            }
            Some(Outcome::Refused(_)) if operation.outcome == Kind::Info => operation.outcome = Kind::Fail,
            _ => {}
        }
        operation
    };
    operations.iter().map(settle).collect()
}

#[cfg(test)]
mod tests;
