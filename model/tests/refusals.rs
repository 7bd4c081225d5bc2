//! What `apply` refuses although somebody may well propose it: a planner with an old view, a host from an earlier life.
//! Each rule alone, because in a whole log another one often hides that it is missing.

use model::{
    command::{MoveOutcome, MoveReport, VmReport},
    *,
};

#[path = "refusals/careful.rs"]
mod careful;
#[path = "refusals/chains.rs"]
mod chains;
#[path = "refusals/moves.rs"]
mod moves;

struct Cloud {
    state: State,
    index: u64,
}

const NODE: NodeId = NodeId(1);
const VM: VmId = VmId(1);

impl Cloud {
    /// Two hosts that are up, and a machine that runs on the first.
    fn new() -> Self {
        let mut cloud = Self { state: State::default(), index: 0 };
        let token = Digest([9; 32]);
        cloud.done(Command::Planner(PlannerCommand::Found {
            cluster: "cloud".into(),
            controller: "one".into(),
            address: "192.0.2.1:7470".into(),
            operator: "root".into(),
            token,
        }));
        let size = Capacity { vcpus: 1000, memory_bytes: 1 << 40, disk_bytes: 1 << 40 };
        let quota = Quota { vms: 10, size, networks: 2, image_bytes: 1 << 40 };
        cloud.done(Command::Operator(OperatorCommand::CreateTenant { name: "acme".into(), quota }));
        for (number, name) in [(1, "alpha"), (2, "beta")] {
            let (token, role) = (Digest([number; 32]), JoinRole::Agent);
            cloud.done(Command::Operator(OperatorCommand::IssueJoinToken { token, role, valid_millis: 60_000 }));
            cloud.done(Command::Planner(PlannerCommand::JoinNode { token, name: name.into() }));
            cloud.attach(NodeId(u64::from(number)));
        }
        let (tenant, range) = (TenantId(1), "10.0.0.0/29".parse().unwrap());
        cloud.done(Command::Tenant(TenantCommand::CreateNetwork { tenant, name: "lan".into(), range }));
        cloud.done(Command::Tenant(TenantCommand::ImportImage {
            tenant,
            name: "debian".into(),
            format: ImageFormat::Qcow2,
            size_bytes: 1 << 30,
            virtual_bytes: 1 << 30,
            digest: Digest([5; 32]),
            replicas: vec![NODE],
        }));
        cloud.done(Command::Tenant(TenantCommand::CreateVm {
            tenant,
            name: "web".into(),
            image: ImageId(1),
            template: "tiny".into(),
            network: NetworkId(1),
            ssh_keys: Vec::new(),
            user_data: String::new(),
            recovery: Recovery::Exclusive,
            priority: 0,
        }));
        cloud.done(Command::Planner(PlannerCommand::PlaceVm { vm: VM, node: NODE }));
        assert_eq!(cloud.report(1, cloud.epoch(), Phase::Running), Ok(Reply::Done));
        assert_eq!(cloud.vm().status(), Status::Running);
        cloud
    }

    fn apply(&mut self, command: Command) -> Applied {
        let actor = match &command {
            Command::Planner(_) => Actor::System,
            Command::Node(NodeCommand::Attach { node, .. } | NodeCommand::ReportVms { node, .. })
            | Command::Node(NodeCommand::ReportMoves { node, .. } | NodeCommand::ReportBackups { node, .. })
            | Command::Node(NodeCommand::ReportImages { node, .. }) => Actor::Node(*node),
            _ => Actor::User { name: "root".into(), role: Role::Operator },
        };
        self.index += 1;
        self.state.apply(self.index, &Entry { at: Timestamp(self.index * 1000), request: None, actor, command })
    }

    fn done(&mut self, command: Command) {
        let told = format!("{command:?}");
        if let Err(refusal) = self.apply(command) {
            panic!("{told}: {refusal}");
        }
    }

    fn attach(&mut self, node: NodeId) {
        self.done(Command::Node(NodeCommand::Attach {
            node,
            address: format!("{node}.test:7480"),
            underlay: [192, 0, 2, 1].into(),
            hypervisor: HypervisorKind::Simulated,
            capacity: Capacity { vcpus: 4, memory_bytes: 4 << 30, disk_bytes: 100 << 30 },
        }));
    }

    fn report_move(&mut self, node: NodeId, epoch: u64, outcome: MoveOutcome) {
        let incarnation = self.state.nodes().get(&node).unwrap().incarnation;
        let reports = vec![MoveReport { vm: VM, epoch, outcome }];
        self.done(Command::Node(NodeCommand::ReportMoves { node, incarnation, reports }));
    }

    fn report(&mut self, incarnation: u64, epoch: u64, phase: Phase) -> Applied {
        let reason = String::new();
        let report = VmReport { vm: VM, epoch, attempt: 0, phase, rebooted: 0, reason, retry: false };
        self.apply(Command::Node(NodeCommand::ReportVms { node: NODE, incarnation, reports: vec![report] }))
    }

    fn lose(&mut self, incarnation: u64) -> Applied {
        self.apply(Command::Planner(PlannerCommand::DeclareLost { node: NODE, incarnation }))
    }

    fn recover(&mut self, epoch: u64) -> Applied {
        self.apply(Command::Planner(PlannerCommand::RecoverVm { vm: VM, epoch }))
    }

    fn vm(&self) -> &Vm {
        self.state.vms().get(&VM).unwrap()
    }

    fn epoch(&self) -> u64 {
        self.vm().placement.unwrap().epoch
    }
}

fn is_stale(applied: &Applied) -> bool {
    matches!(applied, Err(Rejection::Stale(_)))
}

#[test]
fn only_the_running_incarnation_of_a_host_is_believed() {
    let mut cloud = Cloud::new();
    cloud.attach(NODE);
    let epoch = cloud.epoch();
    assert!(is_stale(&cloud.report(1, epoch, Phase::Stopped)), "of the agent before this one");
    assert!(is_stale(&cloud.report(3, epoch, Phase::Stopped)), "of one that is not yet");
    assert_eq!(cloud.vm().status(), Status::Running);
    assert_eq!(cloud.lose(2), Ok(Reply::Done));
    assert!(is_stale(&cloud.report(2, epoch, Phase::Stopped)), "of one that was given up");
    assert_eq!(cloud.vm().status(), Status::Running);
}

#[test]
fn a_report_about_an_earlier_placement_changes_nothing() {
    let mut cloud = Cloud::new();
    let old = cloud.epoch();
    cloud.attach(NODE);
    cloud.lose(2).unwrap();
    cloud.recover(old).unwrap();
    cloud.attach(NODE);
    let (node, incarnation) = (NODE, 3);
    cloud.done(Command::Planner(PlannerCommand::SetNodeSilent { node, incarnation, silent: false }));
    cloud.done(Command::Planner(PlannerCommand::PlaceVm { vm: VM, node: NODE }));
    assert!(cloud.epoch() > old);
    cloud.report(3, old, Phase::Running).unwrap();
    assert_eq!(cloud.vm().phase, None, "the same machine on the same host, but not this one");
}

#[test]
fn only_members_that_are_not_lost_have_standing() {
    let mut cloud = Cloud::new();
    assert!(cloud.state.has_standing(NODE, 1));
    assert!(!cloud.state.has_standing(NODE, 2) && !cloud.state.has_standing(NodeId(7), 1));
    cloud.lose(1).unwrap();
    assert!(!cloud.state.has_standing(NODE, 1), "lost");
    cloud.attach(NODE);
    assert!(!cloud.state.has_standing(NODE, 1), "what it was before it was lost");
    assert!(cloud.state.has_standing(NODE, 2), "back, before it was heard");
    cloud.done(Command::Operator(OperatorCommand::RemoveNode { node: NODE, force: true }));
    assert!(!cloud.state.has_standing(NODE, 2), "removed");
}

#[test]
fn a_host_that_attached_again_is_not_lost_by_what_was_known_before() {
    let mut cloud = Cloud::new();
    cloud.attach(NODE);
    assert!(is_stale(&cloud.lose(1)));
    assert_eq!(cloud.lose(2), Ok(Reply::Done));
    assert!(is_stale(&cloud.lose(2)), "it is lost already");
}

#[test]
fn what_is_on_a_host_that_is_not_lost_stays_there() {
    let mut cloud = Cloud::new();
    let epoch = cloud.epoch();
    assert!(matches!(cloud.recover(epoch), Err(Rejection::Halted(_))));
    cloud.done(Command::Planner(PlannerCommand::SetNodeSilent { node: NODE, incarnation: 1, silent: true }));
    assert!(matches!(cloud.recover(epoch), Err(Rejection::Halted(_))), "silence takes nothing from a host");
    cloud.lose(1).unwrap();
    cloud.attach(NODE);
    assert!(matches!(cloud.recover(epoch), Err(Rejection::Halted(_))), "it came back before anything was taken");
    cloud.lose(2).unwrap();
    assert!(is_stale(&cloud.recover(epoch - 1)), "another placement");
    assert_eq!(cloud.recover(epoch), Ok(Reply::Done));
    assert_eq!(cloud.vm().placement, None);
}

#[test]
fn nothing_is_taken_while_an_operator_or_the_brake_forbids_it() {
    let mut cloud = Cloud::new();
    let epoch = cloud.epoch();
    cloud.lose(1).unwrap();
    cloud.done(Command::Operator(OperatorCommand::MaintainNode { node: NODE, maintenance: true }));
    assert!(matches!(cloud.recover(epoch), Err(Rejection::Halted(_))));
    cloud.done(Command::Operator(OperatorCommand::MaintainNode { node: NODE, maintenance: false }));
    cloud.done(Command::Operator(OperatorCommand::ArmRecovery { armed: false }));
    assert!(matches!(cloud.recover(epoch), Err(Rejection::Halted(_))));
    cloud.done(Command::Operator(OperatorCommand::ArmRecovery { armed: true }));
    assert_eq!(cloud.recover(epoch), Ok(Reply::Done));
}

/// A host that is cut off does not hear that its guest must not run twice, and goes on when its lease has ended.
#[test]
fn a_machine_becomes_exclusive_only_while_no_host_runs_it() {
    let mut cloud = Cloud::new();
    let set = |recovery| Command::Tenant(TenantCommand::SetVmRecovery { vm: VM, recovery, priority: 7 });
    cloud.done(set(Recovery::Exclusive));
    assert_eq!(cloud.vm().priority, 7, "it was exclusive already");
    cloud.done(set(Recovery::Available));
    assert!(is_stale(&cloud.apply(set(Recovery::Exclusive))));
    let power = |wanted| Command::Tenant(TenantCommand::SetVmPower { vm: VM, wanted, stop_grace_millis: 0 });
    cloud.done(power(Wanted::Stopped));
    assert!(is_stale(&cloud.apply(set(Recovery::Exclusive))), "it may still run");
    cloud.report(1, cloud.epoch(), Phase::Stopped).unwrap();
    cloud.done(set(Recovery::Exclusive));
    assert_eq!(cloud.vm().recovery, Recovery::Exclusive);
    cloud.done(set(Recovery::None));
    cloud.done(power(Wanted::Running));
    assert!(is_stale(&cloud.apply(set(Recovery::Exclusive))), "it is being started");
}

#[test]
fn a_forced_deletion_keeps_address_and_room_until_the_host_is_free_of_it() {
    let mut cloud = Cloud::new();
    let (epoch, ip) = (cloud.epoch(), cloud.vm().nics[0].ip);
    cloud.done(Command::Tenant(TenantCommand::DeleteVm { vm: VM, force: true }));
    assert!(cloud.vm().ghost && cloud.vm().nics[0].ip == ip);
    assert!(cloud.state.reserved(NODE).vcpus > 0 && cloud.state.addresses_used(NetworkId(1)) == 1);
    cloud.report(1, epoch, Phase::Absent).unwrap();
    assert!(!cloud.state.vms().contains(&VM) && cloud.state.addresses_used(NetworkId(1)) == 0);
}

#[test]
fn many_for_whom_there_is_no_room_do_not_hold_up_a_small_one() {
    let mut cloud = Cloud::new();
    let (tenant, range) = (TenantId(1), "10.1.0.0/22".parse().unwrap());
    let size = Capacity { vcpus: 10_000, memory_bytes: 1 << 50, disk_bytes: 1 << 50 };
    let quota = Quota { vms: 1000, size, networks: 2, image_bytes: 1 << 40 };
    cloud.done(Command::Operator(OperatorCommand::SetQuota { tenant, quota }));
    cloud.done(Command::Tenant(TenantCommand::CreateNetwork { tenant, name: "many".into(), range }));
    let mut create = |name: String, template: &str| {
        cloud.done(Command::Tenant(TenantCommand::CreateVm {
            tenant,
            name,
            image: ImageId(1),
            template: template.into(),
            network: NetworkId(2),
            ssh_keys: Vec::new(),
            user_data: String::new(),
            recovery: Recovery::Available,
            priority: 0,
        }));
    };
    // One of them fits on the empty host, and only one.
    (0..300).for_each(|number| create(format!("large{number}"), "standard"));
    create("small".into(), "tiny");
    let small = cloud.state.vm_named(tenant, "small").unwrap().id;
    let placed: Vec<_> = plan::plan(&cloud.state, &Telemetry::default(), Timestamp(0))
        .into_iter()
        .filter_map(|command| match command {
            Command::Planner(PlannerCommand::PlaceVm { vm, node }) => Some((vm, node)),
            _ => None,
        })
        .collect();
    assert_eq!(placed, [(VmId(2), NodeId(2)), (small, NODE)]);
}

#[test]
fn a_guest_that_was_told_to_stop_is_started_again_when_its_owner_changed_their_mind_meanwhile() {
    let mut cloud = Cloud::new();
    let power = |wanted| Command::Tenant(TenantCommand::SetVmPower { vm: VM, wanted, stop_grace_millis: 30_000 });
    cloud.done(power(Wanted::Stopped));
    cloud.done(power(Wanted::Running));
    let mut told = |retry| {
        let (epoch, phase, reason) = (cloud.epoch(), Phase::Stopped, String::new());
        let report = VmReport { vm: VM, epoch, attempt: 0, phase, rebooted: 0, reason, retry };
        cloud.done(Command::Node(NodeCommand::ReportVms { node: NODE, incarnation: 1, reports: vec![report] }));
        (cloud.vm().wanted, cloud.vm().phase)
    };
    assert_eq!(told(true), (Wanted::Running, Some(Phase::Stopped)), "it is off as was wished before");
    cloud = Cloud::new();
    let report = cloud.report(1, cloud.epoch(), Phase::Stopped);
    assert_eq!((report, cloud.vm().wanted), (Ok(Reply::Done), Wanted::Stopped), "it switched itself off");
}
