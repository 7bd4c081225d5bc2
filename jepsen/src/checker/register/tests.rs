//! Known good, bad and indeterminate histories, and a comparison with trying every order.

use serde_json::{Value, json};

use super::*;
use crate::chance::Chance;

/// `(function, value, outcome, start, end)`.
type Row = (Function, Value, Kind, u64, u64);

fn operations(rows: &[Row]) -> Vec<Operation> {
    rows.iter()
        .enumerate()
        .map(|(process, (f, value, outcome, start, end))| Operation {
            process: process as u64,
            f: *f,
            key: "k".into(),
            asked: value.clone(),
            answered: value.clone(),
            outcome: *outcome,
            start: *start,
            end: if *outcome == Kind::Info { u64::MAX } else { *end },
            node: String::new(),
            req: String::new(),
            rev: None,
            error: String::new(),
        })
        .collect()
}

use Function::{Cas, Read, Write};
use Kind::{Fail, Info, Ok};

#[track_caller]
fn holds(rows: &[Row]) {
    assert_eq!(check(&operations(rows)), Finding::Holds);
}

#[track_caller]
fn broken(rows: &[Row]) {
    assert!(matches!(check(&operations(rows)), Finding::Broken(_)));
}

#[test]
fn good_histories_hold() {
    holds(&[]);
    holds(&[(Read, json!(null), Ok, 0, 1)]);
    holds(&[(Write, json!(1), Ok, 0, 10), (Read, json!(1), Ok, 11, 12)]);
    // A read that overlaps a write may see either side of it.
    holds(&[(Write, json!(1), Ok, 0, 10), (Read, json!(null), Ok, 2, 3), (Read, json!(1), Ok, 4, 5)]);
    holds(&[(Write, json!(1), Ok, 0, 1), (Cas, json!([1, 2]), Ok, 2, 3), (Read, json!(2), Ok, 4, 5)]);
    holds(&[(Cas, json!([null, 2]), Ok, 2, 3), (Read, json!(2), Ok, 4, 5)]);
    // Two writes and two readers that overlap all of it, and see them in the same order.
    holds(&[
        (Write, json!(1), Ok, 0, 100),
        (Write, json!(2), Ok, 0, 100),
        (Read, json!(2), Ok, 10, 20),
        (Read, json!(1), Ok, 30, 40),
    ]);
}

#[test]
fn bad_histories_are_broken() {
    // A stale read.
    broken(&[(Write, json!(1), Ok, 0, 1), (Write, json!(2), Ok, 2, 3), (Read, json!(1), Ok, 4, 5)]);
    // A lost acknowledged write.
    broken(&[(Write, json!(1), Ok, 0, 1), (Read, json!(null), Ok, 2, 3)]);
    // A value that nobody wrote.
    broken(&[(Write, json!(1), Ok, 0, 1), (Read, json!(7), Ok, 2, 3)]);
    // Two compare-and-sets that both succeeded from the same value.
    broken(&[(Write, json!(1), Ok, 0, 1), (Cas, json!([1, 2]), Ok, 2, 10), (Cas, json!([1, 3]), Ok, 2, 10)]);
    // Readers that disagree about the order of two writes.
    broken(&[
        (Write, json!(1), Ok, 0, 100),
        (Write, json!(2), Ok, 0, 100),
        (Read, json!(1), Ok, 10, 20),
        (Read, json!(2), Ok, 21, 30),
        (Read, json!(1), Ok, 31, 40),
    ]);
    // What failed was seen.
    broken(&[(Write, json!(1), Fail, 0, 1), (Read, json!(1), Ok, 2, 3)]);
}

#[test]
fn unknown_operations_may_have_happened_or_not_and_late() {
    holds(&[(Write, json!(1), Info, 0, 0), (Read, json!(null), Ok, 2, 3)]);
    holds(&[(Write, json!(1), Info, 0, 0), (Read, json!(1), Ok, 2, 3)]);
    // Long after the client gave up.
    holds(&[
        (Write, json!(1), Info, 0, 0),
        (Write, json!(2), Ok, 10, 11),
        (Read, json!(2), Ok, 12, 13),
        (Read, json!(1), Ok, 14, 15),
    ]);
    // But only once.
    broken(&[
        (Write, json!(1), Info, 0, 0),
        (Read, json!(1), Ok, 1, 2),
        (Write, json!(2), Ok, 10, 11),
        (Read, json!(2), Ok, 12, 13),
        (Read, json!(1), Ok, 14, 15),
    ]);
    // And never before it was asked for.
    broken(&[(Read, json!(1), Ok, 0, 1), (Write, json!(1), Info, 2, 0)]);
    // A chain of unknown compare-and-sets that a read proves.
    holds(&[(Cas, json!([null, 1]), Info, 0, 0), (Cas, json!([1, 2]), Info, 1, 0), (Read, json!(2), Ok, 5, 6)]);
    broken(&[(Cas, json!([1, 2]), Info, 1, 0), (Read, json!(2), Ok, 5, 6)]);
}

#[test]
fn a_budget_that_is_too_small_decides_nothing() {
    let rows: Vec<Row> = (0..8).map(|n| (Write, json!(n), Ok, 0, 100)).collect();
    let operations = operations(&rows);
    let references: Vec<&Operation> = operations.iter().collect();
    assert_eq!(linearizable(&calls(&references), 3), None);
}

/// Every order of every subset that keeps all known calls: slow and plainly right.
fn by_trying_every_order(calls: &[Call], done: &mut Vec<usize>, content: Content) -> bool {
    let open: Vec<usize> = (0..calls.len()).filter(|call| !done.contains(call)).collect();
    if open.iter().all(|call| calls[*call].end == u64::MAX) {
        return true;
    }
    let first_end = open.iter().map(|call| calls[*call].end).min().unwrap_or(u64::MAX);
    for call in open {
        if calls[call].start > first_end {
            continue;
        }
        if let Some(after) = calls[call].action.apply(content) {
            done.push(call);
            if by_trying_every_order(calls, done, after) {
                return true;
            }
            done.pop();
        }
    }
    false
}

#[test]
fn agrees_with_trying_every_order() {
    let mut chance = Chance::new(1);
    let (mut good, mut bad) = (0, 0);
    for _ in 0..4000 {
        let rows: Vec<Row> = (0..1 + chance.below(7))
            .map(|_| {
                let start = chance.number() % 20;
                let end = start + 1 + chance.number() % 10;
                let outcome = *chance.pick(&[Ok, Ok, Ok, Info]);
                let old = [json!(null), json!(1), json!(2), json!(3)][chance.below(4)].clone();
                let new = json!(1 + chance.below(3));
                match chance.below(3) {
                    0 => (Read, old, outcome, start, end),
                    1 => (Write, new, outcome, start, end),
                    _ => (Cas, json!([old, new]), outcome, start, end),
                }
            })
            .collect();
        let operations = operations(&rows);
        let references: Vec<&Operation> = operations.iter().collect();
        // The slow way gets the calls before the ones that cannot matter were left out.
        let expected = by_trying_every_order(&possible_calls(&references), &mut Vec::new(), ABSENT);
        assert_eq!(linearizable(&calls(&references), STEP_BUDGET), Some(expected), "{rows:?}");
        if expected { good += 1 } else { bad += 1 }
    }
    assert!(good > 300 && bad > 300, "the histories must not be all alike: {good} good, {bad} bad");
}
