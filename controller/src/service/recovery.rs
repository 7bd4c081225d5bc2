//! Lost hosts, the brake, and what waits for a host or for another try.

use std::collections::BTreeMap;

use api::{error::ApiError, proto};
use model::{
    Brake, Command, Held, Node, NodeId, NodeState, OperatorCommand, Refounding, State, Telemetry, Timestamp, VmId,
};
use tonic::Request;

use super::Service;
use crate::{
    access,
    access::Caller,
    probe::{self, Probes},
    view,
};

/// What one answer lists at most; more waiting machines than this are one problem, not many.
const MOST_LISTED: usize = 1_000;

impl Service {
    pub(super) async fn recovery_get(
        &self,
        request: Request<proto::RecoveryRequest>,
    ) -> Result<proto::RecoveryStatus, ApiError> {
        access::caller(&request)?.must_be_operator()?;
        let stale = request.into_inner().stale;
        let (status, read_at) = self.core.read(stale.into(), |state| self.recovery_shown(state)).await?;
        Ok(proto::RecoveryStatus { read_at: Some(read_at), ..status })
    }

    pub(super) async fn recovery_arm(
        &self,
        request: Request<proto::ArmRecoveryRequest>,
    ) -> Result<proto::RecoveryStatus, ApiError> {
        let make = |_: &State, caller: &Caller, body: &proto::ArmRecoveryRequest| {
            caller.must_be_operator()?;
            Ok(Command::Operator(OperatorCommand::ArmRecovery { armed: body.armed }))
        };
        let (_, index, _) = self.change("ArmRecovery", &request, make).await?;
        self.core.applied(index).await?;
        Ok(self.core.replica.read(|state| self.recovery_shown(state)))
    }

    fn recovery_shown(&self, state: &State) -> proto::RecoveryStatus {
        let suspects = self.core.hear(|ears| suspects(state, ears, &self.core.probes));
        let drifting = state.nodes().values().filter(|node| node.clock_drifts).map(|node| node.name.clone()).collect();
        proto::RecoveryStatus { suspects, drifting, ..shown(state) }
    }

    pub(super) async fn refounding_end(
        &self,
        request: Request<proto::EndRefoundingRequest>,
    ) -> Result<proto::RecoveryStatus, ApiError> {
        let make = |_: &State, caller: &Caller, _: &proto::EndRefoundingRequest| {
            caller.must_be_operator()?;
            Ok(Command::Operator(OperatorCommand::EndRefounding))
        };
        let (_, index, _) = self.change("EndRefounding", &request, make).await?;
        self.core.applied(index).await?;
        Ok(self.core.replica.read(|state| self.recovery_shown(state)))
    }
}

/// Nodes that are not heard, and what a closer look at them said.
fn suspects(state: &State, ears: &Telemetry, probes: &Probes) -> Vec<proto::SuspectNode> {
    let missed = state.nodes().values().filter(|node| probe::is_suspect(ears, node));
    let row = |node: &Node| {
        let proto::Node { name, state, last_beat_age_millis, .. } = view::node(state, ears, node);
        let verdict = probes.of(node.id).as_ref().map(probe::verdict).unwrap_or_default();
        proto::SuspectNode { name, state, last_beat_age_millis, verdict }
    };
    missed.take(MOST_LISTED).map(row).collect()
}

fn refounding(state: &State, open: &Refounding) -> proto::Refounding {
    let name = |id: &NodeId| state.nodes().get(id).map_or_else(|| id.to_string(), |node| node.name.clone());
    let of_node = |(node, held): (&NodeId, &BTreeMap<VmId, Held>)| {
        let node = name(node);
        let orphan = |(vm, held): (&VmId, &Held)| proto::Orphan {
            vm: vm.to_string(),
            node: node.clone(),
            epoch: held.epoch,
            phase: format!("{:?}", held.phase).to_lowercase(),
        };
        held.iter().map(orphan).collect::<Vec<_>>()
    };
    proto::Refounding {
        at_millis: open.at.0,
        awaited: open.awaited.iter().map(name).collect(),
        orphans: open.orphans.iter().flat_map(of_node).take(MOST_LISTED).collect(),
    }
}

fn shown(state: &State) -> proto::RecoveryStatus {
    let (brake, frozen_at, frozen_lost) = match state.cluster().brake {
        Brake::Armed => ("armed", Timestamp::default(), 0),
        Brake::Disarmed => ("disarmed", Timestamp::default(), 0),
        Brake::Frozen { at, lost } => ("frozen", at, lost),
    };
    let lost = state.nodes().values().filter(|node| node.state == NodeState::Lost);
    let waiting = state.waiting().take(MOST_LISTED).map(|vm| proto::Waiting {
        id: vm.id.to_string(),
        tenant: view::tenant_name(state, vm.tenant),
        name: vm.name.clone(),
        status: vm.status().to_string(),
        reason: vm.reason.clone(),
        attempts: vm.attempts.into(),
        next_try_millis: vm.retry_at.unwrap_or_default().0,
        priority: vm.priority.into(),
    });
    proto::RecoveryStatus {
        brake: brake.into(),
        frozen_at_millis: frozen_at.0,
        frozen_lost,
        lost: lost
            .map(|node| proto::LostNode {
                name: node.name.clone(),
                since_millis: node.changed_at.0,
                vms: state.vm_count_on_node(node.id) as u64,
                maintenance: node.maintenance,
            })
            .collect(),
        waiting: waiting.collect(),
        read_at: None,
        suspects: Vec::new(),
        drifting: Vec::new(),
        refounding: state.quorum().refounding.as_ref().map(|open| refounding(state, open)),
    }
}
