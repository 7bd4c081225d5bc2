//! The report as text for a terminal. Pure.

use std::fmt::Write as _;

use super::{
    report::{Distribution, Report, seconds},
    timeline::Latency,
};
use crate::output::Rows;

/// One run in full; of several a line each, and the distributions.
pub fn render(runs: &[Report], distributions: &[Distribution], left: &[String]) -> String {
    let mut text = match runs {
        [] => "no run\n".to_owned(),
        [run] => one(run),
        runs => runs.iter().enumerate().map(|(number, run)| line(number + 1, run)).collect(),
    };
    if runs.len() > 1 {
        let row = |d: &Distribution| {
            let target = d.target_micros.map(seconds).unwrap_or_default();
            let figures = [d.p50_micros, d.p95_micros, d.max_micros].map(seconds);
            [vec![d.name.to_owned(), d.count.to_string()], figures.to_vec(), vec![target]].concat()
        };
        let header = &["MEASURE", ">COUNT", ">P50", ">P95", ">MAX", ">TARGET"];
        let _ = writeln!(text, "\n{}", Rows::new(header, distributions.iter().map(row)).render(None));
    }
    for sentence in left {
        let _ = writeln!(text, "left behind: {sentence}");
    }
    text.trim_end().to_owned()
}

fn line(number: usize, run: &Report) -> String {
    let findings = &run.findings;
    let all = [&findings.broken, &findings.unrecovered, &findings.doubts];
    let why: Vec<&str> = all.into_iter().flatten().map(String::as_str).collect();
    let why = if why.is_empty() { String::new() } else { format!(": {}", why.join("; ")) };
    format!("run {number:3}  {:8} {}{why}\n", run.verdict.to_string(), run.target)
}

fn one(run: &Report) -> String {
    let mut text = format!("{} of {}: {}\n{}\n", run.drill.name(), run.target, run.verdict, run.fault);
    let surroundings = &run.surroundings;
    let _ = writeln!(
        text,
        "{} controllers, {} hosts ({}), {} machines; {}",
        surroundings.controllers,
        surroundings.hosts,
        surroundings.hypervisor,
        surroundings.machines,
        surroundings.machine
    );
    let findings = &run.findings;
    let lists = [
        ("BROKEN", &findings.broken),
        ("NOT RECOVERED", &findings.unrecovered),
        ("in doubt", &findings.doubts),
        ("evidence", &findings.evidence),
    ];
    for (name, sentences) in lists {
        for sentence in sentences {
            let _ = writeln!(text, "{name}: {sentence}");
        }
    }
    let measure = |m: &super::report::Measure| {
        vec![m.name.to_owned(), m.of.clone(), seconds(m.micros), m.target_micros.map(seconds).unwrap_or_default()]
    };
    let measures = Rows::new(&["MEASURE", "OF", ">TIME", ">TARGET"], run.measures.iter().map(measure));
    let _ = writeln!(text, "\n{}", measures.render(None));
    for loss in &run.losses {
        let _ = writeln!(text, "{} lost {}", loss.vm, lost(loss.window_millis));
    }
    let client = &run.client;
    let rows = [
        ("writes before", client.writes_before),
        ("writes during", client.writes_during),
        ("reads before", client.reads_before),
        ("reads during", client.reads_during),
    ];
    let header = &["CLIENT", ">DONE", ">REFUSED", ">UNANSWERED", ">P50", ">P99", ">MAX"];
    let _ = writeln!(text, "\n{}", Rows::new(header, rows.into_iter().map(|(name, l)| latency(name, l))).render(None));
    if run.truth {
        let looks = run.timeline.looks;
        let rate = looks.count as f64 * 1e6 / run.timeline.ended.max(1) as f64;
        let gap = seconds(looks.longest_gap_micros);
        let _ = writeln!(text, "\nthe hosts' processes were looked at {rate:.0} times a second, the longest gap {gap}");
    }
    text
}

fn latency(name: &str, l: Latency) -> Vec<String> {
    let counts = [l.done, l.refused, l.unanswered].map(|count| count.to_string());
    let times = [l.p50_micros, l.p99_micros, l.max_micros].map(seconds);
    [vec![name.to_owned()], counts.to_vec(), times.to_vec()].concat()
}

/// What a machine lost, for a person.
pub fn lost(window_millis: Option<u64>) -> String {
    match window_millis {
        Some(millis) => format!("what was written in {}, since its newest backup", seconds(millis * 1000)),
        None => "all that was ever written: it was made from its first image".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::report::{distributions, tests::observed},
        *,
    };

    #[test]
    fn a_report_says_what_it_was_what_was_lost_and_on_what() {
        let run = Report::of(observed());
        let text = render(std::slice::from_ref(&run), &[], &[]);
        for part in [
            "node-power of h1: passed",
            "(simulated)",
            "evidence: its first process is gone",
            "vm-1 lost what was written in 90.00 s",
            "25 times a second",
        ] {
            assert!(text.contains(part), "no '{part}' in:\n{text}");
        }
    }

    #[test]
    fn of_many_runs_each_that_did_not_pass_says_why() {
        let mut bad = observed();
        bad.findings.evidence.clear();
        let runs = [Report::of(observed()), Report::of(bad)];
        let text = render(&runs, &distributions(&runs), &["the tenant drill".into()]);
        assert!(text.contains("run   2  unknown  h1: nothing proves"), "{text}");
        assert!(
            text.contains("longest time without a write") && text.contains("left behind: the tenant drill"),
            "{text}"
        );
    }
}
