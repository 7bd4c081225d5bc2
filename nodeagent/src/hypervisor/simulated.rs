//! Guests that exist only on paper: the same trait with realistic delays and failures, for tests, for large clouds on
//! one machine, and for machines without virtualisation.
//!
//! A guest is a record in its folder, so it "runs" on while the agent is dead, and is found by the next one. What a
//! real guest does by itself (obey the power button after a while, crash, shut down) happens when the records are next
//! looked at. Whatever this backs says `simulated`. Deliberately not here: images, networks, and any real work.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard},
    thread,
    time::Duration,
};

use model::{Capacity, Digest, HypervisorKind, VmId, telemetry::NodeStatus};
use nix::time::{ClockId, clock_gettime};

use super::{
    Backup, Guest, GuestSpec, GuestUsage, Hypervisor, HypervisorError, OffReason, Parent, Result,
    guest_dir::GuestDirs,
    job::Job,
    migration::{Destination, Route},
    qcow2,
    rehearsal::{Rehearsal, Rehearsed},
};
use crate::{
    clock,
    lease::{Permit, Verdict},
};

mod at_rest;
mod backup;
mod control;
mod effect;
mod migration;
pub mod outside;
mod record;
mod rehearsal;

use control::Control;
use effect::{Effect, EffectLog};
use record::{Power, SimGuest};

/// What a step takes at scale 1000 (thousandths): as measured with libvirt and software emulation on a busy host.
const MAKE_DISK_MILLIS: u64 = 50;
const START_MILLIS: u64 = 900;
const SUSPEND_MILLIS: u64 = 50;
const SHUTDOWN_MILLIS: u64 = 2_800;
const POWER_OFF_MILLIS: u64 = 300;

#[derive(Clone, Debug)]
pub struct SimulatedConfig {
    pub dir: PathBuf,
    pub cluster: String,
    /// Names this host in the effect log.
    pub host: String,
    pub capacity: Capacity,
    /// Delays in thousandths of the realistic ones; 0 for unit tests.
    pub delay_permille: u64,
    /// Of a thousand disks made or guests started, so many fail, and may succeed when tried again.
    pub failure_permille: u64,
    pub seed: u64,
    /// For a harness: one JSON line for each effect on a guest, what really happened.
    pub effects: Option<PathBuf>,
}

pub struct Simulated {
    config: SimulatedConfig,
    dirs: GuestDirs,
    effects: EffectLog,
    state: Mutex<State>,
}

struct State {
    guests: BTreeMap<VmId, SimGuest>,
    /// The end of the lease when guests were last held to it; 0: never. CLOCK_BOOTTIME.
    lease_end_nanos: u64,
    random: u64,
}

impl Simulated {
    /// # Errors
    /// When the folders cannot be made or read.
    pub fn open(config: SimulatedConfig) -> Result<Self> {
        let dirs = GuestDirs::open(&config.dir)?;
        let mut guests = BTreeMap::new();
        for vm in dirs.vms()? {
            match dirs.read::<SimGuest>(vm)? {
                Some(guest) if guest.power != Power::Made => {
                    backup::clear(&dirs, vm)?;
                    guests.insert(vm, guest);
                }
                // Made and never started, or torn: there is nothing in it.
                _ => dirs.remove(vm)?,
            }
        }
        let effects = EffectLog::new(config.effects.clone(), config.host.clone());
        let state = Mutex::new(State { guests, lease_end_nanos: 0, random: config.seed });
        let simulated = Self { config, dirs, effects, state };
        simulated.end_those_of_an_earlier_boot()?;
        // An agent that was killed between the two had noted the end and not told of it.
        for guest in simulated.lock().guests.values().filter(|guest| !guest.is_on()) {
            simulated.effects.append(guest, Effect::Stop);
        }
        Ok(simulated)
    }

    /// From now on the guest does not hear its power button.
    ///
    /// # Errors
    /// When there is no such guest.
    pub fn ignore_power_button(&self, vm: VmId) -> Result<()> {
        self.change(vm, |guest| guest.ignores_button = true)
    }

    /// The guest dies as if its process were killed.
    ///
    /// # Errors
    /// When its record cannot be written.
    pub fn crash(&self, vm: VmId) -> Result<()> {
        self.end(vm, OffReason::Crashed)
    }

    /// The guest shuts itself down.
    ///
    /// # Errors
    /// When its record cannot be written.
    pub fn shut_down_inside(&self, vm: VmId) -> Result<()> {
        self.end(vm, OffReason::ByGuest)
    }

    fn end_those_of_an_earlier_boot(&self) -> Result<()> {
        let boot = clock::boot_id();
        let old: Vec<_> = self.lock().guests.values().filter(|g| g.boot != boot).map(|g| g.vm).collect();
        old.into_iter().try_for_each(|vm| self.end(vm, OffReason::Crashed))
    }

    fn end(&self, vm: VmId, why: OffReason) -> Result<()> {
        let mut state = self.lock();
        match state.guests.get_mut(&vm) {
            Some(guest) if guest.is_on() => self.switch_off(guest, why),
            _ => Ok(()),
        }
    }

    fn switch_off(&self, guest: &mut SimGuest, why: OffReason) -> Result<()> {
        guest.power = Power::Off(why.into());
        guest.off_at_nanos = None;
        self.dirs.write(guest.vm, guest)?;
        self.effects.append(guest, Effect::Stop);
        Ok(())
    }

    fn change(&self, vm: VmId, change: impl FnOnce(&mut SimGuest)) -> Result<()> {
        let mut state = self.lock();
        let guest = state.guests.get_mut(&vm).ok_or_else(|| not_running(vm))?;
        change(guest);
        self.dirs.write(vm, guest)
    }

    /// Let happen what has happened by now: buttons that were obeyed, and what the control file asks for.
    fn look(&self) -> Result<MutexGuard<'_, State>> {
        if let Some(control) = Control::take(self.dirs.root())? {
            for vm in control.ignore_power_button {
                self.change(vm, |guest| guest.ignores_button = true)?;
            }
            control.crash.into_iter().try_for_each(|vm| self.crash(vm))?;
            control.shut_down.into_iter().try_for_each(|vm| self.shut_down_inside(vm))?;
            if control.power_failure {
                let all: Vec<_> = self.lock().guests.keys().copied().collect();
                all.into_iter().try_for_each(|vm| self.crash(vm))?;
            }
        }
        let mut state = self.lock();
        let now = now_nanos();
        for guest in state.guests.values_mut() {
            migration::note_arrival(&self.dirs, guest)?;
            if guest.is_on() && guest.off_at_nanos.is_some_and(|at| now >= at) {
                self.switch_off(guest, OffReason::ByAgent)?;
            }
        }
        Ok(state)
    }

    fn running<'a>(&self, state: &'a mut State, vm: VmId) -> Result<&'a mut SimGuest> {
        state.guests.get_mut(&vm).filter(|guest| guest.is_on()).ok_or_else(|| not_running(vm))
    }

    fn set_power(&self, vm: VmId, power: Power, effect: Effect) -> Result<()> {
        self.delay(SUSPEND_MILLIS);
        let mut state = self.look()?;
        let guest = self.running(&mut state, vm)?;
        if guest.power != power {
            guest.power = power;
            self.dirs.write(vm, guest)?;
            self.effects.append(guest, effect);
        }
        Ok(())
    }

    fn delay(&self, millis: u64) {
        thread::sleep(Duration::from_micros(millis * self.config.delay_permille));
    }

    /// Takes its time and counts; ends early when it must.
    fn work(&self, job: &Job, bytes: u64, millis: u64) -> Result<()> {
        const PARTS: u64 = 10;
        for part in 0..=PARTS {
            job.note(bytes / PARTS * part, bytes);
            if let Some(why) = job.must_end() {
                return Err(HypervisorError::Transient(why.into()));
            }
            self.delay(millis / PARTS);
        }
        Ok(())
    }

    /// Fails as often as configured, by a sequence that the seed decides.
    fn chance(&self, doing: &str) -> Result<()> {
        let mut state = self.lock();
        state.random = state.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        if mix(state.random) % 1000 < self.config.failure_permille {
            return Err(HypervisorError::Transient(format!("simulated failure {doing}")));
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Records are changed whole, so a panic elsewhere does not spoil them.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Hypervisor for Simulated {
    fn kind(&self) -> HypervisorKind {
        HypervisorKind::Simulated
    }

    fn capacity(&self) -> Result<Capacity> {
        Ok(self.config.capacity)
    }

    fn node_status(&self) -> Result<NodeStatus> {
        let (vcpus, all) = (self.config.capacity.vcpus.max(1), self.config.capacity);
        let (mut busy, mut memory, mut disk) = (0, 0, 0);
        let now = now_nanos();
        for guest in self.look()?.guests.values() {
            let usage = guest.usage(now);
            busy += if guest.power == Power::On { guest.vcpus * record::BUSY_PERMILLE } else { 0 };
            memory += usage.memory_used_bytes;
            disk += usage.disk_used_bytes;
        }
        Ok(NodeStatus {
            cpu_permille: (busy / vcpus).min(1000) as u32,
            memory_used_bytes: memory.min(all.memory_bytes),
            memory_total_bytes: all.memory_bytes,
            disk_used_bytes: disk.min(all.disk_bytes),
            disk_total_bytes: all.disk_bytes,
            watchdog: false,
        })
    }

    fn guests(&self) -> Result<Vec<Guest>> {
        let state = self.look()?;
        Ok(state.guests.values().filter_map(SimGuest::listed).collect())
    }

    fn usage(&self) -> Result<Vec<(VmId, GuestUsage)>> {
        let now = now_nanos();
        let state = self.look()?;
        Ok(state.guests.values().filter(|g| g.is_on()).map(|guest| (guest.vm, guest.usage(now))).collect())
    }

    fn bases(&self) -> Result<BTreeSet<PathBuf>> {
        let kept = self.dirs.all()?.into_iter().filter_map(|dir| record::read_kept(&dir));
        let with_parents = |base: PathBuf| qcow2::files_under(&base).into_iter().chain([base]).collect::<Vec<_>>();
        Ok(kept.flat_map(|guest| with_parents(guest.base)).collect())
    }

    fn make_disk(&self, spec: &GuestSpec) -> Result<()> {
        if let Some(guest) = self.look()?.guests.get(&spec.vm).filter(|guest| !guest.gives_way_to(spec)) {
            return guest.same_placement(spec);
        }
        self.delay(MAKE_DISK_MILLIS);
        self.chance("making the disk")?;
        if !spec.base_parents.is_empty() {
            let fit = qcow2::chain_is(&spec.base, &spec.base_parents);
            fit.map_err(|why| HypervisorError::Permanent(format!("the image {}: {why}", spec.base.display())))?;
        }
        if spec.size.disk_bytes < spec.base_virtual_bytes {
            return Err(HypervisorError::Permanent("the image is larger than the machine's disk".into()));
        }
        let mut state = self.lock();
        match state.guests.get(&spec.vm) {
            Some(guest) if guest.gives_way_to(spec) => self.dirs.remove(spec.vm)?,
            Some(guest) => return guest.same_placement(spec),
            None => {}
        }
        let guest = SimGuest::new(spec);
        self.dirs.create(spec.vm)?;
        self.dirs.write(spec.vm, &guest)?;
        state.guests.insert(spec.vm, guest);
        Ok(())
    }

    /// The record is all there is of a simulated disk.
    fn check_disk(&self, vm: VmId) -> Result<()> {
        if self.dirs.read::<SimGuest>(vm)?.is_some() {
            return Ok(());
        }
        Err(HypervisorError::Permanent(format!("its disk is gone: {}", self.dirs.dir(vm).display())))
    }

    fn start(&self, spec: &GuestSpec) -> Result<()> {
        let on_disk = self.dirs.read::<SimGuest>(spec.vm)?.is_some();
        match self.look()?.guests.get_mut(&spec.vm).filter(|_| on_disk) {
            Some(guest) if guest.is_coming() => {
                guest.same_placement(spec)?;
                return Err(migration::not_handed_over(spec.vm));
            }
            None => return Err(HypervisorError::Transient(format!("{} has no disk here", spec.vm))),
            Some(guest) => {
                guest.same_placement(spec)?;
                if guest.is_on() {
                    guest.off_at_nanos = None;
                    return self.dirs.write(spec.vm, guest);
                }
            }
        }
        self.delay(START_MILLIS);
        self.chance("starting the guest")?;
        let mut state = self.lock();
        let guest = state.guests.get_mut(&spec.vm).ok_or_else(|| not_running(spec.vm))?;
        if !guest.is_on() {
            guest.switch_on(spec, now_nanos());
            self.dirs.write(spec.vm, guest)?;
            self.effects.append(guest, Effect::Start);
        }
        Ok(())
    }

    fn suspend(&self, vm: VmId) -> Result<()> {
        self.set_power(vm, Power::Suspended, Effect::Suspend)
    }

    fn resume(&self, vm: VmId) -> Result<()> {
        self.set_power(vm, Power::On, Effect::Resume)
    }

    fn press_power(&self, vm: VmId) -> Result<()> {
        let suspended = match self.look()?.guests.get(&vm) {
            Some(guest) if guest.is_on() => guest.power == Power::Suspended,
            Some(guest) if guest.is_coming() => return Err(migration::not_handed_over(vm)),
            _ => return Ok(()),
        };
        if suspended {
            self.resume(vm)?;
        }
        let takes = SHUTDOWN_MILLIS * self.config.delay_permille * 1000;
        let press = |guest: &mut SimGuest| {
            if !guest.ignores_button {
                guest.off_at_nanos.get_or_insert(now_nanos() + takes);
            }
        };
        self.change(vm, press)
    }

    fn power_off(&self, vm: VmId) -> Result<()> {
        if self.look()?.guests.get(&vm).is_some_and(SimGuest::is_on) {
            self.delay(POWER_OFF_MILLIS);
        }
        self.end(vm, OffReason::ByAgent)
    }

    fn reset(&self, vm: VmId) -> Result<()> {
        let mut state = self.look()?;
        let guest = self.running(&mut state, vm)?;
        guest.power = Power::On;
        guest.off_at_nanos = None;
        self.dirs.write(vm, guest)
    }

    fn remove(&self, vm: VmId) -> Result<()> {
        self.power_off(vm)?;
        let mut state = self.lock();
        self.dirs.remove(vm)?;
        if let Some(guest) = state.guests.remove(&vm) {
            self.effects.append(&guest, Effect::Remove);
        }
        Ok(())
    }

    fn quarantine(&self, vm: VmId) -> Result<()> {
        self.power_off(vm)?;
        let mut state = self.lock();
        if let Some(guest) = state.guests.get(&vm) {
            self.dirs.quarantine(vm, guest.epoch)?;
            state.guests.remove(&vm);
        }
        Ok(())
    }

    fn back_up(&self, vm: VmId, parent: Option<&Parent>, job: &Job) -> Result<Backup> {
        backup::back_up(self, vm, parent, job)
    }

    fn backed_up(&self, vm: VmId, digest: Digest) -> Result<()> {
        backup::keep(self, vm, digest)
    }

    fn rehearse(&self, rehearsal: &Rehearsal, job: &Job) -> Result<Rehearsed> {
        rehearsal::rehearse(self, rehearsal, job)
    }

    fn prepare_migration(&self, spec: &GuestSpec) -> Result<Destination> {
        migration::prepare(self, spec)
    }

    fn migrate(&self, vm: VmId, to: &Destination, _route: &Route, job: &Job) -> Result<()> {
        migration::migrate(self, vm, to, job)
    }

    fn disk_at_rest(&self, vm: VmId) -> Result<Option<PathBuf>> {
        at_rest::disk(self, vm)
    }

    fn take_in(&self, spec: &GuestSpec, disk: &Path) -> Result<()> {
        at_rest::take_in(self, spec, disk)
    }

    fn let_go(&self, vm: VmId) -> Result<()> {
        at_rest::let_go(self, vm)
    }

    fn finish_migration(&self, spec: &GuestSpec, run: bool) -> Result<()> {
        migration::finish(self, spec, run)
    }

    fn cancel_migration(&self, vm: VmId) -> Result<()> {
        migration::cancel(self, vm)
    }

    /// In place of a guard that nothing holds up: what it stops has stopped at the end of the lease, also when this
    /// process was not there to see it.
    fn enforce(&self, permit: &Permit, boottime_nanos: u64) -> Result<()> {
        let mut state = self.lock();
        let ended = [permit.until, state.lease_end_nanos].into_iter().find(|end| (1..=boottime_nanos).contains(end));
        state.lease_end_nanos = permit.until;
        let (slept, now) = (clock::boottime_nanos().saturating_sub(now_nanos()), now_nanos());
        let ended = ended.map_or(now, |end| end.saturating_sub(slept));
        for guest in state.guests.values_mut().filter(|guest| guest.is_on()) {
            let held = match permit.verdict(guest.vm, Some(guest.epoch), boottime_nanos) {
                Verdict::Stop => true,
                Verdict::Run => false,
                Verdict::Leave => continue,
            };
            if held != guest.held {
                guest.held = held;
                // One that was started since ran until now.
                let stopped = if ended > guest.on_since_nanos { ended } else { now };
                let (effect, time) = if held { (Effect::Pause, stopped) } else { (Effect::Continue, now) };
                self.effects.append_at(time, guest, effect);
                self.dirs.write(guest.vm, guest)?;
            }
        }
        Ok(())
    }

    fn console_log(&self, vm: VmId, max_bytes: usize) -> Result<Vec<u8>> {
        let state = self.look()?;
        let Some(guest) = state.guests.get(&vm) else { return Ok(vec![]) };
        let text = format!(
            "This machine is simulated: nothing runs and there is no console.\n{} host={} placement={} power={:?}\n",
            guest.hostname, self.config.host, guest.epoch, guest.power
        );
        let from = text.len().saturating_sub(max_bytes);
        Ok(text.into_bytes().split_off(from))
    }
}

fn not_running(vm: VmId) -> HypervisorError {
    HypervisorError::Transient(format!("{vm} is not running here"))
}

/// CLOCK_MONOTONIC: one clock for all processes of a machine, never set back.
fn now_nanos() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    now.as_nanos() as u64
}

/// SplitMix64's output function.
fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
