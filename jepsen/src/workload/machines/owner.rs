//! An owner of machines: makes, stops, starts, moves and deletes its own, one request at a time, each until it is answered.
//!
//! A request is sent again under the same id, to the next controller, when nobody answered it; sometimes its first answer
//! is not waited for, sometimes it is sent once more although it was answered, and sometimes another one is sent under
//! its id, which must be refused.

use std::time::Duration;

use api::proto::{CreateVmRequest, DeleteVmRequest, MigrateVmRequest, SetVmPowerRequest};
use serde_json::{Value, json};

use super::{IMAGE, NETWORK};
use crate::{
    client::{Answer, Api, Client},
    history::Function,
    workload::{Asked, PAUSE_AFTER_SILENCE, Worker},
};

/// Three owners want nine, which with those that stay are three more than their tenant may have.
const MACHINES: usize = 3;
/// A machine takes a tenth of a second to start, and should be seen to run before it is asked for something else.
const PAUSE: Duration = Duration::from_millis(200);
/// After the run everything is healed: who has no answer after so many tries in a row will have none.
const LAST_TRIES: usize = 40;
/// One in so many requests is given up after so many milliseconds at most: before, while and after it is carried out.
const IMPATIENT: usize = 3;
const IMPATIENCE_MILLIS: usize = 40;
/// One in so many is sent again although it was answered; one in so many is followed by another under its id.
const AGAIN: usize = 6;
const REUSED: usize = 12;

struct Machine {
    name: String,
    stopped: bool,
}

struct Wish<'a> {
    f: Function,
    name: &'a str,
    value: Value,
}

pub async fn work(mut worker: Worker, number: usize) {
    let mut machines: Vec<Machine> = Vec::new();
    let mut count = 0;
    while !worker.shared.is_over() {
        let choice = worker.chance.below(10);
        if machines.is_empty() || (machines.len() < MACHINES && choice < 5) {
            let name = format!("machine-{number}-{count}");
            count += 1;
            let recovery = if worker.chance.below(3) == 0 { "available" } else { "exclusive" };
            if create_one(&mut worker, &name, recovery).await {
                machines.push(Machine { name, stopped: false });
            }
        } else if choice < 8 {
            let chosen = worker.chance.below(machines.len());
            let machine = &mut machines[chosen];
            if choice == 5 {
                request(&mut worker, &Wish { f: Function::Migrate, name: &machine.name, value: Value::Null }).await;
                continue;
            }
            let wanted = if machine.stopped { "running" } else { "stopped" };
            if request(&mut worker, &Wish { f: Function::Power, name: &machine.name, value: json!(wanted) }).await {
                machine.stopped = !machine.stopped;
            }
        } else {
            let chosen = worker.chance.below(machines.len());
            let machine = machines.swap_remove(chosen);
            request(&mut worker, &Wish { f: Function::Delete, name: &machine.name, value: Value::Null }).await;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// True when it may have been made.
pub async fn create_one(worker: &mut Worker, name: &str, recovery: &str) -> bool {
    request(worker, &Wish { f: Function::Create, name, value: json!(recovery) }).await
}

/// Until somebody answers; true when it may have been done.
async fn request(worker: &mut Worker, wish: &Wish<'_>) -> bool {
    let req = Worker::request_id();
    let first = worker.chance.below(worker.clients.len());
    let mut silent = 0;
    for attempt in 0.. {
        let mut client = worker.clients[(first + attempt) % worker.clients.len()].clone();
        if attempt == 0 && worker.chance.below(IMPATIENT) == 0 {
            client = client.within(Duration::from_millis(1 + worker.chance.below(IMPATIENCE_MILLIS) as u64));
        }
        match send(worker, &client, &req, wish).await {
            Answer::Ok(_) => break,
            Answer::Fail(why) if !is_passing(&why) => return false,
            Answer::Fail(_) => tokio::time::sleep(PAUSE_AFTER_SILENCE).await,
            Answer::Info(_) => {}
        }
        silent += usize::from(worker.shared.is_over());
        if silent > LAST_TRIES {
            return true;
        }
    }
    if worker.chance.below(AGAIN) == 0 {
        let client = worker.client();
        send(worker, &client, &req, wish).await;
    }
    if worker.chance.below(REUSED) == 0 {
        let (client, name) = (worker.client(), format!("{}-other", wish.name));
        send(worker, &client, &req, &Wish { f: Function::Create, name: &name, value: json!("exclusive") }).await;
    }
    true
}

/// The controller did not look at it.
fn is_passing(why: &str) -> bool {
    ["no-quorum", "overloaded", "unavailable"].iter().any(|code| why.starts_with(code))
}

async fn send(worker: &mut Worker, client: &Client, req: &str, wish: &Wish<'_>) -> Answer<Value> {
    let (key, value, node) = (wish.name.to_owned(), wish.value.clone(), client.name.clone());
    let asked = Asked { f: wish.f, key, value, node, req: req.to_owned() };
    worker.invoke(&asked);
    let text = wish.value.as_str().unwrap_or_default();
    let answer = match wish.f {
        Function::Create => create(client, req, wish.name, text).await,
        Function::Power => set_power(client, req, wish.name, text).await,
        Function::Migrate => migrate(client, req, wish.name).await,
        _ => delete(client, req, wish.name).await,
    };
    match &answer {
        Answer::Ok(value) => worker.ok(&asked, value.clone(), None),
        Answer::Fail(why) => worker.fail(&asked, why.clone()),
        Answer::Info(why) => worker.info(&asked, why.clone()).await,
    }
    answer
}

async fn create(client: &Client, req: &str, name: &str, recovery: &str) -> Answer<Value> {
    let request = CreateVmRequest {
        tenant: client.tenant(),
        name: name.into(),
        image: IMAGE.into(),
        template: "tiny".into(),
        network: NETWORK.into(),
        recovery: recovery.into(),
        ..CreateVmRequest::default()
    };
    let call = |mut api: Api, request| async move { api.create_vm(request).await };
    client.ask(req, request, call).await.map(|vm| json!({"id": vm.id}))
}

async fn set_power(client: &Client, req: &str, vm: &str, wanted: &str) -> Answer<Value> {
    let request =
        SetVmPowerRequest { tenant: client.tenant(), vm: vm.into(), wanted: wanted.into(), grace_millis: 2_000 };
    let call = |mut api: Api, request| async move { api.set_vm_power(request).await };
    client.ask(req, request, call).await.map(|vm| json!({"id": vm.id}))
}

/// To whichever host has room.
async fn migrate(client: &Client, req: &str, vm: &str) -> Answer<Value> {
    let request = MigrateVmRequest { tenant: client.tenant(), vm: vm.into(), ..MigrateVmRequest::default() };
    let call = |mut api: Api, request| async move { api.migrate_vm(request).await };
    client.ask(req, request, call).await.map(|vm| json!({"id": vm.id}))
}

/// Also of what others made, when everything is cleared away.
pub async fn delete(client: &Client, req: &str, vm: &str) -> Answer<Value> {
    let request = DeleteVmRequest { tenant: client.tenant(), vm: vm.into(), force: false };
    let call = |mut api: Api, request| async move { api.delete_vm(request).await };
    client.ask(req, request, call).await.map(|_| json!({}))
}
