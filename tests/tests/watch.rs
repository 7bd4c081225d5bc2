//! A watch tells every change once, in order, across the death of controllers, and nobody more than they may see.

use std::collections::BTreeSet;

use api::{
    client::{Client, new_request_id},
    proto::{CreateUserRequest, NamedRef, WatchEvent},
};
use tests::stage::{PATIENCE, Stage, Stub, TENANT};

/// What a watch tells up to and with an index, and where it stands then.
async fn told(client: &Client, after: u64, upto: u64) -> (Vec<WatchEvent>, u64) {
    let mut events = Vec::new();
    let mut place = after;
    let follow = async {
        while place < upto {
            let mut watch = client.watch("", Some(place)).await.expect("a controller that lives answers");
            while place < upto {
                // One that has died is left for another, from where it was.
                let Ok(reply) = watch.next().await else { break };
                assert!(reply.events.iter().all(|e| e.revision > place && e.revision <= reply.revision));
                events.extend(reply.events);
                place = reply.revision;
            }
        }
    };
    tokio::time::timeout(PATIENCE, follow).await.expect("everything is told in time");
    (events, place)
}

fn tags(events: &[WatchEvent]) -> Vec<(u64, String, bool)> {
    let tags = events.iter().filter(|event| event.kind == "tag");
    tags.map(|event| (event.revision, event.id.clone(), event.present)).collect()
}

async fn member(stage: &Stage, name: &str, tenant: &str) -> Client {
    let body = CreateUserRequest { name: name.into(), role: "member".into(), tenant: tenant.into() };
    let call = |mut stub: Stub, request| async move { stub.create_user(request).await };
    let token = stage.client.mutate(new_request_id(), body, call).await.unwrap().token;
    Client::new(&stage.cluster.endpoints(), &stage.cluster.access().ca_pem, &token).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_told_once_also_across_a_dead_leader() {
    let mut stage = Stage::set(0).await;
    let start = stage.set_tag("start", "1").await.unwrap();
    let mut expected = Vec::new();
    for number in 0..5 {
        let key = format!("before-{number}");
        expected.push((stage.set_tag(&key, "1").await.unwrap(), key, true));
    }
    let middle = expected[4].0;
    let leader = stage.cluster.leader().await.expect("a leader");
    let (first, place) = told(&stage.client, start, middle).await;
    assert_eq!(tags(&first), expected);
    stage.cluster.kill(leader).unwrap();
    for number in 0..5 {
        let key = format!("after-{number}");
        expected.push((stage.set_tag(&key, "1").await.unwrap(), key, true));
    }
    let end = expected[9].0;
    let (rest, _) = told(&stage.client, place, end).await;
    assert_eq!(tags(&[first, rest].concat()), expected, "nothing twice, nothing missing");

    // The other one that lives tells the same of the same indexes.
    let living: Vec<usize> = (0..3).filter(|c| *c != leader).collect();
    let mut seen = BTreeSet::new();
    for controller in living {
        let access = stage.cluster.access();
        let one = Client::new(&[stage.cluster.endpoint(controller)], &access.ca_pem, &access.token).unwrap();
        let (events, _) = told(&one, start, end).await;
        seen.insert(format!("{:?}", tags(&events)));
    }
    assert_eq!(seen, BTreeSet::from([format!("{expected:?}")]));

    // What a controller that was started again does not remember it does not pretend to know.
    stage.cluster.restart(leader).unwrap();
    stage.settled().await;
    let access = stage.cluster.access();
    let one = Client::new(&[stage.cluster.endpoint(leader)], &access.ca_pem, &access.token).unwrap();
    assert_eq!(one.watch("", Some(0)).await.err().expect("it is refused").code, "compacted");
    assert_eq!(one.watch("", Some(u64::MAX)).await.err().expect("it is refused").code, "invalid-argument");
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_hears_of_the_own_tenant_as_long_as_the_token_lives() {
    let stage = Stage::set(0).await;
    stage.cluster.create_tenant("other").await.unwrap();
    let (ann, bob) = (member(&stage, "ann", TENANT).await, member(&stage, "bob", "other").await);
    let start = stage.set_tag("start", "1").await.unwrap();
    let network = stage.create_network("blue", "10.0.0.0/24").await.unwrap();
    stage.trefoil_ok(&["network", "delete", "blue"]);
    let end = stage.set_tag("end", "1").await.unwrap();
    let networks = |events: &[WatchEvent]| -> Vec<(String, bool)> {
        let networks = events.iter().filter(|event| event.kind == "network");
        networks.map(|event| (event.id.clone(), event.present)).collect()
    };
    let (own, _) = told(&ann, start, end).await;
    assert_eq!(networks(&own), [(network.id.clone(), true), (network.id, false)], "also of what is gone");
    assert_eq!(tags(&own), [(end, "end".to_owned(), true)]);
    let (foreign, _) = told(&bob, start, end).await;
    assert_eq!(foreign, [], "nothing of another tenant");
    assert_eq!(bob.watch(TENANT, None).await.err().expect("it is refused").code, "not-found");

    let mut watch = ann.watch("", None).await.unwrap();
    watch.next().await.unwrap();
    let gone = NamedRef { name: "ann".into(), ..Default::default() };
    let call = |mut stub: Stub, request| async move { stub.delete_user(request).await };
    stage.client.mutate(new_request_id(), gone, call).await.unwrap();
    let ended = async {
        loop {
            if let Err(error) = watch.next().await {
                return error;
            }
        }
    };
    let error = tokio::time::timeout(PATIENCE, ended).await.expect("the watch of a deleted user ends");
    assert_eq!(error.code, "unauthenticated");
    stage.strike().await;
}
