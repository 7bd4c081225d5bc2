//! Watchers: each follows all that changes at one controller, and goes on at another one after a while, and whenever the
//! one it is at is silent or ends. Every message is one operation: asked for what came after an index, told up to another.

use std::time::{Duration, Instant};

use api::proto::WatchReply;
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::timeout};
use tonic::Streaming;

use super::{Asked, CLIENT_PATIENCE, Evidence, PAUSE_AFTER_SILENCE, Site, Worker, Workload};
use crate::{
    chance::Chance,
    checker::{self, Finding},
    client::Answer,
    history::Function,
};

const WATCHERS: usize = 3;
/// A watch of so many seconds at most, so that going on elsewhere is tested without faults too.
const SECONDS_AT_ONE: usize = 8;
/// Controllers that were all started again remember no changes: then a watcher begins anew, as its user would.
const FORGOTTEN: u32 = 6;

pub struct Watchers;

impl Workload for Watchers {
    fn name(&self) -> &'static str {
        "watch"
    }

    fn needs(&self) -> &'static [Function] {
        &[Function::Watch]
    }

    fn start(&self, site: &Site<'_>, chance: &mut Chance) -> anyhow::Result<Vec<JoinHandle<()>>> {
        (0..WATCHERS).map(|_| Ok(tokio::spawn(work(site.worker(chance)?)))).collect()
    }

    fn judge(&self, evidence: &Evidence<'_>) -> Vec<(&'static str, Finding)> {
        vec![("watch: in order, once, without gaps", checker::watch::check(evidence.operations))]
    }
}

/// Works until the run is over.
async fn work(mut worker: Worker) {
    let mut told = None;
    let mut forgotten = 0;
    while !worker.shared.is_over() {
        let mut client = worker.client();
        let asked = asked(told, &client.name);
        worker.invoke(&asked);
        match client.watch(told).await {
            Answer::Ok(stream) => {
                forgotten = 0;
                follow(&mut worker, stream, asked, &mut told).await;
            }
            Answer::Fail(why) => {
                forgotten += u32::from(why.starts_with("compacted"));
                if forgotten >= FORGOTTEN {
                    (told, forgotten) = (None, 0);
                }
                worker.fail(&asked, why);
                tokio::time::sleep(PAUSE_AFTER_SILENCE).await;
            }
            Answer::Info(why) => {
                // A watch changes nothing, so that it did not begin is certain.
                worker.fail(&asked, why);
                tokio::time::sleep(PAUSE_AFTER_SILENCE).await;
            }
        }
    }
}

async fn follow(worker: &mut Worker, mut stream: Streaming<WatchReply>, mut asked: Asked, told: &mut Option<u64>) {
    let seconds = 1 + worker.chance.below(SECONDS_AT_ONE);
    let until = Instant::now() + Duration::from_secs(seconds as u64);
    loop {
        let why = match timeout(CLIENT_PATIENCE, stream.message()).await {
            Ok(Ok(Some(reply))) => {
                *told = Some(reply.revision);
                worker.ok(&asked, events(&reply), *told);
                if worker.shared.is_over() || Instant::now() > until {
                    return;
                }
                asked = self::asked(*told, &asked.node);
                worker.invoke(&asked);
                continue;
            }
            Ok(Ok(None)) => "it ended".into(),
            Ok(Err(status)) => status.to_string(),
            Err(_) => "it is silent".to_owned(),
        };
        return worker.fail(&asked, why);
    }
}

fn events(reply: &WatchReply) -> Value {
    let event = |event: &api::proto::WatchEvent| json!([event.revision, event.kind, event.id, event.present]);
    reply.events.iter().map(event).collect()
}

fn asked(after: Option<u64>, node: &str) -> Asked {
    Asked { f: Function::Watch, key: "watch".into(), value: json!(after), node: node.to_owned(), req: String::new() }
}
