//! The one thread that writes rows: drains the queue into rounds, each one `WriteBatch` and one fsync.
//!
//! Owns: which generation and `_seq` a row gets. Commit order = `_seq` order = the order of the queue; a freeze is an
//! item of the same queue, so a statement lies wholly before or after it.
//! Does not own: locks between statements, checks of values, who is told about a round ([`Options::on_applied`]).
//!
//! After a crash: a round was written whole or not at all, and is answered only after its fsync.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use kalamdb_model::{Generation, InstanceId};
use rocksdb::WriteBatch;
use tokio::sync::oneshot::Sender;

use crate::buffer::{Applied, Committed, EncodedRow, Fresh, Options, Stamps};
use crate::error::CommitError;
use crate::keys;
use crate::row::{self, Header};
use crate::state::Filling;
use crate::store::Store;

/// How long a measurement of the free space is trusted: 100 ms at 500 MB/s are 50 MB past the reserve.
const FREE_SPACE_TRUSTED: Duration = Duration::from_millis(100);

/// What the queue holds.
pub(crate) enum Item {
    Commit(Request),
    /// Rows that were stamped long ago; those that are not newer than what is here are passed over.
    Restore(Request),
    Freeze {
        instance: InstanceId,
        reply: Sender<Result<Option<Generation>, CommitError>>,
    },
}

/// One statement; its keys are whole row keys that lack only the generation, its values only what is stamped.
pub(crate) struct Request {
    pub(crate) instance: InstanceId,
    pub(crate) rows: Vec<EncodedRow>,
    /// What the rows have to get, if that was settled before.
    pub(crate) stamps: Option<Stamps>,
    pub(crate) bytes: usize,
    pub(crate) reply: Sender<Result<Committed, CommitError>>,
}

/// The thread's own.
pub(crate) struct Committer {
    pub(crate) store: Arc<Store>,
    pub(crate) options: Options,
    pub(crate) queue: Receiver<Item>,
    /// Bytes of rows in the queue.
    pub(crate) queued_bytes: Arc<AtomicUsize>,
    pub(crate) disk: Disk,
}

impl Committer {
    /// Works until the queue is closed and empty.
    pub(crate) fn run(mut self) {
        while let Ok(first) = self.queue.recv() {
            let items = self.collect(first);
            self.commit(items);
        }
    }

    /// Takes what is queued, up to the limits, without waiting for more: the fsync of this round is the time in which
    /// the next one gathers. A statement larger than the limits is a round of its own.
    fn collect(&self, first: Item) -> Vec<Item> {
        let (mut rows, mut bytes) = (0, 0);
        let mut items = Vec::new();
        let mut next = Some(first);
        while let Some(item) = next {
            if let Item::Commit(request) | Item::Restore(request) = &item {
                rows += request.rows.len();
                bytes += request.bytes;
                self.queued_bytes.fetch_sub(request.bytes, Ordering::Relaxed);
            }
            items.push(item);
            let full = rows >= self.options.round_ops_max || bytes >= self.options.round_bytes_max;
            next = if full { None } else { self.queue.try_recv().ok() };
        }
        items
    }

    fn commit(&mut self, items: Vec<Item>) {
        let refusal = self.disk.refusal(&self.options);
        let mut round = Round::new(&self.store, (self.options.clock)());
        let mut answers = Vec::with_capacity(items.len());
        for item in items {
            match item {
                Item::Commit(Request { instance, rows, stamps, reply, .. }) => {
                    // Stamped rows are stored elsewhere already: a full disk may not undo that.
                    let refusal = refusal.clone().filter(|_| stamps.is_none());
                    let added = refusal.map_or_else(|| round.add(&instance, rows, stamps), Err);
                    answers.push(Answer::Commit(reply, added));
                }
                Item::Restore(Request { instance, rows, reply, .. }) => {
                    answers.push(Answer::Commit(reply, round.restore(&instance, rows)));
                }
                // A freeze is taken on a full disk: flushing is what frees space.
                Item::Freeze { instance, reply } => answers.push(Answer::Freeze(reply, round.freeze(&instance))),
            }
        }
        let written = round.write();
        if let Ok(applied) = &written
            && !applied.is_empty()
        {
            self.tell(applied);
        }
        let failure = written.err();
        for answer in answers {
            answer.send(failure.as_ref());
        }
    }

    /// A panic of the listener must not end all writing.
    fn tell(&self, applied: &[Applied]) {
        if catch_unwind(AssertUnwindSafe(|| (self.options.on_applied)(applied))).is_err() {
            tracing::error!("the listener to applied rounds panicked");
        }
    }
}

enum Answer {
    Commit(Sender<Result<Committed, CommitError>>, Result<Committed, CommitError>),
    Freeze(Sender<Result<Option<Generation>, CommitError>>, Result<Option<Generation>, CommitError>),
}

impl Answer {
    /// `failure` of the whole round goes before what was meant to be answered. Nobody may be waiting any more: a
    /// statement whose caller went away is committed all the same.
    fn send(self, failure: Option<&CommitError>) {
        match self {
            Self::Commit(reply, answer) => drop(reply.send(answer.and_then(|ok| or(ok, failure)))),
            Self::Freeze(reply, answer) => drop(reply.send(answer.and_then(|ok| or(ok, failure)))),
        }
    }
}

fn or<T>(ok: T, failure: Option<&CommitError>) -> Result<T, CommitError> {
    failure.map_or(Ok(ok), |failure| Err(failure.clone()))
}

/// One round in the making. Nothing is visible to others before [`Round::write`] has succeeded.
struct Round<'a> {
    store: &'a Store,
    now_us: i64,
    batch: WriteBatch,
    work: HashMap<InstanceId, Work>,
    /// Bytes of the rows of this round by key, for rows that it writes twice.
    written: HashMap<Vec<u8>, usize>,
    /// `_seq` of the rows that this round restores, by key.
    restored: HashMap<Vec<u8>, i64>,
}

/// What the round does to one instance.
struct Work {
    /// The active generation when the round began; those below are none of its business.
    base: Generation,
    /// Whether `base` held rows then: if not, no key needs to be looked up.
    base_has_rows: bool,
    active: Generation,
    seq: i64,
    /// Generations from `base` on that hold rows, ascending.
    fillings: Vec<Filling>,
}

impl Work {
    fn active_filling(&mut self) -> &mut Filling {
        if self.fillings.last().is_none_or(|filling| filling.generation != self.active) {
            self.fillings.push(Filling::new(self.active));
        }
        self.fillings.last_mut().expect("pushed above")
    }
}

impl<'a> Round<'a> {
    fn new(store: &'a Store, now_us: i64) -> Self {
        Self {
            store,
            now_us,
            batch: WriteBatch::default(),
            work: HashMap::new(),
            written: HashMap::new(),
            restored: HashMap::new(),
        }
    }

    fn work(&mut self, instance: &InstanceId) -> Result<&mut Work, CommitError> {
        if !self.work.contains_key(instance) {
            let state = self.store.pin(instance).map_err(|source| CommitError::Read { source })?;
            let base = state.active_filling();
            let work = Work {
                base: state.active,
                base_has_rows: base.rows > 0,
                active: state.active,
                seq: state.used_seq,
                fillings: if base.rows > 0 { vec![base] } else { Vec::new() },
            };
            self.work.insert(instance.clone(), work);
        }
        Ok(self.work.get_mut(instance).expect("inserted above"))
    }

    /// Adds a statement, whole or not at all.
    fn add(
        &mut self,
        instance: &InstanceId,
        mut rows: Vec<EncodedRow>,
        stamps: Option<Stamps>,
    ) -> Result<Committed, CommitError> {
        let now_us = self.now_us;
        let work = self.work(instance)?;
        let next = work.seq.checked_add(1).ok_or(CommitError::Exhausted)?;
        let Stamps { first_seq: first, updated_us } =
            stamps.unwrap_or(Stamps { first_seq: next.max(now_us), updated_us: now_us });
        if first < next {
            return Err(CommitError::Order { first_seq: first, next_seq: next });
        }
        let more = i64::try_from(rows.len()).map_err(|_| CommitError::Exhausted)? - 1;
        let last = first.checked_add(more).ok_or(CommitError::Exhausted)?;
        let generation = work.active;
        let offset = keys::generation_offset(instance);
        for (index, (EncodedRow { key, value, fresh }, seq)) in rows.iter_mut().zip(first..).enumerate() {
            keys::stamp(key, offset, generation);
            row::stamp(value, seq, updated_us).map_err(|source| CommitError::Row { index, source })?;
            if *fresh == Fresh::Yes || *fresh == Fresh::In(generation) {
                row::mark_fresh(value);
            }
        }
        self.put(instance, rows, last, updated_us)?;
        Ok(Committed { generation, first_seq: first, last_seq: last, updated_us })
    }

    /// Adds stamped rows, but those of which the buffer has this or a newer version.
    fn restore(&mut self, instance: &InstanceId, rows: Vec<EncodedRow>) -> Result<Committed, CommitError> {
        let offset = keys::generation_offset(instance);
        let work = self.work(instance)?;
        let generation = work.active;
        let (mut newer, mut last, mut oldest_us) = (Vec::with_capacity(rows.len()), work.seq, i64::MAX);
        for (index, mut row) in rows.into_iter().enumerate() {
            let header = Header::parse(&row.value).map_err(|source| CommitError::Row { index, source })?;
            let pk = row.key.get(offset + keys::GENERATION_BYTES..).unwrap_or_default();
            let stored = self.store.newest_seq(instance, pk).map_err(|source| CommitError::Read { source })?;
            keys::stamp(&mut row.key, offset, generation);
            let here = self.restored.get(&row.key).copied().max(stored);
            // What this round writes anew is newer than anything restored.
            let added = self.written.contains_key(&row.key) && !self.restored.contains_key(&row.key);
            if !added && here.is_none_or(|here| here < header.seq) {
                self.restored.insert(row.key.clone(), header.seq);
                (last, oldest_us) = (last.max(header.seq), oldest_us.min(header.updated_us));
                newer.push(row);
            }
        }
        self.put(instance, newer, last, oldest_us)?;
        Ok(Committed { generation, first_seq: last, last_seq: last, updated_us: oldest_us })
    }

    /// Puts stamped rows; nothing is changed on an error.
    fn put(
        &mut self,
        instance: &InstanceId,
        rows: Vec<EncodedRow>,
        last: i64,
        oldest_us: i64,
    ) -> Result<(), CommitError> {
        let work = self.work(instance)?;
        let look_up = work.base_has_rows && work.active == work.base;
        let replaced = if look_up { self.stored_bytes(&rows)? } else { vec![None; rows.len()] };
        // From here on nothing fails.
        for (EncodedRow { key, value, .. }, stored) in rows.into_iter().zip(replaced) {
            let bytes = key.len() + value.len();
            self.store.put_row(&mut self.batch, &key, &value);
            let before = self.written.insert(key, bytes).or(stored);
            let work = self.work.get_mut(instance).expect("made above");
            work.active_filling().add(bytes, before, oldest_us);
            work.seq = last;
        }
        Ok(())
    }

    /// Bytes of key and value of each row that is stored already. Whoever calls a row fresh has looked.
    fn stored_bytes(&self, rows: &[EncodedRow]) -> Result<Vec<Option<usize>>, CommitError> {
        let stored = |row: &EncodedRow| {
            if row.fresh == Fresh::Yes {
                debug_assert!(matches!(self.store.row_bytes(&row.key), Ok(None)), "a fresh row is stored already");
                return Ok(None);
            }
            let value = self.store.row_bytes(&row.key).map_err(|source| CommitError::Read { source })?;
            Ok(value.map(|value| value + row.key.len()))
        };
        rows.iter().map(stored).collect()
    }

    fn freeze(&mut self, instance: &InstanceId) -> Result<Option<Generation>, CommitError> {
        let (store, work) = (self.store, self.work(instance)?);
        // Asked now, not when the round began: a publication in between must not be handed out again.
        let flushed = store.states.of(instance).get(instance).map_or(Generation(0), |state| state.flushed);
        let lowest = Generation(flushed.0.checked_add(1).ok_or(CommitError::Exhausted)?);
        if lowest < work.active {
            return Ok(Some(lowest));
        }
        if work.fillings.last().is_none_or(|filling| filling.generation != work.active) {
            return Ok(None);
        }
        let frozen = work.active;
        work.active = Generation(frozen.0.checked_add(1).ok_or(CommitError::Exhausted)?);
        let (active, seq) = (work.active, work.seq);
        self.store.put_progress(&mut self.batch, instance, active, seq);
        Ok(Some(frozen))
    }

    /// Writes, syncs and applies; on an error nothing is applied.
    fn write(mut self) -> Result<Vec<Applied>, CommitError> {
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() {
            self.abandon();
            return Ok(Vec::new());
        }
        if let Err(source) = self.store.write(batch) {
            tracing::error!(error = %source, "failed to write a round of commits");
            self.abandon();
            return Err(CommitError::Write { source });
        }
        Ok(self.apply())
    }

    fn apply(self) -> Vec<Applied> {
        let mut applied = Vec::with_capacity(self.work.len());
        for (instance, work) in self.work {
            self.store.unpin(&instance, |state| {
                state.fillings.retain(|filling| filling.generation < work.base);
                state.fillings.extend(work.fillings);
                state.active = work.active;
                state.last_seq = work.seq;
                state.used_seq = work.seq;
                let Filling { rows, bytes, oldest_us, .. } = state.active_filling();
                let frozen_bytes = state.frozen_bytes();
                applied.push(Applied { instance: instance.clone(), rows, bytes, frozen_bytes, oldest_us });
            });
        }
        applied
    }

    /// Leaves everything as it was, but never gives a number twice: the rows may yet be in the log.
    fn abandon(self) {
        for (instance, work) in self.work {
            self.store.unpin(&instance, |state| state.used_seq = work.seq);
        }
    }
}

/// Watches the free space.
pub(crate) struct Disk {
    directory: PathBuf,
    measured: Option<(Instant, u64)>,
}

impl Disk {
    pub(crate) const fn new(directory: PathBuf) -> Self {
        Self { directory, measured: None }
    }

    /// Why no rows are taken now.
    fn refusal(&mut self, options: &Options) -> Option<CommitError> {
        let reserve = options.disk_reserve_bytes;
        if reserve == 0 {
            return None;
        }
        let trusted = self.measured.filter(|(at, _)| at.elapsed() < FREE_SPACE_TRUSTED);
        let free = match trusted {
            Some((_, free)) => free,
            None => self.measure(options)?,
        };
        (free < reserve).then_some(CommitError::DiskFull { free, reserve })
    }

    /// `None`: it cannot be told, and a disk is not full because nobody can look.
    fn measure(&mut self, options: &Options) -> Option<u64> {
        let measured = match &options.free_space {
            Some(measure) => measure(),
            None => rustix::fs::statvfs(&self.directory)
                .map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize))
                .map_err(Into::into),
        };
        match measured {
            Ok(free) => {
                self.measured = Some((Instant::now(), free));
                Some(free)
            }
            Err(error) => {
                tracing::warn!(%error, "cannot tell the free space of the write buffer's disk");
                None
            }
        }
    }
}
