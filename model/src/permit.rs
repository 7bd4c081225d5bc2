//! Which machines a host may run just now: its lease and its assignment joined. The host's agent, its guard and the
//! simulation use these same functions.
//!
//! ```text
//!   a beat was answered with a grant ──► lease: (incarnation, until) ──┐ the same incarnation
//!   an assignment was obeyed ──────────► wishes: (incarnation, …) ─────┴──► permit ──► guard
//! ```
//!
//! An exclusive machine may run while its permit does: the lease has not ended, and an assignment *of the lease's own
//! incarnation* names it at this placement. A host that was given up as lost must attach again, which gives it another
//! incarnation; so a new lease never revives what only an old assignment names. Until both are there, the old permit
//! stays in force and simply ends in its time.
//!
//! Deliberately not here: clocks, and what happens to a guest that may not run.

use crate::{Assignment, Recovery, VmId, VmWish};

/// Placements that are remembered as denied, the newest of them. Also when no guest of one is here: the hypervisor may
/// be long about a start, and end it after the machine was given away. More than a host can be about at once, several
/// times over, and no more than fits beside its machines where the guard reads them.
const MOST_DENIED: usize = 512;

/// What is in force on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permit {
    /// Of the lease, and of the assignment that named the machines.
    pub incarnation: u64,
    /// CLOCK_BOOTTIME in nanoseconds.
    pub until: u64,
    pub machines: Vec<Machine>,
}

/// A machine of this host at one placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    pub vm: VmId,
    pub epoch: u64,
    pub standing: Standing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Standing {
    /// It must not run twice: it may run while the lease lasts.
    Leased,
    /// It may run whatever becomes of the lease.
    Free,
    /// It must not run twice, and no assignment in force names it: it may not run again.
    Denied,
}

/// What a guest that was found may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Run,
    Stop,
    /// Nobody has said anything about it: it is left as it is.
    Leave,
}

impl Permit {
    /// `epoch`: as its record on the host says; `None` when that cannot be read.
    pub fn verdict(&self, vm: VmId, epoch: Option<u64>, now: u64) -> Verdict {
        let named = || self.machines.iter().filter(|machine| machine.vm == vm);
        let of = |standing| named().any(|machine| machine.standing == standing);
        let exact = named().find(|machine| Some(machine.epoch) == epoch).map(|machine| machine.standing);
        let standing = match exact {
            Some(standing) => standing,
            // Which of its placements it is cannot be known: the current one, if there is one.
            None if epoch.is_none() && of(Standing::Leased) => Standing::Leased,
            // A copy of an exclusive machine at another placement.
            None if of(Standing::Leased) || of(Standing::Denied) => Standing::Denied,
            None => return Verdict::Leave,
        };
        match standing {
            Standing::Free => Verdict::Run,
            Standing::Leased if now < self.until => Verdict::Run,
            Standing::Leased | Standing::Denied => Verdict::Stop,
        }
    }

    /// Whether the guest may be started, or made to go on. `Err` says why not.
    ///
    /// # Errors
    /// One sentence.
    pub fn may_run(&self, wish: &VmWish, now: u64) -> Result<(), &'static str> {
        if !is_exclusive(wish) {
            return Ok(());
        }
        match self.verdict(wish.vm, Some(wish.epoch), now) {
            Verdict::Run => Ok(()),
            Verdict::Leave => Err("this host has no lease yet that covers it"),
            Verdict::Stop => Err("the lease of this host has ended"),
        }
    }

    /// Whether a machine is named that must not run twice.
    pub fn guards_any(&self) -> bool {
        self.machines.iter().any(|machine| machine.standing != Standing::Free)
    }
}

/// Joins leases and assignments to the permit that is in force.
#[derive(Clone, Debug, Default)]
pub struct Keeper {
    lease: Option<Lease>,
    wished: Option<Wished>,
    force: Permit,
}

#[derive(Clone, Copy, Debug)]
struct Lease {
    incarnation: u64,
    until: u64,
}

#[derive(Clone, Debug)]
struct Wished {
    incarnation: u64,
    machines: Vec<Machine>,
}

/// Each change says whether what is in force has changed.
impl Keeper {
    /// Takes up what an earlier agent of this boot left in force, so that its end costs no guest a pause.
    pub fn resume(force: Permit) -> Self {
        Self { force, ..Self::default() }
    }

    pub fn force(&self) -> &Permit {
        &self.force
    }

    /// A beat of this incarnation was answered: the host may go on until then.
    pub fn granted(&mut self, incarnation: u64, until: u64) -> bool {
        let until = match self.lease {
            Some(lease) if lease.incarnation > incarnation => return false,
            Some(lease) if lease.incarnation == incarnation => lease.until.max(until),
            _ => until,
        };
        self.lease = Some(Lease { incarnation, until });
        self.settle()
    }

    /// An assignment was accepted, and is about to be obeyed.
    pub fn assigned(&mut self, assignment: &Assignment) -> bool {
        let machine = |wish: &VmWish| Machine {
            vm: wish.vm,
            epoch: wish.epoch,
            standing: if is_exclusive(wish) { Standing::Leased } else { Standing::Free },
        };
        let machines = assignment.vms.iter().map(machine).collect();
        self.wished = Some(Wished { incarnation: assignment.incarnation, machines });
        self.settle()
    }

    fn settle(&mut self) -> bool {
        let (Some(lease), Some(wished)) = (&self.lease, &self.wished) else { return false };
        if lease.incarnation != wished.incarnation {
            return false;
        }
        let mut machines = wished.machines.clone();
        let is_named = |old: &&Machine| wished.machines.iter().any(|new| (new.vm, new.epoch) == (old.vm, old.epoch));
        let gone = self.force.machines.iter().filter(|old| old.standing != Standing::Free && !is_named(old));
        let mut denied: Vec<Machine> = gone.map(|old| Machine { standing: Standing::Denied, ..*old }).collect();
        denied.sort_by_key(|machine| std::cmp::Reverse(machine.epoch));
        denied.truncate(MOST_DENIED);
        machines.append(&mut denied);
        let force = Permit { incarnation: lease.incarnation, until: lease.until, machines };
        let changed = force != self.force;
        self.force = force;
        changed
    }
}

pub fn is_exclusive(wish: &VmWish) -> bool {
    wish.recovery == Recovery::Exclusive
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(vm: u64, epoch: u64, standing: Standing) -> Machine {
        Machine { vm: VmId(vm), epoch, standing }
    }

    /// An assignment of this incarnation, as it is kept.
    fn wished(keeper: &mut Keeper, incarnation: u64, machines: &[Machine]) {
        keeper.wished = Some(Wished { incarnation, machines: machines.to_vec() });
        keeper.settle();
    }

    fn verdict(keeper: &Keeper, vm: u64, epoch: u64, now: u64) -> Verdict {
        keeper.force.verdict(VmId(vm), Some(epoch), now)
    }

    #[test]
    fn an_exclusive_machine_runs_while_the_lease_lasts_and_another_for_ever() {
        let mut k = Keeper::default();
        wished(&mut k, 1, &[machine(1, 10, Standing::Leased), machine(2, 11, Standing::Free)]);
        assert_eq!(verdict(&k, 1, 10, 0), Verdict::Leave, "no lease yet: nothing is in force");
        k.granted(1, 100);
        assert_eq!([99, 100].map(|now| verdict(&k, 1, 10, now)), [Verdict::Run, Verdict::Stop]);
        assert_eq!(verdict(&k, 2, 11, 1000), Verdict::Run);
        assert_eq!(verdict(&k, 3, 12, 1000), Verdict::Leave, "nobody has said anything about it");
        k.granted(1, 90);
        assert_eq!(k.force.until, 100, "an answer that comes late shortens nothing");
        k.granted(1, 200);
        assert_eq!(verdict(&k, 1, 10, 150), Verdict::Run, "the lease is back");
    }

    #[test]
    fn a_lease_of_another_incarnation_never_revives_what_only_an_old_assignment_names() {
        let mut k = Keeper::default();
        wished(&mut k, 1, &[machine(1, 10, Standing::Leased)]);
        k.granted(1, 100);
        // It was lost, and has attached again: the lease comes first.
        k.granted(2, 300);
        assert_eq!(verdict(&k, 1, 10, 150), Verdict::Stop, "the old permit has ended in its time");
        wished(&mut k, 2, &[machine(2, 20, Standing::Leased)]);
        assert_eq!(verdict(&k, 1, 10, 150), Verdict::Stop);
        assert_eq!(verdict(&k, 2, 20, 150), Verdict::Run);
        // Or the assignment comes first.
        wished(&mut k, 3, &[machine(2, 30, Standing::Leased)]);
        assert_eq!(verdict(&k, 2, 20, 299), Verdict::Run, "until both are there the old permit stays");
        k.granted(2, 400);
        assert_eq!(k.force.until, 300, "and is not made longer");
        k.granted(3, 500);
        assert_eq!(verdict(&k, 2, 20, 301), Verdict::Stop, "the same machine at its older placement");
        assert_eq!(verdict(&k, 2, 30, 301), Verdict::Run);
        assert_eq!(k.force.verdict(VmId(2), None, 301), Verdict::Run, "its record cannot be read");
        assert_eq!(k.force.verdict(VmId(1), None, 301), Verdict::Stop);
        k.granted(2, 9000);
        assert_eq!(k.force.until, 500, "an answer to a beat of an older incarnation");
    }

    #[test]
    fn what_was_given_away_is_denied_also_when_its_guest_turns_up_late() {
        let mut k = Keeper::default();
        wished(&mut k, 1, &[machine(1, 10, Standing::Leased), machine(2, 11, Standing::Leased)]);
        k.granted(1, 100);
        wished(&mut k, 1, &[machine(2, 11, Standing::Free)]);
        assert_eq!(verdict(&k, 1, 10, 50), Verdict::Stop, "it is no longer wished here");
        assert_eq!(verdict(&k, 2, 11, 500), Verdict::Run, "its owner no longer wants it exclusive");
        // Its start is under way all the time. The host is lost and comes back, and has other things to do.
        k.granted(2, 300);
        wished(&mut k, 2, &[machine(7, 70, Standing::Leased)]);
        wished(&mut k, 2, &[]);
        assert_eq!(verdict(&k, 1, 10, 200), Verdict::Stop);
        assert!(k.force.guards_any(), "so the guard looks for it");
        for epoch in 1000..1000 + 2 * MOST_DENIED as u64 {
            wished(&mut k, 2, &[machine(9, epoch, Standing::Leased)]);
        }
        assert_eq!(k.force.machines.len(), 1 + MOST_DENIED, "the newest are remembered");
        assert_eq!(verdict(&k, 9, 1010 + MOST_DENIED as u64, 200), Verdict::Stop);
    }

    #[test]
    fn a_permit_that_is_taken_up_again_is_not_lengthened_by_a_lease_alone() {
        let mut first = Keeper::default();
        wished(&mut first, 1, &[machine(1, 10, Standing::Leased)]);
        first.granted(1, 100);
        let mut second = Keeper::resume(first.force().clone());
        second.granted(1, 200);
        assert_eq!((second.force().incarnation, second.force().until), (1, 100), "it has no assignment yet");
        wished(&mut second, 2, &[]);
        second.granted(2, 300);
        assert_eq!(second.force().machines, [machine(1, 10, Standing::Denied)], "what the last agent knew is not lost");
    }
}
