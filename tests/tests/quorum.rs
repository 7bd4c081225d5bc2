//! Controllers as processes: made, killed, wiped, added, removed. Nothing that was acknowledged is lost.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use api::{
    client::{Client, new_request_id},
    proto::{ControllerRef, GetTagRequest, SetTagRequest},
};
use tests::stage::{Stage, Stub, TENANT, until};

/// Writes tags one after the other until it is told to stop; what was acknowledged.
async fn write_on(client: Client, stop: Arc<AtomicBool>) -> Vec<String> {
    let mut acknowledged = Vec::new();
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let key = format!("written-{number}");
        let body =
            SetTagRequest { tenant: TENANT.into(), key: key.clone(), value: key.clone(), expected_version: Some(0) };
        let call = |mut stub: Stub, request| async move { stub.set_tag(request).await };
        client.mutate(new_request_id(), body, call).await.expect("a write succeeds while a majority is there");
        acknowledged.push(key);
    }
    acknowledged
}

/// Everything is there, whichever controller is asked.
async fn all_there(stage: &Stage, keys: &[String]) {
    for controller in 0..stage.cluster.size() {
        for key in keys {
            let body = GetTagRequest { tenant: TENANT.into(), key: key.clone(), stale: false };
            let request = stage.client.request(None, body, std::time::Duration::from_secs(10));
            let tag = stage.client.stub(controller).get_tag(request).await;
            let tag = tag.unwrap_or_else(|status| panic!("{key} at controller {controller}: {status}"));
            assert_eq!(tag.into_inner().value, *key);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kill_loses_nothing_acknowledged() {
    let mut stage = Stage::set(0).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_on(stage.client.clone(), stop.clone()));

    // The leader, three times, while writes go on.
    for _ in 0..3 {
        let leader = stage.cluster.leader().await.expect("a leader");
        assert!(stage.cluster.kill(leader).unwrap());
        stage.set_tag("after-a-kill", "yes").await.expect("a write succeeds without the old leader");
        stage.cluster.restart(leader).unwrap();
        stage.cluster.settled(tests::stage::PATIENCE).await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    let acknowledged = writer.await.unwrap();
    assert!(acknowledged.len() > 10, "only {} writes were acknowledged", acknowledged.len());

    // All at once: only the disks remember.
    for controller in 0..3 {
        assert!(stage.cluster.kill(controller).unwrap());
    }
    for controller in 0..3 {
        stage.cluster.restart(controller).unwrap();
    }
    stage.settled().await;
    all_there(&stage, &acknowledged).await;
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wiped_controller_returns_under_a_new_id_by_snapshot_while_writes_go_on() {
    let mut stage = Stage::set(0).await;
    // More than a snapshot's worth of entries, so that the log alone could not bring it back.
    for number in 0..700 {
        stage.set_tag("counter", &number.to_string()).await.unwrap();
    }
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_on(stage.client.clone(), stop.clone()));
    let leader = stage.cluster.leader().await.expect("a leader");
    let victim = (leader + 1) % 3;
    let old = stage.cluster.id(victim);
    assert!(stage.cluster.kill(victim).unwrap());
    let new = stage.cluster.wipe_and_rejoin(victim).await.expect("it joins again");
    assert!(new > 3 && new != old, "controller {old} came back as {new}");
    until("the new one votes and has a snapshot", async || {
        let status = stage.cluster.status(victim).await.ok_or("it does not answer")?;
        let role = status.controllers.iter().find(|c| c.id == new).map(|c| c.role.clone()).unwrap_or_default();
        let ready = (role == "voter" || role == "leader") && status.snapshot_index > 0;
        if ready { Ok(()) } else { Err(format!("role '{role}', snapshot {}", status.snapshot_index)) }
    })
    .await;
    stop.store(true, Ordering::Relaxed);
    let acknowledged = writer.await.unwrap();
    stage.settled().await;
    all_there(&stage, &acknowledged).await;
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_are_added_removed_and_leadership_is_handed_over() {
    let mut stage = Stage::set(0).await;
    let fourth = stage.cluster.add_controller().await.expect("a fourth joins");
    let id = stage.cluster.id(fourth);
    until("the fourth votes", async || {
        let status = stage.cluster.status(0).await.ok_or("no answer")?;
        let role = status.controllers.iter().find(|c| c.id == id).map(|c| c.role.clone()).unwrap_or_default();
        if role == "voter" { Ok(()) } else { Err(format!("it is a '{role}'")) }
    })
    .await;

    let call = |mut stub: Stub, request| async move { stub.transfer_leader(request).await };
    stage.client.mutate(new_request_id(), ControllerRef { id }, call).await.expect("leadership is handed over");
    until("the fourth leads", async || match stage.cluster.leader().await {
        Some(leader) if leader == fourth => Ok(()),
        other => Err(format!("{other:?} leads")),
    })
    .await;

    // The leader itself is removed: the others go on without it.
    let call = |mut stub: Stub, request| async move { stub.remove_controller(request).await };
    stage.client.mutate(new_request_id(), ControllerRef { id }, call).await.expect("it is removed");
    until("three are left and one of them leads", async || {
        let status = stage.cluster.status(0).await.ok_or("no answer")?;
        let voters = status.controllers.iter().filter(|c| c.role == "voter" || c.role == "leader").count();
        if voters == 3 && status.leader != id && status.leader != 0 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
    stage.set_tag("after", "the removal").await.expect("writes go on");
    assert_eq!(stage.tag("after").await.unwrap(), "the removal");
}

/// Waits until so many controllers have a vote.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_follows_the_leader_with_what_it_changes() {
    let stage = Stage::set(0).await;
    let leader = stage.cluster.leader().await.expect("a leader");
    let mut endpoints = stage.cluster.endpoints();
    endpoints.rotate_left(leader + 1);
    let access = stage.cluster.access();
    let client = Client::new(&endpoints, &access.ca_pem, &access.token).unwrap();
    let write = async |value: &str| {
        let body =
            SetTagRequest { tenant: TENANT.into(), key: "k".into(), value: value.into(), expected_version: None };
        let call = |mut stub: Stub, request| async move { stub.set_tag(request).await };
        client.mutate(new_request_id(), body, call).await.expect("a write succeeds");
    };
    assert_ne!(client.leader(), stage.cluster.endpoint(leader), "it begins with a follower");
    write("one").await;
    assert_eq!(client.leader(), stage.cluster.endpoint(leader));

    let next = (leader + 1) % stage.cluster.size();
    stage.cluster.transfer_leader(next).await.expect("leadership is handed over");
    until("it writes to the new leader", async || {
        write("two").await;
        let (goes, leads) = (client.leader(), stage.cluster.endpoint(next));
        if goes == leads { Ok(()) } else { Err(format!("it writes to {goes}, and {leads} leads")) }
    })
    .await;
}

async fn voters(stage: &Stage, count: usize) {
    until(&format!("{count} controllers vote"), async || {
        let status = stage.cluster.status(0).await.ok_or("no answer")?;
        let voters = status.controllers.iter().filter(|c| c.role == "voter" || c.role == "leader").count();
        let known = status.controllers.len();
        if (voters, known) == (count, count) && status.leader != 0 { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_grow_to_five_lose_two_and_shrink_again_while_writes_go_on() {
    let mut stage = Stage::set(0).await;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_on(stage.client.clone(), stop.clone()));
    let fourth = stage.cluster.add_controller().await.expect("a fourth joins");
    let fifth = stage.cluster.add_controller().await.expect("a fifth joins");
    voters(&stage, 5).await;

    // Five survive the loss of two; one of them is dead for good and replaced.
    assert!(stage.cluster.kill(1).unwrap() && stage.cluster.kill(fifth).unwrap());
    stage.set_tag("three-of-five", "are a majority").await.expect("a write succeeds with three of five");
    stage.cluster.restart(fifth).unwrap();
    let new = stage.cluster.wipe_and_rejoin(1).await.expect("the dead one is replaced");
    assert!(new > 5, "it came back as controller-{new}");
    voters(&stage, 5).await;

    for extra in [fourth, fifth] {
        let call = |mut stub: Stub, request| async move { stub.remove_controller(request).await };
        let removed = ControllerRef { id: stage.cluster.id(extra) };
        stage.client.mutate(new_request_id(), removed, call).await.expect("it is removed");
        assert!(stage.cluster.terminate(extra).unwrap(), "it ends when it is asked");
    }
    voters(&stage, 3).await;
    stop.store(true, Ordering::Relaxed);
    let acknowledged = writer.await.unwrap();
    assert!(acknowledged.len() > 10, "only {} writes were acknowledged", acknowledged.len());
    stage.settled().await;
    for controller in 0..3 {
        let body = GetTagRequest { tenant: TENANT.into(), key: "three-of-five".into(), stale: false };
        let request = stage.client.request(None, body, std::time::Duration::from_secs(10));
        assert!(stage.client.stub(controller).get_tag(request).await.is_ok());
    }
    for key in &acknowledged {
        assert_eq!(stage.tag(key).await.as_ref(), Ok(key));
    }
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_check_of_a_sound_state_says_so() {
    let stage = Stage::furnished(1).await;
    stage.create_vm("web", "tiny").await.unwrap();
    stage.vm_is("web", "running").await;
    let checked = stage.trefoil_ok(&["quorum", "check"]);
    assert!(checked["rules"].as_u64().is_some_and(|rules| rules >= 9), "{checked}");
    assert_eq!(checked["broken"].as_array().map(Vec::len), Some(0), "{checked}");
    assert!(checked["read_at"]["index"].as_u64().is_some_and(|index| index > 0), "{checked}");
    let told = stage.trefoil(&["quorum", "check", "--output", "table"]);
    assert!(String::from_utf8_lossy(&told.stdout).starts_with("OK: all "), "{told:?}");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_polite_stop_hands_leadership_over_first() {
    let mut stage = Stage::set(0).await;
    let before = stage.cluster.status(0).await.expect("an answer").term;
    let leader = stage.cluster.leader().await.expect("a leader");
    assert!(stage.cluster.terminate(leader).unwrap(), "it ends when it is asked");
    let began = std::time::Instant::now();
    stage.set_tag("after", "the stop").await.unwrap();
    // Generous: without the handing-over it would take an election after a silence.
    assert!(began.elapsed().as_secs() < 5, "the next write took {:?}", began.elapsed());
    let other = (leader + 1) % 3;
    assert!(stage.cluster.status(other).await.expect("an answer").term > before);
    stage.cluster.restart(leader).unwrap();
    stage.settled().await;
    stage.strike().await;
}
