//! A rehearsal on paper: what is a disk image comes up after as long as a guest takes, and says so on its console.

use std::{
    fs::File,
    io::Read,
    thread,
    time::{Duration, Instant},
};

use super::{
    super::{
        HypervisorError, Result,
        job::Job,
        rehearsal::{Rehearsal, Rehearsed, Signs, judge},
    },
    START_MILLIS, Simulated,
};

/// How often it is looked at.
const GLANCE: Duration = Duration::from_millis(50);
/// A disk that an operating system was read from.
const READ_BYTES: u64 = 40 << 20;

pub fn rehearse(h: &Simulated, rehearsal: &Rehearsal, job: &Job) -> Result<Rehearsed> {
    let start = Instant::now();
    h.work(job, READ_BYTES, START_MILLIS)?;
    let signs = Signs {
        on: true,
        agent_answers: true,
        console: "This machine is simulated: nothing runs and there is no console.\n".into(),
        read_bytes: READ_BYTES,
        written_bytes: 0,
    };
    let signs = if boots(rehearsal) { signs } else { Signs { on: true, ..Signs::default() } };
    loop {
        let took = start.elapsed();
        if let Some((verdict, reason)) = judge(&signs, &rehearsal.expect, took >= rehearsal.limit) {
            return Ok(Rehearsed { verdict, took, reason });
        }
        if let Some(why) = job.must_end() {
            return Err(HypervisorError::Transient(why.into()));
        }
        thread::sleep(GLANCE);
    }
}

/// Backups that are made here have a header; what has none is no disk that a BIOS could boot from.
fn boots(rehearsal: &Rehearsal) -> bool {
    let mut magic = [0; 4];
    let read = File::open(&rehearsal.spec.base).and_then(|mut base| base.read_exact(&mut magic));
    read.is_ok() && &magic == b"QFI\xfb"
}
