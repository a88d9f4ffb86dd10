//! The loop: what there is → compile → append to the catalog log → status.
//!
//! Owns: the order of these steps, and when a pass runs. Does not own: what is decided
//! ([`kalamdb_model::compile()`], [`crate::status`], [`crate::usage`]) or how it is written ([`crate::cluster`],
//! [`crate::log`]).
//!
//! A pass takes no input but the state of the world, so it may end between any two lines and run again. It runs when
//! something has changed, when something that failed may be tried again, and every 10 minutes. It never runs before all
//! kinds were listed and the log was read: what it has not seen would count as deleted.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use k8s_openapi::jiff::Timestamp;
use kalamdb_model::declared::{Declared, Kind, ObjectRef, Spec};
use kalamdb_model::{OnRemoval, Outcome, compile};
use object_store::ObjectStore;
use tokio::sync::watch;

use crate::backoff::Backoffs;
use crate::cluster::{CallError, Cluster, chain};
use crate::log::{Log, StepDown, Stored};
use crate::metrics::{Failure, Metrics};
use crate::serve::Waiting;
use crate::status::{self, Desired, News, Standing, View};
use crate::storages::Storages;
use crate::usage::Usage;
use crate::watch::{Objects, Seen};

/// A pass waits until nothing has changed for this long: one `kubectl apply` of a folder is one catalog version.
const QUIET: Duration = Duration::from_millis(200);
/// But not longer than this.
const QUIET_LONGEST: Duration = Duration::from_secs(1);
/// A pass runs at least this often.
const RESYNC: Duration = Duration::from_secs(600);
/// A pass that is under way when the operator is to stop may go on for this long.
const PASS_GRACE: Duration = Duration::from_secs(8);
/// Writes to the API server at the same time.
const WRITES_MAX: usize = 8;

/// What a pass works with.
pub struct Parts {
    /// What there is.
    pub objects: Arc<Objects>,
    /// The home store.
    pub home: Arc<dyn ObjectStore>,
    /// The API server.
    pub cluster: Cluster,
    /// Who can be reached.
    pub storages: Storages,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Our name in the log: another one for each process start.
    pub writer: String,
}

/// Compiles until `stop` is true.
///
/// # Errors
/// When another operator leads.
pub async fn run(
    parts: Parts,
    waiting: watch::Sender<Waiting>,
    mut stop: watch::Receiver<bool>,
) -> Result<(), StepDown> {
    let log = tokio::select! {
        log = begin(&parts, &waiting) => log,
        () = stopped(&mut stop) => return Ok(()),
    };
    waiting.send_replace(None);
    let mut passes = Passes::new(parts, log);
    let mut ending = stop.clone();
    loop {
        // A pass that is cut off is as one that crashed: the next start makes things right.
        let grace = async {
            stopped(&mut ending).await;
            tokio::time::sleep(PASS_GRACE).await;
        };
        tokio::select! {
            done = passes.pass() => done?,
            () = grace => break,
        }
        tokio::select! {
            () = passes.wait() => {}
            () = stopped(&mut stop) => break,
        }
    }
    Ok(())
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // Without a sender nobody wants us to go on either.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Waits for all lists and the log.
async fn begin(parts: &Parts, waiting: &watch::Sender<Waiting>) -> Log {
    let mut changes = parts.objects.changes();
    loop {
        let unlisted: Vec<&str> = parts.objects.unlisted().into_iter().map(Kind::as_str).collect();
        if unlisted.is_empty() {
            break;
        }
        waiting.send_replace(Some(format!("the first list of {}", unlisted.join(", "))));
        let _ = changes.changed().await;
    }
    waiting.send_replace(Some("the catalog log in the home store".to_owned()));
    Log::load(Arc::clone(&parts.home), parts.writer.clone(), Arc::clone(&parts.metrics)).await
}

struct Passes {
    parts: Parts,
    log: Log,
    backoffs: Backoffs,
    object_changes: watch::Receiver<u64>,
    storage_changes: watch::Receiver<u64>,
}

/// A status that differs, with what it was decided on.
struct Write {
    seen: Arc<Seen>,
    desired: Desired,
}

impl Passes {
    fn new(parts: Parts, log: Log) -> Self {
        let (object_changes, storage_changes) = (parts.objects.changes(), parts.storages.changes());
        Self { parts, log, backoffs: Backoffs::default(), object_changes, storage_changes }
    }

    /// Until the next pass is due.
    async fn wait(&mut self) {
        let retry = [self.log.retry_at(), self.backoffs.next()].into_iter().flatten().min();
        let resync = Instant::now() + RESYNC;
        let until = retry.map_or(resync, |retry| retry.min(resync));
        tokio::select! {
            _ = self.object_changes.changed() => {}
            _ = self.storage_changes.changed() => {}
            () = tokio::time::sleep_until(until.into()) => return,
        }
        let longest = tokio::time::Instant::now() + QUIET_LONGEST;
        while tokio::time::Instant::now() < longest
            && tokio::time::timeout(QUIET, self.object_changes.changed()).await.is_ok()
        {}
    }

    async fn pass(&mut self) -> Result<(), StepDown> {
        let started = Instant::now();
        self.object_changes.mark_unchanged();
        self.storage_changes.mark_unchanged();
        let seen = self.parts.objects.all();
        let uids: HashSet<&str> = seen.iter().map(|seen| seen.object().uid.as_str()).collect();
        self.backoffs.keep(|uid| uids.contains(uid));

        let declared: Vec<Declared> = seen.iter().map(|seen| seen.declared.clone()).collect();
        // Thousands of tables take a while; /livez must not wait for them on a machine with one core.
        let compiled = || compile(self.log.catalog(), &declared, OnRemoval::FollowPolicy);
        let (next, outcomes) = tokio::task::block_in_place(compiled);
        let stored = self.log.bring_to(next, Instant::now()).await?;
        let usage = Usage::of(self.log.catalog());
        let writes = self.decide(&seen, outcomes, &usage, stored);
        if !writes.is_empty() && stored == Stored::Already {
            self.log.make_sure_that_we_lead().await?;
        }
        self.write(writes).await;
        self.backoffs.forget_untried(started);
        self.log.trim().await;
        self.parts.metrics.catalog_version.set(i64::try_from(self.log.catalog().version).unwrap_or(i64::MAX));
        self.parts.metrics.pass_seconds.observe(started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Notes what became of a write.
    fn was_written(&mut self, before: &Seen, answer: Result<Seen, CallError>) -> bool {
        let object = before.object();
        match answer {
            Ok(after) => {
                self.parts.objects.take_written(object, &Arc::new(after));
                self.backoffs.succeeded(&object.uid);
                true
            }
            Err(error) => {
                if error.is_stale() {
                    tracing::debug!(kind = object.kind.as_str(), name = %object.name, "an object has changed meanwhile");
                } else {
                    let kind = object.kind.as_str();
                    tracing::warn!(kind, name = %object.name, error = %chain(&error), "cannot write to an object");
                    self.parts.metrics.failed(Failure::Status);
                }
                self.backoffs.failed(&object.uid, Instant::now());
                false
            }
        }
    }

    /// What became of each object, and the statuses that differ from it.
    fn decide(&self, seen: &[Arc<Seen>], outcomes: Vec<Outcome>, usage: &Usage, stored: Stored) -> Vec<Write> {
        let view = View::new(self.log.catalog(), usage);
        let mut outcomes: HashMap<(Kind, String), Outcome> =
            outcomes.into_iter().map(|it| ((it.object.kind, it.object.name.clone()), it)).collect();
        let now = Timestamp::now();
        let decided = seen.iter().filter_map(|seen| {
            let outcome = outcomes.remove(&(seen.object().kind, seen.object().name.clone()))?;
            let standing = standing(seen, outcome, &view, stored);
            let reach = match &seen.declared.spec {
                Ok(Spec::Storage(spec)) => {
                    Some(self.parts.storages.reach(&seen.object().name, &seen.object().uid, spec))
                }
                _ => None,
            };
            let desired = status::desired(seen, &standing, reach.as_ref(), &view, now);
            Some(Write { seen: Arc::clone(seen), desired })
        });
        let decided: Vec<Write> = decided.collect();
        self.parts.metrics.count_objects(decided.iter().map(|it| (it.seen.object().kind, it.desired.ready)));
        decided.into_iter().filter(|write| write.desired.patch.is_some()).collect()
    }

    async fn write(&mut self, writes: Vec<Write>) {
        let now = Instant::now();
        let due = writes.into_iter().filter(|write| self.backoffs.may_try(&write.seen.object().uid, now));
        let due: Vec<Write> = due.collect();
        let cluster = &self.parts.cluster;
        let calls: Vec<_> = due
            .iter()
            .filter_map(|write| {
                let patch = write.desired.patch.as_ref()?;
                Some(async move { (write, cluster.patch_status(write.seen.object(), patch).await) })
            })
            .collect();
        let answers: Vec<_> = futures::stream::iter(calls).buffer_unordered(WRITES_MAX).collect().await;
        let mut news = Vec::new();
        for (write, answer) in answers {
            if self.was_written(&write.seen, answer) {
                self.parts.metrics.status_writes.inc();
                news.extend(write.desired.news.as_ref().map(|it| (write.seen.object(), it)));
            }
        }
        self.announce(news).await;
    }

    /// Events are for people who look; a pass is not worse for one that is missing.
    async fn announce(&self, news: Vec<(&ObjectRef, &News)>) {
        let calls: Vec<_> = news.into_iter().map(|(object, news)| self.publish(object, news)).collect();
        futures::stream::iter(calls).buffer_unordered(WRITES_MAX).collect::<()>().await;
    }

    async fn publish(&self, object: &ObjectRef, news: &News) {
        if let Err(error) = self.parts.cluster.publish(object, news).await {
            tracing::debug!(name = %object.name, error = %chain(&error), "cannot publish an event");
            self.parts.metrics.failed(Failure::Event);
        }
    }
}

/// What became of a declaration, from its outcome and from what could be done about it. Pure.
fn standing(seen: &Seen, outcome: Outcome, view: &View<'_>, stored: Stored) -> Standing {
    if let Err(refusal) = outcome.verdict {
        return Standing::Refused(refusal);
    }
    if !view.contains(seen.object()) {
        let why = if let Stored::NotYet(why) = stored { why } else { "the catalog does not have it yet" };
        return Standing::Pending(why.to_owned());
    }
    Standing::Accepted { warnings: status::warnings_of(seen, outcome.warnings) }
}

#[cfg(test)]
mod tests {
    use kalamdb_model::catalog::Catalog;
    use kalamdb_model::{Reason, Refusal};

    use super::*;
    use crate::status::tests::Fixture;

    fn of_table(fixture: &Fixture, verdict: Result<(), Refusal>, stored: Stored) -> Standing {
        let usage = Usage::of(&fixture.catalog);
        let seen = fixture.objects.iter().find(|seen| seen.object().kind == Kind::UserTable).unwrap();
        let outcome = Outcome { object: seen.object().clone(), verdict, warnings: Vec::new() };
        standing(seen, outcome, &View::new(&fixture.catalog, &usage), stored)
    }

    fn pending(standing: &Standing) -> &str {
        let Standing::Pending(why) = standing else { panic!("{standing:?}") };
        why
    }

    #[test]
    fn a_table_is_accepted_only_when_the_log_has_it() {
        let fixture = Fixture::new();
        assert_eq!(of_table(&fixture, Ok(()), Stored::Now), Standing::Accepted { warnings: Vec::new() });
        let empty = Fixture { catalog: Catalog::default(), ..fixture };
        let why = "the home store does not take the catalog";
        assert_eq!(pending(&of_table(&empty, Ok(()), Stored::NotYet(why))), why);
    }

    #[test]
    fn a_refusal_is_told_whatever_the_home_store_does() {
        let refusal = Refusal { reason: Reason::Conflict, message: "m".to_owned() };
        let standing = of_table(&Fixture::new(), Err(refusal.clone()), Stored::NotYet("down"));
        assert_eq!(standing, Standing::Refused(refusal));
    }
}
