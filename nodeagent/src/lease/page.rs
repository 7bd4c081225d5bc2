//! What the agent tells the guard, and the guard the agent: a small file in the data directory that both have mapped,
//! so that neither waits for the other.
//!
//! ```text
//! word 0           the permits written so far; the last one is in slot (that number modulo 2)
//! slot 0, slot 1   boot, incarnation, until, number of machines, then (vm, epoch, standing) each
//! the guard's      its process, when it last looked, what it is, number of guests that it stopped, then (pid, start) each;
//!                  whether it feeds a watchdog
//! ```
//!
//! The agent writes the slot that is not in force, then counts up: a writer that is killed in the middle leaves the old
//! permit whole, and a reader whose count has not moved has read one permit. A permit of another boot of the machine
//! counts as none: its clock was another. The guard reads what it has locked in memory, so reading never waits.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::Path,
    ptr,
    sync::atomic::{AtomicU64, Ordering, fence},
};

use model::VmId;
use nix::libc;

use super::{Machine, Permit, Standing};
use crate::clock;

/// Machines that a permit names. A host with so many has no memory left for each to boot in.
pub const MOST_MACHINES: usize = 2048;

/// A guard looks five times a second; one that has not for so long is stuck, or gone.
const STALE_NANOS: u64 = 3_000_000_000;
const FILE: &str = "guard.page";
const SLOT_HEADER: usize = 4;
const SLOT: usize = SLOT_HEADER + 3 * MOST_MACHINES;
const GUARD: usize = 1 + 2 * SLOT;
const GUARD_HEADER: usize = 4;
/// Last, so that a guard of an earlier build finds what it knows in its place.
const WATCHDOG: usize = GUARD + GUARD_HEADER + 2 * MOST_MACHINES;
const WORDS: usize = WATCHDOG + 1;
/// The smallest that a page of memory is.
const WORDS_OF_A_PAGE: usize = 4096 / size_of::<AtomicU64>();
/// The writer comes by twice a second, so a reader is interrupted once at most, unless the file is nonsense.
const MOST_READS: usize = 100;

pub struct Page {
    words: &'static [AtomicU64],
    file: std::fs::File,
    boot: u64,
}

/// What the guard says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuardSign {
    pub pid: u32,
    /// When it last looked, on CLOCK_BOOTTIME in nanoseconds.
    pub looked_at: u64,
    /// Which program it is: another one should take its place.
    pub build: u64,
    pub stopped: u64,
    /// It feeds the machine's watchdog.
    pub watchdog: bool,
}

impl GuardSign {
    /// Whether it has looked lately.
    pub fn is_fresh(&self, now: u64) -> bool {
        now.checked_sub(self.looked_at).is_some_and(|ago| ago < STALE_NANOS)
    }
}

/// A process by what names it for ever: its id, and when it started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    pub pid: u32,
    pub start_time: u64,
}

impl Page {
    /// # Errors
    /// When the file cannot be made or mapped.
    pub fn open(data: &Path) -> io::Result<Self> {
        let path = data.join(FILE);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let bytes = WORDS * size_of::<AtomicU64>();
        if file.metadata()?.len() < bytes as u64 {
            file.set_len(bytes as u64)?;
        }
        // SAFETY: a new shared mapping of a file that is long enough; nobody shortens it.
        let at = unsafe {
            let both = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), bytes, both, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping is that long, aligned to a page, and stays until this value is dropped.
        let words = unsafe { std::slice::from_raw_parts(at.cast::<AtomicU64>(), WORDS) };
        Ok(Self { words, file, boot: boot_number() })
    }

    /// Whether the file is still in its directory; one that is not belongs to nobody any more.
    pub fn is_linked(&self) -> bool {
        self.file.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
    }

    /// Puts a permit in force. Only the agent does, which holds the data directory's lock.
    pub fn write(&self, permit: &Permit) {
        let count = self.words[0].load(Ordering::Relaxed).wrapping_add(1);
        if permit.machines.len() > MOST_MACHINES {
            tracing::error!(most = MOST_MACHINES, "more machines than the guard can be told of; the last are left out");
        }
        // What is written next must not be seen before the last count is.
        fence(Ordering::Release);
        let slot = self.slot(count);
        let machines = permit.machines.iter().take(MOST_MACHINES);
        slot[0].store(self.boot, Ordering::Relaxed);
        slot[1].store(permit.incarnation, Ordering::Relaxed);
        slot[2].store(permit.until, Ordering::Relaxed);
        slot[3].store(machines.len() as u64, Ordering::Relaxed);
        for (at, machine) in slot[SLOT_HEADER..].chunks_exact(3).zip(machines) {
            at[0].store(machine.vm.0, Ordering::Relaxed);
            at[1].store(machine.epoch, Ordering::Relaxed);
            at[2].store(machine.standing as u64, Ordering::Relaxed);
        }
        self.words[0].store(count, Ordering::Release);
    }

    /// The permit in force; an empty one when there is none of this boot. Allocates nothing when `into` has room.
    pub fn read(&self, into: &mut Permit) {
        for _ in 0..MOST_READS {
            let count = self.words[0].load(Ordering::Acquire);
            self.copy(count, into);
            fence(Ordering::Acquire);
            if self.words[0].load(Ordering::Relaxed) == count {
                return;
            }
        }
        (into.incarnation, into.until) = (0, 0);
    }

    fn copy(&self, count: u64, into: &mut Permit) {
        let slot = self.slot(count);
        let word = |at: usize| slot[at].load(Ordering::Relaxed);
        into.machines.clear();
        let ours = word(0) == self.boot;
        (into.incarnation, into.until) = if ours { (word(1), word(2)) } else { (0, 0) };
        let machines = if ours { usize::try_from(word(3)).unwrap_or(0).min(MOST_MACHINES) } else { 0 };
        for at in slot[SLOT_HEADER..].chunks_exact(3).take(machines) {
            let [vm, epoch, standing] = [0, 1, 2].map(|i: usize| at[i].load(Ordering::Relaxed));
            into.machines.push(Machine { vm: VmId(vm), epoch, standing: standing_of(standing) });
        }
    }

    /// The guard's word about itself; `None` when none of this boot has spoken.
    pub fn sign(&self) -> Option<GuardSign> {
        let word = |at: usize| self.words[GUARD + at].load(Ordering::Relaxed);
        let pid = u32::try_from(word(0)).ok().filter(|pid| *pid != 0)?;
        Some(GuardSign {
            pid,
            looked_at: word(1),
            build: word(2),
            stopped: word(3),
            watchdog: word(WATCHDOG - GUARD) == 1,
        })
    }

    /// Only the guard that holds the guards' lock says so.
    pub fn write_watchdog(&self, fed: bool) {
        self.words[WATCHDOG].store(fed.into(), Ordering::Relaxed);
    }

    /// Brings all of it into this process's memory.
    pub fn touch(&self) {
        for word in self.words.iter().step_by(WORDS_OF_A_PAGE).chain(self.words.last()) {
            std::hint::black_box(word.load(Ordering::Relaxed));
        }
    }

    /// Only the guard that holds the guards' lock signs.
    pub fn write_sign(&self, pid: u32, looked_at: u64, build: u64) {
        for (at, value) in [u64::from(pid), looked_at, build].into_iter().enumerate() {
            self.words[GUARD + at].store(value, Ordering::Relaxed);
        }
    }

    /// What guards of this data directory have stopped and not let go on since.
    pub fn stopped(&self) -> Vec<Stopped> {
        let most = self.words[GUARD + 3].load(Ordering::Acquire);
        let word = |at: &AtomicU64| at.load(Ordering::Relaxed);
        let listed = self.words[GUARD + GUARD_HEADER..].chunks_exact(2).take(usize::try_from(most).unwrap_or(0));
        listed.filter_map(|at| Some(Stopped { pid: word(&at[0]).try_into().ok()?, start_time: word(&at[1]) })).collect()
    }

    /// Only the guard that holds the guards' lock lists.
    pub fn write_stopped(&self, stopped: &[Stopped]) {
        let stopped = &stopped[..stopped.len().min(MOST_MACHINES)];
        for (at, process) in self.words[GUARD + GUARD_HEADER..].chunks_exact(2).zip(stopped) {
            at[0].store(process.pid.into(), Ordering::Relaxed);
            at[1].store(process.start_time, Ordering::Relaxed);
        }
        self.words[GUARD + 3].store(stopped.len() as u64, Ordering::Release);
    }

    fn slot(&self, count: u64) -> &[AtomicU64] {
        let start = 1 + if count.is_multiple_of(2) { 0 } else { SLOT };
        &self.words[start..start + SLOT]
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: it was mapped by `open` with this length, and nothing borrows it any more.
        unsafe { libc::munmap(self.words.as_ptr().cast_mut().cast(), size_of_val(self.words)) };
    }
}

/// What cannot be understood may not run.
fn standing_of(word: u64) -> Standing {
    [Standing::Leased, Standing::Free].into_iter().find(|s| *s as u64 == word).unwrap_or(Standing::Denied)
}

/// This boot of the machine, as a number; never 0, which an empty page has.
fn boot_number() -> u64 {
    let digest = blake3::hash(clock::boot_id().as_bytes());
    u64::from_le_bytes(digest.as_bytes()[..8].try_into().unwrap_or_default()) | 1
}

#[cfg(test)]
mod tests;
