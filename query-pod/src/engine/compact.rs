//! Rewrites files of one instance: many small ones into one, and without rows that are replaced or long deleted.
//!
//! Order: merge -> encode -> upload -> commit the edit in the stream -> publish the view -> note the old files as garbage.
//! A compaction holds the instance's flush lock from its choice of files to its publication: only flushes add to deletion
//! vectors, so that none changes meanwhile. Writes and reads go on; what is known of positions in the old files is
//! forgotten with them, and looked up again.
//!
//! After a crash before the commit there is a file that nobody names; after it, the edit is found in the stream.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::RecordBatch;
use kalamdb_model::{InstanceId, TableEntry};
use kalamdb_table_store::manifest::{Edit, FileEntry};
use kalamdb_table_store::merge::{Merge, MergeError};
use kalamdb_table_store::{Positions, parquet_file, paths};

use super::flush::{Encoded, FlushError};
use super::{EPOCH, Engine, RootKey, now_us};
use crate::crash;
use crate::error::Chain;

/// Files below this are small.
const SMALL_BYTES: u64 = 32 << 20;
/// Small files at which they become one.
const SMALL_FILES_MAX: usize = 8;
/// Share of dead rows at which a file is rewritten: one in so many.
const DEAD_SHARE: u64 = 10;
/// Most bytes of files that one compaction reads; its output is held in memory.
const INPUT_BYTES_MAX: u64 = 128 << 20;
/// How long after its retention a deleted row's bytes may stay in a file that has few of them.
const DEAD_MAX_US: i64 = 24 * 3_600 * 1_000_000;

const HOUR_US: i64 = 3_600 * 1_000_000;

/// What a compaction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compacted {
    /// Files that were rewritten.
    pub files: u64,
    /// Rows that are in the new file.
    pub rows: u64,
}

/// Deleted rows up to this moment need not be kept; `None`: all are kept.
fn deleted_until(table: &TableEntry, now_us: i64) -> Option<i64> {
    table.deleted_retention_hours.map(|hours| now_us.saturating_sub(i64::from(hours).saturating_mul(HOUR_US)))
}

/// Which files to rewrite, if any. With `all`, every one that would be better for it.
fn choose(files: &[FileEntry], deleted_until_us: Option<i64>, all: bool) -> Vec<&FileEntry> {
    let expired = |file: &FileEntry| {
        !file.tombstones.is_empty() && deleted_until_us.is_some_and(|until| file.deleted_since_us <= until)
    };
    let dead = |file: &FileEntry| match expired(file) {
        true => file.hidden().len(),
        false => file.replaced.len(),
    };
    let overdue = |file: &FileEntry| {
        expired(file)
            && deleted_until_us.is_some_and(|until| file.deleted_since_us.saturating_add(DEAD_MAX_US) <= until)
    };
    let small: Vec<&FileEntry> = files.iter().filter(|file| file.bytes < SMALL_BYTES).collect();
    let many = small.len() >= if all { 2 } else { SMALL_FILES_MAX };
    let chosen = files.iter().filter(|file| {
        let worn = dead(file) > 0 && (all || dead(file) * DEAD_SHARE >= file.rows || overdue(file));
        worn || (many && file.bytes < SMALL_BYTES)
    });
    let mut bytes = 0;
    let within = |file: &&FileEntry| {
        bytes += file.bytes;
        bytes <= INPUT_BYTES_MAX
    };
    let chosen: Vec<&FileEntry> = chosen.take_while(within).collect();
    // One file without anything dead would become itself.
    if chosen.len() == 1 && dead(chosen[0]) == 0 { Vec::new() } else { chosen }
}

impl Engine {
    /// Compacts the files of `id` if it is worth it; with `all`, whenever it gains anything.
    ///
    /// # Errors
    /// See [`FlushError`]; trying again is always right.
    pub async fn compact(self: &Arc<Self>, id: &InstanceId, all: bool) -> Result<Compacted, FlushError> {
        let instance = self.instances.get(id)?;
        let _no_flush = instance.flushes.lock().await;
        let Some(table) = self.catalog.current().table_by_id(id.table).cloned() else {
            return Err(FlushError::TableGone);
        };
        let view = Arc::clone(&instance.current.read().view);
        self.check_owner(&table, id, &view)?;
        let until = deleted_until(&table, now_us());
        let files: Vec<FileEntry> = choose(&view.manifest.files, until, all).into_iter().cloned().collect();
        if files.is_empty() {
            return Ok(Compacted::default());
        }
        let root = RootKey::of(&table.location);
        self.open_stream(&root).await?;
        // A deleted row is kept as long as a file that stays may hold an older version of it.
        let chosen = |path: &str| files.iter().any(|file| file.path == path);
        let alone = view.manifest.files.iter().filter(|file| !chosen(&file.path)).all(|file| file.replaced.is_empty());
        let merged = self.merge(&table, id, &root, u64::from(view.flushed.0), &files, until.filter(|_| alone)).await?;
        crash::point("compact.merged");
        let add = match merged {
            Some(file) => {
                let generation = view.flushed;
                self.upload(&table.location, id, generation, file).await?.add
            }
            None => Vec::new(),
        };
        crash::point("compact.uploaded");
        let rows = add.iter().map(|file| file.rows).sum();
        let last_seq = files.iter().map(|file| file.max_seq).max().unwrap_or(0);
        let remove: Vec<String> = files.iter().map(|file| file.path.clone()).collect();
        let edit =
            Edit { instance: id.clone(), generation: view.flushed, last_seq, add, remove, replace: BTreeMap::new() };
        self.ship(&root, edit).await?;
        crash::point("compact.published");
        self.describe(id, true).await;
        self.metrics.compactions.inc();
        tracing::info!(table = %table.name, files = files.len(), rows, "compacted an instance");
        Ok(Compacted { files: files.len() as u64, rows })
    }

    /// Compacts the instances of which `matches` holds, one after the other, whenever that gains anything.
    ///
    /// # Errors
    /// The first failure, after every instance was tried.
    pub async fn compact_matching(
        self: &Arc<Self>,
        matches: impl Fn(&InstanceId) -> bool,
    ) -> Result<Compacted, FlushError> {
        let engine = Arc::clone(self);
        let published = tokio::task::spawn_blocking(move || engine.buffer.published()).await??;
        let (mut done, mut failure) = (Compacted::default(), None);
        for id in published.into_iter().filter(matches) {
            match self.compact(&id, true).await {
                Ok(Compacted { files, rows }) => {
                    done.files += files;
                    done.rows += rows;
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(done), Err)
    }

    /// After a flush: compacts if it is worth it, one instance of the pod at a time.
    pub(super) async fn compact_after_flush(self: &Arc<Self>, id: &InstanceId) {
        let Ok(_turn) = self.compactions.acquire().await else { return };
        if self.stop.is_cancelled() {
            return;
        }
        if let Err(error) = self.compact(id, false).await {
            tracing::warn!(table = id.table.0, error = %Chain(&error), "a compaction failed; it is tried again after the next flush");
        }
    }

    async fn merge(
        self: &Arc<Self>,
        table: &Arc<TableEntry>,
        id: &InstanceId,
        root: &RootKey,
        flushed: u64,
        files: &[FileEntry],
        deleted_until_us: Option<i64>,
    ) -> Result<Option<Encoded>, FlushError> {
        let store = self.storages.store(&self.catalog.current(), root)?;
        let prefix = paths::instance_prefix(&table.location, &id.owner)?;
        let path = paths::data_file(&prefix, EPOCH, flushed, &ulid::Ulid::generate().to_string());
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
        let mut merge = Merge::begin(&store, table, files, deleted_until_us).await?;
        while let Some(batch) = merge.next().await? {
            if sender.send(batch).await.is_err() {
                break;
            }
        }
        drop(sender);
        let Some((written, bytes)) = encoding.await?? else { return Ok(None) };
        let entry = FileEntry {
            path: path.to_string(),
            rows: written.rows,
            bytes: bytes.len() as u64,
            min_key: written.min_key,
            max_key: written.max_key,
            min_seq: written.min_seq,
            max_seq: written.max_seq,
            schema_version: table.schema_version,
            created_us: now_us(),
            tombstones: written.tombstones,
            deleted_since_us: written.deleted_since_us,
            replaced: Positions::default(),
        };
        Ok(Some(Encoded { path, bytes: bytes.into(), entry }))
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
