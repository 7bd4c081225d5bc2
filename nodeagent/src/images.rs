//! Image bytes on their way into this host's store: from another host that has a replica, or from whoever puts them.
//!
//! Every byte is hashed on the way, a broken transfer goes on where it ended, and with the next source when one
//! fails. Deliberately not here: which images the host should have.

use std::{path::PathBuf, time::Duration};

use api::{
    proto::{GetImageBytesRequest, node_data_client::NodeDataClient},
    tls::{Identity, client_tls, connect},
};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use model::{Digest, ImageWish};
use storage::images::{Begun, ImageError, ImageStore, Incoming};
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};
use tonic::Status;

/// Bytes in one message: large enough to be cheap, small enough that a few are under way in any memory.
pub const CHUNK_BYTES: usize = 256 << 10;
/// Chunks between network and disk: 2 MB, so that neither waits for the other's short pauses.
pub const CHUNKS_UNDER_WAY: usize = 8;
/// A sender that is silent for this long is given up; disks and hosts under load pause for seconds, not for this long.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error(transparent)]
    Store(#[from] ImageError),
    #[error("no host has a good copy")]
    NoSource,
    #[error("{0}")]
    Sources(String),
    #[error("a blocking task was cut short")]
    Cancelled,
}

/// Gets an image from one of its sources. `progress` is told how many bytes are there.
///
/// # Errors
/// When none of the sources gave the right bytes, or the store refuses them.
pub async fn fetch(
    store: &ImageStore,
    identity: &Identity,
    wish: &ImageWish,
    progress: impl Fn(u64) + Clone + Send + 'static,
) -> Result<PathBuf, TransferError> {
    let mut failed = Vec::new();
    for source in &wish.sources {
        let incoming = match begin(store, wish.digest, wish.size_bytes).await? {
            Begun::Held(path) => return Ok(path),
            Begun::Writing(incoming) => incoming,
        };
        match fetch_from(source, identity, wish.digest, incoming, progress.clone()).await {
            Ok(incoming) if incoming.is_complete() => match finish(incoming).await {
                // The partial may have begun with another source's bytes, so this one may be good yet.
                Err(error @ TransferError::Store(ImageError::Damaged { .. })) => {
                    failed.push(format!("{source}: {error}"))
                }
                other => return other,
            },
            Ok(incoming) => {
                failed.push(format!("{source}: it ended after {} of {} bytes", incoming.offset(), wish.size_bytes))
            }
            Err(error) => failed.push(format!("{source}: {error}")),
        }
    }
    // It may have been put here meanwhile, or all along.
    if let Begun::Held(path) = begin(store, wish.digest, wish.size_bytes).await? {
        return Ok(path);
    }
    Err(if failed.is_empty() { TransferError::NoSource } else { TransferError::Sources(failed.join("; ")) })
}

async fn fetch_from(
    source: &str,
    identity: &Identity,
    digest: Digest,
    incoming: Incoming,
    progress: impl Fn(u64) + Send + 'static,
) -> Result<Incoming, TransferError> {
    let unusable = |error: String| TransferError::Sources(error);
    let channel = connect(source, client_tls(identity)).map_err(|error| unusable(error.to_string()))?;
    let request = GetImageBytesRequest { digest: digest.to_string(), offset: incoming.offset() };
    let mut client = NodeDataClient::new(channel);
    let stream = match timeout(IDLE_TIMEOUT, client.get_image_bytes(request)).await {
        Ok(Ok(response)) => response.into_inner(),
        Ok(Err(status)) => return Err(unusable(api::error::ApiError::from(status).to_string())),
        Err(_) => return Err(unusable("no answer in time".into())),
    };
    let chunks = stream.map(|chunk| chunk.map(|chunk| chunk.data));
    let (incoming, outcome) = receive(incoming, Box::pin(chunks), progress).await?;
    if let Err(status) = outcome {
        tracing::debug!(source, %digest, %status, "a transfer broke off and goes on elsewhere");
    }
    Ok(incoming)
}

/// Writes what comes until the stream ends or breaks; gives back what is there, and why it broke.
///
/// # Errors
/// When the store cannot take the bytes.
pub async fn receive(
    mut incoming: Incoming,
    mut chunks: impl Stream<Item = Result<Bytes, Status>> + Unpin,
    progress: impl Fn(u64) + Send + 'static,
) -> Result<(Incoming, Result<(), Status>), TransferError> {
    let (to_disk, mut arrived) = mpsc::channel::<Bytes>(CHUNKS_UNDER_WAY);
    let writer = spawn_blocking(move || {
        while let Some(bytes) = arrived.blocking_recv() {
            incoming.write(&bytes)?;
            progress(incoming.offset());
        }
        Ok::<_, ImageError>(incoming)
    });
    let outcome = loop {
        match timeout(IDLE_TIMEOUT, chunks.next()).await {
            Err(_) => break Err(Status::deadline_exceeded("the sender fell silent")),
            Ok(None) => break Ok(()),
            Ok(Some(Err(status))) => break Err(status),
            Ok(Some(Ok(bytes))) => {
                if to_disk.send(bytes).await.is_err() {
                    // The writer ended early, and says why below.
                    break Ok(());
                }
            }
        }
    };
    drop(to_disk);
    let incoming = writer.await.map_err(|_| TransferError::Cancelled)??;
    Ok((incoming, outcome))
}

/// # Errors
/// As `ImageStore::begin`.
pub async fn begin(store: &ImageStore, digest: Digest, size_bytes: u64) -> Result<Begun, TransferError> {
    let store = store.clone();
    Ok(spawn_blocking(move || store.begin(digest, size_bytes)).await.map_err(|_| TransferError::Cancelled)??)
}

/// # Errors
/// As `Incoming::finish`.
pub async fn finish(incoming: Incoming) -> Result<PathBuf, TransferError> {
    Ok(spawn_blocking(move || incoming.finish()).await.map_err(|_| TransferError::Cancelled)??)
}
