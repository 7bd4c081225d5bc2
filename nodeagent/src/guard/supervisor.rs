//! The agent's side of the guard: one is always at work. It is started when none is, adopted when one is, replaced when
//! it is of another build or stuck. The agent's end does not end it.

use std::{fs, io, path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    time::sleep,
};

use super::is_held;
use crate::{
    clock,
    lease::{Leases, page::GuardSign},
};

/// How often it is looked whether the guard works. Its own child's end is heard at once.
const LOOK: Duration = Duration::from_millis(200);
/// After a guard that ended; without it a guard that cannot start would be started without end.
const PAUSE: Duration = Duration::from_millis(50);
/// The locking of a program's memory takes up to a second on a busy host; until then it has not signed.
const START_NANOS: u64 = 5_000_000_000;
/// An alert that is still true is repeated this often.
const ALERT_NANOS: u64 = 60_000_000_000;

/// What is started: `PROGRAM agent guard --data DIR`.
#[derive(Clone, Debug)]
pub struct GuardProgram {
    pub program: PathBuf,
    /// Its [`super::build`]: a guard of another one is replaced.
    pub build: u64,
    pub watchdog: Option<PathBuf>,
}

pub struct Supervisor {
    data: PathBuf,
    program: GuardProgram,
    leases: Arc<Leases>,
    child: Option<Child>,
    /// Since when a guard has held the lock without a fresh sign.
    unsigned_since: Option<u64>,
    alert_at: u64,
}

impl Supervisor {
    pub fn new(data: PathBuf, program: GuardProgram, leases: Arc<Leases>) -> Self {
        Self { data, program, leases, child: None, unsigned_since: None, alert_at: 0 }
    }

    /// Keeps a guard at work for as long as it is polled.
    ///
    /// # Errors
    /// When the guards' lock cannot be asked.
    pub async fn keep(mut self) -> io::Result<()> {
        loop {
            if is_held(&self.data)? {
                self.check();
            } else if self.child.is_none() {
                self.start();
            }
            let Some(child) = &mut self.child else {
                sleep(LOOK).await;
                continue;
            };
            tokio::select! {
                ended = child.wait() => {
                    self.child = None;
                    self.alert(&format!("the guard has ended: {}", ended.map_or_else(|e| e.to_string(), |s| s.to_string())));
                    sleep(PAUSE).await;
                }
                () = sleep(LOOK) => {}
            }
        }
    }

    fn start(&mut self) {
        let mut command = Command::new(&self.program.program);
        command.args(["agent", "guard", "--data"]).arg(&self.data);
        if let Some(watchdog) = &self.program.watchdog {
            command.arg("--watchdog").arg(watchdog);
        }
        // It locks what it touches: two megabytes for each few bytes would be a waste.
        command.env("MIMALLOC_ALLOW_THP", "0");
        // Of its own process group: what ends the agent at a terminal does not end the guard.
        command.stdin(Stdio::null()).process_group(0);
        match command.spawn() {
            Ok(child) => self.child = Some(child),
            Err(error) => self.alert(&format!("the guard cannot be started: {error}")),
        }
    }

    fn check(&mut self) {
        let now = clock::boottime_nanos();
        let sign = self.leases.page().sign();
        let fresh = sign.filter(|sign| sign.is_fresh(now));
        let Some(sign) = fresh else {
            let since = *self.unsigned_since.get_or_insert(now);
            if now - since > START_NANOS {
                self.alert("the guard does not look any more");
                self.end(sign, Signal::SIGKILL);
                self.unsigned_since = None;
            }
            return;
        };
        self.unsigned_since = None;
        if sign.build != self.program.build {
            tracing::info!(pid = sign.pid, "the guard is of another build and is replaced");
            self.end(Some(sign), Signal::SIGTERM);
        }
    }

    /// The guard that signed last, if that process is still a guard of this directory.
    fn end(&self, sign: Option<GuardSign>, signal: Signal) {
        let Some(pid) = sign.and_then(|sign| i32::try_from(sign.pid).ok()) else { return };
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let data = self.data.as_os_str().as_encoded_bytes();
        if words.contains(&&b"guard"[..]) && words.contains(&data) {
            // It has ended meanwhile, or it does now.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }

    fn alert(&mut self, what: &str) {
        let now = clock::boottime_nanos();
        if now >= self.alert_at {
            self.alert_at = now + ALERT_NANOS;
            tracing::error!("{what}; machines that must not run twice are not started meanwhile");
        } else {
            tracing::debug!("{what}");
        }
    }
}
