//! An address has one owner: MAC, IP and VNI, in what the cloud lists at any index; the first two also on the hosts.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Finding;
use crate::{
    effect::{self, Effect},
    history::{Function, Kind, Operation},
};

/// Between which log indexes a machine or network was seen to hold an address.
struct Held<'a> {
    owner: &'a str,
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
    if owns.is_empty() {
        return Finding::Undecided("address: no machine was ever listed".into());
    }
    one_owner(&mut addresses).and(on_hosts(&owns, &exclusive, effects))
}

/// A network keeps its VNI, and no other one has it; and each is listed from its creation to its deletion, and no longer.
/// `last`: what each controller listed at the end.
pub fn vnis(operations: &[Operation], last: &[(&str, &Value)]) -> Finding {
    let mut has: BTreeMap<&str, &Value> = BTreeMap::new();
    let mut vnis: BTreeMap<String, Vec<Held>> = BTreeMap::new();
    let mut most = 0;
    let lists = || operations.iter().filter(|o| o.f == Function::Networks && o.outcome == Kind::Ok);
    let made = operations.iter().filter(|o| o.f == Function::CreateNetwork && o.outcome == Kind::Ok);
    let listed = lists().flat_map(|list| rows(&list.answered).map(move |row| (row, list.rev)));
    for (row, index) in listed.chain(made.map(|made| (&made.answered, None))) {
        let (id, vni) = (row["id"].as_str().unwrap_or_default(), &row["vni"]);
        let before = *has.entry(id).or_insert(vni);
        if before != vni {
            return Finding::Broken(format!("address: {id} had VNI {before}, then {vni}"));
        }
        if let Some(index) = index {
            hold(vnis.entry(format!("VNI {vni}")).or_default(), id, index);
        }
    }
    for list in lists() {
        most = most.max(rows(&list.answered).count());
        if let Some(how) = misses_or_invents(operations, list) {
            return Finding::Broken(how);
        }
    }
    if let Some((other, _)) = last.iter().find(|(_, said)| *said != last[0].1) {
        return Finding::Broken(format!("address: {} and {other} list different networks at the end", last[0].0));
    }
    if most < 2 || last.is_empty() {
        return Finding::Undecided("address: never were two networks listed at once".into());
    }
    one_owner(&mut vnis)
}

/// Names are used once.
fn misses_or_invents(operations: &[Operation], list: &Operation) -> Option<String> {
    let has = |name: &str| rows(&list.answered).any(|row| row["name"] == name);
    for made in operations.iter().filter(|o| o.f == Function::CreateNetwork && o.outcome == Kind::Ok) {
        let name = made.key.as_str();
        let deleted = || operations.iter().filter(|o| o.f == Function::DeleteNetwork && o.key == name);
        if made.end < list.start && !has(name) && !deleted().any(|o| o.start < list.end) {
            return Some(format!("address: network '{name}' was made and is not listed by {}", list.node));
        }
        if has(name) && deleted().any(|o| o.outcome == Kind::Ok && o.end < list.start) {
            return Some(format!("address: network '{name}' was deleted and is listed by {}", list.node));
        }
    }
    None
}

fn rows(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

/// No two have the same between any two indexes.
fn one_owner(addresses: &mut BTreeMap<String, Vec<Held<'_>>>) -> Finding {
    for (address, held) in addresses {
        held.sort_by_key(|held| held.from);
        if let Some(two) = held.windows(2).find(|two| two[1].from <= two[0].to) {
            return Finding::Broken(format!(
                "address: {address} was {}'s at index {} and {}'s at index {}",
                two[1].owner, two[1].from, two[0].owner, two[0].to
            ));
        }
    }
    Finding::Holds
}

fn hold<'a>(held: &mut Vec<Held<'a>>, owner: &'a str, index: u64) {
    match held.iter_mut().find(|held| held.owner == owner) {
        Some(held) => (held.from, held.to) = (held.from.min(index), held.to.max(index)),
        None => held.push(Held { owner, from: index, to: index }),
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

    fn networks(index: u64, rows: &[(&str, u64)]) -> Operation {
        let rows = rows.iter().map(|(id, vni)| json!({"id": id, "name": format!("of-{id}"), "vni": vni})).collect();
        Operation { rev: Some(index), ..trial::operation(Function::Networks, "", rows, Kind::Ok, index, index + 1) }
    }

    fn network(f: Function, id: &str, answer: Value, at: u64) -> Operation {
        Operation { key: format!("of-{id}"), ..trial::operation(f, "", answer, Kind::Ok, at, at + 1) }
    }

    #[test]
    fn a_vni_that_passes_on_holds_and_two_networks_with_one_are_broken() {
        let last = json!([]);
        let check = |history: &[Operation]| vnis(history, &[("a", &last), ("b", &last)]);
        let made = network(Function::CreateNetwork, "net-1", json!({"id": "net-1", "vni": 7}), 0);
        let gone = network(Function::DeleteNetwork, "net-1", json!({}), 5);
        let two = networks(2, &[("net-1", 7), ("net-2", 8)]);
        let good = [made.clone(), two.clone(), gone.clone(), networks(9, &[("net-3", 7), ("net-2", 8)])];
        assert_eq!(check(&good), Finding::Holds);
        assert!(matches!(vnis(&good, &[("a", &last), ("b", &json!([1]))]), Finding::Broken(_)));
        for bad in [
            vec![networks(2, &[("net-1", 7), ("net-2", 7)])],
            vec![two.clone(), networks(5, &[("net-3", 7)]), networks(9, &[("net-1", 7)])],
            vec![two.clone(), networks(5, &[("net-1", 9)])],
            vec![network(Function::CreateNetwork, "net-1", json!({"id": "net-1", "vni": 9}), 0), two.clone()],
            vec![made.clone(), two.clone(), networks(4, &[("net-2", 8)])],
            vec![made, two.clone(), gone, two.clone(), networks(9, &[("net-1", 7)])],
        ] {
            assert!(matches!(check(&bad), Finding::Broken(_)), "{bad:?}");
        }
        assert!(matches!(check(&[networks(2, &[("net-1", 7)])]), Finding::Undecided(_)), "one is no evidence");
        assert!(matches!(vnis(&[two], &[]), Finding::Undecided(_)), "nobody was asked at the end");
    }

    #[test]
    fn without_a_list_nothing_is_decided() {
        assert!(matches!(check(&[], &[]), Finding::Undecided(_)));
    }
}
