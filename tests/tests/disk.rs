//! A disk that fails under a controller: it stops loudly, tries nothing again, and nothing acknowledged is lost.

use std::{
    os::unix::process::ExitStatusExt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use api::{
    client::{Client, new_request_id},
    error::ErrorKind,
    proto::{GetTagRequest, SetTagRequest},
};
use jepsen::{
    cluster::shim::{Shim, Syncs},
    verdict::skipped,
};
use nix::sys::signal::Signal;
use tests::stage::{Stage, Stub, TENANT, until};

/// Writes tags until it is told to stop; what was acknowledged. What got no answer may be there or not.
async fn write_on(client: Client, name: &str, stop: Arc<AtomicBool>) -> Vec<String> {
    let client = client.with_deadline(Duration::from_secs(5));
    let mut acknowledged = Vec::new();
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let key = format!("{name}-{number}");
        let body =
            SetTagRequest { tenant: TENANT.into(), key: key.clone(), value: key.clone(), expected_version: None };
        let call = |mut stub: Stub, request| async move { stub.set_tag(request).await };
        match client.mutate(new_request_id(), body, call).await {
            Ok(_) => acknowledged.push(key),
            Err(error) => assert!(
                matches!(error.kind, ErrorKind::Unknown | ErrorKind::Unavailable),
                "a write was refused while the disk failed: {error:?}"
            ),
        }
    }
    acknowledged
}

fn disk(stage: &Stage, controller: usize) -> &Shim {
    stage.cluster.shim(controller).expect("the controllers were preloaded")
}

/// Waits until the controller has ended, and looks at how.
async fn it_stopped_loudly(stage: &mut Stage, controller: usize) {
    let status = until(&format!("the controller on the failing disk {controller} ends"), async || {
        stage.cluster.ended(controller).ok_or_else(|| "it runs".to_owned())
    })
    .await;
    assert_eq!(status.signal(), Some(Signal::SIGABRT as i32), "it ended with {status}");
    let printed = stage.cluster.printed(controller).unwrap();
    assert!(printed.contains("storage failed: ") && printed.contains("stopping"), "{printed}");
    let disk = disk(stage, controller);
    assert_eq!(disk.failed_syncs().unwrap(), (1, 0), "a sync failed, and none was tried after it");
    disk.mend_disk().unwrap();
}

async fn all_there(stage: &Stage, keys: &[String]) {
    for controller in 0..stage.cluster.size() {
        for key in keys {
            let body = GetTagRequest { tenant: TENANT.into(), key: key.clone(), stale: false };
            let request = stage.client.request(None, body, Duration::from_secs(10));
            let tag = stage.client.stub(controller).get_tag(request).await;
            let tag = tag.unwrap_or_else(|status| panic!("{key} at controller {controller}: {status}"));
            assert_eq!(tag.into_inner().value, *key);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_stops_a_controller_loudly_and_loses_nothing_acknowledged() {
    let mut stage = Stage::set(0).await;
    if let Some(obstacle) = Shim::obstacle() {
        return skipped("disk: a failed sync", &obstacle);
    }
    stage.cluster.preload().await.expect("the controllers come back with a shim");
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_on(stage.client.clone(), "one", stop.clone()));

    // The leader's disk: the others go on, and it comes back with what it has.
    let leader = stage.cluster.leader().await.expect("a leader");
    disk(&stage, leader).set_syncs(Syncs::FailOnce, 0).unwrap();
    it_stopped_loudly(&mut stage, leader).await;
    stage.set_tag("after-the-leaders-disk", "yes").await.expect("the others go on");
    stage.cluster.restart(leader).unwrap();
    stage.cluster.settled(tests::stage::PATIENCE).await.unwrap();
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = writer.await.unwrap();
    assert!(!acknowledged.is_empty(), "nothing was acknowledged, so nothing could be lost");

    // All disks at once, with writes under way. Who is left without a majority has nothing to sync; its disk fails
    // when the others are back and write to it.
    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_on(stage.client.clone(), "all", stop.clone()));
    for controller in 0..3 {
        disk(&stage, controller).set_syncs(Syncs::FailOnce, 0).unwrap();
    }
    for _ in 0..3 {
        let failed = || (0..3).find(|c| disk(&stage, *c).failed_syncs().is_ok_and(|(failed, _)| failed > 0));
        let controller = until("another disk fails", async || failed().ok_or_else(String::new)).await;
        it_stopped_loudly(&mut stage, controller).await;
        stage.cluster.restart(controller).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    acknowledged.extend(writer.await.unwrap());
    stage.settled().await;
    all_there(&stage, &acknowledged).await;
    stage.strike().await;
}
