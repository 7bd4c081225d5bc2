//! What a stopped controller has on its disk is shown as it is, and left as it is; what cannot be believed is refused.

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;
use tests::stage::{Stage, until};

/// Every file below, with its bytes and when it was written.
fn files(folder: &Path) -> BTreeMap<String, (Vec<u8>, std::time::SystemTime)> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let about = std::fs::symlink_metadata(&path).unwrap();
            if about.is_dir() {
                folders.push(path);
            } else if about.is_file() {
                let bytes = std::fs::read(&path).unwrap();
                found.insert(path.display().to_string(), (bytes, about.modified().unwrap()));
            }
        }
    }
    found
}

fn dump(stage: &Stage, controller: usize, more: &[&str]) -> Result<Vec<Value>, (i32, Value)> {
    let data = stage.cluster.data(controller).display().to_string();
    let output = stage.trefoil(&[&["controller", "dump", "--data", &data, "--output", "json"], more].concat());
    let lines = |text: &[u8]| -> Vec<Value> {
        String::from_utf8_lossy(text).lines().map(|line| serde_json::from_str(line).expect("JSON a line")).collect()
    };
    match output.status.code() {
        Some(0) => Ok(lines(&output.stdout)),
        code => Err((code.unwrap_or(-1), lines(&output.stderr).pop().unwrap_or_default())),
    }
}

fn of_kind<'a>(lines: &'a [Value], kind: &str) -> Vec<&'a Value> {
    lines.iter().filter(|line| line["kind"] == kind).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_controllers_disk_is_shown_and_left_as_it_is() {
    let mut stage = Stage::furnished(1).await;
    stage.create_vm("web", "tiny").await.unwrap();
    let version = stage.set_tag("color", "red").await.unwrap();
    let last = stage.set_tag("color", "blue").await.unwrap();
    let (code, said) = dump(&stage, 0, &[]).unwrap_err();
    assert_eq!((code, said["code"].as_str()), (4, Some("in-use")), "a running controller is not read: {said}");

    // A killed one: its tables are behind its log.
    let leader = stage.cluster.leader().await.expect("a leader");
    let follower = (0..3).find(|c| *c != leader).unwrap();
    until("the follower has the last write", async || match stage.cluster.status(follower).await {
        Some(status) if status.applied_index >= last => Ok(()),
        other => Err(format!("{:?}", other.map(|status| status.applied_index))),
    })
    .await;
    stage.cluster.kill(follower).unwrap();
    let before = files(stage.cluster.data(follower));
    let lines = dump(&stage, follower, &["--log", "--state", "--at", &version.to_string()]).unwrap();
    assert_eq!(files(stage.cluster.data(follower)), before, "nothing on the disk has changed");

    let head = of_kind(&lines, "controller")[0];
    assert_eq!(head["id"], stage.cluster.id(follower));
    assert!(head["last"]["index"].as_u64() >= Some(last), "{head}");
    assert_eq!(head["state"]["index"], version);
    let tag = |lines: &[Value], key: &str| {
        let rows = of_kind(lines, "row").into_iter();
        rows.filter(|row| row["table"] == "tags" && row["key"].as_str().is_some_and(|k| k.ends_with(key)))
            .map(|row| row["row"]["value"].clone())
            .next()
    };
    assert_eq!(tag(&lines, "/color"), Some("red".into()), "the state is of the index that was asked for");
    let entries = of_kind(&lines, "entry");
    let written = entries.iter().find(|entry| entry["index"] == last).expect("the last write is in the log");
    assert_eq!(written["command"]["Tenant"]["SetTag"]["value"], "blue");
    assert!(written["request"].is_string() && written["term"].is_u64() && written["leader"].is_u64(), "{written}");
    let later = dump(&stage, follower, &["--state", "--at", &last.to_string()]).unwrap();
    assert_eq!(tag(&later, "/color"), Some("blue".into()));
    let (code, said) = dump(&stage, follower, &["--at", "999999"]).unwrap_err();
    assert_eq!((code, said["code"].as_str()), (2, Some("invalid-argument")), "{said}");

    // The same index has the same state on another, which was stopped politely and has its tables up to date.
    let other = (0..3).find(|c| *c != follower && *c != leader).unwrap();
    assert!(stage.cluster.terminate(other).unwrap());
    let polite = dump(&stage, other, &["--state"]).unwrap();
    let machine = of_kind(&polite, "row").into_iter().find(|row| row["table"] == "vms").expect("the machine's row");
    assert!(machine["row"]["request"].as_str().is_some_and(|id| id.len() == 36), "{machine}");
    let index = polite[0]["applied"]["index"].as_u64().expect("it has applied something");
    assert_eq!(polite[0]["state"]["index"], index);
    stage.cluster.restart(follower).unwrap();
    until("the follower is as far", async || match stage.cluster.status(follower).await {
        Some(status) if status.applied_index >= index => Ok(()),
        other => Err(format!("{:?}", other.map(|status| status.applied_index))),
    })
    .await;
    stage.cluster.kill(follower).unwrap();
    let same = dump(&stage, follower, &["--at", &index.to_string()]).unwrap();
    assert_eq!(same[0]["state"], polite[0]["state"], "equal index, equal state");
    flipped_bytes_are_refused(&stage, other);
    stage.strike().await;
}

/// In the middle of what was written: neither a torn tail nor anything that a start would accept.
fn flipped_bytes_are_refused(stage: &Stage, controller: usize) {
    let log = stage.cluster.data(controller).join("raft-log");
    let written = std::fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().path());
    let wal = written.filter(|path| path.extension().is_some_and(|e| e == "log"));
    let largest = wal.max_by_key(|path| std::fs::metadata(path).unwrap().len()).expect("a write-ahead log");
    let mut bytes = std::fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x40;
    std::fs::write(&largest, bytes).unwrap();
    let (code, said) = dump(stage, controller, &["--log"]).unwrap_err();
    assert_eq!((code, said["code"].as_str()), (1, Some("damaged")), "{said}");
}
