//! The time that a leader stamps into entries: carried on by CLOCK_BOOTTIME, and led by the wall clock (ADR 0028).
//!
//! A wall clock that is stepped, by a person or by a time service, must not make the cloud's time jump: what is charged, due
//! and expired goes by that. So it is read once, when the controller starts; from then on time goes as fast as CLOCK_BOOTTIME,
//! and up to one part in [`FOLLOWS`] faster or slower until it is the wall clock's again. It is never behind what the log has.

use std::{
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use model::Timestamp;
use nix::time::{ClockId, clock_gettime};

/// A hundredth: twenty times what a time service slews by (500 ppm), so that an unstepped clock is followed exactly; and less
/// than anybody would find wrong on a bill.
const FOLLOWS: u64 = 100;
/// A busy machine reads its two clocks a moment apart. More than this is a step, and said.
const STEPPED_NANOS: u64 = 1_000_000_000;
const NANOS_PER_MILLI: u64 = 1_000_000;

/// The cloud's time as one controller carries it on.
pub struct CloudClock(Mutex<Carried>);

/// Nanoseconds.
#[derive(Clone, Copy, Debug)]
struct Carried {
    at: u64,
    boot: u64,
    /// Whether it is known that the wall clock is elsewhere.
    apart: bool,
}

impl CloudClock {
    /// The wall clock's time, as it is now.
    pub fn begin() -> Self {
        Self(Mutex::new(Carried { at: wall(), boot: boottime(), apart: false }))
    }

    /// Never goes back, and is not before `known`, which the log has already.
    pub fn read(&self, known: Timestamp) -> Timestamp {
        let mut carried = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let wall = wall();
        carried.advance(wall, boottime(), known.0.saturating_mul(NANOS_PER_MILLI));
        let apart = wall.abs_diff(carried.at) > STEPPED_NANOS;
        if apart && !carried.apart {
            let ahead_seconds = (i128::from(wall) - i128::from(carried.at)) / 1_000_000_000;
            tracing::warn!(
                ahead_seconds,
                "alert: this machine's wall clock was stepped; the cloud's time follows it by one part in {FOLLOWS}"
            );
        }
        carried.apart = apart;
        Timestamp(carried.at / NANOS_PER_MILLI)
    }
}

impl Carried {
    fn advance(&mut self, wall: u64, boot: u64, known: u64) {
        let elapsed = boot.saturating_sub(self.boot);
        let (straight, correction) = (self.at + elapsed, elapsed / FOLLOWS);
        self.at = wall.clamp(straight - correction, straight + correction).max(known);
        self.boot = self.boot.max(boot);
    }
}

fn wall() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Until the year 2554.
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX / 2)
}

fn boottime() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("every supported kernel has CLOCK_BOOTTIME");
    let part = |value: i64| u64::try_from(value).unwrap_or(0);
    part(now.tv_sec()) * 1_000_000_000 + part(now.tv_nsec())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const HOUR: u64 = 3600 * SECOND;

    /// Reads once a millisecond for a minute of boot time, the wall clock ahead by so much; the time that went by.
    fn minute(carried: &mut Carried, ahead: i64) -> u64 {
        let began = carried.at;
        let (at, boot) = (carried.at, carried.boot);
        for millis in 1..=60_000 {
            let gone = millis * NANOS_PER_MILLI;
            let before = carried.at;
            carried.advance(at.saturating_add_signed(ahead) + gone, boot + gone, 0);
            assert!(carried.at >= before);
        }
        carried.at - began
    }

    fn begun() -> Carried {
        Carried { at: 1_000_000 * SECOND, boot: 7 * SECOND, apart: false }
    }

    #[test]
    fn a_wall_clock_that_is_not_stepped_is_followed_exactly() {
        assert_eq!(minute(&mut begun(), 0), 60 * SECOND);
        // Half a second off is caught up within the minute: a hundredth of it is 0.6 s.
        let mut carried = begun();
        assert_eq!(minute(&mut carried, 500_000_000), 60 * SECOND + 500_000_000);
        assert_eq!(minute(&mut carried, 0), 60 * SECOND);
    }

    #[test]
    fn a_step_changes_how_fast_time_goes_by_a_hundredth_and_no_more() {
        assert_eq!(minute(&mut begun(), i64::try_from(HOUR).unwrap()), 60 * SECOND + 600_000_000);
        assert_eq!(minute(&mut begun(), -i64::try_from(HOUR).unwrap()), 60 * SECOND - 600_000_000);
    }

    #[test]
    fn it_is_never_before_what_the_log_has_and_goes_on_from_there() {
        let mut carried = begun();
        let known = carried.at + HOUR;
        let boot = carried.boot;
        carried.advance(carried.at + SECOND, boot + SECOND, known);
        assert_eq!(carried.at, known);
        carried.advance(carried.at, boot + 2 * SECOND, known);
        assert!(carried.at > known, "it does not stand still until the wall clock has caught up");
    }
}
