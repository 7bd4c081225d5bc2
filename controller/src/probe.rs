//! Looks closer at nodes that are not heard: can this controller reach them by TCP, and can two other nodes?
//!
//! It tells a dead host from a cut cable to the person who is woken. It decides nothing: a node is lost when its lease has
//! ended, and not before, whoever reaches it (ADR 0027). Every controller looks, so whichever is asked has an answer of its
//! own; what was found is soft, as all that is heard.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use api::{probe::reach, proto};
use futures::future::{join, join_all};
use model::{Node, NodeId, NodeState, State, Telemetry, lease::SUSPICION_NANOS};
use tokio::time::{sleep, timeout};

use crate::{
    core::{Core, boottime},
    replicas,
};

/// Between two looks; the first comes soon after three beats were missed.
const PERIOD: Duration = Duration::from_secs(2);
/// When more are not heard, the trouble is not theirs, and this many tell as much as all.
const MOST_AT_ONCE: usize = 8;
/// Other nodes that are asked about each.
const WITNESSES: usize = 2;
/// A witness waits for a second and a half itself.
const PATIENCE: Duration = Duration::from_secs(4);

/// What was found last, by node.
#[derive(Default)]
pub(crate) struct Probes(Mutex<BTreeMap<NodeId, Probed>>);

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Probed {
    /// On this controller's CLOCK_BOOTTIME.
    pub at: u64,
    pub by: Vec<(String, Result<(), String>)>,
}

/// A node to look at, and who is asked about it.
struct Suspect {
    node: NodeId,
    address: String,
    witnesses: Vec<(String, String)>,
}

impl Probes {
    pub fn of(&self, node: NodeId) -> Option<Probed> {
        self.all().get(&node).cloned()
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<NodeId, Probed>> {
        // Entries are replaced whole, so a panic elsewhere does not spoil them.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a closer look is due: the quorum does not hear it, or this controller has missed three beats.
pub(crate) fn is_suspect(ears: &Telemetry, node: &Node) -> bool {
    let at = ears.nodes.get(&node.id).map_or(0, |heard| heard.at);
    match node.state {
        NodeState::Joined => false,
        NodeState::Silent | NodeState::Lost => true,
        NodeState::Up => ears.clock.saturating_sub(at) > SUSPICION_NANOS,
    }
}

/// Runs until the process ends.
pub(crate) async fn look(core: Arc<Core>) {
    let name = core.replica.id().to_string();
    loop {
        let suspects = core.replica.read(|state| core.hear(|ears| suspects(state, ears)));
        core.probes.all().retain(|node, _| suspects.iter().any(|suspect| suspect.node == *node));
        join_all(suspects.iter().map(|suspect| probe(&core, &name, suspect))).await;
        sleep(PERIOD).await;
    }
}

fn suspects(state: &State, ears: &Telemetry) -> Vec<Suspect> {
    let all = state.nodes().values();
    let (missed, heard): (Vec<&Node>, Vec<&Node>) =
        all.filter(|node| node.state != NodeState::Joined).partition(|node| is_suspect(ears, node));
    let suspect = |(number, node): (usize, &&Node)| {
        // Not always the same two: one of them may be behind the same broken cable.
        let turned = heard.iter().cycle().skip(number * WITNESSES).take(WITNESSES.min(heard.len()));
        let witnesses = turned.map(|witness| (witness.name.clone(), witness.address.clone())).collect();
        Suspect { node: node.id, address: node.address.clone(), witnesses }
    };
    missed.iter().enumerate().take(MOST_AT_ONCE).map(suspect).collect()
}

async fn probe(core: &Core, name: &str, suspect: &Suspect) {
    let own = async { (name.to_owned(), reach(&suspect.address).await) };
    let asked = suspect.witnesses.iter().map(|(witness, at)| ask(core, witness, at, &suspect.address));
    let (own, others) = join(own, join_all(asked)).await;
    let by = [own].into_iter().chain(others.into_iter().flatten()).collect();
    core.probes.all().insert(suspect.node, Probed { at: boottime(), by });
}

/// `None` when the witness itself says nothing.
async fn ask(core: &Core, witness: &str, at: &str, address: &str) -> Option<(String, Result<(), String>)> {
    let request = proto::ProbeRequest { address: address.into() };
    let mut client = replicas::node(core, at).ok()?;
    let reply = timeout(PATIENCE, client.probe(request)).await.ok()?.ok()?.into_inner();
    let found = if reply.reason.is_empty() { Ok(()) } else { Err(reply.reason) };
    Some((witness.to_owned(), found))
}

/// One sentence; empty when nobody has looked yet.
pub(crate) fn verdict(probed: &Probed) -> String {
    let names = |reached: bool| {
        let found = probed.by.iter().filter(|(_, found)| found.is_ok() == reached);
        found.map(|(from, _)| from.as_str()).collect::<Vec<_>>().join(", ")
    };
    let (reached, missed) = (names(true), names(false));
    match (reached.is_empty(), missed.is_empty()) {
        (true, true) => String::new(),
        (true, false) => format!("answers nobody: not {missed}"),
        (false, true) => format!("reachable from {reached}: its agent hangs, or its beats are lost"),
        (false, false) => format!("reachable from {reached}, not from {missed}: a link problem"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_told_in_one_sentence() {
        let probed = |by: &[(&str, bool)]| {
            let found = |reached| if reached { Ok(()) } else { Err("no answer".into()) };
            Probed { at: 0, by: by.iter().map(|(from, reached)| ((*from).into(), found(*reached))).collect() }
        };
        assert_eq!(verdict(&probed(&[])), "");
        let nobody = probed(&[("controller-1", false), ("rack2", false)]);
        assert_eq!(verdict(&nobody), "answers nobody: not controller-1, rack2");
        let link = probed(&[("controller-1", false), ("rack2", true), ("rack3", true)]);
        assert_eq!(verdict(&link), "reachable from rack2, rack3, not from controller-1: a link problem");
        let hangs = probed(&[("controller-1", true), ("rack2", true)]);
        assert_eq!(verdict(&hangs), "reachable from controller-1, rack2: its agent hangs, or its beats are lost");
    }
}
