//! The quorum: tokens to join, who is in it, who leads it.

use api::{error::ApiError, proto, token::JoinToken};
use model::{Actor, Command, ControllerId, JoinRole, OperatorCommand, PlannerCommand, State, invariant};
use raft::{MembershipError, Role};
use tokio::sync::Semaphore;
use tonic::Request;

use super::Service;
use crate::{access, access::Caller};

/// How long a join token is good for when nothing else was asked.
const DEFAULT_VALID_MILLIS: u64 = 60 * 60 * 1000;

/// A check copies the whole state: two at once would take the memory of two more.
static ONE_CHECK: Semaphore = Semaphore::const_new(1);

impl Service {
    /// The secret is made from the request id and a secret of the cloud, so that a retry shows the same token.
    pub(super) async fn join_token_issue(
        &self,
        request: Request<proto::IssueJoinTokenRequest>,
    ) -> Result<proto::IssueJoinTokenReply, ApiError> {
        let role = match request.get_ref().role.as_str() {
            "controller" => JoinRole::Controller,
            "agent" => JoinRole::Agent,
            other => return Err(ApiError::invalid(format!("role is '{other}', but must be controller or agent"))),
        };
        let id = access::request_of("IssueJoinToken", &request)?.id;
        let mut material = self.core.authority.key_pem.as_bytes().to_vec();
        material.extend_from_slice(&id.0.to_le_bytes());
        let secret = blake3::derive_key("trefoil join token of one request, version 1", &material);
        let controllers = self.core.addresses();
        let token = JoinToken { role, secret, controllers, ca_pem: self.core.identity.ca_pem.clone() };
        let digest = token.digest();
        let make = |_: &State, caller: &Caller, body: &proto::IssueJoinTokenRequest| {
            caller.must_be_operator()?;
            let valid_millis = if body.valid_millis == 0 { DEFAULT_VALID_MILLIS } else { body.valid_millis };
            Ok(Command::Operator(OperatorCommand::IssueJoinToken { token: digest, role, valid_millis }))
        };
        self.change("IssueJoinToken", &request, make).await?;
        Ok(proto::IssueJoinTokenReply { token: token.encode() })
    }

    pub(super) async fn quorum_survey(
        &self,
        request: Request<proto::QuorumStatusRequest>,
    ) -> Result<proto::QuorumStatusReply, ApiError> {
        access::caller(&self.core, &request).await?.must_be_operator()?;
        let status = self.core.replica.survey().await;
        let (cluster, names) = self.core.replica.read(|state| {
            let names: std::collections::BTreeMap<_, _> =
                state.controllers().values().map(|controller| (controller.id, controller.name.clone())).collect();
            (state.cluster().id.clone(), names)
        });
        let controller = |member: &raft::MemberStatus| proto::ControllerStatus {
            id: member.id.0,
            name: names.get(&member.id).cloned().unwrap_or_default(),
            address: member.address.clone(),
            role: match (member.reachable, member.role) {
                (false, _) => "unreachable",
                (true, Role::Leader) => "leader",
                (true, Role::Voter) => "voter",
                (true, Role::Learner) => "learner",
            }
            .into(),
            matched_index: member.matched.unwrap_or_default(),
            applied_index: member.applied.unwrap_or_default(),
            hash_index: member.hash.as_ref().map_or(0, |hash| hash.index),
            hash: member
                .hash
                .as_ref()
                .map(|hash| hash.hash.iter().map(|b| format!("{b:02x}")).collect())
                .unwrap_or_default(),
        };
        Ok(proto::QuorumStatusReply {
            cluster,
            answered_by: status.id.0,
            leader: status.leader.map_or(0, |leader| leader.0),
            term: status.term,
            last_index: status.last,
            committed_index: status.committed,
            applied_index: status.applied,
            controllers: status.members.iter().map(controller).collect(),
            snapshot_index: status.snapshot,
            hashes_agree: status.hashes_agree,
        })
    }

    /// Looks at a copy, so that only the copying holds `apply` up, and that on this controller alone.
    pub(super) async fn quorum_examine(
        &self,
        request: Request<proto::QuorumCheckRequest>,
    ) -> Result<proto::QuorumCheckReply, ApiError> {
        access::caller(&self.core, &request).await?.must_be_operator()?;
        let turn = ONE_CHECK.try_acquire();
        let _turn = turn.map_err(|_| ApiError::overloaded("another check runs on this controller"))?;
        self.core.linearize().await?;
        let core = self.core.clone();
        let examine = move || {
            let (state, index) = core.replica.read_indexed(|state, index| (state.clone(), index));
            let broken = |(rule, sentence): (&str, String)| proto::BrokenRule { rule: rule.into(), sentence };
            proto::QuorumCheckReply {
                rules: u32::try_from(invariant::INVARIANTS.len()).unwrap_or(u32::MAX),
                broken: invariant::broken(&state).map(broken).collect(),
                read_at: Some(proto::ReadAt { index, stale: false, age_millis: 0 }),
            }
        };
        let examined = tokio::task::spawn_blocking(examine).await;
        examined.map_err(|_| ApiError::internal("the check was cut short"))
    }

    pub(super) async fn quorum_add(&self, request: Request<proto::ControllerRef>) -> Result<proto::Done, ApiError> {
        access::caller(&self.core, &request).await?.must_be_operator()?;
        let id = ControllerId(request.into_inner().id);
        self.core.linearize().await?;
        let address = self.core.replica.read(|state| {
            let row = state.controllers().get(&id).filter(|controller| !controller.removed);
            row.map(|controller| controller.address.clone())
        });
        let address = address.ok_or_else(|| ApiError::not_found(format!("{id} has not joined, or was removed")))?;
        if !self.core.replica.members().contains_key(&id) {
            self.core.replica.add_learner(id, &address).await.map_err(membership_error)?;
        }
        self.core.replica.promote(id).await.map_err(membership_error)?;
        Ok(proto::Done {})
    }

    pub(super) async fn quorum_remove(&self, request: Request<proto::ControllerRef>) -> Result<proto::Done, ApiError> {
        access::caller(&self.core, &request).await?.must_be_operator()?;
        let id = ControllerId(request.into_inner().id);
        self.core.linearize().await?;
        let known = self.core.replica.read(|state| state.controllers().contains(&id));
        let member = self.core.replica.members().contains_key(&id);
        if !known && !member {
            return Err(ApiError::not_found(format!("controller '{id}' does not exist")));
        }
        if member && self.core.replica.members().len() == 1 {
            return Err(ApiError::new("in-use", format!("{id} is the only controller")));
        }
        // Out of the voters first: that may be refused, and then nothing has changed. Should the leader take it in again
        // before it is retired in the book, it lets it go again afterwards.
        if member {
            self.core.replica.remove(id).await.map_err(membership_error)?;
        }
        if known {
            let retire = Command::Planner(PlannerCommand::RetireController { controller: id });
            self.core.propose(Actor::System, None, retire).await?.applied?;
        }
        Ok(proto::Done {})
    }

    pub(super) async fn quorum_transfer(
        &self,
        request: Request<proto::ControllerRef>,
    ) -> Result<proto::Done, ApiError> {
        access::caller(&self.core, &request).await?.must_be_operator()?;
        self.core.replica.transfer(ControllerId(request.into_inner().id)).await.map_err(membership_error)?;
        Ok(proto::Done {})
    }
}

pub(crate) fn membership_error(error: MembershipError) -> ApiError {
    match error {
        MembershipError::NoQuorum => ApiError::no_quorum("no majority of the controllers answers; nothing was changed"),
        MembershipError::NotFound(id) => ApiError::not_found(format!("{id} is not a member of the quorum")),
        MembershipError::Timeout(what) => ApiError::timeout(format!("it did not end in time: {what}")),
        MembershipError::Refused(why) => ApiError::new("failed", why),
        MembershipError::Unknown => ApiError::timeout("the quorum did not confirm it in time; look at `quorum status`"),
        MembershipError::Stopped => ApiError::new("unavailable", "this controller is stopping"),
    }
}
