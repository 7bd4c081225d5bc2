//! What lies below: one log in one order, a leader for each term, and which majority can be reached. Raft itself is
//! taken as given; `jepsen/` looks at it under faults.
//!
//! The truth about the log is kept here too: the state after each entry, what each came to, and the hash that every
//! replica must show at the same index.

use std::collections::BTreeMap;

use model::{
    Applied, Assignment, Brake, Capacity, Command, Entry, Node, NodeCommand, NodeState, OperatorCommand, Phase,
    Placement, PlannerCommand, Power, Rejection, RequestId, State, VmId, command::MoveOutcome, invariant,
};

use crate::{
    coverage::{self, Coverage},
    ledger::Ledger,
    wires::{Place, Wires},
};

pub const CONTROLLERS: usize = 3;

pub struct Slot {
    pub appended_at: u64,
    /// `None`: the blank entry that begins a term.
    pub entry: Option<Entry>,
    pub outcome: Option<Applied>,
    pub hash: [u8; 16],
}

pub struct Quorum {
    pub log: Vec<Slot>,
    pub state: State,
    pub leader: usize,
    pub term: u64,
    /// Its process has not ended since it was elected: one that begins again leads nothing.
    pub seated: bool,
    /// Controllers that answer others: they run, and are not frozen.
    pub awake: [bool; CONTROLLERS],
    pub ledger: Ledger,
    /// Since when there was no leader with a majority.
    pub headless_since: Option<u64>,
    answers: BTreeMap<RequestId, Applied>,
    /// The first thing that must not be, in one sentence.
    pub broken: Option<String>,
}

impl Quorum {
    pub fn new() -> Self {
        Self {
            log: Vec::new(),
            state: State::default(),
            leader: 0,
            term: 0,
            seated: false,
            awake: [true; CONTROLLERS],
            ledger: Ledger::default(),
            headless_since: None,
            answers: BTreeMap::new(),
            broken: None,
        }
    }

    /// The index of the last entry.
    pub fn last(&self) -> u64 {
        self.log.len() as u64
    }

    pub fn slot(&self, index: u64) -> &Slot {
        &self.log[index as usize - 1]
    }

    pub fn reaches_majority(&self, wires: &Wires, of: usize) -> bool {
        let answers = |other: usize| {
            self.awake[other] && wires.is_open_both_ways(Place::Controller(of), Place::Controller(other))
        };
        self.awake[of] && (0..CONTROLLERS).filter(|other| answers(*other)).count() * 2 > CONTROLLERS
    }

    pub fn leads(&self, wires: &Wires, controller: usize) -> bool {
        self.seated && self.leader == controller && self.reaches_majority(wires, controller)
    }

    pub fn elect(&mut self, now: u64, leader: usize) {
        (self.leader, self.term, self.seated, self.headless_since) = (leader, self.term + 1, true, None);
        let hash = self.state.hash();
        self.log.push(Slot { appended_at: now, entry: None, outcome: None, hash });
    }

    /// Appends an entry that a leader with a majority took, and looks at what it did.
    pub fn append(&mut self, now: u64, entry: Entry, coverage: &mut Coverage) -> u64 {
        let index = self.last() + 1;
        let before = Before::of(&self.state, &entry);
        self.ledger.pass(&self.state, self.state.now().max(entry.at));
        let outcome = self.state.apply(index, &entry);
        let _ = (self.state.drain_changes(), self.state.take_woken());
        count(&entry, &outcome, &before, coverage);
        count_moves(&self.state, &before, &entry, coverage);
        if is_frozen(self.state.cluster().brake) && !is_frozen(before.brake) {
            coverage.count(coverage::BRAKE_FROZEN);
        }
        let looked = invariant::check(&self.state)
            .and_then(|()| promises_are_kept(&self.state, &entry, &outcome))
            .and_then(|()| recovery_is_allowed(&before, &entry, &outcome))
            .and_then(|()| addresses_have_one_host(&self.state, &entry))
            .and_then(|()| self.answers_are_repeated(&entry, &outcome));
        if let Err(what) = looked {
            self.broken.get_or_insert(format!("after entry {index} {:?}: {what}", entry.command));
        }
        let hash = self.state.hash();
        self.log.push(Slot { appended_at: now, entry: Some(entry), outcome: Some(outcome), hash });
        index
    }

    fn answers_are_repeated(&mut self, entry: &Entry, outcome: &Applied) -> Result<(), String> {
        let Some(request) = entry.request else { return Ok(()) };
        let first = self.answers.entry(request.id).or_insert_with(|| outcome.clone());
        // That something does not exist is not remembered, because an id never comes to be later.
        let forgotten = matches!(first, Err(Rejection::NotFound { .. }));
        if first == outcome || forgotten {
            return Ok(());
        }
        Err(format!("a repeated request was answered {outcome:?}, and {first:?} the first time"))
    }
}

fn promises_are_kept(state: &State, entry: &Entry, outcome: &Applied) -> Result<(), String> {
    let (
        Command::Planner(PlannerCommand::PlaceVm { node, .. })
        | Command::Operator(OperatorCommand::MigrateVm { to: node, .. }),
        Ok(_),
    ) = (&entry.command, outcome)
    else {
        return Ok(());
    };
    let host = state.nodes().get(node).ok_or("a machine was placed on a node that does not exist")?;
    let here = |vm: &&model::Vm| {
        let other = vm.migration.map(|migration| migration.other);
        vm.placement.into_iter().chain(other).any(|placement| placement.node == *node)
    };
    let sizes = state.vms().values().filter(here).map(|vm| vm.size);
    let promised = sizes.fold(Capacity::default(), Capacity::plus);
    if promised.fits_in(state.promisable(host)) {
        return Ok(());
    }
    Err(format!("{node} is promised {promised:?}, more than it has"))
}

/// What is asked of the state before an entry.
struct Before {
    brake: Brake,
    /// The node that the entry is about, or from which it takes a machine.
    node: Option<Node>,
    request_known: bool,
    /// Machines that are on their way, and where to.
    moving: Vec<(VmId, Placement)>,
}

impl Before {
    fn of(state: &State, entry: &Entry) -> Self {
        let node = match &entry.command {
            Command::Planner(PlannerCommand::RecoverVm { vm, .. }) => {
                state.vms().get(vm).and_then(|vm| vm.placement).map(|placement| placement.node)
            }
            Command::Node(NodeCommand::Attach { node, .. }) => Some(*node),
            _ => None,
        };
        Self {
            brake: state.cluster().brake,
            node: node.and_then(|node| state.nodes().get(&node).cloned()),
            moving: state.vms().values().filter(|vm| vm.is_moving()).filter_map(destination).collect(),
            request_known: entry.request.is_some_and(|request| state.requests().contains(&request.id)),
        }
    }
}

fn destination(vm: &model::Vm) -> Option<(VmId, Placement)> {
    vm.migration.map(|migration| (vm.id, migration.other))
}

fn count_moves(state: &State, before: &Before, entry: &Entry, coverage: &mut Coverage) {
    let unmade = |vm: VmId| match &entry.command {
        Command::Node(NodeCommand::ReportMoves { reports, .. }) => {
            reports.iter().any(|report| report.vm == vm && report.outcome == MoveOutcome::Nothing)
        }
        _ => false,
    };
    for (id, to) in &before.moving {
        let Some(vm) = state.vms().get(id).filter(|vm| !vm.is_moving()) else { continue };
        if vm.placement == Some(*to) && vm.phase == Some(Phase::Stopped) {
            coverage.count(if unmade(*id) { coverage::MACHINE_MOVED_UNMADE } else { coverage::MACHINE_MOVED_OFF });
        }
        match vm.placement == Some(*to) {
            true if vm.migration.is_none() => coverage.count(coverage::MOVE_OF_A_LOST_HOST),
            true => coverage.count(coverage::MACHINE_MOVED),
            false => coverage.count(coverage::MOVE_GIVEN_UP),
        }
    }
}

fn is_frozen(brake: Brake) -> bool {
    matches!(brake, Brake::Frozen { .. })
}

/// Whatever a planner thought: nothing is taken from a host that is not lost, in maintenance, or while the brake holds.
fn recovery_is_allowed(before: &Before, entry: &Entry, outcome: &Applied) -> Result<(), String> {
    let (Command::Planner(PlannerCommand::RecoverVm { vm, .. }), Ok(_)) = (&entry.command, outcome) else {
        return Ok(());
    };
    let host = before.node.as_ref().ok_or_else(|| format!("{vm} was taken from no host"))?;
    let brake = before.brake;
    if host.state == NodeState::Lost && !host.maintenance && brake == Brake::Armed {
        return Ok(());
    }
    Err(format!("{vm} was taken from {} which is {:?}, while the brake is {brake:?}", host.id, host.state))
}

/// No address is handed out by two hosts, and no machine is wished on two.
fn addresses_have_one_host(state: &State, entry: &Entry) -> Result<(), String> {
    // What hosts report places nothing.
    if matches!(entry.command, Command::Node(_)) {
        return Ok(());
    }
    let mut machines = BTreeMap::new();
    let mut leases = BTreeMap::new();
    let assignments: Vec<Assignment> = state.nodes().values().filter_map(|node| state.assignment(node.id)).collect();
    for wish in &assignments {
        for vm in wish.vms.iter().filter(|vm| !matches!(vm.power, Power::Arriving | Power::Absent)) {
            if let Some(other) = machines.insert(vm.vm, wish.node) {
                return Err(format!("{} is wished on {other} and on {}", vm.vm, wish.node));
            }
        }
        for lease in wish.networks.iter().flat_map(|network| network.leases.iter().map(move |l| (network.vni, l.ip))) {
            if let Some(other) = leases.insert(lease, wish.node) {
                return Err(format!("{} is handed out by {other} and by {}", lease.1, wish.node));
            }
        }
    }
    Ok(())
}

fn count(entry: &Entry, outcome: &Applied, before: &Before, coverage: &mut Coverage) {
    coverage.count(coverage::ENTRIES);
    if before.request_known {
        coverage.count(coverage::REQUEST_REPEATED);
    }
    match (&entry.command, outcome) {
        (Command::Planner(command), Ok(_)) => match command {
            PlannerCommand::DeclareLost { .. } => coverage.count(coverage::NODE_LOST),
            PlannerCommand::RecoverVm { .. } => coverage.count(coverage::MACHINE_RECOVERED),
            PlannerCommand::DeferVm { .. } => coverage.count(coverage::MACHINE_DEFERRED),
            PlannerCommand::MigrateVm { .. } => coverage.count(coverage::MACHINE_DRAINED),
            PlannerCommand::RetryVm { .. } => coverage.count(coverage::MACHINE_RETRIED),
            PlannerCommand::ExpireVm { .. } => coverage.count(coverage::MACHINE_EXPIRED),
            PlannerCommand::SetNodeSilent { silent: true, .. } => coverage.count(coverage::NODE_SILENT),
            _ => {}
        },
        (Command::Planner(PlannerCommand::RecoverVm { .. }), Err(Rejection::Halted(_))) => {
            coverage.count(coverage::RECOVERY_HALTED);
        }
        (Command::Node(NodeCommand::Attach { .. }), Ok(_))
            if before.node.as_ref().is_some_and(|node| node.state == NodeState::Lost) =>
        {
            coverage.count(coverage::NODE_RETURNED);
        }
        (Command::Node(_), Err(Rejection::Stale(_))) => coverage.count(coverage::REPORT_STALE),
        _ => {}
    }
}
