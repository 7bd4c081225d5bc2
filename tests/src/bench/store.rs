//! One connection to one member of either system: write a value, read a value, nothing else.

use std::time::Duration;

use anyhow::anyhow;
use api::{
    client::{Client, new_request_id},
    proto as trefoil_proto,
    proto::trefoil_client::TrefoilClient,
    tls,
};
use jepsen::cluster::Cluster;
use tonic::{Request, metadata::AsciiMetadataValue, transport::Channel};

use super::{TENANT, etcd::proto};

/// A request that takes longer failed: nobody waits longer for a page.
const TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub enum Store {
    /// As programs use it: follows the leader, and tries again.
    Client(Client),
    /// One attempt at one member.
    Trefoil {
        api: TrefoilClient<Channel>,
        token: AsciiMetadataValue,
    },
    Etcd {
        kv: proto::kv_client::KvClient<Channel>,
    },
}

/// Clients, each of which begins with another member.
///
/// # Errors
/// When an endpoint or the token is malformed.
pub fn clients(cluster: &Cluster, clients: usize) -> anyhow::Result<Vec<Store>> {
    (0..clients)
        .map(|number| {
            let access = cluster.access();
            let mut endpoints = cluster.endpoints();
            endpoints.rotate_left(number % cluster.size());
            Ok(Store::Client(Client::new(&endpoints, &access.ca_pem, &access.token)?.with_deadline(TIMEOUT)))
        })
        .collect()
}

/// Connections to all members in turn.
///
/// # Errors
/// When an endpoint or the token is malformed.
pub fn trefoil(cluster: &Cluster, connections: usize) -> anyhow::Result<Vec<Store>> {
    (0..connections)
        .map(|number| {
            let access = cluster.access();
            let channel = tls::connect(&cluster.endpoint(number % cluster.size()), tls::client_tls_ca(&access.ca_pem))?;
            let token = format!("Bearer {}", access.token).parse()?;
            Ok(Store::Trefoil { api: TrefoilClient::new(channel), token })
        })
        .collect()
}

fn key(number: usize) -> String {
    format!("key-{number:08}")
}

impl Store {
    /// # Errors
    /// With what the server or the transport said.
    pub async fn write(&mut self, number: usize, value: &str) -> anyhow::Result<()> {
        let tag = || trefoil_proto::SetTagRequest {
            tenant: TENANT.into(),
            key: key(number),
            value: value.to_owned(),
            expected_version: None,
        };
        let outcome = match self {
            Self::Client(client) => {
                let call = async |mut stub: TrefoilClient<Channel>, request| stub.set_tag(request).await;
                return Ok(client.mutate(new_request_id(), tag(), call).await.map(drop)?);
            }
            Self::Trefoil { api, token } => {
                let message = tag();
                let mut request = Request::new(message);
                request.metadata_mut().insert("authorization", token.clone());
                request.metadata_mut().insert("trefoil-request", uuid::Uuid::now_v7().to_string().parse()?);
                tokio::time::timeout(TIMEOUT, api.set_tag(request)).await?.map(|_| ())
            }
            Self::Etcd { kv } => {
                let message = proto::PutRequest { key: key(number).into(), value: value.into(), lease: 0 };
                tokio::time::timeout(TIMEOUT, kv.put(message)).await?.map(|_| ())
            }
        };
        outcome.map_err(|status| anyhow!("{}", status.message()))
    }

    /// Linearizable, or what that member has.
    ///
    /// # Errors
    /// With what the server or the transport said, or when the key is not there.
    pub async fn read(&mut self, number: usize, stale: bool) -> anyhow::Result<usize> {
        let get = || trefoil_proto::GetTagRequest { tenant: TENANT.into(), key: key(number), stale };
        let outcome = match self {
            Self::Client(client) => {
                let call = async |mut stub: TrefoilClient<Channel>, request| stub.get_tag(request).await;
                Ok(client.read(get(), call).await?.value.len())
            }
            Self::Trefoil { api, token } => {
                let message = get();
                let mut request = Request::new(message);
                request.metadata_mut().insert("authorization", token.clone());
                let reply = tokio::time::timeout(TIMEOUT, api.get_tag(request)).await?;
                reply.map(|tag| tag.into_inner().value.len())
            }
            Self::Etcd { kv } => {
                let message =
                    proto::RangeRequest { key: key(number).into(), serializable: stale, ..Default::default() };
                let reply = tokio::time::timeout(TIMEOUT, kv.range(message)).await?;
                reply.map(|range| range.into_inner().kvs.first().map_or(0, |kv| kv.value.len()))
            }
        };
        let length = outcome.map_err(|status| anyhow!("{}", status.message()))?;
        anyhow::ensure!(length > 0, "key {number} is not there");
        Ok(length)
    }
}
