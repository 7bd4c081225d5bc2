//! Processes of a cloud, by identity: a process id alone may be somebody else's by now.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::DirBuilderExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use super::place::Place;

/// A process of this machine: its id, and when it started in clock ticks since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    pub start: u64,
}

/// In the environment of every process that a cloud starts, with the cloud's directory: it finds also those whose ids
/// were never written down.
pub const MARK: &str = "TREFOIL_LAB";

const POLL: Duration = Duration::from_millis(10);
/// To start a program and enter its namespaces takes milliseconds; on a machine that swaps, seconds.
const START_LIMIT: Duration = Duration::from_secs(15);
/// A killed process is gone as soon as the kernel has freed its memory.
const KILL_LIMIT: Duration = Duration::from_secs(20);

impl ProcessId {
    /// `None` when there is none of that id, or only its exit status.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in brackets and may hold anything, brackets too; the state is field 3, the start is field 22.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let alive = !matches!(*fields.first()?, "Z" | "X");
        let start = fields.get(19)?.parse().ok()?;
        alive.then_some(Self { pid, start })
    }

    pub fn is_alive(&self) -> bool {
        // Takes away the exit status when it was a child of this process; else there is nothing to take.
        let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
        Self::of(self.pid) == Some(*self)
    }

    /// # Errors
    /// When the kernel refuses; a process that is gone needs no signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(e) => Err(e).with_context(|| format!("cannot signal process {}", self.pid)),
        }
    }

    /// Asks it to end, and kills it when it has not within `polite`; with zero at once. Returns when it is gone.
    ///
    /// # Errors
    /// When it survives that.
    pub async fn end(&self, polite: Duration) -> Result<()> {
        let asked = Instant::now();
        if !polite.is_zero() {
            self.signal(Signal::SIGTERM)?;
            while self.is_alive() && asked.elapsed() < polite {
                sleep(POLL).await;
            }
        }
        self.signal(Signal::SIGKILL)?;
        while self.is_alive() {
            if asked.elapsed() > polite + KILL_LIMIT {
                bail!("process {} does not end", self.pid);
            }
            sleep(POLL).await;
        }
        Ok(())
    }

    /// What brought it into its namespaces, or whoever else started it.
    pub fn parent(&self) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        let parent: i32 = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        // The first process of the machine takes in orphans; it is nobody's way in.
        (parent > 1).then(|| Self::of(parent)).flatten()
    }

    fn children(&self) -> Vec<i32> {
        let list = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid)).unwrap_or_default();
        list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
    }
}

/// A process that goes on when this one ends, with its output in `log`.
pub struct Daemon<'a> {
    pub dir: &'a Path,
    pub log: &'a Path,
    pub place: &'a Place,
}

impl Daemon<'_> {
    /// Starts `command`; the answer is the program itself, not what brought it into its namespaces.
    ///
    /// # Errors
    /// When it cannot be started, or ends at once.
    pub async fn start(&self, command: &[&str]) -> Result<ProcessId> {
        let outer = self.spawn(&self.place.command_line(command))?;
        if self.place.forks() { self.only_child(outer, command).await } else { Ok(outer) }
    }

    /// The same for a command that stays and lets a child do the work: both.
    ///
    /// # Errors
    /// When it cannot be started, or ends at once.
    pub async fn start_pair(&self, command: &[&str]) -> Result<(ProcessId, ProcessId)> {
        let outer = self.spawn(&self.place.command_line(command))?;
        Ok((outer, self.only_child(outer, command).await?))
    }

    fn spawn(&self, command: &[String]) -> Result<ProcessId> {
        if let Some(folder) = self.log.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        }
        let log = File::options().create(true).append(true).open(self.log)?;
        // A session of its own: the terminal's hang-up and Ctrl-C are not for it.
        let mut setsid = Command::new("setsid");
        setsid.args(command).env(MARK, self.dir).current_dir("/");
        setsid.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = setsid.spawn().context("cannot start setsid")?;
        let pid = i32::try_from(child.id())?;
        ProcessId::of(pid).with_context(|| self.ended(command.first().map_or("", String::as_str)))
    }

    async fn only_child(&self, outer: ProcessId, command: &[&str]) -> Result<ProcessId> {
        let asked = Instant::now();
        while outer.is_alive() && asked.elapsed() < START_LIMIT {
            if let Some(child) = outer.children().first().and_then(|pid| ProcessId::of(*pid)) {
                return Ok(child);
            }
            sleep(POLL).await;
        }
        bail!(self.ended(command.first().copied().unwrap_or_default()))
    }

    fn ended(&self, what: &str) -> String {
        format!("{what} did not start; its last words in {}: {}", self.log.display(), last_words(self.log))
    }
}

/// The end of a log, for an error message.
pub fn last_words(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("\n")
}

/// Every process that carries the mark of the cloud in `dir`, except this one.
pub fn marked(dir: &Path) -> BTreeSet<ProcessId> {
    let mut mark = format!("{MARK}=").into_bytes();
    mark.extend_from_slice(dir.as_os_str().as_encoded_bytes());
    let carries = |pid: i32| {
        // Of other people's processes it cannot be read, and they are not ours.
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|word| word == mark)
    };
    let own = std::process::id().cast_signed();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| *pid != own && carries(*pid)).filter_map(ProcessId::of).collect()
}

/// A program that runs to its end, in a place, for the cloud in `dir`; its output.
///
/// # Errors
/// When it fails; the sentence is what it said.
pub async fn run(dir: &Path, place: &Place, command: &[&str]) -> Result<String> {
    let line = place.command_line(command);
    let (program, arguments) = line.split_first().context("an empty command")?;
    let output = tokio::process::Command::new(program)
        .args(arguments)
        .env(MARK, dir)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| format!("cannot start {program}"))?;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    bail!("{}: {}", command.iter().take(3).copied().collect::<Vec<_>>().join(" "), said.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_daemon_is_found_by_its_mark_and_ended_by_its_identity() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log/sleep.log");
        let daemon = Daemon { dir: dir.path(), log: &log, place: &Place::Here };
        let process = daemon.start(&["sleep", "1000"]).await.unwrap();
        assert!(process.is_alive());
        // Between fork and exec, and again while setsid becomes the command, a process has no environment.
        let (asked, mut found) = (Instant::now(), marked(dir.path()));
        while found.is_empty() && asked.elapsed() < START_LIMIT {
            sleep(POLL).await;
            found = marked(dir.path());
        }
        assert_eq!(found, [process].into());
        assert_eq!(process.parent().map(|parent| parent.pid), Some(std::process::id().cast_signed()));
        let other = ProcessId { start: process.start + 1, ..process };
        other.end(Duration::ZERO).await.unwrap();
        assert!(process.is_alive(), "a process of another start is another process");
        process.end(Duration::ZERO).await.unwrap();
        assert!(!process.is_alive() && marked(dir.path()).is_empty());
    }
}
