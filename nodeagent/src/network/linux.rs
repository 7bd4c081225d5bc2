//! The real tenant networks: kernel devices by rtnetlink, isolation rules by nft, leases by dnsmasq.
//!
//! ```text
//!   guest taps   tfg5 ── eth0 10.0.0.1 in namespace tf-5: dnsmasq
//!        │        │   a guest speaks under its own MAC and IP alone
//!      ┌─┴────────┴─┐
//!      │ bridge tfb5│   nft table trefoil_5: no DHCP and nothing of the gateway's crosses tfx5
//!      └─────┬──────┘
//!           tfx5        VXLAN 5, one flood entry a peer host; packets of other hosts are dropped
//! ```
//!
//! Each part looks before it mends, so a second `ensure` touches nothing. Everything lives in the kernel and under
//! `/run`, because it dies with the host anyway; nothing is remembered in this process, so a restarted agent finds
//! what is there. It works in the network namespace of the thread that opened it. Deliberately not here: routing out
//! of the network.

use std::{collections::BTreeSet, fmt::Display, future::Future, net::IpAddr, path::PathBuf, time::Duration};

use model::assignment::NetworkWish;
use tokio::sync::Mutex;

use super::{FoundNetwork, Network, NetworkError, Pending, Result, vxlan_overhead};
use namespace::Namespace;
use netlink::{Link, Netlink};

mod dhcp;
mod gateway;
mod guard;
mod namespace;
mod netlink;
mod segment;
#[cfg(test)]
mod tests;

/// One `ensure`, `remove` or `found` takes well under a second; this only ends one that hangs in a child process.
const LIMIT: Duration = Duration::from_secs(30);

/// Files of the running DHCP servers, a directory a network. World-readable: dnsmasq gives up its rights.
const RUN_DIR: &str = "/run/trefoil/network";

pub struct LinuxNetwork {
    netlink: Netlink,
    local: IpAddr,
    mtu: u32,
    /// Two callers at once would both find a part missing and make it twice.
    turn: Mutex<()>,
}

impl LinuxNetwork {
    /// # Errors
    /// When the kernel refuses a netlink socket, or no device of this host has the address `local`.
    pub async fn open(local: IpAddr) -> Result<Self> {
        let netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
        let holders = netlink.addresses().await?;
        let links = netlink.links().await?;
        let holder = holders.iter().find(|held| held.ip == local).map(|held| held.index);
        let underlay = links.iter().find(|link| Some(link.index) == holder);
        let underlay = underlay.ok_or_else(|| failed("find the underlay")(format!("no device has {local}")))?;
        let mtu = underlay.mtu.saturating_sub(vxlan_overhead(local));
        Ok(Self { netlink, local, mtu, turn: Mutex::new(()) })
    }

    async fn make(&self, wish: &NetworkWish, local: IpAddr) -> Result<()> {
        let names = Names::of(wish.vni);
        segment::Bridge { netlink: &self.netlink, names: &names, mtu: self.mtu }.ensure().await?;
        let outwards = async {
            // Before the tunnel is there, so that not one packet crosses it that must not.
            guard::ensure(&names, wish).await?;
            segment::Tunnel { netlink: &self.netlink, names: &names, mtu: self.mtu, local, wish }.ensure().await
        };
        let inwards = async {
            let gateway = gateway::Gateway { netlink: &self.netlink, names: &names, mtu: self.mtu, wish };
            dhcp::Server { names: &names, mtu: self.mtu, wish }.ensure(&gateway.ensure().await?).await
        };
        // Side by side: each starts a process, and a machine that is being made waits for both.
        tokio::try_join!(outwards, inwards)?;
        segment::adopt_taps(&self.netlink, &names, wish).await
    }

    async fn is_complete(&self, wish: &NetworkWish, links: &[Link], guards: &guard::Standing) -> Result<bool> {
        let names = Names::of(wish.vni);
        let netlink = &self.netlink;
        let tunnel = segment::Tunnel { netlink, names: &names, mtu: self.mtu, local: self.local, wish };
        if !(segment::Bridge { netlink, names: &names, mtu: self.mtu }.is_right(links)
            && tunnel.is_right(links)
            && tunnel.floods_to_peers(links).await?
            && segment::stray_taps(links, &names, wish).is_empty()
            && guards.holds(&names, wish))
        {
            return Ok(false);
        }
        match (gateway::Gateway { netlink, names: &names, mtu: self.mtu, wish }).look(links).await? {
            Some(inside) => Ok(dhcp::Server { names: &names, mtu: self.mtu, wish }.is_right(&inside)),
            None => Ok(false),
        }
    }

    async fn look(&self, wanted: &[NetworkWish]) -> Result<Vec<FoundNetwork>> {
        let links = self.netlink.links().await?;
        let guards = guard::standing().await?;
        let mut vnis: BTreeSet<u32> = links.iter().filter_map(|link| Names::vni_of_device(&link.name)).collect();
        vnis.extend(Namespace::names().iter().filter_map(|name| Names::vni_of_namespace(name)));
        vnis.extend(guards.vnis());
        vnis.extend(dhcp::vnis());
        let mut found = Vec::new();
        for vni in vnis {
            let complete = match wanted.iter().find(|wish| wish.vni == vni) {
                Some(wish) => self.is_complete(wish, &links, &guards).await?,
                None => false,
            };
            found.push(FoundNetwork { vni, complete });
        }
        Ok(found)
    }

    async fn unmake(&self, vni: u32) -> Result<()> {
        let names = Names::of(vni);
        dhcp::remove(&names).await?;
        for link in self.netlink.links().await?.iter().filter(|link| names.devices().contains(&link.name.as_str())) {
            self.netlink.delete(link).await?;
        }
        Namespace::remove(&names.namespace).map_err(failed(format!("remove the namespace {}", names.namespace)))?;
        guard::remove(&names).await
    }

    /// One caller at a time, and each for a bounded time.
    async fn in_turn<T>(&self, what: String, work: impl Future<Output = Result<T>>) -> Result<T> {
        let _turn = self.turn.lock().await;
        let hung = format!("no end within {} s", LIMIT.as_secs());
        tokio::time::timeout(LIMIT, work).await.unwrap_or_else(|_| Err(failed(what)(hung)))
    }
}

impl Network for LinuxNetwork {
    fn bridge(&self, vni: u32) -> String {
        Names::of(vni).bridge
    }
    fn mtu(&self) -> u32 {
        self.mtu
    }
    fn found<'a>(&'a self, wanted: &'a [NetworkWish]) -> Pending<'a, Vec<FoundNetwork>> {
        Box::pin(self.in_turn("look for networks".into(), self.look(wanted)))
    }
    fn ensure<'a>(&'a self, wish: &'a NetworkWish, local: IpAddr) -> Pending<'a, ()> {
        Box::pin(self.in_turn(format!("make network {}", wish.vni), self.make(wish, local)))
    }
    fn remove(&self, vni: u32) -> Pending<'_, ()> {
        Box::pin(self.in_turn(format!("remove network {vni}"), self.unmake(vni)))
    }
}

/// What everything of one network is called. A device name has at most 15 bytes; a VNI has at most 8 digits.
struct Names {
    vni: u32,
    bridge: String,
    tunnel: String,
    gateway: String,
    namespace: String,
    table: String,
    directory: PathBuf,
}

impl Names {
    fn of(vni: u32) -> Self {
        Self {
            vni,
            bridge: format!("tfb{vni}"),
            tunnel: format!("tfx{vni}"),
            gateway: format!("tfg{vni}"),
            namespace: format!("tf-{vni}"),
            table: format!("trefoil_{vni}"),
            directory: PathBuf::from(RUN_DIR).join(vni.to_string()),
        }
    }
    fn devices(&self) -> [&str; 3] {
        [&self.bridge, &self.tunnel, &self.gateway]
    }
    fn vni_of_device(name: &str) -> Option<u32> {
        ["tfb", "tfx", "tfg"].iter().find_map(|prefix| vni_after(prefix, name))
    }
    fn vni_of_namespace(name: &str) -> Option<u32> {
        vni_after("tf-", name)
    }
    fn vni_of_table(name: &str) -> Option<u32> {
        vni_after("trefoil_", name)
    }
    /// The gateway's address on Ethernet: the same on every host, so that a machine that moves keeps its neighbour.
    /// Guests have `02:54:`, so it is nobody else's.
    fn gateway_mac(&self) -> [u8; 6] {
        let [_, a, b, c] = self.vni.to_be_bytes();
        [0x0a, 0x54, 0, a, b, c]
    }
    /// The other end of the gateway's cable, on the bridge.
    fn gateway_port_mac(&self) -> [u8; 6] {
        let [_, a, b, c] = self.vni.to_be_bytes();
        [0x0e, 0x54, 0, a, b, c]
    }
}

/// The number after `prefix`, written as we write it: a device of somebody else is never taken for ours.
fn vni_after(prefix: &str, name: &str) -> Option<u32> {
    let digits = name.strip_prefix(prefix)?;
    let vni: u32 = digits.parse().ok()?;
    (vni.to_string() == digits).then_some(vni)
}

fn failed<E: Display>(what: impl Into<String>) -> impl FnOnce(E) -> NetworkError {
    let what = what.into();
    move |reason| NetworkError::Failed { what, reason: reason.to_string() }
}
