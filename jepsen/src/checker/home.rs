//! A machine that must not run twice runs on one host at any instant, and no older placement of it runs after a newer
//! one: the leases of hosts, taken as locks. Tolerance: none, since one clock orders everything.

use std::collections::{BTreeMap, BTreeSet};

use super::Finding;
use crate::{
    effect::{self, Effect},
    history::{Function, Kind, Operation},
};

/// No two spans of an exclusive machine overlap.
pub fn single(operations: &[Operation], effects: &[Effect]) -> Finding {
    let exclusive = exclusive(operations);
    let mut spans = effect::spans(effects);
    spans.retain(|span| exclusive.contains(span.vm.as_str()));
    if spans.is_empty() {
        return Finding::Undecided("home: no exclusive machine was ever seen to run".into());
    }
    let mut last: BTreeMap<&str, &effect::Span> = BTreeMap::new();
    for span in &spans {
        if let Some(earlier) = last.get(span.vm.as_str())
            && span.from < earlier.to
        {
            return Finding::Broken(format!(
                "home: {} began to run on {} (placement {}) at {} ns while it ran on {} (placement {}) until {} ns",
                span.vm, span.host, span.epoch, span.from, earlier.host, earlier.epoch, earlier.to
            ));
        }
        last.insert(&span.vm, span);
    }
    Finding::Holds
}

/// On one host no placement runs after a newer one; of an exclusive machine none runs anywhere, once anybody has seen
/// a newer one.
pub fn fenced(operations: &[Operation], effects: &[Effect]) -> Finding {
    let exclusive = exclusive(operations);
    let mut seen: Vec<(u64, &str, u64)> =
        rows(operations).map(|(o, row)| (o.end, text(row, "id"), epoch(row))).collect();
    seen.sort_unstable();
    let mut seen = seen.into_iter().peekable();
    let mut granted: BTreeMap<&str, u64> = BTreeMap::new();
    let mut here: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for effect in effects.iter().filter(|effect| effect.begins()) {
        while let Some((_, vm, epoch)) = seen.next_if(|(end, _, _)| *end < effect.time) {
            let newest = granted.entry(vm).or_default();
            *newest = epoch.max(*newest);
        }
        let newest = here.entry((&effect.host, &effect.vm)).or_default();
        if effect.epoch < *newest {
            return Finding::Broken(format!(
                "home: on {} placement {} of {} ran after placement {newest}",
                effect.host, effect.epoch, effect.vm
            ));
        }
        *newest = effect.epoch;
        let newest = granted.get(effect.vm.as_str()).copied().unwrap_or(0);
        if exclusive.contains(effect.vm.as_str()) && effect.epoch < newest {
            return Finding::Broken(format!(
                "home: placement {} of {} began to run on {} at {} ns, after placement {newest} had been granted",
                effect.epoch, effect.vm, effect.host, effect.time
            ));
        }
    }
    if here.is_empty() {
        return Finding::Undecided("home: no machine was ever started".into());
    }
    Finding::Holds
}

/// Exclusive machines that ran on more than one host: what these promises are worth.
pub fn moved(operations: &[Operation], effects: &[Effect]) -> usize {
    let exclusive = exclusive(operations);
    let mut hosts: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for effect in effects.iter().filter(|effect| effect.begins() && exclusive.contains(effect.vm.as_str())) {
        hosts.entry(&effect.vm).or_default().insert(&effect.host);
    }
    hosts.values().filter(|hosts| hosts.len() > 1).count()
}

/// Machines that must not run twice, as they were listed.
pub fn exclusive(operations: &[Operation]) -> BTreeSet<&str> {
    rows(operations).filter(|(_, row)| text(row, "recovery") == "exclusive").map(|(_, row)| text(row, "id")).collect()
}

fn rows(operations: &[Operation]) -> impl Iterator<Item = (&Operation, &serde_json::Value)> {
    let lists = operations.iter().filter(|o| o.f == Function::Machines && o.outcome == Kind::Ok);
    lists.flat_map(|o| o.answered.as_array().into_iter().flatten().map(move |row| (o, row)))
}

fn text<'a>(row: &'a serde_json::Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_default()
}

fn epoch(row: &serde_json::Value) -> u64 {
    row["epoch"].as_u64().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{checker::trial, effect};

    fn effect(time: u64, host: &str, epoch: u64, kind: effect::Kind) -> Effect {
        Effect { time, host: host.into(), vm: "vm-1".into(), epoch, kind, macs: Vec::new() }
    }

    fn seen(end: u64, epoch: u64, recovery: &str) -> Operation {
        let row = json!([{"id": "vm-1", "epoch": epoch, "recovery": recovery}]);
        trial::operation(Function::Machines, "machines", row, Kind::Ok, 0, end)
    }

    use effect::Kind::{Pause, Power, Start, Stop};

    #[test]
    fn one_host_after_the_other_holds() {
        let history = [seen(5, 10, "exclusive"), seen(40, 20, "exclusive")];
        let effects = [effect(1, "a", 10, Start), effect(20, "a", 10, Pause), effect(20, "b", 20, Start)];
        assert_eq!(single(&history, &effects), Finding::Holds);
        assert_eq!(fenced(&history, &effects), Finding::Holds);
        assert_eq!(moved(&history, &effects), 1);
        // A host without power runs nothing.
        let effects = [effect(1, "a", 10, Start), effect(20, "a", 0, Power), effect(21, "b", 20, Start)];
        assert_eq!(single(&history, &effects), Finding::Holds);
    }

    #[test]
    fn an_instant_on_two_hosts_is_broken_if_the_machine_is_exclusive() {
        let effects = [effect(1, "a", 10, Start), effect(20, "b", 20, Start), effect(21, "a", 10, Stop)];
        assert!(matches!(single(&[seen(5, 10, "exclusive")], &effects), Finding::Broken(_)));
        let one = [seen(5, 10, "exclusive"), seen(6, 10, "available")];
        assert!(matches!(single(&one, &effects), Finding::Broken(_)), "it was exclusive at some time");
        assert!(matches!(single(&[seen(5, 10, "available")], &effects), Finding::Undecided(_)));
    }

    #[test]
    fn an_older_placement_after_a_newer_is_broken() {
        let back = [effect(1, "a", 20, Start), effect(2, "a", 20, Stop), effect(3, "a", 10, Start)];
        assert!(matches!(fenced(&[seen(5, 10, "available")], &back), Finding::Broken(_)));
        // Elsewhere a newer one was granted, and somebody was told of it before.
        let history = [seen(5, 10, "exclusive"), seen(30, 20, "exclusive")];
        let late = [effect(31, "a", 10, Start)];
        assert!(matches!(fenced(&history, &late), Finding::Broken(_)));
        let meanwhile = [effect(29, "a", 10, Start)];
        assert_eq!(fenced(&history, &meanwhile), Finding::Holds, "nobody knew yet");
        assert!(matches!(fenced(&history, &[]), Finding::Undecided(_)));
    }
}
