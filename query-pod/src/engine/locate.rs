//! Finds the rows of files that rows of the buffer replace.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use kalamdb_model::TableEntry;
use kalamdb_table_store::parquet_read;

use super::instance::{Instance, Position, View};
use super::read::ReadError;
use super::{Engine, RootKey};

impl Engine {
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
        let files = self.storages.files(&self.catalog.current(), &RootKey::of(&table.location))?;
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
