//! What a quorum promises while its members die, come back, lose their disks and hand over.

mod apart;
mod cut_short;
mod support;

use std::time::{Duration, Instant};

use model::ControllerId;
use raft::{MembershipError, OpenError, ProposeError, ReadError, Replica, Timing};
use support::{Quorum, SNAPSHOT_EVERY, eventually, tenant};

#[tokio::test(flavor = "multi_thread")]
async fn one_member_keeps_what_it_acknowledged_through_a_kill_and_a_clean_stop() {
    let mut quorum = Quorum::found().await;
    quorum.create_tenants(1, 0..50).await;
    quorum.kill(1).await;
    quorum.start(1).await;
    assert_eq!(quorum.leader().await, 1);
    assert_eq!(quorum.tenants(1), 50);
    quorum.create_tenants(1, 50..60).await;
    let shut = quorum.on(1, |replica| async move { replica.shutdown().await });
    shut.await;
    let refused = quorum.create_tenant(1, 99).await;
    assert!(matches!(refused, Err(ProposeError::Stopped)), "{refused:?}");
    quorum.kill(1).await;
    let (state, applied, _) = storage::dump::state(&quorum.data(1)).unwrap();
    assert_eq!(state.tenants().len(), 60, "a clean stop leaves everything in the tables (applied {applied:?})");
    let entries = storage::dump::LogDump::open(&quorum.data(1)).unwrap().slots(0).filter(Result::is_ok).count();
    assert!(entries >= 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_go_on_after_the_leader_was_killed_and_it_catches_up() {
    let mut quorum = Quorum::of_three().await;
    let old = quorum.leader().await;
    quorum.create_tenants(old, 0..20).await;
    quorum.kill(old).await;
    let survivor = quorum.ids()[0];
    let began = Instant::now();
    quorum.create_tenant(survivor, 20).await.unwrap();
    println!("first write {:?} after the kill", began.elapsed());
    for id in quorum.ids() {
        quorum.create_tenants(id, 21 + id * 10..31 + id * 10).await;
    }
    quorum.start(old).await;
    quorum.equal().await;
    assert_eq!(quorum.tenants(old), 41);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_process_ended_is_succeeded_before_its_lease_is_over() {
    // By the timers alone an election would begin after this, and not before.
    const LEASE: Duration = Duration::from_secs(20);
    let election_min_millis = u64::try_from(LEASE.as_millis()).unwrap();
    let timing =
        Timing { heartbeat_millis: 150, election_min_millis, election_max_millis: election_min_millis + 5_000 };
    let mut quorum = Quorum::of_three_with(timing).await;
    // On a busy machine the two that are left may take each other's vote; then the timers decide.
    for round in 0..10 {
        let old = quorum.leader().await;
        quorum.create_tenants(old, 40 * round..40 * round + 20).await;
        let killed = Instant::now();
        quorum.kill(old).await;
        let new = quorum.leader().await;
        let early = killed.elapsed() < LEASE / 2;
        quorum.create_tenants(new, 40 * round + 20..40 * (round + 1)).await;
        quorum.start(old).await;
        quorum.equal().await;
        assert_eq!(quorum.tenants(old) as u64, 40 * (round + 1));
        if early {
            return;
        }
    }
    panic!("no leader was succeeded before its lease was over");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_repeated_on_another_member_happens_once() {
    let quorum = Quorum::of_three().await;
    let mut replies = Vec::new();
    for id in quorum.ids() {
        replies.push(quorum.create_tenant(id, 1).await.unwrap());
    }
    assert!(replies.iter().all(|r| r.applied == replies[0].applied), "{replies:?}");
    assert!(replies[0].index < replies[1].index, "each is an entry of its own");
    quorum.equal().await;
    assert_eq!(quorum.tenants(2), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_linearizable_read_on_a_follower_sees_what_was_acknowledged_before_it() {
    let quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    let follower = quorum.ids().into_iter().find(|id| *id != leader).unwrap();
    for number in 0..50 {
        let written = quorum.create_tenant(leader, number).await.unwrap();
        let index = quorum.on(follower, |replica| async move { replica.linearize().await }).await.unwrap();
        assert!(index >= written.index, "{index} < {}", written.index);
        let seen = quorum.tenants(follower) as u64;
        assert_eq!(seen, number + 1);
    }
    let age = quorum.replica(follower).stale_age().unwrap();
    assert!(age < support::SOON, "{age:?}");
}

/// What a leader's heartbeats go on is kept, and a follower that was started again knows nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_was_started_again_confirms_reads() {
    let mut quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    let followers: Vec<u64> = quorum.ids().into_iter().filter(|id| *id != leader).collect();
    for (again, away) in [(followers[0], followers[1]), (followers[1], followers[0])] {
        quorum.on(leader, |replica| async move { replica.linearize().await }).await.unwrap();
        quorum.kill(again).await;
        quorum.start(again).await;
        quorum.on(leader, |replica| async move { replica.linearize().await }).await.unwrap();
        quorum.kill(away).await;
        for _ in 0..20 {
            let read = quorum.on(leader, |replica| async move { replica.linearize().await }).await;
            assert!(read.is_ok(), "only {again} can confirm it: {read:?}");
        }
        quorum.start(away).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_majority_nothing_is_promised() {
    let mut quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    quorum.create_tenants(leader, 0..5).await;
    for id in quorum.ids() {
        if id != leader {
            quorum.kill(id).await;
        }
    }
    let write = quorum.create_tenant(leader, 100).await;
    assert!(matches!(write, Err(ProposeError::NoQuorum | ProposeError::Unknown)), "{write:?}");
    let read = quorum.on(leader, |replica| async move { replica.linearize().await }).await;
    assert_eq!(read, Err(ReadError::NoQuorum));
    assert_eq!(quorum.tenants(leader), 5, "a stale read still answers");
    let removal = quorum.on(leader, move |replica| async move {
        let other = replica.members().into_keys().find(|id| *id != replica.id()).unwrap();
        replica.remove(other).await
    });
    let removal = removal.await;
    assert!(matches!(removal, Err(MembershipError::Refused(_) | MembershipError::NoQuorum)), "{removal:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lost_its_disk_returns_under_a_new_id_by_snapshot() {
    let mut quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    let lost = quorum.ids().into_iter().find(|id| *id != leader).unwrap();
    quorum.kill(lost).await;
    quorum.wipe(lost);
    // Enough that the entries that the new member would need are purged.
    for round in 0..8 {
        quorum.create_tenants(leader, round * SNAPSHOT_EVERY..(round + 1) * SNAPSHOT_EVERY).await;
    }
    eventually("the log was purged", || {
        let index = quorum.replica(leader).status().snapshot;
        index > 2 * SNAPSHOT_EVERY
    })
    .await;
    let removed = quorum.on(leader, move |replica| async move { replica.remove(ControllerId(lost)).await });
    removed.await.unwrap();
    quorum.join(4).await;
    quorum.equal().await;
    assert_eq!(quorum.tenants(4) as u64, 8 * SNAPSHOT_EVERY);
    let snapshots = std::fs::read_dir(quorum.data(4).join("snapshots")).unwrap().count();
    assert_eq!(snapshots, 1, "it came by snapshot");
    quorum.kill(4).await;
    quorum.start(4).await;
    quorum.create_tenants(leader, 10_000..10_010).await;
    quorum.equal().await;
    assert_eq!(quorum.tenants(4) as u64, 8 * SNAPSHOT_EVERY + 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_is_handed_over_on_demand_and_when_the_leader_stops() {
    let mut quorum = Quorum::of_three().await;
    let first = quorum.leader().await;
    let asked = quorum.ids().into_iter().find(|id| *id != first).unwrap();
    // Asked of the follower that is to lead.
    quorum.on(asked, move |replica| async move { replica.transfer(ControllerId(asked)).await }).await.unwrap();
    eventually("the follower leads", || quorum.replica(asked).is_leader()).await;
    let began = Instant::now();
    quorum.create_tenants(first, 0..10).await;
    println!("10 writes {:?} after a transfer", began.elapsed());

    let began = Instant::now();
    quorum.on(asked, |replica| async move { replica.shutdown().await }).await;
    println!("shutdown took {:?}", began.elapsed());
    quorum.kill(asked).await;
    let leader = quorum.leader().await;
    quorum.create_tenants(leader, 10..20).await;
    println!("10 writes {:?} after the leader began to stop", began.elapsed());
    quorum.start(asked).await;
    quorum.equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_planner_of_an_earlier_term_proposes_nothing() {
    let quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    let term = quorum.replica(leader).leadership().term;
    let command = tenant(1).command;
    let again = command.clone();
    quorum.on(leader, move |replica| async move { replica.propose_as_leader(term, command).await }).await.unwrap();
    let other = quorum.ids().into_iter().find(|id| *id != leader).unwrap();
    for (id, term) in [(leader, term - 1), (other, term)] {
        let command = again.clone();
        let late = quorum.on(id, move |replica| async move { replica.propose_as_leader(term, command).await }).await;
        assert_eq!(late, Err(ProposeError::NotLeader));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_removed_hands_over_first() {
    let mut quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    quorum.create_tenants(leader, 0..5).await;
    quorum.on(leader, move |replica| async move { replica.remove(ControllerId(leader)).await }).await.unwrap();
    quorum.kill(leader).await;
    let successor = quorum.leader().await;
    assert!(!quorum.replica(successor).members().contains_key(&ControllerId(leader)));
    quorum.create_tenants(successor, 5..10).await;
    quorum.equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_proposals_at_once_share_syncs_and_calls() {
    let quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    let follower = quorum.ids().into_iter().find(|id| *id != leader).unwrap();
    for (name, id, first) in [("leader", leader, 0), ("follower", follower, 10_000)] {
        let began = Instant::now();
        quorum.create_tenants(id, first..first + 2000).await;
        let seconds = began.elapsed().as_secs_f64();
        println!("2000 proposals at once on the {name}: {seconds:.2} s, {:.0}/s", 2000.0 / seconds);
    }
    let reads = quorum.on(follower, |replica| async move {
        let began = Instant::now();
        let all = futures::future::join_all((0..1000).map(|_| replica.linearize())).await;
        assert!(all.iter().all(Result::is_ok));
        began.elapsed()
    });
    println!("1000 linearizable reads at once on the follower: {:?}", reads.await);
    let limit = Duration::from_secs(60);
    assert!(tokio::time::timeout(limit, quorum.equal()).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_which_a_part_is_lost_or_of_somebody_else_is_refused() {
    let mut quorum = Quorum::found().await;
    quorum.create_tenants(1, 0..3 * SNAPSHOT_EVERY).await;
    eventually("the log was purged", || quorum.replica(1).status().snapshot > SNAPSHOT_EVERY).await;
    quorum.on(1, |replica| async move { replica.shutdown().await }).await;
    quorum.kill(1).await;
    let data = quorum.data(1);

    let other = quorum.identity("controller-2");
    let opened = Replica::open(quorum.config(1, &other)).await.map(|_| ());
    assert!(matches!(opened, Err(OpenError::Identity { .. })), "{opened:?}");

    let own = quorum.identity("controller-1");
    std::fs::rename(data.join("raft-log"), data.join("aside")).unwrap();
    let opened = Replica::open(quorum.config(1, &own)).await.map(|_| ());
    assert!(matches!(opened, Err(OpenError::Storage(_))), "{opened:?}");

    std::fs::remove_dir_all(data.join("raft-log")).unwrap();
    std::fs::rename(data.join("aside"), data.join("raft-log")).unwrap();
    std::fs::remove_file(data.join("CURRENT")).unwrap();
    let opened = Replica::open(quorum.config(1, &own)).await.map(|_| ());
    assert!(matches!(opened, Err(OpenError::Storage(_))), "{opened:?}");

    std::fs::remove_dir_all(data.join("snapshots")).unwrap();
    std::fs::remove_dir_all(data.join("state-1")).unwrap();
    let opened = Replica::open(quorum.config(1, &own)).await.map(|_| ());
    assert!(matches!(opened, Err(OpenError::Storage(_))), "{opened:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_controllers_are_listened_to() {
    let quorum = Quorum::found().await;
    let address = quorum.address(1);
    let stranger = quorum.identity("node-1");
    let channel = api::tls::connect(&address, api::tls::client_tls(&stranger)).unwrap();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/trefoil.raft.v1.Peer/Call");
    // Longer than any message may be: who it is from is asked before it is taken in.
    let codec = tonic_prost::ProstCodec::<bytes::Bytes, ()>::default();
    let message = tonic::Request::new(bytes::Bytes::from(vec![0; 40 << 20]));
    let refused = client.unary(message, path, codec).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{refused:?}");
}
