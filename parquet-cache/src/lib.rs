//! Answers byte ranges of Parquet files from memory and disk first.
//!
//! Owns: chunks of data files, their key, which requests are served from them, and the folder that holds them. Does not
//! own: stores (`table_store` opens them), or decoded footers (`table_store::footers`).
//!
//! Only [`ObjectStore::get_ranges`] of `*.parquet` is answered from chunks. Those objects are immutable and have unique
//! names, so a cached byte is never stale. Everything else passes through untouched: an old answer for the commit stream,
//! an owner, a manifest or a conditional request would be a fault.
//!
//! The key of a chunk holds the storage root, not the path alone: two storages may have equal paths. A chunk from disk is
//! taken only if its checksum and its place fit. Losing the folder, in a crash or otherwise, costs only time.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod chunk;
mod dropped;
mod flights;
mod folder;
mod layer;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use foyer::{
    BlockEngineConfig, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder, HybridCachePolicy,
    HybridCacheProperties, Location, LruConfig, PsyncIoEngineConfig, RecoverMode,
};
use object_store::ObjectStore;
use object_store::path::Path;

pub use chunk::CHUNK_BYTES;
use chunk::{Chunk, Key};
use dropped::Dropped;
use flights::Flights;
use folder::{Reserve, Room};

/// One reader, or one upload, may put this share of what the cache holds into it: one in so many. A scan of everything
/// would else wash out what everybody else reads.
const SHARE: u64 = 4;
/// How long a look on the disk may take; after it, the store is asked.
const DISK_PATIENCE: Duration = Duration::from_secs(1);
/// How long opening the folder may take; after it, the cache is in memory only.
const OPEN_PATIENCE: Duration = Duration::from_secs(10);
/// Memory of one shard of the map, at least.
const SHARD_BYTES: usize = 32 << 20;

/// How large the cache is, and where.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes of chunks in memory.
    pub memory_bytes: usize,
    /// Bytes of chunks on disk; 0 for none.
    pub disk_bytes: u64,
    /// Free bytes that chunks leave on that disk.
    pub disk_reserve_bytes: u64,
    /// The folder of those on disk. It is the cache's alone: what else is in it is removed.
    pub folder: PathBuf,
}

/// What the cache has done since it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Chunks that were there.
    pub hits: u64,
    /// Chunks that were not.
    pub misses: u64,
    /// Chunks that did not get to the disk, because too many came at once.
    pub dropped: u64,
    /// Bytes in memory now.
    pub memory_bytes: u64,
    /// Bytes that the folder may take.
    pub disk_bytes: u64,
}

/// Chunks of data files in memory and on disk. Clones share one cache.
#[derive(Clone, Debug)]
pub struct Cache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    chunks: HybridCache<Key, Chunk>,
    flights: Flights,
    hits: AtomicU64,
    misses: AtomicU64,
    dropped: Dropped,
    disk_bytes: u64,
    share_bytes: u64,
    reserve: Reserve,
}

impl Cache {
    /// Opens the cache. A folder that cannot be used is reported and costs only time: the cache is then in memory alone.
    pub async fn open(settings: &Settings) -> Self {
        if settings.disk_bytes > 0 {
            let of = settings.clone();
            // In a task of its own, so that a panic over what lies in the folder ends here.
            let opening = tokio::spawn(async move { Self::on_disk(&of).await });
            let abort = opening.abort_handle();
            let failure = match tokio::time::timeout(OPEN_PATIENCE, opening).await {
                Ok(Ok(Ok(cache))) => return cache,
                Ok(Ok(Err(error))) => error,
                Ok(Err(error)) => error.to_string(),
                Err(_) => {
                    abort.abort();
                    format!("it takes longer than {} s", OPEN_PATIENCE.as_secs())
                }
            };
            let folder = settings.folder.display();
            tracing::warn!(folder = %folder, error = failure, "the cache is in memory only");
        }
        Self::in_memory(settings.memory_bytes).await
    }

    /// A cache without a folder.
    pub async fn in_memory(memory_bytes: usize) -> Self {
        let dropped = Dropped::default();
        let built = builder(memory_bytes, &dropped).storage().build().await;
        let chunks = built.expect("without a disk there is nothing that fails");
        Self::of(chunks, dropped, memory_bytes, 0, Reserve::default())
    }

    async fn on_disk(settings: &Settings) -> Result<Self, String> {
        let reserve = Reserve::new(settings.folder.clone(), settings.disk_reserve_bytes);
        let (folder, wanted, left) = (settings.folder.clone(), settings.disk_bytes, settings.disk_reserve_bytes);
        let prepare = move || folder::prepare(&folder, wanted, left);
        let prepared = tokio::task::spawn_blocking(prepare).await.map_err(|error| error.to_string())?;
        let Room { block_bytes, blocks } = prepared.map_err(|error| error.to_string())?;
        let disk_bytes = block_bytes * blocks;
        let dropped = Dropped::default();
        let built = async {
            let device = FsDeviceBuilder::new(&settings.folder).with_capacity(disk_bytes).build()?;
            // psync: plain reads and writes on blocking threads. io_uring is refused in many containers.
            builder(settings.memory_bytes, &dropped)
                .storage()
                .with_io_engine_config(PsyncIoEngineConfig::new())
                .with_engine_config(BlockEngineConfig::new(device).with_block_size(block_bytes))
                .with_recover_mode(RecoverMode::Quiet)
                .build()
                .await
        };
        let chunks = built.await.map_err(|error: foyer::Error| error.to_string())?;
        Ok(Self::of(chunks, dropped, settings.memory_bytes, disk_bytes as u64, reserve))
    }

    fn of(
        chunks: HybridCache<Key, Chunk>,
        dropped: Dropped,
        memory_bytes: usize,
        disk_bytes: u64,
        reserve: Reserve,
    ) -> Self {
        let share_bytes = (memory_bytes as u64 + disk_bytes) / SHARE;
        let (flights, hits, misses) = (Flights::default(), AtomicU64::default(), AtomicU64::default());
        Self(Arc::new(Inner { chunks, flights, hits, misses, dropped, disk_bytes, share_bytes, reserve }))
    }

    /// `store` with the cache before it, for one reader: a scan, a look-up, a merge. Each puts at most a quarter of what
    /// the cache holds into it. `root` names the store: no two stores may ever have one name.
    #[must_use]
    pub fn layer(&self, root: &Arc<str>, store: Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore> {
        Arc::new(layer::Layer::new(self.clone(), Arc::clone(root), store))
    }

    /// Takes in a data file that was uploaded, unless it is larger than a quarter of what the cache holds.
    pub fn fill(&self, root: &Arc<str>, path: &Path, file: &Bytes) {
        if chunk::is_data_file(path) && file.len() as u64 <= self.0.share_bytes {
            let path: Arc<str> = path.as_ref().into();
            for chunk in Chunk::split(file, 0, file.len() as u64) {
                self.0.insert(Key { root: Arc::clone(root), path: Arc::clone(&path), chunk: chunk.number }, chunk);
            }
        }
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            hits: self.0.hits.load(Ordering::Relaxed),
            misses: self.0.misses.load(Ordering::Relaxed),
            dropped: self.0.dropped.count(),
            memory_bytes: self.0.chunks.memory().usage() as u64,
            disk_bytes: self.0.disk_bytes,
        }
    }

    /// Waits at most `grace` for what is on its way to the disk. What does not get there is read from the store again.
    pub async fn close(&self, grace: Duration) {
        let cache = self.clone();
        // In a task of its own, so that a panic over a disk that failed ends here.
        let closing = tokio::spawn(async move { cache.0.chunks.close().await });
        match tokio::time::timeout(grace, closing).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!(error = %error, "the cache did not close"),
            Ok(Err(error)) => tracing::warn!(error = %error, "the cache did not close"),
            Err(_) => tracing::warn!("the cache did not close in time"),
        }
    }
}

impl Inner {
    fn insert(&self, key: Key, chunk: Chunk) {
        let location = if self.reserve.is_left() { Location::Default } else { Location::InMem };
        drop(self.chunks.insert_with_properties(key, chunk, HybridCacheProperties::default().with_location(location)));
    }

    fn in_memory(&self, key: &Key) -> Option<Chunk> {
        self.chunks.memory().get(key).map(|entry| entry.value().clone())
    }

    /// A chunk that is there, in memory or on disk. A disk that fails or dawdles has none.
    async fn find(&self, key: &Key) -> Option<Chunk> {
        if let Some(chunk) = self.in_memory(key) {
            return Some(chunk);
        }
        if !self.chunks.storage().may_contains(key) {
            return None;
        }
        match tokio::time::timeout(DISK_PATIENCE, self.chunks.get(key)).await {
            Ok(Ok(Some(entry))) if entry.value().number == key.chunk => Some(entry.value().clone()),
            Ok(Ok(_)) => None,
            Ok(Err(error)) => {
                tracing::debug!(error = %error, "the cache's disk does not read");
                None
            }
            Err(_) => None,
        }
    }
}

fn builder(
    memory_bytes: usize,
    dropped: &Dropped,
) -> foyer::HybridCacheBuilderPhaseMemory<Key, Chunk, foyer::DefaultHasher> {
    HybridCacheBuilder::new()
        .with_name("parquet")
        // When it is inserted, not when it is evicted: a restart finds what was read lately.
        .with_policy(HybridCachePolicy::WriteOnInsertion)
        .with_flush_on_close(false)
        .with_metrics_registry(Box::new(dropped.clone()))
        .memory(memory_bytes)
        .with_shards((memory_bytes / SHARD_BYTES).clamp(1, 8))
        .with_eviction_config(LruConfig::default())
        .with_weighter(|key: &Key, chunk: &Chunk| key.bytes() + chunk.bytes.len())
}

#[cfg(test)]
mod tests;
