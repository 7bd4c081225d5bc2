//! What was begun and not ended: a change of members whose maker is gone, entries for a member that is down.

use std::{
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use model::ControllerId;
use raft::{Replica, Role};

use crate::support::Quorum;

/// Asks for the promotion and is gone as soon as its first entry is in the log.
async fn promote_half(replica: &Replica, id: ControllerId) {
    let half = async {
        while replica.membership_is_settled() {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        () = half => {}
        done = replica.promote(id) => panic!("it was made whole before it could be cut short: {done:?}"),
    }
}

/// A quorum of one with a learner whose promotion was cut short.
async fn half_promoted() -> Quorum {
    let mut quorum = Quorum::found().await;
    quorum.start(2).await;
    let address = quorum.address(2);
    let cut_short = quorum.on(1, move |replica| async move {
        replica.add_learner(ControllerId(2), &address).await.unwrap();
        promote_half(&replica, ControllerId(2)).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!replica.membership_is_settled(), "nobody finishes it by himself");
        let roles: Vec<_> = replica.status().members.into_iter().map(|member| (member.id.0, member.role)).collect();
        assert_eq!(roles, [(1, Role::Leader), (2, Role::Learner)], "its vote replaces nobody's yet");
    });
    cut_short.await;
    quorum
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_that_was_left_half_made_is_finished_when_it_is_asked_for_again() {
    let quorum = half_promoted().await;
    let again = quorum.on(1, |replica| async move {
        replica.promote(ControllerId(2)).await.unwrap();
        assert!(replica.membership_is_settled());
    });
    again.await;
    quorum.create_tenants(1, 0..5).await;
    quorum.equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_finishes_a_change_of_members_that_another_left_half_made() {
    let quorum = half_promoted().await;
    let settled = quorum.on(1, |replica| async move {
        replica.settle_membership().await.unwrap();
        assert!(replica.membership_is_settled());
        replica.settle_membership().await.unwrap();
    });
    settled.await;
    quorum.create_tenants(1, 0..5).await;
    quorum.equal().await;
}

/// Counts who comes to the address of a member that is down.
struct Doorkeeper {
    visits: Arc<AtomicUsize>,
    leave: Arc<AtomicBool>,
    at_the_door: std::thread::JoinHandle<()>,
}

impl Doorkeeper {
    fn at(address: &str) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let (visits, leave) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (counted, until) = (visits.clone(), leave.clone());
        let at_the_door = std::thread::spawn(move || {
            while !until.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok(_) => drop(counted.fetch_add(1, Ordering::SeqCst)),
                    Err(_) => std::thread::sleep(Duration::from_micros(100)),
                }
            }
        });
        Self { visits, leave, at_the_door }
    }

    fn leave(self) -> usize {
        self.leave.store(true, Ordering::SeqCst);
        self.at_the_door.join().unwrap();
        self.visits.load(Ordering::SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_down_is_tried_a_few_times_a_second_and_not_without_a_pause() {
    const WATCHED: Duration = Duration::from_secs(3);
    /// Of entries, heartbeats and questions together; without a pause there would be thousands.
    const MOST: usize = 300;
    let mut quorum = Quorum::of_three().await;
    let leader = quorum.leader().await;
    let down = quorum.ids().into_iter().find(|id| *id != leader).unwrap();
    quorum.kill(down).await;
    let keeper = Doorkeeper::at(&quorum.address(down));
    quorum.create_tenants(leader, 0..20).await;
    tokio::time::sleep(WATCHED).await;
    let visits = keeper.leave();
    assert!((1..MOST).contains(&visits), "{visits} connections in {WATCHED:?}");
    quorum.start(down).await;
    quorum.equal().await;
    assert_eq!(quorum.tenants(down), 20);
}
