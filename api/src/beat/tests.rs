//! Heartbeats on the wire: what comes out is what went in, and nothing else is believed.

use model::{Phase, VmId, telemetry::Progress};
use proptest::prelude::*;

use super::*;

fn key(n: u8) -> BeatKey {
    BeatKey([n; 32])
}

fn beat(seq: u64, nonce: u64) -> Beat {
    Beat { node: NodeId(3), incarnation: 2, seq, boottime_nanos: 9, nonce, unanswered_millis: 0, status: None }
}

fn vm(id: u64, step: &str) -> VmStatus {
    VmStatus {
        vm: VmId(id),
        epoch: id,
        phase: Phase::Running,
        cpu_time_millis: id,
        memory_used_bytes: id,
        disk_used_bytes: id,
        rx_bytes: id,
        tx_bytes: id,
        progress: (!step.is_empty()).then(|| Progress { step: step.into(), percent: 50 }),
    }
}

#[test]
fn a_beat_and_its_ack_arrive_as_they_were_sent() {
    let sent = Beat { status: split_status(&NodeStatus::default(), &[vm(1, "fetch image")]).pop(), ..beat(1, 7) };
    let datagram = encode(&sent, &key(1)).unwrap();
    assert_eq!(decode_header(&datagram), Some((Kind::Beat, NodeId(3))));
    assert_eq!(decode(&datagram, &key(1)), Ok(sent));
    assert_eq!(decode(&datagram, &key(2)), Err(BeatError::Forged));

    let ack =
        Ack { node: NodeId(3), seq: 1, nonce: 7, boottime_nanos: 9, leader: true, grant: Some(Grant { age_nanos: 5 }) };
    let datagram = encode_ack(&ack, &key(1)).unwrap();
    assert_eq!(decode_ack(&datagram, &key(1)), Ok(ack));
    assert_eq!(decode(&datagram, &key(1)), Err(BeatError::Malformed), "an ack is not a beat");
}

#[test]
fn the_bytes_of_a_small_beat_do_not_change_between_versions() {
    let datagram = encode(&beat(1, 7), &key(0)).unwrap();
    assert_eq!(datagram[..18], [b'T', b'B', b'1', 1, 3, 0, 0, 0, 0, 0, 0, 0, 2, 1, 9, 7, 0, 0]);
    assert_eq!(datagram.len(), 12 + 6 + 32);
}

#[test]
fn a_host_full_of_the_largest_machines_is_split_into_datagrams_that_fit() {
    let vms: Vec<_> = (0..300).map(|n| vm(u64::MAX - n, &"ü".repeat(100))).collect();
    let full = u64::MAX;
    let node = NodeStatus {
        cpu_permille: u32::MAX,
        memory_used_bytes: full,
        memory_total_bytes: full,
        disk_used_bytes: full,
        disk_total_bytes: full,
        watchdog: true,
    };
    let parts = split_status(&node, &vms);
    assert_eq!(parts.iter().map(|part| part.vms.len()).sum::<usize>(), 300);
    for (n, part) in (0..).zip(&parts) {
        assert_eq!((part.part, part.parts as usize), (n, parts.len()));
        let largest = Beat {
            node: NodeId(full),
            incarnation: full,
            seq: full,
            boottime_nanos: full,
            nonce: full,
            unanswered_millis: full,
            status: Some(part.clone()),
        };
        assert!(encode(&largest, &key(1)).unwrap().len() <= MAX_DATAGRAM_BYTES);
    }
    assert_eq!(split_status(&node, &[]).len(), 1, "a host without machines still has a status");
}

#[test]
fn a_beat_is_believed_once_and_only_with_this_process_nonce() {
    let mut guard = ReplayGuard::new(7);
    assert_eq!(guard.check(&beat(1, 0)), Verdict::Unproven);
    assert_eq!(guard.check(&beat(1, 6)), Verdict::Unproven);
    assert_eq!(guard.check(&beat(1, 7)), Verdict::Fresh);
    assert_eq!(guard.check(&beat(1, 7)), Verdict::Replayed);
    assert_eq!(guard.check(&beat(5, 7)), Verdict::Fresh);
    assert_eq!(guard.check(&beat(4, 7)), Verdict::Fresh, "reordered");
    assert_eq!(guard.check(&beat(4, 7)), Verdict::Replayed);
    assert_eq!(guard.check(&beat(69, 7)), Verdict::Fresh);
    assert_eq!(guard.check(&beat(5, 7)), Verdict::Replayed, "the lowest that is remembered");
    assert_eq!(guard.check(&beat(3, 7)), Verdict::Replayed, "older than what is remembered");
    assert_eq!(guard.check(&Beat { incarnation: 1, ..beat(100, 7) }), Verdict::Replayed);
    assert_eq!(guard.check(&Beat { incarnation: 3, ..beat(1, 7) }), Verdict::Fresh);
    assert_eq!(guard.check(&beat(100, 7)), Verdict::Replayed, "of the incarnation before");
    assert_eq!(ReplayGuard::new(8).check(&beat(1, 7)), Verdict::Unproven, "recorded before a restart");
}

proptest! {
    #[test]
    fn no_bytes_make_a_decoder_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..1300), authentic: bool, kind in 0u8..4) {
        if authentic && bytes.len() > HEADER_BYTES {
            // Past the MAC, as a broken agent with the right key could.
            bytes[..3].copy_from_slice(&MAGIC);
            bytes[3] = kind;
            let mac = *blake3::keyed_hash(&key(1).0, &bytes).as_bytes();
            bytes.extend_from_slice(&mac);
        }
        let _ = (decode_header(&bytes), decode(&bytes, &key(1)), decode_ack(&bytes, &key(1)));
    }

    #[test]
    fn a_flipped_bit_or_a_cut_is_refused(bit in 0usize..4096, cut in 1usize..60) {
        let status = split_status(&NodeStatus::default(), &[vm(1, "start")]).pop();
        let mut datagram = encode(&Beat { status, ..beat(1, 7) }, &key(1)).unwrap();
        prop_assert!(decode(&datagram[..datagram.len() - cut], &key(1)).is_err());
        let bit = bit % (datagram.len() * 8);
        datagram[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(decode(&datagram, &key(1)).is_err());
    }

    #[test]
    fn the_window_admits_each_number_at_most_once(seqs in proptest::collection::vec(1u64..200, 0..300)) {
        let mut guard = ReplayGuard::new(7);
        let mut admitted = std::collections::HashSet::new();
        let mut highest = 0;
        for seq in seqs {
            let fresh = guard.check(&beat(seq, 7)) == Verdict::Fresh;
            prop_assert!(!fresh || admitted.insert(seq), "{} twice", seq);
            prop_assert!(fresh || admitted.contains(&seq) || seq + 64 < highest, "{} refused without reason", seq);
            highest = highest.max(seq);
        }
    }
}
