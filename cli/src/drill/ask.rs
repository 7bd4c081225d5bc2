//! The questions and requests of drills, each to whichever controller answers.

use std::time::Duration;

use api::{
    client::{Client, new_request_id},
    error::ApiError,
    proto::{GetVmRequest, Image, ListRequest, ListVmsRequest, Node, QuorumStatusReply, QuorumStatusRequest, Vm},
};

/// The largest page.
const PAGE: u32 = 1000;

/// `ask!(client, get_vm, body)`: the reply of a call that changes nothing.
macro_rules! ask {
    ($client:expr, $method:ident, $body:expr) => {
        $client.read($body, |mut stub, request| async move { stub.$method(request).await }).await
    };
}

/// `tell!(client, create_vm, body)`: the reply of a call that changes something.
macro_rules! tell {
    ($client:expr, $method:ident, $body:expr) => {
        $client
            .mutate(
                api::client::new_request_id(),
                $body,
                |mut stub, request| async move { stub.$method(request).await },
            )
            .await
    };
}

pub(super) use {ask, tell};

pub async fn status(client: &Client) -> Result<QuorumStatusReply, ApiError> {
    ask!(client, quorum_status, QuorumStatusRequest {})
}

/// What one controller says; `None` when it does not answer within `limit`.
pub async fn status_of(client: &Client, endpoint: usize, limit: Duration) -> Option<QuorumStatusReply> {
    let request = client.request(None, QuorumStatusRequest {}, limit);
    let mut stub = client.stub(endpoint);
    Some(tokio::time::timeout(limit, stub.quorum_status(request)).await.ok()?.ok()?.into_inner())
}

pub async fn nodes(client: &Client) -> Result<Vec<Node>, ApiError> {
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let body = ListRequest { limit: PAGE, after, ..ListRequest::default() };
        let page = ask!(client, list_nodes, body)?;
        all.extend(page.nodes);
        if page.next.is_empty() {
            return Ok(all);
        }
        after = page.next;
    }
}

pub async fn images(client: &Client, tenant: &str) -> Result<Vec<Image>, ApiError> {
    let (mut all, mut after) = (Vec::new(), String::new());
    loop {
        let body = ListRequest { tenant: tenant.into(), limit: PAGE, after, ..ListRequest::default() };
        let page = ask!(client, list_images, body)?;
        all.extend(page.images);
        if page.next.is_empty() {
            return Ok(all);
        }
        after = page.next;
    }
}

/// Of all tenants.
pub async fn vms(client: &Client) -> Result<Vec<Vm>, ApiError> {
    Ok(client.all_vms(ListVmsRequest::default()).await?.vms)
}

pub async fn vm(client: &Client, tenant: &str, vm: &str) -> Result<Vm, ApiError> {
    let body = GetVmRequest { tenant: tenant.into(), vm: vm.into(), stale: false };
    ask!(client, get_vm, body)
}

/// What is the same under another word: there already, or gone already.
pub fn unless(code: &str, outcome: Result<(), ApiError>) -> Result<(), ApiError> {
    match outcome {
        Err(error) if error.code == code => Ok(()),
        other => other,
    }
}

/// One write of a tag under an id of its own; its version.
pub async fn set_tag(client: &Client, tenant: &str, key: &str, value: &str) -> Result<u64, ApiError> {
    let body = api::proto::SetTagRequest {
        tenant: tenant.into(),
        key: key.into(),
        value: value.into(),
        expected_version: None,
    };
    let call =
        |mut stub: api::proto::trefoil_client::TrefoilClient<_>, request| async move { stub.set_tag(request).await };
    Ok(client.mutate(new_request_id(), body, call).await?.version)
}
