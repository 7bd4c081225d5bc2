//! Speaking to other controllers: channels that reconnect, and openraft's network on them.
//!
//! Each peer has two connections. Votes, heartbeats and calls have their own, so that a snapshot or a long batch of
//! entries cannot make a healthy leader look dead.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use api::tls::PEER_NAME;
use futures::{Stream, StreamExt, future, stream};
use model::ControllerId;
use openraft::{
    AnyError, BasicNode, OptionalSend, RaftNetworkFactory,
    base::{BoxFuture, BoxStream},
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::{Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption},
    raft::{
        AppendEntriesRequest, SnapshotResponse, StreamAppendResult, TransferLeaderRequest, TransferLeaderResponse,
        VoteRequest, VoteResponse,
    },
};
use tokio::{
    runtime::Handle,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    metadata::MetadataMap,
    transport::{Channel, ClientTlsConfig, Endpoint},
};

use crate::{
    dialect::{Snapshot, TypeConfig, Vote},
    proto::{Frame, peer_client::PeerClient},
    status::Fenced,
    wire::{self, Answer, Call, MAX_FRAME_BYTES, SnapshotAnswer, SnapshotHead},
};

/// The metadata in which a controller names its cluster epoch.
pub const EPOCH_KEY: &str = "trefoil-epoch";
/// Controllers are milliseconds apart; a full handshake on a busy machine takes some tens.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// A peer that vanished is noticed within the sum of these, also when nothing is sent to it.
const KEEPALIVE_INTERVAL: Duration = Duration::from_millis(500);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Replication over 10 Gbit/s and 1 ms needs 1.25 MB in flight.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Chunks of a snapshot that are read ahead of the network.
const SNAPSHOT_CHUNKS_AHEAD: usize = 4;
/// 10 GiB at 10 MB/s take 17 minutes; what takes longer than this is stuck.
const SNAPSHOT_DEADLINE: Duration = Duration::from_secs(30 * 60);
/// Between attempts to reach a peer: short, because most outages are restarts; a refused connection costs next to nothing.
const BACKOFF_FIRST_MILLIS: u64 = 50;
const BACKOFF_LAST_MILLIS: u64 = 250;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Small and urgent.
    Control,
    /// Entries and snapshots.
    Bulk,
}

/// All connections of this controller. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    tls: ClientTlsConfig,
    epoch: u64,
    runtime: Handle,
    /// Told when a peer refuses because it is of a later cluster epoch.
    fenced: watch::Sender<Option<Fenced>>,
    channels: Arc<Mutex<Channels>>,
}

/// By peer and lane: the address that it leads to, and the channel.
type Channels = BTreeMap<(u64, Lane), (String, Channel)>;

/// A call that failed.
#[derive(Debug)]
pub enum CallError {
    /// No connection: the peer has not seen the call.
    NotSent(Status),
    /// It may or may not have been carried out.
    Unclear(Status),
}

impl Peers {
    /// Its connections live on the runtime that it is made on.
    pub fn new(tls: ClientTlsConfig, epoch: u64, fenced: watch::Sender<Option<Fenced>>) -> Self {
        Self { tls, epoch, runtime: Handle::current(), fenced, channels: Arc::default() }
    }

    /// A message that says of which cluster epoch its sender is.
    fn signed<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(EPOCH_KEY, self.epoch.into());
        request
    }

    /// A refusal by a member of a later epoch ends this member.
    fn heed(&self, by: u64, status: Status) -> Status {
        if let Some(epoch) = epoch_in(status.metadata()).filter(|epoch| *epoch > self.epoch) {
            let fenced = Fenced { by: ControllerId(by), epoch, own: self.epoch };
            self.fenced.send_if_modified(|known| known.replace(fenced).is_none());
        }
        status
    }

    /// # Errors
    /// See [`CallError`].
    pub async fn call(&self, id: u64, address: &str, call: &Call, deadline: Duration) -> Result<Answer, CallError> {
        let mut client = self.client(id, address, Lane::Control).map_err(CallError::NotSent)?;
        let mut request = self.signed(wire::encode(call));
        request.set_timeout(deadline);
        let sent = tokio::time::timeout(deadline, client.call(request)).await;
        let reply = sent.map_err(|_| CallError::Unclear(Status::deadline_exceeded("no answer in time")))?;
        let frame = reply.map_err(|status| match was_sent(&self.heed(id, status.clone())) {
            false => CallError::NotSent(status),
            true => CallError::Unclear(status),
        })?;
        wire::decode_frame(frame.get_ref()).map_err(CallError::Unclear)
    }

    /// Connects at the first use and again after each loss.
    fn client(&self, id: u64, address: &str, lane: Lane) -> Result<PeerClient<Channel>, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match channels.get(&(id, lane)) {
            Some((known, channel)) if known == address => channel.clone(),
            _ => {
                // Who calls first may be anybody; the connection lives where the replica does.
                let _here = self.runtime.enter();
                let channel = self.endpoint(address)?.connect_lazy();
                channels.insert((id, lane), (address.to_owned(), channel.clone()));
                channel
            }
        };
        Ok(PeerClient::new(channel)
            .max_decoding_message_size(MAX_FRAME_BYTES)
            .max_encoding_message_size(MAX_FRAME_BYTES))
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, Status> {
        let bad = |error: tonic::transport::Error| Status::invalid_argument(format!("address '{address}': {error}"));
        let endpoint = Endpoint::from_shared(format!("https://{address}")).map_err(bad)?;
        endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .tls_config(self.tls.clone().domain_name(PEER_NAME))
            .map_err(bad)
    }
}

/// Of which cluster epoch the sender of these is; `None` when it does not say.
pub fn epoch_in(metadata: &MetadataMap) -> Option<u64> {
    metadata.get(EPOCH_KEY)?.to_str().ok()?.parse().ok()
}

/// False when the connection could not even be made.
fn was_sent(status: &Status) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return false;
        }
        cause = error.source();
    }
    true
}

/// openraft's way to one peer.
pub struct Connection {
    peers: Peers,
    id: u64,
    address: String,
    lane: Lane,
    /// What the last heartbeat went on, if it was answered.
    heartbeats: Option<Heartbeats>,
}

/// A stream of entries that has none in it. openraft begins another for each heartbeat, and each linearizable read is a round of
/// them; to begin one costs several times what a message does, so this one is kept.
struct Heartbeats {
    requests: mpsc::Sender<Frame>,
    answers: Streaming<Frame>,
}

impl RaftNetworkFactory<TypeConfig> for Peers {
    type Network = Connection;

    async fn new_client(&mut self, id: u64, node: &BasicNode) -> Connection {
        Connection { peers: self.clone(), id, address: node.addr.clone(), lane: Lane::Bulk, heartbeats: None }
    }

    async fn new_heartbeat_client(&mut self, id: u64, node: &BasicNode) -> Connection {
        Connection { peers: self.clone(), id, address: node.addr.clone(), lane: Lane::Control, heartbeats: None }
    }
}

impl Connection {
    fn client(&self, lane: Lane) -> Result<PeerClient<Channel>, RPCError<TypeConfig>> {
        self.peers.client(self.id, &self.address, lane).map_err(|status| unreachable(&status))
    }

    async fn call(&self, call: Call, option: &RPCOption) -> Result<Answer, RPCError<TypeConfig>> {
        let answer = self.peers.call(self.id, &self.address, &call, option.soft_ttl()).await;
        answer.map_err(|error| match error {
            CallError::NotSent(status) => unreachable(&status),
            CallError::Unclear(status) => network(&status),
        })
    }

    /// One stream for as long as openraft has entries for it.
    async fn replicate<'s, S>(&'s mut self, input: S) -> Result<Appended<'s>, RPCError<TypeConfig>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        // openraft waits between its attempts where the first request is made. A connection that is refused before
        // anybody asked for one would be tried again at once, tens of thousands of times a second.
        let mut input = input.map(|request| wire::encode(&request));
        let Some(first) = input.next().await else {
            return Ok(Box::pin(stream::empty()));
        };
        let answers = self.open(stream::iter([first]).chain(input)).await?;
        Ok(Box::pin(answers.map(appended)))
    }

    /// One request after the other, as they are answered.
    fn beat<'s, S>(&'s mut self, input: S) -> Appended<'s>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(stream::unfold((self, input), |(connection, mut input)| async {
            let request = wire::encode(&input.next().await?);
            Some((connection.heartbeat(request).await, (connection, input)))
        }))
    }

    /// On the stream that is kept, or on a new one: the peer may have been started again since. Who gives up waiting for the
    /// answer gives up the stream with it, so that answers and requests stay pairs.
    async fn heartbeat(&mut self, request: Frame) -> Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>> {
        if let Some(kept) = self.heartbeats.take()
            && let Some((answer @ Ok(_), kept)) = kept.exchange(request.clone()).await
        {
            return self.keep(answer, kept);
        }
        let (requests, frames) = mpsc::channel(1);
        let answers = self.open(ReceiverStream::new(frames)).await?;
        let ended = || network(&Status::unavailable("the peer ended the stream of heartbeats"));
        let (answer, kept) = Heartbeats { requests, answers }.exchange(request).await.ok_or_else(ended)?;
        self.keep(answer, kept)
    }

    /// The peer ends the stream with each answer that is not a yes.
    fn keep(
        &mut self,
        answer: Result<Frame, Status>,
        heartbeats: Heartbeats,
    ) -> Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>> {
        let answer = appended(answer);
        self.heartbeats = matches!(answer, Ok(Ok(_))).then_some(heartbeats);
        answer
    }

    async fn open(
        &self,
        frames: impl Stream<Item = Frame> + Send + 'static,
    ) -> Result<Streaming<Frame>, RPCError<TypeConfig>> {
        let answers = self.client(self.lane)?.append(self.peers.signed(frames)).await;
        Ok(answers.map_err(|status| rpc_error(&self.peers.heed(self.id, status)))?.into_inner())
    }
}

impl Heartbeats {
    /// Nothing when the peer has ended the stream.
    async fn exchange(mut self, request: Frame) -> Option<(Result<Frame, Status>, Self)> {
        self.requests.send(request).await.ok()?;
        let answer = self.answers.next().await?;
        Some((answer, self))
    }
}

type Appended<'s> = BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>>;

fn appended(frame: Result<Frame, Status>) -> Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>> {
    let frame = frame.map_err(|status| rpc_error(&status))?;
    wire::decode_frame::<StreamAppendResult<TypeConfig>>(&frame).map_err(|status| network(&status))
}

impl NetStreamAppend<TypeConfig> for Connection {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<Appended<'s>, RPCError<TypeConfig>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        match self.lane {
            Lane::Bulk => Box::pin(self.replicate(input)),
            Lane::Control => Box::pin(future::ready(Ok(self.beat(input)))),
        }
    }
}

impl NetVote<TypeConfig> for Connection {
    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.call(Call::Vote(request), &option).await? {
            Answer::Vote(response) => Ok(response),
            _ => Err(misunderstood()),
        }
    }

    /// The trait's default would grant every pre-vote, and so switch it off.
    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.call(Call::PreVote(request), &option).await? {
            Answer::Vote(response) => Ok(response),
            _ => Err(misunderstood()),
        }
    }
}

impl NetTransferLeader<TypeConfig> for Connection {
    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.call(Call::Transfer(request), &option).await? {
            Answer::Transfer(response) => Ok(response),
            _ => Err(misunderstood()),
        }
    }
}

impl NetSnapshot<TypeConfig> for Connection {
    type SnapshotData = storage::snapshot::Snapshot;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let mut client = self.client(Lane::Bulk)?;
        let frames = self.peers.signed(snapshot_frames(vote, snapshot.snapshot));
        let send = tokio::time::timeout(SNAPSHOT_DEADLINE, client.snapshot(frames));
        let reply = tokio::select! {
            closed = cancel => return Err(StreamingError::Closed(closed)),
            reply = send => reply.map_err(|elapsed| StreamingError::Network(NetworkError::new(&elapsed)))?,
        };
        let frame = reply.map_err(|status| StreamingError::from(rpc_error(&self.peers.heed(self.id, status))))?;
        wire::decode_frame::<SnapshotAnswer>(frame.get_ref()).map_err(|status| network(&status).into())
    }
}

impl NetBackoff<TypeConfig> for Connection {
    /// Doubles, with a jitter of half, so that peers do not come back in step.
    fn backoff(&self) -> Option<Backoff> {
        let doubling = std::iter::successors(Some(BACKOFF_FIRST_MILLIS), |millis| {
            Some(millis.saturating_mul(2).min(BACKOFF_LAST_MILLIS))
        });
        Some(Backoff::new(doubling.map(|millis| Duration::from_millis(millis / 2 + jitter(millis / 2 + 1)))))
    }
}

/// The head, then the files' bytes as they are read. A disk error ends the stream early, which the receiver refuses.
fn snapshot_frames(vote: Vote, snapshot: storage::snapshot::Snapshot) -> ReceiverStream<Frame> {
    let (sender, receiver) = mpsc::channel(SNAPSHOT_CHUNKS_AHEAD);
    tokio::task::spawn_blocking(move || {
        let head = SnapshotHead { vote, manifest: snapshot.manifest().clone() };
        if sender.blocking_send(wire::encode(&head)).is_err() {
            return;
        }
        for chunk in snapshot.chunks() {
            let bytes = match chunk {
                Ok(bytes) => bytes,
                Err(error) => return tracing::error!(%error, "a snapshot cannot be read for sending"),
            };
            if sender.blocking_send(Frame { body: bytes.into() }).is_err() {
                return;
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// Below `bound`; from the clock's nanoseconds, which is random enough to fall out of step.
fn jitter(bound: u64) -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos()) % bound.max(1)
}

fn rpc_error(status: &Status) -> RPCError<TypeConfig> {
    if was_sent(status) { network(status) } else { unreachable(status) }
}

fn unreachable(status: &Status) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::new(status))
}

fn network(status: &Status) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::new(status))
}

fn misunderstood() -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::new(&AnyError::error("the peer answered another question")))
}
