//! The rule of permission, told as what is heard and what may run then.

use model::steps::FoundPower;

use super::*;

fn machine(vm: u64, epoch: u64, standing: Standing) -> Machine {
    Machine { vm: VmId(vm), epoch, standing }
}

fn keeper() -> Keeper {
    Keeper::default()
}

/// An assignment of this incarnation, as it is kept.
fn wished(keeper: &mut Keeper, incarnation: u64, machines: &[Machine]) {
    keeper.wished = Some(Wished { incarnation, machines: machines.to_vec() });
    keeper.settle();
}

fn verdict(keeper: &Keeper, vm: u64, epoch: u64, now: u64) -> Verdict {
    keeper.force.verdict(VmId(vm), Some(epoch), now)
}

#[test]
fn an_exclusive_machine_runs_while_the_lease_lasts_and_another_for_ever() {
    let mut k = keeper();
    wished(&mut k, 1, &[machine(1, 10, Standing::Leased), machine(2, 11, Standing::Free)]);
    assert_eq!(verdict(&k, 1, 10, 0), Verdict::Leave, "no lease yet: nothing is in force");
    k.granted(1, 100);
    assert_eq!([99, 100].map(|now| verdict(&k, 1, 10, now)), [Verdict::Run, Verdict::Stop]);
    assert_eq!(verdict(&k, 2, 11, 1000), Verdict::Run);
    assert_eq!(verdict(&k, 3, 12, 1000), Verdict::Leave, "nobody has said anything about it");
    k.granted(1, 90);
    assert_eq!(k.force.until, 100, "an answer that comes late shortens nothing");
    k.granted(1, 200);
    assert_eq!(verdict(&k, 1, 10, 150), Verdict::Run, "the lease is back");
}

#[test]
fn a_lease_of_another_incarnation_never_revives_what_only_an_old_assignment_names() {
    let mut k = keeper();
    wished(&mut k, 1, &[machine(1, 10, Standing::Leased)]);
    k.granted(1, 100);
    // It was lost, and has attached again: the lease comes first.
    k.granted(2, 300);
    assert_eq!(verdict(&k, 1, 10, 150), Verdict::Stop, "the old permit has ended in its time");
    wished(&mut k, 2, &[machine(2, 20, Standing::Leased)]);
    assert_eq!(verdict(&k, 1, 10, 150), Verdict::Stop);
    assert_eq!(verdict(&k, 2, 20, 150), Verdict::Run);
    // Or the assignment comes first.
    wished(&mut k, 3, &[machine(2, 30, Standing::Leased)]);
    assert_eq!(verdict(&k, 2, 20, 299), Verdict::Run, "until both are there the old permit stays");
    k.granted(2, 400);
    assert_eq!(k.force.until, 300, "and is not made longer");
    k.granted(3, 500);
    assert_eq!(verdict(&k, 2, 20, 301), Verdict::Stop, "the same machine at its older placement");
    assert_eq!(verdict(&k, 2, 30, 301), Verdict::Run);
    assert_eq!(k.force.verdict(VmId(2), None, 301), Verdict::Run, "its record cannot be read");
    assert_eq!(k.force.verdict(VmId(1), None, 301), Verdict::Stop);
    k.granted(2, 9000);
    assert_eq!(k.force.until, 500, "an answer to a beat of an older incarnation");
}

#[test]
fn what_is_denied_stays_so_until_it_is_gone() {
    let mut k = keeper();
    wished(&mut k, 1, &[machine(1, 10, Standing::Leased), machine(2, 11, Standing::Leased)]);
    k.granted(1, 100);
    wished(&mut k, 1, &[machine(2, 11, Standing::Free)]);
    assert_eq!(verdict(&k, 1, 10, 50), Verdict::Stop, "it is no longer wished here");
    assert_eq!(verdict(&k, 2, 11, 500), Verdict::Run, "its owner no longer wants it exclusive");
    let here: BTreeMap<_, _> = [(VmId(1), FoundGuest { epoch: 10, power: FoundPower::Running })].into();
    assert!(!k.found(&here));
    assert_eq!(verdict(&k, 1, 10, 50), Verdict::Stop);
    assert!(k.found(&BTreeMap::new()));
    assert_eq!(k.force.machines, [machine(2, 11, Standing::Free)]);
}

#[test]
fn a_restarted_agent_takes_up_the_permit_and_does_not_lengthen_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = Leases::open(dir.path()).unwrap();
    first.change(|keeper| {
        wished(keeper, 1, &[machine(1, 10, Standing::Leased)]);
        keeper.granted(1, 100)
    });
    drop(first);
    let second = Leases::open(dir.path()).unwrap();
    assert_eq!((second.permit().incarnation, second.permit().until), (1, 100));
    second.granted(1, 200);
    assert_eq!(second.permit().until, 100, "it has no assignment yet");
    second.change(|keeper| {
        wished(keeper, 2, &[]);
        keeper.granted(2, 300)
    });
    assert_eq!(second.permit().machines, [machine(1, 10, Standing::Denied)], "what the last agent knew is not lost");
}
