//! Finds rows by their keys: in the buffer, and in files, where rows of the buffer may replace them.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use kalamdb_model::{Owner, TableEntry, Value};
use kalamdb_table_store::{Positions, parquet_read};
use kalamdb_write_buffer::Fresh;
use kalamdb_write_buffer::row::Header;

use super::instance::{Instance, Position, View};
use super::read::ReadError;
use super::{Engine, RootKey};

/// A row that is not deleted.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// Unflushed: its bytes, which tell its system columns too.
    Buffered(Vec<u8>),
    /// In a file: the values of the table's own columns.
    Filed(Vec<Value>),
}

/// What is known of a key.
#[derive(Clone, Debug)]
pub(super) struct Existing {
    /// Whether there is a row, and it is not deleted.
    pub(super) live: bool,
    /// What may be said of the next version.
    pub(super) fresh: Fresh,
    pub(super) place: Place,
}

#[derive(Clone, Debug)]
pub(super) enum Place {
    Nowhere,
    /// The bytes of the newest version, which is in the buffer.
    Buffer(Vec<u8>),
    /// In one of the files of this view.
    File(Position, Arc<View>),
}

fn in_files(view: &Arc<View>, position: Option<&Position>) -> Existing {
    let Some(position) = position else {
        return Existing { live: false, fresh: Fresh::Yes, place: Place::Nowhere };
    };
    let live = view.file(&position.path).is_some_and(|file| !file.tombstones.contains(position.row));
    Existing { live, fresh: Fresh::No, place: Place::File(position.clone(), Arc::clone(view)) }
}

impl Engine {
    /// The row of `owner`'s instance of `table` with this key, as of one moment. Waits for no statement that writes.
    ///
    /// # Errors
    /// If the buffer or a file does not read: an error is never "no such row".
    pub async fn get(
        self: &Arc<Self>,
        table: &TableEntry,
        owner: &Owner,
        key: Vec<u8>,
    ) -> Result<Option<Row>, ReadError> {
        self.check_owned()?;
        self.check_rebuilt(table, owner).await?;
        let instance = self.instances.get(&Self::instance_id(table, owner))?;
        let found = self.find(table, &instance, vec![key]).await?.into_values().next();
        match found {
            Some(Existing { live: true, place: Place::Buffer(row), .. }) => Ok(Some(Row::Buffered(row))),
            Some(Existing { live: true, place: Place::File(at, view), .. }) => {
                let rows = self.rows_at(table, &view, &at.path, &[at.row].into_iter().collect()).await?;
                Ok(rows.into_iter().next().map(Row::Filed))
            }
            _ => Ok(None),
        }
    }

    /// What is known of each of `keys`: from the buffer, else from those files whose key range may hold it.
    pub(super) async fn find(
        &self,
        table: &TableEntry,
        instance: &Instance,
        keys: Vec<Vec<u8>>,
    ) -> Result<HashMap<Vec<u8>, Existing>, ReadError> {
        let mut known = HashMap::with_capacity(keys.len());
        let mut elsewhere = BTreeSet::new();
        // Buffer and view under one lock, as for scans: a key must not slip from one to the other between two looks.
        let (view, buffered) = {
            let current = instance.current.read();
            let pks: Vec<&[u8]> = keys.iter().map(Vec::as_slice).collect();
            let buffered = self.buffer.get_each(&instance.id, current.view.flushed, &pks)?;
            (Arc::clone(&current.view), buffered)
        };
        for (key, buffered) in keys.into_iter().zip(buffered) {
            match buffered {
                Some((generation, value)) => {
                    let header = Header::parse(&value)?;
                    let fresh = if header.fresh { Fresh::In(generation) } else { Fresh::No };
                    known.insert(key, Existing { live: !header.deleted, fresh, place: Place::Buffer(value) });
                }
                None if view.manifest.files.is_empty() => drop(known.insert(key, in_files(&view, None))),
                None => drop(elsewhere.insert(key)),
            }
        }
        if !elsewhere.is_empty() {
            let located = self.locate(table, instance, &view, &elsewhere).await?;
            known.extend(located.into_iter().map(|(key, position)| {
                let existing = in_files(&view, position.as_ref());
                (key, existing)
            }));
        }
        Ok(known)
    }

    /// The rows at `positions` of the file of `view` under `path`, in file order.
    pub(super) async fn rows_at(
        &self,
        table: &TableEntry,
        view: &View,
        path: &str,
        positions: &Positions,
    ) -> Result<Vec<Vec<Value>>, ReadError> {
        let Some(file) = view.file(path) else { return Ok(Vec::new()) };
        let files = self.storages.files(&self.catalog.current(), &RootKey::of(view.location(table)))?;
        Ok(parquet_read::read_rows(&files, file, table, positions).await?)
    }

    /// Where the files of `view` hold the newest version that they have of each of `keys`. Every key gets an answer. No
    /// request where no file's key range holds a key.
    pub(super) async fn locate(
        &self,
        table: &TableEntry,
        instance: &Instance,
        view: &View,
        keys: &BTreeSet<Vec<u8>>,
    ) -> Result<HashMap<Vec<u8>, Option<Position>>, ReadError> {
        // A key that is looked up in another user's file would tell that he has it.
        self.check_owner(table, &instance.id, view)?;
        let mut located: HashMap<Vec<u8>, Option<Position>> = keys.iter().map(|key| (key.clone(), None)).collect();
        let may_hold = |file: &&kalamdb_table_store::FileEntry| {
            file.min_key <= file.max_key && keys.range(file.min_key.clone()..=file.max_key.clone()).next().is_some()
        };
        let holders: Vec<_> = view.manifest.files.iter().filter(may_hold).collect();
        if holders.is_empty() {
            return Ok(located);
        }
        let files = self.storages.files(&self.catalog.current(), &RootKey::of(view.location(table)))?;
        for file in holders {
            let path: Arc<str> = file.path.as_str().into();
            for (key, row) in parquet_read::locate_keys(&files, file, table, keys).await? {
                if file.replaced.contains(row) {
                    continue;
                }
                let other = located.insert(key, Some(Position { path: Arc::clone(&path), row }));
                if let Some(Some(other)) = other {
                    tracing::error!(object_path = %path, other = %other.path, "two files hold the same row");
                    return Err(ReadError::Twice);
                }
            }
        }
        Ok(located)
    }
}
