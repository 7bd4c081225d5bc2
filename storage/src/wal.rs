//! A closer look at RocksDB's write-ahead log before it is opened.
//!
//! In the last 32 KiB of the file RocksDB takes a damaged length for a torn tail, and silently drops the acknowledged
//! records behind it. A tail that a crash tore has nothing intact behind the tear, so an intact record there means
//! damage. (The file systems in use write data before they extend a file over it, so a crash leaves no such record.)
//!
//! The format is that of RocksDB's `db/log_format.h`: blocks of 32 KiB with records that do not cross them,
//! `masked crc32c of type and payload u32 | length u16 | type u8 | payload`, little-endian. Log files are not recycled
//! here, so the longer header of recycled ones does not occur.

use std::{fs, path::Path};

use crate::{directory, failure::StorageError};

const BLOCK_BYTES: usize = 32 << 10;
const HEADER_BYTES: usize = 7;
const CRC_MASK: u32 = 0xa282_ead8;

/// Refuses a log directory whose write-ahead log has intact records behind a broken one.
///
/// # Errors
/// When it has, or when it cannot be read.
pub fn check(directory: &Path) -> Result<(), StorageError> {
    for (name, path) in directory::entries(directory)? {
        let number = name.strip_suffix(".log").filter(|n| n.bytes().all(|b| b.is_ascii_digit()));
        if number.is_none_or(str::is_empty) {
            continue;
        }
        let bytes = fs::read(&path).map_err(StorageError::file(&path))?;
        if let Some(at) = damage(&bytes) {
            return Err(StorageError::damaged(format!("byte {at} or later of the write-ahead log '{name}'")));
        }
    }
    Ok(())
}

/// Where the first broken record is, if an intact one follows it.
fn damage(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let left = BLOCK_BYTES - at % BLOCK_BYTES;
        if left < HEADER_BYTES {
            at += left;
        }
        match intact(bytes, at) {
            Some(next) => at = next,
            None => break,
        }
    }
    // A record ends with its block, so the next one begins in this block or at the start of a later one.
    let block_end = (at / BLOCK_BYTES + 1) * BLOCK_BYTES;
    let in_block = at + 1..block_end.min(bytes.len());
    let later = (block_end..bytes.len()).step_by(BLOCK_BYTES);
    in_block.chain(later).any(|behind| intact(bytes, behind).is_some()).then_some(at)
}

/// The end of the record that begins at `at`, if it is whole and its checksum is right.
fn intact(bytes: &[u8], at: usize) -> Option<usize> {
    let header = bytes.get(at..at + HEADER_BYTES)?;
    let stored = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let length = usize::from(u16::from_le_bytes([header[4], header[5]]));
    let end = at + HEADER_BYTES + length;
    let in_block = at % BLOCK_BYTES + HEADER_BYTES + length <= BLOCK_BYTES;
    // Type 0 is the zeros of preallocated space.
    if header[6] == 0 || !in_block || end > bytes.len() {
        return None;
    }
    let crc = crc32c(&bytes[at + HEADER_BYTES - 1..end]);
    (crc.rotate_right(15).wrapping_add(CRC_MASK) == stored).then_some(end)
}

/// CRC-32C (Castagnoli), reflected, a byte at a time: some hundred megabytes a second, once per start.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| TABLE[usize::from((crc as u8) ^ byte)] ^ (crc >> 8))
}

static TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc32c() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    fn record(payload: &[u8]) -> Vec<u8> {
        let mut content = vec![1];
        content.extend_from_slice(payload);
        let crc = crc32c(&content).rotate_right(15).wrapping_add(CRC_MASK);
        let length = u16::try_from(payload.len()).unwrap();
        [&crc.to_le_bytes()[..], &length.to_le_bytes(), &content].concat()
    }

    #[test]
    fn any_flipped_bit_before_the_last_record_is_damage_and_a_cut_is_not() {
        let records: Vec<Vec<u8>> = (0..20u8).map(|i| record(&[i; 90])).collect();
        let good = records.concat();
        let last = good.len() - records[19].len();
        assert_eq!(damage(&good), None);
        for at in 0..last {
            for bit in [0x01, 0x40, 0x80] {
                let mut bad = good.clone();
                bad[at] ^= bit;
                assert!(damage(&bad).is_some(), "flipped {bit:#x} at {at}");
            }
        }
        for cut in 0..good.len() {
            assert_eq!(damage(&good[..cut]), None, "cut at {cut}");
            assert_eq!(damage(&[&good[..cut], &[0; 5000][..]].concat()), None, "zeros from {cut}");
        }
    }
}
