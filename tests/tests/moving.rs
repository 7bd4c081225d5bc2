//! Machines on simulated hosts that go from one to another, by the commands that an operator types.

use api::proto::Vm;
use serde_json::Value;
use tests::stage::{Stage, until};

fn other(stage: &Stage, node: &str) -> String {
    let nodes = stage.trefoil_ok(&["node", "list"]);
    let names = nodes["nodes"].as_array().expect("a list of nodes").iter().filter_map(|node| node["name"].as_str());
    names.map(String::from).find(|name| name != node).expect("there is another node")
}

async fn settled(stage: &Stage, name: &str) -> Vm {
    until(&format!("'{name}' runs and nothing of its move is left"), async || match stage.vm(name).await {
        Ok(vm) if vm.status == "running" && vm.migration.is_none() => Ok(vm),
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
async fn a_drained_node_is_empty_but_for_what_is_off() {
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
    for name in ["one", "two"] {
        until(&format!("'{name}' is on the other node"), async || match stage.vm(name).await {
            Ok(vm) if vm.node == to && vm.status == "running" => Ok(()),
            Ok(vm) => Err(format!("{} on {}: {}", vm.status, vm.node, vm.reason)),
            Err(error) => Err(error.to_string()),
        })
        .await;
    }
    let stuck = stage.trefoil(&["node", "drain", &node, "--wait"]);
    let told = String::from_utf8_lossy(&stuck.stderr).into_owned();
    assert!(!stuck.status.success() && told.contains("off") && told.contains("it is stopped"), "{told}");

    // It goes as soon as it runs.
    stage.set_power("off", "running").await.unwrap();
    let status = stage.trefoil_ok(&["node", "drain", &node, "--wait"]);
    assert_eq!(status["left"].as_array().map(Vec::len), Some(0), "{status}");
    assert_eq!(settled(&stage, "off").await.node, to);

    // With the node back in use, what is promised is evened out, and then left alone.
    stage.trefoil_ok(&["node", "uncordon", &node]);
    let suggested = stage.trefoil_ok(&["node", "rebalance", "--dry-run"]);
    let moves = suggested["moves"].as_array().expect("a list of moves").len();
    let held = stage.trefoil_ok(&["vm", "list"])["vms"].as_array().expect("a list of machines").len();
    assert!(moves < held, "never all of them: {suggested}");
    stage.strike().await;
}
