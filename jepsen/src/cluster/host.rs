//! The hosts of a cluster: agents whose guests exist on paper, so that a power cut costs no machine.

use std::{
    fs::OpenOptions,
    io::Write,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Context;
use api::proto::ListRequest;

use super::{Cluster, launch::CONTROLLER_PORT, relay::Relay};
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

    /// From now on the host hears nobody and nobody hears it, but for a controller that is cut off with it.
    ///
    /// # Errors
    /// When the cluster is not on hosts of its own.
    pub fn cut_host(&self, agent: usize, with: Option<usize>) -> anyhow::Result<()> {
        let switch = self.switch.as_ref().context("links can be cut only between hosts")?;
        let mut these: Vec<usize> = with.map(|controller| self.controllers[controller].host).into_iter().collect();
        these.push(self.agents[agent].host);
        switch.part(&these, &self.hosts().filter(|other| !these.contains(other)).collect::<Vec<_>>())
    }

    /// From now on no connection with the host goes on; datagrams do.
    ///
    /// # Errors
    /// When the cluster is not on hosts of its own.
    pub fn cut_streams(&self, agent: usize) -> anyhow::Result<()> {
        let switch = self.switch.as_ref().context("links can be cut only between hosts")?;
        let host = self.agents[agent].host;
        for other in self.hosts().filter(|other| *other != host) {
            switch.link(other, host).cut_streams()?;
            switch.link(host, other).cut_streams()?;
        }
        Ok(())
    }

    fn hosts(&self) -> impl Iterator<Item = usize> {
        self.controllers.iter().chain(&self.agents).map(|member| member.host)
    }

    /// From now on the heartbeats between all that are there go through a [`Relay`], unchanged until it is told otherwise.
    /// Controllers that come later hear them as before.
    ///
    /// # Errors
    /// When the cluster is not on hosts of its own, or the kernel refuses.
    pub fn relay_beats(&mut self) -> anyhow::Result<()> {
        let switch = self.switch.as_ref().context("a relay can be only between hosts")?;
        let hosts = |members: &[super::Member]| members.iter().map(|member| member.host).collect::<Vec<_>>();
        let (controllers, agents) = (hosts(&self.controllers), hosts(&self.agents));
        self.relay = Some(Arc::new(Relay::start(switch, &controllers, &agents, CONTROLLER_PORT)?));
        Ok(())
    }

    /// # Errors
    /// Before [`Self::relay_beats`].
    pub fn relay(&self) -> anyhow::Result<Arc<Relay>> {
        self.relay.clone().context("nothing is on the way of heartbeats")
    }

    /// Where its heartbeats come from.
    ///
    /// # Errors
    /// When the cluster is not on hosts of its own.
    pub fn agent_ip(&self, agent: usize) -> anyhow::Result<IpAddr> {
        let switch = self.switch.as_ref().context("only hosts have addresses of their own")?;
        Ok(switch.ip(self.agents[agent].host).parse()?)
    }

    /// What the quorum says of a host: up, silent, lost, …; empty when nobody answers.
    pub async fn host_state(&self, agent: usize) -> String {
        self.host_state_but(agent, None).await
    }

    /// The same, and one controller is not asked.
    pub async fn host_state_but(&self, agent: usize, but: Option<usize>) -> String {
        let asked: Vec<String> =
            (0..self.size()).filter(|member| Some(*member) != but).map(|member| self.endpoint(member)).collect();
        let Ok(client) = self.client_of(&asked) else { return String::new() };
        let list = ListRequest { limit: 1000, ..Default::default() };
        let call = |mut stub: super::Stub, request| async move { stub.list_nodes(request).await };
        let nodes = client.with_deadline(super::ASK).read(list, call).await.map(|reply| reply.nodes);
        let found = nodes.unwrap_or_default().into_iter().find(|node| node.name == self.agents[agent].name);
        found.map(|node| node.state).unwrap_or_default()
    }
}
