//! What a controller heard lately. Soft: never replicated, lost with the process, rebuilt within a few heartbeats.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    NodeId, VmId,
    lease::{self, Grant},
};

pub use drift::{Drift, Fitness, Rate};

mod drift;

/// By node. Times are nanoseconds of this controller's CLOCK_BOOTTIME, which nobody steps.
#[derive(Clone, Debug, Default)]
pub struct Telemetry {
    pub nodes: BTreeMap<NodeId, Heard>,
    /// What the clock says now.
    pub clock: u64,
    /// Since when this controller has been leader: silence is counted from here at the earliest.
    pub leader_since: u64,
    /// When it last began to ask a majority whether it still leads, was told that it does, and has since applied all
    /// that was in the log then. `None` when it does not lead.
    pub confirmed: Option<u64>,
}

impl Telemetry {
    /// Whether the leader has no lease of the host to fear any more.
    pub fn may_give_away(&self, node: NodeId) -> bool {
        let answered = self.nodes.get(&node).and_then(|heard| heard.answered);
        self.clock >= lease::may_be_given_away_at(answered, self.leader_since)
    }

    /// From here on the host's beats grant it nothing: it is about to be declared lost. False when it has just been
    /// answered, so that it must not be.
    pub fn condemn(&mut self, node: NodeId, incarnation: u64) -> bool {
        let may = self.may_give_away(node);
        if may {
            self.nodes.entry(node).or_default().condemned = Some(incarnation);
        }
        may
    }

    /// The quorum refused to declare it lost, so it may have leases again.
    pub fn spare(&mut self, node: NodeId) {
        if let Some(heard) = self.nodes.get_mut(&node) {
            heard.condemned = None;
        }
    }

    /// A beat of `node` was believed and is being answered. As the leader, says how long the host may go on.
    /// `standing`: what [`crate::State::has_standing`] says of the sender, looked up before what was heard is locked,
    /// because a host is condemned under that lock first. `unanswered_millis`: for how long it has heard no answer.
    pub fn believe(&mut self, node: NodeId, incarnation: u64, unanswered_millis: u64, standing: bool) -> Option<Grant> {
        let clock = self.clock;
        let heard = self.nodes.entry(node).or_default();
        heard.incarnation = incarnation;
        // A host that no answer reaches is as good as silent: it has no lease, and nothing can be asked of it.
        if unanswered_millis.saturating_mul(1_000_000) >= lease::LEASE_NANOS {
            return None;
        }
        heard.at = clock;
        self.grant(node, incarnation, standing)
    }

    fn grant(&mut self, node: NodeId, incarnation: u64, standing: bool) -> Option<Grant> {
        let (clock, confirmed) = (self.clock, self.confirmed?);
        let heard = self.nodes.entry(node).or_default();
        if !standing || heard.condemned == Some(incarnation) {
            return None;
        }
        let grant = Grant::given(clock, confirmed)?;
        heard.answered = Some(clock);
        Some(grant)
    }

    /// A beat of `node` was heard that it sent at `sent` on its own CLOCK_BOOTTIME: its clock is compared with ours. Beats
    /// of an earlier incarnation may be of an earlier boot and come late; with a new one the measurement begins anew.
    pub fn compare_clocks(&mut self, node: NodeId, incarnation: u64, sent: u64) {
        let clock = self.clock;
        let heard = self.nodes.entry(node).or_default();
        if incarnation > heard.incarnation {
            heard.drift = Drift::default();
        }
        if incarnation >= heard.incarnation {
            heard.drift.note(clock, sent);
        }
    }

    /// Whether more clocks go wrong in one direction, measured by ours, than go right together with it: then it is ours
    /// that drifts. So a single node is never believed against us, and two are when no other speaks for us.
    pub fn own_clock_drifts(&self) -> bool {
        let heard = self.nodes.values().filter(|heard| self.clock.saturating_sub(heard.at) < lease::LEASE_NANOS);
        let (mut fast, mut slow, mut right) = (0_usize, 0_usize, 1_usize);
        for Heard { drift, .. } in heard {
            match drift.unfit_since().and(drift.rate()) {
                None => right += 1,
                Some(rate) if rate.ppm > 0 => fast += 1,
                Some(_) => slow += 1,
            }
        }
        fast.max(slow) > fast.min(slow) + right
    }

    /// A session of the node opens here: its silence is counted from now.
    pub fn greet(&mut self, node: NodeId) {
        let heard = self.nodes.entry(node).or_default();
        (heard.at, heard.answered) = (self.clock, Some(self.clock));
    }

    /// A term as leader begins.
    pub fn lead(&mut self) {
        (self.leader_since, self.confirmed) = (self.clock, None);
        self.nodes.values_mut().for_each(|heard| (heard.answered, heard.condemned) = (None, None));
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// When a beat or a new session was last heard.
    pub at: u64,
    /// When this leader last granted it a lease.
    pub answered: Option<u64>,
    /// The incarnation that is about to be declared lost.
    pub condemned: Option<u64>,
    pub incarnation: u64,
    pub drift: Drift,
    pub status: NodeStatus,
    pub vms: BTreeMap<VmId, VmStatus>,
}

/// A host's status as its heartbeats carry it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Used CPU in thousandths of all CPUs of the host.
    pub cpu_permille: u32,
    pub memory_used_bytes: u64,
    pub memory_total_bytes: u64,
    pub disk_used_bytes: u64,
    pub disk_total_bytes: u64,
    /// Its guard feeds a watchdog, which resets the host when guard, agent and kernel hang together.
    pub watchdog: bool,
}

/// One machine's status as heartbeats carry it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    pub vm: VmId,
    pub epoch: u64,
    pub phase: crate::Phase,
    /// CPU time used since it started.
    pub cpu_time_millis: u64,
    pub memory_used_bytes: u64,
    pub disk_used_bytes: u64,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    /// Set while it is being created.
    pub progress: Option<Progress>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// `fetch image`, `make disk`, `plug network`, `start`.
    pub step: String,
    /// 0 to 100, of the whole creation.
    pub percent: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(1);
    const LONG: u64 = 100 * lease::LEASE_NANOS;

    /// A leader since `LONG` that was confirmed then.
    fn leader() -> Telemetry {
        let mut ears = Telemetry { clock: LONG, ..Telemetry::default() };
        ears.lead();
        ears.confirmed = Some(LONG);
        ears
    }

    #[test]
    fn only_a_confirmed_leader_grants_and_only_to_who_stands_and_hears() {
        let mut ears = leader();
        assert_eq!(ears.believe(NODE, 1, 0, true), Some(Grant { age_nanos: 0 }));
        assert_eq!(ears.believe(NODE, 1, 0, false), None, "it does not stand");
        assert_eq!(ears.believe(NODE, 1, lease::LEASE_NANOS / 1_000_000, true), None, "it hears no answers");
        assert_eq!(ears.nodes[&NODE].answered, Some(LONG));
        ears.clock += lease::LEASE_NANOS;
        assert_eq!(ears.believe(NODE, 1, 0, true), None, "the confirmation is too old");
        assert_eq!((ears.nodes[&NODE].at, ears.nodes[&NODE].answered), (ears.clock, Some(LONG)));
        ears.confirmed = None;
        assert_eq!(ears.believe(NODE, 1, 0, true), None, "it does not lead");
    }

    #[test]
    fn who_is_condemned_is_granted_nothing_until_it_is_spared_or_comes_back() {
        let mut ears = leader();
        ears.believe(NODE, 1, 0, true);
        assert!(!ears.condemn(NODE, 1), "it has a lease");
        ears.clock = lease::may_be_given_away_at(Some(LONG), LONG);
        ears.confirmed = Some(ears.clock);
        assert!(ears.condemn(NODE, 1));
        assert_eq!(ears.believe(NODE, 1, 0, true), None);
        assert!(ears.believe(NODE, 2, 0, true).is_some(), "it attached again");
        ears.spare(NODE);
        assert!(ears.believe(NODE, 1, 0, true).is_some());
    }

    #[test]
    fn the_leaders_own_clock_is_suspected_when_it_is_alone_with_what_it_says() {
        // Each node's drift in parts in a million, beside a leader that is right.
        let suspected = |drifts: &[i64]| {
            let mut ears = leader();
            for second in 0..60_u64 {
                ears.clock = LONG + second * 1_000_000_000;
                for (number, ppm) in (1..).zip(drifts) {
                    let passed = i128::from(second) * (1_000_000_000 + i128::from(*ppm) * 1_000);
                    ears.believe(NodeId(number), 1, 0, true);
                    ears.compare_clocks(NodeId(number), 1, LONG + u64::try_from(passed).unwrap());
                }
            }
            let suspected = ears.own_clock_drifts();
            ears.clock += lease::LEASE_NANOS;
            assert!(!ears.own_clock_drifts(), "nobody is heard");
            suspected
        };
        let tenth = 100_000;
        assert!(!suspected(&[]) && !suspected(&[0, 0, 0]) && !suspected(&[tenth]));
        assert!(suspected(&[tenth, tenth]) && suspected(&[-tenth, -tenth, -tenth]) && suspected(&[tenth; 4]));
        assert!(!suspected(&[tenth, -tenth]), "they do not agree");
        assert!(!suspected(&[tenth, tenth, 0]), "one speaks for the leader");
        assert!(suspected(&[tenth, tenth, tenth, 0]));
    }

    #[test]
    fn a_new_term_forgets_what_the_last_one_granted() {
        let mut ears = leader();
        ears.believe(NODE, 1, 0, true);
        ears.clock = lease::may_be_given_away_at(Some(LONG), LONG);
        assert!(ears.condemn(NODE, 1));
        ears.confirmed = Some(ears.clock);
        ears.lead();
        assert_eq!(ears.believe(NODE, 1, 0, true), None, "nobody has confirmed it in this term");
        assert!(!ears.may_give_away(NODE), "what another leader granted since may still last");
        ears.clock = lease::may_be_given_away_at(None, ears.leader_since);
        assert!(ears.may_give_away(NODE));
        ears.greet(NODE);
        assert!(!ears.may_give_away(NODE), "it has just said hello");
    }
}
