//! Datagrams at a real controller's port: recorded, cut, changed, none of them is answered or believed twice; and what they
//! tell a leader of its own clock.

use std::{net::UdpSocket, time::Duration};

use api::{
    beat::{self, Beat, BeatKey},
    proto::{Consistency, ListRequest},
};
use jepsen::{cluster::shim::Shim, verdict::skipped};
use tests::stage::{Stage, until};

/// Never heard by the controller that answers.
const NEVER: u64 = u64::MAX;
const NAME: &str = "quiet";

/// Speaks for a host that has joined and does not run, with its own key.
struct Voice {
    socket: UdpSocket,
    key: BeatKey,
    /// The last beat; the next has a higher number.
    beat: Beat,
}

impl Voice {
    fn of(stage: &Stage) -> Self {
        let text = std::fs::read(stage.folder().join(NAME).join("member.json")).unwrap();
        let member: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let key: [u8; 32] = serde_json::from_value(member["beat_key"].clone()).unwrap();
        let node = serde_json::from_value(member["node"].clone()).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let beat =
            Beat { node, incarnation: 0, seq: 0, boottime_nanos: 1, nonce: 0, unanswered_millis: 0, status: None };
        Self { socket, key: BeatKey(key), beat }
    }

    fn next(&mut self, nonce: u64) -> Vec<u8> {
        (self.beat.seq, self.beat.nonce) = (self.beat.seq + 1, nonce);
        beat::encode(&self.beat, &self.key).unwrap()
    }

    /// Sends it; the number and the nonce of the answer, if one comes in time.
    fn ask(&self, address: &str, datagram: &[u8]) -> Option<(u64, u64)> {
        self.socket.send_to(datagram, address).unwrap();
        let mut buffer = [0; 2048];
        let (length, _) = self.socket.recv_from(&mut buffer).ok()?;
        let ack = beat::decode_ack(&buffer[..length], &self.key).expect("an answer is an authentic ack");
        Some((ack.seq, ack.nonce))
    }

    /// The nonce of the controller's process, as it tells whoever has the key.
    async fn learn(&mut self, address: &str) -> u64 {
        until("a controller tells its nonce", async || {
            let hello = self.next(0);
            self.ask(address, &hello).map(|(_, nonce)| nonce).ok_or_else(|| "no answer".to_owned())
        })
        .await
    }
}

/// How long ago this controller heard the host.
async fn age(stage: &Stage, controller: usize, host: &str) -> u64 {
    let list = ListRequest { limit: 10, consistency: Some(Consistency { stale: true }), ..Default::default() };
    let request = stage.client.request(None, list, Duration::from_secs(10));
    let nodes = stage.client.stub(controller).list_nodes(request).await.expect("a list").into_inner().nodes;
    nodes.iter().find(|node| node.name == host).expect("the host has joined").last_beat_age_millis
}

/// The datagram in every way in which it is not the one that was sent.
fn spoilt(good: &[u8]) -> Vec<Vec<u8>> {
    let cut = (0..good.len()).map(|length| good[..length].to_vec());
    let changed = (0..good.len()).map(|at| {
        let mut bad = good.to_vec();
        bad[at] ^= 1;
        bad
    });
    let longer = [[good, &[0]].concat(), [good, good].concat(), vec![0; 2000], vec![b'T'; 1200]];
    cut.chain(changed).chain(longer).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_cut_or_changed_beat_is_neither_answered_nor_believed() {
    let mut stage = Stage::set(1).await;
    let token = stage.cluster.join_token("agent").await.unwrap();
    let joined = stage.join_host(NAME, &token);
    assert!(joined.status.success(), "{}", String::from_utf8_lossy(&joined.stderr));
    let mut voice = Voice::of(&stage);
    let address: Vec<String> = (0..3).map(|controller| stage.cluster.address(controller).to_owned()).collect();

    // Without the nonce of the process it is answered, so that the host learns it, and believed in nothing.
    let nonce = voice.learn(&address[0]).await;
    assert_eq!(age(&stage, 0, NAME).await, NEVER);
    let good = voice.next(nonce);
    assert_eq!(voice.ask(&address[0], &good), Some((voice.beat.seq, nonce)));
    assert_ne!(age(&stage, 0, NAME).await, NEVER, "a fresh one is believed");

    // Answers come in order, so the first one after these shows that none of them had one.
    for _ in 0..3 {
        voice.socket.send_to(&good, &address[0]).unwrap();
    }
    for bad in spoilt(&good) {
        voice.socket.send_to(&bad, &address[0]).unwrap();
    }
    let next = voice.next(nonce);
    assert_eq!(voice.ask(&address[0], &next), Some((voice.beat.seq, nonce)), "only the next fresh one is answered");

    // At another controller, and at this one after a restart, what was recorded proves nothing.
    voice.learn(&address[1]).await;
    assert!(voice.ask(&address[1], &good).is_some_and(|(_, other)| other != nonce));
    assert_eq!(age(&stage, 1, NAME).await, NEVER);
    assert!(stage.cluster.kill(0).unwrap());
    stage.cluster.restart(0).unwrap();
    stage.settled().await;
    assert_ne!(voice.learn(&address[0]).await, nonce, "each process draws its own");
    assert!(voice.ask(&address[0], &good).is_some());
    assert_eq!(age(&stage, 0, NAME).await, NEVER);

    // The host that runs was heard by every controller all the while.
    until("the running host is heard everywhere", async || {
        for controller in 0..3 {
            let age = age(&stage, controller, "host-1").await;
            if age > 3000 {
                return Err(format!("controller {controller} heard it {age} ms ago"));
            }
        }
        Ok(())
    })
    .await;
    stage.strike().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_own_clock_drifts_hands_over_and_blames_no_host() {
    let mut stage = Stage::set(3).await;
    if let Some(obstacle) = Shim::obstacle() {
        return skipped("clocks: a leader's that drifts", &obstacle);
    }
    stage.cluster.preload().await.expect("the controllers come back with a shim");
    stage.settled().await;
    let leader = stage.cluster.leader().await.expect("a leader");
    // Half of what the margin of a lease covers; some twenty seconds show it.
    stage.cluster.shim(leader).expect("a shim").begin_skew(0, 50_000).unwrap();
    let alert = "alert: this machine's clock drifts";
    until("the leader finds that its clock drifts", async || {
        let printed = stage.cluster.printed(leader).unwrap();
        if printed.contains(alert) { Ok(()) } else { Err("it says nothing of the kind".to_owned()) }
    })
    .await;
    until("another one leads", async || match stage.cluster.leader().await {
        Some(next) if next != leader => Ok(()),
        other => Err(format!("{other:?} leads")),
    })
    .await;
    let recovery = stage.trefoil_ok(&["recovery", "status"]);
    assert_eq!(recovery["drifting"], serde_json::json!([]), "{recovery}");
    stage.strike().await;
}
