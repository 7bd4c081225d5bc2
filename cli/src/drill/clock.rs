//! The drill of a wall clock that is stepped: the leader's, by an hour forward and then by an hour back behind the true time.
//! Nothing may follow from it: no host is lost, no machine touched, and the cloud's time goes on as fast as time does, so that
//! nobody is charged for an hour that was not (ADR 0028).
//!
//! The kernel has one wall clock for all controllers of one machine. One of them gets its own by Debian's libfaketime, which
//! answers for the C library when the controller asks for CLOCK_REALTIME, from a file that the drill writes; the clocks that
//! leases go by stay true. Not here: an agent's wall clock, which decides nothing.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use api::proto::{ControllerRef, CreateTenantRequest, GetBillRequest, RecoveryRequest, Vm};
use tokio::time::sleep;

use super::{
    ask::{self, ask, tell},
    heal::Heal,
    majority::{endpoint_of, untouched},
    quorum::{ELECTION, led, name_of, whole},
    scene,
    stage::Stage,
    timeline::{Micros, Timeline},
};
use crate::{
    lab::{act, member, write_private},
    moment::{moment, now_millis},
};

const HOUR_MILLIS: i64 = 3_600_000;
/// A lease of five seconds, and as much again for a death that it might cause to be seen.
const LONGER_THAN_A_LEASE: Duration = Duration::from_secs(10);
/// A controller that is asked to stop hands leadership over first.
const POLITE: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// A line of a log is written at once.
const SAID: Duration = Duration::from_secs(10);
/// What a log says of an hour need not be right by the second.
const NEAR_MILLIS: u64 = 60_000;
/// The cloud's time may go faster or slower by a hundredth; and what is read is as old as the newest entry.
const SLACK: Duration = Duration::from_secs(2);
const SLEW: u32 = 100;

/// The library, where Debian's package `libfaketime` has it on this machine's architecture.
pub fn library() -> Option<PathBuf> {
    let folders = fs::read_dir("/usr/lib").ok()?.flatten();
    folders.map(|folder| folder.path().join("faketime/libfaketimeMT.so.1")).find(|path| path.exists())
}

pub async fn clock_step(stage: &mut Stage) -> Result<()> {
    let (name, id) = own_clock(stage).await?;
    let machines: Vec<Vm> = ask::vms(&stage.client).await?.into_iter().filter(|vm| vm.status == "running").collect();
    let fault = format!(
        "the wall clock of {name}, which leads as controller-{id}, is put an hour forward, then an hour behind the true time"
    );
    let (at, real) = stage.begin_fault(&name, &fault);
    if real {
        let mut time = Time::begin(stage).await?;
        for hours in [1, -1] {
            step(stage, &name, hours, &mut time).await?;
        }
        time.judge(stage).await?;
        billed(stage, &machines, &time).await?;
        leads_on(stage, id, at);
        lost_nobody(stage, at);
        untouched(stage, &machines, at, &[]).await;
    } else {
        sleep(stage.hold).await;
    }
    stage.heal().await;
    whole(stage).await;
    Ok(())
}

/// Starts a controller that follows with a wall clock of its own, which is true so far, and lets it lead.
async fn own_clock(stage: &mut Stage) -> Result<(String, u64)> {
    let quorum = led(stage).await?;
    let id = *quorum.others.first().context("nobody else votes")?;
    let name = name_of(stage.cloud()?, id)?;
    let library = library().context("there is no libfaketime")?.display().to_string();
    stage.say(&format!("{name} is started anew with a wall clock of its own (libfaketime), and leads"));
    stage.heals.push(Heal::Restart(name.clone()));
    set(stage, &name, 0)?;
    let cloud = stage.cloud()?;
    let clock = cloud.dir.join(&name).join("clock").display().to_string();
    act::end(cloud, &name, POLITE).await?;
    let own = [format!("LD_PRELOAD={library}"), format!("FAKETIME_TIMESTAMP_FILE={clock}")];
    let wrapper = ["env", &own[0], &own[1], "FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1", "NO_FAKE_STAT=1"];
    act::start_controller(cloud, &name, &wrapper).await?;
    member::wait_for_voters(cloud).await?;
    tell!(stage.client, transfer_leader, ControllerRef { id })?;
    let leads = async |client: &api::client::Client| Ok(ask::status(client).await?.leader == id);
    stage.reach(&format!("controller-{id} leads"), ELECTION, leads).await;
    sleep(stage.hold).await;
    Ok((name, id))
}

/// What libfaketime reads at each call: whole or not at all.
fn set(stage: &mut Stage, name: &str, seconds: i64) -> Result<()> {
    let cloud = stage.cloud()?;
    write_private(&cloud.dir.join(name).join("clock"), &format!("{seconds:+}s\n"))
}

async fn step(stage: &mut Stage, name: &str, hours: i64, time: &mut Time) -> Result<()> {
    let log = stage.cloud()?.log(name);
    let before = usize::try_from(fs::metadata(&log).map_or(0, |log| log.len()))?;
    set(stage, name, hours * HOUR_MILLIS / 1000)?;
    let told = format!("the wall clock of {name} is {} h from the true time", hours);
    let endpoint = endpoint_of(stage, name)?;
    let asked = Instant::now();
    let mut line = None;
    while line.is_none() && asked.elapsed() < SAID {
        // Refused, because there is such a tenant; and a refusal is a line in the log, with the time of day.
        let body = CreateTenantRequest { name: scene::TENANT.into(), quota: None };
        let request = stage.client.request(Some(api::client::new_request_id()), body, SAID);
        let _ = stage.client.stub(endpoint).create_tenant(request).await;
        let text = fs::read(&log).unwrap_or_default();
        let text = String::from_utf8_lossy(text.get(before..).unwrap_or_default()).into_owned();
        let should = now_millis().saturating_add_signed(hours * HOUR_MILLIS);
        line = text.lines().find(|line| is_of(line, should)).map(|line| line.chars().take(19).collect::<String>());
        sleep(LOOK_AGAIN).await;
    }
    match line {
        Some(line) => {
            stage.say(&told);
            stage.findings.evidence.push(format!("{told}: its log says {line}"));
        }
        None => stage.findings.doubts.push(format!("the log of {name} does not show that {told}")),
    }
    let held = Instant::now();
    while held.elapsed() < LONGER_THAN_A_LEASE.max(stage.hold) {
        time.look(stage).await?;
        sleep(LOOK_AGAIN).await;
    }
    Ok(())
}

/// Whether a line of a log is of that time.
fn is_of(line: &str, millis: u64) -> bool {
    let text: String = line.chars().take(19).collect();
    moment(&text).is_ok_and(|at| at.abs_diff(millis) < NEAR_MILLIS)
}

/// The cloud's own time beside this program's monotonic clock.
struct Time {
    began: Instant,
    first_millis: u64,
    last_millis: u64,
    looked: Instant,
    looks: u32,
}

impl Time {
    async fn begin(stage: &mut Stage) -> Result<Self> {
        let now = cloud_time(stage).await?;
        let began = Instant::now();
        Ok(Self { began, first_millis: now, last_millis: now, looked: began, looks: 0 })
    }

    async fn look(&mut self, stage: &mut Stage) -> Result<()> {
        let now = cloud_time(stage).await?;
        if now < self.last_millis {
            let what = format!("the cloud's time went back by {} ms", self.last_millis - now);
            stage.findings.broken.push(what);
        }
        (self.last_millis, self.looked, self.looks) = (now, Instant::now(), self.looks + 1);
        Ok(())
    }

    async fn judge(&mut self, stage: &mut Stage) -> Result<()> {
        self.look(stage).await?;
        let went = Duration::from_millis(self.last_millis.saturating_sub(self.first_millis));
        let passed = self.looked - self.began;
        let what = format!("the cloud's time went on by {went:.1?} in {passed:.1?}, looked at {} times", self.looks);
        let list = if is_right(went, passed) { &mut stage.findings.evidence } else { &mut stage.findings.broken };
        list.push(what.clone());
        stage.say(&what);
        Ok(())
    }
}

fn is_right(went: Duration, passed: Duration) -> bool {
    went.abs_diff(passed) <= passed / SLEW + SLACK
}

async fn cloud_time(stage: &Stage) -> Result<u64> {
    let read_at = ask!(stage.client, get_recovery, RecoveryRequest { stale: false })?.read_at;
    Ok(read_at.context("the answer does not say of when it is")?.time_millis)
}

/// Each machine that ran all the time is charged for so long, by the bill's own lines.
async fn billed(stage: &mut Stage, machines: &[Vm], time: &Time) -> Result<()> {
    for vm in machines {
        let body = GetBillRequest {
            tenant: vm.tenant.clone(),
            from_millis: time.first_millis,
            to_millis: time.last_millis,
            stale: false,
        };
        let bill = ask!(stage.client, get_bill, body)?;
        let of_it = bill.lines.iter().filter(|line| line.resource == vm.id);
        let charged = Duration::from_millis(of_it.map(|line| line.to_millis - line.from_millis).sum());
        let passed = time.looked - time.began;
        let what = format!("{} is charged for {charged:.1?} of {passed:.1?}", vm.id);
        let list = if is_right(charged, passed) { &mut stage.findings.evidence } else { &mut stage.findings.broken };
        list.push(what);
    }
    Ok(())
}

/// Who leads is not decided by the time of day. On a machine that is too busy another may lead by chance; then it is not proved
/// that the leader's clock was stepped.
fn leads_on(stage: &mut Stage, id: u64, at: Micros) {
    let other = stage.record.see().leaders.iter().find(|now| now.at_micros >= at && now.leader != id).cloned();
    if let Some(other) = other {
        stage.findings.doubts.push(format!("controller-{} led meanwhile, term {}", other.leader, other.term));
    }
}

fn lost_nobody(stage: &mut Stage, at: Micros) {
    let lost = |seen: &Timeline| {
        let bad = seen.nodes.iter().filter(|now| now.at_micros >= at && now.state != "up");
        bad.map(|now| format!("{} was {}", now.node, now.state)).collect::<Vec<_>>()
    };
    let lost = lost(&stage.record.see());
    stage.findings.broken.extend(lost);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_that_was_not_is_not_right_and_a_hundredth_is() {
        let of = Duration::from_secs;
        assert!(is_right(of(60), of(60)) && is_right(of(62), of(60)) && is_right(of(58), of(60)));
        assert!(!is_right(of(3660), of(60)) && !is_right(of(0), of(60)));
    }

    #[test]
    fn a_log_tells_the_time_of_day() {
        let at = moment("2026-11-23T01:51:35").unwrap();
        assert!(is_of("2026-11-23T01:51:35.045310Z  INFO controller: running", at + 500));
        assert!(!is_of("2026-11-23T00:51:35.045310Z  INFO controller: running", at));
        assert!(!is_of("thread 'main' panicked", at));
    }
}
