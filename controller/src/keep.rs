//! Keeps the quorum as the book of controllers says: who has joined becomes learner, then voter; who was removed leaves.
//!
//! The state carries the work, so that it goes on under the next leader.

use std::time::Duration;

use api::{proto, proto::trefoil_client::TrefoilClient, tls};
use model::ControllerId;
use raft::Role;
use tokio::time::{sleep, timeout};

use crate::core::Core;

const PAUSE: Duration = Duration::from_millis(500);
const PROBE: Duration = Duration::from_secs(2);

pub(crate) async fn keep(core: &Core) {
    loop {
        sleep(PAUSE).await;
        if let Err(error) = core.replica.settle_membership().await {
            tracing::warn!(%error, "a change of the quorum's members is still half made");
        }
        let members = core.replica.status().members;
        let (joined, removed) = core.replica.read(|state| {
            let (removed, joined): (Vec<_>, Vec<_>) =
                state.controllers().values().cloned().partition(|row| row.removed);
            (joined, removed)
        });
        for row in joined {
            let role = members.iter().find(|member| member.id == row.id).map(|member| member.role);
            if !matches!(role, Some(Role::Leader | Role::Voter)) {
                take_in(core, row.id, &row.address, role.is_some()).await;
            }
        }
        for row in removed.iter().filter(|row| members.iter().any(|member| member.id == row.id)) {
            if let Err(error) = core.replica.remove(row.id).await {
                tracing::warn!(controller = %row.id, %error, "a removed controller could not leave the quorum yet");
            }
        }
    }
}

async fn take_in(core: &Core, id: ControllerId, address: &str, learner: bool) {
    if !answers(core, address).await {
        return;
    }
    if !learner && let Err(error) = core.replica.add_learner(id, address).await {
        tracing::warn!(controller = %id, %error, "a controller that joined could not be caught up yet");
        return;
    }
    match core.replica.promote(id).await {
        Ok(()) => tracing::info!(controller = %id, address, "a controller became a voter"),
        Err(error) => tracing::warn!(controller = %id, %error, "a learner could not become a voter yet"),
    }
}

/// A learner that does not run yet would only be waited for; any answer, even a refusal, says that it runs.
async fn answers(core: &Core, address: &str) -> bool {
    let Ok(channel) = tls::connect(address, tls::client_tls(&core.identity)) else { return false };
    let mut client = TrefoilClient::new(channel);
    match timeout(PROBE, client.quorum_status(proto::QuorumStatusRequest {})).await {
        Ok(Ok(_)) => true,
        Ok(Err(status)) => status.code() == tonic::Code::Unauthenticated,
        Err(_) => false,
    }
}
