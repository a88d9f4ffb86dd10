//! Decides when an instance is flushed: by rows, by age, by request, and the largest first when all of them take much room;
//! never one by waiting behind another's failure.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kalamdb_model::{InstanceId, TableEntry};
use kalamdb_write_buffer::{Applied, Counters};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

use super::ship::Backoff;
use super::{Engine, RootKey, now_us};
use crate::catalog::Snapshot;
use crate::error::Chain;

/// How often every dirty instance is looked at: a flush by rows starts within this, one by age too. Waking at each
/// commit instead would walk all of them thousands of times a second.
const TICK: Duration = Duration::from_millis(100);

/// Instances with unflushed rows.
#[derive(Default)]
pub(super) struct Schedule {
    dirty: Mutex<HashMap<InstanceId, Dirty>>,
    /// Of all of them.
    bytes: AtomicU64,
    /// Of those whose table is in no catalog any more.
    gone_bytes: AtomicU64,
    /// Of those in each storage, as of the last look, and what was taken in since then.
    of_roots: Mutex<HashMap<RootKey, u64>>,
    wake: Notify,
}

struct Dirty {
    /// Where its rows go, once that was looked up. It changes only while there are none.
    root: Option<RootKey>,
    rows: u64,
    /// Of the rows that the next flush takes, and of those that one under way has taken.
    bytes: u64,
    frozen_bytes: u64,
    oldest_us: i64,
    urgent: bool,
    flushing: bool,
    not_before: Option<Instant>,
    backoff: Backoff,
}

impl Dirty {
    fn new() -> Self {
        Self {
            root: None,
            rows: 0,
            bytes: 0,
            frozen_bytes: 0,
            oldest_us: 0,
            urgent: false,
            flushing: false,
            not_before: None,
            backoff: Backoff::default(),
        }
    }
}

impl Schedule {
    /// Takes note of a round of the committer.
    pub(super) fn applied(&self, applied: &[Applied]) {
        let mut dirty = self.dirty.lock();
        for round in applied {
            let entry = dirty.entry(round.instance.clone()).or_insert_with(Dirty::new);
            (entry.rows, entry.oldest_us) = (round.rows, round.oldest_us);
            self.count(entry, round.bytes, round.frozen_bytes);
        }
    }

    /// Sets the bytes of an instance, and so those of all.
    fn count(&self, entry: &mut Dirty, bytes: u64, frozen_bytes: u64) {
        self.bytes.fetch_add(bytes + frozen_bytes, Ordering::AcqRel);
        self.bytes.fetch_sub(entry.bytes + entry.frozen_bytes, Ordering::AcqRel);
        (entry.bytes, entry.frozen_bytes) = (bytes, frozen_bytes);
    }

    /// Bytes of all unflushed rows, but those of tables that are gone: nothing flushes these.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire).saturating_sub(self.gone_bytes.load(Ordering::Acquire))
    }

    /// Bytes of the unflushed rows that go to `root`.
    pub(super) fn bytes_of(&self, root: &RootKey) -> u64 {
        self.of_roots.lock().get(root).copied().unwrap_or(0)
    }

    /// Takes note of rows for `root` that are about to come.
    pub(super) fn note_coming(&self, root: &RootKey, bytes: u64) {
        *self.of_roots.lock().entry(root.clone()).or_default() += bytes;
    }

    /// Instances that have any.
    pub(super) fn len(&self) -> usize {
        self.dirty.lock().len()
    }

    /// Takes note of rows from before a restart. What a flush had frozen goes at once.
    pub(super) fn found(&self, id: &InstanceId, counters: &Counters) {
        let mut entry = Dirty::new();
        (entry.rows, entry.oldest_us) = (counters.rows, counters.oldest_us);
        entry.urgent = counters.has_frozen();
        self.count(&mut entry, counters.bytes, counters.frozen_bytes);
        self.dirty.lock().insert(id.clone(), entry);
    }

    /// Flush soon, whatever the policy says.
    pub(super) fn urge(&self, id: &InstanceId) {
        if let Some(entry) = self.dirty.lock().get_mut(id) {
            entry.urgent = true;
        }
        self.wake.notify_one();
    }

    /// Instances of which `matches` holds.
    pub(super) fn dirty(&self, matches: impl Fn(&InstanceId) -> bool) -> Vec<InstanceId> {
        self.dirty.lock().keys().filter(|id| matches(id)).cloned().collect()
    }

    /// Sums up what goes to each storage.
    fn count_roots(&self, engine: &Engine, snapshot: &Snapshot, dirty: &mut HashMap<InstanceId, Dirty>) {
        let mut of_roots: HashMap<RootKey, u64> = HashMap::new();
        for (id, entry) in dirty.iter_mut() {
            if entry.root.is_none() {
                entry.root = snapshot.table_by_id(id.table).and_then(|table| engine.root_of(id, table));
            }
            if let Some(root) = &entry.root {
                match of_roots.get_mut(root) {
                    Some(all) => *all += entry.bytes + entry.frozen_bytes,
                    None => _ = of_roots.insert(root.clone(), entry.bytes + entry.frozen_bytes),
                }
            }
        }
        *self.of_roots.lock() = of_roots;
    }

    fn take_due(&self, engine: &Engine) -> Vec<InstanceId> {
        let snapshot = engine.catalog.current();
        let (now, clock) = (Instant::now(), now_us());
        let mut due = Vec::new();
        let mut dirty = self.dirty.lock();
        self.count_roots(engine, &snapshot, &mut dirty);
        for (id, entry) in dirty.iter_mut() {
            if entry.flushing || entry.not_before.is_some_and(|time| now < time) {
                continue;
            }
            let Some(table) = snapshot.table_by_id(id.table) else { continue };
            // A clock that stepped back tells no age: better a flush too early than hours too late.
            let age = u64::try_from(clock.saturating_sub(entry.oldest_us)).map_or(Duration::MAX, Duration::from_micros);
            if entry.urgent || table.flush_policy.is_due(entry.rows, age) {
                entry.flushing = true;
                due.push(id.clone());
            }
        }
        let sum = |of: &dyn Fn(&InstanceId, &Dirty) -> bool| -> u64 {
            dirty.iter().filter(|(id, entry)| of(id, entry)).map(|(_, it)| it.bytes + it.frozen_bytes).sum()
        };
        self.gone_bytes.store(sum(&|id, _| snapshot.table_by_id(id.table).is_none()), Ordering::Release);
        // What is on its way into files makes room without further ado, and what has to wait for its storage makes none.
        let waits = |entry: &Dirty| entry.flushing || entry.not_before.is_some_and(|time| now < time);
        let going = sum(&|id, entry| snapshot.table_by_id(id.table).is_some() && waits(entry));
        // Before one storage has the half at which its rows are refused.
        let enough = engine.limits.buffered_bytes_max / 4;
        let mut too_much = self.bytes().saturating_sub(going).saturating_sub(enough);
        if too_much > 0 {
            let mut others: Vec<_> = dirty.iter_mut().filter(|(_, entry)| !waits(entry)).collect();
            others.sort_unstable_by_key(|(_, entry)| std::cmp::Reverse(entry.bytes));
            for (id, entry) in others {
                if too_much == 0 || snapshot.table_by_id(id.table).is_none() {
                    continue;
                }
                entry.flushing = true;
                too_much = too_much.saturating_sub(entry.bytes);
                due.push(id.clone());
            }
        }
        due
    }

    /// Takes note of the end of a flush. What is left is read under the schedule's lock: rows that came meanwhile are
    /// seen here, or by [`Schedule::applied`] after us.
    pub(super) fn done(&self, engine: &Engine, id: &InstanceId, succeeded: bool) {
        let mut dirty = self.dirty.lock();
        let Some(entry) = dirty.get_mut(id) else { return };
        entry.flushing = false;
        match succeeded.then(|| engine.buffer.counters(id).ok()).flatten() {
            Some(counters) if counters.rows == 0 && !counters.has_frozen() => {
                self.count(entry, 0, 0);
                dirty.remove(id);
            }
            Some(counters) => {
                self.count(entry, counters.bytes, counters.frozen_bytes);
                (entry.rows, entry.oldest_us) = (counters.rows, counters.oldest_us);
                entry.urgent = counters.has_frozen();
                entry.backoff = Backoff::default();
            }
            // The round that froze the rows has set `rows` to 0: without the urgency nothing would be due again.
            None => {
                entry.urgent = true;
                entry.not_before = Some(Instant::now() + entry.backoff.next());
            }
        }
    }
}

/// Starts due flushes until the engine stops, or its data is another's.
pub(super) async fn run(engine: Arc<Engine>) {
    let mut slots: HashMap<RootKey, Arc<Semaphore>> = HashMap::new();
    loop {
        tokio::select! {
            () = engine.stop.cancelled() => return,
            () = engine.schedule.wake.notified() => {}
            () = tokio::time::sleep(TICK) => {}
        }
        if engine.disowned().is_some() {
            return;
        }
        for id in engine.schedule.take_due(&engine) {
            let Some(table) = engine.catalog.current().table_by_id(id.table).cloned() else { continue };
            let loaded = engine.instances.get(&id);
            let root = loaded.map_or_else(|_| RootKey::of(&table.location), |instance| instance.root(&table));
            let slot =
                Arc::clone(slots.entry(root).or_insert_with(|| Arc::new(Semaphore::new(engine.limits.flushes_max))));
            engine.spawn(flush_one(Arc::clone(&engine), id, slot));
        }
    }
}

async fn flush_one(engine: Arc<Engine>, id: InstanceId, slot: Arc<Semaphore>) {
    let Ok(slot) = slot.acquire_owned().await else { return };
    if engine.stop.is_cancelled() {
        return;
    }
    let outcome = engine.flush(&id).await;
    if let Err(error) = &outcome {
        engine.metrics.flush_failures.inc();
        tracing::warn!(table = id.table.0, error = %Chain(error), "a flush failed; its rows stay buffered, and it is tried again");
    }
    engine.schedule.done(&engine, &id, outcome.is_ok());
    drop(slot);
    if outcome.is_ok() {
        engine.compact_soon(&id);
        engine.describe(&id, false).await;
    }
}

impl Engine {
    /// Where the rows of `id` go, without loading it if they can only go where its table's do. `None` if it does not load.
    fn root_of(&self, id: &InstanceId, table: &TableEntry) -> Option<RootKey> {
        if self.moves.may_be_elsewhere(id) {
            return self.instances.get(id).ok().map(|instance| instance.root(table));
        }
        Some(RootKey::of(&table.location))
    }

    /// Flushes the instances of which `matches` holds, all that are dirty now, and returns how many rows went into files.
    ///
    /// # Errors
    /// The first failure, after every instance was tried; or that it takes too long, and then it goes on.
    pub async fn flush_matching(
        self: &Arc<Self>,
        matches: impl Fn(&InstanceId) -> bool,
    ) -> Result<u64, super::FlushError> {
        let wanted: HashSet<InstanceId> = self.schedule.dirty(matches).into_iter().collect();
        let mut flushes = tokio::task::JoinSet::new();
        let slots = Arc::new(Semaphore::new(self.limits.flushes_max));
        for id in wanted {
            let (engine, slots) = (Arc::clone(self), Arc::clone(&slots));
            flushes.spawn(async move {
                let _slot = slots.acquire().await;
                let outcome = engine.flush(&id).await;
                if outcome.is_ok() {
                    engine.schedule.done(&engine, &id, true);
                    engine.describe(&id, true).await;
                    engine.compact_soon(&id);
                } else {
                    // What it has frozen is counted by no policy any more.
                    engine.schedule.urge(&id);
                }
                outcome
            });
        }
        let (mut rows, mut failure) = (0, None);
        let deadline = tokio::time::Instant::now() + super::flush::WAIT;
        loop {
            let Ok(joined) = tokio::time::timeout_at(deadline, flushes.join_next()).await else {
                // What is under way goes on: stopped between two steps, it would leave work to a restart.
                flushes.detach_all();
                return Err(super::FlushError::Waiting);
            };
            match joined {
                Some(joined) => match joined.map_err(super::FlushError::from).and_then(|outcome| outcome) {
                    Ok(flushed) => rows += flushed.rows,
                    Err(error) => failure = failure.or(Some(error)),
                },
                None => break,
            }
        }
        failure.map_or(Ok(rows), Err)
    }
}
