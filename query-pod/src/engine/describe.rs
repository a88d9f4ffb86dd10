//! Tells outside readers what lies in an instance's folder: `_manifest.json` beside the data.
//!
//! Best effort, derived, never read here. Written after compactions and requested flushes, and at most hourly otherwise:
//! ten thousand users must not mean ten thousand more objects at every flush.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kalamdb_model::{Column, ColumnId, InstanceId};
use kalamdb_table_store::manifest::{FORMAT, FileEntry};
use kalamdb_table_store::paths;
use object_store::{ObjectStoreExt as _, PutPayload};
use serde::Serialize;

use super::{Engine, FlushError, RootKey, now_us};
use crate::error::Chain;

const INTERVAL: Duration = Duration::from_secs(3_600);

/// The JSON of `_manifest.json`; `docs/formats.md` describes it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Described<'a> {
    format: u32,
    table: String,
    schema_version: u32,
    at_us: i64,
    columns: &'a [Column],
    key: &'a [ColumnId],
    files: &'a [FileEntry],
}

impl Engine {
    /// Writes the description of `id` if `at_once`, or if the last one is an hour old.
    pub(super) async fn describe(self: &Arc<Self>, id: &InstanceId, at_once: bool) {
        if let Err(error) = self.try_describe(id, at_once).await {
            tracing::warn!(table = id.table.0, error = %Chain(&error), "cannot write the manifest for outside readers");
        }
    }

    async fn try_describe(self: &Arc<Self>, id: &InstanceId, at_once: bool) -> Result<(), FlushError> {
        let instance = self.instances.get(id)?;
        // One after the other: a later state is never overwritten by an earlier one.
        let mut described = instance.described.lock().await;
        if !at_once && described.is_some_and(|at| at.elapsed() < INTERVAL) {
            return Ok(());
        }
        let Some(table) = self.catalog.current().table_by_id(id.table).cloned() else { return Ok(()) };
        let view = Arc::clone(&instance.current.read().view);
        let content = Described {
            format: FORMAT,
            table: table.name.to_string(),
            schema_version: table.schema_version,
            at_us: now_us(),
            columns: &table.columns,
            key: &table.key,
            files: &view.manifest.files,
        };
        let text = serde_json::to_vec_pretty(&content).expect("names and numbers always have a JSON form");
        let location = view.location(&table);
        let path = paths::outside_manifest(&paths::instance_prefix(location, &id.owner)?);
        let store = self.storages.store(&self.catalog.current(), &RootKey::of(location))?;
        let failed = |source: object_store::Error| FlushError::Describe { path: path.to_string(), source };
        store.put(&path, PutPayload::from(text)).await.map_err(failed)?;
        *described = Some(Instant::now());
        Ok(())
    }
}
