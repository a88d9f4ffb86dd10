//! Brings an instance's data back on an empty disk, from the checkpoints and commit streams of its storages.
//!
//! A volume that takes an instance over from a lost one notes so before anything else. From then on each storage of the
//! catalog is read back before anything that lies there is read, written or flushed; one that does not answer holds up
//! only its own users. Users who may have been in any storage wait for those that the home store knows to be used. The
//! streams of all former processes are ended first, so that what is read is all there will be.
//!
//! Two passes: first the manifests, which say up to which `_seq` rows are in files, then the rows above that. Doing it
//! again after a crash changes nothing.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use kalamdb_model::{Catalog, Generation, InstanceId, Location, Owner, TableEntry, TableKind};
use kalamdb_table_store::checkpoint::{self, Checkpoint};
use kalamdb_table_store::manifest::{self, Edit, Manifest, Placed};
use kalamdb_table_store::stream::{self, Round};
use kalamdb_write_buffer::{Adopted, ReadError, WriteBuffer};
use object_store::ObjectStore;
use parking_lot::Mutex;

use super::begin::BeginError;
use super::instance::View;
use super::publish::is_published;
use super::{Engine, RootKey, now_us};
use crate::catalog::Snapshot;
use crate::crash;

/// How long a statement waits for the storage of its table to be read back.
const WAIT: Duration = Duration::from_secs(5);
/// Instances that are taken over with one fsync.
const ADOPT_MAX: usize = 1_000;

const STATE: &str = "rebuild";

/// What has still to be read back.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Left {
    /// Nothing: as ever on a volume that has lost nothing.
    #[default]
    Nothing,
    /// Everything that the first catalog will name; only roots of these names are known to be used. `None`: all may be.
    Everything(Option<BTreeSet<String>>),
    /// These roots.
    Roots {
        /// Something of this instance is there.
        used: BTreeSet<RootKey>,
        /// Nothing is known to be there. Only who finds his table there waits for them.
        others: BTreeSet<RootKey>,
    },
}

impl Left {
    fn of(used: BTreeSet<RootKey>, others: BTreeSet<RootKey>) -> Self {
        if used.is_empty() && others.is_empty() { Self::Nothing } else { Self::Roots { used, others } }
    }
}

/// The storage of a table is being read back.
#[derive(Clone, Debug, thiserror::Error)]
#[error("storage `{0}` is being read back after the loss of a volume")]
pub struct Rebuilding(pub RootKey);

/// What this volume has still to read back; kept on disk.
pub(super) struct Rebuild {
    buffer: WriteBuffer,
    left: Mutex<Left>,
}

impl Rebuild {
    pub(super) fn open(buffer: WriteBuffer) -> Result<Self, ReadError> {
        let stored = buffer.state_get(STATE)?;
        // What cannot be read was written by nobody: better read everything back than too little.
        let read = |text: Vec<u8>| serde_json::from_slice(&text).unwrap_or(Left::Everything(None));
        let left = stored.map(read).unwrap_or_default();
        Ok(Self { buffer, left: Mutex::new(left) })
    }

    fn set(&self, left: &mut Left, next: Left) -> Result<(), ReadError> {
        match &next {
            Left::Nothing => self.buffer.state_delete(STATE)?,
            other => {
                let text = serde_json::to_vec(other).expect("names and numbers always have a JSON form");
                self.buffer.state_put(STATE, &text)?;
            }
        }
        *left = next;
        Ok(())
    }
}

/// All that has to be replayed of a storage, in order.
struct Source {
    checkpoint: Option<Checkpoint>,
    /// Streams with the first object and the fence of each.
    streams: Vec<(String, u64, u64)>,
}

impl Engine {
    /// Takes note that this volume is new, and its instance is not; `used` is what the home store knows to be used.
    ///
    /// # Errors
    /// If the write buffer does not write.
    pub fn expect_rebuild(&self, used: BTreeSet<String>) -> Result<(), ReadError> {
        let mut left = self.rebuild.left.lock();
        self.rebuild.set(&mut left, Left::Everything(Some(used)))
    }

    /// Settles what has to be read back before the first catalog is served.
    pub(super) fn plan_rebuild(&self, catalog: &Catalog) -> Result<(), ReadError> {
        let mut left = self.rebuild.left.lock();
        let Left::Everything(names) = &*left else { return Ok(()) };
        let (mut used, mut others) = (BTreeSet::new(), BTreeSet::new());
        for (storage, entry) in &catalog.storages {
            for (number, found) in &entry.roots {
                let root = RootKey { storage: storage.clone(), root: *number };
                let name = root.used_name(&found.identity());
                let is_used = names.as_ref().is_none_or(|names| names.contains(&name));
                _ = if is_used { used.insert(root) } else { others.insert(root) };
            }
        }
        self.rebuild.set(&mut left, Left::of(used, others))?;
        crash::point("rebuild.planned");
        Ok(())
    }

    /// Roots with something of this instance that are not read back yet.
    pub(super) fn not_rebuilt(&self) -> BTreeSet<RootKey> {
        match &*self.rebuild.left.lock() {
            Left::Roots { used, .. } => used.clone(),
            Left::Nothing | Left::Everything(_) => BTreeSet::new(),
        }
    }

    /// Whether anything has still to be read back, as far as is known.
    #[must_use]
    pub fn is_rebuilding(&self) -> bool {
        match &*self.rebuild.left.lock() {
            Left::Nothing => false,
            Left::Everything(_) => true,
            Left::Roots { used, .. } => !used.is_empty(),
        }
    }

    pub(super) fn is_rebuilt(&self, root: &RootKey) -> bool {
        match &*self.rebuild.left.lock() {
            Left::Nothing => true,
            Left::Everything(_) => false,
            Left::Roots { used, others } => !used.contains(root) && !others.contains(root),
        }
    }

    /// Waits a little until all that may have rows of `owner` in `table` is read back: the storage of the table, and if
    /// users have storages of their own, his, and every other one that was used.
    pub(super) async fn check_rebuilt(self: &Arc<Self>, table: &TableEntry, owner: &Owner) -> Result<(), Rebuilding> {
        if *self.rebuild.left.lock() == Left::Nothing {
            return Ok(());
        }
        let mut roots = BTreeSet::from([RootKey::of(&table.location)]);
        if matches!(owner, Owner::User(_)) && self.users.any() {
            let own = self.wanted_place(&self.catalog.current(), table, owner);
            roots.extend(own.ok().map(|place| RootKey::of(&place)));
            roots.extend(self.not_rebuilt());
        }
        for root in roots {
            if !self.is_rebuilt(&root) {
                let _opened = tokio::time::timeout(WAIT, self.open_stream(&root)).await;
            }
            if !self.is_rebuilt(&root) {
                return Err(Rebuilding(root));
            }
        }
        Ok(())
    }

    /// Reads `root` back. Nothing of it is served before this is done.
    pub(super) async fn rebuild(
        self: &Arc<Self>,
        root: &RootKey,
        store: &dyn ObjectStore,
        own_disk: bool,
    ) -> Result<(), BeginError> {
        if own_disk {
            tracing::warn!(storage = %root, "this storage lay on the disk that was lost; its rows are gone");
            return Ok(self.note_rebuilt(root)?);
        }
        let source = self.end_all(store).await?;
        crash::point("rebuild.ended");
        let catalog = self.catalog.current();
        let mut views: HashMap<InstanceId, View> = HashMap::new();
        let mut last_us = 0;
        let mut replay = source.replay(store);
        while let Some((at_us, round)) = replay.next().await? {
            last_us = last_us.max(at_us);
            let told = round.edits.iter().map(|edit| &edit.instance);
            told.chain(round.rows.iter().map(|block| &block.instance)).for_each(|id| self.begun(&mut views, root, id));
            let edits = round.edits.iter().filter(|edit| self.may_be_in(&catalog, root, &edit.instance));
            edits.for_each(|edit| bring(&mut views, edit));
        }
        // Who has left has all his rows in files, elsewhere.
        let has_left = |view: &View| {
            let placed = view.manifest.placed.as_ref();
            placed.is_some_and(|placed| RootKey::of(&placed.location) != *root)
        };
        let left: HashSet<InstanceId> =
            views.iter().filter(|(_, view)| has_left(view)).map(|(id, _)| id.clone()).collect();
        views.retain(|_, view| !has_left(view));
        let instances = views.len();
        self.adopt(views).await?;
        crash::point("rebuild.adopted");
        let mut rows = 0;
        let mut replay = source.replay(store);
        while let Some((_, round)) = replay.next().await? {
            let is_here = |id: &InstanceId| !left.contains(id) && self.may_be_in(&catalog, root, id);
            let blocks = round.rows.into_iter().filter(|block| is_here(&block.instance));
            rows += self.restore_all(blocks.collect()).await?;
            crash::point("rebuild.restored");
        }
        self.note_rebuilt(root)?;
        crash::point("rebuild.done");
        self.metrics.rows_rebuilt.inc_by(rows);
        tracing::warn!(
            storage = %root,
            instances,
            unflushed_rows = rows,
            last_commit_us = last_us,
            seconds_ago = now_us().saturating_sub(last_us) / 1_000_000,
            "read a storage back after the loss of a volume; rows that were acknowledged after its last commit, by tables \
             with durability `local`, are lost"
        );
        Ok(())
    }

    /// Takes note that nothing is left to be read back at the place of `root`.
    pub(super) fn note_rebuilt(&self, root: &RootKey) -> Result<(), ReadError> {
        let catalog = self.catalog.current();
        let mut left = self.rebuild.left.lock();
        let Left::Roots { used, others } = &*left else { return Ok(()) };
        let but_it = |roots: &BTreeSet<RootKey>| -> BTreeSet<RootKey> {
            roots.iter().filter(|other| !self.storages.share_place(&catalog, root, other)).cloned().collect()
        };
        let next = Left::of(but_it(used), but_it(others));
        self.rebuild.set(&mut left, next)
    }

    /// Ends the streams of all former processes, and tells what has to be replayed: from the newest checkpoint on.
    async fn end_all(&self, store: &dyn ObjectStore) -> Result<Source, BeginError> {
        let own = self.shippers.incarnation.as_str();
        let mut source = Source { checkpoint: None, streams: Vec::new() };
        let mut left: BTreeSet<String> =
            stream::incarnations(store).await?.into_iter().filter(|name| name != own).collect();
        while let Some(incarnation) = left.pop_first() {
            if incarnation.as_str() > own {
                self.shippers.note_name(&incarnation)?;
                let why = format!(
                    "the clock is behind that of process `{incarnation}`, which came before: start this pod again"
                );
                return Err(why.into());
            }
            let last = stream::last(store, &incarnation).await?.unwrap_or(1);
            let fence = stream::fence(store, &incarnation, last, own).await?;
            let mut from = 1;
            if let Some(checkpoint) = checkpoint::newest(store, &incarnation).await? {
                from = checkpoint.seq;
                if fence.seq < from {
                    // It lived, and shortened its stream before our fence came: that lies in a hole, and ends nothing.
                    left.insert(incarnation);
                    continue;
                }
                // It holds all that came before.
                source = Source { checkpoint: Some(checkpoint), streams: Vec::new() };
            }
            if fence.by != own {
                // It may live, and have nothing of its own yet.
                left.insert(fence.by);
            }
            source.streams.push((incarnation, from, fence.seq));
        }
        Ok(source)
    }

    async fn adopt(self: &Arc<Self>, views: HashMap<InstanceId, View>) -> Result<(), BeginError> {
        let mut views = views.into_iter();
        loop {
            let some: Vec<(InstanceId, View)> = views.by_ref().take(ADOPT_MAX).collect();
            if some.is_empty() {
                return Ok(());
            }
            let engine = Arc::clone(self);
            tokio::task::spawn_blocking(move || engine.adopt_some(some)).await??;
        }
    }

    /// Whether anything of `id` can be in `root`: of its table, or of users who have, or had, storages of their own.
    fn may_be_in(&self, catalog: &Snapshot, root: &RootKey, id: &InstanceId) -> bool {
        catalog.table_by_id(id.table).is_none_or(|table| {
            let of_users = table.kind == TableKind::User && table.had_user_storage;
            of_users || self.storages.share_place(catalog, root, &RootKey::of(&table.location))
        })
    }

    /// What is heard of first in another storage than its table's began there.
    fn begun(&self, views: &mut HashMap<InstanceId, View>, root: &RootKey, id: &InstanceId) {
        let catalog = self.catalog.current();
        let Some(table) = catalog.table_by_id(id.table) else { return };
        let is_of_table = self.storages.share_place(&catalog, root, &RootKey::of(&table.location));
        if views.contains_key(id) || is_of_table || !self.may_be_in(&catalog, root, id) {
            return;
        }
        if let Some(location) = catalog.catalog.place_in(&root.storage, table) {
            let placed = Placed { location: Location { root: root.root, ..location }, moves: 1 };
            let manifest = Manifest { placed: Some(placed), ..Manifest::default() };
            views.insert(id.clone(), View { flushed: Generation(0), manifest });
        }
    }

    fn adopt_some(&self, found: Vec<(InstanceId, View)>) -> Result<(), BeginError> {
        let mut views = Vec::with_capacity(found.len());
        for (id, view) in found {
            let known = Arc::clone(&self.instances.get(&id)?.current.read().view);
            let is_known = known.flushed > Generation(0) || known.manifest.placed.is_some();
            let is_other = is_known && known.manifest.moves() != view.manifest.moves();
            // A crash in a move left both: the files of the one that was left go, and its stream has to be told.
            if is_other && known.manifest.moves() > view.manifest.moves() {
                self.note_left(&id, &view)?;
                self.note_leaving(&id, &view, &known)?;
                continue;
            }
            if is_other {
                self.note_left(&id, &known)?;
                self.note_leaving(&id, &known, &view)?;
            }
            if view.manifest.placed.is_some() {
                self.moves.note_placed(&id)?;
            }
            views.push((id, view));
        }
        let adopted: Vec<Adopted> = views
            .iter()
            .map(|(instance, View { flushed, manifest })| Adopted {
                instance: instance.clone(),
                flushed: *flushed,
                last_seq: manifest.last_seq,
                manifest: manifest.encode(),
            })
            .collect();
        self.buffer.adopt(&adopted)?;
        for (id, view) in views {
            let instance = self.instances.get(&id)?;
            let mut current = instance.current.write();
            current.view = Arc::new(view);
            current.located.clear();
        }
        Ok(())
    }
}

/// Applies an edit that may be applied already: a checkpoint may hold more than its number says.
fn bring(views: &mut HashMap<InstanceId, View>, edit: &Edit) {
    let view = views
        .entry(edit.instance.clone())
        .or_insert_with(|| View { flushed: Generation(0), manifest: Manifest::default() });
    // What `begun` has supposed may be another template: storages change theirs.
    if let Some(placed) = &edit.placed
        && placed.moves == view.manifest.moves()
    {
        view.manifest.placed = Some(placed.clone());
    }
    if !is_published(view, edit) {
        view.manifest = manifest::apply(&view.manifest, edit);
        view.flushed = view.flushed.max(edit.generation);
    }
}

impl Source {
    fn replay<'a>(&'a self, store: &'a dyn ObjectStore) -> Replay<'a> {
        Replay { source: self, store, part: 0, stream: 0, seq: None }
    }
}

/// Goes through a [`Source`], oldest first.
struct Replay<'a> {
    source: &'a Source,
    store: &'a dyn ObjectStore,
    part: u32,
    stream: usize,
    seq: Option<u64>,
}

impl Replay<'_> {
    /// The next round, and when it was written; 0 if it is a part of a checkpoint.
    async fn next(&mut self) -> Result<Option<(i64, Round)>, BeginError> {
        if let Some(checkpoint) = self.source.checkpoint.as_ref().filter(|checkpoint| self.part < checkpoint.parts()) {
            self.part += 1;
            return Ok(Some((0, checkpoint.part(self.store, self.part - 1).await?)));
        }
        while let Some((incarnation, from, fence)) = self.source.streams.get(self.stream) {
            let seq = self.seq.unwrap_or(*from);
            if seq < *fence {
                self.seq = Some(seq + 1);
                let (header, round) = stream::round(self.store, incarnation, seq).await?;
                return Ok(Some((header.at_us, round)));
            }
            (self.stream, self.seq) = (self.stream + 1, None);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stored_note_of_what_is_to_be_read_back_is_what_is_written() {
        let (key, text) = super::super::tests::stored_note(STATE);
        assert_eq!(key, STATE);
        let left: Left = serde_json::from_str(text).unwrap();
        assert!(matches!(&left, Left::Roots { used, others } if (used.len(), others.len()) == (1, 1)), "{left:?}");
        assert_eq!(serde_json::to_string(&left).unwrap(), text);
        let names = BTreeSet::from(["eu.1/file://eu".to_owned()]);
        for (left, text) in [
            (Left::Everything(Some(names)), r#"{"Everything":["eu.1/file://eu"]}"#),
            (Left::Everything(None), r#"{"Everything":null}"#),
        ] {
            assert_eq!(serde_json::to_string(&left).unwrap(), text);
            assert_eq!(serde_json::from_str::<Left>(text).unwrap(), left);
        }
    }
}
