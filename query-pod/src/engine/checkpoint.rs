//! Shortens the commit stream of a storage: writes a checkpoint of all instances there, then deletes what lies before it.
//!
//! A process begins with one: it takes the place of the streams of all former processes, and brings the rows that these
//! acknowledged and did not ship. Later ones come when the stream has grown, or when rows were left out of it. A storage
//! on the pod's own disk needs none: what is published here need not be replayed, so its objects just go.

use std::collections::BTreeSet;
use std::future::pending;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use kalamdb_model::{Generation, InstanceId};
use kalamdb_table_store::checkpoint;
use kalamdb_table_store::checkpoint::CheckpointWriter;
use kalamdb_table_store::manifest::Edit;
use kalamdb_table_store::stream::{self, Round, RowBlock};
use object_store::ObjectStore;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::begin::BeginError;
use super::instance::InstanceError;
use super::ship::{Backoff, edit_bytes};
use super::storages::StoragesError;
use super::{Engine, RootKey};
use crate::catalog::Snapshot;
use crate::crash;
use crate::error::Chain;

/// Objects after which a stream is shortened: what a rebuild has to read one by one.
const OBJECTS_MAX: u64 = 1_000;
/// Bytes of rows after which it is, if the last checkpoint was not larger still.
const BYTES_MIN: usize = 64 << 20;
/// Bytes of a part, and of one block of rows in it; an instance that goes over it still gets in whole.
const PART_BYTES: usize = 8 << 20;
const BLOCK_BYTES: usize = 4 << 20;
/// Objects of a storage on the own disk that are kept at most.
const OWN_DISK_OBJECTS_MAX: u64 = 100;

/// When a checkpoint of one stream is due, and the one that is being written.
pub(super) struct Checkpoints {
    engine: Arc<Engine>,
    root: RootKey,
    /// Of the stream since the last one.
    objects: u64,
    bytes: usize,
    last_bytes: usize,
    wanted: bool,
    /// Checkpoints that were begun.
    attempts: u64,
    /// The object before this one is the first that is left.
    trimmed: u64,
    /// Whether what former processes left is deleted.
    former_trimmed: bool,
    running: Option<JoinHandle<Result<Shortened, BeginError>>>,
    not_before: Option<Instant>,
    backoff: Backoff,
}

impl Checkpoints {
    pub(super) fn new(engine: Arc<Engine>, root: RootKey) -> Self {
        Self {
            engine,
            root,
            objects: 0,
            bytes: 0,
            last_bytes: 0,
            wanted: false,
            attempts: 0,
            trimmed: 1,
            former_trimmed: false,
            running: None,
            not_before: None,
            backoff: Backoff::default(),
        }
    }

    /// Takes note of a further object with so many bytes of rows.
    pub(super) fn count(&mut self, bytes: usize) {
        self.objects += 1;
        self.bytes += bytes;
    }

    /// The stream lacks rows.
    pub(super) fn want(&mut self) {
        self.wanted = true;
    }

    pub(super) fn is_due(&self) -> bool {
        let ships = self.engine.storages.ships_rows(&self.engine.catalog.current(), &self.root);
        let objects_max = if ships { OBJECTS_MAX } else { OWN_DISK_OBJECTS_MAX };
        let grown = self.objects >= objects_max || self.bytes >= BYTES_MIN.max(2 * self.last_bytes);
        let waiting = self.not_before.is_some_and(|time| Instant::now() < time);
        self.running.is_none() && !waiting && (self.wanted || grown)
    }

    /// Begins one, of all that is before object `seq`.
    pub(super) fn start(&mut self, seq: u64) {
        (self.wanted, self.objects, self.bytes) = (false, 0, 0);
        self.attempts += 1;
        let (engine, root) = (Arc::clone(&self.engine), self.root.clone());
        let work = shorten(engine, root, seq, self.attempts, self.trimmed, self.former_trimmed);
        self.running = Some(self.engine.tasks.spawn(work));
    }

    /// Resolves when the one that is being written is done, or when it is time to try again.
    pub(super) async fn due(&mut self) {
        let Some(running) = &mut self.running else {
            match self.not_before.filter(|_| self.wanted) {
                Some(time) => return tokio::time::sleep_until(time).await,
                None => return pending().await,
            }
        };
        let outcome = running.await.unwrap_or_else(|error| Err(error.into()));
        self.running = None;
        match outcome {
            Ok(Shortened { bytes, deleted }) => {
                self.last_bytes = bytes;
                if let Some(trimmed) = deleted {
                    (self.trimmed, self.former_trimmed) = (trimmed, true);
                }
                (self.not_before, self.backoff) = (None, Backoff::default());
            }
            Err(error) => {
                tracing::warn!(storage = %self.root, error = %Chain(error.as_ref()), "a checkpoint was not written; trying again");
                self.wanted = true;
                self.not_before = Some(Instant::now() + self.backoff.next().max(Duration::from_secs(1)));
            }
        }
    }
}

/// What came of a checkpoint.
struct Shortened {
    /// Its size.
    bytes: usize,
    /// If what came before is deleted: the object before this one is the first that is left.
    deleted: Option<u64>,
}

/// Writes a checkpoint of what is before object `seq`, then deletes what it makes superfluous. What cannot be deleted now
/// is left to the next one.
async fn shorten(
    engine: Arc<Engine>,
    root: RootKey,
    seq: u64,
    attempt: u64,
    trimmed: u64,
    former_trimmed: bool,
) -> Result<Shortened, BeginError> {
    let store = engine.open_store(&root)?;
    let own = engine.shippers.incarnation.as_str();
    let (mut bytes, mut complete) = (0, None);
    if engine.storages.ships_rows(&engine.catalog.current(), &root) {
        // One for all of it: places are compared as they are written in one.
        let catalog = engine.catalog.current();
        let (reading, of, by) = (Arc::clone(&engine), root.clone(), Arc::clone(&catalog));
        let (place, ids) = tokio::task::spawn_blocking(move || reading.instances_in(&by, &of)).await??;
        let mut ids = ids.into_iter();
        let mut writer = CheckpointWriter::new(store.as_ref(), own, seq, attempt);
        loop {
            if engine.stop.is_cancelled() {
                return Err("the process is stopping".into());
            }
            let (reading, by, at) = (Arc::clone(&engine), Arc::clone(&catalog), Arc::clone(&place));
            let gathering =
                tokio::task::spawn_blocking(move || reading.gather(&by, &at, &mut ids).map(|part| (part, ids)));
            let ((part, part_bytes), left) = gathering.await??;
            if part == Round::default() {
                break;
            }
            ids = left;
            bytes += part_bytes;
            writer.part(part).await?;
            crash::point("checkpoint.part");
        }
        complete = Some(writer.finish().await?);
        crash::point("checkpoint.complete");
    }
    let deleting = async {
        if let Some(complete) = &complete {
            complete.delete_others(store.as_ref()).await?;
        }
        // The last object stays: so a reader that begins too early notices.
        stream::trim(store.as_ref(), own, trimmed.saturating_sub(1), seq.saturating_sub(1)).await?;
        crash::point("checkpoint.trimmed");
        if former_trimmed { Ok(()) } else { trim_former(store.as_ref(), own).await }
    };
    let deleted = deleting.await;
    engine.metrics.checkpoints.inc_by(u64::from(complete.is_some()));
    match deleted {
        Ok(()) => Ok(Shortened { bytes, deleted: Some(seq) }),
        Err(error) => {
            tracing::warn!(storage = %root, error = %Chain(error.as_ref()), "old parts of the commit stream are left for now");
            Ok(Shortened { bytes, deleted: None })
        }
    }
}

/// Deletes what former processes left, but their fences.
async fn trim_former(store: &dyn ObjectStore, own: &str) -> Result<(), BeginError> {
    for incarnation in stream::incarnations(store).await?.iter().filter(|name| name.as_str() < own) {
        let Some(last) = stream::last(store, incarnation).await? else { continue };
        if stream::is_fence(store, incarnation, last).await? {
            stream::trim_before(store, incarnation, last).await?;
            crash::point("checkpoint.former");
            checkpoint::delete_all(store, incarnation).await?;
        }
    }
    Ok(())
}

impl Engine {
    /// All instances whose data lies where `root` lies: other storages may share its place. Blocking.
    fn instances_in(&self, catalog: &Snapshot, root: &RootKey) -> Result<(Arc<str>, BTreeSet<InstanceId>), BeginError> {
        let place = self.storages.place(catalog, root).ok_or_else(|| StoragesError::Unknown(root.clone()))?;
        let mut here = BTreeSet::new();
        for id in self.buffer.published()?.into_iter().chain(self.buffer.dirty().into_iter().map(|(id, _)| id)) {
            let Some(table) = catalog.table_by_id(id.table) else { continue };
            let at = if self.moves.may_be_elsewhere(&id) {
                self.instances.get(&id)?.root(table)
            } else {
                RootKey::of(&table.location)
            };
            if self.storages.place(catalog, &at).as_ref() == Some(&place) {
                here.insert(id);
            }
        }
        Ok((place, here))
    }

    /// The next part of a checkpoint: manifest and rows of each instance as of one moment, if it is still at `place` by
    /// then. Blocking.
    fn gather(
        &self,
        catalog: &Snapshot,
        place: &Arc<str>,
        ids: &mut impl Iterator<Item = InstanceId>,
    ) -> Result<(Round, usize), GatherError> {
        let (mut part, mut bytes) = (Round::default(), 0);
        while bytes < PART_BYTES {
            let Some(id) = ids.next() else { break };
            let instance = self.instances.get(&id)?;
            let current = instance.current.read();
            let view = &current.view;
            let at = catalog.table_by_id(id.table).map(|table| RootKey::of(view.location(table)));
            if at.and_then(|at| self.storages.place(catalog, &at)).as_ref() != Some(place) {
                continue;
            }
            if view.flushed > Generation(0) || view.manifest.placed.is_some() {
                let edit = Edit {
                    instance: id.clone(),
                    generation: view.flushed,
                    last_seq: view.manifest.last_seq,
                    add: view.manifest.files.clone(),
                    remove: Vec::new(),
                    replace: std::collections::BTreeMap::new(),
                    placed: view.manifest.placed.clone(),
                };
                bytes += edit_bytes(&edit);
                part.edits.push(edit);
            }
            let block = || RowBlock { instance: id.clone(), buffered: true, rows: Vec::new() };
            let (mut rows, mut of_block) = (block(), 0);
            self.buffer.scan(&id, view.flushed, &mut |_, key, row| {
                let size = key.len() + row.len() + 8;
                if of_block + size > BLOCK_BYTES && !rows.rows.is_empty() {
                    part.rows.push(std::mem::replace(&mut rows, block()));
                    of_block = 0;
                }
                rows.rows.push((key.to_vec(), row.to_vec()));
                of_block += size;
                bytes += size;
                ControlFlow::Continue(())
            })?;
            if !rows.rows.is_empty() {
                part.rows.push(rows);
            }
        }
        Ok((part, bytes))
    }
}

/// An instance cannot be read for a checkpoint.
#[derive(Debug, thiserror::Error)]
enum GatherError {
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error("failed to read buffered rows")]
    Buffer(#[from] kalamdb_write_buffer::ReadError),
}
