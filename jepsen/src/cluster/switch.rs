//! Hosts as network namespaces around one switch, and links between them that can be cut in either direction.
//!
//! Nothing of the machine's own network is touched: the switch is a bridge in a namespace of its own, and no packet
//! leaves it.

use std::{
    io,
    process::{Command, Output},
};

use anyhow::{Context, bail};

/// Inside the namespaces only.
const PREFIX: &str = "10.78.0.";

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
        let probe = format!("tfj{}p", std::process::id());
        let made = run("ip", &["netns", "add", &probe])
            .and_then(|()| run("ip", &["netns", "exec", &probe, "nft", "add", "table", "inet", "probe"]));
        let _ = run("ip", &["netns", "del", &probe]);
        made.err().map(|e| format!("{e:#}"))
    }

    /// A switch with `hosts` hosts, numbered from 0.
    ///
    /// # Errors
    /// When the kernel refuses; what was made is removed.
    pub fn new(hosts: usize) -> anyhow::Result<Self> {
        let name = format!("tfj{}", std::process::id());
        let mut switch = Self { name: name.clone(), hosts: Vec::new() };
        run("ip", &["netns", "add", &name])?;
        run("ip", &["-n", &name, "link", "add", "br0", "type", "bridge", "forward_delay", "0", "stp_state", "0"])?;
        run("ip", &["-n", &name, "link", "set", "br0", "up"])?;
        for number in 0..hosts {
            switch.attach(number).with_context(|| format!("host {number}"))?;
        }
        Ok(switch)
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
        run("ip", &["netns", "exec", &name, "nft", "add", "table", "inet", "jepsen"])?;
        let chain = "{ type filter hook input priority 0 ; policy accept ; }";
        run("ip", &["netns", "exec", &name, "nft", "add", "chain", "inet", "jepsen", "input", chain])
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

    /// From now on `to` hears nothing from `from`.
    ///
    /// # Errors
    /// When the rule cannot be made.
    pub fn cut(&self, from: usize, to: usize) -> anyhow::Result<()> {
        let (name, source) = (&self.hosts[to].name, &self.hosts[from].ip);
        run(
            "ip",
            &[
                "netns", "exec", name, "nft", "add", "rule", "inet", "jepsen", "input", "ip", "saddr", source,
                "counter", "drop",
            ],
        )
    }

    /// Packets that all cuts together have dropped since they were made.
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
        for host in &self.hosts {
            run("ip", &["netns", "exec", &host.name, "nft", "flush", "chain", "inet", "jepsen", "input"])?;
        }
        Ok(())
    }
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
        let switch = Switch::new(3).unwrap();
        assert!(reaches(&switch, 0, 1));
        switch.cut(0, 1).unwrap();
        assert!(!reaches(&switch, 0, 1));
        assert!(reaches(&switch, 0, 2));
        assert!(switch.dropped().unwrap() > 0);
        switch.heal().unwrap();
        assert!(reaches(&switch, 0, 1));
    }
}
