//! Backups: made once for each number, and told whatever came of them.

use super::*;

#[test]
fn a_backup_is_made_once_of_a_machine_that_is_here_and_told_whatever_came_of_it() {
    let asked = VmWish { backup: Some(3), ..vm(1, 7, Power::Running) };
    let of_backups = |found: &Observed| {
        let todo = steps(&wish(vec![asked.clone()]), found);
        todo.into_iter().filter(|step| matches!(step, Step::BackUp { .. } | Step::ReportBackup(_))).collect::<Vec<_>>()
    };
    let mut found = Observed::default();
    assert_eq!(of_backups(&found), [], "it is not here yet");
    found.guests.insert(VmId(1), FoundGuest { epoch: 6, power: FoundPower::Running });
    assert_eq!(of_backups(&found), [], "what is here is an older placement");
    found.guests.insert(VmId(1), FoundGuest { epoch: 7, power: FoundPower::OffByAgent });
    assert_eq!(of_backups(&found), [Step::BackUp { vm: VmId(1), number: 3 }]);
    let report = |number| BackupReport { vm: VmId(1), epoch: 7, number, outcome: Err("no space".into()) };
    found.backups.insert(VmId(1), report(2));
    assert_eq!(of_backups(&found), [Step::BackUp { vm: VmId(1), number: 3 }], "another was asked for");
    found.backups.insert(VmId(1), report(3));
    assert_eq!(of_backups(&found), [Step::ReportBackup(report(3))]);
    found.told_backups.insert(VmId(1), 3);
    assert_eq!(of_backups(&found), []);
}
