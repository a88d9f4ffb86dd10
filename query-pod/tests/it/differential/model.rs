//! A table of one user as it is meant: a map.

use std::collections::{BTreeMap, BTreeSet};

use super::actions::{Action, Asked, Conflict};
use super::tables::{Table, Value};
use super::{Row, Said};

/// Rows as answers show them, by their keys.
#[derive(Default)]
pub struct Model {
    rows: BTreeMap<Vec<String>, Row>,
}

impl Model {
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Has these rows from now on.
    pub fn replace(&mut self, table: &Table, rows: Vec<Row>) {
        self.rows = rows.into_iter().map(|row| (table.key_of(&row), row)).collect();
    }

    /// Does what is asked for, and tells what has to be answered.
    pub fn answer(&mut self, asked: &Asked) -> Said {
        let written = match &asked.action {
            Action::Insert { rows, conflict } => match self.insert(asked.table, rows, conflict) {
                Some(written) => written,
                None => return Said::Duplicate,
            },
            Action::Update { key, set } => self.update(key, set),
            Action::Delete { key } => self.rows.remove(&shown_key(key)).into_iter().collect(),
            Action::Get { key } => return Said::Rows(self.rows.get(&shown_key(key)).cloned().into_iter().collect()),
            Action::All => return Said::Rows(self.rows.values().cloned().collect()),
            Action::Count => return Said::Rows(vec![vec![Some(self.rows.len().to_string())]]),
        };
        if asked.returning { Said::Rows(written) } else { Said::Changed(written.len()) }
    }

    /// The rows that were written; `None`: none, because a key exists.
    fn insert(&mut self, table: &Table, rows: &[Vec<Value>], conflict: &Conflict) -> Option<Vec<Row>> {
        let mut after = self.rows.clone();
        let mut named = BTreeSet::new();
        let mut written = Vec::new();
        for row in rows {
            let mut row = shown(row);
            let key = table.key_of(&row);
            let is_named_again = !named.insert(key.clone());
            match (after.get(&key), conflict) {
                (None, _) => {}
                (Some(_), Conflict::Refuses) => return None,
                (Some(_), Conflict::Ignores) => continue,
                (Some(_), Conflict::Overwrites(_)) if is_named_again => return None,
                (Some(old), Conflict::Overwrites(columns)) => {
                    let mut new = old.clone();
                    for at in columns {
                        new[*at] = row[*at].take();
                    }
                    row = new;
                }
            }
            after.insert(key, row.clone());
            written.push(row);
        }
        self.rows = after;
        Some(written)
    }

    fn update(&mut self, key: &[Value], set: &[(usize, Value)]) -> Vec<Row> {
        let Some(row) = self.rows.get_mut(&shown_key(key)) else { return Vec::new() };
        for (at, value) in set {
            row[*at].clone_from(&value.shown);
        }
        vec![row.clone()]
    }
}

fn shown(row: &[Value]) -> Row {
    row.iter().map(|value| value.shown.clone()).collect()
}

fn shown_key(key: &[Value]) -> Vec<String> {
    key.iter().map(|value| value.shown.clone().unwrap()).collect()
}
