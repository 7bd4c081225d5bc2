//! One round: a fault for some time, or several at once that begin and end at different times, in any order.

use std::{collections::BTreeSet, time::Duration};

use super::{
    Fault, HOLD, InForce, Outcome, begin, clock::Wrong, disk::Damage, links::Shape, membership::Change,
    processes::Whom, settled,
};
use crate::{chance::Chance, cluster::Cluster};

/// Faults that are in force together, at most.
const TOGETHER: usize = 3;
/// Between the beginnings, and between the ends, of faults that are in force together: at most.
const APART_MILLIS: usize = 2500;

/// Every fault of which a part of the quorum can be the victim while others are in force.
fn mixable(controllers: usize) -> Vec<Fault> {
    let processes = [Whom::Leader, Whom::Follower];
    let mut faults = processes.map(Fault::Kill).to_vec();
    faults.extend(processes.map(Fault::Pause));
    faults.extend(processes.map(Fault::Slow));
    faults.extend(Shape::cuts(controllers).into_iter().map(Fault::Links));
    faults.extend(Shape::WEAK.into_iter().filter(|shape| *shape != Shape::Late).map(Fault::Links));
    let disks = [Damage::Full, Damage::FailingSync, Damage::SlowSync, Damage::PowerCutLeader];
    faults.extend(disks.map(Fault::Disk));
    faults.extend(Wrong::ALL.map(Fault::Clock));
    faults.push(Fault::Membership(Change::Transfer));
    faults
}

/// Some of them by chance, at most one of links: two that name the same link could not be mended apart.
pub fn mix(controllers: usize, chance: &mut Chance) -> Vec<Fault> {
    let mut chosen: Vec<Fault> = Vec::new();
    let links = |fault: &Fault| matches!(fault, Fault::Links(_));
    for fault in chance.shuffle(mixable(controllers)) {
        if chosen.len() < 2 + chance.below(TOGETHER - 1) && !(links(&fault) && chosen.iter().any(links)) {
            chosen.push(fault);
        }
    }
    chosen
}

/// Does them, heals them, and waits until the controllers agree.
///
/// # Errors
/// When the harness itself fails, or the controllers do not agree in time.
pub async fn round(
    cluster: &mut Cluster,
    faults: &[Fault],
    now: impl Fn() -> u64,
    chance: &mut Chance,
) -> anyhow::Result<Vec<Outcome>> {
    let mut in_force: Vec<(InForce, u64)> = Vec::new();
    let mut taken = BTreeSet::new();
    for fault in faults {
        if !in_force.is_empty() {
            some_time(chance).await;
        }
        let began = now();
        if let Some(fault) = begin(cluster, *fault, &taken, chance).await? {
            taken.extend(fault.taken());
            in_force.push((fault, began));
        }
    }
    tokio::time::sleep(HOLD).await;
    let alone = in_force.len() < 2;
    let mut outcomes: Vec<Outcome> = Vec::new();
    for (fault, began) in chance.shuffle(in_force) {
        if !outcomes.is_empty() {
            some_time(chance).await;
        }
        let mut outcome = fault.heal(cluster, began, now()).await?;
        // What several of them leave together is nobody's promise.
        outcome.must_write &= alone;
        outcomes.push(outcome);
    }
    let names: Vec<String> = faults.iter().map(|fault| format!("'{fault}'")).collect();
    settled(cluster, None, &names.join(", ")).await?;
    let agreed = now();
    outcomes.iter_mut().for_each(|outcome| outcome.settled = agreed);
    outcomes.sort_by_key(|outcome| outcome.began);
    Ok(outcomes)
}

async fn some_time(chance: &mut Chance) {
    tokio::time::sleep(Duration::from_millis(chance.below(APART_MILLIS) as u64)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_is_of_several_faults_with_one_of_links_and_the_same_for_the_same_seed() {
        let mut kinds = BTreeSet::new();
        for seed in 0..200 {
            let faults = mix(5, &mut Chance::new(seed));
            assert_eq!(faults, mix(5, &mut Chance::new(seed)));
            assert!((2..=TOGETHER).contains(&faults.len()), "{faults:?}");
            assert!(faults.iter().filter(|fault| matches!(fault, Fault::Links(_))).count() <= 1);
            kinds.extend(faults.iter().map(ToString::to_string));
        }
        assert_eq!(kinds.len(), mixable(5).len(), "each of them comes up");
    }
}
