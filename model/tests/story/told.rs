//! What a person reads of the cloud, one line a thing, and what of it is new.

use std::collections::BTreeMap;

use model::{bill::EXACT_PER_NANO, *};

/// By thing, the line that tells it.
pub type Picture = BTreeMap<String, String>;

pub fn picture(state: &State) -> Picture {
    let mut picture = Picture::new();
    for node in state.nodes().values() {
        let cordoned = match (node.cordoned, node.maintenance) {
            _ if node.draining => ", is drained",
            (true, _) => ", cordoned",
            (_, true) => ", in maintenance",
            _ => "",
        };
        let drifts = if node.clock_drifts { ", its clock drifts" } else { "" };
        let state = format!("{:?}", node.state).to_lowercase();
        let line = format!("{} {} is {state}{cordoned}{drifts}", node.id, node.name);
        picture.insert(format!("node {}", node.id), line);
    }
    for image in state.images().values() {
        let name = |node: &NodeId| state.nodes().get(node).map_or_else(|| node.to_string(), |node| node.name.clone());
        let kept = |(node, replica): (&NodeId, &ReplicaState)| {
            let state = match replica {
                ReplicaState::Wanted => "wanted",
                ReplicaState::Good => "good",
                ReplicaState::Lost(_) => "lost",
            };
            format!("{} {state}", name(node))
        };
        let replicas: Vec<String> = image.replicas.iter().map(kept).collect();
        let mut line = format!("{} {} of {}: {}", image.id, image.name, image.wanted_replicas, replicas.join(", "));
        if let Some(parent) = image.backup.and_then(|of| of.parent) {
            line += &format!("; stands on {parent}");
        }
        if let Some(rehearsal) = &image.rehearsal {
            let place = rehearsal.placement.map_or("waits".into(), |place| format!("on {}", name(&place.node)));
            let left = seconds(rehearsal.deadline.millis_since(state.now()));
            line += &format!("; rehearsal {place}, given {left}");
        }
        if let Some(rehearsed) = &image.rehearsed {
            line += &format!("; rehearsed {}: {}", rehearsed.verdict, rehearsed.reason);
        }
        picture.insert(format!("image {}", image.id), line);
    }
    for vm in state.vms().values() {
        picture.insert(format!("vm {}", vm.id), machine(state, vm));
    }
    picture
}

fn machine(state: &State, vm: &Vm) -> String {
    let mut line =
        format!("{} {} is {}", vm.id, vm.name, if vm.ghost { "a ghost".into() } else { vm.status().to_string() });
    if let Some(placement) = vm.placement {
        let host = state.nodes().get(&placement.node).map_or("nowhere", |node| node.name.as_str());
        line += &format!(" on {host} since epoch {}", placement.epoch);
    }
    if let Some(migration) = vm.migration {
        let other = state.nodes().get(&migration.other.node).map_or("nowhere", |node| node.name.as_str());
        line += &match migration.stage {
            MigrationStage::Moving => format!(", moves to {other} for epoch {}", migration.other.epoch),
            MigrationStage::GivenUp => format!(", did not move to {other}"),
            MigrationStage::HandedOver => format!(", came from {other}"),
        };
        let told = [(migration.left, ", has left"), (migration.arrived, ", has arrived")];
        line += &told.iter().filter(|(is, _)| *is && vm.is_moving()).map(|(_, what)| *what).collect::<String>();
    }
    let after = |at: Timestamp| seconds(at.millis_since(state.now()));
    if let Some(at) = vm.retry_at {
        line += &format!(", tried again in {}", after(at));
    }
    if let Some(at) = vm.deadline {
        line += &format!(", given {}", after(at));
    }
    if let Some(number) = vm.backups.pending() {
        line += &format!(", backup {number} under way");
    } else if !vm.backups.reason.is_empty() {
        line += &format!(", backup {} failed ({})", vm.backups.answered, vm.backups.reason);
    }
    if let Some(image) = vm.restored_from {
        line += &format!(", made from {image}");
    }
    if !vm.reason.is_empty() {
        line += &format!(": {}", vm.reason);
    }
    line
}

/// What stands in the picture now and did not before, and what is gone.
pub fn news(before: &Picture, after: &Picture) -> Vec<String> {
    let new = after.iter().filter(|(thing, line)| before.get(*thing) != Some(line)).map(|(_, line)| line.clone());
    let gone = before.keys().filter(|thing| !after.contains_key(*thing));
    new.chain(gone.map(|thing| format!("{} is gone", thing.split(' ').nth(1).unwrap_or(thing)))).collect()
}

pub fn bill(state: &State, tenant: TenantId, from: Timestamp) -> String {
    let bill = bill::bill(state, tenant, from, state.now(), state.now());
    let mut out = String::new();
    for line in &bill.lines {
        let (after, length) = (line.from.millis_since(from), line.to.millis_since(line.from));
        let goes_on = if line.open { ", goes on" } else { "" };
        out += &format!(
            "{} {} {} from {} for {}, weight {}, {} nano{goes_on}\n",
            line.resource,
            line.name,
            line.status,
            seconds(after),
            seconds(length),
            line.weight_milli,
            line.exact / EXACT_PER_NANO
        );
    }
    out + &format!("total {} nano", bill.total_nano)
}

fn seconds(millis: u64) -> String {
    match millis {
        0 => "0 s".into(),
        whole if whole % 3_600_000 == 0 => format!("{} h", whole / 3_600_000),
        whole if whole % 60_000 == 0 => format!("{} min", whole / 60_000),
        whole if whole % 1000 == 0 => format!("{} s", whole / 1000),
        part => format!("{part} ms"),
    }
}
