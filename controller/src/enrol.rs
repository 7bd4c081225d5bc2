//! `trefoil controller join`: gets an identity for a one-time token. The leader adds it to the quorum once it runs.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use api::{
    client::{self, Joined},
    tls::{CertificateAuthority, Identity, make_key_and_csr},
};

use crate::config::{Config, Timing, fresh, snapshot_every};

pub struct JoinArgs {
    /// An empty or missing directory.
    pub data: PathBuf,
    pub name: String,
    pub listen: SocketAddr,
    /// `host:port` at which controllers and agents reach it.
    pub advertise: String,
    pub token: String,
    pub timing: Timing,
    /// Log entries between snapshots; `None` is the default.
    pub snapshot_every: Option<u64>,
}

/// Long enough for an election or two while the quorum is busy.
const DEADLINE: Duration = Duration::from_secs(30);

/// # Errors
/// When the directory is in use, the token is refused, or no controller answers.
pub async fn join(args: JoinArgs) -> Result<u64> {
    fresh(&args.data)?;
    let request = make_key_and_csr()?;
    let joined = client::join(&args.token, &args.name, &args.advertise, request.csr_der, DEADLINE).await?;
    let Joined::Controller(reply) = joined else { bail!("the token is an agent's, not a controller's") };
    let text = |bytes: Vec<u8>, what: &str| String::from_utf8(bytes).with_context(|| format!("the {what} is not text"));
    let ca_pem = text(reply.ca_pem.into(), "authority's certificate")?;
    let ca_key_pem = text(reply.ca_key_pem.into(), "authority's key")?;
    let cert_pem = text(reply.certificate_pem.into(), "certificate")?;
    CertificateAuthority::from_pem(&ca_pem, &ca_key_pem)?.save(&args.data)?;
    Identity { ca_pem, cert_pem, key_pem: request.key_pem }.save(&args.data)?;
    let config = Config {
        id: reply.id,
        name: args.name,
        cluster: reply.cluster,
        epoch: reply.epoch,
        listen: args.listen,
        advertise: args.advertise,
        timing: args.timing,
        snapshot_every: args.snapshot_every.unwrap_or_else(snapshot_every),
    };
    config.save(&args.data)?;
    Ok(reply.id)
}
