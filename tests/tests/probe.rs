//! Nodes that are not heard, looked at by real controllers and agents: a dead one is told from one that hangs.

use serde_json::Value;
use tests::stage::{Stage, until};

/// What `recovery status` says of the only node that is not heard, once it says this.
async fn verdict(stage: &Stage, node: &str, part: &str) -> String {
    until(&format!("of {node} is said: {part}"), async || {
        let status = stage.trefoil_ok(&["recovery", "status"]);
        let of = status["suspects"].as_array().into_iter().flatten().find(|suspect| suspect["name"] == node);
        match of.and_then(|suspect| suspect["verdict"].as_str()) {
            Some(verdict) if verdict.contains(part) => Ok(verdict.to_owned()),
            _ => Err(status["suspects"].to_string()),
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_died_answers_nobody_and_one_that_hangs_is_reached_by_all() {
    let mut stage = Stage::set(3).await;
    until("all are heard", async || match &stage.trefoil_ok(&["recovery", "status"])["suspects"] {
        Value::Array(none) if none.is_empty() => Ok(()),
        some => Err(some.to_string()),
    })
    .await;
    assert!(stage.cluster.kill_agent(0).unwrap());
    for part in ["answers nobody", "controller-", "host-2", "host-3"] {
        verdict(&stage, "host-1", part).await;
    }
    until("three have looked", async || {
        let shown = stage.trefoil_ok(&["node", "show", "host-1"]);
        let probes = shown["probes"].as_array().map_or(&[][..], Vec::as_slice);
        let refused = probes.iter().filter(|probe| probe["reason"] == "nobody listens there").count();
        if refused == 3 { Ok(()) } else { Err(shown.to_string()) }
    })
    .await;
    stage.cluster.restart_agent(0).unwrap();
    until("it is heard again", async || match &stage.trefoil_ok(&["recovery", "status"])["suspects"] {
        Value::Array(none) if none.is_empty() => Ok(()),
        some => Err(some.to_string()),
    })
    .await;

    assert!(stage.cluster.pause_agent(1).unwrap());
    verdict(&stage, "host-2", "host-1").await;
    let hangs = verdict(&stage, "host-2", "its agent hangs").await;
    assert!(hangs.starts_with("reachable from controller-"), "{hangs}");
    let of = |node: &str| stage.trefoil_ok(&["node", "show", node]);
    until("it is lost all the same, for that its lease alone decides", async || match of("host-2")["state"].as_str() {
        Some("lost") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    stage.cluster.resume_agent(1).unwrap();
    let clock = of("host-3");
    assert_eq!((&clock["clock_drifts"], &clock["watchdog"]), (&Value::Bool(false), &Value::Bool(false)));
    stage.strike().await;
}
