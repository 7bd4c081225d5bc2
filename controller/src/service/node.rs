//! Hosts.

use std::ops::Bound;

use api::{error::ApiError, proto};
use model::{Command, NodeId, OperatorCommand, State, plan::moves};
use tonic::Request;

use super::{Service, page};
use crate::{access, access::Caller, core::boottime, name, probe::Probed, view};

/// More than a host has machines, and few enough for one message.
const MOST_LEFT: usize = 1_000;

impl Service {
    pub(super) async fn node_list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::ListNodesReply, ApiError> {
        access::caller(&request)?.must_be_operator()?;
        let body = request.into_inner();
        let limit = page::limit(body.limit)?;
        let after: NodeId = page::after(&body.after)?;
        let look = |state: &State| {
            let rows = state.nodes().range((Bound::Excluded(after), Bound::Unbounded)).map(|(_, node)| node);
            let (rows, next) = page::cut(rows, |_| true, limit, |node| node.id.to_string());
            self.core
                .hear(|ears| (rows.into_iter().map(|node| view::node(state, ears, node)).collect::<Vec<_>>(), next))
        };
        let stale = body.consistency.unwrap_or_default().stale;
        let ((nodes, next), read_at) = self.core.read(stale.into(), look).await?;
        Ok(proto::ListNodesReply { nodes, next, read_at: Some(read_at) })
    }

    pub(super) async fn node_get(&self, request: Request<proto::NamedRef>) -> Result<proto::Node, ApiError> {
        access::caller(&request)?.must_be_operator()?;
        let body = request.into_inner();
        let (node, _) = self.core.read(body.stale.into(), |state| self.node_shown(state, &body.name)).await?;
        node
    }

    pub(super) async fn node_cordon(
        &self,
        request: Request<proto::CordonNodeRequest>,
    ) -> Result<proto::Node, ApiError> {
        let make = |state: &State, caller: &Caller, body: &proto::CordonNodeRequest| {
            caller.must_be_operator()?;
            let node = name::node(state, &body.name)?.id;
            Ok(Command::Operator(OperatorCommand::CordonNode { node, cordoned: body.cordoned }))
        };
        let (_, index, _) = self.change("CordonNode", &request, make).await?;
        self.core.applied(index).await?;
        self.core.replica.read(|state| self.node_shown(state, &request.get_ref().name))
    }

    pub(super) async fn node_maintain(
        &self,
        request: Request<proto::MaintainNodeRequest>,
    ) -> Result<proto::Node, ApiError> {
        let make = |state: &State, caller: &Caller, body: &proto::MaintainNodeRequest| {
            caller.must_be_operator()?;
            let node = name::node(state, &body.name)?.id;
            Ok(Command::Operator(OperatorCommand::MaintainNode { node, maintenance: body.maintenance }))
        };
        let (_, index, _) = self.change("MaintainNode", &request, make).await?;
        self.core.applied(index).await?;
        self.core.replica.read(|state| self.node_shown(state, &request.get_ref().name))
    }

    pub(super) async fn node_drain(&self, request: Request<proto::NamedRef>) -> Result<proto::DrainStatus, ApiError> {
        let make = |state: &State, caller: &Caller, body: &proto::NamedRef| {
            caller.must_be_operator()?;
            Ok(Command::Operator(OperatorCommand::DrainNode { node: name::node(state, &body.name)?.id }))
        };
        let (_, index, _) = self.change("DrainNode", &request, make).await?;
        self.core.applied(index).await?;
        self.core.replica.read(|state| self.drain_shown(state, &request.get_ref().name))
    }

    pub(super) async fn drain_get(&self, request: Request<proto::NamedRef>) -> Result<proto::DrainStatus, ApiError> {
        access::caller(&request)?.must_be_operator()?;
        let body = request.into_inner();
        let (status, read_at) = self.core.read(body.stale.into(), |state| self.drain_shown(state, &body.name)).await?;
        status.map(|status| proto::DrainStatus { read_at: Some(read_at), ..status })
    }

    pub(super) async fn moves_suggest(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::SuggestMovesReply, ApiError> {
        access::caller(&request)?.must_be_operator()?;
        let stale = request.get_ref().consistency.unwrap_or_default().stale;
        let look = |state: &State| moves::rebalance(state).iter().map(|next| view::suggestion(state, next)).collect();
        let (moves, read_at) = self.core.read(stale.into(), look).await?;
        Ok(proto::SuggestMovesReply { moves, read_at: Some(read_at) })
    }

    fn drain_shown(&self, state: &State, name: &str) -> Result<proto::DrainStatus, ApiError> {
        let node = name::node(state, name)?;
        Ok(self.core.hear(|ears| {
            let left = moves::left_on(state, ears, node.id, state.now());
            let left = left.iter().take(MOST_LEFT).map(|left| view::left(state, ears, left)).collect();
            proto::DrainStatus { node: Some(view::node(state, ears, node)), left, read_at: None }
        }))
    }

    fn node_shown(&self, state: &State, name: &str) -> Result<proto::Node, ApiError> {
        let node = name::node(state, name)?;
        let shown = self.core.hear(|ears| view::node(state, ears, node));
        let found = self.core.probes.of(node.id);
        let age_millis = |probed: &Probed| boottime().saturating_sub(probed.at) / 1_000_000;
        let probe = |(from, found): &(String, Result<(), String>), age_millis| {
            let reason = found.clone().err().unwrap_or_default();
            proto::Probe { from: from.clone(), reason, age_millis }
        };
        let probes = found.iter().flat_map(|probed| probed.by.iter().map(|found| probe(found, age_millis(probed))));
        Ok(proto::Node { probes: probes.collect(), ..shown })
    }
}

pub(super) fn remove(state: &State, caller: &Caller, body: &proto::RemoveNodeRequest) -> Result<Command, ApiError> {
    caller.must_be_operator()?;
    let node = name::node(state, &body.name)?.id;
    Ok(Command::Operator(OperatorCommand::RemoveNode { node, force: body.force }))
}
