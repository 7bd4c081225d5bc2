//! What the controllers have left on their disks after a run, read by the product's own offline tool.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    process::Command,
};

use anyhow::{Context, bail};
use serde::Serialize;
use serde_json::Value;

use super::Cluster;

/// Where the controllers' disks are, for when they have stopped.
pub struct Disks {
    binary: PathBuf,
    controllers: Vec<(String, PathBuf)>,
}

/// What one controller has left.
#[derive(Clone, Debug, Default)]
pub struct Dump {
    pub controller: String,
    /// Up to where the log has been forgotten; 0 when it is whole.
    pub purged: u64,
    pub last: u64,
    pub applied: u64,
    /// The term of the last entry, and that of the last vote.
    pub terms: (u64, u64),
    /// Each entry that the log still has, by index, as the tool prints it.
    pub entries: BTreeMap<u64, Value>,
    /// What each request that the state remembers came to: the index or the refusal that was answered.
    pub requests: BTreeMap<String, Outcome>,
    pub hashes: BTreeMap<u64, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was done; with the version that it made when it is one of a tag.
    Done(Option<u64>),
    Refused(String),
}

impl Cluster {
    pub fn disks(&self) -> Disks {
        let controllers = self.controllers.iter().map(|member| (member.name.clone(), member.data.clone()));
        Disks { binary: self.binary.clone(), controllers: controllers.collect() }
    }
}

impl Disks {
    /// What all of them have, each also with the hash of its state at the highest index that one of them had applied.
    ///
    /// # Errors
    /// When a controller runs, or its disk cannot be read: the tool's own word.
    pub fn dump(&self) -> anyhow::Result<Vec<Dump>> {
        let mut dumps: Vec<Dump> = self
            .controllers
            .iter()
            .map(|(name, data)| {
                let lines = self.tool(name, data, &["--log", "--state"])?;
                read(name, &lines).with_context(|| format!("the dump of {name} is not what it should be"))
            })
            .collect::<anyhow::Result<_>>()?;
        let newest = dumps.iter().map(|dump| dump.applied).max().unwrap_or(0);
        for (dump, (name, data)) in dumps.iter_mut().zip(&self.controllers) {
            if dump.applied < newest && dump.last >= newest {
                let lines = self.tool(name, data, &["--at", &newest.to_string()])?;
                dump.hashes.extend(lines.first().and_then(hash));
            }
        }
        Ok(dumps)
    }

    fn tool(&self, name: &str, data: &std::path::Path, more: &[&str]) -> anyhow::Result<Vec<Value>> {
        let mut command = Command::new(&self.binary);
        command.args(["controller", "dump", "--output", "json", "--data"]).arg(data).args(more);
        let output = command.output()?;
        if !output.status.success() {
            bail!("dump of {name}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let lines = output.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(|line| Ok(serde_json::from_slice(line)?)).collect()
    }
}

fn read(name: &str, lines: &[Value]) -> Option<Dump> {
    let head = lines.first().filter(|line| line["kind"] == "controller")?;
    let index = |part: &str| head[part]["index"].as_u64().unwrap_or(0);
    let term = |part: &str| head[part]["term"].as_u64().unwrap_or(0);
    let mut dump = Dump {
        controller: name.to_owned(),
        purged: index("purged"),
        last: index("last"),
        applied: index("applied"),
        terms: (term("last"), term("vote")),
        hashes: hash(head).into_iter().collect(),
        ..Dump::default()
    };
    for line in &lines[1..] {
        match line["kind"].as_str()? {
            "entry" => drop(dump.entries.insert(line["index"].as_u64()?, line.clone())),
            "row" if line["table"] == "requests" => {
                drop(dump.requests.insert(line["key"].as_str()?.to_owned(), outcome(&line["row"]["outcome"])?));
            }
            _ => {}
        }
    }
    Some(dump)
}

fn hash(head: &Value) -> Option<(u64, String)> {
    Some((head["state"]["index"].as_u64()?, head["state"]["hash"].as_str()?.to_owned()))
}

fn outcome(row: &Value) -> Option<Outcome> {
    let (what, value) = row.as_object()?.iter().next()?;
    Some(match what.as_str() {
        "Ok" => Outcome::Done(value["Version"].as_u64()),
        _ => Outcome::Refused(value.to_string()),
    })
}

impl Dump {
    /// The request ids of all entries that the log still has.
    pub fn logged(&self) -> BTreeSet<&str> {
        self.entries.values().filter_map(|entry| entry["request"].as_str()).collect()
    }
}
