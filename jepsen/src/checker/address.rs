//! An address has one owner: MAC and IP, in what the cloud lists at any index, and on the hosts.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Finding;
use crate::{
    effect::{self, Effect},
    history::{Function, Kind, Operation},
};

/// Between which log indexes a machine was seen to hold an address.
struct Held<'a> {
    vm: &'a str,
    from: u64,
    to: u64,
}

pub fn check(operations: &[Operation], effects: &[Effect]) -> Finding {
    let mut addresses: BTreeMap<String, Vec<Held>> = BTreeMap::new();
    let mut owns: BTreeMap<&str, (&Value, &Value)> = BTreeMap::new();
    let mut exclusive = Vec::new();
    for list in operations.iter().filter(|o| o.f == Function::Machines && o.outcome == Kind::Ok) {
        let index = list.rev.unwrap_or(0);
        for row in list.answered.as_array().into_iter().flatten() {
            let vm = row["id"].as_str().unwrap_or_default();
            let (mac, ip) = *owns.entry(vm).or_insert((&row["mac"], &row["ip"]));
            if (mac, ip) != (&row["mac"], &row["ip"]) {
                return Finding::Broken(format!("address: {vm} had {mac} {ip}, then {} {}", row["mac"], row["ip"]));
            }
            if row["recovery"] == "exclusive" {
                exclusive.push(vm);
            }
            for address in [mac.to_string(), format!("{ip} in {}", row["network"])] {
                hold(addresses.entry(address).or_default(), vm, index);
            }
        }
    }
    for (address, held) in &mut addresses {
        held.sort_by_key(|held| held.from);
        if let Some(two) = held.windows(2).find(|two| two[1].from <= two[0].to) {
            return Finding::Broken(format!(
                "address: {address} was {}'s at index {} and {}'s at index {}",
                two[1].vm, two[1].from, two[0].vm, two[0].to
            ));
        }
    }
    if owns.is_empty() {
        return Finding::Undecided("address: no machine was ever listed".into());
    }
    on_hosts(&owns, &exclusive, effects)
}

fn hold<'a>(held: &mut Vec<Held<'a>>, vm: &'a str, index: u64) {
    match held.iter_mut().find(|held| held.vm == vm) {
        Some(held) => (held.from, held.to) = (held.from.min(index), held.to.max(index)),
        None => held.push(Held { vm, from: index, to: index }),
    }
}

/// While an exclusive machine runs, no other one runs with its IP. (A stale copy of another may still run on a host that
/// is cut off; its address answers to nobody there.)
fn on_hosts(owns: &BTreeMap<&str, (&Value, &Value)>, exclusive: &[&str], effects: &[Effect]) -> Finding {
    let mut by_ip: BTreeMap<String, Vec<effect::Span>> = BTreeMap::new();
    for span in effect::spans(effects).into_iter().filter(|span| exclusive.contains(&span.vm.as_str())) {
        if let Some((_, ip)) = owns.get(span.vm.as_str()) {
            by_ip.entry(ip.to_string()).or_default().push(span);
        }
    }
    for (ip, spans) in &by_ip {
        if let Some(two) = spans.windows(2).find(|two| two[0].vm != two[1].vm && two[1].from < two[0].to) {
            return Finding::Broken(format!(
                "address: {} began on {} with {ip} while {} still had it on {}",
                two[1].vm, two[1].host, two[0].vm, two[0].host
            ));
        }
    }
    Finding::Holds
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checker::trial;

    fn list(index: u64, rows: &[(&str, &str, &str)]) -> Operation {
        let row = |(id, mac, ip): &(&str, &str, &str)| json!({"id": id, "mac": mac, "ip": ip, "network": "blue", "recovery": "exclusive"});
        let rows = rows.iter().map(row).collect();
        Operation { rev: Some(index), ..trial::operation(Function::Machines, "", rows, Kind::Ok, index, index + 1) }
    }

    fn effect(time: u64, vm: &str, kind: effect::Kind) -> Effect {
        Effect { time, host: format!("of-{vm}"), vm: vm.into(), epoch: 1, kind, macs: Vec::new() }
    }

    #[test]
    fn an_address_that_passes_on_holds() {
        let history = [list(1, &[("vm-1", "a", "1")]), list(9, &[("vm-2", "b", "1")])];
        let effects = [
            effect(1, "vm-1", effect::Kind::Start),
            effect(5, "vm-1", effect::Kind::Stop),
            effect(5, "vm-2", effect::Kind::Start),
        ];
        assert_eq!(check(&history, &effects), Finding::Holds);
    }

    #[test]
    fn two_owners_are_broken_in_one_list_or_in_two() {
        let one = [list(1, &[("vm-1", "a", "1"), ("vm-2", "b", "1")])];
        assert!(matches!(check(&one, &[]), Finding::Broken(_)));
        let macs = [list(1, &[("vm-1", "a", "1"), ("vm-2", "a", "2")])];
        assert!(matches!(check(&macs, &[]), Finding::Broken(_)));
        let back = [list(1, &[("vm-1", "a", "1")]), list(5, &[("vm-2", "b", "1")]), list(9, &[("vm-1", "a", "1")])];
        assert!(matches!(check(&back, &[]), Finding::Broken(_)), "vm-1 held it all the while");
        let changed = [list(1, &[("vm-1", "a", "1")]), list(5, &[("vm-1", "a", "2")])];
        assert!(matches!(check(&changed, &[]), Finding::Broken(_)));
    }

    #[test]
    fn an_address_that_is_freed_too_early_is_broken_on_the_hosts() {
        let history = [list(1, &[("vm-1", "a", "1")]), list(9, &[("vm-2", "b", "1")])];
        let effects = [effect(1, "vm-1", effect::Kind::Start), effect(5, "vm-2", effect::Kind::Start)];
        assert!(matches!(check(&history, &effects), Finding::Broken(_)));
    }

    #[test]
    fn without_a_list_nothing_is_decided() {
        assert!(matches!(check(&[], &[]), Finding::Undecided(_)));
    }
}
