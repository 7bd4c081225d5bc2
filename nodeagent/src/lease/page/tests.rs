//! One writer, many readers, and writers that die in the middle.

use std::{
    sync::atomic::AtomicBool,
    thread::{scope, yield_now},
};

use super::*;

fn permit(n: u64, machines: u64) -> Permit {
    let machine = |vm| Machine { vm: VmId(vm), epoch: n, standing: Standing::Leased };
    Permit { incarnation: n, until: n, machines: (0..machines).map(machine).collect() }
}

fn read(page: &Page) -> Permit {
    let mut permit = Permit::default();
    page.read(&mut permit);
    permit
}

#[test]
fn a_permit_is_read_by_another_process_and_by_the_next_agent() {
    let dir = tempfile::tempdir().unwrap();
    let page = Page::open(dir.path()).unwrap();
    assert_eq!(read(&page), Permit::default(), "a new page permits nothing and names nobody");
    let standings = [Standing::Leased, Standing::Free, Standing::Denied];
    let machines = (1..).zip(standings).map(|(n, standing)| Machine { vm: VmId(n), epoch: n * 7, standing }).collect();
    let written = Permit { incarnation: 3, until: 99, machines };
    page.write(&written);
    assert_eq!(read(&Page::open(dir.path()).unwrap()), written);
    page.write(&permit(4, 0));
    assert_eq!(read(&Page::open(dir.path()).unwrap()), permit(4, 0));
    assert!(page.is_linked());
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    assert!(!page.is_linked());
}

#[test]
fn a_writer_that_died_in_the_middle_and_another_boot_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let page = Page::open(dir.path()).unwrap();
    page.write(&permit(5, 2));
    let next = page.words[0].load(Ordering::Relaxed) + 1;
    for word in page.slot(next) {
        word.store(u64::MAX, Ordering::Relaxed);
    }
    assert_eq!(read(&page), permit(5, 2));
    let mut later = Page::open(dir.path()).unwrap();
    later.boot ^= 2;
    assert_eq!(read(&later), Permit::default(), "the clock of another boot was another");
}

#[test]
fn nobody_reads_half_of_one_permit_and_half_of_another() {
    let dir = tempfile::tempdir().unwrap();
    let page = Page::open(dir.path()).unwrap();
    let done = AtomicBool::new(false);
    page.write(&permit(1, 1));
    scope(|threads| {
        for _ in 0..2 {
            threads.spawn(|| {
                let mut seen = permit(0, 0);
                while !done.load(Ordering::Relaxed) {
                    page.read(&mut seen);
                    // Another writer may have come by at each of the tries: then nothing is permitted.
                    if (seen.incarnation, seen.until) != (0, 0) {
                        assert_eq!(seen, permit(seen.until, seen.until % 97), "one permit, whole");
                    }
                    yield_now();
                }
            });
        }
        for n in 1..20_000 {
            page.write(&permit(n, n % 97));
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn the_guard_speaks_for_itself() {
    let dir = tempfile::tempdir().unwrap();
    let page = Page::open(dir.path()).unwrap();
    assert_eq!((page.sign(), page.stopped()), (None, vec![]));
    let stopped = [Stopped { pid: 7, start_time: 8 }, Stopped { pid: 9, start_time: 10 }];
    page.write_sign(17, 1000, 4);
    page.write_stopped(&stopped);
    assert_eq!(page.sign(), Some(GuardSign { pid: 17, looked_at: 1000, build: 4, stopped: 2, watchdog: false }));
    page.write_watchdog(true);
    assert_eq!(page.sign().map(|sign| sign.watchdog), Some(true));
    page.touch();
    assert_eq!(Page::open(dir.path()).unwrap().stopped(), stopped);
    page.write_stopped(&[]);
    assert_eq!(page.stopped(), vec![]);
}
