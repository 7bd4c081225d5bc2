//! Hosts that are lost, and what becomes of the machines on them.

use super::{Applied, Moment, check};
use crate::{Brake, Node, NodeId, NodeState, Noun, Phase, Rejection, Reply, State, VmId, Wanted, setting};

impl State {
    pub(super) fn declare_lost(&mut self, m: Moment, id: NodeId, incarnation: u64) -> Applied {
        let node = self.nodes.get(&id).ok_or_else(|| check::missing(Noun::Node, id))?;
        if node.incarnation != incarnation || !matches!(node.state, NodeState::Up | NodeState::Silent) {
            return Err(Rejection::Stale(format!("{id} is at incarnation {}, not {incarnation}", node.incarnation)));
        }
        self.put_node(Node { state: NodeState::Lost, changed_at: m.now, ..node.clone() });
        self.renumber_neighbours(id);
        self.forget_moves(m.now, id);
        self.brake(m);
        Ok(Reply::Done)
    }

    /// So many hosts do not die at once: freezes when the loss is less believable than a cut between them and the quorum.
    fn brake(&mut self, m: Moment) {
        let window = self.setting(setting::BRAKE_WINDOW);
        let fresh = |node: &Node| m.now.millis_since(node.changed_at) <= window && !node.maintenance;
        let lost = self.index.lost_nodes.iter().filter_map(|id| self.nodes.get(id)).filter(|node| fresh(node)).count();
        let (lost, all) = (lost as u64, self.nodes.len() as u64);
        let many = lost >= self.setting(setting::BRAKE_COUNT);
        if many && lost * 1000 > all * self.setting(setting::BRAKE_SHARE) && self.cluster().brake == Brake::Armed {
            self.cluster_mut(|cluster| cluster.brake = Brake::Frozen { at: m.now, lost });
        }
    }

    pub(super) fn arm_recovery(&mut self, armed: bool) -> Applied {
        self.cluster_mut(|cluster| cluster.brake = if armed { Brake::Armed } else { Brake::Disarmed });
        Ok(Reply::Done)
    }

    pub(super) fn maintain_node(&mut self, id: NodeId, maintenance: bool) -> Applied {
        let node = self.nodes.get(&id).ok_or_else(|| check::missing(Noun::Node, id))?;
        self.put_node(Node { maintenance, ..node.clone() });
        Ok(Reply::Done)
    }

    /// Machines that move lose their place and wait for another; the others wait for their host.
    pub(super) fn recover_vm(&mut self, m: Moment, id: VmId, epoch: u64) -> Applied {
        let vm = self.vms.get(&id).ok_or_else(|| check::missing(Noun::Vm, id))?;
        let placement = vm.placement.filter(|placement| placement.epoch == epoch);
        let placement = placement.ok_or_else(|| Rejection::Stale(format!("{id} is not placed by {epoch}")))?;
        let node = self.nodes.get(&placement.node).ok_or_else(|| check::missing(Noun::Node, placement.node))?;
        if let Some(why) = self.recovery_is_halted(node) {
            return Err(Rejection::Halted(why));
        }
        if !self.is_recoverable(vm) {
            return Err(Rejection::Stale(format!("{id} has nothing to be recovered from")));
        }
        let mut vm = vm.clone();
        (vm.deadline, vm.retry_at, vm.changed_at) = (None, None, m.now);
        // Whatever of it came to another host is in no wish there from now on, and is set aside.
        vm.migration = None;
        if may_move(&vm) {
            vm.reason = format!("its host {} was lost", node.name);
            self.lose_disk(m, &mut vm);
            (vm.placement, vm.phase, vm.attempts) = (None, None, 0);
        } else {
            vm.reason = format!("it waits for its host {}, which was lost", node.name);
            vm.phase = Some(Phase::Lost);
            // What its host failed at before is to be tried again when it is back: nothing else would ask for that.
            vm.tries += 1;
        }
        self.meter_vm(m.now, &vm);
        self.put_vm(vm);
        Ok(Reply::Done)
    }

    /// Why nothing may be taken from this host; `None` when it is lost and what is on it may be taken.
    pub(crate) fn recovery_is_halted(&self, node: &Node) -> Option<String> {
        match self.cluster().brake {
            _ if self.refounding_is_open().is_some() => self.refounding_is_open(),
            _ if node.state != NodeState::Lost => Some(format!("{} is not lost", node.name)),
            _ if node.maintenance => Some(format!("{} is in maintenance", node.name)),
            Brake::Disarmed => Some("an operator disarmed it".into()),
            Brake::Frozen { lost, .. } => Some(format!("it froze when {lost} nodes were lost at once")),
            Brake::Armed => None,
        }
    }

    /// Whether something is still to be done about a machine on a lost host.
    pub(crate) fn is_recoverable(&self, vm: &crate::Vm) -> bool {
        // One that has left its host is not there any more: its destination has it, and is waited for.
        let left = vm.is_moving() && vm.migration.is_some_and(|migration| migration.left);
        let lost = may_move(vm) || vm.phase != Some(Phase::Lost);
        vm.wanted != Wanted::Deleted && !vm.ghost && !left && lost
    }
}

/// A machine that is off stays where its disk is; it moves when its owner wants it to run.
fn may_move(vm: &crate::Vm) -> bool {
    vm.recovery.moves() && matches!(vm.wanted, Wanted::Running | Wanted::Suspended)
}
