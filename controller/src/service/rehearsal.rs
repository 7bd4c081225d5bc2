//! Rehearsals of a restore: asked for by the name of a backup or of the machine that it is of.

use api::{error::ApiError, proto};
use model::{Command, Image, State, TenantCommand};
use tonic::Request;

use super::Service;
use crate::{access::Caller, name};

impl Service {
    pub(super) async fn backup_rehearse(
        &self,
        request: Request<proto::RehearseBackupRequest>,
    ) -> Result<proto::Image, ApiError> {
        let make = |state: &State, caller: &Caller, body: &proto::RehearseBackupRequest| {
            let image = backup(state, caller, &body.tenant, &body.name)?.id;
            let (limit_millis, expect) = (body.limit_millis, body.expect.clone());
            Ok(Command::Tenant(TenantCommand::RehearseBackup { image, limit_millis, expect }))
        };
        let (_, index, reply) = self.change("RehearseBackup", &request, make).await?;
        self.image_shown(index, reply).await
    }

    pub(super) async fn rehearsal_end(&self, request: Request<proto::NamedRef>) -> Result<proto::Image, ApiError> {
        let make = |state: &State, caller: &Caller, body: &proto::NamedRef| {
            let image = backup(state, caller, &body.tenant, &body.name)?.id;
            Ok(Command::Tenant(TenantCommand::EndRehearsal { image }))
        };
        let (_, index, reply) = self.change("EndRehearsal", &request, make).await?;
        self.image_shown(index, reply).await
    }
}

/// The backup of this name; else, of the machine of this name, the one that is being rehearsed, or the newest.
fn backup<'a>(state: &'a State, caller: &Caller, tenant: &str, name: &str) -> Result<&'a Image, ApiError> {
    let named = name::image(state, caller, tenant, name).ok().filter(|image| image.backup.is_some());
    if let Some(image) = named {
        return Ok(image);
    }
    let vm = name::vm(state, caller, tenant, name)
        .map_err(|_| ApiError::not_found(format!("'{}' is neither a backup nor a machine", name.escape_debug())))?;
    let under_way = state.backups_of(vm.id).find(|image| image.rehearsal.is_some());
    under_way
        .or_else(|| state.backups_of(vm.id).next_back())
        .ok_or_else(|| ApiError::not_found(format!("{} has no backup", vm.name)))
}
