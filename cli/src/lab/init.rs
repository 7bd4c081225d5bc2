//! The first process of a host in namespaces: `trefoil lab host-init`, hidden, started by `unshare`.
//!
//! It gives the host a name, mounts and devices of its own, says so, and from then on only takes in the exit statuses
//! of orphans. When it is killed the kernel ends every process of the host: that is the power failure.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use clap::Args;
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::{getpid, sethostname},
};
use tokio::signal::unix::{SignalKind, signal};

/// The file that says that the host is ready for its cable.
pub const READY: &str = "ready";

#[derive(Args, Debug)]
pub struct InitArgs {
    dir: PathBuf,
    /// Whether the host's devices include KVM
    #[arg(long)]
    kvm: bool,
}

/// Does not return while the host is on.
///
/// # Errors
/// When a mount is refused, or it is not the first process of its namespace.
pub async fn host_init(args: InitArgs) -> Result<()> {
    anyhow::ensure!(
        getpid().as_raw() == 1,
        "this is the first process of a host in namespaces; `trefoil up` starts it"
    );
    let mut orphans = signal(SignalKind::child())?;
    let name = args.dir.file_name().context("a host's directory has a name")?;
    sethostname(name)?;
    mount_tree(&args.dir)?;
    mount_devices(&args.dir, args.kvm)?;
    Command::new("ip").args(["link", "set", "lo", "up"]).status().context("cannot run ip")?;
    File::create(args.dir.join(READY))?;
    loop {
        orphans.recv().await;
        while !matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive) | Err(_)) {}
    }
}

fn mount_tree(dir: &Path) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("cannot have own mounts")?;
    mount_new("proc", Path::new("/proc"), None)?;
    // The machine's control groups must go for good: libvirt would find them below the new one.
    unmount("/sys")?;
    mount_new("sysfs", Path::new("/sys"), None)?;
    // Held mounts of names would keep other hosts' networks alive.
    unmount("/run/netns")?;
    bind(&dir.join("run"), Path::new("/run"))?;
    for part in ["libvirt", "lock", "netns"] {
        fs::create_dir_all(Path::new("/run").join(part))?;
    }
    for (part, at) in [
        ("var", "/var/lib/libvirt"),
        ("cache", "/var/cache/libvirt"),
        ("log", "/var/log/libvirt"),
        ("etc", "/etc/libvirt"),
    ] {
        bind(&dir.join(part), Path::new(at)).context("is libvirt installed?")?;
    }
    bind(&dir.join("etc/hosts"), Path::new("/etc/hosts"))?;
    bind(&dir.join("etc/resolv.conf"), Path::new("/etc/resolv.conf"))
}

/// A `/dev` with what a host of guests needs, and KVM only when asked for: it can be there and not work.
fn mount_devices(dir: &Path, kvm: bool) -> Result<()> {
    let dev = dir.join("dev");
    mount_new("tmpfs", &dev, Some("mode=755"))?;
    let mut nodes = vec!["null", "zero", "full", "random", "urandom", "tty", "net/tun"];
    if kvm {
        nodes.push("kvm");
    }
    for part in ["pts", "shm", "net"] {
        fs::create_dir(dev.join(part))?;
    }
    for node in nodes {
        File::create(dev.join(node))?;
        bind(&Path::new("/dev").join(node), &dev.join(node))?;
    }
    mount_new("devpts", &dev.join("pts"), Some("newinstance,ptmxmode=0666,mode=0620"))?;
    mount_new("tmpfs", &dev.join("shm"), Some("mode=1777"))?;
    symlink("pts/ptmx", dev.join("ptmx"))?;
    symlink("/proc/self/fd", dev.join("fd"))?;
    let none = None::<&str>;
    mount(Some(&dev), "/dev", none, MsFlags::MS_MOVE, none).context("cannot have own devices")
}

fn mount_new(kind: &str, at: &Path, options: Option<&str>) -> Result<()> {
    mount(Some(kind), at, Some(kind), MsFlags::empty(), options)
        .with_context(|| format!("cannot mount {}", at.display()))
}

fn bind(from: &Path, at: &Path) -> Result<()> {
    let none = None::<&str>;
    mount(Some(from), at, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("cannot mount {} at {}", from.display(), at.display()))
}

/// With everything mounted below it; fine when nothing is.
fn unmount(at: &str) -> io::Result<()> {
    loop {
        match umount2(at, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}
