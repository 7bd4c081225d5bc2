//! The built-in certificate authority, the identity that each part gets from it, and connections that use both.
//!
//! The common name of a certificate is the identity of its holder: `controller-1`, `node-3`. Every certificate also
//! carries the DNS name `trefoil`, which every client asks for: a part is trusted for who signed it, so its address
//! may change. People do not have certificates; they have tokens (`crate::token`).
//!
//! Not here: whether an identity may do something. That is decided per call, from [`peer_identity`].

use std::{
    future::Future,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use model::{Digest, NodeId};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SigningKey,
    date_time_ymd,
};
use tokio::net::UnixStream;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::WebPkiClientVerifier,
    },
};
use tonic::{
    codegen::{Service, http::Uri},
    transport::{
        Certificate, Channel, ClientTlsConfig, Endpoint, ServerTlsConfig,
        server::{TcpConnectInfo, TlsConnectInfo, UdsConnectInfo},
    },
};

use crate::pem_file;
pub use crate::pem_file::TlsError;

/// The DNS name that every certificate carries and every client asks for.
pub const SERVER_NAME: &str = "trefoil";

/// The name by which controllers ask for each other, and nobody else: it leads to the quorum's own door. Every certificate carries
/// it, also that of a controller which has taken another's place and address.
pub const PEER_NAME: &str = "localhost";

/// How long one connection attempt may take, TCP and TLS each: hosts of one cloud are milliseconds apart, and a
/// client has other controllers to try.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A peer that vanished without a FIN is noticed within the sum of these two while a call is open.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Of a host's session, which is open all the time: ten thousand of these took a fifth of a core at the other interval, and heartbeats
/// tell sooner that the leader is another one.
const SESSION_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// A server gives a handshake this long, so that silent connections do not pile up: its clients do not wait longer.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// Flow control windows: an image stream over 10 Gbit/s and 1 ms in flight needs about 1.25 MB.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// The cloud's own authority: a self-signed certificate and its key. Its files are on the controllers only.
#[derive(Clone, PartialEq, Eq)]
pub struct CertificateAuthority {
    pub ca_pem: String,
    pub key_pem: String,
}

impl CertificateAuthority {
    /// A new authority, named after the cloud.
    ///
    /// # Errors
    /// When `cluster` cannot stand in a certificate.
    pub fn create(cluster: &str) -> Result<Self, TlsError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = long_lived(&format!("Trefoil {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca_pem = params.self_signed(&key)?.pem();
        Ok(Self { ca_pem, key_pem: key.serialize_pem() })
    }

    /// # Errors
    /// When the two are not a certificate and the key that belongs to it.
    pub fn from_pem(ca_pem: &str, key_pem: &str) -> Result<Self, TlsError> {
        let key = KeyPair::from_pem(key_pem)?;
        check_pair(ca_pem, &key)?;
        Issuer::from_ca_cert_pem(ca_pem, &key)?;
        Ok(Self { ca_pem: ca_pem.into(), key_pem: key_pem.into() })
    }

    /// Signs a request (DER) for `identity`. Of the request only the public key is used, after its signature was
    /// checked: names and extensions are the authority's to give. Returns the certificate as PEM.
    ///
    /// # Errors
    /// When the request is malformed or `identity` cannot be a DNS name.
    pub fn sign(&self, csr_der: &[u8], identity: &str) -> Result<String, TlsError> {
        let request = CertificateSigningRequestParams::from_der(&csr_der.into())?;
        let key = KeyPair::from_pem(&self.key_pem)?;
        let issuer = Issuer::from_ca_cert_pem(&self.ca_pem, &key)?;
        Ok(leaf(identity)?.signed_by(&request.public_key, &issuer)?.pem())
    }

    /// A key and certificate for `identity`, both made here: for the controller that creates the cloud.
    ///
    /// # Errors
    /// As [`Self::sign`].
    pub fn issue(&self, identity: &str) -> Result<Identity, TlsError> {
        let request = make_key_and_csr()?;
        let cert_pem = self.sign(&request.csr_der, identity)?;
        Ok(Identity { ca_pem: self.ca_pem.clone(), cert_pem, key_pem: request.key_pem })
    }

    /// The key under which `node` authenticates its heartbeats. Derived, so that every controller knows it without
    /// keeping it.
    ///
    /// # Errors
    /// When the authority's key is malformed.
    pub fn beat_key(&self, node: NodeId) -> Result<crate::beat::BeatKey, TlsError> {
        let mut material = KeyPair::from_pem(&self.key_pem)?.serialize_der();
        material.extend_from_slice(&node.0.to_le_bytes());
        Ok(crate::beat::BeatKey(blake3::derive_key("trefoil heartbeat key of one node, version 1", &material)))
    }

    /// Reads `authority.pem` in `dir`; `None` when there is no such file.
    ///
    /// # Errors
    /// When the file cannot be read or is not what [`Self::save`] writes.
    pub fn load(dir: &Path) -> Result<Option<Self>, TlsError> {
        let path = Self::path(dir);
        let Some(blocks) = pem_file::read(&path)? else { return Ok(None) };
        match blocks.as_slice() {
            [key, ca] => Self::from_pem(ca, key).map(Some),
            _ => Err(TlsError::BadFile(path)),
        }
    }

    /// Writes `authority.pem` in `dir`, readable by its owner only, synced before it replaces an older one.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn save(&self, dir: &Path) -> Result<(), TlsError> {
        pem_file::write(&Self::path(dir), &[&self.key_pem, &self.ca_pem])
    }

    fn path(dir: &Path) -> PathBuf {
        dir.join("authority.pem")
    }
}

/// Who a controller or an agent is, with the proof.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    pub ca_pem: String,
    pub cert_pem: String,
    pub key_pem: String,
}

impl Identity {
    /// Its name: the common name of the certificate, `node-3`.
    ///
    /// # Errors
    /// When the certificate is malformed.
    pub fn name(&self) -> Result<String, TlsError> {
        holder(&certificate_der(&self.cert_pem)?).ok_or(TlsError::BadCertificate)
    }

    /// Reads `identity.pem` in `dir`; `None` when there is no such file.
    ///
    /// # Errors
    /// When the file cannot be read or is not what [`Self::save`] writes.
    pub fn load(dir: &Path) -> Result<Option<Self>, TlsError> {
        let path = Self::path(dir);
        let Some(blocks) = pem_file::read(&path)? else { return Ok(None) };
        let [key_pem, cert_pem, ca_pem] = <[String; 3]>::try_from(blocks).map_err(|_| TlsError::BadFile(path))?;
        check_pair(&cert_pem, &KeyPair::from_pem(&key_pem)?)?;
        Ok(Some(Self { ca_pem, cert_pem, key_pem }))
    }

    /// Writes `identity.pem` in `dir`, readable by its owner only, synced before it replaces an older one. One file,
    /// so that a crash cannot leave a key beside another key's certificate.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn save(&self, dir: &Path) -> Result<(), TlsError> {
        pem_file::write(&Self::path(dir), &[&self.key_pem, &self.cert_pem, &self.ca_pem])
    }

    fn path(dir: &Path) -> PathBuf {
        dir.join("identity.pem")
    }
}

/// A fresh private key and the request to have it certified. The key never leaves the machine that made it.
pub struct KeyAndRequest {
    pub key_pem: String,
    pub csr_der: Vec<u8>,
}

/// # Errors
/// When the machine cannot give random bytes.
pub fn make_key_and_csr() -> Result<KeyAndRequest, TlsError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let csr_der = CertificateParams::default().serialize_request(&key)?.der().to_vec();
    Ok(KeyAndRequest { key_pem: key.serialize_pem(), csr_der })
}

/// For a server that anybody may speak to; who shows a certificate must show one of this cloud.
pub fn server_tls(identity: &Identity) -> ServerTlsConfig {
    ServerTlsConfig::new()
        .identity(tonic::transport::Identity::from_pem(&identity.cert_pem, &identity.key_pem))
        .client_ca_root(Certificate::from_pem(&identity.ca_pem))
        .client_auth_optional(true)
        .timeout(HANDSHAKE_TIMEOUT)
}

/// The same, for a server that shakes hands itself.
///
/// # Errors
/// When a file of the identity is malformed.
pub fn acceptor(identity: &Identity) -> Result<TlsAcceptor, TlsError> {
    let bad = |error: &dyn std::fmt::Display| TlsError::BadConfig(error.to_string());
    let certificate = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|e| bad(&e));
    let provider = Arc::new(ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(certificate(&identity.ca_pem)?).map_err(|e| bad(&e))?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
    let verifier = verifier.allow_unauthenticated().build().map_err(|e| bad(&e))?;
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).map_err(|e| bad(&e))?;
    let versions = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = versions.map_err(|e| bad(&e))?.with_client_cert_verifier(verifier);
    let mut config = builder.with_single_cert(vec![certificate(&identity.cert_pem)?], key).map_err(|e| bad(&e))?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config).into())
}

/// For a part of the cloud that shows its certificate.
pub fn client_tls(identity: &Identity) -> ClientTlsConfig {
    client_tls_ca(&identity.ca_pem)
        .identity(tonic::transport::Identity::from_pem(&identity.cert_pem, &identity.key_pem))
}

/// For a person or a joiner: verifies the server and shows nothing.
pub fn client_tls_ca(ca_pem: &str) -> ClientTlsConfig {
    ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca_pem))
        .domain_name(SERVER_NAME)
        .timeout(CONNECT_TIMEOUT)
}

/// A channel to `host:port` or `unix:/path` that connects at its first call and again after each loss.
///
/// # Errors
/// When the endpoint is neither, or the certificates in `tls` are malformed.
pub fn connect(endpoint: &str, tls: ClientTlsConfig) -> Result<Channel, TlsError> {
    connect_watched(endpoint, tls, KEEPALIVE_INTERVAL)
}

/// The same for a host's session with its leader.
///
/// # Errors
/// As [`connect`].
pub fn connect_session(endpoint: &str, tls: ClientTlsConfig) -> Result<Channel, TlsError> {
    connect_watched(endpoint, tls, SESSION_KEEPALIVE_INTERVAL)
}

fn connect_watched(endpoint: &str, tls: ClientTlsConfig, keepalive: Duration) -> Result<Channel, TlsError> {
    let bad = || TlsError::BadEndpoint(endpoint.into());
    if let Some(path) = endpoint.strip_prefix("unix:") {
        if !path.starts_with('/') {
            return Err(bad());
        }
        // The address in the URI is never used: the connector below knows the path.
        let transport = tuned(Endpoint::from_static("https://trefoil"), tls, keepalive)?;
        return Ok(transport.connect_with_connector_lazy(UnixConnector(Arc::from(Path::new(path)))));
    }
    let (host, port) = endpoint.rsplit_once(':').ok_or_else(bad)?;
    if host.is_empty() || host.contains(['/', '@', '?', '#']) || port.parse::<u16>().is_err() {
        return Err(bad());
    }
    let transport = Endpoint::from_shared(format!("https://{endpoint}")).map_err(|_| bad())?;
    Ok(tuned(transport, tls, keepalive)?.connect_lazy())
}

/// The name in the certificate that the caller showed and that TLS verified against the cloud's authority; `None`
/// when it showed none. The same on TCP and on the unix socket.
pub fn peer_identity<T>(request: &tonic::Request<T>) -> Option<String> {
    peer_certificate(request).and_then(|der| holder(&der))
}

/// By what the holder of the verified certificate may be known: the digest of its public key, as [`key_digest`] gives it, and
/// that of the certificate itself.
pub fn peer_digests<T>(request: &tonic::Request<T>) -> Option<[Digest; 2]> {
    let der = peer_certificate(request)?;
    Some([digest_of_key(&der)?, Digest::of(&der)])
}

/// The digest of the public key in a certificate: the same however often the certificate is made anew.
///
/// # Errors
/// When the text is not one certificate.
pub fn key_digest(cert_pem: &str) -> Result<Digest, TlsError> {
    digest_of_key(&certificate_der(cert_pem)?).ok_or(TlsError::BadCertificate)
}

fn digest_of_key(der: &[u8]) -> Option<Digest> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    Some(Digest::of(certificate.public_key().raw))
}

fn peer_certificate<T>(request: &tonic::Request<T>) -> Option<Vec<u8>> {
    let extensions = request.extensions();
    let tcp = || extensions.get::<TlsConnectInfo<TcpConnectInfo>>().and_then(TlsConnectInfo::peer_certs);
    let unix = || extensions.get::<TlsConnectInfo<UdsConnectInfo>>().and_then(TlsConnectInfo::peer_certs);
    tcp().or_else(unix)?.first().map(|der| der.to_vec())
}

/// The name in a certificate, DER; `None` when it has none, or more than one.
pub fn holder(der: &[u8]) -> Option<String> {
    let (rest, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let mut names = certificate.subject().iter_common_name();
    let name = names.next()?.as_str().ok()?;
    // Two names would leave it to the reader which one counts.
    (rest.is_empty() && names.next().is_none()).then(|| name.to_owned())
}

fn certificate_der(cert_pem: &str) -> Result<Vec<u8>, TlsError> {
    let (_, pem) = x509_parser::pem::parse_x509_pem(cert_pem.as_bytes()).map_err(|_| TlsError::BadCertificate)?;
    if pem.label == "CERTIFICATE" { Ok(pem.contents) } else { Err(TlsError::BadCertificate) }
}

fn check_pair(cert_pem: &str, key: &impl SigningKey) -> Result<(), TlsError> {
    let der = certificate_der(cert_pem)?;
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).map_err(|_| TlsError::BadCertificate)?;
    let same = certificate.public_key().raw == key.subject_public_key_info().as_slice();
    if same { Ok(()) } else { Err(TlsError::KeyMismatch) }
}

fn leaf(identity: &str) -> Result<CertificateParams, TlsError> {
    let mut params = long_lived(identity);
    for name in [identity, SERVER_NAME, PEER_NAME] {
        params.subject_alt_names.push(SanType::DnsName(name.try_into()?));
    }
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Certificates do not run out by themselves: a cloud must not stop on a date that nobody remembers, nor because a
/// host without a battery woke up in the past. A lost host is shut out by its record in the quorum.
fn long_lived(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.not_before = date_time_ymd(2000, 1, 1);
    params.not_after = date_time_ymd(2099, 12, 31);
    params
}

fn tuned(endpoint: Endpoint, tls: ClientTlsConfig, keepalive: Duration) -> Result<Endpoint, TlsError> {
    let endpoint = endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(keepalive)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    endpoint.tls_config(tls).map_err(|e| TlsError::BadConfig(e.to_string()))
}

/// Tonic's own support for unix sockets has no TLS; as a connector it has.
#[derive(Clone)]
struct UnixConnector(Arc<Path>);

impl Service<Uri> for UnixConnector {
    type Response = TokioIo<UnixStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let path = self.0.clone();
        Box::pin(async move { UnixStream::connect(path).await.map(TokioIo::new) })
    }
}

#[cfg(test)]
mod tests;
