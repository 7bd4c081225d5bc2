//! `trefoil watch`: tells what changes, a line a change, and goes on at another controller when one ends.

use std::time::Duration;

use api::{
    error::ApiError,
    proto::{WatchEvent, WatchReply},
};
use clap::Args;
use serde_json::json;

use crate::{
    context::Context,
    output::{self, Format, printable},
};

#[derive(Debug, Args)]
pub struct WatchArgs {
    /// Tells what changed after this log index: that of an answer (`read_at`), or the last that a watch has told
    #[arg(long, value_name = "REVISION")]
    after: Option<u64>,
    /// Ends once everything up to this log index has been told
    #[arg(long, value_name = "REVISION")]
    until: Option<u64>,
}

pub const EXAMPLE: &str = "Example:\n  trefoil watch --output json\n  trefoil watch --after 4711";

/// Before it is opened anew: an election takes as long.
const PAUSE: Duration = Duration::from_millis(200);

/// # Errors
/// What a controller refused; `compacted` when the changes after that index are not kept any more.
pub async fn run(args: WatchArgs, context: &Context) -> Result<(), ApiError> {
    let mut after = args.after;
    loop {
        let mut watch = context.client.watch(&context.tenant, after).await?;
        let error = loop {
            match watch.next().await {
                Ok(reply) => {
                    tell(context.format, &reply)?;
                    after = Some(reply.revision);
                    if args.until.is_some_and(|until| reply.revision >= until) {
                        return Ok(());
                    }
                }
                Err(error) => break error,
            }
        };
        if !error.is_retryable() {
            return Err(error);
        }
        tracing::debug!(%error, after, "the watch goes on at another controller");
        tokio::time::sleep(PAUSE).await;
    }
}

/// For programs the revision follows its changes, so that who has read it may go on from there.
fn tell(format: Format, reply: &WatchReply) -> Result<(), ApiError> {
    let lines = reply.events.iter().map(|event| line(format, event));
    let mark = (format == Format::Json).then(|| json!({ "told": reply.revision }).to_string());
    let text: String = lines.chain(mark).map(|line| line + "\n").collect();
    output::write(text.as_bytes())
}

fn line(format: Format, event: &WatchEvent) -> String {
    match format {
        Format::Json => json!({
            "revision": event.revision,
            "kind": event.kind,
            "id": event.id,
            "tenant": event.tenant,
            "present": event.present,
        })
        .to_string(),
        Format::Table => {
            let what = if event.present { "changed" } else { "gone" };
            let of = if event.tenant.is_empty() { String::new() } else { format!("  of {}", event.tenant) };
            printable(&format!("{:>8}  {} {}  {what}{of}", event.revision, event.kind, event.id)).into_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_a_line() {
        let event =
            WatchEvent { revision: 7, kind: "vm".into(), id: "vm-1".into(), tenant: "tenant-2".into(), present: false };
        assert_eq!(line(Format::Table, &event), "       7  vm vm-1  gone  of tenant-2");
        let json = r#"{"id":"vm-1","kind":"vm","present":false,"revision":7,"tenant":"tenant-2"}"#;
        assert_eq!(line(Format::Json, &event), json);
    }
}
