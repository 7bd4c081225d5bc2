//! Answers on the terminal: a table that fits it, or the exact values as JSON.

use std::{
    borrow::Cow,
    io::{self, Write},
};

use api::{error::ApiError, proto::ReadAt};
use clap::ValueEnum;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets::NOTHING};
use serde::{Deserialize, Serialize};

use crate::quantity::duration_text;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    #[default]
    Table,
    Json,
}

/// Rows under a header; columns whose name starts with `>` are aligned to the right.
pub struct Rows {
    header: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

impl Rows {
    pub fn new(header: &'static [&'static str], rows: impl IntoIterator<Item = Vec<String>>) -> Self {
        Self { header, rows: rows.into_iter().collect() }
    }

    /// Without trailing spaces, ends without a line break. `width` is for tests; else it is the terminal's, and
    /// unlimited in a pipe.
    pub fn render(&self, width: Option<u16>) -> String {
        let mut table = plain(width);
        table.set_header(self.header.iter().map(|name| Cell::new(name.trim_start_matches('>'))));
        for row in &self.rows {
            table.add_row(row.iter().map(|value| Cell::new(printable(value))));
        }
        for (index, name) in self.header.iter().enumerate() {
            if let (true, Some(column)) = (name.starts_with('>'), table.column_mut(index)) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        finish(&mut table)
    }
}

/// One thing: a name and a value a line.
pub fn details(pairs: &[(&str, String)], width: Option<u16>) -> String {
    let mut table = plain(width);
    for (name, value) in pairs.iter().filter(|(_, value)| !value.is_empty()) {
        table.add_row([Cell::new(name), Cell::new(printable(value))]);
    }
    finish(&mut table)
}

/// Prints the value as JSON, or the text that stands for it.
///
/// # Errors
/// When the output cannot be written.
pub fn print<T: Serialize + ?Sized>(format: Format, value: &T, text: impl FnOnce() -> String) -> Result<(), ApiError> {
    let text = match format {
        Format::Table => text(),
        Format::Json => serde_json::to_string_pretty(value).map_err(|e| ApiError::internal(e.to_string()))?,
    };
    write(format!("{text}\n").as_bytes())
}

/// # Errors
/// When the output cannot be written. A reader that left, as `head` does, has all it wanted.
pub fn write(bytes: &[u8]) -> Result<(), ApiError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(ApiError::new("failed", format!("cannot write the output: {e}")))
        }
        _ => Ok(()),
    }
}

/// Says on the error stream how old a stale answer is; in JSON it is in the answer.
pub fn label(format: Format, read_at: Option<&ReadAt>) {
    if let (Format::Table, Some(at)) = (format, read_at.filter(|at| at.stale)) {
        eprintln!("stale: as of index {}, {} ago", at.index, duration_text(at.age_millis));
    }
}

/// The text without characters that could drive a terminal: they are shown as escapes. A line break stays.
pub fn printable(text: &str) -> Cow<'_, str> {
    let unsafe_character = |c: char| c.is_control() && c != '\n';
    if !text.contains(unsafe_character) {
        return Cow::Borrowed(text);
    }
    let escaped = |c: char| if unsafe_character(c) { c.escape_default().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(escaped).collect())
}

fn plain(width: Option<u16>) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    if let Some(width) = width {
        table.set_width(width);
    }
    table
}

fn finish(table: &mut Table) -> String {
    // Cells are padded on both sides; the first needs none on its left.
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machines() -> Rows {
        let row = |cells: [&str; 3]| cells.map(String::from).to_vec();
        Rows::new(&["NAME", "STATUS", ">MEMORY"], [row(["web", "running", "512 MiB"]), row(["db", "failed", "4 GiB"])])
    }

    #[test]
    fn a_table_is_plain_text_in_columns() {
        assert_eq!(machines().render(None), "NAME  STATUS    MEMORY\nweb   running  512 MiB\ndb    failed     4 GiB");
        assert_eq!(Rows::new(&["NAME"], []).render(None), "NAME");
        assert_eq!(details(&[("name", "web".into()), ("node", String::new())], None), "name  web");
    }

    #[test]
    fn a_table_fits_its_width() {
        let long = Rows::new(&["NAME", "REASON"], [vec!["web".into(), "no node has room for it ".repeat(10)]]);
        let text = long.render(Some(60));
        assert!(text.lines().count() > 3 && text.lines().all(|line| line.chars().count() <= 60), "{text}");
    }

    #[test]
    fn nothing_that_drives_a_terminal_reaches_it() {
        assert_eq!(printable("a\u{1b}[2Jb\0\u{9b}"), "a\\u{1b}[2Jb\\u{0}\\u{9b}");
        assert_eq!(printable("é 漢\n"), "é 漢\n");
    }
}
