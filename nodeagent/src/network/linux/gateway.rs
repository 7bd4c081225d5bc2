//! The node's own foot in a tenant network: a namespace with one cable into the bridge, holding the gateway's address.
//!
//! The namespace keeps equal ranges of different tenants apart on one host.

use std::{io, net::IpAddr, os::fd::AsRawFd};

use model::assignment::NetworkWish;
use rtnetlink::{
    LinkMessageBuilder, LinkUnspec, LinkVeth,
    packet_route::link::{InfoData, InfoKind, InfoVeth},
};

use super::{
    super::Result,
    Names, failed,
    namespace::Namespace,
    netlink::{Held, Link, Netlink, ipv6_is_off, switch_ipv6_off},
    segment::{expect, find},
};

/// The cable's name inside the namespace.
pub const INSIDE: &str = "eth0";

pub struct Gateway<'a> {
    pub netlink: &'a Netlink,
    pub names: &'a Names,
    pub mtu: u32,
    pub wish: &'a NetworkWish,
}

/// A gateway that stands: its namespace, and the index of its cable's end there.
pub struct Inside {
    pub namespace: Namespace,
    pub index: u32,
}

impl Gateway<'_> {
    /// The gateway, when all of it is right.
    pub async fn look(&self, links: &[Link]) -> Result<Option<Inside>> {
        let Some(namespace) = self.namespace()? else { return Ok(None) };
        let bridge = find(links, &self.names.bridge).map(|link| link.index);
        let outside = find(links, &self.names.gateway);
        if bridge.is_none() || !outside.is_some_and(|link| self.is_ready_outside(link, bridge)) {
            return Ok(None);
        }
        let inner = self.netlink_inside(&namespace).await?;
        let links = inner.links().await?;
        let Some(link) = find(&links, INSIDE).filter(|link| self.is_ready_inside(link)) else { return Ok(None) };
        let holds = inner.addresses().await?.contains(&self.address(link.index));
        Ok(holds.then_some(Inside { namespace, index: link.index }))
    }

    pub async fn ensure(&self) -> Result<Inside> {
        if let Some(inside) = self.look(&self.netlink.links().await?).await? {
            return Ok(inside);
        }
        let what = format!("make the namespace {}", self.names.namespace);
        let namespace = match self.namespace()? {
            Some(namespace) => namespace,
            None => {
                Namespace::remove(&self.names.namespace).map_err(failed(&what))?;
                Namespace::create(&self.names.namespace).await.map_err(failed(&what))?
            }
        };
        self.plug_cable(&namespace).await?;
        self.set_outside().await?;
        let index = self.set_inside(&namespace).await?;
        Ok(Inside { namespace, index })
    }

    /// Both ends or none: a cable whose other end is gone is replaced.
    async fn plug_cable(&self, namespace: &Namespace) -> Result<()> {
        let links = self.netlink.links().await?;
        let outside = find(&links, &self.names.gateway);
        let links = self.netlink_inside(namespace).await?.links().await?;
        let inside = find(&links, INSIDE);
        if outside.is_some() && inside.is_some_and(|link| link.mac == self.names.gateway_mac()) {
            return Ok(());
        }
        if let Some(link) = outside {
            self.netlink.delete(link).await?;
        }
        if let Some(link) = inside {
            self.netlink_inside(namespace).await?.delete(link).await?;
        }
        let inside = LinkUnspec::new_with_name(INSIDE)
            .address(self.names.gateway_mac().to_vec())
            .mtu(self.mtu)
            .setns_by_fd(namespace.file().as_raw_fd());
        let cable = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(&self.names.gateway)
            .address(self.names.gateway_port_mac().to_vec())
            .mtu(self.mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(inside.build())));
        self.netlink.add(&self.names.gateway, cable.build()).await
    }

    async fn set_outside(&self) -> Result<()> {
        let name = &self.names.gateway;
        let links = self.netlink.links().await?;
        let bridge = expect(&links, &self.names.bridge)?.index;
        let link = expect(&links, name)?;
        if !self.is_ready_outside(link, Some(bridge)) {
            switch_ipv6_off(name)?;
            let message = LinkUnspec::new_with_index(link.index).mtu(self.mtu).controller(bridge).up();
            self.netlink.change(name, message.build()).await?;
        }
        Ok(())
    }

    async fn set_inside(&self, namespace: &Namespace) -> Result<u32> {
        let what = format!("enter the namespace {}", self.names.namespace);
        let off = || ["all", "default", INSIDE].iter().try_for_each(|device| switch_ipv6_off(device));
        namespace.within(off).await.map_err(failed(what))??;
        let inner = self.netlink_inside(namespace).await?;
        let links = inner.links().await?;
        let link = expect(&links, INSIDE)?;
        inner.add_address(&self.address(link.index)).await?;
        if !self.is_ready_inside(link) {
            inner.change(INSIDE, LinkUnspec::new_with_index(link.index).mtu(self.mtu).up().build()).await?;
        }
        Ok(link.index)
    }

    fn namespace(&self) -> Result<Option<Namespace>> {
        Namespace::find(&self.names.namespace).map_err(failed(format!("look at {}", self.names.namespace)))
    }

    async fn netlink_inside(&self, namespace: &Namespace) -> Result<Netlink> {
        let opened: io::Result<Netlink> = async { namespace.within(Netlink::open).await? }.await;
        opened.map_err(failed(format!("open a netlink socket in {}", self.names.namespace)))
    }

    fn address(&self, index: u32) -> Held {
        Held { index, ip: IpAddr::from(self.wish.range.gateway()), prefix: self.wish.range.prefix }
    }

    fn is_ready_outside(&self, link: &Link, bridge: Option<u32>) -> bool {
        link.up && link.mtu == self.mtu && link.bridge == bridge && ipv6_is_off(&link.name)
    }

    fn is_ready_inside(&self, link: &Link) -> bool {
        link.up && link.mtu == self.mtu && link.mac == self.names.gateway_mac()
    }
}
