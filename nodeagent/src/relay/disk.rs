//! The disk of a machine that is off, from its host to another: one file through one call, hashed on both sides.
//!
//! ```text
//!  source:       read, hash ──▶ header, bytes or runs of zeros, digest ──▶ destination: write, hash
//!                Ok: let go ◀── answer ─────────────────────────────────── the digests are equal: sync, take in
//! ```
//! The machine has arrived when the destination has taken the file in, and not before: a stream without its digest, or
//! with another one, leaves nothing. What breaks off is not gone on with; another move begins anew. Deliberately not
//! here: when a machine goes, and what it takes that nobody starts it meanwhile (`model::steps`).

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use api::{
    error::ApiError,
    proto::{DiskHeader, Done, SendDiskRequest, node_data_client::NodeDataClient, send_disk_request::Part},
    tls::peer_identity,
};
use bytes::Bytes;
use model::{Digest, VmId};
use nix::sys::statvfs::statvfs;
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming, transport::Channel};

use super::{Arrival, DepartureError, HEADER_LIMIT};
use crate::{
    host::Host,
    hypervisor::{HypervisorError, job::Job},
    images::{CHUNK_BYTES, CHUNKS_UNDER_WAY, IDLE_TIMEOUT},
};

static ZEROS: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];

/// On the source. Whoever drops this call ends it, and what has come to the destination so far is removed there.
///
/// # Errors
/// When the file cannot be read, or the destination has not taken it in.
pub async fn send(
    mut to: NodeDataClient<Channel>,
    vm: VmId,
    epoch: u64,
    disk: PathBuf,
    job: Arc<Job>,
) -> Result<(), DepartureError> {
    let (parts, stream) = mpsc::channel(CHUNKS_UNDER_WAY);
    let reader = spawn_blocking(move || {
        let read = |disk: &Path| {
            let mut file = File::open(disk)?;
            let size_bytes = file.metadata()?.len();
            let header = DiskHeader { vm: vm.to_string(), epoch, size_bytes };
            let _ = parts.blocking_send(SendDiskRequest { part: Some(Part::Header(header)) });
            read(&mut file, |part, done| {
                job.note(done, size_bytes);
                parts.blocking_send(SendDiskRequest { part: Some(part) }).is_ok()
            })
        };
        read(&disk).map_err(|source| DepartureError::File { path: disk, source })
    });
    let answer = to.send_disk(ReceiverStream::new(stream)).await;
    // A file that cannot be read is why the destination missed its end.
    reader.await.map_err(|_| DepartureError::CutShort)??;
    answer.map(drop).map_err(|status| DepartureError::Destination(ApiError::from(status).to_string()))
}

/// Hands on all that the file holds, and its digest; ends early when nobody wants it.
fn read(file: &mut File, hand_on: impl Fn(Part, u64) -> bool) -> io::Result<()> {
    let (mut hasher, mut done) = (blake3::Hasher::new(), 0);
    loop {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        let length = Read::by_ref(file).take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
        if length == 0 {
            hand_on(Part::Digest(Bytes::copy_from_slice(hasher.finalize().as_bytes())), done);
            return Ok(());
        }
        hasher.update(&chunk);
        done += length as u64;
        let part = if chunk == ZEROS[..length] { Part::Zeros(length as u64) } else { Part::Data(chunk.into()) };
        if !hand_on(part, done) {
            return Ok(());
        }
    }
}

/// On the destination.
///
/// # Errors
/// When the machine is not expected, not from who asks, there is no room for its disk, or not all of it came.
pub async fn receive(host: &Arc<Host>, request: Request<Streaming<SendDiskRequest>>) -> Result<Done, Status> {
    let peer = peer_identity(&request);
    let mut stream = request.into_inner();
    let first =
        timeout(HEADER_LIMIT, stream.message()).await.map_err(|_| Status::deadline_exceeded("no header came"))??;
    let Some(SendDiskRequest { part: Some(Part::Header(header)) }) = first else {
        return Err(ApiError::invalid("the first message must be the header").into());
    };
    let (vm, arrival) = host.arrivals.find(&header.vm, header.epoch, peer.clone())?;
    // A name of its own: the disk that was prepared stays what it is until this one is whole.
    let file = arrival.destination.disk.with_extension("coming");
    let (parts, arrived) = mpsc::channel(CHUNKS_UNDER_WAY);
    let (path, size_bytes) = (file.clone(), header.size_bytes);
    let writer = spawn_blocking(move || {
        let written = write(&path, size_bytes, arrived);
        if written.is_err() {
            // Else its room is taken until the move is cleared away.
            let _ = fs::remove_file(&path);
        }
        written
    });
    let outcome = hand_over(&mut stream, parts).await;
    let written = writer.await.map_err(|_| ApiError::internal("a blocking task was cut short"))?;
    outcome?;
    written?;
    // It may have been given up meanwhile.
    host.arrivals.find(&header.vm, header.epoch, peer)?;
    let working = host.clone();
    let Arrival { spec, .. } = arrival;
    let taken = spawn_blocking(move || working.hypervisor.take_in(&spec, &file)).await;
    let refused = |error: HypervisorError| Status::from(ApiError::new("unavailable", error.to_string()));
    taken.map_err(|_| ApiError::internal("a blocking task was cut short"))?.map_err(refused)?;
    tracing::info!(%vm, epoch = header.epoch, bytes = size_bytes, "the disk of a machine has come");
    Ok(Done {})
}

/// From the network to the writer, until either ends.
async fn hand_over(stream: &mut Streaming<SendDiskRequest>, parts: mpsc::Sender<Part>) -> Result<(), Status> {
    loop {
        let message = timeout(IDLE_TIMEOUT, stream.message()).await;
        let message = message.map_err(|_| Status::deadline_exceeded("the sender fell silent"))??;
        let Some(SendDiskRequest { part }) = message else { return Ok(()) };
        let part = part.ok_or_else(|| Status::from(ApiError::invalid("a message without a part")))?;
        if parts.send(part).await.is_err() {
            // The writer ended early, and says why.
            return Ok(());
        }
    }
}

/// Writes what comes, and syncs it when it is what was sent. Runs of zeros become holes.
fn write(path: &Path, size_bytes: u64, mut parts: mpsc::Receiver<Part>) -> Result<(), Status> {
    let failed = |error: io::Error| Status::from(ApiError::new("unavailable", format!("{}: {error}", path.display())));
    check_room(path, size_bytes)?;
    let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    let mut file = opened.map_err(failed)?;
    let (mut hasher, mut length) = (blake3::Hasher::new(), 0_u64);
    while let Some(part) = parts.blocking_recv() {
        match part {
            Part::Header(_) => return Err(ApiError::invalid("only one header may come").into()),
            Part::Data(bytes) => {
                hasher.update(&bytes);
                length += bytes.len() as u64;
                file.write_all(&bytes).map_err(failed)?;
            }
            Part::Zeros(run) => {
                let run = usize::try_from(run).ok().filter(|run| *run <= ZEROS.len());
                let run = run.ok_or_else(|| ApiError::invalid("a run of zeros is at most as long as a chunk"))?;
                hasher.update(&ZEROS[..run]);
                length += run as u64;
                file.seek(SeekFrom::Current(run as i64)).map_err(failed)?;
            }
            Part::Digest(told) => {
                let found = Digest(*hasher.finalize().as_bytes());
                if length != size_bytes || told[..] != found.0 {
                    let what =
                        format!("{length} of {size_bytes} bytes came, with another digest or length than was said");
                    return Err(ApiError::new("damaged", what).into());
                }
                file.set_len(length).map_err(failed)?;
                return file.sync_all().map_err(failed);
            }
        }
        if length > size_bytes {
            return Err(ApiError::invalid(format!("more than the {size_bytes} bytes of the header came")).into());
        }
    }
    Err(ApiError::new("unavailable", "the sender broke off").into())
}

/// A disk that fills the host's would stop the guests that are here.
fn check_room(file: &Path, size_bytes: u64) -> Result<(), Status> {
    let dir = file.parent().unwrap_or(file);
    let found = statvfs(dir).map_err(|e| ApiError::new("unavailable", format!("{}: {}", dir.display(), e.desc())))?;
    let free = found.blocks_available() * found.fragment_size();
    if size_bytes > free {
        return Err(ApiError::new("no-room", format!("the disk has {size_bytes} bytes, and {free} are free")).into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
