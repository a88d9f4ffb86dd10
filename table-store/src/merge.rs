//! Merges sorted files of one instance into one sequence of rows, sorted by key: what a compaction writes.
//!
//! Owns: the order of the merge, and which rows are left out. Does not own: which files are merged, or the new file.
//! Memory: one batch of each file, about 32 MiB together, with its keys; and one row group of each as it is encoded.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::pin::Pin;
use std::sync::Arc;

use arrow::compute::{interleave_record_batch, take};
use arrow_array::cast::AsArray;
use arrow_array::types::TimestampMicrosecondType;
use arrow_array::{Array, ArrayRef, RecordBatch, RecordBatchOptions, UInt32Array, new_null_array};
use arrow_schema::ArrowError;
use futures::{Stream, TryStreamExt};
use kalamdb_model::catalog::TableEntry;

use crate::key_columns::{KeyColumns, KeyError, position};
use crate::manifest::FileEntry;
use crate::parquet_read::{self, DataFiles, ReadError};
use crate::{values, width};

/// Rows of a batch that a merge gives.
const BATCH_ROWS: usize = 8_192;

/// Bytes of such a batch, about, and of all those together that it is made of.
const BATCH_BYTES: usize = 32 << 20;

/// Batches of files that one batch takes rows from: where few rows are kept, they must not all be held.
const BATCHES_MAX: usize = 256;

/// Why a merge ended early.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// A file.
    #[error("failed to read a file to merge")]
    Read(#[from] ReadError),
    /// Its rows.
    #[error("`{path}` does not fit its table")]
    Batch {
        /// The file.
        path: String,
        /// What is wrong.
        source: ArrowError,
    },
    /// Its keys.
    #[error("`{path}` does not fit its table")]
    Key {
        /// The file.
        path: String,
        /// What is wrong.
        source: KeyError,
    },
    /// Two rows with one key, of which none says that it was replaced.
    #[error("`{path}` has a row that another file has, too")]
    Twice {
        /// The file.
        path: String,
    },
}

type Batches = Pin<Box<dyn Stream<Item = Result<RecordBatch, ReadError>> + Send>>;

/// A file that is being read: the batch at hand, and its next row.
struct Source {
    path: String,
    batches: Batches,
    batch: RecordBatch,
    /// What each row of the batch takes.
    widths: Vec<usize>,
    keys: Vec<Vec<u8>>,
    next: usize,
}

/// A merge under way.
pub struct Merge<'a> {
    table: &'a TableEntry,
    deleted_until_us: Option<i64>,
    sources: Vec<Source>,
    heap: BinaryHeap<Reverse<(Vec<u8>, usize)>>,
    last: Option<Vec<u8>>,
}

impl<'a> Merge<'a> {
    /// Begins to merge `files` without the rows that are replaced, and without those that were deleted up to
    /// `deleted_until_us` (microseconds since 1970).
    ///
    /// # Errors
    /// If a file cannot be read.
    pub async fn begin(
        from: &DataFiles,
        table: &'a TableEntry,
        files: &[FileEntry],
        deleted_until_us: Option<i64>,
    ) -> Result<Self, MergeError> {
        let mut merge = Self { table, deleted_until_us, sources: Vec::new(), heap: BinaryHeap::new(), last: None };
        for file in files {
            let batch_rows = rows_within(BATCH_BYTES / files.len(), file, table);
            let batches = parquet_read::read_all_but(from, file, &file.replaced, batch_rows).await?;
            let (path, batch) = (file.path.clone(), RecordBatch::new_empty(table.arrow_schema()));
            merge.sources.push(Source { path, batches, batch, widths: Vec::new(), keys: Vec::new(), next: 0 });
            merge.advance(merge.sources.len() - 1).await?;
        }
        Ok(merge)
    }

    /// The next rows, at most 8,192; `None` at the end.
    ///
    /// # Errors
    /// See [`MergeError`]; the merge is over then.
    pub async fn next(&mut self) -> Result<Option<RecordBatch>, MergeError> {
        let mut batches: Vec<RecordBatch> = Vec::new();
        let mut at: Vec<Option<usize>> = vec![None; self.sources.len()];
        let mut rows: Vec<(usize, usize)> = Vec::new();
        let mut bytes = 0;
        while rows.len() < BATCH_ROWS && bytes < BATCH_BYTES && batches.len() < BATCHES_MAX {
            let Some(Reverse((key, index))) = self.heap.pop() else { break };
            let source = &self.sources[index];
            if self.last.as_ref() == Some(&key) {
                return Err(MergeError::Twice { path: source.path.clone() });
            }
            if !self.is_dropped(source) {
                let batch = *at[index].get_or_insert_with(|| {
                    batches.push(source.batch.clone());
                    batches.len() - 1
                });
                rows.push((batch, source.next));
                bytes += source.widths[source.next];
            }
            self.last = Some(key);
            if self.sources[index].next + 1 == self.sources[index].keys.len() {
                at[index] = None;
            }
            self.sources[index].next += 1;
            self.advance(index).await?;
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let borrowed: Vec<&RecordBatch> = batches.iter().collect();
        let path = || self.sources.first().map(|source| source.path.clone()).unwrap_or_default();
        interleave_record_batch(&borrowed, &rows).map(Some).map_err(|source| MergeError::Batch { path: path(), source })
    }

    fn is_dropped(&self, source: &Source) -> bool {
        let Some(until) = self.deleted_until_us else { return false };
        let own = self.table.columns.len();
        let updated = source.batch.column(own + 1).as_primitive::<TimestampMicrosecondType>();
        source.batch.column(own + 2).as_boolean().value(source.next) && updated.value(source.next) <= until
    }

    /// Puts the next row of a source in line, from its next batch if need be.
    async fn advance(&mut self, index: usize) -> Result<(), MergeError> {
        let source = &mut self.sources[index];
        while source.next == source.keys.len() {
            let Some(batch) = source.batches.try_next().await? else { return Ok(()) };
            let path = || source.path.clone();
            source.batch =
                conform(self.table, &batch).map_err(|error| MergeError::Batch { path: path(), source: error })?;
            let keys = KeyColumns::find(self.table, &source.batch)
                .and_then(|columns| (0..source.batch.num_rows()).map(|row| columns.key(row)).collect());
            source.widths = width::of_rows(&source.batch);
            source.keys = keys.map_err(|error| MergeError::Key { path: path(), source: error })?;
            source.next = 0;
        }
        self.heap.push(Reverse((std::mem::take(&mut source.keys[source.next]), index)));
        Ok(())
    }
}

/// How many rows of `file` take so many bytes, about: few where rows have megabytes.
fn rows_within(bytes: usize, file: &FileEntry, table: &TableEntry) -> usize {
    let row = file.average_row() + width::of_absent(table);
    usize::try_from(bytes as u64 / row.max(1)).unwrap_or(BATCH_ROWS).clamp(1, BATCH_ROWS)
}

/// Gives a batch the table's schema: columns in its order, those that the file lacks as they read there.
fn conform(table: &TableEntry, batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    let schema = table.arrow_schema();
    let rows = batch.num_rows();
    let own = table.columns.iter().map(|column| match position(&batch.schema(), column.id, column.name.as_str()) {
        Some(at) => Ok(Arc::clone(batch.column(at))),
        None if column.absent().is_null() => Ok(new_null_array(&column.ty.arrow(), rows)),
        None => repeated(&values::array(column.absent(), &column.ty)?, rows),
    });
    let system = schema.fields().iter().skip(table.columns.len()).map(|field| {
        let missing = || ArrowError::SchemaError(format!("no column `{}`", field.name()));
        batch.column_by_name(field.name()).map(Arc::clone).ok_or_else(missing)
    });
    let columns: Vec<ArrayRef> = own.chain(system).collect::<Result<_, _>>()?;
    RecordBatch::try_new_with_options(schema, columns, &RecordBatchOptions::new().with_row_count(Some(rows)))
}

/// The one value of an array, so often.
fn repeated(one: &dyn Array, rows: usize) -> Result<ArrayRef, ArrowError> {
    take(one, &UInt32Array::from_value(0, rows), None)
}
