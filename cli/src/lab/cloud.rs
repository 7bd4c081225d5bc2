//! What one cloud on this machine consists of, as `cloud.json` in its directory keeps it.

use std::{
    fs,
    io::Write,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use api::client::Client;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{place::Place, process::ProcessId};
use crate::config::ConfigFile;

/// Where the cloud of this machine is, unless said otherwise.
#[derive(Args, Clone, Debug)]
pub struct Placement {
    /// Directory of the cloud: its data, logs and access
    #[arg(long, env = "TREFOIL_DIR", default_value_os_t = default_dir())]
    pub dir: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LabHypervisor {
    /// Real guests on hosts in namespaces; needs root
    Libvirt,
    /// Guests that are only remembered; needs nothing
    Simulated,
}

impl LabHypervisor {
    pub fn name(self) -> &'static str {
        match self {
            Self::Libvirt => "libvirt",
            Self::Simulated => "simulated",
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cloud {
    pub dir: PathBuf,
    pub hypervisor: LabHypervisor,
    /// Whether the hosts may use the machine's KVM.
    pub kvm: bool,
    pub controllers: Vec<Controller>,
    pub hosts: Vec<Host>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Controller {
    /// `c1`: its directory and, with libvirt, its port of the switch.
    pub name: String,
    /// `host:port`, for other controllers and agents.
    pub address: String,
    pub underlay: IpAddr,
    /// Its id in the quorum; another one after it was wiped.
    pub id: u64,
    pub process: Option<ProcessId>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Host {
    /// `h1`: its directory, host name and port of the switch.
    pub name: String,
    pub address: String,
    pub underlay: IpAddr,
    /// `None` when it is switched off, and always with the simulated hypervisor.
    pub boot: Option<Boot>,
    pub agent: Option<ProcessId>,
}

/// The processes of a host that is switched on; all others in it end with `init`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Boot {
    pub unshare: ProcessId,
    pub init: ProcessId,
    pub libvirtd: ProcessId,
}

/// Unix sockets in the directory have paths of up to 35 bytes below it, and the kernel takes 107.
const MAX_DIR_BYTES: usize = 70;
const RECORD: &str = "cloud.json";
const CLIENT_CONFIG: &str = "client.toml";

impl Cloud {
    /// A cloud of that shape, not yet started. Makes the directory, which nobody else can look into.
    ///
    /// # Errors
    /// When there is one in it already, or the directory cannot be used.
    pub fn new(dir: &Path, hypervisor: LabHypervisor, kvm: bool, counts: (u16, u16), base_port: u16) -> Result<Self> {
        let dir = std::path::absolute(dir)?;
        ensure!(dir.as_os_str().len() <= MAX_DIR_BYTES, "the path {} is too long for the sockets in it", dir.display());
        let hidden = ["/run", "/var/run", "/dev", "/proc", "/sys"].iter().any(|top| dir.starts_with(top));
        ensure!(hypervisor == LabHypervisor::Simulated || !hidden, "{} is not seen inside the hosts", dir.display());
        ensure!(!Self::is_in(&dir), "there is a cloud in {} already: `trefoil down` removes it", dir.display());
        make_private(&dir)?;
        ensure!(is_empty(&dir)?, "{} has other files in it", dir.display());
        let (controllers, hosts) = counts;
        let at = |last: u16, port: u16, offset: u16| match hypervisor {
            LabHypervisor::Libvirt => format!("{}:{port}", underlay(last)),
            LabHypervisor::Simulated => format!("127.0.0.1:{}", base_port + offset),
        };
        let on = |last: u16| match hypervisor {
            LabHypervisor::Libvirt => underlay(last),
            LabHypervisor::Simulated => Ipv4Addr::LOCALHOST.into(),
        };
        let controller = |i: u16| Controller {
            name: format!("c{i}"),
            address: at(1 + i, CONTROLLER_PORT, i - 1),
            underlay: on(1 + i),
            id: 0,
            process: None,
        };
        let host = |i: u16| Host {
            name: format!("h{i}"),
            address: at(10 + i, AGENT_PORT, controllers + i - 1),
            underlay: on(10 + i),
            boot: None,
            agent: None,
        };
        let controllers = (1..=controllers).map(controller).collect();
        let cloud = Self { dir, hypervisor, kvm, controllers, hosts: (1..=hosts).map(host).collect() };
        cloud.save()?;
        Ok(cloud)
    }

    /// # Errors
    /// When there is none.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = std::path::absolute(dir)?.join(RECORD);
        let text = fs::read_to_string(&path).with_context(|| format!("no cloud in {}", dir.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// Whole or not at all: a half-written record could not be cleaned up by.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        write_private(&self.dir.join(RECORD), &text)
    }

    /// Whether the directory is one that `up` made.
    pub fn is_in(dir: &Path) -> bool {
        dir.join(RECORD).is_file()
    }

    /// Writes the operator's access, readable by this user alone.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save_access(&self, token: &str, ca_pem: &str) -> Result<()> {
        let (ca, token) = (Some(ca_pem.into()), Some(token.into()));
        let access = ConfigFile { endpoints: self.endpoints(), ca, token, ..ConfigFile::default() };
        access.save(&self.client_config()).context("cannot write the operator's access")
    }

    /// # Errors
    /// When `up` did not come that far.
    pub fn client(&self) -> Result<Client> {
        let path = self.client_config();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let access: ConfigFile = toml::from_str(&text)?;
        Ok(Client::new(&access.endpoints, &access.ca.unwrap_or_default(), &access.token.unwrap_or_default())?)
    }

    pub fn client_config(&self) -> PathBuf {
        self.dir.join(CLIENT_CONFIG)
    }

    /// Where clients on this machine reach the controllers.
    pub fn endpoints(&self) -> Vec<String> {
        let endpoint = |controller: &Controller| match self.hypervisor {
            LabHypervisor::Libvirt => format!("unix:{}", self.data(&controller.name).join("api.sock").display()),
            LabHypervisor::Simulated => controller.address.clone(),
        };
        self.controllers.iter().map(endpoint).collect()
    }

    /// Data directory of a controller or agent.
    pub fn data(&self, name: &str) -> PathBuf {
        self.dir.join(name).join("data")
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(format!("{name}.log"))
    }

    /// The namespaces in which processes of a controller run.
    pub fn place_of_controller(&self, controller: &Controller) -> Place {
        match self.hypervisor {
            LabHypervisor::Libvirt => Place::Network(self.namespace(&controller.name)),
            LabHypervisor::Simulated => Place::Here,
        }
    }

    /// # Errors
    /// When the host is switched off.
    pub fn place_of_host(&self, host: &Host) -> Result<Place> {
        match (self.hypervisor, host.boot) {
            (LabHypervisor::Simulated, _) => Ok(Place::Here),
            (LabHypervisor::Libvirt, Some(boot)) if boot.init.is_alive() => Ok(Place::Host(boot.init)),
            (LabHypervisor::Libvirt, _) => bail!("the host {} is switched off", host.name),
        }
    }

    /// The switch's namespace, and before each name of one the mark that tells them from those of other clouds.
    pub fn namespace(&self, name: &str) -> String {
        format!("{}{name}", namespace_prefix(&self.dir))
    }

    pub fn controller(&mut self, name: &str) -> Option<&mut Controller> {
        self.controllers.iter_mut().find(|controller| controller.name == name)
    }

    pub fn host(&mut self, name: &str) -> Option<&mut Host> {
        self.hosts.iter_mut().find(|host| host.name == name)
    }
}

const CONTROLLER_PORT: u16 = 7470;
const AGENT_PORT: u16 = 7480;

/// Addresses on the switch: controllers from .2, hosts from .11.
fn underlay(last: u16) -> IpAddr {
    let [high, low] = last.to_be_bytes();
    IpAddr::from([10, 77, high, low])
}

/// Names of network namespaces are the whole machine's, so they carry a digest of the directory.
pub fn namespace_prefix(dir: &Path) -> String {
    format!("tf{}-", &blake3::hash(dir.as_os_str().as_encoded_bytes()).to_hex()[..8])
}

fn default_dir() -> PathBuf {
    std::env::temp_dir().join(format!("trefoil-{}", nix::unistd::Uid::effective()))
}

/// In a directory that everybody may write to, one that somebody else prepared must not be taken.
fn make_private(dir: &Path) -> Result<()> {
    let make = || fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    make().with_context(|| format!("cannot make {}", dir.display()))?;
    let found = fs::symlink_metadata(dir)?;
    let ours = found.is_dir() && found.uid() == nix::unistd::Uid::effective().as_raw();
    ensure!(ours, "{} belongs to somebody else", dir.display());
    ensure!(found.mode() & 0o022 == 0, "others may write to {}", dir.display());
    Ok(())
}

fn is_empty(dir: &Path) -> Result<bool> {
    Ok(fs::read_dir(dir)?.next().is_none())
}

/// Whole or not at all, and for this user's eyes only.
///
/// # Errors
/// When the disk refuses.
pub fn write_private(path: &Path, text: &str) -> Result<()> {
    let new = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cloud_reads_back_what_it_wrote_and_refuses_a_second_one() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("cloud");
        let cloud = Cloud::new(&dir, LabHypervisor::Simulated, false, (3, 2), 9000).unwrap();
        assert_eq!(cloud.endpoints(), ["127.0.0.1:9000", "127.0.0.1:9001", "127.0.0.1:9002"]);
        assert_eq!(cloud.hosts[1].address, "127.0.0.1:9004");
        let read = Cloud::load(&dir).unwrap();
        assert_eq!(format!("{read:?}"), format!("{cloud:?}"));
        let again = Cloud::new(&dir, LabHypervisor::Simulated, false, (3, 2), 9000).unwrap_err();
        assert!(again.to_string().contains("already"), "{again}");
    }

    #[test]
    fn a_directory_with_other_files_or_a_long_path_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine"), "").unwrap();
        let new = |dir: &Path| Cloud::new(dir, LabHypervisor::Libvirt, false, (1, 1), 0).unwrap_err().to_string();
        assert!(new(&dir.path().join("x".repeat(80))).contains("too long"));
        assert!(new(Path::new("/run/cloud")).contains("not seen"));
        let locked = Cloud::new(dir.path(), LabHypervisor::Simulated, false, (1, 1), 0).unwrap_err().to_string();
        assert!(locked.contains("other files") || locked.contains("others may write"), "{locked}");
    }
}
