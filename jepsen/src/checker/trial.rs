//! Operations made by hand, for the histories on which checkers are tried.

use serde_json::Value;

use crate::history::{Function, Kind, Operation};

pub fn operation(f: Function, key: &str, value: Value, outcome: Kind, start: u64, end: u64) -> Operation {
    Operation {
        process: start,
        f,
        key: key.into(),
        asked: value.clone(),
        answered: value,
        outcome,
        start,
        end,
        node: "controller-1".into(),
        req: String::new(),
        rev: None,
        error: String::new(),
    }
}
