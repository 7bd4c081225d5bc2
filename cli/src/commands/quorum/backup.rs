//! `trefoil quorum backup`: the cloud's own state into a file, and what such a file holds.

use std::path::Path;

use api::{client, error::ApiError, quorum_backup::Backup};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::{
    context::Context,
    moment::moment_text,
    output::{self, Format, details},
    quantity::size_text,
};

pub async fn back_up(file: &Path, context: &Context) -> Result<(), ApiError> {
    let bar = if context.is_watched() { ProgressBar::no_length() } else { ProgressBar::hidden() };
    let written = context.client.back_up_quorum(file, |bytes| bar.set_message(size_text(bytes))).await;
    bar.finish_and_clear();
    let backup = written?;
    context.print(&told(file, &backup), || {
        let (index, bytes) = (backup.header.index, size_text(backup.bytes));
        format!("{} {bytes}, index {index}: keep it as secret as a controller's directory", file.display())
    })
}

/// Reads it from end to end; nothing of the cloud is asked.
pub fn verify(file: &Path, format: Format) -> Result<(), ApiError> {
    let backup = client::read_quorum_backup(file)?;
    let header = &backup.header;
    output::print(format, &told(file, &backup), || {
        details(
            &[
                ("backup", "whole and sound".to_owned()),
                ("cloud", header.cluster.clone()),
                ("made", moment_text(header.made_at.0)),
                ("index", format!("{}, term {}, cluster epoch {}", header.index, header.term, header.epoch)),
                ("level", header.level.to_string()),
                ("state", hash(&backup)),
                ("size", format!("{}, {} rows", size_text(backup.bytes), header.rows)),
            ],
            None,
        )
    })
}

fn told(file: &Path, backup: &Backup) -> Value {
    let header = &backup.header;
    json!({
        "file": file.display().to_string(),
        "cluster": header.cluster,
        "epoch": header.epoch,
        "level": header.level,
        "index": header.index,
        "term": header.term,
        "hash": hash(backup),
        "made_at_millis": header.made_at.0,
        "rows": header.rows,
        "size_bytes": backup.bytes,
    })
}

fn hash(backup: &Backup) -> String {
    backup.header.hash.iter().map(|byte| format!("{byte:02x}")).collect()
}
