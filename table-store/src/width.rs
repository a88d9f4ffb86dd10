//! How many bytes rows take in memory, decoded: what bounds row groups, batches and compactions.
//!
//! What they take in a file says little of it: a dictionary has a text of a megabyte once, however many rows have it.

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use kalamdb_model::catalog::TableEntry;

/// What each row of a batch takes.
#[must_use]
pub fn of_rows(batch: &RecordBatch) -> Vec<usize> {
    let mut rows = vec![0; batch.num_rows()];
    for column in batch.columns() {
        add(column.as_ref(), &mut rows);
    }
    rows
}

/// What the columns that a file may lack add to each of its rows, at most.
#[must_use]
pub fn of_absent(table: &TableEntry) -> u64 {
    let values = table.columns.iter().map(|column| column.absent());
    values.filter(|value| !value.is_null()).map(|value| value.size() as u64).sum()
}

/// Adds what each value of an array takes to its row.
fn add(array: &dyn Array, rows: &mut [usize]) {
    match array.data_type() {
        DataType::Utf8 => add_each(rows, array.as_string::<i32>().offsets().lengths()),
        DataType::Binary => add_each(rows, array.as_binary::<i32>().offsets().lengths()),
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            let mut items: Vec<usize> = vec![0; list.values().len()];
            add(list.values().as_ref(), &mut items);
            // A part of a list array has all its items.
            let first = list.offsets().first().map_or(0, |first| usize::try_from(*first).unwrap_or(0));
            let mut items = items.into_iter().skip(first);
            add_each(rows, list.offsets().lengths().map(|length| items.by_ref().take(length).sum::<usize>()));
        }
        fixed => {
            let bytes = fixed.primitive_width().unwrap_or(1);
            rows.iter_mut().for_each(|row| *row += bytes);
        }
    }
}

/// Adds values of these lengths, each with its offset.
fn add_each(rows: &mut [usize], lengths: impl Iterator<Item = usize>) {
    rows.iter_mut().zip(lengths).for_each(|(row, length)| *row += length + size_of::<i32>());
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::types::Int64Type;
    use arrow_array::{ArrayRef, BinaryArray, BooleanArray, Int64Array, ListArray, StringArray};

    use super::*;

    #[test]
    fn a_row_takes_what_its_values_do_in_any_part_of_a_batch() {
        let lists = [Some(vec![Some(1), None]), None, Some(vec![Some(7)])];
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("number", Arc::new(Int64Array::from(vec![1, 2, 3]))),
            ("boolean", Arc::new(BooleanArray::from(vec![true, false, true]))),
            ("text", Arc::new(StringArray::from(vec![Some("four"), None, Some("")]))),
            ("bytes", Arc::new(BinaryArray::from_iter_values([&b"12"[..], b"", b"3"]))),
            ("list", Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>(lists))),
        ];
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let rows = of_rows(&batch);
        assert_eq!(rows, [8 + 1 + 8 + 6 + 20, 8 + 1 + 4 + 4 + 4, 8 + 1 + 4 + 5 + 12]);
        assert_eq!(of_rows(&batch.slice(1, 2)), &rows[1..]);
        assert!(of_rows(&batch.slice(0, 0)).is_empty());
    }
}
