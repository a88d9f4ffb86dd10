//! Moves one instance's frozen rows into a Parquet file.
//!
//! Order: freeze -> encode -> upload the file -> commit the edit in the stream -> publish the view -> remove the rows.
//! Upload before commit: an edit without its file would be data loss; a file that no edit names is only garbage.
//! Every step may run twice: after a crash the frozen generation is still in the buffer, and either the commit stream
//! has its edit (then it is published and nothing is written again) or a new attempt writes a file of another name.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use bytes::Bytes;
use kalamdb_model::{Generation, InstanceId, Location, TableEntry};
use kalamdb_table_store::Positions;
use kalamdb_table_store::create::{self, Create, CreateError};
use kalamdb_table_store::manifest::{Edit, FileEntry};
use kalamdb_table_store::parquet_file::{self, FileStats};
use kalamdb_table_store::paths::{self, PathError};
use kalamdb_write_buffer::row::Header;
use kalamdb_write_buffer::{CommitError, RowError};

use object_store::path::Path;

use super::instance::{Instance, InstanceError, View};
use super::jobs::{JobKind, Ticket};
use super::read::{Batches, ReadError};
use super::ship::ShipError;
use super::storages::StoragesError;
use super::users::PlaceError;
use super::{Disowned, EPOCH, Engine, Rebuilding, RootKey, now_us};
use crate::crash;

/// How long whoever asks for a flush waits for an earlier one, and for the end.
pub(super) const WAIT: Duration = Duration::from_secs(10);

/// What a flush did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    /// Rows that are now in a file.
    pub rows: u64,
}

/// A flush that did not finish; the rows are still in the buffer.
#[derive(Debug, thiserror::Error)]
pub enum FlushError {
    /// The table is in no catalog.
    #[error("the table of the instance is not in the catalog")]
    TableGone,
    /// The instance.
    #[error("failed to load the instance")]
    Instance(#[from] InstanceError),
    /// Another flush of the instance, or its storage, takes too long to wait for.
    #[error("the flush goes on, and takes longer than {} s", WAIT.as_secs())]
    Waiting,
    /// The rows have columns that the catalog here does not know; a file without them would lose them.
    #[error("buffered rows have schema version {found}, and the catalog has {known}")]
    NewerRows {
        /// Of the rows.
        found: u32,
        /// Of the catalog.
        known: u32,
    },
    /// Another object lies under the file's name.
    #[error("`{path}` holds other bytes than were uploaded")]
    Garbled {
        /// The file.
        path: String,
    },
    /// Freezing.
    #[error("failed to freeze the buffered rows")]
    Freeze(#[from] CommitError),
    /// The buffer does not read.
    #[error("failed to read the buffered rows")]
    Buffer(#[from] kalamdb_write_buffer::ReadError),
    /// A row.
    #[error("a buffered row is damaged")]
    Row(#[from] RowError),
    /// The rows that the flushed ones replace.
    #[error("failed to look up what the rows replace in files")]
    Located(#[from] ReadError),
    /// Encoding.
    #[error("failed to encode a file")]
    File(#[source] Box<parquet_file::WriteError<RowError>>),
    /// Files that do not merge.
    #[error("failed to compact files: {0}")]
    Compact(String),
    /// The place.
    #[error("failed to resolve the place of the file")]
    Path(#[from] PathError),
    /// The store.
    #[error("the storage of the table is not usable")]
    Storage(#[from] StoragesError),
    /// The upload.
    #[error("failed to upload `{path}`")]
    Upload {
        /// The file.
        path: String,
        /// Why.
        source: Box<CreateError>,
    },
    /// The data is another's now.
    #[error(transparent)]
    Disowned(Disowned),
    /// The description for outside readers.
    #[error("failed to write `{path}`")]
    Describe {
        /// The object.
        path: String,
        /// Why.
        source: object_store::Error,
    },
    /// The commit.
    #[error("failed to commit the file")]
    Ship(#[source] ShipError),
    /// A file could not be copied to another storage.
    #[error("failed to copy `{path}`")]
    Copy {
        /// The file.
        path: String,
        /// Why.
        source: object_store::Error,
    },
    /// Where the rows are to lie.
    #[error("the rows have no place")]
    Place(#[from] PlaceError),
    /// The storage is being read back.
    #[error(transparent)]
    Rebuilding(#[from] Rebuilding),
    /// What was noted of a move.
    #[error("the note of a move is damaged")]
    Note(#[source] serde_json::Error),
    /// It was stopped on request.
    #[error("it was stopped on request")]
    Cancelled,
    /// A worker thread was lost.
    #[error("the flush was interrupted")]
    Interrupted(#[from] tokio::task::JoinError),
}

impl From<ShipError> for FlushError {
    fn from(error: ShipError) -> Self {
        match error {
            ShipError::Disowned(reason) => Self::Disowned(reason),
            error => Self::Ship(error),
        }
    }
}

impl Engine {
    /// Flushes what `id` has buffered now; rows that arrive meanwhile wait for the next flush.
    ///
    /// # Errors
    /// See [`FlushError`]; trying again is always right.
    pub async fn flush(self: &Arc<Self>, id: &InstanceId) -> Result<Flushed, FlushError> {
        let instance = self.instances.get(id)?;
        let earlier = tokio::time::timeout(WAIT, instance.flushes.lock()).await;
        let _one_at_a_time = earlier.map_err(|_| FlushError::Waiting)?;
        self.flush_held(id, &instance).await
    }

    /// As [`Engine::flush`], for one who holds the instance's flushes.
    pub(super) async fn flush_held(
        self: &Arc<Self>,
        id: &InstanceId,
        instance: &Instance,
    ) -> Result<Flushed, FlushError> {
        let counters = self.buffer.counters(id)?;
        if counters.rows == 0 && !counters.has_frozen() {
            self.reclaim(id, counters.flushed).await?;
            return Ok(Flushed::default());
        }
        let job = self.jobs.begin_for(JobKind::Flush, &*self.table(id)?, id);
        let outcome = self.flush_buffered(id, instance, &job).await;
        job.end(&outcome);
        outcome
    }

    async fn flush_buffered(
        self: &Arc<Self>,
        id: &InstanceId,
        instance: &Instance,
        job: &Ticket,
    ) -> Result<Flushed, FlushError> {
        let mut flushed = Flushed::default();
        // Before anything is frozen or uploaded: what a former process committed and did not publish must not be written
        // again.
        self.check_rebuilt(&*self.table(id)?, &id.owner).await?;
        self.settle_move(id).await?;
        self.open_stream(&instance.root(&*self.table(id)?)).await?;
        // Opening it may have published what a former process committed.
        self.reclaim(id, self.buffer.counters(id)?.flushed).await?;
        // A generation that an earlier attempt froze comes first, then the rows of now.
        let last = self.buffer.counters(id)?.active;
        while let Some(generation) = self.freeze(id).await? {
            crash::point("flush.frozen");
            // Taken after the freeze: a column that was added while we waited is in the frozen rows already.
            let (rows, bytes) = self.flush_generation(&self.table(id)?, id, generation).await?;
            flushed.rows += rows;
            job.add(rows, bytes);
            if generation >= last {
                break;
            }
        }
        Ok(flushed)
    }

    async fn freeze(&self, id: &InstanceId) -> Result<Option<Generation>, CommitError> {
        self.buffer.freeze(id.clone()).await.inspect_err(|error| self.note_failure(error))
    }

    fn table(&self, id: &InstanceId) -> Result<Arc<TableEntry>, FlushError> {
        self.catalog.current().table_by_id(id.table).cloned().ok_or(FlushError::TableGone)
    }

    /// Removes the rows of generations that are published, if they are still there.
    async fn reclaim(self: &Arc<Self>, id: &InstanceId, up_to: Generation) -> Result<(), FlushError> {
        let (engine, id) = (Arc::clone(self), id.clone());
        tokio::task::spawn_blocking(move || engine.buffer.reclaim(&id, up_to)).await??;
        Ok(())
    }

    /// Returns rows and bytes of the file.
    async fn flush_generation(
        self: &Arc<Self>,
        table: &Arc<TableEntry>,
        id: &InstanceId,
        generation: Generation,
    ) -> Result<(u64, u64), FlushError> {
        let view = Arc::clone(&self.instances.get(id)?.current.read().view);
        let location = view.location(table).clone();
        let root = RootKey::of(&location);
        let started = std::time::Instant::now();
        let replace = self.replaced_by(table, id, generation).await?;
        let (engine, of_table, of_id) = (Arc::clone(self), Arc::clone(table), id.clone());
        let prefix = paths::instance_prefix(&location, &id.owner)?;
        let encoding = move || engine.encode(&of_table, &of_id, generation, &prefix);
        let file = tokio::task::spawn_blocking(encoding).await??;
        crash::point("flush.encoded");
        let rows = file.entry.rows;
        let size = file.entry.bytes;
        let placed = view.manifest.placed.clone();
        let edit = Edit { replace, placed, ..self.upload(&location, id, generation, file).await? };
        crash::point("flush.uploaded");
        self.ship(&root, edit).await?;
        crash::point("flush.published");
        self.reclaim(id, generation).await?;
        crash::point("flush.reclaimed");
        self.metrics.flushes.inc();
        self.metrics.rows_flushed.inc_by(rows);
        tracing::info!(
            table = %table.name,
            rows,
            bytes = size,
            elapsed_ms = started.elapsed().as_millis(),
            "flushed an instance"
        );
        Ok((rows, size))
    }

    /// The rows of files that the rows of a frozen generation replace. Nothing changes them meanwhile: only a flush does,
    /// and this is the one.
    async fn replaced_by(
        self: &Arc<Self>,
        table: &Arc<TableEntry>,
        id: &InstanceId,
        generation: Generation,
    ) -> Result<BTreeMap<String, Positions>, FlushError> {
        let instance = self.instances.get(id)?;
        loop {
            let (engine, of) = (Arc::clone(self), Arc::clone(&instance));
            let look = move || engine.known_replaced(&of, generation);
            let (view, replaced, unknown) = tokio::task::spawn_blocking(look).await??;
            if unknown.is_empty() {
                return Ok(replaced);
            }
            let found = self.locate(table, &instance, &view, &unknown).await?;
            instance.current.write().note(&view, found);
        }
    }

    fn known_replaced(&self, instance: &Instance, generation: Generation) -> Result<Replaced, FlushError> {
        let mut replaced: BTreeMap<String, Positions> = BTreeMap::new();
        let mut unknown = BTreeSet::new();
        let mut damaged = None;
        let current = instance.current.read();
        let view = Arc::clone(&current.view);
        if view.manifest.files.is_empty() {
            return Ok((view, replaced, unknown));
        }
        self.buffer.scan_generation(&instance.id, generation, &mut |_, key, row| {
            match Header::parse(row) {
                Ok(Header { fresh: true, .. }) => {}
                Ok(_) => match current.located.get(key) {
                    Some(Some(at)) => replaced.entry(at.path.to_string()).or_default().insert(at.row),
                    Some(None) => {}
                    None => drop(unknown.insert(key.to_vec())),
                },
                Err(error) => {
                    damaged = Some(error);
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        })?;
        drop(current);
        damaged.map_or(Ok((view, replaced, unknown)), |error| Err(error.into()))
    }

    fn encode(
        &self,
        table: &TableEntry,
        id: &InstanceId,
        generation: Generation,
        prefix: &Path,
    ) -> Result<Encoded, FlushError> {
        let all: Vec<usize> = (0..table.arrow_schema().fields().len()).collect();
        let mut batches = Batches::new(table, &all, BATCH_ROWS);
        let mut damaged: Option<RowError> = None;
        let mut newer = None;
        self.buffer.scan_generation(id, generation, &mut |_, _, row| {
            let pushed = Header::parse(row).and_then(|header| {
                newer = newer.max((header.schema_version > table.schema_version).then_some(header.schema_version));
                batches.push(row)
            });
            match pushed {
                Ok(()) if newer.is_none() => ControlFlow::Continue(()),
                Ok(()) => ControlFlow::Break(()),
                Err(error) => {
                    damaged = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        if let Some(found) = newer {
            return Err(FlushError::NewerRows { found, known: table.schema_version });
        }
        if let Some(error) = damaged {
            return Err(error.into());
        }
        let batches = batches.finish()?;
        let name = ulid::Ulid::generate().to_string();
        let path = paths::data_file(prefix, EPOCH, u64::from(generation.0), &name);
        let mut bytes = Vec::new();
        let written =
            parquet_file::write(table, EPOCH, batches.into_iter().map(Ok::<RecordBatch, RowError>), &mut bytes)
                .map_err(|error| FlushError::File(Box::new(error)))?;
        Ok(Encoded::new(path, table, written, bytes))
    }

    pub(super) async fn upload(
        &self,
        location: &Location,
        id: &InstanceId,
        generation: Generation,
        file: Encoded,
    ) -> Result<Edit, FlushError> {
        let (snapshot, root) = (self.catalog.current(), RootKey::of(location));
        let store = self.storages.store(&snapshot, &root)?;
        let failed = |source| FlushError::Upload { path: file.path.to_string(), source: Box::new(source) };
        // Under a fresh ULID nobody else writes: other bytes there are our own, garbled, or an answer that is no object's.
        match create::create_exact(store.as_ref(), &file.path, file.bytes.clone()).await.map_err(failed)? {
            Create::Ours => {}
            Create::Lost(_) => return Err(FlushError::Garbled { path: file.path.to_string() }),
        }
        self.storages.fill(&snapshot, &root, file.path, file.bytes).await;
        let last_seq = file.entry.max_seq;
        Ok(Edit {
            instance: id.clone(),
            generation,
            last_seq,
            add: vec![file.entry],
            remove: Vec::new(),
            replace: BTreeMap::new(),
            placed: None,
        })
    }
}

/// The view that was looked at, what is replaced in its files, and keys nobody has looked for in them.
type Replaced = (Arc<View>, BTreeMap<String, Positions>, BTreeSet<Vec<u8>>);

/// Rows decoded at once: keeps the peak below two copies of the instance's buffered rows.
const BATCH_ROWS: usize = 8_192;

/// A file that is ready to be uploaded.
pub(super) struct Encoded {
    pub(super) path: object_store::path::Path,
    pub(super) bytes: Bytes,
    pub(super) entry: FileEntry,
}

impl Encoded {
    pub(super) fn new(path: object_store::path::Path, table: &TableEntry, written: FileStats, bytes: Vec<u8>) -> Self {
        let entry = FileEntry {
            path: path.to_string(),
            rows: written.rows,
            bytes: bytes.len() as u64,
            raw_bytes: written.raw_bytes,
            widest_row: written.widest_row,
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
        Self { path, bytes: bytes.into(), entry }
    }
}

#[cfg(test)]
mod tests {
    use kalamdb_model::{Owner, UserId, Value, key};
    use kalamdb_table_store::FilesystemStore;
    use kalamdb_table_store::stream::{Round, StreamWriter};
    use kalamdb_test_support::pod::MANIFESTS;
    use kalamdb_write_buffer::row;

    use super::super::{NewRow, Secrets, Storages, testing};
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn rows_that_are_published_while_a_stream_begins_leave_the_buffer() {
        let dir = tempfile::tempdir().unwrap();
        let open = || testing::open(dir.path(), MANIFESTS, Storages::new(dir.path().to_owned(), Secrets::default()));
        let (engine, table) = open();
        let owner = Owner::User(UserId::new("alice").unwrap());
        let id = Engine::instance_id(&table, &owner);
        let values = [Value::BigInt(1), Value::Text("body".to_owned())];
        let row = NewRow { key: key::encode(&values[..1]), value: row::encode(&table, &values) };
        engine.write(&table, &owner).await.unwrap().insert(vec![row]).await.unwrap();
        engine.open_stream(&RootKey::of(&table.location)).await.unwrap();
        let generation = engine.buffer.freeze(id.clone()).await.unwrap().unwrap();
        let incarnation = engine.shippers.incarnation.clone();
        engine.close(Duration::from_secs(5)).await;
        drop(engine);
        // It had committed them, and died before they were published.
        let (add, remove, replace) = (Vec::new(), Vec::new(), BTreeMap::new());
        let edit = Edit { instance: id.clone(), generation, last_seq: now_us(), add, remove, replace, placed: None };
        let store = Arc::new(FilesystemStore::open_used(&dir.path().join("files")).unwrap());
        let round = Arc::new(Round { edits: vec![edit], rows: Vec::new() });
        StreamWriter::new(store, incarnation, 1).append(&round).await.unwrap();
        let (engine, _) = open();
        engine.flush(&id).await.unwrap();
        let scanned = engine.buffer.scan(&id, Generation(0), &mut |_, _, _| ControlFlow::Continue(()));
        assert!(matches!(scanned, Err(kalamdb_write_buffer::ReadError::Reclaimed { .. })), "{scanned:?}");
        engine.close(Duration::from_secs(5)).await;
    }
}
