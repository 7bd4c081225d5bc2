//! A quorum made anew from a backup or from one survivor, and what its hosts then say that they hold.
//!
//! Nobody knows what the lost quorum gave out after what is known here. So nothing is given out twice: the log begins
//! above every index that was (`INDICES_PER_SECOND`), and ids, MAC addresses and VNIs leave a gap. And nothing is given
//! away twice: until every host has said what it holds, no machine of before is placed or recovered. What a host holds
//! by a newer placement than the one known here is believed; what is not known at all is left alone and listed.

use std::collections::BTreeSet;

use super::{Applied, Moment, check};
use crate::{
    Controller, ControllerId, Digest, Held, INDICES_PER_SECOND, Node, NodeId, NodeState, Noun, Phase, Quorum,
    Refounding, Rejection, Reply, Role, State, User, Vm, VmId, Wanted, setting,
};

/// Ids, MAC addresses and VNIs that are left out: more than any cloud makes between two backups. A quorum that was
/// refounded twice from one backup may still mint an id again; the placements of the two are then told apart by their
/// epochs, as always.
const IDS_LEFT_OUT: u64 = 1_000_000;
const MACS_LEFT_OUT: u32 = 1_000_000;
const VNIS_LEFT_OUT: u32 = 65_536;
/// Hosts and controllers are few, and people type their ids: they go on at the next hundred, or ten. Their identity is
/// the certificate, or the cluster epoch, so that a number which is used again admits nobody.
const NODES_ROUNDED_TO: u64 = 100;
const CONTROLLERS_ROUNDED_TO: u64 = 10;

pub(super) struct Founder<'a> {
    pub id: ControllerId,
    pub name: &'a str,
    pub address: &'a str,
    pub operator: Option<&'a (String, Digest)>,
}

impl State {
    /// The id of the controller that refounds this cloud from a backup.
    pub fn next_founder(&self) -> ControllerId {
        ControllerId(rounded_up(self.cluster().last_controller, CONTROLLERS_ROUNDED_TO) + 1)
    }

    /// Whether this host has to say what it holds before it is told what it should be.
    pub fn awaits(&self, node: NodeId) -> bool {
        self.quorum().refounding.as_ref().is_some_and(|open| open.awaited.contains(&node))
    }

    pub(super) fn raise_level(&mut self, to: u32) -> Applied {
        let now = self.quorum().level;
        if to < now {
            return Err(check::invalid("level", to, format!("{now} or higher: a level is never lowered")));
        }
        if to > now {
            let row = Quorum { level: to, ..self.quorum().clone() };
            self.put_quorum(row);
        }
        Ok(Reply::Done)
    }

    pub(super) fn refound(&mut self, m: Moment, epoch: u64, founder: Founder) -> Applied {
        if epoch <= self.quorum().epoch {
            return Err(Rejection::Stale(format!("the cloud was refounded in {}, not before", self.quorum().epoch)));
        }
        if self.controllers.is_empty() || m.index < epoch.saturating_mul(INDICES_PER_SECOND) {
            return Err(Rejection::Stale(format!("a log at {} is not of cluster epoch {epoch}", m.index)));
        }
        let known = self.controllers.get(&founder.id).map(|row| row.joined_at);
        if known.is_none() && founder.id < self.next_founder() {
            return Err(check::exists(Noun::Controller, &founder.id.to_string()));
        }
        check::label("name", founder.name)?;
        check::line("address", founder.address, 300)?;
        if let Some((name, _)) = founder.operator {
            check::dotted("operator", name)?;
        }
        self.leave_ids_out(founder.id);
        self.only_controller(m, &founder, known.unwrap_or(m.now));
        if let Some((name, token)) = founder.operator {
            self.remove_user(name);
            self.put_user(User { name: name.clone(), role: Role::Operator, token: *token, created_at: m.now });
        }
        // One that was used since, unknown to this quorum, could be used once more.
        let tokens: Vec<Digest> = self.join_tokens.iter().map(|(token, _)| *token).collect();
        tokens.iter().for_each(|token| self.drop_join_token(token));
        let nodes: Vec<Node> = self.nodes.values().cloned().collect();
        let awaited = nodes.iter().map(|node| node.id).collect();
        for node in nodes {
            let state = if node.state == NodeState::Up { NodeState::Silent } else { node.state };
            let (incarnation, generation) = (m.index, m.index);
            self.put_node(Node { state, incarnation, generation, changed_at: m.now, ..node });
        }
        let floor = VmId(self.cluster().last_vm);
        let refounding = Refounding { at: m.now, index: m.index, floor, awaited, orphans: Default::default() };
        let level = self.quorum().level;
        self.put_quorum(Quorum { epoch, level, refounding: Some(refounding) });
        self.settle_refounding();
        Ok(Reply::Controller(founder.id))
    }

    fn leave_ids_out(&mut self, founder: ControllerId) {
        self.cluster_mut(|cluster| {
            for last in
                [&mut cluster.last_tenant, &mut cluster.last_vm, &mut cluster.last_network, &mut cluster.last_image]
            {
                *last = last.saturating_add(IDS_LEFT_OUT);
            }
            cluster.last_mac = cluster.last_mac.saturating_add(MACS_LEFT_OUT);
            cluster.last_vni = cluster.last_vni.saturating_add(VNIS_LEFT_OUT);
            cluster.last_node = rounded_up(cluster.last_node, NODES_ROUNDED_TO);
            cluster.last_controller = rounded_up(cluster.last_controller, CONTROLLERS_ROUNDED_TO).max(founder.0);
        });
    }

    fn only_controller(&mut self, m: Moment, founder: &Founder, joined_at: crate::Timestamp) {
        let others: Vec<ControllerId> = self.controllers.iter().map(|(id, _)| *id).collect();
        for other in others {
            self.controllers.update(&other, |row| row.removed = true);
        }
        let (name, address) = (founder.name.to_owned(), founder.address.to_owned());
        let joined_at = joined_at.min(m.now);
        let row = Controller { id: founder.id, name, address, joined_at, removed: false };
        self.controllers.put(founder.id, row);
    }

    pub(super) fn take_stock(&mut self, m: Moment, node: NodeId, incarnation: u64, guests: &[(VmId, Held)]) -> Applied {
        self.heard_from(m, node, incarnation)?;
        let Some(open) = self.quorum().refounding.clone().filter(|open| open.awaited.contains(&node)) else {
            return Ok(Reply::Done);
        };
        let is_held = |phase| matches!(phase, Phase::Running | Phase::Suspended | Phase::Stopped);
        if let Some((vm, held)) = guests.iter().find(|(_, held)| !is_held(held.phase)) {
            return Err(check::invalid("phase", format!("{:?} of {vm}", held.phase), "running, suspended or stopped"));
        }
        if let Some((vm, held)) = guests.iter().find(|(_, held)| held.epoch >= open.index) {
            return Err(Rejection::Stale(format!(
                "{node} holds {vm} by placement {}, and this quorum began at {}: it was refounded with a clock that was behind",
                held.epoch, open.index
            )));
        }
        let mut orphans = open.orphans;
        for (id, held) in guests {
            match self.vms.get(id).cloned() {
                None => drop(orphans.entry(node).or_default().insert(*id, *held)),
                Some(vm) if vm.placement.is_none_or(|placement| placement.epoch < held.epoch) => {
                    self.adopt_vm(m, vm, node, *held);
                }
                // Where it is known to be, or an older copy, which its host will set aside.
                Some(_) => {}
            }
        }
        if self.is_careful() {
            self.miss_guests(m, node, guests);
        }
        let mut awaited = open.awaited;
        awaited.remove(&node);
        self.put_quorum(Quorum { refounding: Some(Refounding { awaited, orphans, ..open }), ..self.quorum().clone() });
        self.renumber_node(node);
        self.settle_refounding();
        Ok(Reply::Done)
    }

    /// What is known to be on this host, and is not, was deleted, moved or recovered elsewhere since. Its host would make it anew
    /// from its first image, beside the one that another may hold; so it is nowhere until that one is heard of, or its owner
    /// asks for it.
    fn miss_guests(&mut self, m: Moment, node: NodeId, guests: &[(VmId, Held)]) {
        let held: BTreeSet<(VmId, u64)> = guests.iter().map(|(vm, held)| (*vm, held.epoch)).collect();
        // Where a move is not over, either of two hosts may have it, and one that arrived is not told of.
        let gone = |vm: &&Vm| {
            let placed = vm.placement.is_some_and(|placement| !held.contains(&(vm.id, placement.epoch)));
            placed && vm.existed && vm.migration.is_none() && !vm.ghost && vm.wanted != Wanted::Deleted
        };
        let gone: Vec<Vm> = self.vms_on_node(node).filter(gone).cloned().collect();
        for mut vm in gone {
            self.lose_disk(m, &mut vm);
            (vm.placement, vm.phase) = (None, Some(Phase::Failed));
            vm.reason = format!("{} did not have it any more when the cloud was refounded", self.node_name(node));
            (vm.deadline, vm.retry_at, vm.changed_at) = (None, None, m.now);
            self.meter_vm(m.now, &vm);
            self.put_vm(vm);
        }
    }

    /// The host has it by a placement that was made after what this quorum knows.
    fn adopt_vm(&mut self, m: Moment, mut vm: Vm, node: NodeId, held: Held) {
        vm.placement = Some(crate::Placement { node, epoch: held.epoch });
        vm.phase = Some(held.phase);
        // Whatever move was under way, it ended here; and its disk was not lost.
        vm.migration = None;
        if self.is_careful() {
            (vm.loss, vm.restored_from) = (None, None);
        }
        (vm.existed, vm.rebooted) = (true, vm.reboots);
        vm.backups.answered = vm.backups.asked;
        (vm.attempts, vm.retry_at, vm.changed_at) = (0, None, m.now);
        vm.reason = "found there when the cloud was refounded".into();
        let grace = self.setting(setting::CHANGE_DEADLINE) + vm.stop_grace_millis;
        vm.deadline = vm.in_transition().then_some(m.now.plus_millis(grace));
        self.meter_vm(m.now, &vm);
        self.put_vm(vm);
    }

    /// Waits for no host any more, and leaves what nobody knows to the hosts' ordinary rule: it is set aside.
    pub(super) fn end_refounding(&mut self) -> Applied {
        if self.quorum().refounding.is_some() {
            self.put_quorum(Quorum { refounding: None, ..self.quorum().clone() });
            self.renumber_all();
        }
        Ok(Reply::Done)
    }

    /// A host that is removed need not be waited for, and nothing on it is listed.
    pub(super) fn await_no_more(&mut self, node: NodeId) {
        let Some(mut open) = self.quorum().refounding.clone() else { return };
        if open.awaited.remove(&node) | open.orphans.remove(&node).is_some() {
            self.put_quorum(Quorum { refounding: Some(open), ..self.quorum().clone() });
            self.settle_refounding();
        }
    }

    fn settle_refounding(&mut self) {
        let over = |open: &Refounding| open.awaited.is_empty() && open.orphans.is_empty();
        if self.quorum().refounding.as_ref().is_some_and(over) {
            self.put_quorum(Quorum { refounding: None, ..self.quorum().clone() });
            self.renumber_all();
        }
    }

    fn renumber_all(&mut self) {
        let nodes: Vec<NodeId> = self.nodes.iter().map(|(id, _)| *id).collect();
        nodes.into_iter().for_each(|id| self.renumber_node(id));
    }

    /// Why nothing may be decided yet about machines of before a refounding.
    pub(crate) fn refounding_is_open(&self) -> Option<String> {
        let waits = self.quorum().refounding.as_ref().map_or(0, |open| open.awaited.len());
        (waits > 0).then(|| format!("the quorum was refounded, and {waits} nodes have not said yet what they hold"))
    }

    /// Why this machine may not be placed: it may be on a host that has not said so yet.
    pub(crate) fn may_be_elsewhere(&self, vm: VmId) -> Option<String> {
        let of_before = self.quorum().refounding.as_ref().is_some_and(|open| vm <= open.floor);
        self.refounding_is_open().filter(|_| of_before)
    }
}

fn rounded_up(number: u64, to: u64) -> u64 {
    (number / to + 1) * to
}
