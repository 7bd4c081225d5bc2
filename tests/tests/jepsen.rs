//! A short run of the Jepsen-style tests; `make jepsen` is the standing one.

use jepsen::{
    cluster::switch::Switch,
    nemesis::Family,
    run,
    verdict::{Verdict, skipped},
    workload::ALL,
};

#[tokio::test(flavor = "multi_thread")]
async fn some_faults_of_controllers_and_hosts_break_no_promise() {
    let folder = std::env::temp_dir().join(format!("tfj-{}", std::process::id()));
    let mut families = vec![Family::Host, Family::Partition, Family::Kill, Family::Pause];
    if let Some(obstacle) = Switch::obstacle() {
        skipped("jepsen: partitions and cut hosts", &obstacle);
        families.drain(..2);
    }
    let plan =
        run::Plan { seconds: 30, seed: 1, families, controllers: 3, workloads: ALL.to_vec(), folder: folder.clone() };
    let report = run::run(&plan).await.expect("the harness works");
    report.print(&folder);
    assert_eq!(report.verdict, Verdict::Pass, "kept in {}: {:?} {:?}", folder.display(), report.findings, report.gaps);
    std::fs::remove_dir_all(folder).expect("the folder can be removed");
}
