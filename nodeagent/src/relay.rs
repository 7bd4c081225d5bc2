//! Joins the sockets of two hosts while a guest moves from one to the other, through the agents' own connection.
//!
//! ```text
//!  source's libvirtd, QEMU ──▶ vm-17.control ┐                              ┌──▶ libvirtd's own socket
//!                          ──▶ vm-17.memory  ├─ agent ── mutual TLS ─ agent ┼──▶ vm-17.memory ◀── QEMU listens
//!                          ──▶ vm-17.disk    ┘                              └──▶ vm-17.disk   ◀── QEMU listens
//! ```
//! So no hypervisor listens on a network, and libvirt needs neither certificates nor ports of its own. Through
//! `control` the source's libvirtd may do on the destination whatever a client of libvirtd may; that is how libvirt
//! migrates. Therefore the door is open to one host only, that the quorum named as the source, for one machine under one
//! placement, and only until it has come or was given up.
//!
//! Here is the destination's side; the source's is in `departure`. A machine that is off needs no sockets: its disk goes
//! through the same connection in one call (`disk`). Deliberately not here: when a guest moves.

use std::{
    collections::BTreeMap,
    fs::DirBuilder,
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use api::{
    error::ApiError,
    proto::{
        ArrivalBridge, Chunk, DescribeArrivalReply, DescribeArrivalRequest, RelayChannel, RelayRequest,
        relay_request::Part,
    },
    tls::peer_identity,
};
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt};
use model::{NodeId, VmId};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, Streaming};

use crate::hypervisor::{
    GuestSpec,
    domain_xml::name_prefix,
    migration::{Destination, Route},
};

pub use departure::{Departure, DepartureError, ask};

mod departure;
pub mod disk;

/// Bytes of a socket in one message, and messages between network and socket: as for images, half a megabyte in all,
/// since a migration measures its speed by how soon bytes are taken.
const CHUNK_BYTES: usize = 64 << 10;
const CHUNKS_UNDER_WAY: usize = 8;
/// Whoever opens a connection says at once which it is.
const HEADER_LIMIT: Duration = Duration::from_secs(10);
/// What libvirtd listens on where its configuration does not say otherwise.
const LIBVIRTD: &str = "/run/libvirt/libvirt-sock";

/// The guests that may come to this host.
pub struct Arrivals {
    dir: PathBuf,
    control: Option<PathBuf>,
    expected: Mutex<BTreeMap<VmId, Arrival>>,
}

/// One that may come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The host that it comes from.
    pub source: NodeId,
    /// What it will be here.
    pub spec: GuestSpec,
    /// What was prepared for it, under the placement that it will have.
    pub destination: Destination,
}

/// Where the sockets of moving guests are, on every host of a cloud.
pub fn socket_dir(cluster: &str) -> PathBuf {
    Path::new("/run").join(name_prefix(cluster).trim_end_matches('-'))
}

/// The socket that a libvirt URI leads to; `None` when it leads somewhere else.
pub fn control_socket(uri: &str) -> Option<PathBuf> {
    let (way, query) = uri.split_once('?').unwrap_or((uri, ""));
    let named = query.split('&').find_map(|part| part.strip_prefix("socket="));
    matches!(way, "qemu:///system" | "qemu+unix:///system").then(|| named.unwrap_or(LIBVIRTD).into())
}

impl Arrivals {
    /// `control` is libvirtd's own socket; without one, no guest comes through sockets.
    pub fn new(dir: PathBuf, control: Option<PathBuf>) -> Self {
        Self { dir, control, expected: Mutex::default() }
    }

    /// Without libvirtd guests do not move through sockets.
    pub fn have_sockets(&self) -> bool {
        self.control.is_some()
    }

    /// Closed to other users: who can open these sockets has the guest. Where QEMU runs as a user of its own, the folder
    /// is made for it beforehand.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make_dir(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// From now on its source may send it. Replaces what was expected of the machine before.
    pub fn expect(&self, vm: VmId, arrival: Arrival) {
        self.expected().insert(vm, arrival);
    }

    /// Closes the door to all but these: the others have come, or were given up. Connections that are open stay until
    /// either end closes them.
    pub fn retain(&self, expected: &BTreeMap<VmId, u64>) {
        self.expected().retain(|vm, arrival| expected.get(vm) == Some(&arrival.destination.epoch));
    }

    /// Who is expected, each under the placement that it will have.
    pub fn epochs(&self) -> BTreeMap<VmId, u64> {
        self.expected().iter().map(|(vm, arrival)| (*vm, arrival.destination.epoch)).collect()
    }

    /// What is expected, if `peer` is who it comes from.
    fn find(&self, vm: &str, epoch: u64, peer: Option<String>) -> Result<(VmId, Arrival), Status> {
        let peer = peer.ok_or_else(|| ApiError::unauthenticated("a certificate of this cloud is needed"))?;
        let vm: VmId = vm.parse().map_err(|()| ApiError::invalid("vm must be an id such as vm-17"))?;
        let expected = self.expected();
        let arrival = expected.get(&vm).filter(|arrival| arrival.destination.epoch == epoch);
        let arrival = arrival.ok_or_else(|| ApiError::not_found(format!("{vm} is not expected here")))?;
        if peer != arrival.source.to_string() {
            return Err(ApiError::forbidden(format!("{vm} is not expected from {peer}")).into());
        }
        Ok((vm, arrival.clone()))
    }

    fn socket(&self, vm: VmId, channel: RelayChannel) -> Result<PathBuf, Status> {
        let route = Route::new(&self.dir, vm);
        match channel {
            RelayChannel::Control => {
                self.control.clone().ok_or_else(|| ApiError::new("unavailable", "no libvirtd here").into())
            }
            RelayChannel::Memory => Ok(route.memory),
            RelayChannel::Disk => Ok(route.disk),
            RelayChannel::Unspecified => Err(ApiError::invalid("which channel?").into()),
        }
    }

    fn expected(&self) -> MutexGuard<'_, BTreeMap<VmId, Arrival>> {
        // Every change is one call, so a panic elsewhere does not spoil it.
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// # Errors
/// When it is not expected, or not from who asks.
pub fn describe(
    arrivals: &Arrivals,
    request: &Request<DescribeArrivalRequest>,
) -> Result<DescribeArrivalReply, Status> {
    let asked = request.get_ref();
    let (_, Arrival { destination: found, .. }) = arrivals.find(&asked.vm, asked.epoch, peer_identity(request))?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let bridge = |(mac, bridge): &(model::Mac, String)| ArrivalBridge {
        mac: Bytes::copy_from_slice(&mac.0),
        bridge: bridge.clone(),
    };
    Ok(DescribeArrivalReply {
        disk: text(&found.disk),
        seed: text(&found.seed),
        console: text(&found.console),
        bridges: found.bridges.iter().map(bridge).collect(),
    })
}

pub type RelayStream = Pin<Box<dyn Stream<Item = Result<Chunk, Status>> + Send>>;

/// # Errors
/// When it is not expected, not from who asks, or nothing listens on the socket.
pub async fn serve(arrivals: &Arrivals, request: Request<Streaming<RelayRequest>>) -> Result<RelayStream, Status> {
    let peer = peer_identity(&request);
    let mut stream = request.into_inner();
    let first = timeout(HEADER_LIMIT, stream.message());
    let first = first.await.map_err(|_| Status::deadline_exceeded("no header came"))??;
    let Some(RelayRequest { part: Some(Part::Header(header)) }) = first else {
        return Err(ApiError::invalid("the first message must be the header").into());
    };
    let (vm, _) = arrivals.find(&header.vm, header.epoch, peer)?;
    let socket = arrivals.socket(vm, header.channel())?;
    let near = UnixStream::connect(&socket).await;
    let near = near.map_err(|e| ApiError::new("unavailable", format!("{}: {e}", socket.display())))?;
    tracing::debug!(%vm, socket = %socket.display(), "a connection of a guest that comes");
    let (from_socket, to_socket) = near.into_split();
    let (send, chunks) = mpsc::channel(CHUNKS_UNDER_WAY);
    let data = stream.map(|message| match message?.part {
        Some(Part::Data(bytes)) => Ok(bytes),
        _ => Err(ApiError::invalid("only data may follow the header").into()),
    });
    tokio::spawn(async move {
        // An end in one direction is not yet one in the other; a failure in one is.
        let inward = deliver(Box::pin(data), to_socket);
        let outward = async move { collect(from_socket, |data| send.send(Ok(Chunk { data }))).await };
        if let Err(error) = tokio::try_join!(inward, outward) {
            tracing::debug!(%vm, %error, "a connection of a guest that comes broke off");
        }
    });
    Ok(Box::pin(ReceiverStream::new(chunks)))
}

/// Reads the socket to its end, and hands on what comes.
async fn collect<Handed, E>(mut from: OwnedReadHalf, hand_on: impl Fn(Bytes) -> Handed) -> io::Result<()>
where
    Handed: Future<Output = Result<(), E>>,
{
    loop {
        let mut buffer = BytesMut::with_capacity(CHUNK_BYTES);
        if from.read_buf(&mut buffer).await? == 0 || hand_on(buffer.freeze()).await.is_err() {
            return Ok(());
        }
    }
}

/// Writes to the socket what comes; then its reader sees the end.
async fn deliver(
    mut chunks: impl Stream<Item = Result<Bytes, Status>> + Unpin,
    mut to: OwnedWriteHalf,
) -> io::Result<()> {
    while let Some(chunk) = chunks.next().await {
        to.write_all(&chunk.map_err(io::Error::other)?).await?;
    }
    to.shutdown().await
}

#[cfg(test)]
mod tests;
