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

    fn host(&self) -> NodeId {
        self.vm().placement.unwrap().node
    }
}

fn migrate(to: NodeId) -> Command {
    Command::Operator(OperatorCommand::MigrateVm { vm: VM, to })
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
        |cloud, _| {
            let (vm, wanted, stop_grace_millis) = (VM, Wanted::Stopped, 0);
            cloud.done(Command::Tenant(TenantCommand::SetVmPower { vm, wanted, stop_grace_millis }));
        },
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
    let (vm, wanted, stop_grace_millis) = (VM, Wanted::Stopped, 0);
    cloud.done(Command::Tenant(TenantCommand::SetVmPower { vm, wanted, stop_grace_millis }));
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
