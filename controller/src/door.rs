//! Connections come in here: so many handshakes go on at a time, and no more; and the quorum has a door of its own.
//!
//! ```text
//!   connect ──► whom does it ask for? ──┬── a peer ────► handshake ──► the quorum's own threads
//!                                       └── the cloud ──► handshake ──► everybody else's
//! ```
//! A handshake is the dearest thing that a stranger can ask for. After a failover every host of the cloud comes at once; were
//! all of them let in together, each would wait for all others, give up and come again, and the quorum's messages
//! would wait with them until its members took each other for dead. Who is turned away is turned away at once, and comes
//! back after a pause.

use std::{io, sync::Arc, time::Duration};

use api::tls::{HANDSHAKE_TIMEOUT, PEER_NAME, holder};
use model::ControllerId;
use nix::sys::resource::{Resource, getrlimit};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    runtime::Handle,
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls::server::Acceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;

mod guest;

use guest::Guest;

/// At a time: what a core does in a tenth of a second.
const HANDSHAKES: usize = 256;
/// Who has connected and not said yet whom it wants.
const CALLERS: usize = 1024;
/// From other controllers: far more than they ever open.
const PEERS: usize = 1024;
/// Of a hundred files that the process may have open, connections to the port are so many at most, and those of this
/// machine's socket so many: what is left is for the quorum and the disk.
const PERCENT_OF_PORT: u64 = 75;
const PERCENT_OF_SOCKET: u64 = 10;
/// Those that are done and wait for the server.
const AHEAD: usize = 16;
/// After the system refused a connection (too many open files), it will refuse the next one too.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);
/// The first message of a handshake has some hundred bytes, and comes as a whole but for chance.
const HELLO_BYTES: usize = 16 << 10;
const REST_OF_HELLO: Duration = Duration::from_millis(5);

/// Connections whose handshake is done.
pub(crate) type Incoming<S> = ReceiverStream<io::Result<Guest<S>>>;

/// Listens until `stopped`. Gives the connections of other controllers, which live on the quorum's threads, and all others.
pub(crate) fn open(
    listener: TcpListener,
    tls: &TlsAcceptor,
    quorum: Handle,
    stopped: impl Future<Output = ()> + Send + 'static,
) -> (Incoming<TcpStream>, Incoming<TcpStream>) {
    let (peers, others) = (Door::new(tls, PEERS), Door::new(tls, files_in(PERCENT_OF_PORT)));
    let (peers_in, others_in) = (ReceiverStream::new(peers.1), ReceiverStream::new(others.1));
    let let_in = let_in(listener, Arc::new(peers.0), Arc::new(others.0), quorum);
    tokio::spawn(async move {
        tokio::select! {
            () = stopped => {}
            () = let_in => {}
        }
    });
    (peers_in, others_in)
}

/// The same for the socket on this machine, to which no other controller comes.
pub(crate) fn open_unix(
    listener: UnixListener,
    tls: &TlsAcceptor,
    stopped: impl Future<Output = ()> + Send + 'static,
) -> Incoming<UnixStream> {
    let (door, incoming) = Door::new(tls, files_in(PERCENT_OF_SOCKET));
    let door = Arc::new(door);
    let let_in = async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => door.shake_hands(stream, |_| true),
                Err(error) => refused(&error).await,
            }
        }
    };
    tokio::spawn(async move {
        tokio::select! {
            () = stopped => {}
            () = let_in => {}
        }
    });
    ReceiverStream::new(incoming)
}

async fn let_in(listener: TcpListener, peers: Arc<Door<TcpStream>>, others: Arc<Door<TcpStream>>, quorum: Handle) {
    let callers = Arc::new(Semaphore::new(CALLERS));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                refused(&error).await;
                continue;
            }
        };
        let Ok(caller) = callers.clone().try_acquire_owned() else { continue };
        let (peers, others, quorum) = (peers.clone(), others.clone(), quorum.clone());
        tokio::spawn(async move {
            let asked = timeout(HANDSHAKE_TIMEOUT, asked_name(&stream)).await;
            drop(caller);
            match asked {
                Ok(Some(name)) if name == PEER_NAME => {
                    let Ok(stream) = stream.into_std() else { return };
                    quorum.spawn(async move {
                        if let Ok(stream) = TcpStream::from_std(stream) {
                            peers.shake_hands(stream, |stream| {
                                holder_of(stream).is_some_and(|name| is_controller(&name))
                            });
                        }
                    });
                }
                Ok(Some(_)) => others.shake_hands(stream, |_| true),
                // It said what is no handshake, nothing, or went away.
                Ok(None) | Err(_) => {}
            }
        });
    }
}

async fn refused(error: &io::Error) {
    tracing::warn!(%error, "a connection could not be accepted");
    sleep(REFUSED_PAUSE).await;
}

/// The server's name in the first message of the handshake, which stays unread; empty without a name. `None` when it is none.
async fn asked_name(stream: &TcpStream) -> Option<String> {
    stream.set_nodelay(true).ok()?;
    let mut hello = vec![0; HELLO_BYTES];
    loop {
        let length = stream.peek(&mut hello).await.ok().filter(|length| *length > 0)?;
        let mut acceptor = Acceptor::default();
        acceptor.read_tls(&mut &hello[..length]).ok()?;
        match acceptor.accept() {
            Ok(Some(accepted)) => return Some(accepted.client_hello().server_name().unwrap_or_default().to_owned()),
            Ok(None) if length < HELLO_BYTES => sleep(REST_OF_HELLO).await,
            Ok(None) | Err(_) => return None,
        }
    }
}

fn is_controller(name: &str) -> bool {
    name.parse::<ControllerId>().is_ok()
}

/// As its certificate says, which was verified.
fn holder_of<S>(stream: &TlsStream<S>) -> Option<String> {
    stream.get_ref().1.peer_certificates()?.first().and_then(|certificate| holder(certificate))
}

fn files_in(percent: u64) -> usize {
    // When the limit cannot be read, that of most systems.
    let files = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(limit, _)| limit);
    usize::try_from(files / 100 * percent).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS)
}

struct Door<S> {
    tls: TlsAcceptor,
    places: Arc<Semaphore>,
    guests: Arc<Semaphore>,
    done: mpsc::Sender<io::Result<Guest<S>>>,
}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Door<S> {
    fn new(tls: &TlsAcceptor, guests: usize) -> (Self, mpsc::Receiver<io::Result<Guest<S>>>) {
        let (done, ready) = mpsc::channel(AHEAD);
        let (places, guests) = (Arc::new(Semaphore::new(HANDSHAKES)), Arc::new(Semaphore::new(guests)));
        (Self { tls: tls.clone(), places, guests, done }, ready)
    }

    /// In a task of its own, if there is a place; else the connection is closed. So it is when its holder is not welcome.
    fn shake_hands(&self, stream: S, welcome: impl Fn(&TlsStream<S>) -> bool + Send + 'static) {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            tracing::debug!("too many connections begin at once: one is turned away");
            return;
        };
        let Ok(stay) = self.guests.clone().try_acquire_owned() else {
            tracing::debug!("as many connections are open as may be: one is turned away");
            return;
        };
        let (tls, done) = (self.tls.clone(), self.done.clone());
        tokio::spawn(async move {
            let shaken = timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await;
            drop(place);
            match shaken {
                // The server is stopping when nobody takes it.
                Ok(Ok(stream)) if welcome(&stream) => drop(done.send(Ok(Guest::new(stream, stay))).await),
                Ok(Ok(_)) => tracing::debug!("a stranger came to the door of controllers"),
                Ok(Err(error)) => tracing::debug!(%error, "a handshake failed"),
                Err(_) => tracing::debug!("a handshake took too long"),
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use api::tls::{CertificateAuthority, Identity, acceptor, client_tls, client_tls_ca};
    use tokio::io::AsyncReadExt;
    use tokio_stream::StreamExt;
    use tonic::transport::{ClientTlsConfig, Endpoint};

    use super::*;

    const SOON: Duration = Duration::from_secs(30);

    struct House {
        address: SocketAddr,
        authority: CertificateAuthority,
        peers: Incoming<TcpStream>,
        others: Incoming<TcpStream>,
    }

    async fn house(stopped: impl Future<Output = ()> + Send + 'static) -> House {
        let authority = CertificateAuthority::create("doors").unwrap();
        let tls = acceptor(&authority.issue("controller-1").unwrap()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (peers, others) = open(listener, &tls, Handle::current(), stopped);
        House { address, authority, peers, others }
    }

    impl House {
        fn identity(&self, name: &str) -> Identity {
            self.authority.issue(name).unwrap()
        }

        /// Keeps trying to come in.
        fn knock(&self, tls: ClientTlsConfig) -> tokio::task::JoinHandle<bool> {
            let endpoint = Endpoint::from_shared(format!("https://{}", self.address)).unwrap().tls_config(tls).unwrap();
            tokio::spawn(async move { endpoint.connect().await.is_ok() })
        }
    }

    #[tokio::test]
    async fn silent_strangers_take_their_places_and_no_more() {
        let mut house = house(std::future::pending()).await;
        let mut strangers = Vec::new();
        for _ in 0..=CALLERS {
            strangers.push(TcpStream::connect(house.address).await.unwrap());
        }
        let heard = timeout(SOON, strangers[CALLERS].read(&mut [0; 1])).await.expect("it is turned away at once");
        assert!(matches!(heard, Ok(0) | Err(_)));
        drop(strangers);
        let _knocking = house.knock(client_tls_ca(&house.authority.ca_pem));
        timeout(SOON, house.others.next()).await.expect("there is room again").unwrap().unwrap();
    }

    #[tokio::test]
    async fn controllers_have_a_door_of_their_own_and_nobody_else_comes_in_by_it() {
        let mut house = house(std::future::pending()).await;
        let as_peer = |tls: ClientTlsConfig| tls.domain_name(PEER_NAME);
        let _host = house.knock(client_tls(&house.identity("node-7")));
        let came = timeout(SOON, house.others.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(holder_of(&came.stream).as_deref(), Some("node-7"));
        for stranger in [client_tls(&house.identity("node-7")), client_tls_ca(&house.authority.ca_pem)] {
            let _knocking = house.knock(as_peer(stranger));
            assert!(timeout(Duration::from_millis(300), house.peers.next()).await.is_err());
        }
        let _peer = house.knock(as_peer(client_tls(&house.identity("controller-2"))));
        let came = timeout(SOON, house.peers.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(holder_of(&came.stream).as_deref(), Some("controller-2"));
    }

    #[tokio::test]
    async fn who_stays_keeps_a_place_until_the_connection_is_closed() {
        let authority = CertificateAuthority::create("doors").unwrap();
        let tls = acceptor(&authority.issue("controller-1").unwrap()).unwrap();
        let (door, mut ready) = Door::new(&tls, 1);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("https://{}", listener.local_addr().unwrap());
        let knock = || {
            let endpoint = Endpoint::from_shared(uri.clone()).unwrap();
            let endpoint = endpoint.tls_config(client_tls_ca(&authority.ca_pem)).unwrap();
            tokio::spawn(async move { endpoint.connect().await.is_ok() })
        };
        let open = async || door.shake_hands(listener.accept().await.unwrap().0, |_| true);
        let _first = knock();
        open().await;
        let guest = timeout(SOON, ready.recv()).await.unwrap().unwrap();
        let second = knock();
        open().await;
        assert!(!timeout(SOON, second).await.unwrap().unwrap(), "it is turned away at once");
        drop(guest);
        let _third = knock();
        open().await;
        timeout(SOON, ready.recv()).await.expect("there is room again").unwrap().unwrap();
    }

    #[tokio::test]
    async fn nobody_is_listened_to_once_it_is_closed() {
        let mut house = house(std::future::ready(())).await;
        assert!(timeout(SOON, house.others.next()).await.unwrap().is_none());
        assert!(TcpStream::connect(house.address).await.is_err());
    }
}
