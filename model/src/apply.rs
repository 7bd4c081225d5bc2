//! The only code that changes the state: total, deterministic, without effects.
//!
//! Every handler checks first and changes afterwards, so that a rejection changes nothing but the time and
//! the memory of requests. One line a
//! command here; the handlers live by noun below.

use crate::{
    Actor, Command, Entry, NodeCommand, OperatorCommand, PlannerCommand, Rejection, Remembered, Reply, RequestId, Role,
    State, TenantCommand, TenantId, Timestamp, setting,
};

mod backup;
mod chain;
mod check;
mod image;
mod meter;
mod migration;
mod network;
mod node;
mod operator;
mod placement;
mod quorum;
mod recovery;
mod refound;
mod rehearsal;
mod report;
mod tag;
mod vm;

pub use check::MAX_USER_DATA_BYTES;

/// What an entry came to.
pub type Applied = Result<Reply, Rejection>;

/// Where and when a handler runs.
#[derive(Clone, Copy)]
struct Moment<'a> {
    index: u64,
    now: Timestamp,
    actor: &'a Actor,
    /// 0 when nobody named one.
    request: RequestId,
}

impl State {
    /// Applies the entry at log index `index`.
    ///
    /// # Errors
    /// The refusal; then nothing but the time and the memory of requests has changed.
    pub fn apply(&mut self, index: u64, entry: &Entry) -> Applied {
        let now = self.advance(entry.at);
        if let Some(request) = entry.request
            && let Some(seen) = self.requests.get(&request.id)
        {
            return if seen.body == request.body { seen.outcome.clone() } else { Err(Rejection::RequestReused) };
        }
        let request = entry.request.map(|request| request.id).unwrap_or_default();
        let outcome = self.dispatch(Moment { index, now, actor: &entry.actor, request }, &entry.command);
        if let Some(request) = entry.request
            && is_final(&outcome)
        {
            self.remember(request.id, Remembered { body: request.body, at: now, outcome: outcome.clone() });
            let oldest = Timestamp(now.0.saturating_sub(self.setting(setting::REQUEST_MEMORY)));
            let most = usize::try_from(self.setting(setting::REQUEST_COUNT)).unwrap_or(usize::MAX);
            self.forget_requests(oldest, most);
        }
        outcome
    }

    /// Time as the cloud knows it never goes back, whatever a leader's clock says.
    fn advance(&mut self, at: Timestamp) -> Timestamp {
        self.cluster_mut(|cluster| {
            cluster.now = cluster.now.max(at);
            cluster.now
        })
    }

    fn dispatch(&mut self, m: Moment, command: &Command) -> Applied {
        match command {
            Command::Tenant(command) => self.apply_tenant(m, command),
            Command::Operator(command) => self.apply_operator(m, command),
            Command::Node(command) => self.apply_node(m, command),
            Command::Planner(command) => self.apply_planner(m, command),
        }
    }

    fn apply_tenant(&mut self, m: Moment, command: &TenantCommand) -> Applied {
        use TenantCommand as C;
        match command {
            C::CreateVm { tenant, name, image, template, network, ssh_keys, user_data, recovery, priority } => {
                let (image, network, after_loss) = (*image, *network, (*recovery, *priority));
                let order = vm::Order { name, image, template, network, ssh_keys, user_data, after_loss };
                self.create_vm(m, *tenant, order)
            }
            C::SetVmPower { vm, wanted, stop_grace_millis } => self.set_vm_power(m, *vm, *wanted, *stop_grace_millis),
            C::SetVmRecovery { vm, recovery, priority } => self.set_vm_recovery(m, *vm, *recovery, *priority),
            C::BackUpVm { vm, full } => self.back_up_vm(m, *vm, *full),
            C::SetVmBackup { vm, every_millis, keep, full_every } => self.set_vm_backup(
                m,
                *vm,
                backup::Schedule { every_millis: *every_millis, keep: *keep, full_every: *full_every },
            ),
            C::RehearseBackup { image, limit_millis, expect } => self.rehearse_backup(m, *image, *limit_millis, expect),
            C::EndRehearsal { image } => self.end_rehearsal(m, *image),
            C::RebootVm { vm } => self.reboot_vm(m, *vm),
            C::DeleteVm { vm, force } => self.delete_vm(m, *vm, *force),
            C::CreateNetwork { tenant, name, range } => self.create_network(m, *tenant, name, *range),
            C::DeleteNetwork { network } => self.delete_network(m, *network),
            C::ImportImage { tenant, name, format, size_bytes, virtual_bytes, digest, replicas } => {
                let file = image::File {
                    format: *format,
                    size_bytes: *size_bytes,
                    virtual_bytes: *virtual_bytes,
                    digest: *digest,
                };
                self.import_image(m, *tenant, name, file, replicas)
            }
            C::DeleteImage { image } => self.delete_image(m, *image),
            C::SetTag { tenant, key, value, expected } => self.set_tag(m, *tenant, key, value, *expected),
            C::DeleteTag { tenant, key, expected } => self.delete_tag(m, *tenant, key, *expected),
        }
    }

    fn apply_operator(&mut self, m: Moment, command: &OperatorCommand) -> Applied {
        use OperatorCommand as C;
        m.must_be_operator()?;
        match command {
            C::CreateTenant { name, quota } => self.create_tenant(m, name, *quota),
            C::SetQuota { tenant, quota } => self.set_quota(*tenant, *quota),
            C::DeleteTenant { tenant } => self.delete_tenant(*tenant),
            C::CreateUser { name, role, token } => self.create_user(m, name, *role, *token),
            C::DeleteUser { name } => self.delete_user(m, name),
            C::CreateTemplate { name, size, weight_milli } => self.create_template(name, *size, *weight_milli),
            C::DeleteTemplate { name } => self.delete_template(name),
            C::SetSetting { name, value } => self.set_setting(m, name, *value),
            C::SetPrice { nano_per_hour, from } => self.set_price(m, *nano_per_hour, *from),
            C::IssueJoinToken { token, role, valid_millis } => self.issue_join_token(m, *token, *role, *valid_millis),
            C::CordonNode { node, cordoned } => self.cordon_node(*node, *cordoned),
            C::DrainNode { node } => self.drain_node(*node),
            C::MaintainNode { node, maintenance } => self.maintain_node(*node, *maintenance),
            C::ArmRecovery { armed } => self.arm_recovery(*armed),
            C::MigrateVm { vm, to } => self.begin_migration(m, *vm, *to),
            C::CancelMigration { vm } => self.cancel_migration(m, *vm),
            C::RemoveNode { node, force } => self.forget_node(m, *node, *force),
            C::RaiseLevel { level } => self.raise_level(*level),
            C::EndRefounding => self.end_refounding(),
        }
    }

    fn apply_node(&mut self, m: Moment, command: &NodeCommand) -> Applied {
        use NodeCommand as C;
        match command {
            C::Attach { node, address, underlay, hypervisor, capacity } => {
                let host = node::Host { address, underlay: *underlay, hypervisor: *hypervisor, capacity };
                self.attach_node(m, *node, host)
            }
            C::ReportVms { node, incarnation, reports } => self.report_vms(m, *node, *incarnation, reports),
            C::ReportImages { node, incarnation, reports } => self.report_images(m, *node, *incarnation, reports),
            C::ReportBackups { node, incarnation, reports } => self.report_backups(m, *node, *incarnation, reports),
            C::ReportRehearsals { node, incarnation, reports } => {
                self.report_rehearsals(m, *node, *incarnation, reports)
            }
            C::ReportMoves { node, incarnation, reports } => self.report_moves(m, *node, *incarnation, reports),
            C::Summarise { node, incarnation, summary } => self.summarise_node(m, *node, *incarnation, summary),
            C::TakeStock { node, incarnation, guests } => self.take_stock(m, *node, *incarnation, guests),
        }
    }

    fn apply_planner(&mut self, m: Moment, command: &PlannerCommand) -> Applied {
        use PlannerCommand as C;
        if *m.actor != Actor::System {
            return Err(m.forbidden());
        }
        match command {
            C::Found { cluster, controller, address, operator, token } => {
                self.found(m, cluster, (controller, address), (operator, *token))
            }
            C::JoinController { token, name, address } => self.join_controller(m, token, name, address),
            C::RetireController { controller } => self.retire_controller(*controller),
            C::JoinNode { token, name } => self.join_node(m, token, name),
            C::BindCertificate { node, certificate } => self.bind_certificate(*node, *certificate),
            C::PlaceVm { vm, node } => self.place_vm(m, *vm, *node),
            C::MigrateVm { vm, to } => self.begin_migration(m, *vm, *to),
            C::DeferVm { vm, reason } => self.defer_vm(*vm, reason),
            C::RetryVm { vm } => self.retry_vm(m, *vm),
            C::ExpireVm { vm } => self.expire_vm(m, *vm),
            C::SetNodeSilent { node, incarnation, silent } => self.set_node_silent(m, *node, *incarnation, *silent),
            C::DeclareLost { node, incarnation } => self.declare_lost(m, *node, *incarnation),
            C::RecoverVm { vm, epoch } => self.recover_vm(m, *vm, *epoch),
            C::BackUpDueVm { vm } => self.back_up_due_vm(m, *vm),
            C::PlaceRehearsal { image, node } => self.place_rehearsal(m, *image, *node),
            C::ExpireRehearsal { image } => self.expire_rehearsal(m, *image),
            C::SetNodeClock { node, drifts } => self.set_node_clock(*node, *drifts),
            C::AddReplica { image, node } => self.add_replica(*image, *node),
            C::Refound { epoch, controller, name, address, operator } => self.refound(
                m,
                *epoch,
                refound::Founder { id: *controller, name, address, operator: operator.as_ref() },
            ),
        }
    }
}

/// Whether a later try could come to something else, so that what was answered must be remembered: a refusal that a
/// client was told must not come true by an earlier try that was stuck. An id that does not exist never will.
fn is_final(outcome: &Applied) -> bool {
    match outcome {
        Err(Rejection::NotFound { noun, .. }) => noun.may_come_to_exist(),
        Err(_) | Ok(_) => true,
    }
}

impl Moment<'_> {
    fn forbidden(&self) -> Rejection {
        Rejection::Forbidden(match self.actor {
            Actor::User { name, .. } => format!("user '{name}'"),
            Actor::Node(node) => node.to_string(),
            Actor::System => "the controller".into(),
        })
    }

    fn must_be_operator(&self) -> Result<(), Rejection> {
        match self.actor {
            Actor::User { role: Role::Operator, .. } | Actor::System => Ok(()),
            _ => Err(self.forbidden()),
        }
    }

    /// What belongs to another tenant does not exist for a member.
    fn may_see(&self, tenant: TenantId) -> bool {
        match self.actor {
            Actor::User { role: Role::Member(own), .. } => *own == tenant,
            Actor::User { role: Role::Operator, .. } | Actor::System => true,
            Actor::Node(_) => false,
        }
    }
}
