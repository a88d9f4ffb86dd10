//! Removes the files that compactions have replaced, an hour later: readers that began before still find them.
//!
//! A file is noted before the edit that takes it away is published, and whether it is still named is asked again before
//! it is deleted. So a crash between any two steps deletes nothing that is needed, and forgets nothing that is not.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kalamdb_model::{InstanceId, StorageName};
use kalamdb_table_store::manifest::Edit;
use kalamdb_table_store::paths;
use kalamdb_write_buffer::ReadError;
use object_store::ObjectStoreExt as _;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::instance::{InstanceError, View};
use super::jobs::{JobKind, Ticket};
use super::storages::StoragesError;
use super::{Engine, RootKey, now_us};
use crate::crash;
use crate::error::Chain;

/// How often is looked for garbage, at least.
const TICK: Duration = Duration::from_secs(10);
/// Most files removed at one look.
const REMOVED_MAX: usize = 1_000;

/// Failures one after the other after which a storage is left alone until the next look.
const FAILURES_MAX: usize = 3;

const NOTES: &str = "garbage/";

/// A file that no view names, or soon will not.
#[derive(Serialize, Deserialize)]
struct Note {
    storage: StorageName,
    root: u32,
    path: String,
    instance: InstanceId,
    /// When its time began, microseconds since 1970.
    since_us: i64,
    /// Its size.
    bytes: u64,
}

/// A file that could not be removed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RemoveError {
    #[error("its storage is not usable")]
    Storage(#[from] StoragesError),
    #[error("its path is none")]
    Path(#[from] object_store::path::Error),
    #[error("its storage does not remove it")]
    Store(#[from] object_store::Error),
}

/// The last segment of a path. Those of data files are never given twice.
pub(super) fn file_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

impl Engine {
    /// Takes note of the files that `edit` is about to take away. Blocking.
    pub(super) fn note_garbage(&self, root: &RootKey, view: &View, edit: &Edit) -> Result<(), ReadError> {
        for path in &edit.remove {
            let bytes = view.file(path).map_or(0, |file| file.bytes);
            self.note(root, &edit.instance, path.clone(), bytes)?;
        }
        Ok(())
    }

    /// Takes note of all files of `view`, which are about to be left behind in their storage. Blocking.
    pub(super) fn note_left(&self, id: &InstanceId, view: &View) -> Result<(), ReadError> {
        let catalog = self.catalog.current();
        let Some(table) = catalog.table_by_id(id.table) else { return Ok(()) };
        let location = view.location(table);
        let root = RootKey::of(location);
        let outside = paths::instance_prefix(location, &id.owner).map(|prefix| paths::outside_manifest(&prefix)).ok();
        let files = view.manifest.files.iter().map(|file| (file.path.clone(), file.bytes));
        for (path, bytes) in files.chain(outside.map(|path| (path.to_string(), 0))) {
            self.note(&root, id, path, bytes)?;
        }
        Ok(())
    }

    fn note(&self, root: &RootKey, id: &InstanceId, path: String, bytes: u64) -> Result<(), ReadError> {
        let at = format!("{NOTES}{root}/{path}");
        let (storage, root) = (root.storage.clone(), root.root);
        let note = Note { storage, root, path, instance: id.clone(), since_us: now_us(), bytes };
        let text = serde_json::to_vec(&note).expect("names and numbers always have a JSON form");
        self.buffer.state_put(&at, &text)?;
        crash::point("garbage.noted");
        Ok(())
    }

    /// Whether `path` in `root` is a file of the instance now. A data file is known by its name: what two storages reach has
    /// two paths.
    pub(super) fn is_named(&self, id: &InstanceId, root: &RootKey, path: &str) -> Result<bool, InstanceError> {
        let view = Arc::clone(&self.instances.get(id)?.current.read().view);
        let catalog = self.catalog.current();
        let Some(table) = catalog.table_by_id(id.table) else { return Ok(true) };
        let location = view.location(table);
        let outside = paths::instance_prefix(location, &id.owner).map(|prefix| paths::outside_manifest(&prefix));
        let is_outside = outside.is_ok_and(|outside| outside.as_ref() == path)
            && self.storages.share_place(&catalog, root, &RootKey::of(location));
        Ok(is_outside || view.manifest.files.iter().any(|file| file_name(&file.path) == file_name(path)))
    }

    /// Whether `path` in `root` is to go when its time has come.
    pub(super) fn is_noted(&self, root: &RootKey, path: &Path) -> Result<bool, ReadError> {
        Ok(self.buffer.state_get(&format!("{NOTES}{root}/{path}"))?.is_some())
    }

    pub(super) async fn remove(&self, root: &RootKey, path: &str) -> Result<(), RemoveError> {
        let store = self.storages.store(&self.catalog.current(), root)?;
        match store.delete(&Path::parse(path)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn remove_garbage(self: &Arc<Self>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let after_us = i64::try_from(self.limits.garbage_after_secs.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
        let (mut removed, mut jobs) = (0, HashMap::new());
        let mut failures: HashMap<RootKey, usize> = HashMap::new();
        for (key, text) in self.buffer.state_scan(NOTES)? {
            let Ok(Note { storage, root, path, instance, since_us, bytes }) = serde_json::from_slice(&text) else {
                tracing::error!(object_path = %key, "a note of a replaced file is damaged; the file stays");
                continue;
            };
            if now_us().saturating_sub(since_us) < after_us {
                continue;
            }
            if removed >= REMOVED_MAX || self.stop.is_cancelled() {
                break;
            }
            let root = RootKey { storage, root };
            // A storage that is down keeps its garbage, and the others lose theirs. One file that stays is no such storage.
            if failures.get(&root).is_some_and(|failures| *failures >= FAILURES_MAX) {
                continue;
            }
            if !self.is_named(&instance, &root, &path)? {
                crash::point("garbage.due");
                let outcome = self.remove(&root, &path).await;
                if let Some(table) = self.catalog.current().table_by_id(instance.table) {
                    let job = jobs.entry(table.id).or_insert_with(|| self.jobs.begin(JobKind::Garbage, table));
                    job.count(&instance);
                    match &outcome {
                        Ok(()) => job.add(0, bytes),
                        Err(error) => job.fail(error),
                    }
                }
                if let Err(error) = outcome {
                    tracing::warn!(object_path = %path, error = %Chain(&error), "cannot remove a replaced file yet");
                    *failures.entry(root).or_default() += 1;
                    continue;
                }
                crash::point("garbage.removed");
                failures.remove(&root);
            }
            self.buffer.state_delete(&key)?;
            removed += 1;
        }
        jobs.into_values().for_each(Ticket::done);
        Ok(())
    }
}

/// Removes garbage until the engine stops.
pub(super) async fn run(engine: Arc<Engine>) {
    let tick = TICK.min(Duration::from_secs(engine.limits.garbage_after_secs.max(1)));
    loop {
        tokio::select! {
            () = engine.stop.cancelled() => return,
            () = tokio::time::sleep(tick) => {}
        }
        if let Err(error) = engine.remove_garbage().await {
            tracing::warn!(error = %Chain(error.as_ref()), "cannot look for files to remove");
        }
    }
}

#[cfg(test)]
mod tests {
    use kalamdb_model::UserId;
    use kalamdb_model::declared::StorageRoot;
    use kalamdb_table_store::Credentials;
    use kalamdb_test_support::fault_store::FaultStore;
    use kalamdb_test_support::pod::MANIFESTS;
    use object_store::ObjectStore;
    use object_store::memory::InMemory;

    use super::super::{Secrets, Storages, testing};
    use super::*;

    #[test]
    fn the_stored_note_of_a_replaced_file_is_what_is_written() {
        let (key, text) = super::super::tests::stored_note(NOTES);
        let note: Note = serde_json::from_str(text).unwrap();
        assert_eq!(key, format!("{NOTES}{}.{}/{}", note.storage, note.root, note.path));
        assert_eq!((note.since_us, note.bytes), (1_732_000_000_000_000, 1_001));
        assert_eq!(serde_json::to_string(&note).unwrap(), text);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_storage_that_is_down_keeps_its_garbage_and_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let [down, up] = [(), ()].map(|()| FaultStore::healthy(Arc::new(InMemory::new())));
        down.set_down(true);
        let stores = (down.clone(), up);
        let open = Box::new(move |root: &StorageRoot, _: Option<&Credentials>, _| {
            let store = if root.place().1 == "other" { &stores.1 } else { &stores.0 };
            Ok(Arc::new(store.clone()) as Arc<dyn ObjectStore>)
        });
        let manifests = format!("{MANIFESTS}{}", testing::storage("other", "./other"));
        let (engine, table) = testing::open(dir.path(), &manifests, Storages::opened_by(open, Secrets::default()));
        let id = InstanceId::of_user(UserId::new("alice").unwrap(), table.id);
        let [local, other] =
            ["local", "other"].map(|name| RootKey { storage: StorageName::new(name).unwrap(), root: 1 });
        for root in [&local, &other] {
            for file in 0..20 {
                engine.note(root, &id, format!("users/alice/app/messages/{file}.parquet"), 1).unwrap();
            }
        }
        engine.remove_garbage().await.unwrap();
        let left = |root: &RootKey| engine.buffer.state_scan(&format!("{NOTES}{root}/")).unwrap().len();
        assert_eq!((left(&local), left(&other)), (20, 0));
        assert!(down.faults() < 20, "{} of its files were asked for", down.faults());
        down.set_down(false);
        engine.remove_garbage().await.unwrap();
        assert_eq!(left(&local), 0);
        engine.close(Duration::from_secs(5)).await;
    }
}
