//! The rules on a network's tunnel, as two nft tables of one name.
//!
//! `bridge`: what is the same on every host must not meet over the tunnel. Each host has its own gateway with the same
//! address and its own DHCP server with its own guests' leases, so neither DHCP nor anything from or to the gateway may
//! cross.
//!
//! `inet`: only a host that has a machine in the network now may send into it. One that was given up as lost and goes on
//! all the same would answer for addresses that are elsewhere; what it sends ends at the hosts that know better.

use std::{collections::BTreeMap, fmt::Write as _, net::IpAddr, process::Stdio};

use model::assignment::NetworkWish;
use serde_json::Value;
use tokio::{io::AsyncWriteExt, process::Command};

use super::{super::Result, Names, failed, segment::VXLAN_PORT};

/// The tables of this host's networks that stand: of each its chain and how many rules it has.
pub struct Standing(BTreeMap<(u32, Family), (String, usize)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Family {
    Bridge,
    Inet,
}

const FAMILIES: [Family; 2] = [Family::Bridge, Family::Inet];

impl Family {
    fn word(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Inet => "inet",
        }
    }

    fn hook(self) -> &'static str {
        match self {
            Self::Bridge => "forward",
            Self::Inet => "input",
        }
    }

    fn rules(self, names: &Names, wish: &NetworkWish) -> Vec<String> {
        match self {
            Self::Bridge => kept_apart(names, wish),
            Self::Inet => from_peers_only(names, wish),
        }
    }
}

impl Standing {
    pub fn vnis(&self) -> impl Iterator<Item = u32> {
        self.0.keys().map(|(vni, _)| *vni)
    }

    pub fn holds(&self, names: &Names, wish: &NetworkWish) -> bool {
        FAMILIES.iter().all(|family| {
            let rules = family.rules(names, wish);
            self.0.get(&(names.vni, *family)) == Some(&(chain(&rules), rules.len()))
        })
    }
}

pub async fn standing() -> Result<Standing> {
    let mut tables: BTreeMap<(u32, Family), (String, usize)> = BTreeMap::new();
    for family in FAMILIES {
        let listing = nft(&["-j", "list", "ruleset", family.word()], None).await?;
        let listing: Value = serde_json::from_str(&listing).map_err(failed("read the list of rules"))?;
        for item in listing["nftables"].as_array().into_iter().flatten() {
            let of = |kind: &str| Names::vni_of_table(item[kind]["table"].as_str().unwrap_or_default());
            if let Some(vni) = Names::vni_of_table(item["table"]["name"].as_str().unwrap_or_default()) {
                tables.entry((vni, family)).or_default();
            } else if let Some(vni) = of("chain") {
                let chain = item["chain"]["name"].as_str().unwrap_or_default();
                tables.entry((vni, family)).or_default().0 = chain.into();
            } else if let Some(vni) = of("rule") {
                tables.entry((vni, family)).or_default().1 += 1;
            }
        }
    }
    Ok(Standing(tables))
}

pub async fn ensure(names: &Names, wish: &NetworkWish) -> Result<()> {
    if standing().await?.holds(names, wish) {
        return Ok(());
    }
    nft(&["-f", "-"], Some(tables(names, wish))).await.map(|_| ())
}

pub async fn remove(names: &Names) -> Result<()> {
    // To declare it first makes the removal of none succeed; nft does all at once.
    let remove = FAMILIES.map(|family| cleared(family, names)).concat();
    nft(&["-f", "-"], Some(remove)).await.map(|_| ())
}

fn cleared(family: Family, names: &Names) -> String {
    let (family, table) = (family.word(), &names.table);
    format!("table {family} {table}\ndelete table {family} {table}\n")
}

/// The whole tables, replaced in one transaction: there is no moment without rules.
fn tables(names: &Names, wish: &NetworkWish) -> String {
    let mut text = String::new();
    for family in FAMILIES {
        let rules = family.rules(names, wish);
        let (word, hook, chain) = (family.word(), family.hook(), chain(&rules));
        text += &cleared(family, names);
        let _ = writeln!(text, "table {word} {} {{", names.table);
        let _ = writeln!(text, "  chain {chain} {{\n    type filter hook {hook} priority filter");
        for rule in &rules {
            let _ = writeln!(text, "    {rule}");
        }
        text += "  }\n}\n";
    }
    text
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

/// RFC 7348: the network's number is 12 bytes into the UDP datagram, header included, and 3 bytes long.
fn from_peers_only(names: &Names, wish: &NetworkWish) -> Vec<String> {
    let packet = format!("udp dport {VXLAN_PORT} @th,96,24 {}", names.vni);
    let accept = |peer: &IpAddr| {
        let family = if peer.is_ipv4() { "ip" } else { "ip6" };
        format!("{packet} {family} saddr {peer} accept")
    };
    wish.peers.iter().map(accept).chain([format!("{packet} drop")]).collect()
}

/// The chain's name carries a digest of the rules, so that other rules of another time are seen for what they are.
fn chain(rules: &[String]) -> String {
    format!("guard_{}", &blake3::hash(rules.join("\n").as_bytes()).to_hex()[..16])
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
            leases: vec![],
        };
        let names = Names::of(5);
        let text = FAMILIES
            .iter()
            .fold(tables(&names, &wish), |text, family| text.replace(&chain(&family.rules(&names, &wish)), "guard"));
        assert_eq!(
            text,
            r#"table bridge trefoil_5
delete table bridge trefoil_5
table bridge trefoil_5 {
  chain guard {
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
}
table inet trefoil_5
delete table inet trefoil_5
table inet trefoil_5 {
  chain guard {
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
