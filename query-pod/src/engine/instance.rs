//! Instances in memory: their locks and their view.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use kalamdb_model::{Generation, InstanceId, Location, TableEntry};
use kalamdb_table_store::manifest::{FileEntry, Manifest, ManifestError};
use kalamdb_write_buffer::WriteBuffer;
use parking_lot::{Mutex, RwLock};

use super::RootKey;

/// What a reader sees besides the buffer: the files, and which generations are in them.
#[derive(Debug)]
pub struct View {
    /// Generations up to this one are in the files; the buffer's later ones are not.
    pub flushed: Generation,
    /// The files.
    pub manifest: Manifest,
}

impl View {
    /// Where the files lie.
    pub(super) fn location<'a>(&'a self, table: &'a TableEntry) -> &'a Location {
        self.manifest.placed.as_ref().map_or(&table.location, |placed| &placed.location)
    }

    /// The file under this path.
    pub(super) fn file(&self, path: &str) -> Option<&FileEntry> {
        let files = &self.manifest.files;
        files.binary_search_by(|file| file.path.as_str().cmp(path)).ok().and_then(|at| files.get(at))
    }
}

/// Where a file holds a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Position {
    /// The file.
    pub(super) path: Arc<str>,
    /// The row, counted from 0.
    pub(super) row: u32,
}

/// What is known of an instance's files.
pub(super) struct Current {
    pub(super) view: Arc<View>,
    /// Where the files of `view` hold the newest version that they have of a key, or that they have none: of keys whose
    /// buffered rows may replace one. What is missing here is looked up when it is needed.
    pub(super) located: HashMap<Vec<u8>, Option<Position>>,
}

impl Current {
    /// Takes note of what was looked up in the files of `view`; of no use when there are others by now.
    pub(super) fn note(&mut self, view: &Arc<View>, found: impl IntoIterator<Item = (Vec<u8>, Option<Position>)>) {
        if Arc::ptr_eq(&self.view, view) {
            self.located.extend(found);
        }
    }
}

/// One instance.
pub struct Instance {
    pub(super) id: InstanceId,
    /// Held exclusively by statements that must read before they write, until their commit is applied; shared by those
    /// whose keys nobody else can have made.
    pub(super) writes: Arc<tokio::sync::RwLock<()>>,
    /// Whether rows are stored before they are applied. Changes only while `writes` is held exclusively: rows of both ways
    /// would otherwise overtake each other.
    pub(super) stores_first: AtomicBool,
    /// Bytes of statements that are on their way into the buffer: checked with what is there, so that many at once do not
    /// pass a limit that each alone meets.
    pub(super) incoming: AtomicU64,
    /// When its files were last described for outside readers; held while they are.
    pub(super) described: tokio::sync::Mutex<Option<Instant>>,
    /// Held by the one flush at a time.
    pub(super) flushes: tokio::sync::Mutex<()>,
    /// Readers take view and buffer snapshot together under it; publishing takes it exclusively.
    pub(super) current: RwLock<Current>,
}

impl Instance {
    /// Where its files lie now.
    pub(super) fn location(&self, table: &TableEntry) -> Location {
        self.current.read().view.location(table).clone()
    }

    /// In which storage its files lie now.
    pub(super) fn root(&self, table: &TableEntry) -> RootKey {
        RootKey::of(self.current.read().view.location(table))
    }
}

/// An instance's state cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// The buffer does not read.
    #[error("failed to read the state of an instance")]
    Buffer(#[from] kalamdb_write_buffer::ReadError),
    /// The stored manifest does not parse.
    #[error("the stored manifest of an instance is damaged")]
    Manifest(#[from] ManifestError),
}

/// Most instances kept in memory; unused ones above it are dropped and read again when needed.
const INSTANCES_MAX: usize = 50_000;

/// All instances in memory.
pub(super) struct Instances {
    buffer: WriteBuffer,
    loaded: Mutex<HashMap<InstanceId, Arc<Instance>>>,
}

impl Instances {
    pub(super) fn new(buffer: WriteBuffer) -> Self {
        Self { buffer, loaded: Mutex::default() }
    }

    /// The instance, loaded on first use. Every caller gets the same one: its locks are what keeps writers apart.
    pub(super) fn get(&self, id: &InstanceId) -> Result<Arc<Instance>, InstanceError> {
        let mut loaded = self.loaded.lock();
        if let Some(instance) = loaded.get(id) {
            return Ok(Arc::clone(instance));
        }
        let view = self.load(id)?;
        if loaded.len() >= INSTANCES_MAX {
            // References are only made under this lock, so one that is ours alone cannot be in use.
            loaded.retain(|_, instance| Arc::strong_count(instance) > 1);
        }
        let instance = Arc::new(Instance {
            id: id.clone(),
            writes: Arc::default(),
            stores_first: AtomicBool::new(false),
            incoming: AtomicU64::new(0),
            described: tokio::sync::Mutex::default(),
            flushes: tokio::sync::Mutex::default(),
            current: RwLock::new(Current { view: Arc::new(view), located: HashMap::new() }),
        });
        loaded.insert(id.clone(), Arc::clone(&instance));
        Ok(instance)
    }

    fn load(&self, id: &InstanceId) -> Result<View, InstanceError> {
        Ok(match self.buffer.record(id)? {
            Some(record) if !record.manifest.is_empty() => {
                View { flushed: record.flushed, manifest: Manifest::decode(&record.manifest)? }
            }
            Some(record) => View { flushed: record.flushed, manifest: Manifest::default() },
            None => View { flushed: Generation(0), manifest: Manifest::default() },
        })
    }
}
