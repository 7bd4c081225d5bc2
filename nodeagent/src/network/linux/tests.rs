//! The real networks on hosts of their own: each host is a thread with its own network and mount namespace, two of
//! them joined by a switch. Nothing of it touches the machine that the tests run on.
//!
//! Needs root, dnsmasq, nft, ip and a static busybox; without one of them each test says `skipped` and why.

use std::{collections::BTreeMap, net::IpAddr, slice};

use model::assignment::NetworkWish;

use super::LinuxNetwork;
use crate::network::{
    Network,
    contract::{self, wish},
};
use hosts::{Guest, Host, lab};

mod hosts;

#[test]
fn keeps_the_contract() {
    let Some([host, _]) = lab() else { return };
    let local = host.underlay;
    host.run(move || async move {
        let network = LinuxNetwork::open(local).await.expect("the networks of a host");
        contract::check(&network, local, |vni| hosts::ip(&format!("link delete tfb{vni}"))).await;
    });
    host.is_as_new();
}

#[test]
fn tenants_with_equal_ranges_do_not_meet_and_one_tenant_meets_itself_across_hosts() {
    let Some([one, two]) = lab() else { return };
    // Tenants 5 and 6: .11 on the first host, .12 on the second; .13 only in 6.
    one.ensure(&[wish(5, &[11], &[two.underlay]), wish(6, &[11, 13], &[two.underlay])]);
    two.ensure(&[wish(5, &[12], &[one.underlay]), wish(6, &[12], &[one.underlay])]);
    let a1 = Guest::plug(&one, 5, 11);
    let b1 = Guest::plug(&one, 6, 11);
    let b3 = Guest::plug(&one, 6, 13);
    let a2 = Guest::plug(&two, 5, 12);
    let b2 = Guest::plug(&two, 6, 12);
    for (guest, last) in [(&a1, 11), (&b1, 11), (&b3, 13), (&a2, 12), (&b2, 12)] {
        let lease = guest.lease();
        let told = |name: &str| lease.get(name).cloned().unwrap_or_default();
        assert_eq!(told("ip"), format!("10.0.0.{last}"));
        assert_eq!((told("mtu"), told("serverid")), ("1450".into(), "10.0.0.1".into()));
        assert_eq!(told("hostname"), format!("n{}-m{last}", guest.vni));
        assert_eq!((told("router"), told("dns")), (String::new(), String::new()));
    }
    // Across hosts, and each meets the .12 of its own tenant.
    assert!(a1.reaches(12) && a1.neighbour(12) == a2.mac(), "the first tenant meets itself across hosts");
    assert!(b1.reaches(12) && b1.neighbour(12) == b2.mac(), "so does the second");
    assert!(a2.reaches(11) && a2.neighbour(11) == a1.mac());
    assert!(a1.reaches_with(12, 1422), "a full packet passes the tunnel");
    // On one host and on two.
    assert!(b1.reaches(13) && b2.reaches(13));
    assert!(!a1.reaches(13) && !a2.reaches(13), "the other tenant's machine does not answer");
    // Both hosts have the gateway's address, and each guest sees its own host's.
    assert!(a1.reaches(1) && a2.reaches(1));
    assert!(!one.heard_a_gateway_over_the_tunnel(5) && !two.heard_a_gateway_over_the_tunnel(5));

    // A machine leaves, and its lease with it; the others keep theirs.
    one.ensure(&[wish(5, &[11], &[two.underlay]), wish(6, &[11], &[two.underlay])]);
    assert!(b3.lease().is_empty(), "a machine that left gets no lease");
    assert!(!b1.lease().is_empty());
    for host in [&one, &two] {
        host.remove(&[5, 6]);
    }
    drop((a1, b1, b3, a2, b2));
    one.is_as_new();
    two.is_as_new();
}

#[test]
fn what_is_broken_by_hand_is_mended_with_the_guests_plugged_in() {
    let Some([one, two]) = lab() else { return };
    let wish_one = wish(7, &[11], &[two.underlay]);
    one.ensure(slice::from_ref(&wish_one));
    two.ensure(&[wish(7, &[12], &[one.underlay])]);
    let (near, far) = (Guest::plug(&one, 7, 11), Guest::plug(&two, 7, 12));
    assert!(!near.lease().is_empty() && !far.lease().is_empty());
    assert!(near.reaches(12));
    let damages: BTreeMap<&str, &str> = [
        ("bridge", "ip link delete tfb7"),
        ("tunnel", "ip link delete tfx7"),
        ("a tunnel of another number", "ip link delete tfx7; ip link add tfx7 type vxlan id 8 dstport 4789 local 127.0.0.1"),
        ("flood entry", "bridge fdb delete 00:00:00:00:00:00 dev tfx7 dst 10.77.0.12"),
        ("a flood entry too many", "bridge fdb append 00:00:00:00:00:00 dev tfx7 dst 10.77.0.200"),
        ("gateway's cable", "ip link delete tfg7"),
        ("gateway's address", "ip -n tf-7 address flush dev eth0"),
        ("namespace", "ip netns delete tf-7"),
        ("rules", "nft delete table bridge trefoil_7"),
        ("rules for peers", "nft delete table inet trefoil_7"),
        ("dhcp server", "kill -9 $(cat /run/trefoil/network/7/pid); while kill -0 $(cat /run/trefoil/network/7/pid) 2>/dev/null; do :; done"),
        ("switched off", "ip link set tfb7 down; ip link set tfx7 down"),
    ]
    .into();
    for (what, damage) in damages {
        one.shell(damage);
        assert_eq!(one.complete(slice::from_ref(&wish_one)), [(7, false)], "without the {what}");
        one.ensure(slice::from_ref(&wish_one));
        assert_eq!(one.complete(slice::from_ref(&wish_one)), [(7, true)], "after the {what} was mended");
        assert!(near.reaches(12), "the guest is plugged in again after the {what} was mended");
        assert_eq!(near.lease().get("ip").map(String::as_str), Some("10.0.0.11"), "after the {what} was mended");
    }
    one.remove(&[7]);
    two.remove(&[7]);
    drop((near, far));
    one.is_as_new();
    two.is_as_new();
}

#[test]
fn a_host_that_was_given_up_no_longer_answers_for_addresses_that_are_elsewhere() {
    let Some([one, two]) = lab() else { return };
    let wishes = |lasts: &[u8], peers: &[IpAddr]| [wish(7, lasts, peers)];
    one.ensure(&wishes(&[11], &[two.underlay]));
    two.ensure(&wishes(&[12], &[one.underlay]));
    let (near, stale) = (Guest::plug(&one, 7, 11), Guest::plug(&two, 7, 12));
    assert!(!near.lease().is_empty() && !stale.lease().is_empty());
    assert!(near.reaches(12) && stale.reaches(11));

    // The quorum has given the other host up; that one hears nothing of it, and its guest goes on.
    one.ensure(&wishes(&[11], &[]));
    assert!(!stale.reaches(11) && !near.reaches(12), "neither hears the other");
    let learned = || one.shell("bridge fdb show dev tfx7");
    let far = format!("dst {}", two.underlay);
    assert!(!learned().contains(&far), "nothing is learned from it: {}", learned());
    // So the rules hold it off, and not something else.
    one.shell("nft delete table inet trefoil_7");
    assert!(stale.reaches(11), "without them it would be heard");
    one.ensure(&wishes(&[11], &[]));
    assert!(!stale.reaches(11));

    // Its machine runs here now, under the same addresses, while the stale copy goes on.
    one.ensure(&wishes(&[11, 12], &[]));
    let moved = Guest::plug(&one, 7, 12);
    assert!(!moved.lease().is_empty());
    let chatter = "i=0; while [ $i -lt 200 ]; do busybox arping -q -c1 -w1 -U -I eth0 10.0.0.12; i=$((i+1)); done";
    two.shell(&format!("ip netns exec guest7x12 sh -c '{chatter}' >/dev/null 2>&1 & echo $! >/run/chatter"));
    let before = moved.received();
    for _ in 0..10 {
        assert!(near.reaches(12), "the copy here answers");
    }
    assert!(moved.received() >= before + 10, "it was that one that was asked");
    let heard = learned();
    assert!(!heard.contains(&far) && !heard.contains(&stale.mac()), "the stale one is not heard: {heard}");
    two.shell("kill $(cat /run/chatter) 2>/dev/null; while kill -0 $(cat /run/chatter) 2>/dev/null; do :; done; true");
    one.remove(&[7]);
    two.remove(&[7]);
    drop((near, stale, moved));
    one.is_as_new();
    two.is_as_new();
}

#[test]
fn a_guest_speaks_under_its_own_addresses_alone() {
    let Some([one, two]) = lab() else { return };
    let here = wish(7, &[11, 12], &[two.underlay]);
    one.ensure(slice::from_ref(&here));
    two.ensure(&[wish(7, &[13], &[one.underlay])]);
    let (liar, victim, far) = (Guest::plug(&one, 7, 11), Guest::plug(&one, 7, 12), Guest::plug(&two, 7, 13));
    for guest in [&liar, &victim, &far] {
        assert!(!guest.lease().is_empty());
    }
    assert!(liar.reaches(12) && liar.reaches(13) && far.reaches(12));

    // An address that is nobody's: neither on its own host nor across is it answered.
    assert!(liar.does("ip address add 10.0.0.99/24 dev eth0"));
    let as_another = |last: u8| liar.does(&format!("busybox ping -c2 -W1 -I 10.0.0.99 10.0.0.{last}"));
    assert!(!as_another(12) && !as_another(13));
    // One that is somebody's: whoever asks for it still finds its owner.
    let claims = "i=0; while [ $i -lt 20 ]; do busybox arping -q -c1 -w1 -U -I eth0 10.0.0.12; i=$((i+1)); done";
    assert!(liar.does("ip address add 10.0.0.12/24 dev eth0"));
    liar.does(&format!("sh -c '{claims}'"));
    assert!(far.reaches(12) && far.neighbour(12) == victim.mac());
    assert!(liar.does("ip address delete 10.0.0.12/24 dev eth0"));
    // A MAC that is not its own.
    let mac = liar.mac();
    assert!(liar.does("ip link set eth0 address 02:54:00:99:99:99"));
    assert!(!liar.reaches(12) && !liar.reaches(13));
    assert!(liar.does(&format!("ip link set eth0 address {mac}")));
    assert!(liar.reaches(12) && liar.reaches(13), "under its own it is heard again");

    // So the rules hold it off, and not something else; and they are put back.
    one.shell("nft delete table bridge trefoil_7");
    assert!(as_another(12), "without them it would be heard");
    assert_eq!(one.complete(slice::from_ref(&here)), [(7, false)]);
    one.ensure(slice::from_ref(&here));
    assert!(!as_another(12));
    assert!(!liar.lease().is_empty(), "and it may ask for its lease again");
    one.remove(&[7]);
    two.remove(&[7]);
    drop((liar, victim, far));
    one.is_as_new();
    two.is_as_new();
}

#[test]
fn a_guest_reaches_no_address_of_its_host() {
    let Some([one, _two]) = lab() else { return };
    let here = wish(7, &[11, 12], &[]);
    one.ensure(slice::from_ref(&here));
    let (guest, neighbour) = (Guest::plug(&one, 7, 11), Guest::plug(&one, 7, 12));
    assert!(!guest.lease().is_empty() && !neighbour.lease().is_empty());
    // As on hosts that do not look whether they would answer by the way that a packet came.
    one.shell("for file in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$file; done");
    let address = one.underlay;
    let asks = || guest.does(&format!("busybox arping -c2 -w2 -I eth0 {address}"));
    assert!(guest.does(&format!("ip route add {address} dev eth0")));
    let bridge = one.shell("ip -br link show tfb7 | awk '{ print $3 }'");
    assert!(guest.does(&format!("ip neighbour add {address} lladdr {} dev eth0", bridge.trim())));
    let pinged = || one.shell("awk '/^Icmp: [0-9]/ { print $2 }' /proc/net/snmp");
    let is_heard = || {
        let before = pinged();
        guest.does(&format!("busybox ping -c2 -W1 {address}"));
        pinged() != before
    };
    assert!(!asks() && !is_heard());
    assert!(guest.reaches(12) && guest.reaches(1), "its network and the gateway are there");
    // So the rules hold it off, and not something else; and they are put back.
    one.shell("nft delete table bridge trefoil_7");
    assert!(asks() && is_heard(), "without them it would be heard");
    one.ensure(slice::from_ref(&here));
    assert!(!asks() && !is_heard());
    assert!(!guest.lease().is_empty(), "and it may ask for its lease again");
    one.remove(&[7]);
    drop((guest, neighbour));
    one.is_as_new();
}

#[test]
fn another_agent_finds_and_removes_what_the_last_one_left() {
    let Some([one, _]) = lab() else { return };
    one.ensure(&[wish(8, &[11], &[]), wish(9, &[11], &[])]);
    // Each call opens the networks anew, as an agent does that was started again.
    assert_eq!(one.complete(&[wish(8, &[11], &[])]), [(8, true), (9, false)]);
    one.shell("ip link add tfb12x type bridge; ip netns add other");
    one.remove(&[8, 9]);
    assert_eq!(one.complete(&[]), [], "what is somebody else's is not ours");
    one.shell("ip link delete tfb12x; ip netns delete other");
    one.is_as_new();
}

impl Host {
    fn ensure(&self, wishes: &[NetworkWish]) {
        let (wishes, local) = (wishes.to_vec(), self.underlay);
        self.run(move || async move {
            let network = open(local).await;
            for wish in &wishes {
                network.ensure(wish, local).await.unwrap_or_else(|e| panic!("ensure network {}: {e}", wish.vni));
            }
        });
    }

    fn complete(&self, wishes: &[NetworkWish]) -> Vec<(u32, bool)> {
        let (wishes, local) = (wishes.to_vec(), self.underlay);
        self.run(move || async move {
            let found = open(local).await.found(&wishes).await.expect("a look at the networks");
            found.into_iter().map(|found| (found.vni, found.complete)).collect()
        })
    }

    fn remove(&self, vnis: &[u32]) {
        let (vnis, local) = (vnis.to_vec(), self.underlay);
        self.run(move || async move {
            for vni in vnis {
                open(local).await.remove(vni).await.unwrap_or_else(|e| panic!("remove network {vni}: {e}"));
            }
        });
    }
}

async fn open(local: IpAddr) -> LinuxNetwork {
    LinuxNetwork::open(local).await.expect("the networks of a host")
}
