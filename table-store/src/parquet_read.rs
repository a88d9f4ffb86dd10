//! Looks up primary keys in a Parquet file in object storage, reading as little of it as it can.
//!
//! Owns: what to skip (whole file, row groups and pages by their key range, all other columns). Does not own: general scans.
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
use kalamdb_model::key::{self, KeyRange};
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

    /// Reads the file at `path`, which has `size` bytes and `rows` rows: one that has others is not read.
    #[must_use]
    pub fn reader(&self, path: Path, size: u64, rows: u64) -> FileReader {
        FileReader { files: self.clone(), path, size, rows }
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
        found: u64,
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

impl ReadError {
    /// What a reader of the file at `path` said.
    fn of_reader(path: &str, said: ParquetError) -> Self {
        let other = |source| Self::File { path: path.to_owned(), source };
        match said {
            ParquetError::External(inner) => match inner.downcast::<Self>() {
                Ok(own) => *own,
                Err(inner) => other(ParquetError::External(inner)),
            },
            said => other(said),
        }
    }
}

/// Where in `file` each of `keys` is that it holds, whatever the file's deletion vector says.
///
/// No request when the file's key range holds none of them; else its end, and those pages of the key columns whose range
/// does.
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
    let rows = u32::try_from(file.rows).map_err(|_| ReadError::TooManyRows { path: file.path.clone() })?;
    let builder = open(files, file).await?;
    let likely = rows_with(&builder, table, &missing).map_err(failed)?;
    let other = |found| ReadError::Positions { path: file.path.clone(), expected: likely.len(), found };
    let mut positions = likely.iter();
    let roots = table.key.iter().filter_map(|id| position(builder.schema(), *id, table.column(*id)?.name.as_str()));
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let reader = builder.with_projection(mask).with_row_selection(likely.only(rows)).with_batch_size(BATCH_ROWS);
    let mut batches = reader.build().map_err(failed)?;
    while let Some(batch) = batches.try_next().await.map_err(failed)? {
        let columns = KeyColumns::find(table, &batch).map_err(wrong)?;
        for row in 0..batch.num_rows() {
            let (key, at) = (columns.key(row).map_err(wrong)?, positions.next());
            if missing.remove(&key) {
                found.insert(key, at.ok_or_else(|| other(likely.len() + 1))?);
            }
        }
        if missing.is_empty() {
            return Ok(found);
        }
    }
    // A key is only known to be missing when every row was seen that may have it.
    match positions.count() as u64 {
        0 => Ok(found),
        unseen => Err(other(likely.len() - unseen)),
    }
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
    Ok(rows_within(files, file, table, positions, usize::MAX).await?.unwrap_or_default())
}

/// As [`read_rows`]; `None` if the rows have more than `bytes_max` bytes of values, of which no more are held.
async fn rows_within(
    files: &DataFiles,
    file: &FileEntry,
    table: &TableEntry,
    positions: &Positions,
    bytes_max: usize,
) -> Result<Option<Vec<Vec<Value>>>, ReadError> {
    let failed = |source| ReadError::File { path: file.path.clone(), source };
    let builder = open(files, file).await?;
    let rows = u32::try_from(file.rows).map_err(|_| ReadError::TooManyRows { path: file.path.clone() })?;
    let wanted = table.columns.iter();
    let roots: Vec<usize> =
        wanted.filter_map(|column| position(builder.schema(), column.id, column.name.as_str())).collect();
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let fit = bytes_max / usize::try_from(file.widest_row).unwrap_or(usize::MAX).max(1);
    let reader = builder.with_projection(mask).with_row_selection(positions.only(rows));
    let mut batches = reader.with_batch_size(fit.clamp(1, BATCH_ROWS)).build().map_err(failed)?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    while let Some(batch) = batches.try_next().await.map_err(failed)? {
        let rows = values::rows(table, &batch);
        let rows = rows.map_err(|source| ReadError::Value { path: file.path.clone(), source })?;
        bytes += rows.iter().flatten().map(Value::size).sum::<usize>();
        if bytes > bytes_max {
            return Ok(None);
        }
        found.extend(rows);
    }
    if found.len() as u64 == positions.len() {
        Ok(Some(found))
    } else {
        Err(ReadError::Positions { path: file.path.clone(), expected: positions.len(), found: found.len() as u64 })
    }
}

/// The rows of `file` but those at `without`, in file order, at most `batch_rows` at once.
///
/// # Errors
/// If the file cannot be read; the stream ends at the first error.
pub(crate) async fn read_all_but(
    files: &DataFiles,
    file: &FileEntry,
    without: &Positions,
    batch_rows: usize,
) -> Result<Pin<Box<dyn Stream<Item = Result<RecordBatch, ReadError>> + Send>>, ReadError> {
    let path = file.path.clone();
    let failed = move |source| ReadError::File { path: path.clone(), source };
    let builder = open(files, file).await?;
    let rows = u32::try_from(file.rows).map_err(|_| ReadError::TooManyRows { path: file.path.clone() })?;
    let selection = without.all_but(rows);
    let batches = builder.with_row_selection(selection).with_batch_size(batch_rows).build().map_err(failed.clone())?;
    Ok(batches.map_err(failed).boxed())
}

async fn open(files: &DataFiles, file: &FileEntry) -> Result<ParquetRecordBatchStreamBuilder<FileReader>, ReadError> {
    let path = Path::parse(&file.path).map_err(|source| ReadError::Path { path: file.path.clone(), source })?;
    let opened = ParquetRecordBatchStreamBuilder::new(files.reader(path, file.bytes, file.rows)).await;
    opened.map_err(|source| ReadError::of_reader(&file.path, source))
}

/// Rows that follow each other in key order, with the least and the greatest value of their first key column, as beginnings
/// of keys; `None` where there is none, or none that can be used.
struct Run {
    rows: Range<u32>,
    min: Option<Vec<u8>>,
    max: Option<Vec<u8>>,
}

impl Run {
    /// Whether it leaves room for one of `keys`.
    fn may_hold(&self, keys: &BTreeSet<&Vec<u8>>) -> bool {
        match (&self.min, &self.max) {
            // The first key that is not below: the others are further above.
            (Some(min), Some(max)) => {
                keys.range::<&Vec<u8>, _>(min..).next().is_some_and(|key| *key <= max || key.starts_with(max))
            }
            _ => true,
        }
    }

    /// Whether all its keys are certainly below `bound`, or none is; `None`: neither is certain.
    fn is_below(&self, bound: &[u8]) -> Option<bool> {
        let below = self.max.as_ref().is_some_and(|max| max.as_slice() < bound && !bound.starts_with(max));
        let above = self.min.as_ref().is_some_and(|min| min.as_slice() >= bound);
        (below || above).then_some(below)
    }
}

/// What a file's statistics say of its first key column.
struct Runs<'a> {
    column: &'a Column,
    statistics: StatisticsConverter<'a>,
    footer: &'a ParquetMetaData,
}

impl<'a> Runs<'a> {
    fn of(
        builder: &'a ParquetRecordBatchStreamBuilder<FileReader>,
        table: &'a TableEntry,
    ) -> Result<Self, ParquetError> {
        let first_key = table.key.first().and_then(|id| table.column(*id));
        let column = first_key.ok_or_else(|| ParquetError::General(format!("table `{}` has no key", table.name)))?;
        let Some(at) = position(builder.schema(), column.id, column.name.as_str()) else {
            return Err(ArrowError::SchemaError(format!("no column `{}`", column.name)).into());
        };
        let name = builder.schema().field(at).name();
        let statistics = StatisticsConverter::try_new(name, builder.schema(), builder.parquet_schema())?;
        Ok(Self { column, statistics, footer: builder.metadata() })
    }

    fn runs(&self, first: u32, counts: &[u32], mins: &ArrayRef, maxes: &ArrayRef) -> Result<Vec<Run>, ParquetError> {
        let mut start = first;
        let run = |(at, count): (usize, &u32)| {
            let end = start.checked_add(*count).ok_or_else(|| ParquetError::General("too many rows".to_owned()))?;
            let rows = start..end;
            start = end;
            Ok(Run { rows, min: bound(self.column, mins, at), max: bound(self.column, maxes, at) })
        };
        counts.iter().enumerate().map(run).collect()
    }

    /// The row groups.
    fn groups(&self) -> Result<Vec<Run>, ParquetError> {
        let groups = self.footer.row_groups();
        let rows = groups.iter().map(|group| u32::try_from(group.num_rows()));
        let counts = rows.collect::<Result<Vec<u32>, _>>()?;
        let (mins, maxes) = (self.statistics.row_group_mins(groups)?, self.statistics.row_group_maxes(groups)?);
        self.runs(0, &counts, &mins, &maxes)
    }

    /// The pages of the row group with this number, which has the rows `of`; without a page index all as one.
    fn pages(&self, group: usize, of: Run) -> Result<Vec<Run>, ParquetError> {
        let (Some(columns), Some(offsets)) = (self.footer.column_index(), self.footer.offset_index()) else {
            return Ok(vec![of]);
        };
        let groups = self.footer.row_groups();
        let Some(counts) = self.statistics.data_page_row_counts(offsets, groups, [&group])? else {
            return Ok(vec![of]);
        };
        let mins = self.statistics.data_page_mins(columns, offsets, [&group])?;
        let maxes = self.statistics.data_page_maxes(columns, offsets, [&group])?;
        let counts = counts.values().iter().map(|count| u32::try_from(*count)).collect::<Result<Vec<u32>, _>>()?;
        let pages = self.runs(of.rows.start, &counts, &mins, &maxes)?;
        Ok(if pages.last().is_some_and(|last| last.rows.end == of.rows.end) { pages } else { vec![of] })
    }
}

/// Rows that may have one of `keys`: whole pages, judged by the range of the first key column. Without statistics: all.
fn rows_with(
    builder: &ParquetRecordBatchStreamBuilder<FileReader>,
    table: &TableEntry,
    keys: &BTreeSet<&Vec<u8>>,
) -> Result<Positions, ParquetError> {
    let runs = Runs::of(builder, table)?;
    let mut likely = Positions::default();
    for (group, run) in runs.groups()?.into_iter().enumerate().filter(|(_, run)| run.may_hold(keys)) {
        for page in runs.pages(group, run)?.into_iter().filter(|page| page.may_hold(keys)) {
            likely.insert_range(page.rows);
        }
    }
    Ok(likely)
}

/// How many rows of `file`, which has `rows` in key order, have keys below `bound`. Reads the keys of a page, or of a few
/// where many begin alike.
async fn rows_below(
    files: &DataFiles,
    file: &FileEntry,
    table: &TableEntry,
    bound: &[u8],
    rows: u32,
) -> Result<u32, ReadError> {
    let failed = |source| ReadError::File { path: file.path.clone(), source };
    if bound <= file.min_key.as_slice() {
        return Ok(0);
    }
    if bound > file.max_key.as_slice() {
        return Ok(rows);
    }
    let mut unsure = {
        let builder = open(files, file).await?;
        let runs = Runs::of(&builder, table).map_err(failed)?;
        let mut unsure = Vec::new();
        let groups = runs.groups().map_err(failed)?.into_iter().enumerate();
        for (group, run) in groups.filter(|(_, run)| run.is_below(bound).is_none()) {
            unsure.extend(runs.pages(group, run).map_err(failed)?);
        }
        // Nothing is unsure: the bound lies between two groups.
        if unsure.is_empty() {
            let below = runs.groups().map_err(failed)?.into_iter().filter(|run| run.is_below(bound) == Some(true));
            return Ok(below.map(|run| run.rows.end).max().unwrap_or(0));
        }
        unsure
    };
    // Whole pages are below, then perhaps one is in part, then none: halve until that one is found.
    let mut end = unsure.last().map_or(rows, |run| run.rows.end);
    while let Some(middle) = unsure.get(unsure.len() / 2) {
        let (at, span) = (unsure.len() / 2, middle.rows.clone());
        let below = match middle.is_below(bound) {
            Some(true) => span.len(),
            Some(false) => 0,
            None => {
                keys_of(files, file, table, span.clone(), rows).await?.partition_point(|key| key.as_slice() < bound)
            }
        };
        if below == 0 {
            end = span.start;
            unsure.truncate(at);
        } else if below == span.len() {
            unsure.drain(..=at);
        } else {
            return Ok(span.start + u32::try_from(below).unwrap_or(u32::MAX));
        }
    }
    Ok(end)
}

/// The keys of the rows `span` of `file`, which has `rows`.
async fn keys_of(
    files: &DataFiles,
    file: &FileEntry,
    table: &TableEntry,
    span: Range<u32>,
    rows: u32,
) -> Result<Vec<Vec<u8>>, ReadError> {
    let failed = |source| ReadError::File { path: file.path.clone(), source };
    let wrong = |source| ReadError::Key { path: file.path.clone(), source };
    let mut positions = Positions::default();
    positions.insert_range(span);
    let builder = open(files, file).await?;
    let roots = table.key.iter().filter_map(|id| position(builder.schema(), *id, table.column(*id)?.name.as_str()));
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let reader = builder.with_projection(mask).with_row_selection(positions.only(rows)).with_batch_size(BATCH_ROWS);
    let mut batches = reader.build().map_err(failed)?;
    let mut keys = Vec::new();
    while let Some(batch) = batches.try_next().await.map_err(failed)? {
        let columns = KeyColumns::find(table, &batch).map_err(wrong)?;
        for row in 0..batch.num_rows() {
            keys.push(columns.key(row).map_err(wrong)?);
        }
    }
    if keys.len() as u64 == positions.len() {
        Ok(keys)
    } else {
        Err(ReadError::Positions { path: file.path.clone(), expected: positions.len(), found: keys.len() as u64 })
    }
}

/// Rows of `file` with keys in `range`, but those at `hidden`: at most `limit`, those with the least keys, or with the
/// greatest if `descending`. By key, each with its values in the order of the table's columns. `None` if they have more than
/// `bytes_max` bytes.
///
/// # Errors
/// If the file cannot be read.
pub async fn read_range(
    files: &DataFiles,
    file: &FileEntry,
    table: &TableEntry,
    range: &KeyRange,
    hidden: &Positions,
    (limit, descending): (usize, bool),
    bytes_max: usize,
) -> Result<Option<Vec<(Vec<u8>, Vec<Value>)>>, ReadError> {
    let rows = u32::try_from(file.rows).map_err(|_| ReadError::TooManyRows { path: file.path.clone() })?;
    let start = rows_below(files, file, table, &range.from, rows).await?;
    let end = match &range.to {
        Some(to) => rows_below(files, file, table, to, rows).await?,
        None => rows,
    };
    let shown = |row: &u32| !hidden.contains(*row);
    let positions: Positions = if descending {
        (start..end).rev().filter(shown).take(limit).collect()
    } else {
        (start..end).filter(shown).take(limit).collect()
    };
    if positions.is_empty() {
        return Ok(Some(Vec::new()));
    }
    let key_positions = table.key_positions();
    let keyed = |values: Vec<Value>| {
        let key: Vec<Value> = key_positions.iter().map(|at| values[*at].clone()).collect();
        (key::encode(&key), values)
    };
    let found = rows_within(files, file, table, &positions, bytes_max).await?;
    Ok(found.map(|rows| rows.into_iter().map(keyed).collect()))
}

/// A statistic as the beginning of a key. `None` where there is none, or none that can be used.
fn bound(column: &Column, values: &ArrayRef, at: usize) -> Option<Vec<u8>> {
    value(column, values, at).ok().map(|value| key::encode(&[value]))
}

/// Reads ranges of one data file whose size and number of rows are known, and its footer.
#[derive(Debug, Clone)]
pub struct FileReader {
    files: DataFiles,
    path: Path,
    size: u64,
    rows: u64,
}

impl FileReader {
    /// Positions and counts of rows are taken from manifests: they mean nothing in a file of other rows.
    fn check(&self, footer: &ParquetMetaData) -> Result<(), ParquetError> {
        let found = footer.file_metadata().num_rows();
        if u64::try_from(found) == Ok(self.rows) {
            return Ok(());
        }
        let other = ReadError::Rows { path: self.path.to_string(), expected: self.rows, found };
        Err(ParquetError::External(Box::new(other)))
    }
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
                self.check(&footer)?;
                return Ok(footer);
            }
            let size = self.size;
            let hint = usize::try_from(size.min(FOOTER_BYTES)).unwrap_or(0);
            let reader = ParquetMetaDataReader::new()
                .with_prefetch_hint(Some(hint))
                .with_page_index_policy(PageIndexPolicy::Optional);
            let footer = Arc::new(reader.load_and_finish(&mut *self, size).await?);
            self.check(&footer)?;
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
