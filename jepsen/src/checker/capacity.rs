//! No host has promised more than it has, no tenant has more than it may, in any answer; and all is given back at the
//! end.

use std::collections::BTreeMap;

use serde_json::Value;

use super::Finding;
use crate::history::{Function, Kind, Operation};

/// What may be promised of a host, in thousandths of what it has: the settings of a new cloud.
const PROMISED_PERMILLE: [(&str, u64); 3] = [("vcpus", 4000), ("memory", 1000), ("disk", 2000)];

/// `full`, `empty`: what each controller said of hosts and quota at the end, at rest and after everything was deleted.
pub fn check(operations: &[Operation], full: &[(&str, &Value)], empty: &[(&str, &Value)]) -> Finding {
    let answers = |f| operations.iter().filter(move |o: &&Operation| o.f == f && o.outcome == Kind::Ok);
    if [Function::Machines, Function::Nodes, Function::Quota].iter().any(|f| answers(*f).next().is_none()) {
        return Finding::Undecided("capacity: machines, hosts or the quota were never listed".into());
    }
    if full.is_empty() || empty.is_empty() {
        return Finding::Undecided("capacity: nobody said at the end what is promised".into());
    }
    let mut sizes: BTreeMap<&str, &Value> = BTreeMap::new();
    for node in answers(Function::Nodes).flat_map(|o| rows(&o.answered)) {
        sizes.insert(node["name"].as_str().unwrap_or_default(), node);
        if let Some(over) = over(node, |what| number(&node["reserved"][what])) {
            return over;
        }
    }
    for list in answers(Function::Machines) {
        for (name, node) in &sizes {
            let here = || rows(&list.answered).filter(|row| row["node"].as_str() == Some(name));
            if let Some(over) = over(node, |what| here().map(|row| number(&row[what])).sum()) {
                return over;
            }
        }
    }
    for quota in answers(Function::Quota) {
        let (used, limit) = (number(&quota.answered["used"]), number(&quota.answered["limit"]));
        if used > limit {
            return Finding::Broken(format!("capacity: the tenant had {used} machines, {limit} are allowed"));
        }
    }
    full.iter().map(balanced).chain(empty.iter().map(given_back)).fold(Finding::Holds, Finding::and)
}

fn over(node: &Value, used: impl Fn(&str) -> u64) -> Option<Finding> {
    PROMISED_PERMILLE.iter().find_map(|(what, permille)| {
        let (used, most) = (used(what), number(&node[*what]) * permille / 1000);
        let broken = || Finding::Broken(format!("capacity: {} promised {used} {what} of {most}", node["name"]));
        (used > most).then(broken)
    })
}

/// What is promised is what the listed machines have.
fn balanced((controller, said): &(&str, &Value)) -> Finding {
    for node in rows(&said["nodes"]) {
        let here = rows(&said["machines"]).filter(|row| row["node"] == node["name"]);
        let (sum, reserved) =
            (here.map(|row| number(&row["memory"])).sum::<u64>(), number(&node["reserved"]["memory"]));
        if sum != reserved {
            return Finding::Broken(format!(
                "capacity: {controller} says that {} has promised {reserved} bytes, and lists machines with {sum}",
                node["name"]
            ));
        }
    }
    let (listed, used) = (rows(&said["machines"]).count() as u64, number(&said["quota"]["used"]));
    if listed != used {
        return Finding::Broken(format!("capacity: {controller} counts {used} machines, and lists {listed}"));
    }
    Finding::Holds
}

fn given_back((controller, said): &(&str, &Value)) -> Finding {
    let left: Vec<&Value> = rows(&said["nodes"]).filter(|node| number(&node["reserved"]["memory"]) > 0).collect();
    let used = number(&said["quota"]["used"]);
    if left.is_empty() && used == 0 {
        return Finding::Holds;
    }
    Finding::Broken(format!("capacity: every machine is gone, and {controller} still counts {used}: {left:?}"))
}

fn rows(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checker::trial;

    fn node(reserved: u64) -> Value {
        let reserved = json!({"vcpus": 1, "memory": reserved, "disk": 0});
        json!({"name": "host-1", "vcpus": 1, "memory": 100, "disk": 10, "reserved": reserved})
    }

    fn machine(memory: u64) -> Value {
        json!({"id": "vm-1", "node": "host-1", "memory": memory, "vcpus": 1, "disk": 1})
    }

    fn history(reserved: u64, machines: Value, used: u64) -> Vec<Operation> {
        let ok = |f, value| trial::operation(f, "", value, Kind::Ok, 0, 1);
        vec![
            ok(Function::Nodes, json!([node(reserved)])),
            ok(Function::Machines, machines),
            ok(Function::Quota, json!({"used": used, "limit": 2})),
        ]
    }

    fn verdict(history: &[Operation], full: &Value, empty: &Value) -> Finding {
        check(history, &[("controller-1", full)], &[("controller-1", empty)])
    }

    #[test]
    fn a_full_host_and_a_full_quota_hold() {
        let full = json!({"nodes": [node(100)], "machines": [machine(100)], "quota": {"used": 1}});
        let empty = json!({"nodes": [node(0)], "quota": {"used": 0}});
        assert_eq!(verdict(&history(100, json!([machine(50), machine(50)]), 2), &full, &empty), Finding::Holds);
    }

    #[test]
    fn more_than_there_is_is_broken() {
        let full = json!({"nodes": [], "machines": [], "quota": {"used": 0}});
        let broken = |history: &[Operation]| matches!(verdict(history, &full, &full), Finding::Broken(_));
        assert!(broken(&history(101, json!([]), 0)), "promised");
        assert!(broken(&history(0, json!([machine(60), machine(60)]), 0)), "placed");
        assert!(broken(&history(0, json!([]), 3)), "quota");
    }

    #[test]
    fn what_is_not_given_back_or_not_counted_is_broken() {
        let run = history(0, json!([]), 0);
        let balanced = json!({"nodes": [node(0)], "machines": [], "quota": {"used": 0}});
        let leak = json!({"nodes": [node(5)], "machines": [], "quota": {"used": 0}});
        assert!(matches!(verdict(&run, &leak, &balanced), Finding::Broken(_)));
        assert!(matches!(verdict(&run, &balanced, &leak), Finding::Broken(_)));
        let miscounted = json!({"nodes": [], "machines": [], "quota": {"used": 1}});
        assert!(matches!(verdict(&run, &miscounted, &balanced), Finding::Broken(_)));
    }

    #[test]
    fn without_final_answers_nothing_is_decided() {
        assert!(matches!(check(&history(0, json!([]), 0), &[], &[]), Finding::Undecided(_)));
        let said = json!({});
        assert!(matches!(verdict(&[], &said, &said), Finding::Undecided(_)));
    }
}
