//! 64-bit ids that rise with time, after Twitter's Snowflake: 41 bits of milliseconds since 2024, 10 bits of node,
//! 12 bits of counter. Positive until 2093.

/// 2024-01-01T00:00:00Z in milliseconds since 1970.
const EPOCH_MS: i64 = 1_704_067_200_000;

/// Makes ids for one node. Strictly rising even when the clock steps back: time then stands still in the ids.
#[derive(Debug)]
pub struct Snowflake {
    node: u16,
    last: i64,
}

impl Snowflake {
    /// A generator for `node`, of which the low 10 bits count.
    #[must_use]
    pub const fn new(node: u16) -> Self {
        Self { node: node & 0x3FF, last: 0 }
    }

    /// The next id. When more than 4,096 are taken in one millisecond, ids run ahead of the clock.
    pub fn next(&mut self, now_ms: i64) -> i64 {
        let from_clock = (now_ms - EPOCH_MS).max(0) << 12;
        self.last = from_clock.max(self.last + 1);
        (self.last >> 12) << 22 | i64::from(self.node) << 12 | self.last & 0xFFF
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_rise_when_the_clock_stands_or_steps_back() {
        let mut ids = Snowflake::new(7);
        let mut last = 0;
        for now in (0..20_000).map(|i| EPOCH_MS + 1_000 - i % 3) {
            let id = ids.next(now);
            assert!(id > last, "{id} after {last}");
            last = id;
        }
    }
}
