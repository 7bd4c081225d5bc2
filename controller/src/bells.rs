//! Wakes the sessions of the hosts that changed, and no others: were each of ten thousand to look after every batch of the
//! log, that would cost more than the batch.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use model::{NodeId, Noun};
use tokio::sync::Notify;

use crate::core::Core;

/// One for each session, by its node and incarnation.
#[derive(Default)]
pub(crate) struct Bells(Mutex<BTreeMap<(NodeId, u64), Arc<Notify>>>);

/// Rung after each change of the node's row or of its tunnels, and in rare cases without one.
pub(crate) struct Bell {
    core: Arc<Core>,
    session: (NodeId, u64),
    notify: Arc<Notify>,
}

impl Bell {
    /// Changes that are applied after this will be heard.
    pub fn hang(core: &Arc<Core>, node: NodeId, incarnation: u64) -> Self {
        let (session, notify) = ((node, incarnation), Arc::new(Notify::new()));
        core.bells.lock().insert(session, notify.clone());
        Self { core: core.clone(), session, notify }
    }

    /// Returns at once when it was rung since the last time.
    pub async fn rung(&self) {
        self.notify.notified().await;
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        self.core.bells.lock().remove(&self.session);
    }
}

impl Bells {
    fn ring(&self, node: NodeId) {
        self.lock().range((node, 0)..=(node, u64::MAX)).for_each(|(_, bell)| bell.notify_one());
    }

    fn ring_all(&self) {
        self.lock().values().for_each(|bell| bell.notify_one());
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(NodeId, u64), Arc<Notify>>> {
        // Nothing in there can panic halfway.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs until the process ends.
pub(crate) async fn ring(core: Arc<Core>) {
    let mut applied = core.replica.watch_applied();
    let (mut told, mut members, mut refounding) = (*applied.borrow(), core.replica.members(), true);
    loop {
        let reached = *applied.borrow_and_update();
        let mut all = false;
        match core.replica.changes(told, usize::MAX, |change| change.noun == Noun::Node) {
            Ok(read) => {
                told = read.upto;
                let nodes = read.changes.iter().filter_map(|(_, change)| change.id.parse().ok());
                nodes.for_each(|node| core.bells.ring(node));
            }
            // A snapshot was installed, or this task did not run for a minute.
            Err(_) => (told, all) = (reached, true),
        }
        core.replica.take_woken().into_iter().for_each(|node| core.bells.ring(node));
        // While a quorum is being refounded, what a session waits for is in no row of its node.
        let (was, now) = (refounding, core.replica.read(|state| state.quorum().refounding.is_some()));
        refounding = now;
        let current = core.replica.members();
        if all || was || now || current != members {
            members = current;
            core.bells.ring_all();
        }
        if applied.changed().await.is_err() {
            return;
        }
    }
}
