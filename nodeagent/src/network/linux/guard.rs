//! The rules on a network's tunnel, as one nft table: what is the same on every host must not meet over the tunnel.
//!
//! Each host has its own gateway with the same address and its own DHCP server with its own guests' leases, so neither
//! DHCP nor anything from or to the gateway may cross.

use std::{collections::BTreeMap, fmt::Write as _, process::Stdio};

use model::assignment::NetworkWish;
use serde_json::Value;
use tokio::{io::AsyncWriteExt, process::Command};

use super::{super::Result, Names, failed};

/// The tables of this host's networks that stand: of each its chain and how many rules it has.
pub struct Standing(BTreeMap<u32, (String, usize)>);

impl Standing {
    pub fn vnis(&self) -> impl Iterator<Item = u32> {
        self.0.keys().copied()
    }

    pub fn holds(&self, names: &Names, wish: &NetworkWish) -> bool {
        let rules = rules(names, wish);
        self.0.get(&names.vni) == Some(&(chain(&rules), rules.len()))
    }
}

pub async fn standing() -> Result<Standing> {
    let listing = nft(&["-j", "list", "ruleset", "bridge"], None).await?;
    let listing: Value = serde_json::from_str(&listing).map_err(failed("read the list of rules"))?;
    let mut tables: BTreeMap<u32, (String, usize)> = BTreeMap::new();
    for item in listing["nftables"].as_array().into_iter().flatten() {
        let of = |kind: &str| Names::vni_of_table(item[kind]["table"].as_str().unwrap_or_default());
        if let Some(vni) = Names::vni_of_table(item["table"]["name"].as_str().unwrap_or_default()) {
            tables.entry(vni).or_default();
        } else if let Some(vni) = of("chain") {
            tables.entry(vni).or_default().0 = item["chain"]["name"].as_str().unwrap_or_default().into();
        } else if let Some(vni) = of("rule") {
            tables.entry(vni).or_default().1 += 1;
        }
    }
    Ok(Standing(tables))
}

pub async fn ensure(names: &Names, wish: &NetworkWish) -> Result<()> {
    if standing().await?.holds(names, wish) {
        return Ok(());
    }
    nft(&["-f", "-"], Some(table(names, wish))).await.map(|_| ())
}

pub async fn remove(names: &Names) -> Result<()> {
    let table = &names.table;
    // To declare it first makes the removal of none succeed; nft does both at once.
    nft(&["-f", "-"], Some(format!("table bridge {table}\ndelete table bridge {table}\n"))).await.map(|_| ())
}

/// The whole table, replaced in one transaction: there is no moment without rules.
fn table(names: &Names, wish: &NetworkWish) -> String {
    let rules = rules(names, wish);
    let table = &names.table;
    let mut text = format!("table bridge {table}\ndelete table bridge {table}\ntable bridge {table} {{\n");
    let _ = writeln!(text, "  chain {} {{\n    type filter hook forward priority filter", chain(&rules));
    for rule in &rules {
        let _ = writeln!(text, "    {rule}");
    }
    text + "  }\n}\n"
}

fn rules(names: &Names, wish: &NetworkWish) -> Vec<String> {
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
    fn the_table_of_a_network() {
        let wish = NetworkWish {
            network: model::NetworkId(1),
            vni: 5,
            range: "10.0.0.0/24".parse().unwrap(),
            peers: vec![],
            leases: vec![],
        };
        let text = table(&Names::of(5), &wish);
        let chain = chain(&rules(&Names::of(5), &wish));
        assert_eq!(
            text.replace(&chain, "guard"),
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
"#
        );
    }
}
