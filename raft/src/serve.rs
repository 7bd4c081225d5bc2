//! What a controller answers to other controllers. Everybody else is turned away before anything is taken in.

use std::{pin::Pin, time::Duration};

use futures::{Stream, StreamExt, future};
use model::ControllerId;
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use tokio::time::Instant;
use tonic::{
    Request, Response, Status, Streaming,
    service::{Interceptor, interceptor::InterceptedService},
};

use crate::{
    core::{Core, SharedCore},
    dialect::TypeConfig,
    error::ReadError,
    linear::READ_DEADLINE,
    machine,
    peer::{EPOCH_KEY, epoch_in},
    proto::{
        Frame,
        peer_server::{Peer, PeerServer},
    },
    status::Fenced,
    succession::Watched,
    wire::{self, Answer, Call, MAX_FRAME_BYTES, SnapshotHead},
};

/// To be added to the controller's server: `Server::builder().add_service(replica.service())`.
pub type PeerService = InterceptedService<PeerServer<Serve>, Controllers>;

/// The calls of `proto/raft.proto`.
pub struct Serve {
    core: SharedCore,
}

pub fn service(core: SharedCore) -> PeerService {
    let server = PeerServer::new(Serve { core: core.clone() })
        .max_decoding_message_size(MAX_FRAME_BYTES)
        .max_encoding_message_size(MAX_FRAME_BYTES);
    InterceptedService::new(server, Controllers { core })
}

/// Turns everybody else away before a message of up to [`MAX_FRAME_BYTES`] is taken in, and says who calls.
#[derive(Clone)]
pub struct Controllers {
    core: SharedCore,
}

impl Interceptor for Controllers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let peer = authorize(&self.core, &request)?;
        request.extensions_mut().insert(peer);
        Ok(request)
    }
}

#[tonic::async_trait]
impl Peer for Serve {
    type AppendStream = Pin<Box<dyn Stream<Item = Result<Frame, Status>> + Send>>;

    async fn append(&self, request: Request<Streaming<Frame>>) -> Result<Response<Self::AppendStream>, Status> {
        let peer = peer_of(&request)?;
        // The stream ends at the first message that is not a leader's own: the leader then begins a new one.
        let decode = move |frame: Result<Frame, Status>| {
            let request = wire::decode_frame::<AppendEntriesRequest<TypeConfig>>(&frame.ok()?).ok()?;
            (request.vote.leader_id().node_id == peer.0).then_some(request)
        };
        let frames = Watched::new(request.into_inner(), peer, &self.core);
        let requests = frames.map(decode).take_while(|request| future::ready(request.is_some()));
        let requests = requests.filter_map(future::ready).take_until(self.until_stopped());
        let core = self.core.clone();
        let answers = self.core.raft.stream_append(requests).map(move |result| match result {
            Ok(result) => {
                if result.is_ok() {
                    core.heard_from_leader();
                }
                Ok(wire::encode::<StreamAppendResult<TypeConfig>>(&result))
            }
            Err(fatal) => Err(Status::unavailable(fatal.to_string())),
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn call(&self, request: Request<Frame>) -> Result<Response<Frame>, Status> {
        let peer = peer_of(&request)?;
        let answer = self.answer(peer, wire::decode_frame(request.get_ref())?).await?;
        Ok(Response::new(wire::encode(&answer)))
    }

    async fn snapshot(&self, request: Request<Streaming<Frame>>) -> Result<Response<Frame>, Status> {
        let peer = peer_of(&request)?;
        let mut frames = request.into_inner();
        let first = frames.next().await.ok_or_else(|| Status::invalid_argument("the snapshot has no head"))??;
        let head: SnapshotHead = wire::decode_frame(&first)?;
        if head.vote.leader_id().node_id != peer.0 {
            return Err(Status::permission_denied("the snapshot is not of the leader that sends it"));
        }
        let snapshot = self.receive(head.manifest, frames).await?;
        let snapshot = machine::with_meta(snapshot).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let installed = self.core.raft.install_full_snapshot(head.vote, snapshot).await;
        let answer = installed.map_err(|fatal| Status::unavailable(fatal.to_string()))?;
        self.core.heard_from_leader();
        Ok(Response::new(wire::encode(&answer)))
    }
}

impl Serve {
    async fn answer(&self, peer: ControllerId, call: Call) -> Result<Answer, Status> {
        let core = &self.core;
        let unavailable = |e: &dyn std::error::Error| Status::unavailable(e.to_string());
        let own = |node: u64| {
            let refused = || Status::permission_denied("a controller may speak only for itself");
            if node == peer.0 { Ok(()) } else { Err(refused()) }
        };
        Ok(match call {
            Call::Vote(request) => {
                own(request.vote.leader_id().node_id)?;
                Answer::Vote(core.raft.vote(request).await.map_err(|e| unavailable(&e))?)
            }
            Call::PreVote(request) => {
                own(request.vote.leader_id().node_id)?;
                Answer::Vote(core.raft.pre_vote(request).await.map_err(|e| unavailable(&e))?)
            }
            Call::Transfer(request) => {
                own(request.from_leader().leader_id().node_id)?;
                Answer::Transfer(core.raft.handle_transfer_leader(request).await.map_err(|e| unavailable(&e))?)
            }
            Call::Propose { proposals, millis } => {
                Answer::Propose(core.propose_for_follower(proposals, Duration::from_millis(millis)).await)
            }
            Call::ReadIndex if core.leadership().leader == Some(ControllerId(core.id)) => {
                Answer::ReadIndex(core.read_index(Instant::now() + READ_DEADLINE).await)
            }
            Call::ReadIndex => Answer::ReadIndex(Err(ReadError::NoQuorum)),
            Call::Change(change) => Answer::Change(core.change_as_leader(change).await),
            Call::Report => Answer::Report(core.report()),
        })
    }

    /// Takes the files to disk as they come, each verified.
    async fn receive(
        &self,
        manifest: storage::snapshot::Manifest,
        mut frames: Streaming<Frame>,
    ) -> Result<storage::snapshot::Snapshot, Status> {
        let store = self.core.machine.snapshots().clone();
        let mut incoming = on_disk(move || store.receive(manifest)).await?;
        while let Some(frame) = frames.next().await {
            let bytes = frame?.body;
            incoming = on_disk(move || incoming.write(&bytes).map(|()| incoming)).await?;
        }
        on_disk(move || incoming.finish()).await
    }

    /// Ends the long calls of a replica that stops, so that the server can stop too.
    fn until_stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stopping = self.core.stopping.subscribe();
        async move {
            if stopping.wait_for(|stopping| *stopping).await.is_err() {
                future::pending::<()>().await;
            }
        }
    }
}

/// As [`Controllers`] found out.
fn peer_of<T>(request: &Request<T>) -> Result<ControllerId, Status> {
    let peer = request.extensions().get().copied();
    peer.ok_or_else(|| Status::permission_denied("only controllers may call this"))
}

/// The caller, if its certificate is a controller's and it is of this cluster epoch.
fn authorize<T>(core: &Core, request: &Request<T>) -> Result<ControllerId, Status> {
    let name = api::tls::peer_identity(request);
    let controller = name.as_deref().and_then(|name| name.parse().ok());
    let peer: ControllerId = controller.ok_or_else(|| Status::permission_denied("only controllers may call this"))?;
    let epoch = epoch_in(request.metadata()).unwrap_or_default();
    if epoch == core.epoch {
        return Ok(peer);
    }
    let own = core.epoch;
    if epoch > own {
        core.fenced.send_if_modified(|known| known.replace(Fenced { by: peer, epoch, own }).is_none());
    }
    let why =
        format!("{peer} is of cluster epoch {epoch} and controller-{} of {own}: they are not of one quorum", core.id);
    tracing::warn!(%peer, epoch, own, "a controller of another cluster epoch was refused");
    let mut refusal = Status::failed_precondition(why);
    refusal.metadata_mut().insert(EPOCH_KEY, own.into());
    Err(refusal)
}

async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, storage::failure::StorageError> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| {
            tracing::warn!(%error, "alert: a snapshot that the leader sends cannot be taken in; it is sent again");
            Status::data_loss(error.to_string())
        }),
        Err(error) => Err(Status::internal(error.to_string())),
    }
}
