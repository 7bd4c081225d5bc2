//! A disk that vanished under a machine that has run.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_whose_disk_vanished_fails_and_runs_again_when_the_disk_is_brought_back() {
    let mut world = World::new();
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    world.kill_agent().await;
    world.hypervisor.inner.power_off(VmId(1)).unwrap();
    let (folder, aside) = (world.dir.path().join("vms/vm-1"), world.dir.path().join("aside"));
    std::fs::rename(&folder, &aside).unwrap();
    world.start_agent();
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Failed).await;
    let last = world.last().unwrap();
    assert!(last.reason.starts_with("check disk vm-1: its disk is gone: "), "{}", last.reason);
    assert!(!last.retry, "trying again brings no disk back");
    assert!(!folder.exists(), "no blank disk was made in its place");
    assert_eq!(world.hypervisor.starts.load(Ordering::SeqCst), 1);

    std::fs::rename(&aside, &folder).unwrap();
    world.wish(2, vec![VmWish { attempt: 1, ..vm(7, Power::Running) }]);
    world.until_reported(7, Phase::Running).await;
}
