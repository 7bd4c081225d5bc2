//! Between an agent that only sends and a controller that answers everything with the same bytes.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::verdict::skipped;

const PORT: u16 = 7470;
/// For something that takes a millisecond.
const PATIENCE: Duration = Duration::from_secs(20);

async fn wait(what: &str, so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_is_sent_is_lost_doubled_late_and_played_again() {
    if let Some(obstacle) = Switch::turn_obstacle() {
        return skipped("what_is_sent_is_lost_doubled_late_and_played_again", &obstacle);
    }
    let switch = Switch::new(2).unwrap();
    let heard = Arc::new(AtomicUsize::new(0));
    let controller = UdpSocket::from_std(switch.socket(0, PORT).unwrap()).unwrap();
    let counted = heard.clone();
    tokio::spawn(async move {
        let mut buffer = [0; BUFFER_BYTES];
        while let Ok((length, from)) = controller.recv_from(&mut buffer).await {
            counted.fetch_add(1, Ordering::Relaxed);
            controller.send_to(&buffer[..length], from).await.unwrap();
        }
    });
    let agent = UdpSocket::from_std(switch.socket(1, 0).unwrap()).unwrap();
    let send = async |times: usize| {
        for _ in 0..times {
            agent.send_to(b"beat", (switch.ip(0), PORT)).await.unwrap();
        }
    };
    let relay = Relay::start(&switch, &[0], &[1], PORT).unwrap();
    let host: IpAddr = switch.ip(1).parse().unwrap();
    let (heard, mut buffer) = (|| heard.load(Ordering::Relaxed), [0; BUFFER_BYTES]);

    relay.replay(host, &mut Chance::new(1)).await;
    assert_eq!(relay.counts(), Counts::default(), "there is nothing yet to be played again");
    send(1).await;
    let (length, from) = tokio::time::timeout(PATIENCE, agent.recv_from(&mut buffer)).await.unwrap().unwrap();
    assert_eq!((&buffer[..length], from.port()), (&b"beat"[..], PORT), "it cannot be told from the controller");
    wait("a beat and its answer passed", || relay.counts().passed == 2).await;

    relay.treat(host, Way::OneOf(4), Way::Open);
    let before = relay.counts();
    send(40).await;
    wait("all were counted", || relay.counts().since(before) == Counts { passed: 20, lost: 30, ..Counts::default() })
        .await;
    assert_eq!(heard(), 11);

    relay.treat(host, Way::Twice(Duration::from_millis(20)), Way::Shut);
    let before = relay.counts();
    send(1).await;
    wait("it came twice", || heard() == 13).await;
    wait("two answers were lost", || {
        relay.counts().since(before) == Counts { doubled: 1, lost: 2, ..Counts::default() }
    })
    .await;

    relay.treat(host, Way::Late(Duration::from_millis(200)), Way::Open);
    let sent = Instant::now();
    send(1).await;
    wait("it came late", || heard() == 14).await;
    assert!(sent.elapsed() >= Duration::from_millis(200));

    relay.treat(host, Way::Shut, Way::Shut);
    let before = relay.counts();
    send(5).await;
    wait("they were lost", || relay.counts().since(before).lost >= 5).await;
    relay.replay(host, &mut Chance::new(1)).await;
    wait("one of earlier came", || heard() == 15).await;
    let Counts { beats_replayed, answers_replayed, .. } = relay.counts().since(before);
    assert_eq!((beats_replayed, answers_replayed), (1, 1));
}

#[tokio::test]
async fn silence_is_counted_until_an_answer_is_given() {
    if let Some(obstacle) = Switch::turn_obstacle() {
        return skipped("silence_is_counted_until_an_answer_is_given", &obstacle);
    }
    let switch = Switch::new(2).unwrap();
    let relay = Relay::start(&switch, &[0], &[1], PORT).unwrap();
    let quiet = Duration::from_millis(30);
    wait("nobody answers", || relay.longest_silence() > quiet).await;
    relay.forget_silence();
    let fresh = relay.lanes[0].state().longest;
    assert_eq!(fresh, Duration::ZERO);
}
