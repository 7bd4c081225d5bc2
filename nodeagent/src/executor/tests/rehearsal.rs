//! Rehearsals of backups, from the wish to the report, and to the end of one that is wished no more.

use model::{ImageId, Verdict, assignment::RehearsalWish, command::RehearsalReport};

use super::*;

fn wish(world: &World, epoch: u64, expect: &str) -> RehearsalWish {
    let bytes = [b"QFI\xfb", &[0; 100][..]].concat();
    let (digest, format, size_bytes) = (store(world.dir.path(), &bytes), ImageFormat::Qcow2, bytes.len() as u64);
    RehearsalWish {
        image: ImageId(4),
        epoch,
        vm: VmId(1),
        request: model::RequestId(0),
        size: Capacity { vcpus: 1, memory_bytes: 1 << 20, disk_bytes: 1 << 20 },
        limit_millis: 3_600_000,
        expect: expect.into(),
        base: ImageWish { digest, format, size_bytes, virtual_bytes: 1 << 20, sources: vec![], parents: vec![] },
    }
}

fn tell(world: &World, generation: u64, rehearsals: Vec<RehearsalWish>) {
    let wish = Assignment { rehearsals, ..(*assignment(generation, vec![])).clone() };
    world.assignment.send(Some(Arc::new(wish))).unwrap();
}

async fn reported(world: &World, epoch: u64) -> RehearsalReport {
    let deadline = Instant::now() + DEADLINE;
    loop {
        let told = world.rehearsals.lock().unwrap().iter().find(|report| report.epoch == epoch).cloned();
        match told {
            Some(report) => return report,
            None => assert!(Instant::now() < deadline, "no report of rehearsal {epoch}"),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rehearsal_is_reported_and_ends_when_nobody_wishes_it_any_more() {
    let world = World::new();
    tell(&world, 1, vec![wish(&world, 7, "")]);
    let report = reported(&world, 7).await;
    assert_eq!(
        (report.image, report.verdict, report.reason.as_str()),
        (ImageId(4), Verdict::Booted, "its guest agent answered")
    );

    // One that would wait for an hour. The next of the same backup begins when it has ended, and not before.
    tell(&world, 2, vec![wish(&world, 8, "never said")]);
    let deadline = Instant::now() + DEADLINE;
    while world.hypervisor.rehearsals.load(Ordering::SeqCst) < 2 {
        assert!(Instant::now() < deadline, "the second one does not begin");
        sleep(Duration::from_millis(20)).await;
    }
    tell(&world, 3, vec![wish(&world, 9, "is simulated")]);
    let report = reported(&world, 9).await;
    assert_eq!(report.reason, "its console said 'This machine is simulated: nothing runs and there is no console.'");
    assert!(world.rehearsals.lock().unwrap().iter().all(|report| report.epoch != 8), "nobody asks about it any more");
    assert_eq!(world.hypervisor.inner.guests().unwrap(), [], "a rehearsal is no guest");
}
