//! Rows that can be told from their key alone, so that every answer is checked.

use std::fmt::Write as _;

use serde_json::Value;

/// Length of a payload, bytes.
pub const PAYLOAD_BYTES: usize = 184;

/// The payload of row `id`: words that compress about as text does.
pub fn payload(id: u64) -> String {
    const WORDS: [&str; 16] = [
        "river", "stone", "letter", "morning", "window", "garden", "silver", "market", "winter", "bridge", "candle",
        "harbor", "meadow", "signal", "orchard", "thunder",
    ];
    let mut text = format!("{id} ");
    let mut random = mix(id);
    while text.len() < PAYLOAD_BYTES {
        random = mix(random);
        // Writing to a String cannot fail.
        let _ = write!(text, "{}-{:x} ", WORDS[usize::from(random as u8 % 16)], (random >> 8) as u16);
    }
    text.truncate(PAYLOAD_BYTES);
    text
}

/// SplitMix64 (Steele, Lea, Flood 2014): a number that looks random, the same for the same input.
pub const fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `INSERT` of `count` rows with keys into `table`; its parameters are those of [`params`].
pub fn insert_sql(table: &str, count: u64) -> String {
    let rows: Vec<String> = (0..count).map(|row| format!("(${}, ${})", row * 2 + 1, row * 2 + 2)).collect();
    format!("INSERT INTO {table} (id, payload) VALUES {}", rows.join(", "))
}

/// Keys and payloads of `count` rows from `first` on.
pub fn params(first: u64, count: u64) -> Vec<Value> {
    (first..first + count).flat_map(|id| [Value::from(id), Value::from(payload(id))]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_has_its_length_and_follows_from_its_key() {
        for id in [0, 1, u64::MAX] {
            assert_eq!((payload(id).len(), payload(id)), (PAYLOAD_BYTES, payload(id)));
        }
        assert_ne!(payload(1), payload(2));
    }

    #[test]
    fn an_insert_has_two_parameters_a_row() {
        assert_eq!(insert_sql("t", 2), "INSERT INTO t (id, payload) VALUES ($1, $2), ($3, $4)");
        assert_eq!(params(5, 2).len(), 4);
    }
}
