//! The guard as a process, with processes that carry a guest's arguments and do nothing: an agent that is stopped or
//! killed, a guard that is killed or stuck, a lease that comes back. What ran when is read from `/proc`, not asked for.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use model::VmId;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use nodeagent::{
    clock,
    guard::{
        self,
        supervisor::{GuardProgram, Supervisor},
    },
    hypervisor::domain_xml::{domain_name, domain_uuid},
    lease::{Leases, Machine, Permit, Standing, page::Page},
};

use parts::{PARTS, Process, join, state};

#[path = "guard_host/parts.rs"]
mod parts;

const CLUSTER: &str = "demo";
const PATIENCE: Duration = Duration::from_secs(60);
/// Short, so that the tests are; renewed ten times in it.
const LEASE_NANOS: u64 = 2_000_000_000;
const SECOND: u64 = 1_000_000_000;
/// Of this program, which is larger than a guard: with all of it locked it was more than a hundred MiB.
const MOST_RESIDENT_KIB: u64 = 48 << 10;

/// Machines 1 and 4 must not run twice, 2 may, 3 no longer belongs here; nobody has heard of 5.
const MACHINES: [(u64, Standing); 4] =
    [(1, Standing::Leased), (2, Standing::Free), (3, Standing::Denied), (4, Standing::Leased)];

#[test]
fn guests_stop_at_the_end_of_the_lease_with_the_agent_stopped_and_go_on_when_it_is_back() {
    let host = Host::new();
    let guests = [1, 2, 3, 5].map(|vm| host.guest(vm));
    let page = Page::open(&host.data()).unwrap();
    permit(&page, LEASE_NANOS);
    let agent = host.agent();
    let mut guard = Process::guard(&host.data());
    wait("what is denied is stopped at once", || is_stopped(&guests[2]));
    let watches = [0, 1, 3].map(|at: usize| Watch::begin(&guests[at]));

    signal(&agent, Signal::SIGSTOP);
    wait("the exclusive guest is stopped", || is_stopped(&guests[0]));
    let until = current(&page).until;
    let late = host.guest(4);
    wait("an exclusive guest that is started without a lease is stopped too", || is_stopped(&late));
    wait("the guard has said so", || page.stopped().len() == 3);
    let [exclusive, available, unknown] = watches.map(Watch::end);
    let last_run = exclusive.iter().filter(|seen| !seen.stopped).map(|seen| seen.before).max().unwrap();
    let first_stop = exclusive.iter().find(|seen| seen.stopped).map(|seen| seen.after).unwrap();
    assert!(exclusive.len() > 20, "{} looks", exclusive.len());
    assert!(first_stop >= until, "{} ms too early", (until - first_stop) / 1_000_000);
    assert!(last_run < until + SECOND, "it ran {} ms after the end of its lease", (last_run - until) / 1_000_000);
    println!("last seen to run {:.1} ms after the end of its lease", (last_run as f64 - until as f64) / 1e6);
    assert!(available.iter().chain(&unknown).all(|seen| !seen.stopped), "the others go on");

    // The guard dies meanwhile: what is stopped stays so, and the next guard knows what the last one stopped.
    guard.kill();
    assert!(is_stopped(&guests[0]) && is_stopped(&late));
    let _guard = Process::guard(&host.data());
    wait("the next guard works", || page.sign().is_some_and(|sign| sign.is_fresh(clock::boottime_nanos())));
    assert!(is_stopped(&guests[0]) && is_stopped(&late) && page.stopped().len() == 3);
    signal(&agent, Signal::SIGCONT);
    wait("they go on when the lease is back", || !is_stopped(&guests[0]) && !is_stopped(&late));
    assert!(is_stopped(&guests[2]), "what is denied never does");
}

#[test]
fn the_first_end_of_a_lease_meets_no_page_that_is_missing_and_the_guard_is_small() {
    let host = Host::new();
    let page = Page::open(&host.data()).unwrap();
    permit(&page, LEASE_NANOS);
    let agent = host.agent();
    let guest = host.guest(1);
    let guard = Process::guard(&host.data());
    wait("the guard works", || page.sign().is_some_and(|sign| sign.is_fresh(clock::boottime_nanos())));
    wait("it has looked at the lease", || page_faults(&guard, "deadline") > 0 && wakes(&guard, "deadline") > 3);
    let faults = page_faults(&guard, "deadline");
    signal(&agent, Signal::SIGSTOP);
    wait("the exclusive guest is stopped", || is_stopped(&guest));
    signal(&agent, Signal::SIGCONT);
    wait("it goes on", || !is_stopped(&guest));
    assert_eq!(page_faults(&guard, "deadline"), faults, "it had all that it needed in memory");
    let (resident, locked) = (kib(&guard, "VmRSS"), kib(&guard, "VmLck"));
    println!("the guard has {resident} KiB in memory, {faults} page faults before it began");
    assert!(locked > 0 && resident < MOST_RESIDENT_KIB, "{resident} KiB, {locked} locked");
}

#[test]
fn one_guard_is_always_at_work_and_outlives_the_agent() {
    let host = Host::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let page = Page::open(&host.data()).unwrap();
    let start = || {
        let leases = Arc::new(Leases::open(&host.data()).unwrap());
        let program = GuardProgram { program: host.script(), build: guard::build(Path::new(PARTS)), watchdog: None };
        runtime.spawn(Supervisor::new(host.data(), program, leases).keep())
    };
    let at_work = |not: u32| {
        let sign = || page.sign().filter(|sign| sign.pid != not && sign.is_fresh(clock::boottime_nanos()));
        wait("a guard works", || sign().is_some());
        sign().map_or_else(|| panic!("it has just signed"), |sign| sign.pid)
    };
    let send = |pid: u32, signal| kill(Pid::from_raw(pid as i32), signal).unwrap();

    let agent = start();
    let first = at_work(0);
    send(first, Signal::SIGKILL);
    let second = at_work(first);
    send(second, Signal::SIGSTOP);
    let third = at_work(second);
    agent.abort();
    runtime.block_on(async { drop(agent.await) });
    assert!(guard::is_held(&host.data()).unwrap(), "it works on without an agent");
    let agent = start();
    // Several looks of the supervisor.
    let signed = page.sign().unwrap().looked_at;
    wait("it goes on looking", || page.sign().unwrap().looked_at > signed + SECOND);
    assert_eq!(page.sign().unwrap().pid, third, "the next agent adopts it");
    agent.abort();
    fs::remove_dir_all(host.data()).unwrap();
    wait("it ends with its directory", || !Path::new(&format!("/proc/{third}/fd")).exists() || is_gone(third));
}

fn is_gone(pid: u32) -> bool {
    state(pid).is_none_or(|state| state == 'Z')
}

fn permit(page: &Page, lasts: u64) {
    let machine = |(vm, standing)| Machine { vm: VmId(vm), epoch: epoch(vm), standing };
    let machines = MACHINES.map(machine).to_vec();
    page.write(&Permit { incarnation: 1, until: clock::boottime_nanos() + lasts, machines });
}

fn epoch(vm: u64) -> u64 {
    4000 + vm
}

fn current(page: &Page) -> Permit {
    let mut permit = Permit::default();
    page.read(&mut permit);
    permit
}

/// A data directory of a member, and the processes that belong to it.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        join(CLUSTER, &host.data());
        host
    }

    fn data(&self) -> PathBuf {
        self.0.path().canonicalize().unwrap().join("data")
    }

    fn agent(&self) -> Process {
        let mut command = Command::new(PARTS);
        command.arg("renew").arg(self.data()).arg(LEASE_NANOS.to_string());
        Process(command.spawn().unwrap())
    }

    /// What the supervisor takes for the program: it is called as `SCRIPT agent guard --data DIR`.
    fn script(&self) -> PathBuf {
        let path = self.0.path().join("trefoil");
        fs::write(&path, format!("#!/bin/sh\nexec {PARTS} guard \"$4\"\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// A shell that waits for ever, with what libvirt gives QEMU behind it.
    fn guest(&self, vm: u64) -> Process {
        let dir = self.data().join(format!("vms/vm-{vm}"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("guest.json"), format!("{{\"epoch\": {}}}", epoch(vm))).unwrap();
        let blockdev = format!(r#"{{"driver":"file","filename":"{}/disk.qcow2"}}"#, dir.display());
        let mut command = Command::new("sh");
        command.args(["-c", "while read -r line; do :; done", "qemu"]);
        command.args(["-name", &format!("guest={},debug-threads=on", domain_name(CLUSTER, VmId(vm)))]);
        command.args(["-uuid", &domain_uuid(CLUSTER, VmId(vm)), "-blockdev", &blockdev]);
        // Its input stays open for as long as the test holds it.
        Process(command.stdin(Stdio::piped()).spawn().unwrap())
    }
}

fn signal(process: &Process, signal: Signal) {
    kill(Pid::from_raw(process.0.id() as i32), signal).unwrap();
}

/// Of one thread, so far: proc(5), fields 10 and 12 of its stat.
fn page_faults(process: &Process, thread: &str) -> u64 {
    let Some(task) = task(process, thread) else { return 0 };
    let stat = fs::read_to_string(task.join("stat")).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace();
    let fields: Vec<u64> = fields.map(|field| field.parse().unwrap_or(0)).collect();
    fields[7] + fields[9]
}

/// How often a thread has waited.
fn wakes(process: &Process, thread: &str) -> u64 {
    task(process, thread).map_or(0, |task| number(&task.join("status"), "voluntary_ctxt_switches"))
}

fn kib(process: &Process, name: &str) -> u64 {
    number(Path::new(&format!("/proc/{}/status", process.0.id())), name)
}

fn task(process: &Process, thread: &str) -> Option<PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.0.id())).unwrap();
    let mut tasks = tasks.map(|task| task.unwrap().path());
    tasks.find(|task| fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim_end() == thread))
}

fn is_stopped(process: &Process) -> bool {
    state(process.0.id()) == Some('T')
}

/// A line of a `status` of `/proc`.
fn number(status: &Path, name: &str) -> u64 {
    let status = fs::read_to_string(status).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A guest's state, and the moments on CLOCK_BOOTTIME between which it was read.
struct Seen {
    before: u64,
    stopped: bool,
    after: u64,
}

struct Watch {
    done: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Seen>>,
}

impl Watch {
    /// Looks two hundred times a second, as far as the machine lets it.
    fn begin(guest: &Process) -> Self {
        let (pid, done) = (guest.0.id(), Arc::new(AtomicBool::new(false)));
        let over = done.clone();
        let thread = thread::spawn(move || {
            let mut all = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let before = clock::boottime_nanos();
                let stopped = state(pid) == Some('T');
                all.push(Seen { before, stopped, after: clock::boottime_nanos() });
                sleep(Duration::from_millis(5));
            }
            all
        });
        Self { done, thread }
    }

    fn end(self) -> Vec<Seen> {
        self.done.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

#[track_caller]
fn wait(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain: {what}");
        sleep(Duration::from_millis(10));
    }
}
