//! Machines.

use std::ops::Bound;

use api::{error::ApiError, proto};
use futures::{StreamExt, future, stream};
use model::{
    Command, OperatorCommand, Recovery, Reply, Role, State, TenantCommand, Vm, VmId, Wanted,
    plan::moves::{self, Manner},
};
use tonic::{Request, Status};

use super::{Flow, Service, page};
use crate::{
    access,
    access::Caller,
    core::{Core, Freshness},
    name, replicas, view,
};

/// Rows of one message of a list that is a stream: made in less than a millisecond, while nothing is applied or heard.
const STREAMED_ROWS: usize = 256;
/// The longest piece of a console log that one call gives.
const MOST_LOG_BYTES: u32 = 1 << 20;

impl Service {
    pub(super) async fn vm_create(&self, request: Request<proto::CreateVmRequest>) -> Result<proto::Vm, ApiError> {
        let (_, index, reply) = self.change("CreateVm", &request, create).await?;
        self.vm_shown(index, reply).await
    }

    pub(super) async fn vm_power(&self, request: Request<proto::SetVmPowerRequest>) -> Result<proto::Vm, ApiError> {
        let (_, index, reply) = self.change("SetVmPower", &request, power).await?;
        self.vm_shown(index, reply).await
    }

    pub(super) async fn vm_recovery(
        &self,
        request: Request<proto::SetVmRecoveryRequest>,
    ) -> Result<proto::Vm, ApiError> {
        let (_, index, reply) = self.change("SetVmRecovery", &request, set_recovery).await?;
        self.vm_shown(index, reply).await
    }

    pub(super) async fn vm_back_up(&self, request: Request<proto::BackUpVmRequest>) -> Result<proto::Vm, ApiError> {
        let (_, index, reply) = self.change("BackUpVm", &request, back_up).await?;
        self.vm_shown(index, reply).await
    }

    pub(super) async fn vm_backup_set(
        &self,
        request: Request<proto::SetVmBackupRequest>,
    ) -> Result<proto::Vm, ApiError> {
        let (_, index, reply) = self.change("SetVmBackup", &request, set_backup).await?;
        self.vm_shown(index, reply).await
    }

    pub(super) async fn vm_reboot(&self, request: Request<proto::VmRef>) -> Result<proto::Vm, ApiError> {
        let (_, index, reply) = self.change("RebootVm", &request, reboot).await?;
        self.vm_shown(index, reply).await
    }

    pub(super) async fn vm_migrate(&self, request: Request<proto::MigrateVmRequest>) -> Result<proto::Vm, ApiError> {
        let make = |state: &State, caller: &Caller, body: &proto::MigrateVmRequest| {
            caller.must_be_operator()?;
            let vm = name::vm(state, caller, &body.tenant, &body.vm)?;
            if let Some(manner) = manner(&body.manner)? {
                moves::would_go(vm, manner)?;
            }
            let to = match body.to.as_str() {
                "" => self.core.hear(|ears| moves::destination(state, ears, vm))?,
                node => name::node(state, node)?.id,
            };
            Ok(Command::Operator(OperatorCommand::MigrateVm { vm: vm.id, to }))
        };
        let (_, index, reply) = self.change("MigrateVm", &request, make).await?;
        self.vm_shown(index, reply).await
    }

    pub(super) async fn vm_migration_cancel(&self, request: Request<proto::VmRef>) -> Result<proto::Vm, ApiError> {
        let make = |state: &State, caller: &Caller, body: &proto::VmRef| {
            caller.must_be_operator()?;
            let vm = name::vm(state, caller, &body.tenant, &body.vm)?.id;
            Ok(Command::Operator(OperatorCommand::CancelMigration { vm }))
        };
        let (_, index, reply) = self.change("CancelMigration", &request, make).await?;
        self.vm_shown(index, reply).await
    }

    async fn vm_shown(&self, index: u64, reply: Reply) -> Result<proto::Vm, ApiError> {
        let Reply::Vm(id) = reply else {
            return Err(ApiError::internal(format!("a machine's command replied {reply:?}")));
        };
        self.core.applied(index).await?;
        let shown = self
            .core
            .replica
            .read(|state| state.vms().get(&id).map(|vm| self.core.hear(|ears| view::vm(state, ears, vm))));
        shown.ok_or_else(|| ApiError::not_found(format!("vm '{id}' was made by this request and deleted since")))
    }

    pub(super) async fn vm_get(&self, request: Request<proto::GetVmRequest>) -> Result<proto::Vm, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let look = |state: &State| {
            let vm = name::vm(state, &caller, &body.tenant, &body.vm)?;
            Ok(self.core.hear(|ears| view::vm(state, ears, vm)))
        };
        let (vm, read_at) = self.core.read(body.stale.into(), look).await?;
        vm.map(|vm| proto::Vm { read_at: Some(read_at), ..vm })
    }

    pub(super) async fn vm_list(
        &self,
        request: Request<proto::ListVmsRequest>,
    ) -> Result<proto::ListVmsReply, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        page_of_vms(&self.core, &caller, &body, page::limit(body.limit)?).await
    }

    /// The first page is made before the stream begins, so that a refusal is the answer to the call. Each other one is made when
    /// the one before it is on its way.
    pub(super) async fn vm_stream(
        &self,
        request: Request<proto::ListVmsRequest>,
    ) -> Result<Flow<proto::ListVmsReply>, ApiError> {
        let caller = access::caller(&request)?;
        let mut asked = request.into_inner();
        let first = page_of_vms(&self.core, &caller, &asked, STREAMED_ROWS).await?;
        if !asked.stale {
            asked.at_least = first.read_at.map_or(0, |at| at.index);
        }
        let after = first.next.clone();
        let core = self.core.clone();
        let rest = stream::try_unfold((core, caller, asked, after), |(core, caller, mut asked, after)| async {
            if after.is_empty() {
                return Ok(None);
            }
            asked.after = after;
            let page = page_of_vms(&core, &caller, &asked, STREAMED_ROWS).await.map_err(Status::from)?;
            let after = page.next.clone();
            Ok(Some((page, (core, caller, asked, after))))
        });
        Ok(Box::pin(stream::once(future::ready(Ok(first))).chain(rest)))
    }

    pub(super) async fn vm_console(
        &self,
        request: Request<proto::ConsoleLogRequest>,
    ) -> Result<proto::ConsoleLogReply, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let look = |state: &State| {
            let vm = name::vm(state, &caller, &body.tenant, &body.vm)?;
            let node = vm.placement.and_then(|placement| state.nodes().get(&placement.node));
            let node = node
                .ok_or_else(|| ApiError::new("stale", format!("{} has no node yet, so it has no console", vm.name)))?;
            Ok::<_, ApiError>((vm.id, node.address.clone()))
        };
        let (found, _) = self.core.read(false.into(), look).await?;
        let (vm, address) = found?;
        let max_bytes = if body.max_bytes == 0 { MOST_LOG_BYTES } else { body.max_bytes.min(MOST_LOG_BYTES) };
        replicas::console_log(&self.core, &address, vm, max_bytes).await
    }
}

fn create(state: &State, caller: &Caller, body: &proto::CreateVmRequest) -> Result<Command, ApiError> {
    let tenant = name::tenant(state, caller, &body.tenant)?;
    Ok(Command::Tenant(TenantCommand::CreateVm {
        tenant: tenant.id,
        name: body.name.clone(),
        image: name::image(state, caller, &body.tenant, &body.image)?.id,
        template: body.template.clone(),
        network: name::network(state, caller, &body.tenant, &body.network)?.id,
        ssh_keys: body.ssh_keys.clone(),
        user_data: body.user_data.clone(),
        recovery: recovery(&body.recovery)?,
        priority: priority(body.priority)?,
    }))
}

fn set_recovery(state: &State, caller: &Caller, body: &proto::SetVmRecoveryRequest) -> Result<Command, ApiError> {
    Ok(Command::Tenant(TenantCommand::SetVmRecovery {
        vm: name::vm(state, caller, &body.tenant, &body.vm)?.id,
        recovery: recovery(&body.recovery)?,
        priority: priority(body.priority)?,
    }))
}

fn back_up(state: &State, caller: &Caller, body: &proto::BackUpVmRequest) -> Result<Command, ApiError> {
    let vm = name::vm(state, caller, &body.tenant, &body.vm)?.id;
    Ok(Command::Tenant(TenantCommand::BackUpVm { vm, full: body.full }))
}

fn set_backup(state: &State, caller: &Caller, body: &proto::SetVmBackupRequest) -> Result<Command, ApiError> {
    let vm = name::vm(state, caller, &body.tenant, &body.vm)?.id;
    let (every_millis, keep, full_every) = (body.every_millis, body.keep, body.full_every);
    Ok(Command::Tenant(TenantCommand::SetVmBackup { vm, every_millis, keep, full_every }))
}

async fn page_of_vms(
    core: &Core,
    caller: &Caller,
    asked: &proto::ListVmsRequest,
    limit: usize,
) -> Result<proto::ListVmsReply, ApiError> {
    let after: VmId = page::after(&asked.after)?;
    let look = |state: &State| {
        let node = if asked.node.is_empty() { None } else { Some(name::node(state, &asked.node)?.id) };
        let all_tenants = caller.role == Role::Operator && asked.tenant.is_empty();
        let tenant = if all_tenants { None } else { Some(name::tenant(state, caller, &asked.tenant)?.id) };
        let fits = |vm: &Vm| {
            !vm.ghost
                && tenant.is_none_or(|tenant| vm.tenant == tenant)
                && (asked.status.is_empty() || vm.status().to_string() == asked.status)
        };
        let rows: Box<dyn Iterator<Item = &Vm>> = match (node, tenant) {
            (Some(node), _) => Box::new(state.vms_on_node(node).filter(|vm| vm.id > after)),
            (None, Some(tenant)) => Box::new(state.vms_of_tenant_after(tenant, after)),
            (None, None) => Box::new(state.vms().range((Bound::Excluded(after), Bound::Unbounded)).map(|(_, vm)| vm)),
        };
        let (vms, next) = page::cut(rows, fits, limit, |vm| vm.id.to_string());
        Ok(core.hear(|ears| (vms.into_iter().map(|vm| view::vm(state, ears, vm)).collect::<Vec<_>>(), next)))
    };
    let freshness = match asked.at_least {
        0 => asked.stale.into(),
        index => Freshness::AtLeast(index),
    };
    let (listed, read_at) = core.read(freshness, look).await?;
    listed.map(|(vms, next)| proto::ListVmsReply { vms, next, read_at: Some(read_at) })
}

fn recovery(text: &str) -> Result<Recovery, ApiError> {
    if text.is_empty() { Ok(Recovery::default()) } else { text.parse().map_err(ApiError::invalid) }
}

fn priority(number: u32) -> Result<u8, ApiError> {
    u8::try_from(number).map_err(|_| ApiError::invalid(format!("priority is {number}, but must be 0 to 255")))
}

fn manner(text: &str) -> Result<Option<Manner>, ApiError> {
    match text {
        "" => Ok(None),
        "live" => Ok(Some(Manner::Live)),
        "offline" => Ok(Some(Manner::Offline)),
        other => Err(ApiError::invalid(format!("manner is '{other}', but must be live or offline"))),
    }
}

fn power(state: &State, caller: &Caller, body: &proto::SetVmPowerRequest) -> Result<Command, ApiError> {
    let wanted = match body.wanted.as_str() {
        "running" => Wanted::Running,
        "suspended" => Wanted::Suspended,
        "stopped" => Wanted::Stopped,
        other => {
            return Err(ApiError::invalid(format!("wanted is '{other}', but must be running, suspended or stopped")));
        }
    };
    let vm = name::vm(state, caller, &body.tenant, &body.vm)?.id;
    Ok(Command::Tenant(TenantCommand::SetVmPower { vm, wanted, stop_grace_millis: body.grace_millis }))
}

fn reboot(state: &State, caller: &Caller, body: &proto::VmRef) -> Result<Command, ApiError> {
    Ok(Command::Tenant(TenantCommand::RebootVm { vm: name::vm(state, caller, &body.tenant, &body.vm)?.id }))
}

pub(super) fn delete(state: &State, caller: &Caller, body: &proto::DeleteVmRequest) -> Result<Command, ApiError> {
    Ok(Command::Tenant(TenantCommand::DeleteVm {
        vm: name::vm(state, caller, &body.tenant, &body.vm)?.id,
        force: body.force,
    }))
}

#[cfg(test)]
mod tests {
    use model::{
        Actor, Capacity, Digest, HypervisorKind, ImageFormat, ImageId, JoinRole, NetworkId, NodeCommand, NodeId,
        PlannerCommand, Quota, TenantId,
    };

    use super::*;
    use crate::fixture::Fixture;

    /// Two hosts; of each of two tenants a machine on either, and of the first one that waits.
    async fn cloud() -> Fixture {
        let cloud = Fixture::new().await;
        let planner = async |command| cloud.done(Actor::System, Command::Planner(command)).await;
        let tenant = async |command| cloud.done(Actor::System, Command::Tenant(command)).await;
        let size = Capacity { vcpus: 64, memory_bytes: 1 << 36, disk_bytes: 1 << 40 };
        for number in [1, 2] {
            let (token, role, name) = (Digest([number; 32]), JoinRole::Agent, format!("host{number}"));
            cloud.operator(OperatorCommand::IssueJoinToken { token, role, valid_millis: 60_000 }).await;
            planner(PlannerCommand::JoinNode { token, name }).await;
            let node = NodeId(number.into());
            let attach = NodeCommand::Attach {
                node,
                address: format!("192.0.2.{number}:7471"),
                underlay: [192, 0, 2, number].into(),
                hypervisor: HypervisorKind::Qemu,
                capacity: size,
            };
            cloud.done(Actor::Node(node), Command::Node(attach)).await;
        }
        for (id, name) in [(1, "acme"), (2, "bolt")] {
            let quota = Quota { vms: 10, size, networks: 2, image_bytes: 1 << 40 };
            cloud.operator(OperatorCommand::CreateTenant { name: name.into(), quota }).await;
            let (id, range) = (TenantId(id), "10.0.0.0/24".parse().unwrap());
            tenant(TenantCommand::CreateNetwork { tenant: id, name: "lan".into(), range }).await;
            tenant(TenantCommand::ImportImage {
                tenant: id,
                name: "debian".into(),
                format: ImageFormat::Qcow2,
                size_bytes: 1 << 30,
                virtual_bytes: 1 << 30,
                digest: Digest([5; 32]),
                replicas: vec![NodeId(1)],
            })
            .await;
        }
        for (number, of, on) in [(1, 1, Some(1)), (2, 1, Some(2)), (3, 2, Some(1)), (4, 2, Some(2)), (5, 1, None)] {
            tenant(TenantCommand::CreateVm {
                tenant: TenantId(of),
                name: format!("vm{number}-of-{of}"),
                image: ImageId(of),
                template: "tiny".into(),
                network: NetworkId(of),
                ssh_keys: Vec::new(),
                user_data: String::new(),
                recovery: Recovery::Exclusive,
                priority: 0,
            })
            .await;
            if let Some(node) = on {
                planner(PlannerCommand::PlaceVm { vm: VmId(number), node: NodeId(node) }).await;
            }
        }
        cloud
    }

    #[tokio::test]
    async fn machines_are_listed_by_host_and_tenant_page_by_page() {
        let cloud = cloud().await;
        let root = Caller { name: "root".into(), role: Role::Operator };
        let bob = Caller { name: "bob".into(), role: Role::Member(TenantId(2)) };
        let listed = async |caller: &Caller, tenant: &str, node: &str, after: &str, limit| {
            let (tenant, node, after) = (tenant.into(), node.into(), after.into());
            let asked = proto::ListVmsRequest { tenant, node, after, ..Default::default() };
            let page = page_of_vms(&cloud.core, caller, &asked, limit).await.unwrap();
            (page.vms.into_iter().map(|vm| vm.id).collect::<Vec<_>>(), page.next)
        };
        assert_eq!(listed(&root, "", "host1", "", 9).await, (vec!["vm-1".into(), "vm-3".into()], String::new()));
        assert_eq!(listed(&root, "", "host1", "", 1).await, (vec!["vm-1".into()], "vm-1".into()));
        assert_eq!(listed(&root, "", "host1", "vm-1", 1).await, (vec!["vm-3".into()], String::new()));
        assert_eq!(listed(&root, "acme", "host2", "", 9).await.0, ["vm-2"]);
        assert_eq!(listed(&bob, "", "host1", "", 9).await.0, ["vm-3"], "nobody else's");
        assert_eq!(listed(&bob, "", "", "", 9).await.0, ["vm-3", "vm-4"]);
        assert_eq!(listed(&root, "", "", "vm-2", 9).await.0, ["vm-3", "vm-4", "vm-5"]);
    }
}
