//! For any log: what must always hold. The logs are made in `property/logs.rs`; here is what is asked of them.

use std::collections::BTreeMap;

use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

#[path = "property/charges.rs"]
mod charges;
#[path = "property/logs.rs"]
mod logs;
#[path = "property/world.rs"]
mod world;

use logs::{Dice, Source, dice};
use model::*;
use world::{Disk, normalised, rows_besides_memory, rows_besides_time};

/// Logs a property, and entries a log: together a few seconds, and long enough for a machine to live and die in one.
const CASES: u32 = 160;
const ENTRIES: usize = 220;

fn config() -> ProptestConfig {
    ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() }
}

/// Calls `look` with the state before, the index, the entry, what it came to and the state after, entry by entry.
fn run(
    dice: &[Dice],
    mut look: impl FnMut(&State, u64, &Entry, &Applied, &State) -> Result<(), TestCaseError>,
) -> Result<(State, Source), TestCaseError> {
    let (mut state, mut source, mut index) = (State::default(), Source::new(), 0);
    let mut step = |state: &mut State, entry: Entry| {
        index += 1;
        let before = state.clone();
        let applied = state.apply(index, &entry);
        let seen = look(&before, index, &entry, &applied, state);
        drop((state.take_woken(), state.note_changes()));
        seen
    };
    for entry in source.opening() {
        step(&mut state, entry)?;
    }
    for die in dice {
        let entry = source.next(&state, die);
        step(&mut state, entry)?;
    }
    Ok((state, source))
}

/// The log alone, with what each entry came to.
fn log_of(dice: &[Dice]) -> Vec<(Entry, Applied)> {
    let mut log = Vec::new();
    run(dice, |_, _, entry, applied, _| {
        log.push((entry.clone(), applied.clone()));
        Ok(())
    })
    .expect("nothing is asked here");
    log
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn invariants_hold_after_each_entry_and_a_rejection_changes_only_time_and_memory(dice in dice(ENTRIES)) {
        run(&dice, |before, index, entry, applied, after| {
            if let Err(broken) = invariant::check(after) {
                return Err(TestCaseError::fail(format!("after {index} {entry:?}: {broken}")));
            }
            prop_assert_eq!(after.now(), before.now().max(entry.at));
            if applied.is_err() {
                prop_assert_eq!(rows_besides_memory(before), rows_besides_memory(after), "{:?} was rejected: {:?}", entry, applied);
            }
            Ok(())
        })?;
    }

    #[test]
    fn promises_and_quotas_are_kept_by_what_is_accepted(dice in dice(ENTRIES)) {
        run(&dice, |before, index, entry, applied, after| {
            match (&entry.command, applied) {
                (Command::Planner(PlannerCommand::PlaceVm { vm, node }), Ok(_)) => {
                    let host = &after.nodes().get(node).unwrap();
                    let sizes = after.vms().values().filter(|vm| vm.placement.is_some_and(|p| p.node == *node)).map(|vm| vm.size);
                    let promised = sizes.fold(Capacity::default(), Capacity::plus);
                    prop_assert!(promised.fits_in(after.promisable(host)), "{promised:?} on {host:?}");
                    prop_assert!(host.state == NodeState::Up && !host.cordoned);
                    prop_assert_eq!(after.vms().get(vm).unwrap().placement.unwrap().epoch, index);
                }
                (Command::Tenant(TenantCommand::CreateVm { tenant, .. }), Ok(Reply::Vm(id))) if !before.vms().contains(id) && after.vms().contains(id) => {
                    let owned: Vec<&Vm> = after.vms().values().filter(|vm| vm.tenant == *tenant && !vm.ghost).collect();
                    let quota = after.tenants().get(tenant).unwrap().quota;
                    prop_assert!(owned.len() as u64 <= quota.vms);
                    prop_assert!(owned.iter().fold(Capacity::default(), |sum, vm| sum.plus(vm.size)).fits_in(quota.size));
                    prop_assert!(before.cluster().last_vm < id.0, "{id} was given before");
                }
                _ => {}
            }
            Ok(())
        })?;
    }

    /// A host at the same generation is to do the same; where a base image can be had matters only until it is there, and who is
    /// woken looks whether its tunnels changed.
    #[test]
    fn an_assignment_that_changes_gets_a_new_generation(dice in dice(ENTRIES)) {
        run(&dice, |before, _, entry, _, after| {
            for node in after.nodes().values() {
                let Some(old) = before.assignment(node.id) else { continue };
                let new = after.assignment(node.id).unwrap();
                prop_assert!(new.generation >= old.generation);
                if new.generation == old.generation {
                    let woken = after.clone().take_woken().contains(&node.id);
                    let [old, new] = [old, new].map(|whole| normalised(after, whole));
                    let tunnels = if woken { new.networks.clone() } else { old.networks };
                    prop_assert_eq!(Assignment { networks: tunnels, ..old }, new, "after {:?}", entry);
                }
            }
            Ok(())
        })?;
    }

    /// Or a burst of machines would leave nobody a place in the window of changes: one of them changes the tunnels of hundreds.
    #[test]
    fn a_change_of_tunnels_alone_is_not_told(dice in dice(ENTRIES)) {
        run(&dice, |before, _, entry, _, after| {
            let mut after = after.clone();
            let (woken, told) = (after.take_woken(), after.note_changes());
            for node in woken.into_iter().filter(|node| before.nodes().get(node) == after.nodes().get(node)) {
                let told = told.iter().any(|change| (change.noun, &change.id) == (Noun::Node, &node.to_string()));
                prop_assert!(!told && after.quorum().level >= 3, "{node} after {entry:?}");
            }
            Ok(())
        })?;
    }

    /// As sessions ask for them: whenever a host's generation rises or it is woken.
    #[test]
    fn news_make_the_assignment(dice in dice(ENTRIES)) {
        let mut hosts: BTreeMap<NodeId, (Known, Option<Assignment>)> = BTreeMap::new();
        run(&dice, |_, _, entry, _, after| {
            for node in after.nodes().values() {
                let (known, whole) = hosts.entry(node.id).or_default();
                let woken = after.clone().take_woken().contains(&node.id);
                if !woken && whole.as_ref().is_some_and(|whole| whole.generation == node.generation) {
                    continue;
                }
                let news = after.news(node.id, known).unwrap();
                *whole = Some(news.onto(whole.as_ref()));
                prop_assert_eq!(whole, &after.assignment(node.id), "after {:?}", entry);
                let again = after.news(node.id, known).unwrap();
                prop_assert!(again.is_empty());
            }
            Ok(())
        })?;
    }

    #[test]
    fn a_ghost_frees_its_name_and_keeps_its_address(dice in dice(ENTRIES)) {
        run(&dice, |_, _, _, _, after| {
            for ghost in after.vms().values().filter(|vm| vm.ghost) {
                prop_assert!(ghost.placement.is_some() && ghost.wanted == Wanted::Deleted);
                prop_assert!(after.vm_named(ghost.tenant, &ghost.name).is_none_or(|vm| vm.id != ghost.id));
                prop_assert!(after.vms_of_tenant(ghost.tenant).all(|vm| vm.id != ghost.id));
                let nic = &ghost.nics[0];
                let other = after.vms().values().find(|vm| vm.id != ghost.id && vm.nics[0].network == nic.network && vm.nics[0].ip == nic.ip);
                prop_assert!(other.is_none(), "{other:?} has the address of {ghost:?}");
            }
            Ok(())
        })?;
    }

    #[test]
    fn replicas_agree_however_they_persist_and_wherever_they_restart(dice in dice(ENTRIES), every in 1..40usize, restart in 1..60usize) {
        let (mut one, mut other, mut lazy) = (State::default(), State::default(), State::default());
        let (mut disk, mut other_disk) = (Disk::default(), Disk::default());
        for (i, (entry, applied)) in log_of(&dice).iter().enumerate() {
            let index = i as u64 + 1;
            for state in [&mut one, &mut other, &mut lazy] {
                prop_assert_eq!(&state.apply(index, entry), applied, "entry {} {:?}", index, entry);
            }
            disk.write(one.drain_changes());
            if i % every == 0 {
                other_disk.write(other.drain_changes());
                prop_assert_eq!(one.hash(), other.hash(), "after entry {}", index);
            }
            if i % restart == 0 {
                let loaded = disk.load();
                prop_assert_eq!(loaded.hash(), one.hash());
                prop_assert_eq!(loaded.kept_index(), one.kept_index());
                one = loaded;
                prop_assert!(one.drain_changes().is_empty(), "what was loaded is no change");
            }
        }
        other_disk.write(other.drain_changes());
        let mut lazy_disk = Disk::default();
        lazy_disk.write(lazy.drain_changes());
        prop_assert_eq!(one.hash(), other.hash());
        prop_assert_eq!(one.hash(), lazy.hash());
        prop_assert_eq!(&disk, &other_disk);
        prop_assert_eq!(&disk, &lazy_disk);
    }

    #[test]
    fn a_retry_gets_the_first_reply_and_changes_only_time(dice in dice(ENTRIES), again in any::<prop::sample::Index>(), later in 0..60_000u64) {
        let log = log_of(&dice);
        let mut state = State::default();
        for (i, (entry, _)) in log.iter().enumerate() {
            let _ = state.apply(i as u64 + 1, entry);
        }
        let kept: Vec<_> = log.iter().filter_map(|(entry, applied)| {
            let request = entry.request?;
            state.requests().contains(&request.id).then_some((entry, request, applied))
        }).collect();
        prop_assume!(!kept.is_empty());
        let (first, request, applied) = kept[again.index(kept.len())];
        let mut retry = first.clone();
        retry.at = state.now().plus_millis(later);
        let before = state.clone();
        let index = log.len() as u64 + 1;
        prop_assert_eq!(&state.apply(index, &retry), applied);
        prop_assert_eq!(rows_besides_time(&before), rows_besides_time(&state));
        prop_assert_eq!(state.now(), retry.at);
        retry.request = Some(Request { body: [0xff; 16], ..request });
        prop_assert_eq!(state.apply(index + 1, &retry), Err(Rejection::RequestReused));
        prop_assert_eq!(rows_besides_time(&before), rows_besides_time(&state));
    }

    #[test]
    fn planners_and_willing_hosts_come_to_rest(dice in dice(ENTRIES)) {
        let (mut state, mut source) = run(&dice, |_, _, _, _, _| Ok(()))?;
        world::settle(&mut state, &mut source).map_err(TestCaseError::fail)?;
        for vm in state.vms().values() {
            let calm = match vm.status() {
                Status::Running | Status::Suspended | Status::Stopped | Status::Failed => vm.deadline.is_none() && vm.retry_at.is_none(),
                Status::Pending => vm.reason.starts_with("no node has room") || vm.reason.starts_with("no node has joined"),
                _ => false,
            };
            prop_assert!(calm && !vm.ghost, "{} does not rest: {vm:?}", vm.status());
        }
    }

    #[test]
    fn charges_are_the_integral_of_use(dice in dice(ENTRIES), cuts in proptest::collection::vec(any::<u64>(), 0..6)) {
        let mut ledger = charges::Ledger::default();
        let (state, _) = run(&dice, |before, _, _, _, after| {
            ledger.pass(before, after.now());
            Ok(())
        })?;
        let all = |from, to| -> u128 { tenants_ever(&state).map(|tenant| charges::exact(&state, tenant, from, to)).sum() };
        let end = state.now();
        for tenant in tenants_ever(&state) {
            prop_assert_eq!(charges::exact(&state, tenant, Timestamp(0), end), ledger.of(tenant), "the bill of {}", tenant);
        }
        let mut ends: Vec<Timestamp> = cuts.iter().map(|cut| Timestamp(cut % (end.0 + 1))).chain([Timestamp(0), end]).collect();
        ends.sort();
        let parts: u128 = ends.windows(2).map(|span| all(span[0], span[1])).sum();
        prop_assert_eq!(parts, all(Timestamp(0), end));
        prop_assert_eq!(all(end, end.plus_millis(1_000)), 0, "the future is not charged");
    }

    /// What decodes may be applied, whoever made it: nothing panics, and nothing that must hold breaks.
    #[test]
    fn any_entry_that_decodes_may_be_applied(dice in dice(40), strange in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..60)) {
        let (mut state, _) = run(&dice, |_, _, _, _, _| Ok(()))?;
        for (i, bytes) in strange.iter().enumerate() {
            // Headers that decode, so that most of the chance goes into the command.
            let mut framed = vec![0, 0, 2];
            framed.extend(bytes.iter().enumerate().map(|(at, byte)| if at == 0 { byte % 4 } else if at == 1 { byte % 12 } else { *byte }));
            for bytes in [bytes.as_slice(), framed.as_slice()] {
                let Ok(entry) = postcard::from_bytes::<Entry>(bytes) else { continue };
                let _ = state.apply(1_000_000 + i as u64, &entry);
                if let Err(broken) = invariant::check(&state) {
                    return Err(TestCaseError::fail(format!("after {entry:?}: {broken}")));
                }
            }
        }
    }
}

/// A property of logs in which nothing happens proves nothing: together they must get everywhere.
#[test]
fn the_logs_reach_every_status() {
    let mut runner = TestRunner::deterministic();
    let mut seen: BTreeMap<String, u64> = BTreeMap::new();
    for _ in 0..CASES / 2 {
        let dice = dice(ENTRIES).new_tree(&mut runner).unwrap().current();
        let looked = run(&dice, |_, _, entry, applied, after| {
            let mut see = |what: String| *seen.entry(what).or_default() += 1;
            after.vms().values().for_each(|vm| see(if vm.ghost { "ghost".into() } else { vm.status().to_string() }));
            see(if applied.is_ok() { "accepted" } else { "rejected" }.into());
            match (&entry.command, applied) {
                (Command::Tenant(_) | Command::Operator(_), Err(refusal)) => see(refusal.code().into()),
                (Command::Planner(command), Ok(_)) => {
                    see(command.to_string().split(' ').next().unwrap_or_default().into())
                }
                _ => {}
            }
            Ok(())
        });
        looked.unwrap();
    }
    let wanted = [
        "pending",
        "creating",
        "running",
        "suspending",
        "suspended",
        "resuming",
        "stopping",
        "stopped",
        "starting",
        "rebooting",
        "deleting",
        "failed",
        "ghost",
        "place",
        "defer",
        "retry",
        "expire",
        "copy",
        "not-found",
        "already-exists",
        "invalid-argument",
        "in-use",
        "quota-exceeded",
        "version-mismatch",
        "stale",
        "no-address",
    ];
    let missing: Vec<_> = wanted.iter().filter(|what| !seen.contains_key(**what)).collect();
    assert!(missing.is_empty(), "never seen: {missing:?}; seen: {seen:?}");
    assert!(seen["accepted"] > seen["rejected"], "most of what is asked should be plausible: {seen:?}");
}

/// The one command whose refusal no log above reaches, because each begins with one that is accepted.
#[test]
fn a_refused_founding_leaves_nothing() {
    let token = Digest([1; 32]);
    let found = |controller: &str, address: &str| PlannerCommand::Found {
        cluster: "cloud".into(),
        controller: controller.into(),
        address: address.into(),
        operator: "root".into(),
        token,
    };
    for command in [found("Not a label", "192.0.2.1:7470"), found("one", "")] {
        let (before, mut state) = (State::default(), State::default());
        let entry = Entry { at: Timestamp(5), request: None, actor: Actor::System, command: Command::Planner(command) };
        assert!(matches!(state.apply(1, &entry), Err(Rejection::Invalid { .. })));
        assert_eq!(rows_besides_time(&before), rows_besides_time(&state));
    }
}

fn tenants_ever(state: &State) -> impl Iterator<Item = TenantId> {
    (1..=state.cluster().last_tenant).map(TenantId)
}
