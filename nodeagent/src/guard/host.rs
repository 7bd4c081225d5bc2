//! What the guard asks of the kernel: to be scheduled first, to stay in memory, to be killed last, and to be woken in
//! time. A host that refuses one of the first three is guarded all the same, and says so.

use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

use nix::libc;

/// The smallest that a page is.
const PAGE_BYTES: usize = 4096;
/// Three quarters of the stack of a thread of the guard: above it lie the frames of its start.
const TOUCHED_STACK_BYTES: usize = super::STACK_BYTES / 4 * 3;

/// Of all processes, this one last: it is small, and what it prevents is worse.
pub fn spare_from_memory_shortage() {
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::warn!(%error, "the kernel may end the guard when memory is short");
    }
}

/// Whatever this process has touched, now and later, stays: it need not be read from a disk again. The rest of the program,
/// which is most of it, is not brought in for that.
pub fn keep_in_memory() {
    // SAFETY: no memory is passed.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } != 0 {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, "the guard's memory is not locked: a slow disk may make it late");
    }
}

/// Touches the calling thread's stack as deep as the guard's threads ever go, so that no page of it is missing later.
pub fn touch_stack() {
    let mut space = [0u8; TOUCHED_STACK_BYTES];
    for at in (0..space.len()).step_by(PAGE_BYTES) {
        // SAFETY: within the array. Volatile, because nobody reads it.
        unsafe { ptr::write_volatile(space.as_mut_ptr().add(at), 1) };
    }
}

/// Real-time priority for the calling thread.
pub fn prefer(priority: i32) {
    let wanted = libc::sched_param { sched_priority: priority };
    // SAFETY: `wanted` is valid for the length of the call; 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &wanted) } != 0 {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, "the guard has no real-time priority: a busy host may make it late");
    }
}

/// Something to wait for: a moment on CLOCK_BOOTTIME, or a ring by another thread.
pub struct Timer(OwnedFd);

impl Timer {
    /// Its moments pass also while the machine sleeps, so that it rings as soon as it wakes.
    pub fn boottime() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        Self::owned(unsafe { libc::timerfd_create(libc::CLOCK_BOOTTIME, libc::TFD_CLOEXEC) })
    }

    pub fn event() -> io::Result<Self> {
        // SAFETY: no memory is passed.
        Self::owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })
    }

    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    pub fn wait_until(&self, boottime_nanos: u64) {
        let at = libc::timespec {
            tv_sec: i64::try_from(boottime_nanos / 1_000_000_000).unwrap_or(i64::MAX),
            tv_nsec: (boottime_nanos % 1_000_000_000) as i64,
        };
        let never = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let spec = libc::itimerspec { it_interval: never, it_value: at };
        // SAFETY: `spec` is valid for the length of the call.
        unsafe { libc::timerfd_settime(self.0.as_raw_fd(), libc::TFD_TIMER_ABSTIME, &spec, ptr::null_mut()) };
        self.take();
    }

    /// Wakes whoever waits in `heard_within`.
    pub fn ring(&self) {
        let one = 1u64;
        // SAFETY: eight bytes are read from `one`. A counter that is full has rung already.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Waits for a ring, but not longer than that.
    pub fn heard_within(&self, millis: i32) {
        let mut wait = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: `wait` is one pollfd, valid for the length of the call.
        if unsafe { libc::poll(&mut wait, 1, millis) } > 0 {
            self.take();
        }
    }

    fn take(&self) {
        let mut count = 0u64;
        // SAFETY: eight bytes are written to `count`. When it is interrupted, the caller looks once too often.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }

    fn owned(fd: i32) -> io::Result<Self> {
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}
