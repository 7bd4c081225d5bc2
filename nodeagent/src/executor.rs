//! Closes the difference between what the host should be and what it is: look, compare, act, look again.
//!
//! ```text
//!   assignment ──┐
//!   every 5 s ───┼──► look ──► model::steps ──► journal ──► act, one step a subject at a time ──┐
//!   step done ───┘     ▲                                └──► report, into the outbox            │
//!                      └────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! One task owns all that is remembered, so nothing here is locked. What is remembered durably is written before the
//! effect that it speaks of. Until the first assignment of this process nothing is done: guests stay as they are.
//! Deliberately not here: the decisions; `model::steps` makes them.

use std::{
    collections::{BTreeMap, BTreeSet},
    io, mem,
    sync::Arc,
    time::Duration,
};

use model::{
    Assignment, Digest, Phase, Power, VmId, VmWish,
    command::BackupReport,
    steps::{Failure, FoundPower, Memory, Observed, Seen, Step, Subject, Told, accept, steps},
};
use tokio::{
    sync::{mpsc, watch},
    task::spawn_blocking,
    time::sleep,
};

use crate::{
    clock,
    host::Host,
    hypervisor::{HypervisorError, job::Job},
    journal::Journal,
    outbox::Outbox,
};
use act::{Done as Outcome, Fault, FaultKind, act};
use backups::aged;
use caps::has_room;
use heard::Heard;
use moving::Moves;
use observe::Look;
use rehearsal::Rehearsals;

mod act;
mod backups;
mod caps;
mod heard;
mod moving;
mod notes;
mod observe;
mod rehearsal;

/// A look without a cause: what changed on the host by itself is found at the latest then.
const LOOK_PERIOD: Duration = Duration::from_secs(5);
/// While something waits for a guest or for the end of a pause.
const BUSY_LOOK_PERIOD: Duration = Duration::from_secs(1);
/// Pause after the first failure; it doubles with each one that follows.
const FIRST_PAUSE_MILLIS: u64 = 1_000;
const LONGEST_PAUSE_MILLIS: u64 = 60_000;
/// A guest that ran this long since it crashed has recovered.
const RECOVERED_MILLIS: u64 = 60_000;
/// A failure that nothing came of since is forgotten.
const FORGET_MILLIS: u64 = 600_000;

pub struct Executor {
    host: Arc<Host>,
    outbox: Arc<Outbox>,
    journal: Journal,
    seen: Seen,
    memories: BTreeMap<VmId, Memory>,
    failures: BTreeMap<Subject, Failure>,
    told: BTreeMap<VmId, Told>,
    told_images: BTreeMap<Digest, bool>,
    /// What became of backups, and when each disk was as it is in its copy.
    backups: BTreeMap<VmId, (BackupReport, u64)>,
    told_backups: BTreeMap<VmId, u32>,
    /// Backups that are under way and may go on.
    copies: BTreeMap<VmId, Arc<Job>>,
    rehearsals: Rehearsals,
    moves: Moves,
    assignment: Option<Arc<Assignment>>,
    busy: BTreeMap<Subject, Step>,
    done_sender: mpsc::UnboundedSender<Done>,
    /// Holds at most one message a busy subject.
    done: mpsc::UnboundedReceiver<Done>,
    blind: bool,
    /// As last seen, or as the last step left it: they are not looked at while one is being worked on.
    networks: BTreeMap<u32, bool>,
}

struct Done {
    step: Step,
    result: Result<Outcome, Fault>,
}

impl Executor {
    pub fn new(host: Arc<Host>, outbox: Arc<Outbox>, journal: Journal) -> Self {
        let (done_sender, done) = mpsc::unbounded_channel();
        Self {
            host,
            outbox,
            seen: journal.seen(),
            memories: journal.memories(),
            journal,
            failures: BTreeMap::new(),
            told: BTreeMap::new(),
            told_images: BTreeMap::new(),
            backups: BTreeMap::new(),
            told_backups: BTreeMap::new(),
            copies: BTreeMap::new(),
            rehearsals: Rehearsals::default(),
            moves: Moves::default(),
            assignment: None,
            busy: BTreeMap::new(),
            done_sender,
            done,
            blind: false,
            networks: BTreeMap::new(),
        }
    }

    /// Works for as long as it is polled.
    ///
    /// # Errors
    /// When the journal cannot be written: a host that cannot keep what it promised must not act.
    pub async fn run(
        mut self,
        assignments: watch::Receiver<Option<Arc<Assignment>>>,
        incarnation: watch::Receiver<u64>,
    ) -> io::Result<()> {
        let mut heard = Heard::new(assignments, incarnation);
        loop {
            let Some(look) = self.look(&mut heard).await? else { return Ok(()) };
            let calm = self.reconcile(look)?;
            let pause = match calm {
                _ if heard.since_look => Duration::ZERO,
                true => LOOK_PERIOD,
                false => BUSY_LOOK_PERIOD,
            };
            tokio::select! {
                news = heard.next() => match news {
                    Some(news) => self.hear(news)?,
                    None => return Ok(()),
                },
                Some(done) = self.done.recv() => self.finish(done)?,
                () = sleep(pause) => {}
            }
            while let Ok(done) = self.done.try_recv() {
                self.finish(done)?;
            }
        }
    }

    /// In a new session everything is told once more, so that whatever was lost is mended. A failure is not: each
    /// telling counts as an attempt.
    fn forget_told(&mut self) {
        self.told.retain(|_, told| told.report.phase == Phase::Failed);
        self.told_images.clear();
        self.told_backups.clear();
        self.rehearsals.forget_told();
        self.moves.told.clear();
    }

    fn obey(&mut self, new: Arc<Assignment>) -> io::Result<()> {
        if (new.node, &new.cluster) != (self.host.node, &self.host.cluster) {
            tracing::error!(node = %new.node, cluster = new.cluster, "refused an assignment that is for another host");
            return Ok(());
        }
        if let Err(stale) = accept(&self.seen, &new) {
            tracing::error!(%stale, "refused an assignment from the past");
            return Ok(());
        }
        if self.assignment.as_ref().is_none_or(|old| old.generation != new.generation) {
            tracing::info!(
                generation = new.generation,
                vms = new.vms.len(),
                networks = new.networks.len(),
                "a new assignment"
            );
        }
        let new = moving::with_their_leases(new);
        let old = self.assignment.replace(new.clone());
        let mut networks = mem::take(&mut self.networks);
        self.doubt_networks(old.as_ref().map_or(&[], |old| &old.networks), &mut networks);
        self.networks = networks;
        let asked = |wish: &VmWish| (wish.epoch, wish.attempt, wish.power, wish.reboots);
        let before: BTreeMap<VmId, _> =
            old.iter().flat_map(|old| &old.vms).map(|wish| (wish.vm, asked(wish))).collect();
        for wish in &new.vms {
            if before.get(&wish.vm) != Some(&asked(wish)) {
                self.forgive(wish);
            }
        }
        self.moves.call_back(&new);
        for image in new.images.iter().filter(|image| !self.told_images.contains_key(&image.digest)) {
            image.digests().for_each(|digest| drop(self.failures.remove(&Subject::Image(digest))));
        }
        let wished: BTreeSet<Digest> = new.images.iter().map(|image| image.digest).collect();
        self.told_images.retain(|digest, _| wished.contains(digest));
        self.seen =
            Seen { generation: new.generation, epochs: new.vms.iter().map(|wish| (wish.vm, wish.epoch)).collect() };
        self.save()?;
        self.host.leases.assigned(&new);
        self.rehearsals.keep_wished(&new);
        Ok(())
    }

    /// It is asked for anew: what failed before does not count against it.
    fn forgive(&mut self, wish: &VmWish) {
        self.failures.remove(&Subject::Vm(wish.vm));
        wish.image.digests().for_each(|digest| drop(self.failures.remove(&Subject::Image(digest))));
        for nic in &wish.nics {
            self.failures.remove(&Subject::Network(nic.vni));
        }
    }

    /// True when the host is at rest.
    fn reconcile(&mut self, look: Result<Look, HypervisorError>) -> io::Result<bool> {
        let assignment = self.assignment.clone();
        let look = match look {
            Ok(look) => look,
            Err(error) => {
                if !mem::replace(&mut self.blind, true) {
                    tracing::error!(%error, "the guests of this host cannot be seen; nothing is done or said about them");
                }
                self.host.view.set_machines(None);
                return Ok(false);
            }
        };
        if mem::take(&mut self.blind) {
            tracing::info!("the guests of this host can be seen again");
        }
        self.networks = look.networks.unwrap_or_else(|| mem::take(&mut self.networks));
        let mut found = Observed {
            now_millis: clock::boottime_millis(),
            guests: look.guests,
            networks: self.networks.clone(),
            images: look.images,
            pinned_images: look.pinned_images,
            ..Observed::default()
        };
        self.tidy(&found);
        self.lend(&mut found);
        self.host.view.set_machines(Some(observe::machines(assignment.as_deref(), &found)));
        let Some(assignment) = assignment else { return Ok(true) };
        self.host.arrivals.retain(&moving::arriving(&assignment));
        self.note_wishes(&assignment, &mut found);
        let todo = steps(&assignment, &found);
        let paused = self.failures.values().any(|failure| found.now_millis < failure.not_before_millis);
        let calm = todo.is_empty() && self.busy.is_empty() && !paused && !self.waits_for_guests();
        self.start(&assignment, &found, todo)?;
        Ok(calm)
    }

    /// What the decisions need of what is remembered.
    fn lend(&self, found: &mut Observed) {
        found.memories = self.memories.clone();
        found.failures = self.failures.clone();
        found.set_going = self.busy.values().filter_map(Step::sets_going).collect();
        found.told = self.told.clone();
        found.told_images = self.told_images.clone();
        found.told_backups = self.told_backups.clone();
        self.rehearsals.lend(found);
        self.moves.lend(found, &self.host);
        found.backups = self.backups.iter().map(|(vm, (made, at))| (*vm, aged(made, found.now_millis - at))).collect();
    }

    fn waits_for_guests(&self) -> bool {
        self.memories.values().any(|memory| memory.pressed_first_millis.is_some())
    }

    /// Forgets what no longer matters.
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
        self.backups.retain(|vm, _| wishes.get(vm).is_some_and(|wish| wish.backup.is_some()));
        self.told_backups.retain(|vm, _| self.backups.contains_key(vm));
        self.moves.keep_wished(assignment);
        self.memories.retain(|vm, _| wishes.contains_key(vm) || found.guests.contains_key(vm));
        for (vm, memory) in &mut self.memories {
            let stopping = wishes.get(vm).is_some_and(|wish| wish.power == Power::Stopped) && up(vm);
            if !stopping {
                (memory.pressed_first_millis, memory.pressed_last_millis) = (None, None);
            }
        }
    }

    /// A machine that is wished stopped: that it is off later is then no news from the guest. One whose guest is here
    /// has run: its disk is never made anew.
    fn note_wishes(&mut self, assignment: &Assignment, found: &mut Observed) {
        for wish in &assignment.vms {
            if wish.power == Power::Stopped {
                self.memory(wish, found).wished_off = true;
            }
            if found.guests.get(&wish.vm).is_some_and(|guest| guest.epoch == wish.epoch) {
                self.memory(wish, found).ran = true;
            }
        }
        found.memories = self.memories.clone();
    }

    fn memory(&mut self, wish: &VmWish, found: &Observed) -> &mut Memory {
        let known = found.memory(wish);
        let memory = self.memories.entry(wish.vm).or_insert(known);
        if memory.epoch != wish.epoch {
            *memory = known;
        }
        memory
    }

    /// Writes down what is about to happen, then lets it happen.
    fn start(&mut self, assignment: &Arc<Assignment>, found: &Observed, todo: Vec<Step>) -> io::Result<()> {
        let wishes: BTreeMap<VmId, &VmWish> = assignment.vms.iter().map(|wish| (wish.vm, wish)).collect();
        let mut chosen = Vec::new();
        for step in todo {
            let Some(subject) = step.subject() else {
                self.note_report(&wishes, found, &step);
                chosen.push(step);
                continue;
            };
            if self.busy.contains_key(&subject) {
                self.free(&step);
                continue;
            }
            if self.waits_for_copy(&step) || !has_room(&self.busy, &step) {
                continue;
            }
            self.note_intent(&wishes, found, &step);
            self.busy.insert(subject, step.clone());
            chosen.push(step);
        }
        self.save()?;
        for step in chosen {
            let vm = match step.subject() {
                Some(Subject::Vm(vm) | Subject::Backup(vm)) => wishes.get(&vm),
                _ => None,
            };
            let request = vm.map(|wish| tracing::field::display(wish.request));
            tracing::info!(request, %step, generation = assignment.generation, "step");
            match step {
                Step::Report(report) => self.outbox.vm(report),
                Step::ReportImage(report) => self.outbox.image(report),
                Step::ReportBackup(report) => self.outbox.backup(report),
                Step::ReportRehearsal(report) => self.outbox.rehearsal(report),
                Step::ReportMove(report) => self.outbox.a_move(report),
                step => {
                    let job = match step {
                        Step::Rehearse { image, epoch } => self.rehearsals.begin(assignment, image, epoch),
                        Step::Migrate { vm, epoch } => Some(self.moves.begin(vm, epoch)),
                        Step::BackUp { vm, .. } => Some(self.begin_backup(vm)),
                        _ => None,
                    };
                    let (host, assignment, done) = (self.host.clone(), assignment.clone(), self.done_sender.clone());
                    tokio::spawn(async move {
                        let result = act(host, assignment, step.clone(), job).await;
                        // Nobody listens when the agent is stopping.
                        let _ = done.send(Done { step, result });
                    });
                }
            }
        }
        Ok(())
    }

    /// What is under way on a guest that nobody wants here may wait for an answer of a process that the guard has stopped, and so
    /// would this for its turn.
    fn free(&self, step: &Step) {
        if let Step::Quarantine { vm, .. } | Step::Remove(vm) = *step {
            let hypervisor = self.host.hypervisor.clone();
            spawn_blocking(move || hypervisor.end_if_stopped(vm));
        }
    }

    fn finish(&mut self, Done { step, result }: Done) -> io::Result<()> {
        let Some(subject) = step.subject() else { return Ok(()) };
        self.busy.remove(&subject);
        if let Subject::Backup(vm) = subject {
            self.copies.remove(&vm);
        }
        let not_now = result.as_ref().is_err_and(|fault| fault.kind == FaultKind::NotNow);
        match step {
            Step::BackUp { vm, number, .. } if !not_now => {
                self.note_backup(vm, number, result);
                return Ok(());
            }
            Step::Rehearse { image, epoch } if !not_now => {
                self.rehearsals.finish(image, epoch, result.and_then(Outcome::rehearsed));
                self.failures.remove(&subject);
                // It may have been given up while it ran.
                self.assignment.iter().for_each(|wish| self.rehearsals.keep_wished(wish));
                return Ok(());
            }
            Step::Rehearse { image, .. } => self.rehearsals.put_off(image),
            Step::Migrate { vm, epoch } => self.moves.finish(vm, epoch, &result, self.memories.get_mut(&vm)),
            _ => {}
        }
        match result {
            Ok(_) => self.note_success(subject, &step),
            Err(fault) if fault.kind == FaultKind::NotNow => {
                tracing::warn!(reason = fault.reason, "not possible just now");
                let count = self.failures.remove(&subject).map_or(0, |failure| failure.count);
                self.note_failure(subject, count, false, fault.reason);
            }
            Err(fault) => {
                tracing::warn!(reason = fault.reason, "a step failed");
                let count = self.failures.get(&subject).map_or(0, |failure| failure.count) + 1;
                self.note_failure(subject, count, fault.kind == FaultKind::Permanent, fault.reason);
            }
        }
        self.save()
    }

    fn note_success(&mut self, subject: Subject, step: &Step) {
        // Clearing up is no success of what failed, and a start no proof that the guest stays up.
        if !matches!(step, Step::Remove(_)) {
            let failed = self.failures.remove(&subject);
            if matches!(step, Step::Start { after_crash: true, .. }) {
                let crashes = failed.map_or(0, |failure| failure.count) + 1;
                let reason = format!("its guest crashed, or was killed, {crashes} times in a row");
                self.note_failure(subject, crashes, false, reason);
            }
        }
        match step {
            // What is wished may have changed since.
            Step::EnsureNetwork(wish) => {
                let wished = self.assignment.iter().any(|assignment| assignment.networks.contains(wish));
                self.networks.insert(wish.vni, wished);
            }
            Step::RemoveNetwork(vni) => drop(self.networks.remove(vni)),
            _ => {}
        }
        let Subject::Vm(vm) = subject else { return };
        let now = clock::boottime_millis();
        let Some(memory) = self.memories.get_mut(&vm) else { return };
        match step {
            Step::MakeDisk(_) | Step::CheckDisk(_) => memory.disk_made = true,
            Step::Reset { reboots, .. } => memory.rebooted = *reboots,
            Step::CancelMigration(_) => memory.leaving = None,
            Step::Remove(_) => {
                (memory.removed, memory.begun, memory.disk_made, memory.ran) = (true, false, false, false);
            }
            Step::PressPower(_) => {
                memory.pressed_first_millis.get_or_insert(now);
                memory.pressed_last_millis = Some(now);
            }
            _ => {}
        }
    }

    fn note_failure(&mut self, subject: Subject, count: u32, permanent: bool, reason: String) {
        let pause = FIRST_PAUSE_MILLIS << count.saturating_sub(1).min(10);
        let not_before_millis = clock::boottime_millis() + pause.min(LONGEST_PAUSE_MILLIS);
        let generation = self.seen.generation;
        self.failures.insert(subject, Failure { count, not_before_millis, permanent, generation, reason });
    }

    fn save(&mut self) -> io::Result<()> {
        self.journal.save(&self.seen, &self.memories)
    }
}

#[cfg(test)]
mod tests;
