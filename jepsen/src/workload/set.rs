//! A set of tags that only grows: each is created once, under its own name; sometimes all are listed.

use std::collections::BTreeSet;

use futures::future::LocalBoxFuture;
use serde_json::json;
use tokio::task::JoinHandle;

use super::{Asked, Evidence, PAUSE, Site, Worker, Workload, finals};
use crate::{
    chance::Chance,
    checker::{self, Finding},
    client::Answer,
    history::Function,
};

const CLIENTS: usize = 2;
/// What the names of elements begin with.
const PREFIX: &str = "element-";
/// The name of the set in the history.
const SET: &str = "set";
/// One list to so many elements added: a list costs much more.
const ADDS_PER_LIST: usize = 50;
/// Slower than the registers, so that the set stays small enough to be listed.
const PAUSES: u32 = 4;

pub struct Elements;

impl Workload for Elements {
    fn name(&self) -> &'static str {
        "set"
    }

    fn needs(&self) -> &'static [Function] {
        &[Function::Add, Function::List]
    }

    fn start(&self, site: &Site<'_>, chance: &mut Chance) -> anyhow::Result<Vec<JoinHandle<()>>> {
        (0..CLIENTS).map(|_| Ok(tokio::spawn(work(site.worker(chance)?)))).collect()
    }

    fn finish<'a>(&'a self, site: &'a Site<'a>) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        Box::pin(site.ask_all(SET, async |client| client.list_keys(PREFIX).await.map(|keys| json!(keys))))
    }

    fn judge(&self, evidence: &Evidence<'_>) -> Vec<(&'static str, Finding)> {
        let listed = finals(evidence.operations, SET).into_iter().map(|(controller, keys)| {
            let keys = keys.as_array().into_iter().flatten().filter_map(|key| key.as_str().map(str::to_owned));
            (controller.to_owned(), keys.collect::<BTreeSet<_>>())
        });
        let finding = checker::set::check(evidence.operations, &listed.collect::<Vec<_>>());
        vec![("set: nothing lost, nothing invented", finding)]
    }
}

/// Works until the run is over.
async fn work(mut worker: Worker) {
    let mut count = 0_u64;
    while !worker.shared.is_over() {
        if worker.chance.below(ADDS_PER_LIST) == 0 {
            list(&mut worker).await;
        } else {
            add(&mut worker, count).await;
            count += 1;
        }
        tokio::time::sleep(PAUSE * PAUSES).await;
    }
}

/// Adds the client's element of this number; true when it was acknowledged.
pub async fn add(worker: &mut Worker, count: u64) -> bool {
    let mut client = worker.client();
    let element = format!("{PREFIX}{}-{count}", worker.process);
    let asked = asked(Function::Add, json!(element), &client.name, Worker::request_id());
    worker.invoke(&asked);
    let answer = client.set_tag(&asked.req, &element, "", Some(0)).await;
    let acknowledged = matches!(answer, Answer::Ok(_));
    match answer {
        Answer::Ok(version) => worker.ok(&asked, asked.value.clone(), Some(version)),
        Answer::Fail(why) => worker.fail(&asked, why),
        Answer::Info(why) => worker.info(&asked, why).await,
    }
    acknowledged
}

async fn list(worker: &mut Worker) {
    let mut client = worker.client();
    let asked = asked(Function::List, json!(null), &client.name, String::new());
    worker.invoke(&asked);
    match client.list_keys(PREFIX).await {
        Answer::Ok(keys) => worker.ok(&asked, json!(keys), None),
        Answer::Fail(why) => worker.fail(&asked, why),
        Answer::Info(why) => worker.info(&asked, why).await,
    }
}

fn asked(f: Function, value: serde_json::Value, node: &str, req: String) -> Asked {
    Asked { f, key: SET.to_owned(), value, node: node.to_owned(), req }
}
