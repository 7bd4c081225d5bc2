//! Tenants, users, templates, settings.

use std::ops::Bound;

use api::{error::ApiError, proto, token};
use model::{Capacity, Command, OperatorCommand, Reply, Role, State, TenantId, setting};
use tonic::Request;

use super::{Service, page};
use crate::{access, access::Caller, core::Freshness, name, view};

impl Service {
    pub(super) async fn tenant_create(
        &self,
        request: Request<proto::CreateTenantRequest>,
    ) -> Result<proto::Tenant, ApiError> {
        let make = |_: &State, caller: &Caller, body: &proto::CreateTenantRequest| {
            caller.must_be_operator()?;
            let quota = view::quota_from(body.quota.unwrap_or_default());
            Ok(Command::Operator(OperatorCommand::CreateTenant { name: body.name.clone(), quota }))
        };
        let (_, index, reply) = self.change("CreateTenant", &request, make).await?;
        let Reply::Tenant(id) = reply else {
            return Err(ApiError::internal(format!("a tenant's command replied {reply:?}")));
        };
        self.tenant_shown(index, id).await
    }

    pub(super) async fn tenant_quota(
        &self,
        request: Request<proto::CreateTenantRequest>,
    ) -> Result<proto::Tenant, ApiError> {
        let make = |state: &State, caller: &Caller, body: &proto::CreateTenantRequest| {
            caller.must_be_operator()?;
            let tenant = name::tenant(state, caller, &body.name)?.id;
            Ok(Command::Operator(OperatorCommand::SetQuota {
                tenant,
                quota: view::quota_from(body.quota.unwrap_or_default()),
            }))
        };
        let (caller, index, _) = self.change("SetQuota", &request, make).await?;
        let body = request.into_inner();
        let id = self.core.replica.read(|state| name::tenant(state, &caller, &body.name).map(|tenant| tenant.id))?;
        self.tenant_shown(index, id).await
    }

    async fn tenant_shown(&self, index: u64, id: TenantId) -> Result<proto::Tenant, ApiError> {
        self.core.applied(index).await?;
        let shown = self.core.replica.read(|state| state.tenants().get(&id).map(|tenant| view::tenant(state, tenant)));
        shown.ok_or_else(|| ApiError::not_found(format!("tenant '{id}' was deleted since")))
    }

    pub(super) async fn tenant_list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::ListTenantsReply, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let limit = page::limit(body.limit)?;
        let after: TenantId = page::after(&body.after)?;
        let look = |state: &State| {
            let later = match caller.role {
                Role::Operator => (Bound::Excluded(after), Bound::Unbounded),
                Role::Member(own) => (Bound::Included(own), Bound::Included(own)),
            };
            let rows = state.tenants().range(later).map(|(_, tenant)| tenant);
            let (rows, next) = page::cut(rows, |tenant| tenant.id > after, limit, |tenant| tenant.id.to_string());
            (rows.into_iter().map(|tenant| view::tenant(state, tenant)).collect::<Vec<_>>(), next)
        };
        let stale = body.consistency.unwrap_or_default().stale;
        let ((tenants, next), _) = self.core.read(stale.into(), look).await?;
        Ok(proto::ListTenantsReply { tenants, next })
    }

    /// The token is made from the request id and a secret of the cloud, so that a retry shows the same one.
    pub(super) async fn user_create(
        &self,
        request: Request<proto::CreateUserRequest>,
    ) -> Result<proto::CreateUserReply, ApiError> {
        let id = access::request_id(request.metadata())?;
        let mut material = self.core.authority.key_pem.as_bytes().to_vec();
        material.extend_from_slice(&id.0.to_le_bytes());
        let text = token::user_token(blake3::derive_key("trefoil user token of one request, version 1", &material));
        let digest = token::user_token_digest(&text).ok_or_else(|| ApiError::internal("a made token has a digest"))?;
        let make = |state: &State, caller: &Caller, body: &proto::CreateUserRequest| {
            caller.must_be_operator()?;
            let role = match (body.role.as_str(), body.tenant.as_str()) {
                ("operator", "") => Role::Operator,
                ("operator", tenant) => {
                    return Err(ApiError::invalid(format!("tenant is '{tenant}', but must be empty for an operator")));
                }
                ("member", tenant) => Role::Member(name::tenant(state, caller, tenant)?.id),
                (other, _) => {
                    return Err(ApiError::invalid(format!("role is '{other}', but must be operator or member")));
                }
            };
            Ok(Command::Operator(OperatorCommand::CreateUser { name: body.name.clone(), role, token: digest }))
        };
        self.change("CreateUser", &request, make).await?;
        Ok(proto::CreateUserReply { name: request.into_inner().name, token: text })
    }

    pub(super) async fn user_list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::ListUsersReply, ApiError> {
        let caller = access::caller(&request)?;
        caller.must_be_operator()?;
        let look = |state: &State| {
            let user = |user: &model::User| match user.role {
                Role::Operator => {
                    proto::User { name: user.name.clone(), role: "operator".into(), tenant: String::new() }
                }
                Role::Member(tenant) => proto::User {
                    name: user.name.clone(),
                    role: "member".into(),
                    tenant: view::tenant_name(state, tenant),
                },
            };
            state.users().values().map(user).collect()
        };
        let (users, _) = self.core.read(Freshness::Linearizable, look).await?;
        Ok(proto::ListUsersReply { users })
    }

    pub(super) async fn template_create(&self, request: Request<proto::Template>) -> Result<proto::Template, ApiError> {
        let make = |_: &State, caller: &Caller, body: &proto::Template| {
            caller.must_be_operator()?;
            let size = Capacity { vcpus: body.vcpus, memory_bytes: body.memory_bytes, disk_bytes: body.disk_bytes };
            Ok(Command::Operator(OperatorCommand::CreateTemplate {
                name: body.name.clone(),
                size,
                weight_milli: body.weight_milli,
            }))
        };
        self.change("CreateTemplate", &request, make).await?;
        Ok(request.into_inner())
    }

    pub(super) async fn template_list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::ListTemplatesReply, ApiError> {
        access::caller(&request)?;
        let look = |state: &State| state.templates().values().map(view::template).collect();
        let (templates, _) = self.core.read(Freshness::Linearizable, look).await?;
        Ok(proto::ListTemplatesReply { templates })
    }

    pub(super) async fn setting_set(&self, request: Request<proto::Setting>) -> Result<proto::Setting, ApiError> {
        let make = |_: &State, caller: &Caller, body: &proto::Setting| {
            caller.must_be_operator()?;
            Ok(Command::Operator(OperatorCommand::SetSetting { name: body.name.clone(), value: body.value }))
        };
        self.change("SetSetting", &request, make).await?;
        let body = request.into_inner();
        let known = setting::find(&body.name).ok_or_else(|| ApiError::internal("a setting that was set is known"))?;
        Ok(shown_setting(known, body.value))
    }

    pub(super) async fn setting_list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::ListSettingsReply, ApiError> {
        access::caller(&request)?;
        let look = |state: &State| {
            setting::SETTINGS.iter().map(|known| shown_setting(known, state.setting(known.name))).collect()
        };
        let (settings, _) = self.core.read(Freshness::Linearizable, look).await?;
        Ok(proto::ListSettingsReply { settings })
    }
}

fn shown_setting(known: &setting::Setting, value: u64) -> proto::Setting {
    proto::Setting {
        name: known.name.into(),
        value,
        default_value: known.default,
        min: known.min,
        max: known.max,
        about: known.about.into(),
    }
}

pub(super) fn delete_tenant(state: &State, caller: &Caller, body: &proto::NamedRef) -> Result<Command, ApiError> {
    caller.must_be_operator()?;
    if body.name.is_empty() {
        return Err(ApiError::invalid("name is '', but must be the tenant's"));
    }
    let tenant = name::tenant(state, caller, &body.name)?.id;
    Ok(Command::Operator(OperatorCommand::DeleteTenant { tenant }))
}

pub(super) fn delete_user(_: &State, caller: &Caller, body: &proto::NamedRef) -> Result<Command, ApiError> {
    caller.must_be_operator()?;
    Ok(Command::Operator(OperatorCommand::DeleteUser { name: body.name.clone() }))
}

pub(super) fn delete_template(_: &State, caller: &Caller, body: &proto::NamedRef) -> Result<Command, ApiError> {
    caller.must_be_operator()?;
    Ok(Command::Operator(OperatorCommand::DeleteTemplate { name: body.name.clone() }))
}

#[cfg(test)]
mod tests {
    use model::RequestId;

    use super::*;
    use crate::fixture::Fixture;

    #[tokio::test]
    async fn a_secret_is_shown_again_to_who_asked_for_it_and_to_nobody_who_knows_the_request() {
        let cloud = Fixture::new().await;
        let service = Service { core: cloud.core.clone() };
        let user =
            |name: &str| proto::CreateUserRequest { name: name.into(), role: "operator".into(), tenant: String::new() };
        let ann = service.user_create(cloud.call(&cloud.token, RequestId(1), user("ann")).await).await.unwrap().token;
        let made = service.user_create(cloud.call(&cloud.token, RequestId(2), user("bob")).await).await.unwrap();
        let again = service.user_create(cloud.call(&cloud.token, RequestId(2), user("bob")).await).await.unwrap();
        assert_eq!(again.token, made.token);
        let other = service.user_create(cloud.call(&ann, RequestId(2), user("bob")).await).await.unwrap_err();
        assert_eq!(other.code, "request-reused");
    }
}
