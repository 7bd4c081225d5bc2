//! `trefoil controller dump`: what a stopped controller has on its disk, for people after a disaster and for tests.
//!
//! Nothing is changed and nothing is repaired. What is damaged, or of a later version, ends the dump with an error; what
//! came before that was read whole. Everything is shown as the log or the tables have it: of secrets these hold only
//! digests, except in the user data that tenants gave their machines.

use std::path::{Path, PathBuf};

use anyhow::Result;
use api::error::ApiError;
use model::{Entry, State, state::RowVisitor};
use serde::Serialize;
use serde_json::{Value, json};
use storage::{
    dump::{self, Content, LogDump, Slot},
    failure::StorageError,
    record::{BadRecord, Position, Voters},
};

use crate::config::Config;

pub struct DumpArgs {
    /// Of a controller that has stopped.
    pub data: PathBuf,
    /// Every entry that the log still has.
    pub log: bool,
    /// Every row of the state.
    pub state: bool,
    /// The log index that the state is to be of; by default what the tables on disk are of.
    pub at: Option<u64>,
}

/// Tells what is there, one JSON object at a time: `controller` first, then `entry` and `row`.
///
/// # Errors
/// When the controller runs (`in-use`), there is none (`not-found`), the state is not kept for that index
/// (`invalid-argument`), the disk is damaged (`damaged`) or of a later version (`too-new`), or telling fails.
pub fn dump(args: &DumpArgs, tell: &mut dyn FnMut(Value) -> Result<()>) -> Result<()> {
    let config = Config::load(&args.data).map_err(|error| ApiError::not_found(format!("{error:#}")))?;
    let whose = |error| refusal(&args.data, error);
    let log = LogDump::open(&args.data).map_err(whose)?;
    let summary = log.summary().map_err(whose)?;
    let (state, applied, membership) = dump::state(&args.data).map_err(whose)?;
    let (state, index) = match args.at {
        None => (state, applied.map(|position| position.index)),
        Some(index) => (log.state_at(&args.data, index).map_err(whose)?, Some(index)),
    };
    tell(json!({
        "kind": "controller",
        "id": config.id,
        "name": config.name,
        "cluster": config.cluster,
        "epoch": config.epoch,
        "level": state.quorum().level,
        "vote": summary.vote.map(|vote| json!({
            "term": vote.term, "candidate": vote.candidate, "granted": vote.committed,
        })),
        "last": summary.last.map(position),
        "committed": summary.committed.map(position),
        "purged": summary.purged.map(position),
        "applied": applied.map(position),
        "membership": { "at": membership.at.map(position), "voters": voters(&membership.voters) },
        "state": { "index": index, "hash": hex(&state.hash()) },
    }))?;
    if args.log {
        for slot in log.slots(0) {
            tell(entry(slot.map_err(whose)?))?;
        }
    }
    if args.state { rows(&state, tell) } else { Ok(()) }
}

fn rows(state: &State, tell: &mut dyn FnMut(Value) -> Result<()>) -> Result<()> {
    struct Teller<'a> {
        tell: &'a mut dyn FnMut(Value) -> Result<()>,
        outcome: Result<()>,
    }
    impl RowVisitor for Teller<'_> {
        fn row<V: Serialize>(&mut self, table: &'static str, key: String, row: &V) {
            if self.outcome.is_ok() {
                let row = serde_json::to_value(row).map_err(anyhow::Error::from);
                self.outcome =
                    row.and_then(|row| (self.tell)(json!({ "kind": "row", "table": table, "key": key, "row": row })));
            }
        }
    }
    let mut teller = Teller { tell, outcome: Ok(()) };
    state.visit_rows(&mut teller);
    teller.outcome
}

fn entry(slot: Slot) -> Value {
    let mut line = json!({
        "kind": "entry",
        "index": slot.position.index,
        "term": slot.position.term,
        "leader": slot.position.leader,
    });
    let (what, rest) = match slot.content {
        Content::Blank => ("blank", json!({})),
        Content::Membership(members) => ("membership", voters(&members)),
        Content::Entry(Entry { at, request, actor, command }) => (
            "command",
            json!({ "at": at.0, "request": request.map(|request| request.id.to_string()), "actor": actor, "command": command }),
        ),
    };
    line["what"] = what.into();
    if let (Some(line), Value::Object(rest)) = (line.as_object_mut(), rest) {
        line.extend(rest);
    }
    line
}

fn position(position: Position) -> Value {
    json!({ "index": position.index, "term": position.term, "leader": position.leader })
}

fn voters(voters: &Voters) -> Value {
    json!({ "voters": voters.sets, "members": voters.addresses })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn refusal(data: &Path, error: StorageError) -> ApiError {
    let code = match &error {
        StorageError::Running => "in-use",
        StorageError::NotKept { .. } => "invalid-argument",
        StorageError::TooNew { .. }
        | StorageError::BadRecord { reason: BadRecord::Version(_) | BadRecord::Kind(_), .. } => "too-new",
        StorageError::BadRecord { .. }
        | StorageError::Hole(_)
        | StorageError::Damaged { .. }
        | StorageError::Rows(_)
        | StorageError::Database { .. } => "damaged",
        StorageError::File { .. }
        | StorageError::PurgeTooFar { .. }
        | StorageError::BadSnapshot(_)
        | StorageError::Stopped => "failed",
    };
    ApiError::new(code, format!("{}: {error}", data.display()))
}
