//! Short runs of the Jepsen-style tests; `make jepsen` is the standing one.

use jepsen::{
    cluster::{shim::Shim, switch::Switch},
    liveness::{self, Verified},
    nemesis::Family,
    run,
    verdict::{Verdict, skipped},
    workload::ALL,
};

#[tokio::test(flavor = "multi_thread")]
async fn some_faults_of_controllers_and_hosts_break_no_promise() {
    let mut families = vec![Family::Host, Family::Beats, Family::Partition, Family::Kill, Family::Pause];
    if let Some(obstacle) = Switch::obstacle() {
        skipped("jepsen: partitions, cut hosts and heartbeats", &obstacle);
        families.drain(..3);
    }
    passes("k", 30, families).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minute_of_wrong_clocks_failing_disks_and_new_members_breaks_no_promise() {
    if let Some(obstacle) = Shim::obstacle() {
        return skipped("jepsen: disks and clocks", &obstacle);
    }
    passes("d", 60, vec![Family::Disk, Family::Clock, Family::Membership]).await;
}

async fn passes(name: &str, seconds: u64, families: Vec<Family>) {
    let folder = std::env::temp_dir().join(format!("tfj-{}-{name}", std::process::id()));
    let plan =
        run::Plan { seconds, seed: 1, families, controllers: 3, workloads: ALL.to_vec(), folder: folder.clone() };
    let report = run::run(&plan).await.expect("the harness works");
    report.print(&folder);
    assert_eq!(report.verdict, Verdict::Pass, "kept in {}: {:?} {:?}", folder.display(), report.findings, report.gaps);
    std::fs::remove_dir_all(folder).expect("the folder can be removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_go_on_where_a_majority_hears_each_other_and_nobody_lies_elsewhere() {
    if let Some(obstacle) = Switch::obstacle() {
        return skipped("jepsen: liveness", &obstacle);
    }
    let folder = std::env::temp_dir().join(format!("tfj-{}-l", std::process::id()));
    let report = liveness::run(&liveness::Plan::new(3, true, 1, &folder)).await.expect("the harness works");
    report.print(&folder);
    let dead: Vec<_> = report.rows.iter().filter(|row| row.verified == Verified::Dead).collect();
    assert!(dead.is_empty(), "no write was done: {dead:?}");
    assert!(report.rows.iter().any(|row| row.verified == Verified::Live), "{:?}", report.rows);
    // The bound itself is the standing run's: how long an election takes on a busy machine is not asserted here.
    let lies = report.findings.iter().filter(|(name, finding)| !name.contains("go on") && finding != "holds");
    assert_eq!(lies.collect::<Vec<_>>(), Vec::<&(String, String)>::new(), "kept in {}", folder.display());
    std::fs::remove_dir_all(folder).expect("the folder can be removed");
}
