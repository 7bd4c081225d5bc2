//! Until when this host may run what must not run twice, and which machines those are.
//!
//! ```text
//!   a beat was answered with a grant ──► lease: (incarnation, until) ──┐ the same incarnation
//!   an assignment was obeyed ──────────► wishes: (incarnation, …) ─────┴──► permit ──► page ──► guard
//! ```
//!
//! An exclusive machine may run while its permit does: the lease has not ended, and an assignment *of the lease's own
//! incarnation* names it at this placement. A host that was given up as lost must attach again, which gives it another
//! incarnation; so a new lease never revives what only an old assignment names. Until both are there, the old permit
//! stays in force and simply ends in its time. ADR 0015.
//!
//! Deliberately not here: what happens to a guest that may not run; the guard does that, without this process.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use model::{Assignment, Recovery, VmId, VmWish, steps::FoundGuest};

use crate::clock;
use page::Page;

pub mod page;

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

    /// Whether a machine is named that must not run twice.
    pub fn guards_any(&self) -> bool {
        self.machines.iter().any(|machine| machine.standing != Standing::Free)
    }
}

/// The agent's side: joins leases and assignments, and tells the guard.
pub struct Leases {
    keeper: Mutex<Keeper>,
    page: Page,
}

#[derive(Default)]
struct Keeper {
    lease: Option<Lease>,
    wished: Option<Wished>,
    force: Permit,
}

#[derive(Clone, Copy)]
struct Lease {
    incarnation: u64,
    until: u64,
}

struct Wished {
    incarnation: u64,
    machines: Vec<Machine>,
}

impl Leases {
    /// Takes up what an earlier agent of this boot left in force, so that its end costs no guest a pause.
    ///
    /// # Errors
    /// When the page in the data directory cannot be made or mapped.
    pub fn open(data: &Path) -> io::Result<Self> {
        let page = Page::open(data)?;
        let mut force = Permit::default();
        page.read(&mut force);
        Ok(Self { keeper: Mutex::new(Keeper { force, ..Keeper::default() }), page })
    }

    /// A beat of this incarnation was answered: the host may go on until then.
    pub fn granted(&self, incarnation: u64, until: u64) {
        self.change(|keeper| keeper.granted(incarnation, until));
    }

    /// An assignment was accepted, and is about to be obeyed.
    pub fn assigned(&self, assignment: &Assignment) {
        self.change(|keeper| keeper.assigned(assignment));
    }

    /// The guests that are here: what is denied and gone is forgotten.
    pub fn found(&self, guests: &BTreeMap<VmId, FoundGuest>) {
        self.change(|keeper| keeper.found(guests));
    }

    /// Whether the guest may be started, or made to go on. `Err` says why not.
    ///
    /// # Errors
    /// One sentence.
    pub fn may_run(&self, wish: &VmWish) -> Result<(), &'static str> {
        if !is_exclusive(wish) {
            return Ok(());
        }
        let now = clock::boottime_nanos();
        if !self.page.sign().is_some_and(|sign| sign.is_fresh(now)) {
            return Err("no guard works on this host that could stop it in time");
        }
        match self.keeper().force.verdict(wish.vm, Some(wish.epoch), now) {
            Verdict::Run => Ok(()),
            Verdict::Leave => Err("this host has no lease yet that covers it"),
            Verdict::Stop => Err("the lease of this host has ended"),
        }
    }

    /// What is in force now.
    pub fn permit(&self) -> Permit {
        self.keeper().force.clone()
    }

    pub fn page(&self) -> &Page {
        &self.page
    }

    fn change(&self, change: impl FnOnce(&mut Keeper) -> bool) {
        let mut keeper = self.keeper();
        if change(&mut keeper) {
            self.page.write(&keeper.force);
        }
    }

    fn keeper(&self) -> MutexGuard<'_, Keeper> {
        // A permit is replaced whole, so a panic elsewhere does not spoil it.
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Each says whether what is in force has changed.
impl Keeper {
    fn granted(&mut self, incarnation: u64, until: u64) -> bool {
        let until = match self.lease {
            Some(lease) if lease.incarnation > incarnation => return false,
            Some(lease) if lease.incarnation == incarnation => lease.until.max(until),
            _ => until,
        };
        self.lease = Some(Lease { incarnation, until });
        self.settle()
    }

    fn assigned(&mut self, assignment: &Assignment) -> bool {
        let machine = |wish: &VmWish| Machine {
            vm: wish.vm,
            epoch: wish.epoch,
            standing: if is_exclusive(wish) { Standing::Leased } else { Standing::Free },
        };
        let machines = assignment.vms.iter().map(machine).collect();
        self.wished = Some(Wished { incarnation: assignment.incarnation, machines });
        self.settle()
    }

    fn found(&mut self, guests: &BTreeMap<VmId, FoundGuest>) -> bool {
        let before = self.force.machines.len();
        let is_here = |machine: &Machine| guests.get(&machine.vm).is_some_and(|guest| guest.epoch == machine.epoch);
        self.force.machines.retain(|machine| machine.standing != Standing::Denied || is_here(machine));
        self.force.machines.len() != before
    }

    fn settle(&mut self) -> bool {
        let (Some(lease), Some(wished)) = (&self.lease, &self.wished) else { return false };
        if lease.incarnation != wished.incarnation {
            return false;
        }
        let mut machines = wished.machines.clone();
        for old in self.force.machines.iter().filter(|old| old.standing != Standing::Free) {
            if !machines.iter().any(|new| (new.vm, new.epoch) == (old.vm, old.epoch)) {
                machines.push(Machine { standing: Standing::Denied, ..*old });
            }
        }
        let force = Permit { incarnation: lease.incarnation, until: lease.until, machines };
        let changed = force != self.force;
        self.force = force;
        changed
    }
}

fn is_exclusive(wish: &VmWish) -> bool {
    wish.recovery == Recovery::Exclusive
}

#[cfg(test)]
mod tests;
