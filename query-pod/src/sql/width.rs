//! How many rows the batches of a statement have: fewer where its rows are wide.
//!
//! DataFusion counts rows, not bytes, and what a filter or a join leaves of batches is glued together up to that
//! number: 8,192 rows of a megabyte are more than 32-bit offsets can count, and than there is memory.

use arrow::array::RecordBatch;
use kalamdb_model::TableEntry;
use kalamdb_table_store::{FileEntry, width};

/// Rows of a batch where they are not wide, DataFusion's default.
pub(super) const BATCH_ROWS: usize = 8_192;

/// What a batch of average rows takes, about.
const AVERAGE_BYTES: u64 = 32 << 20;

/// What a batch of the widest rows takes: an eighth of what offsets can count, because joins put rows side by side.
const WIDEST_BYTES: u64 = 256 << 20;

/// How wide the rows are that the scans of a statement come across.
#[derive(Debug, Default)]
pub(super) struct Width {
    /// Of the file or buffer where it is largest.
    average: u64,
    widest: u64,
}

impl Width {
    /// Takes note of what scans of `table` read.
    pub(super) fn note(&mut self, table: &TableEntry, files: &[FileEntry], buffered: &[RecordBatch]) {
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

    fn note_rows(&mut self, average: u64, widest: u64) {
        self.average = self.average.max(average);
        self.widest = self.widest.max(widest);
    }

    /// Most rows of a batch.
    pub(super) fn batch_rows(&self) -> usize {
        let rows = (AVERAGE_BYTES / self.average.max(1)).min(WIDEST_BYTES / self.widest.max(1));
        usize::try_from(rows).unwrap_or(BATCH_ROWS).clamp(1, BATCH_ROWS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_as_short_as_rows_are_wide() {
        let batch_rows = |noted: &[(u64, u64)]| {
            let mut width = Width::default();
            noted.iter().for_each(|(average, widest)| width.note_rows(*average, *widest));
            width.batch_rows()
        };
        assert_eq!(batch_rows(&[]), 8_192);
        assert_eq!(batch_rows(&[(300, 4_000), (100, 200)]), 8_192);
        assert_eq!(batch_rows(&[(1 << 20, 1 << 20), (100, 200)]), 32);
        assert_eq!(batch_rows(&[(300, 4 << 20)]), 64, "a wide row among narrow ones");
        assert_eq!(batch_rows(&[(300, 300), (1 << 40, 1 << 40)]), 1);
    }
}
