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
/// Parts of one status: of eight thousand machines and more, far beyond what a host runs.
const MOST_PARTS: u32 = 1024;

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
        let vms = beat.status.as_ref().and_then(|part| {
            let taken = self.partial.entry(beat.node).or_default().take(part);
            taken.unwrap_or_else(|why| {
                tracing::debug!(node = %beat.node, why, "a part of a status was refused");
                None
            })
        });
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
}

impl Sweep {
    /// The machines of a sweep once its last part is there. A lost part loses the sweep; the next one comes soon.
    ///
    /// # Errors
    /// Why the part is none that an agent sends: it costs its host the status, and not the lease.
    fn take(&mut self, part: &StatusPart) -> Result<Option<BTreeMap<VmId, VmStatus>>, String> {
        let (number, parts) = (part.part, part.parts);
        if parts > MOST_PARTS || number >= parts {
            *self = Self::lost();
            return Err(format!("part is {number} of {parts}, but must be below them, and they at most {MOST_PARTS}"));
        }
        if number == 0 {
            *self = Self::default();
        }
        if number != self.next {
            *self = Self::lost();
            return Ok(None);
        }
        self.next += 1;
        self.vms.extend(part.vms.iter().map(|vm| (vm.vm, vm.clone())));
        Ok((self.next >= parts).then(|| std::mem::take(&mut self.vms)))
    }

    /// No part is the next one but the first of another sweep.
    fn lost() -> Self {
        Self { next: u32::MAX, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use model::telemetry::NodeStatus;

    use super::*;

    fn part(part: u32, parts: u32, vms: &[u64]) -> StatusPart {
        let vm = |id: &u64| VmStatus {
            vm: VmId(*id),
            epoch: 1,
            phase: model::Phase::Running,
            cpu_time_millis: 0,
            memory_used_bytes: 0,
            disk_used_bytes: 0,
            rx_bytes: 0,
            tx_bytes: 0,
            progress: None,
        };
        StatusPart { node: NodeStatus::default(), part, parts, vms: vms.iter().map(vm).collect() }
    }

    fn taken(sweep: &mut Sweep, next: StatusPart) -> Option<Vec<u64>> {
        sweep.take(&next).unwrap().map(|vms| vms.keys().map(|vm| vm.0).collect())
    }

    #[test]
    fn a_sweep_is_told_when_its_last_part_is_there() {
        let mut sweep = Sweep::default();
        assert_eq!(taken(&mut sweep, part(0, 2, &[1, 2])), None);
        assert_eq!(taken(&mut sweep, part(1, 2, &[3])), Some(vec![1, 2, 3]));
        assert_eq!(taken(&mut sweep, part(0, 3, &[1])), None);
        assert_eq!(taken(&mut sweep, part(2, 3, &[3])), None, "one was lost");
        assert_eq!(taken(&mut sweep, part(1, 3, &[2])), None);
        assert_eq!(taken(&mut sweep, part(0, 1, &[4])), Some(vec![4]));
    }

    #[test]
    fn a_sweep_without_end_is_refused_and_kept_nowhere() {
        let mut sweep = Sweep::default();
        assert_eq!(taken(&mut sweep, part(0, MOST_PARTS, &[1])), None);
        for odd in [part(1, u32::MAX, &[2]), part(u32::MAX, u32::MAX, &[2]), part(0, 0, &[2]), part(2, 2, &[2])] {
            let refused = sweep.take(&odd).unwrap_err();
            assert!(refused.contains("at most 1024") && sweep.vms.is_empty(), "{refused}");
        }
        assert_eq!(taken(&mut sweep, part(0, 1, &[3])), Some(vec![3]));
    }
}
