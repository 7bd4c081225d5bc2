//! What the demonstration says on the terminal: a line a step, with the time it took and what was seen.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use anyhow::Result;

pub struct Teller {
    began: Instant,
    steps: Vec<(String, Duration)>,
}

impl Teller {
    pub fn begin(title: &str) -> Self {
        println!("{title}\n");
        Self { began: Instant::now(), steps: Vec::new() }
    }

    /// Runs a step; what it returns is what was seen.
    ///
    /// # Errors
    /// The step's own; nothing after it is told.
    pub fn step(&mut self, what: &str, work: impl FnOnce() -> Result<String>) -> Result<()> {
        let began = Instant::now();
        print!("{:>6.1} s  {what} ", self.began.elapsed().as_secs_f64());
        // A terminal that went away is no reason to stop.
        let _ = std::io::stdout().flush();
        match work() {
            Ok(seen) => {
                println!("… {:.1} s", began.elapsed().as_secs_f64());
                for line in seen.lines() {
                    println!("          {line}");
                }
                self.steps.push((what.to_owned(), began.elapsed()));
                Ok(())
            }
            Err(error) => {
                println!("… FAILED after {:.1} s", began.elapsed().as_secs_f64());
                Err(error)
            }
        }
    }

    pub fn note(&self, text: &str) {
        println!("{:>8}  {text}", "");
    }

    /// The summary; true when everything was verified.
    pub fn end(self, outcome: Result<()>) -> bool {
        println!();
        match outcome {
            Ok(()) => {
                let slowest = self.steps.iter().max_by_key(|(_, took)| *took);
                println!(
                    "{} steps, every one verified, in {:.1} s",
                    self.steps.len(),
                    self.began.elapsed().as_secs_f64()
                );
                if let Some((what, took)) = slowest {
                    println!("the slowest: {what}, {:.1} s", took.as_secs_f64());
                }
                true
            }
            Err(error) => {
                println!("{} steps were verified; then: {error:#}", self.steps.len());
                false
            }
        }
    }
}
