//! A second, linear opinion on registers: the log index in each answer must move forwards in real time.
//!
//! It believes the indexes that the cloud tells, which the search in `register` does not need; two checkers that can
//! be wrong in different ways.

use std::collections::HashMap;

use serde_json::Value;

use super::Finding;
use crate::history::{Function, Kind, Operation};

/// Checks that an index stands for one value, and that nobody saw an index older than one that had been acknowledged
/// before they asked.
pub fn check(operations: &[Operation]) -> Finding {
    let mut by_key: HashMap<&str, Vec<&Operation>> = HashMap::new();
    for operation in operations {
        let register = matches!(operation.f, Function::Read | Function::Write | Function::Cas);
        if register && operation.outcome == Kind::Ok && operation.rev.is_some() {
            by_key.entry(&operation.key).or_default().push(operation);
        }
    }
    let mut keys: Vec<_> = by_key.into_iter().collect();
    keys.sort_by_key(|(key, _)| *key);
    keys.into_iter().fold(Finding::Holds, |finding, (key, operations)| finding.and(check_key(key, &operations)))
}

fn content(operation: &Operation) -> &Value {
    match operation.f {
        Function::Read => &operation.answered,
        Function::Cas => &operation.asked[1],
        _ => &operation.asked,
    }
}

fn check_key(key: &str, operations: &[&Operation]) -> Finding {
    let mut values: HashMap<u64, &Value> = HashMap::new();
    for operation in operations {
        let rev = operation.rev.unwrap_or(0);
        let value = content(operation);
        if *values.entry(rev).or_insert(value) != value {
            return Finding::Broken(format!("key '{key}': index {rev} stands for two values"));
        }
    }
    let mut by_end: Vec<&&Operation> = operations.iter().collect();
    by_end.sort_by_key(|operation| operation.end);
    let mut ended = by_end.into_iter().peekable();
    let mut newest = 0;
    for operation in operations {
        while let Some(earlier) = ended.next_if(|earlier| earlier.end < operation.start) {
            newest = newest.max(earlier.rev.unwrap_or(0));
        }
        let rev = operation.rev.unwrap_or(0);
        let forwards = if operation.f == Function::Read { rev >= newest } else { rev > newest };
        if !forwards {
            return Finding::Broken(format!(
                "key '{key}': process {} was answered from index {rev} after index {newest} had been acknowledged",
                operation.process
            ));
        }
    }
    Finding::Holds
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn operation(f: Function, value: Value, rev: u64, start: u64, end: u64) -> Operation {
        Operation {
            process: start,
            f,
            key: "k".into(),
            asked: value.clone(),
            answered: value,
            outcome: Kind::Ok,
            start,
            end,
            node: String::new(),
            req: String::new(),
            rev: Some(rev),
            error: String::new(),
        }
    }

    #[test]
    fn an_order_that_agrees_with_time_holds() {
        let history = [
            operation(Function::Write, json!("a"), 5, 0, 10),
            operation(Function::Read, json!("a"), 5, 5, 20),
            operation(Function::Write, json!("b"), 9, 12, 30),
            operation(Function::Read, json!("a"), 5, 15, 40),
        ];
        assert_eq!(check(&history), Finding::Holds);
    }

    #[test]
    fn a_stale_read_is_broken() {
        let history = [
            operation(Function::Write, json!("a"), 5, 0, 10),
            operation(Function::Write, json!("b"), 9, 11, 20),
            operation(Function::Read, json!("a"), 5, 21, 30),
        ];
        assert!(matches!(check(&history), Finding::Broken(_)));
    }

    #[test]
    fn one_index_with_two_values_is_broken() {
        let history =
            [operation(Function::Write, json!("a"), 5, 0, 10), operation(Function::Read, json!("b"), 5, 0, 10)];
        assert!(matches!(check(&history), Finding::Broken(_)));
    }

    #[test]
    fn a_write_that_was_answered_with_an_old_index_is_broken() {
        let history =
            [operation(Function::Write, json!("a"), 5, 0, 10), operation(Function::Write, json!("b"), 4, 11, 20)];
        assert!(matches!(check(&history), Finding::Broken(_)));
    }
}
