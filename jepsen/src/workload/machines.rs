//! Machines that are made, stopped, started, moved and deleted while hosts and controllers are hurt: more of them than the
//! tenant may have, more than fit when a host is lost, on a network with hardly more addresses.
//!
//! Everything that can be promised of a machine is judged from these same clients: each fault is paid for once.

use std::time::{Duration, Instant, SystemTime};

use api::proto::{
    BillLine, CreateNetworkRequest, CreateTenantRequest, GetBillRequest, ImportImageHeader, ImportImageRequest,
    ListRequest, Quota, Setting, import_image_request::Part,
};
use futures::{future::LocalBoxFuture, stream};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{Evidence, SETTLE, Site, Workload, finals};
use crate::{
    chance::Chance,
    checker::{self, Finding},
    client::{Answer, Api, Client},
    history::{Function, Kind},
};

mod census;
mod owner;

const OWNERS: usize = 3;
/// Machines that stay for the whole run, so that whatever host is lost, one that must not run twice is on it.
const RESIDENTS: usize = 3;
/// Machines at one time: fewer than are wanted, and than fit on three hosts of four; more than fit on two.
const QUOTA: u64 = 9;
const NETWORK: &str = "blue";
/// Thirteen addresses for ten machines, so that one that was freed is soon used again.
const RANGE: &str = "10.0.0.0/28";
const IMAGE: &str = "disk";
const IMAGE_BYTES: usize = 64 << 10;
/// What clients asked for comes to rest within this, after calm: a host that was lost comes back, and each machine that
/// waited is started.
const REST: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Keys of what is asked at the end.
const AT_REST: &str = "machines at rest";
const EMPTY: &str = "no machines";
const BILL: &str = "bill";

pub struct Machines;

impl Workload for Machines {
    fn name(&self) -> &'static str {
        "machines"
    }

    fn needs(&self) -> &'static [Function] {
        use Function::{Create, Delete, Machines, Migrate, Nodes, Power, Quota};
        &[Create, Power, Migrate, Delete, Machines, Nodes, Quota]
    }

    fn prepare<'a>(&'a self, site: &'a Site<'a>) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        Box::pin(prepare(site))
    }

    fn start(&self, site: &Site<'_>, chance: &mut Chance) -> anyhow::Result<Vec<JoinHandle<()>>> {
        let mut clients = vec![tokio::spawn(census::work(site.worker(chance)?))];
        for number in 0..OWNERS {
            clients.push(tokio::spawn(owner::work(site.worker(chance)?, number)));
        }
        Ok(clients)
    }

    fn finish<'a>(&'a self, site: &'a Site<'a>) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        Box::pin(finish(site))
    }

    fn gaps(&self, evidence: &Evidence<'_>) -> Vec<String> {
        let Evidence { operations, effects, .. } = evidence;
        let lists = operations.iter().filter(|o| o.f == Function::Nodes && o.outcome == Kind::Ok);
        let mut nodes = lists.flat_map(|o| o.answered.as_array().into_iter().flatten());
        let lost = nodes.any(|node| node["state"] == "lost");
        let gap = "machines: hosts were lost, and no exclusive machine ran on another one afterwards";
        if lost && checker::home::moved(operations, effects) == 0 { vec![gap.to_owned()] } else { Vec::new() }
    }

    fn judge(&self, evidence: &Evidence<'_>) -> Vec<(&'static str, Finding)> {
        let Evidence { operations, effects, .. } = evidence;
        let (full, empty) = (finals(operations, AT_REST), finals(operations, EMPTY));
        let listed: Vec<_> = full.iter().map(|(controller, said)| (*controller, &said["machines"])).collect();
        let bills = finals(operations, BILL);
        let witness = evidence.began_unix_millis.map(|began| (*effects, began));
        vec![
            ("requests: exactly once", checker::request::check(operations)),
            ("machines: all is as it was asked for", checker::rest::check(operations, &listed)),
            ("home: one host at any instant", checker::home::single(operations, effects)),
            ("home: no older placement after a newer", checker::home::fenced(operations, effects)),
            ("addresses: one owner", checker::address::check(operations, effects)),
            ("capacity and quota: never over", checker::capacity::check(operations, &full, &empty)),
            ("ledger: the integral of what was used", checker::ledger::check(operations, &bills, witness)),
        ]
    }
}

async fn prepare(site: &Site<'_>) -> anyhow::Result<()> {
    let quota = Quota {
        vms: QUOTA,
        vcpus: u64::MAX,
        memory_bytes: u64::MAX,
        disk_bytes: u64::MAX,
        networks: u64::MAX,
        image_bytes: u64::MAX,
    };
    let network = |tenant| CreateNetworkRequest { tenant, name: NETWORK.into(), range: RANGE.into() };
    // Faults come one after the other, and each is meant to be recovered from.
    let brake = Setting { name: "brake-count".into(), value: 10_000, ..Setting::default() };
    site.once(async |client, id| {
        let quota = CreateTenantRequest { name: client.tenant(), quota: Some(quota) };
        client.ask(id, quota, |mut api: Api, request| async move { api.set_quota(request).await }).await.map(drop)
    })
    .await?;
    site.once(async |client, id| {
        let call = |mut api: Api, request| async move { api.create_network(request).await };
        client.ask(id, network(client.tenant()), call).await.map(drop)
    })
    .await?;
    site.once(async |client, id| {
        let call = |mut api: Api, request| async move { api.set_setting(request).await };
        client.ask(id, brake.clone(), call).await.map(drop)
    })
    .await?;
    site.once(async |client, id| import(client, id, IMAGE, vec![7; IMAGE_BYTES]).await.map(drop)).await?;
    let mut worker = site.worker(&mut Chance::new(0))?;
    for number in 0..RESIDENTS {
        let made = owner::create_one(&mut worker, &format!("resident-{number}"), "exclusive").await;
        anyhow::ensure!(made, "a machine of a new cloud was refused");
    }
    Ok(())
}

/// Imports bytes as an image of this name; the answer is its digest.
pub(super) async fn import(client: &Client, request_id: &str, name: &str, bytes: Vec<u8>) -> Answer<String> {
    let header = ImportImageHeader {
        tenant: client.tenant(),
        name: name.into(),
        format: "raw".into(),
        size_bytes: bytes.len() as u64,
        virtual_bytes: bytes.len() as u64,
        digest: blake3::hash(&bytes).to_string(),
    };
    let parts = [Part::Header(header), Part::Data(bytes.into())];
    let stream = stream::iter(parts.map(|part| ImportImageRequest { part: Some(part) }));
    let call = |mut api: Api, request| async move { api.import_image(request).await };
    client.ask(request_id, stream, call).await.map(|image| image.digest)
}

/// Waits for rest, asks every controller, deletes everything, asks again, and asks for the bill.
async fn finish(site: &Site<'_>) -> anyhow::Result<()> {
    let client = site.clients()?.remove(0);
    wait(async || rests(&client).await).await;
    site.ask_all(AT_REST, async |client| everything(client).await).await?;
    if let Answer::Ok((rows, _)) = census::machines(&client).await {
        for row in rows.as_array().into_iter().flatten() {
            let name = row["name"].as_str().unwrap_or_default();
            site.once(async |client, id| owner::delete(client, id, name).await.map(drop)).await?;
        }
    }
    wait(async || is_empty(&client).await).await;
    site.ask_all(EMPTY, async |client| everything(client).await).await?;
    // A later entry makes this a time in the past of every controller.
    let to = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_millis();
    tokio::time::sleep(Duration::from_millis(5)).await;
    site.once(async |client, id| client.clone().set_tag(id, "the-end", "", None).await.map(drop)).await?;
    let to = u64::try_from(to)?;
    site.ask_all(BILL, async |client| bill(client, to).await).await
}

/// Until it is so; what is not so by then is for the checkers.
async fn wait(so: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + REST.max(SETTLE);
    while Instant::now() < deadline && !so().await {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

async fn rests(client: &Client) -> bool {
    let rows = census::machines(client).await;
    let rests = |row: &Value| checker::rest::rests_as(row).is_some();
    matches!(rows, Answer::Ok((rows, _)) if rows.as_array().is_some_and(|rows| rows.iter().all(rests)))
}

async fn is_empty(client: &Client) -> bool {
    let Answer::Ok(said) = everything(client).await else { return false };
    let nodes = said["nodes"].as_array();
    said["machines"] == json!([]) && nodes.is_some_and(|nodes| nodes.iter().all(|node| node["reserved"]["memory"] == 0))
}

async fn everything(client: &Client) -> Answer<Value> {
    let machines = match census::machines(client).await {
        Answer::Ok((machines, _)) => machines,
        Answer::Fail(why) => return Answer::Fail(why),
        Answer::Info(why) => return Answer::Info(why),
    };
    let nodes = match census::nodes(client).await {
        Answer::Ok((nodes, _)) => nodes,
        Answer::Fail(why) => return Answer::Fail(why),
        Answer::Info(why) => return Answer::Info(why),
    };
    let quota = census::quota(client).await;
    quota.map(|(quota, _)| json!({"machines": machines, "nodes": nodes, "quota": quota}))
}

async fn bill(client: &Client, to_millis: u64) -> Answer<Value> {
    let request = GetBillRequest { tenant: client.tenant(), from_millis: 0, to_millis, stale: false };
    let asked = client.ask("", request, |mut api: Api, request| async move { api.get_bill(request).await }).await;
    let bill = match asked {
        Answer::Ok(bill) => bill,
        Answer::Fail(why) => return Answer::Fail(why),
        Answer::Info(why) => return Answer::Info(why),
    };
    let list = ListRequest { limit: 1000, ..ListRequest::default() };
    let prices = client.ask("", list, |mut api: Api, request| async move { api.list_prices(request).await }).await;
    let line = |line: &BillLine| {
        json!({
            "resource": line.resource, "status": line.status, "weight_milli": line.weight_milli, "exact": line.exact,
            "from": line.from_millis, "to": line.to_millis,
        })
    };
    let lines: Vec<Value> = bill.lines.iter().map(line).collect();
    // Nobody changes the price of a new cloud during a run.
    prices.map(|reply| {
        let price = reply.prices.last().map_or(0, |price| price.nano_per_hour);
        json!({"lines": lines, "total_nano": bill.total_nano, "nano_per_hour": price})
    })
}
