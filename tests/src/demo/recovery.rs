//! A host of the demonstration loses its power; another one is parted from the quorum together with the leader.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    process::Child,
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    cloud::{Cloud, until},
    guest::{Guest, Tenant},
    quorum,
    story::{CHANGE, domains, rows},
};

/// Backs a machine up, cuts the power of its host, and finds it running elsewhere with what the backup had; then switches
/// the host on again and sees that it does not keep what was given away.
///
/// # Errors
/// Of the first thing that is not as it should be.
pub fn power_cut(cloud: &Cloud, guest: &Guest) -> Result<String> {
    let before = guest.info(cloud).context("it did not answer before")?;
    cloud.run(&["backup", "create", &guest.name, "--tenant", guest.tenant.name, "--wait"])?;
    until("the backup is on another host", CHANGE, || {
        Ok((guest.show(cloud)?["backups"]["safe_at_millis"].as_u64() > Some(0)).then_some(()))
    })?;

    let cut = Instant::now();
    cloud.run(&["lab", "poweroff", &guest.node])?;
    until("the host is declared lost", CHANGE, || {
        let lost = cloud.ask(&["recovery", "status"])?["lost"].clone();
        Ok((lost.as_array().is_some_and(|lost| !lost.is_empty())).then_some(()))
    })?;
    let declared = cut.elapsed();
    let (vm, moved) = until("it runs on another host", CHANGE, || {
        let vm = guest.show(cloud)?;
        let runs = vm["status"] == "running" && vm["loss"].is_object();
        Ok(runs.then(|| Guest::find(cloud, &guest.tenant, &guest.name)).transpose()?.map(|moved| (vm, moved)))
    })?;
    let started = cut.elapsed();
    ensure!(moved.node != guest.node && moved.ip == guest.ip, "it is on {} at {}", moved.node, moved.ip);
    ensure!(vm["loss"]["data_from_millis"].as_u64() > Some(0), "it was not made from its backup: {vm}");
    let after = moved.booted(cloud)?;
    ensure!(after.boots == before.boots + 1, "its disk has booted {} times, not {}", after.boots, before.boots + 1);
    let answered = cut.elapsed();

    cloud.run(&["lab", "start", &guest.node])?;
    nothing_left(cloud)?;
    Ok(format!(
        "{} lost power; declared lost after {:.1} s, {} started on {} after {:.1} s and answered after {:.1} s, boot {} of the same disk",
        guest.node,
        declared.as_secs_f64(),
        guest.name,
        moved.node,
        started.as_secs_f64(),
        answered.as_secs_f64(),
        after.boots
    ))
}

/// Every host is up, and there are as many domains as machines.
fn nothing_left(cloud: &Cloud) -> Result<()> {
    until("every host is up", CHANGE, || {
        let nodes = rows(cloud.ask(&["node", "list"])?, "nodes")?;
        Ok(nodes.iter().all(|node| node["state"] == "up").then_some(()))
    })?;
    until("no host has anything of what was given away", CHANGE, || {
        let machines =
            |tenant: &str| -> Result<Vec<Value>> { rows(cloud.ask(&["vm", "list", "--tenant", tenant])?, "vms") };
        let wanted = machines("acme")?.len() + machines("rival")?.len();
        Ok((domains(cloud)?.values().sum::<usize>() == wanted).then_some(()))
    })
}

/// Parts the leader and a host from everybody else: the host hears the old leader and nobody besides. Its machine that
/// may never run twice is stopped there before it runs elsewhere, and the old leader changes nothing any more.
///
/// # Errors
/// Of the first thing that is not as it should be.
pub fn wrong_side(cloud: &Cloud, tenant: &Tenant) -> Result<String> {
    let name = "web-5";
    let create = tenant.create_arguments(name, "--wait");
    cloud.run(&[&create[..], &["--recovery", "exclusive"]].concat())?;
    let guest = Guest::find(cloud, tenant, name)?;
    guest.booted(cloud)?;
    let before = quorum::whole(cloud)?;
    let (old, leader) = (before.leader, before.leader_name()?);

    let truth = Truth::watch(cloud)?;
    until("its process is seen", CHANGE, || Ok(truth.runs(&guest.id, &guest.node).then_some(())))?;
    let parted = Instant::now();
    cloud.run(&["lab", "part", &leader, &guest.node])?;
    let after = until("another controller leads", CHANGE, || {
        Ok(quorum::status(cloud).ok().filter(|status| status.leader != 0 && status.leader != old))
    })?;
    let elected = parted.elapsed();
    let endpoint = format!("unix:{}", cloud.dir().join(&leader).join("data/api.sock").display());
    let at_the_old = ["--endpoint", &endpoint, "--timeout", "3s", "--tenant", tenant.name];
    let write = cloud.run(&[&["tag", "set", "wrong-side", "written"][..], &at_the_old].concat());
    let refusal = write.err().context("the leader that was cut off acknowledged a write")?;
    let read = cloud.run(&[&["vm", "list"][..], &at_the_old].concat());
    ensure!(read.is_err(), "the leader that was cut off answered a linearizable read");
    until("it runs on another host", CHANGE, || Ok(truth.elsewhere(&guest.id, &guest.node).then_some(())))?;
    let started = parted.elapsed();
    until("the cloud says so", CHANGE, || {
        let vm = guest.show(cloud)?;
        Ok((vm["status"] == "running" && vm["loss"].is_object()).then_some(()))
    })?;
    let moved = Guest::find(cloud, tenant, name)?;
    moved.booted(cloud)?;

    cloud.run(&["lab", "heal", &leader])?;
    cloud.run(&["lab", "heal", &guest.node])?;
    quorum::whole(cloud)?;
    nothing_left(cloud)?;
    let tag = cloud.run(&["tag", "get", "wrong-side", "--tenant", tenant.name]);
    ensure!(tag.is_err(), "what the old leader did not acknowledge was carried out");
    let (looks, paused) = truth.end(&guest)?;
    let refusal = refusal.to_string();
    Ok(format!(
        "{leader} led and was parted with {}; {} leads after {:.1} s; the old leader: {}\n\
         {} was stopped on {} {paused:.1} s before it ran on {}, {:.1} s after the cut; {looks} changes seen, never two",
        guest.node,
        after.leader_name()?,
        elected.as_secs_f64(),
        refusal.lines().last().unwrap_or_default().trim(),
        guest.name,
        guest.node,
        moved.node,
        started.as_secs_f64()
    ))
}

/// What the hosts' processes show, as `trefoil lab homes --watch` tells it, forty times a second.
struct Truth {
    child: Child,
    reader: Option<JoinHandle<()>>,
    changes: Arc<Mutex<Vec<Change>>>,
}

#[derive(Clone)]
struct Change {
    at_micros: u64,
    vm: String,
    host: String,
    runs: bool,
}

impl Truth {
    fn watch(cloud: &Cloud) -> Result<Self> {
        let mut child = cloud.start(&["lab", "homes", "--watch"])?;
        let output = BufReader::new(child.stdout.take().context("its output")?);
        let changes: Arc<Mutex<Vec<Change>>> = Arc::default();
        let noted = changes.clone();
        let reader = std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
                let text = |field: &str| value[field].as_str().unwrap_or_default().to_owned();
                let at_micros = value["at_micros"].as_u64().unwrap_or_default();
                let runs = value["run"] == "running";
                let change = Change { at_micros, vm: text("vm"), host: text("host"), runs };
                noted.lock().expect("nobody panics with it").push(change);
            }
        });
        Ok(Self { child, reader: Some(reader), changes })
    }

    fn changes(&self, vm: &str) -> Vec<Change> {
        let all = self.changes.lock().expect("nobody panics with it");
        all.iter().filter(|change| change.vm == vm).cloned().collect()
    }

    fn runs(&self, vm: &str, host: &str) -> bool {
        self.changes(vm).iter().rev().find(|change| change.host == host).is_some_and(|change| change.runs)
    }

    fn elsewhere(&self, vm: &str, than: &str) -> bool {
        self.changes(vm).iter().any(|change| change.host != than && change.runs)
    }

    fn stop(&mut self) {
        // It may have ended by itself; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }

    /// How many changes were seen, and how many seconds it ran nowhere; an error when it ever ran on two hosts.
    fn end(mut self, guest: &Guest) -> Result<(usize, f64)> {
        self.stop();
        let changes = self.changes(&guest.id);
        let mut running: BTreeMap<&str, bool> = BTreeMap::new();
        let (mut stopped, mut gap) = (None, None);
        for change in &changes {
            running.insert(&change.host, change.runs);
            let hosts: Vec<&str> = running.iter().filter(|(_, runs)| **runs).map(|(host, _)| *host).collect();
            ensure!(hosts.len() < 2, "{} ran on {hosts:?} at the same time", guest.name);
            match (hosts.first(), stopped) {
                (None, _) => stopped = stopped.or(Some(change.at_micros)),
                (Some(_), Some(since)) => gap = gap.or(Some((change.at_micros - since) as f64 / 1e6)),
                (Some(_), None) => {}
            }
        }
        let gap = gap.context("it was not seen to stop and to start again")?;
        Ok((changes.len(), gap))
    }
}

impl Drop for Truth {
    fn drop(&mut self) {
        self.stop();
    }
}
