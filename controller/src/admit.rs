//! Lets controllers and agents in: a one-time token against an identity.
//!
//! The request id of the entry is made from the token and the key, so that a join whose answer was lost can be repeated
//! with the same key; anybody else finds the token used.

use std::sync::Arc;

use api::{
    error::ApiError,
    proto::{self, join_server::Join},
    tls,
    token::JoinToken,
};
use model::{Actor, Command, JoinRole, PlannerCommand, Rejection, Reply, Request as Named, RequestId};
use tonic::{Request, Response, Status};

use crate::core::Core;

pub(crate) struct Admission {
    pub core: Arc<Core>,
}

#[tonic::async_trait]
impl Join for Admission {
    async fn join_controller(
        &self,
        request: Request<proto::JoinRequest>,
    ) -> Result<Response<proto::JoinControllerReply>, Status> {
        Ok(Response::new(self.controller(request.into_inner()).await?))
    }

    async fn join_agent(
        &self,
        request: Request<proto::JoinRequest>,
    ) -> Result<Response<proto::JoinAgentReply>, Status> {
        Ok(Response::new(self.agent(request.into_inner()).await?))
    }
}

impl Admission {
    async fn controller(&self, body: proto::JoinRequest) -> Result<proto::JoinControllerReply, ApiError> {
        let token = token_of(&body, JoinRole::Controller)?;
        let command = PlannerCommand::JoinController {
            token: token.digest(),
            name: body.name.clone(),
            address: body.address.clone(),
        };
        let Reply::Controller(id) = self.admit(&token, &body, command).await? else {
            return Err(ApiError::internal("a controller's join replied with another noun"));
        };
        tracing::info!(controller = %id, name = body.name, address = body.address, "a controller joined");
        Ok(proto::JoinControllerReply {
            id: id.0,
            certificate_pem: self.sign(&body.csr, &id.to_string())?.into_bytes().into(),
            ca_pem: self.core.authority.ca_pem.clone().into_bytes().into(),
            ca_key_pem: self.core.authority.key_pem.clone().into_bytes().into(),
            cluster: self.cluster(),
            controllers: self.core.addresses(),
            epoch: self.core.replica.read(|state| state.quorum().epoch),
        })
    }

    async fn agent(&self, body: proto::JoinRequest) -> Result<proto::JoinAgentReply, ApiError> {
        let token = token_of(&body, JoinRole::Agent)?;
        let command = PlannerCommand::JoinNode { token: token.digest(), name: body.name.clone() };
        let Reply::Node(id) = self.admit(&token, &body, command).await? else {
            return Err(ApiError::internal("an agent's join replied with another noun"));
        };
        let certificate_pem = self.sign(&body.csr, &id.to_string())?;
        let certificate = tls::fingerprint(&certificate_pem).map_err(|e| ApiError::internal(e.to_string()))?;
        let bind = Command::Planner(PlannerCommand::BindCertificate { node: id, certificate });
        self.core.propose(Actor::System, None, bind).await?.applied?;
        let beat_key = self.core.authority.beat_key(id).map_err(|e| ApiError::internal(e.to_string()))?;
        tracing::info!(node = %id, name = body.name, "an agent joined");
        Ok(proto::JoinAgentReply {
            id: id.0,
            certificate_pem: certificate_pem.into_bytes().into(),
            ca_pem: self.core.authority.ca_pem.clone().into_bytes().into(),
            beat_key: beat_key.0.to_vec().into(),
            cluster: self.cluster(),
            controllers: self.core.addresses(),
        })
    }

    async fn admit(
        &self,
        token: &JoinToken,
        body: &proto::JoinRequest,
        command: PlannerCommand,
    ) -> Result<Reply, ApiError> {
        let half = |parts: &[&[u8]]| {
            let mut hasher = blake3::Hasher::new();
            parts.iter().for_each(|part| {
                hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
            });
            let mut half = [0; 16];
            half.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
            half
        };
        let body = half(&[&token.digest().0, body.name.as_bytes(), body.address.as_bytes(), &body.csr]);
        let id = RequestId(u128::from_le_bytes(half(&[b"join", &body])));
        let committed = self.core.propose(Actor::System, Some(Named { id, body }), Command::Planner(command)).await?;
        self.core.applied(committed.index).await?;
        Ok(committed.applied?)
    }

    fn sign(&self, csr: &[u8], identity: &str) -> Result<String, ApiError> {
        let refused = |e: tls::TlsError| ApiError::invalid(format!("csr is not a certificate signing request: {e}"));
        self.core.authority.sign(csr, identity).map_err(refused)
    }

    fn cluster(&self) -> String {
        self.core.replica.read(|state| state.cluster().id.clone())
    }
}

fn token_of(body: &proto::JoinRequest, role: JoinRole) -> Result<JoinToken, ApiError> {
    // A request that would be refused at the end must not use up the token.
    if body.csr.is_empty() || body.csr.len() > 16 << 10 {
        return Err(ApiError::invalid("csr is missing or too long, but must be a certificate signing request in DER"));
    }
    let token = JoinToken::decode(&body.token).map_err(|_| ApiError::from(Rejection::BadToken))?;
    if token.role == role { Ok(token) } else { Err(Rejection::BadToken.into()) }
}
