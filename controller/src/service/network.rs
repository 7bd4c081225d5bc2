//! Tenant networks.

use std::ops::Bound;

use api::{error::ApiError, proto};
use model::{Command, Network, NetworkId, Reply, Role, State, TenantCommand};
use tonic::Request;

use super::{Service, page};
use crate::{access, access::Caller, name, view};

impl Service {
    pub(super) async fn network_create(
        &self,
        request: Request<proto::CreateNetworkRequest>,
    ) -> Result<proto::Network, ApiError> {
        let (_, index, reply) = self.change("CreateNetwork", &request, create).await?;
        let Reply::Network(id) = reply else {
            return Err(ApiError::internal(format!("a network's command replied {reply:?}")));
        };
        self.core.applied(index).await?;
        let shown =
            self.core.replica.read(|state| state.networks().get(&id).map(|network| view::network(state, network)));
        shown.ok_or_else(|| ApiError::not_found(format!("network '{id}' was made by this request and deleted since")))
    }

    pub(super) async fn network_list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::ListNetworksReply, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let limit = page::limit(body.limit)?;
        let after: NetworkId = page::after(&body.after)?;
        let look = |state: &State| {
            let all = caller.role == Role::Operator && body.tenant.is_empty();
            let tenant = if all { None } else { Some(name::tenant(state, &caller, &body.tenant)?.id) };
            let rows = state.networks().range((Bound::Excluded(after), Bound::Unbounded)).map(|(_, network)| network);
            let fits = |network: &Network| tenant.is_none_or(|tenant| network.tenant == tenant);
            let (rows, next) = page::cut(rows, fits, limit, |network| network.id.to_string());
            Ok((rows.into_iter().map(|network| view::network(state, network)).collect::<Vec<_>>(), next))
        };
        let stale = body.consistency.unwrap_or_default().stale;
        let (listed, read_at) = self.core.read(stale.into(), look).await?;
        listed.map(|(networks, next)| proto::ListNetworksReply { networks, next, read_at: Some(read_at) })
    }
}

fn create(state: &State, caller: &Caller, body: &proto::CreateNetworkRequest) -> Result<Command, ApiError> {
    let tenant = name::tenant(state, caller, &body.tenant)?.id;
    let refused = || {
        let shown: String = body.range.chars().take(80).collect();
        let allowed = "an aligned IPv4 range with a prefix of 8 to 29, such as 10.0.0.0/24";
        ApiError::invalid(format!("range is '{}', but must be {allowed}", shown.escape_debug()))
    };
    let range = body.range.parse().map_err(|()| refused())?;
    Ok(Command::Tenant(TenantCommand::CreateNetwork { tenant, name: body.name.clone(), range }))
}

pub(super) fn delete(state: &State, caller: &Caller, body: &proto::NamedRef) -> Result<Command, ApiError> {
    let network = name::network(state, caller, &body.tenant, &body.name)?.id;
    Ok(Command::Tenant(TenantCommand::DeleteNetwork { network }))
}
