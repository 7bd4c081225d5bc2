//! Quorums that are made again: from a backup when all controllers are lost, from one survivor when a majority is. Hosts
//! and people know them again, no machine runs twice, and what is left of the old quorum is shut out for ever.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use model::{INDICES_PER_SECOND, table::RowChange};
use serde_json::Value;
use storage::{
    failure,
    state::{Batch, StateStore},
};
use tests::stage::{Stage, until};

/// Waits until an old controller has found out that it is one, and has ended; then it may not even start.
async fn shut_out(stage: &mut Stage, controller: usize) {
    until("the old controller ends by itself", async || match stage.cluster.ended(controller) {
        Some(status) if !status.success() => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    let told = stage.cluster.printed(controller).unwrap();
    assert!(told.contains("the quorum was refounded without it") && told.contains("join under a new id"), "{told}");
    stage.cluster.restart(controller).unwrap();
    until("it does not start again", async || stage.cluster.ended(controller).ok_or("it runs".to_owned())).await;
    let told = stage.cluster.printed(controller).unwrap();
    assert!(told.contains("this controller was fenced"), "{told}");
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[tokio::test(flavor = "multi_thread")]
async fn all_controllers_are_lost_and_the_cloud_goes_on_from_a_backup() {
    let mut stage = Stage::furnished(2).await;
    stage.create_vm("web", "tiny").await.unwrap();
    let web = stage.vm_is("web", "running").await;
    stage.set_tag("before", "the backup").await.unwrap();

    let file = stage.folder().join("cloud.quorum").display().to_string();
    let backed_up = stage.trefoil_ok(&["quorum", "backup", &file]);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "it holds the authority's key");
    let verified = stage.trefoil_ok(&["quorum", "backup", "--verify", &file]);
    assert_eq!(backed_up, verified);
    let again = stage.trefoil(&["quorum", "backup", &file]);
    assert_eq!(again.status.code(), Some(4), "it is not overwritten: {again:?}");
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let damaged = stage.file("damaged.quorum", &bytes);
    let refused = stage.trefoil(&["quorum", "backup", "--verify", &damaged]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");

    // Nobody will know of this one.
    stage.create_vm("late", "tiny").await.unwrap();
    let late = stage.vm_is("late", "running").await;
    assert!(stage.running().values().all(|hosts| hosts.len() == 1), "{:?}", stage.running());
    for controller in 0..3 {
        assert!(stage.cluster.kill(controller).unwrap());
    }

    stage.cluster.restore(0, Path::new(&file)).expect("the backup is restored");
    stage.renew_client();
    stage.cluster.settled(tests::stage::PATIENCE).await.unwrap();
    let status = until("both hosts have said what they hold", async || {
        let status = stage.trefoil_ok(&["recovery", "status"]);
        let awaited = status["refounding"]["awaited"].as_array().map(Vec::len);
        if awaited == Some(0) { Ok(status) } else { Err(status.to_string()) }
    })
    .await;
    let orphans = status["refounding"]["orphans"].as_array().expect("they are listed");
    assert_eq!(orphans.len(), 1, "{status}");
    assert_eq!((&orphans[0]["vm"], &orphans[0]["phase"]), (&Value::from(late.id.clone()), &Value::from("running")));
    let now = stage.vm_is("web", "running").await;
    assert_eq!((now.id, now.node, now.epoch), (web.id.clone(), web.node, web.epoch), "it was not touched");
    assert_eq!(stage.tag("before").await.unwrap(), "the backup");
    let on = stage.running();
    assert!(on[&web.id].len() == 1 && on[&late.id].len() == 1, "both run where they ran: {on:?}");

    // Nothing is given out twice: neither a placement's number nor an id.
    stage.create_vm("new", "tiny").await.unwrap();
    let new = stage.vm_is("new", "running").await;
    let epoch = number(&stage.trefoil_ok(&["quorum", "status"])["epoch"]);
    assert!(new.epoch > epoch * INDICES_PER_SECOND && new.epoch > late.epoch && new.id != late.id, "{new:?}");

    // What is left of the old quorum ends as soon as it speaks with the new one, and comes back under new ids.
    for controller in [1, 2] {
        stage.cluster.restart(controller).unwrap();
        shut_out(&mut stage, controller).await;
        stage.cluster.wipe_and_rejoin(controller).await.expect("it joins the new quorum");
    }
    stage.settled().await;

    stage.trefoil_ok(&["recovery", "settle"]);
    until("what nobody knows is set aside", async || match stage.running() {
        on if on[&late.id].is_empty() => Ok(()),
        on => Err(format!("{on:?}")),
    })
    .await;
    let on = stage.running();
    assert!(on[&web.id].len() == 1 && on[&new.id].len() == 1, "{on:?}");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_majority_is_lost_for_ever_and_one_controller_goes_on() {
    let mut stage = Stage::furnished(1).await;
    stage.create_vm("web", "tiny").await.unwrap();
    let web = stage.vm_is("web", "running").await;
    let leader = stage.cluster.leader().await.expect("a leader");
    let (survivor, gone) = ((leader + 1) % 3, [leader, (leader + 2) % 3]);
    for controller in gone {
        assert!(stage.cluster.kill(controller).unwrap());
    }
    let data = stage.cluster.data(survivor).display().to_string();
    let mut ids = gone.map(|controller| stage.cluster.id(controller).to_string());
    ids.sort();
    let others = ids.join(",");
    let recover = ["quorum", "recover", "--from", &data, "--i-have-fenced", &others];
    let running = stage.trefoil(&recover);
    assert_eq!(running.status.code(), Some(1), "not while it runs: {running:?}");
    assert!(stage.cluster.kill(survivor).unwrap());
    let told = stage.trefoil(&recover[..4]);
    let said = String::from_utf8_lossy(&told.stderr).into_owned();
    assert!(told.status.code() == Some(1) && said.contains(&format!("--i-have-fenced {others}")), "{said}");
    let some = stage.trefoil(&["quorum", "recover", "--from", &data, "--i-have-fenced", &ids[0]]);
    assert!(String::from_utf8_lossy(&some.stderr).contains("the other members are"), "{some:?}");

    let recovered = stage.trefoil_ok(&recover);
    assert_eq!(number(&recovered["id"]), stage.cluster.id(survivor));
    stage.cluster.restart(survivor).unwrap();
    stage.cluster.settled(tests::stage::PATIENCE).await.unwrap();
    stage.set_tag("after", "the recovery").await.expect("one controller is the whole quorum");
    let now = stage.vm_is("web", "running").await;
    assert_eq!((now.epoch, &now.node), (web.epoch, &web.node), "it was not touched");
    until("nothing is open any more", async || {
        let status = stage.trefoil_ok(&["recovery", "status"]);
        if status["refounding"].is_null() { Ok(()) } else { Err(status.to_string()) }
    })
    .await;

    // Both old voters at once: of the old quorum they are a majority.
    for controller in gone {
        stage.cluster.restart(controller).unwrap();
    }
    for controller in gone {
        shut_out(&mut stage, controller).await;
        stage.cluster.wipe_and_rejoin(controller).await.expect("it joins under a new id");
    }
    stage.settled().await;
    assert_eq!(stage.tag("after").await.unwrap(), "the recovery");
    assert_eq!(stage.running()[&web.id].len(), 1);
    let before = fs::read_dir(&data).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
    assert!(before.into_iter().any(|name| name.starts_with("before-epoch-")), "what it knew before is kept");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn levels_are_told_and_a_version_that_is_too_old_does_not_start() {
    let mut stage = Stage::set(0).await;
    let latest = u64::from(model::level::LATEST);
    let status = stage.trefoil_ok(&["quorum", "status"]);
    assert_eq!(number(&status["level"]), latest, "a new cloud begins at the level of its first controller");
    for controller in status["controllers"].as_array().expect("they are listed") {
        assert_eq!(number(&controller["level"]), latest);
        assert_eq!(controller["version"].as_str(), Some(env!("CARGO_PKG_VERSION")));
    }
    let upgraded = stage.trefoil_ok(&["quorum", "upgrade"]);
    assert_eq!((number(&upgraded["from"]), number(&upgraded["to"])), (latest, latest));
    // One that does not say what it knows holds it up.
    let victim = (stage.cluster.leader().await.expect("a leader") + 1) % 3;
    assert!(stage.cluster.terminate(victim).unwrap());
    let refused = stage.trefoil(&["quorum", "upgrade"]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains("does not say which level it knows"), "{said}");

    // As a later version would have left it.
    let (tables, loaded) = StateStore::open(stage.cluster.data(victim), failure::abort()).unwrap();
    let row = Some(postcard::to_stdvec(&(0_u64, 99_u32, "and what else it may have")).unwrap());
    let raised = RowChange { table: model::Quorum::TABLE, key: vec![0], row };
    tables.write(&Batch { rows: vec![raised], hash: loaded.state.hash(), ..Batch::default() }).unwrap();
    tables.flush().unwrap();
    drop(tables);
    stage.cluster.restart(victim).unwrap();
    until("it does not start", async || stage.cluster.ended(victim).ok_or("it runs".to_owned())).await;
    let told = stage.cluster.printed(victim).unwrap();
    assert!(told.contains("feature level 99") && told.contains("run a newer version here"), "{told}");
    stage.strike().await;
}
