//! When a machine changes hands, and when it must not.

use super::*;

const TO: NodeId = NodeId(2);

impl Cloud {
    /// The machine is on its way from the first host to the second; gives the epoch that it will have there.
    fn moving() -> (Self, u64) {
        let mut cloud = Self::new();
        cloud.done(migrate(TO));
        let epoch = cloud.index;
        assert_eq!(cloud.vm().status(), Status::Migrating);
        (cloud, epoch)
    }

    /// The same with one that its owner has stopped.
    fn moving_stopped() -> (Self, u64) {
        let mut cloud = Self::new();
        cloud.done(power(Wanted::Stopped));
        assert_eq!(cloud.report(1, cloud.epoch(), Phase::Stopped), Ok(Reply::Done));
        cloud.done(migrate(TO));
        let epoch = cloud.index;
        assert_eq!(cloud.vm().status(), Status::Migrating);
        (cloud, epoch)
    }

    /// What the first host should make of it: how, and whether it should send it away.
    fn wish_of_source(&self) -> (Power, bool) {
        let assignment = self.state.assignment(NODE).unwrap();
        let wish = assignment.vms.iter().find(|wish| wish.vm == VM).unwrap();
        (wish.power, wish.moves.is_some())
    }

    fn charged_as(&self) -> String {
        self.state.meters().get(&Resource::Vm(VM)).unwrap().status.clone()
    }

    fn host(&self) -> NodeId {
        self.vm().placement.unwrap().node
    }
}

fn migrate(to: NodeId) -> Command {
    Command::Operator(OperatorCommand::MigrateVm { vm: VM, to })
}

fn power(wanted: Wanted) -> Command {
    Command::Tenant(TenantCommand::SetVmPower { vm: VM, wanted, stop_grace_millis: 0 })
}

#[test]
fn what_is_stopped_is_handed_over_stopped() {
    use MoveOutcome::{Arrived, Left};
    for reports in [[(NODE, Left), (TO, Arrived)], [(TO, Arrived), (NODE, Left)]] {
        let (mut cloud, epoch) = Cloud::moving_stopped();
        let [(first, one), (second, other)] = reports;
        cloud.report_move(first, epoch, one);
        assert_eq!(cloud.host(), NODE, "one report is not enough");
        assert_eq!(cloud.report(1, cloud.epoch(), Phase::Stopped), Ok(Reply::Done), "that it is off is no news");
        assert_eq!(cloud.vm().status(), Status::Migrating);
        cloud.report_move(second, epoch, other);
        let vm = cloud.vm();
        assert_eq!((vm.placement, vm.status()), (Some(Placement { node: TO, epoch }), Status::Stopped));
        assert_eq!((vm.deadline, cloud.charged_as()), (None, "stopped".into()));
        assert_eq!(cloud.wish_of_source(), (Power::Absent, false));
    }
}

#[test]
fn a_machine_that_is_started_on_its_way_starts_where_it_was() {
    for left in [false, true] {
        let (mut cloud, epoch) = Cloud::moving_stopped();
        assert_eq!(cloud.wish_of_source(), (Power::Stopped, true));
        if left {
            cloud.report_move(NODE, epoch, MoveOutcome::Left);
        }
        cloud.done(power(Wanted::Running));
        assert_eq!((cloud.vm().status(), cloud.wish_of_source()), (Status::Starting, (Power::Running, false)));
        cloud.report_move(NODE, epoch, MoveOutcome::Left);
        cloud.report_move(TO, epoch, MoveOutcome::Arrived);
        cloud.report_move(NODE, epoch, MoveOutcome::Nothing);
        assert_eq!((cloud.host(), cloud.vm().migration.unwrap().stage), (NODE, MigrationStage::GivenUp));
    }
}

#[test]
fn of_what_was_never_made_its_source_alone_says_so() {
    let (mut cloud, epoch) = Cloud::moving_stopped();
    cloud.report_move(TO, epoch, MoveOutcome::Nothing);
    assert_eq!(cloud.host(), NODE, "its destination cannot know");
    cloud.report_move(NODE, epoch - 1, MoveOutcome::Nothing);
    assert_eq!(cloud.host(), NODE, "of an earlier move");
    cloud.report_move(NODE, epoch, MoveOutcome::Nothing);
    assert_eq!((cloud.host(), cloud.vm().status()), (TO, Status::Stopped));
}

/// Nobody runs it, and its destination may have all of it; but what was not handed over is its source's.
#[test]
fn a_stopped_machine_whose_host_is_lost_waits_for_it_unless_it_had_left() {
    let (mut cloud, epoch) = Cloud::moving_stopped();
    let placed = cloud.epoch();
    cloud.report_move(TO, epoch, MoveOutcome::Arrived);
    cloud.lose(1).unwrap();
    assert_eq!(cloud.recover(placed), Ok(Reply::Done));
    assert_eq!((cloud.host(), cloud.vm().migration, cloud.vm().status()), (NODE, None, Status::Lost));

    let (mut cloud, epoch) = Cloud::moving_stopped();
    let placed = cloud.epoch();
    cloud.report_move(NODE, epoch, MoveOutcome::Left);
    cloud.lose(1).unwrap();
    assert!(is_stale(&cloud.recover(placed)), "its destination is waited for");
    cloud.report_move(TO, epoch, MoveOutcome::Arrived);
    assert_eq!((cloud.host(), cloud.vm().migration, cloud.vm().status()), (TO, None, Status::Stopped));
}

#[test]
fn nothing_is_stopped_or_started_to_be_moved_in_another_manner() {
    use plan::moves::{Manner, would_go};
    let mut cloud = Cloud::new();
    assert_eq!(would_go(cloud.vm(), Manner::Live), Ok(()));
    let refused = would_go(cloud.vm(), Manner::Offline).unwrap_err();
    assert_eq!(refused.code(), "stale");
    assert!(refused.to_string().contains("web is running: stop it to move it offline"), "{refused}");
    cloud.done(power(Wanted::Stopped));
    assert_eq!(cloud.report(1, cloud.epoch(), Phase::Stopped), Ok(Reply::Done));
    assert_eq!(would_go(cloud.vm(), Manner::Offline), Ok(()));
    let refused = would_go(cloud.vm(), Manner::Live).unwrap_err();
    assert!(refused.to_string().contains("web is stopped: start it to move it live"), "{refused}");
}

#[test]
fn a_hand_over_needs_both_reports_in_any_order() {
    use MoveOutcome::{Arrived, Left};
    for reports in [[(NODE, Left), (TO, Arrived)], [(TO, Arrived), (NODE, Left)]] {
        let (mut cloud, epoch) = Cloud::moving();
        let [(first, one), (second, other)] = reports;
        cloud.report_move(first, epoch, one.clone());
        cloud.report_move(first, epoch, one);
        assert_eq!(cloud.host(), NODE, "one report is not enough, however often it is told");
        cloud.report_move(second, epoch, other);
        let vm = cloud.vm();
        assert_eq!((vm.placement, vm.status()), (Some(Placement { node: TO, epoch }), Status::Resuming));
        assert!(cloud.state.meters().contains(&Resource::Vm(VM)), "its owner is charged for it as ever");
    }
}

#[test]
fn each_end_speaks_for_itself_and_for_this_move_alone() {
    use MoveOutcome::{Arrived, Failed, Left};
    let (mut cloud, epoch) = Cloud::moving();
    cloud.report_move(NODE, epoch, Left);
    cloud.report_move(NODE, epoch, Arrived);
    cloud.report_move(TO, epoch - 1, Arrived);
    cloud.report_move(TO, epoch, Left);
    cloud.report_move(TO, epoch - 1, Failed("of an earlier one".into()));
    assert_eq!((cloud.host(), cloud.vm().status()), (NODE, Status::Migrating));
    cloud.report_move(TO, epoch, Arrived);
    assert_eq!(cloud.host(), TO);
}

#[test]
fn what_was_given_up_is_never_handed_over() {
    use MoveOutcome::{Arrived, Failed, Left};
    let give_up: [fn(&mut Cloud, u64); 5] = [
        |cloud, epoch| cloud.report_move(NODE, epoch, Failed("no route".into())),
        |cloud, epoch| cloud.report_move(TO, epoch, Failed("no space".into())),
        |cloud, _| cloud.done(Command::Operator(OperatorCommand::CancelMigration { vm: VM })),
        |cloud, _| cloud.done(power(Wanted::Stopped)),
        |cloud, _| {
            cloud.index += 3_600;
            cloud.done(Command::Planner(PlannerCommand::ExpireVm { vm: VM }));
        },
    ];
    for give_up in give_up {
        let (mut cloud, epoch) = Cloud::moving();
        cloud.report_move(NODE, epoch, Left);
        give_up(&mut cloud, epoch);
        cloud.report_move(TO, epoch, Arrived);
        assert_eq!(cloud.host(), NODE);
        assert!(cloud.state.reserved(TO).vcpus > 0, "its destination has not said that nothing is left there");
        assert!(is_stale(&cloud.apply(migrate(TO))), "nor is there another before it has");
        let (reason, retry) = (String::new(), false);
        let absent = VmReport { vm: VM, epoch, attempt: 0, phase: Phase::Absent, rebooted: 0, reason, retry };
        cloud.done(Command::Node(NodeCommand::ReportVms { node: TO, incarnation: 1, reports: vec![absent] }));
        assert_eq!((cloud.state.reserved(TO), cloud.vm().migration), (Capacity::default(), None));
        assert!(cloud.vm().move_failure.is_some());
    }
}

/// Its destination may have it as it was a moment before its host was lost, and it went on there after that.
#[test]
fn a_machine_whose_host_is_lost_before_it_left_is_recovered_and_never_handed_over() {
    let (mut cloud, epoch) = Cloud::moving();
    cloud.report_move(TO, epoch, MoveOutcome::Arrived);
    let placed = cloud.epoch();
    cloud.lose(1).unwrap();
    assert_eq!(cloud.recover(placed), Ok(Reply::Done));
    cloud.attach(NODE);
    cloud.report_move(NODE, epoch, MoveOutcome::Left);
    assert_eq!((cloud.vm().placement, cloud.vm().migration), (None, None));
}

#[test]
fn a_machine_that_left_a_lost_host_is_its_destinations() {
    let (mut cloud, epoch) = Cloud::moving();
    cloud.report_move(NODE, epoch, MoveOutcome::Left);
    let placed = cloud.epoch();
    cloud.lose(1).unwrap();
    assert!(is_stale(&cloud.recover(placed)), "its destination is waited for");
    cloud.report_move(TO, epoch, MoveOutcome::Arrived);
    assert_eq!((cloud.host(), cloud.vm().migration), (TO, None));
    assert!(is_stale(&cloud.recover(placed)));
}

#[test]
fn only_what_can_be_moved_is() {
    let mut cloud = Cloud::new();
    assert!(matches!(cloud.apply(migrate(NODE)), Err(Rejection::NoRoom { .. })), "it is there");
    assert!(matches!(cloud.apply(migrate(NodeId(7))), Err(Rejection::NotFound { .. })));
    cloud.done(Command::Operator(OperatorCommand::CordonNode { node: TO, cordoned: true }));
    assert!(matches!(cloud.apply(migrate(TO)), Err(Rejection::NoRoom { .. })), "it takes nothing new");
    cloud.done(Command::Operator(OperatorCommand::CordonNode { node: TO, cordoned: false }));
    cloud.done(Command::Tenant(TenantCommand::BackUpVm { vm: VM, full: false }));
    assert!(is_stale(&cloud.apply(migrate(TO))), "a backup is under way");
    cloud.done(power(Wanted::Stopped));
    assert!(is_stale(&cloud.apply(migrate(TO))), "it is being stopped");
}

#[test]
fn what_is_uneven_is_evened_out_once_and_then_left_alone() {
    let mut cloud = Cloud::new();
    for name in ["two", "three"] {
        cloud.done(Command::Tenant(TenantCommand::CreateVm {
            tenant: TenantId(1),
            name: name.into(),
            image: ImageId(1),
            template: "tiny".into(),
            network: NetworkId(1),
            ssh_keys: Vec::new(),
            user_data: String::new(),
            recovery: Recovery::default(),
            priority: 0,
        }));
        let vm = cloud.state.vms().iter().last().map(|(id, _)| *id).unwrap();
        cloud.done(Command::Planner(PlannerCommand::PlaceVm { vm, node: NODE }));
        let (epoch, phase, reason) = (cloud.index, Phase::Running, String::new());
        let report = VmReport { vm, epoch, attempt: 0, phase, rebooted: 0, reason, retry: false };
        cloud.done(Command::Node(NodeCommand::ReportVms { node: NODE, incarnation: 1, reports: vec![report] }));
    }
    let moves = plan::moves::rebalance(&cloud.state);
    let [next] = moves[..] else { panic!("{moves:?}") };
    assert_eq!((next.vm, next.from, next.to), (VM, NODE, TO));
    cloud.done(migrate(TO));
    assert_eq!(plan::moves::rebalance(&cloud.state), [], "what is on its way counts as if it were there");
    let epoch = cloud.index;
    cloud.report_move(NODE, epoch, MoveOutcome::Left);
    cloud.report_move(TO, epoch, MoveOutcome::Arrived);
    assert_eq!(cloud.host(), TO);
    assert_eq!(plan::moves::rebalance(&cloud.state), []);
}
