//! After calm every machine rests: what was asked for is so, what was deleted is gone, and every controller says so.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Finding;
use crate::history::{Function, Kind, Operation};

/// `finals`: the machines that each controller listed when nothing was left to wait for.
pub fn check(operations: &[Operation], finals: &[(&str, &Value)]) -> Finding {
    if finals.is_empty() {
        return Finding::Undecided("rest: no controller listed the machines at the end".into());
    }
    let wishes = wishes(operations);
    for (controller, rows) in finals {
        let rows = rows.as_array().into_iter().flatten();
        let rows: BTreeMap<&str, &Value> = rows.map(|row| (row["name"].as_str().unwrap_or_default(), row)).collect();
        for (name, row) in &rows {
            let Some(status) = rests_as(row) else {
                return Finding::Broken(format!("rest: {controller} still lists '{name}' as {}", row["status"]));
            };
            match wishes.get(name) {
                None => return Finding::Broken(format!("rest: {controller} lists '{name}', which nobody asked for")),
                Some(possible) if !possible.contains(status) => {
                    return Finding::Broken(format!(
                        "rest: {controller} lists '{name}' as {status}, but it should be {possible:?}"
                    ));
                }
                Some(_) => {}
            }
        }
        let missing = wishes.iter().find(|(name, wish)| !wish.contains("gone") && !rows.contains_key(*name));
        if let Some((name, _)) = missing {
            return Finding::Broken(format!("rest: {controller} does not list '{name}', which was acknowledged"));
        }
    }
    Finding::Holds
}

/// What each machine may be at the end, by its last request that was done and those after it whose end nobody knows.
/// Its owner asks for one thing at a time.
fn wishes(operations: &[Operation]) -> BTreeMap<&str, BTreeSet<&str>> {
    let done: BTreeSet<&str> =
        operations.iter().filter(|o| o.outcome == Kind::Ok).map(|o| o.req.as_str()).filter(|r| !r.is_empty()).collect();
    let mut wishes: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for operation in operations {
        let wish = match operation.f {
            Function::Create => "running",
            Function::Power => operation.asked.as_str().unwrap_or_default(),
            Function::Delete => "gone",
            _ => continue,
        };
        let first = if operation.f == Function::Create { Some("gone") } else { None };
        match operation.outcome {
            Kind::Ok => drop(wishes.insert(&operation.key, BTreeSet::from([wish]))),
            // A retry tells what became of it.
            Kind::Info if done.contains(operation.req.as_str()) => {}
            Kind::Info => wishes.entry(&operation.key).or_default().extend(first.into_iter().chain([wish])),
            Kind::Fail | Kind::Invoke => {}
        }
    }
    wishes
}

/// What a machine has come to, or waits to be for as long as it may: one that must not run twice is started on no host
/// whose clock the leader cannot vouch for, and after its own was wrong that is every host, for some ten minutes (ADR 0027).
pub fn rests_as(row: &Value) -> Option<&str> {
    let no_clock = row["reason"].as_str().is_some_and(|reason| reason.ends_with("its clock drifts"));
    match row["status"].as_str()? {
        status @ ("running" | "stopped") => Some(status),
        "pending" if no_clock && row["recovery"] == "exclusive" => Some("running"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checker::trial;

    fn asked(f: Function, wish: &str, outcome: Kind, at: u64) -> Operation {
        Operation { req: format!("r{at}"), ..trial::operation(f, "a", json!(wish), outcome, at, at + 1) }
    }

    fn verdict(history: &[Operation], rows: &[(&str, &str)]) -> Finding {
        let rows: Value = rows.iter().map(|(name, status)| json!({"name": name, "status": status})).collect();
        check(history, &[("controller-1", &rows)])
    }

    #[test]
    fn what_was_asked_for_last_holds() {
        let made = asked(Function::Create, "exclusive", Kind::Ok, 0);
        let stopped = asked(Function::Power, "stopped", Kind::Ok, 5);
        assert_eq!(verdict(std::slice::from_ref(&made), &[("a", "running")]), Finding::Holds);
        assert_eq!(verdict(&[made.clone(), stopped.clone()], &[("a", "stopped")]), Finding::Holds);
        assert_eq!(verdict(&[made, stopped, asked(Function::Delete, "", Kind::Ok, 9)], &[]), Finding::Holds);
    }

    #[test]
    fn only_an_exclusive_machine_may_wait_for_clocks() {
        let row = |recovery: &str, reason: &str| json!({"status": "pending", "recovery": recovery, "reason": reason});
        let drifts = "no node has room: 3 × its clock drifts";
        assert_eq!(rests_as(&row("exclusive", drifts)), Some("running"));
        assert_eq!(rests_as(&row("available", drifts)), None);
        assert_eq!(rests_as(&row("exclusive", "no node has room: 2 × its clock drifts, 1 × no memory")), None);
    }

    #[test]
    fn what_nobody_knows_may_be_either() {
        let history = [asked(Function::Create, "", Kind::Ok, 0), asked(Function::Delete, "", Kind::Info, 5)];
        assert_eq!(verdict(&history, &[]), Finding::Holds);
        assert_eq!(verdict(&history, &[("a", "running")]), Finding::Holds);
        assert!(matches!(verdict(&history, &[("a", "stopped")]), Finding::Broken(_)));
        let perhaps = [asked(Function::Create, "", Kind::Info, 0)];
        assert_eq!(verdict(&perhaps, &[]), Finding::Holds);
        assert_eq!(verdict(&perhaps, &[("a", "running")]), Finding::Holds);
    }

    #[test]
    fn lost_phantom_restless_and_resurrected_machines_are_broken() {
        let made = asked(Function::Create, "exclusive", Kind::Ok, 0);
        let gone = [made.clone(), asked(Function::Delete, "", Kind::Ok, 5)];
        assert!(matches!(verdict(std::slice::from_ref(&made), &[]), Finding::Broken(_)));
        assert!(matches!(verdict(std::slice::from_ref(&made), &[("a", "pending")]), Finding::Broken(_)));
        assert!(matches!(
            verdict(std::slice::from_ref(&made), &[("a", "running"), ("b", "running")]),
            Finding::Broken(_)
        ));
        assert!(matches!(verdict(&gone, &[("a", "running")]), Finding::Broken(_)));
        assert!(matches!(check(&gone, &[]), Finding::Undecided(_)));
    }
}
