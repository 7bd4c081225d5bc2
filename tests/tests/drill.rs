//! `trefoil drill` on a cloud of simulated hosts: it proves what it says, heals when it is stopped, and is never green
//! without proof.

use std::{
    fs,
    io::{BufRead, BufReader, Lines},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, Output, Stdio},
    time::{Duration, Instant},
};

use jepsen::cluster::{binary, free_port};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;

/// A named condition that is not true by then will not become true.
const PATIENCE: Duration = Duration::from_secs(120);
/// Ports that follow each other: three controllers, three hosts.
const PORTS: u16 = 6;

/// A cloud of `trefoil up`, removed at the end.
struct Up {
    binary: PathBuf,
    dir: PathBuf,
}

impl Drop for Up {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("logs were in {}", self.dir.display());
        }
        let _ = self.command(&["down"]).output();
    }
}

impl Up {
    fn begin() -> Self {
        let dir = std::env::temp_dir().join(format!("tfd-{}", std::process::id()));
        let up = Self { binary: binary().expect("the binary is built"), dir };
        // Nobody holds the ports that follow a free one for us, so another place is tried when one is taken.
        let mut said = String::new();
        for _ in 0..20 {
            let port = free_port().unwrap().clamp(1024, 60_000 - PORTS).to_string();
            let output = up.run(&["up", "--hypervisor", "simulated", "--base-port", &port]);
            if output.status.success() {
                return up;
            }
            said = String::from_utf8_lossy(&output.stderr).into_owned();
            up.run(&["down"]);
        }
        panic!("no cloud came up: {said}");
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(arguments).env("TREFOIL_DIR", &self.dir).env("TREFOIL_CONFIG", self.dir.join("client.toml"));
        command.env("TREFOIL_TENANT", "acme").stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary runs")
    }

    fn ok(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--output", "json"]].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "trefoil {}: {said}", arguments.join(" "));
        serde_json::from_slice(&output.stdout).expect("the answer is JSON")
    }

    /// The report of its last run, and the exit status.
    fn drill(&self, arguments: &[&str]) -> (Value, i32) {
        let output = self.run(&[&["drill", "run"], arguments, &["--output", "json"]].concat());
        report(&output)
    }

    /// A drill that is under way, and what it tells.
    fn begin_drill(&self, arguments: &[&str]) -> (Child, Lines<BufReader<ChildStderr>>) {
        let mut command = self.command(&[&["drill", "run"], arguments, &["--output", "json"]].concat());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
        let told = BufReader::new(child.stderr.take().expect("it is piped")).lines();
        (child, told)
    }

    /// Its folder of a machine on a host.
    fn folder(&self, host: &str, vm: &str) -> PathBuf {
        self.dir.join(host).join("data/vms").join(vm)
    }

    fn whole(&self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.ok(&["quorum", "status"]);
            let controllers = status["controllers"].as_array().expect("controllers");
            let voters = controllers.iter().filter(|c| c["role"] == "leader" || c["role"] == "voter").count();
            if voters == 3 && status["hashes_agree"] == true {
                return;
            }
            assert!(Instant::now() < deadline, "three controllers do not vote again: {status}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn report(output: &Output) -> (Value, i32) {
    let said = String::from_utf8_lossy(&output.stderr);
    let all: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("no report: {e}: {said}"));
    let last = all["runs"].as_array().and_then(|runs| runs.last()).cloned();
    (last.unwrap_or_else(|| panic!("no run: {said}")), output.status.code().unwrap_or(-1))
}

/// Reads until it tells this.
fn heard(told: &mut Lines<BufReader<ChildStderr>>, what: &str) {
    let mut all = String::new();
    for line in told.map_while(Result::ok) {
        if line.contains(what) {
            return;
        }
        all += &line;
        all.push('\n');
    }
    panic!("it never told '{what}':\n{all}");
}

fn sentences(report: &Value, of: &str) -> Vec<String> {
    let all = report[of].as_array().unwrap_or_else(|| panic!("no {of} in {report}"));
    all.iter().map(|sentence| sentence.as_str().unwrap_or_default().to_owned()).collect()
}

/// Green, with proof; on a machine that is too slow to look often enough it may say that it does not know.
fn passed((report, status): &(Value, i32)) {
    let doubts = sentences(report, "doubts");
    let slow = doubts.len() == 1 && doubts[0].contains("times a second instead of");
    let why = [sentences(report, "broken"), sentences(report, "unrecovered"), doubts].concat();
    assert!(
        (report["verdict"] == "passed" && *status == 0) || (slow && *status == 6),
        "{}: {why:?}",
        report["verdict"]
    );
    assert!(!sentences(report, "evidence").is_empty());
    assert!(report["client"]["writes_during"]["done"].as_u64() > Some(0), "nobody wrote during the fault");
}

fn measured(report: &Value, name: &str) -> u64 {
    let all = report["measures"].as_array().expect("measures");
    let found = all.iter().find(|measure| measure["name"] == name);
    found.and_then(|measure| measure["micros"].as_u64()).unwrap_or_else(|| panic!("no '{name}' in {all:?}"))
}

/// A machine that may never run twice; its id and its node.
fn furnish(up: &Up) -> (String, String) {
    let image = up.dir.join("disk.raw");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    up.ok(&["tenant", "create", "acme"]);
    up.ok(&["network", "create", "blue", "--range", "10.0.0.0/24"]);
    up.ok(&["image", "import", &image.display().to_string(), "--name", "disk", "--format", "raw"]);
    let create = ["vm", "create", "web", "--image", "disk", "--template", "tiny", "--network", "blue", "--wait"];
    let vm = up.ok(&[&create[..], &["--recovery", "exclusive"]].concat());
    (vm["id"].as_str().unwrap().to_owned(), vm["node"].as_str().unwrap().to_owned())
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    fs::copy(from.join("guest.json"), to.join("guest.part")).unwrap();
    fs::rename(to.join("guest.part"), to.join("guest.json")).unwrap();
}

/// One cloud, because to make one takes longer than to drill it.
#[test]
fn drills_prove_what_they_say() {
    let up = Up::begin();
    refusals(&up);
    killed_leader(&up);
    full_disk(&up);
    let (vm, _) = furnish(&up);
    cut_power(&up, &vm);
    stepped_clock(&up, &vm);
    lost_majority(&up, &vm);
    scheduled(&up);
    not_injected(&up);
    two_homes(&up, &vm);
    stopped_by_a_person(&up);
}

fn refusals(up: &Up) {
    let refused = |arguments: &[&str]| {
        let output = up.run(&[&["drill", "run"], arguments].concat());
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (status, said) = refused(&["node-power"]);
    assert!(status == Some(4) && said.contains("no machine runs") && said.contains("[precondition]"), "{said}");
    let (status, said) = refused(&["agent-hang"]);
    assert!(status == Some(4) && said.contains("hosts of their own") && said.contains("[precondition]"), "{said}");
    let (status, said) = refused(&["leader-kill", "--live", "--tenant", "acme"]);
    assert!(status == Some(4) && said.contains("on a live cloud it would hurt others"), "{said}");
}

fn killed_leader(up: &Up) {
    let page = up.dir.join("report.html");
    let outcome = up.drill(&["leader-kill", "--report", &page.display().to_string()]);
    passed(&outcome);
    let evidence = sentences(&outcome.0, "evidence").join("; ");
    assert!(evidence.contains("has ended") && evidence.contains("leads since"), "{evidence}");
    assert!(measured(&outcome.0, "first write acknowledged") > 0);
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("<svg") && page.contains("<strong>simulated</strong>"));
    up.whole();
}

/// Also its log cannot be written then; it must stop all the same.
fn full_disk(up: &Up) {
    let outcome = up.drill(&["disk-full"]);
    passed(&outcome);
    assert!(measured(&outcome.0, "stopped on a full disk") > 0);
    up.whole();
}

/// The machine comes to run on another host, in truth and as the cloud says.
fn cut_power(up: &Up, vm: &str) {
    let outcome = up.drill(&["node-power"]);
    passed(&outcome);
    let report = &outcome.0;
    // Five seconds of lease from a beat of at most half a second before the cut.
    assert!(measured(report, "declared lost") > 4_000_000, "{}", measured(report, "declared lost"));
    assert!(measured(report, "its process runs elsewhere") > measured(report, "declared lost") - 200_000);
    let homes = report["timeline"]["homes"].as_array().unwrap();
    assert!(homes.iter().any(|home| home["vm"] == vm && home["run"] == "off"), "its end was not seen");
    assert_eq!(report["losses"][0]["window_millis"], Value::Null, "it has no backup, so all is lost");
}

/// An hour forward and an hour back, and neither the cloud's time nor a bill has an hour too much or too little.
fn stepped_clock(up: &Up, vm: &str) {
    let (report, status) = match up.run(&["drill", "run", "clock-step", "--output", "json"]) {
        output if output.status.code() == Some(4) => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(said.contains("install the package libfaketime"), "{said}");
            return eprintln!("SKIPPED clock-step: the package libfaketime is not installed");
        }
        output => report(&output),
    };
    let evidence = sentences(&report, "evidence").join("; ");
    passed(&(report, status));
    for part in [
        "is 1 h from the true time: its log says",
        "is -1 h from",
        "the cloud's time went on",
        &format!("{vm} is charged"),
    ] {
        assert!(evidence.contains(part), "no '{part}' in: {evidence}");
    }
    up.whole();
}

/// Written, listed with how the newest run ended, run by the very command line in the unit, and removed.
fn scheduled(up: &Up) {
    let (units, kept) = (up.dir.join("units"), up.dir.join("kept"));
    fs::create_dir(&units).unwrap();
    let (units, kept) = (units.display().to_string(), kept.display().to_string());
    let places = ["--units", &units, "--keep", &kept];
    let schedule = |words: &[&str]| up.run(&[&["drill", "schedule"], words, &places].concat());
    let calendar = "Mon *-*-* 03:00";
    let printed = schedule(&["leader-transfer", "--calendar", calendar, "--hold", "1s", "--print"]);
    let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
    assert!(printed.contains("OnCalendar=Mon *-*-* 03:00") && fs::read_dir(&units).unwrap().count() == 0, "{printed}");
    let bad = schedule(&["leader-transfer", "--calendar", "daily\nExecStart=/bin/false"]);
    assert_eq!(bad.status.code(), Some(2), "{bad:?}");
    let live = schedule(&["node-power", "--calendar", "daily", "--live"]);
    assert!(String::from_utf8_lossy(&live.stderr).contains("on a live cloud it would hurt others"), "{live:?}");
    assert!(schedule(&["leader-transfer", "--calendar", calendar, "--hold", "1s"]).status.success());

    let list = || up.ok(&[&["drill", "schedule", "--list"], &places[..]].concat());
    let one = list()[0].clone();
    assert_eq!(
        (&one["drill"], &one["calendar"], &one["newest"]),
        (&"leader-transfer".into(), &calendar.into(), &Value::Null)
    );
    let words: Vec<String> = one["command"].as_str().unwrap().split(' ').map(str::to_owned).collect();
    let ran = Command::new(&words[0]).args(&words[1..]).stdin(Stdio::null()).output().unwrap();
    let newest = list()[0]["newest"][1].clone();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert!(
        newest == "passed" || newest == "unknown" && said.contains("times a second instead of"),
        "{newest}: {ran:?}"
    );
    let endings: Vec<String> =
        fs::read_dir(&kept).unwrap().flatten().map(|e| e.file_name().into_string().unwrap()).collect();
    assert!(endings.len() == 2 && endings.iter().any(|name| name.ends_with(".html")), "{endings:?}");

    assert!(schedule(&["leader-transfer", "--remove"]).status.success());
    assert_eq!(schedule(&["leader-transfer", "--remove"]).status.code(), Some(3), "it is gone");
    assert_eq!(list(), Value::Array(vec![]));
}

/// One is left of three: it goes on alone, nothing acknowledged is lost, and an old voter is shut out for ever.
fn lost_majority(up: &Up, vm: &str) {
    let ids = |up: &Up| {
        let status = up.ok(&["quorum", "status"]);
        let controllers = status["controllers"].as_array().expect("controllers").clone();
        (status["epoch"].as_u64(), controllers.iter().map(|c| c["id"].as_u64().expect("an id")).collect::<Vec<_>>())
    };
    let (epoch, before) = ids(up);
    let placed =
        |up: &Up| (up.ok(&["vm", "show", "web"])["node"].clone(), up.ok(&["vm", "show", "web"])["epoch"].clone());
    let home = placed(up);
    let outcome = up.drill(&["lost-majority"]);
    passed(&outcome);
    let report = &outcome.0;
    let evidence = sentences(report, "evidence").join("; ");
    for part in ["refused a write", "refounded without it", "this controller was fenced", "none of the lost"] {
        assert!(evidence.contains(part), "no '{part}' in: {evidence}");
    }
    assert!(measured(report, "majority lost to the next acknowledged write") > 0);
    assert!(measured(report, "a new member votes") > 0);
    up.whole();
    let (refounded, after) = ids(up);
    assert!(refounded > epoch, "{refounded:?} after {epoch:?}");
    assert_eq!(after.iter().filter(|id| before.contains(id)).count(), 1, "{before:?}, then {after:?}");
    assert_eq!(placed(up), home, "{vm} was touched");
}

fn not_injected(up: &Up) {
    let (report, status) = up.drill(&["leader-kill", "--rehearsal"]);
    assert_eq!((&report["verdict"], status), (&"unknown".into(), 6));
    let doubts = sentences(&report, "doubts");
    assert!(doubts.iter().any(|doubt| doubt.contains("nothing proves that the fault happened")), "{doubts:?}");
}

/// A second home of a machine that may never run twice: as when a host were not fenced.
fn two_homes(up: &Up, vm: &str) {
    let now = up.ok(&["vm", "show", "web"]);
    let home = now["node"].as_str().unwrap();
    let other = ["h1", "h2", "h3"].into_iter().find(|host| *host != home).unwrap();
    let (mut child, mut told) = up.begin_drill(&["leader-transfer", "--hold", "2s"]);
    heard(&mut told, "hands leadership");
    let second = up.folder(other, vm);
    copy(&up.folder(home, vm), &second);
    heard(&mut told, "every controller votes");
    fs::remove_dir_all(&second).unwrap();
    let rest: Vec<String> = told.map_while(Result::ok).collect();
    let mut stdout = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut stdout).unwrap();
    let status = child.wait().unwrap().code();
    let all: Value = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("no report: {e}: {rest:?}"));
    let report = &all["runs"][0];
    assert_eq!((&report["verdict"], status), (&"failed".into(), Some(1)), "{rest:?}");
    let broken = sentences(report, "broken");
    assert!(broken.iter().any(|what| what.starts_with(&format!("{vm} may never run twice"))), "{broken:?}");
}

/// SIGINT in the middle of a fault: it is healed, and the report says that it was stopped.
fn stopped_by_a_person(up: &Up) {
    let (mut child, mut told) = up.begin_drill(&["leader-kill", "--hold", "10m"]);
    heard(&mut told, "a write that was begun after it is acknowledged");
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    heard(&mut told, "stopped by a person");
    let rest: Vec<String> = told.map_while(Result::ok).collect();
    let mut stdout = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut stdout).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(6), "{rest:?}");
    let all: Value = serde_json::from_str(&stdout).expect("a report");
    assert!(sentences(&all["runs"][0], "doubts").iter().any(|doubt| doubt.contains("stopped before its end")));
    up.whole();
}
