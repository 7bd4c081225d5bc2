//! The history of a run: what every client asked and heard, one JSON object a line, in the order it happened.
//!
//! One process writes it and one monotonic clock orders it, so "before" needs no tolerance. Deliberately not here:
//! what an event means for a promise; the checkers decide that.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    sync::Mutex,
    time::{Duration, SystemTime},
};

use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub mod edn;

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Invoke,
    /// The answer says that it happened.
    Ok,
    /// It is proved that it did not happen.
    Fail,
    /// Nobody knows: a timeout, a broken connection, an answer that promises nothing. The process ends here.
    Info,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Function {
    Read,
    Write,
    /// The value is `[old, new]`.
    Cas,
    Add,
    /// The value is the list of all elements that were seen.
    List,
    /// A machine; the answer is its id.
    Create,
    /// The value is what a machine should be: running or stopped.
    Power,
    /// To another host, while it runs.
    Migrate,
    Delete,
    /// The answer is every machine at one log index.
    Machines,
    /// The answer is every host, with what it has and what of it is promised.
    Nodes,
    /// The answer is what the tenant may have and what it has.
    Quota,
    /// The answer is its id and VNI.
    CreateNetwork,
    DeleteNetwork,
    /// The answer is every network at one log index.
    Networks,
    /// An image; the value is the digest of its bytes.
    Import,
    /// The answer is the digest of the bytes that came.
    Export,
    /// One message of a watch: the value is the index after which it goes on, then `[index, kind, id, present]` of each
    /// change.
    Watch,
    /// What one controller or host says after everything was healed.
    Final,
}

impl Function {
    /// Whether it changes something in the quorum.
    pub fn is_write(self) -> bool {
        matches!(
            self,
            Self::Write
                | Self::Cas
                | Self::Add
                | Self::Create
                | Self::Power
                | Self::Migrate
                | Self::Delete
                | Self::CreateNetwork
                | Self::DeleteNetwork
                | Self::Import
        )
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub process: u64,
    #[serde(rename = "type")]
    pub kind: Kind,
    pub f: Function,
    pub key: String,
    pub value: Value,
    /// Nanoseconds since the run began.
    pub time: u64,
    /// The controller that was asked.
    pub node: String,
    /// The request id of a mutating call.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub req: String,
    /// The log index that the answer is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rev: Option<u64>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub error: String,
}

/// An invocation with what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operation {
    pub process: u64,
    pub f: Function,
    pub key: String,
    /// What was asked for.
    pub asked: Value,
    /// What was answered; the same as `asked` where nothing was.
    pub answered: Value,
    pub outcome: Kind,
    pub start: u64,
    /// `u64::MAX` when it never ended.
    pub end: u64,
    pub node: String,
    pub req: String,
    pub rev: Option<u64>,
    pub error: String,
}

impl Operation {
    /// The stable code of what a controller refused; empty when none did.
    pub fn code(&self) -> &str {
        if self.outcome == Kind::Fail { self.error.split(':').next().unwrap_or_default() } else { "" }
    }
}

/// Orders and keeps events; clones of the reference may record from any task.
pub struct Recorder {
    /// CLOCK_MONOTONIC, the one clock of all processes of a machine, in nanoseconds.
    began: u64,
    inner: Mutex<Inner>,
}

struct Inner {
    events: Vec<Event>,
    file: Option<BufWriter<File>>,
}

impl Recorder {
    /// Records in memory and, when a path is given, in a file as well.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn new(path: Option<&Path>) -> std::io::Result<Self> {
        let file = path.map(File::create).transpose()?.map(BufWriter::new);
        Ok(Self { began: monotonic_nanos(), inner: Mutex::new(Inner { events: Vec::new(), file }) })
    }

    /// Nanoseconds since the run began.
    pub fn now(&self) -> u64 {
        monotonic_nanos().saturating_sub(self.began)
    }

    /// When the run began, on the clock that every process of this machine can read.
    pub fn began(&self) -> u64 {
        self.began
    }

    /// The same in milliseconds since the Unix epoch, as the wall clock has it now.
    pub fn began_unix_millis(&self) -> u64 {
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let since = Duration::from_nanos(self.now());
        u64::try_from(unix.saturating_sub(since).as_millis()).unwrap_or(u64::MAX)
    }

    /// Stamps the event with the time and keeps it. The time is taken under the lock, so the order in the history is
    /// the order of the clock. An invocation is recorded before it is sent, a completion after it was heard.
    pub fn record(&self, mut event: Event) {
        let mut inner = self.inner.lock().expect("no recorder panics while it holds the lock");
        event.time = self.now();
        if let Some(file) = &mut inner.file
            && let Ok(line) = serde_json::to_string(&event)
        {
            // A history that cannot be written is a harness failure; `finish` reports it.
            let _ = writeln!(file, "{line}");
        }
        inner.events.push(event);
    }

    /// Key and value of everything of this kind that was acknowledged so far.
    pub fn done(&self, f: Function) -> Vec<(String, Value)> {
        let inner = self.inner.lock().expect("no recorder panics while it holds the lock");
        let done = inner.events.iter().filter(|event| event.f == f && event.kind == Kind::Ok);
        done.map(|event| (event.key.clone(), event.value.clone())).collect()
    }

    /// # Errors
    /// When the file could not be written to its end.
    pub fn finish(&self) -> std::io::Result<Vec<Event>> {
        let mut inner = self.inner.lock().expect("no recorder panics while it holds the lock");
        if let Some(file) = &mut inner.file {
            file.flush()?;
        }
        Ok(inner.events.clone())
    }
}

/// Of the one clock of all processes of a machine.
pub fn monotonic_nanos() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Pairs invocations with completions. A process has at most one operation at a time.
///
/// # Errors
/// With a sentence when the events are not a history: a harness failure.
pub fn operations(events: &[Event]) -> Result<Vec<Operation>, String> {
    let mut open: std::collections::HashMap<u64, Operation> = std::collections::HashMap::new();
    let mut done = Vec::new();
    for event in events {
        if event.kind == Kind::Invoke {
            let operation = Operation {
                process: event.process,
                f: event.f,
                key: event.key.clone(),
                asked: event.value.clone(),
                answered: event.value.clone(),
                outcome: Kind::Info,
                start: event.time,
                end: u64::MAX,
                node: event.node.clone(),
                req: event.req.clone(),
                rev: None,
                error: String::new(),
            };
            if open.insert(event.process, operation).is_some() {
                return Err(format!("process {} asked twice without hearing an answer", event.process));
            }
        } else {
            let Some(mut operation) = open.remove(&event.process) else {
                return Err(format!("process {} heard an answer to nothing", event.process));
            };
            operation.outcome = event.kind;
            operation.answered = event.value.clone();
            operation.rev = event.rev;
            operation.error.clone_from(&event.error);
            if event.kind != Kind::Info {
                operation.end = event.time;
            }
            done.push(operation);
        }
    }
    done.extend(open.into_values());
    done.sort_by_key(|operation| operation.start);
    Ok(done)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(process: u64, kind: Kind, value: Value) -> Event {
        Event {
            process,
            kind,
            f: Function::Write,
            key: "k".into(),
            value,
            time: 0,
            node: "controller-1".into(),
            req: String::new(),
            rev: None,
            error: String::new(),
        }
    }

    #[test]
    fn an_event_is_one_line_in_the_published_format() {
        let mut written = event(3, Kind::Ok, json!(7));
        written.rev = Some(12);
        written.req = "r".into();
        let line = serde_json::to_string(&written).unwrap();
        assert_eq!(
            line,
            r#"{"process":3,"type":"ok","f":"write","key":"k","value":7,"time":0,"node":"controller-1","req":"r","rev":12}"#
        );
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), written);
    }

    #[test]
    fn what_never_ended_is_unknown() {
        let events = [event(1, Kind::Invoke, json!(1)), event(2, Kind::Invoke, json!(2)), event(2, Kind::Ok, json!(2))];
        let operations = operations(&events).unwrap();
        assert_eq!(operations.iter().filter(|o| o.outcome == Kind::Info && o.end == u64::MAX).count(), 1);
        assert_eq!(operations.iter().filter(|o| o.outcome == Kind::Ok).count(), 1);
    }

    #[test]
    fn two_open_operations_of_a_process_are_no_history() {
        let events = [event(1, Kind::Invoke, json!(1)), event(1, Kind::Invoke, json!(2))];
        assert!(operations(&events).is_err());
    }
}
