//! The picture of a drill as SVG: phases behind everything, lanes, and below them what the client felt. Pure.

use std::fmt::Write as _;

use super::{
    super::timeline::{Answer, Micros, Outcome, PhaseKind, Timeline},
    escape,
    lanes::{self, Lane},
};

/// The drawing is scaled to the page; these are its own units.
const WIDTH: f64 = 1200.0;
const LEFT: f64 = 150.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 34.0;
const LANE: f64 = 22.0;
const GROUP: f64 = 26.0;
const GRAPH: f64 = 130.0;
const BARS: f64 = 60.0;
/// So many slices of time in the graphs: about a pixel column each three.
const SLICES: u64 = 300;
/// Latencies are drawn from 0.1 ms to 10 s, a tenth of the height a factor of about three.
const FASTEST: f64 = 100.0;
const DECADES: f64 = 5.0;
/// A letter of a span's text; without room for all of it there is none.
const LETTER: f64 = 6.6;

struct Slice {
    from: Micros,
    done: Vec<Micros>,
    refused: u64,
    unanswered: u64,
}

/// `zero`: the moment that times are counted from.
pub fn draw(seen: &Timeline, zero: Micros) -> String {
    let (lanes, left_out) = lanes::all(seen);
    let groups = lanes.iter().map(|lane| lane.group).collect::<std::collections::BTreeSet<_>>().len();
    let lanes_height = lanes.len() as f64 * LANE + groups as f64 * GROUP;
    let height = TOP + lanes_height + GROUP + GRAPH + GROUP + BARS + 40.0;
    let scale = Scale { ended: seen.ended.max(1), zero };
    let mut svg =
        format!("<svg viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-label=\"The drill over time\">\n");
    svg += &phases(seen, &scale, height - 30.0);
    svg += &axis(&scale, height - 30.0);
    let mut y = TOP;
    let mut group = "";
    for lane in &lanes {
        if lane.group != group {
            group = lane.group;
            let _ = writeln!(svg, "<text x=\"0\" y=\"{:.1}\" class=\"group\">{group}</text>", y + GROUP - 9.0);
            y += GROUP;
        }
        svg += &draw_lane(lane, &scale, y);
        y += LANE;
    }
    let slices = slices(seen);
    svg += &latencies(&slices, &scale, y);
    svg += &trouble(&slices, &scale, y + GROUP + GRAPH);
    svg += "</svg>\n";
    let missing = match left_out {
        0 => String::new(),
        n => format!("<p class=\"quiet\">{n} more lanes of machines to which less happened are not drawn.</p>\n"),
    };
    format!("<figure>{svg}{LEGEND}</figure>\n{missing}")
}

const LEGEND: &str = "<figcaption><i class=\"running\"></i>runs <i class=\"paused\"></i>paused, or silent \
                      <i class=\"lost\"></i>lost, or no leader <i class=\"shade\"></i>the fault lasts. Bars: refused (light) \
                      and unanswered (dark) requests.</figcaption>";

struct Scale {
    ended: Micros,
    zero: Micros,
}

impl Scale {
    fn x(&self, at: Micros) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * at.min(self.ended) as f64 / self.ended as f64
    }

    fn seconds(&self, at: Micros) -> f64 {
        (at as f64 - self.zero as f64) / 1e6
    }
}

fn phases(seen: &Timeline, scale: &Scale, bottom: f64) -> String {
    let mut svg = String::new();
    for (index, phase) in seen.phases.iter().enumerate() {
        let to = seen.phases.get(index + 1).map_or(seen.ended, |next| next.from_micros);
        let (x, width) = (scale.x(phase.from_micros), scale.x(to) - scale.x(phase.from_micros));
        let name = match phase.kind {
            PhaseKind::Before => "before",
            PhaseKind::Fault => "fault",
            PhaseKind::Healing => "healing",
            PhaseKind::After => "after",
        };
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"18\" width=\"{width:.1}\" height=\"{:.1}\" class=\"phase {name}\"/>",
            bottom - 18.0
        );
        if width > name.len() as f64 * LETTER + 4.0 {
            let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"13\" class=\"label\">{name}</text>", x + 3.0);
        }
    }
    svg
}

fn draw_lane(lane: &Lane, scale: &Scale, y: f64) -> String {
    let label = escape(&lane.label);
    let mut svg = format!("<text x=\"0\" y=\"{:.1}\" class=\"label\">{label}</text>\n", y + 15.0);
    for span in &lane.spans {
        let (x, width) = (scale.x(span.from), (scale.x(span.to) - scale.x(span.from)).max(1.0));
        let (from, to, text) = (scale.seconds(span.from), scale.seconds(span.to), escape(&span.text));
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\" rx=\"2\" class=\"{}\"><title>{label}: \
             {text}, {from:+.2} s to {to:+.2} s</title></rect>",
            y + 2.0,
            LANE - 4.0,
            span.class
        );
        if width > span.text.len() as f64 * LETTER + 8.0 {
            let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" class=\"inside\">{text}</text>", x + 5.0, y + 15.0);
        }
    }
    svg
}

fn slices(seen: &Timeline) -> Vec<Slice> {
    let width = (seen.ended / SLICES).max(1);
    let slice = |n: u64| Slice { from: n * width, done: Vec::new(), refused: 0, unanswered: 0 };
    let mut slices: Vec<Slice> = (0..=SLICES).map(slice).collect();
    for Answer { began, took, outcome, .. } in &seen.answers {
        // An error is felt when it is heard, a long answer from when it was asked for.
        let heard = usize::try_from((began + took).min(seen.ended) / width).unwrap_or(0).min(slices.len() - 1);
        let asked = usize::try_from((*began).min(seen.ended) / width).unwrap_or(0).min(slices.len() - 1);
        match outcome {
            Outcome::Done => slices[asked].done.push(*took),
            Outcome::Refused => slices[heard].refused += 1,
            Outcome::Unanswered => slices[heard].unanswered += 1,
        }
    }
    slices.iter_mut().for_each(|slice| slice.done.sort_unstable());
    slices
}

fn latencies(slices: &[Slice], scale: &Scale, y: f64) -> String {
    let (top, bottom) = (y + GROUP, y + GROUP + GRAPH);
    let height = |micros: Micros| {
        let part = (micros as f64 / FASTEST).max(1.0).log10() / DECADES;
        bottom - part.min(1.0) * GRAPH
    };
    let mut svg =
        format!("<text x=\"0\" y=\"{:.1}\" class=\"group\">Client: how long an answer took</text>\n", top - 9.0);
    for (label, micros) in [("1 ms", 1_000), ("10 ms", 10_000), ("100 ms", 100_000), ("1 s", 1_000_000)] {
        let at = height(micros);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\" class=\"grid\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" class=\"tick end\">{label}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0
        );
    }
    for slice in slices.iter().filter(|slice| !slice.done.is_empty()) {
        let x = scale.x(slice.from);
        let (median, max) = (slice.done[slice.done.len() / 2], slice.done[slice.done.len() - 1]);
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" class=\"range\"/><rect x=\"{:.1}\" y=\"{:.1}\" \
             width=\"3\" height=\"3\" class=\"median\"/>",
            height(slice.done[0]),
            height(max),
            x - 1.5,
            height(median) - 1.5
        );
    }
    svg
}

fn trouble(slices: &[Slice], scale: &Scale, y: f64) -> String {
    let (top, bottom) = (y + GROUP, y + GROUP + BARS);
    let most = slices.iter().map(|slice| slice.refused + slice.unanswered).max().unwrap_or(0);
    let mut svg = format!("<text x=\"0\" y=\"{:.1}\" class=\"group\">Client: requests in vain</text>\n", top - 9.0);
    let _ = writeln!(
        svg,
        "<line x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{bottom:.1}\" y2=\"{bottom:.1}\" class=\"grid\"/>",
        WIDTH - RIGHT
    );
    if most == 0 {
        let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" class=\"label\">none</text>", LEFT + 6.0, bottom - 8.0);
        return svg;
    }
    let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"{:.1}\" class=\"tick end\">{most}</text>", LEFT - 6.0, top + 10.0);
    let unit = BARS / most as f64;
    let width = (WIDTH - LEFT - RIGHT) / SLICES as f64;
    for slice in slices {
        let (x, mut foot) = (scale.x(slice.from), bottom);
        for (count, class) in [(slice.unanswered, "unanswered"), (slice.refused, "refused")] {
            let high = count as f64 * unit;
            if count > 0 {
                foot -= high;
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{foot:.1}\" width=\"{width:.1}\" height=\"{high:.1}\" class=\"{class}\"/>"
                );
            }
        }
    }
    svg
}

/// Round numbers of seconds, about a dozen of them, counted from the fault.
fn axis(scale: &Scale, y: f64) -> String {
    let all = scale.ended as f64 / 1e6;
    let step = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];
    let step = step.into_iter().find(|step| all / step <= 14.0).unwrap_or(7200.0);
    let mut svg = String::new();
    let first = (-(scale.zero as f64) / 1e6 / step).ceil() as i64;
    for number in first.. {
        let second = number as f64 * step;
        let at = second * 1e6 + scale.zero as f64;
        if at > scale.ended as f64 {
            break;
        }
        let x = scale.x(at as Micros);
        let text = if step < 1.0 { format!("{second:.1}") } else { format!("{second:.0}") };
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"18\" y2=\"{y:.1}\" class=\"grid\"/><text x=\"{x:.1}\" y=\"{:.1}\" \
             class=\"tick middle\">{text}</text>",
            y + 14.0
        );
    }
    let _ = writeln!(svg, "<text x=\"0\" y=\"{:.1}\" class=\"tick\">seconds since the fault</text>", y + 14.0);
    svg
}

#[cfg(test)]
mod tests {
    use super::{super::super::report::tests::observed, *};

    #[test]
    fn nothing_is_drawn_outside_and_every_tag_is_closed() {
        let seen = observed().timeline;
        let svg = draw(&seen, 1_000_000);
        for coordinate in svg.split("x=\"").skip(1).filter_map(|rest| rest.split('"').next()?.parse::<f64>().ok()) {
            assert!((-1.0..=WIDTH).contains(&coordinate), "{coordinate}");
        }
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        assert_eq!(
            svg.matches("<rect").count(),
            svg.matches("/>").count() + svg.matches("</rect>").count() - svg.matches("<line").count()
        );
        assert!(svg.contains("vm-1 on h1: running, -1.00 s to +0.00 s"), "{svg}");
        assert!(svg.contains(">none</text>"), "nothing was in vain");
    }

    #[test]
    fn an_error_is_drawn_when_it_is_heard() {
        let mut seen = observed().timeline;
        let in_vain = |began, outcome| Answer { began, took: 2_000_000, write: true, outcome };
        seen.answers.push(in_vain(1_000_000, Outcome::Unanswered));
        seen.answers.push(in_vain(1_000_000, Outcome::Refused));
        let all = slices(&seen);
        let heard: Vec<&Slice> = all.iter().filter(|slice| slice.unanswered + slice.refused > 0).collect();
        assert_eq!((heard.len(), heard[0].unanswered, heard[0].refused), (1, 1, 1));
        assert!((2_980_000..=3_000_000).contains(&heard[0].from), "{}", heard[0].from);
        let svg = draw(&seen, 0);
        assert!(svg.contains("class=\"unanswered\"") && svg.contains("class=\"refused\""));
    }

    #[test]
    fn an_empty_timeline_is_drawn_too() {
        assert!(draw(&Timeline::default(), 0).contains("seconds since the fault"));
    }
}
