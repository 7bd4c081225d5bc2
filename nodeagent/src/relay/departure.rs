//! The source's side: three sockets, and for each connection to one of them a call to the destination's agent.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use api::{
    error::ApiError,
    proto::{
        Chunk, DescribeArrivalReply, DescribeArrivalRequest, RelayChannel, RelayHeader, RelayRequest,
        node_data_client::NodeDataClient, relay_request::Part,
    },
    tls::{Identity, client_tls, connect},
};
use futures::StreamExt;
use model::{Mac, VmId};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, transport::Channel};

use super::{Arrivals, CHUNKS_UNDER_WAY, collect, deliver};
use crate::hypervisor::migration::{Destination, Route};

/// The destination answers from memory.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum DepartureError {
    /// The destination's agent cannot be reached, or does not expect the guest from here (yet).
    #[error("the destination: {0}")]
    Destination(String),
    /// A socket cannot be made, or a disk not read.
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("a blocking task was cut short")]
    CutShort,
}

/// A guest's way out of this host, open for as long as this lives. When it is dropped while the guest is moving, the
/// move fails and the guest stays.
pub struct Departure {
    pub route: Route,
    pub destination: Destination,
    _doors: JoinSet<()>,
}

impl Departure {
    /// Asks the agent at `address`, and opens the sockets. `own`: whether guests move through any.
    ///
    /// # Errors
    /// When the other agent cannot be reached or does not expect the guest, or a socket cannot be made.
    pub async fn open(
        own: &Arrivals,
        identity: &Identity,
        address: &str,
        vm: VmId,
        epoch: u64,
    ) -> Result<Self, DepartureError> {
        let (client, destination) = ask(identity, address, vm, epoch).await?;
        let dir = own.dir();
        let (route, mut doors) = (Route::new(dir, vm), JoinSet::new());
        if !own.have_sockets() {
            return Ok(Self { route, destination, _doors: doors });
        }
        own.make_dir().map_err(socket_error(dir))?;
        for (path, which) in [
            (&route.control, RelayChannel::Control),
            (&route.memory, RelayChannel::Memory),
            (&route.disk, RelayChannel::Disk),
        ] {
            // Left by an agent that was killed.
            match fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(socket_error(path)(e)),
                _ => {}
            }
            let listener = UnixListener::bind(path).map_err(socket_error(path))?;
            let header = RelayHeader { vm: vm.to_string(), epoch, channel: which.into() };
            doors.spawn(attend(listener, client.clone(), header));
        }
        Ok(Self { route, destination, _doors: doors })
    }
}

impl Drop for Departure {
    fn drop(&mut self) {
        for path in [&self.route.control, &self.route.memory, &self.route.disk] {
            // The next one removes it, if this does not.
            let _ = fs::remove_file(path);
        }
    }
}

/// What the agent at `address` has prepared for the guest, and the way to it.
///
/// # Errors
/// When it cannot be reached, or does not expect the guest from here (yet).
pub async fn ask(
    identity: &Identity,
    address: &str,
    vm: VmId,
    epoch: u64,
) -> Result<(NodeDataClient<Channel>, Destination), DepartureError> {
    let channel = connect(address, client_tls(identity)).map_err(|e| DepartureError::Destination(e.to_string()))?;
    let client = NodeDataClient::new(channel);
    let asked = DescribeArrivalRequest { vm: vm.to_string(), epoch };
    match timeout(ANSWER_LIMIT, client.clone().describe_arrival(asked)).await {
        Ok(Ok(told)) => Ok((client, destination(told.into_inner(), epoch)?)),
        Ok(Err(status)) => Err(DepartureError::Destination(ApiError::from(status).to_string())),
        Err(_) => Err(DepartureError::Destination("no answer in time".into())),
    }
}

fn destination(told: DescribeArrivalReply, epoch: u64) -> Result<Destination, DepartureError> {
    let mut bridges = Vec::new();
    for bridge in told.bridges {
        let mac = <[u8; 6]>::try_from(&*bridge.mac);
        let mac = mac.map_err(|_| DepartureError::Destination("a MAC address has six bytes".into()))?;
        bridges.push((Mac(mac), bridge.bridge));
    }
    let (disk, seed, console) = (told.disk.into(), told.seed.into(), told.console.into());
    Ok(Destination { epoch, disk, seed, console, bridges })
}

/// Its connections end with it.
async fn attend(listener: UnixListener, client: NodeDataClient<Channel>, header: RelayHeader) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((near, _)) => drop(connections.spawn(carry(near, client.clone(), header.clone()))),
                Err(error) => {
                    tracing::warn!(vm = header.vm, %error, "a socket of a guest that goes failed");
                    return;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn carry(near: UnixStream, mut client: NodeDataClient<Channel>, header: RelayHeader) {
    let vm = header.vm.clone();
    if let Err(error) = join(near, &mut client, header).await {
        tracing::debug!(vm, %error, "a connection of a guest that goes broke off");
    }
}

async fn join(near: UnixStream, client: &mut NodeDataClient<Channel>, header: RelayHeader) -> Result<(), Status> {
    let (send, requests) = mpsc::channel(CHUNKS_UNDER_WAY);
    let message = |part| RelayRequest { part: Some(part) };
    // There is room: nothing else was sent yet.
    let _ = send.send(message(Part::Header(header))).await;
    let (from_socket, to_socket) = near.into_split();
    let outward =
        async move { collect(from_socket, |data| send.send(message(Part::Data(data)))).await.map_err(Status::from) };
    let inward = async {
        let answers = client.relay(ReceiverStream::new(requests)).await?.into_inner();
        let data = answers.map(|chunk| chunk.map(|Chunk { data }| data));
        deliver(Box::pin(data), to_socket).await.map_err(Status::from)
    };
    // An end in one direction is not yet one in the other; a failure in one is.
    tokio::try_join!(outward, inward).map(drop)
}

fn socket_error(path: &Path) -> impl FnOnce(io::Error) -> DepartureError {
    let path = path.to_owned();
    move |source| DepartureError::File { path, source }
}
