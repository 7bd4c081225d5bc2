//! A host with libvirt, made of namespaces: what it finds in its directories, and how it is switched on and off.

use std::{
    fmt::Write as _,
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tokio::{
    net::UnixStream,
    time::{Instant, sleep},
};

use super::{
    cloud::{Boot, Cloud, Host},
    init,
    place::Place,
    process::{Daemon, ProcessId, last_words},
    switch,
};

/// Mounts take milliseconds and libvirtd a second or two; a busy machine is slower.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// Switches a host on: namespaces, cable, libvirtd.
///
/// # Errors
/// When one of them fails; the sentence has the last words of its log.
pub async fn boot(cloud: &Cloud, host: &Host) -> Result<Boot> {
    let dir = cloud.dir.join(&host.name);
    prepare(cloud, host, &dir).with_context(|| format!("cannot prepare {}", dir.display()))?;
    let log = cloud.log(&format!("{}-init", host.name));
    let daemon = Daemon { dir: &cloud.dir, log: &log, place: &Place::Here };
    let program = std::env::current_exe()?;
    let (program, dir_text) = (program.display().to_string(), dir.display().to_string());
    let mut command = vec!["unshare", "--net", "--mount", "--uts", "--pid", "--ipc", "--fork", "--kill-child=KILL"];
    command.extend([&*program, "lab", "host-init", &*dir_text]);
    if cloud.kvm {
        command.push("--kvm");
    }
    let (unshare, init) = daemon.start_pair(&command).await?;
    wait(unshare, &log, "the host's mounts", || dir.join(init::READY).exists()).await?;
    switch::plug_host(cloud, &host.name, host.underlay, init).await?;
    let libvirtd = start_libvirtd(cloud, host, init).await?;
    Ok(Boot { unshare, init, libvirtd })
}

/// # Errors
/// When it does not answer in time.
pub async fn start_libvirtd(cloud: &Cloud, host: &Host, init: ProcessId) -> Result<ProcessId> {
    let log = cloud.log(&format!("{}-libvirtd", host.name));
    let daemon = Daemon { dir: &cloud.dir, log: &log, place: &Place::Host(init) };
    let libvirtd = daemon.start(&["libvirtd", "--pid-file", "/run/libvirtd.pid"]).await?;
    let socket = cloud.dir.join(&host.name).join("run/libvirt/libvirt-sock");
    let asked = Instant::now();
    while UnixStream::connect(&socket).await.is_err() {
        if !libvirtd.is_alive() || asked.elapsed() > BOOT_LIMIT {
            bail!("libvirtd of {} does not answer; {}: {}", host.name, log.display(), last_words(&log));
        }
        sleep(POLL).await;
    }
    Ok(libvirtd)
}

/// A power failure: every process of the host ends at once, and its network with them.
///
/// # Errors
/// When they survive it.
pub async fn power_off(boot: &Boot) -> Result<()> {
    boot.init.end(Duration::ZERO).await?;
    boot.unshare.end(Duration::ZERO).await
}

async fn wait(process: ProcessId, log: &Path, what: &str, done: impl Fn() -> bool) -> Result<()> {
    let asked = Instant::now();
    while !done() {
        if !process.is_alive() || asked.elapsed() > BOOT_LIMIT {
            bail!("no sign of {what}; {}: {}", log.display(), last_words(log));
        }
        sleep(POLL).await;
    }
    Ok(())
}

/// What survives a power failure stays; `/run` of a host that boots is empty.
fn prepare(cloud: &Cloud, host: &Host, dir: &Path) -> io::Result<()> {
    for part in ["run", "dev"] {
        match fs::remove_dir_all(dir.join(part)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    for part in ["run", "dev", "var", "cache", "log", "etc/qemu"] {
        fs::create_dir_all(dir.join(part))?;
    }
    // The DHCP server gives up its rights and still reads below /run.
    fs::set_permissions(dir.join("run"), Permissions::from_mode(0o755))?;
    let _ = fs::remove_file(dir.join(init::READY));
    let number: u32 = host.name.trim_start_matches('h').parse().unwrap_or_default();
    fs::write(dir.join("etc/libvirtd.conf"), libvirtd_conf(number))?;
    fs::write(dir.join("etc/qemu.conf"), QEMU_CONF)?;
    fs::write(dir.join("etc/libvirt.conf"), "")?;
    fs::write(dir.join("etc/resolv.conf"), "")?;
    fs::write(dir.join("etc/hosts"), hosts_file(cloud))
}

/// libvirt looks its own host name up, and there is no name server in here.
fn hosts_file(cloud: &Cloud) -> String {
    let mut text = String::from("127.0.0.1 localhost\n");
    for host in &cloud.hosts {
        let _ = writeln!(text, "{} {}", host.underlay, host.name);
    }
    text
}

/// The uuid tells hosts apart that share one machine's firmware.
fn libvirtd_conf(number: u32) -> String {
    format!(
        r#"unix_sock_group = "root"
unix_sock_rw_perms = "0700"
auth_unix_ro = "none"
auth_unix_rw = "none"
listen_tls = 0
listen_tcp = 0
host_uuid = "7ef011ed-0000-4000-8000-{number:012}"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
log_filters = "3:object 3:event 3:util 3:node_device 3:rpc"
"#
    )
}

/// No daemon for the consoles' logs, no change of owners of shared base images, no control groups of the machine.
const QEMU_CONF: &str = r#"stdio_handler = "file"
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
cgroup_controllers = [ ]
namespaces = [ ]
"#;
