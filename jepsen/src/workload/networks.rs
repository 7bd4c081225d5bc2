//! Networks that are made and deleted, so that a run has more than one VNI and VNIs that became free.

use std::time::Instant;

use api::proto::{CreateNetworkRequest, ListRequest, NamedRef};
use futures::future::LocalBoxFuture;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{Asked, Evidence, PAUSE, SETTLE, Site, Worker, Workload, finals};
use crate::{
    chance::Chance,
    checker::{self, Finding},
    client::{Answer, Api, Client},
    history::Function,
};

const CLIENTS: usize = 2;
/// Before the first fault.
const FIRST: usize = 2;
/// Of one client at one time: with two clients fewer than a new tenant may have.
const NETWORKS: usize = 3;
/// Slower than the registers: a network has an address range, and each client has some thousand.
const PAUSES: u32 = 60;
/// More than there ever are.
const PAGE: u32 = 1000;
/// Key of what is asked at the end.
const AT_REST: &str = "networks at rest";

pub struct Networks;

impl Workload for Networks {
    fn name(&self) -> &'static str {
        "networks"
    }

    fn needs(&self) -> &'static [Function] {
        &[Function::CreateNetwork, Function::DeleteNetwork, Function::Networks]
    }

    /// Two that stay, so that there are always two VNIs.
    fn prepare<'a>(&'a self, site: &'a Site<'a>) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        Box::pin(async {
            let mut worker = site.worker(&mut Chance::new(0))?;
            let deadline = Instant::now() + SETTLE;
            // One whose answer was lost has its name and its range.
            for number in 0.. {
                let (name, range) = (format!("network-first-{number}"), range(CLIENTS, number));
                ask(&mut worker, Function::CreateNetwork, &name, &range).await;
                if worker.shared.recorder.done(Function::CreateNetwork).len() >= FIRST {
                    break;
                }
                anyhow::ensure!(Instant::now() < deadline, "a new cloud does not take a network");
            }
            Ok(())
        })
    }

    fn start(&self, site: &Site<'_>, chance: &mut Chance) -> anyhow::Result<Vec<JoinHandle<()>>> {
        (0..CLIENTS).map(|number| Ok(tokio::spawn(work(site.worker(chance)?, number)))).collect()
    }

    fn finish<'a>(&'a self, site: &'a Site<'a>) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        Box::pin(site.ask_all(AT_REST, async |client| list(client).await.map(|(rows, _)| rows)))
    }

    fn judge(&self, evidence: &Evidence<'_>) -> Vec<(&'static str, Finding)> {
        let finding = checker::address::vnis(evidence.operations, &finals(evidence.operations, AT_REST));
        vec![("addresses: a VNI has one network", finding)]
    }
}

/// Works until the run is over. What nobody answered for may be there, and is deleted too.
async fn work(mut worker: Worker, number: usize) {
    let mut names: Vec<String> = Vec::new();
    let mut count = 0_usize;
    while !worker.shared.is_over() {
        let choice = worker.chance.below(4);
        if choice == 0 {
            ask(&mut worker, Function::Networks, "networks", "").await;
        } else if names.len() < NETWORKS && choice < 3 {
            let name = format!("network-{number}-{count}");
            let range = range(number, count);
            count += 1;
            if ask(&mut worker, Function::CreateNetwork, &name, &range).await {
                names.push(name);
            }
        } else if !names.is_empty() {
            let name = names.swap_remove(worker.chance.below(names.len()));
            if !ask(&mut worker, Function::DeleteNetwork, &name, "").await {
                names.push(name);
            }
        }
        tokio::time::sleep(PAUSE * PAUSES).await;
    }
}

/// Once, at a controller by chance. Of a creation true when it may have been done, of a deletion when it was, or need not be.
async fn ask(worker: &mut Worker, f: Function, name: &str, range: &str) -> bool {
    let client = worker.client();
    let req = if f == Function::Networks { String::new() } else { Worker::request_id() };
    let asked = Asked { f, key: name.to_owned(), value: Value::Null, node: client.name.clone(), req };
    worker.invoke(&asked);
    let answer = match f {
        Function::CreateNetwork => create(&client, &asked.req, name, range).await,
        Function::DeleteNetwork => delete(&client, &asked.req, name).await,
        _ => list(&client).await,
    };
    match answer {
        Answer::Ok((value, index)) => {
            worker.ok(&asked, value, index);
            true
        }
        Answer::Fail(why) => {
            let gone = f == Function::DeleteNetwork && why.starts_with("not-found");
            worker.fail(&asked, why);
            gone
        }
        Answer::Info(why) => {
            worker.info(&asked, why).await;
            f == Function::CreateNetwork
        }
    }
}

/// Sixteen addresses that no other network of the tenant has.
fn range(client: usize, count: usize) -> String {
    format!("10.{}.{}.{}/28", 16 + client, count / 16 % 256, count % 16 * 16)
}

async fn create(client: &Client, req: &str, name: &str, range: &str) -> Answer<(Value, Option<u64>)> {
    let request = CreateNetworkRequest { tenant: client.tenant(), name: name.into(), range: range.into() };
    let call = |mut api: Api, request| async move { api.create_network(request).await };
    client.ask(req, request, call).await.map(|network| (json!({"id": network.id, "vni": network.vni}), None))
}

async fn delete(client: &Client, req: &str, name: &str) -> Answer<(Value, Option<u64>)> {
    let request = NamedRef { tenant: client.tenant(), name: name.into(), stale: false };
    let call = |mut api: Api, request| async move { api.delete_network(request).await };
    client.ask(req, request, call).await.map(|_| (json!({}), None))
}

/// Every network of the tenant, and at which log index.
async fn list(client: &Client) -> Answer<(Value, Option<u64>)> {
    let list = ListRequest { tenant: client.tenant(), limit: PAGE, ..ListRequest::default() };
    let call = |mut api: Api, request| async move { api.list_networks(request).await };
    client.ask("", list, call).await.map(|reply| {
        let row = |network: &api::proto::Network| json!({"id": network.id, "name": network.name, "vni": network.vni});
        (reply.networks.iter().map(row).collect(), reply.read_at.map(|at| at.index))
    })
}
