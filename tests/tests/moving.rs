//! Machines on simulated hosts that go from one to another, by the commands that an operator types.

use std::collections::BTreeSet;

use api::proto::Vm;
use serde_json::Value;
use tests::stage::{Stage, until};

fn other(stage: &Stage, node: &str) -> String {
    let nodes = stage.trefoil_ok(&["node", "list"]);
    let names = nodes["nodes"].as_array().expect("a list of nodes").iter().filter_map(|node| node["name"].as_str());
    names.map(String::from).find(|name| name != node).expect("there is another node")
}

async fn settled(stage: &Stage, name: &str) -> Vm {
    rests(stage, name, "running").await
}

async fn rests(stage: &Stage, name: &str, status: &str) -> Vm {
    until(&format!("'{name}' is {status} and nothing of its move is left"), async || match stage.vm(name).await {
        Ok(vm) if vm.status == status && vm.migration.is_none() => Ok(vm),
        Ok(vm) => Err(format!("{} on {}: {:?} {}", vm.status, vm.node, vm.migration, vm.reason)),
        Err(error) => Err(error.to_string()),
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_goes_to_another_host_and_back_and_is_there_once() {
    let stage = Stage::furnished(2).await;
    stage.create_vm("web", "tiny").await.unwrap();
    let before = stage.vm_is("web", "running").await;
    let to = other(&stage, &before.node);
    let moved = stage.trefoil_ok(&["vm", "migrate", "web", "--to", &to, "--wait"]);
    assert_eq!((&moved["status"], &moved["node"]), (&Value::from("running"), &Value::from(to.as_str())));
    let after = settled(&stage, "web").await;
    assert!(after.epoch > before.epoch && after.nics == before.nics, "a new placement under the same address");
    assert_eq!((after.loss, after.attempts), (None, 0), "nothing was lost, and nothing was made again");
    // Without a destination the idlest is chosen: there is only one other.
    stage.trefoil_ok(&["vm", "migrate", "web", "--wait"]);
    let back = settled(&stage, "web").await;
    assert!(back.node == before.node && back.epoch > after.epoch);
    let refused = stage.trefoil(&["vm", "migrate", "web", "--to", &back.node]);
    assert!(!refused.status.success(), "it is there already");
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.contains("no-room") && refused.contains("there already"), "{refused}");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_machine_takes_its_disk_to_another_host_and_stays_stopped() {
    let stage = Stage::furnished(2).await;
    stage.create_vm("web", "tiny").await.unwrap();
    stage.vm_is("web", "running").await;
    let told = |output: &std::process::Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let running = stage.trefoil(&["vm", "migrate", "web", "--offline"]);
    let said = told(&running);
    assert!(running.status.code() == Some(4) && said.contains("stale") && said.contains("web is running"), "{said}");
    stage.set_power("web", "stopped").await.unwrap();
    let before = stage.vm_is("web", "stopped").await;
    let live = stage.trefoil(&["vm", "migrate", "web", "--live"]);
    let said = told(&live);
    assert!(live.status.code() == Some(4) && said.contains("stale") && said.contains("web is stopped"), "{said}");
    assert_eq!(stage.trefoil(&["vm", "migrate", "web", "--live", "--offline"]).status.code(), Some(2), "one of them");

    let mut disks = Vec::new();
    let mut at = before.clone();
    for _ in 0..2 {
        let to = other(&stage, &at.node);
        let moved = stage.trefoil_ok(&["vm", "migrate", "web", "--to", &to, "--offline", "--wait"]);
        assert_eq!((&moved["status"], &moved["node"]), (&Value::from("stopped"), &Value::from(to.as_str())));
        let after = rests(&stage, "web", "stopped").await;
        assert!(after.epoch > at.epoch && after.nics == before.nics, "a new placement under the same address");
        disks.push(disk_of(&stage, &after));
        assert!(stage.running().values().all(BTreeSet::is_empty), "nobody runs it");
        at = after;
    }
    // A simulated disk says which placement wrote it first.
    assert_eq!(disks[0], disks[1]);
    let sentence = format!("simulated disk of {} at {}", before.id, before.epoch);
    assert!(disks[0].contains(&sentence), "not '{sentence}': {}", disks[0]);
    stage.set_power("web", "running").await.unwrap();
    assert_eq!(stage.vm_is("web", "running").await.epoch, at.epoch, "it runs where it went");
    stage.strike().await;
}

/// The disk of a machine, on the one host that has it.
fn disk_of(stage: &Stage, vm: &Vm) -> String {
    let found = ["a1", "a2"].map(|host| stage.folder().join(host).join("vms").join(&vm.id).join("disk.qcow2"));
    let found: Vec<_> = found.into_iter().filter(|disk| disk.exists()).collect();
    assert_eq!(found.len(), 1, "one host has its disk: {found:?}");
    String::from_utf8_lossy(&std::fs::read(&found[0]).expect("the disk")).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_node_is_empty_of_what_runs_and_of_what_is_stopped() {
    let mut stage = Stage::furnished(2).await;
    for name in ["one", "two", "off"] {
        stage.create_vm(name, "tiny").await.unwrap();
        stage.vm_is(name, "running").await;
    }
    let node = stage.vm("off").await.unwrap().node;
    let to = other(&stage, &node);
    for name in ["one", "two"] {
        if stage.vm(name).await.unwrap().node != node {
            stage.trefoil_ok(&["vm", "migrate", name, "--to", &node, "--wait"]);
            settled(&stage, name).await;
        }
    }
    stage.set_power("off", "stopped").await.unwrap();
    stage.vm_is("off", "stopped").await;

    stage.trefoil_ok(&["node", "drain", &node, "--no-wait"]);
    // The next leader goes on with it.
    let leader = stage.cluster.leader().await.expect("a leader");
    assert!(stage.cluster.kill(leader).unwrap());
    stage.cluster.restart(leader).unwrap();
    for (name, status) in [("one", "running"), ("two", "running"), ("off", "stopped")] {
        assert_eq!(rests(&stage, name, status).await.node, to);
    }
    let status = stage.trefoil_ok(&["node", "drain", &node, "--wait"]);
    assert_eq!(status["left"].as_array().map(Vec::len), Some(0), "{status}");
    stage.set_power("off", "running").await.unwrap();
    assert_eq!(stage.vm_is("off", "running").await.node, to);

    // With the node back in use, what is promised is evened out, and then left alone.
    stage.trefoil_ok(&["node", "uncordon", &node]);
    let suggested = stage.trefoil_ok(&["node", "rebalance", "--dry-run"]);
    let moves = suggested["moves"].as_array().expect("a list of moves").len();
    let held = stage.trefoil_ok(&["vm", "list"])["vms"].as_array().expect("a list of machines").len();
    assert!(moves < held, "never all of them: {suggested}");
    stage.strike().await;
}
