//! What the latest feature level decides with more care: copies that nobody sees, backups that nobody can read, sums that are
//! sent in one message. At the level before, everything is as it was, so that members of both versions agree.

use std::collections::BTreeSet;

use model::{plan::plan, *};

use super::{Cloud, NODE, VM, is_stale};

const BETA: NodeId = NodeId(2);

impl Cloud {
    fn careful() -> Self {
        let mut cloud = Self::new();
        cloud.done(Command::Operator(OperatorCommand::RaiseLevel { level: level::LATEST }));
        cloud
    }

    fn after_loss(&mut self, recovery: Recovery) -> Applied {
        self.apply(Command::Tenant(TenantCommand::SetVmRecovery { vm: VM, recovery, priority: 0 }))
    }

    /// The machine is available; its host is cut off, lost, and it has none.
    fn cut_off(&mut self) {
        self.after_loss(Recovery::Available).unwrap();
        self.lose(1).unwrap();
        self.recover(self.epoch()).unwrap();
        assert_eq!(self.vm().placement, None);
    }

    fn create(&mut self, ssh_keys: Vec<String>) -> Applied {
        self.apply(Command::Tenant(TenantCommand::CreateVm {
            tenant: TenantId(1),
            name: "keys".into(),
            image: ImageId(1),
            template: "tiny".into(),
            network: NetworkId(1),
            ssh_keys,
            user_data: String::new(),
            recovery: Recovery::Available,
            priority: 0,
        }))
    }
}

#[test]
fn what_may_still_run_on_a_lost_host_is_not_made_exclusive() {
    let mut before = Cloud::new();
    before.cut_off();
    assert!(before.after_loss(Recovery::Exclusive).is_ok());

    let mut cloud = Cloud::careful();
    cloud.cut_off();
    let refused = cloud.after_loss(Recovery::Exclusive);
    assert!(matches!(&refused, Err(Rejection::Stale(why)) if why.contains("may still run on alpha")), "{refused:?}");
    // Its host is back, and told to set the old copy aside.
    cloud.attach(NODE);
    assert!(cloud.after_loss(Recovery::Exclusive).is_ok());
}

#[test]
fn nothing_is_made_exclusive_where_the_clock_is_not_believed() {
    let mut cloud = Cloud::careful();
    cloud.after_loss(Recovery::Available).unwrap();
    cloud.done(Command::Tenant(TenantCommand::SetVmPower { vm: VM, wanted: Wanted::Stopped, stop_grace_millis: 0 }));
    assert_eq!(cloud.report(1, cloud.epoch(), Phase::Stopped), Ok(Reply::Done));
    cloud.done(Command::Planner(PlannerCommand::SetNodeClock { node: NODE, drifts: true }));
    assert!(is_stale(&cloud.after_loss(Recovery::Exclusive)));
    cloud.done(Command::Planner(PlannerCommand::SetNodeClock { node: NODE, drifts: false }));
    assert!(cloud.after_loss(Recovery::Exclusive).is_ok());
}

#[test]
fn a_backup_that_only_lost_hosts_have_is_not_safe_and_still_better_than_none() {
    let mut cloud = Cloud::careful();
    let backup = cloud.back_up(true, true).expect("a backup");
    cloud.done(Command::Planner(PlannerCommand::AddReplica { image: backup, node: BETA }));
    cloud.says(BETA, backup, true);
    let safe = |cloud: &Cloud| cloud.state.safe_backup(cloud.vm()).map(|image| image.id);
    assert_eq!(safe(&cloud), Some(backup));
    cloud.done(Command::Operator(OperatorCommand::SetSetting { name: "brake-count".into(), value: 100 }));
    cloud.done(Command::Planner(PlannerCommand::DeclareLost { node: BETA, incarnation: 1 }));
    assert_eq!(safe(&cloud), None);
    cloud.lose(1).unwrap();
    cloud.recover(cloud.epoch()).unwrap();
    assert_eq!(cloud.vm().restored_from, Some(backup));
}

#[test]
fn the_keys_of_a_machine_are_bounded_together() {
    let key = |kib: usize| format!("ssh-ed25519 {}", "A".repeat(kib << 10));
    let many = vec![key(10), key(10)];
    assert!(Cloud::new().create(many.clone()).is_ok());
    let refused = Cloud::careful().create(many);
    assert!(matches!(&refused, Err(Rejection::Invalid { field, .. }) if field.starts_with("ssh_keys")), "{refused:?}");
    assert!(Cloud::careful().create(vec![key(4), key(4)]).is_ok());
}

#[test]
fn images_for_which_nothing_can_be_done_do_not_stand_before_the_others() {
    const HOPELESS: u64 = 400;
    let mut cloud = Cloud::careful();
    let import = |cloud: &mut Cloud, number: u64, replicas: Vec<NodeId>| {
        let digest = Digest::of(&number.to_le_bytes());
        let (name, format) = (format!("image-{number}"), ImageFormat::Qcow2);
        let command = TenantCommand::ImportImage {
            tenant: TenantId(1),
            name,
            format,
            size_bytes: 1,
            virtual_bytes: 1 << 20,
            digest,
            replicas,
        };
        match cloud.apply(Command::Tenant(command)) {
            Ok(Reply::Image(id)) => id,
            other => panic!("{other:?}"),
        }
    };
    // More copies are wanted than there are hosts.
    cloud.done(Command::Operator(OperatorCommand::SetSetting { name: "image-replicas".into(), value: 3 }));
    for number in 0..HOPELESS {
        import(&mut cloud, number, vec![NODE, BETA]);
    }
    let last = import(&mut cloud, HOPELESS, vec![NODE]);
    let wanted = |at: u64| {
        plan(&cloud.state, &Telemetry::default(), Timestamp(at)).into_iter().filter_map(|command| match command {
            Command::Planner(PlannerCommand::AddReplica { image, .. }) => Some(image),
            _ => None,
        })
    };
    let asked: BTreeSet<ImageId> = (1_000_000..1_000_100).flat_map(wanted).collect();
    assert!(asked.contains(&last), "{asked:?}");
}
