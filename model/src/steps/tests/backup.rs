//! Backups: made once for each number, and told whatever came of them.

use super::*;
use crate::{BackupWish, assignment::ParentWish};

#[test]
fn a_backup_is_made_once_of_a_machine_that_is_here_and_told_whatever_came_of_it() {
    let asked = VmWish { backup: Some(BackupWish { number: 3, parent: None }), ..vm(1, 7, Power::Running) };
    let of_backups = |found: &Observed| {
        let todo = steps(&wish(vec![asked.clone()]), found);
        todo.into_iter().filter(|step| matches!(step, Step::BackUp { .. } | Step::ReportBackup(_))).collect::<Vec<_>>()
    };
    let mut found = Observed::default();
    assert_eq!(of_backups(&found), [], "it is not here yet");
    found.guests.insert(VmId(1), FoundGuest { epoch: 6, power: FoundPower::Running });
    assert_eq!(of_backups(&found), [], "what is here is an older placement");
    found.guests.insert(VmId(1), FoundGuest { epoch: 7, power: FoundPower::OffByAgent });
    assert_eq!(of_backups(&found), [Step::BackUp { vm: VmId(1), number: 3, parent: None }]);
    let report = |number| BackupReport { vm: VmId(1), epoch: 7, number, outcome: Err("no space".into()) };
    found.backups.insert(VmId(1), report(2));
    assert_eq!(of_backups(&found), [Step::BackUp { vm: VmId(1), number: 3, parent: None }], "another was asked for");
    found.backups.insert(VmId(1), report(3));
    assert_eq!(of_backups(&found), [Step::ReportBackup(report(3))]);
    found.told_backups.insert(VmId(1), 3);
    assert_eq!(of_backups(&found), []);
}

/// Two increments on a full one, `3 on 2 on 1`.
fn chain() -> ImageWish {
    let parent = |n: u8| ParentWish { digest: Digest([n; 32]), size_bytes: n.into(), sources: vec![format!("h{n}:1")] };
    ImageWish { parents: vec![parent(2), parent(1)], ..image(3) }
}

fn held(digests: &[u8]) -> Observed {
    let images = digests.iter().map(|n| (Digest([*n; 32]), 2 * IMAGE_IDLE_MILLIS)).collect();
    Observed { now_millis: 10 * IMAGE_IDLE_MILLIS, images, ..Observed::default() }
}

#[test]
fn what_an_increment_stands_on_is_fetched_first_and_kept_as_long_as_it_is() {
    let kept = Assignment { images: vec![chain()], ..wish(vec![]) };
    let fetched = |found: &Observed| match &steps(&kept, found)[..] {
        [Step::FetchImage(image)] => (image.digest.0[0], image.parents.len(), image.sources.clone()),
        other => panic!("{other:?}"),
    };
    assert_eq!(fetched(&held(&[])), (1, 0, vec!["h1:1".to_owned()]));
    assert_eq!(fetched(&held(&[1])), (2, 1, vec!["h2:1".to_owned()]));
    assert_eq!(fetched(&held(&[1, 2])), (3, 2, vec![]));
    let report = |good| vec![Step::ReportImage(ImageReport { digest: Digest([3; 32]), good })];
    assert_eq!(steps(&kept, &held(&[1, 2, 3])), report(true), "and nothing of it is dropped, idle or not");
    let torn = steps(&kept, &held(&[1, 3]));
    assert!(
        matches!(&torn[..], [Step::FetchImage(image)] if image.digest == Digest([2; 32])),
        "not good yet: {torn:?}"
    );
}

#[test]
fn a_host_that_cannot_get_what_an_increment_stands_on_says_that_it_cannot_have_it() {
    let kept = Assignment { images: vec![chain()], ..wish(vec![]) };
    let mut found = held(&[1]);
    let (permanent, reason) = (false, "no host has a good copy".into());
    let failure =
        Failure { count: FAILURES_BEFORE_REPORT, not_before_millis: u64::MAX, permanent, generation: 0, reason };
    found.failures.insert(Subject::Image(Digest([2; 32])), failure);
    let told = ImageReport { digest: Digest([3; 32]), good: false };
    assert_eq!(steps(&kept, &found), [Step::ReportImage(told)]);
}

#[test]
fn no_machine_starts_on_an_increment_before_all_that_it_stands_on_is_here() {
    let mut machine = vm(1, 7, Power::Running);
    machine.image = chain();
    let makes = |found: &Observed| steps(&wish(vec![machine.clone()]), found).contains(&Step::MakeDisk(VmId(1)));
    assert!(!makes(&held(&[3])) && !makes(&held(&[3, 1])) && !makes(&held(&[2, 1])));
    assert!(makes(&held(&[3, 2, 1])));
}
