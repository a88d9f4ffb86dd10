//! Removes the files that compactions have replaced, an hour later: readers that began before still find them.
//!
//! A file is noted before the edit that takes it away is published, and whether it is still named is asked again before
//! it is deleted. So a crash between any two steps deletes nothing that is needed, and forgets nothing that is not.

use std::sync::Arc;
use std::time::Duration;

use kalamdb_model::{InstanceId, StorageName};
use kalamdb_table_store::manifest::Edit;
use kalamdb_write_buffer::ReadError;
use object_store::ObjectStoreExt as _;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use super::{Engine, RootKey, now_us};
use crate::error::Chain;

/// How often is looked for garbage.
const TICK: Duration = Duration::from_secs(10);
/// Most files removed at one look.
const REMOVED_MAX: usize = 1_000;

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
}

impl Engine {
    /// Takes note of the files that `edit` is about to take away. Blocking.
    pub(super) fn note_garbage(&self, root: &RootKey, edit: &Edit) -> Result<(), ReadError> {
        for path in &edit.remove {
            let note = Note {
                storage: root.storage.clone(),
                root: root.root,
                path: path.clone(),
                instance: edit.instance.clone(),
                since_us: now_us(),
            };
            let text = serde_json::to_vec(&note).expect("names and numbers always have a JSON form");
            self.buffer.state_put(&format!("{NOTES}{root}/{path}"), &text)?;
        }
        Ok(())
    }

    async fn remove(&self, root: &RootKey, path: &str) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let store = self.storages.store(&self.catalog.current(), root)?;
        match store.delete(&Path::parse(path)?).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn remove_garbage(self: &Arc<Self>) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let after_us = i64::try_from(self.limits.garbage_after_secs.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
        let mut removed = 0;
        for (key, text) in self.buffer.state_scan(NOTES)? {
            let Ok(Note { storage, root, path, instance, since_us }) = serde_json::from_slice(&text) else {
                tracing::error!(object_path = %key, "a note of a replaced file is damaged; the file stays");
                continue;
            };
            if now_us().saturating_sub(since_us) < after_us {
                continue;
            }
            if removed >= REMOVED_MAX || self.stop.is_cancelled() {
                break;
            }
            let named = self.instances.get(&instance)?.current.read().view.file(&path).is_some();
            if !named {
                let root = RootKey { storage, root };
                // A storage that is down keeps its garbage; the others lose theirs.
                if let Err(error) = self.remove(&root, &path).await {
                    tracing::warn!(object_path = %path, error = %Chain(error.as_ref()), "cannot remove a replaced file yet");
                    continue;
                }
            }
            self.buffer.state_delete(&key)?;
            removed += 1;
        }
        Ok(())
    }
}

/// Removes garbage until the engine stops.
pub(super) async fn run(engine: Arc<Engine>) {
    loop {
        tokio::select! {
            () = engine.stop.cancelled() => return,
            () = tokio::time::sleep(TICK) => {}
        }
        if let Err(error) = engine.remove_garbage().await {
            tracing::warn!(error = %Chain(error.as_ref()), "cannot look for files to remove");
        }
    }
}
