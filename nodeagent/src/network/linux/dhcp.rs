//! The DHCP server of one network on this host: dnsmasq in the gateway's namespace, with the leases of the machines on
//! this host and none else. It gives address, MTU and host name; no router and no name server yet.
//!
//! Everything that the running server was told is in its directory, so any agent can tell whether it is up to date:
//! `dnsmasq.conf`, `hosts` and `options`, and `loaded`, which is written after the start.

use std::{
    fmt::Write as _,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use model::assignment::NetworkWish;
use nix::{
    errno::Errno,
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::process::{Child, Command};

use super::{
    super::Result,
    Names, RUN_DIR, failed,
    gateway::{INSIDE, Inside},
};

/// How long a server may take to end before it is killed: it has nothing to save.
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// It ends within a millisecond, and a machine that is being made waits for the next one.
const STOP_POLL: Duration = Duration::from_millis(1);

pub struct Server<'a> {
    pub names: &'a Names,
    pub mtu: u32,
    pub wish: &'a NetworkWish,
}

impl Server<'_> {
    pub fn is_right(&self, inside: &Inside) -> bool {
        let leases = Leases::of(self.wish);
        self.serves(inside) && read(&self.file("loaded")) == leases.hosts + &leases.options
    }

    pub async fn ensure(&self, inside: &Inside) -> Result<()> {
        let what = || format!("serve leases in network {}", self.names.vni);
        if self.is_right(inside) {
            return Ok(());
        }
        // It keeps nothing that a new one would miss, and starts in milliseconds. A signal to read its files again was
        // seen to end version 2.90 once it had given a lease.
        stop(self.names, Some(inside)).await?;
        self.write_leases().map_err(failed(what()))?;
        fs::write(self.file("dnsmasq.conf"), self.configuration(inside)).map_err(failed(what()))?;
        self.start(inside).await?;
        let leases = Leases::of(self.wish);
        fs::write(self.file("loaded"), leases.hosts + &leases.options).map_err(failed(what()))
    }

    /// A server runs in this very namespace on this very cable.
    fn serves(&self, inside: &Inside) -> bool {
        let in_here =
            |server: Pid| namespace_of(server).is_some_and(|found| Some(found) == inside.namespace.inode().ok());
        server(self.names).is_some_and(in_here) && read(&self.file("dnsmasq.conf")) == self.configuration(inside)
    }

    fn write_leases(&self) -> io::Result<()> {
        fs::create_dir_all(&self.names.directory)?;
        let leases = Leases::of(self.wish);
        // Until the server has read them, nobody may believe that it did.
        let _ = fs::remove_file(self.file("loaded"));
        fs::write(self.file("hosts"), leases.hosts)?;
        fs::write(self.file("options"), leases.options)
    }

    async fn start(&self, inside: &Inside) -> Result<()> {
        let what = || format!("start dnsmasq in network {}", self.names.vni);
        let argument = argument(self.names);
        let spawn = move || -> io::Result<Child> {
            let mut command = Command::new("dnsmasq");
            command.arg(argument).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
            command.spawn()
        };
        let child = inside.namespace.within(spawn).await.and_then(|child| child).map_err(failed(what()))?;
        // It goes to the background when it serves; until then it tells here what is wrong.
        let output = child.wait_with_output().await.map_err(failed(what()))?;
        if output.status.success() {
            tracing::debug!(vni = self.names.vni, "dnsmasq started");
            return Ok(());
        }
        Err(failed(what())(String::from_utf8_lossy(&output.stderr).trim().to_string()))
    }

    fn configuration(&self, inside: &Inside) -> String {
        let place = format!("interface {} of namespace {}", inside.index, inside.namespace.inode().unwrap_or_default());
        configuration(self.wish, self.mtu, &self.names.directory, &place)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.names.directory.join(name)
    }
}

/// The networks of which something is left in the directory of running servers.
pub fn vnis() -> Vec<u32> {
    let entries = fs::read_dir(RUN_DIR).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Stop the server and remove its files.
pub async fn remove(names: &Names) -> Result<()> {
    stop(names, None).await?;
    match fs::remove_dir_all(&names.directory) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(failed(format!("remove {}", names.directory.display()))(e))
        }
        _ => Ok(()),
    }
}

/// `place` goes into a comment: a server must be started again when its cable was replaced, for it listens to the old.
fn configuration(wish: &NetworkWish, mtu: u32, directory: &Path, place: &str) -> String {
    let (vni, range, directory) = (wish.vni, wish.range, directory.display());
    format!(
        "# Trefoil network {vni}, {place}
port=0
interface={INSIDE}
except-interface=lo
bind-interfaces
no-resolv
no-hosts
no-ping
quiet-dhcp
leasefile-ro
dhcp-authoritative
dhcp-no-override
dhcp-range={first},static,{mask},12h
dhcp-hostsfile={directory}/hosts
dhcp-optsfile={directory}/options
dhcp-option=option:mtu,{mtu}
dhcp-option=option:router
dhcp-option=option:dns-server
pid-file={directory}/pid
",
        first = range.first,
        mask = range.netmask(),
    )
}

/// The two files of leases. Host names are options under a tag of their own: in the file of hosts, a machine that is
/// called `ignore` or `24h` would be taken for a keyword.
struct Leases {
    hosts: String,
    options: String,
}

impl Leases {
    fn of(wish: &NetworkWish) -> Self {
        let mut leases = wish.leases.clone();
        leases.sort_by_key(|lease| lease.mac);
        let (mut hosts, mut options) = (String::new(), String::new());
        for lease in leases {
            let tag = lease.mac.to_string().replace(':', "");
            let _ = writeln!(hosts, "{},set:{tag},{}", lease.mac, lease.ip);
            if is_label(&lease.hostname) {
                let _ = writeln!(options, "tag:{tag},12,{}", lease.hostname);
            }
        }
        Self { hosts, options }
    }
}

/// A label of the domain name system; nothing else gets into dnsmasq's files.
fn is_label(name: &str) -> bool {
    (1..=63).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// The server that wrote the pid file, when it is still that.
fn server(names: &Names) -> Option<Pid> {
    let pid = Pid::from_raw(read(&names.directory.join("pid")).trim().parse().ok()?);
    is_server(pid, names).then_some(pid)
}

fn is_server(pid: Pid, names: &Names) -> bool {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let argument = argument(names);
    command.split(|b| *b == 0).any(|word| word == argument.as_bytes())
}

/// Ends the server of the pid file, and any other of this network that runs in the namespace.
async fn stop(names: &Names, inside: Option<&Inside>) -> Result<()> {
    let mut servers: Vec<Pid> = server(names).into_iter().collect();
    if let Some(here) = inside.and_then(|inside| inside.namespace.inode().ok()) {
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| Some(Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)));
        servers.extend(pids.filter(|pid| is_server(*pid, names) && namespace_of(*pid) == Some(here)));
    }
    for server in servers {
        end(server, names).await?;
    }
    Ok(())
}

async fn end(server: Pid, names: &Names) -> Result<()> {
    let what = || format!("stop dnsmasq of network {}", names.vni);
    let mut signal = Signal::SIGTERM;
    let mut waited = Duration::ZERO;
    while is_server(server, names) {
        match kill(server, signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(failed(what())(e)),
        }
        tokio::time::sleep(STOP_POLL).await;
        waited += STOP_POLL;
        if waited >= STOP_LIMIT {
            signal = Signal::SIGKILL;
        }
    }
    Ok(())
}

fn namespace_of(process: Pid) -> Option<u64> {
    fs::metadata(format!("/proc/{process}/ns/net")).ok().map(|found| found.ino())
}

fn argument(names: &Names) -> String {
    format!("--conf-file={}", names.directory.join("dnsmasq.conf").display())
}

/// A file that cannot be read is as good as empty: what it should say differs from that.
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use model::{Mac, assignment::Lease};

    use super::*;

    fn wish() -> NetworkWish {
        let lease = |last: u8, hostname: &str| Lease {
            mac: Mac([2, 0x54, 0, 0, 0, last]),
            ip: [10, 0, 0, 10 + last].into(),
            hostname: hostname.into(),
        };
        NetworkWish {
            network: model::NetworkId(1),
            vni: 5,
            range: "10.0.0.0/24".parse().unwrap(),
            peers: vec![],
            leases: vec![lease(2, "ignore"), lease(1, "web-1"), lease(3, "bad,name\n")],
        }
    }

    #[test]
    fn the_configuration_names_the_range_and_no_router() {
        let text = configuration(&wish(), 1450, Path::new("/run/x/5"), "interface 2 of namespace 77");
        assert!(text.starts_with("# Trefoil network 5, interface 2 of namespace 77\nport=0\ninterface=eth0\n"));
        assert!(text.contains("\ndhcp-range=10.0.0.0,static,255.255.255.0,12h\ndhcp-hostsfile=/run/x/5/hosts\n"));
        assert!(text.contains("\ndhcp-option=option:mtu,1450\ndhcp-option=option:router\n"));
    }

    #[test]
    fn leases_are_sorted_and_a_name_is_never_a_keyword() {
        let Leases { hosts, options } = Leases::of(&wish());
        assert_eq!(
            hosts,
            "02:54:00:00:00:01,set:025400000001,10.0.0.11\n02:54:00:00:00:02,set:025400000002,10.0.0.12\n\
             02:54:00:00:00:03,set:025400000003,10.0.0.13\n"
        );
        assert_eq!(options, "tag:025400000001,12,web-1\ntag:025400000002,12,ignore\n");
    }
}
