//! The processes that the guard's tests start, stop and kill: a guard, and an agent that does nothing but renew its
//! lease. A test needs a program for them, because a process cannot kill a part of itself.

use std::{env, path::Path, process::exit, thread::sleep, time::Duration};

use nodeagent::{
    clock,
    guard::{self, GuardConfig},
    lease::{Permit, page::Page},
};

/// As the program has it: whether memory is missing when the guard acts depends on it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str = "guard_parts guard DATA, or guard_parts renew DATA NANOSECONDS";

fn main() -> anyhow::Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["guard", data] => Ok(guard::run(&GuardConfig { data: data.into(), watchdog: None })?),
        ["renew", data, lasts] => renew(Path::new(data), lasts.parse()?),
        _ => {
            eprintln!("{USAGE}");
            exit(2);
        }
    }
}

/// Prolongs what is permitted, ten times in each lease.
fn renew(data: &Path, lasts_nanos: u64) -> anyhow::Result<()> {
    let page = Page::open(data)?;
    let mut permit = Permit::default();
    loop {
        page.read(&mut permit);
        permit.until = clock::boottime_nanos() + lasts_nanos;
        page.write(&permit);
        sleep(Duration::from_nanos(lasts_nanos / 10));
    }
}
