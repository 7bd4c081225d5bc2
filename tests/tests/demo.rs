//! The demonstration runs as a test where the machine can carry it: real libvirt, real guests, real networks.

use std::process::Command;

use jepsen::{cluster::binary, verdict::skipped};

/// Why this machine cannot carry real hosts, if it cannot.
fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("hosts with libvirt take root".into());
    }
    let tools =
        ["libvirtd", "qemu-system-x86_64", "qemu-img", "ip", "nft", "dnsmasq", "curl", "virsh", "syslinux", "mcopy"];
    let installed = |tool: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|folder| folder.join(tool).is_file())
    };
    let missing: Vec<&str> = tools.into_iter().filter(|tool| !installed(tool)).collect();
    (!missing.is_empty()).then(|| format!("not installed: {} (`make deps` installs them)", missing.join(", ")))
}

#[test]
fn the_demonstration_is_true() {
    if let Some(obstacle) = obstacle() {
        skipped("the_demonstration_is_true", &obstacle);
        return;
    }
    let demo = binary().expect("the binaries are built").with_file_name("demo");
    let output = Command::new(&demo).output().expect("it runs");
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
