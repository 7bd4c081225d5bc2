//! Bytes between this controller and the nodes: image uploads to all replicas at once, downloads, console logs.

use std::{pin::Pin, time::Duration};

use api::{
    error::ApiError,
    proto::{self, import_image_request::Part, node_data_client::NodeDataClient, put_image_request},
    tls,
};
use model::{Digest, NodeId, VmId};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Status, Streaming, transport::Channel};

use crate::core::Core;

pub(crate) struct Target {
    pub node: NodeId,
    pub address: String,
}

/// Chunks between the reader and each node; the slowest node sets the pace, nobody buffers an image.
const CHUNKS_AHEAD: usize = 4;
/// A stream on which nothing moves for this long is broken.
const STALL: Duration = Duration::from_secs(60);
/// After the last byte each node syncs and verifies what it has.
const SYNC: Duration = Duration::from_secs(300);
const CONSOLE: Duration = Duration::from_secs(10);

pub(crate) fn node(core: &Core, address: &str) -> Result<NodeDataClient<Channel>, ApiError> {
    let channel = tls::connect(address, tls::client_tls(&core.identity))
        .map_err(|e| ApiError::internal(format!("a node's address '{address}' cannot be used: {e}")))?;
    Ok(NodeDataClient::new(channel))
}

/// Streams the image to every target. Returns when all of them have it, synced and verified against the digest; one
/// failure fails the whole, and what the others have is forgotten by them because nothing refers to it.
pub(crate) async fn upload(
    core: &Core,
    targets: &[Target],
    digest: Digest,
    size_bytes: u64,
    mut parts: Streaming<proto::ImportImageRequest>,
) -> Result<(), ApiError> {
    let mut senders = Vec::new();
    let mut puts = JoinSet::new();
    for target in targets {
        let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
        let header = proto::PutImageHeader { digest: digest.to_string(), size_bytes };
        let first = proto::PutImageRequest { part: Some(put_image_request::Part::Header(header)) };
        let stream = tokio_stream::once(first).chain(ReceiverStream::new(receiver));
        let mut client = node(core, &target.address)?;
        let name = target.node;
        puts.spawn(async move { client.put_image(stream).await.map_err(|status| on_node(name, status)) });
        senders.push(sender);
    }
    // A node that has the bytes already answers at once, whatever is sent; that nobody gets an image by knowing its
    // digest alone, they are checked here too.
    let mut seen = blake3::Hasher::new();
    let mut sent = 0;
    while let Some(message) =
        timeout(STALL, parts.message()).await.map_err(|_| ApiError::timeout("the upload stalled"))??
    {
        let Some(Part::Data(data)) = message.part else {
            return Err(ApiError::invalid("a header came twice, but only the first message may be one"));
        };
        sent += data.len() as u64;
        if sent > size_bytes {
            break;
        }
        seen.update(&data);
        let mut listening = Vec::with_capacity(senders.len());
        for sender in senders {
            let part = Some(put_image_request::Part::Data(data.clone()));
            match timeout(STALL, sender.send(proto::PutImageRequest { part })).await {
                Ok(Ok(())) => listening.push(sender),
                // It has answered: that it has the image, or what its trouble is. Heard below.
                Ok(Err(_)) => {}
                Err(_) => return Err(ApiError::new("unavailable", "a node stopped taking the image")),
            }
        }
        senders = listening;
    }
    if sent != size_bytes {
        return Err(ApiError::invalid(format!(
            "size_bytes is '{size_bytes}', but must be what was sent ({sent} bytes)"
        )));
    }
    if *seen.finalize().as_bytes() != digest.0 {
        return Err(ApiError::invalid(format!("digest is '{digest}', but must be that of the bytes that were sent")));
    }
    drop(senders);
    while let Some(put) = timeout(SYNC, puts.join_next())
        .await
        .map_err(|_| ApiError::timeout("a node did not confirm the image in time"))?
    {
        put.map_err(|e| ApiError::internal(format!("an upload to a node ended: {e}")))??;
    }
    Ok(())
}

fn on_node(node: NodeId, status: Status) -> ApiError {
    let error = ApiError::from(status);
    // What the file itself is guilty of is the caller's error; a node in trouble is nobody's, and can be tried again.
    let code = if error.code == "invalid-argument" { "invalid-argument" } else { "unavailable" };
    ApiError::new(code, format!("{node}: {}", error.message))
}

/// From the first holder that begins to answer.
pub(crate) async fn download(
    core: &Core,
    digest: Digest,
    holders: &[String],
) -> Result<Pin<Box<dyn Stream<Item = Result<proto::Chunk, Status>> + Send>>, ApiError> {
    let mut last = ApiError::new("unavailable", "the image has no replica on a node of this cloud");
    for address in holders {
        let request = proto::GetImageBytesRequest { digest: digest.to_string(), offset: 0 };
        match timeout(STALL, node(core, address)?.get_image_bytes(request)).await {
            Ok(Ok(stream)) => return Ok(Box::pin(stream.into_inner())),
            Ok(Err(status)) => last = ApiError::new("unavailable", format!("{address}: {}", status.message())),
            Err(_) => last = ApiError::new("unavailable", format!("{address} does not answer")),
        }
    }
    Err(last)
}

pub(crate) async fn console_log(
    core: &Core,
    address: &str,
    vm: VmId,
    max_bytes: u32,
) -> Result<proto::ConsoleLogReply, ApiError> {
    let mut request = Request::new(proto::GuestConsoleLogRequest { vm: vm.to_string(), max_bytes });
    request.set_timeout(CONSOLE);
    match timeout(CONSOLE, node(core, address)?.guest_console_log(request)).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => {
            Err(ApiError::new("unavailable", format!("the node's agent answered: {}", status.message())))
        }
        Err(_) => Err(ApiError::new("unavailable", "the node's agent does not answer")),
    }
}
