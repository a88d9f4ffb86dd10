//! Rows of instances, from the acknowledged write to the file: the data plane of one pod.
//!
//! Owns: instances and their views, the flush, the commit stream per storage, which store a location means.
//! Does not own: SQL, identity checks (callers pass the [`Owner`] that they proved), key and row formats (`write_buffer`),
//! object names and file formats (`table_store`).
//!
//! After a crash: rows are in the buffer until their file is committed *and* published here; a commit that was not
//! published is found again in the commit stream before anything new is written to that storage. Where the streams tell
//! that another process went on from this data, it is not served at all ([`Disowned`]). After the loss of the disk: the
//! streams and their checkpoints hold all that was shipped ([`Rebuilding`]).

mod begin;
mod caches;
mod checkpoint;
mod compact;
mod counted;
mod describe;
mod flush;
mod garbage;
mod instance;
mod jobs;
mod locate;
mod moves;
mod orphans;
mod publish;
mod range;
mod read;
mod rebuild;
mod schedule;
mod ship;
mod storages;
mod users;
mod write;

use std::collections::BTreeSet;
use std::num::NonZero;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kalamdb_model::{Catalog, InstanceId, Owner, TableEntry};
use kalamdb_write_buffer::{Applied, CommitError, Options, WriteBuffer};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use caches::{CacheLimits, Caches};
pub use compact::Compacted;
pub use counted::Requests;
pub use flush::{FlushError, Flushed};
pub use instance::View;
pub use jobs::{Job, JobKind, JobState, Jobs};
pub use locate::Row;
pub use range::Window;
pub use read::{Keep, Needed, ReadError, Rows, Want};
pub use rebuild::Rebuilding;
pub use ship::{Disowned, ShipError};
pub use storages::{RootKey, Secrets, Storages, StoragesError, Use};
pub use users::{PlaceError, UserError};
pub use write::{NewRow, WriteError, Writing};

use crate::catalog::{self, CatalogHandle, NotedCatalogError, ServeCatalogError};
use crate::crash;
use crate::metrics::Metrics;

/// Ownership epoch in file names. Rises with takeovers; one pod owns everything from the start.
const EPOCH: u32 = 1;

/// Bounds of the data plane.
#[derive(Clone, Debug, clap::Args)]
pub struct EngineLimits {
    /// Most buffered bytes of one user's part of a table; above it writes to it are refused until it is flushed.
    #[arg(long, default_value_t = 64 << 20)]
    pub instance_bytes_max: u64,
    /// Most buffered bytes of all users; from a quarter on the largest are flushed, above it writes are refused. Rows for
    /// one storage take at most half of it, where there are others.
    #[arg(long, default_value_t = 2 << 30)]
    pub buffered_bytes_max: u64,
    /// Free bytes that writes leave on the data folder's disk.
    #[arg(long, default_value_t = 256 << 20)]
    pub disk_reserve_bytes: u64,
    /// How long files that a compaction has replaced are kept, seconds: queries that began before read them.
    #[arg(long, default_value_t = 3_600)]
    pub garbage_after_secs: u64,
    /// How old a data file is at least, seconds, that is removed because no manifest names it.
    #[arg(long, default_value_t = 86_400)]
    pub orphans_after_secs: u64,
    /// Flushes at once per storage.
    #[arg(long, default_value_t = 8)]
    pub flushes_max: usize,
}

/// The data plane.
pub struct Engine {
    buffer: WriteBuffer,
    catalog: CatalogHandle,
    storages: Storages,
    instances: instance::Instances,
    shippers: ship::Shippers,
    rebuild: rebuild::Rebuild,
    users: users::KnownUsers,
    moves: moves::Moves,
    schedule: Arc<schedule::Schedule>,
    limits: EngineLimits,
    metrics: Arc<Metrics>,
    /// Set when the disk has failed a write: RocksDB refuses all further ones until the folder is opened again.
    broken: AtomicBool,
    compactions: compact::Compactions,
    /// One for each reader that filters buffered rows.
    filters: Arc<Semaphore>,
    jobs: Jobs,
    /// Set when the data is another's, for good.
    disowned: OnceLock<Disowned>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// The data plane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The write buffer does not open.
    #[error("failed to open the write buffer")]
    Buffer(#[from] kalamdb_write_buffer::OpenError),
    /// The write buffer does not read.
    #[error("failed to read the write buffer")]
    Read(#[from] kalamdb_write_buffer::ReadError),
    /// The catalog is not the one that the rows belong to.
    #[error("the catalog does not fit the rows of the data folder")]
    Catalog(#[from] NotedCatalogError),
    /// What was noted of a move is damaged.
    #[error("the note `{0}` of a move between storages is damaged")]
    Move(String),
}

/// Microseconds since 1970.
#[must_use]
pub fn now_us() -> i64 {
    chrono::Utc::now().timestamp_micros()
}

impl Engine {
    /// Opens the data plane in `data_dir` and starts its background work.
    ///
    /// # Errors
    /// If another process has the folder, or its contents cannot be read.
    pub fn open(
        data_dir: &Path,
        catalog: CatalogHandle,
        storages: Storages,
        limits: EngineLimits,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, OpenError> {
        let schedule = Arc::new(schedule::Schedule::default());
        let observer = Arc::clone(&schedule);
        let options = Options {
            disk_reserve_bytes: limits.disk_reserve_bytes,
            clock: Arc::new(now_us),
            on_applied: Arc::new(move |applied: &[Applied]| observer.applied(applied)),
            ..Options::default()
        };
        let buffer = WriteBuffer::open(&data_dir.join("buffer"), options)?;
        let engine = Arc::new(Self {
            instances: instance::Instances::new(buffer.clone()),
            shippers: ship::Shippers::new(buffer.clone())?,
            rebuild: rebuild::Rebuild::open(buffer.clone())?,
            users: users::KnownUsers::open(buffer.clone())?,
            moves: moves::Moves::open(buffer.clone())?,
            buffer,
            catalog,
            storages,
            schedule,
            limits,
            metrics,
            broken: AtomicBool::new(false),
            compactions: compact::Compactions::default(),
            filters: Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(2, NonZero::get).max(2))),
            jobs: Jobs::default(),
            disowned: OnceLock::new(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        engine.check_catalog()?;
        engine.pick_up_where_we_stopped()?;
        engine.spawn(schedule::run(Arc::clone(&engine)));
        engine.spawn(garbage::run(Arc::clone(&engine)));
        engine.spawn(compact::run(Arc::clone(&engine)));
        engine.spawn(moves::run(Arc::clone(&engine)));
        engine.spawn(orphans::run(Arc::clone(&engine)));
        Ok(engine)
    }

    /// Rows of flushed generations that a crash left behind go; unflushed ones are scheduled.
    fn pick_up_where_we_stopped(&self) -> Result<(), OpenError> {
        for (id, counters) in self.buffer.dirty() {
            self.buffer.reclaim(&id, counters.flushed)?;
            self.schedule.found(&id, &counters);
        }
        Ok(())
    }

    /// The id of the data folder, made at its first start.
    ///
    /// # Errors
    /// If the write buffer does not read or write.
    pub fn volume(&self) -> Result<String, kalamdb_write_buffer::ReadError> {
        if let Some(volume) = self.buffer.state_get("volume")? {
            return Ok(String::from_utf8_lossy(&volume).into_owned());
        }
        let volume = ulid::Ulid::generate().to_string().to_ascii_lowercase();
        self.buffer.state_put("volume", volume.as_bytes())?;
        Ok(volume)
    }

    /// Whether this data folder is known to own its instance.
    ///
    /// # Errors
    /// If the write buffer does not read.
    pub fn is_owner(&self) -> Result<bool, kalamdb_write_buffer::ReadError> {
        Ok(self.buffer.state_get("owner")?.is_some())
    }

    /// Takes note that it does, and which volume had the instance first.
    ///
    /// # Errors
    /// If the write buffer does not write.
    pub fn set_owner(&self, founder: &str) -> Result<(), kalamdb_write_buffer::ReadError> {
        self.buffer.state_put("founder", founder.as_bytes())?;
        self.buffer.state_put("owner", b"1")
    }

    /// The volume that had the instance first, by which storages know it: this one, if nobody has told another.
    fn founder(&self) -> Result<String, kalamdb_write_buffer::ReadError> {
        match self.buffer.state_get("founder")? {
            Some(founder) => Ok(String::from_utf8_lossy(&founder).into_owned()),
            None => self.volume(),
        }
    }

    /// Saves `next`, takes note of it beside the rows, then serves it.
    ///
    /// # Errors
    /// If it cannot be saved or noted; the one before is then served on, because ids that a restart would not know must
    /// not be used.
    pub fn serve_catalog(self: &Arc<Self>, next: Catalog) -> Result<(), ServeCatalogError> {
        self.plan_rebuild(&next)?;
        let before = self.catalog.current();
        let places = |catalog: &Catalog| {
            let tables = catalog.tables.values().chain(catalog.retained.values());
            let tables = tables.filter(|table| table.use_user_storage).map(|table| table.id).collect::<BTreeSet<_>>();
            (tables, catalog.storages.keys().cloned().collect::<Vec<_>>())
        };
        let moved = places(&before.catalog) != places(&next);
        self.catalog.save(&next)?;
        crash::point("catalog.saved");
        // Noted last: a note of what is not saved would keep the data folder from starting.
        self.buffer.state_put("catalog", catalog::note_of(&next).as_bytes())?;
        crash::point("catalog.noted");
        self.catalog.serve(next);
        if moved {
            self.moves.look_at_all();
        }
        for root in self.not_rebuilt() {
            let engine = Arc::clone(self);
            self.spawn(async move { drop(engine.open_stream(&root).await) });
        }
        Ok(())
    }

    /// Makes sure that the saved catalog is the one that was served last, or a later one that was not served yet, and
    /// takes note of it: rows carry the ids of their tables, and by those of another catalog one table's rows would be
    /// read as another's.
    fn check_catalog(&self) -> Result<(), NotedCatalogError> {
        let noted = self.buffer.state_get("catalog")?.map(|text| String::from_utf8_lossy(&text).into_owned());
        self.catalog.check_noted(noted.as_deref(), self.has_rows()?)?;
        let note = catalog::note_of(&self.catalog.current().catalog);
        Ok(self.buffer.state_put("catalog", note.as_bytes())?)
    }

    /// Whether rows were ever written or flushed here: then the ids of tables mean something, and must not be given anew.
    fn has_rows(&self) -> Result<bool, kalamdb_write_buffer::ReadError> {
        Ok(!self.buffer.dirty().is_empty() || !self.buffer.state_scan("stream/")?.is_empty())
    }

    /// The instance that `owner` has of `table`.
    #[must_use]
    pub fn instance_id(table: &TableEntry, owner: &Owner) -> InstanceId {
        InstanceId { owner: owner.clone(), table: table.id }
    }

    /// The catalog that the engine flushes by.
    #[must_use]
    pub const fn catalog(&self) -> &CatalogHandle {
        &self.catalog
    }

    /// What it does in the background.
    #[must_use]
    pub const fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Bytes of unflushed rows, and how many users' parts of tables have any.
    #[must_use]
    pub fn buffered(&self) -> (u64, usize) {
        (self.schedule.bytes(), self.schedule.len())
    }

    /// The stores behind locations.
    #[must_use]
    pub const fn storages(&self) -> &Storages {
        &self.storages
    }

    /// Why this process may not serve its data any more: nothing is read, acknowledged or flushed then.
    #[must_use]
    pub fn disowned(&self) -> Option<&Disowned> {
        self.disowned.get()
    }

    /// Ends the service of the data for good. The first reason stays.
    fn disown(&self, reason: Disowned) -> Disowned {
        let first = || {
            tracing::error!(error = %reason, "this pod may not serve its data");
            self.metrics.disowned.set(1);
            reason
        };
        self.disowned.get_or_init(first).clone()
    }

    fn check_owned(&self) -> Result<(), Disowned> {
        self.disowned().map_or(Ok(()), |reason| Err(reason.clone()))
    }

    /// Whether the disk has failed a write. Reads go on; the process has to be started again for writes.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    fn note_failure(&self, error: &CommitError) {
        if matches!(error, CommitError::Write { .. }) {
            self.broken.store(true, Ordering::Release);
        }
    }

    fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(work);
    }

    /// Stops background work, waits for flushes under way at most `grace`, and closes the write buffer.
    pub async fn close(&self, grace: Duration) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(grace, self.tasks.wait()).await.is_err() {
            tracing::warn!("stopping although flushes are still under way; their rows stay in the buffer");
        }
        self.buffer.clone().close().await;
    }
}

#[cfg(test)]
mod testing {
    //! An engine for the tests beside the code.

    use kalamdb_model::{OnRemoval, compile};

    use super::*;

    /// An engine in `dir`, and the one table of `manifests`.
    pub(super) fn open(dir: &Path, manifests: &str, storages: Storages) -> (Arc<Engine>, Arc<TableEntry>) {
        let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), manifests.to_owned())]);
        let catalog = CatalogHandle::open(dir).unwrap();
        let (compiled, _) = compile(&catalog.current().catalog, &folder.declared, OnRemoval::Retain);
        let table = Arc::new(compiled.tables.values().next().unwrap().clone());
        catalog.save(&compiled).unwrap();
        catalog.serve(compiled);
        let limits = EngineLimits {
            instance_bytes_max: 1 << 20,
            buffered_bytes_max: 1 << 30,
            disk_reserve_bytes: 0,
            garbage_after_secs: 0,
            orphans_after_secs: 0,
            flushes_max: 1,
        };
        (Engine::open(dir, catalog, storages, limits, Arc::default()).unwrap(), table)
    }

    /// One more storage, in this folder.
    pub(super) fn storage(name: &str, path: &str) -> String {
        format!(
            "---\napiVersion: kalamdb.org/v1alpha1\nkind: Storage\nmetadata: {{name: {name}}}\nspec:\n  \
             type: Filesystem\n  filesystem: {{path: {path}}}\n"
        )
    }
}

#[cfg(test)]
mod tests {
    use kalamdb_model::{OnRemoval, StorageName, UserId, compile};
    use kalamdb_table_store::StoreError;
    use kalamdb_table_store::users::{StorageMode, User};
    use kalamdb_test_support::pod::MANIFESTS;

    use super::*;

    /// Notes of format 1 in the write buffer: key and value. They must be understood as long as any version reads them.
    const NOTES: &str = include_str!("../../tests/it/notes-format-1.txt");

    fn notes() -> impl Iterator<Item = (&'static str, &'static str)> {
        NOTES.lines().filter_map(|line| line.split_once(' '))
    }

    /// Key and value of the stored note whose key begins so.
    pub(super) fn stored_note(prefix: &str) -> (&'static str, &'static str) {
        notes().find(|(key, _)| key.starts_with(prefix)).expect("there is one of each kind")
    }

    fn root(storage: &str) -> RootKey {
        RootKey { storage: StorageName::new(storage).unwrap(), root: 1 }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_stored_notes_of_format_1_are_understood() {
        let dir = tempfile::tempdir().unwrap();
        let buffer = WriteBuffer::open(&dir.path().join("buffer"), Options::default()).unwrap();
        for (key, value) in notes() {
            buffer.state_put(key, value.as_bytes()).unwrap();
        }
        drop(buffer);
        let catalog = CatalogHandle::open(dir.path()).unwrap();
        let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), MANIFESTS.to_owned())]);
        let (compiled, _) = compile(&Catalog::default(), &folder.declared, OnRemoval::Retain);
        let compiled = Catalog { nonce: "00ff".repeat(8), ..compiled };
        catalog.save(&compiled).unwrap();
        catalog.serve(compiled);
        // No storage opens, so that nothing is done about them.
        let closed = || StoreError::Url { url: "closed".to_owned() };
        let storages = Storages::opened_by(Box::new(move |_, _, _| Err(closed())), Secrets::default());
        let limits = EngineLimits {
            instance_bytes_max: 64 << 20,
            buffered_bytes_max: 1 << 30,
            disk_reserve_bytes: 0,
            garbage_after_secs: 3_600,
            orphans_after_secs: 86_400,
            flushes_max: 4,
        };
        let engine = Engine::open(dir.path(), catalog, storages, limits, Arc::default()).unwrap();

        assert_eq!(engine.volume().unwrap(), "01jarz3ndektsv4rrffq69g5fc");
        assert!(engine.is_owner().unwrap());
        assert_eq!(engine.founder().unwrap(), "01jarz3ndektsv4rrffq69g5f9");
        let (id, storage_id) = (UserId::new("alice").unwrap(), StorageName::new("eu").ok());
        assert_eq!(engine.users(), Some(vec![User { id: id.clone(), storage_mode: StorageMode::Region, storage_id }]));
        let alice = InstanceId::of_user(id, kalamdb_model::TableId(1));
        assert!(engine.moves.may_be_elsewhere(&alice) && engine.moves.is_moving(&alice).unwrap());
        assert_eq!(engine.not_rebuilt(), BTreeSet::from([root("eu")]));
        assert!(!engine.is_rebuilt(&root("us")));
        let local = root("local");
        let (key, _) = stored_note("garbage/");
        let file = key.trim_start_matches("garbage/local.1/");
        assert!(engine.is_noted(&local, &object_store::path::Path::from(file)).unwrap());
        assert!(engine.shippers.has_stored_first(&local));
        assert_eq!(engine.shippers.known(&local).unwrap(), [("01jarz3ndektsv4rrffq69g5fb".to_owned(), 7)]);
        assert!(engine.shippers.incarnation.as_str() > "7yyyyyyyyyyyyyyyyyyyyyyyyy", "the clock may be behind");
        engine.note_since(&local, None).unwrap();
        let (key, value) = stored_note("since/");
        assert_eq!(engine.buffer.state_scan("since/").unwrap(), [(key.to_owned(), value.as_bytes().to_vec())]);
        engine.close(Duration::from_secs(5)).await;
    }
}
