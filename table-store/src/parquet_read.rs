//! Looks up primary keys in a Parquet file in object storage, reading as little of it as it can.
//!
//! Owns: what to skip (whole file and row groups by their key range, all other columns). Does not own: general scans.
//!
//! An object that is missing, shorter or other than its manifest entry says is an error, never "no such key".

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::ArrowError;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, TryFutureExt, TryStreamExt};
use kalamdb_model::catalog::{Column, TableEntry};
use kalamdb_model::key;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::arrow_reader::statistics::StatisticsConverter;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use crate::key_columns::{KeyColumns, KeyError, position, value};
use crate::manifest::FileEntry;

/// Read from the end of a file at once: footer and page index of most files, and all of a small one.
const FOOTER_BYTES: u64 = 64 << 10;
/// Rows decoded at once.
const BATCH_ROWS: usize = 8_192;

/// Why keys could not be looked up.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The manifest names no path.
    #[error("`{path}` is no path")]
    Path {
        /// What it names.
        path: String,
        /// What is wrong.
        source: object_store::path::Error,
    },
    /// The file cannot be read: not there, no answer, or damaged.
    #[error("failed to read `{path}`")]
    File {
        /// The file.
        path: String,
        /// What is wrong.
        source: ParquetError,
    },
    /// The file has other rows than its entry says.
    #[error("`{path}` has {found} rows, its manifest says {expected}")]
    Rows {
        /// The file.
        path: String,
        /// In the manifest.
        expected: u64,
        /// In the file.
        found: i64,
    },
    /// Its key columns are not the table's.
    #[error("`{path}` does not fit its table")]
    Key {
        /// The file.
        path: String,
        /// What is wrong.
        source: KeyError,
    },
}

/// Which of `keys` are in `file`, deleted rows included.
///
/// No request when the file's key range holds none of them; else its end, and the key columns of those row groups whose
/// range does.
///
/// # Errors
/// If the file cannot be read whole.
pub async fn find_keys(
    store: &Arc<dyn ObjectStore>,
    file: &FileEntry,
    table: &TableEntry,
    keys: &BTreeSet<Vec<u8>>,
) -> Result<BTreeSet<Vec<u8>>, ReadError> {
    let mut missing: BTreeSet<&Vec<u8>> = keys.range(file.min_key.clone()..=file.max_key.clone()).collect();
    let mut found = BTreeSet::new();
    if missing.is_empty() {
        return Ok(found);
    }
    let failed = |source| ReadError::File { path: file.path.clone(), source };
    let wrong = |source| ReadError::Key { path: file.path.clone(), source };
    let builder = open(store, file).await?;
    let groups = groups_with(&builder, table, &missing).map_err(failed)?;
    let roots = table.key.iter().filter_map(|id| position(builder.schema(), *id, table.column(*id)?.name.as_str()));
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let reader = builder.with_projection(mask).with_row_groups(groups).with_batch_size(BATCH_ROWS);
    let mut batches = reader.build().map_err(failed)?;
    while let Some(batch) = batches.try_next().await.map_err(failed)? {
        collect(table, &batch, &mut missing, &mut found).map_err(wrong)?;
        if missing.is_empty() {
            break;
        }
    }
    Ok(found)
}

fn collect(
    table: &TableEntry,
    batch: &RecordBatch,
    missing: &mut BTreeSet<&Vec<u8>>,
    found: &mut BTreeSet<Vec<u8>>,
) -> Result<(), KeyError> {
    let columns = KeyColumns::find(table, batch)?;
    for row in 0..batch.num_rows() {
        let key = columns.key(row)?;
        if missing.remove(&key) {
            found.insert(key);
        }
    }
    Ok(())
}

async fn open(
    store: &Arc<dyn ObjectStore>,
    file: &FileEntry,
) -> Result<ParquetRecordBatchStreamBuilder<FileReader>, ReadError> {
    let path = Path::parse(&file.path).map_err(|source| ReadError::Path { path: file.path.clone(), source })?;
    let reader = FileReader { store: Arc::clone(store), path, size: file.bytes };
    let builder = ParquetRecordBatchStreamBuilder::new(reader)
        .await
        .map_err(|source| ReadError::File { path: file.path.clone(), source })?;
    let rows = builder.metadata().file_metadata().num_rows();
    if u64::try_from(rows) == Ok(file.rows) {
        Ok(builder)
    } else {
        Err(ReadError::Rows { path: file.path.clone(), expected: file.rows, found: rows })
    }
}

/// Row groups that may hold one of `keys`, judged by the range of the first key column. Without statistics: all.
fn groups_with(
    builder: &ParquetRecordBatchStreamBuilder<FileReader>,
    table: &TableEntry,
    keys: &BTreeSet<&Vec<u8>>,
) -> Result<Vec<usize>, ParquetError> {
    let groups = builder.metadata().row_groups();
    let first = table.key.first().and_then(|id| table.column(*id));
    let Some(column) = first else { return Ok((0..groups.len()).collect()) };
    let Some(at) = position(builder.schema(), column.id, column.name.as_str()) else {
        return Err(ArrowError::SchemaError(format!("no column `{}`", column.name)).into());
    };
    let name = builder.schema().field(at).name();
    let statistics = StatisticsConverter::try_new(name, builder.schema(), builder.parquet_schema())?;
    let (mins, maxes) = (statistics.row_group_mins(groups)?, statistics.row_group_maxes(groups)?);
    let may_hold = |group: &usize| match (bound(column, &mins, *group), bound(column, &maxes, *group)) {
        // The first key that is not below the group: the others are above it.
        (Some(min), Some(max)) => {
            let first = keys.iter().find(|key| ***key >= min);
            first.is_some_and(|key| **key <= max || key.starts_with(&max))
        }
        _ => true,
    };
    Ok((0..groups.len()).filter(may_hold).collect())
}

/// A statistic as the beginning of a key. `None` where there is none, or none that can be used.
fn bound(column: &Column, values: &ArrayRef, group: usize) -> Option<Vec<u8>> {
    value(column, values, group).ok().map(|value| key::encode(&[value]))
}

/// Reads ranges of one object whose size is known.
#[derive(Debug, Clone)]
struct FileReader {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: u64,
}

impl AsyncFileReader for FileReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        let length = range.end - range.start;
        async move { whole(self.store.get_range(&self.path, range).await.map_err(external)?, length) }.boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        async move {
            let found = self.store.get_ranges(&self.path, &ranges).map_err(external).await?;
            let lengths = ranges.iter().map(|range| range.end - range.start);
            found.into_iter().zip(lengths).map(|(bytes, length)| whole(bytes, length)).collect()
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move {
            let size = self.size;
            let hint = usize::try_from(size.min(FOOTER_BYTES)).unwrap_or(0);
            let reader = ParquetMetaDataReader::new().with_prefetch_hint(Some(hint)).with_arrow_reader_options(options);
            Ok(Arc::new(reader.load_and_finish(self, size).await?))
        }
        .boxed()
    }
}

/// Stores answer a range past the end with what there is.
fn whole(bytes: Bytes, length: u64) -> Result<Bytes, ParquetError> {
    if bytes.len() as u64 == length {
        Ok(bytes)
    } else {
        Err(ParquetError::EOF(format!("the file ends {} bytes early", length.saturating_sub(bytes.len() as u64))))
    }
}

fn external(error: object_store::Error) -> ParquetError {
    ParquetError::External(Box::new(error))
}
