//! Values between JSON, columns and DataFusion.

use std::sync::Arc;

use arrow::array::{ArrayRef, new_empty_array};
use arrow::datatypes::{DataType, Field};
use datafusion::common::ScalarValue;
use datafusion::error::{DataFusionError, Result};
use kalamdb_model::{ColumnType, Value};
use serde_json::value::RawValue;

use crate::error::ApiError;

/// `value`, which is of type `ty`, for DataFusion.
///
/// # Errors
/// If an array of such values cannot be made, which no checked value causes.
pub fn scalar(value: &Value, ty: &ColumnType) -> Result<ScalarValue> {
    Ok(match (value, ty) {
        (Value::Null, _) => ScalarValue::try_from(&ty.arrow())?,
        (Value::Boolean(v), _) => ScalarValue::Boolean(Some(*v)),
        (Value::SmallInt(v), _) => ScalarValue::Int16(Some(*v)),
        (Value::Int(v), _) => ScalarValue::Int32(Some(*v)),
        (Value::BigInt(v), _) => ScalarValue::Int64(Some(*v)),
        (Value::Float(v), _) => ScalarValue::Float32(Some(*v)),
        (Value::Double(v), _) => ScalarValue::Float64(Some(*v)),
        (Value::Decimal(v), ColumnType::Decimal { precision, scale }) => {
            ScalarValue::Decimal128(Some(*v), *precision, i8::try_from(*scale).unwrap_or(0))
        }
        (Value::Text(v) | Value::Json(v), _) => ScalarValue::Utf8(Some(v.clone())),
        (Value::Bytes(v), _) => ScalarValue::Binary(Some(v.clone())),
        (Value::Timestamp(v), _) => ScalarValue::TimestampMicrosecond(Some(*v), Some("UTC".into())),
        (Value::Date(v), _) => ScalarValue::Date32(Some(*v)),
        (Value::Time(v), _) => ScalarValue::Time64Microsecond(Some(*v)),
        (Value::Uuid(v), _) => ScalarValue::Utf8(Some(uuid::Uuid::from_bytes(*v).to_string())),
        (Value::Array(items), ColumnType::Array(item)) => list(items, item)?,
        (value, ty) => return Err(DataFusionError::Internal(format!("a value of another type than {ty}: {value:?}"))),
    })
}

fn list(items: &[Value], item: &ColumnType) -> Result<ScalarValue> {
    let scalars: Vec<ScalarValue> = items.iter().map(|value| scalar(value, item)).collect::<Result<_>>()?;
    let values: ArrayRef =
        if scalars.is_empty() { new_empty_array(&item.arrow()) } else { ScalarValue::iter_to_array(scalars)? };
    let offsets = arrow::buffer::OffsetBuffer::from_lengths([values.len()]);
    let field = Arc::new(item.arrow_field("item", true));
    Ok(ScalarValue::List(Arc::new(arrow::array::ListArray::try_new(field, offsets, values, None)?)))
}

/// Parameter `number` (from 1) for a place of type `wanted`, which is what the planner inferred, or for any place.
///
/// # Errors
/// 400 naming the parameter.
pub fn parameter(number: usize, raw: &RawValue, wanted: Option<&DataType>) -> Result<ScalarValue, ApiError> {
    let invalid = |message: String| ApiError::invalid("INVALID_PARAMETER", format!("${number}: {message}"));
    let known = wanted.map(normal).and_then(|ty| ColumnType::of_arrow(&Field::new("", ty, true)));
    let (value, ty) = match known {
        Some(ty) => (of_json(raw, &ty).map_err(|error| invalid(error.to_string()))?, ty),
        None => natural(raw).map_err(invalid)?,
    };
    scalar(&value, &ty).map_err(|error| invalid(error.to_string()))
}

/// A text parameter may stand for JSON and UUID columns too, which are text to the planner; objects then as their text.
fn of_json(raw: &RawValue, ty: &ColumnType) -> Result<Value, kalamdb_model::ValueError> {
    if *ty == ColumnType::Text && raw.get().starts_with(['{', '[']) {
        return Ok(Value::Text(raw.get().to_owned()));
    }
    Value::from_json(raw, ty)
}

/// Types that the planner may infer and parameters do not have.
fn normal(ty: &DataType) -> DataType {
    use arrow::datatypes::TimeUnit;
    match ty {
        DataType::Utf8View | DataType::LargeUtf8 => DataType::Utf8,
        DataType::BinaryView | DataType::LargeBinary | DataType::FixedSizeBinary(_) => DataType::Binary,
        DataType::Int8 | DataType::UInt8 => DataType::Int16,
        DataType::UInt16 => DataType::Int32,
        DataType::UInt32 | DataType::UInt64 => DataType::Int64,
        DataType::Timestamp(_, _) => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        DataType::Time32(_) | DataType::Time64(_) => DataType::Time64(TimeUnit::Microsecond),
        other => other.clone(),
    }
}

/// The type that JSON itself suggests: for `SELECT $1` and its like.
fn natural(raw: &RawValue) -> Result<(Value, ColumnType), String> {
    let text = raw.get();
    let ty = match text.as_bytes().first() {
        Some(b't' | b'f') => ColumnType::Boolean,
        Some(b'-' | b'0'..=b'9') if text.contains(['.', 'e', 'E']) => ColumnType::Double,
        Some(b'-' | b'0'..=b'9') => ColumnType::BigInt,
        Some(b'{' | b'[') => ColumnType::Json,
        _ => ColumnType::Text,
    };
    Ok((Value::from_json(raw, &ty).map_err(|error| error.to_string())?, ty))
}
