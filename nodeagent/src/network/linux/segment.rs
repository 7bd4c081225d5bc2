//! The Ethernet of one network on this host: the bridge, the VXLAN device with a flood entry for each peer host, and
//! the taps of the guests.

use std::{collections::BTreeSet, net::IpAddr};

use model::assignment::NetworkWish;
use rtnetlink::{
    LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVxlan,
    packet_route::link::{BridgeStpState, InfoKind, InfoVxlan, LinkMessage},
};

use super::{
    super::Result,
    Names, failed,
    netlink::{BridgeOptions, FLOOD, Forwarding, Link, Netlink, VxlanOptions, ipv6_is_off, switch_ipv6_off},
};

/// The port that IANA gave to VXLAN.
pub const VXLAN_PORT: u16 = 4789;

pub struct Bridge<'a> {
    pub netlink: &'a Netlink,
    pub names: &'a Names,
    pub mtu: u32,
}

impl Bridge<'_> {
    pub fn is_right(&self, links: &[Link]) -> bool {
        find(links, &self.names.bridge).is_some_and(|link| self.is_ours(link) && self.is_ready(link))
    }

    pub async fn ensure(&self) -> Result<()> {
        let name = &self.names.bridge;
        let links = self.netlink.links().await?;
        if let Some(link) = find(&links, name)
            && !self.is_ours(link)
        {
            self.netlink.delete(link).await?;
        }
        if find(&links, name).is_none_or(|link| !self.is_ours(link)) {
            let message = LinkMessageBuilder::<LinkBridge>::new(name)
                .stp_state(BridgeStpState::Disabled)
                .forward_delay(0)
                .mcast_snooping(false)
                .mtu(self.mtu);
            self.netlink.add(name, message.build()).await?;
        }
        let links = self.netlink.links().await?;
        let link = expect(&links, name)?;
        if !self.is_ready(link) {
            switch_ipv6_off(name)?;
            self.netlink.change(name, LinkUnspec::new_with_index(link.index).mtu(self.mtu).up().build()).await?;
        }
        Ok(())
    }

    /// What cannot be mended, only made anew.
    fn is_ours(&self, link: &Link) -> bool {
        link.kind == Some(InfoKind::Bridge) && link.as_bridge == BridgeOptions::default()
    }

    fn is_ready(&self, link: &Link) -> bool {
        link.up && link.mtu == self.mtu && ipv6_is_off(&link.name)
    }
}

pub struct Tunnel<'a> {
    pub netlink: &'a Netlink,
    pub names: &'a Names,
    pub mtu: u32,
    pub local: IpAddr,
    pub wish: &'a NetworkWish,
}

impl Tunnel<'_> {
    pub fn is_right(&self, links: &[Link]) -> bool {
        let bridge = find(links, &self.names.bridge).map(|link| link.index);
        let link = find(links, &self.names.tunnel);
        bridge.is_some() && link.is_some_and(|link| self.is_ours(link) && self.is_ready(link, bridge))
    }

    /// Flood entries for exactly the peers, and nothing learned from a host that is no peer any more.
    pub async fn floods_to_peers(&self, links: &[Link]) -> Result<bool> {
        let Some(link) = find(links, &self.names.tunnel) else { return Ok(false) };
        let entries = self.netlink.forwarding(link.index).await?;
        let flooded: BTreeSet<IpAddr> = entries.iter().filter(|e| e.mac == FLOOD).map(|e| e.to).collect();
        let peers = self.peers();
        Ok(flooded == peers && entries.iter().all(|entry| peers.contains(&entry.to)))
    }

    pub async fn ensure(&self) -> Result<()> {
        let name = &self.names.tunnel;
        let links = self.netlink.links().await?;
        let bridge = expect(&links, &self.names.bridge)?.index;
        let standing = find(&links, name).filter(|link| self.is_ours(link));
        if standing.is_none() {
            if let Some(link) = find(&links, name) {
                self.netlink.delete(link).await?;
            }
            self.netlink.add(name, self.device()).await?;
        }
        let links = self.netlink.links().await?;
        let link = expect(&links, name)?;
        if !self.is_ready(link, Some(bridge)) {
            switch_ipv6_off(name)?;
            let message = LinkUnspec::new_with_index(link.index).mtu(self.mtu).controller(bridge).up();
            self.netlink.change(name, message.build()).await?;
        }
        self.flood_to_peers(link.index).await
    }

    async fn flood_to_peers(&self, index: u32) -> Result<()> {
        let entries = self.netlink.forwarding(index).await?;
        let peers = self.peers();
        for entry in entries.iter().filter(|entry| !peers.contains(&entry.to)) {
            self.netlink.stop_forwarding(index, entry).await?;
        }
        for &to in &peers {
            let entry = Forwarding { mac: FLOOD.to_vec(), to };
            if !entries.contains(&entry) {
                self.netlink.forward(index, &entry).await?;
            }
        }
        Ok(())
    }

    /// Hosts of the other family than this one's underlay cannot be reached, and this host is no peer of its own.
    fn peers(&self) -> BTreeSet<IpAddr> {
        let reachable = |peer: &&IpAddr| peer.is_ipv4() == self.local.is_ipv4() && **peer != self.local;
        self.wish.peers.iter().filter(reachable).copied().collect()
    }

    fn device(&self) -> LinkMessage {
        let device = LinkMessageBuilder::<LinkVxlan>::new(&self.names.tunnel)
            .id(self.names.vni)
            .port(VXLAN_PORT)
            .append_info_data(InfoVxlan::Learning(true))
            .mtu(self.mtu);
        match self.local {
            IpAddr::V4(ip) => device.local(ip).build(),
            IpAddr::V6(ip) => device.local6(ip).build(),
        }
    }

    fn is_ours(&self, link: &Link) -> bool {
        let wanted = VxlanOptions { vni: self.names.vni, local: Some(self.local), port: VXLAN_PORT, learning: true };
        link.kind == Some(InfoKind::Vxlan) && link.as_vxlan == wanted
    }

    fn is_ready(&self, link: &Link, bridge: Option<u32>) -> bool {
        link.up && link.mtu == self.mtu && link.bridge == bridge && ipv6_is_off(&link.name)
    }
}

/// The taps of this host's guests that are not ports of their bridge, because somebody deleted it.
///
/// libvirt gives a tap the guest's MAC with the first byte `fe`. It switches the tap on only after it has joined the
/// bridge itself, so one that is off is still libvirt's to plug.
pub fn stray_taps<'a>(links: &'a [Link], names: &Names, wish: &NetworkWish) -> Vec<&'a Link> {
    let bridge = find(links, &names.bridge).map(|link| link.index);
    let taps: BTreeSet<Vec<u8>> = wish
        .leases
        .iter()
        .map(|lease| {
            let mut mac = lease.mac.0.to_vec();
            mac[0] = 0xfe;
            mac
        })
        .collect();
    links.iter().filter(|link| link.up && taps.contains(&link.mac) && link.bridge != bridge).collect()
}

pub async fn adopt_taps(netlink: &Netlink, names: &Names, wish: &NetworkWish) -> Result<()> {
    let links = netlink.links().await?;
    let bridge = expect(&links, &names.bridge)?.index;
    for tap in stray_taps(&links, names, wish) {
        switch_ipv6_off(&tap.name)?;
        netlink.change(&tap.name, LinkUnspec::new_with_index(tap.index).controller(bridge).build()).await?;
        tracing::info!(tap = tap.name, bridge = names.bridge, "a guest's tap was plugged in again");
    }
    Ok(())
}

pub fn find<'a>(links: &'a [Link], name: &str) -> Option<&'a Link> {
    links.iter().find(|link| link.name == name)
}

pub fn expect<'a>(links: &'a [Link], name: &str) -> Result<&'a Link> {
    find(links, name).ok_or_else(|| failed(format!("find {name}"))("it was made and is gone"))
}
