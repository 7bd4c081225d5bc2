//! `trefoil controller init`: a new cloud, with this controller as its only member.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::{Context, Result, bail};
use api::{tls::CertificateAuthority, token};
use model::{Actor, Command, ControllerId, Digest, OperatorCommand, PlannerCommand, level};
use raft::{PeerTls, Proposal, Replica, ReplicaConfig};

use crate::config::{Config, Timing, fresh, random, snapshot_every};

pub struct InitArgs {
    /// An empty or missing directory.
    pub data: PathBuf,
    pub name: String,
    pub listen: SocketAddr,
    /// `host:port` at which controllers and agents reach it.
    pub advertise: String,
    /// Name of the first user.
    pub operator: String,
    pub timing: Timing,
    /// Log entries between snapshots; `None` is the default.
    pub snapshot_every: Option<u64>,
}

pub struct InitOutcome {
    pub cluster: String,
    /// Shown once; the cloud keeps only its digest.
    pub operator_token: String,
    pub ca_pem: String,
}

/// # Errors
/// When the directory is in use, the disk fails, or a name is not allowed.
pub async fn init(args: InitArgs) -> Result<InitOutcome> {
    fresh(&args.data)?;
    let seed = random()?;
    let cluster = format!("c{}", &Digest::of(&seed).to_string()[..8]);
    let authority = CertificateAuthority::create(&cluster)?;
    let id = ControllerId(1);
    let identity = authority.issue(&id.to_string())?;
    let operator_token = token::user_token(random()?);
    let digest = token::user_token_digest(&operator_token).context("a user's token has a digest")?;
    authority.save(&args.data)?;
    identity.save(&args.data)?;

    let config = Config {
        id: id.0,
        name: args.name.clone(),
        cluster: cluster.clone(),
        epoch: 0,
        listen: args.listen,
        advertise: args.advertise.clone(),
        timing: args.timing,
        snapshot_every: args.snapshot_every.unwrap_or_else(snapshot_every),
    };
    let replica = Replica::open(replica_config(&config, args.data.clone(), &identity)).await?;
    replica.initialize(&args.advertise).await?;
    let found = PlannerCommand::Found {
        cluster: cluster.clone(),
        controller: args.name,
        address: args.advertise,
        operator: args.operator,
        token: digest,
    };
    let proposal = Proposal { request: None, actor: Actor::System, command: Command::Planner(found) };
    let founded = replica.propose(proposal).await?;
    if let Err(rejection) = founded.applied {
        bail!("{rejection}");
    }
    raise_level(&replica, level::LATEST).await?;
    replica.shutdown().await;
    config.save(&args.data)?;
    Ok(InitOutcome { cluster, operator_token, ca_pem: authority.ca_pem })
}

/// The only member of a quorum need not ask the others what they know.
pub(crate) async fn raise_level(replica: &Replica, level: u32) -> Result<()> {
    let command = Command::Operator(OperatorCommand::RaiseLevel { level });
    let raised = replica.propose(Proposal { request: None, actor: Actor::System, command }).await?;
    raised.applied.map(|_| ()).context("the feature level could not be raised")
}

pub(crate) fn replica_config(config: &Config, data: PathBuf, identity: &api::tls::Identity) -> ReplicaConfig {
    ReplicaConfig {
        id: ControllerId(config.id),
        data,
        tls: PeerTls {
            ca_pem: identity.ca_pem.clone(),
            certificate_pem: identity.cert_pem.clone(),
            key_pem: identity.key_pem.clone(),
        },
        timing: config.timing.raft(),
        epoch: config.epoch,
        knows: level::LATEST,
        snapshot_every: config.snapshot_every,
    }
}
