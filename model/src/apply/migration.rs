//! A machine goes to another host, while it runs or while it is stopped, and is handed over once: when its source has said
//! that it is off there because it left, *and* its destination that all of it is there. ADR 0022 says why it needs both.
//!
//! ```text
//!             begin: the entry's index is the next epoch, room is kept on both hosts
//!               │
//!               ▼        left and arrived
//!            Moving ───────────────────────► HandedOver ── the source has nothing left ──► settled
//!               │ a failure, a deadline, a loss, a cancellation, another wish of its owner
//!               └──────────────────────────► GivenUp ── the destination has nothing left ──► settled
//! ```

use super::{Applied, Moment, check};
use crate::{
    Capacity, Migration, MigrationStage, MoveFailure, NodeId, NodeState, Noun, Phase, Placement, Rejection, Reply,
    State, Status, Timestamp, Vm, VmId, Wanted,
    command::{MoveOutcome, MoveReport},
    setting,
};

impl State {
    pub(super) fn begin_migration(&mut self, m: Moment, id: VmId, to: NodeId) -> Applied {
        let vm = self.vms.get(&id).filter(|vm| !vm.ghost).ok_or_else(|| check::missing(Noun::Vm, id))?;
        self.may_move_to(vm, to, Capacity::default())?;
        let mut vm = vm.clone();
        let other = Placement { node: to, epoch: m.index };
        vm.migration = Some(Migration { stage: MigrationStage::Moving, other, left: false, arrived: false });
        vm.deadline = Some(m.now.plus_millis(self.setting(setting::MIGRATE_DEADLINE)));
        vm.reason.clear();
        vm.changed_at = m.now;
        self.put_vm(vm);
        Ok(Reply::Vm(id))
    }

    pub(super) fn cancel_migration(&mut self, m: Moment, id: VmId) -> Applied {
        let vm = self.vms.get(&id).filter(|vm| !vm.ghost).ok_or_else(|| check::missing(Noun::Vm, id))?;
        if !vm.is_moving() {
            return Err(Rejection::Stale(format!("{} is {}; it is not being moved", vm.name, vm.status())));
        }
        let mut vm = vm.clone();
        if self.hand_over_may_be_unknown(&vm) {
            return Err(Rejection::Halted(self.refounding_is_open().unwrap_or_default()));
        }
        self.give_up_move(m.now, &mut vm, "an operator cancelled it");
        self.put_vm(vm);
        Ok(Reply::Vm(id))
    }

    /// What keeps a machine from being moved just now, wherever to.
    pub(crate) fn may_leave(&self, vm: &Vm) -> Result<Placement, Rejection> {
        let refuse = |why: String| Err(Rejection::Stale(why));
        let Some(placement) = vm.placement else { return refuse(format!("{} has no node", vm.name)) };
        if let Some(migration) = vm.migration {
            let other = self.node_name(migration.other.node);
            return refuse(match migration.stage {
                MigrationStage::Moving => format!("{} is on its way to {other}", vm.name),
                _ => format!("what the last move of {} left on {other} is not cleared away yet", vm.name),
            });
        }
        if !matches!(vm.status(), Status::Running | Status::Suspended | Status::Stopped) {
            return refuse(format!(
                "{} is {}; only what runs, or is suspended or stopped, can be moved",
                vm.name,
                vm.status()
            ));
        }
        if vm.backups.pending().is_some() {
            return refuse(format!("a backup of {} is under way", vm.name));
        }
        match self.nodes.get(&placement.node) {
            Some(node) if node.state == NodeState::Up => Ok(placement),
            _ => refuse(format!("{} is not up", self.node_name(placement.node))),
        }
    }

    /// Why a machine may not go there. `extra`: what is about to be promised there besides.
    pub(crate) fn may_move_to(&self, vm: &Vm, to: NodeId, extra: Capacity) -> Result<(), Rejection> {
        let placement = self.may_leave(vm)?;
        let host = self.nodes.get(&to).ok_or_else(|| check::missing(Noun::Node, to))?;
        let refuse = |reason: &str| Err(Rejection::NoRoom { node: host.name.clone(), reason: reason.into() });
        if placement.node == to {
            return refuse("the machine is there already");
        }
        if self.nodes.get(&placement.node).is_some_and(|source| source.hypervisor != host.hypervisor) {
            return refuse("its guests run in another way than those of the machine's node");
        }
        self.may_hold(host, vm, vm.size.plus(extra))
    }

    pub(super) fn report_moves(
        &mut self,
        m: Moment,
        node: NodeId,
        incarnation: u64,
        reports: &[MoveReport],
    ) -> Applied {
        self.heard_from(m, node, incarnation)?;
        for report in reports {
            let Some(mut vm) = self.vms.get(&report.vm).filter(|vm| vm.is_moving()).cloned() else { continue };
            let (Some(source), Some(migration)) = (vm.placement, vm.migration.as_mut()) else { continue };
            let to = migration.other;
            if to.epoch != report.epoch {
                continue;
            }
            match &report.outcome {
                MoveOutcome::Left if node == source.node => migration.left = true,
                MoveOutcome::Arrived if node == to.node => migration.arrived = true,
                // Nobody runs it, and nothing of it is missing over there.
                MoveOutcome::Nothing if node == source.node => (migration.left, migration.arrived) = (true, true),
                // Its source may only not have found the destination, which has it.
                MoveOutcome::Failed(_) if node == source.node && self.hand_over_may_be_unknown(&vm) => continue,
                MoveOutcome::Failed(reason) if node == source.node || node == to.node => {
                    let why = format!("{}: {reason}", self.node_name(node));
                    self.give_up_move(m.now, &mut vm, &why);
                    self.put_vm(vm);
                    continue;
                }
                _ => continue,
            }
            if migration.left && migration.arrived {
                self.hand_over(m.now, &mut vm, source, to);
            } else {
                // The other one says its word within seconds, or something is wrong.
                let soon = m.now.plus_millis(self.setting(setting::CHANGE_DEADLINE));
                vm.deadline = vm.deadline.map(|deadline| deadline.min(soon));
            }
            self.put_vm(vm);
        }
        Ok(Reply::Done)
    }

    /// Nobody runs it and nothing of it is missing: from here on it is the destination's, which lets it go on. Until
    /// then it is paused, and charged so; what was off stays off.
    fn hand_over(&mut self, now: Timestamp, vm: &mut Vm, source: Placement, to: Placement) {
        vm.placement = Some(to);
        vm.phase = vm.phase.map(|phase| if phase == Phase::Stopped { phase } else { Phase::Suspended });
        vm.migration = match self.nodes.get(&source.node) {
            Some(node) if node.state != NodeState::Lost => {
                Some(Migration { stage: MigrationStage::HandedOver, other: source, left: true, arrived: true })
            }
            // It is in no wish of the source when that comes back, and is set aside there.
            _ => None,
        };
        vm.move_failure = None;
        let soon = now.plus_millis(self.setting(setting::CHANGE_DEADLINE));
        vm.deadline = vm.in_transition().then_some(soon);
        vm.changed_at = now;
        self.meter_vm(now, vm);
    }

    /// It stays where it is. What came to the other host is removed there.
    pub(super) fn give_up_move(&self, now: Timestamp, vm: &mut Vm, why: &str) {
        if !vm.is_moving() {
            return;
        }
        let source = vm.placement.and_then(|placement| self.nodes.get(&placement.node));
        if source.is_some_and(|node| node.state == NodeState::Lost) {
            // The other host may have all that is left of it: it is in no wish, so it is set aside rather than removed.
            vm.migration = None;
        } else if let Some(migration) = &mut vm.migration {
            migration.stage = MigrationStage::GivenUp;
        }
        note_failure(now, vm, why);
    }

    /// Ends a move that no longer fits what the machine is or should be.
    pub(super) fn settle_move(&self, now: Timestamp, vm: &mut Vm) {
        let fits = matches!(
            (vm.wanted, vm.phase),
            (Wanted::Running, Some(Phase::Running))
                | (Wanted::Suspended, Some(Phase::Suspended))
                | (Wanted::Stopped, Some(Phase::Stopped))
        );
        if !fits && vm.is_moving() {
            let reason = vm.reason.clone();
            self.give_up_move(now, vm, "it did not stay as it was");
            // The deadline was that of the move; what it says about itself is what is to be read.
            (vm.reason, vm.deadline) = (reason, None);
        }
    }

    /// Since what a refounded quorum knows of it, the machine may have been handed over to a host that has not said yet what it
    /// holds. The one that it came from keeps it off; to tell it that nothing moves would let it run there as well.
    pub(super) fn hand_over_may_be_unknown(&self, vm: &Vm) -> bool {
        self.is_careful() && vm.migration.is_some_and(|migration| self.awaits(migration.other.node))
    }

    /// A host is lost or removed: whatever moves had there is not waited for.
    pub(super) fn forget_moves(&mut self, now: Timestamp, node: NodeId) {
        let ids: Vec<VmId> = self.others_on_node(node).map(|vm| vm.id).collect();
        for id in ids {
            let Some(mut vm) = self.vms.get(&id).cloned() else { continue };
            let moving = vm.is_moving();
            if moving && self.hand_over_may_be_unknown(&vm) {
                continue;
            }
            vm.migration = None;
            if moving {
                note_failure(now, &mut vm, &format!("{} was lost", self.node_name(node)));
            }
            self.put_vm(vm);
        }
    }

    /// The host that it is placed on has nothing left of it. It is gone when no other has either.
    pub(super) fn gone_from_its_host(&mut self, mut vm: Vm) {
        match vm.migration.take() {
            Some(migration) => {
                vm.placement = Some(migration.other);
                self.put_vm(vm);
            }
            None => self.remove_vm(vm.id),
        }
    }

    /// A host that a machine went from, or should have gone to, says that nothing of it is left.
    pub(super) fn report_cleared(&mut self, vm: VmId, node: NodeId, epoch: u64) {
        let Some(vm) = self.vms.get(&vm) else { return };
        let cleared = |migration: &Migration| {
            migration.stage != MigrationStage::Moving && migration.other == Placement { node, epoch }
        };
        if vm.migration.as_ref().is_some_and(cleared) {
            let vm = Vm { migration: None, ..vm.clone() };
            self.put_vm(vm);
        }
    }

    pub(super) fn node_name(&self, id: NodeId) -> String {
        self.nodes.get(&id).map_or_else(|| id.to_string(), |node| node.name.clone())
    }
}

fn note_failure(now: Timestamp, vm: &mut Vm, why: &str) {
    let count = vm.move_failure.as_ref().map_or(0, |failure| failure.count).saturating_add(1);
    vm.move_failure = Some(MoveFailure { at: now, count, reason: why.into() });
    vm.reason = format!("it was not moved: {why}");
    vm.deadline = vm.deadline.filter(|_| vm.in_transition());
    vm.changed_at = now;
}
