//! Statements that name rows by their whole keys, or ask for all of a table: what the model knows to do.

use rand::Rng as _;
use rand::rngs::StdRng;

use super::tables::{Table, Value};

/// A statement.
#[derive(Clone)]
pub struct Asked {
    pub table: &'static Table,
    pub action: Action,
    pub returning: bool,
    /// Whether values are sent as parameters.
    pub parameters: bool,
}

#[derive(Clone)]
pub enum Action {
    Insert {
        rows: Vec<Vec<Value>>,
        conflict: Conflict,
    },
    /// Sets columns by their positions.
    Update {
        key: Vec<Value>,
        set: Vec<(usize, Value)>,
    },
    Delete {
        key: Vec<Value>,
    },
    Get {
        key: Vec<Value>,
    },
    All,
    Count,
}

/// What becomes of a row whose key exists.
#[derive(Clone)]
pub enum Conflict {
    /// The statement is refused.
    Refuses,
    Ignores,
    /// These columns of the row that is there get the new values.
    Overwrites(Vec<usize>),
}

pub const KINDS: [&str; 10] = [
    "insert",
    "insert, do nothing",
    "insert, do update",
    "update by key",
    "delete by key",
    "select by key",
    "select all",
    "count all",
    "with parameters",
    "returning",
];

/// Some columns that are not of the key, at least one.
fn some_columns(rng: &mut StdRng, table: &Table) -> Vec<usize> {
    let mut all: Vec<usize> = (0..table.columns.len()).filter(|at| !table.columns[*at].is_key).collect();
    let one = all[rng.random_range(0..all.len())];
    all.retain(|at| *at == one || rng.random());
    all
}

impl Asked {
    pub fn random(rng: &mut StdRng, table: &'static Table) -> Self {
        let row = |rng: &mut StdRng| table.row(rng);
        let few = |rng: &mut StdRng| -> Vec<Vec<Value>> {
            let count = [1, 1, 1, 2, 4][rng.random_range(0..5)];
            (0..count).map(|_| row(rng)).collect()
        };
        let action = match rng.random_range(0..100) {
            0..38 => Action::Get { key: table.a_key(rng) },
            38..62 => Action::Insert { rows: few(rng), conflict: Conflict::Refuses },
            62..66 => Action::Insert { rows: few(rng), conflict: Conflict::Ignores },
            66..69 => {
                // Of two rows with one key, SQLite takes one after the other.
                let rows = if table.sqlite.is_some() { vec![row(rng)] } else { few(rng) };
                Action::Insert { rows, conflict: Conflict::Overwrites(some_columns(rng, table)) }
            }
            69..81 => {
                let set = some_columns(rng, table).into_iter().map(|at| (at, table.value(rng, at))).collect();
                Action::Update { key: table.a_key(rng), set }
            }
            81..93 => Action::Delete { key: table.a_key(rng) },
            93..96 => Action::All,
            _ => Action::Count,
        };
        let changes = !matches!(action, Action::Get { .. } | Action::All | Action::Count);
        let returning = changes && rng.random_range(0..20) == 0;
        Self { table, action, returning, parameters: rng.random_range(0..4) == 0 }
    }

    /// `SELECT *`
    pub fn all(table: &'static Table) -> Self {
        Self { table, action: Action::All, returning: false, parameters: false }
    }

    /// What it is, as [`KINDS`] has it.
    pub fn kind(&self) -> &'static str {
        match &self.action {
            Action::Insert { conflict: Conflict::Refuses, .. } => "insert",
            Action::Insert { conflict: Conflict::Ignores, .. } => "insert, do nothing",
            Action::Insert { conflict: Conflict::Overwrites(_), .. } => "insert, do update",
            Action::Update { .. } => "update by key",
            Action::Delete { .. } => "delete by key",
            Action::Get { .. } => "select by key",
            Action::All => "select all",
            Action::Count => "count all",
        }
    }

    /// With its values in it, as SQLite takes it, too.
    pub fn literal(&self) -> String {
        self.text(&mut |value: &Value| value.sql.clone())
    }

    /// With its values beside it, unless it is to have them in it.
    pub fn sent(&self) -> (String, Vec<String>) {
        let mut params = Vec::new();
        if !self.parameters {
            return (self.literal(), params);
        }
        let sql = self.text(&mut |value: &Value| {
            params.push(value.json.clone());
            format!("${}", params.len())
        });
        (sql, params)
    }

    fn text(&self, write: &mut dyn FnMut(&Value) -> String) -> String {
        let (table, name) = (self.table, self.table.name);
        let mut text = match &self.action {
            Action::Insert { rows, conflict } => {
                let rows: Vec<String> = rows.iter().map(|row| format!("({})", list(row, write))).collect();
                format!("INSERT INTO {name} VALUES {}{}", rows.join(", "), conflict.text(table))
            }
            Action::Update { key, set } => {
                let mut to = Vec::new();
                for (at, value) in set {
                    to.push(format!("{} = {}", table.columns[*at].name, write(value)));
                }
                format!("UPDATE {name} SET {} WHERE {}", to.join(", "), is(table, key, write))
            }
            Action::Delete { key } => format!("DELETE FROM {name} WHERE {}", is(table, key, write)),
            Action::Get { key } => format!("SELECT * FROM {name} WHERE {}", is(table, key, write)),
            Action::All => format!("SELECT * FROM {name}"),
            Action::Count => format!("SELECT count(*) FROM {name}"),
        };
        if self.returning {
            text.push_str(" RETURNING *");
        }
        text
    }
}

impl Conflict {
    fn text(&self, table: &Table) -> String {
        match self {
            Self::Refuses => String::new(),
            Self::Ignores => " ON CONFLICT DO NOTHING".to_owned(),
            Self::Overwrites(columns) => {
                let name = |at: &usize| table.columns[*at].name;
                let set: Vec<String> = columns.iter().map(|at| format!("{n} = excluded.{n}", n = name(at))).collect();
                format!(" ON CONFLICT ({}) DO UPDATE SET {}", table.key_names(), set.join(", "))
            }
        }
    }
}

fn list(values: &[Value], write: &mut dyn FnMut(&Value) -> String) -> String {
    let mut texts = Vec::new();
    for value in values {
        texts.push(write(value));
    }
    texts.join(", ")
}

/// `a = 1 AND b = 2`
fn is(table: &Table, key: &[Value], write: &mut dyn FnMut(&Value) -> String) -> String {
    let mut parts = Vec::new();
    for (column, value) in table.key().zip(key) {
        parts.push(format!("{} = {}", column.name, write(value)));
    }
    parts.join(" AND ")
}
