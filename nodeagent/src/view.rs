//! What the host looks like just now, as the heartbeats tell it. Written by the executor, the sampler and the
//! transfers; read by the heartbeat, which must never wait for any of them.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use model::{
    Digest, Phase, VmId,
    telemetry::{NodeStatus, Progress, VmStatus},
};

use crate::hypervisor::GuestUsage;

#[derive(Default)]
pub struct View {
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    node: Option<NodeStatus>,
    usage: BTreeMap<VmId, GuestUsage>,
    /// `None` while the hypervisor does not answer: nothing is said about guests then.
    machines: Option<Vec<Machine>>,
    /// Thousandths that were fetched of images on their way.
    fetched_permille: BTreeMap<Digest, u64>,
    /// Bytes that have gone and bytes in all, of guests that go to another host.
    moved: BTreeMap<VmId, (u64, u64)>,
}

/// One machine as the executor found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub vm: VmId,
    pub epoch: u64,
    pub phase: Phase,
    /// Set while it is being created, or moved away.
    pub stage: Option<Stage>,
}

/// What a machine that is being created or moved waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    FetchImage(Digest),
    MakeDisk,
    PlugNetwork,
    Start,
    Move(VmId),
}

/// The beats' part of the view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub node: NodeStatus,
    pub vms: Vec<VmStatus>,
    pub creating: bool,
}

impl View {
    pub fn set_machines(&self, machines: Option<Vec<Machine>>) {
        self.seen().machines = machines;
    }

    pub fn set_node(&self, node: NodeStatus) {
        self.seen().node = Some(node);
    }

    pub fn set_usage(&self, usage: Vec<(VmId, GuestUsage)>) {
        self.seen().usage = usage.into_iter().collect();
    }

    pub fn set_fetched(&self, digest: Digest, done: u64, total: u64) {
        self.seen().fetched_permille.insert(digest, done * 1000 / total.max(1));
    }

    pub fn end_fetch(&self, digest: Digest) {
        self.seen().fetched_permille.remove(&digest);
    }

    pub fn set_moved(&self, vm: VmId, done: u64, total: u64) {
        self.seen().moved.insert(vm, (done, total));
    }

    pub fn end_move(&self, vm: VmId) {
        self.seen().moved.remove(&vm);
    }

    /// `None` until host and guests have been looked at.
    pub fn status(&self) -> Option<Status> {
        let seen = self.seen();
        let machines = seen.machines.as_ref()?;
        let vms = machines.iter().map(|machine| seen.vm_status(machine)).collect();
        let creating = machines.iter().any(|machine| machine.stage.is_some());
        Some(Status { node: seen.node.clone()?, vms, creating })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seen {
    fn vm_status(&self, machine: &Machine) -> VmStatus {
        let usage = self.usage.get(&machine.vm).cloned().unwrap_or_default();
        VmStatus {
            vm: machine.vm,
            epoch: machine.epoch,
            phase: machine.phase,
            cpu_time_millis: usage.cpu_time_millis,
            memory_used_bytes: usage.memory_used_bytes,
            disk_used_bytes: usage.disk_used_bytes,
            rx_bytes: usage.rx_bytes,
            tx_bytes: usage.tx_bytes,
            progress: machine.stage.map(|stage| self.progress(stage)),
        }
    }

    /// Of the whole creation: fetching the image is most of it when it is not here, and the rest is quick. A guest that
    /// moves goes on writing, so there may be more to do than a moment before.
    fn progress(&self, stage: Stage) -> Progress {
        if let Stage::Move(vm) = stage {
            let (done, total) = self.moved.get(&vm).copied().unwrap_or_default();
            let percent = u8::try_from(done.min(total) / total.div_ceil(100).max(1)).unwrap_or(100);
            return Progress { step: format!("move, {} of {} MiB", done >> 20, total >> 20), percent };
        }
        let (step, percent) = match stage {
            Stage::FetchImage(digest) => {
                let permille = self.fetched_permille.get(&digest).copied().unwrap_or(0);
                ("fetch image", u8::try_from(permille.min(1000) * 60 / 1000).unwrap_or(60))
            }
            Stage::MakeDisk => ("make disk", 60),
            Stage::PlugNetwork => ("plug network", 70),
            Stage::Start | Stage::Move(_) => ("start", 80),
        };
        Progress { step: step.into(), percent }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_follows_the_fetch_and_nothing_is_said_before_the_first_look() {
        let view = View::default();
        assert_eq!(view.status(), None);
        let digest = Digest([1; 32]);
        let stage = Some(Stage::FetchImage(digest));
        view.set_machines(Some(vec![Machine { vm: VmId(1), epoch: 7, phase: Phase::Absent, stage }]));
        assert_eq!(view.status(), None);
        view.set_node(NodeStatus::default());
        view.set_fetched(digest, 50, 100);
        let status = view.status().unwrap();
        assert_eq!(status.vms[0].progress, Some(Progress { step: "fetch image".into(), percent: 30 }));
        assert!(status.creating);
        view.set_machines(None);
        assert_eq!(view.status(), None, "the hypervisor does not answer");
    }
}
