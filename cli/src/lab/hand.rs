//! `trefoil lab`: break a cloud on this machine, mend it, and look inside its hosts.

use std::{os::unix::process::CommandExt, process::Command, time::Duration};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::json;

use crate::output::{self, Format};

use super::{
    act,
    cloud::{Cloud, Host, LabHypervisor, Placement},
    homes::{HomesArgs, homes},
    init,
    process::ProcessId,
};

#[derive(Debug, Subcommand)]
pub enum LabCommand {
    /// Lists controllers and hosts, with their processes
    Status(Placement),
    /// Ends a controller (c1) or the agent of a host (h1) as kill -9 does
    Kill(Target),
    /// Ends a controller or an agent politely
    Stop(Target),
    /// Starts a controller, or switches a host on and starts its agent
    Start(Target),
    /// Destroys the data of a controller that does not run, and joins it anew under a new id
    Wipe(Target),
    /// Ends the libvirt daemon of a host as kill -9 does; `start` starts it again
    KillLibvirtd(Target),
    /// A power failure of a host
    Poweroff(Target),
    /// Pulls the network cable of a controller or host
    Cut(Target),
    /// Parts some from the rest: they reach each other, and nobody else
    Part(Side),
    /// Reconnects a controller or host that was cut off or parted
    Heal(Target),
    /// Prints where each machine runs in truth: by the hosts' processes, not by the cloud
    Homes(HomesArgs),
    /// Runs a command on a controller's or host's network, on a host also among its processes and files
    Exec(Exec),
    /// Runs a command inside a tenant network on a host
    TenantExec(TenantExec),
    /// The first process of a host
    #[command(hide = true)]
    HostInit(init::InitArgs),
}

#[derive(Args, Debug)]
pub struct Target {
    /// c1, c2 ... or h1, h2 ...
    name: String,
    #[command(flatten)]
    placement: Placement,
}

#[derive(Args, Debug)]
pub struct Side {
    /// c1, c2 ... and h1, h2 ...
    #[arg(required = true)]
    names: Vec<String>,
    #[command(flatten)]
    placement: Placement,
}

#[derive(Args, Debug)]
pub struct Exec {
    #[command(flatten)]
    placement: Placement,
    /// c1, c2 ... or h1, h2 ...
    name: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

#[derive(Args, Debug)]
pub struct TenantExec {
    #[command(flatten)]
    placement: Placement,
    /// h1, h2 ...
    host: String,
    /// The network's VNI, as `trefoil network list --output json` shows it
    vni: u32,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// How long a controller or agent may take to leave by itself.
const POLITE: Duration = Duration::from_secs(30);

/// Carries it out; what it prints is for a person. `Exec` and `TenantExec` become the command and do not return.
///
/// # Errors
/// With one sentence.
pub async fn lab(command: LabCommand, format: Format) -> Result<()> {
    match command {
        LabCommand::Status(placement) => status(&Cloud::load(&placement.dir)?, format),
        LabCommand::Kill(target) => target.act(async |cloud, name| act::end(cloud, name, Duration::ZERO).await).await,
        LabCommand::Stop(target) => target.act(async |cloud, name| act::end(cloud, name, POLITE).await).await,
        LabCommand::Start(target) => target.act(act::start).await,
        LabCommand::Wipe(target) => target.act(async |cloud, name| wipe(cloud, name, format).await).await,
        LabCommand::KillLibvirtd(target) => target.act(kill_libvirtd).await,
        LabCommand::Poweroff(target) => target.act(act::power_off).await,
        LabCommand::Cut(target) => target.act(async |cloud, name| act::cut(cloud, name).await).await,
        LabCommand::Part(side) => act::part(&Cloud::load(&side.placement.dir)?, &side.names).await,
        LabCommand::Heal(target) => target.act(async |cloud, name| act::plug(cloud, name).await).await,
        LabCommand::Homes(args) => homes(&args, format),
        LabCommand::Exec(exec) => {
            let mut cloud = Cloud::load(&exec.placement.dir)?;
            become_command(&mut cloud, &exec.name, &[], &exec.command)
        }
        LabCommand::TenantExec(exec) => {
            let mut cloud = Cloud::load(&exec.placement.dir)?;
            act::host_of(&mut cloud, &exec.host)?;
            let way = ["nsenter".into(), format!("--net=/run/netns/tf-{}", exec.vni), "--".into()];
            become_command(&mut cloud, &exec.host, &way, &exec.command)
        }
        LabCommand::HostInit(args) => init::host_init(args).await,
    }
}

impl Target {
    async fn act<T>(self, act: impl AsyncFnOnce(&mut Cloud, &str) -> Result<T>) -> Result<()> {
        act(&mut Cloud::load(&self.placement.dir)?, &self.name).await.map(|_| ())
    }
}

async fn wipe(cloud: &mut Cloud, name: &str, format: Format) -> Result<()> {
    let id = act::wipe(cloud, name).await?;
    let text = || format!("{name} lost its data and is controller-{id} now");
    Ok(output::print(format, &json!({ "name": name, "id": id }), text)?)
}

async fn kill_libvirtd(cloud: &mut Cloud, name: &str) -> Result<()> {
    act::booted(act::host_of(cloud, name)?)?.libvirtd.end(Duration::ZERO).await
}

fn status(cloud: &Cloud, format: Format) -> Result<()> {
    let controllers = cloud.controllers.iter().map(|controller| {
        let (state, pid) = state(controller.process);
        json!({
            "name": controller.name, "address": controller.address, "id": controller.id, "state": state, "pid": pid
        })
    });
    let hosts = cloud.hosts.iter().map(|host| {
        let (state, pid) = state(host.agent);
        json!({ "name": host.name, "address": host.address, "power": power(cloud, host), "agent": state, "pid": pid })
    });
    let told = json!({ "controllers": controllers.collect::<Vec<_>>(), "hosts": hosts.collect::<Vec<_>>() });
    Ok(output::print(format, &told, || describe(cloud))?)
}

/// What has become of a process, and its id while it runs.
fn state(process: Option<ProcessId>) -> (&'static str, Option<i32>) {
    match process {
        Some(process) if process.is_alive() => ("running", Some(process.pid)),
        Some(_) => ("ended", None),
        None => ("stopped", None),
    }
}

/// `None` of a simulated host, which has no power of its own.
fn power(cloud: &Cloud, host: &Host) -> Option<&'static str> {
    match (cloud.hypervisor, host.boot) {
        (LabHypervisor::Simulated, _) => None,
        (_, Some(boot)) if boot.init.is_alive() => Some("on"),
        _ => Some("off"),
    }
}

fn describe(cloud: &Cloud) -> String {
    let words = |process| match state(process) {
        (state, Some(pid)) => format!("{state}, pid {pid}"),
        (state, None) => state.into(),
    };
    let controllers = cloud.controllers.iter().map(|controller| {
        let (name, address, id) = (&controller.name, &controller.address, controller.id);
        format!("{name:4} {address:22} controller-{id:<4} {}", words(controller.process))
    });
    let hosts = cloud.hosts.iter().map(|host| {
        let power = power(cloud, host).map(|power| format!("{power}, ")).unwrap_or_default();
        format!("{:4} {:22} {:15} {power}agent {}", host.name, host.address, "", words(host.agent))
    });
    controllers.chain(hosts).collect::<Vec<_>>().join("\n")
}

fn become_command(cloud: &mut Cloud, name: &str, way: &[String], command: &[String]) -> Result<()> {
    let place = match cloud.controller(name).cloned() {
        Some(controller) => cloud.place_of_controller(&controller),
        None => {
            let host = act::host_of(cloud, name)?.clone();
            cloud.place_of_host(&host)?
        }
    };
    let words: Vec<&str> = way.iter().chain(command).map(String::as_str).collect();
    let line = place.command_line(&words);
    let (program, arguments) = line.split_first().context("an empty command")?;
    Err(Command::new(program).args(arguments).exec()).with_context(|| format!("cannot run {program}"))
}
