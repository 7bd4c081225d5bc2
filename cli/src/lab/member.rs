//! Controllers and agents of a cloud: made, joined, started, by the same commands that a person would type.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use api::{
    client::new_request_id,
    proto::{ControllerRef, IssueJoinTokenRequest, ListRequest, QuorumStatusRequest},
};
use serde_json::Value;
use tokio::time::{Instant, sleep};

use super::{
    cloud::{Cloud, Controller, Host, write_private},
    place::Place,
    process::{Daemon, ProcessId, last_words, run},
};

/// A join token is used within seconds; a longer life would only help a thief.
const TOKEN_VALID_MILLIS: u64 = 120_000;
/// Several elections, and a snapshot on a slow disk.
const SETTLE_LIMIT: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(100);
/// For one question while waiting; the next one is asked anyway.
const QUESTION_LIMIT: Duration = Duration::from_secs(3);
const OPERATOR: &str = "operator";
/// All controllers share this machine's disk and cores, with guests.
const TIMING: [&str; 2] = ["--timing", "noisy"];

#[derive(Clone, Copy)]
pub enum Role {
    Controller,
    Agent,
}

/// The quorum's first member. Writes the operator's access into the cloud's directory.
///
/// # Errors
/// What the command said.
pub async fn init_controller(cloud: &Cloud, controller: &Controller) -> Result<u64> {
    let mut words = place_words("controller", "init", cloud, &controller.name, &controller.address);
    words.extend(["--operator", OPERATOR].into_iter().chain(TIMING).map(String::from));
    let founded = trefoil(cloud, &cloud.place_of_controller(controller), words).await?;
    let text = |field: &str| founded[field].as_str().with_context(|| format!("the answer has no {field}"));
    cloud.save_access(text("operator_token")?, text("ca_pem")?)?;
    Ok(1)
}

/// Another member; its id in the quorum.
///
/// # Errors
/// What the command said.
pub async fn join_controller(cloud: &Cloud, controller: &Controller) -> Result<u64> {
    let mut words = place_words("controller", "join", cloud, &controller.name, &controller.address);
    words.extend(TIMING.map(String::from));
    let token = token(cloud, Role::Controller).await?;
    let joined = join(cloud, &cloud.place_of_controller(controller), &controller.name, words, &token).await?;
    joined["id"].as_u64().context("the answer has no id")
}

/// By way of `wrapper`, a program that becomes the one that it is given.
///
/// # Errors
/// When it does not start.
pub async fn start_controller(cloud: &Cloud, controller: &Controller, wrapper: &[&str]) -> Result<ProcessId> {
    let place = cloud.place_of_controller(controller);
    start(cloud, &place, &controller.name, "controller", wrapper).await
}

/// Makes a stopped controller the whole quorum; the ids are those of all others.
///
/// # Errors
/// What the command said.
pub async fn recover(cloud: &Cloud, controller: &Controller, fenced: &[u64]) -> Result<()> {
    let (data, fenced) = (cloud.data(&controller.name), fenced.iter().map(u64::to_string).collect::<Vec<_>>());
    let mut words = ["quorum", "recover", "--from"].map(String::from).to_vec();
    words.extend([data.display().to_string(), "--i-have-fenced".into(), fenced.join(",")]);
    trefoil(cloud, &cloud.place_of_controller(controller), words).await.map(|_| ())
}

/// # Errors
/// What the command said.
pub async fn join_agent(cloud: &Cloud, host: &Host, token: &str) -> Result<()> {
    let mut words = place_words("agent", "join", cloud, &host.name, &host.address);
    let underlay = host.underlay.to_string();
    words.extend(["--underlay", &underlay, "--hypervisor", cloud.hypervisor.name()].map(String::from));
    join(cloud, &cloud.place_of_host(host)?, &host.name, words, token).await.map(|_| ())
}

/// # Errors
/// When it does not start.
pub async fn start_agent(cloud: &Cloud, host: &Host) -> Result<ProcessId> {
    start(cloud, &cloud.place_of_host(host)?, &host.name, "agent", &[]).await
}

/// A one-time token.
///
/// # Errors
/// What the quorum answered.
pub async fn token(cloud: &Cloud, role: Role) -> Result<String> {
    let role = match role {
        Role::Controller => "controller",
        Role::Agent => "agent",
    };
    let body = IssueJoinTokenRequest { role: role.into(), valid_millis: TOKEN_VALID_MILLIS };
    let client = cloud.client()?;
    let answer =
        client.mutate(new_request_id(), body, |mut stub, request| async move { stub.issue_join_token(request).await });
    Ok(answer.await?.token)
}

/// Takes a controller out of the quorum, when it is in; one that lost its data can only come back as another.
///
/// # Errors
/// What the quorum answered.
pub async fn remove_controller(cloud: &Cloud, id: u64) -> Result<()> {
    let client = cloud.client()?;
    let status =
        client.read(QuorumStatusRequest {}, |mut stub, request| async move { stub.quorum_status(request).await });
    if status.await?.controllers.iter().any(|controller| controller.id == id) {
        let body = ControllerRef { id };
        let removed = client
            .mutate(new_request_id(), body, |mut stub, request| async move { stub.remove_controller(request).await });
        removed.await?;
    }
    Ok(())
}

/// Waits until every controller of this cloud that runs has a vote in the quorum.
///
/// # Errors
/// When it takes too long, or a controller ends meanwhile.
pub async fn wait_for_voters(cloud: &Cloud) -> Result<()> {
    let client = cloud.client()?.with_deadline(QUESTION_LIMIT);
    let asked = Instant::now();
    let mut seen = String::from("nobody answered");
    while asked.elapsed() < SETTLE_LIMIT {
        let status =
            client.read(QuorumStatusRequest {}, |mut stub, request| async move { stub.quorum_status(request).await });
        match status.await {
            Ok(status) => {
                let votes =
                    |id: u64| status.controllers.iter().any(|c| c.id == id && matches!(&*c.role, "leader" | "voter"));
                if cloud.controllers.iter().filter(|c| c.process.is_some()).all(|c| votes(c.id)) {
                    return Ok(());
                }
                let roles: Vec<String> =
                    status.controllers.iter().map(|c| format!("{} is {}", c.name, c.role)).collect();
                seen = roles.join(", ");
            }
            Err(e) => seen = e.message,
        }
        for controller in &cloud.controllers {
            expect_alive(cloud, &controller.name, controller.process)?;
        }
        sleep(POLL).await;
    }
    bail!("the quorum is not complete after {} s: {seen}", SETTLE_LIMIT.as_secs())
}

/// Waits until every host whose agent runs is up.
///
/// # Errors
/// When it takes too long, or an agent ends meanwhile.
pub async fn wait_for_nodes(cloud: &Cloud) -> Result<()> {
    let client = cloud.client()?.with_deadline(QUESTION_LIMIT);
    let asked = Instant::now();
    let mut seen = String::from("nobody answered");
    while asked.elapsed() < SETTLE_LIMIT {
        let body = ListRequest { limit: 1000, ..ListRequest::default() };
        let nodes = client.read(body, |mut stub, request| async move { stub.list_nodes(request).await });
        match nodes.await {
            Ok(reply) => {
                let is_up = |host: &&Host| reply.nodes.iter().any(|node| node.name == host.name && node.state == "up");
                let running = || cloud.hosts.iter().filter(|host| host.agent.is_some());
                if running().all(|host| is_up(&host)) {
                    return Ok(());
                }
                seen = format!("{} of {} hosts are up", running().filter(is_up).count(), running().count());
            }
            Err(e) => seen = e.message,
        }
        for host in &cloud.hosts {
            expect_alive(cloud, &host.name, host.agent)?;
        }
        sleep(POLL).await;
    }
    bail!("after {} s: {seen}", SETTLE_LIMIT.as_secs())
}

fn expect_alive(cloud: &Cloud, name: &str, process: Option<ProcessId>) -> Result<()> {
    if process.is_none_or(|process| process.is_alive()) {
        return Ok(());
    }
    let log = cloud.log(name);
    bail!("{name} has ended; {}: {}", log.display(), last_words(&log))
}

async fn start(cloud: &Cloud, place: &Place, name: &str, noun: &str, wrapper: &[&str]) -> Result<ProcessId> {
    let log = cloud.log(name);
    let (program, data) = (program()?, cloud.data(name).display().to_string());
    let command = [wrapper, &[&*program, noun, "run", "--data", &data]].concat();
    Daemon { dir: &cloud.dir, log: &log, place }.start(&command).await
}

fn place_words(noun: &str, verb: &str, cloud: &Cloud, name: &str, address: &str) -> Vec<String> {
    let data = cloud.data(name).display().to_string();
    [noun, verb, "--data", &data, "--name", name, "--listen", address, "--advertise", address].map(String::from).into()
}

/// The token goes by a file: everybody sees the command line of a process.
async fn join(cloud: &Cloud, place: &Place, name: &str, mut words: Vec<String>, token: &str) -> Result<Value> {
    let file = cloud.dir.join(format!("{name}.token"));
    write_private(&file, token)?;
    words.extend(["--token".into(), format!("@{}", file.display())]);
    let joined = trefoil(cloud, place, words).await;
    fs::remove_file(&file)?;
    joined
}

/// Runs this program to its end; what it printed, as JSON.
async fn trefoil(cloud: &Cloud, place: &Place, words: Vec<String>) -> Result<Value> {
    let program = program()?;
    let mut command: Vec<&str> = vec![&program];
    command.extend(words.iter().map(String::as_str));
    command.extend(["--output", "json"]);
    let output = run(&cloud.dir, place, &command).await?;
    serde_json::from_str(&output).with_context(|| format!("the answer is not JSON: {output}"))
}

/// This very program: it is the controllers and the agents too.
fn program() -> Result<String> {
    let path: PathBuf = std::env::current_exe()?;
    path.into_os_string()
        .into_string()
        .map_err(|path| anyhow::anyhow!("the path of this program is not text: {}", path.display()))
}
