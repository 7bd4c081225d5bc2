//! A set of tags that only grows: each is created once, under its own name; sometimes all are listed.

use serde_json::json;

use super::{Asked, PAUSE, Worker};
use crate::{client::Answer, history::Function};

/// What the names of elements begin with.
pub const PREFIX: &str = "element-";
/// The name of the set in the history.
const SET: &str = "set";
/// One list to so many elements added: a list costs much more.
const ADDS_PER_LIST: usize = 50;
/// Slower than the registers, so that the set stays small enough to be listed.
const PAUSES: u32 = 4;

/// Works until the run is over.
pub async fn work(mut worker: Worker) {
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

async fn add(worker: &mut Worker, count: u64) {
    let mut client = worker.client();
    let element = format!("{PREFIX}{}-{count}", worker.process);
    let asked = asked(Function::Add, json!(element), &client.name, Worker::request_id());
    worker.invoke(&asked);
    match client.set_tag(&asked.req, &element, "", Some(0)).await {
        Answer::Ok(version) => worker.ok(&asked, asked.value.clone(), Some(version)),
        Answer::Fail(why) => worker.fail(&asked, why),
        Answer::Info(why) => worker.info(&asked, why).await,
    }
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
