//! Which hosts have to be told of a change: their wishes get a new generation.

use std::collections::BTreeSet;

use super::State;
use crate::{NetworkId, NodeId, level::QUIET_TUNNELS};

impl State {
    /// The hosts with a machine in the network.
    pub(crate) fn members(&self, network: NetworkId) -> impl Iterator<Item = NodeId> {
        self.index.network_nodes.get(&network).into_iter().flatten().map(|(node, _)| *node)
    }

    /// Which of these hosts are in which of these networks.
    pub(super) fn members_of(&self, hosts: &[NodeId], networks: &[NetworkId]) -> Vec<bool> {
        let nodes = |network| self.index.network_nodes.get(network);
        let is_in = |network, host| nodes(network).is_some_and(|nodes| nodes.contains_key(host));
        networks.iter().flat_map(|network| hosts.iter().map(move |host| is_in(network, host))).collect()
    }

    /// Hosts whose tunnels changed since the last call, without a change of their rows.
    pub fn take_woken(&mut self) -> BTreeSet<NodeId> {
        std::mem::take(&mut self.woken)
    }

    /// A machine's own hosts are told of every change of it; the other hosts of its networks only when one of its own
    /// joined or left the network, because then their tunnels change.
    pub(super) fn renumber(&mut self, own: &[NodeId], networks: &[NetworkId], before: &[bool]) {
        let mut others = BTreeSet::new();
        let after = self.members_of(own, networks);
        for (at, network) in networks.iter().enumerate() {
            let of = at * own.len()..(at + 1) * own.len();
            if before[of.clone()] != after[of] {
                others.extend(self.members(*network));
            }
        }
        for node in own.iter().copied().collect::<BTreeSet<NodeId>>() {
            others.remove(&node);
            self.renumber_node(node);
        }
        self.change_tunnels(others);
    }

    /// The hosts that this one's machines share a network with.
    pub(crate) fn renumber_neighbours(&mut self, node: NodeId) {
        let networks: BTreeSet<NetworkId> = self
            .vms_on_node(node)
            .chain(self.others_on_node(node))
            .flat_map(|vm| &vm.nics)
            .map(|nic| nic.network)
            .collect();
        let members = networks.into_iter().flat_map(|network| self.members(network));
        let neighbours: BTreeSet<NodeId> = members.filter(|member| *member != node).collect();
        self.change_tunnels(neighbours);
    }

    /// A network of a hundred hosts has a hundred such changes for each that gets its first machine of it, and nothing refers to
    /// them: they need no number.
    fn change_tunnels(&mut self, hosts: BTreeSet<NodeId>) {
        if self.quorum().level < QUIET_TUNNELS {
            hosts.into_iter().for_each(|host| self.renumber_node(host));
        } else {
            self.woken.extend(hosts);
        }
    }

    pub(crate) fn renumber_node(&mut self, node: NodeId) {
        self.nodes.update(&node, |row| row.generation += 1);
    }
}
