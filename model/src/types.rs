//! Column types: their SQL text, Arrow type, and name in answers.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use arrow_schema::{DataType, Field, TimeUnit};
use serde::{Deserialize, Serialize};

/// Arrow field metadata that tells types apart which share an Arrow type: `JSON` and `UUID` are stored as text, so
/// that SQL compares them with literals, any Parquet reader shows them, and byte order is key order.
pub const TYPE_METADATA: &str = "kalamdb:type";

/// The type of a column.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ColumnType {
    /// `true` or `false`.
    Boolean,
    /// 16-bit integer.
    SmallInt,
    /// 32-bit integer.
    Int,
    /// 64-bit integer.
    BigInt,
    /// 32-bit IEEE 754.
    Float,
    /// 64-bit IEEE 754.
    Double,
    /// Exact number with `precision` digits, `scale` of them after the point.
    Decimal {
        /// 1 to 38.
        precision: u8,
        /// 0 to `precision`.
        scale: u8,
    },
    /// UTF-8.
    Text,
    /// Any bytes.
    Bytes,
    /// A JSON text, kept as it was written.
    Json,
    /// Microseconds since 1970-01-01 UTC.
    Timestamp,
    /// Days since 1970-01-01.
    Date,
    /// Microseconds since midnight.
    Time,
    /// Canonical lower-case text with hyphens.
    Uuid,
    /// Values of one type, each of which may be null.
    Array(Box<ColumnType>),
}

/// Deepest nesting of `ARRAY<…>`.
pub const ARRAY_DEPTH_MAX: usize = 4;

impl ColumnType {
    /// The Arrow type of stored values and scans.
    #[must_use]
    pub fn arrow(&self) -> DataType {
        match self {
            Self::Boolean => DataType::Boolean,
            Self::SmallInt => DataType::Int16,
            Self::Int => DataType::Int32,
            Self::BigInt => DataType::Int64,
            Self::Float => DataType::Float32,
            Self::Double => DataType::Float64,
            Self::Decimal { precision, scale } => {
                DataType::Decimal128(*precision, i8::try_from(*scale).expect("a scale is at most 38"))
            }
            Self::Text | Self::Json | Self::Uuid => DataType::Utf8,
            Self::Bytes => DataType::Binary,
            Self::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
            Self::Date => DataType::Date32,
            Self::Time => DataType::Time64(TimeUnit::Microsecond),
            Self::Array(item) => DataType::List(Arc::new(item.arrow_field("item", true))),
        }
    }

    /// An Arrow field of this type, with [`TYPE_METADATA`] where the Arrow type does not say it all.
    #[must_use]
    pub fn arrow_field(&self, name: &str, nullable: bool) -> Field {
        let field = Field::new(name, self.arrow(), nullable);
        match self {
            Self::Json | Self::Uuid => {
                field.with_metadata([(TYPE_METADATA.to_owned(), self.to_string())].into_iter().collect())
            }
            _ => field,
        }
    }

    /// The type of an Arrow field, for results of queries. `None`: no column type equals it (the caller casts first).
    #[must_use]
    pub fn of_arrow(field: &Field) -> Option<Self> {
        Some(match field.data_type() {
            DataType::Boolean => Self::Boolean,
            DataType::Int16 => Self::SmallInt,
            DataType::Int32 => Self::Int,
            DataType::Int64 => Self::BigInt,
            DataType::Float32 => Self::Float,
            DataType::Float64 => Self::Double,
            DataType::Decimal128(precision, scale) => {
                Self::Decimal { precision: *precision, scale: u8::try_from(*scale).ok()? }
            }
            DataType::Utf8 => match field.metadata().get(TYPE_METADATA).map(String::as_str) {
                Some("JSON") => Self::Json,
                Some("UUID") => Self::Uuid,
                _ => Self::Text,
            },
            DataType::Binary => Self::Bytes,
            DataType::Timestamp(TimeUnit::Microsecond, _) => Self::Timestamp,
            DataType::Date32 => Self::Date,
            DataType::Time64(TimeUnit::Microsecond) => Self::Time,
            DataType::List(item) => Self::Array(Box::new(Self::of_arrow(item)?)),
            _ => return None,
        })
    }

    /// `data_type` in the answers of `POST /v1/api/sql`.
    #[must_use]
    pub fn answer_name(&self) -> serde_json::Value {
        let name = match self {
            Self::Boolean => "Boolean",
            Self::SmallInt => "SmallInt",
            Self::Int => "Int",
            Self::BigInt => "BigInt",
            Self::Float => "Float",
            Self::Double => "Double",
            Self::Decimal { precision, scale } => {
                return serde_json::json!({"Decimal": {"precision": precision, "scale": scale}});
            }
            Self::Text => "Text",
            Self::Bytes => "Bytes",
            Self::Json => "Json",
            Self::Timestamp => "Timestamp",
            Self::Date => "Date",
            Self::Time => "Time",
            Self::Uuid => "Uuid",
            Self::Array(item) => return serde_json::json!({"Array": item.answer_name()}),
        };
        name.into()
    }

    /// Whether a primary key may hold it: types whose equality and order are exact.
    #[must_use]
    pub const fn can_be_key(&self) -> bool {
        !matches!(self, Self::Float | Self::Double | Self::Json | Self::Array(_))
    }

    fn depth(&self) -> usize {
        match self {
            Self::Array(item) => 1 + item.depth(),
            _ => 0,
        }
    }
}

impl fmt::Display for ColumnType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boolean => f.write_str("BOOLEAN"),
            Self::SmallInt => f.write_str("SMALLINT"),
            Self::Int => f.write_str("INT"),
            Self::BigInt => f.write_str("BIGINT"),
            Self::Float => f.write_str("FLOAT"),
            Self::Double => f.write_str("DOUBLE"),
            Self::Decimal { precision, scale } => write!(f, "DECIMAL({precision},{scale})"),
            Self::Text => f.write_str("TEXT"),
            Self::Bytes => f.write_str("BYTES"),
            Self::Json => f.write_str("JSON"),
            Self::Timestamp => f.write_str("TIMESTAMP"),
            Self::Date => f.write_str("DATE"),
            Self::Time => f.write_str("TIME"),
            Self::Uuid => f.write_str("UUID"),
            Self::Array(item) => write!(f, "ARRAY<{item}>"),
        }
    }
}

/// Why a text is no type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// No such type.
    #[error(
        "unknown type `{0}`; use BOOLEAN, SMALLINT, INT, BIGINT, FLOAT, DOUBLE, DECIMAL(p,s), TEXT, BYTES, JSON, TIMESTAMP, DATE, TIME, UUID or ARRAY<type>"
    )]
    Unknown(String),
    /// `DECIMAL` with impossible digits.
    #[error("`{0}` needs a precision of 1 to 38 and a scale of 0 to the precision")]
    Decimal(String),
    /// Too many levels of `ARRAY<…>`.
    #[error("arrays nest at most {ARRAY_DEPTH_MAX} deep")]
    Depth,
}

impl FromStr for ColumnType {
    type Err = TypeError;

    fn from_str(text: &str) -> Result<Self, TypeError> {
        let parsed = parse(text.trim(), 0)?;
        if parsed.depth() > ARRAY_DEPTH_MAX { Err(TypeError::Depth) } else { Ok(parsed) }
    }
}

fn parse(text: &str, depth: usize) -> Result<ColumnType, TypeError> {
    if depth > ARRAY_DEPTH_MAX {
        return Err(TypeError::Depth);
    }
    let upper = text.trim().to_ascii_uppercase();
    Ok(match upper.as_str() {
        "BOOLEAN" | "BOOL" => ColumnType::Boolean,
        "SMALLINT" => ColumnType::SmallInt,
        "INT" | "INTEGER" => ColumnType::Int,
        "BIGINT" => ColumnType::BigInt,
        "FLOAT" => ColumnType::Float,
        "DOUBLE" => ColumnType::Double,
        "DECIMAL" => ColumnType::Decimal { precision: 38, scale: 10 },
        "TEXT" | "STRING" => ColumnType::Text,
        "BYTES" => ColumnType::Bytes,
        "JSON" => ColumnType::Json,
        "TIMESTAMP" => ColumnType::Timestamp,
        "DATE" => ColumnType::Date,
        "TIME" => ColumnType::Time,
        "UUID" => ColumnType::Uuid,
        other => return parse_parametrized(other, depth),
    })
}

fn parse_parametrized(upper: &str, depth: usize) -> Result<ColumnType, TypeError> {
    if let Some(item) = upper.strip_prefix("ARRAY<").and_then(|rest| rest.strip_suffix('>')) {
        return Ok(ColumnType::Array(Box::new(parse(item, depth + 1)?)));
    }
    if let Some(digits) = upper.strip_prefix("DECIMAL(").and_then(|rest| rest.strip_suffix(')')) {
        let bad = || TypeError::Decimal(upper.to_owned());
        let (precision, scale) = digits.split_once(',').unwrap_or((digits, "0"));
        let precision: u8 = precision.trim().parse().map_err(|_| bad())?;
        let scale: u8 = scale.trim().parse().map_err(|_| bad())?;
        if !(1..=38).contains(&precision) || scale > precision {
            return Err(bad());
        }
        return Ok(ColumnType::Decimal { precision, scale });
    }
    Err(TypeError::Unknown(upper.to_owned()))
}

impl TryFrom<String> for ColumnType {
    type Error = TypeError;
    fn try_from(text: String) -> Result<Self, TypeError> {
        text.parse()
    }
}

impl From<ColumnType> for String {
    fn from(ty: ColumnType) -> Self {
        ty.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_reads_back_from_its_own_text_and_its_arrow_field() {
        for text in [
            "BOOLEAN",
            "SMALLINT",
            "INT",
            "BIGINT",
            "FLOAT",
            "DOUBLE",
            "DECIMAL(18,4)",
            "TEXT",
            "BYTES",
            "JSON",
            "TIMESTAMP",
            "DATE",
            "TIME",
            "UUID",
            "ARRAY<BIGINT>",
            "ARRAY<ARRAY<UUID>>",
        ] {
            let ty: ColumnType = text.parse().expect(text);
            assert_eq!(ty.to_string(), text);
            assert_eq!(ColumnType::of_arrow(&ty.arrow_field("c", true)), Some(ty));
        }
    }

    #[test]
    fn a_wrong_type_says_what_is_allowed() {
        assert!("VARCHAR(3)".parse::<ColumnType>().is_err());
        assert!("DECIMAL(39,1)".parse::<ColumnType>().is_err());
        assert!("DECIMAL(4,5)".parse::<ColumnType>().is_err());
        assert_eq!("ARRAY<ARRAY<ARRAY<ARRAY<ARRAY<INT>>>>>".parse::<ColumnType>(), Err(TypeError::Depth));
    }
}
