//! Image bytes to and from the cloud: streams with progress, restarted from the beginning when a controller is lost.
//!
//! Not here: what is in the bytes. The caller knows format, size and digest before an import; an export returns the
//! digest of what was written, for the caller to compare.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use model::{Digest, RequestId};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status};

use super::{Asked, Client, FIRST_BACKOFF, LAST_BACKOFF, given_up, refused};
use crate::{
    error::ApiError,
    proto::{Image, ImportImageHeader, ImportImageRequest, NamedRef, import_image_request::Part},
};

/// One message of a stream; well below the 4 MiB that gRPC accepts.
const CHUNK_BYTES: usize = 512 << 10;
/// Chunks that wait between the disk and the wire.
const CHUNKS_AHEAD: usize = 4;
/// A stream that moves no byte for this long is broken. Replicas sync and verify the whole image before the last
/// answer comes: 100 GiB at 1 GB/s is within it.
const STALL: Duration = Duration::from_secs(120);

impl Client {
    /// Uploads `path`; `progress` is told how many bytes were sent. A second attempt starts again at 0.
    ///
    /// # Errors
    /// When the file cannot be read, when it is refused, or when no controller took it before the deadline since the
    /// last byte that moved.
    pub async fn import_image(
        &self,
        id: RequestId,
        header: ImportImageHeader,
        path: &Path,
        progress: impl Fn(u64),
    ) -> Result<Image, ApiError> {
        let upload = |index: usize| self.upload(index, id, header.clone(), path, &progress);
        self.restarting(Asked::Change(id), upload).await
    }

    /// Downloads into `path`, which is replaced when all bytes are there. Returns the digest of what was written.
    ///
    /// # Errors
    /// When the file cannot be written, when it is refused, or when no controller gave it before the deadline.
    pub async fn export_image(&self, image: NamedRef, path: &Path, progress: impl Fn(u64)) -> Result<Digest, ApiError> {
        let beside = path.with_extension("part");
        let download = |index: usize| self.download(index, image.clone(), &beside, &progress);
        let digest = self.restarting(Asked::Read, download).await?;
        std::fs::rename(&beside, path).map_err(|e| local("write", path, &e))?;
        Ok(digest)
    }

    pub(super) async fn restarting<A, Fut>(&self, asked: Asked, attempt: impl Fn(usize) -> Fut) -> Result<A, ApiError>
    where
        Fut: Future<Output = Result<A, ApiError>>,
    {
        let first = self.shared.preferred.load(Ordering::Relaxed);
        let mut give_up = Instant::now() + self.deadline;
        let mut backoff = FIRST_BACKOFF;
        let mut perhaps_done = false;
        for index in first.. {
            let started = Instant::now();
            let error = match attempt(index).await {
                Ok(answer) => return Ok(answer),
                Err(error) if !error.is_retryable() => return Err(refused(error, perhaps_done, asked)),
                Err(error) => error,
            };
            // The time that bytes took to move is not held against the next attempt; it is against the one after.
            if index == first {
                give_up += started.elapsed();
            }
            perhaps_done |= error.code == "timeout";
            if Instant::now() + backoff >= give_up {
                return Err(given_up(error, perhaps_done, asked));
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(LAST_BACKOFF);
        }
        unreachable!("the loop ends by the deadline")
    }

    async fn upload(
        &self,
        endpoint: usize,
        id: RequestId,
        header: ImportImageHeader,
        path: &Path,
        progress: &impl Fn(u64),
    ) -> Result<Image, ApiError> {
        let file = File::open(path).map_err(|e| local("read", path, &e))?;
        let (queue, messages) = mpsc::channel(CHUNKS_AHEAD);
        let sent = Arc::new(AtomicU64::new(0));
        let counter = sent.clone();
        let reader = tokio::task::spawn_blocking(move || send_file(file, header, &queue, &counter));
        let mut request = Request::new(ReceiverStream::new(messages));
        self.authorize(&mut request, Some(id));
        let mut stub = self.stub(endpoint);
        let answer = watched(&sent, progress, stub.import_image(request)).await;
        // Ends by itself: the queue is closed, or all was read.
        let read = reader.await.map_err(|e| ApiError::internal(e.to_string()))?;
        read.map_err(|e| local("read", path, &e))?;
        answer.map(tonic::Response::into_inner)
    }

    async fn download(
        &self,
        endpoint: usize,
        image: NamedRef,
        path: &Path,
        progress: &impl Fn(u64),
    ) -> Result<Digest, ApiError> {
        let mut file = File::create(path).map_err(|e| local("write", path, &e))?;
        let mut request = Request::new(image);
        self.authorize(&mut request, None);
        let mut stub = self.stub(endpoint);
        let stalled = |_| ApiError::new("unavailable", "the stream of the image stopped");
        let opened = tokio::time::timeout(STALL, stub.export_image(request)).await.map_err(stalled)??;
        let mut stream = opened.into_inner();
        let (mut hasher, mut received) = (blake3::Hasher::new(), 0);
        while let Some(chunk) = tokio::time::timeout(STALL, stream.message()).await.map_err(stalled)?? {
            hasher.update(&chunk.data);
            file.write_all(&chunk.data).map_err(|e| local("write", path, &e))?;
            received += chunk.data.len() as u64;
            progress(received);
        }
        file.sync_all().map_err(|e| local("write", path, &e))?;
        Ok(Digest(*hasher.finalize().as_bytes()))
    }
}

/// Awaits the answer, tells the progress meanwhile, and gives up when nothing moves.
async fn watched<A>(
    sent: &AtomicU64,
    progress: &impl Fn(u64),
    answer: impl Future<Output = Result<A, Status>>,
) -> Result<A, ApiError> {
    tokio::pin!(answer);
    // Ten times a second is what an eye can follow.
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    let (mut last, mut moved_at) = (0, Instant::now());
    loop {
        tokio::select! {
            answer = &mut answer => {
                progress(sent.load(Ordering::Relaxed));
                return answer.map_err(ApiError::from);
            }
            _ = tick.tick() => {
                let now = sent.load(Ordering::Relaxed);
                progress(now);
                if now != last {
                    (last, moved_at) = (now, Instant::now());
                }
                if moved_at.elapsed() > STALL {
                    return Err(ApiError::timeout("the stream of the image stopped"));
                }
            }
        }
    }
}

/// Feeds header and bytes into the queue; returns quietly when the other end is gone.
fn send_file(
    mut file: File,
    header: ImportImageHeader,
    queue: &mpsc::Sender<ImportImageRequest>,
    sent: &AtomicU64,
) -> io::Result<()> {
    let mut part = Part::Header(header);
    loop {
        if queue.blocking_send(ImportImageRequest { part: Some(part) }).is_err() {
            return Ok(());
        }
        let mut chunk = vec![0; CHUNK_BYTES];
        let mut filled = 0;
        while filled < chunk.len() {
            match file.read(&mut chunk[filled..]) {
                Ok(0) => break,
                Ok(more) => filled += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if filled == 0 {
            return Ok(());
        }
        chunk.truncate(filled);
        sent.fetch_add(filled as u64, Ordering::Relaxed);
        part = Part::Data(Bytes::from(chunk));
    }
}

fn local(verb: &str, path: &Path, error: &io::Error) -> ApiError {
    ApiError::new("failed", format!("cannot {verb} {}: {error}", path.display()))
}
