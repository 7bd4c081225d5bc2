//! The indexes: derived from the rows, kept beside them, never stored.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    net::IpAddr,
};

use super::{Queue, State};
use crate::{
    Capacity, Digest, Image, ImageId, Meter, Network, NetworkId, Node, NodeId, NodeState, Remembered, RequestId,
    Resource, Tenant, TenantId, Timestamp, User, Vm, VmId, news,
};

/// Derived from the rows; equal indexes follow from equal rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    pub(crate) tenant_by_name: BTreeMap<String, TenantId>,
    pub(crate) user_by_token: BTreeMap<Digest, String>,
    pub(crate) node_by_name: BTreeMap<String, NodeId>,
    pub(crate) network_by_name: BTreeMap<(TenantId, String), NetworkId>,
    pub(crate) image_by_name: BTreeMap<(TenantId, String), ImageId>,
    pub(crate) images_by_digest: BTreeMap<Digest, BTreeSet<ImageId>>,
    pub(crate) images_by_node: BTreeMap<NodeId, BTreeSet<ImageId>>,
    /// Without ghosts: their names are free again.
    pub(crate) vm_by_name: BTreeMap<(TenantId, String), VmId>,
    pub(crate) vms_by_tenant: BTreeMap<TenantId, BTreeSet<VmId>>,
    pub(crate) vms_by_node: BTreeMap<NodeId, BTreeSet<VmId>>,
    /// By the second host of a move.
    pub(crate) others_by_node: BTreeMap<NodeId, BTreeSet<VmId>>,
    pub(crate) vms_by_image: BTreeMap<ImageId, BTreeSet<VmId>>,
    pub(crate) backups_by_vm: BTreeMap<VmId, BTreeSet<ImageId>>,
    /// By what they stand on.
    pub(crate) increments: BTreeMap<ImageId, BTreeSet<ImageId>>,
    /// The backups that are being rehearsed; those that have a host, by host.
    pub(crate) rehearsing: BTreeSet<ImageId>,
    pub(crate) rehearsing_by_node: BTreeMap<NodeId, BTreeSet<ImageId>>,
    pub(crate) addresses: BTreeMap<NetworkId, BTreeMap<u32, VmId>>,
    /// How many machines of a network are on each node.
    pub(crate) network_nodes: BTreeMap<NetworkId, BTreeMap<NodeId, u32>>,
    pub(crate) reserved: BTreeMap<NodeId, Capacity>,
    /// What is being created on each node: promised already, and not yet in the use that it reports.
    pub(crate) coming: BTreeMap<NodeId, Capacity>,
    pub(crate) usage: BTreeMap<TenantId, Usage>,
    pub(crate) meters_by_tenant: BTreeMap<TenantId, BTreeSet<Resource>>,
    /// Machines that want a host and may have one now.
    pub(crate) unplaced: Queue,
    pub(crate) lost_nodes: BTreeSet<NodeId>,
    /// Where tunnels to the other nodes end: asked for by the hundred for each host that a network of many gets or loses.
    pub(crate) underlays: BTreeMap<NodeId, IpAddr>,
    /// Of all of them, in any order.
    pub(crate) underlays_hash: u64,
    /// When a deadline passes or a back-off ends.
    pub(crate) due: BTreeSet<(Timestamp, VmId)>,
    pub(crate) requests_by_age: BTreeSet<(Timestamp, RequestId)>,
    /// Images with fewer replicas, wanted ones counted, than they should have.
    pub(crate) thin_images: BTreeSet<ImageId>,
}

impl State {
    /// What follows from the rows, rebuilt from nothing; equal to what is kept, always.
    pub fn rebuilt_index(&self) -> Index {
        Index::of(self)
    }
    pub fn kept_index(&self) -> &Index {
        &self.index
    }
}

/// What a tenant holds, as its quota counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub vms: u64,
    pub size: Capacity,
    pub networks: u64,
    pub image_bytes: u64,
    pub tags: u64,
}

impl Index {
    pub(super) fn of(state: &State) -> Self {
        let mut index = Self::default();
        state.tenants.values().for_each(|row| index.add_tenant(row));
        state.users.values().for_each(|row| index.add_user(row));
        state.nodes.values().for_each(|row| index.add_node(row));
        state.networks.values().for_each(|row| index.add_network(row));
        state.images.values().for_each(|row| index.add_image(row));
        state.vms.values().for_each(|row| index.add_vm(row));
        state.tags.iter().for_each(|((tenant, _), _)| index.add_tag(*tenant));
        state.meters.values().for_each(|row| index.add_meter(row));
        state.requests.iter().for_each(|(id, row)| index.add_request(*id, row));
        index
    }

    pub(super) fn add_tenant(&mut self, row: &Tenant) {
        self.tenant_by_name.insert(row.name.clone(), row.id);
    }
    pub(super) fn add_user(&mut self, row: &User) {
        self.user_by_token.insert(row.token, row.name.clone());
    }
    pub(super) fn add_node(&mut self, row: &Node) {
        self.node_by_name.insert(row.name.clone(), row.id);
        if row.state == NodeState::Lost {
            self.lost_nodes.insert(row.id);
            self.set_underlay(row.id, None);
        } else {
            self.lost_nodes.remove(&row.id);
            self.set_underlay(row.id, Some(row.underlay));
        }
    }
    pub(super) fn set_underlay(&mut self, node: NodeId, underlay: Option<IpAddr>) {
        let before = match underlay {
            Some(underlay) => self.underlays.insert(node, underlay),
            None => self.underlays.remove(&node),
        };
        for end in [before, underlay].into_iter().flatten() {
            self.underlays_hash ^= news::hash((node, end));
        }
    }
    pub(super) fn add_request(&mut self, id: RequestId, row: &Remembered) {
        self.requests_by_age.insert((row.at, id));
    }
    pub(super) fn add_network(&mut self, row: &Network) {
        self.network_by_name.insert((row.tenant, row.name.clone()), row.id);
        self.usage.entry(row.tenant).or_default().networks += 1;
    }
    pub(super) fn add_image(&mut self, row: &Image) {
        self.image_by_name.insert((row.tenant, row.name.clone()), row.id);
        self.images_by_digest.entry(row.digest).or_default().insert(row.id);
        if let Some(of) = row.backup {
            self.backups_by_vm.entry(of.vm).or_default().insert(row.id);
            if let Some(parent) = of.parent {
                self.increments.entry(parent).or_default().insert(row.id);
            }
        }
        for node in row.replicas.keys() {
            self.images_by_node.entry(*node).or_default().insert(row.id);
        }
        if row.keepers().count() < row.wanted_replicas as usize {
            self.thin_images.insert(row.id);
        }
        self.usage.entry(row.tenant).or_default().image_bytes += row.size_bytes;
        let Some(rehearsal) = &row.rehearsal else { return };
        self.rehearsing.insert(row.id);
        if let Some(placement) = rehearsal.placement {
            self.rehearsing_by_node.entry(placement.node).or_default().insert(row.id);
            let reserved = self.reserved.entry(placement.node).or_default();
            *reserved = reserved.plus(rehearsal.size);
        }
    }
    pub(super) fn remove_rehearsal(&mut self, row: &Image) {
        let Some(rehearsal) = &row.rehearsal else { return };
        self.rehearsing.remove(&row.id);
        if let Some(placement) = rehearsal.placement {
            forget(&mut self.rehearsing_by_node, placement.node, row.id);
            self.release(placement.node, rehearsal.size);
        }
    }
    pub(super) fn add_tag(&mut self, tenant: TenantId) {
        self.usage.entry(tenant).or_default().tags += 1;
    }
    pub(super) fn add_meter(&mut self, row: &Meter) {
        self.meters_by_tenant.entry(row.tenant).or_default().insert(row.resource);
    }
    pub(super) fn add_vm(&mut self, vm: &Vm) {
        if !vm.ghost {
            self.vm_by_name.insert((vm.tenant, vm.name.clone()), vm.id);
            self.vms_by_tenant.entry(vm.tenant).or_default().insert(vm.id);
            let usage = self.usage.entry(vm.tenant).or_default();
            usage.vms += 1;
            usage.size = usage.size.plus(vm.size);
        }
        for image in iter::once(vm.image).chain(vm.restored_from) {
            self.vms_by_image.entry(image).or_default().insert(vm.id);
        }
        for nic in &vm.nics {
            self.addresses.entry(nic.network).or_default().insert(nic.ip.into(), vm.id);
        }
        if let Some(placement) = vm.placement {
            self.vms_by_node.entry(placement.node).or_default().insert(vm.id);
            if vm.phase.is_none() {
                let coming = self.coming.entry(placement.node).or_default();
                *coming = coming.plus(vm.size);
            }
        } else if vm.wants_host() {
            self.unplaced.insert(vm);
        }
        if let Some(migration) = vm.migration {
            self.others_by_node.entry(migration.other.node).or_default().insert(vm.id);
        }
        vm.hosts().for_each(|node| self.enter_node(vm, node));
        vm.due_times().for_each(|at| {
            self.due.insert((at, vm.id));
        });
    }
    pub(super) fn remove_vm(&mut self, vm: &Vm) {
        if !vm.ghost {
            self.vm_by_name.remove(&(vm.tenant, vm.name.clone()));
            forget(&mut self.vms_by_tenant, vm.tenant, vm.id);
            let usage = self.usage.entry(vm.tenant).or_default();
            usage.vms -= 1;
            usage.size = usage.size.minus(vm.size);
            self.settle_usage(vm.tenant);
        }
        for image in iter::once(vm.image).chain(vm.restored_from) {
            forget(&mut self.vms_by_image, image, vm.id);
        }
        for nic in &vm.nics {
            if let Some(addresses) = self.addresses.get_mut(&nic.network) {
                addresses.remove(&nic.ip.into());
                if addresses.is_empty() {
                    self.addresses.remove(&nic.network);
                }
            }
        }
        if let Some(placement) = vm.placement {
            forget(&mut self.vms_by_node, placement.node, vm.id);
            if vm.phase.is_none()
                && let Some(coming) = self.coming.get_mut(&placement.node)
            {
                *coming = coming.minus(vm.size);
                if *coming == Capacity::default() {
                    self.coming.remove(&placement.node);
                }
            }
        }
        if let Some(migration) = vm.migration {
            forget(&mut self.others_by_node, migration.other.node, vm.id);
        }
        vm.hosts().for_each(|node| self.leave_node(vm, node));
        self.unplaced.remove(vm);
        vm.due_times().for_each(|at| {
            self.due.remove(&(at, vm.id));
        });
    }
    /// What it is promised there, and its networks.
    fn enter_node(&mut self, vm: &Vm, node: NodeId) {
        let reserved = self.reserved.entry(node).or_default();
        *reserved = reserved.plus(vm.size);
        for nic in &vm.nics {
            *self.network_nodes.entry(nic.network).or_default().entry(node).or_default() += 1;
        }
    }
    fn leave_node(&mut self, vm: &Vm, node: NodeId) {
        self.release(node, vm.size);
        for nic in &vm.nics {
            let Some(nodes) = self.network_nodes.get_mut(&nic.network) else { continue };
            if let Some(count) = nodes.get_mut(&node) {
                *count -= 1;
                if *count == 0 {
                    nodes.remove(&node);
                }
            }
            if nodes.is_empty() {
                self.network_nodes.remove(&nic.network);
            }
        }
    }
    fn release(&mut self, node: NodeId, size: Capacity) {
        let Some(reserved) = self.reserved.get_mut(&node) else { return };
        *reserved = reserved.minus(size);
        let used = self.vms_by_node.contains_key(&node)
            || self.others_by_node.contains_key(&node)
            || self.rehearsing_by_node.contains_key(&node);
        if *reserved == Capacity::default() && !used {
            self.reserved.remove(&node);
        }
    }
    pub(super) fn settle_usage(&mut self, tenant: TenantId) {
        if self.usage.get(&tenant) == Some(&Usage::default()) {
            self.usage.remove(&tenant);
        }
    }
}

pub(super) fn forget<K: Ord, V: Ord>(sets: &mut BTreeMap<K, BTreeSet<V>>, key: K, value: V) {
    if let Some(set) = sets.get_mut(&key) {
        set.remove(&value);
        if set.is_empty() {
            sets.remove(&key);
        }
    }
}
