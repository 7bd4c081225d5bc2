//! A quorum that was made anew knows less than its hosts: what it may not give out again, whom it waits for, and what it
//! believes.

use std::collections::BTreeSet;

use model::{plan::plan, *};

const EPOCH: u64 = 1_800_000_000;
const ALPHA: NodeId = NodeId(1);
const BETA: NodeId = NodeId(2);

/// A cloud as it is in a backup: two hosts, `web` on the first, `new` not placed yet.
struct Cloud {
    state: State,
    index: u64,
}

impl Cloud {
    fn new() -> Self {
        let mut cloud = Self { state: State::default(), index: 0 };
        let (token, size) = (Digest([9; 32]), Capacity { vcpus: 100, memory_bytes: 1 << 40, disk_bytes: 1 << 40 });
        let (one, at) = ("one".to_owned(), "192.0.2.1:7470".to_owned());
        let (cluster, operator) = ("cloud".into(), "root".into());
        cloud.done(Command::Planner(PlannerCommand::Found { cluster, controller: one, address: at, operator, token }));
        let quota = Quota { vms: 10, size, networks: 2, image_bytes: 1 << 40 };
        cloud.done(Command::Operator(OperatorCommand::CreateTenant { name: "acme".into(), quota }));
        for (number, name) in [(1, "alpha"), (2, "beta")] {
            let (token, role) = (Digest([number; 32]), JoinRole::Agent);
            cloud.done(Command::Operator(OperatorCommand::IssueJoinToken { token, role, valid_millis: 60_000 }));
            cloud.done(Command::Planner(PlannerCommand::JoinNode { token, name: name.into() }));
            cloud.attach(NodeId(number.into()));
        }
        let token = Digest([7; 32]);
        cloud.done(Command::Operator(OperatorCommand::IssueJoinToken {
            token,
            role: JoinRole::Agent,
            valid_millis: 60_000,
        }));
        let (tenant, range) = (TenantId(1), "10.0.0.0/24".parse().unwrap());
        cloud.done(Command::Tenant(TenantCommand::CreateNetwork { tenant, name: "lan".into(), range }));
        cloud.done(Command::Tenant(TenantCommand::ImportImage {
            tenant,
            name: "debian".into(),
            format: ImageFormat::Qcow2,
            size_bytes: 1 << 30,
            virtual_bytes: 1 << 30,
            digest: Digest([5; 32]),
            replicas: vec![ALPHA],
        }));
        cloud.create("web");
        cloud.done(Command::Planner(PlannerCommand::PlaceVm { vm: VmId(1), node: ALPHA }));
        cloud.create("new");
        cloud
    }

    fn refounded() -> Self {
        let mut cloud = Self::new();
        cloud.index = EPOCH * INDICES_PER_SECOND;
        assert_eq!(cloud.refound(EPOCH), Ok(Reply::Controller(ControllerId(11))));
        cloud
    }

    /// As [`Self::refounded`], with `web` known to have run; and at the latest level.
    fn refounded_with_web() -> Self {
        let mut cloud = Self::new();
        cloud.done(Command::Operator(OperatorCommand::RaiseLevel { level: level::LATEST }));
        cloud.web_runs();
        cloud.index = EPOCH * INDICES_PER_SECOND;
        assert_eq!(cloud.refound(EPOCH), Ok(Reply::Controller(ControllerId(11))));
        cloud
    }

    fn web_runs(&mut self) {
        let (incarnation, reason) = (self.state.nodes().get(&ALPHA).unwrap().incarnation, String::new());
        let (vm, epoch) = (VmId(1), self.placed(1).unwrap().1);
        let report =
            command::VmReport { vm, epoch, attempt: 0, phase: Phase::Running, rebooted: 0, reason, retry: false };
        self.done(Command::Node(NodeCommand::ReportVms { node: ALPHA, incarnation, reports: vec![report] }));
    }

    fn refound(&mut self, epoch: u64) -> Applied {
        let (name, address) = ("eleven".into(), "192.0.2.11:7470".into());
        let operator = Some(("root".into(), Digest([8; 32])));
        let controller = self.state.next_founder();
        self.apply(Command::Planner(PlannerCommand::Refound { epoch, controller, name, address, operator }))
    }

    fn apply(&mut self, command: Command) -> Applied {
        self.index += 1;
        let actor = match &command {
            Command::Node(NodeCommand::Attach { node, .. } | NodeCommand::TakeStock { node, .. })
            | Command::Node(NodeCommand::ReportVms { node, .. }) => Actor::Node(*node),
            Command::Planner(_) => Actor::System,
            _ => Actor::User { name: "root".into(), role: Role::Operator },
        };
        let applied = self.state.apply(self.index, &Entry { at: Timestamp(self.index), request: None, actor, command });
        invariant::check(&self.state).expect("every rule holds");
        applied
    }

    fn done(&mut self, command: Command) -> Reply {
        let told = format!("{command:?}");
        self.apply(command).unwrap_or_else(|refusal| panic!("{told}: {refusal}"))
    }

    fn create(&mut self, name: &str) -> VmId {
        let command = TenantCommand::CreateVm {
            tenant: TenantId(1),
            name: name.into(),
            image: ImageId(1),
            template: "tiny".into(),
            network: NetworkId(1),
            ssh_keys: Vec::new(),
            user_data: String::new(),
            recovery: Recovery::Available,
            priority: 0,
        };
        let Reply::Vm(id) = self.done(Command::Tenant(command)) else { panic!("a machine has an id") };
        id
    }

    fn attach(&mut self, node: NodeId) -> u64 {
        let capacity = Capacity { vcpus: 8, memory_bytes: 1 << 35, disk_bytes: 1 << 40 };
        let (address, underlay, hypervisor) =
            ("192.0.2.9:7480".into(), [192, 0, 2, 9].into(), HypervisorKind::Simulated);
        let attach = NodeCommand::Attach { node, address, underlay, hypervisor, capacity };
        match self.done(Command::Node(attach)) {
            Reply::Incarnation(incarnation) => incarnation,
            other => panic!("{other:?}"),
        }
    }

    fn says(&mut self, node: NodeId, guests: &[(u64, u64)]) -> Applied {
        let incarnation = self.attach(node);
        let held = |(vm, epoch): &(u64, u64)| (VmId(*vm), Held { epoch: *epoch, phase: Phase::Running });
        let guests = guests.iter().map(held).collect();
        self.apply(Command::Node(NodeCommand::TakeStock { node, incarnation, guests }))
    }

    fn placed(&self, vm: u64) -> Option<(NodeId, u64)> {
        self.state.vms().get(&VmId(vm)).and_then(|vm| vm.placement).map(|placement| (placement.node, placement.epoch))
    }

    fn planned(&self) -> Vec<String> {
        let told = |command: Command| match command {
            Command::Planner(command) => command.to_string(),
            other => panic!("{other:?}"),
        };
        plan(&self.state, &Telemetry::default(), self.state.now()).into_iter().map(told).collect()
    }

    fn spared(&self, node: NodeId) -> Option<BTreeSet<VmId>> {
        self.state.assignment(node).unwrap().spared
    }
}

#[test]
fn nothing_is_given_out_twice() {
    let before = Cloud::new();
    let mut cloud = Cloud::refounded();
    let old = before.state.cluster();
    let vm = cloud.create("later");
    assert!(vm.0 > old.last_vm + 900_000, "{vm}");
    let (web, later) = (cloud.state.vms().get(&VmId(1)).unwrap(), cloud.state.vms().get(&vm).unwrap());
    assert!(later.nics[0].mac > web.nics[0].mac && cloud.state.cluster().last_mac > old.last_mac + 900_000);
    let range = "10.9.0.0/24".parse().unwrap();
    cloud.done(Command::Tenant(TenantCommand::CreateNetwork { tenant: TenantId(1), name: "two".into(), range }));
    assert!(cloud.state.networks().values().map(|network| network.vni).max() > Some(old.last_vni + 60_000));
    for node in cloud.state.nodes().values() {
        assert!(node.generation > EPOCH * INDICES_PER_SECOND && node.incarnation > EPOCH * INDICES_PER_SECOND);
        assert_eq!(node.state, NodeState::Silent, "until it is heard");
    }
    assert!(cloud.state.join_tokens().is_empty(), "none may be used once more");
    let members: Vec<_> = cloud.state.controllers().values().map(|row| (row.id.0, row.removed)).collect();
    assert_eq!(members, [(1, true), (11, false)]);
    let root = cloud.state.user_of_token(&Digest([8; 32])).expect("the operator has a token again");
    assert_eq!((root.name.as_str(), cloud.state.user_of_token(&Digest([9; 32]))), ("root", None));
}

#[test]
fn what_hosts_hold_by_newer_placements_is_believed_and_nothing_moves_before_all_have_spoken() {
    let mut cloud = Cloud::refounded();
    let (old, later) = (cloud.placed(1).unwrap().1, cloud.create("later"));
    cloud.attach(ALPHA);
    assert!(cloud.state.awaits(ALPHA), "a session alone says nothing");
    let waits = cloud.planned();
    assert!(waits.iter().any(|line| line.starts_with("defer vm-2: the quorum was refounded")), "{waits:?}");
    let halted = cloud.apply(Command::Planner(PlannerCommand::PlaceVm { vm: VmId(2), node: ALPHA }));
    assert!(matches!(halted, Err(Rejection::Halted(_))), "{halted:?}");
    // No host can have it, so it need not wait.
    cloud.done(Command::Planner(PlannerCommand::PlaceVm { vm: later, node: ALPHA }));

    assert_eq!(cloud.says(ALPHA, &[(1, old)]), Ok(Reply::Done));
    assert!(!cloud.state.awaits(ALPHA) && cloud.state.awaits(BETA));
    // Since the backup it was moved to the other host, which also has one that came to be since.
    assert_eq!(cloud.says(BETA, &[(1, old + 100), (2, old + 101), (3, old + 102)]), Ok(Reply::Done));
    assert_eq!((cloud.placed(1), cloud.placed(2)), (Some((BETA, old + 100)), Some((BETA, old + 101))));
    assert_eq!(cloud.state.vms().get(&VmId(2)).unwrap().status(), Status::Running);
    let wished = cloud.state.assignment(ALPHA).unwrap();
    assert!(wished.vms.iter().all(|wish| wish.vm == later), "the older copy is set aside: {wished}");
    assert_eq!(cloud.spared(BETA), Some([VmId(3)].into()), "nobody knows it, nobody kills it");
    assert_eq!(cloud.spared(ALPHA), Some(BTreeSet::new()));

    let generation = cloud.state.nodes().get(&BETA).unwrap().generation;
    cloud.done(Command::Operator(OperatorCommand::EndRefounding));
    assert_eq!(cloud.spared(BETA), None);
    assert!(cloud.state.nodes().get(&BETA).unwrap().generation > generation, "its host hears of it");
}

#[test]
fn it_is_over_by_itself_when_all_have_spoken_and_nothing_is_unknown() {
    let mut cloud = Cloud::refounded();
    let old = cloud.placed(1).unwrap().1;
    assert_eq!(cloud.says(ALPHA, &[(1, old)]), Ok(Reply::Done));
    cloud.done(Command::Operator(OperatorCommand::RemoveNode { node: BETA, force: true }));
    assert_eq!((cloud.state.quorum().refounding.clone(), cloud.spared(ALPHA)), (None, None));
    assert!(cloud.planned().contains(&"place vm-2 on node-1".to_owned()), "{:?}", cloud.planned());
}

#[test]
fn a_host_that_is_lost_meanwhile_gives_nothing_away() {
    let mut cloud = Cloud::refounded();
    let incarnation = cloud.state.nodes().get(&ALPHA).unwrap().incarnation;
    cloud.done(Command::Planner(PlannerCommand::DeclareLost { node: ALPHA, incarnation }));
    let (vm, epoch) = (VmId(1), cloud.placed(1).unwrap().1);
    let halted = cloud.apply(Command::Planner(PlannerCommand::RecoverVm { vm, epoch }));
    assert!(matches!(halted, Err(Rejection::Halted(_))), "{halted:?}");
    assert!(!cloud.planned().iter().any(|line| line.starts_with("recover")), "{:?}", cloud.planned());
}

#[test]
fn a_clock_that_was_behind_is_found_out() {
    let mut cloud = Cloud::refounded();
    let future = cloud.index + 1_000;
    let refused = cloud.says(ALPHA, &[(1, future)]);
    assert!(matches!(&refused, Err(Rejection::Stale(why)) if why.contains("clock that was behind")), "{refused:?}");
    assert!(cloud.state.awaits(ALPHA));
    assert!(matches!(cloud.refound(EPOCH), Err(Rejection::Stale(_))), "twice in one epoch");
    assert!(matches!(cloud.refound(EPOCH + 1), Err(Rejection::Stale(_))), "before the log reached its index");
    let incarnation = cloud.attach(BETA);
    let guests = vec![(VmId(1), Held { epoch: 1, phase: Phase::Failed })];
    let odd = cloud.apply(Command::Node(NodeCommand::TakeStock { node: BETA, incarnation, guests }));
    assert!(matches!(odd, Err(Rejection::Invalid { .. })), "{odd:?}");
}

#[test]
fn a_level_rises_and_never_falls() {
    let mut cloud = Cloud::new();
    assert_eq!(cloud.state.quorum().level, level::OLDEST);
    cloud.done(Command::Operator(OperatorCommand::RaiseLevel { level: 2 }));
    cloud.done(Command::Operator(OperatorCommand::RaiseLevel { level: 2 }));
    let lowered = cloud.apply(Command::Operator(OperatorCommand::RaiseLevel { level: 1 }));
    assert!(matches!(lowered, Err(Rejection::Invalid { .. })), "{lowered:?}");
    assert_eq!(cloud.state.quorum().level, 2);
}

#[test]
fn a_guest_that_is_spared_and_every_image_are_left_alone() {
    let mut cloud = Cloud::refounded();
    let old = cloud.placed(1).unwrap().1;
    assert_eq!(cloud.says(BETA, &[(3, old + 1)]), Ok(Reply::Done));
    let guest = steps::FoundGuest { epoch: old + 1, power: steps::FoundPower::Running };
    let images = [(Digest([6; 32]), 10 * steps::IMAGE_IDLE_MILLIS)].into();
    let found = steps::Observed { guests: [(VmId(3), guest)].into(), images, ..steps::Observed::default() };
    let told = |cloud: &Cloud| {
        let steps = steps::steps(&cloud.state.assignment(BETA).unwrap(), &found);
        steps.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(told(&cloud).is_empty(), "{:?}", told(&cloud));
    cloud.done(Command::Operator(OperatorCommand::EndRefounding));
    assert!(told(&cloud).iter().any(|step| step.contains("vm-3")), "{:?}", told(&cloud));
}

#[test]
fn what_a_host_does_not_hold_any_more_is_not_made_anew_there() {
    let mut cloud = Cloud::refounded_with_web();
    let old = cloud.placed(1).unwrap().1;
    // It was moved to the other host since, or deleted.
    assert_eq!(cloud.says(ALPHA, &[]), Ok(Reply::Done));
    let web = cloud.state.vms().get(&VmId(1)).unwrap();
    assert_eq!((web.placement, web.status()), (None, Status::Failed), "{}", web.reason);
    assert!(cloud.state.assignment(ALPHA).unwrap().vms.is_empty(), "or it would boot on a blank disk");
    assert!(!cloud.planned().iter().any(|line| line.starts_with("place vm-1")), "{:?}", cloud.planned());

    assert_eq!(cloud.says(BETA, &[(1, old + 100)]), Ok(Reply::Done));
    let web = cloud.state.vms().get(&VmId(1)).unwrap();
    assert_eq!((cloud.placed(1), web.status()), (Some((BETA, old + 100)), Status::Running));
    assert_eq!((web.loss, web.restored_from), (None, None), "nothing was lost");
}

#[test]
fn what_a_host_holds_stays_where_it_is() {
    let mut cloud = Cloud::refounded_with_web();
    let placed = cloud.placed(1).unwrap();
    assert_eq!(cloud.says(ALPHA, &[(1, placed.1)]), Ok(Reply::Done));
    assert_eq!((cloud.placed(1), cloud.state.assignment(ALPHA).unwrap().vms.len()), (Some(placed), 1));
}

#[test]
fn a_move_that_may_have_been_handed_over_is_not_given_up_before_its_other_host_has_spoken() {
    let mut cloud = Cloud::new();
    cloud.done(Command::Operator(OperatorCommand::RaiseLevel { level: level::LATEST }));
    cloud.web_runs();
    cloud.done(Command::Operator(OperatorCommand::MigrateVm { vm: VmId(1), to: BETA }));
    cloud.index = EPOCH * INDICES_PER_SECOND;
    assert_eq!(cloud.refound(EPOCH), Ok(Reply::Controller(ControllerId(11))));
    let (_, old) = cloud.placed(1).unwrap();
    assert_eq!(cloud.says(ALPHA, &[(1, old)]), Ok(Reply::Done));
    let moves = |cloud: &Cloud| cloud.state.vms().get(&VmId(1)).unwrap().is_moving();

    let incarnation = cloud.state.nodes().get(&BETA).unwrap().incarnation;
    cloud.done(Command::Planner(PlannerCommand::DeclareLost { node: BETA, incarnation }));
    assert!(moves(&cloud), "the other host may have it");
    let cancelled = cloud.apply(Command::Operator(OperatorCommand::CancelMigration { vm: VmId(1) }));
    assert!(matches!(cancelled, Err(Rejection::Halted(_))), "{cancelled:?}");
    cloud.index += 1 << 40;
    cloud.done(Command::Planner(PlannerCommand::ExpireVm { vm: VmId(1) }));
    assert!(moves(&cloud));

    let mut removed = Cloud { state: cloud.state.clone(), index: cloud.index };
    removed.done(Command::Operator(OperatorCommand::RemoveNode { node: BETA, force: true }));
    assert!(!moves(&removed), "who is removed is not waited for");

    assert_eq!(cloud.says(BETA, &[(1, old + 100)]), Ok(Reply::Done));
    assert_eq!((cloud.placed(1), moves(&cloud)), (Some((BETA, old + 100)), false));
}
