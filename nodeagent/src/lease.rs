//! Until when this host may run what must not run twice, and which machines those are: the agent's side, which tells the
//! guard.
//!
//! ```text
//!   a beat was answered, an assignment was obeyed ──► model::permit::Keeper ──► page ──► guard
//! ```
//!
//! Deliberately not here: the rule, which is `model::permit` (ADR 0015), and what happens to a guest that may not run; the
//! guard does that, without this process.

use std::{
    io,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

pub use model::permit::{Machine, Permit, Standing, Verdict};
use model::{
    Assignment, VmWish,
    permit::{Keeper, is_exclusive},
};

use crate::clock;
use page::Page;

pub mod page;

/// The agent's side: joins leases and assignments, and tells the guard.
pub struct Leases {
    keeper: Mutex<Keeper>,
    page: Page,
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
        Ok(Self { keeper: Mutex::new(Keeper::resume(force)), page })
    }

    /// A beat of this incarnation was answered: the host may go on until then.
    pub fn granted(&self, incarnation: u64, until: u64) {
        self.change(|keeper| keeper.granted(incarnation, until));
    }

    /// An assignment was accepted, and is about to be obeyed.
    pub fn assigned(&self, assignment: &Assignment) {
        self.change(|keeper| keeper.assigned(assignment));
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
        self.keeper().force().may_run(wish, now)
    }

    /// What is in force now.
    pub fn permit(&self) -> Permit {
        self.keeper().force().clone()
    }

    pub fn page(&self) -> &Page {
        &self.page
    }

    fn change(&self, change: impl FnOnce(&mut Keeper) -> bool) {
        let mut keeper = self.keeper();
        if change(&mut keeper) {
            self.page.write(keeper.force());
        }
    }

    fn keeper(&self) -> MutexGuard<'_, Keeper> {
        // A permit is replaced whole, so a panic elsewhere does not spoil it.
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
