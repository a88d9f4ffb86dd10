//! Sets of row positions in one file: deletion vectors and their like.
//!
//! In JSON: base64 (standard alphabet, padded) of the portable Roaring serialization, which other languages read
//! (<https://github.com/RoaringBitmap/RoaringFormatSpec>).

use std::ops::Range;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use parquet::arrow::arrow_reader::{RowSelection, RowSelector};
use roaring::RoaringBitmap;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

/// Row positions, counted from 0 over the whole file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Positions(RoaringBitmap);

impl Eq for Positions {}

impl Positions {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len()
    }

    /// About what they take in JSON.
    #[must_use]
    pub fn json_bytes(&self) -> usize {
        self.0.serialized_size() / 3 * 4 + 8
    }

    /// Whether `row` is one.
    #[must_use]
    pub fn contains(&self, row: u32) -> bool {
        self.0.contains(row)
    }

    /// Adds `row`.
    pub fn insert(&mut self, row: u32) {
        self.0.insert(row);
    }

    /// Adds `rows`.
    pub fn insert_range(&mut self, rows: Range<u32>) {
        self.0.insert_range(rows);
    }

    /// Those of either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self(&self.0 | &other.0)
    }

    /// Ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter()
    }

    /// Selects the rows of a file of `rows` rows that are in the set, and no others.
    #[must_use]
    pub fn only(&self, rows: u32) -> RowSelection {
        self.selection(rows, RowSelector::select, RowSelector::skip)
    }

    /// Selects the rows of a file of `rows` rows that are not in the set.
    #[must_use]
    pub fn all_but(&self, rows: u32) -> RowSelection {
        self.selection(rows, RowSelector::skip, RowSelector::select)
    }

    fn selection(
        &self,
        rows: u32,
        inside: fn(usize) -> RowSelector,
        outside: fn(usize) -> RowSelector,
    ) -> RowSelection {
        let mut selectors = Vec::new();
        let mut at = 0;
        for (first, count) in self.gaps(rows) {
            if first > at {
                selectors.push(inside((first - at) as usize));
            }
            selectors.push(outside(count as usize));
            at = first + count;
        }
        if at < rows {
            selectors.push(inside((rows - at) as usize));
        }
        selectors.into()
    }

    /// The positions of a file of `rows` rows that are not in the set, as (first, count), ascending.
    fn gaps(&self, rows: u32) -> Vec<(u32, u32)> {
        let mut gaps = Vec::new();
        let mut at = 0;
        let mut ranges = self.0.iter();
        while let Some(range) = ranges.next_range() {
            let (start, end) = ((*range.start()).min(rows), range.end().saturating_add(1).min(rows));
            if start > at {
                gaps.push((at, start - at));
            }
            at = end;
        }
        if at < rows {
            gaps.push((at, rows - at));
        }
        gaps
    }
}

impl FromIterator<u32> for Positions {
    fn from_iter<I: IntoIterator<Item = u32>>(rows: I) -> Self {
        Self(rows.into_iter().collect())
    }
}

impl Serialize for Positions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = Vec::with_capacity(self.0.serialized_size());
        self.0.serialize_into(&mut bytes).map_err(ser::Error::custom)?;
        serializer.serialize_str(&STANDARD.encode(bytes))
    }
}

impl<'de> Deserialize<'de> for Positions {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = STANDARD.decode(String::deserialize(deserializer)?).map_err(de::Error::custom)?;
        let mut rest = bytes.as_slice();
        let positions = RoaringBitmap::deserialize_from(&mut rest).map_err(de::Error::custom)?;
        if rest.is_empty() { Ok(Self(positions)) } else { Err(de::Error::custom("bytes after the positions")) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn positions_read_back(rows in proptest::collection::btree_set(any::<u32>(), 0..200)) {
            let positions: Positions = rows.iter().copied().collect();
            let text = serde_json::to_string(&positions).unwrap();
            prop_assert_eq!(serde_json::from_str::<Positions>(&text).unwrap(), positions);
        }

        #[test]
        fn the_gaps_are_what_is_not_in_the_set(
            set in proptest::collection::btree_set(0..300_u32, 0..200), rows in 0..300_u32,
        ) {
            let positions: Positions = set.iter().copied().collect();
            let gaps = positions.gaps(rows);
            let listed: Vec<u32> = gaps.iter().flat_map(|(first, count)| *first..first + count).collect();
            let expected: Vec<u32> = (0..rows).collect::<BTreeSet<_>>().difference(&set).copied().collect();
            prop_assert_eq!(&listed, &expected);
            prop_assert_eq!(positions.all_but(rows).row_count(), expected.len());
            prop_assert_eq!(positions.only(rows).row_count(), rows as usize - expected.len());
            prop_assert!(gaps.windows(2).all(|pair| pair[0].0 + pair[0].1 < pair[1].0), "runs that touch are one");
        }
    }

    #[test]
    fn damaged_positions_are_an_error() {
        for bad in ["\"\"", "\"AAAA\"", "\"!\"", "[1]", "\"OjAAAAAAAAAA\""] {
            assert!(serde_json::from_str::<Positions>(bad).is_err(), "{bad}");
        }
    }
}
