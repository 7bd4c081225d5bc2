//! What the planners propose about machines; everything they assumed is checked again here.

use super::{Applied, Moment, check};
use crate::{
    Node, NodeId, NodeState, Noun, Phase, Placement, Recovery, Rejection, Reply, State, Status, Vm, VmId, Wanted,
    setting,
};

impl State {
    pub(super) fn place_vm(&mut self, m: Moment, id: VmId, node: NodeId) -> Applied {
        let vm = self.vms.get(&id).ok_or_else(|| check::missing(Noun::Vm, id))?;
        if !vm.wants_host() {
            return Err(Rejection::Stale(format!("{id} does not wait for a node")));
        }
        if let Some(why) = self.may_be_elsewhere(id) {
            return Err(Rejection::Halted(why));
        }
        let host = self.nodes.get(&node).ok_or_else(|| check::missing(Noun::Node, node))?;
        self.may_hold(host, vm, vm.size)?;
        let mut vm = vm.clone();
        vm.placement = Some(Placement { node, epoch: m.index });
        vm.phase = None;
        vm.existed = false;
        vm.backups.answered = vm.backups.asked;
        vm.rebooted = vm.reboots;
        vm.reason.clear();
        vm.deadline = Some(m.now.plus_millis(self.setting(setting::CREATE_DEADLINE)));
        vm.changed_at = m.now;
        self.put_vm(vm);
        Ok(Reply::Node(node))
    }

    /// Why this machine may not go to this node. `size`: its own, and what else is about to go there.
    pub(crate) fn may_hold(&self, node: &Node, vm: &Vm, size: crate::Capacity) -> Result<(), Rejection> {
        self.has_room(node, size)?;
        if node.clock_drifts && vm.recovery == Recovery::Exclusive {
            return Err(Rejection::NoRoom { node: node.name.clone(), reason: "its clock drifts".into() });
        }
        Ok(())
    }

    /// Why a machine of this size may not go to this node.
    pub(crate) fn has_room(&self, node: &Node, size: crate::Capacity) -> Result<(), Rejection> {
        let refuse = |reason: &str| Err(Rejection::NoRoom { node: node.name.clone(), reason: reason.into() });
        if node.state != NodeState::Up {
            return refuse("it is not up");
        }
        if node.cordoned {
            return refuse("it is cordoned");
        }
        if node.maintenance {
            return refuse("it is in maintenance");
        }
        let room = self.promisable(node).minus(self.reserved(node.id));
        if size.vcpus > room.vcpus {
            return refuse("too few vCPUs");
        }
        if size.memory_bytes > room.memory_bytes {
            return refuse("too little memory");
        }
        if size.disk_bytes > room.disk_bytes {
            return refuse("too little disk");
        }
        Ok(())
    }

    pub(super) fn defer_vm(&mut self, id: VmId, reason: &str) -> Applied {
        let vm = self.vms.get(&id).ok_or_else(|| check::missing(Noun::Vm, id))?;
        if !vm.wants_host() {
            return Err(Rejection::Stale(format!("{id} does not wait for a node")));
        }
        let mut vm = vm.clone();
        vm.reason = reason.into();
        self.put_vm(vm);
        Ok(Reply::Done)
    }

    pub(super) fn retry_vm(&mut self, m: Moment, id: VmId) -> Applied {
        let vm = self.vms.get(&id).ok_or_else(|| check::missing(Noun::Vm, id))?;
        if vm.retry_at.is_none_or(|at| at > m.now) {
            return Err(Rejection::Stale(format!("{id} is not due for another try")));
        }
        let mut vm = vm.clone();
        vm.retry_at = None;
        vm.changed_at = m.now;
        self.restart_transition(m.now, vm);
        Ok(Reply::Done)
    }

    pub(super) fn expire_vm(&mut self, m: Moment, id: VmId) -> Applied {
        let vm = self.vms.get(&id).ok_or_else(|| check::missing(Noun::Vm, id))?;
        if vm.deadline.is_none_or(|deadline| deadline > m.now) {
            return Err(Rejection::Stale(format!("{id} is within its deadline")));
        }
        let mut vm = vm.clone();
        let late = m.now.millis_since(vm.changed_at) / 1000;
        if vm.wanted == Wanted::Deleted {
            vm.ghost = true;
            vm.deadline = None;
            vm.reason = "its host has not said that it is gone".into();
            self.put_vm(vm);
            return Ok(Reply::Done);
        }
        if vm.is_moving() && self.hand_over_may_be_unknown(&vm) {
            vm.deadline = Some(m.now.plus_millis(self.setting(setting::CHANGE_DEADLINE)));
            self.put_vm(vm);
            return Ok(Reply::Done);
        }
        if vm.is_moving() {
            let why = format!("it was not done within {late} s");
            self.give_up_move(m.now, &mut vm, &why);
            self.put_vm(vm);
            return Ok(Reply::Done);
        }
        let doing = match vm.status() {
            Status::Creating => "creation",
            Status::Starting => "the start",
            Status::Stopping => "the stop",
            Status::Suspending => "suspending",
            Status::Resuming => "resuming",
            Status::Rebooting => "the reboot",
            Status::Pending
            | Status::Running
            | Status::Suspended
            | Status::Stopped
            | Status::Migrating
            | Status::Deleting
            | Status::Failed
            | Status::Lost => {
                vm.deadline = None;
                self.put_vm(vm);
                return Ok(Reply::Done);
            }
        };
        if vm.phase == Some(Phase::Running) {
            // The guest is as it was; only the change did not come about. It goes on being charged as running.
            vm.reason = format!("{doing} did not succeed within {late} s");
            vm.wanted = Wanted::Running;
            vm.rebooted = vm.reboots;
            vm.deadline = None;
            vm.changed_at = m.now;
            self.put_vm(vm);
        } else {
            self.fail_vm(m, vm, &format!("{doing} did not succeed within {late} s"), true, false);
        }
        Ok(Reply::Done)
    }
}
