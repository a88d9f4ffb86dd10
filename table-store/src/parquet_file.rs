//! Writes the Parquet files of tables: sorted by key, each column bound to its catalog id.
//!
//! Owns: writer settings, file metadata, the check that keys rise. Does not own: names of files ([`crate::paths`]),
//! uploads, or how scans read (DataFusion does; [`locate_keys`] is for single keys).
//!
//! Settings, with the reasons of the layout measurements: ZSTD(1); row groups of 32,768 rows and pages of 1,024 (3 to 7
//! times faster point reads and latest-N than 131,072 / 8,192, at most 30 % slower full scans); page index; dictionaries
//! only where values repeat; no statistics of FLOAT and DOUBLE; a Bloom filter for keys that do not rise with time, in
//! files of 1,024 rows or more. A row group ends at 64 MiB decoded, too, however little that is in the file: it bounds
//! what a reader has in memory.
//!
//! A file is made in memory, so a crash leaves none.

use std::collections::HashSet;
use std::io::Write;
use std::sync::Arc;

use arrow::row::{RowConverter, SortField};
use arrow_array::cast::AsArray;
use arrow_array::types::{Int64Type, TimestampMicrosecondType};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{ArrowError, SchemaRef};
use kalamdb_model::catalog::TableEntry;
use kalamdb_model::types::ColumnType;
use parquet::arrow::{ArrowSchemaConverter, ArrowWriter};
use parquet::basic::{Compression, Encoding, Type as PhysicalType, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::metadata::{KeyValue, SortingColumn};
use parquet::file::properties::{BloomFilterPosition, EnabledStatistics, WriterProperties, WriterPropertiesBuilder};
use parquet::schema::types::SchemaDescriptor;

pub use crate::key_columns::{KeyColumns, KeyError, key_of};
pub use crate::parquet_read::{ReadError, locate_keys};
use crate::positions::Positions;
use crate::width;

/// Rows of a row group.
pub const ROW_GROUP_ROWS: usize = 32_768;
/// Most decoded bytes of a row group, but for a single row. Batches end where row groups do: none comes near the 2 GiB
/// that 32-bit offsets can count.
pub const ROW_GROUP_BYTES: usize = 64 << 20;
/// Rows of a page.
pub const PAGE_ROWS: usize = 1_024;
/// Smallest file that gets Bloom filters: below, reading its keys costs as much as reading the filter.
pub const BLOOM_ROWS_MIN: usize = 1_024;
/// Rows that are looked at to choose encodings, spread over what is there.
const SAMPLE_ROWS: usize = 2_048;
/// Share of different values below which a dictionary pays.
const DICTIONARY_SHARE_MAX: f64 = 0.3;

/// Keys of a file's key-value metadata.
pub mod metadata_keys {
    /// Number of the table.
    pub const TABLE_ID: &str = "kalamdb:table_id";
    /// Schema version of the table when the file was written.
    pub const SCHEMA_VERSION: &str = "kalamdb:schema_version";
    /// Epoch of the shard's owner.
    pub const EPOCH: &str = "kalamdb:epoch";
    /// Smallest `_seq` in the file.
    pub const MIN_SEQ: &str = "kalamdb:min_seq";
    /// Largest `_seq` in the file.
    pub const MAX_SEQ: &str = "kalamdb:max_seq";
}

/// What a file turned out to be: the facts of its [`crate::FileEntry`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileStats {
    /// Rows.
    pub rows: u64,
    /// Bytes.
    pub bytes: u64,
    /// What the rows take decoded.
    pub raw_bytes: u64,
    /// What the widest of them takes.
    pub widest_row: u64,
    /// Smallest key, memcomparable.
    pub min_key: Vec<u8>,
    /// Largest key.
    pub max_key: Vec<u8>,
    /// Smallest `_seq`.
    pub min_seq: i64,
    /// Largest `_seq`.
    pub max_seq: i64,
    /// Rows that are deleted ones.
    pub tombstones: Positions,
    /// `_updated` of the first of them; 0 without any.
    pub deleted_since_us: i64,
}

/// Why no file was written. What `out` got until then is no file.
#[derive(Debug, thiserror::Error)]
pub enum WriteError<E: std::error::Error + 'static> {
    /// The rows could not be had.
    #[error("failed to read the rows to write")]
    Rows(#[source] E),
    /// There are none.
    #[error("a file needs at least one row")]
    Empty,
    /// A batch is not of the table's schema.
    #[error("the rows do not fit the table's schema")]
    Schema(#[source] ArrowError),
    /// A row without a key.
    #[error("a row has no key")]
    Key(#[source] KeyError),
    /// Keys that do not rise strictly.
    #[error("row {row} does not follow the row before it in key order")]
    Order {
        /// Row of the file.
        row: u64,
    },
    /// More rows than a position can count.
    #[error("a file holds at most {} rows", u32::MAX)]
    TooManyRows,
    /// The writer failed.
    #[error("failed to write Parquet")]
    Parquet(#[source] ParquetError),
}

/// Writes one file of `table` to `out`. Batches hold the table's own columns and `_seq`, `_updated`, `_deleted`
/// ([`TableEntry::arrow_schema`]), with keys that rise strictly over all batches. `epoch` is that of the shard's owner.
///
/// Work for a blocking thread: nothing here waits. Memory: the first 1,024 rows or 64 MiB of them, one batch, and a row
/// group.
///
/// # Errors
/// If rows do not fit the table or do not rise; nothing is sorted or dropped silently.
pub fn write<E: std::error::Error + 'static, W: Write + Send>(
    table: &TableEntry,
    epoch: u32,
    batches: impl IntoIterator<Item = Result<RecordBatch, E>>,
    out: W,
) -> Result<FileStats, WriteError<E>> {
    let schema = table.arrow_schema();
    let mut batches = batches.into_iter().map(|batch| conform(batch, &schema));
    let head = take_head(&mut batches)?;
    let properties = properties(table, epoch, &schema, &head).map_err(WriteError::Parquet)?;
    let writer = ArrowWriter::try_new(out, SchemaRef::clone(&schema), Some(properties)).map_err(WriteError::Parquet)?;
    let mut groups = RowGroups { writer, rows: 0, bytes: 0 };
    let mut seen = Seen::default();
    for batch in head.into_iter().map(Ok).chain(batches) {
        let batch = batch?;
        let widths = width::of_rows(&batch);
        seen.add(table, &batch, &widths)?;
        groups.write(&batch, &widths).map_err(WriteError::Parquet)?;
    }
    let mut writer = groups.writer;
    for (key, seq) in [(metadata_keys::MIN_SEQ, seen.min_seq), (metadata_keys::MAX_SEQ, seen.max_seq)] {
        writer.append_key_value_metadata(KeyValue::new(key.to_owned(), seq.to_string()));
    }
    writer.finish().map_err(WriteError::Parquet)?;
    let bytes = writer.bytes_written() as u64;
    Ok(FileStats {
        rows: u64::from(seen.rows),
        bytes,
        raw_bytes: seen.raw_bytes,
        widest_row: seen.widest_row,
        min_key: seen.min_key,
        max_key: seen.max_key,
        min_seq: seen.min_seq,
        max_seq: seen.max_seq,
        tombstones: seen.tombstones,
        deleted_since_us: seen.deleted_since_us,
    })
}

/// Gives a batch the table's schema with its field ids, which also checks types and NULLs.
fn conform<E: std::error::Error + 'static>(
    batch: Result<RecordBatch, E>,
    schema: &SchemaRef,
) -> Result<RecordBatch, WriteError<E>> {
    let batch = batch.map_err(WriteError::Rows)?;
    let named = batch.schema_ref().fields().iter().zip(schema.fields()).all(|(found, own)| found.name() == own.name());
    if !named {
        let names: Vec<_> = batch.schema_ref().fields().iter().map(|field| field.name().clone()).collect();
        return Err(WriteError::Schema(ArrowError::SchemaError(format!("columns are {}", names.join(", ")))));
    }
    RecordBatch::try_new(SchemaRef::clone(schema), batch.columns().to_vec()).map_err(WriteError::Schema)
}

/// Batches until encodings and Bloom filters can be decided, or a row group is full.
fn take_head<E: std::error::Error + 'static>(
    batches: &mut impl Iterator<Item = Result<RecordBatch, WriteError<E>>>,
) -> Result<Vec<RecordBatch>, WriteError<E>> {
    let (mut head, mut rows, mut bytes) = (Vec::new(), 0, 0);
    while rows < BLOOM_ROWS_MIN && bytes < ROW_GROUP_BYTES {
        let Some(batch) = batches.next() else { break };
        let batch = batch?;
        rows += batch.num_rows();
        bytes += width::of_rows(&batch).into_iter().sum::<usize>();
        head.push(batch);
    }
    if rows == 0 { Err(WriteError::Empty) } else { Ok(head) }
}

/// The file that is being written, and what its last row group has so far.
struct RowGroups<W: Write> {
    writer: ArrowWriter<W>,
    rows: usize,
    bytes: usize,
}

impl<W: Write + Send> RowGroups<W> {
    /// Writes rows that take so much each.
    fn write(&mut self, batch: &RecordBatch, widths: &[usize]) -> Result<(), ParquetError> {
        let mut first = 0;
        for (row, width) in widths.iter().enumerate() {
            let is_full = self.rows == ROW_GROUP_ROWS || self.bytes + width > ROW_GROUP_BYTES;
            if is_full && self.rows > 0 {
                self.writer.write(&batch.slice(first, row - first))?;
                self.writer.flush()?;
                (self.rows, self.bytes, first) = (0, 0, row);
            }
            self.rows += 1;
            self.bytes += width;
        }
        self.writer.write(&batch.slice(first, batch.num_rows() - first))
    }
}

/// What the file's entry says, gathered row by row; and the last key, which the next must exceed.
#[derive(Default)]
struct Seen {
    rows: u32,
    raw_bytes: u64,
    widest_row: u64,
    min_key: Vec<u8>,
    max_key: Vec<u8>,
    min_seq: i64,
    max_seq: i64,
    tombstones: Positions,
    deleted_since_us: i64,
}

impl Seen {
    fn add<E: std::error::Error + 'static>(
        &mut self,
        table: &TableEntry,
        batch: &RecordBatch,
        widths: &[usize],
    ) -> Result<(), WriteError<E>> {
        let keys = KeyColumns::find(table, batch).map_err(WriteError::Key)?;
        let seqs = batch.column(table.columns.len()).as_primitive::<Int64Type>();
        let updated = batch.column(table.columns.len() + 1).as_primitive::<TimestampMicrosecondType>();
        let deleted = batch.column(table.columns.len() + 2).as_boolean();
        for (row, width) in widths.iter().enumerate() {
            let (key, seq) = (keys.key(row).map_err(WriteError::Key)?, seqs.value(row));
            self.raw_bytes += *width as u64;
            self.widest_row = self.widest_row.max(*width as u64);
            if self.rows == 0 {
                self.min_key.clone_from(&key);
                (self.min_seq, self.max_seq) = (seq, seq);
            } else if key <= self.max_key {
                return Err(WriteError::Order { row: u64::from(self.rows) });
            }
            self.max_key = key;
            self.min_seq = self.min_seq.min(seq);
            self.max_seq = self.max_seq.max(seq);
            if deleted.value(row) {
                let at = updated.value(row);
                self.deleted_since_us = if self.tombstones.is_empty() { at } else { self.deleted_since_us.min(at) };
                self.tombstones.insert(self.rows);
            }
            self.rows = self.rows.checked_add(1).ok_or(WriteError::TooManyRows)?;
        }
        Ok(())
    }
}

fn properties(
    table: &TableEntry,
    epoch: u32,
    schema: &SchemaRef,
    head: &[RecordBatch],
) -> Result<WriterProperties, ParquetError> {
    let parquet_schema = ArrowSchemaConverter::new().convert(schema)?;
    let metadata = [
        (metadata_keys::TABLE_ID, table.id.0),
        (metadata_keys::SCHEMA_VERSION, table.schema_version),
        (metadata_keys::EPOCH, epoch),
    ];
    let mut builder = WriterProperties::builder()
        .set_created_by(format!("KalamDB {}", env!("CARGO_PKG_VERSION")))
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_data_page_row_count_limit(PAGE_ROWS)
        .set_write_batch_size(PAGE_ROWS)
        .set_statistics_enabled(EnabledStatistics::Page)
        // Before the page index, so that one request for the end of the file brings them, too.
        .set_bloom_filter_position(BloomFilterPosition::End)
        .set_key_value_metadata(Some(
            metadata.map(|(key, value)| KeyValue::new(key.to_owned(), value.to_string())).to_vec(),
        ));
    builder = builder.set_sorting_columns(Some(sorting(table, &parquet_schema)));
    for (at, dictionary) in dictionaries(head)?.into_iter().enumerate() {
        builder = encode_column(builder, &parquet_schema, at, dictionary);
    }
    if has_bloom(table, head) {
        for leaf in key_leaves(table, &parquet_schema) {
            let path = parquet_schema.column(leaf).path().clone();
            builder = builder.set_column_bloom_filter_enabled(path, true);
        }
    }
    Ok(builder.build())
}

/// Leaf columns of the key, in key order. Keys are of flat types, so each has one leaf.
fn key_leaves(table: &TableEntry, schema: &SchemaDescriptor) -> Vec<usize> {
    let leaf = |root: usize| (0..schema.num_columns()).find(|leaf| schema.get_column_root_idx(*leaf) == root);
    table.key_positions().into_iter().filter_map(leaf).collect()
}

fn sorting(table: &TableEntry, schema: &SchemaDescriptor) -> Vec<SortingColumn> {
    let column = |leaf| i32::try_from(leaf).ok();
    let ascending = |column_idx| SortingColumn { column_idx, descending: false, nulls_first: false };
    key_leaves(table, schema).into_iter().filter_map(column).map(ascending).collect()
}

/// A single BIGINT or TIMESTAMP key rises with time, so that smallest and largest key tell files apart already.
fn has_bloom(table: &TableEntry, head: &[RecordBatch]) -> bool {
    let types: Vec<_> = table.key.iter().filter_map(|id| table.column(*id)).map(|column| &column.ty).collect();
    let monotone = matches!(types[..], [ColumnType::BigInt | ColumnType::Timestamp]);
    !monotone && head.iter().map(RecordBatch::num_rows).sum::<usize>() >= BLOOM_ROWS_MIN
}

/// Dictionary where values repeat, else DELTA for 64-bit integers and PLAIN for the rest: parquet 59 cannot skip 32-bit
/// ones whose equal steps add up to more than 32 bits.
fn encode_column(
    mut builder: WriterPropertiesBuilder,
    schema: &SchemaDescriptor,
    root: usize,
    dictionary: bool,
) -> WriterPropertiesBuilder {
    for leaf in (0..schema.num_columns()).filter(|leaf| schema.get_column_root_idx(*leaf) == root) {
        let column = schema.column(leaf);
        builder = builder.set_column_dictionary_enabled(column.path().clone(), dictionary);
        if !dictionary && column.physical_type() == PhysicalType::INT64 {
            builder = builder.set_column_encoding(column.path().clone(), Encoding::DELTA_BINARY_PACKED);
        }
        // Minima and maxima leave NaN out, and SQL does not: `x = 'NaN'` and `x > 1` would skip pages that hold one.
        if matches!(column.physical_type(), PhysicalType::FLOAT | PhysicalType::DOUBLE) {
            builder = builder.set_column_statistics_enabled(column.path().clone(), EnabledStatistics::None);
        }
    }
    builder
}

/// For each column, whether a sample of the first rows repeats its values.
fn dictionaries(head: &[RecordBatch]) -> Result<Vec<bool>, ParquetError> {
    let Some(first) = head.first() else { return Ok(Vec::new()) };
    (0..first.num_columns())
        .map(|at| {
            let columns: Vec<&ArrayRef> = head.iter().map(|batch| batch.column(at)).collect();
            repeats(&columns).map_err(ParquetError::from)
        })
        .collect()
}

fn repeats(columns: &[&ArrayRef]) -> Result<bool, ArrowError> {
    let Some(first) = columns.first() else { return Ok(false) };
    let converter = RowConverter::new(vec![SortField::new(first.data_type().clone())])?;
    let rows: usize = columns.iter().map(|column| column.len()).sum();
    let step = rows.div_ceil(SAMPLE_ROWS).max(1);
    let (mut different, mut sampled) = (HashSet::new(), 0_u32);
    for column in columns {
        let picked = arrow::array::UInt64Array::from_iter_values((0..column.len() as u64).step_by(step));
        let picked = arrow::compute::take(column, &picked, None)?;
        let rows = converter.convert_columns(&[Arc::clone(&picked)])?;
        sampled += u32::try_from(rows.num_rows()).unwrap_or(u32::MAX);
        different.extend(rows.iter().map(|row| row.owned()));
    }
    let different = u32::try_from(different.len()).unwrap_or(u32::MAX);
    Ok(f64::from(different) < f64::from(sampled) * DICTIONARY_SHARE_MAX)
}
