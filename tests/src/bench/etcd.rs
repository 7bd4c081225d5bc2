//! A three-member etcd with its own defaults, on loopback: without TLS, its fastest form, and with TLS between members
//! and to clients, as Trefoil always has it.

use std::{path::Path, process::Command, time::Duration};

use anyhow::Context;
use api::tls;
use jepsen::cluster::{free_port, process::Process};
use tonic::transport::{Channel, Endpoint};

use super::{LOOK_AGAIN, store::Store, until};

/// Generated from `proto/etcd.proto`.
#[allow(clippy::all, clippy::pedantic)]
pub mod proto {
    tonic::include_proto!("etcdserverpb");
}

const MEMBERS: usize = 3;

pub struct Etcd {
    members: Vec<Member>,
    /// With TLS: what members are trusted by.
    ca_pem: Option<String>,
}

pub struct Member {
    pub process: Process,
    address: String,
    arguments: Vec<String>,
}

impl Etcd {
    /// Why it cannot be measured here, if it cannot.
    pub fn obstacle() -> Option<String> {
        let found = Command::new("etcd").arg("--version").output();
        found.err().map(|_| "the command 'etcd' is not installed (Debian: etcd-server)".into())
    }

    /// # Errors
    /// When it does not come up within half a minute.
    pub async fn start(root: &Path, tls: bool) -> anyhow::Result<Self> {
        std::fs::create_dir_all(root)?;
        let (ca_pem, secrets) = if tls { certificates(root)? } else { (None, Vec::new()) };
        let ports: Vec<(u16, u16)> =
            (0..MEMBERS).map(|_| Ok((free_port()?, free_port()?))).collect::<anyhow::Result<_>>()?;
        let scheme = if tls { "https" } else { "http" };
        let listen = |port: u16| format!("{scheme}://127.0.0.1:{port}");
        // A name, because the certificates have no addresses.
        let reach = |port: u16| format!("{scheme}://localhost:{port}");
        let all: Vec<String> =
            ports.iter().enumerate().map(|(n, (_, peer))| format!("m{n}={}", reach(*peer))).collect();
        let mut members = Vec::new();
        for (number, (client, peer)) in ports.iter().enumerate() {
            let data = root.join(format!("m{number}")).display().to_string();
            let arguments = [
                ("name", format!("m{number}")),
                ("data-dir", data),
                ("listen-client-urls", listen(*client)),
                ("advertise-client-urls", reach(*client)),
                ("listen-peer-urls", listen(*peer)),
                ("initial-advertise-peer-urls", reach(*peer)),
                ("initial-cluster", all.join(",")),
                ("log-level", "error".into()),
            ];
            let mut arguments: Vec<String> =
                arguments.into_iter().map(|(name, value)| format!("--{name}={value}")).collect();
            arguments.extend(secrets.clone());
            let process = launch(&arguments, &root.join(format!("m{number}.log")))?;
            members.push(Member { process, address: format!("127.0.0.1:{client}"), arguments });
        }
        let etcd = Self { members, ca_pem };
        until("etcd has a leader", Duration::from_secs(30), LOOK_AGAIN, async || etcd.leader().await.is_some()).await?;
        Ok(etcd)
    }

    fn channel(&self, member: usize) -> anyhow::Result<Channel> {
        let address = &self.members[member].address;
        if let Some(ca_pem) = &self.ca_pem {
            return Ok(tls::connect(address, tls::client_tls_ca(ca_pem))?);
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
        Ok(endpoint.tcp_nodelay(true).connect_timeout(Duration::from_secs(1)).connect_lazy())
    }

    /// Connections to all members in turn.
    ///
    /// # Errors
    /// When an endpoint is malformed.
    pub fn stores(&self, connections: usize) -> anyhow::Result<Vec<Store>> {
        let store = |number: usize| {
            let channel = self.channel(number % self.members.len())?;
            Ok(Store::Etcd { kv: proto::kv_client::KvClient::new(channel) })
        };
        (0..connections).map(store).collect()
    }

    /// Which member leads, if a member that answers knows one.
    pub async fn leader(&self) -> Option<usize> {
        for member in 0..self.members.len() {
            let Ok(channel) = self.channel(member) else { continue };
            let mut client = proto::maintenance_client::MaintenanceClient::new(channel);
            let call = client.status(proto::StatusRequest {});
            let Ok(Ok(reply)) = tokio::time::timeout(Duration::from_millis(500), call).await else { continue };
            let status = reply.into_inner();
            if status.leader != 0 && status.header.is_some_and(|header| header.member_id == status.leader) {
                return Some(member);
            }
        }
        None
    }

    /// # Errors
    /// When it cannot be killed.
    pub fn kill(&mut self, member: usize) -> std::io::Result<bool> {
        self.members[member].process.kill()
    }

    /// # Errors
    /// When it cannot be started.
    pub fn restart(&mut self, member: usize) -> anyhow::Result<()> {
        let member = &mut self.members[member];
        member.process = launch(&member.arguments, &member.process.log.clone())?;
        Ok(())
    }

    pub fn cpu_time(&self) -> Duration {
        self.members.iter().filter_map(|member| member.process.cpu_time()).sum()
    }

    /// Mean over the members.
    pub fn resident_bytes(&self) -> u64 {
        let sum: u64 = self.members.iter().filter_map(|member| member.process.resident_bytes()).sum();
        sum / MEMBERS as u64
    }
}

/// An authority and one certificate for all members, as files; the arguments that name them.
fn certificates(root: &Path) -> anyhow::Result<(Option<String>, Vec<String>)> {
    let authority = tls::CertificateAuthority::create("bench")?;
    let identity = authority.issue("etcd")?;
    let file = |name: &str, text: &str| {
        let path = root.join(name);
        std::fs::write(&path, text)?;
        anyhow::Ok(path.display().to_string())
    };
    let ca = file("ca.pem", &identity.ca_pem)?;
    let (certificate, key) = (file("cert.pem", &identity.cert_pem)?, file("key.pem", &identity.key_pem)?);
    let mut arguments = vec![format!("--peer-trusted-ca-file={ca}"), "--peer-client-cert-auth".to_owned()];
    for side in ["", "peer-"] {
        arguments.extend([format!("--{side}cert-file={certificate}"), format!("--{side}key-file={key}")]);
    }
    Ok((Some(identity.ca_pem), arguments))
}

fn launch(arguments: &[String], log: &Path) -> anyhow::Result<Process> {
    let mut command = Command::new("etcd");
    command.args(arguments);
    Process::start(command, log).context("starting etcd")
}
