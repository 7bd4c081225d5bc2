//! The report as one page for a browser, whole in itself: no script, no font, no picture from elsewhere. Pure.
//!
//! Written for somebody who was not there: first the verdict and what was done, then the picture, then the story in
//! order, then how it was measured. `chart` draws the picture, `lanes` says what is in it.

use std::fmt::Write as _;

use super::{
    report::{Distribution, Findings, Report, Verdict, overall, seconds},
    text::lost,
    timeline::{Latency, PhaseKind},
};
use crate::moment::moment_text;

mod chart;
mod lanes;

const STYLE: &str = include_str!("page/style.css");

/// The page of one run, or of several: then with their distribution first and the slowest run open.
pub fn render(runs: &[Report], distributions: &[Distribution]) -> String {
    let name = runs.first().map(|run| run.drill.name()).unwrap_or_default();
    let verdict = overall(runs);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Drill {name}: {verdict}</title><style>{STYLE}</style></head><body>\n\
         <h1>Drill {name} <span class=\"verdict {verdict}\">{verdict}</span></h1>\n"
    );
    if let Some(run) = runs.first() {
        page += &surroundings(run, runs.len());
    }
    if runs.len() > 1 {
        page += &spread(distributions);
    }
    let slowest = (0..runs.len()).max_by_key(|index| (runs[*index].verdict, weight(&runs[*index])));
    for (index, run) in runs.iter().enumerate() {
        if runs.len() == 1 {
            page += &section(run);
            continue;
        }
        let open = if Some(index) == slowest { " open" } else { "" };
        let (number, verdict, target) = (index + 1, run.verdict, escape(&run.target));
        let _ = write!(
            page,
            "<details{open}><summary>Run {number}, {target}: <span class=\"verdict {verdict}\">{verdict}</span>\
             </summary>\n{}</details>\n",
            section(run)
        );
    }
    page += "</body></html>\n";
    page
}

/// How much there is to see in a run.
fn weight(run: &Report) -> u64 {
    run.measures
        .iter()
        .filter(|measure| measure.target_micros.is_some())
        .map(|measure| measure.micros)
        .max()
        .unwrap_or(0)
}

fn surroundings(run: &Report, runs: usize) -> String {
    let about = &run.surroundings;
    let times = if runs > 1 { format!(", the first of {runs} runs") } else { String::new() };
    let mut text = format!(
        "<p class=\"quiet\">{} UTC{times}. {} controllers, {} hosts ({}), {} machines, on {}. Trefoil {}.</p>\n",
        moment_text(run.began_at_millis),
        about.controllers,
        about.hosts,
        escape(&about.hypervisor),
        about.machines,
        escape(&about.machine),
        escape(&about.version)
    );
    if about.hypervisor.contains("simulated") {
        text += "<p class=\"notice\">The hypervisor is <strong>simulated</strong>: machines are records, no guest runs. \
                 Times of the quorum are real; times in which machines start are made up.</p>\n";
    }
    if !run.truth {
        text += "<p class=\"notice\">On a live cloud the hosts' processes are not read: where machines ran is the \
                 cloud's own word.</p>\n";
    }
    text
}

fn section(run: &Report) -> String {
    let zero = run.timeline.phase(PhaseKind::Fault).map_or(0, |(from, _)| from);
    let mut text = summary(run);
    text += &figures(run);
    text += &chart::draw(&run.timeline, zero);
    text += &findings(&run.findings);
    text += &story(run, zero);
    text += &client(run);
    text += &how(run);
    text
}

/// Two or three sentences that say it all.
fn summary(run: &Report) -> String {
    let judged = match run.verdict {
        Verdict::Passed => "Everything came back, no rule was broken, and the fault is proved.",
        Verdict::Unknown => "<strong>Nothing is proved by this run.</strong> See the doubts below.",
        Verdict::Failed => "<strong>Something broke or did not come back.</strong> See the findings below.",
    };
    let losses: String =
        run.losses.iter().map(|loss| format!(" {} lost {}.", escape(&loss.vm), lost(loss.window_millis))).collect();
    let fault = if run.fault.is_empty() { "Nothing was done".into() } else { capital(&run.fault) };
    format!("<p class=\"summary\">{}. {judged}{losses}</p>\n", escape(&fault))
}

fn figures(run: &Report) -> String {
    let mut text = String::from("<div class=\"figures\">");
    for measure in &run.measures {
        let (class, target) = match measure.target_micros {
            Some(target) if measure.micros > target => (" late", format!(", target {}", seconds(target))),
            Some(target) => ("", format!(", target {}", seconds(target))),
            None => ("", String::new()),
        };
        let _ = write!(
            text,
            "<div class=\"figure{class}\"><b>{}</b><span>{}</span><small>{}{target}</small></div>",
            seconds(measure.micros),
            capital(measure.name),
            escape(&measure.of)
        );
    }
    text + "</div>\n"
}

fn findings(findings: &Findings) -> String {
    let lists = [
        ("Broken", "broken", &findings.broken),
        ("Not recovered", "broken", &findings.unrecovered),
        ("In doubt", "doubt", &findings.doubts),
        ("That it really happened", "proof", &findings.evidence),
    ];
    let mut text = String::new();
    for (title, class, sentences) in lists.into_iter().filter(|(_, _, sentences)| !sentences.is_empty()) {
        let items: String =
            sentences.iter().map(|sentence| format!("<li>{}</li>", escape(&capital(sentence)))).collect();
        let _ = writeln!(text, "<h2>{title}</h2><ul class=\"{class}\">{items}</ul>");
    }
    text
}

fn story(run: &Report, zero: u64) -> String {
    let row = |mark: &super::timeline::Mark| {
        let at = (mark.at_micros as f64 - zero as f64) / 1e6;
        format!("<tr><td class=\"time\">{at:+.2} s</td><td>{}</td></tr>", escape(&capital(&mark.what)))
    };
    let rows: String = run.timeline.marks.iter().map(row).collect();
    format!("<h2>What happened, in order</h2><table class=\"story\">{rows}</table>\n")
}

fn client(run: &Report) -> String {
    let rows = [
        ("Writes before", run.client.writes_before),
        ("Writes during the fault", run.client.writes_during),
        ("Linearizable reads before", run.client.reads_before),
        ("Linearizable reads during the fault", run.client.reads_during),
    ];
    let row = |(name, l): (&str, Latency)| {
        let cells = [l.done.to_string(), l.refused.to_string(), l.unanswered.to_string()];
        let times = [l.p50_micros, l.p99_micros, l.max_micros].map(seconds);
        let cells: String = cells.iter().chain(&times).map(|cell| format!("<td>{cell}</td>")).collect();
        format!("<tr><th>{name}</th>{cells}</tr>")
    };
    let rows: String = rows.into_iter().map(row).collect();
    format!(
        "<h2>What a client felt</h2><table><tr><th></th><th>done</th><th>refused</th><th>unanswered</th><th>p50</th>\
         <th>p99</th><th>max</th></tr>{rows}</table>\n<p>The longest time without an acknowledged write, from the fault \
         to the end: <b>{}</b>.</p>\n",
        seconds(run.client.write_gap_micros)
    )
}

fn how(run: &Report) -> String {
    let looks = run.timeline.looks;
    let rate = looks.count as f64 * 1e6 / run.timeline.ended.max(1) as f64;
    let truth = if run.truth {
        format!(
            "Where machines ran was read from the hosts' own processes (or, simulated, their records), {rate:.0} times \
             a second; the longest gap between two looks was {}. A stopped process counts as paused. ",
            seconds(looks.longest_gap_micros)
        )
    } else {
        String::new()
    };
    format!(
        "<h2>How it was measured</h2><p class=\"quiet\">{truth}All times are from one monotonic clock. Leaders, hosts and \
         machines as the cloud sees them were asked for ten times a second, linearizably: such a time may be 0.1 s late. The \
         client has two writers and two readers; each request goes from controller to controller for two seconds and is \
         unanswered then. A refused request is proved not to have happened. Every read was compared with the newest \
         write that was acknowledged before it began.</p>\n"
    )
}

fn spread(distributions: &[Distribution]) -> String {
    let row = |d: &Distribution| {
        let late = d.target_micros.is_some_and(|target| d.max_micros > target);
        let class = if late { " class=\"late\"" } else { "" };
        let figures: String =
            [d.p50_micros, d.p95_micros, d.max_micros].map(|m| format!("<td>{}</td>", seconds(m))).concat();
        let target = d.target_micros.map(seconds).unwrap_or_default();
        format!("<tr{class}><th>{}</th><td>{}</td>{figures}<td>{target}</td></tr>", capital(d.name), d.count)
    };
    let rows: String = distributions.iter().map(row).collect();
    format!(
        "<h2>All runs</h2><table><tr><th></th><th>count</th><th>p50</th><th>p95</th><th>max</th><th>target</th></tr>\
         {rows}</table>\n"
    )
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    // A name such as vm-1 or h2 stays as it is.
    let word = text.split_whitespace().next().unwrap_or_default();
    match letters.next() {
        Some(first) if word.chars().all(char::is_alphabetic) => first.to_uppercase().chain(letters).collect(),
        _ => text.to_owned(),
    }
}

/// Names are other people's.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::{
        super::report::{distributions, tests::observed},
        *,
    };

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_says_that_it_is_simulated() {
        let run = Report::of(observed());
        let page = render(std::slice::from_ref(&run), &[]);
        for foreign in ["http:", "https:", "src=", "href=", "url(http", "@import", "<script", "<link"] {
            assert!(!page.contains(foreign), "the page has '{foreign}'");
        }
        for part in ["<strong>simulated</strong>", "prefers-color-scheme: dark", "verdict passed", "vm-1 lost"] {
            assert!(page.contains(part), "the page has no '{part}'");
        }
        assert_eq!(page.matches("<svg").count(), 1);
    }

    #[test]
    fn names_of_others_are_text_and_not_markup() {
        let mut seen = observed();
        seen.fault = "<b>x</b> & \"y\"".into();
        seen.timeline.homes[0].vm = "<script>".into();
        let page = render(&[Report::of(seen)], &[]);
        assert!(page.contains("&lt;b&gt;x&lt;/b&gt; &amp; &quot;y&quot;") && !page.contains("<script"));
    }

    #[test]
    fn of_several_runs_the_worst_is_open() {
        let mut bad = observed();
        bad.findings.evidence.clear();
        let runs = [Report::of(observed()), Report::of(bad)];
        let page = render(&runs, &distributions(&runs));
        assert!(page.contains("verdict unknown\">unknown</span></h1>"), "the whole is as good as its worst run");
        assert_eq!((page.matches("<details>").count(), page.matches("<details open>").count()), (1, 1));
        assert!(page.contains("<details open><summary>Run 2") && page.contains("All runs"));
    }
}
