//! Images: the record here, the bytes between people and nodes.

use std::{ops::Bound, time::Duration};

use api::{error::ApiError, proto, proto::import_image_request::Part};
use model::{Command, Digest, Image, ImageFormat, ImageId, NodeId, Rejection, Reply, Role, State, TenantCommand};
use prost::Message;
use tokio::time::timeout;
use tonic::{Request, Status, Streaming};

use super::{Flow, Service, page};
use crate::{
    access,
    access::Caller,
    name,
    replicas::{self, Target},
    view,
};

/// Who opens an upload says within this what it is of.
const HEADER: Duration = Duration::from_secs(10);

impl Service {
    /// Bytes first, record after: an image that is listed is whole, verified and on all its nodes.
    pub(super) async fn image_import(
        &self,
        request: Request<Streaming<proto::ImportImageRequest>>,
    ) -> Result<proto::Image, ApiError> {
        let caller = access::caller(&request)?;
        let (metadata, _, mut parts) = request.into_parts();
        let header = header_in(HEADER, parts.message()).await?;
        let id = access::request_named("ImportImage", &caller, &metadata, &header.encode_to_vec())?;
        let digest: Digest = header.digest.parse().map_err(|()| {
            ApiError::invalid("digest is not one, but must be the BLAKE3 digest of the file in 64 hexadecimal digits")
        })?;
        self.core.linearize().await?;
        let remembered =
            self.core.replica.read(|state| state.requests().get(&id.id).map(|seen| (seen.body, seen.outcome.clone())));
        match remembered {
            Some((body, outcome)) if body == id.body => return self.image_shown(0, outcome?).await,
            Some(_) => return Err(Rejection::RequestReused.into()),
            None => {}
        }
        self.may_upload(&caller, &header)?;
        let targets = self.upload_targets(header.size_bytes)?;
        replicas::upload(&self.core, &targets, digest, header.size_bytes, parts).await?;
        let holders: Vec<NodeId> = targets.iter().map(|target| target.node).collect();
        let make = |state: &State| import(state, &caller, &header, digest, &holders);
        let (index, reply) = self.core.change(&caller.actor(), id, make).await?;
        tracing::info!(request = %id.id, user = caller.name, index, name = header.name, %digest, "image imported");
        self.image_shown(index, reply).await
    }

    pub(super) async fn image_shown(&self, index: u64, reply: Reply) -> Result<proto::Image, ApiError> {
        let Reply::Image(id) = reply else {
            return Err(ApiError::internal(format!("an image's command replied {reply:?}")));
        };
        self.core.applied(index).await?;
        let shown = self.core.replica.read(|state| state.images().get(&id).map(|image| view::image(state, image)));
        shown.ok_or_else(|| ApiError::not_found(format!("image '{id}' was made by this request and deleted since")))
    }

    /// What the quorum would refuse at the end is refused before the first byte, as far as it can be known.
    fn may_upload(&self, caller: &Caller, header: &proto::ImportImageHeader) -> Result<(), ApiError> {
        self.core.replica.read(|state| {
            let tenant = name::tenant(state, caller, &header.tenant)?;
            format_of(&header.format)?;
            if state.image_named(tenant.id, &header.name).is_some() {
                return Err(Rejection::Exists { noun: model::Noun::Image, name: header.name.clone() }.into());
            }
            let used = state.usage(tenant.id).image_bytes;
            if used.saturating_add(header.size_bytes) > tenant.quota.image_bytes {
                let (limit, asked) = (tenant.quota.image_bytes, header.size_bytes);
                return Err(Rejection::Quota {
                    tenant: tenant.name.clone(),
                    what: "bytes of images".into(),
                    limit,
                    used,
                    asked,
                }
                .into());
            }
            Ok(())
        })
    }

    /// As many nodes as an image is to have replicas, or as there are.
    fn upload_targets(&self, size_bytes: u64) -> Result<Vec<Target>, ApiError> {
        self.core.replica.read(|state| {
            let wanted = usize::try_from(state.setting(model::setting::IMAGE_REPLICAS)).unwrap_or(1);
            let nodes = self.core.hear(|ears| model::plan::image_targets(state, ears, size_bytes));
            let target =
                |id: &NodeId| state.nodes().get(id).map(|node| Target { node: node.id, address: node.address.clone() });
            let targets: Vec<Target> = nodes.iter().filter_map(target).take(wanted).collect();
            if targets.is_empty() {
                return Err(ApiError::new(
                    "no-room",
                    format!("no node is up that has {size_bytes} bytes free for the image"),
                ));
            }
            Ok(targets)
        })
    }

    pub(super) async fn image_export(&self, request: Request<proto::NamedRef>) -> Result<Flow<proto::Chunk>, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let look = |state: &State| {
            let image = name::image(state, &caller, &body.tenant, &body.name)?;
            if let Some(full) = state.chain(image).skip(1).last() {
                let said = "is an increment: its file alone is no disk, for it stands on earlier ones down to";
                let next = "'backup create --full' makes one that stands alone";
                return Err(ApiError::new("precondition", format!("{} {said} {}; {next}", image.name, full.name)));
            }
            let holders = image.keepers().filter_map(|id| state.nodes().get(&id)).map(|node| node.address.clone());
            Ok::<_, ApiError>((image.digest, holders.collect::<Vec<_>>()))
        };
        let (found, _) = self.core.read(body.stale.into(), look).await?;
        let (digest, holders) = found?;
        replicas::download(&self.core, digest, &holders).await
    }

    pub(super) async fn image_get(&self, request: Request<proto::NamedRef>) -> Result<proto::Image, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let look = |state: &State| {
            name::image(state, &caller, &body.tenant, &body.name).map(|image| view::image(state, image))
        };
        self.core.read(body.stale.into(), look).await?.0
    }

    pub(super) async fn image_list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::ListImagesReply, ApiError> {
        let caller = access::caller(&request)?;
        let body = request.into_inner();
        let limit = page::limit(body.limit)?;
        let after: ImageId = page::after(&body.after)?;
        let look = |state: &State| {
            let all = caller.role == Role::Operator && body.tenant.is_empty();
            let tenant = if all { None } else { Some(name::tenant(state, &caller, &body.tenant)?.id) };
            let rows = state.images().range((Bound::Excluded(after), Bound::Unbounded)).map(|(_, image)| image);
            let fits = |image: &Image| tenant.is_none_or(|tenant| image.tenant == tenant);
            let (rows, next) = page::cut(rows, fits, limit, |image| image.id.to_string());
            Ok((rows.into_iter().map(|image| view::image(state, image)).collect::<Vec<_>>(), next))
        };
        let stale = body.consistency.unwrap_or_default().stale;
        let (listed, read_at) = self.core.read(stale.into(), look).await?;
        listed.map(|(images, next)| proto::ListImagesReply { images, next, read_at: Some(read_at) })
    }
}

/// The header of an upload, if it is the first message and comes within `limit`.
async fn header_in(
    limit: Duration,
    first: impl Future<Output = Result<Option<proto::ImportImageRequest>, Status>>,
) -> Result<proto::ImportImageHeader, ApiError> {
    let first = timeout(limit, first).await.map_err(|_| ApiError::new("unavailable", "no header came in time"))??;
    match first.and_then(|message| message.part) {
        Some(Part::Header(header)) => Ok(header),
        _ => Err(ApiError::invalid("the first message is not a header, but must be")),
    }
}

fn import(
    state: &State,
    caller: &Caller,
    header: &proto::ImportImageHeader,
    digest: Digest,
    holders: &[NodeId],
) -> Result<Command, ApiError> {
    Ok(Command::Tenant(TenantCommand::ImportImage {
        tenant: name::tenant(state, caller, &header.tenant)?.id,
        name: header.name.clone(),
        format: format_of(&header.format)?,
        size_bytes: header.size_bytes,
        virtual_bytes: header.virtual_bytes,
        digest,
        replicas: holders.to_vec(),
    }))
}

fn format_of(name: &str) -> Result<ImageFormat, ApiError> {
    match name {
        "qcow2" => Ok(ImageFormat::Qcow2),
        "raw" => Ok(ImageFormat::Raw),
        other => Err(ApiError::invalid(format!("format is '{}', but must be qcow2 or raw", other.escape_debug()))),
    }
}

pub(super) fn delete(state: &State, caller: &Caller, body: &proto::NamedRef) -> Result<Command, ApiError> {
    let image = name::image(state, caller, &body.tenant, &body.name)?.id;
    Ok(Command::Tenant(TenantCommand::DeleteImage { image }))
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    #[tokio::test]
    async fn an_upload_begins_with_a_header_and_soon() {
        let header = proto::ImportImageHeader { name: "debian".into(), ..Default::default() };
        let message = |part| Ok(Some(proto::ImportImageRequest { part: Some(part) }));
        let told = header_in(HEADER, ready(message(Part::Header(header.clone())))).await;
        assert_eq!(told.unwrap(), header);
        for first in [message(Part::Data(vec![1].into())), Ok(None)] {
            assert_eq!(header_in(HEADER, ready(first)).await.unwrap_err().code, "invalid-argument");
        }
        let silent = header_in(Duration::from_millis(20), pending()).await.unwrap_err();
        assert!(silent.message.contains("in time"), "{silent}");
    }
}
