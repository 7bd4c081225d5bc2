//! Tenant networks that are only remembered: for hosts without rights, and for tests. They carry no packet.

use std::{collections::BTreeMap, future::ready, net::IpAddr, sync::Mutex};

use model::assignment::NetworkWish;

use super::{FoundNetwork, Network, Pending, vxlan_overhead};

/// What Ethernet usually carries.
const UNDERLAY_MTU: u32 = 1500;

#[derive(Default)]
pub struct SimulatedNetwork {
    made: Mutex<BTreeMap<u32, Made>>,
}

struct Made {
    wish: NetworkWish,
    /// False once its bridge was taken away.
    whole: bool,
}

impl SimulatedNetwork {
    pub fn new() -> Self {
        Self::default()
    }

    /// What an operator's `ip link delete` does to the real one.
    pub fn delete_bridge(&self, vni: u32) {
        if let Some(made) = self.made().get_mut(&vni) {
            made.whole = false;
        }
    }

    fn made(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Made>> {
        self.made.lock().expect("nothing panics while it holds the simulated networks")
    }
}

impl Network for SimulatedNetwork {
    fn bridge(&self, vni: u32) -> String {
        format!("tfb{vni}")
    }
    fn mtu(&self) -> u32 {
        UNDERLAY_MTU - vxlan_overhead(IpAddr::from([0, 0, 0, 0]))
    }
    fn found<'a>(&'a self, wanted: &'a [NetworkWish]) -> Pending<'a, Vec<FoundNetwork>> {
        let look = |(&vni, made): (&u32, &Made)| {
            let complete = made.whole && wanted.iter().any(|wish| wish.vni == vni && same(wish, &made.wish));
            FoundNetwork { vni, complete }
        };
        let found = self.made().iter().map(look).collect();
        Box::pin(ready(Ok(found)))
    }
    fn ensure<'a>(&'a self, wish: &'a NetworkWish, _local: IpAddr) -> Pending<'a, ()> {
        self.made().insert(wish.vni, Made { wish: wish.clone(), whole: true });
        Box::pin(ready(Ok(())))
    }
    fn remove(&self, vni: u32) -> Pending<'_, ()> {
        self.made().remove(&vni);
        Box::pin(ready(Ok(())))
    }
}

/// Peers and leases are sets: their order says nothing.
fn same(a: &NetworkWish, b: &NetworkWish) -> bool {
    let sorted = |wish: &NetworkWish| {
        let mut wish = wish.clone();
        wish.peers.sort();
        wish.leases.sort_by_key(|lease| lease.mac);
        wish
    };
    sorted(a) == sorted(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::contract;

    #[tokio::test]
    async fn keeps_the_contract() {
        let network = SimulatedNetwork::new();
        contract::check(&network, IpAddr::from([10, 77, 0, 11]), |vni| network.delete_bridge(vni)).await;
    }
}
