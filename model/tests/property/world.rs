//! What stands around the state in these tests: a disk, a look at its rows, and hosts that do as they are told.

use std::collections::BTreeMap;

use model::{
    assignment::RehearsalWish,
    command::{ImageReport, MoveOutcome, MoveReport, RehearsalReport, VmReport},
    table::RowChange,
    *,
};

use crate::logs::Source;

/// Rows as a store keeps them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Disk(BTreeMap<(u8, Vec<u8>), Vec<u8>>);

impl Disk {
    pub fn write(&mut self, changes: Vec<RowChange>) {
        for RowChange { table, key, row } in changes {
            match row {
                Some(row) => self.0.insert((table, key), row),
                None => self.0.remove(&(table, key)),
            };
        }
    }

    pub fn load(&self) -> State {
        let rows = self.0.iter().map(|((table, key), row)| (*table, key.clone(), row.clone()));
        State::load(rows).expect("what was drained can be loaded")
    }
}

/// Every row of the state but the cloud's own time.
pub fn rows_besides_time(state: &State) -> Vec<String> {
    let mut rows = rows_besides_memory(state);
    rows.extend(state.requests().iter().map(|row| format!("{row:?}")));
    rows
}

/// Every row of the state but the cloud's own time and what it remembers of requests.
pub fn rows_besides_memory(state: &State) -> Vec<String> {
    let cluster = Cluster { now: Timestamp(0), ..state.cluster().clone() };
    let mut rows = vec![format!("{cluster:?}")];
    macro_rules! print {
        ($($table:ident),*) => { $(rows.extend(state.$table().iter().map(|row| format!("{row:?}")));)* };
    }
    print!(
        controllers,
        join_tokens, nodes, templates, tenants, users, networks, images, vms, tags, prices, meters, lines
    );
    rows.extend(setting::SETTINGS.iter().map(|setting| format!("{} {}", setting.name, state.setting(setting.name))));
    rows
}

/// An assignment without hints, and without the sources of images that the host needs no more.
pub fn normalised(state: &State, mut assignment: Assignment) -> Assignment {
    for wish in &mut assignment.vms {
        // A hint: a host that follows an old one is told so when it reports.
        wish.backup.iter_mut().for_each(|backup| backup.parent = None);
        if state.vms().get(&wish.vm).is_none_or(|vm| vm.existed) {
            wish.image.sources.clear();
            wish.image.parents.iter_mut().for_each(|parent| parent.sources.clear());
        }
    }
    for wish in &mut assignment.images {
        let held = |image: &&Image| {
            image.digest == wish.digest && image.replicas.get(&assignment.node) == Some(&ReplicaState::Good)
        };
        if state.images().values().any(|image| held(&image)) {
            wish.sources.clear();
        }
    }
    assignment
}

/// Rounds until planners and hosts have nothing more to say; each lets every back-off and deadline end.
const ROUNDS: usize = 40;
const ROUND_MILLIS: u64 = 20 * 60_000;

/// Lets planners propose and hosts do as they are told until neither has anything to add.
///
/// # Errors
/// When that does not happen; names what is still being said.
pub fn settle(state: &mut State, source: &mut Source) -> Result<(), String> {
    let mut index = 1_000_000;
    let mut said: Vec<Command> = Vec::new();
    source.clock = source.clock.max(state.now().0);
    let waiting: Vec<NodeId> = state
        .nodes()
        .values()
        .filter(|n| matches!(n.state, NodeState::Joined | NodeState::Lost))
        .map(|n| n.id)
        .collect();
    for node in waiting {
        index += 1;
        state.apply(index, &source.attach(node, 0, 2)).map_err(|refusal| refusal.to_string())?;
    }
    let machines: Vec<VmId> = state.vms().iter().map(|(id, _)| *id).collect();
    for vm in machines {
        // A schedule is never at rest.
        index += 1;
        let command = Command::Tenant(TenantCommand::SetVmBackup { vm, every_millis: 0, keep: 0, full_every: 0 });
        let _ = state.apply(index, &Entry { at: state.now(), request: None, actor: Actor::System, command });
    }
    for _ in 0..ROUNDS {
        source.clock += ROUND_MILLIS;
        let now = Timestamp(source.clock);
        let clock = now.0 * 1_000_000;
        let heard = |node: &Node| {
            let incarnation = node.incarnation;
            (node.id, Heard { at: clock, answered: Some(clock), incarnation, ..Heard::default() })
        };
        source.telemetry.clock = clock;
        source.telemetry.nodes = state.nodes().values().map(heard).collect();
        said = plan::plan(state, &source.telemetry, now);
        for command in &said {
            index += 1;
            let entry = Entry { at: now, request: None, actor: Actor::System, command: command.clone() };
            state.apply(index, &entry).map_err(|refusal| format!("{command:?} was planned and refused: {refusal}"))?;
        }
        let before = rows_besides_time(state);
        for (actor, command) in reports(state) {
            index += 1;
            let _ = state.apply(index, &Entry { at: now, request: None, actor, command });
        }
        if said.is_empty() && rows_besides_time(state) == before {
            return Ok(());
        }
    }
    Err(format!("after {ROUNDS} rounds the planners still say {said:?}"))
}

/// Every host reports that it is as it should be.
fn reports(state: &State) -> Vec<(Actor, Command)> {
    let mut out = Vec::new();
    for id in state.nodes().values().map(|node| node.id) {
        let Some(assignment) = state.assignment(id) else { continue };
        let incarnation = assignment.incarnation;
        let vms = assignment.vms.iter().filter_map(done).collect();
        let moves = assignment.vms.iter().filter_map(moved).collect();
        out.push(NodeCommand::ReportMoves { node: id, incarnation, reports: moves });
        let images = assignment.images.iter().map(|wish| ImageReport { digest: wish.digest, good: true }).collect();
        let booted = |wish: &RehearsalWish| rehearsal_report(wish, Verdict::Booted);
        let reports = assignment.rehearsals.iter().map(booted).collect();
        out.push(NodeCommand::ReportRehearsals { node: id, incarnation, reports });
        out.push(NodeCommand::ReportVms { node: id, incarnation, reports: vms });
        out.push(NodeCommand::ReportImages { node: id, incarnation, reports: images });
    }
    let node = |command: &NodeCommand| match command {
        NodeCommand::Attach { node, .. }
        | NodeCommand::ReportVms { node, .. }
        | NodeCommand::ReportImages { node, .. }
        | NodeCommand::ReportBackups { node, .. }
        | NodeCommand::ReportRehearsals { node, .. }
        | NodeCommand::ReportMoves { node, .. }
        | NodeCommand::Summarise { node, .. }
        | NodeCommand::TakeStock { node, .. } => *node,
    };
    out.into_iter().map(|command| (Actor::Node(node(&command)), Command::Node(command))).collect()
}

pub fn rehearsal_report(wish: &RehearsalWish, verdict: Verdict) -> RehearsalReport {
    RehearsalReport { image: wish.image, epoch: wish.epoch, verdict, took_millis: 1000, reason: "seen".into() }
}

fn moved(wish: &VmWish) -> Option<MoveReport> {
    let outcome = if wish.power == Power::Arriving { MoveOutcome::Arrived } else { MoveOutcome::Left };
    Some(MoveReport { vm: wish.vm, epoch: wish.moves.as_ref()?.epoch, outcome })
}

fn done(wish: &VmWish) -> Option<VmReport> {
    let phase = match wish.power {
        Power::Running => Phase::Running,
        Power::Suspended => Phase::Suspended,
        Power::Stopped => Phase::Stopped,
        Power::Arriving => return None,
        Power::Absent => Phase::Absent,
    };
    Some(VmReport {
        vm: wish.vm,
        epoch: wish.epoch,
        attempt: wish.attempt,
        phase,
        rebooted: wish.reboots,
        reason: String::new(),
        retry: true,
    })
}
