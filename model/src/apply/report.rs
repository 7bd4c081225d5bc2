//! What hosts found: the evidence by which a machine's phase changes and a host's resources become free.

use super::{Applied, Moment};
use crate::{
    NodeId, NodeState, Noun, Phase, Rejection, ReplicaState, Reply, State, Vm, Wanted,
    command::{ImageReport, VmReport},
    setting,
};

/// First pause before a failed machine is tried again; it doubles with each attempt up to the longest.
const FIRST_PAUSE_MILLIS: u64 = 5_000;
const LONGEST_PAUSE_MILLIS: u64 = 10 * 60_000;

impl State {
    pub(super) fn report_vms(&mut self, m: Moment, node: NodeId, incarnation: u64, reports: &[VmReport]) -> Applied {
        self.heard_from(m, node, incarnation)?;
        for report in reports {
            if report.phase == Phase::Absent {
                self.report_cleared(report.vm, node, report.epoch);
            }
            let current = self.vms.get(&report.vm);
            let current = current.filter(|vm| vm.placement.is_some_and(|p| p.node == node && p.epoch == report.epoch));
            if let Some(vm) = current.cloned() {
                self.report_vm(m, vm, report);
            }
        }
        Ok(Reply::Done)
    }

    fn report_vm(&mut self, m: Moment, mut vm: Vm, report: &VmReport) {
        let now = m.now;
        if vm.wanted == Wanted::Deleted {
            match report.phase {
                Phase::Absent => self.gone_from_its_host(vm),
                Phase::Failed => self.quiet(vm, |vm| vm.reason.clone_from(&report.reason)),
                Phase::Running | Phase::Suspended | Phase::Stopped | Phase::Lost => {}
            }
            return;
        }
        let before = (vm.phase, vm.rebooted, vm.wanted, vm.reason.clone());
        let was_on = matches!(vm.phase, Some(Phase::Running | Phase::Suspended | Phase::Lost));
        match report.phase {
            Phase::Failed if report.attempt != vm.tries => return,
            Phase::Failed => return self.fail_vm(m, vm, &report.reason, report.retry, true),
            Phase::Absent if vm.existed => return self.fail_vm(m, vm, "its host has lost it", false, false),
            Phase::Absent | Phase::Lost => return,
            Phase::Stopped if was_on && matches!(vm.wanted, Wanted::Running | Wanted::Suspended) && !report.retry => {
                vm.wanted = Wanted::Stopped;
                vm.reason =
                    if report.reason.is_empty() { "switched off from inside".into() } else { report.reason.clone() };
            }
            // The same phase told again without a reason leaves the reason that is known.
            Phase::Running | Phase::Suspended | Phase::Stopped => {
                if vm.phase != Some(report.phase) || !report.reason.is_empty() {
                    vm.reason.clone_from(&report.reason);
                }
            }
        }
        vm.phase = Some(report.phase);
        vm.existed = true;
        vm.rebooted = vm.rebooted.max(report.rebooted.min(vm.reboots));
        vm.retry_at = None;
        self.settle_move(now, &mut vm);
        if (vm.phase, vm.rebooted, vm.wanted, vm.reason.clone()) == before {
            return;
        }
        if !vm.in_transition() {
            vm.deadline = None;
            vm.attempts = 0;
        } else if vm.deadline.is_none() {
            // It left its rest by itself: a crash, or somebody's hand on the host.
            let millis = self.setting(setting::CHANGE_DEADLINE) + vm.stop_grace_millis;
            vm.deadline = Some(now.plus_millis(millis));
        }
        vm.changed_at = now;
        self.meter_vm(now, &vm);
        self.put_vm(vm);
    }

    /// The transition did not succeed. `evidence`: the host says so itself, and that nothing of a creation is left on it.
    pub(super) fn fail_vm(&mut self, m: Moment, mut vm: Vm, reason: &str, retry: bool, evidence: bool) {
        // A failure that is told again, as in a new session, is still one failure.
        if vm.phase != Some(Phase::Failed) {
            vm.attempts += 1;
        }
        let most = u32::try_from(self.setting(setting::VM_ATTEMPTS)).unwrap_or(u32::MAX);
        let host = vm.placement.map(|p| p.node);
        let host = host.and_then(|id| self.nodes.get(&id)).map_or("its node", |node| &node.name);
        vm.reason = format!("{host}: {reason} (attempt {} of {most})", vm.attempts);
        let again = retry && vm.attempts < most;
        vm.retry_at = again.then(|| vm.retry_at.unwrap_or(m.now.plus_millis(pause_millis(vm.attempts))));
        vm.deadline = None;
        vm.changed_at = m.now;
        vm.phase = Some(Phase::Failed);
        self.settle_move(m.now, &mut vm);
        if evidence && !vm.existed {
            vm.placement = None;
            vm.phase = (!again).then_some(Phase::Failed);
        }
        self.meter_vm(m.now, &vm);
        self.put_vm(vm);
    }

    pub(super) fn report_images(
        &mut self,
        m: Moment,
        node: NodeId,
        incarnation: u64,
        reports: &[ImageReport],
    ) -> Applied {
        self.heard_from(m, node, incarnation)?;
        for report in reports {
            let ids: Vec<_> = self.index.images_by_digest.get(&report.digest).into_iter().flatten().copied().collect();
            for id in ids {
                let Some(image) = self.images.get(&id) else { continue };
                let state = image.replicas.get(&node).copied();
                let mut image = image.clone();
                match (state, report.good) {
                    (Some(ReplicaState::Wanted), true) => image.replicas.insert(node, ReplicaState::Good),
                    (Some(ReplicaState::Wanted | ReplicaState::Good), false) => {
                        image.replicas.insert(node, ReplicaState::Lost(m.now))
                    }
                    (Some(ReplicaState::Good), true) | (Some(ReplicaState::Lost(_)) | None, _) => continue,
                };
                let backup = image.backup;
                self.put_image(image);
                self.renumber_node(node);
                self.renumber_fetchers(id);
                if let Some(of) = backup {
                    // An older one may go when a newer one is safe.
                    self.drop_superfluous_backups(m, of.vm);
                }
            }
        }
        Ok(Reply::Done)
    }

    /// A change that no host has to hear of and that keeps the time of the last change.
    fn quiet(&mut self, mut vm: Vm, change: impl FnOnce(&mut Vm)) {
        change(&mut vm);
        if self.vms.get(&vm.id) != Some(&vm) {
            self.put_vm(vm);
        }
    }

    /// Only the running incarnation of a host's agent is believed.
    pub(super) fn heard_from(&self, m: Moment, id: NodeId, incarnation: u64) -> Result<(), Rejection> {
        if *m.actor != crate::Actor::Node(id) {
            return Err(m.forbidden());
        }
        let node = self.nodes.get(&id).ok_or_else(|| super::check::missing(Noun::Node, id))?;
        if node.state == NodeState::Lost {
            return Err(Rejection::Stale(format!("{id} was declared lost and has to attach again")));
        }
        if node.incarnation == incarnation {
            return Ok(());
        }
        Err(Rejection::Stale(format!("{id} is at incarnation {}, not {incarnation}", node.incarnation)))
    }
}

fn pause_millis(attempts: u32) -> u64 {
    (FIRST_PAUSE_MILLIS << attempts.saturating_sub(1).min(10)).min(LONGEST_PAUSE_MILLIS)
}
