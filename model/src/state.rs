//! Everything the cloud is: one ordered table per noun, and the indexes that reads and planners need.
//!
//! Rows are changed only through the `put_*` and `remove_*` functions below, which keep the indexes true; the indexes
//! are never stored, `load` rebuilds them. Deliberately not here: any rule about what may change; that is `apply`.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    Capacity, Cluster, Controller, ControllerId, Digest, Image, ImageId, JoinToken, Line, Meter, Network, NetworkId,
    Node, NodeId, Overcommit, Quorum, Remembered, RequestId, Resource, Tag, Template, Tenant, TenantId, Timestamp,
    User, Vm, VmId, setting,
    table::{LoadError, RowChange, Table},
};

mod change;
mod generation;
mod index;
mod queue;
mod rows;

pub use change::{Change, Owner};
use index::forget;
pub use index::{Index, Usage};
pub use queue::Queue;
pub use rows::RowVisitor;

/// Equal on every replica at the same log index.
#[derive(Clone, Debug)]
pub struct State {
    pub(crate) cluster: Table<u8, Cluster>,
    pub(crate) controllers: Table<ControllerId, Controller>,
    pub(crate) join_tokens: Table<Digest, JoinToken>,
    pub(crate) nodes: Table<NodeId, Node>,
    pub(crate) templates: Table<String, Template>,
    pub(crate) tenants: Table<TenantId, Tenant>,
    pub(crate) users: Table<String, User>,
    pub(crate) networks: Table<NetworkId, Network>,
    pub(crate) images: Table<ImageId, Image>,
    pub(crate) vms: Table<VmId, Vm>,
    pub(crate) tags: Table<(TenantId, String), Tag>,
    pub(crate) settings: Table<String, u64>,
    pub(crate) prices: Table<Timestamp, u64>,
    pub(crate) meters: Table<Resource, Meter>,
    pub(crate) lines: Table<(TenantId, u64), Line>,
    pub(crate) requests: Table<RequestId, Remembered>,
    pub(crate) quorum: Table<u8, Quorum>,
    pub(crate) index: Index,
    /// See `take_woken`.
    woken: BTreeSet<NodeId>,
    hash: u128,
}

macro_rules! tables {
    ($self:ident, $do:ident) => {
        $do!($self, 0, cluster);
        $do!($self, 1, controllers);
        $do!($self, 2, join_tokens);
        $do!($self, 3, nodes);
        $do!($self, 4, templates);
        $do!($self, 5, tenants);
        $do!($self, 6, users);
        $do!($self, 7, networks);
        $do!($self, 8, images);
        $do!($self, 9, vms);
        $do!($self, 10, tags);
        $do!($self, 11, settings);
        $do!($self, 12, prices);
        $do!($self, 13, meters);
        $do!($self, 14, lines);
        $do!($self, 15, requests);
        $do!($self, 16, quorum);
    };
}

impl Default for State {
    fn default() -> Self {
        let mut state = Self {
            cluster: Table::new(0),
            controllers: Table::new(1),
            join_tokens: Table::new(2),
            nodes: Table::new(3),
            templates: Table::new(4),
            tenants: Table::new(5),
            users: Table::new(6),
            networks: Table::new(7),
            images: Table::new(8),
            vms: Table::new(9),
            tags: Table::new(10),
            settings: Table::new(11),
            prices: Table::new(12),
            meters: Table::new(13),
            lines: Table::new(14),
            requests: Table::new(15),
            quorum: Table::new(Quorum::TABLE),
            index: Index::default(),
            woken: BTreeSet::new(),
            hash: 0,
        };
        state.cluster.put(0, Cluster::default());
        state
    }
}

/// Reading.
impl State {
    pub fn cluster(&self) -> &Cluster {
        self.cluster.get(&0).expect("the cluster's row is there from the start and never removed")
    }
    /// Its row comes to be with the first entry that changes it, so that a state of level 1 has none.
    pub fn quorum(&self) -> &Quorum {
        self.quorum.get(&0).unwrap_or(&Quorum::FIRST)
    }
    pub fn now(&self) -> Timestamp {
        self.cluster().now
    }
    pub fn controllers(&self) -> &Table<ControllerId, Controller> {
        &self.controllers
    }
    pub fn join_tokens(&self) -> &Table<Digest, JoinToken> {
        &self.join_tokens
    }
    pub fn nodes(&self) -> &Table<NodeId, Node> {
        &self.nodes
    }
    pub fn templates(&self) -> &Table<String, Template> {
        &self.templates
    }
    pub fn tenants(&self) -> &Table<TenantId, Tenant> {
        &self.tenants
    }
    pub fn users(&self) -> &Table<String, User> {
        &self.users
    }
    pub fn networks(&self) -> &Table<NetworkId, Network> {
        &self.networks
    }
    pub fn images(&self) -> &Table<ImageId, Image> {
        &self.images
    }
    pub fn vms(&self) -> &Table<VmId, Vm> {
        &self.vms
    }
    pub fn tags(&self) -> &Table<(TenantId, String), Tag> {
        &self.tags
    }
    pub fn prices(&self) -> &Table<Timestamp, u64> {
        &self.prices
    }
    pub fn meters(&self) -> &Table<Resource, Meter> {
        &self.meters
    }
    /// What a tenant uses now, in order of resource.
    pub fn meters_of_tenant(&self, tenant: TenantId) -> impl Iterator<Item = &Meter> {
        self.index.meters_by_tenant.get(&tenant).into_iter().flatten().filter_map(|resource| self.meters.get(resource))
    }
    pub fn lines(&self) -> &Table<(TenantId, u64), Line> {
        &self.lines
    }
    pub fn requests(&self) -> &Table<RequestId, Remembered> {
        &self.requests
    }

    /// The value of a setting, its default when nobody set it.
    ///
    /// # Panics
    /// When `name` is not one of the constants of [`setting`].
    pub fn setting(&self, name: &str) -> u64 {
        let default = setting::find(name).expect("settings are named by the constants of their module").default;
        self.settings.get(name).copied().unwrap_or(default)
    }

    pub fn tenant_named(&self, name: &str) -> Option<&Tenant> {
        self.index.tenant_by_name.get(name).and_then(|id| self.tenants.get(id))
    }
    pub fn node_named(&self, name: &str) -> Option<&Node> {
        self.index.node_by_name.get(name).and_then(|id| self.nodes.get(id))
    }
    pub fn network_named(&self, tenant: TenantId, name: &str) -> Option<&Network> {
        self.index.network_by_name.get(&(tenant, name.to_owned())).and_then(|id| self.networks.get(id))
    }
    pub fn image_named(&self, tenant: TenantId, name: &str) -> Option<&Image> {
        self.index.image_by_name.get(&(tenant, name.to_owned())).and_then(|id| self.images.get(id))
    }
    pub fn vm_named(&self, tenant: TenantId, name: &str) -> Option<&Vm> {
        self.index.vm_by_name.get(&(tenant, name.to_owned())).and_then(|id| self.vms.get(id))
    }
    pub fn user_of_token(&self, token: &Digest) -> Option<&User> {
        self.index.user_by_token.get(token).and_then(|name| self.users.get(name))
    }
    pub fn vms_of_tenant(&self, tenant: TenantId) -> impl DoubleEndedIterator<Item = &Vm> {
        self.index.vms_by_tenant.get(&tenant).into_iter().flatten().filter_map(|id| self.vms.get(id))
    }
    /// From the row after `after`, in order of id.
    pub fn vms_of_tenant_after(&self, tenant: TenantId, after: VmId) -> impl Iterator<Item = &Vm> {
        let later = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
        self.index
            .vms_by_tenant
            .get(&tenant)
            .into_iter()
            .flat_map(move |ids| ids.range(later))
            .filter_map(|id| self.vms.get(id))
    }
    pub fn vms_on_node(&self, node: NodeId) -> impl Iterator<Item = &Vm> {
        self.index.vms_by_node.get(&node).into_iter().flatten().filter_map(|id| self.vms.get(id))
    }
    /// Those that go there, or went from there and have something left on it.
    pub fn others_on_node(&self, node: NodeId) -> impl Iterator<Item = &Vm> {
        self.index.others_by_node.get(&node).into_iter().flatten().filter_map(|id| self.vms.get(id))
    }
    /// Whether a host may be granted a lease: it is a member at this incarnation, and not lost.
    pub fn has_standing(&self, node: NodeId, incarnation: u64) -> bool {
        let stands = |node: &Node| {
            node.incarnation == incarnation && matches!(node.state, crate::NodeState::Up | crate::NodeState::Silent)
        };
        self.nodes.get(&node).is_some_and(stands)
    }
    pub fn vm_count_on_node(&self, node: NodeId) -> usize {
        self.index.vms_by_node.get(&node).map_or(0, BTreeSet::len)
    }
    /// Machines that nothing is done for just now: without a host, in a pause before another try, or on a lost host. In
    /// the order in which they are served.
    pub fn waiting(&self) -> impl Iterator<Item = &Vm> {
        let mut served = self.index.unplaced.served();
        let unplaced = std::iter::from_fn(move || served.next()).map(|(id, _)| id);
        let paused = self.index.due.iter().map(|(_, id)| *id);
        let paused = paused.filter(|id| self.vms.get(id).is_some_and(|vm| vm.retry_at.is_some()));
        let lost = self.index.lost_nodes.iter().flat_map(|node| self.index.vms_by_node.get(node)).flatten().copied();
        unplaced.chain(paused).chain(lost).filter_map(|id| self.vms.get(&id)).filter(|vm| !vm.ghost)
    }
    pub fn vms_of_image(&self, image: ImageId) -> usize {
        self.index.vms_by_image.get(&image).map_or(0, BTreeSet::len)
    }
    pub fn addresses_used(&self, network: NetworkId) -> usize {
        self.index.addresses.get(&network).map_or(0, BTreeMap::len)
    }
    /// What the machines on a node are promised.
    pub fn reserved(&self, node: NodeId) -> Capacity {
        self.index.reserved.get(&node).copied().unwrap_or_default()
    }
    pub fn usage(&self, tenant: TenantId) -> Usage {
        self.index.usage.get(&tenant).copied().unwrap_or_default()
    }
    /// What may be promised on a node.
    pub fn promisable(&self, node: &Node) -> Capacity {
        self.overcommit().of(node.capacity)
    }
    pub fn overcommit(&self) -> Overcommit {
        Overcommit {
            vcpus_permille: self.setting(setting::OVERCOMMIT_CPU),
            memory_permille: self.setting(setting::OVERCOMMIT_MEMORY),
            disk_permille: self.setting(setting::OVERCOMMIT_DISK),
        }
    }
}

/// What of a machine its host has to know.
fn wished(vm: &Vm) -> impl PartialEq {
    let asked = (vm.stop_grace_millis, vm.reboots, vm.tries, vm.backups.pending());
    let migration = vm.migration.map(|migration| (migration.stage, migration.other));
    (vm.placement, migration, vm.wanted, vm.recovery, asked, vm.request)
}

/// Persistence: changed rows out, all rows in.
impl State {
    /// The rows that changed since the last call, as they are now; from here on the hash covers them.
    pub fn drain_changes(&mut self) -> Vec<RowChange> {
        let mut changes = Vec::new();
        macro_rules! drain {
            ($state:ident, $number:literal, $table:ident) => {
                $state.$table.drain(&mut changes, &mut $state.hash)
            };
        }
        tables!(self, drain);
        changes
    }

    /// Every row as it goes to disk, in the order of tables and keys.
    pub fn rows(&self) -> impl Iterator<Item = RowChange> {
        let mut rows: Box<dyn Iterator<Item = RowChange> + '_> = Box::new(std::iter::empty());
        macro_rules! add {
            ($state:ident, $number:literal, $table:ident) => {
                rows = Box::new(rows.chain($state.$table.encoded()))
            };
        }
        tables!(self, add);
        rows
    }

    /// A hash of all rows as of the last `drain_changes`, however they came to be.
    pub fn hash(&self) -> [u8; 16] {
        self.hash.to_le_bytes()
    }

    /// Rebuilds the state from what `drain_changes` gave out.
    ///
    /// # Errors
    /// When a row is of an unknown table or does not decode.
    pub fn load(rows: impl Iterator<Item = (u8, Vec<u8>, Vec<u8>)>) -> Result<Self, LoadError> {
        let mut state = Self::default();
        for (table, key, row) in rows {
            macro_rules! load {
                ($state:ident, $number:literal, $table:ident) => {
                    if table == $number {
                        $state.$table.load(&key, &row, &mut $state.hash)?;
                        continue;
                    }
                };
            }
            tables!(state, load);
            return Err(LoadError { table, reason: "no such table in this version".into() });
        }
        state.cluster.settle();
        state.index = Index::of(&state);
        Ok(state)
    }
}

/// Writing: the only places where rows and indexes change together.
impl State {
    pub(crate) fn cluster_mut<T>(&mut self, change: impl FnOnce(&mut Cluster) -> T) -> T {
        self.cluster.update(&0, change).expect("the cluster's row is there from the start and never removed")
    }

    pub(crate) fn put_quorum(&mut self, row: Quorum) {
        self.quorum.put(0, row);
    }

    pub(crate) fn put_tenant(&mut self, row: Tenant) {
        self.index.add_tenant(&row);
        self.tenants.put(row.id, row);
    }
    pub(crate) fn remove_tenant(&mut self, id: TenantId) {
        if let Some(row) = self.tenants.remove(&id, &mut self.hash) {
            self.index.tenant_by_name.remove(&row.name);
        }
    }
    pub(crate) fn put_user(&mut self, row: User) {
        self.index.add_user(&row);
        self.users.put(row.name.clone(), row);
    }
    pub(crate) fn remove_user(&mut self, name: &str) {
        if let Some(row) = self.users.remove(&name.to_owned(), &mut self.hash) {
            self.index.user_by_token.remove(&row.token);
        }
    }
    pub(crate) fn put_node(&mut self, row: Node) {
        self.index.add_node(&row);
        self.nodes.put(row.id, row);
    }
    pub(crate) fn remove_node(&mut self, id: NodeId) {
        if let Some(row) = self.nodes.remove(&id, &mut self.hash) {
            self.index.node_by_name.remove(&row.name);
            self.index.lost_nodes.remove(&id);
            self.index.set_underlay(id, None);
        }
    }
    pub(crate) fn put_network(&mut self, row: Network) {
        self.index.add_network(&row);
        self.networks.put(row.id, row);
    }
    pub(crate) fn remove_network(&mut self, id: NetworkId) {
        if let Some(row) = self.networks.remove(&id, &mut self.hash) {
            self.index.network_by_name.remove(&(row.tenant, row.name));
            self.index.usage.entry(row.tenant).or_default().networks -= 1;
            self.index.settle_usage(row.tenant);
        }
    }
    pub(crate) fn put_image(&mut self, row: Image) {
        self.unindex_image(row.id);
        self.index.add_image(&row);
        self.images.put(row.id, row);
    }
    pub(crate) fn remove_image(&mut self, id: ImageId) {
        self.unindex_image(id);
        self.images.remove(&id, &mut self.hash);
    }
    fn unindex_image(&mut self, id: ImageId) {
        let Some(row) = self.images.get(&id) else { return };
        self.index.remove_rehearsal(row);
        self.index.image_by_name.remove(&(row.tenant, row.name.clone()));
        forget(&mut self.index.images_by_digest, row.digest, id);
        for node in row.replicas.keys() {
            forget(&mut self.index.images_by_node, *node, id);
        }
        self.index.thin_images.remove(&id);
        if let Some(of) = row.backup {
            forget(&mut self.index.backups_by_vm, of.vm, id);
            of.parent.iter().for_each(|parent| forget(&mut self.index.increments, *parent, id));
        }
        self.index.usage.entry(row.tenant).or_default().image_bytes -= row.size_bytes;
        self.index.settle_usage(row.tenant);
    }

    /// Puts the machine's row. The nodes whose assignment this changes get a new generation.
    pub(crate) fn put_vm(&mut self, vm: Vm) {
        let old = self.vms.get(&vm.id);
        let unchanged = old.is_some_and(|old| wished(old) == wished(&vm));
        let own: Vec<NodeId> = old.into_iter().flat_map(Vm::hosts).chain(vm.hosts()).collect();
        let shared: Vec<NetworkId> = vm.nics.iter().map(|nic| nic.network).collect();
        let before = self.members_of(&own, &shared);
        if let Some(old) = self.vms.get(&vm.id) {
            self.index.remove_vm(old);
        }
        self.index.add_vm(&vm);
        self.vms.put(vm.id, vm);
        if !unchanged {
            self.renumber(&own, &shared, &before);
        }
    }

    pub(crate) fn remove_vm(&mut self, id: VmId) {
        let Some(old) = self.vms.get(&id) else { return };
        let shared: Vec<NetworkId> = old.nics.iter().map(|nic| nic.network).collect();
        let own: Vec<NodeId> = old.hosts().collect();
        let before = self.members_of(&own, &shared);
        if let Some(old) = self.vms.remove(&id, &mut self.hash) {
            self.index.remove_vm(&old);
        }
        self.renumber(&own, &shared, &before);
    }

    pub(crate) fn remember(&mut self, id: RequestId, row: Remembered) {
        self.index.add_request(id, &row);
        self.requests.put(id, row);
    }
    /// Forgets replies that are older than `oldest` or beyond the `most` newest; a few at a time, so that no entry pays for many.
    pub(crate) fn forget_requests(&mut self, oldest: Timestamp, most: usize) {
        const AT_ONCE: usize = 4;
        for _ in 0..AT_ONCE {
            match self.index.requests_by_age.first().copied() {
                Some((at, id)) if at < oldest || self.requests.len() > most => {
                    self.index.requests_by_age.remove(&(at, id));
                    self.requests.remove(&id, &mut self.hash);
                }
                _ => return,
            }
        }
    }

    pub(crate) fn drop_join_token(&mut self, token: &Digest) {
        self.join_tokens.remove(token, &mut self.hash);
    }
    pub(crate) fn drop_template(&mut self, name: &str) {
        self.templates.remove(&name.to_owned(), &mut self.hash);
    }
    pub(crate) fn put_tag(&mut self, key: (TenantId, String), row: Tag) {
        let tenant = key.0;
        if self.tags.put(key, row).is_none() {
            self.index.add_tag(tenant);
        }
    }
    pub(crate) fn drop_tag(&mut self, key: &(TenantId, String)) {
        if self.tags.remove(key, &mut self.hash).is_some() {
            self.index.usage.entry(key.0).or_default().tags -= 1;
            self.index.settle_usage(key.0);
        }
    }
    pub(crate) fn put_meter(&mut self, row: Meter) {
        self.index.add_meter(&row);
        self.meters.put(row.resource, row);
    }
    pub(crate) fn drop_meter(&mut self, resource: Resource) -> Option<Meter> {
        let row = self.meters.remove(&resource, &mut self.hash)?;
        forget(&mut self.index.meters_by_tenant, row.tenant, resource);
        Some(row)
    }
}
