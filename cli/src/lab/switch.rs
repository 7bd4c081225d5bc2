//! The switch that joins controllers and hosts: a bridge in a network namespace of its own, a port for each, and a second
//! bridge for those that are parted from the rest.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{
    cloud::Cloud,
    place::Place,
    process::{ProcessId, run},
};

const NAME: &str = "sw";
/// Bridges: where all are, and where those are that are parted from them.
const UNDER: &str = "under";
const APART: &str = "apart";

/// Makes the switch.
///
/// # Errors
/// When the kernel refuses.
pub async fn make(cloud: &Cloud) -> Result<()> {
    let switch = &cloud.namespace(NAME);
    ip(cloud, &["netns", "add", switch]).await?;
    for bridge in [UNDER, APART] {
        let kind = ["type", "bridge", "forward_delay", "0", "stp_state", "0"];
        ip(cloud, &[&["-n", switch, "link", "add", bridge], &kind[..]].concat()).await?;
        ip(cloud, &["-n", switch, "link", "set", bridge, "up"]).await?;
    }
    Ok(())
}

/// Makes the network namespace of a controller and plugs it in.
///
/// # Errors
/// When the kernel refuses.
pub async fn plug_controller(cloud: &Cloud, name: &str, underlay: IpAddr) -> Result<()> {
    let namespace = &cloud.namespace(name);
    ip(cloud, &["netns", "add", namespace]).await?;
    plug(cloud, name, namespace, underlay).await?;
    set_up(cloud, &Place::Network(namespace.clone()), underlay).await
}

/// Plugs in a host by its first process.
///
/// # Errors
/// When the kernel refuses.
pub async fn plug_host(cloud: &Cloud, name: &str, underlay: IpAddr, init: ProcessId) -> Result<()> {
    plug(cloud, name, &init.pid.to_string(), underlay).await?;
    set_up(cloud, &Place::Host(init), underlay).await
}

/// Pulls a cable, or plugs it in again.
///
/// # Errors
/// When there is no such port.
pub async fn set_port(cloud: &Cloud, name: &str, connected: bool) -> Result<()> {
    let state = if connected { "up" } else { "down" };
    ip(cloud, &["-n", &cloud.namespace(NAME), "link", "set", name, state]).await
}

/// Moves a port to the other side of a partition, or back: those on one side reach each other.
///
/// # Errors
/// When there is no such port.
pub async fn part(cloud: &Cloud, name: &str, apart: bool) -> Result<()> {
    let side = if apart { APART } else { UNDER };
    ip(cloud, &["-n", &cloud.namespace(NAME), "link", "set", name, "master", side]).await
}

/// Bytes that a port has carried so far, in and out.
///
/// # Errors
/// When there is no such port.
pub async fn carried(cloud: &Cloud, name: &str) -> Result<u64> {
    let switch = cloud.namespace(NAME);
    let words = ["ip", "-n", &switch, "-s", "-j", "link", "show", "dev", name];
    let ports: Value = serde_json::from_str(&run(&cloud.dir, &Place::Here, &words).await?)?;
    let bytes = |way: &str| ports[0]["stats64"][way]["bytes"].as_u64().context("the kernel counts no bytes");
    Ok(bytes("rx")? + bytes("tx")?)
}

/// The cable is made inside the switch: the machine's own network never sees an end of it. `to` is the name of a
/// namespace or a process. As a real card's, the MAC is the same after each boot: neighbours remember it.
async fn plug(cloud: &Cloud, port: &str, to: &str, underlay: IpAddr) -> Result<()> {
    let switch = &cloud.namespace(NAME);
    let octets = match underlay {
        IpAddr::V4(ip) => ip.octets(),
        IpAddr::V6(_) => bail!("the switch carries IPv4"),
    };
    let mac = octets.iter().fold(String::from("06:77"), |mac, octet| format!("{mac}:{octet:02x}"));
    let cable = ["type", "veth", "peer", "name", "under0", "address", &mac, "netns", to];
    ip(cloud, &[&["-n", switch, "link", "add", port], &cable[..]].concat()).await?;
    ip(cloud, &["-n", switch, "link", "set", port, "master", UNDER, "up"]).await
}

async fn set_up(cloud: &Cloud, place: &Place, underlay: IpAddr) -> Result<()> {
    run(&cloud.dir, place, &["ip", "link", "set", "lo", "up"]).await?;
    run(&cloud.dir, place, &["ip", "address", "add", &format!("{underlay}/16"), "dev", "under0"]).await?;
    run(&cloud.dir, place, &["ip", "link", "set", "under0", "up"]).await.map(|_| ())
}

async fn ip(cloud: &Cloud, arguments: &[&str]) -> Result<()> {
    run(&cloud.dir, &Place::Here, &[&["ip"], arguments].concat()).await.map(|_| ())
}
