//! The handle that everybody else holds.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{SystemTime, UNIX_EPOCH};

use kalamdb_model::key::KeyRange;
use kalamdb_model::{Generation, InstanceId};
use parking_lot::{Mutex, RwLock};
use tokio::sync::oneshot;

use crate::committer::{Committer, Disk, Item, Request};
use crate::error::{CommitError, OpenError, ReadError};
use crate::keys;
use crate::record::Record;
use crate::row::{self, Header};
use crate::state::Counters;
use crate::store::{Found, Moment, Store, Visit};

/// Most bytes of rows that wait in the queue; one statement is taken however large it is.
const QUEUE_BYTES_MAX: usize = 256 << 20;

/// Hears what each round did.
pub type OnApplied = Arc<dyn Fn(&[Applied]) + Send + Sync>;

/// Tells how many bytes are free.
pub type FreeSpace = Arc<dyn Fn() -> std::io::Result<u64> + Send + Sync>;

/// How a buffer works.
#[derive(Clone)]
pub struct Options {
    /// Statements that wait at most; more are [`CommitError::Busy`]. Default 16,384.
    pub queue_max: usize,
    /// Rows at which a round is closed. Default 4,096.
    pub round_ops_max: usize,
    /// Bytes of rows at which a round is closed. Default 1 MiB.
    pub round_bytes_max: usize,
    /// Commits are refused while less than this is free on the directory's file system; 0 = never. Default 512 MiB.
    pub disk_reserve_bytes: u64,
    /// Microseconds since 1970 UTC. Default: the system's.
    pub clock: Arc<dyn Fn() -> i64 + Send + Sync>,
    /// Called on the committer's thread after each round, before its statements are answered. Must not block.
    pub on_applied: OnApplied,
    /// Bytes free, in place of asking the file system.
    pub free_space: Option<FreeSpace>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue_max: 16_384,
            round_ops_max: 4_096,
            round_bytes_max: 1 << 20,
            disk_reserve_bytes: 512 << 20,
            clock: Arc::new(system_clock),
            on_applied: Arc::new(|_| ()),
            free_space: None,
        }
    }
}

fn system_clock() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("queue_max", &self.queue_max)
            .field("round_ops_max", &self.round_ops_max)
            .field("round_bytes_max", &self.round_bytes_max)
            .field("disk_reserve_bytes", &self.disk_reserve_bytes)
            .finish_non_exhaustive()
    }
}

/// A row to store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedRow {
    /// The primary key, memcomparable.
    pub key: Vec<u8>,
    /// What [`crate::row::encode`] made.
    pub value: Vec<u8>,
    /// What is known of older versions.
    pub fresh: Fresh,
}

/// Whether files hold, or will hold, an older version of a row: if none does, no scan has to look for one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fresh {
    /// They may.
    No,
    /// None does, and the buffer has none.
    Yes,
    /// None does, and the only older version is a row of this generation: it is replaced, and never gets into a file, if
    /// the statement comes into the same generation.
    In(Generation),
}

/// Where a statement went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Generation of all its rows.
    pub generation: Generation,
    /// `_seq` of its first row.
    pub first_seq: i64,
    /// `_seq` of its last row; they rise by one, in the order of the statement.
    pub last_seq: i64,
    /// `_updated` of all of them.
    pub updated_us: i64,
}

/// What the rows of a statement get, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamps {
    /// `_seq` of the first; the others follow one by one.
    pub first_seq: i64,
    /// `_updated` of all of them, microseconds since 1970 UTC.
    pub updated_us: i64,
}

/// What is known of an instance that another buffer had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// Which.
    pub instance: InstanceId,
    /// Generations up to this are in files.
    pub flushed: Generation,
    /// The last `_seq` that is in files.
    pub last_seq: i64,
    /// As it was published.
    pub manifest: Vec<u8>,
}

/// What an instance holds after a round that touched it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// Which.
    pub instance: InstanceId,
    /// Rows in the active generation.
    pub rows: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of rows in frozen generations, which are not in files yet.
    pub frozen_bytes: u64,
    /// `_updated` of the first of them, microseconds since 1970 UTC; 0 without rows.
    pub oldest_us: i64,
}

/// The rows of all instances of this pod that are not in files yet. Clones are the same buffer; the directory is free
/// for another process when the last one is gone.
///
/// All methods that are not `async` may wait for the disk: call them where blocking is allowed.
#[derive(Clone)]
pub struct WriteBuffer(Arc<Inner>);

struct Inner {
    store: Arc<Store>,
    /// `None` once closed.
    queue: RwLock<Option<SyncSender<Item>>>,
    queued_bytes: Arc<AtomicUsize>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for WriteBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteBuffer").field("closed", &self.0.queue.read().is_none()).finish_non_exhaustive()
    }
}

impl WriteBuffer {
    /// Opens the buffer in `directory`, which is made if it is missing, and counts what it holds.
    ///
    /// # Errors
    /// If another process has it open ([`OpenError::Locked`] names it), another version wrote it, or it is damaged.
    pub fn open(directory: &Path, options: Options) -> Result<Self, OpenError> {
        let store = Arc::new(Store::open(directory)?);
        let (sender, queue) = sync_channel(options.queue_max);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let committer = Committer {
            store: Arc::clone(&store),
            options,
            queue,
            queued_bytes: Arc::clone(&queued_bytes),
            disk: Disk::new(directory.to_owned()),
        };
        let thread = thread::Builder::new()
            .name("committer".to_owned())
            .spawn(move || committer.run())
            .map_err(|source| OpenError::Thread { source })?;
        let inner = Inner { store, queue: RwLock::new(Some(sender)), queued_bytes, thread: Mutex::new(Some(thread)) };
        Ok(Self(Arc::new(inner)))
    }

    /// Stores one statement: all its rows in one generation, all or none, in the order given. Returns after the fsync.
    /// Dropping the future once it was polled neither undoes nor halves the statement.
    ///
    /// # Errors
    /// See [`CommitError`]: [`CommitError::Busy`] and [`CommitError::DiskFull`] may be tried again.
    pub async fn commit(&self, instance: InstanceId, rows: Vec<EncodedRow>) -> Result<Committed, CommitError> {
        self.send(instance, rows, None, Item::Commit).await
    }

    /// As [`WriteBuffer::commit`], for rows whose stamps were settled before. They must be above all that the instance
    /// has: nobody else may write to it in between. Taken on a full disk, too.
    ///
    /// # Errors
    /// As [`WriteBuffer::commit`], and [`CommitError::Order`].
    pub async fn commit_stamped(
        &self,
        instance: InstanceId,
        rows: Vec<EncodedRow>,
        stamps: Stamps,
    ) -> Result<Committed, CommitError> {
        self.send(instance, rows, Some(stamps), Item::Commit).await
    }

    /// Stores rows, as keys and stamped values, that were written before, here or elsewhere: each only if it is newer
    /// than what the buffer has under its key. The caller leaves out those that are in files. Doing it again changes
    /// nothing.
    ///
    /// # Errors
    /// As [`WriteBuffer::commit`].
    pub async fn restore(&self, instance: InstanceId, rows: Vec<(Vec<u8>, Vec<u8>)>) -> Result<(), CommitError> {
        if rows.is_empty() {
            return Ok(());
        }
        // What files hold of them is not known: every reader looks.
        let rows = rows.into_iter().map(|(key, mut value)| {
            row::clear_fresh(&mut value);
            EncodedRow { key, value, fresh: Fresh::No }
        });
        self.send(instance, rows.collect(), None, Item::Restore).await.map(drop)
    }

    async fn send(
        &self,
        instance: InstanceId,
        rows: Vec<EncodedRow>,
        stamps: Option<Stamps>,
        item: fn(Request) -> Item,
    ) -> Result<Committed, CommitError> {
        if rows.is_empty() {
            return Err(CommitError::Empty);
        }
        for (index, row) in rows.iter().enumerate() {
            Header::parse(&row.value).map_err(|source| CommitError::Row { index, source })?;
        }
        let keyed = |row: EncodedRow| EncodedRow { key: keys::row_key(&instance, Generation(0), &row.key), ..row };
        let rows: Vec<EncodedRow> = rows.into_iter().map(keyed).collect();
        let bytes = rows.iter().map(|row| row.key.len() + row.value.len()).sum();
        let (reply, answer) = oneshot::channel();
        self.reserve(bytes)?;
        if let Err(error) = self.enqueue(item(Request { instance, rows, stamps, bytes, reply })) {
            self.0.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(error);
        }
        answer.await.map_err(|_| CommitError::Lost)?
    }

    /// Closes the active generation, so that its rows can be flushed, and opens the next: every statement lies wholly
    /// before or after. Durable when it returns. A generation that is frozen and not published is returned again, the
    /// lowest first; `None` means that there is nothing to flush.
    ///
    /// # Errors
    /// See [`CommitError`].
    pub async fn freeze(&self, instance: InstanceId) -> Result<Option<Generation>, CommitError> {
        let (reply, answer) = oneshot::channel();
        self.enqueue(Item::Freeze { instance, reply })?;
        answer.await.map_err(|_| CommitError::Lost)?
    }

    fn reserve(&self, bytes: usize) -> Result<(), CommitError> {
        let before = self.0.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before > 0 && before.saturating_add(bytes) > QUEUE_BYTES_MAX {
            self.0.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(CommitError::Busy);
        }
        Ok(())
    }

    fn enqueue(&self, item: Item) -> Result<(), CommitError> {
        match self.0.queue.read().as_ref() {
            Some(queue) => queue.try_send(item).map_err(|error| match error {
                TrySendError::Full(_) => CommitError::Busy,
                TrySendError::Disconnected(_) => CommitError::Closed,
            }),
            None => Err(CommitError::Closed),
        }
    }

    /// What is buffered for an instance, as of the last answered round.
    ///
    /// # Errors
    /// If its record cannot be read.
    pub fn counters(&self, instance: &InstanceId) -> Result<Counters, ReadError> {
        self.0.store.counters(instance)
    }

    /// What is stored about an instance; `None` if it was never frozen or published.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn record(&self, instance: &InstanceId) -> Result<Option<Record>, ReadError> {
        self.0.store.record(instance)
    }

    /// The rows of all instances as of now. Not to be kept for long: what is removed stays on the disk as long.
    #[must_use]
    pub fn moment(&self) -> Moment<'_> {
        self.0.store.moment()
    }

    /// Visits the newest version of each row, deleted ones too, in generations above `after`, by key, as of one moment.
    ///
    /// # Errors
    /// If reading fails, or generations above `after` are being removed ([`ReadError::Reclaimed`]): never a shorter
    /// answer.
    pub fn scan(&self, instance: &InstanceId, after: Generation, visit: Visit<'_>) -> Result<(), ReadError> {
        self.0.store.moment().generations(instance, after)?.scan(visit)
    }

    /// As [`WriteBuffer::scan`], of the rows whose keys are in `range`, from the greatest if `descending`.
    ///
    /// # Errors
    /// As [`WriteBuffer::scan`].
    pub fn scan_range(
        &self,
        instance: &InstanceId,
        after: Generation,
        range: &KeyRange,
        descending: bool,
        visit: Visit<'_>,
    ) -> Result<(), ReadError> {
        self.0.store.moment().generations(instance, after)?.scan_range(range, descending, visit)
    }

    /// Visits the rows of one generation by key: what a flush writes.
    ///
    /// # Errors
    /// As [`WriteBuffer::scan`].
    pub fn scan_generation(
        &self,
        instance: &InstanceId,
        generation: Generation,
        visit: Visit<'_>,
    ) -> Result<(), ReadError> {
        self.0.store.scan_generation(instance, generation, visit)
    }

    /// The newest version of a row in generations above `after`, deleted or not, with its generation.
    ///
    /// # Errors
    /// As [`WriteBuffer::scan`].
    pub fn get(&self, instance: &InstanceId, after: Generation, pk: &[u8]) -> Result<Found, ReadError> {
        Ok(self.get_each(instance, after, &[pk])?.pop().flatten())
    }

    /// As [`WriteBuffer::get`], for many keys: an answer for each, in their order.
    ///
    /// # Errors
    /// As [`WriteBuffer::scan`].
    pub fn get_each(&self, instance: &InstanceId, after: Generation, pks: &[&[u8]]) -> Result<Vec<Found>, ReadError> {
        self.0.store.get_each(instance, after, pks)
    }

    /// Records, durably and at once, that generations up to `flushed` are in the files that `manifest` names. The same
    /// `flushed` again replaces the manifest.
    ///
    /// # Errors
    /// If `flushed` would go back, or is not frozen.
    pub fn publish(&self, instance: &InstanceId, flushed: Generation, manifest: &[u8]) -> Result<(), ReadError> {
        self.0.store.publish(instance, flushed, manifest)
    }

    /// Takes instances over from another buffer, durably and at once: generations up to `flushed` are in the files that
    /// `manifest` names, no `_seq` up to `last_seq` is given again. Doing it again changes nothing.
    ///
    /// # Errors
    /// If writing fails.
    pub fn adopt(&self, adopted: &[Adopted]) -> Result<(), ReadError> {
        self.0.store.adopt(adopted)
    }

    /// Removes the rows of generations up to `up_to`, which are published; returns how many. From its start on, scans
    /// that would need them fail. May be repeated, and what a crash interrupts is done at the next open.
    ///
    /// # Errors
    /// If `up_to` is not published.
    pub fn reclaim(&self, instance: &InstanceId, up_to: Generation) -> Result<u64, ReadError> {
        self.0.store.reclaim(instance, up_to)
    }

    /// All instances with rows that are not published, frozen ones included ([`Counters::has_frozen`]).
    #[must_use]
    pub fn dirty(&self) -> Vec<(InstanceId, Counters)> {
        self.0.store.dirty()
    }

    /// All instances that have files, or had some.
    ///
    /// # Errors
    /// If reading fails.
    pub fn published(&self) -> Result<Vec<InstanceId>, ReadError> {
        self.0.store.published()
    }

    /// Reads pod state.
    ///
    /// # Errors
    /// If reading fails.
    pub fn state_get(&self, key: &str) -> Result<Option<Vec<u8>>, ReadError> {
        self.0.store.state_get(key)
    }

    /// Stores pod state durably.
    ///
    /// # Errors
    /// If writing fails.
    pub fn state_put(&self, key: &str, value: &[u8]) -> Result<(), ReadError> {
        self.0.store.state_put(key, value)
    }

    /// All pod state whose key starts with `prefix`, by key.
    ///
    /// # Errors
    /// If reading fails.
    pub fn state_scan(&self, prefix: &str) -> Result<Vec<(String, Vec<u8>)>, ReadError> {
        self.0.store.state_scan(prefix)
    }

    /// Deletes pod state durably; a key that is not there is no error.
    ///
    /// # Errors
    /// If writing fails.
    pub fn state_delete(&self, key: &str) -> Result<(), ReadError> {
        self.0.store.state_delete(key)
    }

    /// Takes no further commits, finishes those in the queue, and ends the thread. Reading still works.
    pub async fn close(self) {
        let Some(thread) = self.0.stop() else { return };
        // An error here is a panic of the thread, which its own hook has told.
        let _joined = tokio::task::spawn_blocking(move || thread.join()).await;
    }
}

impl Inner {
    fn stop(&self) -> Option<JoinHandle<()>> {
        drop(self.queue.write().take());
        self.thread.lock().take()
    }
}

impl Drop for Inner {
    /// As [`WriteBuffer::close`], so that the directory is free when this returns. The last handle may be one that the
    /// listener held: a thread cannot wait for itself.
    fn drop(&mut self) {
        if let Some(thread) = self.stop()
            && thread.thread().id() != thread::current().id()
        {
            let _joined = thread.join();
        }
    }
}
