//! A table of rows in memory that knows which rows changed since they were last taken to disk.

use std::{
    borrow::Borrow,
    collections::{BTreeMap, BTreeSet},
    ops::RangeBounds,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A row as it goes to disk: table number, encoded key, encoded row or `None` when it was deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowChange {
    pub table: u8,
    pub key: Vec<u8>,
    pub row: Option<Vec<u8>>,
}

#[derive(Clone, Debug)]
pub struct Table<K, V> {
    number: u8,
    rows: BTreeMap<K, Held<V>>,
    /// Since the last `note`, in the order in which they changed.
    fresh: Vec<K>,
    /// Before that, since the last `drain`.
    changed: BTreeSet<K>,
}

/// A row with the hash that it adds to the hash of the state.
#[derive(Clone, Debug)]
struct Held<V> {
    row: V,
    hash: u128,
}

#[derive(Debug, thiserror::Error)]
#[error("a row of table {table} cannot be read: {reason}")]
pub struct LoadError {
    pub table: u8,
    pub reason: String,
}

impl<K: Ord + Clone + Serialize + DeserializeOwned, V: Serialize + DeserializeOwned> Table<K, V> {
    pub(crate) fn new(number: u8) -> Self {
        Self { number, rows: BTreeMap::new(), fresh: Vec::new(), changed: BTreeSet::new() }
    }

    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.rows.get(key).map(|held| &held.row)
    }
    pub fn contains(&self, key: &K) -> bool {
        self.rows.contains_key(key)
    }
    pub fn len(&self) -> usize {
        self.rows.len()
    }
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.rows.iter().map(|(key, held)| (key, &held.row))
    }
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> {
        self.rows.values().map(|held| &held.row)
    }
    pub fn range<R: RangeBounds<K>>(&self, range: R) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.rows.range(range).map(|(key, held)| (key, &held.row))
    }

    pub(crate) fn put(&mut self, key: K, row: V) -> Option<V> {
        self.fresh.push(key.clone());
        match self.rows.get_mut(&key) {
            Some(held) => Some(std::mem::replace(&mut held.row, row)),
            None => {
                self.rows.insert(key, Held { row, hash: 0 });
                None
            }
        }
    }

    /// Changes a row in place; `None` when there is no such row.
    pub(crate) fn update<T>(&mut self, key: &K, change: impl FnOnce(&mut V) -> T) -> Option<T> {
        let held = self.rows.get_mut(key)?;
        self.fresh.push(key.clone());
        Some(change(&mut held.row))
    }

    /// The hash of the removed row leaves the state's hash at once: there is no place left to keep it.
    pub(crate) fn remove(&mut self, key: &K, state_hash: &mut u128) -> Option<V> {
        let held = self.rows.remove(key)?;
        *state_hash = state_hash.wrapping_sub(held.hash);
        self.fresh.push(key.clone());
        Some(held.row)
    }

    /// Shows each row that changed since the last call, once, in the order of keys; `None` when it is gone.
    pub(crate) fn note(&mut self, mut show: impl FnMut(&K, Option<&V>)) {
        if self.fresh.len() > 1 {
            self.fresh.sort_unstable();
            self.fresh.dedup();
        }
        for key in self.fresh.drain(..) {
            show(&key, self.rows.get(&key).map(|held| &held.row));
            self.changed.insert(key);
        }
    }

    pub(crate) fn drain(&mut self, changes: &mut Vec<RowChange>, state_hash: &mut u128) {
        self.changed.extend(self.fresh.drain(..));
        for key in std::mem::take(&mut self.changed) {
            let encoded_key = encode(&key);
            let row = self.rows.get_mut(&key).map(|held| {
                let row = encode(&held.row);
                let hash = row_hash(self.number, &encoded_key, &row);
                *state_hash = state_hash.wrapping_sub(held.hash).wrapping_add(hash);
                held.hash = hash;
                row
            });
            changes.push(RowChange { table: self.number, key: encoded_key, row });
        }
    }

    /// Every row as it goes to disk.
    pub(crate) fn encoded(&self) -> impl Iterator<Item = RowChange> {
        let row = |(key, held): (&K, &Held<V>)| RowChange {
            table: self.number,
            key: encode(key),
            row: Some(encode(&held.row)),
        };
        self.rows.iter().map(row)
    }

    /// After a load, what the default state had put is no change any more.
    pub(crate) fn settle(&mut self) {
        self.fresh.clear();
        self.changed.clear();
    }

    pub(crate) fn load(&mut self, key: &[u8], row: &[u8], state_hash: &mut u128) -> Result<&V, LoadError> {
        let refuse = |e: postcard::Error| LoadError { table: self.number, reason: e.to_string() };
        let decoded_key: K = decode(key).map_err(refuse)?;
        let decoded: V = decode(row).map_err(refuse)?;
        let hash = row_hash(self.number, key, row);
        *state_hash = state_hash.wrapping_add(hash);
        let held = self.rows.entry(decoded_key).insert_entry(Held { row: decoded, hash });
        Ok(&held.into_mut().row)
    }
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_stdvec(value).expect("no row has a type that postcard refuses")
}

pub(crate) fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, postcard::Error> {
    let (value, rest) = postcard::take_from_bytes(bytes)?;
    if rest.is_empty() { Ok(value) } else { Err(postcard::Error::DeserializeBadEncoding) }
}

/// The state's hash is the sum of these, so it does not depend on the order or the batches in which rows changed.
fn row_hash(table: u8, key: &[u8], row: &[u8]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[table]).update(&(key.len() as u64).to_le_bytes()).update(key).update(row);
    let mut half = [0; 16];
    half.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(half)
}
