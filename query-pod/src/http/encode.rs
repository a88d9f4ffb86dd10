//! Answers as JSON: how each type is written depends on the column's type alone, never on the value.

use std::fmt::Write as _;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Field, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type, Schema,
    Time64MicrosecondType, TimeUnit, TimestampMicrosecondType,
};
use arrow::json::writer::LineDelimited;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use base64::Engine as _;
use bytes::Bytes;
use kalamdb_model::ColumnType;
use kalamdb_write_buffer::Stamps;

use super::body::{self, Room};
use crate::error::{ApiError, Kind};
use crate::shares::Share;

/// What every answer of a statement that succeeded begins with.
const BEGIN: &str = r#"{"status":"success","results":["#;

/// Size from which on rows are a piece of their own, counted until it is sent. Smaller answers are not counted, and so
/// never refused for want of room: 1,024 requests hold 64 MiB of them.
const PIECE_BYTES: usize = 64 << 10;

/// The envelope of a statement that succeeded, without its end, which says how long it took.
pub struct Answer {
    pieces: Vec<Bytes>,
    open: String,
}

impl Answer {
    /// The answer of a statement that returns no rows.
    #[must_use]
    pub fn affected(rows: u64, message: String) -> Self {
        let message = serde_json::Value::String(message);
        let open = format!(r#"{BEGIN}{{"schema":[],"rows":[],"row_count":{rows},"message":{message}}}"#);
        Self { pieces: Vec::new(), open }
    }

    /// The whole envelope; the last of its pieces keeps `held`.
    pub fn into_pieces<T: Send + 'static>(mut self, took_ms: f64, held: T) -> Vec<Bytes> {
        self.open.push_str(&format!(r#"],"took":{took_ms:?},"error":null}}"#));
        self.pieces.push(body::piece(self.open, held));
        self.pieces
    }
}

/// Writes batches as `rows`.
pub struct Encoder {
    columns: Vec<Output>,
    room: Room,
    pieces: Vec<Piece>,
    /// What is no piece yet.
    open: String,
    /// Of `open`.
    gaps: Vec<Gap>,
    /// Bytes of rows so far, and those of them that are in pieces.
    rows_bytes: usize,
    counted_bytes: usize,
    rows: u64,
    bytes_max: usize,
}

/// Rows that are counted until they are sent.
struct Piece {
    text: String,
    gaps: Vec<Gap>,
    share: Share,
}

/// A value that rows get when they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stamped {
    /// `_seq`.
    Seq,
    /// `_updated`.
    Updated,
}

/// Where in a text such a value comes to stand, in the place of [`GAP`].
struct Gap {
    at: usize,
    value: Stamped,
    /// The row's place in its statement, counted from 0.
    row: i64,
}

/// As long as the longest value, so that none makes an answer larger than it was when it was checked.
const GAP: &str = r#""-9223372036854775808""#;

/// How one column is written.
struct Output {
    ty: ColumnType,
    cast: Cast,
}

enum Cast {
    /// The Arrow type is the column type's own.
    None,
    /// To the column type's Arrow type.
    To(DataType),
    /// Structs and maps, as JSON texts.
    Json,
    /// What has no type of ours, as the text that Arrow shows.
    Text,
    /// The array has the places of rows that are to be written.
    Stamped(Stamped),
}

impl Encoder {
    /// An encoder for batches of `schema` that refuses more than `bytes_max` bytes of rows, and keeps them in `room`.
    #[must_use]
    pub fn new(schema: &Schema, bytes_max: usize, room: Room) -> Self {
        Self::of_unwritten(schema, &[], bytes_max, room)
    }

    /// An encoder for rows that are to be written. Where `stamped` says, their batches have no values yet but the places
    /// of the rows in the statement, 64-bit integers from 0 on.
    #[must_use]
    pub fn of_unwritten(schema: &Schema, stamped: &[(usize, Stamped)], bytes_max: usize, room: Room) -> Self {
        let mut columns: Vec<Output> = schema.fields().iter().map(|field| Output::of(field)).collect();
        for (at, value) in stamped {
            columns[*at] = Output::stamped(*value);
        }
        let described: Vec<serde_json::Value> = schema
            .fields()
            .iter()
            .zip(&columns)
            .enumerate()
            .map(|(index, (field, output))| {
                serde_json::json!({"name": field.name(), "data_type": output.ty.answer_name(), "index": index})
            })
            .collect();
        let open = format!(r#"{BEGIN}{{"schema":{},"rows":["#, serde_json::Value::Array(described));
        let (pieces, gaps) = (Vec::new(), Vec::new());
        Self { columns, room, pieces, open, gaps, rows_bytes: 0, counted_bytes: 0, rows: 0, bytes_max }
    }

    /// Adds the rows of `batch`.
    ///
    /// # Errors
    /// 413 when the answer grows over its limit, 429 when there is no room: an answer is complete or an error.
    pub async fn push(&mut self, batch: &RecordBatch) -> Result<(), ApiError> {
        let columns: Vec<ArrayRef> = self
            .columns
            .iter()
            .zip(batch.columns())
            .map(|(output, array)| output.convert(array))
            .collect::<Result<_, _>>()?;
        for row in 0..batch.num_rows() {
            let before = self.open.len();
            self.open.push_str(if self.rows == 0 { "[" } else { ",[" });
            for (index, (array, output)) in columns.iter().zip(&self.columns).enumerate() {
                if index > 0 {
                    self.open.push(',');
                }
                match output.cast {
                    Cast::Stamped(value) => {
                        let row = array.as_primitive::<Int64Type>().value(row);
                        self.gaps.push(Gap { at: self.open.len(), value, row });
                        self.open.push_str(GAP);
                    }
                    _ => write_value(&mut self.open, array, row, &output.ty),
                }
                // After each value: a row may name one large value a thousand times.
                if self.rows_bytes + (self.open.len() - before) > self.bytes_max {
                    let message =
                        format!("the answer is larger than {} bytes; select less, or use LIMIT", self.bytes_max);
                    return Err(ApiError::new(Kind::TooLarge, "ANSWER_TOO_LARGE", message));
                }
            }
            self.open.push(']');
            self.rows += 1;
            self.rows_bytes += self.open.len() - before;
            if self.open.len() >= PIECE_BYTES {
                self.close_piece().await?;
            }
        }
        Ok(())
    }

    async fn close_piece(&mut self) -> Result<(), ApiError> {
        let share = self.room.take(self.rows_bytes - self.counted_bytes).await?;
        self.counted_bytes = self.rows_bytes;
        let mut text = std::mem::take(&mut self.open);
        text.shrink_to_fit();
        self.pieces.push(Piece { text, gaps: std::mem::take(&mut self.gaps), share });
        Ok(())
    }

    /// The answer.
    #[must_use]
    pub fn finish(mut self) -> Answer {
        self.open.push_str(&format!(r#"],"row_count":{},"message":null}}"#, self.rows));
        let pieces = self.pieces.into_iter().map(|piece| body::piece(piece.text, piece.share));
        Answer { pieces: pieces.collect(), open: self.open }
    }

    /// The answer of a statement that has written its rows.
    #[must_use]
    pub fn finish_written(mut self, stamps: Stamps) -> Answer {
        for piece in &mut self.pieces {
            fill(&mut piece.text, &piece.gaps, stamps);
        }
        fill(&mut self.open, &self.gaps, stamps);
        self.finish()
    }
}

/// Writes what the rows got into the gaps of `text`.
fn fill(text: &mut String, gaps: &[Gap], stamps: Stamps) {
    let mut filled = String::with_capacity(text.len());
    let mut from = 0;
    for gap in gaps {
        filled.push_str(&text[from..gap.at]);
        // Writing to a String cannot fail.
        let _ = match gap.value {
            Stamped::Seq => write!(filled, "\"{}\"", stamps.first_seq + gap.row),
            Stamped::Updated => write!(filled, "{}", stamps.updated_us),
        };
        from = gap.at + GAP.len();
    }
    filled.push_str(&text[from..]);
    *text = filled;
}

impl Output {
    fn of(field: &Field) -> Self {
        if let Some(ty) = ColumnType::of_arrow(field) {
            return Self { ty, cast: Cast::None };
        }
        match nearest(field.data_type()) {
            Some(near) => {
                let field = Field::new(field.name(), near.clone(), true).with_metadata(field.metadata().clone());
                match ColumnType::of_arrow(&field) {
                    Some(ty) => Self { ty, cast: Cast::To(near) },
                    None => Self { ty: ColumnType::Text, cast: Cast::Text },
                }
            }
            None if matches!(field.data_type(), DataType::Struct(_) | DataType::Map(..)) => {
                Self { ty: ColumnType::Json, cast: Cast::Json }
            }
            None => Self { ty: ColumnType::Text, cast: Cast::Text },
        }
    }

    fn stamped(value: Stamped) -> Self {
        let ty = match value {
            Stamped::Seq => ColumnType::BigInt,
            Stamped::Updated => ColumnType::Timestamp,
        };
        Self { ty, cast: Cast::Stamped(value) }
    }

    fn convert(&self, array: &ArrayRef) -> Result<ArrayRef, ApiError> {
        let failed = |error: arrow::error::ArrowError| ApiError::invalid("INVALID_VALUE", error.to_string());
        match &self.cast {
            Cast::None => {
                check_digits(array).map_err(failed)?;
                Ok(Arc::clone(array))
            }
            Cast::To(ty) => {
                // An overflow is an error; the default would make it NULL.
                let options = CastOptions { safe: false, ..CastOptions::default() };
                let array = cast_with_options(array, ty, &options).map_err(failed)?;
                check_digits(&array).map_err(failed)?;
                Ok(array)
            }
            Cast::Json => json_texts(array).map_err(failed),
            Cast::Text => texts(array).map_err(failed),
            Cast::Stamped(_) => Ok(Arc::clone(array)),
        }
    }
}

/// The type of ours that holds every value of `ty`.
fn nearest(ty: &DataType) -> Option<DataType> {
    Some(match ty {
        DataType::Utf8View | DataType::LargeUtf8 | DataType::Null => DataType::Utf8,
        DataType::BinaryView | DataType::LargeBinary | DataType::FixedSizeBinary(_) => DataType::Binary,
        DataType::Int8 | DataType::UInt8 => DataType::Int16,
        DataType::UInt16 => DataType::Int32,
        // Counts, mostly; one over 2^63 - 1 is an error.
        DataType::UInt32 | DataType::UInt64 => DataType::Int64,
        DataType::Float16 => DataType::Float32,
        DataType::Decimal32(precision, scale) | DataType::Decimal64(precision, scale) if *scale >= 0 => {
            DataType::Decimal128(*precision, *scale)
        }
        DataType::Timestamp(..) | DataType::Date64 => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        DataType::Time32(_) | DataType::Time64(_) => DataType::Time64(TimeUnit::Microsecond),
        DataType::Dictionary(_, value) => nearest(value).unwrap_or_else(|| value.as_ref().clone()),
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            let inner = if ColumnType::of_arrow(item).is_some() {
                item.data_type().clone()
            } else {
                nearest(item.data_type())?
            };
            DataType::List(Arc::new(Field::new("item", inner, true).with_metadata(item.metadata().clone())))
        }
        _ => return None,
    })
}

/// Arithmetic of decimals stays within 128 bits and not within their digits, and what has more is printed without the last
/// ones.
fn check_digits(array: &ArrayRef) -> Result<(), arrow::error::ArrowError> {
    match array.data_type() {
        DataType::Decimal128(precision, _) => {
            array.as_primitive::<Decimal128Type>().validate_decimal_precision(*precision)
        }
        DataType::List(_) => check_digits(array.as_list::<i32>().values()),
        _ => Ok(()),
    }
}

fn json_texts(array: &ArrayRef) -> Result<ArrayRef, arrow::error::ArrowError> {
    let field = Field::new("v", array.data_type().clone(), true);
    let batch = RecordBatch::try_new(Arc::new(Schema::new(vec![field])), vec![Arc::clone(array)])?;
    // A member that is NULL is a member.
    let mut writer = arrow::json::WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(Vec::new());
    writer.write(&batch)?;
    writer.finish()?;
    let lines = String::from_utf8_lossy(&writer.into_inner()).into_owned();
    let inner = lines.lines().enumerate().map(|(row, line)| {
        let object = line.strip_prefix("{\"v\":").and_then(|rest| rest.strip_suffix('}'));
        object.filter(|_| !array.is_null(row)).map(str::to_owned)
    });
    Ok(Arc::new(inner.collect::<arrow::array::StringArray>()))
}

fn texts(array: &ArrayRef) -> Result<ArrayRef, arrow::error::ArrowError> {
    let options = FormatOptions::default();
    let shown = ArrayFormatter::try_new(array, &options)?;
    let rows = (0..array.len()).map(|row| (!array.is_null(row)).then(|| shown.value(row).to_string()));
    Ok(Arc::new(rows.collect::<arrow::array::StringArray>()))
}

/// Writes one value; `array` has the Arrow type of `ty`.
fn write_value(out: &mut String, array: &ArrayRef, row: usize, ty: &ColumnType) {
    if array.is_null(row) {
        out.push_str("null");
        return;
    }
    // Writing to a String cannot fail.
    let _ = match ty {
        ColumnType::Boolean => write!(out, "{}", array.as_boolean().value(row)),
        ColumnType::SmallInt => write!(out, "{}", array.as_primitive::<Int16Type>().value(row)),
        ColumnType::Int => write!(out, "{}", array.as_primitive::<Int32Type>().value(row)),
        ColumnType::BigInt => write!(out, "\"{}\"", array.as_primitive::<Int64Type>().value(row)),
        ColumnType::Float => write_float(out, f64::from(array.as_primitive::<Float32Type>().value(row)), || {
            format!("{:?}", array.as_primitive::<Float32Type>().value(row))
        }),
        ColumnType::Double => write_float(out, array.as_primitive::<Float64Type>().value(row), || {
            format!("{:?}", array.as_primitive::<Float64Type>().value(row))
        }),
        ColumnType::Decimal { .. } => {
            write!(out, "\"{}\"", array.as_primitive::<Decimal128Type>().value_as_string(row))
        }
        ColumnType::Text | ColumnType::Uuid => write_text(out, array.as_string::<i32>().value(row)),
        ColumnType::Json => write_json(out, array.as_string::<i32>().value(row)),
        ColumnType::Bytes => {
            write!(out, "\"{}\"", base64::engine::general_purpose::STANDARD.encode(array.as_binary::<i32>().value(row)))
        }
        ColumnType::Timestamp => write!(out, "{}", array.as_primitive::<TimestampMicrosecondType>().value(row)),
        ColumnType::Date => write!(out, "{}", array.as_primitive::<Date32Type>().value(row)),
        ColumnType::Time => write!(out, "{}", array.as_primitive::<Time64MicrosecondType>().value(row)),
        ColumnType::Array(item) => {
            let values = array.as_list::<i32>().value(row);
            out.push('[');
            for at in 0..values.len() {
                if at > 0 {
                    out.push(',');
                }
                write_value(out, &values, at, item);
            }
            out.push(']');
            Ok(())
        }
    };
}

fn write_float(out: &mut String, value: f64, finite: impl Fn() -> String) -> std::fmt::Result {
    if value.is_nan() {
        write!(out, "\"NaN\"")
    } else if value.is_infinite() {
        write!(out, "\"{}Infinity\"", if value < 0.0 { "-" } else { "" })
    } else {
        write!(out, "{}", finite())
    }
}

fn write_text(out: &mut String, text: &str) -> std::fmt::Result {
    write!(out, "{}", serde_json::Value::String(text.to_owned()))
}

/// A JSON column holds checked JSON; a text that an expression made of one may not be JSON any more, and is a string.
fn write_json(out: &mut String, text: &str) -> std::fmt::Result {
    if serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok() {
        out.push_str(text);
        Ok(())
    } else {
        write_text(out, text)
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Decimal128Array, Float64Array, Int64Array, StringArray, UInt64Array};

    use kalamdb_model::UserId;

    use super::*;
    use crate::shares::Shares;

    fn encoder(schema: &Schema, bytes_max: usize, room: &Arc<Shares>) -> Encoder {
        Encoder::new(schema, bytes_max, Room::new(Arc::clone(room), UserId::new("a").expect("valid")))
    }

    async fn encode(field: Field, array: ArrayRef) -> serde_json::Value {
        let schema = Arc::new(Schema::new(vec![field]));
        let batch = RecordBatch::try_new(Arc::clone(&schema), vec![array]).expect("batch");
        let mut encoder = encoder(&schema, 1 << 20, &Arc::new(Shares::halves(0)));
        encoder.push(&batch).await.expect("small");
        json(&encoder.finish().into_pieces(1.5, ()))["results"][0].clone()
    }

    fn json(pieces: &[Bytes]) -> serde_json::Value {
        serde_json::from_slice(&pieces.concat()).expect("json")
    }

    #[tokio::test]
    async fn the_json_type_depends_on_the_column_type_alone() {
        let big = encode(Field::new("n", DataType::Int64, true), Arc::new(Int64Array::from(vec![Some(1), None]))).await;
        assert_eq!(big["schema"][0]["data_type"], "BigInt");
        assert_eq!(big["rows"], serde_json::json!([["1"], [null]]));
        let unsigned = encode(Field::new("n", DataType::UInt64, true), Arc::new(UInt64Array::from(vec![7]))).await;
        assert_eq!((&unsigned["schema"][0]["data_type"], &unsigned["rows"][0][0]), (&"BigInt".into(), &"7".into()));
        let float = Float64Array::from(vec![f64::NAN, f64::NEG_INFINITY, 1.0, 0.1, 1e300]);
        let float = encode(Field::new("n", DataType::Float64, true), Arc::new(float)).await;
        assert_eq!(float["rows"], serde_json::json!([["NaN"], ["-Infinity"], [1.0], [0.1], [1e300]]));
        let decimal = Decimal128Array::from(vec![-150]).with_precision_and_scale(18, 4).expect("scale");
        let decimal = encode(Field::new("n", DataType::Decimal128(18, 4), true), Arc::new(decimal)).await;
        assert_eq!(decimal["rows"][0][0], "-0.0150");
        assert_eq!(decimal["schema"][0]["data_type"], serde_json::json!({"Decimal": {"precision": 18, "scale": 4}}));
    }

    #[tokio::test]
    async fn json_columns_are_json_and_text_is_text() {
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["{\"a\":1.10}"]));
        let json = encode(ColumnType::Json.arrow_field("j", true), Arc::clone(&texts)).await;
        assert_eq!(json["rows"][0][0]["a"], serde_json::json!(1.1));
        let text = encode(Field::new("t", DataType::Utf8, true), texts).await;
        assert_eq!(text["rows"][0][0], "{\"a\":1.10}");
    }

    #[tokio::test]
    async fn an_answer_over_its_limit_is_an_error() {
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, true)]));
        let batch =
            RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(Int64Array::from(vec![1; 100]))]).expect("batch");
        let mut encoder = encoder(&schema, 50, &Arc::new(Shares::halves(0)));
        assert_eq!(encoder.push(&batch).await.expect_err("too large").code, "ANSWER_TOO_LARGE");
    }

    #[tokio::test]
    async fn a_row_that_repeats_a_large_value_grows_by_one_over_the_limit() {
        let names = (0..1_000).map(|n| Field::new(format!("c{n}"), DataType::Utf8, true));
        let schema = Arc::new(Schema::new(names.collect::<Vec<_>>()));
        let value: ArrayRef = Arc::new(StringArray::from(vec!["x".repeat(1_000)]));
        let batch = RecordBatch::try_new(Arc::clone(&schema), vec![value; 1_000]).expect("batch");
        let mut encoder = encoder(&schema, 10_000, &Arc::new(Shares::halves(0)));
        let head = encoder.open.len();
        assert_eq!(encoder.push(&batch).await.expect_err("too large").code, "ANSWER_TOO_LARGE");
        assert!(encoder.open.len() - head < 12_000, "{} bytes", encoder.open.len() - head);
    }

    #[tokio::test]
    async fn what_rows_get_when_they_are_written_stands_in_each_of_them() {
        const ROWS: i64 = 10_000;
        let field = |name: &str| Field::new(name, DataType::Int64, false);
        let schema = Arc::new(Schema::new(vec![field("at"), field("n"), field("s")]));
        let places: ArrayRef = Arc::new(Int64Array::from_iter_values(0..ROWS));
        let batch = RecordBatch::try_new(Arc::clone(&schema), vec![places; 3]).expect("batch");
        let room = || Room::new(Arc::new(Shares::halves(1 << 30)), UserId::new("a").expect("valid"));
        let stamped = [(2, Stamped::Seq), (0, Stamped::Updated)];
        let mut encoder = Encoder::of_unwritten(&schema, &stamped, 1 << 20, room());
        encoder.push(&batch).await.expect("room");
        assert!(encoder.pieces.len() > 1);
        let stamps = Stamps { first_seq: i64::MAX - ROWS, updated_us: -7 };
        let answer = json(&encoder.finish_written(stamps).into_pieces(1.5, ()))["results"][0].clone();
        let types: Vec<_> =
            (0..3_usize).map(|at| answer["schema"][at]["data_type"].as_str().expect("a type")).collect();
        assert_eq!(types, ["Timestamp", "BigInt", "BigInt"]);
        let expected = |row: i64| serde_json::json!([-7, row.to_string(), (stamps.first_seq + row).to_string()]);
        assert_eq!(answer["rows"], serde_json::Value::Array((0..ROWS).map(expected).collect()));
        // The limit is held whatever they get.
        let longest = 2 * GAP.len() + r#",[,"0",]"#.len();
        let mut encoder = Encoder::of_unwritten(&schema, &stamped, 10 * longest, room());
        encoder.push(&batch.slice(0, 10)).await.expect("as large as it may be");
        let mut encoder = Encoder::of_unwritten(&schema, &stamped, 9 * longest, room());
        assert_eq!(encoder.push(&batch.slice(0, 10)).await.expect_err("too large").code, "ANSWER_TOO_LARGE");
    }

    #[tokio::test]
    async fn a_large_answer_is_counted_until_the_last_of_it_is_dropped() {
        const ROWS: usize = 40_000;
        let schema = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, true)]));
        let numbers = Int64Array::from(vec![1_000_000_000; ROWS]);
        let batch = RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(numbers)]).expect("batch");
        let row = r#",["1000000000"]"#.len();
        // Room for one of them, and for less than two.
        let room = Arc::new(Shares::new(ROWS * row * 3 / 2, ROWS * row * 3 / 2));
        let mut first = encoder(&schema, ROWS * row, &room);
        first.push(&batch).await.expect("room for one");
        let mut pieces = first.finish().into_pieces(1.5, ());
        let whole = json(&pieces);
        assert_eq!(whole["results"][0]["rows"].as_array().expect("rows").len(), ROWS);
        assert_eq!((&whole["results"][0]["row_count"], &whole["took"]), (&ROWS.into(), &1.5.into()));
        let small = || async {
            let mut encoder = encoder(&schema, 1 << 20, &room);
            encoder.push(&batch.slice(0, 1_000)).await.map(|()| encoder.finish())
        };
        let large = || async { encoder(&schema, ROWS * row, &room).push(&batch).await };
        let refused = large().await.expect_err("no room for two");
        assert_eq!((refused.kind, refused.code), (Kind::Busy, "ANSWERS_BUSY"));
        assert!(refused.message.contains(&format!("{} bytes", ROWS * row * 3 / 2)), "{}", refused.message);
        small().await.expect("small answers are not counted");
        // Half of it is sent, and a part of a piece is still on its way.
        let on_its_way = pieces[0].slice(10..20);
        pieces.drain(..pieces.len() / 2 + 1);
        large().await.expect("half of the room is free again");
        drop((on_its_way, pieces));
        large().await.expect("all of the room is free again");
    }
}
