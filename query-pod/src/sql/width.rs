//! How many rows the batches of a statement have: fewer where its rows are wide.
//!
//! DataFusion counts rows, not bytes, and what a filter or a join leaves of batches is glued together up to that
//! number: 8,192 rows of a megabyte are more than 32-bit offsets can count, and than there is memory.

use std::sync::atomic::{AtomicU64, Ordering};

use arrow::array::{RecordBatch, UInt64Array};
use arrow::compute::take_record_batch;
use arrow::error::ArrowError;
use kalamdb_model::TableEntry;
use kalamdb_table_store::{FileEntry, width};

/// Rows of a batch where they are not wide, DataFusion's default.
pub(super) const BATCH_ROWS: usize = 8_192;

/// What a batch of average rows takes, about.
const AVERAGE_BYTES: u64 = 32 << 20;

/// What a batch of the widest rows takes: an eighth of what offsets can count, because joins put rows side by side.
const WIDEST_BYTES: u64 = 256 << 20;

/// How wide the rows are that the scans of a statement came across. An extension of its session.
#[derive(Debug, Default)]
pub(super) struct Width {
    /// Of the file or buffer where it is largest.
    average: AtomicU64,
    widest: AtomicU64,
}

impl Width {
    /// Takes note of what a scan of `table` reads.
    pub(super) fn note(&self, table: &TableEntry, files: &[FileEntry], buffered: &[RecordBatch]) {
        let absent = width::of_absent(table);
        for file in files {
            self.note_rows(file.average_row() + absent, file.widest_row + absent);
        }
        for batch in buffered {
            let rows = width::of_rows(batch);
            let bytes: usize = rows.iter().sum();
            self.note_rows((bytes / rows.len().max(1)) as u64, rows.into_iter().max().unwrap_or(0) as u64);
        }
    }

    fn note_rows(&self, average: u64, widest: u64) {
        self.average.fetch_max(average, Ordering::Relaxed);
        self.widest.fetch_max(widest, Ordering::Relaxed);
    }

    /// Most rows of a batch.
    pub(super) fn batch_rows(&self) -> usize {
        let fit = |bytes: u64, row: &AtomicU64| bytes / row.load(Ordering::Relaxed).max(1);
        let rows = fit(AVERAGE_BYTES, &self.average).min(fit(WIDEST_BYTES, &self.widest));
        usize::try_from(rows).unwrap_or(BATCH_ROWS).clamp(1, BATCH_ROWS)
    }
}

/// `batches`, in copies of at most `rows_max` rows if these are fewer than usual: of a slice DataFusion counts all the
/// memory that it is a slice of, and of one batch there may be thousands.
pub(super) fn cut(batches: Vec<RecordBatch>, rows_max: usize) -> Result<Vec<RecordBatch>, ArrowError> {
    if rows_max >= BATCH_ROWS {
        return Ok(batches);
    }
    let mut parts = Vec::new();
    for batch in batches {
        // Without columns there is nothing to copy.
        if batch.num_rows() <= rows_max || batch.num_columns() == 0 {
            parts.push(batch);
            continue;
        }
        for first in (0..batch.num_rows()).step_by(rows_max) {
            let rows = first..(first + rows_max).min(batch.num_rows());
            let rows = UInt64Array::from_iter_values(rows.map(|row| row as u64));
            parts.push(take_record_batch(&batch, &rows)?);
        }
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, StringArray};
    use arrow::compute::concat_batches;

    use super::*;

    #[test]
    fn batches_are_as_short_as_rows_are_wide() {
        let batch_rows = |noted: &[(u64, u64)]| {
            let width = Width::default();
            noted.iter().for_each(|(average, widest)| width.note_rows(*average, *widest));
            width.batch_rows()
        };
        assert_eq!(batch_rows(&[]), 8_192);
        assert_eq!(batch_rows(&[(300, 4_000), (100, 200)]), 8_192);
        assert_eq!(batch_rows(&[(1 << 20, 1 << 20), (100, 200)]), 32);
        assert_eq!(batch_rows(&[(300, 4 << 20)]), 64, "a wide row among narrow ones");
        assert_eq!(batch_rows(&[(300, 300), (1 << 40, 1 << 40)]), 1);
    }

    #[test]
    fn the_parts_of_a_batch_have_all_its_rows_and_each_its_own_memory() {
        let texts: ArrayRef = Arc::new(StringArray::from_iter_values((0..100).map(|n| format!("{n}").repeat(1_000))));
        let batch = RecordBatch::try_from_iter([("text", texts)]).unwrap();
        let parts = cut(vec![batch.clone()], 30).unwrap();
        let rows: Vec<usize> = parts.iter().map(RecordBatch::num_rows).collect();
        assert_eq!(rows, [30, 30, 30, 10]);
        assert_eq!(concat_batches(&batch.schema(), &parts).unwrap(), batch);
        let bytes: usize = parts.iter().map(RecordBatch::get_array_memory_size).sum();
        assert!(bytes < 2 * batch.get_array_memory_size(), "{bytes}");
        assert_eq!(cut(vec![batch.clone()], BATCH_ROWS).unwrap(), std::slice::from_ref(&batch));
        assert_eq!(cut(vec![batch.slice(0, 0)], 1).unwrap().len(), 1, "its schema is needed");
    }
}
