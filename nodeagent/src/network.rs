//! Tenant networks on this host: the trait, and what both implementations speak of.
//!
//! A network is a bridge, a VXLAN device with one forwarding entry a peer host, and a DHCP server with static leases
//! in a namespace of its own. Deliberately not here: which networks should exist; `model::steps` decides that.

use std::{future::Future, net::IpAddr, pin::Pin};

use model::{Mac, assignment::NetworkWish};

#[cfg(test)]
mod contract;
pub mod linux;
pub mod simulated;

/// Bytes that VXLAN adds to each packet: outer IP header, UDP 8, VXLAN 8, inner Ethernet 14. The MTU inside is the
/// underlay's minus this.
pub fn vxlan_overhead(underlay: IpAddr) -> u32 {
    let ip_header = if underlay.is_ipv4() { 20 } else { 40 };
    ip_header + 8 + 8 + 14
}

/// What the names of all guests' taps begin with, and of nothing else on a host.
pub const TAP_PREFIX: &str = "tfn";

/// The name of the tap of a guest's card, known before it is there. A device's name has at most 15 bytes, and of a MAC of the
/// quorum's the first byte is always the same.
pub fn tap(mac: Mac) -> String {
    let [_, a, b, c, d, e] = mac.0;
    format!("{TAP_PREFIX}{a:02x}{b:02x}{c:02x}{d:02x}{e:02x}")
}

/// A network that was found on this host, in a form that compares with what is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundNetwork {
    pub vni: u32,
    /// True when bridge, tunnel, isolation rules and DHCP server are all there, with these peers and leases.
    pub complete: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{what}: {reason}")]
    Failed { what: String, reason: String },
}

pub type Result<T> = std::result::Result<T, NetworkError>;
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

pub trait Network: Send + Sync {
    /// The bridge that guests of network `vni` join: its name is a pure function of the VNI.
    fn bridge(&self, vni: u32) -> String;
    /// MTU inside tenant networks.
    fn mtu(&self) -> u32;
    /// The networks of Trefoil on this host. `wanted` says what complete means for each.
    fn found<'a>(&'a self, wanted: &'a [NetworkWish]) -> Pending<'a, Vec<FoundNetwork>>;
    /// Make it as wished: everything that is missing is made, everything wrong is mended, nothing right is touched.
    fn ensure<'a>(&'a self, wish: &'a NetworkWish, local: IpAddr) -> Pending<'a, ()>;
    /// Remove every trace of it.
    fn remove(&self, vni: u32) -> Pending<'_, ()>;
}
