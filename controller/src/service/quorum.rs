//! The quorum: tokens to join, who is in it, who leads it.

use api::{
    error::ApiError,
    proto,
    quorum_backup::{self, Header},
    token::JoinToken,
};
use model::{Actor, Command, ControllerId, JoinRole, OperatorCommand, PlannerCommand, State, invariant};
use raft::{MembershipError, Role};
use tokio::sync::Semaphore;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Request;

use super::{Flow, Service};
use crate::{access, access::Caller, core::half_done};

/// How long a join token is good for when nothing else was asked.
const DEFAULT_VALID_MILLIS: u64 = 60 * 60 * 1000;

/// Pieces of a backup between its making and the network.
const PIECES_AHEAD: usize = 4;

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
        let id = access::request_id(request.metadata())?;
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
        access::caller(&request)?.must_be_operator()?;
        let status = self.core.replica.survey().await;
        let (cluster, names, epoch, level) = self.core.replica.read(|state| {
            let names: std::collections::BTreeMap<_, _> =
                state.controllers().values().map(|controller| (controller.id, controller.name.clone())).collect();
            let quorum = state.quorum();
            (state.cluster().id.clone(), names, quorum.epoch, quorum.level)
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
            version: member.version.clone().unwrap_or_default(),
            level: member.knows.unwrap_or_default(),
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
            epoch,
            level,
        })
    }

    /// Looks at a copy, so that only the copying holds `apply` up, and that on this controller alone.
    pub(super) async fn quorum_examine(
        &self,
        request: Request<proto::QuorumCheckRequest>,
    ) -> Result<proto::QuorumCheckReply, ApiError> {
        access::caller(&request)?.must_be_operator()?;
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
                read_at: Some(proto::ReadAt { index, stale: false, age_millis: 0, time_millis: state.now().0 }),
            }
        };
        let examined = tokio::task::spawn_blocking(examine).await;
        examined.map_err(|_| ApiError::internal("the check was cut short"))
    }

    /// A copy at one index, verified as a reader of the file would, before its first byte is sent.
    pub(super) async fn quorum_back_up(
        &self,
        request: Request<proto::BackUpQuorumRequest>,
    ) -> Result<Flow<proto::Chunk>, ApiError> {
        let caller = access::caller(&request)?;
        caller.must_be_operator()?;
        let turn = ONE_CHECK.try_acquire();
        let turn = turn.map_err(|_| ApiError::overloaded("another check or backup runs on this controller"))?;
        self.core.linearize().await?;
        let core = self.core.clone();
        let term = core.replica.leadership().term;
        let copy = move || {
            let made_at = core.replica.now();
            let (mut state, index) = core.replica.read_indexed(|state, index| (state.clone(), index));
            state.drain_changes();
            invariant::check(&state)
                .map_err(|broken| ApiError::new("failed", format!("the state is not sound: {broken}")))?;
            let header = Header {
                cluster: state.cluster().id.clone(),
                epoch: state.quorum().epoch,
                level: state.quorum().level,
                index,
                term,
                hash: state.hash(),
                made_at,
                rows: state.rows().count() as u64,
                ca_pem: core.authority.ca_pem.clone(),
                ca_key_pem: core.authority.key_pem.clone(),
            };
            Ok::<_, ApiError>((header, state))
        };
        let copied = tokio::task::spawn_blocking(copy).await;
        let (header, state) = copied.map_err(|_| ApiError::internal("the backup was cut short"))??;
        tracing::info!(user = caller.name, index = header.index, rows = header.rows, "the quorum is backed up");
        let (sender, pieces) = tokio::sync::mpsc::channel(PIECES_AHEAD);
        tokio::task::spawn_blocking(move || {
            let _turn = turn;
            for piece in quorum_backup::pieces(&header, &state) {
                // Whoever asked may have gone.
                if sender.blocking_send(Ok(proto::Chunk { data: piece.into() })).is_err() {
                    return;
                }
            }
        });
        Ok(Box::pin(ReceiverStream::new(pieces)))
    }

    /// To the highest level that every member knows; each must answer.
    pub(super) async fn quorum_upgrade(
        &self,
        request: Request<proto::UpgradeQuorumRequest>,
    ) -> Result<proto::UpgradeQuorumReply, ApiError> {
        access::caller(&request)?.must_be_operator()?;
        self.core.linearize().await?;
        let from = self.core.replica.read(|state| state.quorum().level);
        let level = self.core.replica.survey().await.common_level().map_err(|silent| {
            ApiError::new("failed", format!("{silent} does not say which level it knows: start it, or remove it"))
        })?;
        if level > from {
            let make = |_: &State, _: &Caller, _: &proto::UpgradeQuorumRequest| {
                Ok(Command::Operator(OperatorCommand::RaiseLevel { level }))
            };
            let (_, index, _) = self.change("UpgradeQuorum", &request, make).await?;
            self.core.applied(index).await?;
        }
        Ok(proto::UpgradeQuorumReply { from, to: level.max(from) })
    }

    pub(super) async fn quorum_add(&self, request: Request<proto::ControllerRef>) -> Result<proto::Done, ApiError> {
        access::caller(&request)?.must_be_operator()?;
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
        let promoted = self.core.replica.promote(id).await.map_err(membership_error);
        promoted.map_err(|error| half_done(&format!("{id} is a member without a vote"), error))?;
        Ok(proto::Done {})
    }

    pub(super) async fn quorum_remove(&self, request: Request<proto::ControllerRef>) -> Result<proto::Done, ApiError> {
        access::caller(&request)?.must_be_operator()?;
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
            match self.core.replica.remove(id).await {
                // Somebody else did it, or an earlier try of this call.
                Ok(()) | Err(MembershipError::NotFound(_)) => {}
                Err(error) => return Err(membership_error(error)),
            }
        }
        if known {
            let retire = Command::Planner(PlannerCommand::RetireController { controller: id });
            let retired = self.core.propose(Actor::System, None, retire).await;
            retired.map_err(|error| half_done(&format!("{id} is out of the quorum"), error))?.applied?;
        }
        Ok(proto::Done {})
    }

    pub(super) async fn quorum_transfer(
        &self,
        request: Request<proto::ControllerRef>,
    ) -> Result<proto::Done, ApiError> {
        access::caller(&request)?.must_be_operator()?;
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
