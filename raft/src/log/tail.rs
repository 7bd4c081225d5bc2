//! The last entries of the log in memory: each is read once for every follower and once for `apply`, moments after it
//! was written. What is on disk decides; this only saves reading, checking and decoding it again.

use std::{collections::VecDeque, ops::Range};

use openraft::EntryPayload;

use crate::dialect::Entry;

/// Half a second of 10,000 writes of 256 bytes; who is further behind reads the tables.
const MAX_BYTES: usize = 4 << 20;
/// What an entry costs besides its bytes, about.
const ENTRY_BYTES: usize = 128;

/// A gapless run that ends with the last entry of the log, or nothing.
#[derive(Default)]
pub struct Tail {
    entries: VecDeque<Entry>,
    bytes: usize,
}

impl Tail {
    /// `entries` were written, in order.
    pub fn append(&mut self, entries: Vec<Entry>) {
        let follows = |last: &Entry, next: &Entry| last.log_id.index + 1 == next.log_id.index;
        if let (Some(last), Some(next)) = (self.entries.back(), entries.first())
            && !follows(last, next)
        {
            *self = Self::default();
        }
        self.bytes += entries.iter().map(size).sum::<usize>();
        self.entries.extend(entries);
        while self.bytes > MAX_BYTES
            && let Some(first) = self.entries.pop_front()
        {
            self.bytes -= size(&first);
        }
    }

    /// Entries from `from` on are no longer the log's.
    pub fn truncate_from(&mut self, from: u64) {
        let kept = self.entries.partition_point(|entry| entry.log_id.index < from);
        self.bytes -= self.entries.drain(kept..).map(|entry| size(&entry)).sum::<usize>();
    }

    /// Entries up to `upto` are no longer the log's.
    pub fn purge(&mut self, upto: u64) {
        let gone = self.entries.partition_point(|entry| entry.log_id.index <= upto);
        self.bytes -= self.entries.drain(..gone).map(|entry| size(&entry)).sum::<usize>();
    }

    /// The entries of `range`, up to about `max_bytes` but at least one; `None` when they are not all here.
    pub fn read(&self, range: &Range<u64>, max_bytes: usize) -> Option<Vec<Entry>> {
        let (first, last) = (self.entries.front()?.log_id.index, self.entries.back()?.log_id.index);
        // One that is just being written is asked of the tables, where it is first.
        if range.start < first || range.end > last + 1 || range.end <= range.start {
            return None;
        }
        let mut bytes = 0;
        let within = |entry: &&Entry| {
            let before = bytes;
            bytes += size(entry);
            before == 0 || bytes <= max_bytes
        };
        let wanted = self.entries.range((range.start - first) as usize..(range.end - first) as usize);
        Some(wanted.take_while(within).cloned().collect())
    }
}

fn size(entry: &Entry) -> usize {
    let own = match &entry.payload {
        EntryPayload::Normal(encoded) => encoded.0.len(),
        EntryPayload::Blank | EntryPayload::Membership(_) => 0,
    };
    ENTRY_BYTES + own
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::dialect::{EncodedEntry, LeaderId, LogId};

    fn entries(range: Range<u64>, term: u64) -> Vec<Entry> {
        let entry = |index| Entry {
            log_id: LogId { leader_id: LeaderId { term, node_id: 1 }, index },
            payload: EntryPayload::Normal(EncodedEntry(Bytes::from(vec![0; 1000]))),
        };
        range.map(entry).collect()
    }

    fn indexes(read: Option<Vec<Entry>>) -> Option<Vec<u64>> {
        Some(read?.iter().map(|entry| entry.log_id.index).collect())
    }

    #[test]
    fn it_gives_what_it_has_whole_or_nothing() {
        let mut tail = Tail::default();
        assert_eq!(tail.read(&(5..7), usize::MAX), None);
        tail.append(entries(5..8, 1));
        tail.append(entries(8..10, 1));
        assert_eq!(indexes(tail.read(&(5..10), usize::MAX)), Some(vec![5, 6, 7, 8, 9]));
        assert_eq!(indexes(tail.read(&(6..10), 2500)), Some(vec![6, 7]));
        assert_eq!(indexes(tail.read(&(6..10), 1)), Some(vec![6]), "at least one");
        assert_eq!([4..6, 9..11, 7..7].map(|range| tail.read(&range, usize::MAX)), [None, None, None]);
    }

    #[test]
    fn it_forgets_what_the_log_does() {
        let mut tail = Tail::default();
        tail.append(entries(1..10, 1));
        tail.truncate_from(7);
        tail.append(entries(7..8, 2));
        let read = tail.read(&(6..8), usize::MAX).unwrap();
        assert_eq!(read.iter().map(|entry| entry.log_id.leader_id.term).collect::<Vec<_>>(), [1, 2]);
        tail.purge(3);
        assert_eq!(tail.read(&(3..8), usize::MAX), None);
        assert_eq!(indexes(tail.read(&(4..8), usize::MAX)), Some(vec![4, 5, 6, 7]));
        // After a snapshot the log goes on elsewhere.
        tail.append(entries(90..92, 3));
        assert_eq!(tail.read(&(4..8), usize::MAX), None);
        assert_eq!(indexes(tail.read(&(90..92), usize::MAX)), Some(vec![90, 91]));
        tail.truncate_from(0);
        assert_eq!((tail.bytes, tail.entries.len()), (0, 0));
    }

    #[test]
    fn it_is_bounded() {
        let mut tail = Tail::default();
        for at in 0..10 {
            tail.append(entries(at * 1000..(at + 1) * 1000, 1));
        }
        assert!(tail.bytes <= MAX_BYTES && tail.entries.len() > 3000, "{} of {}", tail.bytes, tail.entries.len());
        assert_eq!(tail.bytes, tail.entries.iter().map(size).sum::<usize>());
        assert!(tail.read(&(9999..10000), usize::MAX).is_some());
    }
}
