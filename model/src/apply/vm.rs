//! What owners do with machines: create, power, reboot, delete.

use std::{collections::BTreeMap, net::Ipv4Addr};

use super::{Applied, Moment, check};
use crate::{
    Backups, Capacity, ImageId, Mac, Network, NetworkId, Nic, NodeState, Noun, Phase, Recovery, Rejection, Reply,
    State, Status, TenantId, Timestamp, Vm, VmId, Wanted, setting,
};

pub(super) struct Order<'a> {
    pub name: &'a str,
    pub image: ImageId,
    pub template: &'a str,
    pub network: NetworkId,
    pub ssh_keys: &'a [String],
    pub user_data: &'a str,
    pub after_loss: (Recovery, u8),
}

/// Longest time that ACPI shutdown may be given.
const MOST_GRACE_MILLIS: u64 = 60 * 60 * 1000;

impl State {
    pub(super) fn create_vm(&mut self, m: Moment, tenant: TenantId, order: Order) -> Applied {
        check::label("name", order.name)?;
        check::not_an_id::<VmId>("name", order.name)?;
        check::ssh_keys(order.ssh_keys)?;
        if self.is_careful() {
            check::ssh_keys_together(order.ssh_keys)?;
        }
        check::user_data(order.user_data)?;
        let owner = self.visible_tenant(m, tenant)?;
        if self.vm_named(tenant, order.name).is_some() {
            return Err(check::exists(Noun::Vm, order.name));
        }
        let image = self.images.get(&order.image).filter(|image| image.tenant == tenant || m.may_see(image.tenant));
        let image = image.ok_or_else(|| check::missing(Noun::Image, order.image))?;
        let template = self.templates.get(&order.template.to_owned());
        let template = template.ok_or_else(|| check::missing(Noun::Template, order.template))?;
        let network = self.networks.get(&order.network).filter(|network| network.tenant == tenant);
        let network = network.ok_or_else(|| check::missing(Noun::Network, order.network))?;
        let size = Capacity { disk_bytes: template.size.disk_bytes.max(image.virtual_bytes), ..template.size };
        self.within_quota(owner.id, &owner.name, owner.quota, size)?;
        let ip = self.free_address(network)?;
        let (weight_milli, image, network) = (template.weight_milli, image.id, network.id);
        let (id, mac) = self.cluster_mut(|cluster| {
            cluster.last_vm += 1;
            cluster.last_mac += 1;
            (VmId(cluster.last_vm), minted_mac(cluster.last_mac))
        });
        self.put_vm(Vm {
            id,
            tenant,
            name: order.name.into(),
            template: order.template.into(),
            image,
            size,
            weight_milli,
            nics: vec![Nic { network, mac, ip }],
            ssh_keys: order.ssh_keys.to_vec(),
            user_data: order.user_data.into(),
            wanted: Wanted::Running,
            recovery: order.after_loss.0,
            priority: order.after_loss.1,
            loss: None,
            backups: Backups::default(),
            restored_from: None,
            stop_grace_millis: 0,
            reboots: 0,
            placement: None,
            migration: None,
            move_failure: None,
            phase: None,
            existed: false,
            rebooted: 0,
            reason: "waiting for a node".into(),
            attempts: 0,
            tries: 0,
            retry_at: None,
            deadline: None,
            request: m.request,
            ghost: false,
            created_at: m.now,
            changed_at: m.now,
        });
        Ok(Reply::Vm(id))
    }

    pub(super) fn set_vm_power(&mut self, m: Moment, id: VmId, wanted: Wanted, grace: u64) -> Applied {
        check::between("grace_millis", grace, 0, MOST_GRACE_MILLIS)?;
        if wanted == Wanted::Deleted {
            return Err(check::invalid("wanted", "deleted", "running, suspended or stopped"));
        }
        let mut vm = self.owned_vm(m, id)?.clone();
        if wanted == Wanted::Suspended && vm.phase == Some(Phase::Stopped) {
            return Err(Rejection::Stale(format!("{} is stopped; only a running machine can be suspended", vm.name)));
        }
        vm.wanted = wanted;
        vm.stop_grace_millis = grace;
        self.asked_anew(m, vm);
        Ok(Reply::Vm(id))
    }

    pub(super) fn set_vm_recovery(&mut self, m: Moment, id: VmId, recovery: Recovery, priority: u8) -> Applied {
        let mut vm = self.owned_vm(m, id)?.clone();
        let becomes_exclusive = recovery == Recovery::Exclusive && vm.recovery != recovery;
        // A host that does not hear of it would let the guest run beyond its lease, and another one runs then as well.
        if becomes_exclusive && vm.placement.is_some() && vm.status() != Status::Stopped {
            return Err(Rejection::Stale(format!(
                "{} is {}; a machine can be made exclusive only while it is stopped or has no host",
                vm.name,
                vm.status()
            )));
        }
        if becomes_exclusive && self.is_careful() {
            self.may_be_exclusive(&vm)?;
        }
        (vm.recovery, vm.priority, vm.request) = (recovery, priority, m.request);
        self.put_vm(vm);
        Ok(Reply::Vm(id))
    }

    /// One that was available until now may run on, without a lease, on a host that was lost; and a lease is nothing where the
    /// clock is not believed.
    fn may_be_exclusive(&self, vm: &Vm) -> Result<(), Rejection> {
        let lost = vm.loss.and_then(|loss| self.nodes.get(&loss.node)).filter(|node| node.state == NodeState::Lost);
        if let Some(node) = lost {
            return Err(Rejection::Stale(format!(
                "{} may still run on {}, which is lost; it can be made exclusive when that node is back, or removed",
                vm.name, node.name
            )));
        }
        let host = vm.placement.and_then(|placement| self.nodes.get(&placement.node));
        if let Some(node) = host.filter(|node| node.clock_drifts) {
            return Err(Rejection::Stale(format!(
                "{} is on {}, whose clock drifts; a lease cannot be counted there, so it cannot be made exclusive",
                vm.name, node.name
            )));
        }
        Ok(())
    }

    pub(super) fn reboot_vm(&mut self, m: Moment, id: VmId) -> Applied {
        let mut vm = self.owned_vm(m, id)?.clone();
        if vm.status() != Status::Running {
            return Err(Rejection::Stale(format!(
                "{} is {}; only a running machine can be rebooted",
                vm.name,
                vm.status()
            )));
        }
        vm.reboots += 1;
        self.asked_anew(m, vm);
        Ok(Reply::Vm(id))
    }

    pub(super) fn delete_vm(&mut self, m: Moment, id: VmId, force: bool) -> Applied {
        let mut vm = self.visible_vm(m, id)?.clone();
        self.stop_meter(m.now, crate::Resource::Vm(id));
        if vm.placement.is_none() {
            self.remove_vm(id);
            return Ok(Reply::Done);
        }
        if vm.wanted != Wanted::Deleted {
            vm.wanted = Wanted::Deleted;
            self.settle_move(m.now, &mut vm);
            vm.deadline = Some(m.now.plus_millis(self.setting(setting::DELETE_DEADLINE)));
            vm.changed_at = m.now;
        }
        vm.request = m.request;
        vm.retry_at = None;
        if force {
            vm.ghost = true;
            vm.deadline = None;
        }
        self.put_vm(vm);
        Ok(Reply::Done)
    }

    /// The owner asked for something: failures until now are forgotten and the transition gets its deadline.
    fn asked_anew(&mut self, m: Moment, mut vm: Vm) {
        vm.attempts = 0;
        if vm.phase == Some(Phase::Stopped) && vm.wanted == Wanted::Running {
            // A host that has not heard yet that its owner took the stop for granted must know that this is a new wish.
            vm.tries += 1;
        }
        vm.reason.clear();
        vm.retry_at = None;
        vm.changed_at = m.now;
        vm.request = m.request;
        self.restart_transition(m.now, vm);
    }

    /// Puts the machine with a deadline for what is still to happen, if anything is.
    pub(super) fn restart_transition(&mut self, now: Timestamp, mut vm: Vm) {
        if vm.phase == Some(Phase::Failed) {
            vm.phase = vm.existed.then_some(Phase::Stopped);
            vm.tries += 1;
        }
        self.settle_move(now, &mut vm);
        if vm.is_moving() {
            return self.put_vm(vm);
        }
        vm.deadline = match vm.status() {
            Status::Creating => Some(self.setting(setting::CREATE_DEADLINE)),
            _ if vm.in_transition() && vm.placement.is_some() => {
                Some(self.setting(setting::CHANGE_DEADLINE) + vm.stop_grace_millis)
            }
            _ => None,
        }
        .map(|millis| now.plus_millis(millis));
        self.meter_vm(now, &vm);
        self.put_vm(vm);
    }

    pub(super) fn visible_vm(&self, m: Moment, id: VmId) -> Result<&Vm, Rejection> {
        self.vms.get(&id).filter(|vm| m.may_see(vm.tenant) && !vm.ghost).ok_or_else(|| check::missing(Noun::Vm, id))
    }

    /// One that can still be asked for something.
    pub(super) fn owned_vm(&self, m: Moment, id: VmId) -> Result<&Vm, Rejection> {
        let vm = self.visible_vm(m, id)?;
        if vm.wanted == Wanted::Deleted {
            return Err(Rejection::Stale(format!("{} is being deleted", vm.name)));
        }
        Ok(vm)
    }

    fn within_quota(
        &self,
        tenant: TenantId,
        name: &str,
        quota: crate::Quota,
        asked: Capacity,
    ) -> Result<(), Rejection> {
        let used = self.usage(tenant);
        let rows = [
            ("machines", quota.vms, used.vms, 1),
            ("vCPUs", quota.size.vcpus, used.size.vcpus, asked.vcpus),
            ("bytes of memory", quota.size.memory_bytes, used.size.memory_bytes, asked.memory_bytes),
            ("bytes of disk", quota.size.disk_bytes, used.size.disk_bytes, asked.disk_bytes),
        ];
        for (what, limit, used, asked) in rows {
            let limit = self.limit(limit);
            if used.saturating_add(asked) > limit {
                return Err(Rejection::Quota { tenant: name.into(), what: what.into(), limit, used, asked });
            }
        }
        Ok(())
    }

    /// The lowest address that nobody holds; the first is the network's, the second the node's, the last is broadcast.
    fn free_address(&self, network: &Network) -> Result<Ipv4Addr, Rejection> {
        let first = u32::from(network.range.first) + 2;
        let last = u32::from(network.range.broadcast());
        let Some(used) = self.index.addresses.get(&network.id) else { return Ok(first.into()) };
        // Used addresses are in order, so the first gap is where the count and the address part ways: after the last one
        // when there is none, as in a network from which nothing was deleted.
        let dense = used.last_key_value().filter(|(last, _)| (**last - first) as usize + 1 == used.len());
        let mut candidate = dense.map_or(first, |(last, _)| *last + 1);
        let used = if dense.is_some() { None } else { Some(used) };
        for address in used.into_iter().flat_map(BTreeMap::keys) {
            if *address != candidate {
                break;
            }
            candidate += 1;
        }
        if candidate >= last {
            return Err(Rejection::NoAddress { network: network.name.clone() });
        }
        Ok(candidate.into())
    }
}

/// `02` marks it locally administered and unicast; the rest counts, so it is never given twice.
fn minted_mac(number: u32) -> Mac {
    let [a, b, c, d] = number.to_be_bytes();
    Mac([0x02, 0x54, a, b, c, d])
}
