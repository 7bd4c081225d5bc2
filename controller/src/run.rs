//! `trefoil controller run`: opens the replica, listens, and stops so that nobody notices.

use std::{
    future::Future,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use api::{
    proto::{join_server::JoinServer, node_session_server::NodeSessionServer, trefoil_server::TrefoilServer},
    session::MAX_FRAME_BYTES,
    tls::{self, CertificateAuthority, Identity},
};
use raft::Replica;
use tokio::{
    net::{TcpListener, UdpSocket, UnixListener},
    runtime::{Handle, Runtime},
};
use tonic::transport::{Server, server::Router};

use crate::{
    admit::{Admission, MAX_JOIN_BYTES},
    bells,
    config::{Config, random},
    core::Core,
    door,
    found::replica_config,
    gate::Gate,
    hear, lead, probe, refound,
    service::{MAX_REQUEST_BYTES, Service},
    session::Sessions,
};

pub struct RunArgs {
    pub data: PathBuf,
}

/// Calls that are open when the controller stops may take this long to end.
const DRAIN: Duration = Duration::from_secs(2);
/// An image upload at 10 Gbit/s and 1 ms has about 1.25 MB in flight.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// One may be applying a batch, and there is still one that answers. A third cost a sixth of the writes of 64 clients on two cores.
const QUORUM_THREADS: usize = 2;
/// A thread that hangs on a disk is left behind.
const LAST_THREADS: Duration = Duration::from_secs(5);
/// A client that vanished without a word keeps what it had open for the sum of these. Nothing else waits for that.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Calls that one connection may have open; more wait in the client.
const CALLS_PER_CONNECTION: u32 = 2048;

/// Runs until `shutdown` is ready, then hands leadership over, lets open calls end and stops.
///
/// # Errors
/// When the data directory is not a controller's, an address cannot be listened on, or the replica cannot open.
pub async fn run(args: RunArgs, shutdown: impl Future<Output = ()> + Send + 'static) -> Result<()> {
    boxed(args, Box::pin(shutdown)).await
}

/// Without a type parameter the server is compiled, and optimised, in this crate and not in the program's.
fn boxed(
    args: RunArgs,
    shutdown: Pin<Box<dyn Future<Output = ()> + Send>>,
) -> Pin<Box<dyn Future<Output = Result<()>> + Send>> {
    Box::pin(serve(args, shutdown))
}

async fn serve(args: RunArgs, shutdown: Pin<Box<dyn Future<Output = ()> + Send>>) -> Result<()> {
    let config = Config::load(&args.data)?;
    refound::must_be_whole(&args.data)?;
    must_not_be_fenced(&args.data)?;
    let identity = Identity::load(&args.data)?.with_context(|| format!("{} has no identity", args.data.display()))?;
    let authority =
        CertificateAuthority::load(&args.data)?.with_context(|| format!("{} has no authority", args.data.display()))?;
    let tcp =
        TcpListener::bind(config.listen).await.with_context(|| format!("cannot listen on {} (TCP)", config.listen))?;
    let udp =
        UdpSocket::bind(config.listen).await.with_context(|| format!("cannot listen on {} (UDP)", config.listen))?;
    let unix = unix_listener(&args.data)?;
    let quorum = QuorumThreads::start()?;
    let opening = Replica::open(replica_config(&config, args.data.clone(), &identity));
    let replica = quorum.handle().spawn(opening).await??;
    let core = Arc::new(Core::new(replica, authority, identity));

    let (stop, stopped) = tokio::sync::watch::channel(false);
    let until = |mut stopped: tokio::sync::watch::Receiver<bool>| async move {
        // The sender lives until the end of `run`; losing it means the same.
        let _ = stopped.wait_for(|stop| *stop).await;
    };
    let acceptor = tls::acceptor(&core.identity)?;
    let (peers, others) = door::open(tcp, &acceptor, quorum.handle().clone(), until(stopped.clone()));
    let unix = door::open_unix(unix, &acceptor, until(stopped.clone()));
    let for_peers = quorum.handle().spawn(router(&core).serve_with_incoming_shutdown(peers, until(stopped.clone())));
    let over_tcp = router(&core).serve_with_incoming_shutdown(others, until(stopped.clone()));
    let over_unix = router(&core).serve_with_incoming_shutdown(unix, until(stopped));
    let servers = tokio::spawn(async move { tokio::join!(over_tcp, over_unix, for_peers) });
    let nonce = u64::from_le_bytes(random()?[..8].try_into().context("eight of 32 bytes")?) | 1;
    tokio::spawn(hear::listen(core.clone(), udp, nonce));
    tokio::spawn(lead::lead(core.clone()));
    tokio::spawn(bells::ring(core.clone()));
    tokio::spawn(probe::look(core.clone()));
    tracing::info!(controller = config.id, name = config.name, cluster = config.cluster, listen = %config.listen, "running");

    let mut fenced = core.replica.watch_fenced();
    let fenced = async move { fenced.wait_for(Option::is_some).await.ok().and_then(|fenced| *fenced) };
    let fenced = tokio::select! {
        () = shutdown => None,
        fenced = fenced => fenced,
    };
    match &fenced {
        Some(fenced) => remember_fence(&args.data, &fenced.to_string())?,
        None => tracing::info!("stopping: leadership is handed over first"),
    }
    core.replica.shutdown().await;
    // Sessions with agents are open without end; what is not done within the drain is broken off.
    let _ = stop.send(true);
    let _ = tokio::time::timeout(DRAIN, servers).await;
    quorum.stop().await;
    tracing::info!("stopped");
    fenced.map_or(Ok(()), |fenced| bail!("{fenced}"))
}

/// The threads of consensus: ten thousand hosts that all want something must not come between its messages.
struct QuorumThreads(Option<Runtime>);

impl QuorumThreads {
    fn start() -> Result<Self> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(QUORUM_THREADS).thread_name("quorum").enable_all().build();
        Ok(Self(Some(runtime.context("cannot start the quorum's threads")?)))
    }

    fn handle(&self) -> &Handle {
        self.0.as_ref().expect("it is taken at the end only").handle()
    }

    async fn stop(mut self) {
        let Some(runtime) = self.0.take() else { return };
        // As for the other threads: RocksDB must be closed before the process ends.
        let stopped = tokio::task::spawn_blocking(|| runtime.shutdown_timeout(LAST_THREADS)).await;
        stopped.unwrap_or_else(|error| tracing::warn!(%error, "the quorum's threads were not stopped"));
    }
}

impl Drop for QuorumThreads {
    fn drop(&mut self) {
        // After an error nothing is waited for.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// What says why this controller may never run again from its directory.
const FENCED: &str = "FENCED";

fn must_not_be_fenced(data: &Path) -> Result<()> {
    match std::fs::read_to_string(data.join(FENCED)) {
        Ok(why) => bail!("this controller was fenced: {}", why.trim_end()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", data.join(FENCED).display())),
    }
}

/// Before it stops: the next start must not find out again.
fn remember_fence(data: &Path, why: &str) -> Result<()> {
    tracing::error!(why, "alert: this controller is fenced and stops for good");
    let mut file = std::fs::File::create(data.join(FENCED))?;
    file.write_all(format!("{why}\n").as_bytes())?;
    file.sync_all()?;
    Ok(std::fs::File::open(data)?.sync_all()?)
}

fn router(core: &Arc<Core>) -> Router {
    let service = TrefoilServer::new(Service { core: core.clone() }).max_decoding_message_size(MAX_REQUEST_BYTES);
    let admission = JoinServer::new(Admission { core: core.clone() }).max_decoding_message_size(MAX_JOIN_BYTES);
    let sessions = NodeSessionServer::new(Sessions { core: core.clone() }).max_decoding_message_size(MAX_FRAME_BYTES);
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_concurrent_streams(CALLS_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(Gate::new(core.clone(), service))
        .add_service(admission)
        .add_service(sessions)
        .add_service(core.replica.service())
}

/// `DATA/api.sock` speaks the same as the TCP port, tokens and all, so anybody on the machine may connect to it.
fn unix_listener(data: &std::path::Path) -> Result<UnixListener> {
    let path = data.join("api.sock");
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove the old {}", path.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use api::{
        client::{self, Client, Joined, new_request_id},
        error::ApiError,
        proto::{IssueJoinTokenRequest, ListRequest, node_session_client::NodeSessionClient},
        tls::make_key_and_csr,
        token,
    };
    use tonic::transport::ClientTlsConfig;

    use super::*;
    use crate::found::{InitArgs, init};

    const PATIENCE: Duration = Duration::from_secs(30);

    /// What a host is told that opens a session and says nothing.
    async fn attached(address: &str, tls: ClientTlsConfig) -> ApiError {
        let mut sessions = NodeSessionClient::new(tls::connect(address, tls).unwrap());
        sessions.attach(tokio_stream::empty()).await.expect_err("it said no hello").into()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn people_are_known_by_their_tokens_and_hosts_by_their_certificates_on_the_port_and_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let listen: SocketAddr = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let founded = init(InitArgs {
            data: data.clone(),
            name: "c1".into(),
            listen,
            advertise: listen.to_string(),
            operator: "root".into(),
            timing: crate::Timing::Noisy,
            snapshot_every: None,
        });
        let founded = founded.await.unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn(run(RunArgs { data: data.clone() }, async { drop(stopped.await) }));

        let places = [listen.to_string(), format!("unix:{}", data.join("api.sock").display())];
        for (number, place) in places.into_iter().enumerate() {
            let known = Client::new(std::slice::from_ref(&place), &founded.ca_pem, &founded.operator_token).unwrap();
            let listed =
                known.read(ListRequest::default(), async |mut stub, r| stub.list_users(r).await).await.unwrap();
            assert_eq!(listed.users.len(), 1, "{place}");
            let made_up =
                Client::new(std::slice::from_ref(&place), &founded.ca_pem, &token::user_token([1; 32])).unwrap();
            let refused = made_up.read(ListRequest::default(), async |mut stub, r| stub.list_users(r).await).await;
            assert_eq!(refused.unwrap_err().code, "unauthenticated", "{place}");

            let asked = IssueJoinTokenRequest { role: "agent".into(), valid_millis: 0 };
            let issue =
                async |mut stub: api::proto::trefoil_client::TrefoilClient<_>, r| stub.issue_join_token(r).await;
            let token = known.mutate(new_request_id(), asked, issue).await.unwrap().token;
            let request = make_key_and_csr().unwrap();
            let name = format!("host{number}");
            let joined = client::join(&token, &name, "192.0.2.1:7471", request.csr_der, PATIENCE).await.unwrap();
            let Joined::Agent(joined) = joined else { panic!("the token is an agent's") };
            let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
            let (ca_pem, cert_pem) = (text(&joined.ca_pem), text(&joined.certificate_pem));
            let host = Identity { ca_pem, cert_pem, key_pem: request.key_pem };
            assert_eq!(attached(&place, tls::client_tls(&host)).await.code, "invalid-argument", "{place}: no hello");
            let stranger = CertificateAuthority::load(&data).unwrap().unwrap().issue("node-1").unwrap();
            for tls in [tls::client_tls(&stranger), tls::client_tls_ca(&founded.ca_pem)] {
                assert_eq!(attached(&place, tls).await.code, "unauthenticated", "{place}");
            }
        }
        stop.send(()).unwrap();
        running.await.unwrap().unwrap();
    }
}
