//! `trefoil agent`: makes this machine a host of a cloud, and runs its agent.
//!
//! What `join` is told about the host is kept in `DATA/agent.toml`, so that `run` and `guard` need the directory alone; a
//! flag of theirs wins over the file.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use api::Capacity;
use clap::{Args, Subcommand, ValueEnum};
use nodeagent::{
    agent::{self, AgentConfig, DEFAULT_IMAGE_RESERVE_BYTES, HypervisorChoice},
    guard::{self, GuardConfig, supervisor::GuardProgram},
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{asked_to_end, name_or_host, text_or_file};
use crate::{
    output::{self, Format},
    quantity::size,
};

#[derive(Debug, Subcommand)]
pub enum AgentCommand {
    /// Makes this machine a host of the cloud that issued the token
    #[command(
        after_help = "Example:\n  trefoil agent join --data /var/lib/trefoil/agent --advertise 192.0.2.11:7480 --token trefoil-join-..."
    )]
    Join {
        #[command(flatten)]
        host: HostArgs,
        /// Name for people [default: the host's]
        #[arg(long)]
        name: Option<String>,
        /// One-time token that 'trefoil quorum token --role agent' printed, or @FILE
        #[arg(long, value_name = "TOKEN")]
        token: String,
    },
    /// Stops guests that must not run twice when the host's lease ends; the agent starts it
    #[command(after_help = "Example:\n  trefoil agent guard --data /var/lib/trefoil/agent")]
    Guard {
        /// The agent's directory
        #[arg(long, value_name = "DIRECTORY")]
        data: PathBuf,
        /// Watchdog device to feed while all is well; without its food it resets the machine [default: that of 'join']
        #[arg(long, value_name = "DEVICE")]
        watchdog: Option<PathBuf>,
    },
    /// Runs the agent until it is asked to end; its guests run on
    #[command(after_help = "Example:\n  trefoil agent run --data /var/lib/trefoil/agent")]
    Run {
        #[command(flatten)]
        host: HostArgs,
        /// Log JSON objects, one a line
        #[arg(long)]
        log_json: bool,
    },
}

#[derive(Debug, Args)]
pub struct HostArgs {
    /// Directory for its identity, images and guests' disks
    #[arg(long, value_name = "DIRECTORY")]
    data: PathBuf,
    #[command(flatten)]
    settings: HostSettings,
}

/// The same as flags and as `agent.toml`.
#[derive(Clone, Debug, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostSettings {
    /// host:port at which controllers and other agents reach it
    #[arg(long, value_name = "ENDPOINT")]
    advertise: Option<String>,
    /// Controller to try besides those that it knows, such as one of a quorum that was restored at another address
    #[arg(long = "controller", value_name = "ENDPOINT")]
    #[serde(default)]
    controllers: Vec<String>,
    /// Address to listen on [default: [::]:7480]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Address of this host that tenant networks are tunnelled from [default: that of --advertise]
    #[arg(long, value_name = "IP")]
    underlay: Option<IpAddr>,
    /// What runs the guests [default: libvirt]
    #[arg(long, value_enum)]
    hypervisor: Option<HypervisorName>,
    /// URI of the libvirt daemon [default: qemu:///system]
    #[arg(long, value_name = "URI")]
    libvirt_uri: Option<String>,
    /// Offer so many CPUs [default: what the host has; simulated: 16]
    #[arg(long)]
    vcpus: Option<u64>,
    /// Offer so much memory [default: what the host has; simulated: 64GiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Offer so much disk [default: what the host has; simulated: 1TiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    disk: Option<u64>,
    /// Watchdog device that the guard feeds, such as /dev/watchdog; without its food it resets the machine
    #[arg(long, value_name = "DEVICE")]
    watchdog: Option<PathBuf>,
    /// Disk that images leave free [default: 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    image_reserve: Option<u64>,
    /// Simulated: delays in thousandths of a real host's [default: 1000]
    #[arg(long, value_name = "PERMILLE")]
    simulated_delay: Option<u64>,
    /// Simulated: how many of a thousand disks made or guests started fail [default: 0]
    #[arg(long, value_name = "PERMILLE")]
    simulated_failure: Option<u64>,
    /// Simulated: seed of delays and failures [default: 1]
    #[arg(long, value_name = "NUMBER")]
    simulated_seed: Option<u64>,
    /// Simulated, for test harnesses: append each effect on a guest to this file, a JSON object a line
    #[arg(long, value_name = "FILE")]
    simulated_effects: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HypervisorName {
    /// Real guests
    Libvirt,
    /// Guests on paper, with delays and failures
    Simulated,
}

/// A middling server: large enough for a test of the scheduler, small enough to be filled by one.
const SIMULATED: Capacity = Capacity { vcpus: 16, memory_bytes: 64 << 30, disk_bytes: 1 << 40 };
const FILE: &str = "agent.toml";

impl AgentCommand {
    pub fn is_server(&self) -> bool {
        matches!(self, Self::Run { .. } | Self::Guard { .. })
    }

    pub fn logs_json(&self) -> bool {
        matches!(self, Self::Run { log_json: true, .. })
    }
}

/// # Errors
/// As the agent tells them.
pub async fn run(command: AgentCommand, format: Format) -> Result<()> {
    match command {
        AgentCommand::Join { host, name, token } => join(host, name, &token, format).await,
        AgentCommand::Guard { data, watchdog } => {
            let watchdog = watchdog_of(&data, watchdog)?;
            // It keeps threads of its own and returns when its directory is gone.
            Ok(tokio::task::block_in_place(|| guard::run(&GuardConfig { data, watchdog }))?)
        }
        AgentCommand::Run { host, .. } => {
            let settings = host.settings.over(load(&host.data)?);
            agent::run(settings.config(host.data)?, asked_to_end()?).await
        }
    }
}

async fn join(host: HostArgs, name: Option<String>, token: &str, format: Format) -> Result<()> {
    let Some(advertise) = host.settings.advertise.clone() else {
        bail!("say with --advertise host:port where controllers and other agents reach this host");
    };
    // What `run` would refuse is refused before the token is used up.
    host.settings.clone().config(host.data.clone())?;
    let name = name_or_host(name)?;
    let node = agent::join(&text_or_file(token)?, &name, &advertise, &host.data).await?;
    save(&host.data, &host.settings)?;
    output::print(format, &json!({ "id": node.to_string(), "name": name }), || format!("joined as {node} '{name}'"))?;
    Ok(())
}

impl HostSettings {
    /// Each of these, or else that of the file.
    fn over(self, file: Self) -> Self {
        Self {
            advertise: self.advertise.or(file.advertise),
            controllers: if self.controllers.is_empty() { file.controllers } else { self.controllers },
            listen: self.listen.or(file.listen),
            underlay: self.underlay.or(file.underlay),
            hypervisor: self.hypervisor.or(file.hypervisor),
            libvirt_uri: self.libvirt_uri.or(file.libvirt_uri),
            vcpus: self.vcpus.or(file.vcpus),
            memory: self.memory.or(file.memory),
            disk: self.disk.or(file.disk),
            watchdog: self.watchdog.or(file.watchdog),
            image_reserve: self.image_reserve.or(file.image_reserve),
            simulated_delay: self.simulated_delay.or(file.simulated_delay),
            simulated_failure: self.simulated_failure.or(file.simulated_failure),
            simulated_seed: self.simulated_seed.or(file.simulated_seed),
            simulated_effects: self.simulated_effects.or(file.simulated_effects),
        }
    }

    fn config(self, data: PathBuf) -> Result<AgentConfig> {
        let hypervisor = match self.hypervisor.unwrap_or(HypervisorName::Libvirt) {
            HypervisorName::Libvirt => HypervisorChoice::Libvirt {
                uri: self.libvirt_uri.clone().unwrap_or("qemu:///system".into()),
                limit: self.limit()?,
                guard: GuardProgram {
                    program: std::env::current_exe()?,
                    build: guard::build(Path::new(guard::THIS_PROGRAM)),
                    watchdog: self.watchdog.clone(),
                },
            },
            HypervisorName::Simulated => HypervisorChoice::Simulated {
                capacity: self.capacity_or(SIMULATED),
                delay_permille: self.simulated_delay.unwrap_or(1000),
                failure_permille: self.simulated_failure.unwrap_or(0),
                seed: self.simulated_seed.unwrap_or(1),
                effects: self.simulated_effects.clone(),
            },
        };
        Ok(AgentConfig {
            data,
            listen: self.listen.unwrap_or_else(|| SocketAddr::from(([0; 16], 7480))),
            underlay: self.underlay()?,
            advertise: self.advertise,
            controllers: self.controllers,
            hypervisor,
            image_reserve_bytes: self.image_reserve.unwrap_or(DEFAULT_IMAGE_RESERVE_BYTES),
        })
    }

    fn underlay(&self) -> Result<IpAddr> {
        let advertised = self.advertise.as_ref().and_then(|address| address.rsplit_once(':'));
        let host = advertised.and_then(|(host, _)| host.trim_matches(['[', ']']).parse().ok());
        self.underlay
            .or(host)
            .context("say with --underlay from which address of this host tenant networks are tunnelled")
    }

    fn capacity_or(&self, base: Capacity) -> Capacity {
        Capacity {
            vcpus: self.vcpus.unwrap_or(base.vcpus),
            memory_bytes: self.memory.unwrap_or(base.memory_bytes),
            disk_bytes: self.disk.unwrap_or(base.disk_bytes),
        }
    }

    /// `None` when nothing was limited: what the host has is known to its agent only.
    fn limit(&self) -> Result<Option<Capacity>> {
        let given = [self.vcpus, self.memory, self.disk];
        ensure!(given.iter().flatten().all(|&amount| amount > 0), "a host must offer more than nothing");
        let unlimited = Capacity { vcpus: u64::MAX, memory_bytes: u64::MAX, disk_bytes: u64::MAX };
        Ok(given.iter().any(Option::is_some).then(|| self.capacity_or(unlimited)))
    }
}

/// The device that the guard was given, else the one of `join`: whoever starts it may know the directory alone.
fn watchdog_of(data: &Path, given: Option<PathBuf>) -> Result<Option<PathBuf>> {
    match given {
        Some(device) => Ok(Some(device)),
        None => Ok(load(data)?.watchdog),
    }
}

fn load(data: &Path) -> Result<HostSettings> {
    let path = data.join(FILE);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("{} is not the data directory of an agent (join first)", data.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is not valid", path.display()))
}

fn save(data: &Path, settings: &HostSettings) -> Result<()> {
    let path = data.join(FILE);
    fs::write(&path, toml::to_string(settings)?).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> HostSettings {
        HostSettings { advertise: Some("10.0.0.1:7480".into()), ..HostSettings::default() }
    }

    #[test]
    fn what_a_join_was_told_is_there_for_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let told = HostSettings { vcpus: Some(4), hypervisor: Some(HypervisorName::Simulated), ..settings() };
        save(dir.path(), &told).unwrap();
        assert_eq!(load(dir.path()).unwrap(), told);
        let flags = HostSettings { vcpus: Some(8), ..HostSettings::default() };
        assert_eq!(flags.over(told.clone()), HostSettings { vcpus: Some(8), ..told });
        assert!(load(&dir.path().join("x")).unwrap_err().to_string().contains("join first"));
    }

    #[test]
    fn a_guard_that_is_told_no_watchdog_has_the_one_of_the_join() {
        let dir = tempfile::tempdir().unwrap();
        let device = |name: &str| Some(PathBuf::from(name));
        assert!(watchdog_of(dir.path(), None).unwrap_err().to_string().contains("join first"));
        save(dir.path(), &settings()).unwrap();
        assert_eq!(watchdog_of(dir.path(), None).unwrap(), None);
        save(dir.path(), &HostSettings { watchdog: device("/dev/watchdog"), ..settings() }).unwrap();
        assert_eq!(watchdog_of(dir.path(), None).unwrap(), device("/dev/watchdog"));
        assert_eq!(watchdog_of(dir.path(), device("/dev/watchdog1")).unwrap(), device("/dev/watchdog1"));
    }

    #[test]
    fn tunnels_start_at_the_advertised_address_unless_told_otherwise() {
        assert_eq!(settings().underlay().unwrap().to_string(), "10.0.0.1");
        let named = HostSettings { advertise: Some("rack1:7480".into()), ..HostSettings::default() };
        assert!(named.underlay().unwrap_err().to_string().contains("--underlay"));
        let ipv6 = HostSettings { advertise: Some("[fd00::1]:7480".into()), ..HostSettings::default() };
        assert_eq!(ipv6.underlay().unwrap().to_string(), "fd00::1");
    }

    #[test]
    fn a_limit_leaves_the_rest_to_the_host() {
        assert_eq!(settings().limit().unwrap(), None);
        let limit = HostSettings { vcpus: Some(2), ..settings() }.limit().unwrap().unwrap();
        assert_eq!((limit.vcpus, limit.memory_bytes), (2, u64::MAX));
        assert!(HostSettings { memory: Some(0), ..settings() }.limit().is_err());
    }
}
