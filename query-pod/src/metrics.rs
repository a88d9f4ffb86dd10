//! What the pod counts. Labels come from closed sets; never a user, a table or a statement.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::engine::{Caches, Engine};
use crate::error::Kind;

/// Label of failed statements.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Status {
    status: u16,
}

/// All metrics.
pub struct Metrics {
    registry: Mutex<Registry>,
    /// Rows acknowledged.
    pub rows_written: Counter,
    /// Rows moved into files.
    pub rows_flushed: Counter,
    /// Files written.
    pub flushes: Counter,
    /// Flushes that did not finish.
    pub flush_failures: Counter,
    /// Compactions of instances.
    pub compactions: Counter,
    /// Checkpoints of commit streams.
    pub checkpoints: Counter,
    /// Rows brought back from commit streams on a new volume.
    pub rows_rebuilt: Counter,
    /// Memory that running queries have taken.
    pub query_memory_bytes: Gauge,
    /// Queries run.
    pub queries: Counter,
    /// Queries whose plan had been made before.
    pub plans_reused: Counter,
    /// Statements that were answered without the planner.
    pub fast_statements: Counter,
    /// Seconds per statement, from request to answer.
    pub statement_seconds: Histogram,
    /// Version of the catalog that is served.
    pub catalog_version: Gauge,
    /// 1 while the catalog log is of another history than the catalog that is served.
    pub catalog_refused: Gauge,
    /// 1 when the data folder may not be served: another process took over, or it is an older copy.
    pub disowned: Gauge,
    failures: Family<Status, Counter>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("kalamdb");
        let statement_seconds = Histogram::new(exponential_buckets(0.000_1, 2.0, 18));
        let (rows_written, rows_flushed) = (Counter::default(), Counter::default());
        let (flushes, flush_failures, queries) = (Counter::default(), Counter::default(), Counter::default());
        let (compactions, checkpoints, rows_rebuilt) = (Counter::default(), Counter::default(), Counter::default());
        let query_memory_bytes = Gauge::default();
        let (catalog_version, catalog_refused) = (Gauge::default(), Gauge::default());
        let failures = Family::<Status, Counter>::default();
        registry.register("rows_written", "Rows acknowledged", rows_written.clone());
        registry.register("rows_flushed", "Rows moved into files", rows_flushed.clone());
        registry.register("flushes", "Files written by flushes", flushes.clone());
        registry.register("flush_failures", "Flushes that did not finish and are tried again", flush_failures.clone());
        registry.register("compactions", "Compactions of one user's part of a table", compactions.clone());
        registry.register("checkpoints", "Checkpoints of commit streams", checkpoints.clone());
        registry.register(
            "rows_rebuilt",
            "Unflushed rows brought back from commit streams after the loss of a volume",
            rows_rebuilt.clone(),
        );
        let memory = "Memory that running queries have taken, of --queries-memory-bytes";
        registry.register("query_memory_bytes", memory, query_memory_bytes.clone());
        registry.register("queries", "Queries run", queries.clone());
        let plans_reused = Counter::default();
        registry.register("plans_reused", "Queries whose plan had been made before", plans_reused.clone());
        let fast_statements = Counter::default();
        registry.register(
            "fast_statements",
            "Statements whose rows were found by primary key or counted without planning a query",
            fast_statements.clone(),
        );
        registry.register("statement_seconds", "Seconds per statement", statement_seconds.clone());
        registry.register("catalog_version", "Version of the catalog that is served", catalog_version.clone());
        registry.register(
            "catalog_refused",
            "1 while the catalog log is of another history than the catalog that is served",
            catalog_refused.clone(),
        );
        let disowned = Gauge::default();
        registry.register(
            "disowned",
            "1 if this pod may not serve its data: another process took over, or the data folder is an older copy",
            disowned.clone(),
        );
        registry.register("statement_failures", "Failed statements by HTTP status", failures.clone());
        Self {
            registry: Mutex::new(registry),
            rows_written,
            rows_flushed,
            flushes,
            flush_failures,
            compactions,
            checkpoints,
            rows_rebuilt,
            query_memory_bytes,
            queries,
            plans_reused,
            fast_statements,
            statement_seconds,
            catalog_version,
            disowned,
            catalog_refused,
            failures,
        }
    }
}

impl Metrics {
    /// Shows how full `engine` and the disk of `data_dir` are, what storages are asked for, and what their caches do.
    pub fn watch(&self, engine: &Arc<Engine>, data_dir: &Path) {
        let storages = engine.storages();
        let mut registry = self.registry.lock();
        let of_engine = OfEngine { engine: Arc::downgrade(engine), data_dir: data_dir.to_owned() };
        registry.register_collector(Box::new(of_engine));
        registry.register("storage_requests", "Requests to storages by kind", storages.requests().clone());
        if let Some(caches) = storages.caches() {
            registry.register_collector(Box::new(OfCaches(caches.clone())));
        }
    }

    /// Counts a failed statement.
    pub fn failed(&self, kind: Kind) {
        self.failures.get_or_create(&Status { status: kind.status().as_u16() }).inc();
    }

    /// All metrics as text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &self.registry.lock());
        text
    }
}

/// How full the data plane is. Weak: it holds the metrics.
struct OfEngine {
    engine: Weak<Engine>,
    data_dir: PathBuf,
}

impl std::fmt::Debug for OfEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OfEngine")
    }
}

impl Collector for OfEngine {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let Some(engine) = self.engine.upgrade() else { return Ok(()) };
        let mut put = |name: &str, help: &str, value: u64| {
            let metric = gauge(value);
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        let (bytes, instances) = engine.buffered();
        let unshipped =
            "Bytes of acknowledged rows that are on this disk and not yet in the commit stream of their storage";
        put("unshipped_bytes", unshipped, engine.unshipped_bytes() as u64)?;
        put("buffered_bytes", "Bytes of unflushed rows, of --buffered-bytes-max", bytes)?;
        put("buffered_instances", "Users' parts of tables that have unflushed rows", instances as u64)?;
        if let Ok(disk) = rustix::fs::statvfs(&self.data_dir) {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            put("disk_free_bytes", "Free bytes of the data folder's disk; writes leave --disk-reserve-bytes", free)?;
        }
        if let Ok(files) = std::fs::read_dir("/proc/self/fd") {
            put("open_files", "Files and connections that are open", files.count() as u64)?;
        }
        Ok(())
    }
}

/// The caches count for themselves; this says how the numbers are called.
#[derive(Debug)]
struct OfCaches(Caches);

impl Collector for OfCaches {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let mut put = |name: &str, help: &str, metric: &dyn EncodeMetric| {
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        let (chunks, footers) = self.0.counts();
        if let Some(chunks) = chunks {
            let dropped = "Parts of data files that did not get to the disk, because too many came at once";
            put("cache_hits", "Parts of data files that were in the cache", &ConstCounter::new(chunks.hits))?;
            put("cache_misses", "Parts of data files that were not in the cache", &ConstCounter::new(chunks.misses))?;
            put("cache_dropped", dropped, &ConstCounter::new(chunks.dropped))?;
            put("cache_memory_bytes", "Memory that parts of data files take", &gauge(chunks.memory_bytes))?;
            put("cache_disk_bytes_max", "Disk that parts of data files may take", &gauge(chunks.disk_bytes))?;
        }
        put("footer_hits", "Footers of data files that were in memory", &ConstCounter::new(footers.hits))?;
        put("footer_misses", "Footers of data files that were read", &ConstCounter::new(footers.misses))?;
        put("footer_bytes", "Memory that footers of data files take", &gauge(footers.bytes))
    }
}

fn gauge(value: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}
