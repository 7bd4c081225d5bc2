//! The page is whole in itself, and hides nothing.

use serde_json::{Value, json};

use super::*;
use crate::{history::Function, report::About, verdict::Verdict};

fn operation(key: &str, outcome: Kind, start: u64, end: u64) -> Operation {
    Operation {
        process: 7,
        f: Function::Write,
        key: key.into(),
        asked: json!("v1"),
        answered: json!("v1"),
        outcome,
        start,
        end,
        node: "controller-1".into(),
        req: String::new(),
        rev: Some(9),
        error: "no answer in time".into(),
    }
}

fn report(findings: &[(&str, &str)], verdict: Verdict) -> Report {
    Report {
        verdict,
        about: About { version: "trefoil <1>".into(), command: "make jepsen SEED=5".into(), ..About::default() },
        seed: 5,
        seconds: 20.0,
        findings: findings.iter().map(|(name, finding)| ((*name).into(), (*finding).into())).collect(),
        gaps: vec!["no cas was ever acknowledged".into()],
        skipped: Vec::new(),
        faults: Vec::new(),
        operations: 2,
        acknowledged: 1,
        refused: 0,
        unknown: 1,
        resolved: (1, 0),
        latency: Vec::new(),
    }
}

#[test]
fn the_page_needs_nothing_from_elsewhere() {
    let page = render(&report(&[], Verdict::Unknown), &[operation("k", Kind::Ok, 1, 2_000_000)]);
    for foreign in ["http:", "https:", "<script", "src=", "@import", "url("] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    assert!(page.contains("trefoil &lt;1&gt;") && page.contains("make jepsen SEED=5"));
    assert!(page.contains("no cas was ever acknowledged") && page.contains("UNKNOWN"));
    assert_eq!(page.matches("<svg").count(), 3);
}

#[test]
fn operations_against_a_promise_are_shown() {
    let findings = [("register", "BROKEN: key 'k': no order explains it"), ("set", "holds")];
    let history = [operation("k", Kind::Info, 5_000_000_000, u64::MAX), operation("other", Kind::Ok, 1, 2)];
    let page = render(&report(&findings, Verdict::Violation), &history);
    let shown = page.split("Against").nth(1).expect("a chapter on the broken promise");
    assert!(shown.contains("5.0000 s") && shown.contains("never") && shown.contains("unknown: no answer in time"));
    assert_eq!(shown.matches("<td>controller-1</td>").count(), 1, "operations on other keys are not shown");
    assert_eq!(page.matches("Against").count(), 1);
    let _: Value = serde_json::to_value(report(&findings, Verdict::Violation)).unwrap();
}
