//! Removes data files that no manifest names: uploads of flushes, compactions and moves that were given up, and what was
//! noted as garbage on a volume that is lost.
//!
//! Once a day each storage is listed. A file goes only if it is a day old, by its name and by the store; if it was made
//! since this data folder uses the storage (what was there before is another's); and if, while nothing of its instance is
//! being flushed, compacted or moved, neither the manifest nor a note of garbage names it. Names of files are compared, not
//! where they are said to lie: two storages may reach one place, and no two files have one name.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt as _;
use kalamdb_model::{InstanceId, Location, TableEntry, TableKind};
use kalamdb_table_store::{Manifest, paths};
use kalamdb_write_buffer::ReadError;
use object_store::path::Path;

use super::garbage::file_name;
use super::jobs::JobKind;
use super::ship::root_of;
use super::{Engine, RootKey, now_us};
use crate::catalog::Snapshot;
use crate::error::Chain;

/// How often storages are listed, at most.
const INTERVAL_MIN: Duration = Duration::from_secs(3_600);
/// How long a storage may take to let us prove that it is ours.
const PATIENCE: Duration = Duration::from_secs(30);
/// Since when a storage is used, microseconds since 1970.
const SINCE: &str = "since/";

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The tables that may have files in a root, by the folders that come after the user's.
struct Places {
    /// What comes before the user, then what comes after him.
    tables: BTreeMap<String, HashMap<String, Vec<Place>>>,
}

/// Where a table may have files.
type Place = (Location, Arc<TableEntry>);

impl Places {
    fn of(catalog: &Snapshot, root: &RootKey) -> Self {
        let mut tables: BTreeMap<String, HashMap<String, Vec<_>>> = BTreeMap::new();
        let all = catalog.catalog.tables.values().chain(catalog.catalog.retained.values());
        for table in all.filter_map(|table| catalog.table_by_id(table.id)) {
            let own = (RootKey::of(&table.location) == *root).then(|| table.location.clone());
            // Users may have had this storage as their own.
            let of_users = (own.is_none() && table.kind == TableKind::User && table.had_user_storage)
                .then(|| catalog.catalog.place_in(&root.storage, table))
                .flatten()
                .map(|location| Location { root: root.root, ..location });
            for location in own.into_iter().chain(of_users) {
                let (before, after) = match location.template.split_once(kalamdb_model::template::USER) {
                    Some((before, after)) => (before.to_owned(), after.to_owned()),
                    None => (location.template.clone(), String::new()),
                };
                let folder = tables.entry(before).or_default().entry(after).or_default();
                folder.push((location, Arc::clone(table)));
            }
        }
        Self { tables }
    }

    /// Whose file lies at `path`, if it can be but one's.
    fn instance(&self, before: &str, path: &Path) -> Option<(InstanceId, &Arc<TableEntry>)> {
        let (folder, _) = path.as_ref().rsplit_once('/')?;
        let afters = self.tables.get(before)?;
        let prefix = Path::parse(folder).ok()?;
        let ends = folder.rmatch_indices('/').map(|(at, _)| &folder[at..]);
        let candidates = std::iter::once("").chain(ends).filter_map(|after| afters.get(after)).flatten();
        let mut owners = candidates.filter_map(|(location, table)| {
            let owner = paths::owner_of_prefix(location, &prefix)?;
            Some((InstanceId { owner, table: table.id }, table))
        });
        owners.next().filter(|_| owners.next().is_none())
    }
}

impl Engine {
    /// Takes note of the first use of a root by this data folder, or by those that it goes on from.
    pub(super) fn note_since(&self, root: &RootKey, since_us: Option<i64>) -> Result<(), ReadError> {
        let identity = self.storages.identity(&self.catalog.current(), root).unwrap_or_default();
        let key = format!("{SINCE}{root}/{identity}");
        match self.buffer.state_get(&key)? {
            Some(_) => Ok(()),
            None => self.buffer.state_put(&key, since_us.unwrap_or_else(now_us).to_string().as_bytes()),
        }
    }

    /// Removes data files that no manifest names from all storages that are in use, and tells how many.
    ///
    /// # Errors
    /// If the write buffer does not read. A storage that does not answer is left for the next time.
    pub async fn collect_orphans(self: &Arc<Self>) -> Result<u64, ReadError> {
        let mut removed = 0;
        for (key, since) in self.buffer.state_scan(SINCE)? {
            let noted = key.trim_start_matches(SINCE).split_once('/');
            let Some((root, identity)) = noted.and_then(|(root, identity)| Some((root_of(root)?, identity))) else {
                continue;
            };
            // What does not read removes nothing.
            let since_us = String::from_utf8_lossy(&since).parse().unwrap_or(i64::MAX);
            let found = self.storages.identity(&self.catalog.current(), &root);
            if !self.is_rebuilt(&root) || found.as_deref() != Some(identity) {
                continue;
            }
            match self.collect_in(&root, since_us).await {
                Ok(count) => removed += count,
                Err(error) => {
                    tracing::warn!(storage = %root, error = %Chain(error.as_ref()), "cannot look for files that nobody needs");
                }
            }
        }
        Ok(removed)
    }

    /// The name of every file of an instance, those of tables that are gone, too. Blocking.
    fn named(&self) -> Result<HashSet<String>, Error> {
        let mut named = HashSet::new();
        for id in self.buffer.published()? {
            let manifest = match self.buffer.record(&id)? {
                Some(record) if !record.manifest.is_empty() => Manifest::decode(&record.manifest)?,
                _ => continue,
            };
            named.extend(manifest.files.iter().map(|file| file_name(&file.path).to_owned()));
        }
        Ok(named)
    }

    async fn collect_in(self: &Arc<Self>, root: &RootKey, since_us: i64) -> Result<u64, Error> {
        let after_us = i64::try_from(self.limits.orphans_after_secs.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
        // Before the proof: whatever another owner writes after it is younger.
        let until_us = now_us().saturating_sub(after_us);
        tokio::time::timeout(PATIENCE, self.prove_ownership(root)).await??;
        let reading = Arc::clone(self);
        let named = tokio::task::spawn_blocking(move || reading.named()).await??;
        let catalog = self.catalog.current();
        let places = Places::of(&catalog, root);
        let store = self.storages.store(&catalog, root)?;
        let mut removed = 0;
        for before in places.tables.keys() {
            let mut listing = store.list(Some(&Path::parse(before.trim_end_matches('/'))?));
            while let Some(found) = listing.try_next().await? {
                if self.stop.is_cancelled() {
                    return Ok(removed);
                }
                let is_outside = found.location.filename() == Some(paths::OUTSIDE_MANIFEST);
                let stored_us = found.last_modified.timestamp_micros();
                let made_us = paths::data_file_made_us(&found.location).or(is_outside.then_some(stored_us));
                let made_us = made_us.filter(|made| (since_us..=until_us).contains(made));
                if made_us.is_none() || stored_us > until_us || named.contains(file_name(found.location.as_ref())) {
                    continue;
                }
                let Some((id, table)) = places.instance(before, &found.location) else { continue };
                match self.remove_orphan(root, &id, table, &found.location, found.size).await {
                    Ok(is_gone) => removed += u64::from(is_gone),
                    // Others may go all the same.
                    Err(error) => {
                        tracing::warn!(
                            object_path = %found.location,
                            error = %Chain(error.as_ref()),
                            "cannot remove a file that nobody needs"
                        );
                    }
                }
            }
        }
        Ok(removed)
    }

    /// Removes a file if nobody names it. Holds the instance's flushes: whoever is about to name it does, too.
    async fn remove_orphan(
        self: &Arc<Self>,
        root: &RootKey,
        id: &InstanceId,
        table: &TableEntry,
        path: &Path,
        bytes: u64,
    ) -> Result<bool, Error> {
        let instance = self.instances.get(id)?;
        let Ok(_no_flush) = instance.flushes.try_lock() else { return Ok(false) };
        if self.moves.is_moving(id)? || self.is_noted(root, path)? || self.is_named(id, root, path.as_ref())? {
            return Ok(false);
        }
        let job = self.jobs.begin_for(JobKind::Garbage, table, id);
        let outcome = self.remove(root, path.as_ref()).await;
        job.add(0, bytes);
        job.end(&outcome);
        outcome?;
        tracing::info!(object_path = %path, "removed a file that nobody needs");
        Ok(true)
    }
}

/// Looks for orphans until the engine stops.
pub(super) async fn run(engine: Arc<Engine>) {
    let interval = Duration::from_secs(engine.limits.orphans_after_secs).max(INTERVAL_MIN);
    loop {
        tokio::select! {
            () = engine.stop.cancelled() => return,
            () = tokio::time::sleep(interval) => {}
        }
        if let Err(error) = engine.collect_orphans().await {
            tracing::warn!(error = %Chain(&error), "cannot look for files that nobody needs");
        }
    }
}
