//! `trefoil lab`: break a cloud on this machine, mend it, and look inside its hosts.

use std::{fs, os::unix::process::CommandExt, process::Command, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};

use super::{
    cloud::{Cloud, Host, LabHypervisor, Placement},
    host, init, member,
    process::ProcessId,
    switch,
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
    /// Plugs it in again
    Heal(Target),
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
pub async fn lab(command: LabCommand) -> Result<()> {
    match command {
        LabCommand::Status(placement) => status(&Cloud::load(&placement.dir)?),
        LabCommand::Kill(target) => end(target, Duration::ZERO).await,
        LabCommand::Stop(target) => end(target, POLITE).await,
        LabCommand::Start(target) => start(target).await,
        LabCommand::Wipe(target) => wipe(target).await,
        LabCommand::KillLibvirtd(target) => {
            let (mut cloud, name) = target.open()?;
            booted(host_of(&mut cloud, &name)?)?.libvirtd.end(Duration::ZERO).await
        }
        LabCommand::Poweroff(target) => poweroff(target).await,
        LabCommand::Cut(target) => set_cable(target, false).await,
        LabCommand::Heal(target) => set_cable(target, true).await,
        LabCommand::Exec(exec) => {
            let mut cloud = Cloud::load(&exec.placement.dir)?;
            become_command(&mut cloud, &exec.name, &[], &exec.command)
        }
        LabCommand::TenantExec(exec) => {
            let mut cloud = Cloud::load(&exec.placement.dir)?;
            host_of(&mut cloud, &exec.host)?;
            let way = ["nsenter".into(), format!("--net=/run/netns/tf-{}", exec.vni), "--".into()];
            become_command(&mut cloud, &exec.host, &way, &exec.command)
        }
        LabCommand::HostInit(args) => init::host_init(args).await,
    }
}

impl Target {
    fn open(self) -> Result<(Cloud, String)> {
        Ok((Cloud::load(&self.placement.dir)?, self.name))
    }
}

fn status(cloud: &Cloud) -> Result<()> {
    let state = |process: Option<ProcessId>| match process {
        Some(process) if process.is_alive() => format!("runs, pid {}", process.pid),
        Some(_) => "has ended".into(),
        None => "stopped".into(),
    };
    for controller in &cloud.controllers {
        let (name, address, id) = (&controller.name, &controller.address, controller.id);
        println!("{name:4} {address:22} controller-{id:<4} {}", state(controller.process));
    }
    for host in &cloud.hosts {
        let power = match (cloud.hypervisor, host.boot) {
            (LabHypervisor::Simulated, _) => "",
            (_, Some(boot)) if boot.init.is_alive() => "on, ",
            _ => "off, ",
        };
        println!("{:4} {:22} {:15} {power}agent {}", host.name, host.address, "", state(host.agent));
    }
    Ok(())
}

async fn end(target: Target, polite: Duration) -> Result<()> {
    let (mut cloud, name) = target.open()?;
    let process = match cloud.controller(&name) {
        Some(controller) => &mut controller.process,
        None => &mut host_of(&mut cloud, &name)?.agent,
    };
    let ended = process.take().filter(ProcessId::is_alive).with_context(|| format!("{name} does not run"))?;
    ended.end(polite).await?;
    cloud.save()
}

async fn start(target: Target) -> Result<()> {
    let (mut cloud, name) = target.open()?;
    if let Some(controller) = cloud.controllers.iter().find(|controller| controller.name == name) {
        ensure!(!controller.process.is_some_and(|process| process.is_alive()), "{name} runs already");
        let process = member::start_controller(&cloud, controller).await?;
        expect(cloud.controller(&name), &name)?.process = Some(process);
        return cloud.save();
    }
    let host = host_of(&mut cloud, &name)?.clone();
    if cloud.hypervisor == LabHypervisor::Libvirt {
        let boot = match host.boot {
            Some(mut boot) if boot.init.is_alive() => {
                if !boot.libvirtd.is_alive() {
                    boot.libvirtd = host::start_libvirtd(&cloud, &host, boot.init).await?;
                }
                boot
            }
            _ => host::boot(&cloud, &host).await?,
        };
        host_of(&mut cloud, &name)?.boot = Some(boot);
        cloud.save()?;
    }
    if !host.agent.is_some_and(|agent| agent.is_alive()) {
        let host = host_of(&mut cloud, &name)?.clone();
        let agent = member::start_agent(&cloud, &host).await?;
        host_of(&mut cloud, &name)?.agent = Some(agent);
    }
    cloud.save()
}

async fn wipe(target: Target) -> Result<()> {
    let (mut cloud, name) = target.open()?;
    let controller = expect(cloud.controller(&name), &name)?.clone();
    ensure!(!controller.process.is_some_and(|process| process.is_alive()), "{name} runs; stop or kill it first");
    member::remove_controller(&cloud, controller.id).await?;
    match fs::remove_dir_all(cloud.data(&name)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).with_context(|| format!("cannot wipe {name}"))?,
        _ => {}
    }
    let id = member::join_controller(&cloud, &controller).await?;
    let process = member::start_controller(&cloud, &controller).await?;
    let joined = expect(cloud.controller(&name), &name)?;
    (joined.id, joined.process) = (id, Some(process));
    cloud.save()?;
    member::wait_for_voters(&cloud).await?;
    println!("{name} lost its data and is controller-{id} now");
    Ok(())
}

async fn poweroff(target: Target) -> Result<()> {
    let (mut cloud, name) = target.open()?;
    let host = host_of(&mut cloud, &name)?;
    match host.boot.take() {
        Some(boot) => host::power_off(&boot).await?,
        // A simulated host has one process.
        None => host.agent.with_context(|| format!("{name} is off already"))?.end(Duration::ZERO).await?,
    }
    host.agent = None;
    cloud.save()
}

async fn set_cable(target: Target, connected: bool) -> Result<()> {
    let (cloud, name) = target.open()?;
    ensure!(cloud.hypervisor == LabHypervisor::Libvirt, "members of a simulated cloud share one network");
    switch::set_port(&cloud, &name, connected).await
}

fn become_command(cloud: &mut Cloud, name: &str, way: &[String], command: &[String]) -> Result<()> {
    let place = match cloud.controller(name).cloned() {
        Some(controller) => cloud.place_of_controller(&controller),
        None => {
            let host = host_of(cloud, name)?.clone();
            cloud.place_of_host(&host)?
        }
    };
    let words: Vec<&str> = way.iter().chain(command).map(String::as_str).collect();
    let line = place.command_line(&words);
    let (program, arguments) = line.split_first().context("an empty command")?;
    Err(Command::new(program).args(arguments).exec()).with_context(|| format!("cannot run {program}"))
}

fn host_of<'a>(cloud: &'a mut Cloud, name: &str) -> Result<&'a mut Host> {
    expect(cloud.host(name), name)
}

fn booted(host: &Host) -> Result<super::cloud::Boot> {
    match host.boot {
        Some(boot) if boot.init.is_alive() => Ok(boot),
        _ => bail!("the host {} is switched off, or simulated", host.name),
    }
}

fn expect<'a, T>(found: Option<&'a mut T>, name: &str) -> Result<&'a mut T> {
    found.with_context(|| format!("there is no {name} in this cloud (see `trefoil lab status`)"))
}
