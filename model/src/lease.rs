//! The rule of leases: how long a host may run what must not run twice, and when the quorum may give it away.
//!
//! ```text
//!   host    s: beat sent ────────────────────────────── s + LEASE − age: guests stop running
//!   leader        c: asked a majority   r: beat heard, answered with age = r − c
//!                 └── still leader at c ─┘              r + LEASE × (1 + drift) + MARGIN: may be given away
//! ```
//!
//! `s` is on the host's clock, `c` and `r` on the leader's; all are CLOCK_BOOTTIME in nanoseconds, which no step of
//! the wall clock moves and which goes on while a machine sleeps. The lease is counted from the send, so a late answer
//! grants nothing that has passed; and from the confirmation, so a leader that was deposed after it grants nothing
//! beyond what its successor waits for. The proof sketch is in ADR 0014.
//!
//! Deliberately not here: clocks, and what follows from a lease's end.

use serde::{Deserialize, Serialize};

const SECOND: u64 = 1_000_000_000;

/// How long a host may go on after the beat that was answered.
pub const LEASE_NANOS: u64 = 5 * SECOND;
/// How much faster or slower than another one a host's clock may run: a thousandth, ten times what crystals do.
pub const DRIFT_PPM: u64 = 1_000;
/// From the end of the lease to the last instruction of a guest: the guard's timer, its signal, and the host's scheduler.
pub const MARGIN_NANOS: u64 = SECOND / 2;
/// The first this many beats without an answer are chance; after them a host gets no new machines.
pub const SUSPICION_NANOS: u64 = 3 * BEAT_NANOS;
/// Beats are sent this often.
pub const BEAT_NANOS: u64 = SECOND / 2;

/// What the leader's answer to a beat carries when the host may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// How long before the answer the leader last asked a majority whether it still leads, and was told that it does.
    pub age_nanos: u64,
}

impl Grant {
    /// The leader's side, when it answers a beat at `now`; `None` when the confirmation is too old to be worth anything.
    pub fn given(now: u64, confirmed: u64) -> Option<Self> {
        let age_nanos = now.checked_sub(confirmed)?;
        (age_nanos < LEASE_NANOS).then_some(Self { age_nanos })
    }

    /// The host's side: until when it may go on, for a beat that it sent at `sent`.
    pub fn until(self, sent: u64) -> u64 {
        sent.saturating_add(LEASE_NANOS.saturating_sub(self.age_nanos))
    }
}

/// From when on the leader may give away what is on a host whose last answered beat it heard at `answered`, or never.
///
/// `leader_since`: when this controller became leader. What an earlier leader granted has ended by then too, for that
/// leader's last confirmation came before this one's election.
pub fn may_be_given_away_at(answered: Option<u64>, leader_since: u64) -> u64 {
    let since = answered.map_or(leader_since, |answered| answered.max(leader_since));
    since.saturating_add(LEASE_NANOS + LEASE_NANOS * DRIFT_PPM / 1_000_000 + MARGIN_NANOS)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Nanoseconds that pass on a clock that runs `ppm` parts in a million too fast while `real` pass in truth.
    fn on_clock(real: u64, ppm: i64) -> u64 {
        let passed = i128::from(real) * (1_000_000 + i128::from(ppm)) / 1_000_000;
        u64::try_from(passed).unwrap()
    }

    fn truth_of(passed: u64, ppm: i64) -> u64 {
        u64::try_from(i128::from(passed) * 1_000_000 / (1_000_000 + i128::from(ppm))).unwrap()
    }

    proptest! {
        /// Events in true time; each clock has its own start and its own rate, together within the bound.
        #[test]
        fn a_host_has_stopped_before_its_machines_may_be_given_away(
            confirmed in 0..SECOND * 100,
            // Often the worst: confirmed, sent and heard at the same moment.
            sent_after in prop_oneof![Just(10 * SECOND), 0..SECOND * 20],
            travelled in prop_oneof![Just(0), 0..SECOND * 20],
            elected_after in prop_oneof![Just(0), 0..SECOND * 60],
            host_ppm in -400_i64..=400,
            leader_ppm in -400_i64..=400,
            next_ppm in -400_i64..=400,
            host_start in 0..SECOND * 1000,
            leader_start in 0..SECOND * 1000,
            next_start in 0..SECOND * 1000,
        ) {
            let sent = confirmed.saturating_sub(10 * SECOND) + sent_after;
            let heard = (sent + travelled).max(confirmed);
            let host = |at: u64| host_start + on_clock(at, host_ppm);
            let leader = |at: u64| leader_start + on_clock(at, leader_ppm);
            let Some(grant) = Grant::given(leader(heard), leader(confirmed)) else { return Ok(()) };
            let until = grant.until(host(sent));
            let stopped = truth_of(until - host_start, host_ppm);
            let given_away = may_be_given_away_at(Some(leader(heard)), 0);
            prop_assert!(stopped < truth_of(given_away - leader_start, leader_ppm), "by the leader that granted it");
            // Another leader was elected after this one's last confirmation, and never heard of the host.
            let elected = confirmed + elected_after;
            let given_away = may_be_given_away_at(None, next_start + on_clock(elected, next_ppm));
            prop_assert!(stopped < truth_of(given_away - next_start, next_ppm), "by its successor");
        }
    }

    #[test]
    fn an_old_confirmation_or_one_from_the_future_grants_nothing() {
        assert_eq!(Grant::given(LEASE_NANOS + 7, 7), None);
        assert_eq!(Grant::given(7, 8), None);
        assert_eq!(Grant::given(9, 7).map(|grant| grant.until(100)), Some(100 + LEASE_NANOS - 2));
    }
}
