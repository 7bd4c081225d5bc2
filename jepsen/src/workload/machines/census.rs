//! Somebody who only looks: machines, hosts and quota, at one controller after another.

use std::time::Duration;

use api::proto::{ListRequest, ListVmsRequest};
use serde_json::{Value, json};

use crate::{
    client::{Answer, Api, Client},
    history::Function,
    workload::{Asked, Worker},
};

/// Often enough to see most states of a machine, which takes a tenth of a second to start.
const PAUSE: Duration = Duration::from_millis(150);
/// More than there ever are.
const PAGE: u32 = 1000;

pub async fn work(mut worker: Worker) {
    while !worker.shared.is_over() {
        let client = worker.client();
        let f = *worker.chance.pick(&[Function::Machines, Function::Machines, Function::Nodes, Function::Quota]);
        let (key, node) = ("cloud".to_owned(), client.name.clone());
        let asked = Asked { f, key, value: Value::Null, node, req: String::new() };
        worker.invoke(&asked);
        let answer = match f {
            Function::Machines => machines(&client).await,
            Function::Nodes => nodes(&client).await,
            _ => quota(&client).await,
        };
        match answer {
            Answer::Ok((value, index)) => worker.ok(&asked, value, index),
            Answer::Fail(why) => worker.fail(&asked, why),
            Answer::Info(why) => worker.info(&asked, why).await,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Every machine of the tenant, and at which log index.
pub async fn machines(client: &Client) -> Answer<(Value, Option<u64>)> {
    let list = ListVmsRequest { tenant: client.tenant(), limit: PAGE, ..ListVmsRequest::default() };
    let call = |mut api: Api, request| async move { api.list_vms(request).await };
    client.ask("", list, call).await.map(|reply| {
        let row = |vm: &api::proto::Vm| {
            let nic = vm.nics.first().cloned().unwrap_or_default();
            json!({
                "id": vm.id, "name": vm.name, "status": vm.status, "reason": vm.reason, "node": vm.node,
                "epoch": vm.epoch, "recovery": vm.recovery, "changed": vm.changed_at_millis, "mac": nic.mac,
                "ip": nic.ip, "network": nic.network, "vcpus": vm.vcpus, "memory": vm.memory_bytes,
                "disk": vm.disk_bytes,
            })
        };
        (reply.vms.iter().map(row).collect(), reply.read_at.map(|at| at.index))
    })
}

pub async fn nodes(client: &Client) -> Answer<(Value, Option<u64>)> {
    let list = ListRequest { limit: PAGE, ..ListRequest::default() };
    let call = |mut api: Api, request| async move { api.list_nodes(request).await };
    client.ask("", list, call).await.map(|reply| {
        let row = |node: &api::proto::Node| {
            let reserved = json!({
                "vcpus": node.reserved_vcpus, "memory": node.reserved_memory_bytes, "disk": node.reserved_disk_bytes,
            });
            json!({
                "name": node.name, "state": node.state, "vcpus": node.vcpus, "memory": node.memory_bytes,
                "disk": node.disk_bytes, "reserved": reserved,
            })
        };
        (reply.nodes.iter().map(row).collect(), reply.read_at.map(|at| at.index))
    })
}

pub async fn quota(client: &Client) -> Answer<(Value, Option<u64>)> {
    let list = ListRequest { limit: PAGE, ..ListRequest::default() };
    let call = |mut api: Api, request| async move { api.list_tenants(request).await };
    client.ask("", list, call).await.map(|reply| {
        let tenant = reply.tenants.into_iter().find(|tenant| tenant.name == client.tenant()).unwrap_or_default();
        let (used, limit) = (tenant.used.unwrap_or_default(), tenant.quota.unwrap_or_default());
        (json!({"used": used.vms, "limit": limit.vms}), None)
    })
}
