//! SQLite: the tables of one user that it can have.

use rusqlite::types::ValueRef;

use super::tables::{TABLES, Table};
use super::{Row, Said};

pub struct Theirs(rusqlite::Connection);

impl Theirs {
    pub fn new() -> anyhow::Result<Self> {
        let connection = rusqlite::Connection::open_in_memory()?;
        connection.execute_batch("PRAGMA case_sensitive_like = ON")?;
        for table in &TABLES {
            if let Some(sqlite) = table.sqlite {
                connection.execute_batch(&format!("CREATE TABLE {} ({})", table.name, sqlite.columns))?;
            }
        }
        Ok(Self(connection))
    }

    pub fn run(&self, sql: &str) -> anyhow::Result<Said> {
        let mut statement = self.0.prepare(sql)?;
        let width = statement.column_count();
        let outcome = if width == 0 {
            statement.execute([]).map(Said::Changed)
        } else {
            statement
                .query_map([], |row| (0..width).map(|at| row.get_ref(at).map(cell)).collect())
                .and_then(Iterator::collect)
                .map(Said::Rows)
        };
        match outcome {
            Ok(said) => Ok(said),
            Err(rusqlite::Error::SqliteFailure(error, _)) if error.code == rusqlite::ErrorCode::ConstraintViolation => {
                Ok(Said::Duplicate)
            }
            Err(error) => Err(error.into()),
        }
    }

    pub fn all(&self, table: &Table) -> anyhow::Result<Vec<Row>> {
        match self.run(&format!("SELECT * FROM {}", table.name))? {
            Said::Rows(rows) => Ok(rows),
            other => anyhow::bail!("SELECT said {other:?}"),
        }
    }
}

fn cell(value: ValueRef<'_>) -> Option<String> {
    match value {
        ValueRef::Null => None,
        ValueRef::Integer(v) => Some(v.to_string()),
        ValueRef::Real(v) => Some(v.to_string()),
        ValueRef::Text(v) => Some(String::from_utf8_lossy(v).into_owned()),
        ValueRef::Blob(_) => Some("blob".to_owned()),
    }
}
