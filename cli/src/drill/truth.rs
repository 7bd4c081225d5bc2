//! What the machines of a cloud on this machine do in truth: read from the hosts' own processes, not from the cloud.
//!
//! A thread looks 40 times a second, by the monotonic clock. With libvirt a machine's home is the host whose folder its
//! QEMU process has its disk in, and a process in state `T` is paused; simulated, it is the record of the guest, while
//! its host is on. Deliberately not here: whether QEMU lets the guest run inside (a process that libvirt paused counts
//! as running), and who answers for an address.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::Arc,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nodeagent::hypervisor::simulated::outside;

use super::{
    record::Record,
    timeline::{HomeChange, Run},
};
use crate::lab::{Cloud, LabHypervisor};

/// Twice as often as the verdict asks for: a busy machine wakes it late.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// A process takes its final command line at once after it was made; one that is older is what it looks like.
const SETTLED: Duration = Duration::from_secs(2);

type Homes = BTreeMap<(String, String), Run>;

enum Eyes {
    Simulated(Vec<(String, PathBuf)>),
    Qemu(Qemu),
}

/// Looks until the record is over.
///
/// # Errors
/// When no thread can be started.
pub fn watch(cloud: &Cloud, record: Arc<Record>) -> std::io::Result<JoinHandle<()>> {
    let folders = cloud.hosts.iter().map(|host| (host.name.clone(), cloud.data(&host.name)));
    let mut eyes = match cloud.hypervisor {
        LabHypervisor::Simulated => Eyes::Simulated(folders.collect()),
        LabHypervisor::Libvirt => Eyes::Qemu(Qemu { folders: folders.collect(), known: BTreeMap::new() }),
    };
    std::thread::Builder::new().name("truth".into()).spawn(move || {
        let mut before = Homes::new();
        let mut last: Option<Instant> = None;
        while !record.is_over() {
            let looked = Instant::now();
            let now = match &mut eyes {
                Eyes::Simulated(folders) => simulated(folders),
                Eyes::Qemu(qemu) => qemu.look(),
            };
            note(&record, looked, last, &before, &now);
            (before, last) = (now, Some(looked));
            std::thread::sleep(LOOK_EVERY.saturating_sub(looked.elapsed()));
        }
    })
}

fn note(record: &Record, looked: Instant, last: Option<Instant>, before: &Homes, now: &Homes) {
    let at_micros = record.at(looked);
    let mut timeline = record.see();
    timeline.looks.count += 1;
    let gap = last.map_or(0, |last| at_micros - record.at(last));
    timeline.looks.longest_gap_micros = timeline.looks.longest_gap_micros.max(gap);
    let mut change = |(vm, host): &(String, String), run| {
        timeline.homes.push(HomeChange { at_micros, vm: vm.clone(), host: host.clone(), run });
    };
    for (home, run) in now {
        if before.get(home) != Some(run) {
            change(home, *run);
        }
    }
    for home in before.keys().filter(|home| !now.contains_key(*home)) {
        change(home, Run::Off);
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
struct Qemu {
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
            if let Some(home) = &home {
                match state(pid) {
                    Some('Z' | 'X') | None => {}
                    Some('T' | 't') => note_home(&mut homes, home, Run::Paused),
                    Some(_) => note_home(&mut homes, home, Run::Running),
                }
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
fn note_home(homes: &mut Homes, home: &(String, String), run: Run) {
    let seen = homes.entry(home.clone()).or_insert(run);
    if run == Run::Running {
        *seen = run;
    }
}

/// Of the process as a whole: a stopped one has stopped in all threads.
fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_qemu_process_is_known_by_its_name_and_its_hosts_folder() {
        let folders = vec![("h1".to_owned(), PathBuf::from("/tmp/c/h1/data")), ("h2".into(), "/tmp/c/h2/data".into())];
        let qemu = Qemu { folders, known: BTreeMap::new() };
        let line = "qemu\0-name\0guest=trefoil-1a-vm-17,debug-threads=on\0-blockdev\0{\"filename\":\"/tmp/c/h2/data/vms/vm-17/disk\"}";
        assert_eq!(qemu.home(line.as_bytes()), Some(("vm-17".into(), "h2".into())));
        let other = line.replace("/tmp/c/", "/tmp/other/");
        assert_eq!(qemu.home(other.as_bytes()), None, "another cloud's");
        assert_eq!(qemu.home(b"vi\0/tmp/c/h1/data/vms/vm-17/disk"), None);
    }

    #[test]
    fn only_changes_are_noted_and_the_end_of_a_guest_is_one() {
        let record = Record::begin();
        let home = |run| Homes::from([(("vm-1".to_owned(), "h1".to_owned()), run)]);
        let now = Instant::now();
        note(&record, now, None, &Homes::new(), &home(Run::Running));
        note(&record, now, Some(now), &home(Run::Running), &home(Run::Running));
        note(&record, now, Some(now), &home(Run::Running), &home(Run::Paused));
        note(&record, now, Some(now), &home(Run::Paused), &Homes::new());
        let (timeline, _) = record.close();
        let runs: Vec<Run> = timeline.homes.iter().map(|change| change.run).collect();
        assert_eq!((runs, timeline.looks.count), (vec![Run::Running, Run::Paused, Run::Off], 4));
    }
}
