//! One entry for each command, in an order in which a cloud accepts them, and the state that follows.

use model::{
    command::{BackupMade, BackupReport, ImageReport, MoveOutcome, MoveReport, RehearsalReport, VmReport},
    *,
};

const GIB: u64 = 1 << 30;

/// Its name; a command without a line here does not compile.
pub fn name(command: &Command) -> &'static str {
    use {NodeCommand as N, OperatorCommand as O, PlannerCommand as P, TenantCommand as T};
    match command {
        Command::Tenant(T::CreateVm { .. }) => "tenant.create-vm",
        Command::Tenant(T::SetVmRecovery { .. }) => "tenant.set-vm-recovery",
        Command::Tenant(T::BackUpVm { .. }) => "tenant.back-up-vm",
        Command::Tenant(T::SetVmBackup { .. }) => "tenant.set-vm-backup",
        Command::Tenant(T::RehearseBackup { .. }) => "tenant.rehearse-backup",
        Command::Tenant(T::EndRehearsal { .. }) => "tenant.end-rehearsal",
        Command::Tenant(T::SetVmPower { .. }) => "tenant.set-vm-power",
        Command::Tenant(T::RebootVm { .. }) => "tenant.reboot-vm",
        Command::Tenant(T::DeleteVm { .. }) => "tenant.delete-vm",
        Command::Tenant(T::CreateNetwork { .. }) => "tenant.create-network",
        Command::Tenant(T::DeleteNetwork { .. }) => "tenant.delete-network",
        Command::Tenant(T::ImportImage { .. }) => "tenant.import-image",
        Command::Tenant(T::DeleteImage { .. }) => "tenant.delete-image",
        Command::Tenant(T::SetTag { .. }) => "tenant.set-tag",
        Command::Tenant(T::DeleteTag { .. }) => "tenant.delete-tag",
        Command::Operator(O::CreateTenant { .. }) => "operator.create-tenant",
        Command::Operator(O::SetQuota { .. }) => "operator.set-quota",
        Command::Operator(O::DeleteTenant { .. }) => "operator.delete-tenant",
        Command::Operator(O::CreateUser { .. }) => "operator.create-user",
        Command::Operator(O::DeleteUser { .. }) => "operator.delete-user",
        Command::Operator(O::CreateTemplate { .. }) => "operator.create-template",
        Command::Operator(O::DeleteTemplate { .. }) => "operator.delete-template",
        Command::Operator(O::SetSetting { .. }) => "operator.set-setting",
        Command::Operator(O::SetPrice { .. }) => "operator.set-price",
        Command::Operator(O::IssueJoinToken { .. }) => "operator.issue-join-token",
        Command::Operator(O::CordonNode { .. }) => "operator.cordon-node",
        Command::Operator(O::DrainNode { .. }) => "operator.drain-node",
        Command::Operator(O::MaintainNode { .. }) => "operator.maintain-node",
        Command::Operator(O::ArmRecovery { .. }) => "operator.arm-recovery",
        Command::Operator(O::MigrateVm { .. }) => "operator.migrate-vm",
        Command::Operator(O::CancelMigration { .. }) => "operator.cancel-migration",
        Command::Operator(O::RemoveNode { .. }) => "operator.remove-node",
        Command::Operator(O::RaiseLevel { .. }) => "operator.raise-level",
        Command::Operator(O::EndRefounding) => "operator.end-refounding",
        Command::Node(N::Attach { .. }) => "node.attach",
        Command::Node(N::ReportVms { .. }) => "node.report-vms",
        Command::Node(N::ReportImages { .. }) => "node.report-images",
        Command::Node(N::ReportBackups { .. }) => "node.report-backups",
        Command::Node(N::ReportRehearsals { .. }) => "node.report-rehearsals",
        Command::Node(N::ReportMoves { .. }) => "node.report-moves",
        Command::Node(N::Summarise { .. }) => "node.summarise",
        Command::Node(N::TakeStock { .. }) => "node.take-stock",
        Command::Planner(P::Found { .. }) => "planner.found",
        Command::Planner(P::JoinController { .. }) => "planner.join-controller",
        Command::Planner(P::RetireController { .. }) => "planner.retire-controller",
        Command::Planner(P::JoinNode { .. }) => "planner.join-node",
        Command::Planner(P::BindCertificate { .. }) => "planner.bind-certificate",
        Command::Planner(P::PlaceVm { .. }) => "planner.place-vm",
        Command::Planner(P::MigrateVm { .. }) => "planner.migrate-vm",
        Command::Planner(P::DeferVm { .. }) => "planner.defer-vm",
        Command::Planner(P::RetryVm { .. }) => "planner.retry-vm",
        Command::Planner(P::ExpireVm { .. }) => "planner.expire-vm",
        Command::Planner(P::SetNodeSilent { .. }) => "planner.set-node-silent",
        Command::Planner(P::DeclareLost { .. }) => "planner.declare-lost",
        Command::Planner(P::RecoverVm { .. }) => "planner.recover-vm",
        Command::Planner(P::BackUpDueVm { .. }) => "planner.back-up-due-vm",
        Command::Planner(P::PlaceRehearsal { .. }) => "planner.place-rehearsal",
        Command::Planner(P::ExpireRehearsal { .. }) => "planner.expire-rehearsal",
        Command::Planner(P::SetNodeClock { .. }) => "planner.set-node-clock",
        Command::Planner(P::AddReplica { .. }) => "planner.add-replica",
        Command::Planner(P::Refound { .. }) => "planner.refound",
    }
}

/// What has become of a cloud in which all of them were asked; some are refused, as they would be.
pub fn state() -> State {
    let mut state = State::default();
    for (i, entry) in entries().iter().enumerate() {
        let _ = state.apply(i as u64 + 1, entry);
    }
    state
}

pub fn entries() -> Vec<Entry> {
    let commands = start().into_iter().chain(life()).chain(end());
    commands.enumerate().map(|(i, command)| entry(i as u64, command)).collect()
}

fn entry(i: u64, command: Command) -> Entry {
    let at = Timestamp(1_700_000_000_000 + 1000 * i);
    let request =
        Request { id: RequestId(0x0190_0000_0000_7000_8000_0000_0000_0000 + u128::from(i)), body: [i as u8; 16] };
    let root = Actor::User { name: "root".into(), role: Role::Operator };
    let (actor, request) = match &command {
        Command::Tenant(TenantCommand::SetTag { .. }) => {
            (Actor::User { name: "ann".into(), role: Role::Member(TenantId(1)) }, Some(request))
        }
        Command::Tenant(_) | Command::Operator(_) => (root, Some(request)),
        Command::Node(_) => (Actor::Node(NodeId(1)), None),
        Command::Planner(_) => (Actor::System, None),
    };
    Entry { at, request, actor, command }
}

fn start() -> Vec<Command> {
    let [agent, controller, user] = [Digest([1; 32]), Digest([2; 32]), Digest([3; 32])];
    let size = Capacity { vcpus: 2, memory_bytes: 2 * GIB, disk_bytes: 10 * GIB };
    let capacity = Capacity { vcpus: 16, memory_bytes: 64 * GIB, disk_bytes: 1000 * GIB };
    let quota = Quota { vms: 10, size: capacity, networks: 4, image_bytes: 100 * GIB };
    let (hypervisor, underlay) = (HypervisorKind::Qemu, [192, 0, 2, 11].into());
    vec![
        Command::Planner(PlannerCommand::Found {
            cluster: "cloud".into(),
            controller: "one".into(),
            address: "192.0.2.1:7470".into(),
            operator: "root".into(),
            token: Digest([9; 32]),
        }),
        operator(OperatorCommand::CreateTenant { name: "acme".into(), quota }),
        operator(OperatorCommand::SetQuota { tenant: TenantId(1), quota: Quota { vms: 300, ..quota } }),
        operator(OperatorCommand::CreateUser { name: "ann".into(), role: Role::Member(TenantId(1)), token: user }),
        operator(OperatorCommand::CreateTemplate { name: "small".into(), size, weight_milli: 1500 }),
        operator(OperatorCommand::SetSetting { name: setting::IMAGE_REPLICAS.into(), value: 3 }),
        operator(OperatorCommand::SetPrice { nano_per_hour: 12_000_000, from: Timestamp(1_700_000_100_000) }),
        operator(OperatorCommand::IssueJoinToken { token: agent, role: JoinRole::Agent, valid_millis: 3_600_000 }),
        operator(OperatorCommand::IssueJoinToken {
            token: controller,
            role: JoinRole::Controller,
            valid_millis: 3_600_000,
        }),
        Command::Planner(PlannerCommand::JoinController {
            token: controller,
            name: "two".into(),
            address: "192.0.2.2:7470".into(),
        }),
        Command::Planner(PlannerCommand::JoinNode { token: agent, name: "alpha".into() }),
        Command::Planner(PlannerCommand::BindCertificate { node: NodeId(1), certificate: Digest([4; 32]) }),
        node(NodeCommand::Attach {
            node: NodeId(1),
            address: "192.0.2.11:7480".into(),
            underlay,
            hypervisor,
            capacity,
        }),
    ]
}

fn life() -> Vec<Command> {
    let (vm, node_id, tenant, digest) = (VmId(1), NodeId(1), TenantId(1), Digest([5; 32]));
    let report =
        |epoch, phase| VmReport { vm, epoch, attempt: 2, phase, rebooted: 1, reason: "as asked".into(), retry: true };
    let reports = |reports| node(NodeCommand::ReportVms { node: node_id, incarnation: 1, reports });
    let summary = NodeSummary {
        from: Timestamp(1),
        to: Timestamp(2),
        samples: 3,
        cpu_permille_mean: 4,
        ..NodeSummary::default()
    };
    vec![
        node(NodeCommand::Summarise { node: node_id, incarnation: 1, summary }),
        tenant_asks(TenantCommand::CreateNetwork { tenant, name: "lan".into(), range: "10.0.0.0/24".parse().unwrap() }),
        tenant_asks(TenantCommand::ImportImage {
            tenant,
            name: "debian-12.5".into(),
            format: ImageFormat::Qcow2,
            size_bytes: 300 << 20,
            virtual_bytes: 2 * GIB,
            digest,
            replicas: vec![node_id],
        }),
        tenant_asks(TenantCommand::CreateVm {
            tenant,
            name: "web".into(),
            image: ImageId(1),
            template: "small".into(),
            network: NetworkId(1),
            ssh_keys: vec!["ssh-ed25519 AAAA ann".into()],
            user_data: "#cloud-config\n".into(),
            recovery: Recovery::Exclusive,
            priority: 7,
        }),
        Command::Planner(PlannerCommand::DeferVm { vm, reason: "no node has room".into() }),
        Command::Planner(PlannerCommand::PlaceVm { vm, node: node_id }),
        reports(vec![report(19, Phase::Running), report(18, Phase::Failed)]),
        tenant_asks(TenantCommand::RebootVm { vm }),
        tenant_asks(TenantCommand::SetVmPower { vm, wanted: Wanted::Suspended, stop_grace_millis: 30_000 }),
        reports(vec![report(19, Phase::Suspended), report(19, Phase::Stopped), report(19, Phase::Absent)]),
        tenant_asks(TenantCommand::SetTag { tenant, key: "colour".into(), value: "blue".into(), expected: Some(0) }),
    ]
}

fn end() -> Vec<Command> {
    let (vm, node_id, tenant) = (VmId(1), NodeId(1), TenantId(1));
    let reports = vec![ImageReport { digest: Digest([5; 32]), good: true }];
    let outcome = Ok(BackupMade {
        digest: Digest([6; 32]),
        size_bytes: GIB,
        virtual_bytes: 2 * GIB,
        age_millis: 30_000,
        consistency: Consistency::Frozen,
        parent: None,
    });
    let since = |made: BackupMade| BackupMade { digest: Digest([7; 32]), parent: Some(made.digest), ..made };
    let increment = BackupReport { vm, epoch: 19, number: 2, outcome: outcome.clone().map(since) };
    let made = BackupReport { vm, epoch: 19, number: 1, outcome };
    let (image, verdict, reason) = (ImageId(2), Verdict::Booted, "its guest agent answered".into());
    let rehearsed = RehearsalReport { image, epoch: 40, verdict, took_millis: 12_000, reason };
    vec![
        node(NodeCommand::ReportImages { node: node_id, incarnation: 1, reports }),
        Command::Planner(PlannerCommand::AddReplica { image: ImageId(1), node: NodeId(2) }),
        Command::Planner(PlannerCommand::RetryVm { vm }),
        Command::Planner(PlannerCommand::ExpireVm { vm }),
        Command::Planner(PlannerCommand::SetNodeSilent { node: node_id, incarnation: 1, silent: true }),
        Command::Planner(PlannerCommand::SetNodeClock { node: node_id, drifts: true }),
        Command::Planner(PlannerCommand::RetireController { controller: ControllerId(2) }),
        tenant_asks(TenantCommand::SetVmBackup { vm, every_millis: 86_400_000, keep: 7, full_every: 3 }),
        Command::Planner(PlannerCommand::BackUpDueVm { vm }),
        tenant_asks(TenantCommand::BackUpVm { vm, full: true }),
        node(NodeCommand::ReportBackups {
            node: node_id,
            incarnation: 1,
            reports: vec![made.clone(), BackupReport { outcome: Err("no room".into()), ..made }],
        }),
        tenant_asks(TenantCommand::BackUpVm { vm, full: false }),
        node(NodeCommand::ReportBackups { node: node_id, incarnation: 1, reports: vec![increment] }),
        tenant_asks(TenantCommand::RehearseBackup { image: ImageId(2), limit_millis: 60_000, expect: "up".into() }),
        Command::Planner(PlannerCommand::PlaceRehearsal { image: ImageId(2), node: node_id }),
        Command::Planner(PlannerCommand::ExpireRehearsal { image: ImageId(2) }),
        node(NodeCommand::ReportRehearsals { node: node_id, incarnation: 1, reports: vec![rehearsed] }),
        tenant_asks(TenantCommand::EndRehearsal { image: ImageId(2) }),
        tenant_asks(TenantCommand::SetVmRecovery { vm, recovery: Recovery::RestartInPlace, priority: 1 }),
        operator(OperatorCommand::MigrateVm { vm, to: NodeId(2) }),
        node(NodeCommand::ReportMoves {
            node: node_id,
            incarnation: 1,
            reports: vec![
                MoveReport { vm, epoch: 40, outcome: MoveOutcome::Left },
                MoveReport { vm, epoch: 40, outcome: MoveOutcome::Arrived },
                MoveReport { vm, epoch: 40, outcome: MoveOutcome::Failed("no room".into()) },
                MoveReport { vm, epoch: 40, outcome: MoveOutcome::Nothing },
            ],
        }),
        operator(OperatorCommand::CancelMigration { vm }),
        operator(OperatorCommand::ArmRecovery { armed: false }),
        operator(OperatorCommand::DrainNode { node: node_id }),
        Command::Planner(PlannerCommand::MigrateVm { vm, to: NodeId(2) }),
        operator(OperatorCommand::MaintainNode { node: node_id, maintenance: true }),
        Command::Planner(PlannerCommand::DeclareLost { node: node_id, incarnation: 1 }),
        Command::Planner(PlannerCommand::RecoverVm { vm, epoch: 19 }),
        operator(OperatorCommand::CordonNode { node: node_id, cordoned: true }),
        operator(OperatorCommand::RemoveNode { node: node_id, force: false }),
        operator(OperatorCommand::DeleteTemplate { name: "enhanced".into() }),
        operator(OperatorCommand::DeleteUser { name: "bob".into() }),
        operator(OperatorCommand::DeleteTenant { tenant }),
        tenant_asks(TenantCommand::DeleteTag { tenant, key: "colour".into(), expected: Some(1) }),
        tenant_asks(TenantCommand::DeleteImage { image: ImageId(1) }),
        tenant_asks(TenantCommand::DeleteNetwork { network: NetworkId(1) }),
        tenant_asks(TenantCommand::DeleteVm { vm: VmId(2), force: true }),
        operator(OperatorCommand::RaiseLevel { level: 2 }),
        Command::Planner(PlannerCommand::Refound {
            epoch: 1_700_000_000,
            controller: ControllerId(11),
            name: "eleven".into(),
            address: "192.0.2.11:7470".into(),
            operator: Some(("root".into(), Digest([8; 32]))),
        }),
        node(NodeCommand::TakeStock {
            node: node_id,
            incarnation: 1,
            guests: vec![(vm, Held { epoch: 19, phase: Phase::Suspended })],
        }),
        operator(OperatorCommand::EndRefounding),
    ]
}

fn operator(command: OperatorCommand) -> Command {
    Command::Operator(command)
}
fn tenant_asks(command: TenantCommand) -> Command {
    Command::Tenant(command)
}
fn node(command: NodeCommand) -> Command {
    Command::Node(command)
}
