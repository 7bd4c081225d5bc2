//! What was acknowledged is there for ever; what is there was asked for.

use std::collections::BTreeSet;

use serde_json::Value;

use super::Finding;
use crate::history::{Function, Kind, Operation};

/// `finals`: what each controller listed after everything had been healed.
pub fn check(operations: &[Operation], finals: &[(String, BTreeSet<String>)]) -> Finding {
    if finals.is_empty() {
        return Finding::Undecided("set: no controller could list the elements at the end".into());
    }
    let with = |wanted: &[Kind]| -> BTreeSet<String> {
        operations
            .iter()
            .filter(|o| o.f == Function::Add && wanted.contains(&o.outcome))
            .map(|o| text(&o.asked))
            .collect()
    };
    let acknowledged = with(&[Kind::Ok]);
    let possible = with(&[Kind::Ok, Kind::Info]);
    for (controller, listed) in finals {
        if let Some(lost) = acknowledged.difference(listed).next() {
            let count = acknowledged.difference(listed).count();
            return Finding::Broken(format!(
                "set: {controller} does not list '{lost}', which was acknowledged ({count} such elements)"
            ));
        }
        if let Some(phantom) = listed.difference(&possible).next() {
            return Finding::Broken(format!(
                "set: {controller} lists '{phantom}', which nobody asked for or which was refused"
            ));
        }
    }
    lists_keep_what_was_acknowledged_before(operations)
}

/// A list that was read during the run has everything acknowledged before the reading began.
fn lists_keep_what_was_acknowledged_before(operations: &[Operation]) -> Finding {
    let mut added: Vec<(u64, String)> = operations
        .iter()
        .filter(|o| o.f == Function::Add && o.outcome == Kind::Ok)
        .map(|o| (o.end, text(&o.asked)))
        .collect();
    added.sort();
    for list in operations.iter().filter(|o| o.f == Function::List && o.outcome == Kind::Ok) {
        let listed: BTreeSet<String> = list.answered.as_array().into_iter().flatten().map(text).collect();
        let due = added.iter().take_while(|(end, _)| *end < list.start);
        if let Some((_, lost)) = due.into_iter().find(|(_, element)| !listed.contains(element)) {
            return Finding::Broken(format!(
                "set: a list does not have '{lost}', acknowledged before the list was asked for"
            ));
        }
    }
    Finding::Holds
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn add(element: &str, outcome: Kind) -> Operation {
        operation(Function::Add, json!(element), outcome, 0, 10)
    }

    fn operation(f: Function, value: Value, outcome: Kind, start: u64, end: u64) -> Operation {
        Operation {
            process: 0,
            f,
            key: "set".into(),
            asked: value.clone(),
            answered: value,
            outcome,
            start,
            end,
            node: String::new(),
            req: String::new(),
            rev: None,
            error: String::new(),
        }
    }

    fn listed(elements: &[&str]) -> Vec<(String, BTreeSet<String>)> {
        vec![("controller-1".into(), elements.iter().map(|e| (*e).to_owned()).collect())]
    }

    #[test]
    fn acknowledged_is_there_and_unknown_may_be() {
        let history = [add("a", Kind::Ok), add("b", Kind::Info), add("c", Kind::Info), add("d", Kind::Fail)];
        assert_eq!(check(&history, &listed(&["a", "b"])), Finding::Holds);
    }

    #[test]
    fn lost_phantom_and_refused_elements_are_broken() {
        let history = [add("a", Kind::Ok), add("d", Kind::Fail)];
        assert!(matches!(check(&history, &listed(&[])), Finding::Broken(_)));
        assert!(matches!(check(&history, &listed(&["a", "z"])), Finding::Broken(_)));
        assert!(matches!(check(&history, &listed(&["a", "d"])), Finding::Broken(_)));
    }

    #[test]
    fn a_list_that_misses_an_earlier_element_is_broken() {
        let list = operation(Function::List, json!(["b"]), Kind::Ok, 11, 20);
        let history = [add("a", Kind::Ok), add("b", Kind::Ok), list];
        assert!(matches!(check(&history, &listed(&["a", "b"])), Finding::Broken(_)));
    }

    #[test]
    fn without_a_final_list_nothing_is_decided() {
        assert!(matches!(check(&[add("a", Kind::Ok)], &[]), Finding::Undecided(_)));
    }
}
