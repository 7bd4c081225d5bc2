//! Where the machines of a cloud on this machine run in truth: read from the hosts' own processes, not from the cloud.
//!
//! With libvirt a machine's home is the host whose folder its QEMU process has its disk in, and a process in state `T` is
//! paused; simulated, it is the record of the guest. Deliberately not here: whether QEMU lets the guest run inside (a
//! process that libvirt paused counts as running), and who answers for an address.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Args;
use nodeagent::hypervisor::simulated::outside;
use serde::Serialize;
use serde_json::json;

use super::cloud::{Cloud, LabHypervisor, Placement};
use crate::output::{self, Format};

/// A process takes its final command line at once after it was made; one that is older is what it looks like.
const SETTLED: Duration = Duration::from_secs(2);
/// Twice as often as the twenty times a second that are promised: a busy machine wakes who sleeps late.
pub const LOOK_EVERY: Duration = Duration::from_millis(25);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Run {
    Off,
    /// Its process is there and cannot run.
    Paused,
    Running,
}

/// By machine and host.
pub type Homes = BTreeMap<(String, String), Run>;

#[derive(Args, Debug)]
pub struct HomesArgs {
    #[command(flatten)]
    placement: Placement,
    /// Go on and print each change, a JSON object a line, with the time since the start
    #[arg(long)]
    watch: bool,
}

/// # Errors
/// When there is no such cloud.
pub fn homes(args: &HomesArgs, format: Format) -> Result<()> {
    let mut eyes = Eyes::of(&Cloud::load(&args.placement.dir)?);
    if !args.watch {
        let now = eyes.look();
        return Ok(output::print(format, &told(&now), || describe(&now))?);
    }
    let (began, mut before) = (Instant::now(), Homes::new());
    loop {
        let looked = Instant::now();
        let now = eyes.look();
        for (vm, host, run) in changes(&before, &now) {
            let at = u64::try_from((looked - began).as_micros()).unwrap_or(u64::MAX);
            println!("{}", json!({ "at_micros": at, "vm": vm, "host": host, "run": run }));
        }
        before = now;
        std::thread::sleep(LOOK_EVERY.saturating_sub(looked.elapsed()));
    }
}

fn told(homes: &Homes) -> serde_json::Value {
    let row = |((vm, host), run): (&(String, String), &Run)| json!({ "vm": vm, "host": host, "run": run });
    json!({ "machines": homes.iter().map(row).collect::<Vec<_>>() })
}

fn describe(homes: &Homes) -> String {
    let run = |run: &Run| if *run == Run::Running { "running" } else { "paused" };
    let lines: Vec<String> =
        homes.iter().map(|((vm, host), state)| format!("{vm:8} {host:8} {}", run(state))).collect();
    lines.join("\n")
}

/// What is otherwise now than before: first what ended, so that nobody who follows it sees a machine twice that moved
/// between two looks.
pub fn changes<'a>(before: &'a Homes, now: &'a Homes) -> Vec<(&'a str, &'a str, Run)> {
    let new = now.iter().filter(|(home, run)| before.get(*home) != Some(*run)).map(|(home, run)| (home, *run));
    let gone = before.keys().filter(|home| !now.contains_key(*home)).map(|home| (home, Run::Off));
    let mut all: Vec<_> = new.chain(gone).map(|((vm, host), run)| (vm.as_str(), host.as_str(), run)).collect();
    all.sort_by_key(|(_, _, run)| *run);
    all
}

pub enum Eyes {
    Simulated(Vec<(String, PathBuf)>),
    Qemu(Qemu),
}

impl Eyes {
    pub fn of(cloud: &Cloud) -> Self {
        let folders = cloud.hosts.iter().map(|host| (host.name.clone(), cloud.data(&host.name))).collect();
        match cloud.hypervisor {
            LabHypervisor::Simulated => Self::Simulated(folders),
            LabHypervisor::Libvirt => Self::Qemu(Qemu { folders, known: BTreeMap::new() }),
        }
    }

    pub fn look(&mut self) -> Homes {
        match self {
            Self::Simulated(folders) => simulated(folders),
            Self::Qemu(qemu) => qemu.look(),
        }
    }
}

fn simulated(folders: &[(String, PathBuf)]) -> Homes {
    let mut homes = Homes::new();
    for (host, data) in folders {
        // A folder that cannot be read now is read at the next look; the agent's own trouble shows elsewhere.
        for guest in outside::guests(data).unwrap_or_default() {
            let run = if guest.paused { Run::Paused } else { Run::Running };
            homes.insert((guest.vm.to_string(), host.clone()), run);
        }
    }
    homes
}

/// The QEMU processes of this machine that have their disk in a host's folder.
pub struct Qemu {
    folders: Vec<(String, PathBuf)>,
    /// By process id: when it was first seen, and which machine on which host it runs, if it does.
    known: BTreeMap<i32, (Instant, Option<(String, String)>)>,
}

impl Qemu {
    fn look(&mut self) -> Homes {
        let mut homes = Homes::new();
        let mut there = BTreeMap::new();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        for pid in entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
            let (since, mut home) = self.known.remove(&pid).unwrap_or_else(|| (Instant::now(), None));
            if home.is_none() && since.elapsed() < SETTLED {
                home = fs::read(format!("/proc/{pid}/cmdline")).ok().and_then(|line| self.home(&line));
            }
            if let Some((home, run)) = home.as_ref().zip(state(pid)) {
                note(&mut homes, home, run);
            }
            there.insert(pid, (since, home));
        }
        self.known = there;
        homes
    }

    /// The machine and the host of a QEMU process, by its command line.
    fn home(&self, line: &[u8]) -> Option<(String, String)> {
        let text = String::from_utf8_lossy(line);
        let name = text.split('\0').find_map(|word| word.strip_prefix("guest=")?.split(',').next())?;
        let vm = name.rfind("vm-").map(|at| name[at..].to_owned())?;
        let (host, _) = self.folders.iter().find(|(_, data)| text.contains(&format!("{}/", data.display())))?;
        Some((vm, host.clone()))
    }
}

/// Of two processes of one machine on one host, as while one takes over from the other, the one that runs counts.
fn note(homes: &mut Homes, home: &(String, String), run: Run) {
    let seen = homes.entry(home.clone()).or_insert(run);
    if run == Run::Running {
        *seen = run;
    }
}

/// Of the process as a whole: a stopped one has stopped in all threads. `None` when it has ended, or will not run one more
/// instruction of its own: a stopped process that is killed wakes up to die, which on a busy machine takes a while.
fn state(pid: i32) -> Option<Run> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    run_of(&stat, &status)
}

/// proc(5): in `stat` the state is field 3 and the kernel's flags field 9; in `status`, signals that wait, as bits.
fn run_of(stat: &str, status: &str) -> Option<Run> {
    const EXITING: u64 = 0x4;
    const KILL: u64 = 1 << (nix::libc::SIGKILL - 1);
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let flags: u64 = fields.get(6)?.parse().ok()?;
    let waits = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).is_some_and(|bits| bits & KILL != 0)
    };
    if flags & EXITING != 0 || waits("SigPnd:") || waits("ShdPnd:") {
        return None;
    }
    match *fields.first()? {
        "Z" | "X" => None,
        "T" | "t" => Some(Run::Paused),
        _ => Some(Run::Running),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_process_is_known_by_its_name_and_its_hosts_folder() {
        let folders = vec![("h1".to_owned(), PathBuf::from("/tmp/c/h1/data")), ("h2".into(), "/tmp/c/h2/data".into())];
        let qemu = Qemu { folders, known: BTreeMap::new() };
        let disk = r#"{"filename":"/tmp/c/h2/data/vms/vm-17/disk"}"#;
        let line = format!("qemu\0-name\0guest=trefoil-1a-vm-17,debug-threads=on\0-blockdev\0{disk}");
        assert_eq!(qemu.home(line.as_bytes()), Some(("vm-17".into(), "h2".into())));
        let other = line.replace("/tmp/c/", "/tmp/other/");
        assert_eq!(qemu.home(other.as_bytes()), None, "another cloud's");
        assert_eq!(qemu.home(b"vi\0/tmp/c/h1/data/vms/vm-17/disk"), None);
    }

    #[test]
    fn homes_are_told_to_programs_too() {
        let homes = Homes::from([(("vm-1".to_owned(), "h1".to_owned()), Run::Paused)]);
        assert_eq!(told(&homes), json!({ "machines": [{ "vm": "vm-1", "host": "h1", "run": "paused" }] }));
        assert_eq!(describe(&homes), "vm-1     h1       paused");
    }

    #[test]
    fn a_process_that_is_being_killed_does_not_run_and_one_that_was_continued_does() {
        let stat = |state: &str, flags: u64| format!("7 (a) b) {state} 1 7 7 0 -1 {flags} 0 0");
        let waiting = |bits: &str| format!("Name:\ta\nSigPnd:\t{bits}\nShdPnd:\t0000000000000000\n");
        let (nothing, killed, asked) =
            (waiting("0000000000000000"), waiting("0000000000000100"), waiting("0000000000004000"));
        assert_eq!(run_of(&stat("T", 0x400), &nothing), Some(Run::Paused));
        assert_eq!(run_of(&stat("R", 0x400), &nothing), Some(Run::Running));
        assert_eq!(run_of(&stat("R", 0x400), &killed), None);
        assert_eq!(run_of(&stat("R", 0x404), &nothing), None);
        assert_eq!(run_of(&stat("T", 0x400), &asked), Some(Run::Paused), "SIGTERM waits until it goes on");
        assert_eq!(run_of(&stat("Z", 0x400), &nothing), None);
    }

    #[test]
    fn only_changes_are_told_and_the_end_of_a_guest_is_one() {
        let home = |run| Homes::from([(("vm-1".to_owned(), "h1".to_owned()), run)]);
        let told =
            |before: &Homes, now: &Homes| changes(before, now).into_iter().map(|(_, _, run)| run).collect::<Vec<_>>();
        let (nothing, running, paused) = (Homes::new(), home(Run::Running), home(Run::Paused));
        assert_eq!(told(&nothing, &running), [Run::Running]);
        assert_eq!(told(&running, &running), []);
        assert_eq!(told(&running, &paused), [Run::Paused]);
        assert_eq!(told(&paused, &nothing), [Run::Off]);
        let moved = Homes::from([(("vm-1".to_owned(), "a".to_owned()), Run::Running)]);
        assert_eq!(told(&running, &moved), [Run::Off, Run::Running]);
    }
}
