//! The guard as a process, with processes that carry a guest's arguments and do nothing: an agent that is stopped or
//! killed, a guard that is killed or stuck, a lease that comes back. What ran when is read from `/proc`, not asked for.
//!
//! Agent and guard are this very program: see the two tests that are ignored.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use api::{beat::BeatKey, tls::CertificateAuthority};
use model::{NodeId, VmId};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use nodeagent::{
    clock,
    guard::{
        self, GuardConfig,
        supervisor::{GuardProgram, Supervisor},
    },
    hypervisor::domain_xml::{domain_name, domain_uuid},
    lease::{Leases, Machine, Permit, Standing, page::Page},
    membership::{DataDir, Membership},
};

const CLUSTER: &str = "demo";
const PATIENCE: Duration = Duration::from_secs(60);
/// Short, so that the tests are; renewed ten times in it.
const LEASE_NANOS: u64 = 2_000_000_000;
const SECOND: u64 = 1_000_000_000;

/// Machines 1 and 4 must not run twice, 2 may, 3 no longer belongs here; nobody has heard of 5.
const MACHINES: [(u64, Standing); 4] =
    [(1, Standing::Leased), (2, Standing::Free), (3, Standing::Denied), (4, Standing::Leased)];

#[test]
#[ignore = "it is the guard of the other tests"]
fn guard_process() {
    let Some(data) = env::var_os("TREFOIL_TEST_DATA") else { return };
    guard::run(&GuardConfig { data: data.into(), watchdog: None }).unwrap();
}

#[test]
#[ignore = "it is the agent of the other tests"]
fn agent_process() {
    let Some(data) = env::var_os("TREFOIL_TEST_DATA") else { return };
    let page = Page::open(Path::new(&data)).unwrap();
    loop {
        permit(&page, LEASE_NANOS);
        sleep(Duration::from_millis(LEASE_NANOS / 10_000_000));
    }
}

#[test]
fn guests_stop_at_the_end_of_the_lease_with_the_agent_stopped_and_go_on_when_it_is_back() {
    let host = Host::new();
    let guests = [1, 2, 3, 5].map(|vm| host.guest(vm));
    let agent = host.start("agent_process");
    let page = Page::open(&host.data()).unwrap();
    wait("the agent permits", || current(&page).until > 0);
    let mut guard = host.start("guard_process");
    wait("what is denied is stopped at once", || guests[2].is_stopped());
    let watches = [0, 1, 3].map(|at: usize| Watch::begin(&guests[at]));

    agent.signal(Signal::SIGSTOP);
    wait("the exclusive guest is stopped", || guests[0].is_stopped());
    let until = current(&page).until;
    let late = host.guest(4);
    wait("an exclusive guest that is started without a lease is stopped too", || late.is_stopped());
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
    assert!(guests[0].is_stopped() && late.is_stopped());
    let _guard = host.start("guard_process");
    wait("the next guard works", || page.sign().is_some_and(|sign| sign.is_fresh(clock::boottime_nanos())));
    assert!(guests[0].is_stopped() && late.is_stopped() && page.stopped().len() == 3);
    agent.signal(Signal::SIGCONT);
    wait("they go on when the lease is back", || !guests[0].is_stopped() && !late.is_stopped());
    assert!(guests[2].is_stopped(), "what is denied never does");
}

#[test]
fn one_guard_is_always_at_work_and_outlives_the_agent() {
    let host = Host::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let page = Page::open(&host.data()).unwrap();
    let start = || {
        let leases = Arc::new(Leases::open(&host.data()).unwrap());
        let program = GuardProgram { program: host.script(), watchdog: None };
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
        let member = Membership {
            cluster: CLUSTER.into(),
            node: NodeId(1),
            name: "h1".into(),
            address: "127.0.0.1:7480".into(),
            beat_key: BeatKey([7; 32]),
            identity: CertificateAuthority::create(CLUSTER).unwrap().issue("node-1").unwrap(),
        };
        DataDir::open(&host.data()).unwrap().save_membership(&member).unwrap();
        host
    }

    fn data(&self) -> PathBuf {
        self.0.path().canonicalize().unwrap().join("data")
    }

    fn start(&self, role: &str) -> Process {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args([role, "--exact", "--ignored", "--nocapture"]).env("TREFOIL_TEST_DATA", self.data());
        Process(command.stdout(Stdio::null()).spawn().unwrap())
    }

    /// What the supervisor takes for the program: it is called as `SCRIPT agent guard --data DIR`.
    fn script(&self) -> PathBuf {
        let path = self.0.path().join("trefoil");
        let program = env::current_exe().unwrap();
        let text = format!(
            "#!/bin/sh\nTREFOIL_TEST_DATA=$4 exec {} guard_process guard \"$4\" --exact --ignored --nocapture >/dev/null\n",
            program.display()
        );
        fs::write(&path, text).unwrap();
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

/// Ends with the test.
struct Process(Child);

impl Process {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }

    fn is_stopped(&self) -> bool {
        state(self.0.id()) == Some('T')
    }

    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// proc(5): the state follows the name, which may hold anything, brackets too.
fn state(pid: u32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
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
