//! What the libraries below KalamDB do alone with its files: DataFusion reading them, the Parquet writer making them.
//!
//! In this process, without HTTP, SQL of users, tokens or checks: a bound that the server cannot reach, and its ratio to
//! it is what the server costs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use datafusion::arrow::array::RecordBatch;
use datafusion::arrow::error::ArrowError;
use datafusion::arrow::util::display::array_value_to_string;
use datafusion::prelude::{ParquetReadOptions, SessionContext};
use kalamdb_table_store::FileEntry;
use kalamdb_table_store::parquet_file::{PAGE_ROWS, ROW_GROUP_ROWS};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{Compression, Encoding, Type, ZstdLevel};
use parquet::file::metadata::RowGroupMetaData;
use parquet::file::properties::{BloomFilterPosition, EnabledStatistics, WriterProperties};
use serde::Deserialize;

/// The table that [`open`] makes.
pub const TABLE: &str = "plain";

/// The part of `_manifest.json` (docs/formats.md) that is needed here.
#[derive(Deserialize)]
struct Described {
    files: Vec<FileEntry>,
}

/// The files that the server says `folder` consists of, as of the last flush or compaction that was asked for.
///
/// # Errors
/// If there is no such description.
pub fn files(folder: &Path) -> anyhow::Result<Vec<FileEntry>> {
    let path = folder.join("_manifest.json");
    let text = std::fs::read(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
    let described: Described =
        serde_json::from_slice(&text).with_context(|| format!("`{}` is damaged", path.display()))?;
    Ok(described.files)
}

/// DataFusion as it comes, with `paths` as one table.
///
/// # Errors
/// If the files are no Parquet.
pub async fn open(paths: &[PathBuf]) -> anyhow::Result<SessionContext> {
    let context = SessionContext::new();
    let paths: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
    let rows = Box::pin(context.read_parquet(paths, ParquetReadOptions::default())).await?;
    context.register_table(TABLE, rows.into_view())?;
    Ok(context)
}

/// The rows of the answer to `sql`, as text.
///
/// # Errors
/// If the query fails.
pub async fn answer(context: &SessionContext, sql: &str) -> anyhow::Result<Vec<Vec<String>>> {
    let query = Box::pin(context.sql(sql)).await?;
    let mut rows = Vec::new();
    for batch in Box::pin(query.collect()).await? {
        for row in 0..batch.num_rows() {
            let values = batch.columns().iter().map(|column| array_value_to_string(column, row));
            rows.push(values.collect::<Result<_, ArrowError>>()?);
        }
    }
    Ok(rows)
}

/// How long it takes to encode the rows of the flushed file at `path` once more, as the flush did: in memory, on one
/// thread, with its settings. Decoding them before is not counted.
///
/// # Errors
/// If the file is no Parquet.
pub fn encoding(path: &Path) -> anyhow::Result<Duration> {
    let file = std::fs::File::open(path).with_context(|| format!("failed to open `{}`", path.display()))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)?.with_batch_size(8_192);
    let properties = properties(reader.metadata().row_group(0))?;
    let batches: Vec<RecordBatch> = reader.build()?.collect::<Result<_, ArrowError>>()?;
    let first = batches.first().context("a flushed file has rows")?;
    let started = Instant::now();
    let mut writer = ArrowWriter::try_new(Vec::new(), first.schema(), Some(properties))?;
    for batch in &batches {
        writer.write(batch)?;
    }
    writer.close()?;
    Ok(started.elapsed())
}

/// The settings of `table_store::parquet_file`. What it chose for each column is read off the file.
fn properties(written: &RowGroupMetaData) -> anyhow::Result<WriterProperties> {
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_data_page_row_count_limit(PAGE_ROWS)
        .set_write_batch_size(PAGE_ROWS)
        .set_statistics_enabled(EnabledStatistics::Page)
        .set_bloom_filter_position(BloomFilterPosition::End)
        .set_sorting_columns(written.sorting_columns().cloned());
    for column in written.columns() {
        let has_dictionary = column.dictionary_page_offset().is_some();
        properties = properties.set_column_dictionary_enabled(column.column_path().clone(), has_dictionary);
        if !has_dictionary && column.column_type() == Type::INT64 {
            properties = properties.set_column_encoding(column.column_path().clone(), Encoding::DELTA_BINARY_PACKED);
        }
    }
    Ok(properties.build())
}
