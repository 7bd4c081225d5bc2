//! Hosts for the tests: threads with namespaces of their own, and guests that are namespaces with a cable into a bridge.

use std::{
    collections::BTreeMap,
    fs::File,
    future::Future,
    io::Write,
    net::IpAddr,
    process::Command,
    sync::{
        Arc,
        mpsc::{Sender, channel},
    },
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{Pid, Uid, gettid},
};
use tokio::runtime::{Builder, Runtime};

use crate::network::{contract, tap};

type Job = Box<dyn FnOnce(&Runtime) + Send>;

pub struct Host {
    pub underlay: IpAddr,
    thread: Pid,
    jobs: Sender<Job>,
    /// The switch's thread ends with the last host that is plugged into it.
    _switch: Option<Arc<Host>>,
}

/// Two hosts on one switch, 10.77.0.11 and 10.77.0.12; `None`, after saying why, where that cannot be.
pub fn lab() -> Option<[Host; 2]> {
    if let Some(reason) = obstacle() {
        skipped(&reason);
        return None;
    }
    let switch = Arc::new(Host::boot([10, 77, 0, 1].into(), None));
    let hosts = [11, 12].map(|last| Host::boot([10, 77, 0, last].into(), Some(switch.clone())));
    let [one, two] = &hosts;
    switch.shell(&format!(
        "ip link add sw type bridge; ip link set sw up
         for h in 1:{} 2:{}; do ip link add p${{h%:*}} type veth peer name under0 netns ${{h#*:}}
         ip link set p${{h%:*}} master sw up; done",
        one.thread, two.thread
    ));
    for host in &hosts {
        host.shell(&format!("ip address add {}/24 dev under0; ip link set under0 up", host.underlay));
    }
    Some(hosts)
}

/// Why there can be no hosts on this machine.
fn obstacle() -> Option<String> {
    if !Uid::effective().is_root() {
        return Some("needs root".into());
    }
    let tools = [("dnsmasq", "--version"), ("nft", "--version"), ("ip", "-V"), ("busybox", "--help")];
    let missing = |(tool, argument): &(&str, &str)| Command::new(tool).arg(argument).output().is_err();
    tools.iter().find(|tool| missing(tool)).map(|(tool, _)| format!("{tool} is not installed"))
}

/// On the terminal, and in the file that the test command counts.
fn skipped(reason: &str) {
    let test = thread::current().name().unwrap_or_default().to_owned();
    println!("skipped: {test}: {reason}");
    if let Some(path) = std::env::var_os("TREFOIL_SKIPPED") {
        let file = File::options().append(true).create(true).open(path);
        file.and_then(|mut file| writeln!(file, "{test}: {reason}")).expect("the list of skipped tests");
    }
}

impl Host {
    fn boot(underlay: IpAddr, switch: Option<Arc<Host>>) -> Self {
        let (jobs, taken) = channel::<Job>();
        let (tell, told) = channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("namespaces for a host");
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("mounts of its own");
            mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("an empty /run");
            ip("link set lo up");
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
            tell.send(gettid()).expect("the test waits for its hosts");
            taken.iter().for_each(|job| job(&runtime));
        });
        Self { underlay, thread: told.recv().expect("the host boots"), jobs, _switch: switch }
    }

    /// Runs `work` on the host, and panics here when it panics there.
    pub fn run<T, F>(&self, work: impl FnOnce() -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T>,
    {
        let (tell, told) = channel();
        let job = move |runtime: &Runtime| {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(work())));
            let _ = tell.send(result);
        };
        self.jobs.send(Box::new(job)).expect("the host runs");
        told.recv().expect("the host runs").unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Output of a shell script on the host, which must succeed.
    pub fn shell(&self, script: &str) -> String {
        let script = script.to_string();
        self.run(move || async move { shell(&script) })
    }

    /// Whether the gateway's MAC address was ever heard through the tunnel.
    pub fn heard_a_gateway_over_the_tunnel(&self, vni: u32) -> bool {
        let mac = self.shell(&format!("ip -n tf-{vni} -br link show eth0 | awk '{{print $3}}'"));
        let entries = self.shell(&format!("bridge fdb show dev tfx{vni}"));
        entries.contains(mac.trim())
    }

    /// Nothing of Trefoil is left, in the kernel or in files. A guest's tap goes with it, a moment later.
    pub fn is_as_new(&self) {
        let left = self.shell(
            "ip -br link | grep -E '^tf[bxg]' || true; ip netns list | grep tf- || true
             nft list tables | grep trefoil || true; ls /run/trefoil/network 2>/dev/null || true",
        );
        assert_eq!(left.trim(), "", "left on the host");
    }
}

impl Drop for Host {
    /// A failed test leaves its servers; they would keep the host's namespaces alive for ever.
    fn drop(&mut self) {
        let kill = "for p in /run/trefoil/network/*/pid; do [ -e $p ] && kill -9 $(cat $p); done 2>/dev/null; true";
        let _ = self.jobs.send(Box::new(|_| drop(Command::new("sh").args(["-c", kill]).status())));
    }
}

/// A namespace that behaves as a guest, with a cable that behaves as its tap.
pub struct Guest<'a> {
    host: &'a Host,
    pub vni: u32,
    last: u8,
    name: String,
}

impl<'a> Guest<'a> {
    pub fn plug(host: &'a Host, vni: u32, last: u8) -> Self {
        let guest = Self { host, vni, last, name: format!("guest{vni}x{last}") };
        let (name, mac) = (&guest.name, guest.mac());
        let tap = tap(contract::mac(vni, last));
        let tap_mac = format!("fe{}", &mac[2..]);
        host.shell(&format!(
            "ip netns add {name}
             ip link add {tap} address {tap_mac} mtu 1450 type veth peer name eth0 address {mac} mtu 1450 netns {name}
             ip link set {tap} master tfb{vni}; ip link set {tap} up
             ip -n {name} link set lo up; ip -n {name} link set eth0 up"
        ));
        guest
    }

    pub fn mac(&self) -> String {
        contract::mac(self.vni, self.last).to_string()
    }

    /// What DHCP tells it; nothing when nobody answers within three tries. It takes the address.
    pub fn lease(&self) -> BTreeMap<String, String> {
        let name = &self.name;
        let told = self.host.shell(&format!(
            r#"cat >/run/{name}.sh <<'S'
#!/bin/sh
[ "$1" = bound ] || exit 0
env >/run/{name}.env
ip address flush dev eth0; ip address add $ip/24 dev eth0
S
chmod 755 /run/{name}.sh; rm -f /run/{name}.env
ip netns exec {name} busybox udhcpc -i eth0 -s /run/{name}.sh -O mtu -f -n -q -t 3 -T 1 >/run/{name}.log 2>&1 || true
cat /run/{name}.env 2>/dev/null || true"#
        ));
        told.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    }

    /// Whether `10.0.0.LAST` answers, within three tries.
    pub fn reaches(&self, last: u8) -> bool {
        self.reaches_with(last, 56)
    }

    /// The same with so many bytes in one packet.
    pub fn reaches_with(&self, last: u8, bytes: u32) -> bool {
        let name = &self.name;
        let out = self.host.shell(&format!(
            "ip -n {name} neighbour flush dev eth0
             for i in 1 2 3; do ip netns exec {name} busybox ping -c1 -W1 -s {bytes} 10.0.0.{last} >/dev/null && echo yes && break; done; true"
        ));
        out.trim() == "yes"
    }

    /// Whether a command on it succeeds.
    pub fn does(&self, command: &str) -> bool {
        let name = &self.name;
        let out = self.host.shell(&format!("ip netns exec {name} {command} >/dev/null 2>&1 && echo yes; true"));
        out.trim() == "yes"
    }

    /// How many packets it has received.
    pub fn received(&self) -> u64 {
        let name = &self.name;
        let script = format!("ip -n {name} -s link show eth0 | awk '/RX:/ {{ getline; print $2 }}'");
        let count = self.host.shell(&script);
        count.trim().parse().expect("a number of packets")
    }

    /// The MAC address that answered for `10.0.0.LAST`.
    pub fn neighbour(&self, last: u8) -> String {
        let name = &self.name;
        self.host.shell(&format!("ip -n {name} neighbour show 10.0.0.{last} | awk '{{print $5}}'")).trim().into()
    }
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.host.shell(&format!("ip netns delete {}", self.name));
        }
    }
}

/// `ip` on the calling thread's host.
pub fn ip(arguments: &str) {
    shell(&format!("ip {arguments}"));
}

fn shell(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().expect("a shell");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}: {out}{err}");
    out.into_owned()
}
