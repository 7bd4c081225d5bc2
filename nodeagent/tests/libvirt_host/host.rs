//! A host with a libvirtd of its own, made of namespaces, for the tests that need one or two.
//!
//! Needs root, libvirtd and QEMU; without them there is no host, and the reason is printed. With TREFOIL_TEST_IMAGE
//! naming a bootable qcow2 image guests boot it; otherwise their disk is blank and they only run a BIOS.
#![allow(dead_code, reason = "not every test does everything to its host")]

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use model::{Capacity, ImageFormat, Mac, NetworkId, VmId};
use nodeagent::hypervisor::{
    GuestNic, GuestSpec,
    domain_xml::domain_uuid,
    libvirt::{Libvirt, LibvirtConfig},
};

pub const CLUSTER: &str = "contract";

/// Starting libvirtd took 1 s, on a busy machine 5; booting the test image 8 s, on a busy machine 30.
const PATIENCE: Duration = Duration::from_secs(180);

/// `unshare` holds its namespaces, and everything in them ends with its first process.
pub struct Host {
    pub dir: tempfile::TempDir,
    unshare: Child,
    init: u32,
}

impl Host {
    /// `None`, with the reason printed, where it cannot be had.
    pub fn start(number: u32) -> Option<Self> {
        let skip = |why: &str| {
            println!("skipped: {why}");
            None
        };
        if fs::metadata("/proc/self").map_or(1, |m| m.uid()) != 0 {
            return skip("not root");
        }
        for tool in ["libvirtd", "qemu-img", "qemu-system-x86_64", "unshare", "nsenter"] {
            let found = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(tool).exists());
            if !found {
                return skip(&format!("{tool} is not installed"));
            }
        }
        let dir = tempfile::Builder::new().prefix("tfhv").tempdir().ok()?;
        fs::create_dir_all(dir.path().join("etc/qemu")).ok()?;
        let uuid = format!("host_uuid = \"1ab00000-0000-4000-8000-{number:012}\"\n");
        fs::write(dir.path().join("etc/libvirtd.conf"), format!("{LIBVIRTD_CONF}{uuid}")).ok()?;
        fs::write(dir.path().join("etc/qemu.conf"), QEMU_CONF).ok()?;
        fs::write(dir.path().join("etc/libvirt.conf"), "").ok()?;
        fs::write(dir.path().join("hosts"), format!("127.0.0.1 localhost contract-host-{number}\n")).ok()?;
        fs::write(dir.path().join("init.sh"), INIT.replace("contract-host", &format!("contract-host-{number}")))
            .ok()?;
        let base = dir.path().join("base.qcow2");
        match std::env::var_os("TREFOIL_TEST_IMAGE") {
            Some(image) => drop(fs::copy(image, &base).expect("the test image can be read")),
            None => shell(&format!("qemu-img create -q -f qcow2 {} 45M", base.display())),
        }
        let Some((unshare, init)) = enter(dir.path()) else {
            return skip("namespaces cannot be made here");
        };
        let host = Self { dir, unshare, init };
        host.start_libvirtd();
        Some(host)
    }

    pub fn open(&self) -> Libvirt {
        let (uri, dir) = (self.uri(), self.agent_dir());
        Libvirt::open(LibvirtConfig { uri, dir, cluster: CLUSTER.into(), limit: None }).unwrap()
    }

    pub fn agent_dir(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}/run/libvirt/libvirt-sock", self.dir.path().display())
    }

    pub fn spec(&self, vm: u64) -> GuestSpec {
        GuestSpec {
            cluster: CLUSTER.into(),
            vm: VmId(vm),
            epoch: 4242,
            tenant: "acme & sons".into(),
            hostname: "web-1".into(),
            size: Capacity { vcpus: 1, memory_bytes: 96 << 20, disk_bytes: 1 << 30 },
            base: self.dir.path().join("base.qcow2"),
            base_format: ImageFormat::Qcow2,
            base_parents: vec![],
            base_virtual_bytes: 45 << 20,
            nics: vec![GuestNic {
                network: NetworkId(1),
                mac: Mac([2, 0x54, 0, 0, 1, vm as u8]),
                bridge: "br-contract".into(),
                mtu: 1450,
            }],
            ssh_keys: vec!["ssh-ed25519 AAAA test".into()],
            user_data: String::new(),
        }
    }

    pub fn inside(&self, command: &str) -> Command {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["-t", &self.init.to_string(), "-m", "-n", "-u", "-i", "-p", "--", "sh", "-c", command]);
        nsenter.stdin(Stdio::null());
        nsenter
    }

    pub fn start_libvirtd(&self) {
        let started = self.inside("rm -f /run/libvirtd.pid; exec libvirtd -d -p /run/libvirtd.pid").status().unwrap();
        assert!(started.success(), "libvirtd starts");
        let socket = self.dir.path().join("run/libvirt/libvirt-sock");
        wait("libvirtd answers", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    }

    pub fn kill_libvirtd(&self) {
        let killed =
            self.inside("p=$(cat /run/libvirtd.pid); kill -9 $p; while kill -0 $p 2>/dev/null; do :; done").status();
        assert!(killed.unwrap().success(), "libvirtd is killed");
    }

    /// As `kill -SIGNAL` does: STOP makes it hang, CONT lets it go on.
    pub fn signal_libvirtd(&self, signal: &str) {
        let signalled = self.inside(&format!("kill -{signal} $(cat /run/libvirtd.pid)")).status();
        assert!(signalled.unwrap().success(), "libvirtd takes {signal}");
    }

    /// The QEMU of a guest of this host, by its UUID and its place in this host's process namespace.
    pub fn guest_process(&self, vm: VmId) -> Option<u32> {
        let uuid = domain_uuid(CLUSTER, vm);
        let here = fs::read_link(format!("/proc/{}/ns/pid", self.init)).ok()?;
        let mut processes =
            fs::read_dir("/proc").ok()?.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
        processes.find(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(&uuid)
                && fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|ns| ns == here)
        })
    }

    pub fn kill_guest(&self, vm: VmId) {
        let pid = self.guest_process(vm).expect("the guest's process");
        shell(&format!("kill -9 {pid}"));
        wait("the guest's process is gone", || self.guest_process(vm).is_none());
    }

    /// The ends of what libvirtd and QEMU had to say, for whoever must find out why a test failed.
    fn tell_logs(&self) {
        let log = self.dir.path().join("log");
        let guests = fs::read_dir(log.join("qemu")).into_iter().flatten().flatten().map(|entry| entry.path());
        for file in guests.chain([log.join("libvirtd.log")]) {
            let text = fs::read_to_string(&file).unwrap_or_default();
            let from = text.lines().count().saturating_sub(20);
            println!("{}:", file.display());
            text.lines().skip(from).for_each(|line| println!("  {line}"));
        }
    }

    /// Everything in the host ends at once, as without power.
    pub fn power_failure(&mut self) {
        let _ = Command::new("kill").args(["-9", &self.init.to_string()]).status();
        let _ = self.unshare.wait();
    }

    pub fn boot(&mut self) {
        let (unshare, init) = enter(self.dir.path()).expect("the host boots again");
        (self.unshare, self.init) = (unshare, init);
        self.start_libvirtd();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if thread::panicking() {
            self.tell_logs();
        }
        self.power_failure();
    }
}

/// Make the namespaces; returns when the first process in them is set up.
fn enter(dir: &Path) -> Option<(Child, u32)> {
    for fresh in ["run", "var", "cache", "log"] {
        fs::create_dir_all(dir.join(fresh)).ok()?;
    }
    // A host that boots has an empty /run.
    fs::remove_dir_all(dir.join("run")).ok()?;
    fs::create_dir_all(dir.join("run")).ok()?;
    let mut unshare = Command::new("unshare")
        .args(["--net", "--mount", "--uts", "--pid", "--ipc", "--fork", "--kill-child=KILL", "sh"])
        .arg(dir.join("init.sh"))
        .arg(dir)
        .stdin(Stdio::null())
        .stderr(File::create(dir.join("init.log")).ok()?)
        .spawn()
        .ok()?;
    let start = Instant::now();
    while !dir.join("run/up").exists() {
        if start.elapsed() > PATIENCE || unshare.try_wait().ok()?.is_some() {
            let _ = unshare.kill();
            let _ = unshare.wait();
            return None;
        }
        thread::sleep(Duration::from_millis(20));
    }
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", unshare.id())).ok()?;
    Some((unshare, children.trim().parse().ok()?))
}

pub fn shell(command: &str) {
    assert!(Command::new("sh").args(["-c", command]).status().unwrap().success(), "{command}");
}

#[track_caller]
pub fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

const LIBVIRTD_CONF: &str = r#"
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_rw_perms = "0700"
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
"#;

/// No virtlogd, and no change of owner on a base image that others read too.
const QEMU_CONF: &str = r#"
stdio_handler = "file"
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = [ ]
namespaces = [ ]
"#;

/// The first process of the host. /dev/kvm is left in place: that it is there and does not work is one of the cases.
const INIT: &str = r#"
set -e
D=$1
hostname contract-host
mount --make-rprivate /
mount -t proc proc /proc
umount -R -l /sys 2>/dev/null || true
mount -t sysfs sysfs /sys
mkdir -p /var/lib/libvirt /var/cache/libvirt /var/log/libvirt /etc/libvirt
mount --bind "$D/var" /var/lib/libvirt
mount --bind "$D/cache" /var/cache/libvirt
mount --bind "$D/log" /var/log/libvirt
mount --bind "$D/etc" /etc/libvirt
mount --bind "$D/hosts" /etc/hosts
mount --bind "$D/run" /run
mkdir -p /run/libvirt /run/lock
ip link set lo up
ip link add br-contract type bridge forward_delay 0 stp_state 0
ip link set br-contract mtu 1450 up
trap 'exit 0' TERM
touch /run/up
while :; do sleep 86400 & wait $! || true; done
"#;
