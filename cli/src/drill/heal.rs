//! How what a drill broke is made whole again: written down before it is broken, so that an interrupted drill heals too.
//!
//! Each succeeds when there is nothing to heal.

use std::{fmt, time::Duration};

use anyhow::{Context, Result};
use api::{
    client::Client,
    error::ApiError,
    proto::{DeleteVmRequest, NamedRef},
};
use nix::sys::signal::Signal;
use tokio::time::{Instant, sleep};

use super::ask::{tell, unless};
use crate::lab::{Cloud, act, member, process::ProcessId, refound};

#[derive(Clone, Debug)]
pub enum Heal {
    /// A controller or a host runs, and its agent.
    Start(String),
    /// A controller runs as it would without the drill.
    Restart(String),
    /// A controller that lost its data votes again.
    Rejoin(String),
    /// Where no majority is left, this controller is the whole quorum.
    Refound(String),
    /// Nothing runs of an old voter, and nothing is kept of it.
    Expel(String),
    Plug(String),
    Continue(String, ProcessId),
    /// Machine and tenant.
    DeleteVm {
        tenant: String,
        vm: String,
    },
    DeleteImage {
        tenant: String,
        image: String,
    },
    DeleteNetwork {
        tenant: String,
        network: String,
    },
    DeleteTag {
        tenant: String,
        key: String,
    },
    DeleteTenant(String),
}

impl fmt::Display for Heal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start(name) => write!(f, "{name} is started"),
            Self::Restart(name) => write!(f, "{name} is started as it was"),
            Self::Rejoin(name) => write!(f, "{name} joins anew"),
            Self::Refound(name) => write!(f, "{name} goes on alone, as a new quorum"),
            Self::Expel(name) => write!(f, "what is left of the old {name} is thrown away"),
            Self::Plug(name) => write!(f, "the cable of {name} is plugged in"),
            Self::Continue(name, process) => write!(f, "the agent of {name} goes on (SIGCONT to {})", process.pid),
            Self::DeleteVm { vm, .. } => write!(f, "the machine {vm} is deleted"),
            Self::DeleteImage { image, .. } => write!(f, "the image {image} is deleted"),
            Self::DeleteNetwork { network, .. } => write!(f, "the network {network} is deleted"),
            Self::DeleteTag { key, .. } => write!(f, "the tag {key} is deleted"),
            Self::DeleteTenant(name) => write!(f, "the tenant {name} is deleted"),
        }
    }
}

/// What is deleted holds what it was made from until its host says that it is gone.
const IN_USE: Duration = Duration::from_secs(60);
/// A controller that leads hands over first.
const POLITE: Duration = Duration::from_secs(10);
const TRY_AGAIN: Duration = Duration::from_secs(1);

impl Heal {
    /// Heals, and waits for what is still in use.
    ///
    /// # Errors
    /// With one sentence.
    pub async fn apply(&self, mut cloud: Option<&mut Cloud>, client: &Client) -> Result<()> {
        let asked = Instant::now();
        loop {
            let outcome = self.attempt(cloud.as_deref_mut(), client).await;
            let Err(error) = &outcome else { return Ok(()) };
            let in_use = error.downcast_ref::<ApiError>().is_some_and(|error| error.code == "in-use");
            if !in_use || asked.elapsed() > IN_USE {
                return outcome;
            }
            sleep(TRY_AGAIN).await;
        }
    }

    async fn attempt(&self, cloud: Option<&mut Cloud>, client: &Client) -> Result<()> {
        match self {
            Self::Start(name) => start(of_up(cloud)?, name).await,
            Self::Restart(name) => {
                let cloud = of_up(cloud)?;
                if runs(cloud, name) {
                    act::end(cloud, name, POLITE).await?;
                }
                start(cloud, name).await
            }
            Self::Rejoin(name) => {
                let cloud = of_up(cloud)?;
                if runs(cloud, name) { Ok(()) } else { act::wipe(cloud, name).await.map(|_| ()) }
            }
            Self::Refound(name) => {
                let cloud = of_up(cloud)?;
                if has_majority(cloud) { Ok(()) } else { refound::refound(cloud, name).await }
            }
            Self::Expel(name) => refound::expel(of_up(cloud)?, name).await,
            Self::Plug(name) => act::plug(of_up(cloud)?, name).await,
            Self::Continue(_, process) => {
                process.signal(Signal::SIGCONT)?;
                // nsenter stops itself with its child. While it stands still, nobody takes in the child's end, and the
                // host could never be switched off.
                process.parent().map_or(Ok(()), |parent| parent.signal(Signal::SIGCONT))
            }
            Self::DeleteVm { tenant, vm } => {
                let body = DeleteVmRequest { tenant: tenant.clone(), vm: vm.clone(), force: false };
                gone(tell!(client, delete_vm, body).map(|_| ()))
            }
            Self::DeleteImage { tenant, image } => gone(tell!(client, delete_image, named(tenant, image)).map(|_| ())),
            Self::DeleteNetwork { tenant, network } => {
                gone(tell!(client, delete_network, named(tenant, network)).map(|_| ()))
            }
            Self::DeleteTag { tenant, key } => {
                let (tenant, key) = (tenant.clone(), key.clone());
                let body = api::proto::DeleteTagRequest { tenant, key, expected_version: None };
                gone(tell!(client, delete_tag, body).map(|_| ()))
            }
            Self::DeleteTenant(name) => gone(tell!(client, delete_tenant, named("", name)).map(|_| ())),
        }
    }
}

async fn start(cloud: &mut Cloud, name: &str) -> Result<()> {
    if runs(cloud, name) {
        return Ok(());
    }
    act::start(cloud, name).await?;
    member::wait_for_voters(cloud).await?;
    member::wait_for_nodes(cloud).await
}

/// Whether its controller or agent runs.
fn runs(cloud: &Cloud, name: &str) -> bool {
    let controllers = cloud.controllers.iter().map(|controller| (&controller.name, controller.process));
    let mut all = controllers.chain(cloud.hosts.iter().map(|host| (&host.name, host.agent)));
    all.any(|(own, process)| own == name && process.is_some_and(|process| process.is_alive()))
}

/// Whether enough controllers run to agree on anything.
fn has_majority(cloud: &Cloud) -> bool {
    let run = cloud.controllers.iter().filter(|controller| runs(cloud, &controller.name)).count();
    run * 2 > cloud.controllers.len()
}

fn of_up(cloud: Option<&mut Cloud>) -> Result<&mut Cloud> {
    cloud.context("only the processes of a cloud of `trefoil up` can be reached")
}

fn named(tenant: &str, name: &str) -> NamedRef {
    NamedRef { tenant: tenant.to_owned(), name: name.to_owned(), stale: false }
}

/// What is not there need not be deleted.
fn gone(outcome: Result<(), ApiError>) -> Result<()> {
    Ok(unless("not-found", outcome)?)
}
