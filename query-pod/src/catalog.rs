//! The catalog that statements run against: the newest compiled one, swapped as a whole.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kalamdb_model::{Catalog, SqlName, TableEntry, TableId, TableName};
use parking_lot::RwLock;

/// One version of the catalog with its indexes. A statement takes one at its start and keeps it.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// The catalog.
    pub catalog: Catalog,
    tables: HashMap<TableName, Arc<TableEntry>>,
    /// Live and retained ones: rows of a table whose manifest went away are still flushed.
    by_id: HashMap<TableId, Arc<TableEntry>>,
}

impl Snapshot {
    fn new(catalog: Catalog) -> Self {
        let tables: HashMap<_, _> =
            catalog.tables.values().map(|entry| (entry.name.clone(), Arc::new(entry.clone()))).collect();
        let retained = catalog.retained.values().map(|entry| (entry.id, Arc::new(entry.clone())));
        let by_id = retained.chain(tables.values().map(|entry| (entry.id, Arc::clone(entry)))).collect();
        Self { catalog, tables, by_id }
    }

    /// The table of that name.
    #[must_use]
    pub fn table(&self, name: &TableName) -> Option<&Arc<TableEntry>> {
        self.tables.get(name)
    }

    /// The table with that id, live or retained.
    #[must_use]
    pub fn table_by_id(&self, id: TableId) -> Option<&Arc<TableEntry>> {
        self.by_id.get(&id)
    }

    /// Names of the tables of a namespace, sorted.
    #[must_use]
    pub fn tables_of(&self, namespace: &SqlName) -> Vec<&TableName> {
        self.catalog.tables.keys().filter(|name| name.namespace == *namespace).collect()
    }
}

/// Holds the current [`Snapshot`] and its last copy on local disk.
#[derive(Clone)]
pub struct CatalogHandle(Arc<Shared>);

struct Shared {
    current: RwLock<Arc<Snapshot>>,
    saved_as: PathBuf,
}

/// The saved catalog cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SavedCatalogError {
    /// Reading or writing failed.
    #[error("failed to read or write the saved catalog `{path}`")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is not what we wrote.
    #[error(
        "the saved catalog `{path}` is damaged; restore it from a backup: it holds the ids by which rows are found"
    )]
    Damaged {
        /// The file.
        path: String,
        /// Where.
        source: serde_json::Error,
    },
}

impl CatalogHandle {
    /// Starts from the copy in `data_dir/catalog.json`, or empty. Ids and pinned locations live in it, so a damaged
    /// copy is an error, not a fresh start.
    ///
    /// # Errors
    /// If the copy cannot be read.
    pub fn open(data_dir: &Path) -> Result<Self, SavedCatalogError> {
        let saved_as = data_dir.join("catalog.json");
        let path = || saved_as.display().to_string();
        let catalog = match std::fs::read(&saved_as) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| SavedCatalogError::Damaged { path: path(), source })?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Catalog::default(),
            Err(source) => return Err(SavedCatalogError::Io { path: path(), source }),
        };
        let current = RwLock::new(Arc::new(Snapshot::new(catalog)));
        Ok(Self(Arc::new(Shared { current, saved_as })))
    }

    /// The newest snapshot.
    #[must_use]
    pub fn current(&self) -> Arc<Snapshot> {
        Arc::clone(&self.0.current.read())
    }

    /// Saves `catalog`, which is to be served next.
    ///
    /// # Errors
    /// If the disk fails; the old one is then served on, because ids that are not on disk must not be used.
    pub fn save(&self, catalog: &Catalog) -> Result<(), SavedCatalogError> {
        let path = &self.0.saved_as;
        let bytes = serde_json::to_vec(catalog)
            .map_err(|source| SavedCatalogError::Damaged { path: path.display().to_string(), source })?;
        write_durably(path, &bytes, 0o644)
            .map_err(|source| SavedCatalogError::Io { path: path.display().to_string(), source })
    }

    /// Makes sure that the catalog is the one that `noted` was noted of, or a later one.
    ///
    /// # Errors
    /// If statements may have used ids of tables that it does not know, or knows otherwise.
    pub fn check_noted(&self, noted: Option<&str>, has_rows: bool) -> Result<(), NotedCatalogError> {
        check_noted(&self.current().catalog, noted, has_rows, self.0.saved_as.display().to_string())
    }

    /// Serves `catalog`, which must be saved.
    pub fn serve(&self, catalog: Catalog) {
        *self.0.current.write() = Arc::new(Snapshot::new(catalog));
    }
}

/// A catalog cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeCatalogError {
    /// It cannot be saved.
    #[error("failed to save the catalog")]
    Save(#[from] SavedCatalogError),
    /// The write buffer does not take note of it.
    #[error("failed to note the catalog's version in the write buffer")]
    Note(#[from] kalamdb_write_buffer::ReadError),
}

/// The saved catalog is not the one that this data folder served last.
#[derive(Debug, thiserror::Error)]
pub enum NotedCatalogError {
    /// An older one.
    #[error(
        "the write buffer belongs to catalog version {noted}, and `{path}` is version {saved}; restore the file that was \
         there"
    )]
    Older {
        /// The file.
        path: String,
        /// In the write buffer.
        noted: u64,
        /// In the file.
        saved: u64,
    },
    /// The same number, given by somebody else.
    #[error(
        "the write buffer belongs to another catalog version {version} than `{path}`; restore the file that was there"
    )]
    OtherHistory {
        /// The file.
        path: String,
        /// Of both.
        version: u64,
    },
    /// None.
    #[error("the write buffer belongs to a catalog, and `{path}` is missing or empty; restore the file that was there")]
    Missing {
        /// The file.
        path: String,
    },
    /// What was noted is no note.
    #[error("the write buffer's note of its catalog, `{0}`, is damaged")]
    Damaged(String),
    /// The write buffer does not read or write.
    #[error("failed to read or write the write buffer's note of its catalog")]
    Buffer(#[from] kalamdb_write_buffer::ReadError),
}

/// What is noted beside the rows about the catalog that they belong to.
#[must_use]
pub fn note_of(catalog: &Catalog) -> String {
    format!("{} {}", catalog.version, catalog.nonce)
}

/// Compares the catalog saved at `path` with the note of the last one that was served. A later one was saved by a
/// process that died before it served it.
fn check_noted(saved: &Catalog, noted: Option<&str>, has_rows: bool, path: String) -> Result<(), NotedCatalogError> {
    let Some(note) = noted else {
        return if saved.version == 0 && has_rows { Err(NotedCatalogError::Missing { path }) } else { Ok(()) };
    };
    let damaged = || NotedCatalogError::Damaged(note.to_owned());
    let (version, nonce) = note.split_once(' ').ok_or_else(damaged)?;
    let noted: u64 = version.parse().map_err(|_| damaged())?;
    match saved.version.cmp(&noted) {
        Ordering::Less if saved.version == 0 => Err(NotedCatalogError::Missing { path }),
        Ordering::Less => Err(NotedCatalogError::Older { path, noted, saved: saved.version }),
        Ordering::Equal if saved.nonce != nonce => Err(NotedCatalogError::OtherHistory { path, version: noted }),
        Ordering::Equal | Ordering::Greater => Ok(()),
    }
}

/// Writes `path` so that after a crash it holds the old bytes or the new ones: temporary, fsync, rename, fsync folder.
///
/// # Errors
/// If the disk fails.
pub fn write_durably(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let temporary = path.with_extension("tmp");
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    match path.parent() {
        Some(folder) => std::fs::File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_catalog_that_is_older_or_of_another_history_is_refused() {
        let catalog = |version, nonce: &str| Catalog { version, nonce: nonce.to_owned(), ..Catalog::default() };
        let note = note_of(&catalog(7, "a"));
        let check =
            |saved: &Catalog, noted: Option<&str>, has_rows| check_noted(saved, noted, has_rows, "p".to_owned());
        let noted = |saved: &Catalog| check(saved, Some(&note), false);
        noted(&catalog(7, "a")).unwrap();
        noted(&catalog(8, "b")).unwrap();
        assert!(matches!(noted(&catalog(6, "a")), Err(NotedCatalogError::Older { noted: 7, saved: 6, .. })));
        assert!(matches!(noted(&Catalog::default()), Err(NotedCatalogError::Missing { .. })));
        assert!(matches!(noted(&catalog(7, "b")), Err(NotedCatalogError::OtherHistory { version: 7, .. })));
        check(&Catalog::default(), None, false).unwrap();
        assert!(matches!(check(&Catalog::default(), None, true), Err(NotedCatalogError::Missing { .. })));
        for damaged in ["", "7", "x a"] {
            assert!(matches!(check(&catalog(7, "a"), Some(damaged), false), Err(NotedCatalogError::Damaged(_))));
        }
    }
}
