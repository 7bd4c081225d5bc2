//! Networks of machines that are here, and of those that come.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_was_broken_by_hand_is_mended() {
    let world = World::new();
    world.wish(1, vec![vm(7, Power::Running)]);
    world.until_reported(7, Phase::Running).await;
    world.network.delete_bridge(100);
    let wanted = [network()];
    let begun = Instant::now();
    while !world.network.found(&wanted).await.unwrap()[0].complete {
        assert!(begun.elapsed() < DEADLINE, "waited in vain for: the bridge is back");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_network_of_which_more_is_wished_is_not_whole_before_it_was_seen_again() {
    let mut world = World::new();
    world.kill_agent().await;
    let (mut executor, _outbox) = world.executor();
    executor.obey(assignment(1, vec![vm(7, Power::Running)])).unwrap();
    executor.networks = [(100, true)].into();
    executor.obey(assignment(2, vec![vm(7, Power::Stopped)])).unwrap();
    assert_eq!(executor.networks, [(100, true)].into(), "nothing else is wished of it");
    let mut wider = (*assignment(3, vec![vm(7, Power::Running)])).clone();
    wider.networks[0].peers.push(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 7)));
    let narrower = executor.assignment.clone().unwrap();
    executor.obey(Arc::new(wider)).unwrap();
    assert_eq!(executor.networks, [(100, false)].into());
    // A look that began before does not speak of it either.
    let mut seen = [(100, true)].into();
    executor.doubt_networks(&narrower.networks, &mut seen);
    assert_eq!(seen, [(100, false)].into());
}

#[tokio::test]
async fn a_network_is_made_for_a_guest_before_it_comes() {
    let mut world = World::new();
    world.kill_agent().await;
    let (mut executor, _outbox) = world.executor();
    let there = |power| VmWish { vm: VmId(2), name: "db".into(), ..vm(8, power) };
    let obeyed = |executor: &Executor| executor.assignment.as_ref().unwrap().networks.clone();
    let lease =
        |hostname: &str| model::assignment::Lease { mac: MAC, ip: [10, 0, 0, 2].into(), hostname: hostname.into() };
    // As the quorum says it: the address is of the host that the guest comes from.
    let mut coming = (*assignment(1, vec![vm(7, Power::Running), there(Power::Arriving)])).clone();
    coming.networks[0].leases = vec![lease("web")];
    executor.obey(Arc::new(coming.clone())).unwrap();
    assert_eq!(obeyed(&executor)[0].leases, [lease("web"), lease("db")]);
    executor.networks = [(100, true)].into();
    let mut over = (*assignment(2, vec![vm(7, Power::Running), there(Power::Running)])).clone();
    over.networks[0].leases = vec![lease("web"), lease("db")];
    executor.obey(Arc::new(over)).unwrap();
    assert_eq!(executor.networks, [(100, true)].into(), "nothing is left to be made when it is handed over");
    coming.generation = 3;
    coming.vms[1].power = Power::Absent;
    executor.obey(Arc::new(coming)).unwrap();
    assert_eq!(obeyed(&executor)[0].leases, [lease("web")]);
}
