//! What really happened to simulated guests, in the order of one clock: a checker compares it with what was reported.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    path::PathBuf,
};

use serde::Serialize;

use super::{now_nanos, record::SimGuest};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    Start,
    Stop,
    Suspend,
    Resume,
    Remove,
    /// Stopped because it may not run.
    Pause,
    /// It may again.
    Continue,
}

pub struct EffectLog {
    path: Option<PathBuf>,
    host: String,
}

#[derive(Serialize)]
struct Line<'a> {
    /// CLOCK_MONOTONIC, when the effect took place.
    time_ns: u64,
    host: &'a str,
    vm: String,
    epoch: u64,
    effect: Effect,
}

impl EffectLog {
    pub fn new(path: Option<PathBuf>, host: String) -> Self {
        Self { path, host }
    }

    /// Several agents may append to one file: a line is one write.
    pub fn append(&self, guest: &SimGuest, effect: Effect) {
        let Some(path) = &self.path else { return };
        let (vm, epoch) = (guest.vm.to_string(), guest.epoch);
        let line = Line { time_ns: now_nanos(), host: &self.host, vm, epoch, effect };
        let write = || -> io::Result<()> {
            let text = serde_json::to_string(&line)? + "\n";
            OpenOptions::new().create(true).append(true).open(path)?.write_all(text.as_bytes())
        };
        if let Err(e) = write() {
            tracing::error!(error = %e, "the effect log has a gap");
        }
    }
}
