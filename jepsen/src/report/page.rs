//! The report as one page for a browser, whole in itself: no script, no font, no picture from elsewhere. Pure.
//!
//! For a sceptic: first the verdict and what it rests on, then the pictures, then what was done with the proof that it was
//! done, then the operations that speak against a promise, and how to have it all again.

use std::fmt::Write as _;

use super::{Report, chart::Charts};
use crate::history::{Kind, Operation};

const STYLE: &str = include_str!("style.css");
/// Operations of a broken promise that the page shows; the rest is in the history.
const SHOWN: usize = 60;

pub fn render(report: &Report, operations: &[Operation]) -> String {
    let verdict = report.verdict;
    let charts = Charts::new(report.seconds, operations, &report.faults);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Jepsen-style run: {verdict}</title><style>{STYLE}</style></head><body>\n\
         <h1>Jepsen-style run <span class=\"verdict {verdict}\">{verdict}</span></h1>\n{}",
        about(report)
    );
    page += &promises(report);
    page += &coverage(report);
    page += "<h2>What clients saw</h2>\n<p class=\"quiet\">Red: a fault is in force, under its number in the table below; \
             yellow: healed, until all controllers agreed on a leader again.</p>\n";
    page += &charts.latency_raw();
    page += &charts.latency_quantiles();
    page += &charts.rate();
    page += &latencies(report);
    page += &faults(report);
    page += &against(report, operations);
    page += &again(report);
    page += "</body></html>\n";
    page
}

fn about(report: &Report) -> String {
    let about = &report.about;
    let network = if about.isolated { "each on a network host of its own" } else { "all on loopback" };
    let (happened, never) = report.resolved;
    format!(
        "<p>{} operations in {:.0} s by clients of {} controllers, {network}: {} acknowledged, {} refused, {} without an \
         answer. {} faults.</p>\n<p class=\"quiet\">{}, {}, {} processors. Workloads: {}. Of what got no answer, \
         {happened} changes were made and {never} were not, by the controllers' own disks; the rest were reads.</p>\n",
        report.operations,
        report.seconds,
        about.controllers,
        report.acknowledged,
        report.refused,
        report.unknown,
        report.faults.len(),
        escape(&about.version),
        escape(&about.kernel),
        about.processors,
        escape(&about.workloads.join(", "))
    )
}

fn promises(report: &Report) -> String {
    let mut table = "<h2>Promises</h2>\n<table><tr><th>promise</th><th>finding</th></tr>\n".to_owned();
    for (promise, finding) in &report.findings {
        let class = match finding.as_str() {
            "holds" => "holds",
            broken if broken.starts_with("BROKEN") => "broken",
            _ => "undecided",
        };
        let _ = writeln!(table, "<tr><td>{}</td><td class=\"{class}\">{}</td></tr>", escape(promise), escape(finding));
    }
    table + "</table>\n"
}

/// What the run should have done and did not.
fn coverage(report: &Report) -> String {
    let mut text = "<h2>Coverage and harness</h2>\n".to_owned();
    if report.gaps.is_empty() {
        text += "<p class=\"holds\">Every kind of operation was acknowledged, every family of faults really struck, and \
                 writes went on under each fault that leaves a majority, and after it.</p>\n";
    }
    for gap in &report.gaps {
        let _ = writeln!(text, "<p class=\"undecided\">{}</p>", escape(gap));
    }
    for skipped in &report.skipped {
        let _ = writeln!(text, "<p class=\"quiet\">Not possible on this machine: {}</p>", escape(skipped));
    }
    text + "<p class=\"quiet\">The harness did what it should: every process was started, every fault healed, every disk read. \
            Where it does not, it says so and leaves no page.</p>\n"
}

fn latencies(report: &Report) -> String {
    let mut table = "<h2>Latency of acknowledged operations</h2>\n<table><tr><th>phase</th><th class=\"n\">operations</th>\
                     <th class=\"n\">50 %</th><th class=\"n\">99 %</th><th class=\"n\">99.9 %</th><th class=\"n\">longest</th>\
                     <th class=\"n\">longest without a write</th></tr>\n"
        .to_owned();
    for l in &report.latency {
        let _ = writeln!(
            table,
            "<tr><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{:.1} ms</td><td class=\"n\">{:.1} ms</td>\
             <td class=\"n\">{:.1} ms</td><td class=\"n\">{:.1} ms</td><td class=\"n\">{:.0} ms</td></tr>",
            l.phase, l.count, l.p50, l.p99, l.p999, l.max, l.longest_write_gap
        );
    }
    table + "</table>\n"
}

fn faults(report: &Report) -> String {
    let mut table =
        "<h2>Faults, and the proof of each</h2>\n<table><tr><th></th><th>fault</th><th>hit</th><th>evidence</th>\
                     <th class=\"n\">from</th><th class=\"n\">healed</th><th class=\"n\">agreed</th>\
                     <th class=\"n\">longest without a write</th></tr>\n"
            .to_owned();
    for (number, fault) in report.faults.iter().enumerate() {
        let seconds = |nanos: u64| nanos as f64 / 1e9;
        let doubt = match fault.doubt.as_str() {
            "" => String::new(),
            why => format!(" <span class=\"undecided\">does not count: {}</span>", escape(why)),
        };
        let _ = writeln!(
            table,
            "<tr><td class=\"n\">{}</td><td>{}</td><td>{}</td><td>{}{doubt}</td><td class=\"n\">{:.1} s</td>\
             <td class=\"n\">{:.1} s</td><td class=\"n\">{:.1} s</td><td class=\"n\">{:.0} ms</td></tr>",
            number + 1,
            fault.fault,
            escape(&fault.hit.join(" ")),
            escape(&fault.evidence),
            seconds(fault.began),
            seconds(fault.healed),
            seconds(fault.settled),
            fault.write_gap
        );
    }
    table + "</table>\n"
}

/// For each broken promise the operations on what its sentence names.
fn against(report: &Report, operations: &[Operation]) -> String {
    let mut text = String::new();
    for (promise, finding) in report.findings.iter().filter(|(_, finding)| finding.starts_with("BROKEN")) {
        let names = |word: &str| !word.is_empty() && finding.contains(&format!("'{word}'"));
        let about: Vec<&Operation> =
            operations.iter().filter(|o| names(&o.key) || o.asked.as_str().is_some_and(names)).collect();
        let _ = writeln!(text, "<h2>Against “{}”</h2>\n<p>{}</p>", escape(promise), escape(finding));
        if about.is_empty() {
            continue;
        }
        text += "<table><tr><th class=\"n\">from</th><th class=\"n\">to</th><th class=\"n\">process</th><th>at</th>\
                 <th>operation</th><th>asked</th><th>came to</th><th class=\"n\">index</th></tr>\n";
        for operation in about.iter().take(SHOWN) {
            text += &operation_row(operation);
        }
        text += "</table>\n";
        if about.len() > SHOWN {
            let _ = writeln!(text, "<p class=\"quiet\">and {} more in history.jsonl</p>", about.len() - SHOWN);
        }
    }
    text
}

fn operation_row(o: &Operation) -> String {
    let seconds = |nanos: u64| if nanos == u64::MAX { "never".into() } else { format!("{:.4} s", nanos as f64 / 1e9) };
    let came = match o.outcome {
        Kind::Ok => o.answered.to_string(),
        Kind::Fail => format!("refused: {}", o.error),
        Kind::Info | Kind::Invoke => format!("unknown: {}", o.error),
    };
    format!(
        "<tr><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td>{}</td><td>{:?}</td><td>{}</td><td>{}</td>\
         <td class=\"n\">{}</td></tr>\n",
        seconds(o.start),
        seconds(o.end),
        o.process,
        escape(&o.node),
        o.f,
        escape(&short(&o.asked.to_string())),
        escape(&short(&came)),
        o.rev.map(|rev| rev.to_string()).unwrap_or_default()
    )
}

/// A list of all elements would fill the page.
fn short(text: &str) -> String {
    const MOST: usize = 120;
    if text.chars().count() <= MOST { text.to_owned() } else { text.chars().take(MOST).collect::<String>() + "…" }
}

fn again(report: &Report) -> String {
    format!(
        "<h2>The same again</h2>\n<p><code>{}</code> makes the same choices; what the machine does meanwhile is its own.</p>\n\
         <p class=\"quiet\">Beside this page: <code>history.jsonl</code>, every event by one monotonic clock; \
         <code>resolved.jsonl</code>, what became of requests without an answer; <code>edn/</code>, the same history for Knossos and \
         Elle; <code>report.json</code>; <code>cluster/</code>, logs and disks of the controllers.</p>\n",
        escape(&report.about.command)
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests;
