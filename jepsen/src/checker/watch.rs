//! Watches: every change told once, in order, none missing, the same by every controller, and all that was acknowledged.
//!
//! Each operation is one message: `after` was asked for, `rev` is how far it told, its events lie between. What one
//! stream told of an index every other one that covers the index must have told.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Finding;
use crate::history::{Function, Kind, Operation};

/// A kind, an id, there or gone.
type Event<'a> = (&'a str, &'a str, bool);

/// What one message covers.
struct Told<'a> {
    process: u64,
    node: &'a str,
    after: u64,
    upto: u64,
    events: Vec<(u64, Event<'a>)>,
}

pub fn check(operations: &[Operation]) -> Finding {
    let answered = operations.iter().filter(|o| o.f == Function::Watch && o.outcome == Kind::Ok);
    let Some(told) = answered.map(read).collect::<Option<Vec<Told>>>() else {
        return Finding::Broken("watch: a message is not what it should be".into());
    };
    if !told.iter().any(|told| !told.events.is_empty()) {
        return Finding::Undecided("watch: nothing was ever told".into());
    }
    let mut all: BTreeMap<u64, BTreeSet<Event>> = BTreeMap::new();
    for message in &told {
        if let Err(how) = in_order(message) {
            return Finding::Broken(format!("watch: {} told process {} {how}", message.node, message.process));
        }
        for (index, event) in &message.events {
            all.entry(*index).or_default().insert(*event);
        }
    }
    for message in &told {
        if let Err(how) = whole(message, &all) {
            return Finding::Broken(format!("watch: {} {how}", message.node));
        }
    }
    acknowledged(operations, &told)
}

/// Nothing twice, nothing backwards, nothing from outside of what the message is about.
fn in_order(message: &Told) -> Result<(), String> {
    if message.upto < message.after {
        return Err(format!("index {} after index {}", message.upto, message.after));
    }
    let mut seen = BTreeSet::new();
    let mut newest = message.after;
    for (index, event) in &message.events {
        if *index < newest || *index <= message.after || *index > message.upto {
            return Err(format!(
                "of index {index} after {newest}, in a message from {} to {}",
                message.after, message.upto
            ));
        }
        if !seen.insert((index, event)) {
            return Err(format!("twice of '{}' at index {index}", event.1));
        }
        newest = *index;
    }
    Ok(())
}

/// Everything that any stream told of these indexes.
fn whole(message: &Told, all: &BTreeMap<u64, BTreeSet<Event>>) -> Result<(), String> {
    let own: BTreeSet<(u64, Event)> = message.events.iter().copied().collect();
    if message.upto == message.after {
        return Ok(());
    }
    for (index, events) in all.range(message.after + 1..=message.upto) {
        if let Some(missing) = events.iter().find(|event| !own.contains(&(*index, **event))) {
            return Err(format!(
                "told up to index {} and left out '{}' at index {index}, which another stream has",
                message.upto, missing.1
            ));
        }
    }
    Ok(())
}

/// What was written to a tag and acknowledged at an index is told of that index.
fn acknowledged(operations: &[Operation], told: &[Told]) -> Finding {
    let mut written: BTreeMap<u64, String> = BTreeMap::new();
    for operation in operations.iter().filter(|o| o.outcome == Kind::Ok) {
        let key = match operation.f {
            Function::Write | Function::Cas => operation.key.clone(),
            Function::Add => operation.asked.as_str().unwrap_or_default().to_owned(),
            _ => continue,
        };
        written.extend(operation.rev.map(|rev| (rev, key)));
    }
    for message in told.iter().filter(|message| message.upto > message.after) {
        for (index, key) in written.range(message.after + 1..=message.upto) {
            if !message.events.contains(&(*index, ("tag", key, true))) {
                return Finding::Broken(format!(
                    "watch: {} told up to index {} without '{key}', which was acknowledged at index {index}",
                    message.node, message.upto
                ));
            }
        }
    }
    Finding::Holds
}

fn read(operation: &Operation) -> Option<Told<'_>> {
    let event = |event: &'_ Value| -> Option<(u64, bool)> { Some((event[0].as_u64()?, event[3].as_bool()?)) };
    let events = operation.answered.as_array()?.iter().map(|value| {
        let (index, present) = event(value)?;
        Some((index, (value[1].as_str()?, value[2].as_str()?, present)))
    });
    let events: Vec<_> = events.collect::<Option<_>>()?;
    let first = events.first().map(|(index, _)| index - 1);
    Some(Told {
        process: operation.process,
        node: &operation.node,
        // A watch that begins anew does not say where: it covers nothing before what it tells first.
        after: operation.asked.as_u64().or(first).or(operation.rev)?,
        upto: operation.rev?,
        events,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(node: &str, after: Value, upto: u64, events: Value) -> Operation {
        operation(Function::Watch, node, after, events, upto)
    }

    fn operation(f: Function, node: &str, asked: Value, answered: Value, rev: u64) -> Operation {
        Operation {
            process: 1,
            f,
            key: "k".into(),
            asked,
            answered,
            outcome: Kind::Ok,
            start: 0,
            end: 1,
            node: node.into(),
            req: String::new(),
            rev: Some(rev),
            error: String::new(),
        }
    }

    fn tag(index: u64, key: &str) -> Value {
        json!([index, "tag", key, true])
    }

    #[test]
    fn streams_that_agree_hold() {
        let write = operation(Function::Write, "a", json!("v1"), json!("v1"), 7);
        let history = [
            message("a", Value::Null, 5, json!([])),
            message("a", Value::Null, 8, json!([tag(7, "k")])),
            message("a", json!(5), 9, json!([tag(7, "k"), tag(9, "x")])),
            message("b", json!(6), 8, json!([tag(7, "k")])),
            write,
        ];
        assert_eq!(check(&history), Finding::Holds);
    }

    #[test]
    fn what_is_missing_twice_or_out_of_order_is_broken() {
        let whole = message("a", json!(5), 9, json!([tag(7, "k"), tag(9, "x")]));
        let write = operation(Function::Write, "a", json!("v1"), json!("v1"), 7);
        for bad in [
            message("b", json!(6), 8, json!([])),
            message("b", json!(5), 9, json!([tag(9, "x"), tag(7, "k")])),
            message("b", json!(5), 9, json!([tag(7, "k"), tag(7, "k"), tag(9, "x")])),
            message("b", json!(7), 9, json!([tag(7, "k"), tag(9, "x")])),
            message("b", json!(5), 8, json!([tag(7, "k"), tag(9, "x")])),
            message("b", json!(5), 9, json!([tag(7, "k"), tag(8, "y"), tag(9, "x")])),
        ] {
            let told = bad.answered.clone();
            assert!(matches!(check(&[whole.clone(), bad]), Finding::Broken(_)), "{told}");
        }
        // Every stream left it out, and a client was told that it is done.
        let all = [message("a", json!(5), 9, json!([tag(9, "x")])), write];
        assert!(matches!(check(&all), Finding::Broken(_)));
    }

    #[test]
    fn without_a_message_nothing_is_decided() {
        assert!(matches!(check(&[]), Finding::Undecided(_)));
    }
}
