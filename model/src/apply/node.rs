//! Hosts: joining, sessions, silence, cordons, leaving.

use std::net::IpAddr;

use super::{Applied, Moment, check};
use crate::{
    Actor, Capacity, Digest, HypervisorKind, JoinRole, Node, NodeId, NodeState, NodeSummary, Noun, Phase, Rejection,
    Reply, State, Wanted,
};

pub(super) struct Host<'a> {
    pub address: &'a str,
    pub underlay: IpAddr,
    pub hypervisor: HypervisorKind,
    pub capacity: &'a Capacity,
}

impl State {
    pub(super) fn join_node(&mut self, m: Moment, token: &Digest, name: &str) -> Applied {
        self.usable_token(m, token, JoinRole::Agent)?;
        check::label("name", name)?;
        check::not_an_id::<NodeId>("name", name)?;
        if self.node_named(name).is_some() {
            return Err(check::exists(Noun::Node, name));
        }
        let id = self.cluster_mut(|cluster| {
            cluster.last_node += 1;
            NodeId(cluster.last_node)
        });
        self.use_token(token, id.to_string());
        self.put_node(Node {
            id,
            name: name.into(),
            address: String::new(),
            underlay: IpAddr::from([0, 0, 0, 0]),
            hypervisor: HypervisorKind::Qemu,
            capacity: Capacity::default(),
            state: NodeState::Joined,
            cordoned: false,
            draining: false,
            maintenance: false,
            clock_drifts: false,
            generation: 0,
            incarnation: 0,
            certificate: Digest::default(),
            joined_at: m.now,
            changed_at: m.now,
            summary: None,
        });
        Ok(Reply::Node(id))
    }

    pub(super) fn bind_certificate(&mut self, id: NodeId, certificate: Digest) -> Applied {
        self.changed_node(id, |node| node.certificate = certificate)
    }

    pub(super) fn attach_node(&mut self, m: Moment, id: NodeId, host: Host) -> Applied {
        if *m.actor != Actor::Node(id) {
            return Err(m.forbidden());
        }
        check::line("address", host.address, 300)?;
        if host.capacity.vcpus > 1 << 16 || host.capacity.memory_bytes > 1 << 50 || host.capacity.disk_bytes > 1 << 60 {
            return Err(check::invalid("capacity", format!("{:?}", host.capacity), "what a host can have"));
        }
        let before = self.nodes.get(&id).ok_or_else(|| check::missing(Noun::Node, id))?;
        let known = before.state != NodeState::Joined;
        let moved = known && (before.address != host.address || before.underlay != host.underlay);
        let (incarnation, was_lost) = (before.incarnation + 1, before.state == NodeState::Lost);
        self.put_node(Node {
            address: host.address.into(),
            underlay: host.underlay,
            hypervisor: host.hypervisor,
            capacity: *host.capacity,
            // One that was lost has to be heard first: only its beats may be cut off, and it would be lost again at once.
            state: if before.state == NodeState::Lost { NodeState::Silent } else { NodeState::Up },
            changed_at: m.now,
            incarnation,
            generation: before.generation + 1,
            ..before.clone()
        });
        if was_lost {
            self.renumber_neighbours(id);
        }
        if moved {
            // Other hosts name this one as the end of a tunnel or as a source of images.
            let others: Vec<NodeId> = self.nodes.iter().map(|(other, _)| *other).filter(|other| *other != id).collect();
            others.into_iter().for_each(|other| self.renumber_node(other));
        }
        Ok(Reply::Incarnation(incarnation))
    }

    pub(super) fn summarise_node(&mut self, m: Moment, id: NodeId, incarnation: u64, summary: &NodeSummary) -> Applied {
        self.heard_from(m, id, incarnation)?;
        self.changed_node(id, |node| node.summary = Some(summary.clone()))
    }

    pub(super) fn set_node_silent(&mut self, m: Moment, id: NodeId, incarnation: u64, silent: bool) -> Applied {
        let node = self.nodes.get(&id).ok_or_else(|| check::missing(Noun::Node, id))?;
        if node.incarnation != incarnation || matches!(node.state, NodeState::Joined | NodeState::Lost) {
            return Err(Rejection::Stale(format!("{id} is at incarnation {}, not {incarnation}", node.incarnation)));
        }
        let state = if silent { NodeState::Silent } else { NodeState::Up };
        let now = m.now;
        self.changed_node(id, |node| {
            if node.state != state {
                node.state = state;
                node.changed_at = now;
            }
        })
    }

    pub(super) fn set_node_clock(&mut self, id: NodeId, drifts: bool) -> Applied {
        self.changed_node(id, |node| node.clock_drifts = drifts)
    }

    pub(super) fn cordon_node(&mut self, id: NodeId, cordoned: bool) -> Applied {
        self.changed_node(id, |node| (node.cordoned, node.draining) = (cordoned, node.draining && cordoned))
    }

    /// It gets nothing new, and planners move away what it has, until it is let have machines again.
    pub(super) fn drain_node(&mut self, id: NodeId) -> Applied {
        self.changed_node(id, |node| (node.cordoned, node.draining) = (true, true))
    }

    pub(super) fn forget_node(&mut self, m: Moment, id: NodeId, force: bool) -> Applied {
        let node = self.nodes.get(&id).ok_or_else(|| check::missing(Noun::Node, id))?;
        let name = node.name.clone();
        let machines: Vec<_> = self.vms_on_node(id).cloned().collect();
        let others = self.others_on_node(id).count();
        if machines.len() + others > 0 && !force {
            return Err(check::in_use(Noun::Node, &name, format!("{} machines are on it", machines.len() + others)));
        }
        self.await_no_more(id);
        self.forget_moves(m.now, id);
        for mut vm in machines {
            if vm.ghost || vm.wanted == Wanted::Deleted {
                self.gone_from_its_host(vm);
                continue;
            }
            // Its disk is gone with the host, so its owner may have it made anew elsewhere.
            self.lose_disk(m, &mut vm);
            (vm.placement, vm.migration) = (None, None);
            vm.phase = Some(Phase::Failed);
            vm.reason = format!("its host {name} was removed");
            (vm.deadline, vm.retry_at, vm.changed_at) = (None, None, m.now);
            self.meter_vm(m.now, &vm);
            self.put_vm(vm);
        }
        self.leave_rehearsals(id);
        let images: Vec<_> = self.index.images_by_node.get(&id).into_iter().flatten().copied().collect();
        for image in images {
            let Some(mut image) = self.images.get(&image).cloned() else { continue };
            image.replicas.remove(&id);
            let changed = image.id;
            self.put_image(image);
            self.renumber_fetchers(changed);
        }
        self.remove_node(id);
        Ok(Reply::Done)
    }

    fn changed_node(&mut self, id: NodeId, change: impl FnOnce(&mut Node)) -> Applied {
        self.nodes.update(&id, change).map(|()| Reply::Done).ok_or_else(|| check::missing(Noun::Node, id))
    }
}
