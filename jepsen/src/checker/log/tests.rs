//! Disks that agree and disks that do not.

use serde_json::{Value, json};

use super::*;

fn dump(controller: &str, entries: &[(u64, &str)], applied: u64) -> Dump {
    let entry = |(index, request): &(u64, &str)| {
        (*index, json!({ "kind": "entry", "index": index, "term": 1, "request": request }))
    };
    Dump {
        controller: controller.into(),
        purged: entries[0].0 - 1,
        last: entries[entries.len() - 1].0,
        applied,
        terms: (1, 1),
        entries: entries.iter().map(entry).collect(),
        requests: entries
            .iter()
            .filter(|(index, _)| *index <= applied)
            .map(|(index, request)| ((*request).to_owned(), Outcome::Done(Some(*index))))
            .collect(),
        hashes: [(applied, format!("hash of {applied}"))].into(),
    }
}

fn event(process: u64, kind: Kind, req: &str, rev: Option<u64>) -> Event {
    Event {
        process,
        kind,
        f: Function::Write,
        key: "k".into(),
        value: Value::Null,
        time: process,
        node: String::new(),
        req: req.into(),
        rev,
        error: String::new(),
    }
}

#[test]
fn disks_that_agree_hold() {
    let dumps = [dump("a", &[(3, "r"), (4, "s")], 4), dump("b", &[(4, "s"), (5, "t")], 4)];
    assert_eq!(matches(&dumps), Finding::Holds);
    assert_eq!(states(&dumps), Finding::Holds);
    let events = [event(1, Kind::Invoke, "r", None), event(1, Kind::Ok, "r", Some(3))];
    let mut whole = dumps.clone();
    whole[1].requests.insert("r".into(), Outcome::Done(Some(3)));
    assert_eq!(acknowledged(&events, &whole), Finding::Holds, "b has it below where its log begins");
}

#[test]
fn an_entry_of_a_term_in_which_no_vote_is_known_is_a_violation() {
    let mut dumps = [dump("a", &[(3, "r")], 3), dump("b", &[(3, "r")], 3)];
    assert_eq!(votes(&dumps), Finding::Holds);
    dumps[1].terms = (1, 2);
    assert_eq!(votes(&dumps), Finding::Holds, "it has voted since");
    dumps[1].terms = (2, 1);
    assert!(matches!(votes(&dumps), Finding::Broken(_)));
    assert!(matches!(votes(&[]), Finding::Undecided(_)));
}

#[test]
fn what_was_acknowledged_and_is_nowhere_is_a_violation() {
    let events = [event(1, Kind::Ok, "r", Some(3))];
    let lost = [dump("a", &[(3, "other"), (4, "s")], 4)];
    assert!(matches!(acknowledged(&events, &lost), Finding::Broken(_)));
    let mut elsewhere = [dump("a", &[(3, "other"), (4, "s")], 4)];
    elsewhere[0].requests.insert("r".into(), Outcome::Done(Some(3)));
    assert!(matches!(acknowledged(&events, &elsewhere), Finding::Broken(_)), "index 3 is another entry");
    assert!(matches!(acknowledged(&[], &lost), Finding::Undecided(_)));
}

#[test]
fn disks_that_differ_are_broken() {
    let other = [dump("a", &[(3, "r"), (4, "s")], 4), dump("b", &[(3, "r"), (4, "x")], 4)];
    assert!(matches!(matches(&other), Finding::Broken(_)));
    // Behind what anybody has applied a deposed leader may have entries of its own.
    let tail = [dump("a", &[(3, "r"), (4, "s")], 3), dump("b", &[(3, "r"), (4, "x")], 3)];
    assert_eq!(matches(&tail), Finding::Holds);
    let alone = [dump("a", &[(3, "r"), (4, "s")], 4), dump("b", &[(3, "r")], 3), dump("c", &[(3, "r")], 3)];
    assert!(matches!(matches(&alone), Finding::Broken(_)), "applied without a majority");
    let mut hashes = [dump("a", &[(3, "r")], 3), dump("b", &[(3, "r")], 3)];
    hashes[1].hashes.insert(3, "another".into());
    assert!(matches!(states(&hashes), Finding::Broken(_)));
    hashes[1].hashes.clear();
    assert!(matches!(states(&hashes), Finding::Undecided(_)));
}

#[test]
fn what_clients_could_not_know_is_resolved() {
    let mut dumps = [dump("a", &[(3, "r"), (4, "s"), (5, "tail")], 4)];
    dumps[0].requests.insert("no".into(), Outcome::Refused("version".into()));
    let asked = |process, req| event(process, Kind::Invoke, req, None);
    let events = [
        asked(1, "s"),
        event(1, Kind::Info, "s", None),
        asked(2, "no"),
        asked(3, "nowhere"),
        asked(4, "tail"),
        asked(5, "r"),
        event(5, Kind::Ok, "r", Some(3)),
    ];
    let resolved = resolve(&events, &dumps);
    let outcomes: Vec<_> = resolved.iter().map(|r| (r.request.as_str(), &r.outcome)).collect();
    let never = Outcome::Refused("it is in no log".into());
    assert_eq!(
        outcomes,
        [("s", &Outcome::Done(Some(4))), ("no", &Outcome::Refused("version".into())), ("nowhere", &never)],
        "an entry that nobody has applied stays unknown"
    );
    let operations = crate::history::operations(&events).unwrap();
    let known = with_resolved(&operations, &resolved);
    let kinds: Vec<_> = known.iter().map(|o| (o.process, o.outcome, o.rev)).collect();
    assert_eq!(
        kinds,
        [
            (1, Kind::Ok, Some(4)),
            (2, Kind::Fail, None),
            (3, Kind::Fail, None),
            (4, Kind::Info, None),
            (5, Kind::Ok, Some(3)),
        ]
    );
    assert_eq!(known[0].end, u64::MAX, "when it was done stays open");
}
