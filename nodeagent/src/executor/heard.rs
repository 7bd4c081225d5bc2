//! What the session says, which is obeyed also while the host is looked at.
//!
//! A look takes as long as a hung libvirtd takes to be given up, or as it takes to hash every image of the host; a lease is shorter
//! (ADR 0015). So an assignment is taken up at once, and with it the permit of its incarnation. The look goes on: it speaks of
//! the host and not of wishes, and one that began anew with each assignment might never end.

use std::{collections::BTreeMap, io, pin::pin, sync::Arc};

use model::{Assignment, NetworkWish, steps::Subject};
use tokio::sync::watch;

use super::{
    Executor,
    observe::{self, Look},
};
use crate::hypervisor::HypervisorError;

pub struct Heard {
    assignments: watch::Receiver<Option<Arc<Assignment>>>,
    incarnation: watch::Receiver<u64>,
    /// Something was heard since the last look began: what that saw may be older than what is wished.
    pub since_look: bool,
}

pub enum News {
    Assignment(Arc<Assignment>),
    Session,
}

impl Heard {
    /// What was heard before counts as news.
    pub fn new(mut assignments: watch::Receiver<Option<Arc<Assignment>>>, incarnation: watch::Receiver<u64>) -> Self {
        assignments.mark_changed();
        Self { assignments, incarnation, since_look: false }
    }

    /// Loses nothing when it is not polled to its end. `None` when nobody will say anything any more.
    pub async fn next(&mut self) -> Option<News> {
        let news = loop {
            tokio::select! {
                changed = self.incarnation.changed() => break changed.ok().map(|()| News::Session)?,
                changed = self.assignments.changed() => {
                    changed.ok()?;
                    if let Some(new) = self.assignments.borrow_and_update().clone() {
                        break News::Assignment(new);
                    }
                }
            }
        };
        self.since_look = true;
        Some(news)
    }
}

impl Executor {
    pub(super) fn hear(&mut self, news: News) -> io::Result<()> {
        match news {
            News::Session => self.forget_told(),
            News::Assignment(new) => self.obey(new)?,
        }
        Ok(())
    }

    /// Looks at the host, and obeys meanwhile. `None` when nobody will say anything any more.
    pub(super) async fn look(&mut self, heard: &mut Heard) -> io::Result<Option<Result<Look, HypervisorError>>> {
        heard.since_look = false;
        let (host, assignment) = (self.host.clone(), self.assignment.clone());
        let wanted = || assignment.as_ref().map_or(&[][..], |assignment| &assignment.networks);
        let at_networks = !self.busy.keys().any(|subject| matches!(subject, Subject::Network(_)));
        let mut look = pin!(observe::look(&host, at_networks.then(wanted)));
        let mut look = loop {
            tokio::select! {
                look = &mut look => break look,
                news = heard.next() => match news {
                    Some(news) => self.hear(news)?,
                    None => return Ok(None),
                },
            }
        };
        if let Ok(look) = &mut look
            && let Some(networks) = &mut look.networks
        {
            self.doubt_networks(wanted(), networks);
        }
        Ok(Some(look))
    }

    /// What was seen of a network does not speak of what is wished of it since.
    pub(super) fn doubt_networks(&self, before: &[NetworkWish], seen: &mut BTreeMap<u32, bool>) {
        let wished = self.assignment.iter().flat_map(|assignment| &assignment.networks);
        for wish in wished.filter(|wish| !before.contains(wish)) {
            seen.entry(wish.vni).and_modify(|complete| *complete = false);
        }
    }
}
