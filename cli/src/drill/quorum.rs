//! Drills of one controller: the leader is killed or hands over, one loses its data, one has a full disk.

use std::time::Duration;

use anyhow::{Context, Result};
use api::proto::{ControllerRef, QuorumStatusReply};
use tokio::time::{Instant, sleep};

use super::{
    ask::{self, tell},
    heal::Heal,
    stage::Stage,
    timeline::Micros,
};
use crate::lab::{
    Cloud, Place, act, member,
    process::{ProcessId, run},
};

/// Many elections; who has no leader after it will not get one.
pub const ELECTION: Duration = Duration::from_secs(60);
/// A controller that cannot write finds out at the next entry.
const NOTICE: Duration = Duration::from_secs(30);
const SECOND: Duration = Duration::from_secs(1);
/// Makes a full disk an error for the program and not its end by the kernel.
const NO_SIGNAL: [&str; 2] = ["env", "--ignore-signal=XFSZ"];

/// Who leads, and who else votes.
pub struct Quorum {
    pub leader: u64,
    pub term: u64,
    pub others: Vec<u64>,
}

pub async fn leader_kill(stage: &mut Stage) -> Result<()> {
    let quorum = led(stage).await?;
    let name = name_of(stage.cloud()?, quorum.leader)?;
    let process = process_of(stage.cloud()?, &name)?;
    let fault = format!("kill -9 of {name}, which leads as controller-{}", quorum.leader);
    let (_, real) = stage.begin_fault(&name, &fault);
    if real {
        agreed_before(stage, &quorum).await;
        stage.heals.push(Heal::Start(name.clone()));
        let at = stage.record.now();
        act::end(stage.cloud()?, &name, Duration::ZERO).await?;
        gone(stage, &name, process);
        succeeded(stage, &quorum, at).await;
    }
    sleep(stage.hold).await;
    let healing = stage.record.now();
    stage.heal().await;
    whole(stage).await;
    if real {
        stage.measure("back after its start", stage.record.now() - healing, &name, None);
    }
    Ok(())
}

pub async fn leader_transfer(stage: &mut Stage) -> Result<()> {
    let quorum = led(stage).await?;
    let to = *quorum.others.first().context("nobody else votes")?;
    let target = format!("controller-{}", quorum.leader);
    let (at, real) =
        stage.begin_fault(&target, &format!("controller-{} hands leadership to controller-{to}", quorum.leader));
    if real {
        agreed_before(stage, &quorum).await;
        tell!(stage.client, transfer_leader, ControllerRef { id: to })?;
        succeeded(stage, &quorum, at).await;
    }
    sleep(stage.hold).await;
    whole(stage).await;
    Ok(())
}

pub async fn controller_wipe(stage: &mut Stage) -> Result<()> {
    let quorum = led(stage).await?;
    let old = *quorum.others.first().context("nobody else votes")?;
    let name = name_of(stage.cloud()?, old)?;
    let process = process_of(stage.cloud()?, &name)?;
    let (at, real) = stage.begin_fault(&name, &format!("{name}, controller-{old}, is killed and loses its data"));
    if real {
        stage.heals.push(Heal::Rejoin(name.clone()));
        act::end(stage.cloud()?, &name, Duration::ZERO).await?;
        gone(stage, &name, process);
        sleep(stage.hold).await;
        let new = act::wipe(stage.cloud()?, &name).await?;
        stage.heals.pop();
        stage.say(&format!("{name} votes again, as controller-{new}"));
        stage.measure("wiped controller votes again", stage.record.now() - at, &name, None);
        let status = ask::status(&stage.client).await?;
        let voters: Vec<u64> = status.controllers.iter().map(|controller| controller.id).collect();
        if new != old && voters.contains(&new) && !voters.contains(&old) {
            stage.findings.evidence.push(format!("the quorum lists controller-{new} and no more controller-{old}"));
        } else {
            stage.findings.broken.push(format!("{name} came back as controller-{new}; the quorum lists {voters:?}"));
        }
    }
    stage.heal().await;
    whole(stage).await;
    Ok(())
}

pub async fn disk_full(stage: &mut Stage) -> Result<()> {
    let quorum = led(stage).await?;
    let id = *quorum.others.first().context("nobody else votes")?;
    let name = name_of(stage.cloud()?, id)?;
    stage.say(&format!("{name} is started anew, so that a full disk is an error for it and not a signal"));
    stage.heals.push(Heal::Start(name.clone()));
    let cloud = stage.cloud()?;
    act::end(cloud, &name, NOTICE).await?;
    act::start_controller(cloud, &name, &NO_SIGNAL).await?;
    member::wait_for_voters(cloud).await?;
    let process = process_of(stage.cloud()?, &name)?;
    sleep(stage.hold).await;
    let fault = format!("no file of {name} may grow any more: every write to its disk fails (EFBIG)");
    let (at, real) = stage.begin_fault(&name, &fault);
    if real {
        let limit = ["prlimit", &format!("--pid={}", process.pid), "--fsize=0:0"];
        run(&stage.cloud()?.dir, &Place::Here, &limit).await?;
        full(stage, &name, process, at).await?;
        sleep(stage.hold).await;
    }
    stage.heal().await;
    whole(stage).await;
    Ok(())
}

/// The controller must notice, and stop: a disk error is not retried.
async fn full(stage: &mut Stage, name: &str, process: ProcessId, at: Micros) -> Result<()> {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", process.pid)).unwrap_or_default();
    let limited =
        limits.lines().any(|line| line.starts_with("Max file size") && line.split_whitespace().nth(3) == Some("0"));
    if limited {
        stage.findings.evidence.push(format!("the kernel listed a largest file size of 0 for {name}"));
    }
    let asked = Instant::now();
    while process.is_alive() && asked.elapsed() < NOTICE {
        sleep(SECOND / 50).await;
    }
    if process.is_alive() {
        stage
            .findings
            .unrecovered
            .push(format!("{name} went on for {} s with a disk that takes nothing", NOTICE.as_secs()));
    } else {
        stage.say(&format!("{name} has stopped by itself"));
        stage.measure("stopped on a full disk", stage.record.now() - at, name, None);
    }
    Ok(())
}

pub async fn led(stage: &Stage) -> Result<Quorum> {
    let QuorumStatusReply { leader, term, controllers, .. } = ask::status(&stage.client).await?;
    let others = controllers.iter().filter(|c| c.role == "voter" && c.id != leader).map(|c| c.id).collect();
    Ok(Quorum { leader, term, others })
}

/// Whether who is about to be hurt leads: a majority must say so, of the same term.
async fn agreed_before(stage: &mut Stage, quorum: &Quorum) {
    let all = (0..stage.client.endpoints()).map(|endpoint| ask::status_of(&stage.client, endpoint, SECOND));
    let replies: Vec<QuorumStatusReply> = futures::future::join_all(all).await.into_iter().flatten().collect();
    let agree = replies.iter().filter(|reply| (reply.leader, reply.term) == (quorum.leader, quorum.term)).count();
    let all = quorum.others.len() + 1;
    let what = format!("{agree} of {all} controllers said that controller-{} led, term {}", quorum.leader, quorum.term);
    let list = if agree * 2 > all { &mut stage.findings.evidence } else { &mut stage.findings.doubts };
    list.push(what);
}

/// The kernel's word.
pub fn gone(stage: &mut Stage, name: &str, process: ProcessId) {
    let what = format!("process {} of {name}", process.pid);
    match process.is_alive() {
        true => stage.findings.doubts.push(format!("{what} is still there")),
        false => stage.findings.evidence.push(format!("{what} has ended")),
    }
}

async fn succeeded(stage: &mut Stage, quorum: &Quorum, at: Micros) {
    let (old, term) = (quorum.leader, quorum.term);
    let new =
        stage.expect("another controller leads", ELECTION, |seen| seen.led_by_another(old, term, at).cloned()).await;
    if let Some(new) = new {
        let of = format!("controller-{}", new.leader);
        stage.measure("another controller was seen to lead", new.at_micros - at, &of, None);
        stage.findings.evidence.push(format!("{of} leads since, term {} after {term}", new.term));
    }
    let write = stage
        .expect("a write that was begun after it is acknowledged", ELECTION, |seen| seen.first_write_after(at))
        .await;
    if let Some(write) = write {
        stage.measure("first write acknowledged", write - at, "the background client", None);
    }
}

/// Every controller votes, and the states agree.
pub async fn whole(stage: &mut Stage) {
    let wanted = stage.client.endpoints();
    let votes = async |client: &api::client::Client| {
        let status = ask::status(client).await?;
        let voters = status.controllers.iter().filter(|c| matches!(&*c.role, "leader" | "voter")).count();
        Ok(status.leader != 0 && status.hashes_agree && voters >= wanted)
    };
    stage.reach("every controller votes, and their states agree", ELECTION, votes).await;
}

pub fn name_of(cloud: &Cloud, id: u64) -> Result<String> {
    let found = cloud.controllers.iter().find(|controller| controller.id == id);
    Ok(found.with_context(|| format!("controller-{id} is not one of this cloud's record"))?.name.clone())
}

pub fn process_of(cloud: &Cloud, name: &str) -> Result<ProcessId> {
    let found = cloud.controllers.iter().find(|controller| controller.name == name);
    found.and_then(|controller| controller.process).with_context(|| format!("{name} does not run"))
}
