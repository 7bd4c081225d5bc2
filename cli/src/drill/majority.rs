//! The drill of a majority that is lost for ever: all controllers but one are killed and their data destroyed, the one that is
//! left goes on alone (`trefoil quorum recover`), others join it, and an old voter must not come back.
//!
//! ```text
//!   as many as can be missed are killed ─► a write is acknowledged without them ─► the leader and the rest are killed
//!   ─► no majority: a write is refused ─► the one that is left is the whole quorum ─► writes, hosts say what they hold
//!   ─► an old voter starts from a kept copy: FENCED ─► the others join under new ids
//! ```
//! The write in between is what makes a lost one a broken rule: who is left was needed for it, so it has all that was ever
//! acknowledged. When a majority is lost at one blow the newest writes may be lost with it (`operating.md`).

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context, Result};
use api::{
    client::new_request_id,
    error::ApiError,
    proto::{RecoveryRequest, SetTagRequest, Vm},
};
use tokio::time::{Instant, sleep};

use super::{
    ask::{self, ask},
    heal::Heal,
    quorum::{ELECTION, gone, led, name_of, process_of, whole},
    scene,
    stage::Stage,
    timeline::{Micros, PhaseKind, Run, Timeline},
};
use crate::lab::{act, refound};

/// A controller waits five seconds for a majority before it refuses; of the first write it may not know what became of it.
const REFUSED: Duration = Duration::from_secs(20);
/// Agents try one controller after the other, and each says what it holds.
const FOLLOWED: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Who is left, and who is not. All by name.
struct Parts {
    survivor: String,
    survivor_id: u64,
    /// As many as a quorum can do without.
    spare: Vec<String>,
    /// With them the majority goes; the leader is the first.
    rest: Vec<String>,
    epoch: u64,
    old_ids: BTreeSet<u64>,
}

pub async fn lost_majority(stage: &mut Stage) -> Result<()> {
    let parts = parts(stage).await?;
    let machines: Vec<Vm> = ask::vms(&stage.client).await?.into_iter().filter(|vm| vm.status == "running").collect();
    let fault = format!(
        "{} are killed for ever and their data destroyed; {} is left, as controller-{}",
        parts.lost().map(String::as_str).collect::<Vec<_>>().join(", "),
        parts.survivor,
        parts.survivor_id
    );
    let (began, real) = stage.begin_fault(&parts.survivor, &fault);
    if !real {
        sleep(stage.hold).await;
        whole(stage).await;
        return Ok(());
    }
    stage.heals.extend(parts.lost().map(|name| Heal::Rejoin(name.clone())));
    stage.heals.push(Heal::Refound(parts.survivor.clone()));
    let lost = lose(stage, &parts).await?;
    no_majority(stage, &parts).await?;
    sleep(stage.hold).await;
    if stage.record.see().first_write_after(lost.without).is_some() {
        stage.findings.broken.push("a write was acknowledged while there was no majority".into());
    }
    recover(stage, &parts, lost.at).await?;
    follow(stage, &parts).await?;
    shut_out(stage, &parts.rest[0]).await?;
    join(stage, &parts).await?;
    stage.heal().await;
    whole(stage).await;
    // Hosts go on without a quorum.
    untouched(stage, &machines, began, &["exclusive"]).await;
    Ok(())
}

async fn parts(stage: &mut Stage) -> Result<Parts> {
    let quorum = led(stage).await?;
    let epoch = ask::status(&stage.client).await?.epoch;
    let cloud = stage.cloud()?;
    let (survivor_id, others) = quorum.others.split_first().context("nobody else votes")?;
    let missed = (quorum.others.len() + 1).div_ceil(2) - 1;
    let names = |ids: &[u64]| ids.iter().map(|id| name_of(cloud, *id)).collect::<Result<Vec<_>>>();
    let (spare, rest) = others.split_at(missed.min(others.len()));
    Ok(Parts {
        survivor: name_of(cloud, *survivor_id)?,
        survivor_id: *survivor_id,
        spare: names(spare)?,
        rest: names(&[&[quorum.leader], rest].concat())?,
        epoch,
        old_ids: quorum.others.iter().copied().chain([quorum.leader]).collect(),
    })
}

impl Parts {
    fn lost(&self) -> impl Iterator<Item = &String> {
        self.spare.iter().chain(&self.rest)
    }
}

struct Lost {
    /// The last moment with a majority.
    at: Micros,
    /// From here on there is none, by the kernel's word.
    without: Micros,
}

/// Kills them in that order, and takes the data of each away.
async fn lose(stage: &mut Stage, parts: &Parts) -> Result<Lost> {
    for name in &parts.spare {
        kill(stage, name).await?;
    }
    let since = stage.record.now();
    stage
        .expect("a write is acknowledged by those that are left", ELECTION, |seen| seen.first_write_after(since))
        .await;
    let at = stage.record.now();
    for name in &parts.rest {
        kill(stage, name).await?;
    }
    let without = stage.record.now();
    let old = &parts.rest[0];
    stage.heals.push(Heal::Expel(old.clone()));
    refound::keep(stage.cloud()?, old)?;
    for name in parts.lost().filter(|name| *name != old) {
        refound::destroy(stage.cloud()?, name)?;
    }
    stage.say("no majority is left, and the data of the others is gone");
    Ok(Lost { at, without })
}

async fn kill(stage: &mut Stage, name: &str) -> Result<()> {
    let process = process_of(stage.cloud()?, name)?;
    act::end(stage.cloud()?, name, Duration::ZERO).await?;
    gone(stage, name, process);
    Ok(())
}

/// The one that is left must refuse a write, and say why.
async fn no_majority(stage: &mut Stage, parts: &Parts) -> Result<()> {
    let endpoint = endpoint_of(stage, &parts.survivor)?;
    let (asked, mut seen) = (Instant::now(), String::from("it did not answer"));
    while asked.elapsed() < REFUSED {
        let key = super::load::keys().next().context("the background client writes")?;
        let body = SetTagRequest { tenant: scene::TENANT.into(), key, value: "drill".into(), expected_version: None };
        let request = stage.client.request(Some(new_request_id()), body, REFUSED);
        match stage.client.stub(endpoint).set_tag(request).await.map_err(ApiError::from) {
            Ok(_) => {
                stage.findings.broken.push(format!("{} acknowledged a write without a majority", parts.survivor));
                return Ok(());
            }
            Err(error) if error.code == "no-quorum" => {
                let what = format!("{} refused a write: {error}", parts.survivor);
                stage.say(&what);
                stage.findings.evidence.push(what);
                return Ok(());
            }
            Err(error) => seen = error.to_string(),
        }
        sleep(LOOK_AGAIN).await;
    }
    stage.findings.doubts.push(format!("{} did not refuse a write for want of a majority: {seen}", parts.survivor));
    Ok(())
}

/// The way out, as a person would take it.
async fn recover(stage: &mut Stage, parts: &Parts, lost: Micros) -> Result<()> {
    let healing = stage.record.enter(PhaseKind::Healing);
    stage.say(&format!("{} is stopped, and made the whole quorum (`trefoil quorum recover`)", parts.survivor));
    refound::refound(stage.cloud()?, &parts.survivor).await?;
    let write = stage.expect("a write is acknowledged again", ELECTION, |seen| seen.first_write_after(healing)).await;
    if let Some(write) = write {
        stage.measure("majority lost to the next acknowledged write", write - lost, "the background client", None);
        stage.measure("way out begun to the next acknowledged write", write - healing, "the background client", None);
    }
    let status = ask::status(&stage.client).await?;
    let what = format!("the quorum is of cluster epoch {} after {}", status.epoch, parts.epoch);
    let list = if status.epoch > parts.epoch { &mut stage.findings.evidence } else { &mut stage.findings.unrecovered };
    list.push(what);
    Ok(())
}

/// Every host speaks with the new quorum, and has said what it holds.
async fn follow(stage: &mut Stage, parts: &Parts) -> Result<()> {
    let from = stage.record.now();
    let hosts = stage.cloud()?.hosts.len();
    let spoken = async |client: &api::client::Client| {
        let awaited = ask!(client, get_recovery, RecoveryRequest { stale: false })?.refounding;
        let up = ask::nodes(client).await?.iter().filter(|node| node.state == "up").count();
        Ok(awaited.is_none_or(|open| open.awaited.is_empty()) && up >= hosts)
    };
    stage.reach("every host is up in the new cluster epoch and has said what it holds", FOLLOWED, spoken).await;
    stage.measure("every host has followed", stage.record.now() - from, &parts.survivor, None);
    let left = ask!(stage.client, get_recovery, RecoveryRequest { stale: false })?.refounding;
    let orphans = left.map(|open| open.orphans.len()).unwrap_or_default();
    if orphans > 0 {
        stage.findings.broken.push(format!("{orphans} machines on hosts are not known to the new quorum"));
    }
    Ok(())
}

/// An old voter from a kept copy: it must end by itself, say why, and never start again.
async fn shut_out(stage: &mut Stage, name: &str) -> Result<()> {
    refound::give_back(stage.cloud()?, name)?;
    let tries = [
        ("hears that it is of an old quorum, and ends", "the quorum was refounded without it"),
        ("does not start a second time", "this controller was fenced"),
    ];
    for (what, sentence) in tries {
        let log = stage.cloud()?.log(name);
        let before = fs::metadata(&log).map_or(0, |log| log.len());
        stage.say(&format!("the old {name} is started from a kept copy of its data"));
        let from = stage.record.now();
        // One that ends at once has perhaps ended before it could be looked at; its log tells.
        let started = act::start_controller(stage.cloud()?, name, &[]).await;
        let process = process_of(stage.cloud()?, name).ok().filter(|_| started.is_ok());
        let asked = Instant::now();
        while process.is_some_and(|process| process.is_alive()) && asked.elapsed() < ELECTION {
            sleep(LOOK_AGAIN).await;
        }
        if process.is_some_and(|process| process.is_alive()) {
            stage.findings.broken.push(format!("the old {name} ran on beside the new quorum"));
            break;
        }
        let text = fs::read(&log).unwrap_or_default();
        let told = String::from_utf8_lossy(text.get(usize::try_from(before)?..).unwrap_or_default()).into_owned();
        match told.lines().rev().find(|line| line.contains(sentence)) {
            Some(line) => {
                stage.say(&format!("the old {name} {what}"));
                stage.findings.evidence.push(format!("the old {name} {what}: {}", line.trim()));
                stage.measure("an old voter ended by itself", stage.record.now() - from, name, None);
            }
            None => stage.findings.doubts.push(format!("the old {name} ended and did not say '{sentence}'")),
        }
    }
    if !stage.cloud()?.data(name).join("FENCED").exists() {
        stage.findings.broken.push(format!("nothing in the data of the old {name} says that it is fenced"));
    }
    refound::expel(stage.cloud()?, name).await?;
    stage.heals.retain(|heal| !matches!(heal, Heal::Expel(_)));
    Ok(())
}

/// The places of the lost join the new quorum, under ids that no voter ever had.
async fn join(stage: &mut Stage, parts: &Parts) -> Result<()> {
    stage.heals.retain(|heal| !matches!(heal, Heal::Refound(_)));
    for name in parts.lost() {
        let from = stage.record.now();
        let new = act::wipe(stage.cloud()?, name).await?;
        stage.say(&format!("{name} votes in the new quorum, as controller-{new}"));
        stage.measure("a new member votes", stage.record.now() - from, name, None);
        stage.heals.retain(|heal| !matches!(heal, Heal::Rejoin(other) if other == name));
        if parts.old_ids.contains(&new) {
            stage.findings.broken.push(format!("{name} came back under the old id controller-{new}"));
        }
    }
    let status = ask::status(&stage.client).await?;
    let now: Vec<u64> = status.controllers.iter().map(|controller| controller.id).collect();
    let old: Vec<u64> =
        now.iter().copied().filter(|id| *id != parts.survivor_id && parts.old_ids.contains(id)).collect();
    if old.is_empty() {
        stage.findings.evidence.push(format!("the quorum lists {now:?} and none of the lost"));
    } else {
        stage.findings.broken.push(format!("the quorum still lists {old:?}"));
    }
    Ok(())
}

/// No machine has ended, and none was placed anew. Those of the policies `may_pause` may have been paused at the end of their
/// host's lease.
pub async fn untouched(stage: &mut Stage, machines: &[Vm], since: Micros, may_pause: &[&str]) {
    for vm in machines {
        let (id, host) = (vm.id.as_str(), vm.node.as_str());
        let stopped = stopped(&stage.record.see(), vm, since, may_pause);
        if let Some(run) = stopped {
            let how = if run == Run::Off { "ended" } else { "was paused" };
            stage.findings.broken.push(format!("{id} {how} on {host}"));
        }
        match ask::vm(&stage.client, &vm.tenant, id).await {
            Ok(now) if (now.node.as_str(), now.epoch) == (host, vm.epoch) => {}
            Ok(now) => stage
                .findings
                .broken
                .push(format!("{id} was on {host}, epoch {}, and is on {}, epoch {}", vm.epoch, now.node, now.epoch)),
            Err(error) => stage.findings.unrecovered.push(format!("{id} is not found again: {error}")),
        }
    }
}

/// What a machine did on its host that it should not have.
fn stopped(seen: &Timeline, vm: &Vm, since: Micros, may_pause: &[&str]) -> Option<Run> {
    let may_pause = may_pause.contains(&vm.recovery.as_str());
    let here =
        |home: &&super::timeline::HomeChange| home.vm == vm.id && home.host == vm.node && home.at_micros >= since;
    let stops = |run: &Run| *run == Run::Off || *run == Run::Paused && !may_pause;
    seen.homes.iter().filter(here).map(|home| home.run).find(stops)
}

pub fn endpoint_of(stage: &mut Stage, name: &str) -> Result<usize> {
    let place = stage.cloud()?.controllers.iter().position(|controller| controller.name == name);
    place.with_context(|| format!("there is no controller {name}"))
}

#[cfg(test)]
mod tests {
    use super::{super::timeline::HomeChange, *};

    #[test]
    fn an_exclusive_machine_may_be_paused_and_no_machine_may_end() {
        let home = |at_micros, run| HomeChange { at_micros, vm: "vm-1".into(), host: "h1".into(), run };
        let homes = vec![home(0, Run::Running), home(5, Run::Paused), home(6, Run::Running)];
        let mut seen = Timeline { homes, ..Timeline::default() };
        let vm =
            |recovery: &str| Vm { id: "vm-1".into(), node: "h1".into(), recovery: recovery.into(), ..Vm::default() };
        let stopped = |seen: &Timeline, recovery, since| stopped(seen, &vm(recovery), since, &["exclusive"]);
        assert_eq!(stopped(&seen, "exclusive", 1), None);
        assert_eq!(stopped(&seen, "available", 1), Some(Run::Paused));
        assert_eq!(stopped(&seen, "available", 6), None, "before the fault it may do as it likes");
        seen.homes.push(home(9, Run::Off));
        assert_eq!(stopped(&seen, "exclusive", 1), Some(Run::Off));
    }
}
