//! Backups that stand on earlier ones: what an increment needs, and what must stay because of it.
//!
//! ```text
//! full ◄── increment ◄── increment        a chain: the last is of use only with all that it stands on
//! ```
//! A chain is never broken: what something stands on is not deleted, by nobody.

use std::{collections::BTreeSet, iter};

use crate::{Digest, Image, ImageId, NodeId, Rejection, ReplicaState, State, Vm, setting};

impl State {
    /// The image, what it stands on, what that stands on; the last is a full copy.
    pub fn chain<'a>(&'a self, image: &'a Image) -> impl Iterator<Item = &'a Image> {
        iter::successors(Some(image), |image| self.images.get(&image.backup?.parent?))
    }

    /// Those that stand on it, themselves.
    pub fn increments_of(&self, image: ImageId) -> impl Iterator<Item = &Image> {
        self.index.increments.get(&image).into_iter().flatten().filter_map(|id| self.images.get(id))
    }

    /// What the next backup of the machine may stand on: the newest one, while its chain is whole on the machine's own
    /// host and may grow. `None`: the next is a full one.
    pub(crate) fn next_parent(&self, vm: &Vm) -> Option<&Image> {
        let newest = self.backups_of(vm.id).next_back().filter(|_| !vm.backups.full)?;
        let host = vm.placement?.node;
        let full_every = match vm.backups.full_every {
            0 => self.setting(setting::BACKUP_FULL_EVERY),
            every => every.into(),
        };
        let may_grow = (self.chain(newest).count() as u64) < full_every;
        (may_grow && self.holds_chain(host, newest)).then_some(newest)
    }

    /// The node has, verified, all that it takes to open the image.
    pub(crate) fn holds_chain(&self, node: NodeId, image: &Image) -> bool {
        self.chain(image).all(|link| link.replicas.get(&node) == Some(&ReplicaState::Good))
    }

    /// Of a machine's backups, the one with these bytes that an increment may be made of.
    pub(super) fn parent_of(&self, vm: &Vm, digest: Digest, virtual_bytes: u64) -> Result<&Image, Rejection> {
        let stale = |why: &str| Rejection::Stale(why.into());
        let found = self.backups_of(vm.id).rev().find(|image| image.digest == digest);
        let parent = found.ok_or_else(|| stale("the backup that it stands on was deleted meanwhile"))?;
        if parent.virtual_bytes != virtual_bytes {
            return Err(stale("the disk is of another length than the backup that it stands on"));
        }
        if self.chain(parent).count() as u64 >= setting::MOST_FULL_EVERY {
            return Err(Rejection::Stale(format!("{} has as many increments as a chain may have", parent.name)));
        }
        Ok(parent)
    }

    /// Why it may not be deleted, when something stands on it.
    pub(super) fn stood_upon(&self, image: ImageId) -> Option<String> {
        self.increments_of(image).next().map(|child| format!("backup {} stands on it", child.name))
    }

    /// Of these, oldest first, those that can go: nothing needs them that stays. So a chain goes when all of it can.
    pub(super) fn dispensable(&self, beyond: &[ImageId]) -> BTreeSet<ImageId> {
        let mut gone = BTreeSet::new();
        // Newest first: what stands on something is younger than that.
        for id in beyond.iter().rev() {
            let used = self.vms_of_image(*id) > 0 || self.index.rehearsing.contains(id);
            if !used && self.increments_of(*id).all(|child| gone.contains(&child.id)) {
                gone.insert(*id);
            }
        }
        gone
    }

    /// The image, and all that stands on it.
    pub(super) fn with_increments(&self, image: ImageId) -> BTreeSet<ImageId> {
        let (mut all, mut open) = (BTreeSet::new(), vec![image]);
        while let Some(id) = open.pop() {
            if all.insert(id) {
                open.extend(self.increments_of(id).map(|child| child.id));
            }
        }
        all
    }
}
