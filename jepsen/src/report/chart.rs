//! The three pictures that users of Jepsen expect, as SVG: every operation's latency, its quantiles over time, and the rate;
//! the time of each fault shaded, and that of healing lighter. Pure.

use std::{collections::BTreeSet, fmt::Write as _};

use super::is_timed;
use crate::{
    history::{Kind, Operation},
    nemesis::Outcome,
};

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 250.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 12.0;
/// The numbers of the faults stand above the plot.
const TOP: f64 = 24.0;
const BOTTOM: f64 = 30.0;
/// Powers of ten of a millisecond between which latencies lie: a tenth to ten seconds.
const DECADES: (f64, f64) = (-1.0, 4.0);
/// Points that would cover each other are drawn once: a page of some megabytes shows no more.
const GRID: f64 = 1.5;
/// Parts of a run for quantiles and rates: wider than a pixel, narrower than a fault.
const BUCKETS: f64 = 150.0;

/// What an operation is drawn as: a class of the style sheet and its name.
const KINDS: [(&str, &str); 4] =
    [("write", "write"), ("read", "read or list"), ("refused", "refused"), ("unknown", "no answer")];

/// The run that all pictures share.
pub struct Charts<'a> {
    seconds: f64,
    operations: Vec<&'a Operation>,
    faults: &'a [Outcome],
}

impl<'a> Charts<'a> {
    pub fn new(seconds: f64, operations: &'a [Operation], faults: &'a [Outcome]) -> Self {
        Self { seconds: seconds.max(1.0), operations: operations.iter().filter(|o| is_timed(o)).collect(), faults }
    }

    /// Each operation a point: when it ended, and how long it took. What never ended stands on the upper edge, where it
    /// began.
    pub fn latency_raw(&self) -> String {
        let mut points: [BTreeSet<(i64, i64)>; 4] = Default::default();
        for operation in &self.operations {
            let (at, y) = match operation.outcome {
                Kind::Info | Kind::Invoke => (operation.start, TOP),
                Kind::Ok | Kind::Fail => (operation.end, log_y(millis(operation.end - operation.start))),
            };
            let cell = |v: f64| (v / GRID).round() as i64;
            points[kind(operation)].insert((cell(self.x(at as f64 / 1e9)), cell(y)));
        }
        let mut body = log_axis();
        for ((class, _), points) in KINDS.iter().zip(&points) {
            let mut path = String::new();
            for (x, y) in points {
                let _ = write!(path, "M{:.1} {:.1}h2v2h-2z", *x as f64 * GRID - 1.0, *y as f64 * GRID - 1.0);
            }
            let _ = write!(body, "<path class=\"p {class}\" d=\"{path}\"/>");
        }
        self.frame("Latency of every operation, ms", &KINDS, &body)
    }

    /// Of acknowledged operations, in each short time.
    pub fn latency_quantiles(&self) -> String {
        const QUANTILES: [(&str, &str, f64); 4] =
            [("q50", "median", 0.5), ("q95", "95 %", 0.95), ("q99", "99 %", 0.99), ("q100", "longest", 1.0)];
        let mut buckets: Vec<Vec<f64>> = vec![Vec::new(); self.buckets()];
        for operation in self.operations.iter().filter(|o| o.outcome == Kind::Ok) {
            let bucket = self.bucket(operation.end);
            buckets[bucket].push(millis(operation.end - operation.start));
        }
        let mut body = log_axis();
        for (class, _, quantile) in QUANTILES {
            let values = buckets.iter_mut().map(|bucket| {
                bucket.sort_by(f64::total_cmp);
                let rank = (quantile * bucket.len() as f64).ceil() as usize;
                bucket.get(rank.saturating_sub(1)).map(|latency| log_y(*latency))
            });
            body += &self.line(class, &values.collect::<Vec<_>>());
        }
        self.frame("Quantiles of the latency of acknowledged operations, ms", &QUANTILES.map(|(c, n, _)| (c, n)), &body)
    }

    /// Operations a second, by what became of them.
    pub fn rate(&self) -> String {
        let width = self.seconds / self.buckets() as f64;
        let mut counts = vec![[0.0; 4]; self.buckets()];
        for operation in &self.operations {
            let at = if operation.outcome == Kind::Info { operation.start } else { operation.end };
            counts[self.bucket(at)][kind(operation)] += 1.0 / width;
        }
        let most = counts.iter().flatten().copied().fold(1.0, f64::max);
        let step = nice(most / 4.0);
        let top = (most / step).ceil() * step;
        let y = |rate: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - rate / top);
        let mut body = String::new();
        let mut mark = 0.0;
        while mark <= top {
            body += &grid_line(y(mark), &format!("{mark}"));
            mark += step;
        }
        for (number, (class, _)) in KINDS.iter().enumerate() {
            body += &self.line(class, &counts.iter().map(|count| Some(y(count[number]))).collect::<Vec<_>>());
        }
        self.frame("Operations a second", &KINDS, &body)
    }

    fn frame(&self, title: &str, legend: &[(&str, &str)], body: &str) -> String {
        let keys: String =
            legend.iter().map(|(class, name)| format!("<span class=\"key {class}\">{name}</span>")).collect();
        let bottom = HEIGHT - BOTTOM;
        let mut times = String::new();
        let step = nice(self.seconds / 10.0).max(1.0);
        let mut second = 0.0;
        while second <= self.seconds {
            let x = self.x(second);
            let _ = write!(
                times,
                "<path class=\"grid\" d=\"M{x:.1} {bottom}v4\"/><text class=\"tick\" x=\"{x:.1}\" y=\"{}\" \
                 text-anchor=\"middle\">{second} s</text>",
                bottom + 17.0
            );
            second += step;
        }
        format!(
            "<figure><figcaption>{title}{keys}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
             aria-label=\"{title}\">{}{times}{body}</svg></figure>\n",
            self.shades()
        )
    }

    /// A fault's own time, then that until all agreed again, under the number that it has in the table.
    fn shades(&self) -> String {
        let (mut out, height) = (String::new(), HEIGHT - TOP - BOTTOM);
        for (number, fault) in self.faults.iter().enumerate() {
            let at = |nanos: u64| self.x(nanos as f64 / 1e9);
            let (began, healed, settled) = (at(fault.began), at(fault.healed), at(fault.settled));
            let class = if fault.doubt.is_empty() { "fault" } else { "fault doubt" };
            let _ = write!(
                out,
                "<g><title>{}: {} {}</title><rect class=\"{class}\" x=\"{began:.1}\" y=\"{TOP}\" width=\"{:.1}\" \
                 height=\"{height}\"/><rect class=\"healing\" x=\"{healed:.1}\" y=\"{TOP}\" width=\"{:.1}\" \
                 height=\"{height}\"/><text class=\"number\" x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text></g>",
                fault.fault,
                fault.hit.join(" "),
                fault.evidence,
                healed - began,
                (settled - healed).max(0.0),
                f64::midpoint(began, healed),
                TOP - 8.0,
                number + 1
            );
        }
        out
    }

    /// Broken where there is no value.
    fn line(&self, class: &str, values: &[Option<f64>]) -> String {
        let width = self.seconds / values.len() as f64;
        let (mut path, mut drawing) = (String::new(), false);
        for (number, value) in values.iter().enumerate() {
            if let Some(y) = value {
                let x = self.x((number as f64 + 0.5) * width);
                let _ = write!(path, "{}{x:.1} {y:.1}", if drawing { 'L' } else { 'M' });
            }
            drawing = value.is_some();
        }
        format!("<path class=\"l {class}\" d=\"{path}\"/>")
    }

    fn buckets(&self) -> usize {
        self.seconds.min(BUCKETS).ceil() as usize
    }

    fn bucket(&self, nanos: u64) -> usize {
        let at = nanos as f64 / 1e9 / self.seconds * self.buckets() as f64;
        (at as usize).min(self.buckets() - 1)
    }

    fn x(&self, seconds: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * (seconds / self.seconds).clamp(0.0, 1.0)
    }
}

fn kind(operation: &Operation) -> usize {
    match operation.outcome {
        Kind::Ok if operation.f.is_write() => 0,
        Kind::Ok => 1,
        Kind::Fail => 2,
        Kind::Info | Kind::Invoke => 3,
    }
}

fn millis(nanos: u64) -> f64 {
    nanos as f64 / 1e6
}

fn log_y(millis: f64) -> f64 {
    let (low, high) = DECADES;
    let share = ((millis.max(1e-6).log10() - low) / (high - low)).clamp(0.0, 1.0);
    TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - share)
}

fn log_axis() -> String {
    [(0.1, "0.1"), (1.0, "1"), (10.0, "10"), (100.0, "100"), (1000.0, "1 s"), (10_000.0, "10 s")]
        .map(|(millis, text)| grid_line(log_y(millis), text))
        .concat()
}

fn grid_line(y: f64, text: &str) -> String {
    format!(
        "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{}\"/><text class=\"tick\" x=\"{}\" y=\"{:.1}\" \
         text-anchor=\"end\">{text}</text>",
        WIDTH - RIGHT,
        LEFT - 6.0,
        y + 4.0
    )
}

/// 1, 2 or 5 times a power of ten, at least as large.
fn nice(least: f64) -> f64 {
    let power = 10f64.powf(least.max(1e-9).log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|times| times * power).into_iter().find(|step| *step >= least).unwrap_or(10.0 * power)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round_numbers() {
        assert_eq!([0.3, 1.0, 6.0, 12.0].map(nice), [0.5, 1.0, 10.0, 20.0]);
    }

    #[test]
    fn latencies_stand_between_the_axes() {
        assert_eq!(log_y(0.1), HEIGHT - BOTTOM);
        assert_eq!(log_y(10_000.0), TOP);
        assert!(log_y(0.0) <= HEIGHT - BOTTOM && log_y(1e9) >= TOP);
    }
}
