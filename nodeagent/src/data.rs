//! What the agent serves to controllers and other agents: image bytes in and out, the end of a guest's console, what was
//! set aside, and the way in for a guest that comes from another host.
//!
//! Only holders of a certificate of this cloud that is a controller's or a node's get an answer. Deliberately not
//! here: deciding who may have which image; a controller asked for it.

use std::{io::Read, io::Seek, io::SeekFrom, pin::Pin, sync::Arc};

use api::{
    error::ApiError,
    probe,
    proto::{
        Chunk, ConsoleLogReply, DescribeArrivalReply, DescribeArrivalRequest, Done, GetImageBytesRequest,
        GuestConsoleLogRequest, ListQuarantineReply, ListQuarantineRequest, ProbeReply, ProbeRequest, PutImageRequest,
        QuarantineEntry, RelayRequest, SendDiskRequest, node_data_server::NodeData, put_image_request::Part,
    },
    tls::peer_identity,
};
use futures::{Stream, StreamExt};
use model::{Digest, VmId};
use storage::images::{Begun, ImageError};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::spawn_blocking,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    host::Host,
    hypervisor::quarantine::{self, SetAside},
    images::{CHUNK_BYTES, CHUNKS_UNDER_WAY, IDLE_TIMEOUT, TransferError, begin, finish, receive},
    relay,
};

/// Transfers at once: each holds 2 MB of chunks, and a disk serves few readers better than many.
const MOST_TRANSFERS: usize = 16;
/// Probes at once: one for each controller that a quorum may have. A host must not be made to knock at many doors.
const MOST_PROBES: usize = 8;
/// The most of a console that one call gives: what a person reads, and less than one gRPC message may be.
const MOST_CONSOLE_BYTES: u32 = 1 << 20;

pub struct DataService {
    host: Arc<Host>,
    transfers: Arc<Semaphore>,
    probing: Semaphore,
}

impl DataService {
    pub fn new(host: Arc<Host>) -> Self {
        Self { host, transfers: Arc::new(Semaphore::new(MOST_TRANSFERS)), probing: Semaphore::new(MOST_PROBES) }
    }

    fn transfer(&self) -> Result<OwnedSemaphorePermit, Status> {
        let busy = |_| ApiError::overloaded(format!("this host has {MOST_TRANSFERS} transfers under way already"));
        Ok(self.transfers.clone().try_acquire_owned().map_err(busy)?)
    }
}

#[tonic::async_trait]
impl NodeData for DataService {
    async fn put_image(&self, request: Request<Streaming<PutImageRequest>>) -> Result<Response<Done>, Status> {
        check_peer(&request)?;
        let _transfer = self.transfer()?;
        let mut stream = request.into_inner();
        let first = timeout(IDLE_TIMEOUT, stream.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no header came"))??;
        let Some(PutImageRequest { part: Some(Part::Header(header)) }) = first else {
            return Err(ApiError::invalid("the first message must be the header").into());
        };
        let digest = parse_digest(&header.digest)?;
        let mut incoming = match begin(&self.host.images, digest, header.size_bytes).await.map_err(refusal)? {
            Begun::Held(_) => return Ok(Response::new(Done {})),
            Begun::Writing(incoming) => incoming,
        };
        // Whoever puts sends everything.
        incoming.restart().map_err(|error| refusal(error.into()))?;
        let chunks = stream.map(|message| match message?.part {
            Some(Part::Data(bytes)) => Ok(bytes),
            _ => Err(ApiError::invalid("only data may follow the header").into()),
        });
        let (incoming, outcome) = receive(incoming, Box::pin(chunks), |_| {}).await.map_err(refusal)?;
        outcome?;
        finish(incoming).await.map_err(refusal)?;
        tracing::info!(%digest, bytes = header.size_bytes, "an image was stored");
        Ok(Response::new(Done {}))
    }

    type GetImageBytesStream = Pin<Box<dyn Stream<Item = Result<Chunk, Status>> + Send>>;

    async fn get_image_bytes(
        &self,
        request: Request<GetImageBytesRequest>,
    ) -> Result<Response<Self::GetImageBytesStream>, Status> {
        check_peer(&request)?;
        let transfer = self.transfer()?;
        let request = request.into_inner();
        let (digest, offset) = (parse_digest(&request.digest)?, request.offset);
        let store = self.host.images.clone();
        let opened = spawn_blocking(move || store.read(digest)).await.map_err(|_| refusal(TransferError::Cancelled))?;
        let (mut file, size) = opened.map_err(|error| refusal(error.into()))?;
        if offset > size {
            return Err(ApiError::invalid(format!("the image has {size} bytes, none at {offset}")).into());
        }
        let (send, chunks) = mpsc::channel(CHUNKS_UNDER_WAY);
        spawn_blocking(move || {
            let _transfer = transfer;
            if let Err(error) = file.seek(SeekFrom::Start(offset)) {
                let _ = send.blocking_send(Err(Status::from(ApiError::internal(error.to_string()))));
                return;
            }
            loop {
                let mut data = Vec::with_capacity(CHUNK_BYTES);
                let chunk = match file.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut data) {
                    Ok(0) => return,
                    Ok(_) => Ok(Chunk { data: data.into() }),
                    Err(error) => Err(Status::from(ApiError::internal(error.to_string()))),
                };
                let failed = chunk.is_err();
                // The receiver went away: nobody is left to tell.
                if send.blocking_send(chunk).is_err() || failed {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(chunks))))
    }

    async fn guest_console_log(
        &self,
        request: Request<GuestConsoleLogRequest>,
    ) -> Result<Response<ConsoleLogReply>, Status> {
        check_peer(&request)?;
        let request = request.into_inner();
        let vm: VmId = request.vm.parse().map_err(|()| ApiError::invalid("vm must be an id such as vm-17"))?;
        let max_bytes = request.max_bytes.min(MOST_CONSOLE_BYTES) as usize;
        let hypervisor = self.host.hypervisor.clone();
        let log = spawn_blocking(move || hypervisor.console_log(vm, max_bytes)).await;
        match log {
            Ok(Ok(log)) => Ok(Response::new(ConsoleLogReply { log: log.into() })),
            Ok(Err(error)) => Err(ApiError::new("unavailable", error.to_string()).into()),
            Err(_) => Err(refusal(TransferError::Cancelled)),
        }
    }

    async fn list_quarantine(
        &self,
        request: Request<ListQuarantineRequest>,
    ) -> Result<Response<ListQuarantineReply>, Status> {
        check_peer(&request)?;
        let data = self.host.data.clone();
        let listed = spawn_blocking(move || quarantine::list(&data)).await;
        let listed = listed.map_err(|_| refusal(TransferError::Cancelled))?;
        let entry = |found: SetAside| QuarantineEntry {
            vm: found.vm.to_string(),
            epoch: found.epoch,
            bytes: found.bytes,
            path: found.path.display().to_string(),
            since_seconds: found.since_seconds,
        };
        match listed {
            Ok(listed) => Ok(Response::new(ListQuarantineReply { entries: listed.into_iter().map(entry).collect() })),
            Err(error) => Err(ApiError::new("unavailable", error.to_string()).into()),
        }
    }

    async fn probe(&self, request: Request<ProbeRequest>) -> Result<Response<ProbeReply>, Status> {
        check_controller(&request)?;
        let address = request.into_inner().address;
        let busy = |_| ApiError::overloaded(format!("this host has {MOST_PROBES} probes under way already"));
        let _probe = self.probing.try_acquire().map_err(busy)?;
        Ok(Response::new(ProbeReply { reason: probe::reach(&address).await.err().unwrap_or_default() }))
    }

    async fn describe_arrival(
        &self,
        request: Request<DescribeArrivalRequest>,
    ) -> Result<Response<DescribeArrivalReply>, Status> {
        relay::describe(&self.host.arrivals, &request).map(Response::new)
    }

    type RelayStream = relay::RelayStream;

    async fn relay(&self, request: Request<Streaming<RelayRequest>>) -> Result<Response<Self::RelayStream>, Status> {
        relay::serve(&self.host.arrivals, request).await.map(Response::new)
    }

    async fn send_disk(&self, request: Request<Streaming<SendDiskRequest>>) -> Result<Response<Done>, Status> {
        relay::disk::receive(&self.host, request).await.map(Response::new)
    }
}

fn check_controller<T>(request: &Request<T>) -> Result<(), Status> {
    match peer_identity(request) {
        Some(name) if name.starts_with("controller-") => Ok(()),
        Some(name) => Err(ApiError::forbidden(format!("{name} may not ask a host to probe")).into()),
        None => Err(ApiError::unauthenticated("a certificate of this cloud is needed").into()),
    }
}

/// Tokens do not count here: only parts of the cloud speak to its hosts.
fn check_peer<T>(request: &Request<T>) -> Result<(), Status> {
    let Some(name) = peer_identity(request) else {
        return Err(ApiError::unauthenticated("a certificate of this cloud is needed").into());
    };
    if name.starts_with("controller-") || name.starts_with("node-") {
        return Ok(());
    }
    Err(ApiError::forbidden(format!("{name} may not speak to a host")).into())
}

fn parse_digest(text: &str) -> Result<Digest, Status> {
    text.parse().map_err(|()| ApiError::invalid("digest must be 64 hexadecimal digits").into())
}

fn refusal(error: TransferError) -> Status {
    let code = match &error {
        TransferError::Store(ImageError::Missing(_)) => "not-found",
        TransferError::Store(ImageError::NoRoom { .. }) => "no-room",
        TransferError::Store(ImageError::Busy(_)) => "overloaded",
        TransferError::Store(ImageError::Length { .. } | ImageError::Damaged { .. }) => "invalid-argument",
        TransferError::Store(ImageError::Io { .. }) | TransferError::Cancelled => "internal",
        TransferError::NoSource | TransferError::Sources(_) => "unavailable",
    };
    ApiError::new(code, error.to_string()).into()
}
