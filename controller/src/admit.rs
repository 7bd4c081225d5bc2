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
use model::{Actor, Command, JoinRole, PlannerCommand, Rejection, Reply, Request as Named, RequestId, State};
use tonic::{Request, Response, Status};

use crate::{
    core::{Core, half_done},
    name,
};

/// A join has a token and a signing request of 16 KiB each at most. Anybody may send one, so no more is taken in.
pub(crate) const MAX_JOIN_BYTES: usize = 64 << 10;
/// No name or address that `apply` takes is longer.
const MOST_NAME_BYTES: usize = 63;
const MOST_ADDRESS_BYTES: usize = 300;

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
        // Of the key and not of this certificate, which each try makes anew: an earlier try whose entry is late binds the same.
        let certificate = tls::key_digest(&certificate_pem).map_err(|e| ApiError::internal(e.to_string()))?;
        if !self.core.replica.read(|state| state.nodes().get(&id).is_some_and(|node| node.certificate == certificate)) {
            let bind = Command::Planner(PlannerCommand::BindCertificate { node: id, certificate });
            let bound = self.core.propose(Actor::System, None, bind).await;
            bound.map_err(|error| half_done(&format!("{id} has joined"), error))?.applied?;
        }
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
        let digest = token.digest();
        let body = half(&[&digest.0, body.name.as_bytes(), body.address.as_bytes(), &body.csr]);
        let id = RequestId(u128::from_le_bytes(half(&[b"join", &body])));
        // Only who holds a token may write to the log. Whether it is still good when its turn comes, `apply` decides.
        let make = |state: &State| {
            let row = state.join_tokens().get(&digest);
            let usable = |row: &model::JoinToken| row.role == token.role && row.used_by.is_none();
            let known = row.is_some_and(|row| usable(row) && row.expires_at >= state.now());
            if known { Ok(Command::Planner(command.clone())) } else { Err(Rejection::BadToken.into()) }
        };
        let (index, reply) = self.core.change(&Actor::System, Named { id, body }, make).await?;
        self.core.applied(index).await?;
        Ok(reply)
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
    let within = |field: &str, value: &str, most: usize| {
        let invalid = || Rejection::Invalid {
            field: field.into(),
            value: name::shown(value),
            allowed: format!("at most {most} bytes of text"),
        };
        if value.len() <= most { Ok(()) } else { Err(invalid()) }
    };
    within("name", &body.name, MOST_NAME_BYTES)?;
    within("address", &body.address, MOST_ADDRESS_BYTES)?;
    let token = JoinToken::decode(&body.token).map_err(|_| ApiError::from(Rejection::BadToken))?;
    if token.role == role { Ok(token) } else { Err(Rejection::BadToken.into()) }
}

#[cfg(test)]
mod tests {
    use model::OperatorCommand;

    use super::*;
    use crate::fixture::Fixture;

    fn token(secret: u8) -> JoinToken {
        let controllers = vec!["127.0.0.1:7470".into()];
        JoinToken { role: JoinRole::Agent, secret: [secret; 32], controllers, ca_pem: String::new() }
    }

    fn asked(token: &JoinToken, name: &str) -> proto::JoinRequest {
        let csr = tls::make_key_and_csr().unwrap().csr_der.into();
        proto::JoinRequest { token: token.encode(), name: name.into(), address: String::new(), csr }
    }

    #[tokio::test]
    async fn who_has_no_token_writes_nothing_and_a_join_can_be_repeated() {
        let cloud = Fixture::new().await;
        let admission = Admission { core: cloud.core.clone() };
        let before = cloud.index();
        let refused = admission.agent(asked(&token(1), "alpha")).await.unwrap_err();
        assert_eq!((refused.code.as_str(), cloud.index()), ("bad-join-token", before));
        let role = JoinRole::Agent;
        let issue = OperatorCommand::IssueJoinToken { token: token(1).digest(), role, valid_millis: 60_000 };
        cloud.operator(issue).await;
        let body = asked(&token(1), "alpha");
        let joined = admission.agent(body.clone()).await.unwrap();
        let bound =
            || cloud.core.replica.read(|state| state.nodes().get(&model::NodeId(joined.id)).unwrap().certificate);
        let (before, index) = (bound(), cloud.index());
        let again = admission.agent(body).await.unwrap();
        assert_eq!(again.id, joined.id, "the same request has the same answer");
        assert_eq!((bound(), cloud.index()), (before, index), "and either certificate is good");
        let refused = admission.agent(asked(&token(1), "beta")).await.unwrap_err();
        assert_eq!(refused.code, "bad-join-token", "it is used");
        let other = JoinToken { role: JoinRole::Controller, ..token(1) };
        let refused = admission.controller(asked(&other, "gamma")).await.unwrap_err();
        assert_eq!(refused.code, "bad-join-token");
        let requests = cloud.core.replica.read(|state| state.requests().len());
        assert_eq!(requests, 1, "nothing but the join is remembered");
    }

    #[tokio::test]
    async fn a_name_or_an_address_that_is_too_long_is_refused_by_name() {
        let cloud = Fixture::new().await;
        let admission = Admission { core: cloud.core.clone() };
        let long = "n".repeat(MOST_NAME_BYTES + 1);
        let refused = admission.agent(asked(&token(1), &long)).await.unwrap_err();
        assert_eq!(refused.code, "invalid-argument");
        assert!(refused.message.contains("name") && refused.message.contains("at most 63 bytes"), "{refused}");
        let address = "a".repeat(MOST_ADDRESS_BYTES + 1);
        let body = proto::JoinRequest { address, ..asked(&token(1), "alpha") };
        let refused = admission.agent(body).await.unwrap_err();
        assert!(refused.message.contains("address") && refused.message.len() < 300, "{refused}");
    }
}
