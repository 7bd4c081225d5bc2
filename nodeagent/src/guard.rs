//! `trefoil agent guard`: stops guests that must not run twice when the host's lease ends, whatever has become of the
//! agent and of libvirtd.
//!
//! ```text
//!   agent ──► page (shared memory) ──► deadline thread ── SIGSTOP, SIGCONT by pidfd ──► QEMU
//!                                         ▲   timer on CLOCK_BOOTTIME at the end of the lease
//!   /proc ──► look-out thread ── roster ──┘
//! ```
//!
//! The deadline thread waits for nothing but its timer: real-time priority, nothing allocated, no file read or written, no
//! log. What it will need of code and memory it uses once before it begins, on processes that do not exist; what was used is
//! locked in memory, so that the end of a lease meets no page that has to be fetched. What can block (`/proc`, the page's writes, the log) is the look-out's. A guest that is
//! stopped here and comes to be permitted again goes on; one that nobody names is left as it is.
//!
//! One guard works for a data directory; a second one waits for its end and takes over. It outlives the agent.
//! Deliberately not here: who may run (`lease`), and what becomes of a guest that was given away (the agent, later).

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use model::VmId;

use crate::{
    clock,
    hypervisor::qemu_process::QemuProcess,
    lease::{
        Machine, Permit, Standing,
        page::{MOST_MACHINES, Page},
    },
    membership::{self, MembershipError},
};
use host::{Timer, keep_in_memory, prefer, spare_from_memory_shortage, touch_stack};
use look_out::LookOut;
use roster::{Held, Roster};
use watchdog::Watchdog;

mod host;
mod look_out;
mod roster;
pub mod supervisor;
mod watchdog;

/// How often the deadline thread looks at the page besides the end of the lease: a permit that is taken away, or given
/// again, takes effect within it.
const GLANCE_NANOS: u64 = 100_000_000;
/// Above everything that is not itself real-time; the look-out below it, so that it never holds the deadline up.
const DEADLINE_PRIORITY: i32 = 50;
const LOOK_OUT_PRIORITY: i32 = 40;
/// What is touched of a stack is locked in memory; these threads need little.
const STACK_BYTES: usize = 256 << 10;
/// What is worth telling comes one at a time; more than so many at once are not read by anybody.
const MOST_UNTOLD: usize = 64;
const LOCK: &str = "guard.lock";

#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    #[error("{0}")]
    Membership(#[from] MembershipError),
    #[error("cannot {what}")]
    Io { what: &'static str, source: io::Error },
    #[error("{0}")]
    Watchdog(String),
}

#[derive(Clone, Debug)]
pub struct GuardConfig {
    /// The agent's data directory.
    pub data: PathBuf,
    /// Fed while all is well; it resets the machine when guard and agent are both gone.
    pub watchdog: Option<PathBuf>,
}

/// What the two threads share.
struct Shared {
    page: Page,
    roster: Roster,
    /// When the look-out last saw that nothing runs that may not, on CLOCK_BOOTTIME in nanoseconds.
    settled_at: AtomicU64,
    /// Set by the deadline thread when it stopped something, or let it go on: the look-out looks at once.
    acted: AtomicBool,
}

/// Guards until the data directory is removed or the process is ended. Waits first while another guard works.
///
/// # Errors
/// When the directory is no member's, the page cannot be mapped, or the watchdog cannot be had.
pub fn run(config: &GuardConfig) -> Result<(), GuardError> {
    let cluster = membership::cluster_of(&config.data)?;
    let lock = lock_file(&config.data)?;
    lock.lock().map_err(failed("wait for the guards' lock"))?;
    let page = Page::open(&config.data).map_err(failed("map the guard's page"))?;
    let watchdog = config.watchdog.as_deref().map(Watchdog::open).transpose().map_err(GuardError::Watchdog)?;
    if watchdog.is_none() {
        tracing::warn!(
            "no watchdog: when agent, guard and the host's kernel hang together, guests that must not run twice go on"
        );
    }
    spare_from_memory_shortage();
    keep_in_memory();
    page.write_watchdog(watchdog.is_some());
    let shared = Arc::new(Shared {
        page,
        roster: Roster::default(),
        settled_at: AtomicU64::new(0),
        acted: AtomicBool::new(false),
    });
    let (tell, told) = sync_channel(MOST_UNTOLD);
    let teller = spawn("teller", move || tell_all(&told))?;
    let wake = Timer::event().map_err(failed("make an event"))?;
    let look_out = LookOut::new(
        shared.clone(),
        cluster,
        config.data.clone(),
        tell,
        wake.try_clone().map_err(failed("share an event"))?,
    );
    let looking = spawn("look-out", move || {
        prefer(LOOK_OUT_PRIORITY);
        look_out.run();
    })?;
    let timer = Timer::boottime().map_err(failed("make a timer"))?;
    let deadline = spawn("deadline", move || {
        prefer(DEADLINE_PRIORITY);
        let mut deadline = Deadline { shared, timer, wake, watchdog, permit: roomy() };
        if let Err(error) = deadline.exercise() {
            tracing::warn!(%error, "the guard could not exercise: a slow disk may make it late");
        }
        deadline.run();
    })?;
    tracing::info!(data = %config.data.display(), "the guard works");
    // The look-out ends when the directory is gone; then there is nothing left to guard.
    let _ = looking.join();
    drop((deadline, teller, lock));
    Ok(())
}

/// Whether a guard works for this directory.
///
/// # Errors
/// When the lock cannot be asked.
pub fn is_held(data: &Path) -> io::Result<bool> {
    let lock = File::options().create(true).truncate(false).write(true).open(data.join(LOCK))?;
    match lock.try_lock() {
        Ok(()) => Ok(false),
        Err(std::fs::TryLockError::WouldBlock) => Ok(true),
        Err(std::fs::TryLockError::Error(error)) => Err(error),
    }
}

/// The file that runs, also when another one has its name by now.
pub const THIS_PROGRAM: &str = "/proc/self/exe";

/// Tells one build of a program from another, so that a new agent replaces the guard of the old one. 0 when there is no
/// such file.
pub fn build(program: &Path) -> u64 {
    let of = || -> Option<u64> {
        let metadata = program.metadata().ok()?;
        let modified = metadata.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
        Some(modified.as_nanos() as u64 ^ metadata.len().rotate_left(48))
    };
    of().unwrap_or(0)
}

struct Deadline {
    shared: Arc<Shared>,
    timer: Timer,
    wake: Timer,
    watchdog: Option<Watchdog>,
    permit: Permit,
}

impl Deadline {
    /// Goes once through all that the end of a lease takes.
    fn exercise(&mut self) -> io::Result<()> {
        touch_stack();
        self.shared.page.touch();
        let nobody = |vm| Machine { vm: VmId(vm), epoch: 0, standing: Standing::Denied };
        self.permit.machines.extend((0..MOST_MACHINES as u64).map(nobody));
        self.permit.machines[0].standing = Standing::Free;
        let held = |vm: u64| {
            let process = QemuProcess::nobody(VmId(vm))?;
            io::Result::Ok(Arc::new(Held { process, stopped: AtomicBool::new(true) }))
        };
        let roster = Roster::default();
        roster.replace(vec![held(0)?, held(1)?]);
        let now = clock::boottime_nanos();
        roster.enforce(&self.permit, now);
        self.wake.ring();
        self.timer.wait_until(now);
        Ok(())
    }

    fn run(mut self) {
        loop {
            self.shared.page.read(&mut self.permit);
            let now = clock::boottime_nanos();
            if self.shared.roster.enforce(&self.permit, now) {
                self.shared.acted.store(true, Ordering::Release);
                self.wake.ring();
            }
            if let Some(watchdog) = &mut self.watchdog {
                let settled_at = self.shared.settled_at.load(Ordering::Acquire);
                watchdog.feed_if(now, &self.permit, settled_at);
            }
            let until = self.permit.until;
            let glance = now + GLANCE_NANOS;
            self.timer.wait_until(if now < until { until.min(glance) } else { glance });
        }
    }
}

/// So that reading the largest permit allocates nothing.
fn roomy() -> Permit {
    Permit { machines: Vec::with_capacity(MOST_MACHINES), ..Permit::default() }
}

/// A log that nobody reads may block its writer: that is this thread, and nobody waits for it.
fn tell_all(told: &Receiver<Event>) {
    for event in told {
        event.tell();
    }
}

/// What a person may want to know later.
#[derive(Clone, Debug)]
enum Event {
    Stopped { vm: VmId, pid: u32, after_lease: Option<Duration> },
    Continued { vm: VmId, pid: u32 },
    Blind { why: String },
}

impl Event {
    fn tell(&self) {
        match self {
            Self::Stopped { vm, pid, after_lease: Some(after) } => {
                let millis = after.as_millis();
                tracing::warn!(%vm, pid, millis, "stopped: the lease of this host has ended; seen to stand still so long after it");
            }
            Self::Stopped { vm, pid, after_lease: None } => {
                tracing::warn!(%vm, pid, "stopped: no assignment in force names it, and it must not run twice");
            }
            Self::Continued { vm, pid } => tracing::info!(%vm, pid, "goes on: the lease is back"),
            Self::Blind { why } => tracing::error!(why, "guests cannot be looked for"),
        }
    }
}

type Teller = SyncSender<Event>;

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, GuardError> {
    let thread = thread::Builder::new().name(name.into()).stack_size(STACK_BYTES);
    thread.spawn(work).map_err(failed("start a thread"))
}

fn lock_file(data: &Path) -> Result<File, GuardError> {
    let file = File::options().create(true).truncate(false).write(true).open(data.join(LOCK));
    file.map_err(failed("open the guards' lock"))
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> GuardError {
    move |source| GuardError::Io { what, source }
}
