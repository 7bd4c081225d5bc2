//! Backups: what owners ask for, what hosts made, and when old ones go. What increments stand on is in `chain.rs`.

use std::collections::{BTreeMap, BTreeSet};

use super::{Applied, Moment, check, image::MOST_BYTES};
use crate::{
    Backups, Image, ImageFormat, ImageId, Loss, NodeId, NodeState, Phase, Rejection, ReplicaState, Reply, Resource,
    State, Timestamp, Vm, VmId,
    command::{BackupMade, BackupReport, Noun},
    noun::BackupOf,
    setting,
};

/// Backups more often than this would only wait for each other.
const LEAST_EVERY_MILLIS: u64 = 60_000;
const MOST_EVERY_MILLIS: u64 = 366 * 24 * 3_600_000;
/// More than these of one machine are an archive, which is not what this is.
const MOST_KEPT: u64 = 1_000;

pub(super) struct Schedule {
    pub every_millis: u64,
    pub keep: u32,
    pub full_every: u32,
}

impl State {
    pub(super) fn back_up_vm(&mut self, m: Moment, id: VmId, full: bool) -> Applied {
        let mut vm = self.owned_vm(m, id)?.clone();
        ask(&mut vm, full)?;
        vm.request = m.request;
        self.put_vm(vm);
        Ok(Reply::Vm(id))
    }

    pub(super) fn set_vm_backup(&mut self, m: Moment, id: VmId, schedule: Schedule) -> Applied {
        let Schedule { every_millis, keep, full_every } = schedule;
        if every_millis != 0 {
            check::between("every_millis", every_millis, LEAST_EVERY_MILLIS, MOST_EVERY_MILLIS)?;
        }
        check::between("keep", keep.into(), 0, MOST_KEPT)?;
        check::between("full_every", full_every.into(), 0, setting::MOST_FULL_EVERY)?;
        let mut vm = self.owned_vm(m, id)?.clone();
        let due_at = (every_millis > 0).then(|| m.now.plus_millis(every_millis));
        vm.backups = Backups { every_millis, keep, full_every, due_at, ..vm.backups };
        self.put_vm(vm);
        self.drop_superfluous_backups(m, id);
        Ok(Reply::Vm(id))
    }

    /// By its schedule. One that cannot be made now is left out, and the next is due as ever.
    pub(super) fn back_up_due_vm(&mut self, m: Moment, id: VmId) -> Applied {
        let vm = self.vms.get(&id).ok_or_else(|| check::missing(Noun::Vm, id))?;
        if vm.backups.due_at.is_none_or(|at| at > m.now) {
            return Err(Rejection::Stale(format!("no backup of {id} is due")));
        }
        let mut vm = vm.clone();
        vm.backups.due_at = Some(m.now.plus_millis(vm.backups.every_millis));
        if let Err(refusal) = ask(&mut vm, false) {
            vm.backups.reason = refusal.to_string();
        }
        self.put_vm(vm);
        Ok(Reply::Done)
    }

    pub(super) fn report_backups(
        &mut self,
        m: Moment,
        node: NodeId,
        incarnation: u64,
        reports: &[BackupReport],
    ) -> Applied {
        self.heard_from(m, node, incarnation)?;
        for report in reports {
            let vm = self.vms.get(&report.vm);
            let vm = vm.filter(|vm| vm.placement.is_some_and(|p| p.node == node && p.epoch == report.epoch));
            let Some(mut vm) = vm.filter(|vm| vm.backups.pending() == Some(report.number)).cloned() else { continue };
            vm.backups.answered = report.number;
            vm.backups.reason = match &report.outcome {
                Ok(made) => match self.keep_backup(m, &vm, node, made) {
                    Ok(()) => String::new(),
                    Err(refusal) => refusal.to_string(),
                },
                Err(reason) => reason.clone(),
            };
            self.put_vm(vm);
        }
        Ok(Reply::Done)
    }

    /// The bytes are on the machine's own host; copies follow as for any image.
    fn keep_backup(&mut self, m: Moment, vm: &Vm, node: NodeId, made: &BackupMade) -> Result<(), Rejection> {
        if self.is_careful() {
            check::between("size_bytes", made.size_bytes, 1, MOST_BYTES)?;
            check::between("virtual_bytes", made.virtual_bytes, 1, MOST_BYTES)?;
        }
        let owner = self.tenants.get(&vm.tenant).ok_or_else(|| check::missing(Noun::Tenant, vm.tenant))?;
        let (limit, used) = (self.limit(owner.quota.image_bytes), self.usage(vm.tenant).image_bytes);
        if used.saturating_add(made.size_bytes) > limit {
            let (tenant, what) = (owner.name.clone(), "bytes of images".into());
            return Err(Rejection::Quota { tenant, what, limit, used, asked: made.size_bytes });
        }
        let parent = made.parent.map(|digest| self.parent_of(vm, digest, made.virtual_bytes)).transpose()?;
        let parent = parent.map(|image| image.id);
        let id = self.cluster_mut(|cluster| {
            cluster.last_image += 1;
            ImageId(cluster.last_image)
        });
        let taken_at = Timestamp(m.now.0.saturating_sub(made.age_millis));
        let image = Image {
            id,
            tenant: vm.tenant,
            // Ids are never given twice, so the name is free unless somebody took it on purpose.
            name: format!("backup-{}-{}", vm.id, id.0),
            format: ImageFormat::Qcow2,
            size_bytes: made.size_bytes,
            virtual_bytes: made.virtual_bytes,
            digest: made.digest,
            wanted_replicas: u32::try_from(self.setting(setting::IMAGE_REPLICAS)).unwrap_or(1),
            replicas: BTreeMap::from([(node, ReplicaState::Good)]),
            backup: Some(BackupOf { vm: vm.id, taken_at, consistency: made.consistency, parent }),
            rehearsal: None,
            rehearsed: None,
            created_at: m.now,
        };
        if self.image_named(vm.tenant, &image.name).is_some() {
            return Err(check::exists(Noun::Image, &image.name));
        }
        self.meter_image(m.now, &image);
        self.put_image(image);
        self.renumber_node(node);
        Ok(())
    }

    /// Drops what is beyond what the machine keeps.
    pub(super) fn drop_superfluous_backups(&mut self, m: Moment, vm: VmId) {
        for image in self.superfluous_backups(vm) {
            let nodes: Vec<_> = self.images.get(&image).into_iter().flat_map(Image::keepers).collect();
            self.stop_meter(m.now, Resource::Image(image));
            self.remove_image(image);
            nodes.into_iter().for_each(|node| self.renumber_node(node));
        }
    }

    /// The oldest of a machine's safe backups beyond those that it keeps, without those that a machine is made from,
    /// that are being rehearsed, or that one which stays stands on.
    fn superfluous_backups(&self, id: VmId) -> BTreeSet<ImageId> {
        let Some(vm) = self.vms.get(&id).filter(|vm| vm.backups.keep > 0) else { return BTreeSet::new() };
        let safe: Vec<ImageId> =
            self.backups_of(id).filter(|image| self.is_safe(image, vm)).map(|image| image.id).collect();
        let beyond = safe.len().saturating_sub(vm.backups.keep as usize);
        self.dispensable(&safe[..beyond])
    }

    /// Oldest first.
    pub fn backups_of(&self, vm: VmId) -> impl DoubleEndedIterator<Item = &Image> {
        self.index.backups_by_vm.get(&vm).into_iter().flatten().filter_map(|id| self.images.get(id))
    }

    /// The newest backup from which the machine could be made again if its host were lost now.
    pub fn safe_backup(&self, vm: &Vm) -> Option<&Image> {
        self.backups_of(vm.id).rev().find(|image| self.is_safe(image, vm))
    }

    /// The disk of a machine is lost with its host: its next one is made from the newest backup that is safe elsewhere.
    pub(super) fn lose_disk(&self, m: Moment, vm: &mut Vm) {
        if let Some(placement) = vm.placement.filter(|_| vm.existed) {
            // One that only lost hosts have is waited for rather than none used.
            let of_lost = || self.backups_of(vm.id).rev().find(|image| self.is_elsewhere(image, vm, |_| true));
            let backup =
                self.safe_backup(vm).or_else(of_lost).and_then(|image| Some((image.id, image.backup?.taken_at)));
            vm.restored_from = backup.map(|(image, _)| image);
            vm.loss = Some(Loss { node: placement.node, at: m.now, data_from: backup.map(|(_, taken_at)| taken_at) });
        }
        vm.existed = false;
        vm.backups.answered = vm.backups.asked;
    }

    /// Its bytes, and those that it stands on, are, verified, on other hosts than the machine, which are not lost.
    fn is_safe(&self, image: &Image, vm: &Vm) -> bool {
        let there = |node: NodeId| self.nodes.get(&node).is_some_and(|node| node.state != NodeState::Lost);
        self.is_elsewhere(image, vm, |node| !self.is_careful() || there(node))
    }

    fn is_elsewhere(&self, image: &Image, vm: &Vm, counts: impl Fn(NodeId) -> bool) -> bool {
        let own = vm.placement.map(|placement| placement.node);
        let elsewhere = |(node, replica): (&NodeId, &ReplicaState)| {
            *replica == ReplicaState::Good && Some(*node) != own && counts(*node)
        };
        self.chain(image).all(|link| link.replicas.iter().any(elsewhere))
    }
}

/// One more, unless one is under way; but a full one when that may be none.
fn ask(vm: &mut Vm, full: bool) -> Result<(), Rejection> {
    let there = matches!(vm.phase, Some(Phase::Running | Phase::Suspended | Phase::Stopped)) && vm.placement.is_some();
    if !there {
        return Err(Rejection::Stale(format!("{} is {}; there is nothing to back up", vm.name, vm.status())));
    }
    if vm.is_moving() {
        return Err(Rejection::Stale(format!("{} is {}; it can be backed up afterwards", vm.name, vm.status())));
    }
    if vm.backups.pending().is_none() || (full && !vm.backups.full) {
        vm.backups.asked += 1;
        vm.backups.full = full;
    }
    Ok(())
}
