//! Certificates, identities and connections, tried over real sockets.

use std::os::unix::fs::PermissionsExt;

use tokio::{
    net::{TcpListener, UnixListener},
    sync::oneshot,
};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::{Request, Response, Status, transport::Server};

use super::*;
use crate::proto::{
    JoinAgentReply, JoinControllerReply, JoinRequest,
    join_client::JoinClient,
    join_server::{Join, JoinServer},
};

/// Answers with the name in the caller's certificate.
struct Mirror;

#[tonic::async_trait]
impl Join for Mirror {
    async fn join_controller(&self, _: Request<JoinRequest>) -> Result<Response<JoinControllerReply>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn join_agent(&self, request: Request<JoinRequest>) -> Result<Response<JoinAgentReply>, Status> {
        let cluster = peer_identity(&request).unwrap_or_default();
        let beat_key =
            peer_digests(&request).map(|digests| digests.map(|digest| digest.0).concat()).unwrap_or_default();
        Ok(Response::new(JoinAgentReply { cluster, beat_key: beat_key.into(), ..Default::default() }))
    }
}

async fn ask(endpoint: &str, tls: ClientTlsConfig) -> Result<JoinAgentReply, Status> {
    let mut client = JoinClient::new(connect(endpoint, tls).unwrap());
    client.join_agent(JoinRequest::default()).await.map(Response::into_inner)
}

#[tokio::test]
async fn peers_are_known_by_their_certificate_on_tcp_and_on_the_unix_socket() {
    let ca = CertificateAuthority::create("test").unwrap();
    let server = ca.issue("controller-1").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("api.sock");
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoints = [tcp.local_addr().unwrap().to_string(), format!("unix:{}", socket.display())];
    let unix = UnixListener::bind(&socket).unwrap();
    let (stop_tcp, stopped_tcp) = oneshot::channel::<()>();
    let (stop_unix, stopped_unix) = oneshot::channel::<()>();
    let build = || Server::builder().tls_config(server_tls(&server)).unwrap().add_service(JoinServer::new(Mirror));
    let serving = tokio::spawn(build().serve_with_incoming_shutdown(TcpListenerStream::new(tcp), async {
        let _ = stopped_tcp.await;
    }));
    let serving_unix = tokio::spawn(build().serve_with_incoming_shutdown(UnixListenerStream::new(unix), async {
        let _ = stopped_unix.await;
    }));

    let node = ca.issue("node-3").unwrap();
    let stranger = CertificateAuthority::create("test").unwrap();
    for endpoint in &endpoints {
        let known = ask(endpoint, client_tls(&node)).await.unwrap();
        assert_eq!(known.cluster, "node-3", "{endpoint}");
        let of_certificate = Digest::of(&certificate_der(&node.cert_pem).unwrap());
        let digests = [key_digest(&node.cert_pem).unwrap(), of_certificate].map(|digest| digest.0).concat();
        assert_eq!(known.beat_key, digests, "{endpoint}");
        assert_eq!(ask(endpoint, client_tls_ca(&ca.ca_pem)).await.unwrap().cluster, "", "{endpoint}");
        ask(endpoint, client_tls_ca(&stranger.ca_pem)).await.expect_err("a server of another authority");
        let forged = Identity { ca_pem: ca.ca_pem.clone(), ..stranger.issue("node-3").unwrap() };
        ask(endpoint, client_tls(&forged)).await.expect_err("a certificate of another authority");
    }
    drop((stop_tcp, stop_unix));
    serving.await.unwrap().unwrap();
    serving_unix.await.unwrap().unwrap();
}

#[test]
fn only_the_public_key_of_a_request_is_believed() {
    let ca = CertificateAuthority::create("test").unwrap();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut wish = long_lived("controller-1");
    wish.subject_alt_names.push(SanType::DnsName("evil".try_into().unwrap()));
    wish.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let csr = wish.serialize_request(&key).unwrap();
    let cert_pem = ca.sign(csr.der(), "node-3").unwrap();
    let der = certificate_der(&cert_pem).unwrap();
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
    assert_eq!(holder(&der).as_deref(), Some("node-3"));
    assert!(!certificate.is_ca() && !format!("{:?}", certificate.extensions()).contains("evil"));

    let mut broken = csr.der().to_vec();
    *broken.last_mut().unwrap() ^= 1;
    assert!(ca.sign(&broken, "node-3").is_err(), "the signature of the request is checked");
    assert!(ca.sign(b"junk", "node-3").is_err() && ca.sign(csr.der(), "nöde").is_err());
}

#[test]
fn a_certificate_that_is_made_anew_is_of_the_same_key() {
    let ca = CertificateAuthority::create("test").unwrap();
    let request = make_key_and_csr().unwrap();
    let [first, again] = [(); 2].map(|()| ca.sign(&request.csr_der, "node-3").unwrap());
    assert_ne!(certificate_der(&first).unwrap(), certificate_der(&again).unwrap());
    assert_eq!(key_digest(&first).unwrap(), key_digest(&again).unwrap());
    let another = ca.sign(&make_key_and_csr().unwrap().csr_der, "node-3").unwrap();
    assert_ne!(key_digest(&first).unwrap(), key_digest(&another).unwrap());
    assert!(key_digest("junk").is_err());
}

#[test]
fn secrets_are_read_back_as_they_were_written_for_their_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    assert!(Identity::load(&data).unwrap().is_none() && CertificateAuthority::load(&data).unwrap().is_none());
    let ca = CertificateAuthority::create("test").unwrap();
    let identity = ca.issue("node-3").unwrap();
    ca.save(&data).unwrap();
    identity.save(&data).unwrap();
    identity.save(&data).unwrap();
    assert!(CertificateAuthority::load(&data).unwrap() == Some(ca.clone()));
    let loaded = Identity::load(&data).unwrap().unwrap();
    assert!(loaded == identity && loaded.name().unwrap() == "node-3");
    for file in ["identity.pem", "authority.pem"] {
        assert_eq!(std::fs::metadata(data.join(file)).unwrap().permissions().mode() & 0o777, 0o600, "{file}");
    }
    assert_eq!(std::fs::metadata(&data).unwrap().permissions().mode() & 0o777, 0o700);

    let mixed = Identity { key_pem: ca.issue("node-3").unwrap().key_pem, ..identity };
    mixed.save(&data).unwrap();
    assert!(matches!(Identity::load(&data), Err(TlsError::KeyMismatch)));
    std::fs::write(data.join("identity.pem"), "junk").unwrap();
    assert!(matches!(Identity::load(&data), Err(TlsError::BadFile(_))));
}

#[test]
fn each_node_has_its_own_beat_key_the_same_on_every_controller() {
    let ca = CertificateAuthority::create("test").unwrap();
    let copy = CertificateAuthority::from_pem(&ca.ca_pem, &format!("{}\n", ca.key_pem)).unwrap();
    assert!(ca.beat_key(NodeId(1)).unwrap() == copy.beat_key(NodeId(1)).unwrap());
    assert!(ca.beat_key(NodeId(1)).unwrap() != ca.beat_key(NodeId(2)).unwrap());
    assert!(CertificateAuthority::from_pem(&ca.ca_pem, &CertificateAuthority::create("x").unwrap().key_pem).is_err());
}

#[tokio::test]
async fn an_endpoint_has_two_forms() {
    let ca = CertificateAuthority::create("test").unwrap();
    for good in ["10.0.0.1:7470", "controller:1", "[::1]:7470", "unix:/run/trefoil/api.sock"] {
        assert!(connect(good, client_tls_ca(&ca.ca_pem)).is_ok(), "{good}");
    }
    for bad in ["", "10.0.0.1", ":7470", "host:0x1", "host:70000", "unix:api.sock", "http://h:1", "a b:1", "h/x:1"] {
        assert!(connect(bad, client_tls_ca(&ca.ca_pem)).is_err(), "{bad}");
    }
}
