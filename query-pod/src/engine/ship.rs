//! One commit stream per storage: gathers the edits of finished uploads and the rows that are in no file yet, commits each
//! round as one object, and publishes what is committed.
//!
//! Rows take one of two ways. With `durability: local` they are acknowledged after the fsync here, wait in [`Unshipped`],
//! and come into the stream within a second. With `durability: objectStore` they come into the stream first: only then are
//! they applied, visible and acknowledged. A storage on the pod's own disk gets no rows: it would be lost with the buffer.
//!
//! Before the first commit of a process to a storage, every former incarnation that this data folder knows is fenced
//! there, and what it had committed but not published is published now ([`super::begin`]). Until then rows stay in the
//! buffer, and reads are right. One storage that does not answer holds up only its own flushes.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kalamdb_model::{InstanceId, StorageName};
use kalamdb_table_store::manifest::Edit;
use kalamdb_table_store::stream::{Round, RowBlock, StreamError, StreamWriter};
use kalamdb_write_buffer::{CommitError, Committed, EncodedRow, ReadError, RowError, Stamps, WriteBuffer, row};
use object_store::ObjectStore;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::begin::{self, BeginError};
use super::checkpoint::Checkpoints;
use super::storages::StoragesError;
use super::{Engine, RootKey, now_us};
use crate::catalog::Snapshot;
use crate::crash;
use crate::error::Chain;

/// Why a process may not serve its data folder any more. Starting it again does not help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Disowned {
    /// Another process has fenced this one.
    #[error("another process has taken over the data of this one, which must not serve it again")]
    Fenced,
    /// A storage holds commits that came after this state of the data folder.
    #[error(
        "the data folder is an older copy: in storage `{root}`, {found}; nothing is read, written or flushed here; stop \
         this pod, and bring back the newest copy of the folder"
    )]
    OlderCopy {
        /// Where it was found out.
        root: RootKey,
        /// By what.
        found: String,
    },
}

/// A commit that did not happen, or whose happening is not known here.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ShipError {
    /// The data is another's now.
    #[error(transparent)]
    Disowned(#[from] Disowned),
    /// The storage is not there, or cannot be used. Nothing was written.
    #[error("the storage is not usable")]
    Storage(#[from] StoragesError),
    /// The process stops. What was asked for may yet happen, after the next start.
    #[error("the process is stopping")]
    Stopping,
    /// The edit cannot be committed at all.
    #[error("the commit was refused")]
    Refused(#[source] Arc<StreamError>),
    /// Another storage is the same place in other words, and has its stream there. Nothing was written.
    #[error("storage `{0}` lies at the same place as another one; declare another bucket or prefix")]
    Shared(RootKey),
    /// So many bytes wait for the storage already. Nothing was written.
    #[error("more than {STATEMENTS_BYTES_MAX} bytes of rows wait for the storage")]
    Waiting,
    /// The rows are in the stream, and not in the buffer: they appear after the next start.
    #[error("rows that are stored could not be applied")]
    Unapplied(#[source] CommitError),
    /// The rows cannot be stamped. Nothing was written.
    #[error("the rows cannot be stamped")]
    Row(#[from] RowError),
    /// The buffer does not read. Nothing was written.
    #[error("the state of the instance cannot be read")]
    Buffer(#[from] ReadError),
}

/// The number of the first object of a stream.
pub(super) const FIRST_SEQ: u64 = 1;
/// Most edits that wait for a round of one storage; flushes wait beyond it.
const QUEUE_MAX: usize = 1_024;
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// Edits and rows of one object, bytes; a statement that goes over it still gets in whole.
const ROUND_BYTES_MAX: usize = 8 << 20;
/// Acknowledged rows wait at most so long for company on their way to the storage, and less if they are many.
const SHIP_AFTER: Duration = Duration::from_millis(500);
/// Bytes of rows that wait for a storage in memory; beyond it the next checkpoint brings them.
const UNSHIPPED_BYTES_MAX: usize = 64 << 20;
/// Bytes of statements that wait for a storage to be acknowledged; beyond it they are refused.
const STATEMENTS_BYTES_MAX: u32 = 128 << 20;
/// What a statement that waits takes beside its rows.
const STATEMENT_BYTES: usize = 4 << 10;
/// How long a statement waits for room among them.
const ROOM_WAIT: Duration = Duration::from_secs(5);
/// How long a stop waits for the last rows to reach the storage.
const LAST_WAIT: Duration = Duration::from_secs(5);

/// What a round is asked to bring. Without either it only asks that the stream be open.
#[derive(Default)]
struct Asked {
    /// Whether an object has to be stored in any case: then we are not fenced.
    proof: bool,
    edit: Option<Edit>,
    rows: Option<(InstanceId, Vec<EncodedRow>)>,
}

struct Request {
    asked: Asked,
    done: oneshot::Sender<Shipped>,
}

/// What the rows got that a round was asked to bring.
type Shipped = Result<Option<Stamps>, ShipError>;

impl Request {
    /// About what it takes in its object.
    fn size(&self) -> usize {
        let rows = self.asked.rows.iter().flat_map(|(_, rows)| rows).map(|row| row.key.len() + row.value.len() + 8);
        self.asked.edit.as_ref().map_or(0, edit_bytes) + rows.sum::<usize>()
    }
}

/// About what an edit takes in its object: keys of files are written in hex.
pub(super) fn edit_bytes(edit: &Edit) -> usize {
    let files = edit.add.iter().map(|file| {
        let keys = 2 * (file.min_key.len() + file.max_key.len());
        512 + keys + file.path.len() + file.tombstones.json_bytes() + file.replaced.json_bytes()
    });
    let replaced = edit.replace.iter().map(|(path, rows)| path.len() + rows.json_bytes());
    256 + files.sum::<usize>() + replaced.sum::<usize>()
}

/// Rows that are acknowledged, and not in the stream of their storage.
#[derive(Default)]
pub(super) struct Unshipped {
    waiting: Mutex<Waiting>,
    wake: Notify,
}

#[derive(Default)]
struct Waiting {
    blocks: VecDeque<RowBlock>,
    bytes: usize,
    /// When the first of them came.
    since: Option<Instant>,
    /// Some were left out: only a checkpoint brings them.
    overflown: bool,
}

fn bytes_of(block: &RowBlock) -> usize {
    block.rows.iter().map(|(key, value)| key.len() + value.len() + 8).sum()
}

impl Unshipped {
    fn push(&self, block: RowBlock) {
        let mut waiting = self.waiting.lock();
        let bytes = bytes_of(&block);
        if waiting.bytes + bytes > UNSHIPPED_BYTES_MAX {
            // The rest goes, too: the checkpoint has all of it.
            *waiting = Waiting { overflown: true, ..Waiting::default() };
        } else {
            waiting.bytes += bytes;
            waiting.since.get_or_insert_with(Instant::now);
            waiting.blocks.push_back(block);
        }
        drop(waiting);
        self.wake.notify_one();
    }

    fn take(&self, bytes_max: usize) -> Vec<RowBlock> {
        let mut waiting = self.waiting.lock();
        let (mut taken, mut bytes) = (Vec::new(), 0);
        while bytes < bytes_max
            && let Some(block) = waiting.blocks.pop_front()
        {
            bytes += bytes_of(&block);
            taken.push(block);
        }
        waiting.bytes = waiting.bytes.saturating_sub(bytes);
        if waiting.blocks.is_empty() {
            waiting.since = None;
        }
        taken
    }

    /// Whether rows were left out since the last call. From now on they are kept again, for as long as there is room.
    fn take_overflow(&self) -> bool {
        std::mem::take(&mut self.waiting.lock().overflown)
    }

    /// Rows were taken that did not come into the stream.
    fn note_loss(&self) {
        self.waiting.lock().overflown = true;
    }

    /// Leaves out the rows of one instance.
    fn forget(&self, instance: &InstanceId) {
        let mut waiting = self.waiting.lock();
        waiting.blocks.retain(|block| block.instance != *instance);
        waiting.bytes = waiting.blocks.iter().map(bytes_of).sum();
        if waiting.blocks.is_empty() {
            waiting.since = None;
        }
    }

    /// Bytes that wait.
    pub(super) fn bytes(&self) -> usize {
        self.waiting.lock().bytes
    }

    /// Resolves when rows have waited long enough, or are many.
    async fn due(&self) {
        loop {
            let at = {
                let waiting = self.waiting.lock();
                if waiting.overflown || waiting.bytes >= ROUND_BYTES_MAX {
                    return;
                }
                waiting.since.map(|since| since + SHIP_AFTER)
            };
            match at {
                Some(at) if at <= Instant::now() => return,
                Some(at) => {
                    tokio::select! { () = tokio::time::sleep_until(at) => {}, () = self.wake.notified() => {} }
                }
                None => self.wake.notified().await,
            }
        }
    }
}

/// The stream of one storage.
#[derive(Clone)]
struct Running {
    /// Whether it was begun: what former processes stored is applied.
    open: Arc<AtomicBool>,
    queue: mpsc::Sender<Request>,
    unshipped: Arc<Unshipped>,
    /// One permit for each byte of statements that wait.
    room: Arc<Semaphore>,
}

/// The streams of this process.
pub(super) struct Shippers {
    buffer: WriteBuffer,
    pub(super) incarnation: String,
    /// A storage that is declared anew elsewhere is another; one that comes back is the one that it was: a process has
    /// one stream in each place.
    running: Mutex<HashMap<(RootKey, String), Running>>,
    /// Those that are open, or about to be: no other one may begin at the place of one of them.
    placed: Mutex<HashSet<(RootKey, String)>>,
    /// Streams that may hold rows which are not applied.
    stored_first: Mutex<HashSet<RootKey>>,
}

const STATE: &str = "stream/";
/// Names of other processes that ours must be above.
const NAMES: &str = "process/";
/// Streams to which rows were stored before they were applied.
const STORED_FIRST: &str = "stored-first/";

impl Shippers {
    pub(super) fn new(buffer: WriteBuffer) -> Result<Self, ReadError> {
        // Incarnations rise, whatever the clock does: rebuilding goes by their order.
        let noted = buffer.state_scan(STATE)?.into_iter().chain(buffer.state_scan(NAMES)?);
        let names = noted.filter_map(|(key, _)| key.rsplit_once('/').map(|(_, name)| name.to_owned()));
        let incarnation = next_incarnation(names.max().as_deref());
        let noted = buffer.state_scan(STORED_FIRST)?;
        let stored_first = noted.iter().filter_map(|(key, _)| root_of(key.strip_prefix(STORED_FIRST)?)).collect();
        let (running, placed) = (Mutex::default(), Mutex::default());
        Ok(Self { buffer, incarnation, running, placed, stored_first: Mutex::new(stored_first) })
    }

    /// Whether rows may be in the stream of `root` that are not applied here.
    pub(super) fn has_stored_first(&self, root: &RootKey) -> bool {
        self.stored_first.lock().contains(root)
    }

    /// Takes note that rows are about to be stored in `root` before they are applied.
    fn note_stored_first(&self, root: &RootKey) -> Result<(), ReadError> {
        let mut noted = self.stored_first.lock();
        if !noted.contains(root) {
            self.buffer.state_put(&format!("{STORED_FIRST}{root}"), b"1")?;
            noted.insert(root.clone());
        }
        Ok(())
    }

    /// All that former processes stored in `root` is applied.
    pub(super) fn forget_stored_first(&self, root: &RootKey) -> Result<(), ReadError> {
        let mut noted = self.stored_first.lock();
        if noted.remove(root) {
            self.buffer.state_delete(&format!("{STORED_FIRST}{root}"))?;
        }
        Ok(())
    }

    fn state_prefix(root: &RootKey) -> String {
        format!("{STATE}{root}/")
    }

    /// The incarnations that this data folder knows in `root`, oldest first, each with the first number of its stream of
    /// which not all may be published.
    pub(super) fn known(&self, root: &RootKey) -> Result<Vec<(String, u64)>, BeginError> {
        let prefix = Self::state_prefix(root);
        let stored = self.buffer.state_scan(&prefix)?.into_iter();
        stored
            .map(|(key, at)| Ok((key.trim_start_matches(&prefix).to_owned(), String::from_utf8(at)?.parse()?)))
            .collect()
    }

    /// Takes note that everything before object `seq` of a stream is published here.
    pub(super) fn note(&self, root: &RootKey, incarnation: &str, seq: u64) -> Result<(), ReadError> {
        self.buffer.state_put(&format!("{}{incarnation}", Self::state_prefix(root)), seq.to_string().as_bytes())
    }

    /// Takes note of a name that the next process's must be above.
    pub(super) fn note_name(&self, incarnation: &str) -> Result<(), ReadError> {
        self.buffer.state_put(&format!("{NAMES}{incarnation}"), b"1")
    }

    pub(super) fn forget(&self, root: &RootKey, incarnation: &str) -> Result<(), ReadError> {
        self.buffer.state_delete(&format!("{}{incarnation}", Self::state_prefix(root)))
    }

    /// Every root that has a stream of ours.
    fn roots(&self) -> Result<BTreeSet<RootKey>, ReadError> {
        let root = |key: &str| root_of(key.strip_prefix(STATE)?.split_once('/')?.0);
        Ok(self.buffer.state_scan(STATE)?.iter().filter_map(|(key, _)| root(key)).collect())
    }

    /// Whether `incarnation` ran on this data folder, wherever its stream was.
    pub(super) fn ran_here(&self, incarnation: &str) -> Result<bool, ReadError> {
        let names = self.buffer.state_scan(STATE)?;
        Ok(names.iter().any(|(key, _)| key.rsplit_once('/').is_some_and(|(_, name)| name == incarnation)))
    }
}

/// The root whose text is `text`.
pub(super) fn root_of(text: &str) -> Option<RootKey> {
    let (storage, number) = text.rsplit_once('.')?;
    Some(RootKey { storage: StorageName::new(storage).ok()?, root: number.parse().ok()? })
}

/// A name above `last` in order.
fn next_incarnation(last: Option<&str>) -> String {
    let fresh = ulid::Ulid::generate();
    let last = last.and_then(|last| ulid::Ulid::from_string(&last.to_ascii_uppercase()).ok());
    let above = last.filter(|last| *last >= fresh).and_then(|last| last.increment().ok());
    above.unwrap_or(fresh).to_string().to_ascii_lowercase()
}

impl Engine {
    /// Opens the streams of the storages that were written to before, so that an older copy of the data folder is found
    /// out before it answers. What takes longer than `patience` goes on: a storage that is down holds up no start.
    ///
    /// # Errors
    /// If the write buffer does not read.
    pub async fn open_known_streams(self: &Arc<Self>, patience: Duration) -> Result<(), ReadError> {
        let catalog = self.catalog.current();
        let served = |root: &RootKey| {
            catalog.catalog.storages.get(&root.storage).is_some_and(|entry| entry.roots.contains_key(&root.root))
        };
        let mut opening = JoinSet::new();
        for root in self.shippers.roots()?.into_iter().filter(served).chain(self.not_rebuilt()) {
            let engine = Arc::clone(self);
            opening.spawn(async move { engine.open_stream(&root).await });
        }
        let all = async { while opening.join_next().await.is_some() {} };
        if tokio::time::timeout(patience, all).await.is_err() {
            tracing::warn!("a storage does not answer yet; serving the rows that are here, its files as it recovers");
            opening.detach_all();
        }
        Ok(())
    }

    /// Waits until former incarnations are fenced in `root` and what they had committed is published.
    pub(super) async fn open_stream(self: &Arc<Self>, root: &RootKey) -> Result<(), ShipError> {
        self.request(root, Asked::default()).await.map(drop)
    }

    /// Makes sure that the data of `root` is ours still: an idle process does not hear of it when it is fenced.
    pub(super) async fn prove_ownership(self: &Arc<Self>, root: &RootKey) -> Result<(), ShipError> {
        self.request(root, Asked { proof: true, ..Asked::default() }).await.map(drop)
    }

    /// Commits `edit` in the stream of `root` and publishes it.
    pub(super) async fn ship(self: &Arc<Self>, root: &RootKey, edit: Edit) -> Result<(), ShipError> {
        self.request(root, Asked { edit: Some(edit), ..Asked::default() }).await.map(drop)
    }

    /// Commits rows in the stream of `root`, and then to the buffer. They may be there, or appear later, after an error
    /// that does not say otherwise. Returns what they got.
    pub(super) async fn ship_rows(
        self: &Arc<Self>,
        root: &RootKey,
        instance: InstanceId,
        rows: Vec<EncodedRow>,
    ) -> Result<Option<Stamps>, ShipError> {
        self.shippers.note_stored_first(root)?;
        let bytes: usize = rows.iter().map(|row| row.key.len() + row.value.len()).sum();
        let bytes = u32::try_from(bytes + STATEMENT_BYTES).unwrap_or(u32::MAX).min(STATEMENTS_BYTES_MAX);
        let room = tokio::time::timeout(ROOM_WAIT, self.running(root)?.room.acquire_many_owned(bytes)).await;
        let _room: OwnedSemaphorePermit = room.map_err(|_| ShipError::Waiting)?.map_err(|_| ShipError::Stopping)?;
        self.request(root, Asked { rows: Some((instance, rows)), ..Asked::default() }).await
    }

    /// Takes note of acknowledged rows, for the stream of their storage.
    pub(super) fn ship_later(
        self: &Arc<Self>,
        root: &RootKey,
        instance: &InstanceId,
        mut rows: Vec<(Vec<u8>, Vec<u8>)>,
        committed: Committed,
    ) -> Result<(), RowError> {
        for ((_, value), seq) in rows.iter_mut().zip(committed.first_seq..) {
            row::stamp(value, seq, committed.updated_us)?;
        }
        // Of a storage that is not declared any more, the first checkpoint brings them when it is again.
        if let Ok(running) = self.running(root) {
            running.unshipped.push(RowBlock { instance: instance.clone(), buffered: true, rows });
        }
        Ok(())
    }

    /// Rows of an instance that has left `root` are not told there any more: they are in its files, elsewhere.
    pub(super) fn forget_unshipped(self: &Arc<Self>, root: &RootKey, instance: &InstanceId) {
        if let Ok(running) = self.running(root) {
            running.unshipped.forget(instance);
        }
    }

    /// Bytes of acknowledged rows that are not in the stream of their storage.
    pub fn unshipped_bytes(&self) -> usize {
        self.shippers.running.lock().values().map(|running| running.unshipped.bytes()).sum()
    }

    fn running(self: &Arc<Self>, root: &RootKey) -> Result<Running, StoragesError> {
        let identity = self.storages.identity(&self.catalog.current(), root);
        let identity = identity.ok_or_else(|| StoragesError::Unknown(root.clone()))?;
        let mut running = self.shippers.running.lock();
        if let Some(known) = running.get(&(root.clone(), identity.clone())) {
            return Ok(known.clone());
        }
        let (queue, receiver) = mpsc::channel(QUEUE_MAX);
        let (unshipped, open) = (Arc::<Unshipped>::default(), Arc::<AtomicBool>::default());
        let place = Place { root: root.clone(), identity: identity.clone() };
        self.spawn(run(Arc::clone(self), place, receiver, Arc::clone(&unshipped), Arc::clone(&open)));
        let room = Arc::new(Semaphore::new(STATEMENTS_BYTES_MAX as usize));
        let new = Running { open, queue, unshipped, room };
        running.insert((root.clone(), identity), new.clone());
        Ok(new)
    }

    /// Takes the place of `place` for its stream, or tells which other root has its own there, or is about to.
    pub(super) fn take_place(&self, place: &Place) -> Result<(), RootKey> {
        let catalog = self.catalog.current();
        let mut placed = self.shippers.placed.lock();
        let mut others = placed.iter().map(|(root, _)| root).filter(|root| **root != place.root);
        if let Some(other) = others.find(|other| self.storages.share_place(&catalog, &place.root, other)) {
            return Err(other.clone());
        }
        placed.insert((place.root.clone(), place.identity.clone()));
        Ok(())
    }

    /// The stream of `place` is not begun.
    pub(super) fn leave_place(&self, place: &Place) {
        self.shippers.placed.lock().remove(&(place.root.clone(), place.identity.clone()));
    }

    /// Whether all that former processes stored in `root` is applied.
    pub(super) fn is_open(self: &Arc<Self>, root: &RootKey) -> bool {
        self.running(root).is_ok_and(|running| running.open.load(Ordering::Acquire))
    }

    async fn request(self: &Arc<Self>, root: &RootKey, asked: Asked) -> Shipped {
        self.check_owned()?;
        let (done, answer) = oneshot::channel();
        let ended = || self.check_owned().map_or_else(ShipError::from, |()| ShipError::Stopping);
        self.running(root)?.queue.send(Request { asked, done }).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    pub(super) async fn pause(&self, backoff: &mut Backoff) -> Result<(), ShipError> {
        tokio::select! {
            () = self.stop.cancelled() => Err(ShipError::Stopping),
            () = tokio::time::sleep(backoff.next()) => Ok(()),
        }
    }

    pub(super) fn open_store(&self, root: &RootKey) -> Result<Arc<dyn ObjectStore>, StoragesError> {
        self.storages.store(&self.catalog.current(), root)
    }
}

/// A root where it lay when its stream was begun.
pub(super) struct Place {
    pub(super) root: RootKey,
    pub(super) identity: String,
}

impl Place {
    /// Whether `catalog` says that it lies there still.
    pub(super) fn is_in(&self, engine: &Engine, catalog: &Snapshot) -> bool {
        engine.storages.identity(catalog, &self.root).as_ref() == Some(&self.identity)
    }

    /// Its store as it is reached now.
    fn store(&self, engine: &Engine) -> Option<Arc<dyn ObjectStore>> {
        let catalog = engine.catalog.current();
        if self.is_in(engine, &catalog) { engine.storages.store(&catalog, &self.root).ok() } else { None }
    }
}

async fn run(
    engine: Arc<Engine>,
    place: Place,
    mut queue: mpsc::Receiver<Request>,
    unshipped: Arc<Unshipped>,
    open: Arc<AtomicBool>,
) {
    while let Ok(stream) = begin::open(&engine, &place).await {
        open.store(true, Ordering::Release);
        let ended = commit_rounds(&engine, &place, stream, &mut queue, &unshipped).await;
        if !matches!(ended, Err(ShipError::Shared(_))) {
            return;
        }
        open.store(false, Ordering::Release);
        // The objects there are of the other one's stream: the next process must not take them for those of this one.
        if let Err(error) = engine.shippers.forget(&place.root, &engine.shippers.incarnation) {
            tracing::warn!(storage = %place.root, error = %Chain(&error), "cannot forget a commit stream");
        }
        engine.leave_place(&place);
    }
}

/// Commits what comes until the engine stops. Fails when there can be no further round.
async fn commit_rounds(
    engine: &Arc<Engine>,
    place: &Place,
    mut stream: StreamWriter,
    queue: &mut mpsc::Receiver<Request>,
    unshipped: &Unshipped,
) -> Result<(), ShipError> {
    let root = &place.root;
    let mut checkpoints = Checkpoints::new(Arc::clone(engine), root.clone());
    checkpoints.start(stream.next_seq());
    loop {
        let first = tokio::select! {
            biased;
            // First: statements that never stop coming must not keep it from the next one. It is seldom.
            () = checkpoints.due() => None,
            request = queue.recv() => match request { Some(request) => Some(request), None => return Ok(()) },
            () = unshipped.due() => None,
            () = engine.stop.cancelled() => break,
        };
        let mut bytes = first.as_ref().map_or(0, Request::size);
        let mut requests: Vec<Request> = first.into_iter().collect();
        while bytes < ROUND_BYTES_MAX {
            let Ok(more) = queue.try_recv() else { break };
            bytes += more.size();
            requests.push(more);
        }
        round(engine, place, &mut stream, unshipped, requests, &mut checkpoints).await?;
        if unshipped.take_overflow() {
            checkpoints.want();
        }
        // Between two rounds: everything before the next object is in the views and the buffer.
        if checkpoints.is_due() {
            // What is left of the part that goes is its last object.
            append_nothing(engine, place, &mut stream).await?;
            checkpoints.start(stream.next_seq());
        }
    }
    let last = async {
        while unshipped.bytes() > 0 {
            round(engine, place, &mut stream, unshipped, Vec::new(), &mut checkpoints).await?;
        }
        Ok::<_, ShipError>(())
    };
    if !matches!(tokio::time::timeout(LAST_WAIT, last).await, Ok(Ok(()))) {
        tracing::warn!(storage = %root, "stopping although the storage does not have the last rows; they are on this disk");
    }
    Ok(())
}

/// A statement on its way through a round.
struct Statement {
    instance: InstanceId,
    rows: Vec<EncodedRow>,
    stamps: Stamps,
    done: oneshot::Sender<Shipped>,
}

/// Commits and applies what is asked for and what waits. Fails when there can be no further round.
async fn round(
    engine: &Arc<Engine>,
    place: &Place,
    stream: &mut StreamWriter,
    unshipped: &Unshipped,
    requests: Vec<Request>,
    checkpoints: &mut Checkpoints,
) -> Result<(), ShipError> {
    let root = &place.root;
    let mut round = Round::default();
    let (mut waiting, mut statements, mut last_seqs) = (Vec::new(), Vec::new(), HashMap::new());
    let mut proof = false;
    for Request { asked: Asked { proof: wanted, edit, rows }, done } in requests {
        proof |= wanted;
        round.edits.extend(edit);
        let Some((instance, mut rows)) = rows else {
            waiting.push(done);
            continue;
        };
        match stamp(engine, &mut last_seqs, &instance, &mut rows) {
            Ok(stamps) => {
                let stored = rows.iter().map(|row| (row.key.clone(), row.value.clone())).collect();
                round.rows.push(RowBlock { instance: instance.clone(), buffered: false, rows: stored });
                statements.push(Statement { instance, rows, stamps, done });
            }
            // Whoever asked may be gone.
            Err(error) => _ = done.send(Err(error)),
        }
    }
    let taken = unshipped.take(ROUND_BYTES_MAX);
    round.rows.extend(taken);
    let (edits, bytes) = (round.edits.clone(), round.rows.iter().map(bytes_of).sum());
    let nothing = round == Round::default() && !proof;
    let appended = if nothing { Ok(()) } else { append(engine, place, stream, Arc::new(round)).await };
    if let Err(error) = appended {
        unshipped.note_loss();
        let told = statements.into_iter().map(|statement| statement.done).chain(waiting);
        told.for_each(|done| _ = done.send(Err(error.clone())));
        let ends = matches!(error, ShipError::Stopping | ShipError::Disowned(_) | ShipError::Shared(_));
        return if ends { Err(error) } else { Ok(()) };
    }
    if edits.iter().any(|edit| edit.placed.as_ref().is_some_and(|placed| RootKey::of(&placed.location) != *root)) {
        // What the stream has of those who have left has to go.
        checkpoints.want();
    }
    if !nothing {
        checkpoints.count(bytes);
        crash::point("flush.committed");
    }
    let published = engine.publish_all(root, edits).await;
    // What is stored and not applied comes back with the next start; whoever waits for it is not told that it is not there.
    let applied = if published.is_ok() { apply_all(engine, statements).await } else { Err(ShipError::Stopping) };
    let outcome = published.and(applied);
    match &outcome {
        Ok(()) if !nothing => note_position(engine, root, stream),
        Ok(()) => {}
        // No further round may pass over it.
        Err(error) => {
            tracing::error!(storage = %root, error = %Chain(error), "the commit stream rests until this pod is started again");
            engine.broken.store(true, Ordering::Release);
        }
    }
    for done in waiting {
        // The flush may have been given up; its edit is published all the same.
        let _ = done.send(outcome.clone().map(|()| None));
    }
    outcome
}

/// Stores an object that tells of nobody.
pub(super) async fn append_nothing(
    engine: &Arc<Engine>,
    place: &Place,
    stream: &mut StreamWriter,
) -> Result<(), ShipError> {
    append(engine, place, stream, Arc::default()).await?;
    // Before anything is deleted: the next process would take what is missing from here on for a gap.
    note_position(engine, &place.root, stream);
    Ok(())
}

/// Everything before the next object is published here, so a later start need not look at it.
fn note_position(engine: &Engine, root: &RootKey, stream: &StreamWriter) {
    if let Err(error) = engine.shippers.note(root, &engine.shippers.incarnation, stream.next_seq()) {
        tracing::warn!(error = %Chain(&error), "cannot save the position of the commit stream; a restart replays more");
    }
}

/// Applies statements that are stored: those of one instance in their order, those of different ones at once.
async fn apply_all(engine: &Arc<Engine>, statements: Vec<Statement>) -> Result<(), ShipError> {
    let mut of_instances: HashMap<InstanceId, Vec<Statement>> = HashMap::new();
    for statement in statements {
        of_instances.entry(statement.instance.clone()).or_default().push(statement);
    }
    let mut applying = JoinSet::new();
    for statements in of_instances.into_values() {
        let engine = Arc::clone(engine);
        applying.spawn(async move {
            let mut outcome = Ok(());
            for Statement { instance, rows, stamps, done } in statements {
                if outcome.is_ok() {
                    outcome = apply(&engine, instance, rows, stamps).await;
                    crash::point("commit.applied");
                }
                // Whoever asked may be gone.
                let _ = done.send(outcome.clone().map(|()| Some(stamps)));
            }
            outcome
        });
    }
    let mut outcome = Ok(());
    while let Some(applied) = applying.join_next().await {
        outcome = outcome.and(applied.unwrap_or(Err(ShipError::Stopping)));
    }
    outcome
}

/// Settles `_seq` and `_updated` of rows that are stored before they are applied. Only a round does so, one at a time, and
/// nobody else writes to the instance meanwhile; `last_seqs` is what the round has given already.
fn stamp(
    engine: &Engine,
    last_seqs: &mut HashMap<InstanceId, i64>,
    instance: &InstanceId,
    rows: &mut [EncodedRow],
) -> Result<Stamps, ShipError> {
    let applied = engine.buffer.counters(instance)?.last_seq;
    let last = last_seqs.get(instance).copied().unwrap_or(i64::MIN).max(applied);
    let updated_us = now_us();
    let first_seq = last.saturating_add(1).max(updated_us);
    for (row, seq) in rows.iter_mut().zip(first_seq..) {
        row::stamp(&mut row.value, seq, updated_us)?;
        last_seqs.insert(instance.clone(), seq);
    }
    Ok(Stamps { first_seq, updated_us })
}

/// Applies rows that are stored. They must not be given up for a queue that is full.
async fn apply(engine: &Engine, instance: InstanceId, rows: Vec<EncodedRow>, stamps: Stamps) -> Result<(), ShipError> {
    let mut backoff = Backoff::default();
    loop {
        match engine.buffer.commit_stamped(instance.clone(), rows.clone(), stamps).await {
            Ok(_) => return Ok(()),
            Err(CommitError::Busy) => tokio::time::sleep(backoff.next()).await,
            Err(error) => {
                tracing::error!(error = %Chain(&error), "rows that are stored could not be applied");
                engine.note_failure(&error);
                return Err(ShipError::Unapplied(error));
            }
        }
    }
}

/// Stores `round`, for as long as it takes.
async fn append(
    engine: &Arc<Engine>,
    place: &Place,
    stream: &mut StreamWriter,
    round: Arc<Round>,
) -> Result<(), ShipError> {
    let mut backoff = Backoff::default();
    loop {
        match stream.append(&round).await {
            Ok(_) => return Ok(()),
            // Only this process has the name. A stream that has begun can only be met by a copy of the process.
            Err(StreamError::Foreign { .. }) if stream.next_seq() == FIRST_SEQ => {
                return Err(ShipError::Shared(place.root.clone()));
            }
            Err(error @ (StreamError::Fenced { .. } | StreamError::Foreign { .. })) => {
                tracing::error!(storage = %place.root, error = %Chain(&error), "the commit stream was ended");
                return Err(engine.disown(Disowned::Fenced).into());
            }
            Err(error @ (StreamError::TooLarge { .. } | StreamError::Encode(_))) => {
                return Err(ShipError::Refused(Arc::new(error)));
            }
            Err(error) => {
                tracing::warn!(storage = %place.root, error = %Chain(&error), "the outcome of a commit is unknown");
            }
        }
        engine.pause(&mut backoff).await?;
        if let Some(store) = place.store(engine) {
            stream.use_store(store);
        }
    }
}

/// Doubling waits with jitter.
#[derive(Default)]
pub(super) struct Backoff {
    attempt: u32,
}

impl Backoff {
    pub(super) fn next(&mut self) -> Duration {
        let base = BACKOFF_MIN.saturating_mul(1 << self.attempt.min(10)).min(BACKOFF_MAX);
        self.attempt += 1;
        base.mul_f64(rand::random_range(0.8..1.2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incarnations_rise_even_if_the_clock_steps_back() {
        let future = ulid::Ulid::from_parts(u64::MAX >> 17, 7).to_string().to_ascii_lowercase();
        assert!(next_incarnation(Some(&future)) > future);
        assert!(next_incarnation(Some("not one")).as_str() > "0");
        let now = next_incarnation(None);
        assert!(next_incarnation(Some(&now)) > now);
    }
}
