//! What `up` and `down` tell while they work: a line a step, with the time since the start.

use std::time::Instant;

#[derive(Clone, Copy)]
pub struct Telling {
    began: Instant,
}

impl Telling {
    pub fn begin() -> Self {
        Self { began: Instant::now() }
    }

    /// On the error stream: the result on the other one can be read by a program.
    pub fn step(&self, what: &str) {
        eprintln!("{:7.1} s  {what}", self.began.elapsed().as_secs_f64());
    }
}
