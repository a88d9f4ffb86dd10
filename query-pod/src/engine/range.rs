//! The first or last rows of an instance by key, without reading the others.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use kalamdb_model::key::KeyRange;
use kalamdb_model::{Owner, TableEntry, Value};
use kalamdb_table_store::{FileEntry, parquet_read};
use kalamdb_write_buffer::row::Header;

use super::locate::Row;
use super::read::ReadError;
use super::{Engine, RootKey};

/// Most bytes of rows that are held at once.
const BYTES_MAX: usize = 8 << 20;
/// Most rows of the buffer that are looked at, deleted ones too.
const VISITED_MAX: usize = 10_000;

/// Which rows: those of `range`, at most `limit`, the ones with the least keys, or with the greatest if `descending`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// Their keys.
    pub range: KeyRange,
    /// How many.
    pub limit: usize,
    /// Whether the greatest come first.
    pub descending: bool,
}

/// What was found so far, by key.
struct Found {
    window: Window,
    rows: BTreeMap<Vec<u8>, Row>,
    bytes: usize,
}

impl Found {
    /// The key that `window` would give up first, once there are as many rows as it takes.
    fn edge(&self) -> Option<&Vec<u8>> {
        let edge = if self.window.descending { self.rows.first_key_value() } else { self.rows.last_key_value() };
        edge.filter(|_| self.rows.len() >= self.window.limit).map(|(key, _)| key)
    }

    /// Whether all keys of `file` are further away than those of the rows that were found.
    fn is_nearer_than(&self, file: &FileEntry) -> bool {
        self.edge().is_some_and(|edge| if self.window.descending { file.max_key < *edge } else { file.min_key > *edge })
    }

    /// Adds a row, and gives up the one that is too many.
    fn add(&mut self, key: Vec<u8>, row: Row) -> Result<(), ReadError> {
        self.bytes += row.size();
        if self.rows.insert(key, row).is_some() {
            return Err(ReadError::Twice);
        }
        if self.rows.len() > self.window.limit {
            let gone = if self.window.descending { self.rows.pop_first() } else { self.rows.pop_last() };
            self.bytes -= gone.map_or(0, |(_, row)| row.size());
        }
        Ok(())
    }
}

impl Engine {
    /// The rows of `owner`'s instance of `table` that `window` asks for, in its order, as of one moment. `None`: it takes
    /// more than is held at once; a scan reads as much as it needs.
    ///
    /// # Errors
    /// If anything cannot be read; never fewer rows than there are.
    pub async fn range(
        self: &Arc<Self>,
        table: &TableEntry,
        owner: &Owner,
        window: Window,
    ) -> Result<Option<Vec<Row>>, ReadError> {
        self.check_owned()?;
        self.check_rebuilt(table, owner).await?;
        let instance = self.instances.get(&Self::instance_id(table, owner))?;
        let mut found = Found { window, rows: BTreeMap::new(), bytes: 0 };
        let Window { range, limit, descending } = found.window.clone();
        // Keys whose rows in files, if there are any, are older than what the buffer has.
        let mut newer: BTreeSet<Vec<u8>> = BTreeSet::new();
        let (mut visited, mut outcome) = (0, Ok(()));
        // Buffer and view under one lock, as for scans.
        let view = {
            let current = instance.current.read();
            self.buffer.scan_range(&instance.id, current.view.flushed, &range, descending, &mut |_, key, row| {
                outcome = Header::parse(row).map_err(ReadError::from).and_then(|header| {
                    visited += 1;
                    if !header.fresh {
                        found.bytes += key.len();
                        newer.insert(key.to_vec());
                    }
                    if header.deleted { Ok(()) } else { found.add(key.to_vec(), Row::Buffered(row.to_vec())) }
                });
                let enough = found.rows.len() >= limit || visited > VISITED_MAX || found.bytes > BYTES_MAX;
                if outcome.is_err() || enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })?;
            Arc::clone(&current.view)
        };
        outcome?;
        if visited > VISITED_MAX || found.bytes > BYTES_MAX {
            return Ok(None);
        }
        self.check_owner(table, &instance.id, &view)?;
        let mut files: Vec<&FileEntry> = view.manifest.files.iter().filter(|file| meets(file, &range)).collect();
        files.sort_by(
            |one, other| if descending { other.max_key.cmp(&one.max_key) } else { one.min_key.cmp(&other.min_key) },
        );
        if files.is_empty() {
            return Ok(Some(in_order(found)));
        }
        let store = self.storages.files(&self.catalog.current(), &RootKey::of(view.location(table)))?;
        for file in files {
            if found.is_nearer_than(file) {
                break;
            }
            // So many of its rows may be hidden by newer ones.
            let wanted = limit.saturating_add(newer.len());
            let (hidden, of) = (file.hidden(), (wanted, descending));
            let near = parquet_read::read_range(&store, file, table, &range, &hidden, of, BYTES_MAX);
            let Some(near) = near.await? else { return Ok(None) };
            for (key, values) in near {
                if !newer.contains(&key) {
                    found.add(key, Row::Filed(values))?;
                }
            }
            if found.bytes > BYTES_MAX {
                return Ok(None);
            }
        }
        Ok(Some(in_order(found)))
    }
}

/// Whether `file` may have keys in `range`.
fn meets(file: &FileEntry, range: &KeyRange) -> bool {
    file.min_key <= file.max_key && range.from <= file.max_key && range.to.as_ref().is_none_or(|to| file.min_key < *to)
}

fn in_order(found: Found) -> Vec<Row> {
    let rows = found.rows.into_values();
    if found.window.descending { rows.rev().collect() } else { rows.collect() }
}

impl Row {
    /// About what it takes, bytes.
    fn size(&self) -> usize {
        match self {
            Self::Buffered(row) => row.len(),
            Self::Filed(values) => values.iter().map(Value::size).sum(),
        }
    }
}
