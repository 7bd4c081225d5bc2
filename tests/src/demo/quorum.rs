//! The controllers, as the demonstration sees and hurts them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::cloud::{Cloud, until};

const PATIENCE: Duration = Duration::from_secs(60);

pub struct Status {
    pub leader: u64,
    /// Id, the laboratory's name, role.
    pub controllers: Vec<(u64, String, String)>,
    pub hashes_agree: bool,
    pub applied: u64,
}

/// # Errors
/// What the cloud answered.
pub fn status(cloud: &Cloud) -> Result<Status> {
    let reply = cloud.ask(&["quorum", "status"])?;
    let number = |value: &Value, field: &str| value[field].as_u64().with_context(|| format!("no {field} in {value}"));
    let controllers = reply["controllers"].as_array().context("no controllers")?;
    let one = |c: &Value| {
        Ok((number(c, "id")?, c["name"].as_str().unwrap_or("").to_owned(), c["role"].as_str().unwrap_or("").to_owned()))
    };
    Ok(Status {
        leader: number(&reply, "leader")?,
        controllers: controllers.iter().map(one).collect::<Result<_>>()?,
        hashes_agree: reply["hashes_agree"].as_bool().unwrap_or(false),
        applied: number(&reply, "applied_index")?,
    })
}

impl Status {
    /// Name of the leader.
    pub fn leader_name(&self) -> Result<String> {
        self.name_of(self.leader)
    }

    fn name_of(&self, id: u64) -> Result<String> {
        let found = self.controllers.iter().find(|(own, _, _)| *own == id);
        found.map(|(_, name, _)| name.clone()).with_context(|| format!("controller {id} is not in the quorum"))
    }

    /// A controller that does not lead.
    pub fn follower(&self) -> Result<(u64, String)> {
        let found = self.controllers.iter().find(|(id, _, role)| *id != self.leader && role == "voter");
        found.map(|(id, name, _)| (*id, name.clone())).context("there is no follower")
    }

    fn is_whole(&self) -> bool {
        let votes = |role: &str| role == "leader" || role == "voter";
        self.leader != 0 && self.hashes_agree && self.controllers.iter().filter(|(_, _, role)| votes(role)).count() == 3
    }
}

/// Waits until three controllers vote and their states agree.
///
/// # Errors
/// When that takes too long.
pub fn whole(cloud: &Cloud) -> Result<Status> {
    until("three controllers vote and agree", PATIENCE, || status(cloud).map(|s| s.is_whole().then_some(s)))
}

/// A controller loses its disk and joins anew, while writes go on. Returns what was seen.
///
/// # Errors
/// When it does not come back under another id, or a write fails meanwhile.
pub fn wipe(cloud: &Cloud, tenant: &str) -> Result<String> {
    let before = whole(cloud)?;
    let (old, name) = before.follower()?;
    cloud.run(&["lab", "kill", &name])?;
    let mut wiping = cloud.start(&["lab", "wipe", &name])?;
    let mut writes = 0;
    while wiping.try_wait()?.is_none() {
        let value = format!("value-{writes}");
        cloud.run(&["tag", "set", "written-meanwhile", &value, "--tenant", tenant])?;
        writes += 1;
    }
    super::cloud::finish(&format!("trefoil lab wipe {name}"), &wiping.wait_with_output()?)?;
    let after = whole(cloud)?;
    ensure!(!after.controllers.iter().any(|(id, _, role)| *id == old && role == "voter"), "the old id still votes");
    let new = after.controllers.iter().map(|(id, _, _)| *id).max().unwrap_or(0);
    ensure!(new > old && !before.controllers.iter().any(|(id, _, _)| *id == new), "it has no new id");
    let tag = cloud.ask(&["tag", "get", "written-meanwhile", "--tenant", tenant])?;
    ensure!(
        writes > 0 && tag["value"] == format!("value-{}", writes - 1),
        "the last write meanwhile is not there: {tag}"
    );
    Ok(format!(
        "{name} was controller-{old}, is controller-{new}; {writes} writes meanwhile; index {}, hashes agree",
        after.applied
    ))
}
