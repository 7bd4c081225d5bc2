//! What can be done to the members of a cloud on this machine: ended, started, wiped, cut off. For people (`hand`) and for
//! drills.
//!
//! Each act writes the cloud's record before it returns, so that `status` and `down` know of it.

use std::{fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};

use super::{
    cloud::{Boot, Cloud, Host, LabHypervisor},
    host, member,
    process::ProcessId,
    switch,
};

/// Ends a controller or the agent of a host, with zero as `kill -9` does; who it was.
///
/// # Errors
/// When it does not run, or survives.
pub async fn end(cloud: &mut Cloud, name: &str, polite: Duration) -> Result<ProcessId> {
    let process = match cloud.controller(name) {
        Some(controller) => &mut controller.process,
        None => &mut host_of(cloud, name)?.agent,
    };
    let ended = process.take().filter(ProcessId::is_alive).with_context(|| format!("{name} does not run"))?;
    ended.end(polite).await?;
    cloud.save()?;
    Ok(ended)
}

/// Starts a controller, or switches a host on and starts its agent.
///
/// # Errors
/// When a controller runs already, or something does not start.
pub async fn start(cloud: &mut Cloud, name: &str) -> Result<()> {
    if cloud.controller(name).is_some() {
        return start_controller(cloud, name, &[]).await;
    }
    let host = host_of(cloud, name)?.clone();
    if cloud.hypervisor == LabHypervisor::Libvirt {
        let boot = match host.boot {
            Some(mut boot) if boot.init.is_alive() => {
                if !boot.libvirtd.is_alive() {
                    boot.libvirtd = host::start_libvirtd(cloud, &host, boot.init).await?;
                }
                boot
            }
            _ => host::boot(cloud, &host).await?,
        };
        host_of(cloud, name)?.boot = Some(boot);
        cloud.save()?;
    }
    if !host.agent.is_some_and(|agent| agent.is_alive()) {
        let host = host_of(cloud, name)?.clone();
        let agent = member::start_agent(cloud, &host).await?;
        host_of(cloud, name)?.agent = Some(agent);
    }
    cloud.save()
}

/// Starts a controller by way of `wrapper`, a program that becomes the one that it is given.
///
/// # Errors
/// When it runs already, or does not start.
pub async fn start_controller(cloud: &mut Cloud, name: &str, wrapper: &[&str]) -> Result<()> {
    let controller = expect(cloud.controller(name), name)?.clone();
    ensure!(!controller.process.is_some_and(|process| process.is_alive()), "{name} runs already");
    let process = member::start_controller(cloud, &controller, wrapper).await?;
    expect(cloud.controller(name), name)?.process = Some(process);
    cloud.save()
}

/// Destroys the data of a controller that does not run, and joins it anew; its new id.
///
/// # Errors
/// When it runs, or the quorum does not take it.
pub async fn wipe(cloud: &mut Cloud, name: &str) -> Result<u64> {
    let controller = expect(cloud.controller(name), name)?.clone();
    ensure!(!controller.process.is_some_and(|process| process.is_alive()), "{name} runs; stop or kill it first");
    member::remove_controller(cloud, controller.id).await?;
    match fs::remove_dir_all(cloud.data(name)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).with_context(|| format!("cannot wipe {name}"))?,
        _ => {}
    }
    let id = member::join_controller(cloud, &controller).await?;
    let process = member::start_controller(cloud, &controller, &[]).await?;
    let joined = expect(cloud.controller(name), name)?;
    (joined.id, joined.process) = (id, Some(process));
    cloud.save()?;
    member::wait_for_voters(cloud).await?;
    Ok(id)
}

/// A power failure of a host: every process of it ends, and every guest with them.
///
/// # Errors
/// When it is off already, or something survives.
pub async fn power_off(cloud: &mut Cloud, name: &str) -> Result<()> {
    let data = cloud.data(name);
    let host = host_of(cloud, name)?;
    match host.boot.take() {
        Some(boot) => host::power_off(&boot).await?,
        None => {
            host.agent.with_context(|| format!("{name} is off already"))?.end(Duration::ZERO).await?;
            nodeagent::hypervisor::simulated::outside::cut_power(&data)?;
        }
    }
    host.agent = None;
    cloud.save()
}

/// Pulls the network cable of a member.
///
/// # Errors
/// When the members share one network.
pub async fn cut(cloud: &Cloud, name: &str) -> Result<()> {
    own_network(cloud)?;
    switch::set_port(cloud, name, false).await
}

/// Puts members on the other side of a partition: they reach each other, and nobody else.
///
/// # Errors
/// When the members share one network.
pub async fn part(cloud: &Cloud, names: &[String]) -> Result<()> {
    own_network(cloud)?;
    for name in names {
        switch::part(cloud, name, true).await?;
    }
    Ok(())
}

/// Plugs a cable in again, on the side where most are.
///
/// # Errors
/// When the members share one network.
pub async fn plug(cloud: &Cloud, name: &str) -> Result<()> {
    own_network(cloud)?;
    switch::part(cloud, name, false).await?;
    switch::set_port(cloud, name, true).await
}

fn own_network(cloud: &Cloud) -> Result<()> {
    ensure!(cloud.hypervisor == LabHypervisor::Libvirt, "members of a simulated cloud share one network");
    Ok(())
}

/// The processes of a host that is on.
///
/// # Errors
/// When it is off, or simulated.
pub fn booted(host: &Host) -> Result<Boot> {
    match host.boot {
        Some(boot) if boot.init.is_alive() => Ok(boot),
        _ => bail!("the host {} is switched off, or simulated", host.name),
    }
}

/// # Errors
/// When there is no such host.
pub fn host_of<'a>(cloud: &'a mut Cloud, name: &str) -> Result<&'a mut Host> {
    expect(cloud.host(name), name)
}

fn expect<'a, T>(found: Option<&'a mut T>, name: &str) -> Result<&'a mut T> {
    found.with_context(|| format!("there is no {name} in this cloud (see `trefoil lab status`)"))
}
