//! One value of one column, and how texts and JSON become one without loss.

use base64::Engine as _;
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, Timelike};
use serde_json::value::RawValue;

use crate::error::ValueError;
use crate::types::ColumnType;

/// A value. Which variants a column takes follows from its [`ColumnType`]; `Null` fits every type.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// SQL NULL.
    Null,
    /// BOOLEAN.
    Boolean(bool),
    /// SMALLINT.
    SmallInt(i16),
    /// INT.
    Int(i32),
    /// BIGINT.
    BigInt(i64),
    /// FLOAT.
    Float(f32),
    /// DOUBLE.
    Double(f64),
    /// DECIMAL, without its point: 1.50 at scale 2 is 150.
    Decimal(i128),
    /// TEXT.
    Text(String),
    /// BYTES.
    Bytes(Vec<u8>),
    /// JSON, as it was written.
    Json(String),
    /// TIMESTAMP: microseconds since 1970 UTC.
    Timestamp(i64),
    /// DATE: days since 1970.
    Date(i32),
    /// TIME: microseconds since midnight.
    Time(i64),
    /// UUID.
    Uuid([u8; 16]),
    /// ARRAY.
    Array(Vec<Value>),
}

const MICROS_PER_DAY: i64 = 86_400_000_000;

impl Value {
    /// Whether it is NULL.
    #[must_use]
    pub const fn is_null(&self) -> bool {
        matches!(self, Self::Null)
    }

    /// Whether it is NULL or of type `ty`, to the last nested item.
    #[must_use]
    pub fn is_of(&self, ty: &ColumnType) -> bool {
        match (self, ty) {
            (Self::Null, _)
            | (Self::Boolean(_), ColumnType::Boolean)
            | (Self::SmallInt(_), ColumnType::SmallInt)
            | (Self::Int(_), ColumnType::Int)
            | (Self::BigInt(_), ColumnType::BigInt)
            | (Self::Float(_), ColumnType::Float)
            | (Self::Double(_), ColumnType::Double)
            | (Self::Decimal(_), ColumnType::Decimal { .. })
            | (Self::Text(_), ColumnType::Text)
            | (Self::Bytes(_), ColumnType::Bytes)
            | (Self::Json(_), ColumnType::Json)
            | (Self::Timestamp(_), ColumnType::Timestamp)
            | (Self::Date(_), ColumnType::Date)
            | (Self::Time(_), ColumnType::Time)
            | (Self::Uuid(_), ColumnType::Uuid) => true,
            (Self::Array(items), ColumnType::Array(item)) => items.iter().all(|value| value.is_of(item)),
            _ => false,
        }
    }

    /// Reads the text of a literal or of a JSON string or number as a value of type `ty`.
    ///
    /// BYTES are base64 (or `\x` and hex digits, as PostgreSQL writes them), timestamps RFC 3339 or
    /// `YYYY-MM-DD[ hh:mm:ss[.ffffff]]` in UTC or an integer, arrays JSON.
    ///
    /// # Errors
    /// If the text is of another type or out of range; nothing is rounded or cut silently.
    pub fn from_text(text: &str, ty: &ColumnType) -> Result<Self, ValueError> {
        let mismatch = || ValueError::mismatch(ty, text);
        Ok(match ty {
            ColumnType::Boolean => match text.to_ascii_lowercase().as_str() {
                "true" | "t" => Self::Boolean(true),
                "false" | "f" => Self::Boolean(false),
                _ => return Err(mismatch()),
            },
            ColumnType::SmallInt => Self::SmallInt(integer(text, ty)?),
            ColumnType::Int => Self::Int(integer(text, ty)?),
            ColumnType::BigInt => Self::BigInt(integer(text, ty)?),
            ColumnType::Float => Self::Float(float32(text, ty)?),
            ColumnType::Double => Self::Double(float64(text, ty)?),
            ColumnType::Decimal { precision, scale } => Self::Decimal(decimal(text, *precision, *scale)?),
            ColumnType::Text => Self::Text(text.to_owned()),
            ColumnType::Bytes => Self::Bytes(bytes(text).ok_or_else(mismatch)?),
            ColumnType::Json => {
                let raw: Box<RawValue> = serde_json::from_str(text).map_err(|_| mismatch())?;
                Self::Json(json(raw.get(), ty)?)
            }
            ColumnType::Timestamp => Self::Timestamp(timestamp(text, ty)?),
            ColumnType::Date => Self::Date(date(text, ty)?),
            ColumnType::Time => Self::Time(time(text, ty)?),
            ColumnType::Uuid => Self::Uuid(uuid::Uuid::try_parse(text).map_err(|_| mismatch())?.into_bytes()),
            ColumnType::Array(item) => {
                let items: Vec<Box<RawValue>> = serde_json::from_str(text).map_err(|_| mismatch())?;
                Self::Array(items.iter().map(|raw| Self::from_json(raw, item)).collect::<Result<_, _>>()?)
            }
        })
    }

    /// Reads a JSON parameter as a value of type `ty`, from its text, so that no digit is lost on the way. `null` is NULL.
    ///
    /// # Errors
    /// As [`Value::from_text`]; also for JSON types that `ty` does not take (a number for TEXT, say).
    pub fn from_json(raw: &RawValue, ty: &ColumnType) -> Result<Self, ValueError> {
        let text = raw.get().trim();
        let first = text.as_bytes().first().copied().unwrap_or(b' ');
        if text == "null" {
            return Ok(Self::Null);
        }
        if *ty == ColumnType::Json {
            return json(text, ty).map(Self::Json);
        }
        let mismatch = || ValueError::mismatch(ty, text);
        match (first, ty) {
            (b'[', ColumnType::Array(_)) => Self::from_text(text, ty),
            (b'"', ColumnType::Boolean) => Err(mismatch()),
            (b'"', _) => {
                let string: String = serde_json::from_str(text).map_err(|_| mismatch())?;
                Self::from_text(&string, ty)
            }
            (b't' | b'f', ColumnType::Boolean) => Self::from_text(text, ty),
            (
                b'-' | b'0'..=b'9',
                ColumnType::SmallInt
                | ColumnType::Int
                | ColumnType::BigInt
                | ColumnType::Float
                | ColumnType::Double
                | ColumnType::Decimal { .. }
                | ColumnType::Timestamp
                | ColumnType::Date
                | ColumnType::Time,
            ) => Self::from_text(text, ty),
            _ => Err(mismatch()),
        }
    }

    /// Approximate heap and inline size in bytes, for limits.
    #[must_use]
    pub fn size(&self) -> usize {
        match self {
            Self::Text(text) | Self::Json(text) => text.len() + 4,
            Self::Bytes(bytes) => bytes.len() + 4,
            Self::Array(items) => items.iter().map(Self::size).sum::<usize>() + 4,
            Self::Decimal(_) | Self::Uuid(_) => 16,
            _ => 8,
        }
    }
}

/// Integers also as `7.0` or `7e2`, which is how some JSON writers print them; a fraction is a mismatch.
fn integer<T: TryFrom<i128>>(text: &str, ty: &ColumnType) -> Result<T, ValueError> {
    let exact: i128 = match text.parse() {
        Ok(exact) => exact,
        Err(_) => unscaled(text, 0).ok_or_else(|| ValueError::mismatch(ty, text))?,
    };
    T::try_from(exact).map_err(|_| ValueError::range(ty, text))
}

fn float64(text: &str, ty: &ColumnType) -> Result<f64, ValueError> {
    match text {
        "NaN" => return Ok(f64::NAN),
        "Infinity" => return Ok(f64::INFINITY),
        "-Infinity" => return Ok(f64::NEG_INFINITY),
        _ => {}
    }
    let value: f64 = text.parse().map_err(|_| ValueError::mismatch(ty, text))?;
    if value.is_finite() { Ok(value) } else { Err(ValueError::range(ty, text)) }
}

fn float32(text: &str, ty: &ColumnType) -> Result<f32, ValueError> {
    match text {
        "NaN" => return Ok(f32::NAN),
        "Infinity" => return Ok(f32::INFINITY),
        "-Infinity" => return Ok(f32::NEG_INFINITY),
        _ => {}
    }
    let value: f32 = text.parse().map_err(|_| ValueError::mismatch(ty, text))?;
    if value.is_finite() { Ok(value) } else { Err(ValueError::range(ty, text)) }
}

/// `text` times 10^`scale` if that is a whole number of at most 38 digits.
fn unscaled(text: &str, scale: u8) -> Option<i128> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (text, 0),
    };
    let (negative, digits) = match mantissa.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, mantissa.strip_prefix('+').unwrap_or(mantissa)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !all_digits(whole) || !all_digits(fraction) {
        return None;
    }
    let joined = format!("{whole}{fraction}");
    let significant = joined.trim_start_matches('0');
    if significant.is_empty() {
        return Some(0);
    }
    let shift = i32::from(scale).checked_add(exponent)?.checked_sub(i32::try_from(fraction.len()).ok()?)?;
    let shifted = if shift >= 0 {
        if significant.len() + usize::try_from(shift).ok()? > 39 {
            return None;
        }
        format!("{significant}{}", "0".repeat(usize::try_from(shift).ok()?))
    } else {
        let drop = usize::try_from(-shift).ok()?;
        let keep = significant.len().checked_sub(drop)?;
        if !significant[keep..].bytes().all(|byte| byte == b'0') {
            return None;
        }
        significant[..keep].to_owned()
    };
    let value: i128 = if shifted.is_empty() { 0 } else { shifted.parse().ok()? };
    Some(if negative { -value } else { value })
}

fn decimal(text: &str, precision: u8, scale: u8) -> Result<i128, ValueError> {
    let ty = ColumnType::Decimal { precision, scale };
    if unscaled(text, 38).is_none() && text.parse::<f64>().is_err() {
        return Err(ValueError::mismatch(ty, text));
    }
    let value = unscaled(text, scale).ok_or_else(|| ValueError::range(&ty, text))?;
    let limit = 10_i128.pow(u32::from(precision));
    if value.abs() >= limit { Err(ValueError::range(ty, text)) } else { Ok(value) }
}

/// `text`, which is JSON by its grammar, if every client can read it: no half of a surrogate pair, no number beyond
/// DOUBLE, no deep nesting. An answer with such a value would be unreadable as a whole.
fn json(text: &str, ty: &ColumnType) -> Result<String, ValueError> {
    let readable = serde_json::from_str::<serde_json::Value>(text).is_ok() && json_depth(text) <= JSON_DEPTH_MAX;
    if readable { Ok(text.to_owned()) } else { Err(ValueError::range(ty, text)) }
}

/// Parsers commonly stop at 128 levels; answers, arrays and their envelope need some of them.
const JSON_DEPTH_MAX: usize = 100;

fn json_depth(text: &str) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    if let Some(hex) = text.strip_prefix("\\x") {
        if !hex.len().is_multiple_of(2) || !hex.is_ascii() {
            return None;
        }
        return (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).ok()).collect();
    }
    base64::engine::general_purpose::STANDARD.decode(text).ok()
}

fn timestamp(text: &str, ty: &ColumnType) -> Result<i64, ValueError> {
    if let Ok(micros) = text.parse::<i64>() {
        return Ok(micros);
    }
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        return exact_micros(time.timestamp_micros(), time.nanosecond(), ty, text);
    }
    for format in ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f"] {
        if let Ok(time) = NaiveDateTime::parse_from_str(text, format) {
            return exact_micros(time.and_utc().timestamp_micros(), time.nanosecond(), ty, text);
        }
    }
    match NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        Ok(day) => Ok(i64::from(days(day)) * MICROS_PER_DAY),
        Err(_) => Err(ValueError::mismatch(ty, text)),
    }
}

/// Refuses nanoseconds rather than cut them, and leap seconds, which Arrow cannot hold.
fn exact_micros(micros: i64, nanos: u32, ty: &ColumnType, text: &str) -> Result<i64, ValueError> {
    if nanos.is_multiple_of(1_000) && nanos < 1_000_000_000 { Ok(micros) } else { Err(ValueError::range(ty, text)) }
}

fn days(day: NaiveDate) -> i32 {
    let epoch = NaiveDate::from_ymd_opt(1970, 1, 1).expect("1970-01-01 exists");
    i32::try_from(day.signed_duration_since(epoch).num_days()).expect("chrono's dates fit 32 bits of days")
}

fn date(text: &str, ty: &ColumnType) -> Result<i32, ValueError> {
    if let Ok(days) = text.parse::<i32>() {
        return Ok(days);
    }
    NaiveDate::parse_from_str(text, "%Y-%m-%d").map(days).map_err(|_| ValueError::mismatch(ty, text))
}

fn time(text: &str, ty: &ColumnType) -> Result<i64, ValueError> {
    if let Ok(micros) = text.parse::<i64>() {
        return if (0..MICROS_PER_DAY).contains(&micros) { Ok(micros) } else { Err(ValueError::range(ty, text)) };
    }
    for format in ["%H:%M:%S%.f", "%H:%M"] {
        if let Ok(time) = NaiveTime::parse_from_str(text, format) {
            let micros = i64::from(time.num_seconds_from_midnight()) * 1_000_000 + i64::from(time.nanosecond() / 1_000);
            return exact_micros(micros, time.nanosecond(), ty, text);
        }
    }
    Err(ValueError::mismatch(ty, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, ty: &str, expected: Option<Value>) {
        let ty: ColumnType = ty.parse().expect("type");
        assert_eq!(Value::from_text(text, &ty).ok(), expected, "{text} as {ty}");
    }

    #[test]
    fn numbers_are_exact_or_refused() {
        check("9223372036854775807", "BIGINT", Some(Value::BigInt(i64::MAX)));
        check("9223372036854775808", "BIGINT", None);
        check("7.0", "INT", Some(Value::Int(7)));
        check("7.5", "INT", None);
        check("1e3", "SMALLINT", Some(Value::SmallInt(1000)));
        check("40000", "SMALLINT", None);
        check("123456789012.3456", "DECIMAL(18,4)", Some(Value::Decimal(1_234_567_890_123_456)));
        check("0.00001", "DECIMAL(18,4)", None);
        check("-1.5000", "DECIMAL(6,2)", Some(Value::Decimal(-150)));
        check("99999999999999999999999999999999999999", "DECIMAL(38,0)", Some(Value::Decimal(10_i128.pow(38) - 1)));
        check("100000000000000000000000000000000000000", "DECIMAL(38,0)", None);
        check("1e400", "DOUBLE", None);
        check("-Infinity", "DOUBLE", Some(Value::Double(f64::NEG_INFINITY)));
    }

    #[test]
    fn times_are_exact_or_refused() {
        check("1970-01-02", "DATE", Some(Value::Date(1)));
        check("1970-01-01T00:00:00.000001Z", "TIMESTAMP", Some(Value::Timestamp(1)));
        check("1970-01-01T01:00:00+01:00", "TIMESTAMP", Some(Value::Timestamp(0)));
        check("1970-01-01T00:00:00.0000001Z", "TIMESTAMP", None);
        check("-5", "TIMESTAMP", Some(Value::Timestamp(-5)));
        check("23:59:59.999999", "TIME", Some(Value::Time(MICROS_PER_DAY - 1)));
        check("86400000000", "TIME", None);
        check("2021-02-30", "DATE", None);
    }

    #[test]
    fn json_parameters_keep_every_digit_and_their_type() {
        let raw = |text: &str| RawValue::from_string(text.to_owned()).expect("json");
        let json = |text: &str, ty: ColumnType| Value::from_json(&raw(text), &ty).ok();
        assert_eq!(
            json("12345678901234567890.1234", ColumnType::Decimal { precision: 38, scale: 4 }),
            Some(Value::Decimal(123_456_789_012_345_678_901_234))
        );
        assert_eq!(json("\"5\"", ColumnType::BigInt), Some(Value::BigInt(5)));
        assert_eq!(json("5", ColumnType::Text), None);
        assert_eq!(json("\"true\"", ColumnType::Boolean), None);
        assert_eq!(json("{\"a\":1.10}", ColumnType::Json), Some(Value::Json("{\"a\":1.10}".into())));
        assert_eq!(json("\"x\"", ColumnType::Json), Some(Value::Json("\"x\"".into())));
        assert_eq!(json("null", ColumnType::Json), Some(Value::Null));
        assert_eq!(
            json("[\"1\",null]", ColumnType::Array(Box::new(ColumnType::BigInt))),
            Some(Value::Array(vec![Value::BigInt(1), Value::Null]))
        );
        assert_eq!(json("\"AQI=\"", ColumnType::Bytes), Some(Value::Bytes(vec![1, 2])));
    }

    #[test]
    fn json_that_clients_cannot_read_is_refused() {
        for text in [r#""\ud800""#, r#"{"a":"\udc00x"}"#, "1e999", &format!("{}{}", "[".repeat(101), "]".repeat(101))] {
            assert!(Value::from_text(text, &ColumnType::Json).is_err(), "{text}");
            let raw = RawValue::from_string(text.to_owned()).expect("JSON by its grammar");
            assert!(Value::from_json(&raw, &ColumnType::Json).is_err(), "{text}");
        }
        for text in [r#""\ud83d\ude42 [[[ \" [""#, &format!("{}{}", "[".repeat(100), "]".repeat(100))] {
            assert_eq!(Value::from_text(text, &ColumnType::Json).ok(), Some(Value::Json(text.to_owned())));
        }
    }

    #[test]
    fn an_error_quotes_at_most_64_characters() {
        let error = Value::from_text(&"é".repeat(1000), &ColumnType::Int).expect_err("no integer").to_string();
        assert!(error.chars().count() < 120, "{error}");
    }
}
