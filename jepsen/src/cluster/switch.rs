//! Hosts as network namespaces around one switch, and links between them that can be cut in either direction.
//!
//! Nothing of the machine's own network is touched: the switch is a bridge in a namespace of its own, and no packet
//! leaves it.

use std::{
    fs::File,
    io,
    net::UdpSocket,
    process::{Command, Output},
    sync::atomic::{AtomicUsize, Ordering},
};

use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};

/// Inside the namespaces only.
const PREFIX: &str = "10.78.0.";
/// Of the packets of a weakened link: connections live, and are slow and uneven.
const LOSS_PERCENT: u32 = 30;
/// Less than a heartbeat's interval, so that nothing must fail by it.
const DELAY: &str = "40ms";
const DELAY_VARIATION: &str = "10ms";
/// Of addresses, in each host's table.
const SETS: [&str; 3] = ["deaf", "lossy", "streamless"];

pub struct Switch {
    name: String,
    hosts: Vec<Host>,
}

struct Host {
    name: String,
    ip: String,
}

impl Switch {
    /// Why this machine cannot make one, if it cannot.
    pub fn obstacle() -> Option<String> {
        if !nix::unistd::geteuid().is_root() {
            return Some("network namespaces take root".into());
        }
        for tool in ["ip", "nft"] {
            if Command::new(tool).arg("-V").output().is_err() {
                return Some(format!("the command '{tool}' is not installed"));
            }
        }
        tried(|name| run("ip", &["netns", "exec", name, "nft", "add", "table", "inet", "probe"]))
    }

    /// A switch with `hosts` hosts, numbered from 0.
    ///
    /// # Errors
    /// When the kernel refuses; what was made is removed.
    pub fn new(hosts: usize) -> anyhow::Result<Self> {
        let name = new_name();
        let mut switch = Self { name: name.clone(), hosts: Vec::new() };
        run("ip", &["netns", "add", &name])?;
        run("ip", &["-n", &name, "link", "add", "br0", "type", "bridge", "forward_delay", "0", "stp_state", "0"])?;
        run("ip", &["-n", &name, "link", "set", "br0", "up"])?;
        for number in 0..hosts {
            switch.attach(number).with_context(|| format!("host {number}"))?;
        }
        Ok(switch)
    }

    /// Makes sure that there is a host of this number; those before it must be there.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn ensure(&mut self, number: usize) -> anyhow::Result<()> {
        if number < self.hosts.len() { Ok(()) } else { self.attach(number) }
    }

    fn attach(&mut self, number: usize) -> anyhow::Result<()> {
        let host = Host { name: format!("{}h{number}", self.name), ip: format!("{PREFIX}{}", 11 + number) };
        let (name, port) = (host.name.clone(), format!("h{number}"));
        let address = format!("{}/24", host.ip);
        run("ip", &["netns", "add", &name])?;
        self.hosts.push(host);
        run("ip", &["-n", &name, "link", "add", "eth0", "type", "veth", "peer", "name", &port, "netns", &self.name])?;
        run("ip", &["-n", &self.name, "link", "set", &port, "master", "br0", "up"])?;
        run("ip", &["-n", &name, "addr", "add", &address, "dev", "eth0"])?;
        run("ip", &["-n", &name, "link", "set", "eth0", "up"])?;
        run("ip", &["-n", &name, "link", "set", "lo", "up"])?;
        nft(&name, &table())
    }

    /// The address of a host, reachable from the other hosts only.
    pub fn ip(&self, host: usize) -> &str {
        &self.hosts[host].ip
    }

    /// A command that runs on a host; its process id is the command's own.
    pub fn command(&self, host: usize, program: &std::path::Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.hosts[host].name]).arg(program);
        command
    }

    /// What `to` hears from `from`.
    pub fn link(&self, from: usize, to: usize) -> Link {
        Link { namespace: self.hosts[to].name.clone(), source: self.hosts[from].ip.clone() }
    }

    /// From now on nothing goes between these hosts and those; at these first, each at one stroke, so that none of them hears
    /// of what the others make of it.
    ///
    /// # Errors
    /// When a rule cannot be changed.
    pub fn part(&self, these: &[usize], those: &[usize]) -> anyhow::Result<()> {
        let deaf = |host: &usize, to: &[usize]| {
            let sources: Vec<&str> = to.iter().map(|from| self.ip(*from)).collect();
            nft(&self.hosts[*host].name, &format!("add element inet jepsen deaf {{ {} }}", sources.join(", ")))
        };
        these.iter().try_for_each(|host| deaf(host, those))?;
        those.iter().try_for_each(|host| deaf(host, these))
    }

    /// Packets that all cuts and losses together have dropped since the switch was made.
    ///
    /// # Errors
    /// When the rules cannot be read.
    pub fn dropped(&self) -> anyhow::Result<u64> {
        let mut packets = 0;
        for host in &self.hosts {
            let output = output("ip", &["netns", "exec", &host.name, "nft", "list", "table", "inet", "jepsen"])?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            for after in text.split("counter packets ").skip(1) {
                packets += after.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            }
        }
        Ok(packets)
    }

    /// Mends every link.
    ///
    /// # Errors
    /// When the rules cannot be removed.
    pub fn heal(&self) -> anyhow::Result<()> {
        self.hosts
            .iter()
            .try_for_each(|host| nft(&host.name, &SETS.map(|set| format!("flush set inet jepsen {set}\n")).concat()))
    }

    /// From now on what comes over the switch for one UDP port of a host comes to another one instead; who sent it sees its
    /// answers come from the first.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn turn_port(&self, host: usize, port: u16, to: u16) -> anyhow::Result<()> {
        nft(&self.hosts[host].name, &turned(port, to))
    }

    /// Why ports cannot be turned on this machine, if they cannot.
    pub fn turn_obstacle() -> Option<String> {
        Self::obstacle().or_else(|| tried(|name| nft(name, &turned(1, 2))))
    }

    /// A UDP socket of this process that is on a host; port 0 is any. It does not block.
    ///
    /// # Errors
    /// When the host or the port is not to be had.
    pub fn socket(&self, host: usize, port: u16) -> anyhow::Result<UdpSocket> {
        let Host { name, ip } = &self.hosts[host];
        let (path, address) = (format!("/var/run/netns/{name}"), (ip.clone(), port));
        // A thread of its own goes there and ends; a socket stays where it was made.
        let made = std::thread::spawn(move || -> anyhow::Result<UdpSocket> {
            setns(File::open(path)?, CloneFlags::CLONE_NEWNET)?;
            let socket = UdpSocket::bind((address.0.as_str(), address.1))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        made.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?.with_context(|| format!("host {host}"))
    }

    /// Why packets cannot be delayed on this machine, if they cannot.
    pub fn delay_obstacle() -> Option<String> {
        tried(|name| delay(name, "lo", true))
    }

    /// Whether what a host sends is delayed.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delay(&self, host: usize, on: bool) -> anyhow::Result<()> {
        delay(&self.hosts[host].name, "eth0", on)
    }
}

/// One direction between two hosts. Outlives the switch without harm: then there is nothing to change.
#[derive(Clone)]
pub struct Link {
    namespace: String,
    source: String,
}

impl Link {
    /// From now on nothing comes.
    ///
    /// # Errors
    /// When the rule cannot be changed.
    pub fn cut(&self) -> anyhow::Result<()> {
        nft(&self.namespace, &format!("add element inet jepsen deaf {{ {} }}", self.source))
    }

    /// From now on no connection goes on; datagrams come as before.
    ///
    /// # Errors
    /// When the rule cannot be changed.
    pub fn cut_streams(&self) -> anyhow::Result<()> {
        nft(&self.namespace, &format!("add element inet jepsen streamless {{ {} }}", self.source))
    }

    /// From now on a part of the packets is lost.
    ///
    /// # Errors
    /// When the rule cannot be changed.
    pub fn weaken(&self) -> anyhow::Result<()> {
        nft(&self.namespace, &format!("add element inet jepsen lossy {{ {} }}", self.source))
    }

    /// From now on everything comes. To be called for links that were cut or weakened, and to be repeated without harm.
    ///
    /// # Errors
    /// When the rule cannot be changed.
    pub fn mend(&self) -> anyhow::Result<()> {
        // Adding first makes the deletion of what is not there no error; both happen at once.
        let source = &self.source;
        let change = |verb: &str, set: &str| format!("{verb} element inet jepsen {set} {{ {source} }}\n");
        let mended = SETS.map(|set| change("add", set) + &change("delete", set));
        nft(&self.namespace, &mended.concat())
    }
}

/// Before anything else sees the packet, and after everything else has.
fn turned(port: u16, to: u16) -> String {
    format!(
        "table inet turned {{
           chain coming {{
             type filter hook prerouting priority -300
             iifname \"eth0\" udp dport {port} udp dport set {to}
           }}
           chain going {{
             type filter hook output priority -300
             oifname \"eth0\" udp sport {to} udp sport set {port}
           }}
         }}"
    )
}

/// The counters are the evidence that something met the rule.
fn table() -> String {
    format!(
        "table inet jepsen {{
           set deaf {{ type ipv4_addr; }}
           set lossy {{ type ipv4_addr; }}
           set streamless {{ type ipv4_addr; }}
           chain input {{
             type filter hook input priority 0; policy accept;
             ip saddr @deaf counter drop
             ip saddr @streamless meta l4proto tcp counter drop
             ip saddr @lossy numgen random mod 100 < {LOSS_PERCENT} counter drop
           }}
         }}"
    )
}

fn delay(namespace: &str, device: &str, on: bool) -> anyhow::Result<()> {
    let verb = if on { "add" } else { "del" };
    let netem = ["-n", namespace, "qdisc", verb, "dev", device, "root", "netem"];
    let amount = ["delay", DELAY, DELAY_VARIATION];
    run("tc", &[&netem[..], if on { &amount[..] } else { &[] }].concat())
}

/// All of the script or nothing of it.
fn nft(namespace: &str, script: &str) -> anyhow::Result<()> {
    run("ip", &["netns", "exec", namespace, "nft", script])
}

/// Of a namespace: no other thread of this process has it either.
fn new_name() -> String {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    format!("tfj{}n{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed))
}

/// Tries something in a namespace that is removed again; why it cannot be done, if it cannot.
fn tried(attempt: impl FnOnce(&str) -> anyhow::Result<()>) -> Option<String> {
    let name = new_name();
    let made = run("ip", &["netns", "add", &name]).and_then(|()| attempt(&name));
    // When it could not be made there is nothing to remove.
    let _ = run("ip", &["netns", "del", &name]);
    made.err().map(|e| format!("{e:#}"))
}

impl Drop for Switch {
    fn drop(&mut self) {
        for host in &self.hosts {
            let _ = run("ip", &["netns", "del", &host.name]);
        }
        let _ = run("ip", &["netns", "del", &self.name]);
    }
}

fn output(program: &str, arguments: &[&str]) -> io::Result<Output> {
    Command::new(program).args(arguments).output()
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = output(program, arguments).with_context(|| program.to_owned())?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reaches(switch: &Switch, from: usize, to: usize) -> bool {
        let mut ping = switch.command(from, std::path::Path::new("ping"));
        ping.args(["-c1", "-W1", switch.ip(to)]);
        ping.output().is_ok_and(|output| output.status.success())
    }

    #[test]
    fn a_cut_link_carries_nothing_until_it_is_mended() {
        if let Some(obstacle) = Switch::obstacle() {
            crate::verdict::skipped("a_cut_link_carries_nothing_until_it_is_mended", &obstacle);
            return;
        }
        let mut switch = Switch::new(3).unwrap();
        assert!(reaches(&switch, 0, 1));
        let link = switch.link(0, 1);
        link.cut().unwrap();
        assert!(!reaches(&switch, 0, 1));
        assert!(reaches(&switch, 0, 2));
        assert!(switch.dropped().unwrap() > 0);
        link.mend().unwrap();
        assert!(reaches(&switch, 0, 1));
        link.mend().expect("mending twice is no error");
        link.cut().unwrap();
        switch.link(1, 2).weaken().unwrap();
        assert!(!reaches(&switch, 0, 1));
        switch.heal().unwrap();
        assert!(reaches(&switch, 0, 1));
        switch.ensure(3).unwrap();
        assert!(reaches(&switch, 3, 1));
    }
}
