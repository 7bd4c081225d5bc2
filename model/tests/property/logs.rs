//! Random logs that are mostly plausible: each die is read against the state that the log has reached so far, so that
//! ids, names, epochs and incarnations are real ones far more often than not.

use std::collections::VecDeque;

use model::{
    command::{BackupMade, BackupReport, ImageReport, MoveOutcome, MoveReport, RehearsalReport, VmReport},
    *,
};
use proptest::prelude::*;

use crate::world::rehearsal_report;

/// Eight numbers that decide one entry; a smaller one means a simpler entry, so that a failing log shrinks well.
pub type Dice = [u16; 8];

pub fn dice(most: usize) -> impl Strategy<Value = Vec<Dice>> {
    proptest::collection::vec(any::<Dice>(), 0..most)
}

const NAMES: [&str; 7] = ["a", "b", "c", "web", "db", "mail", "dns"];
const GIB: u64 = 1 << 30;

/// Makes the next entry from a die and the state.
pub struct Source {
    /// The leader's wall clock; it may step back.
    pub clock: u64,
    requests: u128,
    planned: VecDeque<Command>,
    pub telemetry: Telemetry,
}

/// Reads one die number by number.
struct Reader<'a> {
    dice: &'a Dice,
    at: usize,
}

impl Reader<'_> {
    fn below(&mut self, n: usize) -> usize {
        let value = self.dice[self.at % self.dice.len()];
        // A number that is read again is turned, so that it does not decide two things the same way.
        let turned = value.rotate_left(5 * (self.at / self.dice.len()) as u32);
        self.at += 1;
        usize::from(turned) % n.max(1)
    }
    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }
    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        let i = self.below(from.len());
        from.get(i).cloned()
    }
    fn name(&mut self) -> String {
        if self.one_in(24) { "Not a name".into() } else { NAMES[self.below(NAMES.len())].into() }
    }
}

impl Source {
    pub fn new() -> Self {
        Self { clock: 1_000_000, requests: 0, planned: VecDeque::new(), telemetry: Telemetry::default() }
    }

    /// A cloud with two tenants, three hosts, and the same range in both tenants.
    pub fn opening(&mut self) -> Vec<Entry> {
        let quota = Quota {
            vms: 8,
            size: Capacity { vcpus: 16, memory_bytes: 16 * GIB, disk_bytes: 500 * GIB },
            networks: 3,
            image_bytes: 20 * GIB,
        };
        let mut out = vec![self.system(found())];
        for name in ["acme", "globex"] {
            out.push(self.operator(OperatorCommand::CreateTenant { name: name.into(), quota }));
        }
        for (n, name) in [(1, "alpha"), (2, "beta"), (3, "gamma")] {
            let token = Digest([n; 32]);
            out.push(self.operator(OperatorCommand::IssueJoinToken {
                token,
                role: JoinRole::Agent,
                valid_millis: 60_000,
            }));
            out.push(self.system(PlannerCommand::JoinNode { token, name: name.into() }));
            out.push(self.attach(NodeId(u64::from(n)), 0, 2));
        }
        for tenant in [TenantId(1), TenantId(2)] {
            let range = "10.0.0.0/29".parse().unwrap();
            out.push(self.tenant(TenantCommand::CreateNetwork { tenant, name: "lan".into(), range }));
            out.push(self.tenant(import(tenant, "debian", 2 * GIB, 1, vec![NodeId(1)])));
        }
        out
    }

    fn entry(&mut self, actor: Actor, command: Command) -> Entry {
        Entry { at: Timestamp(self.clock), request: None, actor, command }
    }
    fn system(&mut self, command: PlannerCommand) -> Entry {
        self.entry(Actor::System, Command::Planner(command))
    }
    fn asked(&mut self, actor: Actor, command: Command) -> Entry {
        self.requests += 1;
        let request = Request { id: RequestId(self.requests), body: [self.requests as u8; 16] };
        Entry { request: Some(request), ..self.entry(actor, command) }
    }
    fn operator(&mut self, command: OperatorCommand) -> Entry {
        self.asked(root(), Command::Operator(command))
    }
    fn tenant(&mut self, command: TenantCommand) -> Entry {
        self.asked(root(), Command::Tenant(command))
    }
    fn node(&mut self, node: NodeId, command: NodeCommand) -> Entry {
        self.entry(Actor::Node(node), Command::Node(command))
    }
    pub fn attach(&mut self, node: NodeId, place: u8, units: u64) -> Entry {
        let capacity = Capacity { vcpus: units, memory_bytes: 4 * units * GIB, disk_bytes: 60 * units * GIB };
        let (address, underlay) = (format!("{node}-{place}:7480"), [192, 0, 2, node.0 as u8 + 10 * place].into());
        self.node(
            node,
            NodeCommand::Attach { node, address, underlay, hypervisor: HypervisorKind::Simulated, capacity },
        )
    }

    pub fn next(&mut self, state: &State, dice: &Dice) -> Entry {
        let mut r = Reader { dice, at: 0 };
        let kind = r.below(40);
        self.step_clock(&mut r);
        match kind {
            0..=5 => self.create(state, &mut r),
            6..=10 => self.power(state, &mut r),
            11..=12 => self.delete(state, &mut r),
            13..=22 => self.report(state, &mut r),
            23..=31 => self.planned(state, &mut r),
            32 => self.hasty_planner(state, &mut r),
            33..=34 => self.host(state, &mut r),
            35 => self.image(state, &mut r),
            36 => self.tag(state, &mut r),
            37 => self.network(state, &mut r),
            _ => self.office(state, &mut r),
        }
    }

    fn step_clock(&mut self, r: &mut Reader) {
        match r.below(16) {
            0..=3 => {}
            4..=10 => self.clock += 700,
            11..=12 => self.clock += 20_000,
            13 => self.clock += 400_000,
            14 => self.clock += 3 * 3_600_000,
            _ => self.clock = self.clock.saturating_sub(30_000),
        }
    }

    fn actor(&mut self, state: &State, r: &mut Reader) -> Actor {
        let tenants: Vec<TenantId> = state.tenants().iter().map(|(id, _)| *id).collect();
        match (r.one_in(8), r.pick(&tenants)) {
            (true, Some(tenant)) => Actor::User { name: "member".into(), role: Role::Member(tenant) },
            _ => root(),
        }
    }

    fn create(&mut self, state: &State, r: &mut Reader) -> Entry {
        let networks: Vec<(TenantId, NetworkId)> = state.networks().values().map(|n| (n.tenant, n.id)).collect();
        let (tenant, network) = r.pick(&networks).unwrap_or_default();
        let images: Vec<ImageId> = state.images().values().filter(|i| i.tenant == tenant).map(|i| i.id).collect();
        let image = if r.one_in(16) { ImageId(r.below(4) as u64) } else { r.pick(&images).unwrap_or_default() };
        let template = ["tiny", "normal", "standard", "enhanced", "none"][r.below(14).saturating_sub(9)].into();
        let actor = self.actor(state, r);
        let (ssh_keys, user_data) = (vec!["ssh-ed25519 AAAA me".to_owned()], String::new());
        let (recovery, priority) = (recovery(r), r.below(3) as u8);
        let command = TenantCommand::CreateVm {
            tenant,
            name: r.name(),
            image,
            template,
            network,
            ssh_keys,
            user_data,
            recovery,
            priority,
        };
        self.asked(actor, Command::Tenant(command))
    }

    fn machine(&self, state: &State, r: &mut Reader) -> VmId {
        let ids: Vec<VmId> = state.vms().iter().map(|(id, _)| *id).collect();
        if r.one_in(24) { VmId(r.below(9) as u64) } else { r.pick(&ids).unwrap_or_default() }
    }

    fn power(&mut self, state: &State, r: &mut Reader) -> Entry {
        let vm = self.machine(state, r);
        let wanted = match r.below(14) {
            0..=3 => Wanted::Running,
            4..=5 => Wanted::Suspended,
            6..=7 => Wanted::Stopped,
            8 => Wanted::Deleted,
            10 if r.one_in(2) => return self.tenant(TenantCommand::BackUpVm { vm, full: r.one_in(3) }),
            10 if r.one_in(2) => return self.tenant(rehearsal(state, r)),
            10 => {
                let (every_millis, keep) = ([0, 60_000, 3_600_000][r.below(3)], r.below(3) as u32);
                let full_every = r.below(5) as u32;
                return self.tenant(TenantCommand::SetVmBackup { vm, every_millis, keep, full_every });
            }
            9 => {
                let (recovery, priority) = (recovery(r), r.below(3) as u8);
                return self.tenant(TenantCommand::SetVmRecovery { vm, recovery, priority });
            }
            _ => return self.tenant(TenantCommand::RebootVm { vm }),
        };
        let stop_grace_millis = [0, 30_000, u64::MAX][r.below(20) / 9];
        let actor = self.actor(state, r);
        self.asked(actor, Command::Tenant(TenantCommand::SetVmPower { vm, wanted, stop_grace_millis }))
    }

    fn delete(&mut self, state: &State, r: &mut Reader) -> Entry {
        let vm = self.machine(state, r);
        let (actor, force) = (self.actor(state, r), r.one_in(3));
        self.asked(actor, Command::Tenant(TenantCommand::DeleteVm { vm, force }))
    }

    fn report(&mut self, state: &State, r: &mut Reader) -> Entry {
        let nodes: Vec<&Node> = state.nodes().values().filter(|node| node.state != NodeState::Joined).collect();
        let busy: Vec<&Node> = nodes.iter().copied().filter(|node| state.vm_count_on_node(node.id) > 0).collect();
        let Some(node) = r.pick(&busy).or_else(|| r.pick(&nodes)) else { return self.host(state, r) };
        let late = u64::from(r.one_in(12));
        let incarnation = node.incarnation - late.min(node.incarnation);
        let held: Vec<&Vm> = state.vms_on_node(node.id).collect();
        let asked: Vec<&&Vm> = held.iter().filter(|vm| vm.backups.pending().is_some()).collect();
        if let (Some(vm), true) = (r.pick(&asked), r.one_in(2)) {
            let reports = vec![backup_report(state, vm, r)];
            return self.node(node.id, NodeCommand::ReportBackups { node: node.id, incarnation, reports });
        }
        let rehearsals = state.assignment(node.id).map_or_else(Vec::new, |assignment| assignment.rehearsals);
        if let (Some(wish), true) = (r.pick(&rehearsals), r.one_in(2)) {
            let verdict = [Verdict::Booted, Verdict::Failed, Verdict::Unknown][r.below(3)];
            let report =
                RehearsalReport { epoch: wish.epoch - u64::from(r.one_in(9)), ..rehearsal_report(&wish, verdict) };
            let reports = vec![report];
            return self.node(node.id, NodeCommand::ReportRehearsals { node: node.id, incarnation, reports });
        }
        let moving: Vec<&Vm> =
            held.iter().copied().chain(state.others_on_node(node.id)).filter(|vm| vm.migration.is_some()).collect();
        if let (Some(vm), false) = (r.pick(&moving), r.one_in(3)) {
            return self.report_of_a_move(node.id, incarnation, vm, r);
        }
        let many = 1 + r.below(2);
        let reports = (0..many).filter_map(|_| r.pick(&held).map(|vm| vm_report(vm, r))).collect();
        self.node(node.id, NodeCommand::ReportVms { node: node.id, incarnation, reports })
    }

    fn report_of_a_move(&mut self, node: NodeId, incarnation: u64, vm: &Vm, r: &mut Reader) -> Entry {
        let other = vm.migration.map_or(Placement { node, epoch: 0 }, |migration| migration.other);
        if !vm.is_moving() && other.node == node {
            let (phase, reason, retry) = (Phase::Absent, String::new(), false);
            let report = VmReport { vm: vm.id, epoch: other.epoch, attempt: 0, phase, rebooted: 0, reason, retry };
            return self.node(node, NodeCommand::ReportVms { node, incarnation, reports: vec![report] });
        }
        let outcome = match r.below(12) {
            0 => MoveOutcome::Failed("no luck".into()),
            1 => MoveOutcome::Arrived,
            2 => MoveOutcome::Left,
            3 => MoveOutcome::Nothing,
            _ if other.node == node => MoveOutcome::Arrived,
            _ => MoveOutcome::Left,
        };
        let late = u64::from(r.one_in(15));
        let report = MoveReport { vm: vm.id, epoch: other.epoch - late.min(other.epoch), outcome };
        self.node(node, NodeCommand::ReportMoves { node, incarnation, reports: vec![report] })
    }

    fn planned(&mut self, state: &State, r: &mut Reader) -> Entry {
        if self.planned.is_empty() {
            let heard = |node: &Node, r: &mut Reader| {
                let at = if r.one_in(9) { 0 } else { self.clock * 1_000_000 };
                (node.id, Heard { at, incarnation: node.incarnation, ..Heard::default() })
            };
            self.telemetry.clock = self.clock * 1_000_000;
            self.telemetry.nodes = state.nodes().values().map(|node| heard(node, r)).collect();
            // A plan is carried out while other entries come between: by then parts of it are stale.
            self.planned = plan::plan(state, &self.telemetry, Timestamp(self.clock)).into();
        }
        match self.planned.pop_front() {
            Some(command) => self.entry(Actor::System, command),
            None => self.report(state, r),
        }
    }

    fn hasty_planner(&mut self, state: &State, r: &mut Reader) -> Entry {
        let (vm, node) = (self.machine(state, r), NodeId(r.below(5) as u64));
        let image = ImageId(1 + r.below(5) as u64);
        let command = match r.below(12) {
            11 => PlannerCommand::SetNodeClock { node, drifts: r.one_in(2) },
            9 => PlannerCommand::PlaceRehearsal { image, node },
            10 => PlannerCommand::ExpireRehearsal { image },
            7 => PlannerCommand::DeclareLost { node, incarnation: r.below(3) as u64 },
            8 => PlannerCommand::RecoverVm { vm, epoch: r.below(60) as u64 },
            0 => PlannerCommand::PlaceVm { vm, node },
            1 => PlannerCommand::DeferVm { vm, reason: "no".into() },
            2 => PlannerCommand::RetryVm { vm },
            3 => PlannerCommand::ExpireVm { vm },
            4 => PlannerCommand::SetNodeSilent { node, incarnation: r.below(3) as u64, silent: r.one_in(2) },
            5 => PlannerCommand::AddReplica { image: ImageId(r.below(4) as u64), node },
            _ => found(),
        };
        self.system(command)
    }

    fn host(&mut self, state: &State, r: &mut Reader) -> Entry {
        if r.one_in(2) {
            let vms: Vec<VmId> = state.vms().values().filter(|vm| vm.phase.is_some()).map(|vm| vm.id).collect();
            let nodes: Vec<NodeId> = state.nodes().iter().map(|(id, _)| *id).collect();
            if let (Some(vm), Some(to)) = (r.pick(&vms), r.pick(&nodes)) {
                let cancels = r.one_in(6);
                let command = OperatorCommand::MigrateVm { vm, to };
                return self.operator(if cancels { OperatorCommand::CancelMigration { vm } } else { command });
            }
        }
        let node = NodeId(1 + r.below(4) as u64);
        let token = Digest([100 + r.below(3) as u8; 32]);
        match r.below(12) {
            11 => self.operator(OperatorCommand::DrainNode { node }),
            9 => self.operator(OperatorCommand::MaintainNode { node, maintenance: r.one_in(3) }),
            10 => self.operator(OperatorCommand::ArmRecovery { armed: !r.one_in(4) }),
            0..=2 => self.attach(node, r.below(2) as u8, 1 + r.below(3) as u64),
            3 => self.operator(OperatorCommand::CordonNode { node, cordoned: r.one_in(3) }),
            4 => self.operator(OperatorCommand::RemoveNode { node, force: r.one_in(2) }),
            5 => self.operator(OperatorCommand::IssueJoinToken { token, role: JoinRole::Agent, valid_millis: 60_000 }),
            6 => self.system(PlannerCommand::JoinNode { token, name: format!("late-{}", r.below(3)) }),
            7 => self.system(PlannerCommand::BindCertificate { node, certificate: token }),
            _ => {
                let incarnation = state.nodes().get(&node).map_or(0, |node| node.incarnation);
                self.node(node, NodeCommand::Summarise { node, incarnation, summary: NodeSummary::default() })
            }
        }
    }

    fn image(&mut self, state: &State, r: &mut Reader) -> Entry {
        let tenant = TenantId(1 + r.below(2) as u64);
        match r.below(6) {
            0 => {
                let replicas = vec![NodeId(1 + r.below(3) as u64), NodeId(r.below(16) as u64)];
                self.tenant(import(tenant, &r.name(), GIB / 3 * (1 + r.below(9) as u64), r.below(3) as u8, replicas))
            }
            1 => self.tenant(TenantCommand::DeleteImage { image: ImageId(1 + r.below(5) as u64) }),
            _ => {
                let node = NodeId(1 + r.below(3) as u64);
                let incarnation = state.nodes().get(&node).map_or(0, |node| node.incarnation);
                let report = ImageReport { digest: Digest([r.below(3) as u8; 32]), good: !r.one_in(3) };
                self.node(node, NodeCommand::ReportImages { node, incarnation, reports: vec![report] })
            }
        }
    }

    fn tag(&mut self, state: &State, r: &mut Reader) -> Entry {
        let (tenant, key) = (TenantId(1 + r.below(2) as u64), r.name());
        let version = state.tags().get(&(tenant, key.clone())).map_or(0, |tag| tag.version);
        let expected = [None, Some(version), Some(version + 1)][r.below(3)];
        match r.below(3) {
            0 => self.tenant(TenantCommand::DeleteTag { tenant, key, expected }),
            _ => self.tenant(TenantCommand::SetTag { tenant, key, value: "v".into(), expected }),
        }
    }

    fn network(&mut self, state: &State, r: &mut Reader) -> Entry {
        let (tenant, network) = (TenantId(1 + r.below(2) as u64), NetworkId(1 + r.below(5) as u64));
        let first = [10, 0, r.below(3) as u8, [0, 8, 16, 1][r.below(4)]].into();
        let actor = self.actor(state, r);
        let command = match r.below(3) {
            0 => TenantCommand::DeleteNetwork { network },
            _ => TenantCommand::CreateNetwork { tenant, name: r.name(), range: Cidr { first, prefix: 29 } },
        };
        self.asked(actor, Command::Tenant(command))
    }

    fn office(&mut self, state: &State, r: &mut Reader) -> Entry {
        let (now, tenant) = (state.now(), TenantId(1 + r.below(3) as u64));
        let quota = |vms| Quota { vms, ..state.tenants().get(&TenantId(1)).map_or(NOTHING, |tenant| tenant.quota) };
        let command = match r.below(16) {
            0..=3 => {
                let from =
                    [Timestamp::default(), now.plus_millis(r.below(5_000_000) as u64), Timestamp(1)][r.below(6) / 2];
                OperatorCommand::SetPrice { nano_per_hour: r.below(1000) as u64 * 7919, from }
            }
            4 => OperatorCommand::SetQuota { tenant, quota: quota(r.below(9) as u64) },
            5 => OperatorCommand::DeleteTenant { tenant },
            6 => OperatorCommand::CreateUser {
                name: r.name(),
                role: Role::Member(tenant),
                token: Digest([r.below(5) as u8; 32]),
            },
            7 => OperatorCommand::DeleteUser { name: r.name() },
            8 => OperatorCommand::CreateTenant { name: r.name(), quota: quota(2) },
            9 => {
                OperatorCommand::SetSetting { name: setting::OVERCOMMIT_CPU.into(), value: [1000, 4000, 1][r.below(3)] }
            }
            10 => OperatorCommand::SetSetting { name: setting::VM_ATTEMPTS.into(), value: r.below(4) as u64 },
            11 => {
                let names = [setting::BILL_RUNNING, setting::BILL_STOPPED, setting::BILL_IMAGE];
                OperatorCommand::SetSetting { name: names[r.below(3)].into(), value: r.below(4) as u64 * 700 }
            }
            12 => OperatorCommand::SetSetting { name: setting::TENANT_TAGS.into(), value: r.below(4) as u64 },
            13 => OperatorCommand::DeleteTemplate { name: "enhanced".into() },
            _ => OperatorCommand::RaiseLevel { level: level::LATEST },
        };
        self.operator(command)
    }
}

fn vm_report(vm: &Vm, r: &mut Reader) -> VmReport {
    let epoch = vm.placement.map_or(0, |p| p.epoch) - u64::from(r.one_in(16));
    let wished = match vm.wanted {
        Wanted::Running => Phase::Running,
        Wanted::Suspended => Phase::Suspended,
        Wanted::Stopped => Phase::Stopped,
        Wanted::Deleted => Phase::Absent,
    };
    let any = [Phase::Failed, Phase::Running, Phase::Suspended, Phase::Stopped, Phase::Absent];
    let phase = if r.below(5) < 3 { wished } else { any[r.below(any.len())] };
    let rebooted = if r.one_in(5) { r.below(4) as u32 } else { vm.reboots };
    let reason = if phase == Phase::Failed { "no space".into() } else { String::new() };
    let attempt = vm.tries - u32::from(vm.tries > 0 && r.one_in(16));
    VmReport { vm: vm.id, epoch, attempt, phase, rebooted, reason, retry: !r.one_in(3) }
}

const NOTHING: Quota =
    Quota { vms: 0, size: Capacity { vcpus: 0, memory_bytes: 0, disk_bytes: 0 }, networks: 0, image_bytes: 0 };

pub fn root() -> Actor {
    Actor::User { name: "root".into(), role: Role::Operator }
}

fn found() -> PlannerCommand {
    PlannerCommand::Found {
        cluster: "cloud".into(),
        controller: "one".into(),
        address: "192.0.2.1:7470".into(),
        operator: "root".into(),
        token: Digest([9; 32]),
    }
}

fn import(tenant: TenantId, name: &str, size_bytes: u64, digest: u8, replicas: Vec<NodeId>) -> TenantCommand {
    let (format, digest) = (ImageFormat::Qcow2, Digest([digest; 32]));
    TenantCommand::ImportImage {
        tenant,
        name: name.into(),
        format,
        size_bytes,
        virtual_bytes: 3 * GIB,
        digest,
        replicas,
    }
}

fn recovery(r: &mut Reader) -> Recovery {
    [Recovery::Exclusive, Recovery::Available, Recovery::RestartInPlace, Recovery::None][r.below(4)]
}

fn rehearsal(state: &State, r: &mut Reader) -> TenantCommand {
    let backups: Vec<ImageId> = state.images().values().filter(|image| image.backup.is_some()).map(|i| i.id).collect();
    let image = if r.one_in(9) { ImageId(r.below(4) as u64) } else { r.pick(&backups).unwrap_or_default() };
    match r.below(4) {
        0 => TenantCommand::EndRehearsal { image },
        _ => TenantCommand::RehearseBackup { image, limit_millis: 60_000, expect: String::new() },
    }
}

fn backup_report(state: &State, vm: &Vm, r: &mut Reader) -> BackupReport {
    let number = vm.backups.asked - u32::from(r.one_in(9)).min(vm.backups.asked);
    let epoch = vm.placement.map_or(0, |placement| placement.epoch);
    let earlier: Vec<Digest> = state.backups_of(vm.id).map(|image| image.digest).collect();
    let parent = if r.one_in(12) { Some(Digest([39; 32])) } else { r.pick(&earlier).filter(|_| !r.one_in(3)) };
    let made = BackupMade {
        digest: Digest([40 + r.below(9) as u8; 32]),
        size_bytes: GIB / 8,
        virtual_bytes: vm.size.disk_bytes.max(1),
        age_millis: 1000,
        consistency: Consistency::Crash,
        parent,
    };
    let outcome = if r.one_in(4) { Err("no room".into()) } else { Ok(made) };
    BackupReport { vm: vm.id, epoch, number, outcome }
}
