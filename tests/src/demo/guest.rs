//! A machine of the demonstration: created, asked over HTTP, asked from the inside.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::cloud::{Cloud, until};

/// A guest boots in seconds with KVM and in half a minute emulated; five at once on two cores take longer.
pub const BOOT: Duration = Duration::from_secs(300);
/// One HTTP request to an emulated guest on a busy machine.
const ANSWER: Duration = Duration::from_secs(15);

/// A tenant with its one network.
#[derive(Clone)]
pub struct Tenant {
    pub name: &'static str,
    pub vni: u64,
}

#[derive(Clone)]
pub struct Guest {
    pub name: String,
    pub tenant: Tenant,
    pub id: String,
    pub node: String,
    pub ip: String,
}

/// What a guest says of itself.
#[derive(Debug)]
pub struct Info {
    pub hostname: String,
    /// How often its disk has booted.
    pub boots: u64,
    /// Counts in its memory, twice a second, while it runs.
    pub counter: u64,
}

impl Tenant {
    /// Made with a network of this range.
    ///
    /// # Errors
    /// What the cloud answered.
    pub fn create(cloud: &Cloud, name: &'static str, range: &str) -> Result<Self> {
        cloud.ask(&["tenant", "create", name])?;
        let network = cloud.ask(&["network", "create", "blue", "--range", range, "--tenant", name])?;
        Ok(Self { name, vni: network["vni"].as_u64().context("the network has no VNI")? })
    }

    /// The arguments that create a machine here and wait until it runs.
    pub fn create_arguments<'a>(&self, name: &'a str, wait: &'a str) -> Vec<&'a str> {
        vec![
            "vm",
            "create",
            name,
            "--image",
            "guest",
            "--template",
            "tiny",
            "--network",
            "blue",
            "--tenant",
            self.name,
            wait,
            "--output",
            "json",
        ]
    }
}

impl Guest {
    /// # Errors
    /// When the machine is not there or has no node or address.
    pub fn find(cloud: &Cloud, tenant: &Tenant, name: &str) -> Result<Self> {
        let vm = cloud.ask(&["vm", "show", name, "--tenant", tenant.name])?;
        let nodes = cloud.ask(&["node", "list"])?;
        let is_its = |node: &&Value| node["id"] == vm["node"] || node["name"] == vm["node"];
        let node = nodes["nodes"].as_array().and_then(|nodes| nodes.iter().find(is_its));
        let text = |field: &str, value: &Value| {
            value
                .as_str()
                .filter(|text| !text.is_empty())
                .map(str::to_owned)
                .with_context(|| format!("no {field} in {vm}"))
        };
        Ok(Self {
            name: text("name", &vm["name"])?,
            tenant: tenant.clone(),
            id: text("id", &vm["id"])?,
            node: text("node", &node.unwrap_or(&Value::Null)["name"])?,
            ip: text("address", &vm["nics"][0]["ip"])?,
        })
    }

    /// What it is now, as the cloud says.
    ///
    /// # Errors
    /// What the cloud answered.
    pub fn show(&self, cloud: &Cloud) -> Result<Value> {
        cloud.ask(&["vm", "show", &self.name, "--tenant", self.tenant.name])
    }

    /// Suspend, resume, reboot, stop, start; waits until it is done.
    ///
    /// # Errors
    /// What the cloud answered.
    pub fn tell(&self, cloud: &Cloud, verb: &str) -> Result<()> {
        cloud.run(&["vm", verb, &self.name, "--tenant", self.tenant.name, "--wait"]).map(|_| ())
    }

    /// What it says of itself, asked from its network on its own host; `None` while it does not answer.
    pub fn info(&self, cloud: &Cloud) -> Option<Info> {
        let url = format!("http://{}/cgi-bin/info", self.ip);
        parse(&cloud.http(&self.node, self.tenant.vni, &url, None, ANSWER)?)
    }

    /// # Errors
    /// When it does not answer in time, or somebody else answers.
    pub fn booted(&self, cloud: &Cloud) -> Result<Info> {
        let info = until(&format!("{} answers over HTTP", self.name), BOOT, || Ok(self.info(cloud)))?;
        ensure!(info.hostname == self.name, "'{}' answers at the address of {}", info.hostname, self.name);
        Ok(info)
    }

    /// Who answers this guest at an address of its network; `None` when nobody does.
    ///
    /// # Errors
    /// When the guest itself does not answer: then nothing is known.
    pub fn asks(&self, cloud: &Cloud, ip: &str) -> Result<Option<String>> {
        let script = format!("timeout 8 wget -q -O - http://{ip}/cgi-bin/info; echo");
        let url = format!("http://{}/cgi-bin/sh", self.ip);
        let heard = cloud.http(&self.node, self.tenant.vni, &url, Some(&script), ANSWER * 2);
        let heard = heard.with_context(|| format!("{} could not be asked to ask {ip}", self.name))?;
        ensure!(heard.contains("rc=0"), "{} could not ask: {heard}", self.name);
        Ok(heard.lines().find_map(parse).map(|info| info.hostname))
    }
}

fn parse(text: &str) -> Option<Info> {
    let value: Value = serde_json::from_str(text.trim()).ok()?;
    Some(Info {
        hostname: value["hostname"].as_str()?.to_owned(),
        boots: value["boots"].as_u64()?,
        counter: value["counter"].as_u64()?,
    })
}
