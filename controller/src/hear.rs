//! Heartbeats: every controller listens, so that a new leader is warm. What is heard is soft and never replicated.

use std::{
    collections::{BTreeMap, HashMap},
    io::ErrorKind,
    sync::Arc,
    time::Duration,
};

use api::beat::{self, Ack, Beat, BeatKey, Kind, ReplayGuard, StatusPart, Verdict};
use model::{NodeId, VmId, lease::Grant, telemetry::VmStatus};
use tokio::{net::UdpSocket, time::sleep};

use crate::core::Core;

/// Between two looks at the socket. What comes meanwhile is taken at once: with thousands of hosts, waking up for each of their
/// beats costs more than they do. A lease is counted from the sending, so an answer that is later by this costs nothing.
const BREATH: Duration = Duration::from_millis(1);
/// Datagrams that are taken at once: as many as the socket's buffer holds, and few enough to let others run.
const TURN: usize = 256;

/// Listens until the process ends. A datagram that is refused costs a look-up and a hash, and gets no answer.
pub(crate) async fn listen(core: Arc<Core>, socket: UdpSocket, nonce: u64) {
    let mut ears = Ears { core, guard: ReplayGuard::new(nonce), keys: HashMap::new(), partial: HashMap::new() };
    let mut buffer = vec![0; beat::MAX_DATAGRAM_BYTES + 1];
    loop {
        if let Err(error) = socket.readable().await {
            tracing::debug!(%error, "the heartbeat socket cannot be waited for");
        }
        for _ in 0..TURN {
            let (length, from) = match socket.try_recv_from(&mut buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // An earlier answer came back as unreachable; it says nothing about the socket.
                Err(error) => {
                    tracing::debug!(%error, "the heartbeat socket reported an error");
                    continue;
                }
            };
            if let Some(answer) = ears.hear(&buffer[..length])
                && let Err(error) = socket.send_to(&answer, from).await
            {
                tracing::debug!(%error, %from, "a heartbeat could not be answered");
            }
        }
        sleep(BREATH).await;
    }
}

struct Ears {
    core: Arc<Core>,
    guard: ReplayGuard,
    /// Of nodes that exist; a datagram that names another costs nothing but the look-up.
    keys: HashMap<NodeId, BeatKey>,
    /// Status parts of one sweep that is not complete yet.
    partial: HashMap<NodeId, Sweep>,
}

#[derive(Default)]
struct Sweep {
    next: u32,
    vms: BTreeMap<VmId, VmStatus>,
}

impl Ears {
    fn hear(&mut self, datagram: &[u8]) -> Option<Vec<u8>> {
        let (kind, node) = beat::decode_header(datagram)?;
        if kind != Kind::Beat {
            return None;
        }
        let key = self.key(node)?;
        let beat = beat::decode(datagram, &key).ok()?;
        let leader = self.core.replica.is_leader();
        let grant = match self.guard.check(&beat) {
            Verdict::Replayed => return None,
            Verdict::Unproven => None,
            Verdict::Fresh => self.believe(&beat, leader),
        };
        let ack =
            Ack { node, seq: beat.seq, nonce: self.guard.nonce(), boottime_nanos: beat.boottime_nanos, leader, grant };
        beat::encode_ack(&ack, &key).ok()
    }

    fn key(&mut self, node: NodeId) -> Option<BeatKey> {
        if !self.core.replica.read(|state| state.nodes().contains(&node)) {
            if self.keys.remove(&node).is_some() {
                self.guard.forget(node);
                self.partial.remove(&node);
                self.core.hear(|ears| ears.nodes.remove(&node));
            }
            return None;
        }
        if !self.keys.contains_key(&node) {
            self.keys.insert(node, self.core.authority.beat_key(node).ok()?);
        }
        self.keys.get(&node).cloned()
    }

    /// Takes note of it; as the leader, says how long the host may go on.
    fn believe(&mut self, beat: &Beat, leader: bool) -> Option<Grant> {
        let vms = beat.status.as_ref().and_then(|part| self.collect(beat.node, part));
        let standing = self.core.replica.read(|state| state.has_standing(beat.node, beat.incarnation));
        self.core.hear(|ears| {
            let heard = ears.nodes.entry(beat.node).or_default();
            if let Some(part) = &beat.status {
                heard.status = part.node.clone();
            }
            if let Some(vms) = vms {
                heard.vms = vms;
            }
            ears.compare_clocks(beat.node, beat.incarnation, beat.boottime_nanos);
            ears.believe(beat.node, beat.incarnation, beat.unanswered_millis, leader && standing)
        })
    }

    /// The machines of a sweep once its last part is there. A lost part loses the sweep; the next one comes soon.
    fn collect(&mut self, node: NodeId, part: &StatusPart) -> Option<BTreeMap<VmId, VmStatus>> {
        let sweep = self.partial.entry(node).or_default();
        if part.part == 0 {
            *sweep = Sweep::default();
        }
        if part.part != sweep.next {
            *sweep = Sweep { next: u32::MAX, ..Sweep::default() };
            return None;
        }
        sweep.next += 1;
        sweep.vms.extend(part.vms.iter().map(|vm| (vm.vm, vm.clone())));
        (sweep.next >= part.parts).then(|| std::mem::take(&mut sweep.vms))
    }
}
