//! Primary keys of rows in Arrow arrays, as the bytes that the write buffer and manifests order by.
//!
//! Owns: which columns make the key, and their checks. Does not own: the encoding ([`kalamdb_model::key`]).

use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, Schema};
use kalamdb_model::catalog::{Column, FIELD_ID_METADATA, TableEntry};
use kalamdb_model::types::ColumnType;
use kalamdb_model::value::Value;
use kalamdb_model::{ColumnId, key};

use crate::values::{self, ValueError};

/// Why a row has no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The batch lacks a key column.
    #[error("the batch has no key column `{column}`")]
    Missing {
        /// Its name.
        column: String,
    },
    /// The column is of another type than the table says.
    #[error("key column `{column}` is {found}, not {expected}")]
    Type {
        /// Its name.
        column: String,
        /// The table's type.
        expected: ColumnType,
        /// The batch's type.
        found: DataType,
    },
    /// NULL in a key.
    #[error("key column `{column}` is NULL in row {row}")]
    Null {
        /// Its name.
        column: String,
        /// Row of the batch.
        row: usize,
    },
    /// A text that is no UUID in a UUID column.
    #[error("key column `{column}` holds no UUID in row {row}")]
    Uuid {
        /// Its name.
        column: String,
        /// Row of the batch.
        row: usize,
    },
    /// A row that the batch does not have.
    #[error("the batch has no row {row}")]
    Row {
        /// The row.
        row: usize,
    },
}

/// The key columns of one batch, found once for all its rows.
#[derive(Debug)]
pub struct KeyColumns<'a> {
    columns: Vec<(&'a Column, ArrayRef)>,
    rows: usize,
}

/// The memcomparable key of one row.
///
/// # Errors
/// If the batch does not fit the table.
pub fn key_of(table: &TableEntry, batch: &RecordBatch, row: usize) -> Result<Vec<u8>, KeyError> {
    KeyColumns::find(table, batch)?.key(row)
}

impl<'a> KeyColumns<'a> {
    /// Finds the key columns of `table` in `batch`, by their ids, else by name. Other columns may be missing.
    ///
    /// # Errors
    /// If one is missing or of another type.
    pub fn find(table: &'a TableEntry, batch: &RecordBatch) -> Result<Self, KeyError> {
        let mut columns = Vec::with_capacity(table.key.len());
        for id in &table.key {
            let name = || format!("#{}", id.0);
            let column = table.column(*id).ok_or_else(|| KeyError::Missing { column: name() })?;
            let missing = || KeyError::Missing { column: column.name.to_string() };
            let at = position(&batch.schema(), *id, column.name.as_str()).ok_or_else(missing)?;
            let array = batch.column(at);
            check_type(column, array.data_type())?;
            columns.push((column, ArrayRef::clone(array)));
        }
        Ok(Self { columns, rows: batch.num_rows() })
    }

    /// The key of a row.
    ///
    /// # Errors
    /// If a value of it is NULL or no value of its type.
    pub fn key(&self, row: usize) -> Result<Vec<u8>, KeyError> {
        if row >= self.rows {
            return Err(KeyError::Row { row });
        }
        let values: Result<Vec<Value>, KeyError> =
            self.columns.iter().map(|(column, array)| value(column, array, row)).collect();
        Ok(key::encode(&values?))
    }
}

/// Where in an Arrow schema a catalog column is: by its id, and only in schemas without ids by its name.
#[must_use]
pub(crate) fn position(schema: &Schema, id: ColumnId, name: &str) -> Option<usize> {
    let wanted = id.0.to_string();
    let by_id = schema.fields().iter().position(|field| field.metadata().get(FIELD_ID_METADATA) == Some(&wanted));
    by_id.or_else(|| {
        let at = schema.index_of(name).ok()?;
        (!schema.field(at).metadata().contains_key(FIELD_ID_METADATA)).then_some(at)
    })
}

/// Whether an array holds what the column says, and that can be a key.
fn check_type(column: &Column, found: &DataType) -> Result<(), KeyError> {
    if column.ty.can_be_key() && values::check_type(found, &column.ty).is_ok() {
        return Ok(());
    }
    Err(KeyError::Type { column: column.name.to_string(), expected: column.ty.clone(), found: found.clone() })
}

/// One value of an array whose type [`check_type`] accepted.
pub(crate) fn value(column: &Column, array: &dyn Array, row: usize) -> Result<Value, KeyError> {
    match values::value(array, row, &column.ty) {
        Ok(Value::Null) => Err(KeyError::Null { column: column.name.to_string(), row }),
        Ok(value) => Ok(value),
        Err(ValueError::Uuid { .. }) => Err(KeyError::Uuid { column: column.name.to_string(), row }),
        Err(ValueError::Type { expected, found }) => {
            Err(KeyError::Type { column: column.name.to_string(), expected, found })
        }
    }
}
