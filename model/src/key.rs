//! Memcomparable encoding of primary keys: byte order of encodings = order of key values, column by column.
//!
//! Integers, dates, times: big endian with the sign bit flipped. Decimals: the same on 128 bits (one scale per column).
//! Text and bytes: `0x00` escaped as `0x00 0xFF`, ended by `0x00 0x01`, so that no key is a prefix of another
//! (the scheme of FoundationDB's tuple layer). NULL is no key value.

use crate::value::Value;

/// Encodes the values of the key columns, in key order.
///
/// # Panics
/// Never on values that were checked against a table: those of keys are not NULL and of a type that [`can_be_key`].
///
/// [`can_be_key`]: crate::types::ColumnType::can_be_key
#[must_use]
pub fn encode(values: &[Value]) -> Vec<u8> {
    let mut out = Vec::with_capacity(values.len() * 9);
    for value in values {
        encode_one(value, &mut out);
    }
    out
}

fn encode_one(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Boolean(flag) => out.push(u8::from(*flag)),
        Value::SmallInt(v) => out.extend(((v.cast_unsigned()) ^ 1 << 15).to_be_bytes()),
        Value::Int(v) | Value::Date(v) => out.extend(((v.cast_unsigned()) ^ 1 << 31).to_be_bytes()),
        Value::BigInt(v) | Value::Timestamp(v) | Value::Time(v) => {
            out.extend(((v.cast_unsigned()) ^ 1 << 63).to_be_bytes());
        }
        Value::Decimal(v) => out.extend(((v.cast_unsigned()) ^ 1 << 127).to_be_bytes()),
        Value::Uuid(bytes) => out.extend(bytes),
        Value::Text(text) => escape(text.as_bytes(), out),
        Value::Bytes(bytes) => escape(bytes, out),
        Value::Null | Value::Float(_) | Value::Double(_) | Value::Json(_) | Value::Array(_) => {
            unreachable!("validated tables have no key column of this type, and rows no NULL in one")
        }
    }
}

fn escape(bytes: &[u8], out: &mut Vec<u8>) {
    for byte in bytes {
        out.push(*byte);
        if *byte == 0 {
            out.push(0xFF);
        }
    }
    out.extend([0, 1]);
}

/// Keys from `from` on and below `to`; without `to`, all from `from` on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeyRange {
    /// The least.
    pub from: Vec<u8>,
    /// What they are below.
    pub to: Option<Vec<u8>>,
}

impl KeyRange {
    /// Keys whose encoding begins with `prefix`: those with the same values in their first columns.
    #[must_use]
    pub fn beginning_with(prefix: &[u8]) -> Self {
        Self { from: prefix.to_vec(), to: after(prefix) }
    }

    /// Whether `key` is one.
    #[must_use]
    pub fn contains(&self, key: &[u8]) -> bool {
        self.from.as_slice() <= key && self.to.as_deref().is_none_or(|to| key < to)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.to.as_ref().is_some_and(|to| *to <= self.from)
    }
}

/// The least key above all that begin with `prefix`; `None` if there is none.
#[must_use]
pub fn after(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte != u8::MAX)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn byte_order_is_value_order(a in any::<(i64, String, i16, i128)>(), b in any::<(i64, String, i16, i128)>()) {
            let values = |t: &(i64, String, i16, i128)| vec![
                Value::BigInt(t.0), Value::Text(t.1.clone()), Value::SmallInt(t.2), Value::Decimal(t.3),
            ];
            prop_assert_eq!(encode(&values(&a)).cmp(&encode(&values(&b))), a.cmp(&b));
            let texts = |t: &(i64, String, i16, i128)| vec![Value::Text(t.1.clone()), Value::BigInt(t.0)];
            prop_assert_eq!(encode(&texts(&a)).cmp(&encode(&texts(&b))), (&a.1, a.0).cmp(&(&b.1, b.0)));
        }

        #[test]
        fn a_range_by_prefix_has_the_keys_with_these_first_values(
            a in any::<(i64, String)>(), b in any::<(i64, String)>(),
        ) {
            let range = KeyRange::beginning_with(&encode(&[Value::BigInt(a.0)]));
            let key = encode(&[Value::BigInt(b.0), Value::Text(b.1)]);
            prop_assert_eq!(range.contains(&key), a.0 == b.0);
            prop_assert!(range.contains(&encode(&[Value::BigInt(a.0), Value::Text(a.1)])) && !range.is_empty());
        }

        #[test]
        fn no_key_is_a_prefix_of_another(a in any::<Vec<u8>>(), b in any::<Vec<u8>>()) {
            let (x, y) = (encode(&[Value::Bytes(a.clone())]), encode(&[Value::Bytes(b.clone())]));
            prop_assert_eq!(x.starts_with(&y), a == b);
            prop_assert_eq!(x.cmp(&y), a.cmp(&b));
        }
    }

    #[test]
    fn what_comes_after_a_prefix_is_above_all_that_begins_with_it() {
        assert_eq!(after(&[1, 2]), Some(vec![1, 3]));
        assert_eq!(after(&[1, 0xFF]), Some(vec![2]));
        assert_eq!(after(&[0xFF, 0xFF]), None);
    }
}
