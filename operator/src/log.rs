//! The newest catalog, and the one way to a newer one: the catalog log in the home store.
//!
//! Owns: what is done when the log does not say what became of an append, when to try again, when to step down, when to
//! trim. Does not own: the log's format and its races (`kalamdb_table_store::catalog_log`), what the catalog says.
//!
//! After a crash: an entry is in the log or not, and the next start reads which. While the process runs, an append whose
//! fate is unknown is repeated, unchanged, before anything else is appended. If the log no longer is the one that was
//! read, nothing is appended: the next start compiles on what is there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kalamdb_model::catalog::Catalog;
use kalamdb_table_store::CatalogLog;
use kalamdb_table_store::catalog_log::{self, Appended, LogError, SNAPSHOT_EVERY};
use object_store::ObjectStore;

use crate::backoff::Backoff;
use crate::cluster::chain;
use crate::metrics::{Failure, Metrics};

/// Pauses of a home store that does not answer.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);
/// Reading or appending: an append may take 80 s by itself (`kalamdb_table_store::create`).
const TIMEOUT: Duration = Duration::from_secs(120);
/// Entries that stay in the log for readers that are behind: a day of a change every 84 s.
const ENTRIES_KEPT: u64 = 1024;

/// What objects wait for whose change could not be appended.
const NOT_TAKEN: &str = "the home store does not take the catalog; trying again";
const ONE_BY_ONE: &str = "an earlier change of the catalog was only now stored";

/// Another operator leads, or the log is another one: this operator must end.
#[derive(Debug, thiserror::Error)]
pub enum StepDown {
    /// It won a number of the log.
    #[error("catalog version {version} is `{writer}`'s: another operator leads this instance")]
    Lost {
        /// The number.
        version: u64,
        /// The other one.
        writer: String,
    },
    /// It has gone on.
    #[error("the catalog log is at version {found}, and this operator knows {known}: another one leads this instance")]
    Behind {
        /// Where the log is.
        found: u64,
        /// Where we are.
        known: u64,
    },
    /// The home store was brought back to an older state, say.
    #[error("the catalog log in the home store is not the one that this operator has read")]
    OtherHistory(#[source] LogError),
}

/// Why the log does not answer.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error("{}", chain(.0))]
    Failed(LogError),
    #[error("no answer in {} s", TIMEOUT.as_secs())]
    Late,
}

/// Whether the log holds what was to be appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// There was nothing to append, and nothing is unknown.
    Already,
    /// By this call.
    Now,
    /// Not yet, for this reason; see [`Log::retry_at`].
    NotYet(&'static str),
}

/// The newest catalog in the log, as far as we know.
pub struct Log {
    home: Arc<dyn ObjectStore>,
    metrics: Arc<Metrics>,
    writer: String,
    catalog: Catalog,
    /// Handed to the log, whose answer is unknown: nothing else may be appended before that is resolved.
    unresolved: Option<Catalog>,
    backoff: Backoff,
    retry_at: Option<Instant>,
    trimmed_at: u64,
}

impl Log {
    /// Reads the log, however long the store takes to answer. `writer` is our name in it, another one for each process
    /// start.
    pub async fn load(home: Arc<dyn ObjectStore>, writer: String, metrics: Arc<Metrics>) -> Self {
        let mut backoff = Backoff::new(FIRST, LONGEST);
        let catalog = loop {
            match in_time(CatalogLog::load(home.as_ref())).await {
                Ok(catalog) => break catalog,
                Err(error) => {
                    let pause = backoff.failed();
                    tracing::error!(error = %error, retry_secs = pause.as_secs(), "cannot read the catalog log");
                    metrics.failed(Failure::LogRead);
                    tokio::time::sleep(pause).await;
                }
            }
        };
        tracing::info!(version = catalog.version, tables = catalog.tables.len(), "read the catalog log");
        backoff.succeeded();
        let trimmed_at = catalog.version;
        Self { home, metrics, writer, catalog, unresolved: None, backoff, retry_at: None, trimmed_at }
    }

    /// The newest catalog.
    #[must_use]
    pub const fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// When [`Log::bring_to`] is to be called again, if it must be.
    #[must_use]
    pub const fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Appends `next`, compiled on [`Log::catalog`], if it differs.
    ///
    /// # Errors
    /// When another operator leads, or the log is another one.
    pub async fn bring_to(&mut self, next: Catalog, now: Instant) -> Result<Stored, StepDown> {
        let changed = next.version != self.catalog.version;
        if self.retry_at.is_some_and(|at| at > now) && (changed || self.unresolved.is_some()) {
            return Ok(Stored::NotYet(NOT_TAKEN));
        }
        self.retry_at = None;
        match self.unresolved.take() {
            Some(unresolved) => {
                let differs = unresolved != Catalog { nonce: unresolved.nonce.clone(), ..next };
                let stored = self.append(unresolved, now).await?;
                if stored == Stored::Now && differs {
                    // What is declared by now must be compiled on top of it, at once.
                    self.retry_at = Some(now);
                    return Ok(Stored::NotYet(ONE_BY_ONE));
                }
                Ok(stored)
            }
            None if changed => self.append(Catalog { nonce: catalog_log::nonce(), ..next }, now).await,
            None => Ok(Stored::Already),
        }
    }

    async fn append(&mut self, next: Catalog, now: Instant) -> Result<Stored, StepDown> {
        match in_time(CatalogLog::append(self.home.as_ref(), &self.catalog, &next, &self.writer)).await {
            Ok(Appended::Ours) => {
                tracing::info!(version = next.version, tables = next.tables.len(), "appended a catalog version");
                self.catalog = next;
                self.backoff.succeeded();
                Ok(Stored::Now)
            }
            Ok(Appended::Foreign { version, writer }) => Err(StepDown::Lost { version, writer }),
            Err(NoAnswer::Failed(error @ LogError::OtherHistory { .. })) => Err(StepDown::OtherHistory(error)),
            Err(error) => {
                let pause = self.backoff.failed();
                let (version, retry_secs) = (next.version, pause.as_secs());
                tracing::error!(version, error = %error, retry_secs, "cannot append a catalog version");
                self.metrics.failed(Failure::LogAppend);
                self.retry_at = Some(now + pause);
                self.unresolved = Some(next);
                Ok(Stored::NotYet(NOT_TAKEN))
            }
        }
    }

    /// Looks whether anybody else has appended. Two operators that agree append nothing, and would yet undo one
    /// another's statuses for ever.
    ///
    /// # Errors
    /// When another operator leads, or the log is another one.
    pub async fn make_sure_that_we_lead(&self) -> Result<(), StepDown> {
        match in_time(CatalogLog::next(self.home.as_ref(), &self.catalog)).await {
            Ok(None) => Ok(()),
            Ok(Some(found)) => Err(StepDown::Behind { found: found.version, known: self.catalog.version }),
            Err(NoAnswer::Failed(error @ LogError::OtherHistory { .. })) => Err(StepDown::OtherHistory(error)),
            Err(error) => {
                // Nobody else can append either, and a status that names the trouble is worth having.
                tracing::warn!(error = %error, "cannot read the catalog log; reporting what is known");
                self.metrics.failed(Failure::LogRead);
                Ok(())
            }
        }
    }

    /// Keeps the log short, now and then; a failure only leaves it longer.
    pub async fn trim(&mut self) {
        if self.catalog.version < self.trimmed_at + SNAPSHOT_EVERY {
            return;
        }
        self.trimmed_at = self.catalog.version;
        let keep_from = self.catalog.version.saturating_sub(ENTRIES_KEPT);
        match in_time(CatalogLog::trim(self.home.as_ref(), keep_from)).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, keep_from, "trimmed the catalog log"),
            Err(error) => tracing::warn!(error = %error, "cannot trim the catalog log"),
        }
    }
}

async fn in_time<T>(call: impl Future<Output = Result<T, LogError>>) -> Result<T, NoAnswer> {
    match tokio::time::timeout(TIMEOUT, call).await {
        Ok(answer) => answer.map_err(NoAnswer::Failed),
        Err(_) => Err(NoAnswer::Late),
    }
}

#[cfg(test)]
mod tests {
    use kalamdb_model::{OnRemoval, compile};
    use kalamdb_table_store::paths;
    use kalamdb_test_support::fault_store::FaultStore;
    use object_store::ObjectStoreExt as _;
    use object_store::memory::InMemory;

    use super::*;
    use crate::status::tests::Fixture;

    async fn log(store: &FaultStore, writer: &str) -> Log {
        Log::load(Arc::new(store.clone()), writer.to_owned(), Arc::default()).await
    }

    /// What the fixture's objects compile to, on top of what the log has; without tables if `empty`.
    fn next(log: &Log, tables: bool) -> Catalog {
        let objects = Fixture::new().objects;
        let all = objects.iter().filter(|seen| tables || !seen.object().name.contains('.'));
        let declared: Vec<_> = all.map(|seen| seen.declared.clone()).collect();
        compile(log.catalog(), &declared, OnRemoval::FollowPolicy).0
    }

    fn store() -> FaultStore {
        FaultStore::healthy(Arc::new(InMemory::new()))
    }

    #[tokio::test]
    async fn only_a_change_is_appended() {
        let store = store();
        let mut log = log(&store, "a").await;
        assert_eq!(log.bring_to(next(&log, true), Instant::now()).await.unwrap(), Stored::Now);
        let puts = store.puts();
        assert_eq!(log.bring_to(next(&log, true), Instant::now()).await.unwrap(), Stored::Already);
        assert_eq!((store.puts(), log.catalog().version), (puts, 1));
        log.make_sure_that_we_lead().await.unwrap();
    }

    #[tokio::test]
    async fn an_append_of_unknown_fate_is_repeated_before_anything_else() {
        let (store, now) = (store(), Instant::now());
        let mut log = log(&store, "a").await;
        store.set_down(true);
        assert_eq!(log.bring_to(next(&log, false), now).await.unwrap(), Stored::NotYet(NOT_TAKEN));
        assert_eq!((log.catalog().version, log.retry_at()), (0, Some(now + FIRST)));
        store.set_down(false);
        let puts = store.puts();
        assert_eq!(log.bring_to(next(&log, true), now).await.unwrap(), Stored::NotYet(NOT_TAKEN));
        assert_eq!(store.puts(), puts, "it waits");
        let later = now + FIRST;
        assert_eq!(log.bring_to(next(&log, true), later).await.unwrap(), Stored::NotYet(ONE_BY_ONE));
        assert!(log.catalog().version == 1 && log.catalog().tables.is_empty());
        assert_eq!(log.bring_to(next(&log, true), later).await.unwrap(), Stored::Now);
        assert!(log.catalog().version == 2 && log.catalog().tables.len() == 1);
        assert_eq!(log.retry_at(), None);
    }

    #[tokio::test]
    async fn of_two_operators_one_steps_down() {
        let store = store();
        let (mut one, mut two) = (log(&store, "one").await, log(&store, "two").await);
        one.bring_to(next(&one, true), Instant::now()).await.unwrap();
        let behind = two.make_sure_that_we_lead().await.unwrap_err();
        assert!(matches!(behind, StepDown::Behind { found: 1, known: 0 }), "{behind}");
        let lost = two.bring_to(next(&two, true), Instant::now()).await.unwrap_err();
        assert!(matches!(&lost, StepDown::Lost { version: 1, writer } if writer == "one"), "{lost}");
    }

    #[tokio::test]
    async fn on_a_log_of_another_history_nothing_is_appended() {
        let store = store();
        let mut log = log(&store, "a").await;
        log.bring_to(next(&log, false), Instant::now()).await.unwrap();
        // Restored to a state before that version; then with another operator's under its number.
        store.delete(&paths::catalog_entry(1)).await.unwrap();
        for restored in [0, 1] {
            if restored == 1 {
                let mut other = self::log(&store, "b").await;
                other.bring_to(next(&other, false), Instant::now()).await.unwrap();
            }
            let puts = store.puts();
            let refused = log.bring_to(next(&log, true), Instant::now()).await.unwrap_err();
            assert!(matches!(refused, StepDown::OtherHistory(_)), "{refused}");
            assert_eq!(store.puts(), puts);
        }
    }

    #[tokio::test]
    async fn a_store_that_is_down_at_the_start_is_waited_for() {
        let store = store();
        store.set_down(true);
        let metrics = Arc::new(Metrics::default());
        let loading = tokio::spawn(Log::load(Arc::new(store.clone()), "a".to_owned(), Arc::clone(&metrics)));
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!loading.is_finished() && metrics.text().contains(r#"failures_total{what="LogRead"}"#));
        store.set_down(false);
        assert_eq!(loading.await.unwrap().catalog().version, 0);
    }
}
