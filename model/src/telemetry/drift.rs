//! How fast a host's clock runs beside this controller's, from the times that its beats carry.
//!
//! ```text
//!   host        s ──── beat ────┐              s − r = offset − delay,  delay ≥ 0
//!   controller                  r              best of a window: offset − the least delay of some twenty beats
//!
//!   first window ├──────────── span ────────────┤ last window      change of the best ± DELAY = change of the offset
//! ```
//!
//! Nothing is averaged: what is concluded holds whatever the delays were, as long as in each window one beat took no
//! longer than `DELAY_NANOS`. So a host is called unfit only when no such delays could explain what was heard, and fit
//! again only when none could hide a drift. A clock that stood still for a while, of a machine that was paused, counts as
//! one that drifts: a lease would have been counted on it.
//!
//! Deliberately not here: what follows from it.

use std::collections::VecDeque;

use crate::lease::DRIFT_PPM;

/// Beats of this time give one point: some twenty, of which the quickest counts.
const WINDOW_NANOS: u64 = 10_000_000_000;
/// Half of them. With fewer, the host or its network stood still meanwhile, and all that came may have come late.
const ENOUGH_BEATS: u32 = 10;
/// The quickest beat of a window takes no longer. A network or a host on which it does holds no lease either.
const DELAY_NANOS: i64 = 500_000_000;
/// Points are compared with one from at most this long ago, and at least seven eighths of that once it has passed: long
/// enough for `DELAY_NANOS` to be little more than half of what the bound allows, and soon enough to forget a clock that
/// was mended.
const BASE_NANOS: u64 = 1_000_000_000_000;
/// Between two points that are kept for that. What went before them is forgotten when the clock has gone at another rate
/// since: it was mended, or broke.
const STEP_NANOS: u64 = BASE_NANOS / 8;

const MILLION: i128 = 1_000_000;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drift {
    /// When a beat was last heard.
    heard: u64,
    window: Option<Window>,
    /// The points that later ones are compared with, the oldest first: at most nine.
    anchors: VecDeque<Point>,
    latest: Option<Point>,
    /// Since when it has been unfit, on our clock.
    unfit_since: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Window {
    since: u64,
    best: Point,
    beats: u32,
}

/// The host's clock less ours, less the delay, at a time on ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Point {
    at: u64,
    offset: i64,
}

/// What was measured: the host's clock gains so many parts in a million on ours, give or take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    pub ppm: i64,
    pub uncertainty_ppm: u64,
    pub span_nanos: u64,
}

/// Whether a lease may be counted on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fitness {
    /// Within the bound, whatever the delays were.
    Fit,
    /// Beyond it, whatever the delays were.
    Unfit,
    /// Not measured for long enough to say.
    Open,
}

impl Drift {
    /// A beat that was sent at `sent` on the host's clock was heard at `at` on ours; both in nanoseconds.
    pub fn note(&mut self, at: u64, sent: u64) {
        // The host's clock counts from its boot: one that is younger than the silence before this beat was booted in it.
        if sent < at.saturating_sub(self.heard).saturating_add(DELAY_NANOS.unsigned_abs()) {
            *self = Self::default();
        }
        self.heard = at;
        let offset = i128::from(sent) - i128::from(at);
        let point = Point { at, offset: i64::try_from(offset).unwrap_or(if offset < 0 { i64::MIN } else { i64::MAX }) };
        match &mut self.window {
            Some(window) if at < window.since.saturating_add(WINDOW_NANOS) => {
                window.beats += 1;
                if point.offset > window.best.offset {
                    window.best = point;
                }
            }
            window => {
                let ended = window.replace(Window { since: at, best: point, beats: 1 });
                if let Some(window) = ended.filter(|window| window.beats >= ENOUGH_BEATS) {
                    self.conclude(window.best);
                }
            }
        }
    }

    fn conclude(&mut self, point: Point) {
        self.latest = Some(point);
        let since = |anchor: &Point| point.at.saturating_sub(anchor.at);
        while self.anchors.get(1).is_some_and(|anchor| since(anchor) >= BASE_NANOS - STEP_NANOS) {
            self.anchors.pop_front();
        }
        let recent = self.anchors.iter().rposition(|anchor| since(anchor) >= STEP_NANOS).unwrap_or(0);
        if self.anchors.get(recent).is_some_and(|recent| apart(self.anchors[0], *recent, point)) {
            self.anchors.drain(..recent);
        }
        if self.anchors.back().is_none_or(|anchor| since(anchor) >= STEP_NANOS) {
            self.anchors.push_back(point);
        }
        self.unfit_since = (self.fitness() == Fitness::Unfit).then(|| self.unfit_since.unwrap_or(point.at));
    }

    /// Since when it has been unfit without a break, in nanoseconds on our clock; `None` when it is not.
    pub fn unfit_since(&self) -> Option<u64> {
        self.unfit_since
    }

    /// `None` until there are two points.
    pub fn rate(&self) -> Option<Rate> {
        let (change, span) = self.change()?;
        let ppm = |nanos: i128| i64::try_from(nanos * MILLION / i128::from(span)).unwrap_or(i64::MAX);
        Some(Rate { ppm: ppm(change), uncertainty_ppm: ppm(DELAY_NANOS.into()).unsigned_abs(), span_nanos: span })
    }

    pub fn fitness(&self) -> Fitness {
        let Some((change, span)) = self.change() else { return Fitness::Open };
        let allowed = i128::from(span) * i128::from(DRIFT_PPM) / MILLION;
        if change.abs() > allowed + i128::from(DELAY_NANOS) {
            Fitness::Unfit
        } else if change.abs() + i128::from(DELAY_NANOS) <= allowed {
            Fitness::Fit
        } else {
            Fitness::Open
        }
    }

    /// By how much the offset changed, and over which time.
    fn change(&self) -> Option<(i128, u64)> {
        let (change, span) = between(*self.anchors.front()?, self.latest?);
        (span > 0).then_some((change, span))
    }
}

fn between(from: Point, to: Point) -> (i128, u64) {
    (i128::from(to.offset) - i128::from(from.offset), to.at.saturating_sub(from.at))
}

/// Whether no one rate explains both what was seen from `first` on and from `recent` on, whatever the delays were.
fn apart(first: Point, recent: Point, last: Point) -> bool {
    let ((whole, long), (part, short)) = (between(first, last), between(recent, last));
    let (long, short) = (i128::from(long), i128::from(short));
    (whole * short - part * long).abs() > i128::from(DELAY_NANOS) * (long + short)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MILLI: u64 = 1_000_000;
    const SECOND: u64 = 1_000 * MILLI;
    const BEAT: u64 = crate::lease::BEAT_NANOS;

    /// Nanoseconds on a clock that runs `ppm` parts in a million too fast, when `real` have passed in truth.
    fn on_clock(start: u64, real: u64, ppm: i64) -> u64 {
        let passed = i128::from(real) * (MILLION + i128::from(ppm)) / MILLION;
        start + u64::try_from(passed).unwrap()
    }

    /// A stretch of beats, one each half second of truth from `from`; `delay` of each, `None` for one that is lost.
    fn hear(drift: &mut Drift, from: u64, seconds: u64, clocks: (i64, i64), delay: impl Fn(u64) -> Option<u64>) {
        for beat in 0..seconds * SECOND / BEAT {
            let sent = from + beat * BEAT;
            if let Some(delay) = delay(beat) {
                let heard = on_clock(7 * SECOND, sent + delay, clocks.1);
                drift.note(heard, on_clock(9_000 * SECOND, sent, clocks.0));
            }
        }
    }

    /// Each beat's delay by a hash of its number: even ones, long ones, and some that are lost.
    fn jitter(seed: u64, most_millis: u64) -> impl Fn(u64) -> Option<u64> {
        move |beat| {
            let mixed =
                (beat ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (!mixed.is_multiple_of(5)).then(|| (mixed >> 20) % (most_millis * MILLI + 1))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Delays of up to half a second, calm and rough by turns, and no beat of one in five.
        #[test]
        fn a_clock_within_the_bound_is_never_called_unfit(
            host in -490_i64..=490,
            ours in -490_i64..=490,
            stretches in prop::collection::vec((any::<u64>(), 0_u64..=500, 0_u64..=500, 5_u64..400), 1..8),
        ) {
            let (mut drift, mut from) = (Drift::default(), 0);
            for (seed, most, least, seconds) in stretches {
                let delay = |beat| jitter(seed, most)(beat).map(|delay| (delay + least * MILLI).min(500 * MILLI));
                for step in 0..seconds / 5 + 1 {
                    hear(&mut drift, from + step * 5 * SECOND, 5, (host, ours), delay);
                    prop_assert_ne!(drift.fitness(), Fitness::Unfit, "{:?} after {} s", drift.rate(), from / SECOND);
                }
                from += (seconds / 5 + 1) * 5 * SECOND;
            }
        }

        #[test]
        fn ten_times_the_bound_is_seen_within_two_and_a_half_minutes(
            fast in any::<bool>(),
            ours in -490_i64..=490,
            seed in any::<u64>(),
            most in 0_u64..=500,
        ) {
            let mut drift = Drift::default();
            let host = if fast { 10_500 } else { -10_500 };
            hear(&mut drift, 0, 150, (host, ours), jitter(seed, most));
            prop_assert_eq!(drift.fitness(), Fitness::Unfit, "{:?}", drift.rate());
        }

        #[test]
        fn a_good_clock_is_known_to_be_fit_in_twenty_minutes_and_remains_so(
            host in -200_i64..=200,
            seed in any::<u64>(),
            most in 0_u64..=100,
        ) {
            let mut drift = Drift::default();
            hear(&mut drift, 0, 1_200, (host, 0), jitter(seed, most));
            for from in (1_200..3_600).step_by(20) {
                prop_assert_eq!(drift.fitness(), Fitness::Fit, "{:?} after {} s", drift.rate(), from);
                let delay = |beat| jitter(seed, most)(from * 2 + beat);
                hear(&mut drift, from * SECOND, 20, (host, 0), delay);
            }
        }
    }

    #[test]
    fn a_rate_is_told_with_what_it_is_worth() {
        let mut drift = Drift::default();
        assert_eq!((drift.rate(), drift.fitness()), (None, Fitness::Open));
        hear(&mut drift, 0, 600, (300, 0), |_| Some(MILLI));
        let rate = drift.rate().unwrap();
        assert!((299..=301).contains(&rate.ppm) && rate.uncertainty_ppm < 900, "{rate:?}");
        assert_eq!(drift.fitness(), Fitness::Open, "delays could hide another rate");
        hear(&mut drift, 600 * SECOND, 400, (300, 0), |_| Some(MILLI));
        assert!(drift.rate().unwrap().uncertainty_ppm <= 520, "{:?}", drift.rate());
    }

    #[test]
    fn a_clock_that_is_mended_is_unfit_for_no_longer_than_five_minutes() {
        let mut drift = Drift::default();
        hear(&mut drift, 0, 600, (0, 0), |_| Some(MILLI));
        let (broke_at, mended_at) = (600 * SECOND, 620 * SECOND);
        for beat in 0..320 * SECOND / BEAT {
            let sent = broke_at + beat * BEAT;
            // A tenth too fast for twenty seconds.
            let ahead = (sent.min(mended_at) - broke_at) / 10;
            drift.note(7 * SECOND + sent + MILLI, 9_000 * SECOND + sent + ahead);
            let since = sent.saturating_sub(mended_at);
            if (20 * SECOND..100 * SECOND).contains(&since) {
                assert_eq!(drift.fitness(), Fitness::Unfit, "{} s after", since / SECOND);
            }
        }
        assert_eq!(drift.fitness(), Fitness::Open, "{:?}", drift.rate());
    }

    #[test]
    fn a_clock_that_is_mended_is_fit_again_and_another_boot_begins_anew() {
        let mut drift = Drift::default();
        hear(&mut drift, 0, 300, (20_000, 0), |_| Some(MILLI));
        assert_eq!(drift.fitness(), Fitness::Unfit);
        let (mended_at, ahead) = (300 * SECOND, 300 * SECOND / 50);
        for beat in 0..1_600 * SECOND / BEAT {
            let sent = mended_at + beat * BEAT;
            drift.note(7 * SECOND + sent + MILLI, 9_000 * SECOND + sent + ahead);
        }
        assert_eq!(drift.fitness(), Fitness::Fit, "{:?}", drift.rate());
        drift.note(1_908 * SECOND, 10_000 * SECOND);
        assert_eq!(drift.fitness(), Fitness::Fit, "a datagram was overtaken");
        drift.note(1_950 * SECOND, 30 * SECOND);
        assert_eq!((drift.rate(), drift.fitness()), (None, Fitness::Open), "the host was booted");
    }

    #[test]
    fn a_host_that_is_booted_again_soon_after_a_boot_has_no_drifting_clock() {
        let mut drift = Drift::default();
        for (booted, beats) in [(100, 40), (145, 60), (1_000, 60)] {
            for beat in 8..beats {
                drift.note((booted + beat) * SECOND, beat * SECOND);
                assert_ne!(drift.fitness(), Fitness::Unfit, "booted at {booted}, {beat} s ago: {:?}", drift.rate());
            }
        }
    }

    #[test]
    fn a_clock_that_stood_still_for_seconds_counts_as_one_that_drifts() {
        let mut drift = Drift::default();
        for beat in 0..200 {
            let stood_still = if beat < 100 { 0 } else { 10 * SECOND };
            drift.note(100 * SECOND + beat * BEAT, 50 * SECOND + beat * BEAT - stood_still);
        }
        assert_eq!(drift.fitness(), Fitness::Unfit);
    }

    #[test]
    fn absurd_times_are_no_mistake() {
        let mut drift = Drift::default();
        for (at, sent) in [(0, u64::MAX), (u64::MAX, 0), (0, 0), (u64::MAX, u64::MAX), (1, u64::MAX)] {
            drift.note(at, sent);
            let _ = (drift.rate(), drift.fitness());
        }
    }
}
