//! The way of a statement's rows into the buffer.
//!
//! A statement that brings its own keys, or reads before it writes, holds the instance exclusively from its first look
//! until its commit is applied ([`Writing`]); one whose keys this pod generated shares it with others of its kind.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kalamdb_model::declared::Durability;
use kalamdb_model::{Owner, TableEntry, Value};
use kalamdb_table_store::Positions;
use kalamdb_table_store::manifest::{Manifest, Placed};
use kalamdb_write_buffer::row::{self, RowView};
use kalamdb_write_buffer::{CommitError, EncodedRow, Fresh, RowError, Stamps};
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard};

use super::instance::{Instance, InstanceError, View};
use super::locate::{Existing, Place};
use super::read::ReadError;
use super::{Disowned, Engine, FlushError, PlaceError, Rebuilding, RootKey, ShipError};
use crate::crash;

/// How long a statement waits for others that are at work on the same rows.
const HOLD_WAIT: Duration = Duration::from_secs(30);

/// How long a statement may look for rows in files: nobody else writes to the instance meanwhile.
const LOOK_WAIT: Duration = Duration::from_secs(30);

/// A row to write.
#[derive(Clone, Debug)]
pub struct NewRow {
    /// Its primary key, memcomparable.
    pub key: Vec<u8>,
    /// What [`row::encode`] made.
    pub value: Vec<u8>,
}

/// A write that did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The row with this position in the statement has a key that exists, or that stands twice in the statement.
    #[error("the primary key of row {0} exists already")]
    Exists(usize),
    /// The instance's buffer is full.
    #[error("the unflushed rows of this table take {bytes} bytes, and at most {limit} are buffered")]
    BufferFull {
        /// What is buffered.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The buffers of all are full.
    #[error("the unflushed rows of all users take {bytes} bytes, and at most {limit} are buffered")]
    PodFull {
        /// What is buffered.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The rows of one storage take their part of the buffers of all.
    #[error(
        "the unflushed rows for storage `{root}` take {bytes} bytes, and at most {limit} are buffered for one storage"
    )]
    StorageFull {
        /// The storage.
        root: RootKey,
        /// What is buffered for it.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The data is another's now.
    #[error(transparent)]
    Disowned(#[from] Disowned),
    /// The storage is being read back.
    #[error(transparent)]
    Rebuilding(#[from] Rebuilding),
    /// Where the rows of the user are to lie.
    #[error("the rows have no place: {0}")]
    Place(#[from] PlaceError),
    /// Whether the rows were moved.
    #[error("it is not known yet in which storage the rows lie")]
    Settle(#[source] Box<FlushError>),
    /// The files do not answer in time.
    #[error("looking keys up took longer than {} s", LOOK_WAIT.as_secs())]
    Slow,
    /// Others that read before they write take too long.
    #[error("other statements have been at work on these rows for {} s", HOLD_WAIT.as_secs())]
    Held,
    /// The rows did not get into the commit stream, or it is not known whether they did.
    #[error("failed to store the rows")]
    Ship(#[from] ShipError),
    /// The buffer refused or failed.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The instance's state.
    #[error("failed to load the instance")]
    Instance(#[from] InstanceError),
    /// The buffer does not read.
    #[error("failed to look keys up in the buffer")]
    Buffer(#[from] kalamdb_write_buffer::ReadError),
    /// A buffered row does not read.
    #[error("a buffered row is damaged")]
    Row(#[from] RowError),
    /// Rows cannot be found by their keys, in the buffer or in files.
    #[error("failed to look keys up")]
    Read(#[from] ReadError),
}

/// Keys of rows that are wanted from one file, by position.
type KeysByRow<'a> = BTreeMap<u32, &'a Vec<u8>>;

/// Held by a statement while it reads and writes an instance.
enum Hold {
    Shared(#[allow(dead_code, reason = "held until dropped")] OwnedRwLockReadGuard<()>),
    Exclusive(#[allow(dead_code, reason = "held until dropped")] OwnedRwLockWriteGuard<()>),
}

/// A statement that writes to one instance. Nothing is written before [`Writing::commit`]; dropping it is giving up.
pub struct Writing {
    engine: Arc<Engine>,
    table: Arc<TableEntry>,
    instance: Arc<Instance>,
    known: HashMap<Vec<u8>, Existing>,
    _hold: Hold,
}

impl Engine {
    /// Waits until no other statement that reads before it writes is at work on `owner`'s instance of `table`.
    ///
    /// # Errors
    /// If another process has taken over, or the instance cannot be loaded.
    pub async fn write(self: &Arc<Self>, table: &Arc<TableEntry>, owner: &Owner) -> Result<Writing, WriteError> {
        let instance = self.writable(table, owner).await?;
        let hold = exclusive(&instance).await?;
        let stores_first = self.stores_first(table, &instance.root(table));
        instance.stores_first.store(stores_first, Ordering::Relaxed);
        self.writing(table, instance, hold)
    }

    /// As [`Engine::write`], for a statement that only adds rows whose keys this pod has just generated. They differ from
    /// each other, so such statements need not wait for one another; they still wait for a statement that brings its own
    /// keys, which could bring the same.
    ///
    /// # Errors
    /// As [`Engine::write`].
    pub async fn append(self: &Arc<Self>, table: &Arc<TableEntry>, owner: &Owner) -> Result<Writing, WriteError> {
        let instance = self.writable(table, owner).await?;
        let shared = Arc::clone(&instance.writes).read_owned();
        let shared = tokio::time::timeout(HOLD_WAIT, shared).await.map_err(|_| WriteError::Held)?;
        if instance.stores_first.load(Ordering::Relaxed) == self.stores_first(table, &instance.root(table)) {
            return self.writing(table, instance, Hold::Shared(shared));
        }
        drop(shared);
        self.write(table, owner).await
    }

    async fn writable(self: &Arc<Self>, table: &TableEntry, owner: &Owner) -> Result<Arc<Instance>, WriteError> {
        self.check_owned()?;
        self.check_rebuilt(table, owner).await?;
        let instance = self.instances.get(&Self::instance_id(table, owner))?;
        let settled = tokio::time::timeout(HOLD_WAIT, self.settle_move(&instance.id)).await;
        settled.map_err(|_| ShipError::Waiting)?.map_err(|error| WriteError::Settle(Box::new(error)))?;
        self.place_new(table, &instance).await?;
        let root = instance.root(table);
        // Rows that a former process stored, and did not apply, must not appear beneath a statement that has looked.
        let may_appear = self.stores_first(table, &root) || self.shippers.has_stored_first(&root);
        if may_appear && !self.is_open(&root) {
            let opened = tokio::time::timeout(HOLD_WAIT, self.open_stream(&root)).await;
            opened.map_err(|_| ShipError::Waiting)??;
        }
        Ok(instance)
    }

    /// Settles where the rows of a user lie who has none yet, if not where the table's do.
    async fn place_new(&self, table: &TableEntry, instance: &Arc<Instance>) -> Result<(), WriteError> {
        let is_new = || {
            let counters = self.buffer.counters(&instance.id)?;
            Ok::<_, WriteError>(self.is_new(instance) && counters.rows == 0 && !counters.has_frozen())
        };
        if !table.use_user_storage || !is_new()? {
            return Ok(());
        }
        self.users.wait().await;
        let location = self.wanted_place(&self.catalog.current(), table, &instance.id.owner)?;
        if location == table.location {
            return Ok(());
        }
        let _hold = exclusive(instance).await?;
        if !is_new()? {
            return Ok(());
        }
        self.moves.note_placed(&instance.id)?;
        let manifest = Manifest { placed: Some(Placed { location, moves: 1 }), ..Manifest::default() };
        let mut current = instance.current.write();
        self.buffer.publish(&instance.id, current.view.flushed, &manifest.encode())?;
        current.view = Arc::new(View { flushed: current.view.flushed, manifest });
        Ok(())
    }

    /// Whether rows of `table` are stored before they are applied. On the pod's own disk the fsync is as good.
    fn stores_first(&self, table: &TableEntry, root: &RootKey) -> bool {
        table.durability == Durability::ObjectStore && self.storages.ships_rows(&self.catalog.current(), root)
    }

    fn writing(
        self: &Arc<Self>,
        table: &Arc<TableEntry>,
        instance: Arc<Instance>,
        hold: Hold,
    ) -> Result<Writing, WriteError> {
        self.check_owned()?;
        // The hold may have been waited for behind a move whose commit was not answered.
        if self.moves.is_pending(&instance.id) {
            return Err(WriteError::Settle(Box::new(FlushError::Waiting)));
        }
        let (engine, table) = (Arc::clone(self), Arc::clone(table));
        Ok(Writing { engine, table, instance, known: HashMap::new(), _hold: hold })
    }
}

impl Writing {
    /// Whether there is a row with this key. Asks for [`Writing::look_up`] first.
    #[must_use]
    pub fn exists(&self, key: &[u8]) -> bool {
        self.known.get(key).is_some_and(|existing| existing.live)
    }

    /// Looks keys up, in the buffer and in those files whose key range may hold them.
    ///
    /// # Errors
    /// If either does not read: an error is never "no such row".
    pub async fn look_up(&mut self, keys: impl IntoIterator<Item = &[u8]>) -> Result<(), WriteError> {
        let wanted: Vec<Vec<u8>> =
            keys.into_iter().filter(|key| !self.known.contains_key(*key)).map(<[u8]>::to_vec).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let found = within(self.engine.find(&self.table, &self.instance, wanted)).await?;
        self.known.extend(found);
        Ok(())
    }

    /// Takes note of the rows of files that `rows` are about to replace. Before they are there: for a reader these are facts
    /// about the files, no more.
    fn note_replaced(&self, rows: &[EncodedRow]) {
        let mut current = self.instance.current.write();
        for row in rows {
            if let Some(Existing { place: Place::File(at, view), .. }) = self.known.get(&row.key) {
                current.note(view, [(row.key.clone(), Some(at.clone()))]);
            }
        }
    }

    /// The values of existing rows, by key. Keys that do not exist are left out.
    ///
    /// # Errors
    /// As [`Writing::look_up`].
    pub async fn rows(&mut self, keys: &BTreeSet<Vec<u8>>) -> Result<HashMap<Vec<u8>, Vec<Value>>, WriteError> {
        self.look_up(keys.iter().map(Vec::as_slice)).await?;
        let mut rows = HashMap::new();
        let mut wanted: HashMap<Arc<str>, (Arc<View>, KeysByRow<'_>)> = HashMap::new();
        for key in keys {
            match self.known.get(key) {
                Some(Existing { live: true, place: Place::Buffer(value), .. }) => {
                    rows.insert(key.clone(), RowView::parse(value)?.values(&self.table)?);
                }
                Some(Existing { live: true, place: Place::File(at, view), .. }) => {
                    let of_file = wanted.entry(Arc::clone(&at.path));
                    of_file.or_insert_with(|| (Arc::clone(view), BTreeMap::new())).1.insert(at.row, key);
                }
                _ => {}
            }
        }
        for (path, (view, keys)) in wanted {
            let positions: Positions = keys.keys().copied().collect();
            let found = within(self.engine.rows_at(&self.table, &view, &path, &positions)).await?;
            rows.extend(keys.into_values().cloned().zip(found));
        }
        Ok(rows)
    }

    /// Writes new rows: all of them, durably, or none. Returns what they got; `None` if there are none.
    ///
    /// # Errors
    /// [`WriteError::Exists`] if one exists already or is twice in `rows`.
    pub async fn insert(mut self, rows: Vec<NewRow>) -> Result<Option<Stamps>, WriteError> {
        if !rows.is_sorted_by(|one, other| one.key < other.key) {
            let mut keys = HashSet::with_capacity(rows.len());
            if let Some(index) = rows.iter().position(|row| !keys.insert(row.key.as_slice())) {
                return Err(WriteError::Exists(index));
            }
        }
        self.look_up(rows.iter().map(|row| row.key.as_slice())).await?;
        if let Some(index) = rows.iter().position(|row| self.exists(&row.key)) {
            return Err(WriteError::Exists(index));
        }
        self.commit(rows, Vec::new()).await
    }

    /// Writes `put`, whether or not there are rows with those keys, and deletes the rows of `delete`, of which the last
    /// values are kept: all of it, durably, or nothing. No key may come twice. Returns what the rows got, those of
    /// `put` before those of `delete`; `None` if there are none.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub async fn commit(mut self, put: Vec<NewRow>, delete: Vec<NewRow>) -> Result<Option<Stamps>, WriteError> {
        let count = (put.len() + delete.len()) as u64;
        if count == 0 {
            return Ok(None);
        }
        self.look_up(put.iter().chain(&delete).map(|row| row.key.as_slice())).await?;
        let deleted = delete.into_iter().map(|mut row| {
            row::mark_deleted(&mut row.value);
            row
        });
        let known = &self.known;
        let encoded = |row: NewRow| {
            let fresh = known.get(&row.key).map_or(Fresh::No, |existing| existing.fresh);
            EncodedRow { key: row.key, value: row.value, fresh }
        };
        let rows: Vec<EncodedRow> = put.into_iter().chain(deleted).map(encoded).collect();
        let engine = &self.engine;
        // The hold keeps it from moving.
        let (root, id) = (self.instance.root(&self.table), self.instance.id.clone());
        let _room = engine.take_room(&self.instance, &root, &rows)?;
        self.note_replaced(&rows);
        let stamps = if self.instance.stores_first.load(Ordering::Relaxed) {
            engine.ship_rows(&root, id, rows).await?
        } else {
            let ships = engine.storages.ships_rows(&engine.catalog.current(), &root);
            let copies = ships.then(|| rows.iter().map(|row| (row.key.clone(), row.value.clone())).collect());
            let committed =
                engine.buffer.commit(id.clone(), rows).await.inspect_err(|error| engine.note_failure(error))?;
            crash::point("commit.buffered");
            if let Some(copies) = copies {
                engine.ship_later(&root, &id, copies, committed)?;
            }
            Some(Stamps { first_seq: committed.first_seq, updated_us: committed.updated_us })
        };
        engine.metrics.rows_written.inc_by(count);
        engine.look_at_place(&self.table, &self.instance);
        Ok(stamps)
    }
}

async fn within<T>(look: impl Future<Output = Result<T, ReadError>>) -> Result<T, WriteError> {
    Ok(tokio::time::timeout(LOOK_WAIT, look).await.map_err(|_| WriteError::Slow)??)
}

async fn exclusive(instance: &Instance) -> Result<Hold, WriteError> {
    let held = tokio::time::timeout(HOLD_WAIT, Arc::clone(&instance.writes).write_owned()).await;
    held.map(Hold::Exclusive).map_err(|_| WriteError::Held)
}

/// Room in an instance's buffer, given back when dropped.
struct Room<'a> {
    instance: &'a Instance,
    bytes: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.instance.incoming.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

impl Engine {
    /// Takes room for `rows` in the instance's buffer until they are in it or refused. A frozen generation, on its way
    /// into a file, may be as large again.
    fn take_room<'a>(
        &self,
        instance: &'a Instance,
        root: &RootKey,
        rows: &[EncodedRow],
    ) -> Result<Room<'a>, WriteError> {
        let bytes = rows.iter().map(|row| (row.key.len() + row.value.len()) as u64).sum();
        let room = Room { instance, bytes };
        let incoming = instance.incoming.fetch_add(bytes, Ordering::AcqRel);
        let (of_all, all_max) = (self.schedule.bytes(), self.limits.buffered_bytes_max);
        if of_all > 0 && of_all + bytes > all_max {
            return Err(WriteError::PodFull { bytes: of_all, limit: all_max });
        }
        // A storage that is down would fill the room of all: half of it is left to the others, if there are any.
        let (of_root, root_max) = (self.schedule.bytes_of(root), all_max / 2);
        if of_root > 0 && of_root + bytes > root_max && self.has_other_storages(root) {
            return Err(WriteError::StorageFull { root: root.clone(), bytes: of_root, limit: root_max });
        }
        let (buffered, limit) = (self.buffer.counters(&instance.id)?.bytes, self.limits.instance_bytes_max);
        // One statement may always pass an empty buffer: its own size is bounded.
        if buffered + incoming == 0 || buffered + incoming + bytes <= limit {
            self.schedule.note_coming(root, bytes);
            return Ok(room);
        }
        self.schedule.urge(&instance.id);
        Err(WriteError::BufferFull { bytes: buffered, limit })
    }

    /// Whether rows may go to another storage than that of `root`, too.
    fn has_other_storages(&self, root: &RootKey) -> bool {
        let catalog = self.catalog.current();
        let several = catalog.catalog.storages.len() > 1;
        let mut tables = catalog.catalog.tables.values();
        tables.any(|table| table.location.storage != root.storage || (table.use_user_storage && several))
    }
}

#[cfg(test)]
mod tests {
    use kalamdb_model::{OnRemoval, UserId, compile, key};
    use kalamdb_test_support::pod::MANIFESTS;

    use super::*;
    use crate::catalog::CatalogHandle;
    use crate::engine::{EngineLimits, Secrets, Storages};
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn what_a_refused_statement_would_have_replaced_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), MANIFESTS.to_owned())]);
        let catalog = CatalogHandle::open(dir.path()).unwrap();
        catalog.serve(compile(&catalog.current().catalog, &folder.declared, OnRemoval::Retain).0);
        let table = Arc::new(catalog.current().catalog.tables.values().next().unwrap().clone());
        let storages = Storages::new(dir.path().to_owned(), Secrets::default());
        let limits = EngineLimits {
            instance_bytes_max: 1_000,
            disk_reserve_bytes: 0,
            buffered_bytes_max: 1 << 30,
            garbage_after_secs: 0,
            orphans_after_secs: 0,
            flushes_max: 1,
        };
        let engine = Engine::open(dir.path(), catalog, storages, limits, Arc::new(Metrics::default())).unwrap();
        let owner = Owner::User(UserId::new("alice").unwrap());
        let id = Engine::instance_id(&table, &owner);
        let row_of = |id: i64, bytes: usize| {
            let values = [Value::BigInt(id), Value::Text("x".repeat(bytes))];
            NewRow { key: key::encode(&values[..1]), value: row::encode(&table, &values) }
        };
        engine.write(&table, &owner).await.unwrap().insert(vec![row_of(1, 1)]).await.unwrap();
        engine.flush(&id).await.unwrap();
        engine.write(&table, &owner).await.unwrap().insert(vec![row_of(2, 1_000)]).await.unwrap();
        let refused = engine.write(&table, &owner).await.unwrap().commit(vec![row_of(1, 2)], Vec::new()).await;
        assert!(matches!(refused, Err(WriteError::BufferFull { .. })), "{refused:?}");
        assert!(engine.instances.get(&id).unwrap().current.read().located.is_empty());
        engine.close(Duration::from_secs(5)).await;
    }
}
