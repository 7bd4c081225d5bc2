//! The heartbeats of all hosts at one controller.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use api::beat::{self, Beat, MAX_DATAGRAM_BYTES, StatusPart};
use model::telemetry::NodeStatus;
use nix::time::{ClockId, clock_gettime};

use super::host::Host;

/// Beats are sent in bursts this far apart; on a real network they come evenly, which costs more wake-ups.
const BURST: Duration = Duration::from_millis(2);
/// One beat in so many tells the host's status.
const STATUS_EVERY: u64 = 10;

/// One host in so many looks closely at its answers.
const ASKED: usize = 50;

/// What the thread that beats at one controller is told, and tells.
#[derive(Default)]
pub struct Ear {
    pub controller: usize,
    pub per_second: AtomicU64,
    pub answered: AtomicU64,
    pub stop: AtomicBool,
}

/// Beats of all hosts in turn at one controller, and its answers, until told to stop.
pub fn beat_at(target: SocketAddr, hosts: &[Arc<Host>], ear: &Ear, leader: &AtomicUsize) -> std::io::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(target)?;
    socket.set_nonblocking(true)?;
    let mut answer = [0; MAX_DATAGRAM_BYTES];
    let (mut turn, mut nonce, mut owed, mut last) = (0_u64, 0, 0.0, Instant::now());
    while !ear.stop.load(Relaxed) {
        let now = Instant::now();
        owed += now.duration_since(last).as_secs_f64() * ear.per_second.load(Relaxed) as f64;
        last = now;
        while owed >= 1.0 {
            owed -= 1.0;
            let host = &hosts[turn as usize % hosts.len()];
            let datagram = next_beat(host, turn / hosts.len() as u64 + 1, nonce);
            turn += 1;
            // A full socket loses datagrams, as a network does.
            let _ = socket.send(&datagram);
        }
        while let Ok(length) = socket.recv(&mut answer) {
            ear.answered.fetch_add(1, Relaxed);
            // A controller that was started anew has another nonce, and believes nobody who does not know it.
            if let Some((_, node)) = beat::decode_header(&answer[..length])
                && let Ok(place) = hosts.binary_search_by_key(&node, |host| host.node)
                && (nonce == 0 || place % ASKED == 0)
                && let Ok(ack) = beat::decode_ack(&answer[..length], &hosts[place].key)
            {
                nonce = ack.nonce;
                if ack.leader {
                    leader.store(ear.controller, Relaxed);
                }
            }
        }
        std::thread::sleep(BURST);
    }
    Ok(())
}

fn next_beat(host: &Host, seq: u64, nonce: u64) -> Vec<u8> {
    let idle = NodeStatus {
        cpu_permille: 50,
        memory_used_bytes: 1 << 30,
        memory_total_bytes: 64 << 30,
        disk_used_bytes: 1 << 30,
        disk_total_bytes: 1 << 40,
        watchdog: false,
    };
    let status = (seq % STATUS_EVERY == 1 || seq < STATUS_EVERY).then(|| StatusPart {
        node: idle,
        part: 0,
        parts: 1,
        vms: Vec::new(),
    });
    let boottime = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    let message = Beat {
        node: host.node,
        incarnation: host.incarnation.load(Relaxed),
        seq,
        boottime_nanos: u64::try_from(boottime.as_nanos()).unwrap_or(u64::MAX),
        nonce,
        unanswered_millis: 0,
        status,
    };
    beat::encode(&message, &host.key).expect("a beat with one short status fits")
}
