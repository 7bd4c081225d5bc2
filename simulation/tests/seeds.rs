//! A cloud from each of some seeds, under faults: nothing that must not be ever is, and all is well afterwards. The
//! environment variable SEEDS asks for more of them; `make simulate` tells the story of one that fails.

use simulation::{coverage::Coverage, run, run_all};

/// Enough that everything of `coverage::REQUIRED` happens, some of it often; a few seconds.
const SEEDS: u64 = 64;

#[test]
fn no_seed_breaks_a_promise_and_all_come_to_rest() {
    let seeds = std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    let outcomes = run_all(0..seeds);
    let mut coverage = Coverage::default();
    for outcome in &outcomes {
        if let Some(broken) = &outcome.broken {
            let story = run(outcome.seed, true).story.join("\n");
            panic!("{story}\nseed {}: {broken}\nits story again: make simulate SEED={}", outcome.seed, outcome.seed);
        }
        coverage.merge(&outcome.coverage);
    }
    assert_eq!(outcomes.len() as u64, seeds);
    println!("{seeds} seeds:\n{coverage}");
    if seeds >= SEEDS {
        assert!(coverage.missing().is_empty(), "no proof: these never happened: {:?}\n{coverage}", coverage.missing());
    }
}

#[test]
fn a_seed_is_the_same_run_again_and_another_is_not() {
    let (one, again, other) = (run(11, true), run(11, true), run(12, true));
    assert_eq!((one.digest, &one.coverage, &one.story), (again.digest, &again.coverage, &again.story));
    assert!(one.digest != other.digest && one.story != other.story);
    assert!(one.story.len() > 100, "the story of a run can be read");
}
