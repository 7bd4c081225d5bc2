//! `trefoil up`: a quorum and its hosts, from nothing to ready.

use std::net::{TcpListener, UdpSocket};

use anyhow::{Context, Result, ensure};
use clap::Args;
use futures::future::try_join_all;
use nix::unistd::Uid;

use super::{
    cloud::{Boot, Cloud, LabHypervisor, Placement},
    host, member,
    process::ProcessId,
    switch,
    telling::Telling,
};

#[derive(Args, Clone, Debug)]
pub struct UpArgs {
    /// How many hosts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(0..=MAX_HOSTS))]
    pub hosts: u16,
    /// How many controllers
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=MAX_CONTROLLERS))]
    pub controllers: u16,
    /// What runs the guests; libvirt for root where it is installed, else simulated
    #[arg(long, value_enum)]
    pub hypervisor: Option<LabHypervisor>,
    /// First of the ports on loopback that simulated clouds use: one a controller, then one a host
    #[arg(long, default_value_t = 7470, value_parser = clap::value_parser!(u16).range(1024..=60_000))]
    pub base_port: u16,
    /// Let the hosts use KVM; without, guests are emulated
    #[arg(long)]
    pub kvm: bool,
    #[command(flatten)]
    pub placement: Placement,
}

/// Addresses of the switch end before the next hundred; no machine runs that many libvirts.
const MAX_HOSTS: i64 = 100;
/// Addresses .2 to .10; a quorum of more is only slower.
const MAX_CONTROLLERS: i64 = 9;

/// What hosts in namespaces run on, and the package that has it.
const TOOLS: [(&str, &str); 9] = [
    ("setsid", "util-linux"),
    ("nsenter", "util-linux"),
    ("unshare", "util-linux"),
    ("ip", "iproute2"),
    ("libvirtd", "libvirt-daemon-system"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("dnsmasq", "dnsmasq-base"),
    ("nft", "nftables"),
];

/// Starts it all and returns when three controllers vote and every host is up.
///
/// # Errors
/// With one sentence; what was started stays to be looked at, and `down` removes it.
pub async fn up(args: UpArgs) -> Result<Cloud> {
    let telling = Telling::begin();
    let hypervisor = args.hypervisor.unwrap_or_else(best_hypervisor);
    check(&args, hypervisor)?;
    let dir = &args.placement.dir;
    let mut cloud = Cloud::new(dir, hypervisor, args.kvm, (args.controllers, args.hosts), args.base_port)?;
    telling.step(&format!("a cloud with the hypervisor '{}' in {}", hypervisor.name(), cloud.dir.display()));
    start(&mut cloud, telling)
        .await
        .with_context(|| format!("what was started is in {}; `trefoil down` removes it", cloud.dir.display()))?;
    telling.step("ready");
    Ok(cloud)
}

/// How to use it, for a person.
pub fn how_to_use(cloud: &Cloud) -> String {
    let config = cloud.client_config();
    let dir = cloud.dir.display();
    format!(
        "\nexport TREFOIL_CONFIG={}\n\ntrefoil quorum status        the controllers\ntrefoil node list            the hosts\n\
         trefoil lab status --dir {dir}\ntrefoil down --dir {dir}\n",
        config.display()
    )
}

fn best_hypervisor() -> LabHypervisor {
    let libvirt = Uid::effective().is_root() && is_installed("libvirtd");
    if libvirt { LabHypervisor::Libvirt } else { LabHypervisor::Simulated }
}

/// Everything that can be known before anything is started.
fn check(args: &UpArgs, hypervisor: LabHypervisor) -> Result<()> {
    let dir = args.placement.dir.display();
    ensure!(!Cloud::is_in(&args.placement.dir), "there is a cloud in {dir} already: `trefoil down` removes it");
    let tools = match hypervisor {
        LabHypervisor::Libvirt => &TOOLS[..],
        LabHypervisor::Simulated => &TOOLS[..1],
    };
    for (tool, package) in tools {
        ensure!(is_installed(tool), "{tool} is not installed; it is in the Debian package {package}");
    }
    if hypervisor == LabHypervisor::Libvirt {
        ensure!(Uid::effective().is_root(), "hosts in namespaces need root; `--hypervisor simulated` does not");
        return Ok(());
    }
    for port in args.base_port..args.base_port + args.controllers + args.hosts {
        let free = TcpListener::bind(("127.0.0.1", port)).is_ok() && UdpSocket::bind(("127.0.0.1", port)).is_ok();
        ensure!(free, "port {port} of 127.0.0.1 is in use; choose others with --base-port");
    }
    Ok(())
}

fn is_installed(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
}

async fn start(cloud: &mut Cloud, telling: Telling) -> Result<()> {
    if cloud.hypervisor == LabHypervisor::Libvirt {
        switch::make(cloud).await?;
        for controller in &cloud.controllers {
            switch::plug_controller(cloud, &controller.name, controller.underlay).await?;
        }
        telling.step("a switch, and a network namespace for each controller");
    }
    let (controllers, boots) = tokio::try_join!(start_quorum(cloud, telling), boot_hosts(cloud, telling))?;
    for (controller, (id, process)) in cloud.controllers.iter_mut().zip(controllers) {
        (controller.id, controller.process) = (id, Some(process));
    }
    for (host, boot) in cloud.hosts.iter_mut().zip(boots) {
        host.boot = Some(boot);
    }
    cloud.save()?;
    let agents = start_agents(cloud).await?;
    for (host, agent) in cloud.hosts.iter_mut().zip(agents) {
        host.agent = Some(agent);
    }
    cloud.save()?;
    telling.step(&format!("{} agents joined", cloud.hosts.len()));
    member::wait_for_voters(cloud).await?;
    telling.step(&format!("{} controllers vote", cloud.controllers.len()));
    member::wait_for_nodes(cloud).await?;
    telling.step(&format!("{} hosts are up", cloud.hosts.len()));
    Ok(())
}

async fn start_quorum(cloud: &Cloud, telling: Telling) -> Result<Vec<(u64, ProcessId)>> {
    let mut started = Vec::new();
    for (number, controller) in cloud.controllers.iter().enumerate() {
        let id = match number {
            0 => member::init_controller(cloud, controller).await?,
            _ => member::join_controller(cloud, controller).await?,
        };
        started.push((id, member::start_controller(cloud, controller, &[]).await?));
        let did = if number == 0 { "founded the cloud" } else { "joined" };
        telling.step(&format!("controller {} {did}", controller.name));
    }
    Ok(started)
}

/// Nothing with the simulated hypervisor.
async fn boot_hosts(cloud: &Cloud, telling: Telling) -> Result<Vec<Boot>> {
    if cloud.hypervisor == LabHypervisor::Simulated {
        return Ok(Vec::new());
    }
    let boot = async |host| {
        let boot = host::boot(cloud, host).await?;
        telling.step(&format!("host {} has booted, its libvirt answers", host.name));
        Ok::<_, anyhow::Error>(boot)
    };
    try_join_all(cloud.hosts.iter().map(boot)).await
}

async fn start_agents(cloud: &Cloud) -> Result<Vec<ProcessId>> {
    let start = async |host| {
        let token = member::token(cloud, member::Role::Agent).await?;
        member::join_agent(cloud, host, &token).await?;
        member::start_agent(cloud, host).await
    };
    try_join_all(cloud.hosts.iter().map(start)).await
}
