//! Rehearsals of backups on simulated hosts: what an owner sees of them, and that they survive the death of the leader
//! and of the host that has them.

use serde_json::{Value, json};
use tests::stage::{Stage, TENANT, until};

/// A running machine `web` and one backup of it, which is on another host as well.
async fn backed_up() -> (Stage, String) {
    let stage = Stage::furnished(2).await;
    stage.create_vm("web", "tiny").await.unwrap();
    stage.vm_is("web", "running").await;
    stage.trefoil_ok(&["backup", "create", "web", "--wait"]);
    until("the backup is on another host", async || {
        let backups = stage.vm("web").await.map_err(|error| error.to_string())?.backups.unwrap_or_default();
        if backups.safe_at_millis > 0 { Ok(()) } else { Err(format!("{backups:?}")) }
    })
    .await;
    let name = backup(&stage)["name"].as_str().expect("it has a name").to_owned();
    (stage, name)
}

fn backup(stage: &Stage) -> Value {
    stage.trefoil_ok(&["backup", "list", "--vm", "web"])[0].clone()
}

async fn under_way(stage: &Stage) -> String {
    until("the rehearsal has a host", async || match backup(stage)["rehearsal"]["node"].as_str() {
        Some(node) if !node.is_empty() => Ok(node.to_owned()),
        _ => Err(backup(stage).to_string()),
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_rehearsed_unseen_and_without_a_charge() {
    let (stage, name) = backed_up().await;
    let own = stage.vm("web").await.unwrap().node;
    let done = stage.trefoil_ok(&["backup", "rehearse", "web", "--wait"]);
    assert_eq!((&done["name"], &done["rehearsed"]["verdict"]), (&json!(name), &json!("ok")));
    assert_eq!(done["rehearsed"]["reason"], "its guest agent answered");
    let vm = stage.vm("web").await.unwrap();
    let told = vm.backups.unwrap();
    assert_eq!((told.rehearsed_image, told.rehearsed.unwrap().verdict), (name.clone(), "ok".to_owned()));

    // One that goes on until it is ended.
    let slow = ["backup", "rehearse", &name, "--expect", "never said", "--within", "1h", "--no-wait"];
    stage.trefoil_ok(&slow);
    let node = under_way(&stage).await;
    assert_ne!(node, own, "rather on another host than its own");
    assert_eq!(stage.vms().await.len(), 1, "it is no machine");
    let bill = stage.trefoil_ok(&["bill", "show", "--tenant", TENANT]);
    let resources: Vec<&str> =
        bill["lines"].as_array().unwrap().iter().filter_map(|l| l["resource"].as_str()).collect();
    assert!(resources.iter().all(|r| *r == vm.id || r.starts_with("img-")), "{resources:?}");
    let again = stage.trefoil(&slow);
    assert!(String::from_utf8_lossy(&again.stderr).contains("in-use"), "{again:?}");
    let deletion = stage.trefoil(&["image", "delete", &name]);
    assert!(String::from_utf8_lossy(&deletion.stderr).contains("in-use"), "{deletion:?}");

    stage.trefoil_ok(&["backup", "rehearse", "web", "--abort"]);
    let after = backup(&stage);
    assert_eq!(
        (&after["rehearsal"], &after["rehearsed"]["verdict"]),
        (&Value::Null, &json!("ok")),
        "the last one counts"
    );
    let done = stage.trefoil_ok(&["backup", "rehearse", &name, "--expect", "is simulated", "--wait"]);
    assert!(done["rehearsed"]["reason"].as_str().unwrap().contains("is simulated"), "the host was free again: {done}");
    let late = stage.trefoil(&["backup", "rehearse", &name, "--expect", "never said", "--within", "10s", "--wait"]);
    assert_eq!(late.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&late.stderr).contains("inconclusive"), "{late:?}");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rehearsal_outlives_the_leader_and_goes_on_elsewhere_without_its_host() {
    let (mut stage, name) = backed_up().await;
    stage.trefoil_ok(&["backup", "rehearse", &name, "--expect", "never said", "--within", "1h", "--no-wait"]);
    let node = under_way(&stage).await;
    let leader = stage.cluster.leader().await.expect("a leader");
    assert!(stage.cluster.kill(leader).unwrap());
    until("another leader knows of it", async || match backup(&stage)["rehearsal"]["node"].as_str() {
        Some(now) if now == node => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;

    let host = (0..2).find(|host| format!("host-{}", host + 1) == node).expect("the host has a name");
    assert!(stage.cluster.kill_agent(host).unwrap());
    until("another host has it", async || match backup(&stage)["rehearsal"]["node"].as_str() {
        Some(now) if now != node && !now.is_empty() => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    stage.trefoil_ok(&["backup", "rehearse", &name, "--abort"]);
    let done = stage.trefoil_ok(&["backup", "rehearse", &name, "--wait"]);
    assert_eq!(done["rehearsed"]["verdict"], "ok");
    stage.cluster.restart(leader).unwrap();
    stage.cluster.restart_agent(host).unwrap();
    stage.settled().await;
    stage.strike().await;
}
