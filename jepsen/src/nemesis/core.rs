//! The end of a run: everybody is broken, then a connected majority is healed and must converge while the rest stays
//! broken, then the rest is healed. A cluster that needs all its members to recover passes every other test.

use std::{collections::BTreeSet, time::Duration};

use super::{Fault, HOLD, Outcome, settled};
use crate::{chance::Chance, cluster::Cluster};

/// Everybody is broken for so long: several elections.
const BROKEN: Duration = Duration::from_secs(3);

/// # Errors
/// When the harness itself fails, or the majority does not agree in time.
pub async fn heal_majority_first(
    cluster: &mut Cluster,
    now: impl Fn() -> u64,
    chance: &mut Chance,
) -> anyhow::Result<Outcome> {
    let size = cluster.size();
    let order = chance.shuffle((0..size).collect::<Vec<_>>());
    let (majority, rest) = order.split_at(size / 2 + 1);
    let isolated = cluster.dropped().is_ok();
    let mut killed = BTreeSet::new();
    for controller in &order {
        if chance.below(2) == 0 {
            cluster.kill(*controller)?;
            killed.insert(*controller);
        } else {
            anyhow::ensure!(cluster.pause(*controller)?, "{} was not stopped", cluster.name(*controller));
        }
        for other in order.iter().filter(|other| isolated && *other != controller) {
            cluster.cut(*other, *controller)?;
        }
    }
    tokio::time::sleep(BROKEN).await;

    mend(cluster, majority, majority, &killed, isolated)?;
    let asked = now();
    settled(cluster, Some(majority), "a majority was healed").await?;
    let began = now();
    tokio::time::sleep(HOLD).await;
    let healed = now();

    mend(cluster, rest, &order, &killed, isolated)?;
    settled(cluster, None, "the rest was healed").await?;
    let how = |controller: &usize| if killed.contains(controller) { "killed" } else { "stopped" };
    let broken: Vec<String> = rest.iter().map(|c| format!("{} {}", cluster.name(*c), how(c))).collect();
    Ok(Outcome {
        fault: Fault::AllButMajority,
        hit: rest.iter().map(|controller| cluster.name(*controller).to_owned()).collect(),
        began,
        healed,
        settled: now(),
        evidence: format!(
            "the majority agreed after {} ms; {}{}",
            (began - asked) / 1_000_000,
            broken.join(", "),
            if isolated { " and cut off" } else { "" }
        ),
        doubt: String::new(),
        must_write: true,
        broken: String::new(),
        write_gap: 0.0,
    })
}

/// Brings these back, and the links between them and those.
fn mend(
    cluster: &mut Cluster,
    these: &[usize],
    those: &[usize],
    killed: &BTreeSet<usize>,
    isolated: bool,
) -> anyhow::Result<()> {
    for controller in these {
        for other in those.iter().filter(|other| isolated && *other != controller) {
            cluster.link(*other, *controller)?.mend()?;
            cluster.link(*controller, *other)?.mend()?;
        }
        if killed.contains(controller) {
            cluster.restart(*controller)?;
        } else {
            cluster.resume(*controller)?;
        }
    }
    Ok(())
}
