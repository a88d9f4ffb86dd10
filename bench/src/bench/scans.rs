//! Queries over all rows of a table, and their answers, which follow from the keys alone.

/// A query over all rows of a table.
pub struct Scan {
    /// What it does.
    pub what: &'static str,
    sql: &'static str,
    answer: fn(&mut dyn Iterator<Item = u64>) -> Vec<Vec<u64>>,
}

/// Those that are measured.
pub const SCANS: [Scan; 4] = [
    Scan { what: "count(*)", sql: "SELECT count(*) FROM $table", answer: |ids| vec![vec![ids.count() as u64]] },
    Scan { what: "sum", sql: "SELECT sum(id) FROM $table", answer: |ids| vec![vec![ids.sum()]] },
    Scan {
        what: "group by, 100 groups",
        sql: "SELECT id % 100, count(*), sum(id) FROM $table GROUP BY id % 100 ORDER BY id % 100",
        answer: grouped,
    },
    Scan {
        what: "filter on every text",
        sql: "SELECT count(*) FROM $table WHERE payload LIKE '%-%'",
        answer: |ids| vec![vec![ids.count() as u64]],
    },
];

/// Which rows are deleted for the second round of scans: 9.9 % of them, as the server rewrites a file at 10 %.
pub const DEAD_SQL: &str = "id % 10 = 3 AND id % 1000 <> 3";

/// Whether [`DEAD_SQL`] is true of row `id`.
pub const fn is_dead(id: u64) -> bool {
    id % 10 == 3 && id % 1_000 != 3
}

impl Scan {
    /// The query over `table`.
    pub fn sql(&self, table: &str) -> String {
        self.sql.replace("$table", table)
    }

    /// The answer, as text, for a table with the rows `ids`.
    pub fn answer(&self, mut ids: impl Iterator<Item = u64>) -> Vec<Vec<String>> {
        let rows = (self.answer)(&mut ids);
        rows.iter().map(|row| row.iter().map(u64::to_string).collect()).collect()
    }
}

fn grouped(ids: &mut dyn Iterator<Item = u64>) -> Vec<Vec<u64>> {
    let mut groups = [(0, 0); 100];
    for id in ids {
        let (count, sum) = &mut groups[id as usize % 100];
        *count += 1;
        *sum += id;
    }
    let filled = (0..).zip(groups).filter(|(_, (count, _))| *count > 0);
    filled.map(|(group, (count, sum))| vec![group, count, sum]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_follow_from_the_keys() {
        let [count, sum, groups, filter] = SCANS.map(|scan| scan.answer([1, 2, 101].into_iter()));
        assert_eq!((&count, &filter, sum), (&vec![vec!["3".to_owned()]], &count, vec![vec!["104".to_owned()]]));
        assert_eq!(groups, [["1", "2", "102"], ["2", "1", "2"]]);
    }

    #[test]
    fn fewer_rows_die_than_a_compaction_takes_for_its_reason() {
        assert_eq!((0..100_000).filter(|id| is_dead(*id)).count(), 9_900);
    }
}
