//! Values of rows in Arrow arrays.
//!
//! Owns: Arrow value → [`Value`] for every column type, the inverse of what flushes write.

use std::sync::Arc;

use arrow::buffer::OffsetBuffer;
use arrow::compute::concat;
use arrow_array::cast::AsArray;
use arrow_array::types::{
    Date32Type, Decimal128Type, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type, Time64MicrosecondType,
    TimestampMicrosecondType,
};
use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float32Array, Float64Array, Int16Array,
    Int32Array, Int64Array, ListArray, RecordBatch, StringArray, Time64MicrosecondArray, TimestampMicrosecondArray,
    new_empty_array, new_null_array,
};
use arrow_schema::{ArrowError, DataType, TimeUnit};
use kalamdb_model::catalog::TableEntry;
use kalamdb_model::types::ColumnType;
use kalamdb_model::value::Value;

use crate::key_columns::position;

/// An array that holds no values of a column's type.
#[derive(Debug, thiserror::Error)]
pub enum ValueError {
    /// Another Arrow type.
    #[error("the array is {found}, not {expected}")]
    Type {
        /// The column's type.
        expected: ColumnType,
        /// The array's.
        found: DataType,
    },
    /// A text that is no UUID as it is stored.
    #[error("row {row} holds no UUID")]
    Uuid {
        /// Row of the array.
        row: usize,
    },
}

/// The value of `row`. The array holds what [`ColumnType::arrow`] says; zones of timestamps are not compared, all are UTC.
///
/// # Errors
/// If it does not.
pub fn value(array: &dyn Array, row: usize, ty: &ColumnType) -> Result<Value, ValueError> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    check_type(array.data_type(), ty)?;
    Ok(match ty {
        ColumnType::Boolean => Value::Boolean(array.as_boolean().value(row)),
        ColumnType::SmallInt => Value::SmallInt(array.as_primitive::<Int16Type>().value(row)),
        ColumnType::Int => Value::Int(array.as_primitive::<Int32Type>().value(row)),
        ColumnType::BigInt => Value::BigInt(array.as_primitive::<Int64Type>().value(row)),
        ColumnType::Float => Value::Float(array.as_primitive::<Float32Type>().value(row)),
        ColumnType::Double => Value::Double(array.as_primitive::<Float64Type>().value(row)),
        ColumnType::Decimal { .. } => Value::Decimal(array.as_primitive::<Decimal128Type>().value(row)),
        ColumnType::Text => Value::Text(array.as_string::<i32>().value(row).to_owned()),
        ColumnType::Json => Value::Json(array.as_string::<i32>().value(row).to_owned()),
        ColumnType::Bytes => Value::Bytes(array.as_binary::<i32>().value(row).to_vec()),
        ColumnType::Timestamp => Value::Timestamp(array.as_primitive::<TimestampMicrosecondType>().value(row)),
        ColumnType::Date => Value::Date(array.as_primitive::<Date32Type>().value(row)),
        ColumnType::Time => Value::Time(array.as_primitive::<Time64MicrosecondType>().value(row)),
        ColumnType::Uuid => uuid(array.as_string::<i32>().value(row)).ok_or(ValueError::Uuid { row })?,
        ColumnType::Array(item) => {
            let items = array.as_list::<i32>().value(row);
            Value::Array((0..items.len()).map(|at| value(items.as_ref(), at, item)).collect::<Result<_, _>>()?)
        }
    })
}

pub(crate) fn check_type(found: &DataType, ty: &ColumnType) -> Result<(), ValueError> {
    let fits = match (ty, found) {
        (ColumnType::Timestamp, DataType::Timestamp(TimeUnit::Microsecond, _)) => true,
        // Items are checked one by one.
        (ColumnType::Array(_), DataType::List(_)) => true,
        (ty, found) => ty.arrow() == *found,
    };
    if fits { Ok(()) } else { Err(ValueError::Type { expected: ty.clone(), found: found.clone() }) }
}

/// Only the form that is stored: another spelling would sort elsewhere than its key.
fn uuid(text: &str) -> Option<Value> {
    let canonical = !text.bytes().any(|byte| byte.is_ascii_uppercase()) && text.len() == 36;
    if canonical { Value::from_text(text, &ColumnType::Uuid).ok() } else { None }
}

/// An array of this one value.
///
/// # Errors
/// If the value is none of the type.
pub fn array(value: &Value, ty: &ColumnType) -> Result<ArrayRef, ArrowError> {
    Ok(match (value, ty) {
        (Value::Null, _) => new_null_array(&ty.arrow(), 1),
        (Value::Boolean(v), ColumnType::Boolean) => Arc::new(BooleanArray::from(vec![*v])),
        (Value::SmallInt(v), ColumnType::SmallInt) => Arc::new(Int16Array::from_value(*v, 1)),
        (Value::Int(v), ColumnType::Int) => Arc::new(Int32Array::from_value(*v, 1)),
        (Value::BigInt(v), ColumnType::BigInt) => Arc::new(Int64Array::from_value(*v, 1)),
        (Value::Float(v), ColumnType::Float) => Arc::new(Float32Array::from_value(*v, 1)),
        (Value::Double(v), ColumnType::Double) => Arc::new(Float64Array::from_value(*v, 1)),
        (Value::Decimal(v), ColumnType::Decimal { .. }) => {
            Arc::new(Decimal128Array::from_value(*v, 1).with_data_type(ty.arrow()))
        }
        (Value::Text(v), ColumnType::Text) | (Value::Json(v), ColumnType::Json) => {
            Arc::new(StringArray::from_iter_values([v]))
        }
        (Value::Bytes(v), ColumnType::Bytes) => Arc::new(BinaryArray::from_iter_values([v])),
        (Value::Timestamp(v), ColumnType::Timestamp) => {
            Arc::new(TimestampMicrosecondArray::from_value(*v, 1).with_data_type(ty.arrow()))
        }
        (Value::Date(v), ColumnType::Date) => Arc::new(Date32Array::from_value(*v, 1)),
        (Value::Time(v), ColumnType::Time) => Arc::new(Time64MicrosecondArray::from_value(*v, 1)),
        (Value::Uuid(v), ColumnType::Uuid) => {
            Arc::new(StringArray::from_iter_values([uuid::Uuid::from_bytes(*v).to_string()]))
        }
        (Value::Array(items), ColumnType::Array(item)) => {
            let arrays: Vec<ArrayRef> = items.iter().map(|value| array(value, item)).collect::<Result<_, _>>()?;
            let borrowed: Vec<&dyn Array> = arrays.iter().map(AsRef::as_ref).collect();
            let values = if arrays.is_empty() { new_empty_array(&item.arrow()) } else { concat(&borrowed)? };
            let field = Arc::new(item.arrow_field("item", true));
            Arc::new(ListArray::try_new(field, OffsetBuffer::from_lengths([values.len()]), values, None)?)
        }
        (value, ty) => return Err(ArrowError::CastError(format!("{value:?} is no {ty}"))),
    })
}

/// All rows of a batch, each with its values in the order of the table's columns; a column that the batch does not have
/// reads as [`kalamdb_model::Column::absent`] says.
///
/// # Errors
/// If a column is of another type than the table's.
pub fn rows(table: &TableEntry, batch: &RecordBatch) -> Result<Vec<Vec<Value>>, ValueError> {
    let arrays: Vec<Option<ArrayRef>> = table
        .columns
        .iter()
        .map(|column| position(&batch.schema(), column.id, column.name.as_str()).map(|at| Arc::clone(batch.column(at))))
        .collect();
    let row = |row: usize| {
        let cells = table.columns.iter().zip(&arrays);
        cells
            .map(|(column, array)| match array {
                Some(array) => value(array.as_ref(), row, &column.ty),
                None => Ok(column.absent().clone()),
            })
            .collect()
    };
    (0..batch.num_rows()).map(row).collect()
}
