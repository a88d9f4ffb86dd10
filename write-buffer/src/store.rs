//! RocksDB and the states of instances: everything but the committer's rounds.
//!
//! Owns: families, options, reads, publication, removal of flushed rows, pod state.
//! Does not own: stamping and writing rows ([`crate::committer`]), rebuilding states at open ([`crate::recovery`]).
//!
//! After a crash: a publication is there whole or not at all; removal of rows is not synced, and what it missed is
//! removed at the next open.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use kalamdb_model::key::KeyRange;
use kalamdb_model::{Generation, InstanceId, key};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, DBRawIterator,
    DBRecoveryMode, ReadOptions, Snapshot, WriteBatch, WriteOptions,
};

use crate::buffer::Adopted;
use crate::error::{OpenError, ReadError};
use crate::keys;
use crate::lock::DirectoryLock;
use crate::record::{self, Part, Record};
use crate::row::Header;
use crate::state::{Counters, State, States};

/// Rows.
const ROWS: &str = "rows";
/// Records of instances, see [`crate::record`].
const INSTANCES: &str = "instances";
/// Pod state: the format and what [`Store::state_put`] stores.
const DEFAULT: &str = "default";

const FORMAT_KEY: &[u8] = b"format";
const FORMAT: &str = "1";
/// In front of keys of pod state, so that none is ever taken for another key of the family.
const STATE_PREFIX: &str = "state/";

const BLOCK_CACHE_BYTES: usize = 128 << 20;
const WRITE_BUFFER_BYTES: usize = 64 << 20;
const WRITE_BUFFERS: i32 = 4;
const SMALL_WRITE_BUFFER_BYTES: usize = 8 << 20;
/// Replay of 229 MB takes 0.85 s; more than this would make a restart slow.
const WAL_BYTES_MAX: u64 = 512 << 20;
const OPEN_FILES_MAX: i32 = 512;
const BLOOM_BITS_PER_KEY: f64 = 10.0;
/// Share of a memtable: 1.3 MB of 64 make the look-up of a new key a bit test.
const MEMTABLE_BLOOM_RATIO: f64 = 0.02;
const RECLAIM_BATCH_ROWS: usize = 4_096;

/// The rows of one generation.
struct Source<'a> {
    generation: Generation,
    rows: DBRawIterator<'a>,
}

/// The rows of all instances as they were when this was made: what a client was told to be written before is there, of
/// whatever instance, and nothing that was written later. RocksDB keeps what is removed meanwhile until it is dropped.
pub struct Moment<'a> {
    store: &'a Store,
    snapshot: Snapshot<'a>,
}

/// The rows of an instance in its generations above one, as of a [`Moment`].
pub struct Generations<'a> {
    moment: &'a Moment<'a>,
    instance: &'a InstanceId,
    after: Generation,
    active: Generation,
}

/// The newest version of a row, if there is one, and its generation.
pub type Found = Option<(Generation, Vec<u8>)>;

/// Sees one row at a time: generation, primary key, stored bytes. Ends the scan with `Break`.
pub type Visit<'a> = &'a mut dyn FnMut(Generation, &[u8], &[u8]) -> ControlFlow<()>;

/// The open database.
pub(crate) struct Store {
    pub(crate) states: States,
    db: DB,
    // After `db`: fields are dropped in order, and the directory is free only when RocksDB has left it.
    _lock: DirectoryLock,
}

impl Store {
    /// Opens or makes the database in `directory`.
    pub(crate) fn open(directory: &Path) -> Result<Self, OpenError> {
        make_directory(directory)?;
        let lock = DirectoryLock::take(directory)?;
        let path = directory.join("db");
        let failed = |source| OpenError::Database { path: path.clone(), source };
        let db = DB::open_cf_descriptors(&database_options(), &path, families()).map_err(failed)?;
        sync_directory(directory)?;
        let store = Self { states: States::new(), db, _lock: lock };
        store.check_format(&path)?;
        store.recover().map_err(|source| OpenError::Stored { path, source })?;
        Ok(store)
    }

    /// Refuses what another version wrote, and marks a new database.
    fn check_format(&self, path: &Path) -> Result<(), OpenError> {
        let failed = |source| OpenError::Database { path: path.to_owned(), source };
        let found = self.db.get_cf(self.family(DEFAULT), FORMAT_KEY).map_err(failed)?;
        match found {
            Some(found) if found == FORMAT.as_bytes() => Ok(()),
            None if self.is_empty().map_err(failed)? => {
                self.db.put_cf_opt(self.family(DEFAULT), FORMAT_KEY, FORMAT, &synced()).map_err(failed)
            }
            other => Err(OpenError::Format {
                path: path.to_owned(),
                found: String::from_utf8_lossy(&other.unwrap_or_default()).into_owned(),
                supported: FORMAT,
            }),
        }
    }

    fn is_empty(&self) -> Result<bool, rocksdb::Error> {
        for family in [DEFAULT, ROWS, INSTANCES] {
            let mut iterator = self.db.raw_iterator_cf(self.family(family));
            iterator.seek_to_first();
            iterator.status()?;
            if iterator.valid() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("every family is named when the database is opened")
    }

    /// An iterator over the stored rows in `[from, to)`, positioned on the first. It sees the database as of this call.
    pub(crate) fn rows(&self, from: Vec<u8>, to: Option<Vec<u8>>) -> DBRawIterator<'_> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(from.as_slice());
        if let Some(to) = to {
            options.set_iterate_upper_bound(to);
        }
        let mut iterator = self.db.raw_iterator_cf_opt(self.family(ROWS), options);
        iterator.seek(from);
        iterator
    }

    /// Bytes of the value that is stored under the whole key of a row.
    pub(crate) fn row_bytes(&self, key: &[u8]) -> Result<Option<usize>, ReadError> {
        let found = self.db.get_pinned_cf(self.family(ROWS), key);
        Ok(found.map_err(reading)?.map(|value| value.len()))
    }

    pub(crate) fn put_row(&self, batch: &mut WriteBatch, key: &[u8], value: &[u8]) {
        batch.put_cf(self.family(ROWS), key, value);
    }

    pub(crate) fn put_progress(&self, batch: &mut WriteBatch, instance: &InstanceId, active: Generation, seq: i64) {
        let key = record::key(&keys::instance_prefix(instance), Part::Progress);
        batch.put_cf(self.family(INSTANCES), key, record::encode(active, seq, &[]));
    }

    /// Writes and syncs.
    pub(crate) fn write(&self, batch: WriteBatch) -> Result<(), rocksdb::Error> {
        self.db.write_opt(batch, &synced())
    }

    /// What is stored about an instance.
    pub(crate) fn record(&self, instance: &InstanceId) -> Result<Option<Record>, ReadError> {
        let prefix = keys::instance_prefix(instance);
        let get = |part| self.db.get_pinned_cf(self.family(INSTANCES), record::key(&prefix, part));
        // The publication first: a freeze in between only raises what is read next.
        let publication = get(Part::Publication).map_err(reading)?;
        let progress = get(Part::Progress).map_err(reading)?;
        record::decode(publication.as_deref(), progress.as_deref()).map_err(|source| ReadError::Record { source })
    }

    /// A copy of the state, from the record if nothing is buffered.
    fn state(&self, instance: &InstanceId) -> Result<State, ReadError> {
        if let Some(state) = self.states.of(instance).get(instance) {
            return Ok(state.clone());
        }
        Ok(State::of_record(&self.record(instance)?.unwrap_or_default()))
    }

    /// A copy of the state, which is kept in memory until [`Store::unpin`].
    pub(crate) fn pin(&self, instance: &InstanceId) -> Result<State, ReadError> {
        // The record is read under the lock: a publication that ends in between would otherwise be overlooked.
        let mut states = self.states.of(instance);
        if !states.contains_key(instance) {
            let state = State::of_record(&self.record(instance)?.unwrap_or_default());
            states.insert(instance.clone(), state);
        }
        let state = states.get_mut(instance).expect("inserted above");
        state.pinned = true;
        Ok(state.clone())
    }

    /// Ends [`Store::pin`] with what the round changed.
    pub(crate) fn unpin(&self, instance: &InstanceId, change: impl FnOnce(&mut State)) {
        self.states.update(instance, |state| {
            state.pinned = false;
            change(state);
        });
    }

    pub(crate) fn counters(&self, instance: &InstanceId) -> Result<Counters, ReadError> {
        Ok(self.state(instance)?.counters())
    }

    pub(crate) fn dirty(&self) -> Vec<(InstanceId, Counters)> {
        self.states.dirty()
    }

    pub(crate) fn moment(&self) -> Moment<'_> {
        Moment { store: self, snapshot: self.db.snapshot() }
    }

    /// By key, from the greatest if `descending`.
    fn scan_generations(
        &self,
        of: &Generations<'_>,
        range: &KeyRange,
        descending: bool,
        visit: Visit<'_>,
    ) -> Result<(), ReadError> {
        let Generations { moment, instance, after, active } = of;
        let Some(first) = after.0.checked_add(1) else { return Ok(()) };
        if range.is_empty() {
            return Ok(());
        }
        let offset = keys::generation_offset(instance);
        let generations = (first..=active.0).rev().map(Generation);
        let source = |generation| self.source(&moment.snapshot, (instance, generation), range, descending);
        let mut sources: Vec<Source<'_>> = generations.map(source).collect();
        let mut last: Vec<u8> = Vec::new();
        loop {
            let mut next: Option<(usize, &[u8])> = None;
            for (index, source) in sources.iter().enumerate() {
                let Some(key) = source.rows.key() else { continue };
                let (_, pk) = split(key, offset)?;
                // Equal keys: the newer generation comes first in the list, and wins.
                if next.is_none_or(|(_, first)| if descending { pk > first } else { pk < first }) {
                    next = Some((index, pk));
                }
            }
            let Some((newest, pk)) = next else { break };
            let value = sources[newest].rows.value().unwrap_or_default();
            if visit(sources[newest].generation, pk, value).is_break() {
                return Ok(());
            }
            last.clear();
            last.extend(pk);
            for source in &mut sources {
                let same = source
                    .rows
                    .key()
                    .is_some_and(|key| key.get(offset + keys::GENERATION_BYTES..) == Some(last.as_slice()));
                match (same, descending) {
                    (false, _) => {}
                    (true, false) => source.rows.next(),
                    (true, true) => source.rows.prev(),
                }
            }
        }
        // An iterator ends at an error, too: without this a failing disk would shorten the answer.
        sources.iter().try_for_each(|source| source.rows.status().map_err(reading))
    }

    fn source<'m>(
        &self,
        snapshot: &'m Snapshot<'_>,
        (instance, generation): (&InstanceId, Generation),
        range: &KeyRange,
        descending: bool,
    ) -> Source<'m> {
        let from = keys::row_key(instance, generation, &range.from);
        let to = match &range.to {
            Some(to) => Some(keys::row_key(instance, generation, to)),
            None => key::after(&keys::generation_prefix(instance, generation)),
        };
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(from.as_slice());
        if let Some(to) = to {
            options.set_iterate_upper_bound(to);
        }
        let mut rows = snapshot.raw_iterator_cf_opt(self.family(ROWS), options);
        if descending {
            rows.seek_to_last();
        } else {
            rows.seek(from);
        }
        Source { generation, rows }
    }

    pub(crate) fn scan_generation(
        &self,
        instance: &InstanceId,
        generation: Generation,
        visit: Visit<'_>,
    ) -> Result<(), ReadError> {
        let from = keys::generation_prefix(instance, generation);
        let to = key::after(&from);
        self.visit(instance, Generation(generation.0.saturating_sub(1)), (from, to), visit)
    }

    fn visit(
        &self,
        instance: &InstanceId,
        after: Generation,
        (from, to): (Vec<u8>, Option<Vec<u8>>),
        visit: Visit<'_>,
    ) -> Result<(), ReadError> {
        let offset = keys::generation_offset(instance);
        let mut rows = self.rows(from, to);
        // After the iterator: a removal that begins from now on is not seen by it.
        self.check_readable(instance, after)?;
        while let Some((key, value)) = rows.item() {
            let (generation, pk) = split(key, offset)?;
            if visit(generation, pk, value).is_break() {
                return Ok(());
            }
            rows.next();
        }
        // An iterator ends at an error, too: without this a failing disk would shorten the answer.
        rows.status().map_err(reading)
    }

    fn check_readable(&self, instance: &InstanceId, after: Generation) -> Result<(), ReadError> {
        let reclaimed = self.state(instance)?.reclaiming;
        if after < reclaimed { Err(ReadError::Reclaimed { after, reclaimed }) } else { Ok(()) }
    }

    pub(crate) fn get_each(
        &self,
        instance: &InstanceId,
        after: Generation,
        pks: &[&[u8]],
    ) -> Result<Vec<Found>, ReadError> {
        // Before the look-ups it bounds their number; what counts is the same check after them.
        self.check_readable(instance, after)?;
        let active = self.state(instance)?.active;
        let mut key = keys::row_key(instance, Generation(0), &[]);
        let (offset, start) = (keys::generation_offset(instance), key.len());
        let mut found = Vec::with_capacity(pks.len());
        for pk in pks {
            key.truncate(start);
            key.extend_from_slice(pk);
            let mut newest = None;
            for generation in (after.0.saturating_add(1)..=active.0).rev().map(Generation) {
                keys::stamp(&mut key, offset, generation);
                if let Some(value) = self.db.get_pinned_cf(self.family(ROWS), &key).map_err(reading)? {
                    newest = Some((generation, value.to_vec()));
                    break;
                }
            }
            found.push(newest);
        }
        // No removal had begun when this is checked, so none had when the rows were looked up.
        self.check_readable(instance, after)?;
        Ok(found)
    }

    pub(crate) fn publish(&self, instance: &InstanceId, flushed: Generation, manifest: &[u8]) -> Result<(), ReadError> {
        let _publishing = self.states.publishing(instance);
        let State { flushed: stored, active, last_seq, .. } = self.state(instance)?;
        if flushed < stored {
            return Err(ReadError::Stale { flushed, stored });
        }
        if flushed >= active {
            return Err(ReadError::NotFrozen { flushed, active });
        }
        let key = record::key(&keys::instance_prefix(instance), Part::Publication);
        let value = record::encode(flushed, last_seq, manifest);
        self.db
            .put_cf_opt(self.family(INSTANCES), key, value, &synced())
            .map_err(|source| ReadError::Database { operation: "publish a manifest", source })?;
        self.states.update(instance, |state| state.publish(flushed));
        Ok(())
    }

    pub(crate) fn adopt(&self, adopted: &[Adopted]) -> Result<(), ReadError> {
        let mut batch = WriteBatch::default();
        for Adopted { instance, flushed, last_seq, manifest } in adopted {
            let key = record::key(&keys::instance_prefix(instance), Part::Publication);
            batch.put_cf(self.family(INSTANCES), key, record::encode(*flushed, *last_seq, manifest));
        }
        self.write(batch).map_err(|source| ReadError::Database { operation: "take instances over", source })?;
        for Adopted { instance, flushed, last_seq, .. } in adopted {
            self.states.update(instance, |state| state.adopt(*flushed, *last_seq));
        }
        Ok(())
    }

    /// `_seq` of the newest version of a row that no file holds.
    pub(crate) fn newest_seq(&self, instance: &InstanceId, pk: &[u8]) -> Result<Option<i64>, ReadError> {
        let flushed = self.state(instance)?.flushed;
        let Some((_, value)) = self.get_each(instance, flushed, &[pk])?.pop().flatten() else { return Ok(None) };
        Ok(Some(Header::parse(&value).map_err(|source| ReadError::Row { source })?.seq))
    }

    pub(crate) fn reclaim(&self, instance: &InstanceId, up_to: Generation) -> Result<u64, ReadError> {
        let State { flushed, reclaimed, .. } = self.state(instance)?;
        if up_to > flushed {
            return Err(ReadError::NotFlushed { up_to, flushed });
        }
        if up_to <= reclaimed {
            return Ok(0);
        }
        self.states.update(instance, |state| state.reclaiming = state.reclaiming.max(up_to));
        let from = keys::generation_prefix(instance, Generation(reclaimed.0 + 1));
        let to = key::after(&keys::generation_prefix(instance, up_to));
        let removed = self.remove(from, to)?;
        self.states.update(instance, |state| state.reclaimed = state.reclaimed.max(up_to));
        Ok(removed)
    }

    /// Deletes the stored rows in `[from, to)` one by one. A range tombstone for each flushed generation would take
    /// scans of other instances from 8 µs to 9 ms.
    pub(crate) fn remove(&self, from: Vec<u8>, to: Option<Vec<u8>>) -> Result<u64, ReadError> {
        let deleting = |source| ReadError::Database { operation: "delete flushed rows", source };
        let mut rows = self.rows(from, to);
        let mut batch = WriteBatch::default();
        let mut removed = 0;
        while let Some(key) = rows.key() {
            batch.delete_cf(self.family(ROWS), key);
            removed += 1;
            if batch.len() >= RECLAIM_BATCH_ROWS {
                self.db.write(std::mem::take(&mut batch)).map_err(deleting)?;
            }
            rows.next();
        }
        rows.status().map_err(reading)?;
        self.db.write(batch).map_err(deleting)?;
        Ok(removed)
    }

    pub(crate) fn published(&self) -> Result<Vec<InstanceId>, ReadError> {
        let mut records = self.db.raw_iterator_cf(self.family(INSTANCES));
        records.seek_to_first();
        let mut found = Vec::new();
        while let Some(key) = records.key() {
            let (instance, part) = keys::parse_instance(key).map_err(|source| ReadError::Key { source })?;
            if part == [Part::Publication as u8] {
                found.push(instance);
            }
            records.next();
        }
        records.status().map_err(reading)?;
        Ok(found)
    }

    pub(crate) fn state_get(&self, key: &str) -> Result<Option<Vec<u8>>, ReadError> {
        self.db.get_cf(self.family(DEFAULT), state_key(key)).map_err(reading)
    }

    pub(crate) fn state_put(&self, key: &str, value: &[u8]) -> Result<(), ReadError> {
        self.db
            .put_cf_opt(self.family(DEFAULT), state_key(key), value, &synced())
            .map_err(|source| ReadError::Database { operation: "store pod state", source })
    }

    pub(crate) fn state_delete(&self, key: &str) -> Result<(), ReadError> {
        self.db
            .delete_cf_opt(self.family(DEFAULT), state_key(key), &synced())
            .map_err(|source| ReadError::Database { operation: "delete pod state", source })
    }

    pub(crate) fn state_scan(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, ReadError> {
        let from = state_key(prefix);
        let mut options = ReadOptions::default();
        if let Some(to) = key::after(from.as_bytes()) {
            options.set_iterate_upper_bound(to);
        }
        let mut iterator = self.db.raw_iterator_cf_opt(self.family(DEFAULT), options);
        iterator.seek(&from);
        let mut found = Vec::new();
        while let Some((key, value)) = iterator.item() {
            let key = String::from_utf8_lossy(&key[STATE_PREFIX.len()..]).into_owned();
            found.push((key, value.to_vec()));
            iterator.next();
        }
        iterator.status().map_err(reading)?;
        Ok(found)
    }
}

impl Moment<'_> {
    /// The generations of `instance` above `after`.
    ///
    /// # Errors
    /// If its state cannot be read, or such generations are being removed ([`ReadError::Reclaimed`]). What is not by
    /// now stays readable.
    pub fn generations<'m>(
        &'m self,
        instance: &'m InstanceId,
        after: Generation,
    ) -> Result<Generations<'m>, ReadError> {
        // After the snapshot, which sees no removal that begins from now on; and no generation that it has rows of is
        // missing, but one that nobody was told of.
        let State { active, reclaiming: reclaimed, .. } = self.store.state(instance)?;
        if after < reclaimed {
            return Err(ReadError::Reclaimed { after, reclaimed });
        }
        Ok(Generations { moment: self, instance, after, active })
    }
}

impl Generations<'_> {
    /// Visits the newest version of each row, deleted ones too, by key.
    ///
    /// # Errors
    /// If reading fails: never a shorter answer.
    pub fn scan(&self, visit: Visit<'_>) -> Result<(), ReadError> {
        self.scan_range(&KeyRange::default(), false, visit)
    }

    /// As [`Generations::scan`], of the rows whose keys are in `range`, from the greatest if `descending`.
    ///
    /// # Errors
    /// As [`Generations::scan`].
    pub fn scan_range(&self, range: &KeyRange, descending: bool, visit: Visit<'_>) -> Result<(), ReadError> {
        self.moment.store.scan_generations(self, range, descending, visit)
    }
}

fn state_key(key: &str) -> String {
    format!("{STATE_PREFIX}{key}")
}

/// Generation and primary key of a row key whose generation lies at `offset`.
pub(crate) fn split(key: &[u8], offset: usize) -> Result<(Generation, &[u8]), ReadError> {
    let rest = key.get(offset..).and_then(|rest| rest.split_first_chunk());
    let (generation, pk) = rest.ok_or(ReadError::Key { source: crate::keys::KeyError::Short(key.len()) })?;
    Ok((Generation(u32::from_be_bytes(*generation)), pk))
}

pub(crate) fn reading(source: rocksdb::Error) -> ReadError {
    ReadError::Database { operation: "read from the write buffer", source }
}

fn synced() -> WriteOptions {
    let mut options = WriteOptions::default();
    options.set_sync(true);
    options
}

fn database_options() -> rocksdb::Options {
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_total_wal_size(WAL_BYTES_MAX);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_max_background_jobs(2);
    options.set_bytes_per_sync(1 << 20);
    options.set_keep_log_file_num(4);
    options.set_max_log_file_size(16 << 20);
    options.set_stats_dump_period_sec(0);
    // A torn tail was never acknowledged. Anything else that is damaged must be seen: the default mode would stop
    // there and silently drop every acknowledged statement after it.
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options
}

fn families() -> [ColumnFamilyDescriptor; 3] {
    let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES);
    [
        ColumnFamilyDescriptor::new(DEFAULT, family_options(&cache, SMALL_WRITE_BUFFER_BYTES, 2)),
        ColumnFamilyDescriptor::new(ROWS, family_options(&cache, WRITE_BUFFER_BYTES, WRITE_BUFFERS)),
        ColumnFamilyDescriptor::new(INSTANCES, family_options(&cache, SMALL_WRITE_BUFFER_BYTES, 2)),
    ]
}

fn family_options(cache: &Cache, write_buffer_bytes: usize, write_buffers: i32) -> rocksdb::Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_bloom_filter(BLOOM_BITS_PER_KEY, false);
    // Counted against the cache: memory stays bounded whatever the number of files.
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_pin_l0_filter_and_index_blocks_in_cache(true);
    let mut options = rocksdb::Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(write_buffer_bytes);
    options.set_max_write_buffer_number(write_buffers);
    options.set_memtable_whole_key_filtering(true);
    options.set_memtable_prefix_bloom_ratio(MEMTABLE_BLOOM_RATIO);
    options.set_compression_type(DBCompressionType::Lz4);
    options
}

/// Makes `directory` so that it outlives a power failure: RocksDB syncs what is in its own directory, not above it.
fn make_directory(directory: &Path) -> Result<(), OpenError> {
    let failed = |source| OpenError::Directory { path: directory.to_owned(), source };
    let missing: Vec<PathBuf> = directory.ancestors().take_while(|path| !path.exists()).map(Path::to_owned).collect();
    std::fs::create_dir_all(directory).map_err(failed)?;
    for made in missing {
        match made.parent() {
            Some(parent) if parent.as_os_str().is_empty() => sync_directory(Path::new("."))?,
            Some(parent) => sync_directory(parent)?,
            None => {}
        }
    }
    Ok(())
}

fn sync_directory(path: &Path) -> Result<(), OpenError> {
    let failed = |source| OpenError::Directory { path: path.to_owned(), source };
    std::fs::File::open(path).and_then(|directory| directory.sync_all()).map_err(failed)
}
