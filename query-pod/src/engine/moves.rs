//! Moves instances to the storages that their users' rows are to lie in.
//!
//! Order: copy the files, without any lock -> hold flushes and writes -> flush and copy what came meanwhile -> note the
//! move -> commit it in the stream of the new storage, with all files -> publish -> let go -> commit it in the stream of
//! the old one, without files -> remove the old files, after their time. The copies have names of their own, so a move
//! that is tried again, or back, never meets the files of an earlier one.
//!
//! The commit in the new storage is the move. After a crash before it, the instance is where it was, and the copies belong
//! to nobody; after it, the stream of the new storage tells, and nothing of the instance is written before that stream was
//! read ([`Engine::settle_move`]). The same holds when the commit is not answered in time. After the loss of a volume, both
//! storages may seem to have it: the higher number of moves does.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kalamdb_model::{InstanceId, Location, Owner, StorageName, TableEntry, TableId, TableKind, UserId};
use kalamdb_table_store::create::{self, Create};
use kalamdb_table_store::manifest::{Edit, FileEntry, Placed};
use kalamdb_table_store::paths;
use kalamdb_write_buffer::{ReadError, WriteBuffer};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, Semaphore};

use super::flush::{FlushError, Flushed, WAIT};
use super::instance::{Instance, View};
use super::jobs::{JobKind, Ticket};
use super::{EPOCH, Engine, OpenError, RootKey};
use crate::catalog::Snapshot;
use crate::crash;
use crate::error::Chain;

/// Moves at once.
const MOVES_MAX: usize = 4;
/// When a move that failed is tried again.
const AGAIN: Duration = Duration::from_secs(30);
/// How often files are copied without a lock before the rest is copied under one.
const PASSES: usize = 3;

/// Moves that are not known to be over.
const NOTES: &str = "move/";
/// Instances that may lie elsewhere than their table.
const PLACED: &str = "placed/";

/// Files at their new place, by their old path.
type Copies = HashMap<String, FileEntry>;

/// A move that is about to be committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    from: Location,
    placed: Placed,
}

/// What has to be looked at, and what is not over.
pub(super) struct Moves {
    buffer: WriteBuffer,
    /// Of a former process, or of an attempt whose commit was not answered.
    pending: Mutex<HashMap<InstanceId, Note>>,
    placed: RwLock<HashSet<InstanceId>>,
    wanted: Mutex<BTreeSet<InstanceId>>,
    at_work: Mutex<HashSet<InstanceId>>,
    /// Of attempts that failed.
    copies: Mutex<HashMap<InstanceId, (Location, Copies)>>,
    /// Whose moves to a storage were stopped on request: they rest until somebody says again where they are to lie.
    resting: Mutex<HashMap<InstanceId, StorageName>>,
    all: AtomicBool,
    wake: Notify,
}

fn key(prefix: &str, id: &InstanceId) -> String {
    let user = match &id.owner {
        Owner::User(user) => user.to_string(),
        Owner::Shared => String::new(),
    };
    format!("{prefix}{}/{user}", id.table.0)
}

fn instance_of(key: &str) -> Option<InstanceId> {
    let (table, user) = key.split_once('/')?;
    Some(InstanceId::of_user(UserId::new(user).ok()?, TableId(table.parse().ok()?)))
}

impl Moves {
    pub(super) fn open(buffer: WriteBuffer) -> Result<Self, OpenError> {
        let mut pending = HashMap::new();
        for (key, text) in buffer.state_scan(NOTES)? {
            let id = instance_of(key.trim_start_matches(NOTES));
            match (id, serde_json::from_slice(&text)) {
                (Some(id), Ok(note)) => _ = pending.insert(id, note),
                // Better no start than a row in an instance that may be elsewhere.
                _ => return Err(OpenError::Move(key)),
            }
        }
        let placed = buffer.state_scan(PLACED)?;
        let placed = placed.iter().filter_map(|(key, _)| instance_of(key.trim_start_matches(PLACED))).collect();
        let moves = Self {
            buffer,
            pending: Mutex::new(pending),
            placed: RwLock::new(placed),
            wanted: Mutex::default(),
            at_work: Mutex::default(),
            copies: Mutex::default(),
            resting: Mutex::default(),
            all: AtomicBool::default(),
            wake: Notify::new(),
        };
        moves.look_at_all();
        Ok(moves)
    }

    /// Whether the files of `id` may lie elsewhere than its table's.
    pub(super) fn may_be_elsewhere(&self, id: &InstanceId) -> bool {
        self.placed.read().contains(id)
    }

    /// Whether a move of `id` is under way, or not known to be over.
    pub(super) fn is_moving(&self, id: &InstanceId) -> Result<bool, ReadError> {
        let is_at_work = self.at_work.lock().contains(id) || self.copies.lock().contains_key(id);
        Ok(is_at_work || self.buffer.state_get(&key(NOTES, id))?.is_some())
    }

    /// Takes note that they may, before they do.
    pub(super) fn note_placed(&self, id: &InstanceId) -> Result<(), ReadError> {
        if !self.may_be_elsewhere(id) {
            self.buffer.state_put(&key(PLACED, id), b"1")?;
            self.placed.write().insert(id.clone());
        }
        Ok(())
    }

    /// What an earlier attempt to bring `id` to the same place has copied. Copies at another place are orphans.
    fn take_copies(&self, id: &InstanceId, to: &Location) -> Copies {
        let before = self.copies.lock().remove(id);
        before.filter(|(place, _)| place == to).map(|(_, copies)| copies).unwrap_or_default()
    }

    /// Everybody's place may be another than it was.
    pub(super) fn look_at_all(&self) {
        self.all.store(true, Ordering::Release);
        self.wake.notify_one();
    }

    /// A user's place may be.
    pub(super) fn look_at_user(&self, catalog: &Snapshot, user: &UserId) {
        let tables = catalog.catalog.tables.values().chain(catalog.catalog.retained.values());
        let of_user = tables
            .filter(|table| table.kind == TableKind::User && table.use_user_storage)
            .map(|table| InstanceId::of_user(user.clone(), table.id));
        self.wanted.lock().extend(of_user);
        self.wake.notify_one();
    }

    /// It is said anew where a user's rows are to lie: what was stopped goes on.
    pub(super) fn wake_user(&self, user: &UserId) {
        self.resting.lock().retain(|id, _| !matches!(&id.owner, Owner::User(owner) if owner == user));
    }

    /// A move was stopped on request. What it has copied is of no use.
    fn rest(&self, id: &InstanceId, to: StorageName) {
        self.resting.lock().insert(id.clone(), to);
        self.copies.lock().remove(id);
    }

    /// Whether a commit of a move was not answered: nothing may be written to `id` before it is.
    pub(super) fn is_pending(&self, id: &InstanceId) -> bool {
        self.pending.lock().contains_key(id)
    }

    fn look_again(&self, id: InstanceId) {
        self.wanted.lock().insert(id);
        self.wake.notify_one();
    }
}

/// Moves what has to move until the engine stops.
pub(super) async fn run(engine: Arc<Engine>) {
    let slots = Arc::new(Semaphore::new(MOVES_MAX));
    loop {
        tokio::select! {
            () = engine.stop.cancelled() => return,
            () = engine.moves.wake.notified() => {}
        }
        if engine.disowned().is_some() {
            return;
        }
        if engine.moves.all.swap(false, Ordering::AcqRel) {
            for user in engine.users().unwrap_or_default() {
                engine.moves.look_at_user(&engine.catalog.current(), &user.id);
            }
            let placed: Vec<InstanceId> = engine.moves.placed.read().iter().cloned().collect();
            let pending: Vec<InstanceId> = engine.moves.pending.lock().keys().cloned().collect();
            engine.moves.wanted.lock().extend(placed.into_iter().chain(pending));
        }
        let wanted = std::mem::take(&mut *engine.moves.wanted.lock());
        for id in wanted {
            // One that is at work looks again when it is done.
            if !engine.moves.at_work.lock().insert(id.clone()) {
                engine.moves.wanted.lock().insert(id);
                continue;
            }
            let (of, slots) = (Arc::clone(&engine), Arc::clone(&slots));
            engine.spawn(async move {
                let slot = slots.acquire().await;
                let outcome = if of.stop.is_cancelled() { Ok(()) } else { of.move_to_its_place(&id).await };
                // Others need not wait for the next attempt.
                drop(slot);
                let failed = outcome.inspect_err(|error| {
                    tracing::warn!(table = id.table.0, error = %Chain(error), "an instance was not moved; trying again");
                });
                if failed.is_err() {
                    // Still at work meanwhile: statements, which look at the place too, bring no attempt of their own.
                    of.moves.look_again(id.clone());
                    tokio::select! { () = of.stop.cancelled() => {}, () = tokio::time::sleep(AGAIN) => {} }
                }
                of.moves.at_work.lock().remove(&id);
                // It may have been asked for meanwhile.
                of.moves.wake.notify_one();
            });
        }
    }
}

/// Copies `file`, and reads the copy back: the original is going to be deleted.
async fn copy(from: &dyn ObjectStore, to: &dyn ObjectStore, file: &FileEntry, path: &Path) -> Result<(), FlushError> {
    let failed = |source| FlushError::Copy { path: file.path.clone(), source };
    let read = async |store: &dyn ObjectStore, path: &Path| store.get(path).await?.bytes().await;
    let bytes = read(from, &Path::parse(&file.path).map_err(|error| failed(error.into()))?).await.map_err(failed)?;
    if bytes.len() as u64 != file.bytes {
        return Err(FlushError::Garbled { path: file.path.clone() });
    }
    let created = create::create_exact(to, path, bytes.clone()).await;
    let created = created.map_err(|source| FlushError::Upload { path: path.to_string(), source: Box::new(source) })?;
    let copied = read(to, path).await.map_err(|source| FlushError::Copy { path: path.to_string(), source })?;
    if created == Create::Ours && copied == bytes {
        Ok(())
    } else {
        Err(FlushError::Garbled { path: path.to_string() })
    }
}

impl Engine {
    /// Moves `id` to where its rows are to lie, if they lie elsewhere.
    async fn move_to_its_place(self: &Arc<Self>, id: &InstanceId) -> Result<(), FlushError> {
        let catalog = self.catalog.current();
        let Some(table) = catalog.table_by_id(id.table).cloned() else { return Ok(()) };
        self.check_rebuilt(&table, &id.owner).await?;
        self.settle_move(id).await?;
        self.finish_leaving(id).await?;
        let to = self.wanted_place(&catalog, &table, &id.owner)?;
        let instance = self.instances.get(id)?;
        let counters = self.buffer.counters(id)?;
        let is_used = counters.rows > 0 || counters.has_frozen() || !self.is_new(&instance);
        // A new one is placed by its first statement.
        if !is_used || instance.location(&table).storage == to.storage {
            self.moves.copies.lock().remove(id);
            return Ok(());
        }
        if self.moves.resting.lock().get(id) == Some(&to.storage) {
            return Ok(());
        }
        let job = self.jobs.begin_for(JobKind::StorageMove, &table, id);
        let outcome = self.move_now(&table, &instance, &to, &job).await;
        if outcome.is_err() && job.cancel.is_cancelled() {
            self.moves.rest(id, to.storage);
        }
        job.end(&outcome);
        if matches!(outcome, Err(FlushError::Cancelled)) { Ok(()) } else { outcome }
    }

    /// Whether nothing was ever flushed or placed.
    pub(super) fn is_new(&self, instance: &Instance) -> bool {
        let current = instance.current.read();
        current.view.flushed.0 == 0 && current.view.manifest.placed.is_none()
    }

    async fn move_now(
        self: &Arc<Self>,
        table: &Arc<TableEntry>,
        instance: &Arc<Instance>,
        to: &Location,
        job: &Ticket,
    ) -> Result<(), FlushError> {
        let id = &instance.id;
        self.open_soon(&RootKey::of(to)).await?;
        self.open_soon(&instance.root(table)).await?;
        self.flush_soon(id, self.flush(id)).await?;
        let mut copies = self.moves.take_copies(id, to);
        let outcome = self.copy_and_switch(table, instance, to, &mut copies, job).await;
        if let Err(error) = outcome {
            // The next attempt goes on from them.
            self.moves.copies.lock().insert(id.clone(), (to.clone(), copies));
            return Err(error);
        }
        self.finish_leaving(id).await?;
        self.describe(id, true).await;
        tracing::info!(table = %table.name, storage = %to.storage, "moved an instance");
        Ok(())
    }

    async fn copy_and_switch(
        self: &Arc<Self>,
        table: &Arc<TableEntry>,
        instance: &Arc<Instance>,
        to: &Location,
        copies: &mut Copies,
        job: &Ticket,
    ) -> Result<(), FlushError> {
        let id = &instance.id;
        for _ in 0..PASSES {
            let view = Arc::clone(&instance.current.read().view);
            match self.copy_files(table, id, &view, to, copies, job).await {
                // A compaction has taken it away meanwhile.
                Err(FlushError::Copy { source: object_store::Error::NotFound { .. }, .. }) => {}
                other => {
                    other?;
                    break;
                }
            }
        }
        crash::point("move.copied");
        let flushes = tokio::time::timeout(WAIT, instance.flushes.lock()).await;
        let _no_flush = flushes.map_err(|_| FlushError::Waiting)?;
        let writes = tokio::time::timeout(WAIT, Arc::clone(&instance.writes).write_owned()).await;
        let _no_write = writes.map_err(|_| FlushError::Waiting)?;
        self.flush_soon(id, self.flush_held(id, instance)).await?;
        let view = Arc::clone(&instance.current.read().view);
        self.copy_files(table, id, &view, to, copies, job).await?;
        if job.cancel.is_cancelled() {
            return Err(FlushError::Cancelled);
        }
        let rows = self.switch(table, instance, &view, to, copies).await?;
        job.add(rows, 0);
        self.remove_stale(&RootKey::of(to), &view, copies).await;
        Ok(())
    }

    /// Removes copies of files that were replaced before the move.
    async fn remove_stale(&self, root: &RootKey, view: &View, copies: &Copies) {
        for (_, copy) in copies.iter().filter(|(path, _)| view.file(path).is_none()) {
            if let Err(error) = self.remove(root, &copy.path).await {
                tracing::warn!(error = %Chain(&error), "a copy that nobody needs stays for a day");
            }
        }
    }

    /// Opens the stream of `root`, if that does not take long: a storage that is down must not hold up the moves of others.
    pub(super) async fn open_soon(self: &Arc<Self>, root: &RootKey) -> Result<(), FlushError> {
        Ok(tokio::time::timeout(WAIT, self.open_stream(root)).await.map_err(|_| FlushError::Waiting)??)
    }

    /// Commits `edit` in the stream of `root`, if that does not take long. After an error it may happen yet.
    async fn ship_soon(self: &Arc<Self>, root: &RootKey, edit: Edit) -> Result<(), FlushError> {
        Ok(tokio::time::timeout(WAIT, self.ship(root, edit)).await.map_err(|_| FlushError::Waiting)??)
    }

    /// Waits for a flush of `id` as long as a move may. What is cut off is begun again by the schedule: each of its steps
    /// may run twice.
    async fn flush_soon(
        &self,
        id: &InstanceId,
        flush: impl Future<Output = Result<Flushed, FlushError>>,
    ) -> Result<(), FlushError> {
        let flushed = tokio::time::timeout(WAIT, flush).await.unwrap_or(Err(FlushError::Waiting));
        self.schedule.done(self, id, flushed.is_ok());
        flushed.map(drop)
    }

    /// After a statement: if its instance was new, its place may have changed while the statement was under way.
    pub(super) fn look_at_place(&self, table: &TableEntry, instance: &Instance) {
        if table.use_user_storage && !self.is_in_its_storage(table, instance) {
            self.moves.look_again(instance.id.clone());
        }
    }

    /// Takes note that the storage of `left` has still to be told that the instance is where `there` is. Blocking.
    pub(super) fn note_leaving(&self, id: &InstanceId, left: &View, there: &View) -> Result<(), ReadError> {
        let catalog = self.catalog.current();
        let (Some(table), Some(placed)) = (catalog.table_by_id(id.table), there.manifest.placed.clone()) else {
            return Ok(());
        };
        let note = Note { from: left.location(table).clone(), placed };
        let text = serde_json::to_vec(&note).expect("names and numbers always have a JSON form");
        self.buffer.state_put(&key(NOTES, id), &text)?;
        self.moves.look_again(id.clone());
        Ok(())
    }

    /// Copies those files of `view` that are not in `copies`.
    async fn copy_files(
        &self,
        table: &TableEntry,
        id: &InstanceId,
        view: &View,
        to: &Location,
        copies: &mut Copies,
        job: &Ticket,
    ) -> Result<(), FlushError> {
        let catalog = self.catalog.current();
        self.check_owner(table, id, view)?;
        let from = self.storages.store(&catalog, &RootKey::of(view.location(table)))?;
        let target = self.storages.store(&catalog, &RootKey::of(to))?;
        let prefix = paths::instance_prefix(to, &id.owner)?;
        for file in &view.manifest.files {
            if copies.contains_key(&file.path) {
                continue;
            }
            if job.cancel.is_cancelled() {
                return Err(FlushError::Cancelled);
            }
            let name = ulid::Ulid::generate().to_string();
            let path = paths::data_file(&prefix, EPOCH, u64::from(view.flushed.0), &name);
            copy(from.as_ref(), target.as_ref(), file, &path).await?;
            job.add(0, file.bytes);
            copies.insert(file.path.clone(), FileEntry { path: path.to_string(), ..file.clone() });
        }
        Ok(())
    }

    /// Commits the move: from here on the instance is in the new storage. Returns how many rows that are.
    async fn switch(
        self: &Arc<Self>,
        table: &TableEntry,
        instance: &Instance,
        view: &View,
        to: &Location,
        copies: &Copies,
    ) -> Result<u64, FlushError> {
        let id = &instance.id;
        let copied = |file: &FileEntry| {
            let copy = copies.get(&file.path)?;
            // The vector may have grown after the copy.
            Some(FileEntry { path: copy.path.clone(), ..file.clone() })
        };
        let add: Option<Vec<FileEntry>> = view.manifest.files.iter().map(copied).collect();
        let add = add.ok_or(FlushError::Waiting)?;
        let rows = add.iter().map(|file| file.rows).sum();
        let placed = Placed { location: to.clone(), moves: view.manifest.moves() + 1 };
        let note = Note { from: view.location(table).clone(), placed: placed.clone() };
        let text = serde_json::to_vec(&note).expect("names and numbers always have a JSON form");
        // The user waits meanwhile: not for a storage that has just gone away.
        self.open_soon(&RootKey::of(&note.placed.location)).await?;
        self.moves.note_placed(id)?;
        self.buffer.state_put(&key(NOTES, id), &text)?;
        crash::point("move.noted");
        let edit = Edit {
            instance: id.clone(),
            generation: view.flushed,
            last_seq: view.manifest.last_seq,
            add,
            remove: Vec::new(),
            replace: BTreeMap::new(),
            placed: Some(placed),
        };
        if let Err(error) = self.ship_soon(&RootKey::of(&note.placed.location), edit).await {
            // It may have happened, or happen yet: nothing is written to the instance before that is known.
            self.moves.pending.lock().insert(id.clone(), note);
            return Err(error);
        }
        crash::point("move.arrived");
        Ok(rows)
    }

    /// Makes sure that it is known whether a move that was about to be committed has happened: what was asked of the stream
    /// before is done when it answers. Until then nothing may be written to the instance, in whatever storage.
    pub(super) async fn settle_move(self: &Arc<Self>, id: &InstanceId) -> Result<(), FlushError> {
        // Cheap, and almost always so.
        let Some(note) = self.moves.pending.lock().get(id).cloned() else { return Ok(()) };
        let instance = self.instances.get(id)?;
        let has_moved = || instance.current.read().view.manifest.moves() >= note.placed.moves;
        if !has_moved() {
            self.open_soon(&RootKey::of(&note.placed.location)).await?;
        }
        // Under the lock: several may settle one move, and none may settle the next.
        let mut pending = self.moves.pending.lock();
        if pending.get(id) == Some(&note) {
            if !has_moved() {
                self.buffer.state_delete(&key(NOTES, id))?;
            }
            pending.remove(id);
        }
        Ok(())
    }

    /// Tells the old storage of `id` that it was left, if a move is not over.
    async fn finish_leaving(self: &Arc<Self>, id: &InstanceId) -> Result<(), FlushError> {
        let Some(text) = self.buffer.state_get(&key(NOTES, id))? else { return Ok(()) };
        let note: Note = serde_json::from_slice(&text).map_err(FlushError::Note)?;
        let view = Arc::clone(&self.instances.get(id)?.current.read().view);
        if view.manifest.moves() < note.placed.moves {
            // It is not known to have moved.
            self.moves.pending.lock().insert(id.clone(), note);
            return self.settle_move(id).await;
        }
        let root = RootKey::of(&note.from);
        self.open_soon(&root).await?;
        self.forget_unshipped(&root, id);
        let edit = Edit {
            instance: id.clone(),
            generation: view.flushed,
            last_seq: view.manifest.last_seq,
            add: Vec::new(),
            remove: Vec::new(),
            replace: BTreeMap::new(),
            placed: Some(note.placed),
        };
        // The note stays until it is known to be told; telling it again changes nothing.
        self.ship_soon(&root, edit).await?;
        crash::point("move.left");
        Ok(self.buffer.state_delete(&key(NOTES, id))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stored_note_of_a_move_is_what_is_written() {
        let (key, text) = super::super::tests::stored_note(NOTES);
        let alice = InstanceId::of_user(UserId::new("alice").unwrap(), TableId(1));
        assert_eq!(super::key(NOTES, &alice), key);
        let note: Note = serde_json::from_str(text).unwrap();
        assert_eq!((note.from.storage.as_str(), note.placed.moves), ("local", 1));
        assert_eq!(serde_json::to_string(&note).unwrap(), text);
    }
}
