//! What every implementation of `Network` promises; the real and the simulated one run the same suite.

use std::{net::IpAddr, slice};

use model::{
    Mac, NetworkId,
    assignment::{Lease, NetworkWish},
};

use super::{FoundNetwork, Network};

/// A network 10.0.0.0/24 with the machines `10.0.0.LAST` on this host. Two of them differ in nothing but the VNI,
/// as the networks of two tenants may.
pub fn wish(vni: u32, lasts: &[u8], peers: &[IpAddr]) -> NetworkWish {
    let lease =
        |&last: &u8| Lease { mac: mac(vni, last), ip: [10, 0, 0, last].into(), hostname: format!("n{vni}-m{last}") };
    NetworkWish {
        network: NetworkId(vni.into()),
        vni,
        range: "10.0.0.0/24".parse().expect("a good range"),
        peers: peers.to_vec(),
        leases: lasts.iter().map(lease).collect(),
    }
}

pub fn mac(vni: u32, last: u8) -> Mac {
    let [_, _, a, b] = vni.to_be_bytes();
    Mac([2, 0x54, 0, a, b, last])
}

/// `delete_bridge` is what an operator does by hand, behind the implementation's back.
pub async fn check(network: &dyn Network, local: IpAddr, delete_bridge: impl Fn(u32)) {
    let peer = IpAddr::from([10, 77, 0, 99]);
    let found = async |wanted: &[NetworkWish]| network.found(wanted).await.expect("a look at the networks");
    let complete = |vni| FoundNetwork { vni, complete: true };
    let lacking = |vni| FoundNetwork { vni, complete: false };

    assert!((1..=15).contains(&network.bridge(16_777_215).len()), "the bridge of the highest VNI has a device's name");
    assert!((1..1500).contains(&network.mtu()), "the tunnel's header fits in the underlay's packets");

    let (a, b) = (wish(1001, &[11, 12], &[peer]), wish(1002, &[11, 12], &[]));
    assert_eq!(found(&[a.clone(), b.clone()]).await, [], "a new host has no networks");
    network.ensure(&a, local).await.expect("the first network is made");
    assert_eq!(found(&[a.clone(), b.clone()]).await, [complete(1001)]);
    network.ensure(&b, local).await.expect("a second one with the same range is made");
    network.ensure(&a, local).await.expect("what stands is asked for again");
    assert_eq!(found(&[b.clone(), a.clone()]).await, [complete(1001), complete(1002)]);
    assert_eq!(
        found(slice::from_ref(&b)).await,
        [lacking(1001), complete(1002)],
        "one that nobody wants is told, not complete"
    );

    for changed in [wish(1001, &[11, 13], &[peer]), wish(1001, &[11, 13], &[]), a.clone()] {
        assert_eq!(
            found(slice::from_ref(&changed)).await[0],
            lacking(1001),
            "other leases or peers than wished: {changed:?}"
        );
        network.ensure(&changed, local).await.expect("it is changed");
        assert_eq!(found(slice::from_ref(&changed)).await[0], complete(1001));
    }

    delete_bridge(1001);
    assert_eq!(found(&[a.clone(), b.clone()]).await, [lacking(1001), complete(1002)], "after the bridge was deleted");
    network.ensure(&a, local).await.expect("it is mended");
    assert_eq!(found(&[a.clone(), b.clone()]).await, [complete(1001), complete(1002)]);

    network.remove(1001).await.expect("it is removed");
    network.remove(1001).await.expect("what is gone is removed again");
    assert_eq!(found(&[a, b]).await, [complete(1002)]);
    network.remove(1002).await.expect("the other is removed");
    assert_eq!(found(&[]).await, [], "nothing is left");
}
