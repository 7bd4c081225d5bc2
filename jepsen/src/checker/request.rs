//! One request is carried out once, however often it is sent: its retries get its first answer, and another request
//! under its id is refused.

use std::collections::{BTreeMap, BTreeSet};

use super::Finding;
use crate::history::{Function, Kind, Operation};

/// What a controller says that did not look at the request: it tells nothing about it.
const NOT_LOOKED_AT: &[&str] = &["no-quorum", "overloaded", "unavailable"];

pub fn check(operations: &[Operation]) -> Finding {
    let mut requests: BTreeMap<&str, Vec<&Operation>> = BTreeMap::new();
    for operation in operations.iter().filter(|o| !o.req.is_empty()) {
        requests.entry(&operation.req).or_default().push(operation);
    }
    let retried = requests.values().filter(|attempts| attempts.len() > 1).count();
    let each = requests.iter().map(|(req, attempts)| one(req, attempts));
    let finding = each.fold(count(operations), Finding::and);
    match finding {
        Finding::Holds if retried == 0 => Finding::Undecided("request: none was ever sent twice".into()),
        finding => finding,
    }
}

/// `attempts`: in order of their beginnings.
fn one(req: &str, attempts: &[&Operation]) -> Finding {
    let broken = |how: String| Finding::Broken(format!("request {req}: {how}"));
    let done: Vec<&&Operation> = attempts.iter().filter(|o| o.outcome == Kind::Ok).collect();
    if let Some(first) = done.first() {
        for other in &done {
            if !same(first, other) {
                return broken(format!("'{}' was done under the id of '{}'", other.key, first.key));
            }
            if first.answered != other.answered {
                return broken(format!("it was answered {}, then {}", first.answered, other.answered));
            }
        }
    }
    for refused in attempts.iter().filter(|o| o.outcome == Kind::Fail && !NOT_LOOKED_AT.contains(&o.code())) {
        let before = attempts.iter().filter(|o| o.end < refused.start);
        for earlier in before.filter(|o| o.outcome == Kind::Ok) {
            let reused = !same(earlier, refused);
            // What was made by it may have been deleted since.
            let gone = !reused && refused.code() == "not-found";
            if !gone && reused != (refused.code() == "request-reused") {
                return broken(format!("'{}' had been done, then: {}", earlier.key, refused.error));
            }
        }
        if refused.f == Function::Create && refused.code() == "already-exists" {
            return broken(format!("its name '{}' is nobody else's, and it was told: {}", refused.key, refused.error));
        }
        // Refusals are remembered too; what is not there when it is named is not.
        let later = |o: &&&&Operation| refused.end < o.start && same(o, refused);
        if refused.code() != "not-found" && done.iter().any(|o| later(&o)) {
            return broken(format!("it was refused ({}), then done", refused.error));
        }
    }
    Finding::Holds
}

fn same(a: &Operation, b: &Operation) -> bool {
    (a.f, &a.key, &a.asked) == (b.f, &b.key, &b.asked)
}

/// Ids are minted from one counter, one a machine that was made: there are as many as requests that may have made one.
fn count(operations: &[Operation]) -> Finding {
    let creates = || operations.iter().filter(|o| o.f == Function::Create);
    let done: BTreeSet<&str> = creates().filter(|o| o.outcome == Kind::Ok).map(|o| o.req.as_str()).collect();
    let unknown = creates().filter(|o| o.outcome == Kind::Info && !done.contains(o.req.as_str()));
    let unknown: BTreeSet<&str> = unknown.map(|o| o.req.as_str()).collect();
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    let mut made = 0;
    let lists = operations.iter().filter(|o| o.f == Function::Machines && o.outcome == Kind::Ok);
    for row in lists.flat_map(|o| o.answered.as_array().into_iter().flatten()) {
        let (id, name) = (row["id"].as_str().unwrap_or_default(), row["name"].as_str().unwrap_or_default());
        made = made.max(number(id));
        if *names.entry(name).or_insert(id) != id {
            return Finding::Broken(format!("request: '{name}' was made twice, as {} and {id}", names[name]));
        }
    }
    made = made.max(creates().map(|o| number(o.answered["id"].as_str().unwrap_or_default())).max().unwrap_or(0));
    let most = (done.len() + unknown.len()) as u64;
    if made > most || (made < done.len() as u64) {
        return Finding::Broken(format!(
            "request: {made} machines were made for {} requests that were done and {} that may have been",
            done.len(),
            unknown.len()
        ));
    }
    Finding::Holds
}

fn number(id: &str) -> u64 {
    id.strip_prefix("vm-").and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checker::trial;

    fn create(req: &str, name: &str, outcome: Kind, at: u64, told: &str) -> Operation {
        let mut operation = trial::operation(Function::Create, name, json!("exclusive"), outcome, at, at + 5);
        operation.req = req.into();
        if outcome == Kind::Info {
            operation.end = u64::MAX;
        }
        match outcome {
            Kind::Ok => operation.answered = json!({"id": told}),
            _ => operation.error = told.into(),
        }
        operation
    }

    #[test]
    fn retries_that_get_the_first_answer_hold() {
        let history = [
            create("r", "a", Kind::Info, 0, "no answer in time"),
            create("r", "a", Kind::Ok, 10, "vm-1"),
            create("r", "a", Kind::Fail, 20, "no-quorum: none"),
            create("r", "a", Kind::Ok, 30, "vm-1"),
            create("r", "b", Kind::Fail, 40, "request-reused: another body"),
            create("s", "c", Kind::Fail, 50, "quota-exceeded: full"),
            create("s", "c", Kind::Fail, 60, "quota-exceeded: full"),
            create("t", "d", Kind::Info, 70, "no answer in time"),
        ];
        assert_eq!(check(&history), Finding::Holds);
    }

    #[test]
    fn a_request_that_is_done_twice_is_broken() {
        let twice = [create("r", "a", Kind::Ok, 0, "vm-1"), create("r", "a", Kind::Ok, 10, "vm-2")];
        assert!(matches!(check(&twice), Finding::Broken(_)));
        let told = [create("r", "a", Kind::Info, 0, ""), create("r", "a", Kind::Fail, 10, "already-exists: a")];
        assert!(matches!(check(&told), Finding::Broken(_)));
        let one_too_many = [create("r", "a", Kind::Ok, 0, "vm-1"), create("s", "b", Kind::Ok, 10, "vm-3")];
        assert!(matches!(check(&one_too_many), Finding::Broken(_)));
    }

    #[test]
    fn another_body_under_the_same_id_is_refused_as_such() {
        let done = [create("r", "a", Kind::Ok, 0, "vm-1"), create("r", "b", Kind::Ok, 10, "vm-1")];
        assert!(matches!(check(&done), Finding::Broken(_)));
        let refused = [create("r", "a", Kind::Ok, 0, "vm-1"), create("r", "b", Kind::Fail, 10, "quota-exceeded: x")];
        assert!(matches!(check(&refused), Finding::Broken(_)));
    }

    #[test]
    fn a_refusal_that_comes_true_later_is_broken() {
        let history = [create("r", "a", Kind::Fail, 0, "quota-exceeded: full"), create("r", "a", Kind::Ok, 10, "vm-1")];
        assert!(matches!(check(&history), Finding::Broken(_)));
    }

    #[test]
    fn without_a_retry_nothing_is_decided() {
        assert!(matches!(check(&[create("r", "a", Kind::Ok, 0, "vm-1")]), Finding::Undecided(_)));
    }
}
