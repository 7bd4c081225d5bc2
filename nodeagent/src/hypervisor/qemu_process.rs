//! The QEMU processes of this cloud's guests on this host, found and held without asking libvirtd.
//!
//! When libvirtd hangs, a guest can still be stopped: its process takes SIGSTOP and SIGKILL like any other. It is known
//! by three arguments that libvirt gives it, which all must agree: the domain's name, its UUID, and a disk in this
//! agent's folder; so another cloud's guests, and those of another agent that can be seen from here, are never touched.
//!
//! A process is held by a pidfd, which stays bound to it: a signal never meets another process that got its number
//! since. Reading `/proc` can block on a process that is stuck in the kernel, and a record on a disk that is; so whoever
//! must act in time looks while all is well, keeps what was found, and only sends signals then.
//!
//! Deliberately not here: deciding which guests must stop, and what libvirt should be told about it.

use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use model::VmId;
use nix::libc;
use serde::Deserialize;

use super::domain_xml::{domain_uuid, name_prefix};

/// A guest's process. Holding it keeps nothing alive; it only says which process is meant.
#[derive(Debug)]
pub struct QemuProcess {
    pub vm: VmId,
    /// Of the placement that it runs under, by the record in its folder; `None` when that cannot be read.
    pub epoch: Option<u64>,
    /// As this process sees it; for people. Signals do not use it.
    pub pid: u32,
    /// Clock ticks between the host's start and its own: with the pid it names one process for ever.
    pub start_time: u64,
    handle: OwnedFd,
}

/// The processes of the guests of `cluster` whose folders are under `dir` (as `LibvirtConfig::dir`), in order of their
/// ids. One that ends meanwhile is left out.
///
/// # Errors
/// When `/proc` cannot be listed, or `dir` cannot be found.
pub fn find_all(cluster: &str, dir: &Path) -> io::Result<Vec<QemuProcess>> {
    let family = Family { cluster, prefix: name_prefix(cluster), dir: dir.canonicalize()? };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // The first look spares a pidfd for each process of the host; only what is read while it is held counts.
        if family.member(pid).is_some()
            && let Some(process) = family.hold(pid)
        {
            found.push(process);
        }
    }
    found.sort_unstable_by_key(|process| (process.vm, process.pid));
    Ok(found)
}

impl QemuProcess {
    /// No process at all: every signal to it is refused by the kernel, after the same way there.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub fn nobody(vm: VmId) -> io::Result<Self> {
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        let handle = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { vm, epoch: Some(0), pid: 0, start_time: 0, handle })
    }

    /// Stops every thread of it, so that the guest computes, sends and writes nothing more. What it had already handed
    /// to the kernel may still reach the disk.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub fn pause(&self) -> io::Result<()> {
        self.signal(libc::SIGSTOP)
    }

    /// Lets it run again.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub fn resume(&self) -> io::Result<()> {
        self.signal(libc::SIGCONT)
    }

    /// Ends it, paused or not. One that has ended already is as good.
    ///
    /// # Errors
    /// When the kernel refuses the signal.
    pub fn kill(&self) -> io::Result<()> {
        match self.signal(libc::SIGKILL) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// True when no thread of it can run: each has met the stop, or has ended.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub fn is_paused(&self) -> io::Result<bool> {
        let mut paused = true;
        for thread in fs::read_dir(format!("/proc/{}/task", self.pid))? {
            match stat(&thread?.path()) {
                Ok(stat) => paused &= matches!(stat.state, 'T' | 't' | 'Z' | 'X'),
                // A thread that ended while its siblings were listed.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        // It still has its pid now, so it was looked at and not a successor.
        self.signal(0).map(|()| paused)
    }

    /// False when it has ended, also when nobody has collected it yet.
    pub fn is_alive(&self) -> bool {
        !self.ended_within(Duration::ZERO)
    }

    /// Waits until it has ended; says whether it has.
    pub fn ended_within(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut wait = libc::pollfd { fd: self.handle.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            let millis = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            // SAFETY: `wait` is one pollfd, valid for the length of the call.
            match unsafe { libc::poll(&mut wait, 1, millis) } {
                1.. => return true,
                _ if left.is_zero() => return false,
                // In vain so far, or interrupted.
                _ => {}
            }
        }
    }

    fn signal(&self, signal: i32) -> io::Result<()> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the handle is an open pidfd, and no memory is passed.
        let sent =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.handle.as_raw_fd(), signal, no_info, 0u32) };
        if sent == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // ESRCH has no kind of its own in the standard library.
        if error.raw_os_error() == Some(libc::ESRCH) { Err(io::ErrorKind::NotFound.into()) } else { Err(error) }
    }
}

/// Whose processes are looked for.
struct Family<'a> {
    cluster: &'a str,
    prefix: String,
    dir: PathBuf,
}

impl Family<'_> {
    /// The machine that a process runs, if it is one of ours.
    fn member(&self, pid: u32) -> Option<VmId> {
        self.machine_of(&fs::read(format!("/proc/{pid}/cmdline")).ok()?)
    }

    fn machine_of(&self, command_line: &[u8]) -> Option<VmId> {
        let words: Vec<&str> = command_line.split(|b| *b == 0).filter_map(|word| str::from_utf8(word).ok()).collect();
        let values = |option| words.windows(2).filter(move |pair| pair[0] == option).map(|pair| pair[1]);
        // `guest=NAME,debug-threads=on`; our names have no comma.
        let name = values("-name").find_map(|value| value.strip_prefix("guest=")?.split(',').next())?;
        let vm: VmId = name.strip_prefix(&self.prefix)?.parse().ok()?;
        let uuid = domain_uuid(self.cluster, vm);
        let folder = self.folder(vm);
        let is_ours = |blockdev: &str| {
            serde_json::from_str::<Blockdev>(blockdev).is_ok_and(|b| b.filename.is_some_and(|f| f.starts_with(&folder)))
        };
        (values("-uuid").any(|value| value == uuid) && values("-blockdev").any(is_ours)).then_some(vm)
    }

    fn hold(&self, pid: u32) -> Option<QemuProcess> {
        let handle = pidfd(pid).ok()?;
        let vm = self.member(pid)?;
        let start_time = stat(Path::new(&format!("/proc/{pid}"))).ok()?.start_time;
        let epoch = fs::read(self.folder(vm).join("guest.json")).ok().and_then(|record| {
            let record: Placed = serde_json::from_slice(&record).ok()?;
            Some(record.epoch)
        });
        let process = QemuProcess { vm, epoch, pid, start_time, handle };
        // Alive after all that was read, so all of it was its own: a pid is not given anew before its process is gone.
        process.is_alive().then_some(process)
    }

    fn folder(&self, vm: VmId) -> PathBuf {
        self.dir.join("vms").join(vm.to_string())
    }
}

/// What libvirt passes to `-blockdev`, as far as it matters here.
#[derive(Deserialize)]
struct Blockdev {
    filename: Option<PathBuf>,
}

/// What the record in a guest's folder begins with, whoever wrote it.
#[derive(Deserialize)]
struct Placed {
    epoch: u64,
}

struct Stat {
    state: char,
    start_time: u64,
}

/// proc(5): `PID (NAME) STATE …`, the start time is the 22nd field. A name may hold blanks and parentheses.
fn stat(dir: &Path) -> io::Result<Stat> {
    let text = fs::read_to_string(dir.join("stat")).map_err(|e| {
        // A process that ends between opening and reading.
        if e.raw_os_error() == Some(libc::ESRCH) { io::ErrorKind::NotFound.into() } else { e }
    })?;
    let parsed = || {
        let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        Some(Stat { state, start_time: fields.nth(18)?.parse().ok()? })
    };
    parsed().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{} is not a stat", dir.display())))
}

fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed; pidfds are closed on exec by themselves.
    let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0u32) };
    if opened < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, and it fits.
    Ok(unsafe { OwnedFd::from_raw_fd(opened as i32) })
}

#[cfg(test)]
mod tests;
