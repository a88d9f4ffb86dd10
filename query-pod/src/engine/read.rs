//! What a scan of one instance reads: buffered rows as one batch, and the list of files.

use std::ops::ControlFlow;
use std::sync::Arc;

use arrow::array::RecordBatch;
use kalamdb_model::{InstanceId, Owner, TableEntry};
use kalamdb_table_store::paths::{self, PathError};
use kalamdb_write_buffer::{BatchBuilder, RowError};

use super::instance::{InstanceError, View};
use super::storages::StoragesError;
use super::{Disowned, Engine, RootKey};

/// One consistent state of one instance.
pub struct Rows {
    /// Rows that are in no file; one batch, but for very much data.
    pub buffered: Vec<RecordBatch>,
    /// The files; none of the buffered rows is in one.
    pub view: Arc<View>,
    /// Where the files lie.
    pub root: RootKey,
}

/// An instance cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The data is another's now, who may have acknowledged rows that are not here.
    #[error(transparent)]
    Disowned(#[from] Disowned),
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

impl Engine {
    /// The rows that `owner` has in `table`: buffered ones with the columns `projection` (positions in the table's Arrow
    /// schema), at most `limit` of them, and the files. Blocking.
    ///
    /// # Errors
    /// If anything cannot be read; never fewer rows than there are.
    pub fn read(
        &self,
        table: &TableEntry,
        owner: &Owner,
        projection: &[usize],
        limit: Option<usize>,
    ) -> Result<Rows, ReadError> {
        self.check_owned()?;
        let id = Self::instance_id(table, owner);
        let instance = self.instances.get(&id)?;
        let mut batches = Batches::new(table, projection, usize::MAX);
        let mut damaged = None;
        // View and buffer under one lock: a flush published in between would show its rows twice or not at all.
        let guard = instance.view.read();
        let view = Arc::clone(&guard);
        if limit != Some(0) {
            self.buffer.scan(&id, view.flushed, &mut |_, _, row| match batches.push(row) {
                Ok(()) if limit.is_some_and(|limit| batches.rows() >= limit) => ControlFlow::Break(()),
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    damaged = Some(error);
                    ControlFlow::Break(())
                }
            })?;
        }
        drop(guard);
        if let Some(error) = damaged {
            return Err(error.into());
        }
        self.check_owner(table, &id, &view)?;
        Ok(Rows { buffered: batches.finish()?, view, root: RootKey::of(&table.location) })
    }

    /// The last fence before bytes are read: every file of the view lies below the prefix of its owner.
    pub(super) fn check_owner(&self, table: &TableEntry, id: &InstanceId, view: &View) -> Result<(), ReadError> {
        let prefix = format!("{}/", paths::instance_prefix(&table.location, &id.owner)?);
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
