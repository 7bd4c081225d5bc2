//! From wishes to steps, as `nodeagent/src/executor.rs` does it: obey, look, ask `model::steps`, act, remember.

use std::collections::{BTreeMap, BTreeSet};

use model::{
    Assignment, Digest, Phase, Power, VmId, VmWish,
    steps::{Failure, FoundPower, Memory, Observed, Seen, Step, Subject, Told, accept, steps},
};

use crate::{agent::Agent, coverage, dice::MILLI, host::Host, surroundings::Surroundings};

/// As in `nodeagent/src/executor.rs`.
const FIRST_PAUSE_MILLIS: u64 = 1_000;
const LONGEST_PAUSE_MILLIS: u64 = 60_000;
const RECOVERED_MILLIS: u64 = 60_000;
const FORGET_MILLIS: u64 = 600_000;
/// Shorter than in the agent, which also looks at once when something happened.
const LOOK_PERIOD: u64 = 400 * MILLI;

impl Agent {
    pub(crate) fn forget_told(&mut self) {
        self.told.retain(|_, told| told.report.phase == Phase::Failed);
        self.told_images.clear();
        self.told_moves.clear();
        self.next_look = 0;
    }

    pub(crate) fn obey(&mut self, around: &mut Surroundings, host: &mut Host, new: Assignment) {
        if let Err(stale) = accept(&self.seen, &new) {
            around.coverage.count(coverage::STALE_ASSIGNMENT);
            let id = self.id;
            return around.story.tell(around.now, || format!("{id} refuses: {stale}"));
        }
        let id = self.id;
        around.story.tell(around.now, || format!("{id} obeys {}", new.to_string().replace('\n', "; ")));
        let asked = |wish: &VmWish| (wish.epoch, wish.attempt, wish.power, wish.reboots);
        let old = self.assignment.take();
        let before: BTreeMap<VmId, _> =
            old.iter().flat_map(|old| &old.vms).map(|wish| (wish.vm, asked(wish))).collect();
        for wish in &new.vms {
            if before.get(&wish.vm) != Some(&asked(wish)) {
                self.failures.remove(&Subject::Vm(wish.vm));
                self.failures.remove(&Subject::Image(wish.image.digest));
                wish.nics.iter().for_each(|nic| drop(self.failures.remove(&Subject::Network(nic.vni))));
            }
        }
        let end = |vm: &VmId| new.vms.iter().find(|wish| wish.vm == *vm)?.moves.as_ref().map(|end| end.epoch);
        for (vm, _) in self.going.iter().filter(|(vm, epoch)| end(vm) != Some(**epoch)) {
            host.call_back(around, *vm);
        }
        let wished: BTreeSet<Digest> = new.images.iter().map(|image| image.digest).collect();
        self.told_images.retain(|digest, _| wished.contains(digest));
        self.seen =
            Seen { generation: new.generation, epochs: new.vms.iter().map(|wish| (wish.vm, wish.epoch)).collect() };
        self.keeper.assigned(&new);
        host.page = self.keeper.force().clone();
        for wish in &new.vms {
            if let Some(guest) = host.guests.get_mut(&wish.vm).filter(|guest| guest.epoch == wish.epoch) {
                guest.exclusive = model::permit::is_exclusive(wish);
            }
        }
        self.assignment = Some(new);
        self.next_look = 0;
    }

    pub(crate) fn execute(&mut self, around: &mut Surroundings, host: &mut Host) {
        let clock = host.clock.at(around.now);
        while let Some((step, result)) = self.done.pop_front() {
            self.finish(&step, result, clock / MILLI);
            self.next_look = 0;
        }
        if clock < self.next_look {
            return;
        }
        self.next_look = clock + LOOK_PERIOD;
        let mut found = Observed {
            now_millis: clock / MILLI,
            guests: host.found(),
            networks: host.networks.iter().map(|vni| (*vni, true)).collect(),
            images: host.images.iter().map(|digest| (*digest, 0)).collect(),
            ..Observed::default()
        };
        self.tidy(&found);
        found.memories = self.memories.clone();
        found.failures = self.failures.clone();
        found.told = self.told.clone();
        found.told_images = self.told_images.clone();
        found.told_moves = self.told_moves.clone();
        found.moves_failed = self.moves_failed.clone();
        found.leaving = self.going.keys().copied().collect();
        let Some(assignment) = self.assignment.clone() else { return };
        let id = self.id;
        let comes = |vm: &VmId, epoch: &u64| {
            assignment.vms.iter().any(|w| (w.vm, w.epoch, w.power) == (*vm, *epoch, Power::Arriving))
        };
        around.doors.retain(|(host, vm), epoch| *host != id || comes(vm, epoch));
        let own = around.doors.iter().filter(|((host, _), _)| *host == id);
        found.expected = own.map(|((_, vm), epoch)| (*vm, *epoch)).collect();
        for wish in &assignment.vms {
            if wish.power == Power::Stopped {
                self.memory(wish, &found).wished_off = true;
            }
            if found.guests.get(&wish.vm).is_some_and(|guest| guest.epoch == wish.epoch) {
                self.memory(wish, &found).ran = true;
            }
        }
        found.memories = self.memories.clone();
        for step in steps(&assignment, &found) {
            self.take(around, host, &assignment, &found, step);
        }
    }

    fn take(
        &mut self,
        around: &mut Surroundings,
        host: &mut Host,
        assignment: &Assignment,
        found: &Observed,
        step: Step,
    ) {
        let wish = |vm: &VmId| assignment.vms.iter().find(|wish| wish.vm == *vm);
        match &step {
            Step::Report(report) => {
                let Some(wish) = wish(&report.vm) else { return };
                if matches!(report.phase, Phase::Running | Phase::Suspended | Phase::Stopped) {
                    self.memory(wish, found).existed = true;
                }
                let told = Told { attempt: wish.attempt, power: wish.power, report: report.clone() };
                self.told.insert(report.vm, told);
                return self.post(report.clone());
            }
            Step::ReportImage(report) => {
                self.told_images.insert(report.digest, report.good);
                return self.post_image(report.clone());
            }
            Step::ReportMove(report) => {
                self.told_moves.insert(report.vm, report.clone());
                return self.post_move(report.clone());
            }
            _ => {}
        }
        let Some(subject) = step.subject() else { return };
        if !self.busy.insert(subject) {
            return;
        }
        let clock = host.clock.at(around.now);
        if let Subject::Vm(vm) = subject
            && let Some(wish) = wish(&vm)
        {
            self.note_intent(wish, found, &step);
            let touches_a_running_guest = matches!(
                step,
                Step::Start { .. }
                    | Step::Suspend(_)
                    | Step::Resume(_)
                    | Step::PressPower(_)
                    | Step::Reset { .. }
                    | Step::Migrate { .. }
                    | Step::FinishMigration { .. }
                    | Step::CancelMigration(_)
            );
            if touches_a_running_guest && self.keeper.force().may_run(wish, clock).is_err() {
                self.busy.remove(&subject);
                if let Step::Migrate { vm, .. } = &step {
                    self.going.remove(vm);
                    self.memory(wish, found).leaving = None;
                }
                let count = self.failures.get(&subject).map_or(0, |failure| failure.count);
                return self.note_failure(subject, count, "not now".into(), clock / MILLI);
            }
        }
        host.begin(around, step, assignment, self.process);
    }

    fn note_intent(&mut self, wish: &VmWish, found: &Observed, step: &Step) {
        match step {
            Step::MakeDisk(_) | Step::Start { .. } => {
                let memory = self.memory(wish, found);
                (memory.begun, memory.removed) = (true, false);
                if let Step::Start { reboots, .. } = step {
                    (memory.rebooted, memory.wished_off) = (*reboots, false);
                }
            }
            Step::Migrate { vm, epoch } => {
                self.memory(wish, found).leaving = Some(*epoch);
                self.going.insert(*vm, *epoch);
            }
            Step::PressPower(_) | Step::Reset { .. } | Step::Remove(_) => drop(self.memory(wish, found)),
            _ => {}
        }
    }

    fn memory(&mut self, wish: &VmWish, found: &Observed) -> &mut Memory {
        let known = found.memory(wish);
        let memory = self.memories.entry(wish.vm).or_insert(known);
        if memory.epoch != wish.epoch {
            *memory = known;
        }
        memory
    }

    fn tidy(&mut self, found: &Observed) {
        let now = found.now_millis;
        let up = |vm: &VmId| {
            found.guests.get(vm).is_some_and(|guest| matches!(guest.power, FoundPower::Running | FoundPower::Suspended))
        };
        self.failures.retain(|subject, failure| {
            let recovered =
                matches!(subject, Subject::Vm(vm) if up(vm)) && now > failure.not_before_millis + RECOVERED_MILLIS;
            !recovered && now < failure.not_before_millis + FORGET_MILLIS
        });
        let Some(assignment) = &self.assignment else { return };
        let wishes: BTreeMap<VmId, &VmWish> = assignment.vms.iter().map(|wish| (wish.vm, wish)).collect();
        self.told.retain(|vm, _| wishes.contains_key(vm));
        let end = |vm: &VmId| wishes.get(vm)?.moves.as_ref().map(|end| end.epoch);
        self.told_moves.retain(|vm, told| end(vm) == Some(told.epoch));
        self.moves_failed.retain(|vm, (epoch, _)| end(vm) == Some(*epoch));
        self.memories.retain(|vm, _| wishes.contains_key(vm) || found.guests.contains_key(vm));
        for (vm, memory) in &mut self.memories {
            if !(wishes.get(vm).is_some_and(|wish| wish.power == Power::Stopped) && up(vm)) {
                (memory.pressed_first_millis, memory.pressed_last_millis) = (None, None);
            }
        }
    }

    fn finish(&mut self, step: &Step, result: Result<(), ()>, now_millis: u64) {
        let Some(subject) = step.subject() else { return };
        self.busy.remove(&subject);
        if let Step::Migrate { vm, epoch } = step {
            self.going.remove(vm);
            if result.is_err() {
                self.moves_failed.insert(*vm, (*epoch, "it failed".into()));
            }
        }
        if result.is_err() {
            let count = self.failures.get(&subject).map_or(0, |failure| failure.count) + 1;
            return self.note_failure(subject, count, format!("{step}: it failed"), now_millis);
        }
        if !matches!(step, Step::Remove(_)) {
            let failed = self.failures.remove(&subject);
            if matches!(step, Step::Start { after_crash: true, .. }) {
                let crashes = failed.map_or(0, |failure| failure.count) + 1;
                self.note_failure(subject, crashes, format!("its guest crashed {crashes} times in a row"), now_millis);
            }
        }
        let Subject::Vm(vm) = subject else { return };
        let Some(memory) = self.memories.get_mut(&vm) else { return };
        match step {
            Step::MakeDisk(_) | Step::CheckDisk(_) => memory.disk_made = true,
            Step::Reset { reboots, .. } => memory.rebooted = *reboots,
            Step::CancelMigration(_) => memory.leaving = None,
            Step::Remove(_) => {
                (memory.removed, memory.begun, memory.disk_made, memory.ran) = (true, false, false, false);
            }
            Step::PressPower(_) => {
                memory.pressed_first_millis.get_or_insert(now_millis);
                memory.pressed_last_millis = Some(now_millis);
            }
            _ => {}
        }
    }

    fn note_failure(&mut self, subject: Subject, count: u32, reason: String, now_millis: u64) {
        let pause = FIRST_PAUSE_MILLIS << count.saturating_sub(1).min(10);
        let not_before_millis = now_millis + pause.min(LONGEST_PAUSE_MILLIS);
        let generation = self.seen.generation;
        let failure = Failure { count, not_before_millis, permanent: false, generation, reason };
        self.failures.insert(subject, failure);
    }
}
