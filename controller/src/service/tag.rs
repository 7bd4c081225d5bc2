//! Tags.

use std::ops::Bound;

use api::{error::ApiError, proto};
use model::{Command, Noun, Reply, State, TenantCommand};
use tonic::Request;

use super::{Service, page};
use crate::{access, access::Caller, name};

impl Service {
    pub(super) async fn tag_set(&self, request: Request<proto::SetTagRequest>) -> Result<proto::Tag, ApiError> {
        let (_, _, reply) = self.change("SetTag", &request, set).await?;
        let Reply::Version(version) = reply else {
            return Err(ApiError::internal(format!("a tag's command replied {reply:?}")));
        };
        let body = request.into_inner();
        Ok(proto::Tag { key: body.key, value: body.value, version, read_at: None })
    }

    pub(super) async fn tag_get(&self, request: Request<proto::GetTagRequest>) -> Result<proto::Tag, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let look = |state: &State| {
            let tenant = name::tenant(state, &caller, &body.tenant)?.id;
            let tag = state.tags().get(&(tenant, body.key.clone())).cloned();
            tag.ok_or_else(|| name::missing(Noun::Tag, &body.key))
        };
        let (tag, read_at) = self.core.read(body.stale.into(), look).await?;
        tag.map(|tag| proto::Tag { key: body.key, value: tag.value, version: tag.version, read_at: Some(read_at) })
    }

    pub(super) async fn tag_list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::ListTagsReply, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let limit = page::limit(body.limit)?;
        let look = |state: &State| {
            let tenant = name::tenant(state, &caller, &body.tenant)?.id;
            let rows = state.tags().range((Bound::Excluded((tenant, body.after.clone())), Bound::Unbounded));
            let rows = rows.take_while(|((owner, _), _)| *owner == tenant);
            let (rows, next) = page::cut(rows, |_| true, limit, |((_, key), _)| key.clone());
            let tag = |((_, key), tag): (&(_, String), &model::Tag)| proto::Tag {
                key: key.clone(),
                value: tag.value.clone(),
                version: tag.version,
                read_at: None,
            };
            Ok((rows.into_iter().map(tag).collect::<Vec<_>>(), next))
        };
        let stale = body.consistency.unwrap_or_default().stale;
        let (listed, read_at) = self.core.read(stale.into(), look).await?;
        listed.map(|(tags, next)| proto::ListTagsReply { tags, next, read_at: Some(read_at) })
    }
}

fn set(state: &State, caller: &Caller, body: &proto::SetTagRequest) -> Result<Command, ApiError> {
    let tenant = name::tenant(state, caller, &body.tenant)?.id;
    let (key, value, expected) = (body.key.clone(), body.value.clone(), body.expected_version);
    Ok(Command::Tenant(TenantCommand::SetTag { tenant, key, value, expected }))
}

pub(super) fn delete(state: &State, caller: &Caller, body: &proto::DeleteTagRequest) -> Result<Command, ApiError> {
    let tenant = name::tenant(state, caller, &body.tenant)?.id;
    Ok(Command::Tenant(TenantCommand::DeleteTag { tenant, key: body.key.clone(), expected: body.expected_version }))
}
