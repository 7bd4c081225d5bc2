//! Images: the record of bytes that are already on nodes.

use std::collections::{BTreeMap, BTreeSet};

use super::{Applied, Moment, check};
use crate::{
    Digest, Image, ImageFormat, ImageId, NodeId, Noun, Rejection, ReplicaState, Reply, Resource, State, TenantId,
    setting,
};

pub(super) struct File {
    pub format: ImageFormat,
    pub size_bytes: u64,
    pub virtual_bytes: u64,
    pub digest: Digest,
}

/// Larger than any disk a host has; keeps sums far from overflow.
pub(super) const MOST_BYTES: u64 = 1 << 50;

impl State {
    pub(super) fn import_image(
        &mut self,
        m: Moment,
        tenant: TenantId,
        name: &str,
        file: File,
        holders: &[NodeId],
    ) -> Applied {
        self.may_import(m, tenant, name, file.size_bytes)?;
        check::between("virtual_bytes", file.virtual_bytes, 1, MOST_BYTES)?;
        let replicas: BTreeMap<_, _> = holders.iter().map(|node| (*node, ReplicaState::Good)).collect();
        if replicas.is_empty() {
            return Err(check::invalid("replicas", "none", "at least one node that holds the bytes"));
        }
        if let Some(gone) = replicas.keys().find(|node| !self.nodes.contains(node)) {
            return Err(check::missing(Noun::Node, gone));
        }
        let id = self.cluster_mut(|cluster| {
            cluster.last_image += 1;
            ImageId(cluster.last_image)
        });
        let File { format, size_bytes, virtual_bytes, digest } = file;
        let wanted_replicas = u32::try_from(self.setting(setting::IMAGE_REPLICAS)).unwrap_or(1);
        let nodes: Vec<_> = replicas.keys().copied().collect();
        let image = Image {
            id,
            tenant,
            name: name.into(),
            format,
            size_bytes,
            virtual_bytes,
            digest,
            wanted_replicas,
            replicas,
            backup: None,
            rehearsal: None,
            rehearsed: None,
            created_at: m.now,
        };
        self.meter_image(m.now, &image);
        self.put_image(image);
        nodes.into_iter().for_each(|node| self.renumber_node(node));
        Ok(Reply::Image(id))
    }

    /// What an upload is checked against before its first byte is sent, and again when it is recorded.
    fn may_import(&self, m: Moment, tenant: TenantId, name: &str, size_bytes: u64) -> Result<(), Rejection> {
        check::dotted("name", name)?;
        check::not_an_id::<ImageId>("name", name)?;
        check::between("size_bytes", size_bytes, 1, MOST_BYTES)?;
        let owner = self.visible_tenant(m, tenant)?;
        if self.image_named(tenant, name).is_some() {
            return Err(check::exists(Noun::Image, name));
        }
        let (limit, used) = (self.limit(owner.quota.image_bytes), self.usage(tenant).image_bytes);
        if used.saturating_add(size_bytes) > limit {
            let (tenant, what) = (owner.name.clone(), "bytes of images".into());
            return Err(Rejection::Quota { tenant, what, limit, used, asked: size_bytes });
        }
        Ok(())
    }

    pub(super) fn delete_image(&mut self, m: Moment, id: ImageId) -> Applied {
        let image = self.images.get(&id).filter(|image| m.may_see(image.tenant));
        let image = image.ok_or_else(|| check::missing(Noun::Image, id))?;
        let machines = self.vms_of_image(id);
        if machines > 0 {
            return Err(check::in_use(Noun::Image, &image.name, format!("{machines} machines are made from it")));
        }
        if image.rehearsal.is_some() {
            return Err(check::in_use(Noun::Image, &image.name, "a rehearsal of it is under way".into()));
        }
        if let Some(child) = self.stood_upon(id) {
            return Err(check::in_use(Noun::Image, &image.name, child));
        }
        let nodes: Vec<_> = image.replicas.keys().copied().collect();
        self.stop_meter(m.now, Resource::Image(id));
        self.remove_image(id);
        nodes.into_iter().for_each(|node| self.renumber_node(node));
        Ok(Reply::Done)
    }

    /// Who holds the image changed, so the hosts that still have to fetch it, or what stands on it, get the new sources.
    pub(super) fn renumber_fetchers(&mut self, id: ImageId) {
        let mut nodes = self.fetchers(id);
        for increment in self.with_increments(id) {
            nodes.extend(self.fetchers(increment));
            // Also who has the increment already gets back what it stands on.
            nodes.extend(self.images.get(&increment).filter(|_| increment != id).into_iter().flat_map(Image::keepers));
        }
        nodes.into_iter().for_each(|node| self.renumber_node(node));
    }

    fn fetchers(&self, id: ImageId) -> BTreeSet<NodeId> {
        let replicas = self.images.get(&id).into_iter().flat_map(|image| &image.replicas);
        let keepers = replicas.filter(|(_, state)| **state == ReplicaState::Wanted).map(|(node, _)| *node);
        let machines = self.index.vms_by_image.get(&id).into_iter().flatten().filter_map(|vm| self.vms.get(vm));
        let makers = machines.filter(|vm| !vm.existed).filter_map(|vm| vm.placement).map(|placement| placement.node);
        let rehearsal = self.images.get(&id).and_then(|image| image.rehearsal.as_ref()?.placement);
        let rehearsing = rehearsal.map(|placement| placement.node);
        keepers.chain(makers).chain(rehearsing).collect()
    }

    pub(super) fn add_replica(&mut self, id: ImageId, node: NodeId) -> Applied {
        let image = self.images.get(&id).ok_or_else(|| check::missing(Noun::Image, id))?;
        if !self.nodes.contains(&node) {
            return Err(check::missing(Noun::Node, node));
        }
        if image.keepers().any(|keeper| keeper == node) {
            return Err(Rejection::Stale(format!("{node} is to hold {} already", image.name)));
        }
        let mut image = image.clone();
        image.replicas.insert(node, ReplicaState::Wanted);
        self.put_image(image);
        self.renumber_node(node);
        Ok(Reply::Done)
    }
}
