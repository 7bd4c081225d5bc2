//! Members that do not belong together: of different cluster epochs, or of versions that know different feature levels;
//! and a leader that is alone.

use std::time::{Duration, Instant};

use model::{Actor, Command, ControllerId, OperatorCommand, level};
use raft::{OpenError, Proposal, ProposeError, Replica};

use super::support::{Quorum, SOON, eventually, tenant};

fn operator(command: OperatorCommand) -> Proposal {
    Proposal { request: None, actor: Actor::System, command: Command::Operator(command) }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_another_epoch_are_refused_and_the_earlier_one_ends() {
    let mut quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    quorum.create_tenants(leader, 0..5).await;
    for id in quorum.ids() {
        quorum.kill(id).await;
    }
    // One goes on in a later epoch: the others, a majority of the old quorum, speak with it and hear of it.
    quorum.epochs.insert(1, 7);
    for id in [1, 2, 3] {
        quorum.start(id).await;
    }
    for id in [2, 3] {
        let fenced = quorum.replica(id).watch_fenced();
        eventually("an old member hears that it is one", || fenced.borrow().is_some()).await;
        let fenced = fenced.borrow().expect("it has heard");
        assert_eq!((fenced.by, fenced.epoch, fenced.own), (ControllerId(1), 7, 0));
    }
    assert!(quorum.replica(1).watch_fenced().borrow().is_none(), "the later one goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_level_rises_only_when_the_leader_knows_it_and_gates_what_is_proposed() {
    let mut quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    let propose = |quorum: &Quorum, command: OperatorCommand| {
        quorum.on(leader, move |replica| async move { replica.propose(operator(command)).await })
    };
    let early = propose(&quorum, OperatorCommand::EndRefounding).await;
    assert_eq!(early, Err(ProposeError::Level { needs: 2, at: level::OLDEST }), "nobody may find it in its log yet");
    let unknown = propose(&quorum, OperatorCommand::RaiseLevel { level: level::LATEST + 1 }).await;
    assert!(matches!(unknown, Err(ProposeError::Level { .. })), "{unknown:?}");

    // One of the versions before: it is told apart, and holds the level up.
    let old = quorum.ids().into_iter().find(|id| *id != leader).unwrap();
    quorum.kill(old).await;
    quorum.knows.insert(old, level::OLDEST);
    quorum.start(old).await;
    let started = Instant::now();
    let common = loop {
        let status = quorum.on(leader, |replica| async move { replica.survey().await }).await;
        match status.common_level() {
            Ok(common) => break common,
            Err(silent) => assert!(started.elapsed() < SOON, "{silent} does not answer"),
        }
    };
    assert_eq!(common, level::OLDEST, "two versions work together at the level that both know");
    quorum.create_tenants(leader, 0..5).await;
    quorum.equal().await;

    // The new version in its place, and the cloud may rise.
    quorum.kill(old).await;
    quorum.knows.remove(&old);
    quorum.start(old).await;
    let leader = quorum.leader().await;
    let raise = operator(OperatorCommand::RaiseLevel { level: level::LATEST });
    quorum.on(leader, move |replica| async move { replica.propose(raise).await }).await.unwrap().applied.unwrap();
    let now = operator(OperatorCommand::EndRefounding);
    quorum.on(leader, move |replica| async move { replica.propose(now).await }).await.unwrap().applied.unwrap();
    quorum.equal().await;

    // There is no way back for a version that does not know it.
    quorum.on(old, |replica| async move { replica.shutdown().await }).await;
    quorum.kill(old).await;
    quorum.knows.insert(old, level::OLDEST);
    let identity = quorum.identity(&ControllerId(old).to_string());
    let refused = Replica::open(quorum.config(old, &identity)).await.map(|_| ());
    let told = refused.as_ref().map_err(ToString::to_string);
    assert!(matches!(&refused, Err(OpenError::Storage(_))), "{refused:?}");
    assert!(told.unwrap_err().contains("this version of trefoil knows up to 1"), "it says why");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_alone_says_so_at_once() {
    let mut quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    quorum.create_tenants(leader, 0..5).await;
    for id in quorum.ids().into_iter().filter(|id| *id != leader) {
        quorum.kill(id).await;
    }
    // What is under way when it happens may yet come true; it holds nobody else up.
    let stuck = quorum.on(leader, |replica| async move { replica.propose(tenant(100)).await });
    let clear = || {
        let status = quorum.replica(leader).stale_age();
        status.is_none_or(|age| age > Duration::from_secs(3))
    };
    eventually("its contact with the majority is over", clear).await;
    let began = Instant::now();
    let refused = quorum.create_tenant(leader, 101).await;
    assert_eq!(refused, Err(ProposeError::NoQuorum));
    // Without the rule it would be the whole patience of a proposer, which is five seconds.
    assert!(began.elapsed() < Duration::from_secs(4), "it took {:?}", began.elapsed());
    let stuck = stuck.await;
    assert!(matches!(stuck, Err(ProposeError::Unknown | ProposeError::NoQuorum)), "{stuck:?}");
}
