//! One real process: started with its output in a file, signalled and measured by its own id.

use std::{
    fs::File,
    io,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How often a condition on a process is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

pub struct Process {
    child: Child,
    pub log: PathBuf,
}

impl Process {
    /// Starts it; what it prints is added to the file `log`.
    ///
    /// # Errors
    /// When the program or the file is not there.
    pub fn start(mut command: Command, log: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(log)?;
        let child = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn()?;
        Ok(Self { child, log: log.to_owned() })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// True until it has ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = i32::try_from(self.child.id()).map_err(io::Error::other)?;
        kill(Pid::from_raw(pid), signal).map_err(io::Error::from)
    }

    /// SIGKILL, and waits until the kernel has taken it away. True when that is how it ended.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> io::Result<bool> {
        self.child.kill()?;
        let status = self.child.wait()?;
        Ok(status.signal() == Some(Signal::SIGKILL as i32))
    }

    /// SIGSTOP; true when the kernel says that it is stopped.
    ///
    /// # Errors
    /// When it is gone.
    pub fn pause(&self) -> io::Result<bool> {
        self.signal(Signal::SIGSTOP)?;
        let deadline = Instant::now() + Duration::from_secs(1);
        while Instant::now() < deadline {
            if self.state() == Some('T') {
                return Ok(true);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(false)
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// When it is gone.
    pub fn resume(&self) -> io::Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// SIGTERM, then SIGKILL when it is still there after the deadline. True when it left by itself, and not by a signal: an
    /// abort on the way out is no end.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn stop(&mut self, patience: Duration) -> io::Result<bool> {
        if self.is_running() {
            self.signal(Signal::SIGTERM)?;
        }
        let deadline = Instant::now() + patience;
        while self.is_running() {
            if Instant::now() > deadline {
                self.kill()?;
                return Ok(false);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(self.ended().is_none_or(|status| status.signal().is_none()))
    }

    /// The state letter of `/proc/PID/stat`: R, S, D, T, Z.
    pub fn state(&self) -> Option<char> {
        self.stat()?.first()?.chars().next()
    }

    /// CPU time of all its threads so far.
    pub fn cpu_time(&self) -> Option<Duration> {
        let fields = self.stat()?;
        // Fields 14 and 15 of the file, user and system time, in ticks of 10 ms on every Linux that Rust runs on.
        let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
        Some(Duration::from_millis(ticks * 10))
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
    }

    /// Fields of `/proc/PID/stat` from the third on: the second, the name, may hold spaces.
    fn stat(&self) -> Option<Vec<String>> {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).ok()?;
        let (_, rest) = text.rsplit_once(')')?;
        Some(rest.split_whitespace().map(str::to_owned).collect())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A stopped process dies of SIGKILL too. It may have ended before; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_paused_resumed_measured_and_killed() {
        let log = std::env::temp_dir().join(format!("trefoil-process-{}", std::process::id()));
        let mut command = Command::new("sleep");
        command.arg("60");
        let mut process = Process::start(command, &log).unwrap();
        assert!(process.is_running());
        assert!(process.pause().unwrap());
        process.resume().unwrap();
        assert!(process.cpu_time().is_some());
        assert!(process.kill().unwrap());
        assert!(!process.is_running());
        std::fs::remove_file(log).unwrap();
    }
}
