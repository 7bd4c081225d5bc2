//! The rules of a network on this host, as two nft tables of one name, in four parts.
//!
//! *Apart* (`bridge`): what is the same on every host must not meet over the tunnel. Each host has its own gateway with the
//! same address and its own DHCP server with its own guests' leases, so neither DHCP nor anything from or to the gateway may
//! cross.
//!
//! *Own* (`bridge`): a guest of this host speaks under its own MAC and IP address, or not at all. Its tap is known by name before
//! it is there, so that not even its first packet is under another's. That also holds for one that comes from another host.
//! Not here: IPv6, in which nobody here has an address.
//!
//! *Shut* (`bridge`): nothing that guests send is for the host itself. The bridge has no address, but the kernel would answer on it
//! for every address that the host has elsewhere, and take packets for them: into other tenants' tunnels, for one. Gateway and
//! DHCP server are behind a port, in a namespace, and so are not the host.
//!
//! *Peers* (`inet`): only a host that has a machine in the network now may send into it. One that was given up as lost and goes
//! on all the same would answer for addresses that are elsewhere; what it sends ends at the hosts that know better.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::IpAddr,
    process::Stdio,
};

use model::assignment::{Lease, NetworkWish};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, process::Command};

use super::{
    super::{Result, TAP_PREFIX, tap},
    Names, failed,
    segment::VXLAN_PORT,
};

/// The chains of this host's networks that stand: of each its whole name and how many rules it has.
pub struct Standing {
    vnis: BTreeSet<u32>,
    chains: BTreeMap<(u32, Part), (String, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Apart,
    Own,
    Shut,
    Peers,
}

const PARTS: [Part; 4] = [Part::Apart, Part::Own, Part::Shut, Part::Peers];
const FAMILIES: [&str; 2] = ["bridge", "inet"];

impl Part {
    fn family(self) -> &'static str {
        match self {
            Self::Apart | Self::Own | Self::Shut => "bridge",
            Self::Peers => "inet",
        }
    }

    fn hook(self) -> &'static str {
        match self {
            Self::Apart => "forward",
            Self::Own => "prerouting",
            Self::Shut | Self::Peers => "input",
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Apart => "apart",
            Self::Own => "own",
            Self::Shut => "shut",
            Self::Peers => "peers",
        }
    }

    fn rules(self, names: &Names, wish: &NetworkWish) -> Vec<String> {
        match self {
            Self::Apart => kept_apart(names, wish),
            Self::Own => wish.leases.iter().flat_map(under_its_own_address).collect(),
            Self::Shut => shut(names),
            Self::Peers => from_peers_only(names, wish),
        }
    }

    /// The chain's name carries a digest of the rules, so that other rules of another time are seen for what they are.
    fn chain(self, rules: &[String]) -> String {
        format!("{}_{}", self.word(), &blake3::hash(rules.join("\n").as_bytes()).to_hex()[..16])
    }

    fn of_chain(name: &str) -> Option<Self> {
        let word = name.split_once('_')?.0;
        PARTS.into_iter().find(|part| part.word() == word)
    }
}

impl Standing {
    pub fn vnis(&self) -> impl Iterator<Item = u32> {
        self.vnis.iter().copied()
    }

    pub fn holds(&self, names: &Names, wish: &NetworkWish) -> bool {
        PARTS.iter().all(|part| {
            let rules = part.rules(names, wish);
            self.chains.get(&(names.vni, *part)) == Some(&(part.chain(&rules), rules.len()))
        })
    }
}

pub async fn standing() -> Result<Standing> {
    let mut standing = Standing { vnis: BTreeSet::new(), chains: BTreeMap::new() };
    // One process lists both: each look at the host waits for it.
    let lists = FAMILIES.map(|family| json!({ "list": { "ruleset": { "family": family } } }));
    // As an argument: from its input it reads JSON only where there is a /dev/stdin.
    let listings = nft(&["-j", &json!({ "nftables": lists }).to_string()], None).await?;
    for listing in serde_json::Deserializer::from_str(&listings).into_iter::<Value>() {
        let listing = listing.map_err(failed("read the list of rules"))?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        for item in listing["nftables"].as_array().into_iter().flatten() {
            standing.vnis.extend(Names::vni_of_table(&text(&item["table"]["name"])));
            let chain = &item["chain"];
            if let Some(key) = Names::vni_of_table(&text(&chain["table"])).zip(Part::of_chain(&text(&chain["name"]))) {
                standing.chains.insert(key, (text(&chain["name"]), 0));
            }
            let rule = &item["rule"];
            if let Some(key) = Names::vni_of_table(&text(&rule["table"])).zip(Part::of_chain(&text(&rule["chain"]))) {
                standing.chains.entry(key).or_default().1 += 1;
            }
        }
    }
    Ok(standing)
}

/// Without a look whether they stand: to replace them costs no more, and changes nothing for what they let through.
pub async fn ensure(names: &Names, wish: &NetworkWish) -> Result<()> {
    nft(&["-f", "-"], Some(tables(names, wish))).await.map(|_| ())
}

pub async fn remove(names: &Names) -> Result<()> {
    // To declare it first makes the removal of none succeed; nft does all at once.
    let remove = FAMILIES.map(|family| cleared(family, names)).concat();
    nft(&["-f", "-"], Some(remove)).await.map(|_| ())
}

fn cleared(family: &str, names: &Names) -> String {
    let table = &names.table;
    format!("table {family} {table}\ndelete table {family} {table}\n")
}

/// The whole tables, replaced in one transaction: there is no moment without rules.
fn tables(names: &Names, wish: &NetworkWish) -> String {
    let mut text = String::new();
    for family in FAMILIES {
        text += &cleared(family, names);
        let _ = writeln!(text, "table {family} {} {{", names.table);
        for part in PARTS.into_iter().filter(|part| part.family() == family) {
            let rules = part.rules(names, wish);
            let (hook, chain) = (part.hook(), part.chain(&rules));
            let _ = writeln!(text, "  chain {chain} {{\n    type filter hook {hook} priority filter");
            for rule in &rules {
                let _ = writeln!(text, "    {rule}");
            }
            text += "  }\n";
        }
        text += "}\n";
    }
    text
}

/// Before it has an address it asks for one by DHCP, and looks by ARP whether somebody else has it (RFC 5227): from nobody's
/// address, which is taken for nobody's.
fn under_its_own_address(lease: &Lease) -> Vec<String> {
    let Lease { mac, ip, .. } = lease;
    let tap = tap(*mac);
    [
        format!("ether saddr != {mac} drop"),
        format!("arp saddr ether != {mac} drop"),
        format!("arp saddr ip != {{ 0.0.0.0, {ip} }} drop"),
        "ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept".into(),
        format!("ip saddr != {ip} drop"),
    ]
    .map(|rule| format!("iifname \"{tap}\" {rule}"))
    .into()
}

fn kept_apart(names: &Names, wish: &NetworkWish) -> Vec<String> {
    let tunnel = &names.tunnel;
    let gateway = wish.range.gateway();
    let mac = model::Mac(names.gateway_mac());
    let both_ways = |what: String| ["iifname", "oifname"].map(|way| format!("{way} \"{tunnel}\" {what} drop"));
    [
        "udp dport { 67, 68 }".to_string(),
        format!("arp saddr ip {gateway}"),
        format!("arp daddr ip {gateway}"),
        format!("ether saddr {mac}"),
        format!("ether daddr {mac}"),
    ]
    .into_iter()
    .flat_map(both_ways)
    .collect()
}

/// By what is plugged in, because not every kernel can name the bridge (`meta ibrname`): the tap of every guest,
/// whichever network it is in, and the two other ports.
fn shut(names: &Names) -> Vec<String> {
    let ports = [format!("{TAP_PREFIX}*"), names.tunnel.clone(), names.gateway.clone()];
    ports.map(|port| format!("iifname \"{port}\" drop")).into()
}

/// RFC 7348: the network's number is 12 bytes into the UDP datagram, header included, and 3 bytes long.
fn from_peers_only(names: &Names, wish: &NetworkWish) -> Vec<String> {
    let packet = format!("udp dport {VXLAN_PORT} @th,96,24 {}", names.vni);
    let accept = |peer: &IpAddr| {
        let family = if peer.is_ipv4() { "ip" } else { "ip6" };
        format!("{packet} {family} saddr {peer} accept")
    };
    wish.peers.iter().map(accept).chain([format!("{packet} drop")]).collect()
}

async fn nft(arguments: &[&str], input: Option<String>) -> Result<String> {
    let what = || format!("run nft {}", arguments.join(" "));
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed(what()))?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        stdin.write_all(input.as_bytes()).await.map_err(failed(what()))?;
    }
    let output = child.wait_with_output().await.map_err(failed(what()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(failed(what())(String::from_utf8_lossy(&output.stderr).trim().to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_of_a_network() {
        let wish = NetworkWish {
            network: model::NetworkId(1),
            vni: 5,
            range: "10.0.0.0/24".parse().unwrap(),
            peers: vec![[10, 77, 0, 12].into(), "fd00::12".parse().unwrap()],
            leases: vec![Lease {
                mac: model::Mac([2, 0x54, 0, 0, 0, 9]),
                ip: [10, 0, 0, 9].into(),
                hostname: "web".into(),
            }],
        };
        let names = Names::of(5);
        let text = PARTS.into_iter().fold(tables(&names, &wish), |text, part| {
            text.replace(&part.chain(&part.rules(&names, &wish)), part.word())
        });
        assert_eq!(
            text,
            r#"table bridge trefoil_5
delete table bridge trefoil_5
table bridge trefoil_5 {
  chain apart {
    type filter hook forward priority filter
    iifname "tfx5" udp dport { 67, 68 } drop
    oifname "tfx5" udp dport { 67, 68 } drop
    iifname "tfx5" arp saddr ip 10.0.0.1 drop
    oifname "tfx5" arp saddr ip 10.0.0.1 drop
    iifname "tfx5" arp daddr ip 10.0.0.1 drop
    oifname "tfx5" arp daddr ip 10.0.0.1 drop
    iifname "tfx5" ether saddr 0a:54:00:00:00:05 drop
    oifname "tfx5" ether saddr 0a:54:00:00:00:05 drop
    iifname "tfx5" ether daddr 0a:54:00:00:00:05 drop
    oifname "tfx5" ether daddr 0a:54:00:00:00:05 drop
  }
  chain own {
    type filter hook prerouting priority filter
    iifname "tfn5400000009" ether saddr != 02:54:00:00:00:09 drop
    iifname "tfn5400000009" arp saddr ether != 02:54:00:00:00:09 drop
    iifname "tfn5400000009" arp saddr ip != { 0.0.0.0, 10.0.0.9 } drop
    iifname "tfn5400000009" ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept
    iifname "tfn5400000009" ip saddr != 10.0.0.9 drop
  }
  chain shut {
    type filter hook input priority filter
    iifname "tfn*" drop
    iifname "tfx5" drop
    iifname "tfg5" drop
  }
}
table inet trefoil_5
delete table inet trefoil_5
table inet trefoil_5 {
  chain peers {
    type filter hook input priority filter
    udp dport 4789 @th,96,24 5 ip saddr 10.77.0.12 accept
    udp dport 4789 @th,96,24 5 ip6 saddr fd00::12 accept
    udp dport 4789 @th,96,24 5 drop
  }
}
"#
        );
    }
}
