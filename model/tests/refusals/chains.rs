//! Backups that stand on others: whatever is made, deleted, dropped, copied or lost in any order, no chain is broken, and a
//! machine is made again from the newest backup that can be opened elsewhere.

use model::{
    command::{BackupMade, BackupReport, ImageReport},
    *,
};
use proptest::prelude::*;

use super::{Cloud, NODE, VM};

const BETA: NodeId = NodeId(2);
const MOST: u32 = 4;

impl Cloud {
    fn tenant(&mut self, command: TenantCommand) -> Applied {
        self.apply(Command::Tenant(command))
    }

    /// Asks for one, and has the host make what it is told, or less. The image, if it is one.
    pub fn back_up(&mut self, full: bool, obedient: bool) -> Option<ImageId> {
        self.tenant(TenantCommand::BackUpVm { vm: VM, full }).unwrap();
        let wish = self.state.assignment(NODE).unwrap().vms[0].backup.expect("one is asked for");
        assert!(!full || wish.parent.is_none(), "a full one stands on nothing");
        self.made(wish.number, wish.parent.filter(|_| obedient))
    }

    fn made(&mut self, number: u32, parent: Option<Digest>) -> Option<ImageId> {
        let before = self.state.images().len();
        let made = BackupMade {
            digest: Digest::of(&number.to_le_bytes()),
            size_bytes: 1 << 20,
            virtual_bytes: 1 << 30,
            age_millis: 0,
            consistency: Consistency::Frozen,
            parent,
        };
        let reports = vec![BackupReport { vm: VM, epoch: self.epoch(), number, outcome: Ok(made) }];
        self.done(Command::Node(NodeCommand::ReportBackups { node: NODE, incarnation: 1, reports }));
        let newest = self.state.backups_of(VM).next_back().map(|image| image.id);
        newest.filter(|_| self.state.images().len() > before)
    }

    pub fn says(&mut self, node: NodeId, image: ImageId, good: bool) {
        let digest = self.state.images().get(&image).unwrap().digest;
        let reports = vec![ImageReport { digest, good }];
        self.done(Command::Node(NodeCommand::ReportImages { node, incarnation: 1, reports }));
    }

    fn pick(&self, dice: u8) -> Option<ImageId> {
        let all: Vec<ImageId> = self.state.backups_of(VM).map(|image| image.id).collect();
        all.get(usize::from(dice) % all.len().max(1)).copied()
    }

    fn is_whole(&self) {
        invariant::check(&self.state).unwrap();
        for image in self.state.backups_of(VM) {
            let chain: Vec<&Image> = self.state.chain(image).collect();
            assert_eq!(chain.last().unwrap().backup.unwrap().parent, None, "{} ends in a full copy", image.name);
            assert!(chain.len() <= MOST as usize, "{} is longer than may be", image.name);
        }
    }

    /// The newest of which every link has a good copy on the other host.
    fn newest_that_opens(&self) -> Option<ImageId> {
        let elsewhere = |image: &Image| image.replicas.get(&BETA) == Some(&ReplicaState::Good);
        let opens = |image: &&Image| self.state.chain(image).all(elsewhere);
        self.state.backups_of(VM).rfind(opens).map(|image| image.id)
    }
}

fn chained() -> Cloud {
    let mut cloud = Cloud::new();
    let schedule = TenantCommand::SetVmBackup { vm: VM, every_millis: 0, keep: 0, full_every: MOST };
    cloud.tenant(schedule).unwrap();
    cloud
}

#[test]
fn what_something_stands_on_is_not_deleted_and_the_refusal_names_it() {
    let mut cloud = chained();
    let full = cloud.back_up(false, true).unwrap();
    let increment = cloud.back_up(false, true).unwrap();
    let refused = cloud.tenant(TenantCommand::DeleteImage { image: full }).unwrap_err();
    let name = &cloud.state.images().get(&increment).unwrap().name;
    assert_eq!(refused.code(), "in-use");
    assert!(refused.to_string().contains(name), "{refused}");
    cloud.tenant(TenantCommand::DeleteImage { image: increment }).unwrap();
    cloud.tenant(TenantCommand::DeleteImage { image: full }).unwrap();
}

#[test]
fn an_increment_of_what_is_gone_or_of_another_length_is_no_backup() {
    let mut cloud = chained();
    let full = cloud.back_up(false, true).unwrap();
    cloud.tenant(TenantCommand::BackUpVm { vm: VM, full: false }).unwrap();
    let wish = cloud.state.assignment(NODE).unwrap().vms[0].backup.unwrap();
    assert_eq!(wish.parent, Some(cloud.state.images().get(&full).unwrap().digest));
    cloud.tenant(TenantCommand::DeleteImage { image: full }).unwrap();
    assert_eq!(cloud.made(wish.number, wish.parent), None);
    assert!(cloud.vm().backups.reason.contains("deleted meanwhile"), "{}", cloud.vm().backups.reason);
    assert!(cloud.back_up(false, true).is_some(), "the next is a full one");
    assert_eq!(cloud.newest_that_opens(), None);
}

#[test]
fn a_full_one_that_is_asked_for_while_an_increment_is_made_is_made_as_well() {
    let mut cloud = chained();
    cloud.back_up(false, true).unwrap();
    cloud.tenant(TenantCommand::BackUpVm { vm: VM, full: false }).unwrap();
    let first = cloud.state.assignment(NODE).unwrap().vms[0].backup.unwrap();
    cloud.tenant(TenantCommand::BackUpVm { vm: VM, full: true }).unwrap();
    let second = cloud.state.assignment(NODE).unwrap().vms[0].backup.unwrap();
    assert_eq!((second.number, second.parent), (first.number + 1, None));
    assert_eq!(cloud.made(first.number, first.parent), None, "that one is old news");
    assert!(cloud.made(second.number, None).is_some());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_chain_is_broken_by_any_order_of_backups_deletions_retention_and_loss(
        acts in proptest::collection::vec((0..9u8, any::<u8>()), 1..60)
    ) {
        let mut cloud = chained();
        for (act, dice) in acts {
            let image = cloud.pick(dice);
            match (act, image) {
                (0..=2, _) => drop(cloud.back_up(dice % 8 == 0, dice % 5 != 0)),
                (3, Some(image)) => drop(cloud.tenant(TenantCommand::DeleteImage { image })),
                (4, _) => {
                    let keep = u32::from(dice % 4);
                    let schedule = TenantCommand::SetVmBackup { vm: VM, every_millis: 0, keep, full_every: MOST };
                    cloud.tenant(schedule).unwrap();
                }
                (5 | 6, Some(image)) => {
                    let _ = cloud.apply(Command::Planner(PlannerCommand::AddReplica { image, node: BETA }));
                    cloud.says(BETA, image, true);
                }
                (7, Some(image)) => cloud.says(BETA, image, false),
                (_, Some(image)) => cloud.says(NODE, image, dice % 3 > 0),
                (_, None) => {}
            }
            cloud.is_whole();
        }
        let newest = cloud.newest_that_opens();
        prop_assert_eq!(cloud.state.safe_backup(cloud.vm()).map(|image| image.id), newest);
        cloud.done(Command::Planner(PlannerCommand::DeclareLost { node: NODE, incarnation: 1 }));
        cloud.done(Command::Planner(PlannerCommand::RecoverVm { vm: VM, epoch: cloud.epoch() }));
        prop_assert_eq!(cloud.vm().restored_from, newest);
        cloud.done(Command::Planner(PlannerCommand::PlaceVm { vm: VM, node: BETA }));
        let wish = cloud.state.assignment(BETA).unwrap().vms[0].image.clone();
        let base = cloud.state.images().get(&cloud.vm().base()).unwrap();
        let digests: Vec<Digest> = cloud.state.chain(base).map(|link| link.digest).collect();
        prop_assert_eq!(wish.digests().collect::<Vec<_>>(), digests, "the host gets all of it");
        cloud.is_whole();
    }
}
