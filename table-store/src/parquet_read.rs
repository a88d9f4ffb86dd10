//! Looks up primary keys in a Parquet file in object storage, reading as little of it as it can.
//!
//! Owns: what to skip (whole file and row groups by their key range, all other columns). Does not own: general scans.
//!
//! An object that is missing, shorter or other than its manifest entry says is an error, never "no such key".

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::ArrowError;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt, TryFutureExt, TryStreamExt};
use kalamdb_model::catalog::{Column, TableEntry};
use kalamdb_model::key;
use kalamdb_model::value::Value;
use object_store::ObjectStore;
use object_store::path::Path;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::arrow_reader::statistics::StatisticsConverter;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use parquet::errors::ParquetError;
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader};

use crate::footers::{Footers, Key};
use crate::key_columns::{KeyColumns, KeyError, position, value};
use crate::manifest::FileEntry;
use crate::positions::Positions;
use crate::values::{self, ValueError};

/// Read from the end of a file at once: footer and page index of a million rows, and all of a small file. The cache has
/// chunks of that size.
const FOOTER_BYTES: u64 = 512 << 10;
/// Rows decoded at once.
const BATCH_ROWS: usize = 8_192;
/// Bytes decoded at once, about, where whole files are read.
pub(crate) const BATCH_BYTES: usize = 32 << 20;

/// The data files of one storage root: where their bytes come from, and their decoded footers.
#[derive(Clone, Debug)]
pub struct DataFiles {
    store: Arc<dyn ObjectStore>,
    root: Arc<str>,
    footers: Footers,
}

impl DataFiles {
    /// `root` names the store: no two that share `footers` may have one name.
    #[must_use]
    pub const fn new(store: Arc<dyn ObjectStore>, root: Arc<str>, footers: Footers) -> Self {
        Self { store, root, footers }
    }

    /// Reads the file at `path`, which has `size` bytes.
    #[must_use]
    pub fn reader(&self, path: Path, size: u64) -> FileReader {
        FileReader { files: self.clone(), path, size }
    }
}

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
    /// More rows than a position can count.
    #[error("`{path}` has more than {} rows", u32::MAX)]
    TooManyRows {
        /// The file.
        path: String,
    },
    /// Positions that the file does not have.
    #[error("`{path}` has {found} of {expected} rows that were asked for")]
    Positions {
        /// The file.
        path: String,
        /// How many were asked for.
        expected: u64,
        /// How many there are.
        found: usize,
    },
    /// A column is not the table's.
    #[error("`{path}` does not fit its table")]
    Value {
        /// The file.
        path: String,
        /// What is wrong.
        source: ValueError,
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

/// Where in `file` each of `keys` is that it holds, whatever the file's deletion vector says.
///
/// No request when the file's key range holds none of them; else its end, and the key columns of those row groups whose
/// range does.
///
/// # Errors
/// If the file cannot be read whole.
pub async fn locate_keys(
    files: &DataFiles,
    file: &FileEntry,
    table: &TableEntry,
    keys: &BTreeSet<Vec<u8>>,
) -> Result<BTreeMap<Vec<u8>, u32>, ReadError> {
    let mut missing: BTreeSet<&Vec<u8>> = keys.range(file.min_key.clone()..=file.max_key.clone()).collect();
    let mut found = BTreeMap::new();
    if missing.is_empty() {
        return Ok(found);
    }
    let failed = |source| ReadError::File { path: file.path.clone(), source };
    let wrong = |source| ReadError::Key { path: file.path.clone(), source };
    let builder = open(files, file).await?;
    let groups = groups_with(&builder, table, &missing).map_err(failed)?;
    let mut positions = rows_of(&builder, &groups);
    let roots = table.key.iter().filter_map(|id| position(builder.schema(), *id, table.column(*id)?.name.as_str()));
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let reader = builder.with_projection(mask).with_row_groups(groups).with_batch_size(BATCH_ROWS);
    let mut batches = reader.build().map_err(failed)?;
    while let Some(batch) = batches.try_next().await.map_err(failed)? {
        let columns = KeyColumns::find(table, &batch).map_err(wrong)?;
        for row in 0..batch.num_rows() {
            let (key, at) = (columns.key(row).map_err(wrong)?, positions.next());
            if missing.remove(&key) {
                let at = at.ok_or_else(|| ReadError::TooManyRows { path: file.path.clone() })?;
                found.insert(key, at);
            }
        }
        if missing.is_empty() {
            break;
        }
    }
    Ok(found)
}

/// The rows of `file` at `positions`, in file order, with their values in the order of the table's columns.
///
/// # Errors
/// If the file cannot be read, or does not have all of them.
pub async fn read_rows(
    files: &DataFiles,
    file: &FileEntry,
    table: &TableEntry,
    positions: &Positions,
) -> Result<Vec<Vec<Value>>, ReadError> {
    let failed = |source| ReadError::File { path: file.path.clone(), source };
    let builder = open(files, file).await?;
    let rows = u32::try_from(file.rows).map_err(|_| ReadError::TooManyRows { path: file.path.clone() })?;
    let wanted = table.columns.iter();
    let roots: Vec<usize> =
        wanted.filter_map(|column| position(builder.schema(), column.id, column.name.as_str())).collect();
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let reader = builder.with_projection(mask).with_row_selection(positions.only(rows)).build().map_err(failed)?;
    let mut found = Vec::new();
    let mut batches = reader;
    while let Some(batch) = batches.try_next().await.map_err(failed)? {
        let rows = values::rows(table, &batch);
        found.extend(rows.map_err(|source| ReadError::Value { path: file.path.clone(), source })?);
    }
    if found.len() as u64 == positions.len() {
        Ok(found)
    } else {
        Err(ReadError::Positions { path: file.path.clone(), expected: positions.len(), found: found.len() })
    }
}

/// The rows of `file` but those at `without`, in file order.
///
/// # Errors
/// If the file cannot be read; the stream ends at the first error.
pub(crate) async fn read_all_but(
    files: &DataFiles,
    file: &FileEntry,
    without: &Positions,
) -> Result<Pin<Box<dyn Stream<Item = Result<RecordBatch, ReadError>> + Send>>, ReadError> {
    let path = file.path.clone();
    let failed = move |source| ReadError::File { path: path.clone(), source };
    let builder = open(files, file).await?;
    let rows = u32::try_from(file.rows).map_err(|_| ReadError::TooManyRows { path: file.path.clone() })?;
    let selection = without.all_but(rows);
    // Rows may have megabytes: then few at once.
    let raw: u64 = builder.metadata().row_groups().iter().map(|group| group.total_byte_size().unsigned_abs()).sum();
    let fit = BATCH_BYTES as u64 / (raw / file.rows.max(1)).max(1);
    let batch_rows = usize::try_from(fit).unwrap_or(BATCH_ROWS).clamp(1, BATCH_ROWS);
    let batches = builder.with_row_selection(selection).with_batch_size(batch_rows).build().map_err(failed.clone())?;
    Ok(batches.map_err(failed).boxed())
}

/// Positions in the file of the rows that reading `groups` gives.
fn rows_of(
    builder: &ParquetRecordBatchStreamBuilder<FileReader>,
    groups: &[usize],
) -> impl Iterator<Item = u32> + use<> {
    let counts: Vec<u32> =
        builder.metadata().row_groups().iter().map(|group| u32::try_from(group.num_rows()).unwrap_or(0)).collect();
    let first = |group: usize| counts.iter().take(group).copied().fold(0, u32::saturating_add);
    let ranges: Vec<_> = groups.iter().map(|group| (first(*group), counts.get(*group).copied().unwrap_or(0))).collect();
    ranges.into_iter().flat_map(|(first, count)| first..first.saturating_add(count))
}

async fn open(files: &DataFiles, file: &FileEntry) -> Result<ParquetRecordBatchStreamBuilder<FileReader>, ReadError> {
    let path = Path::parse(&file.path).map_err(|source| ReadError::Path { path: file.path.clone(), source })?;
    let builder = ParquetRecordBatchStreamBuilder::new(files.reader(path, file.bytes))
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

/// Reads ranges of one data file whose size is known, and its footer.
#[derive(Debug, Clone)]
pub struct FileReader {
    files: DataFiles,
    path: Path,
    size: u64,
}

impl AsyncFileReader for FileReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        async move {
            let found = self.get_byte_ranges(vec![range]).await?;
            found.into_iter().next().ok_or_else(|| ParquetError::EOF("the store gave no bytes".to_owned()))
        }
        .boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, Result<Vec<Bytes>, ParquetError>> {
        async move {
            let found = self.files.store.get_ranges(&self.path, &ranges).map_err(external).await?;
            let lengths = ranges.iter().map(|range| range.end - range.start);
            found.into_iter().zip(lengths).map(|(bytes, length)| whole(bytes, length)).collect()
        }
        .boxed()
    }

    /// With the page index, whatever the options: footers are shared between readers of different options.
    fn get_metadata<'a>(
        &'a mut self,
        _: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move {
            let key = Key { root: Arc::clone(&self.files.root), path: self.path.clone(), size: self.size };
            if let Some(footer) = self.files.footers.get(&key) {
                return Ok(footer);
            }
            let size = self.size;
            let hint = usize::try_from(size.min(FOOTER_BYTES)).unwrap_or(0);
            let reader = ParquetMetaDataReader::new()
                .with_prefetch_hint(Some(hint))
                .with_page_index_policy(PageIndexPolicy::Optional);
            let footer = Arc::new(reader.load_and_finish(&mut *self, size).await?);
            self.files.footers.keep(key, &footer);
            Ok(footer)
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
