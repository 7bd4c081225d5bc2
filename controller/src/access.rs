//! Who calls: a person by token, a part of the cloud by certificate.

use api::{
    client::{REQUEST_KEY, TOKEN_KEY},
    error::ApiError,
    tls, token,
};
use model::{Actor, Digest, NodeId, Request, RequestId, Role, State};
use prost::Message;
use tonic::metadata::MetadataMap;

use crate::core::Core;

/// A person or a program, known by its token.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub name: String,
    pub role: Role,
}

impl Caller {
    pub fn actor(&self) -> Actor {
        Actor::User { name: self.name.clone(), role: self.role }
    }

    pub fn must_be_operator(&self) -> Result<(), ApiError> {
        match self.role {
            Role::Operator => Ok(()),
            Role::Member(_) => Err(ApiError::forbidden(format!("user '{}' is not an operator", self.name))),
        }
    }
}

/// Whose token the call carries.
///
/// A token that this replica does not know may be newer than the replica: it asks the quorum once before it refuses.
pub(crate) async fn authenticate(core: &Core, metadata: &MetadataMap) -> Result<Caller, ApiError> {
    let digest = token_of(metadata)?;
    if let Some(caller) = core.replica.read(|state| known(state, &digest)) {
        return Ok(caller);
    }
    core.linearize().await?;
    core.replica.read(|state| known(state, &digest)).ok_or_else(refused)
}

/// Who calls, as the gate found out.
pub(crate) fn caller<T>(request: &tonic::Request<T>) -> Result<Caller, ApiError> {
    request.extensions().get::<Caller>().cloned().ok_or_else(refused)
}

/// The digest of the token that the call carries.
pub(crate) fn token_of(metadata: &MetadataMap) -> Result<Digest, ApiError> {
    let header = metadata.get(TOKEN_KEY).and_then(|value| value.to_str().ok()).ok_or_else(refused)?;
    let text = header.strip_prefix("Bearer ").ok_or_else(refused)?;
    token::user_token_digest(text).ok_or_else(refused)
}

/// For a call that goes on: whether the token is still that user's, with the same rights.
pub(crate) fn still(core: &Core, token: &Digest, caller: &Caller) -> bool {
    let now = core.replica.read(|state| known(state, token));
    now.is_some_and(|now| now.name == caller.name && now.role == caller.role)
}

fn refused() -> ApiError {
    ApiError::unauthenticated("the call carries no valid token")
}

fn known(state: &State, token: &Digest) -> Option<Caller> {
    state.user_of_token(token).map(|user| Caller { name: user.name.clone(), role: user.role })
}

/// The name of a mutating call under which a retry is the same call.
pub(crate) fn request_of<T: Message>(
    method: &str,
    caller: &Caller,
    request: &tonic::Request<T>,
) -> Result<Request, ApiError> {
    request_named(method, caller, request.metadata(), &request.get_ref().encode_to_vec())
}

/// As `request_of`, for a call whose body is not one message.
///
/// The caller is part of what was asked: an answer can be a secret, and is for nobody who only knows the request's id.
pub(crate) fn request_named(
    method: &str,
    caller: &Caller,
    metadata: &MetadataMap,
    body: &[u8],
) -> Result<Request, ApiError> {
    let id = request_id(metadata)?;
    let role = match caller.role {
        Role::Operator => "operator".to_owned(),
        Role::Member(tenant) => tenant.to_string(),
    };
    let mut hasher = blake3::Hasher::new();
    for part in [method, &caller.name, &role] {
        hasher.update(part.as_bytes()).update(&[0]);
    }
    hasher.update(body);
    let mut half = [0; 16];
    half.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    Ok(Request { id, body: half })
}

/// What the client calls a mutating call.
pub(crate) fn request_id(metadata: &MetadataMap) -> Result<RequestId, ApiError> {
    let text = metadata.get(REQUEST_KEY).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.parse()
        .map_err(|()| ApiError::invalid(format!("{REQUEST_KEY} is '{text}', but must be a UUID chosen by the client")))
}

/// The node whose certificate the peer shows, if its key is the one that the quorum knows it by.
pub(crate) fn node_of<T>(core: &Core, request: &tonic::Request<T>) -> Result<NodeId, ApiError> {
    let refused = || ApiError::unauthenticated("the call needs the certificate of a node of this cloud");
    let id: NodeId = tls::peer_identity(request).and_then(|name| name.parse().ok()).ok_or_else(refused)?;
    let shown = tls::peer_digests(request).ok_or_else(refused)?;
    // Earlier versions bound the certificate itself.
    let bound = core.replica.read(|state| state.nodes().get(&id).map(|node| node.certificate));
    if bound.is_some_and(|bound| shown.contains(&bound)) { Ok(id) } else { Err(refused()) }
}
