//! The catalog that statements run against: the newest compiled one, swapped as a whole.

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

    /// Saves `catalog`, then serves it.
    ///
    /// # Errors
    /// If it cannot be saved; the old one is then served on, because ids that are not on disk must not be used.
    pub fn replace(&self, catalog: Catalog) -> Result<(), SavedCatalogError> {
        let path = &self.0.saved_as;
        let bytes = serde_json::to_vec(&catalog)
            .map_err(|source| SavedCatalogError::Damaged { path: path.display().to_string(), source })?;
        write_durably(path, &bytes, 0o644)
            .map_err(|source| SavedCatalogError::Io { path: path.display().to_string(), source })?;
        *self.0.current.write() = Arc::new(Snapshot::new(catalog));
        Ok(())
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
