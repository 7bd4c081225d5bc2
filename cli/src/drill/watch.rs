//! What the cloud says of itself during a drill: who leads, how the hosts are, how the machines are.
//!
//! Every controller is asked for the leader, every tenth of a second; the newest term counts. The rest is read
//! linearizably: while there is no quorum nothing is known, and nothing is noted.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use api::client::Client;
use futures::future::join_all;
use tokio::task::JoinSet;

use super::{
    ask,
    record::Record,
    timeline::{LeaderChange, NodeChange, StatusChange},
};

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// For one question; the next one is asked anyway.
const PATIENCE: Duration = Duration::from_millis(500);

/// Looks until the record is over.
pub fn start(client: &Client, record: &Arc<Record>) -> JoinSet<()> {
    let client = client.clone().with_deadline(PATIENCE);
    let mut watchers = JoinSet::new();
    watchers.spawn(watch_leader(client.clone(), record.clone()));
    watchers.spawn(watch_nodes(client.clone(), record.clone()));
    watchers.spawn(watch_machines(client, record.clone()));
    watchers
}

async fn watch_leader(client: Client, record: Arc<Record>) {
    while !record.is_over() {
        let all = (0..client.endpoints()).map(|endpoint| ask::status_of(&client, endpoint, PATIENCE));
        let replies: Vec<_> = join_all(all).await.into_iter().flatten().collect();
        if let Some(newest) = replies.iter().max_by_key(|reply| (reply.term, reply.leader)) {
            let at_micros = record.now();
            let mut timeline = record.see();
            let seen = (newest.leader, newest.term);
            if timeline.leaders.last().map(|last| (last.leader, last.term)) != Some(seen) {
                timeline.leaders.push(LeaderChange { at_micros, leader: newest.leader, term: newest.term });
            }
        }
        for reply in &replies {
            if !reply.hashes_agree {
                record
                    .broke(format!("controller-{} says that the states of the controllers differ", reply.answered_by));
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn watch_nodes(client: Client, record: Arc<Record>) {
    let mut before: BTreeMap<String, String> = BTreeMap::new();
    while !record.is_over() {
        if let Ok(nodes) = ask::nodes(&client).await {
            let at_micros = record.now();
            for node in nodes {
                if before.get(&node.name) != Some(&node.state) {
                    before.insert(node.name.clone(), node.state.clone());
                    record.see().nodes.push(NodeChange { at_micros, node: node.name, state: node.state });
                }
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn watch_machines(client: Client, record: Arc<Record>) {
    let mut before: BTreeMap<String, (String, String)> = BTreeMap::new();
    while !record.is_over() {
        if let Ok(vms) = ask::vms(&client).await {
            let at_micros = record.now();
            for vm in vms {
                let now = (vm.status, vm.node);
                if before.get(&vm.id) != Some(&now) {
                    let (status, node) = now.clone();
                    before.insert(vm.id.clone(), now);
                    record.see().statuses.push(StatusChange { at_micros, vm: vm.id, status, node });
                }
            }
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
