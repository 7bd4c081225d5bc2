//! What really happened to simulated guests, on one clock: a checker compares it with what was reported.
//!
//! Only a harness asks for it (`--simulated-effects`): hosts that share a machine may share the file, since a line is
//! one write at its end. A guest that starts takes the addresses that its line names, and lets them go when it stops.
//! Lines are in the order in which they were written; what orders the effects is their time.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    path::PathBuf,
};

use serde::Serialize;

use super::{
    now_nanos,
    record::{Power, SimGuest, Why},
};

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
    /// Of a stop.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<Why>,
    macs: Vec<String>,
}

impl EffectLog {
    pub fn new(path: Option<PathBuf>, host: String) -> Self {
        Self { path, host }
    }

    /// It takes place now.
    pub fn append(&self, guest: &SimGuest, effect: Effect) {
        self.append_at(now_nanos(), guest, effect);
    }

    pub fn append_at(&self, time_ns: u64, guest: &SimGuest, effect: Effect) {
        let Some(path) = &self.path else { return };
        let why = match guest.power {
            Power::Off(why) if effect == Effect::Stop => Some(why),
            _ => None,
        };
        let macs = guest.macs.iter().map(ToString::to_string).collect();
        let (vm, epoch) = (guest.vm.to_string(), guest.epoch);
        let line = Line { time_ns, host: &self.host, vm, epoch, effect, why, macs };
        let write = || -> io::Result<()> {
            let text = serde_json::to_string(&line)? + "\n";
            OpenOptions::new().create(true).append(true).open(path)?.write_all(text.as_bytes())
        };
        if let Err(e) = write() {
            tracing::error!(error = %e, "the effect log has a gap");
        }
    }
}
