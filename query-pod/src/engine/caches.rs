//! What the pod keeps of data files: chunks of their bytes ([`kalamdb_parquet_cache`]) and decoded footers.

use std::path::Path;
use std::time::Duration;

use kalamdb_parquet_cache::{Cache, Counts, Settings};
use kalamdb_table_store::{FooterCounts, Footers};

/// Footers get this share of the cache's memory: one in so many. Each stands for up to 128 MiB of rows.
const FOOTER_SHARE: usize = 4;

/// How much is kept of data files.
#[derive(Clone, Debug, clap::Args)]
pub struct CacheLimits {
    /// Memory for parts of data files and their decoded footers, bytes; 0 keeps none, nor any on disk.
    #[arg(long, default_value_t = 256 << 20)]
    pub cache_memory_bytes: usize,
    /// Disk for parts of data files of remote storages, in the data folder, bytes; 0 keeps none there. Taken as needed,
    /// and at most half of what is free above twice the reserve at the start; none while less than that is free.
    #[arg(long, default_value_t = 4 << 30)]
    pub cache_disk_bytes: u64,
}

/// The caches. The default ones keep nothing.
#[derive(Clone, Debug, Default)]
pub struct Caches {
    /// Parts of data files.
    pub(super) chunks: Option<Cache>,
    /// Decoded footers.
    pub(super) footers: Footers,
}

impl Caches {
    /// Opens the caches, which leave twice `disk_reserve_bytes` free. One process at a time may have a data folder, and that was made sure of before.
    pub async fn open(data_dir: &Path, limits: &CacheLimits, disk_reserve_bytes: u64) -> Self {
        if limits.cache_memory_bytes == 0 {
            return Self::default();
        }
        let footer_bytes = limits.cache_memory_bytes / FOOTER_SHARE;
        let settings = Settings {
            memory_bytes: limits.cache_memory_bytes - footer_bytes,
            disk_bytes: limits.cache_disk_bytes,
            // Commits are refused below the reserve itself: what frees the disk then needs room to work.
            disk_reserve_bytes: disk_reserve_bytes.saturating_mul(2),
            folder: data_dir.join("cache"),
        };
        Self { chunks: Some(Cache::open(&settings).await), footers: Footers::new(footer_bytes) }
    }

    /// What they have done so far; `None` of chunks when none are kept.
    #[must_use]
    pub fn counts(&self) -> (Option<Counts>, FooterCounts) {
        (self.chunks.as_ref().map(Cache::counts), self.footers.counts())
    }

    /// Waits at most `grace` for what is on its way to the disk.
    pub async fn close(&self, grace: Duration) {
        if let Some(chunks) = &self.chunks {
            chunks.close(grace).await;
        }
    }
}
