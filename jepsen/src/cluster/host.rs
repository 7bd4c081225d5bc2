//! The hosts of a cluster: agents whose guests exist on paper, so that a power cut costs no machine.

use std::{
    fs::OpenOptions,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::Context;
use api::proto::ListRequest;

use super::Cluster;
use crate::history::monotonic_nanos;

impl Cluster {
    /// How many hosts there are.
    pub fn agents(&self) -> usize {
        self.agents.len()
    }

    pub fn agent_name(&self, agent: usize) -> &str {
        &self.agents[agent].name
    }

    pub fn agent_data(&self, agent: usize) -> &Path {
        &self.agents[agent].data
    }

    /// Where all agents write what they did to guests, a JSON object a line.
    pub fn effects(&self) -> PathBuf {
        self.root.join("effects")
    }

    /// `kill -9`, and nothing runs on the host any more; the effect log says since when. True when that is how the agent
    /// ended.
    ///
    /// # Errors
    /// When it does not run, or a file cannot be written.
    pub fn cut_power(&mut self, agent: usize) -> anyhow::Result<bool> {
        let killed = self.kill_agent(agent)?;
        let line = serde_json::json!({
            "time_ns": monotonic_nanos(), "host": self.agents[agent].name, "effect": "power",
        });
        // One write, as the agents do.
        OpenOptions::new().create(true).append(true).open(self.effects())?.write_all(format!("{line}\n").as_bytes())?;
        // The next agent finds its guests ended.
        std::fs::write(self.agents[agent].data.join("sim-control.json"), r#"{"power_failure": true}"#)?;
        Ok(killed)
    }

    /// From now on the host hears nobody and nobody hears it.
    ///
    /// # Errors
    /// When the cluster is not on hosts of its own.
    pub fn cut_host(&self, agent: usize) -> anyhow::Result<()> {
        let switch = self.switch.as_ref().context("links can be cut only between hosts")?;
        let host = self.agents[agent].host;
        let all = self.controllers.iter().chain(&self.agents).map(|member| member.host);
        for other in all.filter(|other| *other != host) {
            switch.link(other, host).cut()?;
            switch.link(host, other).cut()?;
        }
        Ok(())
    }

    /// What the quorum says of a host: up, silent, lost, …; empty when nobody answers.
    pub async fn host_state(&self, agent: usize) -> String {
        let Ok(client) = self.client() else { return String::new() };
        let list = ListRequest { limit: 1000, ..Default::default() };
        let call = |mut stub: super::Stub, request| async move { stub.list_nodes(request).await };
        let nodes = client.with_deadline(super::ASK).read(list, call).await.map(|reply| reply.nodes);
        let found = nodes.unwrap_or_default().into_iter().find(|node| node.name == self.agents[agent].name);
        found.map(|node| node.state).unwrap_or_default()
    }
}
