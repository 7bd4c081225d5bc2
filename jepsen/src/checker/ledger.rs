//! The bill is the integral of what was used: each line exact to the unit, no moment charged twice, every status that
//! anybody saw charged as such from the millisecond at which the cloud says that it began, and nobody charged before a
//! host ran anything.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Finding, home::exclusive};
use crate::{
    effect::{self, Effect},
    history::{Function, Kind, Operation},
};

/// Thousandths of a weight times milliseconds of an hour: what an exact amount is divided by to give nano-units.
const EXACT_PER_NANO: u128 = 1000 * 3_600_000;
/// The log's time and a host's are read on one machine, and cut to milliseconds.
const ROUNDING_MILLIS: u64 = 2;

#[derive(Debug)]
struct Line<'a> {
    status: &'a str,
    from: u64,
    to: u64,
}

/// `bills`: what each controller said at the end of the same span of time. `witness`: what hosts did, and when the run
/// began in milliseconds since the Unix epoch; none when a wall clock was set meanwhile.
pub fn check(operations: &[Operation], bills: &[(&str, &Value)], witness: Option<(&[Effect], u64)>) -> Finding {
    let Some((controller, bill)) = bills.first() else {
        return Finding::Undecided("ledger: nobody gave a bill at the end".into());
    };
    if let Some((other, _)) = bills.iter().find(|(_, other)| other != bill) {
        return Finding::Broken(format!("ledger: {controller} and {other} give different bills of the same time"));
    }
    let lines = match lines(bill) {
        Ok(lines) => lines,
        Err(how) => return Finding::Broken(format!("ledger: {how}")),
    };
    let ran = witness.map_or(Finding::Holds, |(effects, began)| as_it_ran(operations, &lines, effects, began));
    as_seen(operations, &lines).and(ran)
}

/// Lines by machine, each added up again.
fn lines(bill: &Value) -> Result<BTreeMap<&str, Vec<Line<'_>>>, String> {
    let price = u128::from(number(&bill["nano_per_hour"]));
    let mut lines: BTreeMap<&str, Vec<Line>> = BTreeMap::new();
    let mut sum = 0;
    for line in bill["lines"].as_array().into_iter().flatten() {
        let resource = line["resource"].as_str().unwrap_or_default();
        let (from, to) = (number(&line["from"]), number(&line["to"]));
        let exact: u128 = line["exact"].as_str().and_then(|exact| exact.parse().ok()).unwrap_or(0);
        let due = price * u128::from(number(&line["weight_milli"])) * u128::from(to.saturating_sub(from));
        if exact != due {
            return Err(format!("{resource} from {from} to {to} costs {exact}, but {due} is due"));
        }
        sum += exact;
        let of = lines.entry(resource).or_default();
        if let Some(last) = of.last().filter(|last| from < last.to) {
            return Err(format!("{resource} is charged twice from {from} to {}", last.to.min(to)));
        }
        of.push(Line { status: line["status"].as_str().unwrap_or_default(), from, to });
    }
    let (total, due) = (u128::from(number(&bill["total_nano"])), (sum + EXACT_PER_NANO / 2) / EXACT_PER_NANO);
    if total != due {
        return Err(format!("the total is {total}, but its lines make {due}"));
    }
    Ok(lines)
}

/// Every machine in every answer: from the millisecond of its last change on it is charged as what it was.
fn as_seen(operations: &[Operation], lines: &BTreeMap<&str, Vec<Line<'_>>>) -> Finding {
    let mut seen: BTreeMap<(&str, u64), Vec<&Value>> = BTreeMap::new();
    for list in operations.iter().filter(|o| o.f == Function::Machines && o.outcome == Kind::Ok) {
        for row in list.answered.as_array().into_iter().flatten() {
            let of = seen.entry((row["id"].as_str().unwrap_or_default(), number(&row["changed"]))).or_default();
            if !of.iter().any(|other| other["status"] == row["status"]) {
                of.push(row);
            }
        }
    }
    let mut charged = 0;
    for ((vm, at), rows) in seen {
        // Two changes in one millisecond: the first has lasted for nothing.
        let [row] = rows[..] else { continue };
        let found = lines.get(vm).into_iter().flatten().find(|line| line.from <= at && at < line.to);
        let due = charged_as(row);
        charged += usize::from(!due.is_empty());
        let found = found.map(|line| line.status);
        if found.map_or(!due.is_empty(), |found| !due.contains(&found)) {
            return Finding::Broken(format!(
                "ledger: {vm} became {} at {at}, and is charged as {} then",
                row["status"],
                found.unwrap_or("nothing")
            ));
        }
    }
    if charged == 0 {
        return Finding::Undecided("ledger: no machine was ever seen that costs anything".into());
    }
    Finding::Holds
}

/// By what its host said last; a machine that is being made, given away or deleted costs nothing. One that has arrived
/// from another host counts as suspended until its new host says that it runs, and may be asked to stop before. What is on
/// its way to another host costs what it did before.
fn charged_as(row: &Value) -> &'static [&'static str] {
    match row["status"].as_str().unwrap_or_default() {
        "running" | "rebooting" => &["running"],
        "migrating" => &["running", "stopped"],
        "stopping" => &["running", "suspended"],
        "resuming" | "suspended" => &["suspended"],
        "stopped" if row["node"] == "" => &[],
        "stopped" | "starting" => &["stopped"],
        _ => &[],
    }
}

/// What hosts did comes before what they say of it: nobody is charged as running before it ran for the first time, nor an
/// exclusive machine as stopped while it ran on. (Of another one a stale copy may run on a host that is cut off.) One that
/// was stopped and at once started may run again when its stop enters the log: that it had stopped since the line before
/// is enough.
fn as_it_ran(
    operations: &[Operation],
    lines: &BTreeMap<&str, Vec<Line<'_>>>,
    effects: &[Effect],
    began: u64,
) -> Finding {
    let millis = |nanos: u64| began.saturating_add(nanos / 1_000_000);
    let exclusive = exclusive(operations);
    let spans = effect::spans(effects);
    for (vm, lines) in lines.iter().filter(|(resource, _)| resource.starts_with("vm-")) {
        let spans = || spans.iter().filter(|span| span.vm == **vm);
        let first = spans().map(|span| millis(span.from)).min();
        let mut since = 0;
        for line in lines {
            let early = first.is_none_or(|first| line.from + ROUNDING_MILLIS < first);
            if line.status == "running" && early {
                return Finding::Broken(format!(
                    "ledger: {vm} is charged as running from {}, before it ran",
                    line.from
                ));
            }
            let on = |span: &effect::Span| {
                millis(span.from) + ROUNDING_MILLIS < line.from && line.from + ROUNDING_MILLIS < millis(span.to)
            };
            let ended = |span: &effect::Span| {
                let end = millis(span.to);
                since <= end + ROUNDING_MILLIS && end <= line.from + ROUNDING_MILLIS
            };
            if line.status == "stopped" && exclusive.contains(vm) && spans().any(on) && !spans().any(ended) {
                return Finding::Broken(format!(
                    "ledger: {vm} is charged as stopped from {}, while it runs",
                    line.from
                ));
            }
            since = line.from;
        }
    }
    Finding::Holds
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checker::trial;

    const BEGAN: u64 = 1_000_000;

    /// Price 3,600,000 an hour for weight 1: a thousandth of a nano-unit for each thousandth and millisecond.
    fn bill(lines: &[(&str, u64, u64)]) -> Value {
        let line = |(status, from, to): &(&str, u64, u64)| {
            let weight = if *status == "running" { 100 } else { 10 };
            let exact = (3_600_000 * weight * (to - from)).to_string();
            json!({"resource": "vm-1", "status": status, "weight_milli": weight, "from": from, "to": to, "exact": exact})
        };
        let sum: u64 = lines.iter().map(|(s, from, to)| (if *s == "running" { 100 } else { 10 }) * (to - from)).sum();
        let lines: Vec<Value> = lines.iter().map(line).collect();
        json!({"nano_per_hour": 3_600_000, "lines": lines, "total_nano": (sum + 500) / 1000})
    }

    fn seen(status: &str, changed: u64) -> Operation {
        let rows =
            json!([{"id": "vm-1", "status": status, "changed": changed, "node": "host-1", "recovery": "exclusive"}]);
        trial::operation(Function::Machines, "", rows, Kind::Ok, 0, 1)
    }

    fn ran(from: u64, to: u64) -> Vec<Effect> {
        let effect = |time, kind| Effect {
            time: time * 1_000_000,
            host: "host-1".into(),
            vm: "vm-1".into(),
            epoch: 1,
            kind,
            macs: Vec::new(),
        };
        vec![effect(from, effect::Kind::Start), effect(to, effect::Kind::Stop)]
    }

    fn verdict(history: &[Operation], bill: &Value) -> Finding {
        check(history, &[("controller-1", bill), ("controller-2", bill)], Some((&ran(50, 200), BEGAN)))
    }

    fn good() -> (Vec<Operation>, Value) {
        let history = [
            ("creating", 20),
            ("running", 100),
            ("migrating", 150),
            ("stopping", 190),
            ("stopped", 200),
            ("deleting", 300),
        ];
        let history = history.map(|(status, at)| seen(status, BEGAN + at)).into();
        (history, bill(&[("running", BEGAN + 100, BEGAN + 200), ("stopped", BEGAN + 200, BEGAN + 300)]))
    }

    #[test]
    fn what_was_used_is_charged_once() {
        let (history, bill) = good();
        assert_eq!(verdict(&history, &bill), Finding::Holds);
    }

    #[test]
    fn a_moment_more_or_less_is_broken() {
        let (history, _) = good();
        let (from, to) = (BEGAN + 100, BEGAN + 200);
        for lines in [
            vec![("running", from + 1, to), ("stopped", to, to + 100)],
            vec![("running", from, to + 1), ("stopped", to + 1, to + 100)],
            vec![("running", from, to), ("stopped", to, to + 101)],
            vec![("running", from, to)],
            vec![("running", from, to), ("stopped", to - 1, to + 100)],
            vec![("running", from, to + 500), ("running", from, to + 500)],
        ] {
            assert!(matches!(verdict(&history, &bill(&lines)), Finding::Broken(_)), "{lines:?}");
        }
    }

    #[test]
    fn amounts_that_do_not_add_up_are_broken() {
        let (history, bill) = good();
        let mut wrong = bill.clone();
        wrong["total_nano"] = json!(12);
        assert!(matches!(verdict(&history, &wrong), Finding::Broken(_)));
        let mut wrong = bill.clone();
        wrong["lines"][0]["exact"] = json!("7");
        assert!(matches!(verdict(&history, &wrong), Finding::Broken(_)));
        let two = [("controller-1", &bill), ("controller-2", &wrong)];
        assert!(matches!(check(&history, &two, None), Finding::Broken(_)));
    }

    #[test]
    fn who_pays_before_it_runs_or_too_little_while_it_runs_is_broken() {
        let (history, bill) = good();
        let verdict = |effects: &[Effect]| check(&history, &[("c", &bill)], Some((effects, BEGAN)));
        assert!(matches!(verdict(&ran(103, 200)), Finding::Broken(_)));
        assert!(matches!(verdict(&[]), Finding::Broken(_)));
        assert!(matches!(verdict(&ran(50, 203)), Finding::Broken(_)));
        assert_eq!(verdict(&ran(50, 150)), Finding::Holds, "the host tells of it later");
        let again = [ran(50, 190), ran(195, 400)].concat();
        assert_eq!(verdict(&again), Finding::Holds, "it was started again before its stop was in the log");
        let before = [ran(50, 90), ran(95, 400)].concat();
        assert!(matches!(verdict(&before), Finding::Broken(_)), "it has not stopped since it was charged as running");
        assert_eq!(check(&history, &[("c", &bill)], None), Finding::Holds, "a wall clock was set");
    }

    #[test]
    fn without_a_bill_or_a_machine_nothing_is_decided() {
        let (history, bill) = good();
        assert!(matches!(check(&history, &[], None), Finding::Undecided(_)));
        assert!(matches!(verdict(&[], &bill), Finding::Undecided(_)));
    }
}
