//! What a scan of one instance reads: buffered rows as one batch, the list of files, and which of their rows buffered
//! ones replace.

use std::collections::{BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;

use arrow::array::RecordBatch;
use kalamdb_model::{InstanceId, Owner, TableEntry};
use kalamdb_table_store::Positions;
use kalamdb_table_store::parquet_read;
use kalamdb_table_store::paths::{self, PathError};
use kalamdb_write_buffer::row::Header;
use kalamdb_write_buffer::{BatchBuilder, RowError};

use super::instance::{Instance, InstanceError, View};
use super::storages::StoragesError;
use super::{Disowned, Engine, Rebuilding, RootKey};

/// One consistent state of one instance.
pub struct Rows {
    /// Rows that are in no file; one batch, but for very much data.
    pub buffered: Vec<RecordBatch>,
    /// The files.
    pub view: Arc<View>,
    /// Rows of the files that newer, unflushed versions replace, by path.
    pub replaced: HashMap<Arc<str>, Positions>,
    /// Where the files lie.
    pub root: RootKey,
}

/// An instance cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The data is another's now, who may have acknowledged rows that are not here.
    #[error(transparent)]
    Disowned(#[from] Disowned),
    /// Its storage is being read back.
    #[error(transparent)]
    Rebuilding(#[from] Rebuilding),
    /// Its state.
    #[error("failed to load the instance")]
    Instance(#[from] InstanceError),
    /// The buffer.
    #[error("failed to read buffered rows")]
    Buffer(#[from] kalamdb_write_buffer::ReadError),
    /// A row.
    #[error("a buffered row is damaged")]
    Row(#[from] RowError),
    /// Its place.
    #[error("failed to resolve the place of an instance")]
    Path(#[from] PathError),
    /// Its store.
    #[error("the storage of the table is not usable")]
    Storage(#[from] StoragesError),
    /// A file.
    #[error("failed to look keys up in a file")]
    File(#[from] parquet_read::ReadError),
    /// Two files have the same row, and neither says that it was replaced.
    #[error("two files of the instance hold the same row")]
    Twice,
    /// A worker thread was lost.
    #[error("the read was interrupted")]
    Interrupted(#[from] tokio::task::JoinError),
    /// A file that is not the owner's. Nothing is read then.
    #[error("a file of the instance lies outside its owner's prefix")]
    Foreign,
}

/// Rows on their way into batches of at most so many rows, and of no more bytes than one may hold.
pub(super) struct Batches<'a> {
    table: &'a TableEntry,
    projection: &'a [usize],
    rows_max: usize,
    full: Vec<RecordBatch>,
    rows_in_full: usize,
    builder: BatchBuilder,
}

impl<'a> Batches<'a> {
    pub(super) fn new(table: &'a TableEntry, projection: &'a [usize], rows_max: usize) -> Self {
        let builder = BatchBuilder::new(table, projection);
        Self { table, projection, rows_max, full: Vec::new(), rows_in_full: 0, builder }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows_in_full + self.builder.rows()
    }

    pub(super) fn push(&mut self, row: &[u8]) -> Result<(), RowError> {
        match self.builder.push(row) {
            Err(RowError::BatchFull { .. }) if self.builder.rows() > 0 => {
                self.turn()?;
                self.builder.push(row)?;
            }
            other => other?,
        }
        if self.builder.rows() >= self.rows_max { self.turn() } else { Ok(()) }
    }

    fn turn(&mut self) -> Result<(), RowError> {
        let full = std::mem::replace(&mut self.builder, BatchBuilder::new(self.table, self.projection));
        self.rows_in_full += full.rows();
        self.full.push(full.finish()?);
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<Vec<RecordBatch>, RowError> {
        if self.builder.rows() > 0 || self.full.is_empty() {
            self.full.push(self.builder.finish()?);
        }
        Ok(self.full)
    }
}

/// What was there at one moment, complete if nothing is unknown.
struct Taken {
    buffered: Vec<RecordBatch>,
    view: Arc<View>,
    replaced: HashMap<Arc<str>, Positions>,
    /// Keys that may replace a row of a file nobody has looked for.
    unknown: BTreeSet<Vec<u8>>,
}

impl Engine {
    /// The rows that `owner` has in `table`: buffered ones with the columns `projection` (positions in the table's Arrow
    /// schema), at most `limit` of them, and the files with those of their rows that are replaced.
    ///
    /// # Errors
    /// If anything cannot be read; never fewer rows than there are.
    pub async fn read(
        self: &Arc<Self>,
        table: &Arc<TableEntry>,
        owner: &Owner,
        projection: Vec<usize>,
        limit: Option<usize>,
    ) -> Result<Rows, ReadError> {
        self.check_owned()?;
        self.check_rebuilt(table, owner).await?;
        let instance = self.instances.get(&Self::instance_id(table, owner))?;
        let projection: Arc<[usize]> = projection.into();
        loop {
            let (engine, of_table, of) = (Arc::clone(self), Arc::clone(table), Arc::clone(&instance));
            let columns = Arc::clone(&projection);
            let take = move || engine.take(&of_table, &of, &columns, limit);
            let taken = tokio::task::spawn_blocking(take).await??;
            if taken.unknown.is_empty() {
                self.check_owner(table, &instance.id, &taken.view)?;
                let root = RootKey::of(taken.view.location(table));
                return Ok(Rows { buffered: taken.buffered, view: taken.view, replaced: taken.replaced, root });
            }
            // Once for rows from before a restart or of before a change of the files; afterwards they are known.
            let found = self.locate(table, &instance, &taken.view, &taken.unknown).await?;
            instance.current.write().note(&taken.view, found);
        }
    }

    /// View, buffer and positions as of one moment. Blocking.
    fn take(
        &self,
        table: &TableEntry,
        instance: &Instance,
        projection: &[usize],
        limit: Option<usize>,
    ) -> Result<Taken, ReadError> {
        let mut batches = Batches::new(table, projection, usize::MAX);
        let mut damaged = None;
        let mut replaced: HashMap<Arc<str>, Positions> = HashMap::new();
        let mut unknown = BTreeSet::new();
        // All under one lock: a flush published in between would show its rows twice or not at all.
        let current = instance.current.read();
        let view = Arc::clone(&current.view);
        let no_files = view.manifest.files.is_empty();
        self.buffer.scan(&instance.id, view.flushed, &mut |_, key, row| {
            let visited = Header::parse(row).and_then(|header| {
                let full = limit.is_some_and(|limit| batches.rows() >= limit);
                if !header.deleted && !full {
                    batches.push(row)?;
                }
                // Every row that replaces one in a file counts, whether or not it is shown itself.
                if !header.fresh && !no_files {
                    match current.located.get(key) {
                        Some(Some(at)) => replaced.entry(Arc::clone(&at.path)).or_default().insert(at.row),
                        Some(None) => {}
                        None => drop(unknown.insert(key.to_vec())),
                    }
                }
                Ok(if full && no_files { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            });
            visited.unwrap_or_else(|error| {
                damaged = Some(error);
                ControlFlow::Break(())
            })
        })?;
        drop(current);
        match damaged {
            Some(error) => Err(error.into()),
            None => Ok(Taken { buffered: batches.finish()?, view, replaced, unknown }),
        }
    }

    /// The last fence before bytes are read: every file of the view lies below the prefix of its owner.
    pub(super) fn check_owner(&self, table: &TableEntry, id: &InstanceId, view: &View) -> Result<(), ReadError> {
        let prefix = format!("{}/", paths::instance_prefix(view.location(table), &id.owner)?);
        let foreign = view.manifest.files.iter().find(|file| !file.path.starts_with(&prefix));
        match foreign {
            Some(file) => {
                tracing::error!(object_path = %file.path, "a manifest names a file outside its owner's prefix");
                Err(ReadError::Foreign)
            }
            None => Ok(()),
        }
    }
}
