//! Checks of what people type: each refusal names the field, the value and what is allowed.

use crate::{Capacity, Noun, Rejection};

/// What cloud-init reads in one go; larger things belong in an image.
pub const MAX_USER_DATA_BYTES: usize = 16 << 10;
/// Longest value that an error message repeats.
const SHOWN: usize = 80;

pub(super) fn invalid(field: &str, value: impl ToString, allowed: impl Into<String>) -> Rejection {
    Rejection::Invalid { field: field.into(), value: shown(value), allowed: allowed.into() }
}

/// What a refusal repeats of what was typed: it ends on somebody's terminal.
fn shown(value: impl ToString) -> String {
    value.to_string().chars().take(SHOWN).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A DNS label, because names become host names of guests.
pub(super) fn label(field: &str, name: &str) -> Result<(), Rejection> {
    named(field, name, "-", "a DNS label")
}

/// A label that may also hold dots and underscores: `debian-12.5`.
pub(super) fn dotted(field: &str, name: &str) -> Result<(), Rejection> {
    named(field, name, "-._", "a name")
}

/// A name that reads as another row's id would hide that row.
pub(super) fn not_an_id<Id: std::str::FromStr>(field: &str, name: &str) -> Result<(), Rejection> {
    if name.parse::<Id>().is_err() { Ok(()) } else { Err(invalid(field, name, "a name that does not look like an id")) }
}

fn named(field: &str, name: &str, inner: &str, what: &str) -> Result<(), Rejection> {
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = name.as_bytes();
    let good = (1..=63).contains(&bytes.len())
        && edge(bytes[0])
        && edge(bytes[bytes.len() - 1])
        && bytes.iter().all(|b| edge(*b) || inner.as_bytes().contains(b));
    if good {
        return Ok(());
    }
    let inner: Vec<String> = inner.chars().map(|c| format!("'{c}'")).collect();
    let allowed = format!(
        "{what} of 1 to 63 characters: lower-case letters, digits and {}, with a letter or digit first and last",
        inner.join(", ")
    );
    Err(invalid(field, name, allowed))
}

/// Text on one line, without control characters.
pub(super) fn line(field: &str, text: &str, most: usize) -> Result<(), Rejection> {
    if !text.is_empty() && text.len() <= most && !text.chars().any(char::is_control) {
        return Ok(());
    }
    Err(invalid(field, text, format!("1 to {most} bytes of text without control characters")))
}

pub(super) fn between(field: &str, value: u64, min: u64, max: u64) -> Result<(), Rejection> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(invalid(field, value, format!("{min} to {max}"))) }
}

/// Sizes that a host could have; the upper bounds keep every sum far from overflow.
pub(super) fn size(size: Capacity, least_memory: u64) -> Result<(), Rejection> {
    between("vcpus", size.vcpus, 1, 1024)?;
    between("memory", size.memory_bytes, least_memory, 64 << 40)?;
    between("disk", size.disk_bytes, 0, 1 << 50)
}

pub(super) fn ssh_keys(keys: &[String]) -> Result<(), Rejection> {
    between("ssh_keys", keys.len() as u64, 0, 16)?;
    for key in keys {
        line("ssh_key", key, 16 << 10)?;
        if key.split_whitespace().count() < 2 {
            return Err(invalid("ssh_key", key, "a public key as in authorized_keys: type, key, comment"));
        }
    }
    Ok(())
}

/// Of all keys of a machine: its host is told of them, and of all its machines in one message.
pub(super) fn ssh_keys_together(keys: &[String]) -> Result<(), Rejection> {
    let bytes = keys.iter().map(String::len).sum::<usize>();
    between("ssh_keys (bytes together)", bytes as u64, 0, 16 << 10)
}

pub(super) fn user_data(text: &str) -> Result<(), Rejection> {
    let odd = |c: char| c.is_control() && !matches!(c, '\n' | '\r' | '\t');
    if text.len() > MAX_USER_DATA_BYTES || text.chars().any(odd) {
        let allowed = format!("at most {MAX_USER_DATA_BYTES} bytes of text without control characters");
        return Err(invalid("user_data", text, allowed));
    }
    Ok(())
}

pub(super) fn missing(noun: Noun, name: impl ToString) -> Rejection {
    Rejection::NotFound { noun, name: shown(name) }
}

pub(super) fn exists(noun: Noun, name: &str) -> Rejection {
    Rejection::Exists { noun, name: name.into() }
}

pub(super) fn in_use(noun: Noun, name: &str, by: String) -> Rejection {
    Rejection::InUse { noun, name: name.into(), by }
}
