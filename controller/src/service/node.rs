//! Hosts.

use std::ops::Bound;

use api::{error::ApiError, proto};
use model::{Command, NodeId, OperatorCommand, State};
use tonic::Request;

use super::{Service, page};
use crate::{access, access::Caller, name, view};

impl Service {
    pub(super) async fn node_list(
        &self,
        request: Request<proto::ListRequest>,
    ) -> Result<proto::ListNodesReply, ApiError> {
        access::caller(&self.core, &request).await?.must_be_operator()?;
        let body = request.into_inner();
        let limit = page::limit(body.limit)?;
        let after: NodeId = page::after(&body.after)?;
        let look = |state: &State| {
            let rows = state.nodes().range((Bound::Excluded(after), Bound::Unbounded)).map(|(_, node)| node);
            let (rows, next) = page::cut(rows, limit, |node| node.id.to_string());
            self.core
                .hear(|ears| (rows.into_iter().map(|node| view::node(state, ears, node)).collect::<Vec<_>>(), next))
        };
        let stale = body.consistency.unwrap_or_default().stale;
        let ((nodes, next), read_at) = self.core.read(stale.into(), look).await?;
        Ok(proto::ListNodesReply { nodes, next, read_at: Some(read_at) })
    }

    pub(super) async fn node_get(&self, request: Request<proto::NamedRef>) -> Result<proto::Node, ApiError> {
        access::caller(&self.core, &request).await?.must_be_operator()?;
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

    fn node_shown(&self, state: &State, name: &str) -> Result<proto::Node, ApiError> {
        let node = name::node(state, name)?;
        Ok(self.core.hear(|ears| view::node(state, ears, node)))
    }
}

pub(super) fn remove(state: &State, caller: &Caller, body: &proto::RemoveNodeRequest) -> Result<Command, ApiError> {
    caller.must_be_operator()?;
    let node = name::node(state, &body.name)?.id;
    Ok(Command::Operator(OperatorCommand::RemoveNode { node, force: body.force }))
}
