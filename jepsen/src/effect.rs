//! What really happened to guests, as their hosts wrote it down: the second witness, which does not trust the API.
//!
//! Its clock is the history's. Deliberately not here: what may happen; the checkers know.

use std::{io, path::Path};

use serde::Deserialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Start,
    Stop,
    Suspend,
    Resume,
    Remove,
    Pause,
    Continue,
    /// The harness cut the power of the host: nothing runs on it from here on.
    Power,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Effect {
    /// In the file CLOCK_MONOTONIC, in a run since it began; nanoseconds.
    #[serde(rename = "time_ns")]
    pub time: u64,
    pub host: String,
    #[serde(default)]
    pub vm: String,
    #[serde(default)]
    pub epoch: u64,
    #[serde(rename = "effect")]
    pub kind: Kind,
    #[serde(default)]
    pub macs: Vec<String>,
}

impl Effect {
    /// Whether a guest runs from here on.
    pub fn begins(&self) -> bool {
        matches!(self.kind, Kind::Start | Kind::Resume | Kind::Continue)
    }
}

/// In the order of their times; what ends at a moment comes before what begins at it. Times count from `began`.
///
/// # Errors
/// When the file cannot be read, or a line in it is not an effect.
pub fn read(path: &Path, began: u64) -> io::Result<Vec<Effect>> {
    let text = match std::fs::read_to_string(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => String::new(),
        other => other?,
    };
    let mut effects: Vec<Effect> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    for effect in &mut effects {
        effect.time = effect.time.saturating_sub(began);
    }
    effects.sort_by_key(|effect| (effect.time, effect.begins()));
    Ok(effects)
}

/// A span in which a guest ran on a host, from a start to its end; `u64::MAX` when it goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub vm: String,
    pub host: String,
    pub epoch: u64,
    pub from: u64,
    pub to: u64,
}

/// Every span in which a guest ran, in order of their beginnings.
pub fn spans(effects: &[Effect]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for effect in effects {
        let here = |span: &Span| span.to == u64::MAX && span.host == effect.host;
        if effect.kind == Kind::Power {
            spans.iter_mut().filter(|span| here(span)).for_each(|span| span.to = effect.time);
            continue;
        }
        let open = spans.iter_mut().find(|span| here(span) && span.vm == effect.vm);
        match (open, effect.begins()) {
            (None, true) => spans.push(Span {
                vm: effect.vm.clone(),
                host: effect.host.clone(),
                epoch: effect.epoch,
                from: effect.time,
                to: u64::MAX,
            }),
            (Some(span), false) => span.to = effect.time,
            (Some(_), true) | (None, false) => {}
        }
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_several_hosts_are_one_order() {
        let file = std::env::temp_dir().join(format!("trefoil-effects-{}", std::process::id()));
        let lines = r#"{"time_ns":130,"host":"b","vm":"vm-1","epoch":9,"effect":"start","macs":["02:00"]}
{"time_ns":130,"host":"a","vm":"vm-1","epoch":5,"effect":"pause","macs":[]}
{"time_ns":110,"host":"a","vm":"vm-1","epoch":5,"effect":"start","macs":[]}
{"time_ns":140,"host":"b","effect":"power"}
{"time_ns":150,"host":"b","vm":"vm-1","epoch":9,"effect":"stop","why":"Crashed","macs":[]}
"#;
        std::fs::write(&file, lines).unwrap();
        let effects = read(&file, 100).unwrap();
        std::fs::remove_file(&file).unwrap();
        let span = |host: &str, epoch, from, to| Span { vm: "vm-1".into(), host: host.into(), epoch, from, to };
        assert_eq!(spans(&effects), [span("a", 5, 10, 30), span("b", 9, 30, 40)]);
        assert_eq!(read(&file, 0).unwrap(), [], "no host has written anything yet");
    }
}
