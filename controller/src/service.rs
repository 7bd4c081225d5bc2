//! The public API: one line a call here, the work by noun below.

use std::{pin::Pin, sync::Arc};

use api::{client::LEADER_KEY, error::ApiError, proto, proto::trefoil_server::Trefoil};
use model::{Command, Reply, State};
use prost::Message;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

use crate::{access, access::Caller, core::Core};

mod bill;
mod image;
mod network;
mod node;
mod operator;
mod page;
mod quorum;
mod recovery;
mod rehearsal;
mod tag;
mod vm;
mod watch;

pub(crate) struct Service {
    pub core: Arc<Core>,
}

/// The largest request that is not a stream: a machine with its user data and keys is at most 300 KB.
pub(crate) const MAX_REQUEST_BYTES: usize = 1 << 20;

type Answer<T> = Result<Response<T>, Status>;
type Flow<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    /// An answer, and who leads when it is another controller: what changes something takes one way less when it is sent there.
    fn answer<T>(&self, result: Result<T, ApiError>) -> Answer<T> {
        let mut response = result.map(Response::new).map_err(|error| {
            if error.code == "internal" {
                tracing::error!(%error, "a call failed for a reason of our own");
            }
            Status::from(error)
        })?;
        if let Some(leader) = self.core.leader_elsewhere() {
            response.metadata_mut().insert(LEADER_KEY, leader);
        }
        Ok(response)
    }

    /// A mutating call: who asks, under which request id, and the command that its names come to.
    async fn change<B, F>(
        &self,
        method: &str,
        request: &Request<B>,
        command: F,
    ) -> Result<(Caller, u64, Reply), ApiError>
    where
        B: Message,
        F: Fn(&State, &Caller, &B) -> Result<Command, ApiError>,
    {
        let caller = access::caller(request)?;
        let id = access::request_of(method, &caller, request)?;
        let body = request.get_ref();
        let make = |state: &State| command(state, &caller, body);
        let changed = self.core.change(&caller.actor(), id, make).await;
        match &changed {
            // A tag is a tenant's own data, not a change of the cloud, and comes as often as its tenant likes.
            Ok((index, Reply::Version(_))) => {
                tracing::debug!(request = %id.id, user = caller.name, method, index, "changed")
            }
            Ok((index, _)) => tracing::info!(request = %id.id, user = caller.name, method, index, "changed"),
            Err(error) => {
                tracing::info!(request = %id.id, user = caller.name, method, code = error.code, %error, "refused")
            }
        }
        let (index, reply) = changed?;
        Ok((caller, index, reply))
    }

    /// The same, for calls that answer nothing but that it was done.
    async fn do_change<B, F>(&self, method: &str, request: Request<B>, command: F) -> Answer<proto::Done>
    where
        B: Message,
        F: Fn(&State, &Caller, &B) -> Result<Command, ApiError>,
    {
        self.answer(self.change(method, &request, command).await.map(|_| proto::Done {}))
    }
}

#[tonic::async_trait]
impl Trefoil for Service {
    type StreamVmsStream = Flow<proto::ListVmsReply>;
    type ExportImageStream = Flow<proto::Chunk>;
    type BackUpQuorumStream = Flow<proto::Chunk>;
    type WatchStream = Flow<proto::WatchReply>;

    async fn create_vm(&self, request: Request<proto::CreateVmRequest>) -> Answer<proto::Vm> {
        self.answer(self.vm_create(request).await)
    }
    async fn get_vm(&self, request: Request<proto::GetVmRequest>) -> Answer<proto::Vm> {
        self.answer(self.vm_get(request).await)
    }
    async fn list_vms(&self, request: Request<proto::ListVmsRequest>) -> Answer<proto::ListVmsReply> {
        self.answer(self.vm_list(request).await)
    }
    async fn stream_vms(&self, request: Request<proto::ListVmsRequest>) -> Answer<Self::StreamVmsStream> {
        self.answer(self.vm_stream(request).await)
    }
    async fn set_vm_power(&self, request: Request<proto::SetVmPowerRequest>) -> Answer<proto::Vm> {
        self.answer(self.vm_power(request).await)
    }
    async fn reboot_vm(&self, request: Request<proto::VmRef>) -> Answer<proto::Vm> {
        self.answer(self.vm_reboot(request).await)
    }
    async fn back_up_vm(&self, request: Request<proto::BackUpVmRequest>) -> Answer<proto::Vm> {
        self.answer(self.vm_back_up(request).await)
    }
    async fn set_vm_backup(&self, request: Request<proto::SetVmBackupRequest>) -> Answer<proto::Vm> {
        self.answer(self.vm_backup_set(request).await)
    }
    async fn set_vm_recovery(&self, request: Request<proto::SetVmRecoveryRequest>) -> Answer<proto::Vm> {
        self.answer(self.vm_recovery(request).await)
    }
    async fn migrate_vm(&self, request: Request<proto::MigrateVmRequest>) -> Answer<proto::Vm> {
        self.answer(self.vm_migrate(request).await)
    }
    async fn cancel_migration(&self, request: Request<proto::VmRef>) -> Answer<proto::Vm> {
        self.answer(self.vm_migration_cancel(request).await)
    }
    async fn delete_vm(&self, request: Request<proto::DeleteVmRequest>) -> Answer<proto::Done> {
        self.do_change("DeleteVm", request, vm::delete).await
    }
    async fn console_log(&self, request: Request<proto::ConsoleLogRequest>) -> Answer<proto::ConsoleLogReply> {
        self.answer(self.vm_console(request).await)
    }

    async fn create_network(&self, request: Request<proto::CreateNetworkRequest>) -> Answer<proto::Network> {
        self.answer(self.network_create(request).await)
    }
    async fn list_networks(&self, request: Request<proto::ListRequest>) -> Answer<proto::ListNetworksReply> {
        self.answer(self.network_list(request).await)
    }
    async fn delete_network(&self, request: Request<proto::NamedRef>) -> Answer<proto::Done> {
        self.do_change("DeleteNetwork", request, network::delete).await
    }

    async fn import_image(&self, request: Request<Streaming<proto::ImportImageRequest>>) -> Answer<proto::Image> {
        self.answer(self.image_import(request).await)
    }
    async fn export_image(&self, request: Request<proto::NamedRef>) -> Answer<Self::ExportImageStream> {
        self.answer(self.image_export(request).await)
    }
    async fn list_images(&self, request: Request<proto::ListRequest>) -> Answer<proto::ListImagesReply> {
        self.answer(self.image_list(request).await)
    }
    async fn get_image(&self, request: Request<proto::NamedRef>) -> Answer<proto::Image> {
        self.answer(self.image_get(request).await)
    }
    async fn delete_image(&self, request: Request<proto::NamedRef>) -> Answer<proto::Done> {
        self.do_change("DeleteImage", request, image::delete).await
    }

    async fn rehearse_backup(&self, request: Request<proto::RehearseBackupRequest>) -> Answer<proto::Image> {
        self.answer(self.backup_rehearse(request).await)
    }
    async fn end_rehearsal(&self, request: Request<proto::NamedRef>) -> Answer<proto::Image> {
        self.answer(self.rehearsal_end(request).await)
    }

    async fn set_tag(&self, request: Request<proto::SetTagRequest>) -> Answer<proto::Tag> {
        self.answer(self.tag_set(request).await)
    }
    async fn get_tag(&self, request: Request<proto::GetTagRequest>) -> Answer<proto::Tag> {
        self.answer(self.tag_get(request).await)
    }
    async fn list_tags(&self, request: Request<proto::ListRequest>) -> Answer<proto::ListTagsReply> {
        self.answer(self.tag_list(request).await)
    }
    async fn delete_tag(&self, request: Request<proto::DeleteTagRequest>) -> Answer<proto::Done> {
        self.do_change("DeleteTag", request, tag::delete).await
    }

    async fn watch(&self, request: Request<proto::WatchRequest>) -> Answer<Self::WatchStream> {
        self.answer(self.watch_begin(request).await)
    }

    async fn get_bill(&self, request: Request<proto::GetBillRequest>) -> Answer<proto::Bill> {
        self.answer(self.bill_get(request).await)
    }
    async fn set_price(&self, request: Request<proto::SetPriceRequest>) -> Answer<proto::Done> {
        self.do_change("SetPrice", request, bill::set_price).await
    }
    async fn list_prices(&self, request: Request<proto::ListRequest>) -> Answer<proto::ListPricesReply> {
        self.answer(self.price_list(request).await)
    }

    async fn create_tenant(&self, request: Request<proto::CreateTenantRequest>) -> Answer<proto::Tenant> {
        self.answer(self.tenant_create(request).await)
    }
    async fn set_quota(&self, request: Request<proto::CreateTenantRequest>) -> Answer<proto::Tenant> {
        self.answer(self.tenant_quota(request).await)
    }
    async fn list_tenants(&self, request: Request<proto::ListRequest>) -> Answer<proto::ListTenantsReply> {
        self.answer(self.tenant_list(request).await)
    }
    async fn delete_tenant(&self, request: Request<proto::NamedRef>) -> Answer<proto::Done> {
        self.do_change("DeleteTenant", request, operator::delete_tenant).await
    }
    async fn create_user(&self, request: Request<proto::CreateUserRequest>) -> Answer<proto::CreateUserReply> {
        self.answer(self.user_create(request).await)
    }
    async fn list_users(&self, request: Request<proto::ListRequest>) -> Answer<proto::ListUsersReply> {
        self.answer(self.user_list(request).await)
    }
    async fn delete_user(&self, request: Request<proto::NamedRef>) -> Answer<proto::Done> {
        self.do_change("DeleteUser", request, operator::delete_user).await
    }
    async fn create_template(&self, request: Request<proto::Template>) -> Answer<proto::Template> {
        self.answer(self.template_create(request).await)
    }
    async fn list_templates(&self, request: Request<proto::ListRequest>) -> Answer<proto::ListTemplatesReply> {
        self.answer(self.template_list(request).await)
    }
    async fn delete_template(&self, request: Request<proto::NamedRef>) -> Answer<proto::Done> {
        self.do_change("DeleteTemplate", request, operator::delete_template).await
    }
    async fn set_setting(&self, request: Request<proto::Setting>) -> Answer<proto::Setting> {
        self.answer(self.setting_set(request).await)
    }
    async fn list_settings(&self, request: Request<proto::ListRequest>) -> Answer<proto::ListSettingsReply> {
        self.answer(self.setting_list(request).await)
    }

    async fn list_nodes(&self, request: Request<proto::ListRequest>) -> Answer<proto::ListNodesReply> {
        self.answer(self.node_list(request).await)
    }
    async fn get_node(&self, request: Request<proto::NamedRef>) -> Answer<proto::Node> {
        self.answer(self.node_get(request).await)
    }
    async fn cordon_node(&self, request: Request<proto::CordonNodeRequest>) -> Answer<proto::Node> {
        self.answer(self.node_cordon(request).await)
    }
    async fn maintain_node(&self, request: Request<proto::MaintainNodeRequest>) -> Answer<proto::Node> {
        self.answer(self.node_maintain(request).await)
    }
    async fn drain_node(&self, request: Request<proto::NamedRef>) -> Answer<proto::DrainStatus> {
        self.answer(self.node_drain(request).await)
    }
    async fn get_drain(&self, request: Request<proto::NamedRef>) -> Answer<proto::DrainStatus> {
        self.answer(self.drain_get(request).await)
    }
    async fn suggest_moves(&self, request: Request<proto::ListRequest>) -> Answer<proto::SuggestMovesReply> {
        self.answer(self.moves_suggest(request).await)
    }
    async fn arm_recovery(&self, request: Request<proto::ArmRecoveryRequest>) -> Answer<proto::RecoveryStatus> {
        self.answer(self.recovery_arm(request).await)
    }
    async fn get_recovery(&self, request: Request<proto::RecoveryRequest>) -> Answer<proto::RecoveryStatus> {
        self.answer(self.recovery_get(request).await)
    }
    async fn end_refounding(&self, request: Request<proto::EndRefoundingRequest>) -> Answer<proto::RecoveryStatus> {
        self.answer(self.refounding_end(request).await)
    }
    async fn remove_node(&self, request: Request<proto::RemoveNodeRequest>) -> Answer<proto::Done> {
        self.do_change("RemoveNode", request, node::remove).await
    }

    async fn issue_join_token(
        &self,
        request: Request<proto::IssueJoinTokenRequest>,
    ) -> Answer<proto::IssueJoinTokenReply> {
        self.answer(self.join_token_issue(request).await)
    }
    async fn quorum_status(&self, request: Request<proto::QuorumStatusRequest>) -> Answer<proto::QuorumStatusReply> {
        self.answer(self.quorum_survey(request).await)
    }
    async fn quorum_check(&self, request: Request<proto::QuorumCheckRequest>) -> Answer<proto::QuorumCheckReply> {
        self.answer(self.quorum_examine(request).await)
    }
    async fn back_up_quorum(&self, request: Request<proto::BackUpQuorumRequest>) -> Answer<Self::BackUpQuorumStream> {
        self.answer(self.quorum_back_up(request).await)
    }
    async fn upgrade_quorum(&self, request: Request<proto::UpgradeQuorumRequest>) -> Answer<proto::UpgradeQuorumReply> {
        self.answer(self.quorum_upgrade(request).await)
    }
    async fn add_voter(&self, request: Request<proto::ControllerRef>) -> Answer<proto::Done> {
        self.answer(self.quorum_add(request).await)
    }
    async fn remove_controller(&self, request: Request<proto::ControllerRef>) -> Answer<proto::Done> {
        self.answer(self.quorum_remove(request).await)
    }
    async fn transfer_leader(&self, request: Request<proto::ControllerRef>) -> Answer<proto::Done> {
        self.answer(self.quorum_transfer(request).await)
    }
}
