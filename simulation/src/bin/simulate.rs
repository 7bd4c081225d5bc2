//! `make simulate`: a cloud from each of many seeds, or the story of one.

use std::{process::ExitCode, time::Instant};

use clap::Parser;
use simulation::{coverage::Coverage, run, run_all};

/// Seeds are played in this many at a time, so that a failure is told soon.
const CHUNK: u64 = 64;

/// Simulates clouds under faults.
#[derive(Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 64)]
    seeds: u64,
    /// The first one.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Play this one alone and tell what happens.
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let Arguments { seeds, from, seed } = Arguments::parse();
    if let Some(seed) = seed {
        return tell(seed);
    }
    let began = Instant::now();
    let (mut coverage, mut next) = (Coverage::default(), from);
    while next < from + seeds {
        let end = (next + CHUNK).min(from + seeds);
        for outcome in run_all(next..end) {
            coverage.merge(&outcome.coverage);
            if let Some(broken) = outcome.broken {
                eprintln!("seed {}: {broken}\n", outcome.seed);
                return tell(outcome.seed);
            }
        }
        next = end;
    }
    println!("{seeds} seeds from {from} in {:.1} s: all is well\n\n{coverage}", began.elapsed().as_secs_f64());
    let missing = coverage.missing();
    if missing.is_empty() || seeds < CHUNK {
        return ExitCode::SUCCESS;
    }
    eprintln!("no proof: these never happened: {}", missing.join(", "));
    ExitCode::from(3)
}

fn tell(seed: u64) -> ExitCode {
    let outcome = run(seed, true);
    outcome.story.iter().for_each(|line| println!("{line}"));
    match outcome.broken {
        Some(broken) => {
            println!("seed {seed}: {broken}\nagain: make simulate SEED={seed}");
            ExitCode::FAILURE
        }
        None => {
            println!("seed {seed}: all is well");
            ExitCode::SUCCESS
        }
    }
}
