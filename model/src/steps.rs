//! The host's side: wanted − found. Pure; the agent carries the steps out.
//!
//! `steps` names everything that can be done now, at most one step a machine, network or image; what has to wait
//! (a start for its image and network) appears in a later call, after the agent has looked again. A step is
//! idempotent, so that one carried out twice does no harm, and a host at rest has no steps.
//!
//! ```text
//!  nothing ── fetch image ── make disk ──┐
//!                ensure network ─────────┴─ start ──► running ◄── resume / suspend ──► suspended
//!                                             ▲          │
//!                                             │          │ press power, and after the grace: power off
//!                                             └── off ◄──┘
//!  older epoch, or in no wish: quarantine        wished absent: remove        reboot asked for: reset, once
//! ```
//!
//! - A guest that switched itself off is not started again: it is reported, and the quorum changes the wish.
//! - A guest that crashed is started again here, with back-off; the quorum hears of it when that fails repeatedly.
//! - What failed repeatedly is reported and left alone until the quorum asks for another attempt. Of a machine that
//!   never came to be, everything is removed before that report: it is the evidence that the host is free of it.
//! - A disk is made once. When that of a machine that has run is missing, the machine has failed: it never comes up blank.
//! - Apart from that, disks are only deleted for a machine that is wished absent. Everything else that nobody wants is
//!   kept aside, but for what the assignment spares.
//!
//! Deliberately not here: what an assignment may say, and carrying anything out.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
};

use crate::{
    Assignment, Digest, ImageId, ImageWish, Phase, Power, Recovery, VmId, VmWish,
    command::{BackupReport, ImageReport, MoveReport, RehearsalReport, VmReport},
};

pub use step::{Step, Subject};

mod backup;
mod moving;
mod rehearsal;
mod step;

/// A blob that nobody wants is kept this long: an upload is stored before the quorum knows the image, and a base that
/// was used a moment ago is likely to be used again.
pub const IMAGE_IDLE_MILLIS: u64 = 3_600_000;
/// A guest that is still booting ignores the power button, so it is pressed again after this time.
pub const PRESS_AGAIN_MILLIS: u64 = 10_000;
/// Failures in a row before the quorum is told: a daemon's restart or a lost source cures itself within a few seconds.
pub const FAILURES_BEFORE_REPORT: u32 = 3;

/// What the agent found on its host, and the little that it remembers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The host's clock that all times here are in.
    pub now_millis: u64,
    /// Every guest of this cloud.
    pub guests: BTreeMap<VmId, FoundGuest>,
    /// Every network of this cloud by VNI, and whether it is as the assignment wants it.
    pub networks: BTreeMap<u32, bool>,
    /// Verified blobs, and for how long nobody has used or written them.
    pub images: BTreeMap<Digest, u64>,
    /// Blobs that must stay whatever the assignment says: disks that were kept aside stand on them.
    pub pinned_images: BTreeSet<Digest>,
    /// Machines that a step under way sets going: what was seen of them may be from before it.
    pub set_going: BTreeSet<VmId>,
    pub memories: BTreeMap<VmId, Memory>,
    pub failures: BTreeMap<Subject, Failure>,
    /// What the quorum was last told.
    pub told: BTreeMap<VmId, Told>,
    pub told_images: BTreeMap<Digest, bool>,
    /// What became of the last backup of each machine, as long as this process remembers it.
    pub backups: BTreeMap<VmId, BackupReport>,
    pub told_backups: BTreeMap<VmId, u32>,
    /// What became of rehearsals, and of which placement the quorum was told.
    pub rehearsals: BTreeMap<ImageId, RehearsalReport>,
    pub told_rehearsals: BTreeMap<ImageId, u64>,
    /// Guests that may come, each under the placement that it will have: their hosts are let in.
    pub expected: BTreeMap<VmId, u64>,
    /// Guests that are going just now.
    pub leaving: BTreeSet<VmId>,
    /// Why a guest did not go, and in which move, as long as this process remembers it.
    pub moves_failed: BTreeMap<VmId, (u64, String)>,
    pub told_moves: BTreeMap<VmId, MoveReport>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FoundGuest {
    pub epoch: u64,
    pub power: FoundPower,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundPower {
    Running,
    Suspended,
    /// Its memory and disk are on their way to here.
    Arriving,
    /// All of it is here, paused, and was not handed over to this host yet.
    Arrived,
    /// Off because it went to another host.
    Moved,
    /// Off because the guest switched itself off.
    OffByGuest,
    /// Off because the agent did it.
    OffByAgent,
    /// Off for any other reason: a crash, a killed process, the host's own end.
    Crashed,
}

/// What the agent remembers of a machine at one placement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    pub epoch: u64,
    /// The last requested reboot that was carried out; a start carries out all that were asked for before it.
    pub rebooted: u32,
    /// It was wished stopped since its last start: that it is off is then no news from the guest.
    pub wished_off: bool,
    /// Something of it may have been made at this placement, and not been removed since.
    pub begun: bool,
    /// Its disk was made, or seen to be there, since the agent started.
    pub disk_made: bool,
    /// Its guest was seen at this placement: its disk holds what the guest wrote, so a missing one is never made anew.
    pub ran: bool,
    /// It was removed, and nothing is left.
    pub removed: bool,
    /// The quorum was told, or is about to be, that it came to be: from then on its disk may hold something.
    pub existed: bool,
    /// The move in which it was sent away, from before it was until that is settled: a move is tried once.
    pub leaving: Option<u64>,
    pub pressed_first_millis: Option<u64>,
    pub pressed_last_millis: Option<u64>,
}

/// A report, and the attempt that it was about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    pub attempt: u32,
    pub power: Power,
    pub report: VmReport,
}

/// Failures in a row of one subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub count: u32,
    /// Not tried again before this time.
    pub not_before_millis: u64,
    /// It will fail the same way until the assignment changes.
    pub permanent: bool,
    /// The assignment under which it failed last.
    pub generation: u64,
    /// One sentence.
    pub reason: String,
}

/// The highest numbers that this host has ever obeyed. Kept across restarts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub generation: u64,
    pub epochs: BTreeMap<VmId, u64>,
}

/// Why an assignment is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stale {
    #[error("assignment {new} is older than assignment {seen}, which this host has obeyed")]
    Generation { seen: u64, new: u64 },
    #[error("assignment {generation} places {vm} by epoch {new}, older than epoch {seen}, which this host has obeyed")]
    Epoch { generation: u64, vm: VmId, seen: u64, new: u64 },
}

/// Whether an assignment may be obeyed. The same generation again may: a new session repeats it.
///
/// # Errors
/// When it, or one placement in it, is older than one that this host has obeyed.
pub fn accept(seen: &Seen, new: &Assignment) -> Result<(), Stale> {
    if new.generation < seen.generation {
        return Err(Stale::Generation { seen: seen.generation, new: new.generation });
    }
    for wish in &new.vms {
        match seen.epochs.get(&wish.vm) {
            Some(&epoch) if wish.epoch < epoch => {
                return Err(Stale::Epoch { generation: new.generation, vm: wish.vm, seen: epoch, new: wish.epoch });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Everything that can be done now to make the host what it should be; nothing when it is.
pub fn steps(wish: &Assignment, found: &Observed) -> Vec<Step> {
    let mut out = Vec::new();
    networks(wish, found, &mut out);
    fetches(wish, found, &mut out);
    // Nothing is said or done about a guest that is just being started: seen off, it may run by the time that anybody reads so.
    for vm in wish.vms.iter().filter(|vm| !found.set_going.contains(&vm.vm)) {
        if vm.power == Power::Arriving {
            moving::arrival(wish.generation, vm, found, &mut out);
            continue;
        }
        machine(wish.generation, vm, found, &mut out);
        moving::departure(wish.generation, vm, found, &mut out);
        backup::backup(wish.generation, vm, found, &mut out);
    }
    rehearsal::rehearsals(wish, found, &mut out);
    leftovers(wish, found, &mut out);
    image_reports(wish, found, &mut out);
    out
}

/// What a machine needs next.
enum Next {
    Do(Step),
    /// Something else has to happen first.
    Wait,
    /// It is as wished, or only the quorum can say what now.
    Rest {
        phase: Phase,
        reason: &'static str,
        retry: bool,
    },
}

const fn rest(phase: Phase) -> Next {
    Next::Rest { phase, reason: "", retry: false }
}

/// Off because it was wished so. Its owner may have changed their mind by the time that is read, and then it is no word of
/// the guest's: it is started again.
const OFF_AS_WISHED: Next = Next::Rest { phase: Phase::Stopped, reason: "", retry: true };

impl Observed {
    fn may_try(&self, subject: Subject, generation: u64) -> bool {
        let other = |failure: &Failure| !failure.permanent || generation > failure.generation;
        self.pause_is_over(subject) && self.failures.get(&subject).is_none_or(other)
    }

    fn pause_is_over(&self, subject: Subject) -> bool {
        self.failures.get(&subject).is_none_or(|failure| self.now_millis >= failure.not_before_millis)
    }

    /// The quorum was told that this attempt failed.
    fn given_up(&self, wish: &VmWish) -> bool {
        self.told.get(&wish.vm).is_some_and(|told| told.report.phase == Phase::Failed && told.is_about(wish))
    }

    /// The quorum knows that it is off, and its owner asked for it since.
    fn asked_again(&self, wish: &VmWish) -> bool {
        let told = self.told.get(&wish.vm).filter(|told| told.report.epoch == wish.epoch);
        told.is_some_and(|told| told.report.phase == Phase::Stopped && told.attempt < wish.attempt)
    }

    /// Nothing is here that this placement made, unless it came to be and is kept.
    fn free_of(&self, wish: &VmWish) -> bool {
        let memory = self.memory(wish);
        let made = self.guest(wish).is_some_and(|guest| guest.epoch == wish.epoch);
        memory.existed || !(memory.begun || made)
    }

    /// All of it is here, and what it stands on.
    pub fn holds(&self, image: &ImageWish) -> bool {
        image.digests().all(|digest| self.images.contains_key(&digest))
    }

    fn first_missing(&self, image: &ImageWish) -> Option<ImageWish> {
        image.first_missing(|digest| self.images.contains_key(&digest))
    }

    fn guest(&self, wish: &VmWish) -> Option<FoundGuest> {
        self.guests.get(&wish.vm).copied()
    }

    /// Memory of an earlier placement is no memory of this one. A guest that nobody remembers was started before the
    /// memory was lost: it is taken as it is, rather than booted again.
    pub fn memory(&self, wish: &VmWish) -> Memory {
        let kept = self.memories.get(&wish.vm).filter(|kept| kept.epoch == wish.epoch);
        let existed = self.guest(wish).is_some_and(|guest| guest.epoch == wish.epoch);
        let rebooted = if existed { wish.reboots } else { 0 };
        kept.copied().unwrap_or(Memory { epoch: wish.epoch, rebooted, existed, ran: existed, ..Memory::default() })
    }

    /// The failure that keeps a machine from its wish and is worth telling: its own, or that of what it waits for.
    fn failure(&self, wish: &VmWish) -> Option<&Failure> {
        let up =
            self.guest(wish).is_some_and(|guest| matches!(guest.power, FoundPower::Running | FoundPower::Suspended));
        let starts = !up && matches!(wish.power, Power::Running | Power::Suspended | Power::Arriving);
        let image = self.first_missing(&wish.image).filter(|_| starts).map(|image| Subject::Image(image.digest));
        let networks = wish.nics.iter().filter(|nic| starts && self.networks.get(&nic.vni) != Some(&true));
        iter::once(Subject::Vm(wish.vm))
            .chain(image)
            .chain(networks.map(|nic| Subject::Network(nic.vni)))
            .filter_map(|subject| self.failures.get(&subject))
            .find(|failure| failure.is_news())
    }
}

impl Failure {
    fn is_news(&self) -> bool {
        self.permanent || self.count >= FAILURES_BEFORE_REPORT
    }
}

fn networks(wish: &Assignment, found: &Observed, out: &mut Vec<Step>) {
    for network in &wish.networks {
        let complete = found.networks.get(&network.vni) == Some(&true);
        if !complete && found.may_try(Subject::Network(network.vni), wish.generation) {
            out.push(Step::EnsureNetwork(network.clone()));
        }
    }
}

fn fetches(wish: &Assignment, found: &Observed, out: &mut Vec<Step>) {
    let bases = wish.vms.iter().filter(|vm| match vm.power {
        Power::Running | Power::Suspended | Power::Arriving => true,
        Power::Stopped => found.guest(vm).is_some(),
        Power::Absent => false,
    });
    let mut asked = BTreeSet::new();
    let rehearsed = wish.rehearsals.iter().map(|rehearsal| &rehearsal.base);
    for image in wish.images.iter().chain(bases.map(|vm| &vm.image)).chain(rehearsed) {
        let missing = found.first_missing(image).filter(|image| asked.insert(image.digest));
        let may_try = |image: &ImageWish| found.may_try(Subject::Image(image.digest), wish.generation);
        out.extend(missing.filter(may_try).map(Step::FetchImage));
    }
}

fn machine(generation: u64, wish: &VmWish, found: &Observed, out: &mut Vec<Step>) {
    let (phase, reason, retry) = match next(wish, found) {
        Next::Rest { phase, reason, retry } => (phase, reason.to_owned(), retry),
        _ if wish.power != Power::Absent && found.given_up(wish) => return,
        pending => {
            let failure = found.failure(wish);
            let clean_up = failure.is_some() && wish.power != Power::Absent && !found.free_of(wish);
            let step = match pending {
                _ if clean_up => Some(Step::Remove(wish.vm)),
                Next::Do(step) if failure.is_none() || wish.power == Power::Absent => Some(step),
                _ => None,
            };
            let subject = Subject::Vm(wish.vm);
            let may_try = if clean_up { found.pause_is_over(subject) } else { found.may_try(subject, generation) };
            out.extend(step.filter(|_| may_try));
            match failure {
                Some(failure) if !clean_up => (Phase::Failed, failure.reason.clone(), !failure.permanent),
                _ => return,
            }
        }
    };
    let rebooted = found.memory(wish).rebooted;
    let report = VmReport { vm: wish.vm, epoch: wish.epoch, attempt: wish.attempt, phase, rebooted, reason, retry };
    if found.told.get(&wish.vm).is_none_or(|told| !told.says(wish, &report)) {
        out.push(Step::Report(report));
    }
}

impl Told {
    /// Reasons may carry numbers that change with each try; that alone is not worth a log entry. That the machine was
    /// asked for something is: the quorum waits for an answer, even when there was nothing to do.
    fn says(&self, wish: &VmWish, report: &VmReport) -> bool {
        let key = |r: &VmReport| (r.epoch, r.phase, r.rebooted, r.retry);
        self.is_about(wish) && key(&self.report) == key(report)
    }

    fn is_about(&self, wish: &VmWish) -> bool {
        (self.report.epoch, self.attempt, self.power) == (wish.epoch, wish.attempt, wish.power)
    }
}

fn next(wish: &VmWish, found: &Observed) -> Next {
    let memory = found.memory(wish);
    match (wish.power, found.guest(wish)) {
        // The wish is older than the guest: another assignment made it, and a newer one will come.
        (_, Some(guest)) if guest.epoch > wish.epoch => Next::Wait,
        (Power::Absent, None) if memory.removed => rest(Phase::Absent),
        (Power::Absent, _) => Next::Do(Step::Remove(wish.vm)),
        (_, Some(guest)) if guest.epoch < wish.epoch => Next::Do(Step::Quarantine { vm: wish.vm, epoch: guest.epoch }),
        (Power::Stopped, None) => OFF_AS_WISHED,
        (_, Some(guest)) if moving::comes_first(wish, guest.power, memory) => moving::settle(wish, guest.power, memory),
        (Power::Stopped, Some(guest)) => stop(wish, guest.power, memory, found.now_millis),
        (Power::Arriving, _) => Next::Wait,
        (Power::Running | Power::Suspended, None) => start(wish, found, memory, false),
        (Power::Running | Power::Suspended, Some(guest)) => keep_on(wish, guest.power, found, memory),
    }
}

fn stop(wish: &VmWish, power: FoundPower, memory: Memory, now_millis: u64) -> Next {
    let since = |then: u64| now_millis.saturating_sub(then);
    match power {
        FoundPower::OffByGuest | FoundPower::OffByAgent | FoundPower::Crashed => OFF_AS_WISHED,
        FoundPower::Arriving | FoundPower::Arrived | FoundPower::Moved => Next::Wait,
        _ if wish.stop_grace_millis == 0 => Next::Do(Step::PowerOff(wish.vm)),
        _ if memory.pressed_first_millis.is_some_and(|at| since(at) >= wish.stop_grace_millis) => {
            Next::Do(Step::PowerOff(wish.vm))
        }
        // A suspended guest cannot hear the button.
        FoundPower::Suspended => Next::Do(Step::Resume(wish.vm)),
        FoundPower::Running if memory.pressed_last_millis.is_some_and(|at| since(at) < PRESS_AGAIN_MILLIS) => {
            Next::Wait
        }
        FoundPower::Running => Next::Do(Step::PressPower(wish.vm)),
    }
}

fn start(wish: &VmWish, found: &Observed, memory: Memory, after_crash: bool) -> Next {
    if moving::may_have_left(wish, memory) {
        return Next::Wait;
    }
    if !found.holds(&wish.image) {
        return Next::Wait;
    }
    if !memory.disk_made {
        return Next::Do(if memory.ran { Step::CheckDisk(wish.vm) } else { Step::MakeDisk(wish.vm) });
    }
    if wish.nics.iter().any(|nic| found.networks.get(&nic.vni) != Some(&true)) {
        return Next::Wait;
    }
    Next::Do(Step::Start { vm: wish.vm, reboots: wish.reboots, after_crash })
}

fn keep_on(wish: &VmWish, power: FoundPower, found: &Observed, memory: Memory) -> Next {
    let reboot_due = wish.reboots > memory.rebooted;
    match (power, wish.power) {
        (FoundPower::Arriving | FoundPower::Arrived | FoundPower::Moved, _) => Next::Wait,
        // Pressed before its owner changed their mind: it may still go down, and is started again then.
        (FoundPower::OffByGuest, _) if !memory.wished_off && !reboot_due && !found.asked_again(wish) => {
            Next::Rest { phase: Phase::Stopped, reason: "the guest switched itself off", retry: false }
        }
        (FoundPower::OffByGuest | FoundPower::OffByAgent, _) => start(wish, found, memory, false),
        (FoundPower::Crashed, _) if wish.recovery == Recovery::None && !found.asked_again(wish) => {
            Next::Rest { phase: Phase::Stopped, reason: "it went down, and is not to be started again", retry: false }
        }
        (FoundPower::Crashed, _) => start(wish, found, memory, true),
        (FoundPower::Running, Power::Suspended) => Next::Do(Step::Suspend(wish.vm)),
        (FoundPower::Suspended, Power::Suspended) => rest(Phase::Suspended),
        (FoundPower::Suspended, _) => Next::Do(Step::Resume(wish.vm)),
        (FoundPower::Running, _) if reboot_due => Next::Do(Step::Reset { vm: wish.vm, reboots: wish.reboots }),
        (FoundPower::Running, _) => rest(Phase::Running),
    }
}

/// What is here and in no wish. Networks go last: a guest that is still here may be plugged into one of them.
fn leftovers(wish: &Assignment, found: &Observed, out: &mut Vec<Step>) {
    let wished: BTreeMap<VmId, &VmWish> = wish.vms.iter().map(|vm| (vm.vm, vm)).collect();
    for (vm, guest) in &found.guests {
        let spared = wish.spared.as_ref().is_some_and(|spared| spared.contains(vm));
        if !wished.contains_key(vm) && !spared && found.may_try(Subject::Vm(*vm), wish.generation) {
            out.push(Step::Quarantine { vm: *vm, epoch: guest.epoch });
        }
    }
    let all_wanted = found
        .guests
        .iter()
        .all(|(vm, guest)| wished.get(vm).is_some_and(|wish| wish.power != Power::Absent && wish.epoch == guest.epoch));
    let plugged = wish.vms.iter().filter(|vm| vm.power != Power::Absent).flat_map(|vm| &vm.nics).map(|nic| nic.vni);
    let vnis: BTreeSet<u32> = wish.networks.iter().map(|network| network.vni).chain(plugged).collect();
    for vni in found.networks.keys() {
        if all_wanted && !vnis.contains(vni) && found.may_try(Subject::Network(*vni), wish.generation) {
            out.push(Step::RemoveNetwork(*vni));
        }
    }
    let bases = wish.vms.iter().map(|vm| &vm.image);
    let rehearsed = wish.rehearsals.iter().map(|rehearsal| &rehearsal.base);
    let kept: BTreeSet<Digest> =
        wish.images.iter().chain(bases).chain(rehearsed).flat_map(ImageWish::digests).collect();
    for (digest, idle_millis) in &found.images {
        let wanted =
            kept.contains(digest) || found.pinned_images.contains(digest) || !all_wanted || wish.spared.is_some();
        if !wanted && *idle_millis >= IMAGE_IDLE_MILLIS && found.may_try(Subject::Image(*digest), wish.generation) {
            out.push(Step::DropImage(*digest));
        }
    }
}

fn image_reports(wish: &Assignment, found: &Observed, out: &mut Vec<Step>) {
    for image in &wish.images {
        let told = found.told_images.get(&image.digest).copied();
        let given_up = |digest| found.failures.get(&Subject::Image(digest)).is_some_and(Failure::is_news);
        let news = match found.images.contains_key(&image.digest) {
            // It is of use once all that it stands on is here as well; that something of this is lost is told of that.
            true => (told != Some(true) && found.holds(image)).then_some(true),
            // Not held yet is no news; lost, or not to be had, is.
            false => (told == Some(true) || (told.is_none() && image.digests().any(given_up))).then_some(false),
        };
        if let Some(good) = news {
            out.push(Step::ReportImage(ImageReport { digest: image.digest, good }));
        }
    }
}

#[cfg(test)]
mod tests;
