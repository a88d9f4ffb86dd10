//! Rewrites files of one instance: many small ones into one, and without rows that are replaced or long deleted.
//!
//! Order: merge -> encode -> upload -> commit the edit in the stream -> publish the view -> note the old files as garbage.
//! A compaction holds the instance's flush lock from its choice of files to its publication: only flushes add to deletion
//! vectors, so that none changes meanwhile. Writes and reads go on; what is known of positions in the old files is
//! forgotten with them, and looked up again.
//!
//! After a crash before the commit there is a file that nobody names; after it, the edit is found in the stream.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use kalamdb_model::{InstanceId, TableEntry};
use kalamdb_table_store::manifest::{Edit, FileEntry, Manifest};
use kalamdb_table_store::merge::{Merge, MergeError};
use kalamdb_table_store::{parquet_file, paths};
use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::flush::{Encoded, FlushError, WAIT};
use super::instance::{InstanceError, View};
use super::jobs::{JobKind, Ticket};
use super::{EPOCH, Engine, RootKey, now_us};
use crate::crash;
use crate::error::Chain;

/// Files that count less than this are small ([`weight`]).
const SMALL_BYTES: u64 = 32 << 20;
/// Small files at which they become one.
const SMALL_FILES_MAX: usize = 8;
/// Share of dead rows at which a file is rewritten: one in so many.
const DEAD_SHARE: u64 = 10;
/// Most bytes of files that one compaction reads; its output is held in memory.
const INPUT_BYTES_MAX: u64 = 128 << 20;
/// So many decoded bytes count as one of a file, which is about what encoding saves: where it saves more, a compaction
/// reads 512 MiB decoded.
const DECODED_BYTES: u64 = 4;
/// How long after its retention a deleted row's bytes may stay in a file that has few of them.
const DEAD_MAX_US: i64 = 24 * 3_600 * 1_000_000;

/// How often all instances are looked at, idle ones too.
const SWEEP: Duration = Duration::from_secs(3_600);
/// Instances that are looked at in one go.
const SWEEP_AT_ONCE: usize = 1_000;

/// How long whoever compacts many instances waits for one of them.
const COMPACT_WAIT: Duration = Duration::from_secs(60);
/// Failures one after the other after which those of one storage are left alone.
const FAILURES_MAX: usize = 3;

const HOUR_US: i64 = 3_600 * 1_000_000;

/// Why files are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// A flush has added to them.
    Flushed,
    /// Somebody asked for it: whenever it gains anything.
    Asked,
    /// Time has passed.
    Sweep,
}

/// What a compaction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Files that were rewritten.
    pub files: u64,
    /// Rows that are in the new file.
    pub rows: u64,
}

/// Compactions under way and to come.
#[derive(Default)]
pub(super) struct Compactions {
    turns: Mutex<HashMap<RootKey, Arc<tokio::sync::Mutex<()>>>>,
    waiting: Mutex<HashSet<InstanceId>>,
}

/// Deleted rows up to this moment need not be kept; `None`: all are kept.
fn deleted_until(table: &TableEntry, now_us: i64) -> Option<i64> {
    table.deleted_retention_hours.map(|hours| now_us.saturating_sub(i64::from(hours).saturating_mul(HOUR_US)))
}

/// What a compaction is to do.
#[derive(Debug, PartialEq)]
struct Choice<'a> {
    files: Vec<&'a FileEntry>,
    /// Rows that were deleted up to here are left out.
    deleted_until_us: Option<i64>,
}

/// Which files to rewrite, if any. With `all`, every one that would be better for it.
fn choose(files: &[FileEntry], deleted_until_us: Option<i64>, all: bool) -> Choice<'_> {
    let chosen = pick(files, deleted_until_us, all);
    let Some(until) = deleted_until_us else { return Choice { files: chosen, deleted_until_us: None } };
    // A deleted row is kept as long as a file that stays may hold an older version of it.
    let alone = |chosen: &[&FileEntry]| {
        let stays = |file: &&FileEntry| !chosen.iter().any(|other| other.path == file.path);
        files.iter().filter(stays).all(|file| file.replaced.is_empty())
    };
    if alone(&chosen) {
        return Choice { files: chosen, deleted_until_us };
    }
    if all || chosen.iter().any(|file| is_overdue(file, until)) {
        let wider = |file: &&FileEntry| !file.replaced.is_empty() || chosen.iter().any(|other| other.path == file.path);
        let wider = within_budget(files.iter().filter(wider).collect());
        if alone(&wider) {
            return Choice { files: wider, deleted_until_us };
        }
    }
    // Without dropping them: a file must not be rewritten for the sake of rows that stay.
    Choice { files: pick(files, None, all), deleted_until_us: None }
}

fn is_overdue(file: &FileEntry, until: i64) -> bool {
    !file.tombstones.is_empty() && file.deleted_since_us.saturating_add(DEAD_MAX_US) <= until
}

/// Rows that a rewrite drops for sure: deleted ones only when the time of all of them is over.
fn dead(file: &FileEntry, until: Option<i64>) -> u64 {
    if until.is_some_and(|until| file.created_us <= until) { file.hidden().len() } else { file.replaced.len() }
}

/// What a file counts where it matters how large it is.
fn weight(file: &FileEntry) -> u64 {
    file.bytes.max(file.raw_bytes / DECODED_BYTES)
}

fn pick(files: &[FileEntry], until: Option<i64>, all: bool) -> Vec<&FileEntry> {
    let small = |file: &FileEntry| weight(file) < SMALL_BYTES;
    let many = files.iter().filter(|file| small(file)).count() >= if all { 2 } else { SMALL_FILES_MAX };
    let worn = |file: &FileEntry| {
        let dead = dead(file, until);
        let expired = !file.tombstones.is_empty() && until.is_some_and(|until| file.deleted_since_us <= until);
        (all && (dead > 0 || expired))
            || (dead > 0 && dead * DEAD_SHARE >= file.rows)
            || until.is_some_and(|until| is_overdue(file, until))
    };
    let chosen = within_budget(files.iter().filter(|file| worn(file) || (many && small(file))).collect());
    match chosen.as_slice() {
        // One file without anything dead would become itself.
        [one] if !worn(one) => files.iter().find(|file| worn(file)).into_iter().collect(),
        _ => chosen,
    }
}

/// As many as may be read at once; one in any case.
fn within_budget(mut chosen: Vec<&FileEntry>) -> Vec<&FileEntry> {
    let mut bytes = 0_u64;
    chosen.retain(|file| {
        let fits = bytes == 0 || bytes + weight(file) <= INPUT_BYTES_MAX;
        bytes += if fits { weight(file) } else { 0 };
        fits
    });
    chosen
}

impl Engine {
    /// Compacts the files of `id` if it is worth it.
    async fn compact(self: &Arc<Self>, id: &InstanceId, why: Why) -> Result<Compacted, FlushError> {
        let instance = self.instances.get(id)?;
        let earlier = tokio::time::timeout(WAIT, instance.flushes.lock()).await;
        let _no_flush = earlier.map_err(|_| FlushError::Waiting)?;
        let Some(table) = self.catalog.current().table_by_id(id.table).cloned() else {
            return Err(FlushError::TableGone);
        };
        self.check_rebuilt(&table, &id.owner).await?;
        self.settle_move(id).await?;
        let root = instance.root(&table);
        // Before the view is taken: this may publish what a former process committed.
        self.open_soon(&root).await?;
        let view = Arc::clone(&instance.current.read().view);
        self.check_owner(&table, id, &view)?;
        let Choice { files, deleted_until_us } =
            choose(&view.manifest.files, deleted_until(&table, now_us()), why == Why::Asked);
        let files: Vec<FileEntry> = files.into_iter().cloned().collect();
        if files.is_empty() {
            return Ok(Compacted::default());
        }
        if let Some(found) =
            files.iter().map(|file| file.schema_version).max().filter(|found| *found > table.schema_version)
        {
            return Err(FlushError::NewerRows { found, known: table.schema_version });
        }
        let kind = if why == Why::Sweep { JobKind::Retention } else { JobKind::Compaction };
        let job = self.jobs.begin_for(kind, &table, id);
        let outcome = self.rewrite(&table, id, &view, &files, deleted_until_us, &job).await;
        job.end(&outcome);
        if matches!(outcome, Err(FlushError::Cancelled)) { Ok(Compacted::default()) } else { outcome }
    }

    /// Puts one file in the place of `files`.
    async fn rewrite(
        self: &Arc<Self>,
        table: &Arc<TableEntry>,
        id: &InstanceId,
        view: &View,
        files: &[FileEntry],
        deleted_until_us: Option<i64>,
        job: &Ticket,
    ) -> Result<Compacted, FlushError> {
        let location = view.location(table);
        let root = RootKey::of(location);
        let merging = self.merge(table, id, view, files, deleted_until_us);
        let merged = tokio::select! {
            merged = merging => merged?,
            // Nothing is changed before the commit.
            () = job.cancel.cancelled() => return Err(FlushError::Cancelled),
        };
        crash::point("compact.merged");
        let add = match merged {
            Some(file) => self.upload(location, id, view.flushed, file).await?.add,
            None => Vec::new(),
        };
        crash::point("compact.uploaded");
        let rows = add.iter().map(|file| file.rows).sum();
        let bytes = add.iter().map(|file| file.bytes).sum();
        let last_seq = files.iter().map(|file| file.max_seq).max().unwrap_or(0);
        let remove: Vec<String> = files.iter().map(|file| file.path.clone()).collect();
        let (instance, generation, replace) = (id.clone(), view.flushed, BTreeMap::new());
        let edit = Edit { instance, generation, last_seq, add, remove, replace, placed: view.manifest.placed.clone() };
        self.ship(&root, edit).await?;
        crash::point("compact.published");
        job.add(rows, bytes);
        self.describe(id, true).await;
        self.metrics.compactions.inc();
        tracing::info!(table = %table.name, files = files.len(), rows, "compacted an instance");
        Ok(Compacted { files: files.len() as u64, rows })
    }

    /// Compacts the instances of which `matches` holds, those of one storage one after the other, whenever that gains
    /// anything.
    ///
    /// # Errors
    /// The first failure, after every instance was tried, but those of a storage that fails again and again.
    pub async fn compact_matching(
        self: &Arc<Self>,
        matches: impl Fn(&InstanceId) -> bool,
    ) -> Result<Compacted, FlushError> {
        let engine = Arc::clone(self);
        let published = tokio::task::spawn_blocking(move || engine.buffer.published()).await??;
        self.compact_all(published.into_iter().filter(matches).collect(), Why::Asked).await
    }

    /// Compacts `ids`, those of one storage one after the other. One that is down holds up only its own, and not for ever.
    async fn compact_all(self: &Arc<Self>, ids: Vec<InstanceId>, why: Why) -> Result<Compacted, FlushError> {
        let engine = Arc::clone(self);
        let of_storages = tokio::task::spawn_blocking(move || engine.by_root(ids)).await??;
        let mut compacting = JoinSet::new();
        for ids in of_storages.into_values() {
            compacting.spawn(Arc::clone(self).compact_each(ids, why));
        }
        let (mut done, mut failure) = (Compacted::default(), None);
        while let Some(compacted) = compacting.join_next().await {
            let (Compacted { files, rows }, failed) = compacted?;
            done.files += files;
            done.rows += rows;
            failure = failure.or(failed);
        }
        failure.map_or(Ok(done), Err)
    }

    /// `ids` by the storage that they lie in.
    fn by_root(&self, ids: Vec<InstanceId>) -> Result<HashMap<RootKey, Vec<InstanceId>>, FlushError> {
        let catalog = self.catalog.current();
        let mut of_roots: HashMap<RootKey, Vec<InstanceId>> = HashMap::new();
        for id in ids {
            if let Some(table) = catalog.table_by_id(id.table) {
                of_roots.entry(self.instances.get(&id)?.root(table)).or_default().push(id);
            }
        }
        Ok(of_roots)
    }

    /// Compacts instances of one storage, and tells the first failure.
    async fn compact_each(self: Arc<Self>, ids: Vec<InstanceId>, why: Why) -> (Compacted, Option<FlushError>) {
        let (mut done, mut failure, mut failures) = (Compacted::default(), None, 0);
        for id in ids {
            if self.stop.is_cancelled() || failures >= FAILURES_MAX {
                break;
            }
            let (engine, of) = (Arc::clone(&self), id.clone());
            let work = self.tasks.spawn(async move { engine.compact_in_turn(&of, why).await });
            // Its commit waits for its storage for as long as it takes: then it goes on by itself.
            let outcome = match tokio::time::timeout(COMPACT_WAIT, work).await {
                Ok(joined) => joined.map_err(FlushError::from).and_then(|outcome| outcome),
                Err(_) => Err(FlushError::Waiting),
            };
            match outcome {
                Ok(Compacted { files, rows }) => {
                    done.files += files;
                    done.rows += rows;
                    failures = 0;
                }
                Err(error) => {
                    tracing::warn!(table = id.table.0, error = %Chain(&error), "an instance was not compacted");
                    failure = failure.or(Some(error));
                    failures += 1;
                }
            }
        }
        (done, failure)
    }

    /// One compaction of a storage at a time; one that is down holds up only its own.
    async fn compact_in_turn(self: &Arc<Self>, id: &InstanceId, why: Why) -> Result<Compacted, FlushError> {
        let Some(table) = self.catalog.current().table_by_id(id.table).cloned() else {
            return Err(FlushError::TableGone);
        };
        let turns = Arc::clone(self.compactions.turns.lock().entry(self.instances.get(id)?.root(&table)).or_default());
        let _turn = tokio::time::timeout(WAIT, turns.lock()).await.map_err(|_| FlushError::Waiting)?;
        self.compact(id, why).await
    }

    /// After a flush: compacts soon if it is worth it.
    pub(super) fn compact_soon(self: &Arc<Self>, id: &InstanceId) {
        if !self.compactions.waiting.lock().insert(id.clone()) {
            return;
        }
        let (engine, id) = (Arc::clone(self), id.clone());
        self.spawn(async move {
            let outcome = if engine.stop.is_cancelled() {
                Ok(Compacted::default())
            } else {
                engine.compact_in_turn(&id, Why::Flushed).await
            };
            engine.compactions.waiting.lock().remove(&id);
            if let Err(error) = outcome {
                tracing::warn!(
                    table = id.table.0,
                    error = %Chain(&error),
                    "a compaction did not happen; it is tried again after the next flush"
                );
            }
        });
    }

    /// Looks at every instance, also at those that nobody writes to: deleted rows go when their time is over.
    ///
    /// # Errors
    /// If the write buffer does not read. What fails for one instance is tried again at the next sweep.
    pub async fn sweep(self: &Arc<Self>) -> Result<(), FlushError> {
        let engine = Arc::clone(self);
        let published = tokio::task::spawn_blocking(move || engine.buffer.published()).await??;
        let mut all = Vec::new();
        for ids in published.chunks(SWEEP_AT_ONCE) {
            let (engine, ids) = (Arc::clone(self), ids.to_vec());
            let overdue = tokio::task::spawn_blocking(move || engine.overdue(ids)).await??;
            all.extend(overdue);
        }
        if let Err(error) = self.compact_all(all, Why::Sweep).await {
            tracing::warn!(error = %Chain(&error), "deleted rows whose time is over stay for now");
        }
        Ok(())
    }

    /// Those of `ids` whose files are worth a rewrite. Reads their records past the instances in memory: most are idle.
    fn overdue(&self, ids: Vec<InstanceId>) -> Result<Vec<InstanceId>, FlushError> {
        let (catalog, now) = (self.catalog.current(), now_us());
        let mut overdue = Vec::new();
        for id in ids {
            let Some(until) = catalog.table_by_id(id.table).and_then(|table| deleted_until(table, now)) else {
                continue;
            };
            let Some(record) = self.buffer.record(&id)?.filter(|record| !record.manifest.is_empty()) else { continue };
            let manifest = Manifest::decode(&record.manifest).map_err(InstanceError::from)?;
            if !choose(&manifest.files, Some(until), false).files.is_empty() {
                overdue.push(id);
            }
        }
        Ok(overdue)
    }

    async fn merge(
        self: &Arc<Self>,
        table: &Arc<TableEntry>,
        id: &InstanceId,
        view: &View,
        files: &[FileEntry],
        deleted_until_us: Option<i64>,
    ) -> Result<Option<Encoded>, FlushError> {
        let location = view.location(table);
        let from = self.storages.files(&self.catalog.current(), &RootKey::of(location))?;
        let prefix = paths::instance_prefix(location, &id.owner)?;
        let path = paths::data_file(&prefix, EPOCH, u64::from(view.flushed.0), &ulid::Ulid::generate().to_string());
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<RecordBatch>(2);
        let of_table = Arc::clone(table);
        let encoding = tokio::task::spawn_blocking(move || {
            let batches = std::iter::from_fn(|| receiver.blocking_recv()).map(Ok::<_, std::convert::Infallible>);
            let mut bytes = Vec::new();
            match parquet_file::write(&of_table, EPOCH, batches, &mut bytes) {
                Ok(stats) => Ok(Some((stats, bytes))),
                Err(parquet_file::WriteError::Empty) => Ok(None),
                Err(error) => Err(FlushError::Compact(error.to_string())),
            }
        });
        let mut merge = Merge::begin(&from, table, files, deleted_until_us).await?;
        while let Some(batch) = merge.next().await? {
            if sender.send(batch).await.is_err() {
                break;
            }
        }
        drop(sender);
        let Some((written, bytes)) = encoding.await?? else { return Ok(None) };
        Ok(Some(Encoded::new(path, table, written, bytes)))
    }
}

/// Sweeps until the engine stops.
pub(super) async fn run(engine: Arc<Engine>) {
    loop {
        tokio::select! {
            () = engine.stop.cancelled() => return,
            () = tokio::time::sleep(SWEEP) => {}
        }
        if let Err(error) = engine.sweep().await {
            tracing::warn!(error = %Chain(&error), "cannot look for deleted rows whose time is over");
        }
    }
}

impl From<MergeError> for FlushError {
    fn from(error: MergeError) -> Self {
        match error {
            MergeError::Read(error) => Self::Located(error.into()),
            other => Self::Compact(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_US: i64 = 24 * HOUR_US;

    /// A file of a hundred rows, made on day `made`, with so many deleted on day `deleted` and so many replaced.
    fn file(name: &str, mib: u64, made: i64, (deleted, on): (u32, i64), replaced: u32) -> FileEntry {
        FileEntry {
            path: name.to_owned(),
            rows: 100,
            bytes: mib << 20,
            raw_bytes: mib << 20,
            widest_row: 0,
            min_key: vec![],
            max_key: vec![],
            min_seq: 0,
            max_seq: 0,
            schema_version: 1,
            created_us: made * DAY_US,
            tombstones: (0..deleted).collect(),
            deleted_since_us: if deleted > 0 { on * DAY_US } else { 0 },
            replaced: (50..50 + replaced).collect(),
        }
    }

    fn chosen(files: &[FileEntry], until_day: Option<i64>, all: bool) -> (Vec<&str>, bool) {
        let choice = choose(files, until_day.map(|day| day * DAY_US), all);
        (choice.files.iter().map(|file| file.path.as_str()).collect(), choice.deleted_until_us.is_some())
    }

    #[test]
    fn eight_small_files_become_one_and_seven_do_not() {
        let files: Vec<FileEntry> = (0..8).map(|n| file(&format!("f{n}"), 1, 1, (0, 0), 0)).collect();
        assert_eq!(chosen(&files, None, false).0.len(), 8);
        assert_eq!(chosen(&files[..7], None, false).0.len(), 0);
        assert_eq!(chosen(&files[..2], None, true).0.len(), 2);
        assert_eq!(chosen(&files[..1], None, true).0.len(), 0);
    }

    #[test]
    fn a_file_is_rewritten_when_a_tenth_of_it_is_dead() {
        let files = [file("a", 40, 1, (0, 0), 9), file("b", 40, 1, (0, 0), 10)];
        assert_eq!(chosen(&files, None, false).0, ["b"]);
        assert_eq!(chosen(&files, None, true).0, ["a", "b"]);
    }

    #[test]
    fn deleted_rows_count_only_when_the_time_of_all_is_over_and_are_never_a_reason_without_being_dropped() {
        let worn = [file("a", 40, 3, (20, 1), 0)];
        assert_eq!(chosen(&worn, Some(1), false), (vec![], true), "some of them are younger");
        assert_eq!(chosen(&worn, Some(3), false), (vec!["a"], true));
        assert_eq!(chosen(&worn, None, false), (vec![], false), "they are kept for ever");
        // Another file may hold older versions, and is not worth a rewrite: nothing is gained by one.
        let beside = [file("a", 40, 3, (20, 3), 0), file("b", 40, 3, (0, 0), 1)];
        assert_eq!(chosen(&beside, Some(3), false), (vec![], false));
        // A day later both are: the bytes have to go.
        assert_eq!(chosen(&beside, Some(4), false), (vec!["a", "b"], true));
    }

    #[test]
    fn files_of_little_that_decode_to_much_are_neither_small_nor_read_all_at_once() {
        let decoded = |name: &str, mib: u64| FileEntry { raw_bytes: mib << 20, ..file(name, 0, 1, (0, 0), 0) };
        let many: Vec<FileEntry> = (0..40).map(|n| decoded(&format!("f{n:02}"), 60)).collect();
        assert_eq!(chosen(&many, None, false).0.len(), 8, "480 of 512 MiB");
        // What they became is not rewritten with the next small ones.
        let next = [decoded("a", 480), decoded("b", 60), decoded("c", 60)];
        assert_eq!(chosen(&next, None, true).0, ["b", "c"]);
    }

    #[test]
    fn a_large_file_neither_stops_others_nor_waits_for_ever() {
        let large = [file("a", 200, 1, (0, 0), 20), file("b", 40, 1, (0, 0), 20)];
        assert_eq!(chosen(&large, None, false).0, ["a"]);
        assert_eq!(chosen(&large[1..], None, false).0, ["b"]);
        let mixed = [file("a", 1, 1, (0, 0), 0), file("b", 1, 1, (0, 0), 0), file("c", 200, 1, (0, 0), 1)];
        assert_eq!(chosen(&mixed, None, true).0, ["a", "b"]);
    }
}
