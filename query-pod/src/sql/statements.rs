//! Statements that were parsed before. What a text means depends on nothing but the text, so they are everybody's.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::parse::{self, Statement};
use super::parse_dml::Source;
use crate::error::ApiError;

/// Longest text that is kept, bytes: an INSERT of some thousand parameters.
const SQL_BYTES_MAX: usize = 16 << 10;
/// All texts that are kept, bytes. A tree may take two hundred times its text.
const ALL_BYTES_MAX: usize = 256 << 10;

/// Parsed statements, the ones used last.
#[derive(Default)]
pub(super) struct Statements(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    statements: HashMap<Arc<str>, (Arc<Statement>, u64)>,
    /// Of the texts.
    bytes: usize,
    /// Counts uses, so that the statement whose last one is the oldest makes room.
    uses: u64,
}

impl Statements {
    /// What `sql` says.
    ///
    /// # Errors
    /// As [`parse::parse`]; an error is not kept.
    pub(super) fn parse(&self, sql: &str) -> Result<Arc<Statement>, ApiError> {
        if let Some(statement) = self.get(sql) {
            return Ok(statement);
        }
        let statement = Arc::new(parse::parse(sql)?);
        if sql.len() <= SQL_BYTES_MAX && comes_again(&statement) {
            self.keep(sql, &statement);
        }
        Ok(statement)
    }

    fn get(&self, sql: &str) -> Option<Arc<Statement>> {
        let mut kept = self.0.lock();
        kept.uses += 1;
        let now = kept.uses;
        let (statement, used) = kept.statements.get_mut(sql)?;
        *used = now;
        Some(Arc::clone(statement))
    }

    fn keep(&self, sql: &str, statement: &Arc<Statement>) {
        let mut kept = self.0.lock();
        if kept.bytes + sql.len() > ALL_BYTES_MAX {
            kept.make_room();
        }
        kept.uses += 1;
        let now = kept.uses;
        if kept.statements.insert(sql.into(), (Arc::clone(statement), now)).is_none() {
            kept.bytes += sql.len();
        }
    }
}

impl Kept {
    /// Down to the half: what makes room looks at all of them.
    fn make_room(&mut self) {
        let mut by_use: Vec<(u64, usize)> = self.statements.iter().map(|(sql, (_, used))| (*used, sql.len())).collect();
        by_use.sort_unstable();
        let mut oldest = 0;
        for (used, bytes) in by_use {
            if self.bytes <= ALL_BYTES_MAX / 2 {
                break;
            }
            oldest = used;
            self.bytes -= bytes;
        }
        self.statements.retain(|_, (_, used)| *used > oldest);
    }
}

/// Whether the same text is likely to be sent again. Rows that are written out come once.
fn comes_again(statement: &Statement) -> bool {
    match statement {
        Statement::Insert(insert) => matches!(insert.source, Source::Query(_)) || !insert.parameters.is_empty(),
        Statement::Query(_) | Statement::Update(_) | Statement::Delete(_) => true,
        Statement::Flush(_) | Statement::Compact(_) | Statement::CancelJob(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_is_parsed_once_and_an_error_every_time() {
        let statements = Statements::default();
        let first = statements.parse("SELECT $1").unwrap();
        assert!(Arc::ptr_eq(&first, &statements.parse("SELECT $1").unwrap()));
        assert!(!Arc::ptr_eq(&first, &statements.parse("SELECT $2").unwrap()));
        for _ in 0..2 {
            assert_eq!(statements.parse("SELEC 1").unwrap_err().code, "SYNTAX_ERROR");
        }
        assert_eq!(statements.0.lock().statements.len(), 2);
    }

    #[test]
    fn rows_that_are_written_out_are_not_kept() {
        let statements = Statements::default();
        statements.parse("INSERT INTO app.t VALUES (1, 'a')").unwrap();
        assert_eq!(statements.0.lock().bytes, 0);
        statements.parse("INSERT INTO app.t VALUES ($1, 'a')").unwrap();
        assert_eq!(statements.0.lock().bytes, 34);
    }

    #[test]
    fn what_is_kept_is_bounded_and_used_ones_stay() {
        let statements = Statements::default();
        let used = "SELECT 1";
        let first = statements.parse(used).unwrap();
        for number in 0..200 {
            statements.parse(&format!("SELECT '{}{number}'", "x".repeat(5_000))).unwrap();
            let kept = statements.0.lock();
            assert!(kept.bytes <= ALL_BYTES_MAX);
            assert_eq!(kept.bytes, kept.statements.keys().map(|sql| sql.len()).sum::<usize>());
            drop(kept);
            assert!(Arc::ptr_eq(&first, &statements.parse(used).unwrap()), "after {number}");
        }
        let long = format!("SELECT '{}'", "x".repeat(SQL_BYTES_MAX));
        statements.parse(&long).unwrap();
        assert!(!statements.0.lock().statements.contains_key(long.as_str()));
    }
}
