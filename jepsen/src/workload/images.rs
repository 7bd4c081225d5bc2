//! Small images that are imported, and exported again at any controller, while the hosts that keep them are killed.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use api::proto::NamedRef;
use futures::future::LocalBoxFuture;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::{Asked, Evidence, SETTLE, Shared, Site, Worker, Workload, finals, machines::import};
use crate::{
    chance::Chance,
    checker::{self, Finding},
    client::{Answer, Api, Client},
    cluster::Cluster,
    history::{Function, Kind},
};

/// Copies of an image in a new cloud.
const REPLICAS: usize = 2;
/// Several chunks of a disk's cache, and nothing for a network.
const BYTES: usize = 48 << 10;
/// Few enough that hosts spend their time on machines.
const PAUSE: Duration = Duration::from_millis(500);
/// A new image one time in so many; else one of those that are there is fetched.
const EXPORTS_PER_IMPORT: usize = 4;
/// The bytes reach the hosts that should have them within this, after calm.
const REPAIR: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_millis(200);
/// Keys of what is asked at the end.
const FETCHED: &str = "images fetched";
const DISKS: &str = "images on disk";

pub struct Images;

impl Workload for Images {
    fn name(&self) -> &'static str {
        "images"
    }

    fn needs(&self) -> &'static [Function] {
        &[Function::Import, Function::Export]
    }

    /// The first of them, so that there is something to fetch from the beginning.
    fn prepare<'a>(&'a self, site: &'a Site<'a>) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        Box::pin(async {
            let mut worker = site.worker(&mut Chance::new(0))?;
            let deadline = Instant::now() + SETTLE;
            // One whose answer was lost has its name.
            for number in 0.. {
                if import_one(&mut worker, &format!("image-first-{number}")).await {
                    break;
                }
                anyhow::ensure!(Instant::now() < deadline, "a new cloud does not take an image");
            }
            Ok(())
        })
    }

    fn start(&self, site: &Site<'_>, chance: &mut Chance) -> anyhow::Result<Vec<JoinHandle<()>>> {
        Ok(vec![tokio::spawn(work(site.worker(chance)?))])
    }

    fn finish<'a>(&'a self, site: &'a Site<'a>) -> LocalBoxFuture<'a, anyhow::Result<()>> {
        Box::pin(finish(site))
    }

    fn judge(&self, evidence: &Evidence<'_>) -> Vec<(&'static str, Finding)> {
        let (fetched, disks) = (finals(evidence.operations, FETCHED), finals(evidence.operations, DISKS));
        let finding = checker::image::check(evidence.operations, &fetched, &disks, REPLICAS);
        vec![("images: every byte, on as many hosts", finding)]
    }
}

async fn work(mut worker: Worker) {
    let done = worker.shared.recorder.done(Function::Import);
    let mut names: Vec<String> = done.into_iter().map(|(name, _)| name).collect();
    let mut count = 0;
    while !worker.shared.is_over() {
        if worker.chance.below(EXPORTS_PER_IMPORT) == 0 {
            let name = format!("image-{count}");
            count += 1;
            if import_one(&mut worker, &name).await {
                names.push(name);
            }
        } else {
            let name = worker.chance.pick(&names).clone();
            let client = worker.client();
            export_one(&mut worker, &client, &name).await;
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn import_one(worker: &mut Worker, name: &str) -> bool {
    let bytes: Vec<u8> = (0..BYTES / 8).flat_map(|_| worker.chance.number().to_le_bytes()).collect();
    let digest = json!(blake3::hash(&bytes).to_string());
    let client = worker.client();
    let (node, req) = (client.name.clone(), Worker::request_id());
    let asked = Asked { f: Function::Import, key: name.into(), value: digest, node, req };
    worker.invoke(&asked);
    let answer = import(&client, &asked.req, name, bytes).await;
    note(worker, &asked, answer).await
}

async fn export_one(worker: &mut Worker, client: &Client, name: &str) -> bool {
    let node = client.name.clone();
    let asked = Asked { f: Function::Export, key: name.into(), value: Value::Null, node, req: String::new() };
    worker.invoke(&asked);
    let answer = export(client, name).await;
    note(worker, &asked, answer).await
}

/// Writes down what came of it; whether it was done.
async fn note(worker: &mut Worker, asked: &Asked, answer: Answer<String>) -> bool {
    match answer {
        Answer::Ok(digest) => {
            worker.ok(asked, json!(digest), None);
            return true;
        }
        Answer::Fail(why) => worker.fail(asked, why),
        Answer::Info(why) => worker.info(asked, why).await,
    }
    false
}

/// The digest of the bytes that came.
async fn export(client: &Client, name: &str) -> Answer<String> {
    let request = NamedRef { tenant: client.tenant(), name: name.into(), stale: false };
    let call = |mut api: Api, request| async move { api.export_image(request).await };
    let mut chunks = match client.ask("", request, call).await {
        Answer::Ok(chunks) => chunks,
        Answer::Fail(why) => return Answer::Fail(why),
        Answer::Info(why) => return Answer::Info(why),
    };
    let mut hasher = blake3::Hasher::new();
    loop {
        match chunks.message().await {
            Ok(Some(chunk)) => drop(hasher.update(&chunk.data)),
            Ok(None) => return Answer::Ok(hasher.finalize().to_string()),
            Err(status) => return Answer::Info(status.message().to_owned()),
        }
    }
}

/// Fetches every acknowledged image from every controller, and reads the hosts' disks.
async fn finish(site: &Site<'_>) -> anyhow::Result<()> {
    let images = site.shared.recorder.done(Function::Import);
    for client in site.clients()? {
        let mut worker = Worker::new(site.shared, Vec::new(), Chance::new(0));
        let (mut fetched, deadline) = (Vec::new(), Instant::now() + SETTLE);
        for (name, _) in &images {
            let mut came = export_one(&mut worker, &client, name).await;
            while !came && Instant::now() < deadline {
                tokio::time::sleep(LOOK_AGAIN).await;
                came = export_one(&mut worker, &client, name).await;
            }
            fetched.extend(came.then_some(name));
        }
        tell(site.shared, FETCHED, &client.name, json!(fetched));
    }
    let deadline = Instant::now() + REPAIR;
    while Instant::now() < deadline && !all_there(site.cluster, &images)? {
        tokio::time::sleep(LOOK_AGAIN).await;
    }
    for agent in 0..site.cluster.agents() {
        tell(site.shared, DISKS, site.cluster.agent_name(agent), json!(on_disk(site.cluster.agent_data(agent))?));
    }
    Ok(())
}

fn all_there(cluster: &Cluster, images: &[(String, Value)]) -> io::Result<bool> {
    let disks =
        (0..cluster.agents()).map(|agent| on_disk(cluster.agent_data(agent))).collect::<io::Result<Vec<_>>>()?;
    let copies =
        |digest: &str| disks.iter().filter(|disk| disk.get(digest).is_some_and(|found| found == digest)).count();
    Ok(images.iter().all(|(_, digest)| copies(digest.as_str().unwrap_or_default()) >= REPLICAS))
}

/// Every blob of a host: the digest by which it is kept, and that of its bytes.
fn on_disk(data: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(data.join("images"))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        // What is still being written is no blob.
        if name.len() == blake3::OUT_LEN * 2 {
            found.insert(name, blake3::hash(&std::fs::read(&path)?).to_string());
        }
    }
    Ok(found)
}

fn tell(shared: &Arc<Shared>, key: &str, who: &str, value: Value) {
    let worker = Worker::new(shared, Vec::new(), Chance::new(0));
    let (key, node) = (key.to_owned(), who.to_owned());
    let asked = Asked { f: Function::Final, key, value: Value::Null, node, req: String::new() };
    worker.record(&asked, Kind::Invoke, Value::Null, None, String::new());
    worker.ok(&asked, value, None);
}
