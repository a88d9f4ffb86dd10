//! Decoded footers of data files, with their page indexes, in memory.
//!
//! Owns: which are kept, within a bound of bytes, least recently used out first. Does not own: how one is read
//! ([`crate::parquet_read`]). The key holds the storage root, since two storages may have equal paths, and the size that
//! the manifest says, so that a file that is other than its entry is looked at again.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use object_store::path::Path;
use parquet::file::metadata::ParquetMetaData;

/// What an entry takes beside footer and path.
const ENTRY_BYTES: usize = 256;

/// Which file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) root: Arc<str>,
    pub(crate) path: Path,
    pub(crate) size: u64,
}

/// What was found since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FooterCounts {
    /// Footers that were there.
    pub hits: u64,
    /// Footers that had to be read.
    pub misses: u64,
    /// Bytes that the kept ones take now.
    pub bytes: u64,
}

/// Decoded footers. Clones share one cache; the default one keeps nothing.
#[derive(Clone, Debug, Default)]
pub struct Footers(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    bytes_max: usize,
    kept: HashMap<Arc<Key>, Kept>,
    /// By when they were last used.
    order: BTreeMap<u64, Arc<Key>>,
    now: u64,
    counts: FooterCounts,
    bytes: usize,
}

#[derive(Debug)]
struct Kept {
    footer: Arc<ParquetMetaData>,
    bytes: usize,
    used: u64,
}

impl Footers {
    /// Keeps at most `bytes_max` bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self(Arc::new(Mutex::new(State { bytes_max, ..State::default() })))
    }

    /// What was found so far.
    #[must_use]
    pub fn counts(&self) -> FooterCounts {
        let state = self.state();
        FooterCounts { bytes: state.bytes as u64, ..state.counts }
    }

    pub(crate) fn get(&self, key: &Key) -> Option<Arc<ParquetMetaData>> {
        self.state().get(key)
    }

    pub(crate) fn keep(&self, key: Key, footer: &Arc<ParquetMetaData>) {
        self.state().keep(key, footer);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic between two lines that hold the lock leaves at worst an entry that is never evicted.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn get(&mut self, key: &Key) -> Option<Arc<ParquetMetaData>> {
        let Some(kept) = self.kept.get_mut(key) else {
            self.counts.misses += 1;
            return None;
        };
        self.counts.hits += 1;
        self.now += 1;
        if let Some(key) = self.order.remove(&kept.used) {
            kept.used = self.now;
            self.order.insert(self.now, key);
        }
        Some(Arc::clone(&kept.footer))
    }

    fn keep(&mut self, key: Key, footer: &Arc<ParquetMetaData>) {
        let bytes = footer.memory_size() + key.path.as_ref().len() + ENTRY_BYTES;
        if bytes > self.bytes_max {
            return;
        }
        let key = Arc::new(key);
        self.now += 1;
        let kept = Kept { footer: Arc::clone(footer), bytes, used: self.now };
        // Two that missed it at once both bring it.
        if let Some(before) = self.kept.insert(Arc::clone(&key), kept) {
            self.order.remove(&before.used);
            self.bytes -= before.bytes;
        }
        self.order.insert(self.now, key);
        self.bytes += bytes;
        while self.bytes > self.bytes_max {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            if let Some(gone) = self.kept.remove(&oldest) {
                self.bytes -= gone.bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use parquet::file::metadata::FileMetaData;
    use parquet::schema::types::{SchemaDescriptor, Type};

    use super::*;

    fn footer(rows: i64) -> Arc<ParquetMetaData> {
        let schema = Arc::new(Type::group_type_builder("schema").build().unwrap());
        let file = FileMetaData::new(1, rows, None, None, Arc::new(SchemaDescriptor::new(schema)), None);
        Arc::new(ParquetMetaData::new(file, Vec::new()))
    }

    fn key(root: &str, path: &str, size: u64) -> Key {
        Key { root: root.into(), path: path.into(), size }
    }

    fn rows(footers: &Footers, key: &Key) -> Option<i64> {
        footers.get(key).map(|footer| footer.file_metadata().num_rows())
    }

    #[test]
    fn equal_paths_in_two_roots_and_other_sizes_are_other_footers() {
        let footers = Footers::new(1 << 20);
        footers.keep(key("a", "x", 1), &footer(1));
        footers.keep(key("b", "x", 1), &footer(2));
        assert_eq!(rows(&footers, &key("a", "x", 1)), Some(1));
        assert_eq!(rows(&footers, &key("b", "x", 1)), Some(2));
        assert_eq!(rows(&footers, &key("a", "x", 2)), None);
        assert_eq!((footers.counts().hits, footers.counts().misses), (2, 1));
    }

    #[test]
    fn bytes_stay_within_the_bound_and_what_was_used_last_stays() {
        let each = footer(0).memory_size() + 1 + ENTRY_BYTES;
        let footers = Footers::new(3 * each);
        for path in ["a", "b", "c"] {
            footers.keep(key("r", path, 1), &footer(0));
        }
        footers.get(&key("r", "a", 1)).unwrap();
        // Again: nothing grows.
        footers.keep(key("r", "c", 1), &footer(0));
        footers.keep(key("r", "d", 1), &footer(0));
        assert_eq!(footers.counts().bytes, 3 * each as u64);
        let there = ["a", "b", "c", "d"].map(|path| rows(&footers, &key("r", path, 1)).is_some());
        assert_eq!(there, [true, false, true, true]);
        let nothing = Footers::default();
        nothing.keep(key("r", "a", 1), &footer(0));
        assert_eq!(nothing.counts().bytes, 0);
    }
}
