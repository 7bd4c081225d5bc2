//! From rows to what the wire carries. Soft facts come from what this controller heard.

use api::proto;
use model::{
    Capacity, HypervisorKind, Image, ImageFormat, Migration, MigrationStage, Network, Node, NodeState, Placement,
    Quota, Rehearsal, Rehearsed, ReplicaState, State, Telemetry, Template, Tenant, Vm,
    bill::Bill,
    bill::EXACT_PER_NANO,
    plan::moves::{Goes, Left, Suggestion},
};

pub(crate) fn vm(state: &State, ears: &Telemetry, vm: &Vm) -> proto::Vm {
    let node = vm.placement.and_then(|placement| state.nodes().get(&placement.node));
    let heard = vm.placement.and_then(|placement| {
        let status = ears.nodes.get(&placement.node)?.vms.get(&vm.id)?;
        (status.epoch == placement.epoch).then_some(status)
    });
    let nic = |nic: &model::Nic| proto::Nic {
        network: state
            .networks()
            .get(&nic.network)
            .map_or_else(|| nic.network.to_string(), |network| network.name.clone()),
        mac: nic.mac.to_string(),
        ip: nic.ip.to_string(),
    };
    let progress = heard.and_then(|heard| heard.progress.as_ref()).filter(|_| vm.in_transition());
    proto::Vm {
        id: vm.id.to_string(),
        tenant: tenant_name(state, vm.tenant),
        name: vm.name.clone(),
        status: vm.status().to_string(),
        reason: vm.reason.clone(),
        template: vm.template.clone(),
        image: state.images().get(&vm.image).map_or_else(|| vm.image.to_string(), |image| image.name.clone()),
        node: node.map(|node| node.name.clone()).unwrap_or_default(),
        epoch: vm.placement.map(|placement| placement.epoch).unwrap_or_default(),
        vcpus: vm.size.vcpus,
        memory_bytes: vm.size.memory_bytes,
        disk_bytes: vm.size.disk_bytes,
        nics: vm.nics.iter().map(nic).collect(),
        progress: progress.map(|p| proto::Progress { step: p.step.clone(), percent: p.percent.into() }),
        created_at_millis: vm.created_at.0,
        changed_at_millis: vm.changed_at.0,
        recovery: vm.recovery.to_string(),
        backups: Some(backups(state, vm)),
        priority: vm.priority.into(),
        loss: vm.loss.map(|loss| proto::Loss {
            node: state.nodes().get(&loss.node).map_or_else(|| loss.node.to_string(), |node| node.name.clone()),
            at_millis: loss.at.0,
            data_from_millis: loss.data_from.unwrap_or_default().0,
        }),
        attempts: vm.attempts.into(),
        retry_at_millis: vm.retry_at.unwrap_or_default().0,
        hypervisor: node.map(|node| hypervisor(node.hypervisor).to_owned()).unwrap_or_default(),
        usage: heard.map(|heard| proto::VmUsage {
            cpu_time_millis: heard.cpu_time_millis,
            memory_used_bytes: heard.memory_used_bytes,
            disk_used_bytes: heard.disk_used_bytes,
            rx_bytes: heard.rx_bytes,
            tx_bytes: heard.tx_bytes,
        }),
        read_at: None,
        migration: vm.migration.map(|migration| self::migration(state, migration)),
        move_failure: vm.move_failure.as_ref().map(|failure| failure.reason.clone()).unwrap_or_default(),
        move_failures: vm.move_failure.as_ref().map_or(0, |failure| failure.count),
    }
}

fn migration(state: &State, migration: Migration) -> proto::Migration {
    let Placement { node, epoch } = migration.other;
    proto::Migration {
        stage: match migration.stage {
            MigrationStage::Moving => "moving",
            MigrationStage::GivenUp => "given-up",
            MigrationStage::HandedOver => "handed-over",
        }
        .into(),
        node: state.nodes().get(&node).map_or_else(|| node.to_string(), |node| node.name.clone()),
        epoch,
        left: migration.left,
        arrived: migration.arrived,
    }
}

pub(crate) fn node(state: &State, ears: &Telemetry, node: &Node) -> proto::Node {
    let heard = ears.nodes.get(&node.id).filter(|heard| heard.incarnation == node.incarnation);
    let status = heard.map(|heard| heard.status.clone()).unwrap_or_default();
    let reserved = state.reserved(node.id);
    let rate = heard.and_then(|heard| heard.drift.rate());
    proto::Node {
        id: node.id.to_string(),
        name: node.name.clone(),
        address: node.address.clone(),
        underlay: node.underlay.to_string(),
        hypervisor: hypervisor(node.hypervisor).into(),
        state: match node.state {
            NodeState::Joined => "joined",
            NodeState::Up => "up",
            NodeState::Silent => "silent",
            NodeState::Lost => "lost",
        }
        .into(),
        cordoned: node.cordoned,
        maintenance: node.maintenance,
        draining: node.draining,
        generation: node.generation,
        incarnation: node.incarnation,
        vcpus: node.capacity.vcpus,
        memory_bytes: node.capacity.memory_bytes,
        disk_bytes: node.capacity.disk_bytes,
        reserved_vcpus: reserved.vcpus,
        reserved_memory_bytes: reserved.memory_bytes,
        reserved_disk_bytes: reserved.disk_bytes,
        vms: state.vm_count_on_node(node.id) as u64,
        last_beat_age_millis: heard.map_or(u64::MAX, |heard| ears.clock.saturating_sub(heard.at) / 1_000_000),
        cpu_permille: status.cpu_permille,
        memory_used_bytes: status.memory_used_bytes,
        disk_used_bytes: status.disk_used_bytes,
        summary_cpu_permille_mean: node.summary.as_ref().map_or(0, |summary| summary.cpu_permille_mean),
        summary_to_millis: node.summary.as_ref().map_or(0, |summary| summary.to.0),
        clock_drifts: node.clock_drifts,
        watchdog: status.watchdog,
        clock_ppm: rate.map_or(0, |rate| rate.ppm),
        clock_uncertainty_ppm: rate.map_or(0, |rate| rate.uncertainty_ppm),
        clock_span_millis: rate.map_or(0, |rate| rate.span_nanos / 1_000_000),
        probes: Vec::new(),
    }
}

pub(crate) fn left(state: &State, ears: &Telemetry, left: &Left) -> proto::Left {
    let shown = vm(state, ears, left.vm);
    let (goes, why) = match &left.goes {
        Goes::Now => ("now", String::new()),
        Goes::Later(why) => ("later", why.clone()),
        Goes::Never(why) => ("never", why.clone()),
    };
    let proto::Vm { id, tenant, name, status, progress, .. } = shown;
    proto::Left { id, tenant, name, status, goes: goes.into(), why, progress }
}

pub(crate) fn suggestion(state: &State, next: &Suggestion) -> proto::Suggestion {
    let vm = state.vms().get(&next.vm);
    let node = |id| state.nodes().get(&id).map(|node| node.name.clone()).unwrap_or_default();
    proto::Suggestion {
        id: next.vm.to_string(),
        tenant: vm.map(|vm| tenant_name(state, vm.tenant)).unwrap_or_default(),
        name: vm.map(|vm| vm.name.clone()).unwrap_or_default(),
        from: node(next.from),
        to: node(next.to),
        gain_permille: next.gain_permille,
    }
}

pub(crate) fn network(state: &State, network: &Network) -> proto::Network {
    proto::Network {
        id: network.id.to_string(),
        tenant: tenant_name(state, network.tenant),
        name: network.name.clone(),
        range: network.range.to_string(),
        vni: network.vni,
        addresses_used: u32::try_from(state.addresses_used(network.id)).unwrap_or(u32::MAX),
        // The network's own address, the node's and the broadcast address are nobody's.
        addresses_total: network.range.size() - 3,
    }
}

pub(crate) fn image(state: &State, image: &Image) -> proto::Image {
    let good = image.replicas.iter().filter(|(_, replica)| **replica == ReplicaState::Good);
    let chain: Vec<&Image> = state.chain(image).filter(|_| image.backup.is_some()).collect();
    proto::Image {
        id: image.id.to_string(),
        tenant: tenant_name(state, image.tenant),
        name: image.name.clone(),
        format: format(image.format).into(),
        size_bytes: image.size_bytes,
        virtual_bytes: image.virtual_bytes,
        digest: image.digest.to_string(),
        wanted_replicas: image.wanted_replicas,
        replicas: good
            .map(|(id, _)| state.nodes().get(id).map_or_else(|| id.to_string(), |node| node.name.clone()))
            .collect(),
        created_at_millis: image.created_at.0,
        backup_of: image.backup.map(|of| of.vm.to_string()).unwrap_or_default(),
        taken_at_millis: image.backup.map_or(0, |of| of.taken_at.0),
        consistency: image.backup.map(|of| of.consistency.to_string()).unwrap_or_default(),
        rehearsal: image.rehearsal.as_ref().map(|rehearsal| rehearsal_of(state, rehearsal)),
        rehearsed: image.rehearsed.as_ref().map(rehearsed),
        parent: chain.get(1).map(|parent| parent.name.clone()).unwrap_or_default(),
        chain_length: u32::try_from(chain.len()).unwrap_or(u32::MAX),
        chain_bytes: chain.iter().map(|link| link.size_bytes).sum(),
    }
}

fn rehearsal_of(state: &State, rehearsal: &Rehearsal) -> proto::Rehearsal {
    let node = rehearsal.placement.and_then(|placement| state.nodes().get(&placement.node));
    proto::Rehearsal {
        node: node.map(|node| node.name.clone()).unwrap_or_default(),
        deadline_millis: rehearsal.deadline.0,
        limit_millis: rehearsal.limit_millis,
        expect: rehearsal.expect.clone(),
    }
}

fn rehearsed(rehearsed: &Rehearsed) -> proto::Rehearsed {
    proto::Rehearsed {
        verdict: rehearsed.verdict.to_string(),
        at_millis: rehearsed.at.0,
        took_millis: rehearsed.took_millis,
        reason: rehearsed.reason.clone(),
    }
}

fn backups(state: &State, vm: &Vm) -> proto::VmBackups {
    let safe = state.safe_backup(vm);
    let tried = state.backups_of(vm.id).filter_map(|image| Some((image.rehearsed.as_ref()?, image)));
    let tried = tried.max_by_key(|(rehearsed, _)| rehearsed.at);
    let name = |id: model::ImageId| state.images().get(&id).map_or_else(|| id.to_string(), |image| image.name.clone());
    proto::VmBackups {
        every_millis: vm.backups.every_millis,
        keep: vm.backups.keep,
        full_every: vm.backups.full_every,
        asked: vm.backups.asked,
        answered: vm.backups.answered,
        reason: vm.backups.reason.clone(),
        due_at_millis: vm.backups.due_at.unwrap_or_default().0,
        safe_at_millis: safe.and_then(|image| image.backup).map_or(0, |of| of.taken_at.0),
        safe_image: safe.map(|image| image.name.clone()).unwrap_or_default(),
        restored_from: vm.restored_from.map(name).unwrap_or_default(),
        rehearsed_image: tried.map(|(_, image)| image.name.clone()).unwrap_or_default(),
        rehearsed: tried.map(|(last, _)| rehearsed(last)),
    }
}

pub(crate) fn tenant(state: &State, tenant: &Tenant) -> proto::Tenant {
    let usage = state.usage(tenant.id);
    let used = Quota { vms: usage.vms, size: usage.size, networks: usage.networks, image_bytes: usage.image_bytes };
    proto::Tenant {
        id: tenant.id.to_string(),
        name: tenant.name.clone(),
        quota: Some(quota(tenant.quota)),
        used: Some(quota(used)),
    }
}

pub(crate) fn quota(quota: Quota) -> proto::Quota {
    proto::Quota {
        vms: quota.vms,
        vcpus: quota.size.vcpus,
        memory_bytes: quota.size.memory_bytes,
        disk_bytes: quota.size.disk_bytes,
        networks: quota.networks,
        image_bytes: quota.image_bytes,
    }
}

/// Fields left at 0 mean without limit, because proto3 cannot tell them from missing ones.
pub(crate) fn quota_from(wire: proto::Quota) -> Quota {
    let limit = |value: u64| if value == 0 { u64::MAX } else { value };
    Quota {
        vms: limit(wire.vms),
        size: Capacity {
            vcpus: limit(wire.vcpus),
            memory_bytes: limit(wire.memory_bytes),
            disk_bytes: limit(wire.disk_bytes),
        },
        networks: limit(wire.networks),
        image_bytes: limit(wire.image_bytes),
    }
}

pub(crate) fn template(template: &Template) -> proto::Template {
    proto::Template {
        name: template.name.clone(),
        vcpus: template.size.vcpus,
        memory_bytes: template.size.memory_bytes,
        disk_bytes: template.size.disk_bytes,
        weight_milli: template.weight_milli,
    }
}

pub(crate) fn bill(tenant: &Tenant, bill: Bill) -> proto::Bill {
    let line = |line: model::bill::BillLine| proto::BillLine {
        resource: line.resource.to_string(),
        name: line.name,
        status: line.status,
        weight_milli: line.weight_milli,
        from_millis: line.from.0,
        to_millis: line.to.0,
        open: line.open,
        exact: line.exact.to_string(),
        nano: saturated(line.exact / EXACT_PER_NANO),
    };
    proto::Bill {
        tenant: tenant.name.clone(),
        from_millis: bill.from.0,
        to_millis: bill.to.0,
        total_nano: saturated(bill.total_nano),
        lines: bill.lines.into_iter().map(line).collect(),
        read_at: None,
    }
}

/// Only the sum of an absurd price over centuries is beyond 64 bits; `exact` is right even then.
fn saturated(nano: u128) -> u64 {
    u64::try_from(nano).unwrap_or(u64::MAX)
}

pub(crate) fn tenant_name(state: &State, id: model::TenantId) -> String {
    state.tenants().get(&id).map_or_else(|| id.to_string(), |tenant| tenant.name.clone())
}

pub(crate) fn hypervisor(kind: HypervisorKind) -> &'static str {
    match kind {
        HypervisorKind::Kvm => "kvm",
        HypervisorKind::Qemu => "qemu",
        HypervisorKind::Simulated => "simulated",
    }
}

pub(crate) fn format(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Qcow2 => "qcow2",
        ImageFormat::Raw => "raw",
    }
}
