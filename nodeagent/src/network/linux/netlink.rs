//! The few questions and requests that tenant networks put to the kernel over rtnetlink.
//!
//! A `Netlink` speaks for the network namespace of the thread that opened it, for ever.

use std::{fs, io, net::IpAddr};

use futures::{StreamExt, TryStreamExt};
use rtnetlink::{
    Handle,
    packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::AddressAttribute,
        link::{
            BridgeStpState, InfoBridge, InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
        },
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    },
};
use tokio::task::JoinHandle;

use super::{super::Result, failed};

pub struct Netlink {
    handle: Handle,
    driver: JoinHandle<()>,
}

/// A device, as far as tenant networks care.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub kind: Option<InfoKind>,
    pub up: bool,
    pub mtu: u32,
    pub mac: Vec<u8>,
    /// Index of the bridge that it is a port of.
    pub bridge: Option<u32>,
    pub as_bridge: BridgeOptions,
    pub as_vxlan: VxlanOptions,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BridgeOptions {
    pub spanning_tree: bool,
    pub multicast_snooping: bool,
    pub forward_delay: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VxlanOptions {
    pub vni: u32,
    pub local: Option<IpAddr>,
    pub port: u16,
    pub learning: bool,
}

/// An address on a device of this namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub index: u32,
    pub ip: IpAddr,
    pub prefix: u8,
}

/// One forwarding entry of a VXLAN device: frames to `mac` go to the host `to`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarding {
    pub mac: Vec<u8>,
    pub to: IpAddr,
}

/// The entry of frames whose receiver is not known: they go to every host that has one.
pub const FLOOD: [u8; 6] = [0; 6];

impl Netlink {
    pub fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self { handle, driver: tokio::spawn(connection) })
    }

    pub async fn links(&self) -> Result<Vec<Link>> {
        let messages: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.map_err(failed("list the devices"))?;
        Ok(messages.into_iter().map(Link::from).collect())
    }

    pub async fn addresses(&self) -> Result<Vec<Held>> {
        let messages: Vec<_> =
            self.handle.address().get().execute().try_collect().await.map_err(failed("list the addresses"))?;
        let ip = |attribute: &AddressAttribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        };
        let held = |message: &rtnetlink::packet_route::address::AddressMessage| {
            let ip = message.attributes.iter().find_map(ip)?;
            Some(Held { index: message.header.index, ip, prefix: message.header.prefix_len })
        };
        Ok(messages.iter().filter_map(held).collect())
    }

    /// Make a device.
    pub async fn add(&self, what: &str, message: LinkMessage) -> Result<()> {
        self.handle.link().add(message).execute().await.map_err(failed(format!("make {what}")))
    }

    /// Change a device that is there.
    pub async fn change(&self, what: &str, message: LinkMessage) -> Result<()> {
        self.handle.link().change(message).execute().await.map_err(failed(format!("change {what}")))
    }

    pub async fn delete(&self, link: &Link) -> Result<()> {
        let gone = self.handle.link().del(link.index).execute().await;
        match gone {
            // The other end of a pair takes this one with it.
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -nix::libc::ENODEV => Ok(()),
            other => other.map_err(failed(format!("remove {}", link.name))),
        }
    }

    pub async fn add_address(&self, held: &Held) -> Result<()> {
        let request = self.handle.address().add(held.index, held.ip, held.prefix).replace();
        request.execute().await.map_err(failed(format!("set the address {}", held.ip)))
    }

    /// The forwarding entries of the VXLAN device `index`, learned ones included.
    pub async fn forwarding(&self, index: u32) -> Result<Vec<Forwarding>> {
        let request = self.handle.neighbours().get().set_address_family(AddressFamily::Bridge);
        let messages: Vec<NeighbourMessage> =
            request.execute().try_collect().await.map_err(failed("list the forwarding entries"))?;
        Ok(messages.iter().filter(|message| message.header.ifindex == index).filter_map(forwarding).collect())
    }

    pub async fn forward(&self, index: u32, entry: &Forwarding) -> Result<()> {
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewNeighbour(neighbour(index, entry)));
        // Append, because one unknown receiver is looked for at many hosts: add would refuse the second entry.
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_APPEND;
        let what = format!("forward to {}", entry.to);
        let mut answers = self.handle.clone().request(request).map_err(failed(&what))?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(e) = answer.payload {
                return Err(failed(what)(e));
            }
        }
        Ok(())
    }

    pub async fn stop_forwarding(&self, index: u32, entry: &Forwarding) -> Result<()> {
        match self.handle.neighbours().del(neighbour(index, entry)).execute().await {
            // A learned entry may age out between the look and the removal.
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -nix::libc::ENOENT => Ok(()),
            other => other.map_err(failed(format!("stop forwarding to {}", entry.to))),
        }
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// Whether a device speaks no IPv6: the host must not answer or solicit on a tenant's wire.
pub fn ipv6_is_off(device: &str) -> bool {
    fs::read_to_string(ipv6_switch(device)).map_or(true, |value| value.trim() == "1")
}

/// Switch IPv6 off on a device (or `all`, `default`) of this thread's namespace. A kernel without IPv6 needs nothing.
pub fn switch_ipv6_off(device: &str) -> Result<()> {
    match fs::write(ipv6_switch(device), "1") {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(format!("switch IPv6 off on {device}"))(e)),
        _ => Ok(()),
    }
}

fn ipv6_switch(device: &str) -> String {
    format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6")
}

fn neighbour(index: u32, entry: &Forwarding) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(entry.mac.clone()));
    message.attributes.push(NeighbourAttribute::Destination(match entry.to {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }));
    message
}

/// Entries without a destination belong to the bridge, not to the tunnel.
fn forwarding(message: &NeighbourMessage) -> Option<Forwarding> {
    let mut entry = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => entry.0 = Some(mac.clone()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => entry.1 = Some(IpAddr::from(*ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => entry.1 = Some(IpAddr::from(*ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => entry.1 = ip_of(bytes),
            _ => {}
        }
    }
    Some(Forwarding { mac: entry.0?, to: entry.1? })
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let up = message.header.flags.contains(LinkFlags::Up);
        let mut link = Self { index: message.header.index, up, ..Self::default() };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Controller(index) => link.bridge = (index != 0).then_some(index),
                LinkAttribute::LinkInfo(infos) => infos.into_iter().for_each(|info| link.take(info)),
                _ => {}
            }
        }
        link
    }
}

impl Link {
    fn take(&mut self, info: LinkInfo) {
        match info {
            LinkInfo::Kind(kind) => self.kind = Some(kind),
            LinkInfo::Data(InfoData::Bridge(options)) => {
                for option in options {
                    match option {
                        InfoBridge::StpState(state) => self.as_bridge.spanning_tree = state != BridgeStpState::Disabled,
                        InfoBridge::MulticastSnooping(on) => self.as_bridge.multicast_snooping = on,
                        InfoBridge::ForwardDelay(delay) => self.as_bridge.forward_delay = delay,
                        _ => {}
                    }
                }
            }
            LinkInfo::Data(InfoData::Vxlan(options)) => {
                for option in options {
                    match option {
                        InfoVxlan::Id(vni) => self.as_vxlan.vni = vni,
                        InfoVxlan::Local(ip) => self.as_vxlan.local = Some(ip.into()),
                        InfoVxlan::Local6(ip) => self.as_vxlan.local = Some(ip.into()),
                        InfoVxlan::Port(port) => self.as_vxlan.port = port,
                        InfoVxlan::Learning(on) => self.as_vxlan.learning = on,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
}
