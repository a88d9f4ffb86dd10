//! One commit stream per storage: gathers the edits of finished uploads, commits each round as one object, and
//! publishes what is committed.
//!
//! Before the first commit of a process to a storage, every former incarnation that this data folder knows is fenced
//! there, and what it had committed but not published is published now. Until then rows stay in the buffer, and reads
//! are right. One storage that does not answer holds up only its own flushes.
//!
//! The streams also tell when the data folder is an older copy of what once ran: a former stream was ended by a process
//! that the folder does not know, or has commits that the folder cannot have made. Publishing these would drop buffered
//! rows that are in no file, and without them answers are too short; so the pod gives up ([`Disowned`]). It looks before
//! it fences: a copy that was started by mistake must not lock the newest one out.

use std::collections::{BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kalamdb_model::{Generation, StorageName};
use kalamdb_table_store::manifest::{self, Edit};
use kalamdb_table_store::stream::{self, Look, StreamError, StreamWriter};
use kalamdb_write_buffer::row::Header;
use kalamdb_write_buffer::{ReadError, RowError, WriteBuffer};
use object_store::ObjectStore;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::instance::{InstanceError, Position, View};
use super::storages::{StoragesError, Use};
use super::{Engine, RootKey};
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
    /// The process stops.
    #[error("the process is stopping")]
    Stopping,
    /// The edit cannot be committed at all.
    #[error("the commit was refused")]
    Refused(#[source] Arc<StreamError>),
}

/// Why a committed edit cannot be made visible.
#[derive(Debug, thiserror::Error)]
enum PublishError {
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error("failed to read buffered rows")]
    Buffer(#[from] ReadError),
    #[error("a buffered row is damaged")]
    Row(#[from] RowError),
    /// Rows that are in no file would go with it.
    #[error("{0}")]
    Uncovered(String),
}

/// Most edits that wait for a round of one storage; flushes wait beyond it.
const QUEUE_MAX: usize = 1_024;
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// Edits of one object, bytes; half of what an object may have, for the one that goes over it.
const ROUND_BYTES_MAX: usize = 8 << 20;

struct Request {
    /// `None` only asks that the stream be open.
    edit: Option<Edit>,
    done: oneshot::Sender<Result<(), ShipError>>,
}

/// The streams of this process.
pub(super) struct Shippers {
    buffer: WriteBuffer,
    incarnation: String,
    running: Mutex<HashMap<RootKey, mpsc::Sender<Request>>>,
}

impl Shippers {
    pub(super) fn new(buffer: WriteBuffer) -> Self {
        let incarnation = ulid::Ulid::generate().to_string().to_ascii_lowercase();
        Self { buffer, incarnation, running: Mutex::default() }
    }

    fn state_prefix(root: &RootKey) -> String {
        format!("stream/{root}/")
    }

    /// The incarnations that this data folder knows in `root`, oldest first, each with the first number of its stream of
    /// which not all may be published.
    fn known(&self, root: &RootKey) -> Result<Vec<(String, u64)>, BeginError> {
        let prefix = Self::state_prefix(root);
        let stored = self.buffer.state_scan(&prefix)?.into_iter();
        stored
            .map(|(key, at)| Ok((key.trim_start_matches(&prefix).to_owned(), String::from_utf8(at)?.parse()?)))
            .collect()
    }

    /// Every root that has a stream of ours.
    fn roots(&self) -> Result<BTreeSet<RootKey>, ReadError> {
        let root = |key: &str| {
            let (storage, number) = key.strip_prefix("stream/")?.split_once('/')?.0.rsplit_once('.')?;
            Some(RootKey { storage: StorageName::new(storage).ok()?, root: number.parse().ok()? })
        };
        Ok(self.buffer.state_scan("stream/")?.iter().filter_map(|(key, _)| root(key)).collect())
    }
}

type BeginError = Box<dyn std::error::Error + Send + Sync>;

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
        for root in self.shippers.roots()?.into_iter().filter(served) {
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
        self.request(root, None).await
    }

    /// Commits `edit` in the stream of `root` and publishes it.
    pub(super) async fn ship(self: &Arc<Self>, root: &RootKey, edit: Edit) -> Result<(), ShipError> {
        self.request(root, Some(edit)).await
    }

    async fn request(self: &Arc<Self>, root: &RootKey, edit: Option<Edit>) -> Result<(), ShipError> {
        self.check_owned()?;
        let (done, answer) = oneshot::channel();
        let queue = {
            let mut running = self.shippers.running.lock();
            let start = || {
                let (sender, receiver) = mpsc::channel(QUEUE_MAX);
                self.spawn(run(Arc::clone(self), root.clone(), receiver));
                sender
            };
            running.entry(root.clone()).or_insert_with(start).clone()
        };
        let ended = || self.check_owned().map_or_else(ShipError::from, |()| ShipError::Stopping);
        queue.send(Request { edit, done }).await.map_err(|_| ended())?;
        answer.await.map_err(|_| ended())?
    }

    /// Makes a committed edit visible: the record on disk and the view in memory change under the instance's lock.
    /// Blocking; running it twice changes nothing.
    fn publish(&self, root: &RootKey, edit: &Edit) -> Result<(), PublishError> {
        // Outside the lock: rows of a frozen generation do not change, and only the shipper publishes.
        self.check_covered(edit)?;
        let instance = self.instances.get(&edit.instance)?;
        let mut current = instance.current.write();
        if is_published(&current.view, edit) {
            return Ok(());
        }
        self.note_garbage(root, edit)?;
        let manifest = manifest::apply(&current.view.manifest, edit);
        self.buffer.publish(&edit.instance, edit.generation.max(current.view.flushed), &manifest.encode())?;
        // Keys of which nothing was found may be in the new file; of the others those are still where they were whose rows
        // the new file does not replace.
        let stays = |at: &Position| {
            let removed = edit.remove.iter().any(|path| **path == *at.path);
            !removed && edit.replace.get(&*at.path).is_none_or(|replaced| !replaced.contains(at.row))
        };
        current.located.retain(|_, at| at.as_ref().is_some_and(stays));
        current.view = Arc::new(View { flushed: edit.generation.max(current.view.flushed), manifest });
        Ok(())
    }

    /// Checks that the files of `edit` hold every row that is given up for them: its generation is closed here, and none
    /// of its rows is newer than the files. Blocking.
    fn check_covered(&self, edit: &Edit) -> Result<(), PublishError> {
        let (generation, table) = (edit.generation, edit.instance.table.0);
        let flushed = self.instances.get(&edit.instance)?.current.read().view.flushed;
        if flushed >= generation {
            return Ok(());
        }
        let active = self.buffer.counters(&edit.instance)?.active;
        if generation >= active {
            let found = format!("generation {} of table {table} is committed, and takes rows here", generation.0);
            return Err(PublishError::Uncovered(found));
        }
        let (mut newest, mut damaged) = (i64::MIN, None);
        for of in flushed.0 + 1..=generation.0 {
            self.buffer.scan_generation(&edit.instance, Generation(of), &mut |_, _, row| match Header::parse(row) {
                Ok(header) => {
                    newest = newest.max(header.seq);
                    ControlFlow::Continue(())
                }
                Err(error) => {
                    damaged = Some(error);
                    ControlFlow::Break(())
                }
            })?;
        }
        if let Some(error) = damaged {
            return Err(error.into());
        }
        if newest > edit.last_seq {
            let found = format!(
                "generation {} of table {table} is committed up to `_seq` {}, and has rows up to {newest} here",
                generation.0, edit.last_seq
            );
            return Err(PublishError::Uncovered(found));
        }
        Ok(())
    }

    /// Publishes until it works: a committed edit that was given up here would be written a second time.
    async fn publish_all(self: &Arc<Self>, root: &RootKey, edits: Vec<Edit>) -> Result<(), ShipError> {
        for edit in edits {
            let mut backoff = Backoff::default();
            loop {
                let (engine, of, again) = (Arc::clone(self), root.clone(), edit.clone());
                match tokio::task::spawn_blocking(move || engine.publish(&of, &again)).await {
                    Ok(Ok(())) => break,
                    Ok(Err(PublishError::Uncovered(found))) => return Err(self.older_copy(root, found).into()),
                    Ok(Err(error)) => {
                        tracing::error!(error = %Chain(&error), "cannot publish a committed flush");
                        self.broken.store(true, Ordering::Release);
                    }
                    Err(error) => tracing::error!(error = %error, "cannot publish a committed flush"),
                }
                self.pause(&mut backoff).await?;
            }
        }
        Ok(())
    }

    fn older_copy(&self, root: &RootKey, found: String) -> Disowned {
        self.disown(Disowned::OlderCopy { root: root.clone(), found })
    }

    async fn pause(&self, backoff: &mut Backoff) -> Result<(), ShipError> {
        tokio::select! {
            () = self.stop.cancelled() => Err(ShipError::Stopping),
            () = tokio::time::sleep(backoff.next()) => Ok(()),
        }
    }

    fn open_store(&self, root: &RootKey) -> Result<Arc<dyn ObjectStore>, StoragesError> {
        self.storages.store(&self.catalog.current(), root)
    }
}

/// Whether `view` has what `edit` brings: a flush brings a generation, a compaction takes files away.
fn is_published(view: &View, edit: &Edit) -> bool {
    if edit.remove.is_empty() {
        view.flushed >= edit.generation
    } else {
        edit.remove.iter().all(|path| view.file(path).is_none())
    }
}

/// About what an edit takes in its object: keys are written in hex.
fn size(request: &Request) -> usize {
    let files = request.edit.iter().flat_map(|edit| &edit.add);
    let files = files.map(|file| {
        512 + 2 * (file.min_key.len() + file.max_key.len()) + file.path.len() + file.tombstones.json_bytes()
    });
    let replaced = request.edit.iter().flat_map(|edit| &edit.replace);
    files.sum::<usize>() + replaced.map(|(path, rows)| path.len() + rows.json_bytes()).sum::<usize>()
}

async fn run(engine: Arc<Engine>, root: RootKey, mut queue: mpsc::Receiver<Request>) {
    let Ok(mut stream) = open(&engine, &root).await else { return };
    loop {
        let first = tokio::select! {
            () = engine.stop.cancelled() => return,
            request = queue.recv() => match request { Some(request) => request, None => return },
        };
        let mut bytes = size(&first);
        let mut round = vec![first];
        while bytes < ROUND_BYTES_MAX {
            let Ok(more) = queue.try_recv() else { break };
            bytes += size(&more);
            round.push(more);
        }
        let edits: Vec<Edit> = round.iter().filter_map(|request| request.edit.clone()).collect();
        let outcome = if edits.is_empty() { Ok(()) } else { commit(&engine, &root, &mut stream, edits).await };
        for request in round {
            // The flush may have been given up; its edit is published all the same.
            let _ = request.done.send(outcome.clone());
        }
        if matches!(outcome, Err(ShipError::Stopping)) {
            return;
        }
    }
}

/// Ends the streams of former incarnations and begins our own.
async fn open(engine: &Arc<Engine>, root: &RootKey) -> Result<StreamWriter, ShipError> {
    let mut backoff = Backoff::default();
    loop {
        let begun = begin(engine, root).await;
        engine.check_owned()?;
        match begun {
            Ok(writer) => return Ok(writer),
            Err(error) => {
                tracing::warn!(storage = %root, error = %Chain(error.as_ref()), "cannot begin the commit stream yet");
            }
        }
        engine.pause(&mut backoff).await?;
    }
}

async fn begin(engine: &Arc<Engine>, root: &RootKey) -> Result<StreamWriter, BeginError> {
    let shippers = &engine.shippers;
    let known = shippers.known(root)?;
    let usage = if known.is_empty() { Use::First } else { Use::Again };
    let store = engine.storages.open(&engine.catalog.current(), root, usage)?;
    let former: Vec<_> = known.iter().filter(|(incarnation, _)| *incarnation != shippers.incarnation).collect();
    for (incarnation, from) in &former {
        let Look { edits, fenced_by } = look(engine, root, store.as_ref(), incarnation, *from).await?;
        check_end(engine, root, &known, incarnation, fenced_by.as_deref())?;
        check_all(engine, root, edits).await?;
    }
    // On disk before our first object, a fence included: the next process must know us by both.
    let key = |incarnation: &str| format!("{}{incarnation}", Shippers::state_prefix(root));
    shippers.buffer.state_put(&key(&shippers.incarnation), b"1")?;
    for (incarnation, from) in &former {
        let replay = stream::fence(store.as_ref(), incarnation, *from, &shippers.incarnation).await?;
        check_end(engine, root, &known, incarnation, Some(&replay.fenced_by))?;
        let edits: Vec<Edit> = replay.edits.into_iter().map(|(_, edit)| edit).collect();
        tracing::info!(storage = %root, edits = edits.len(), "ended the commit stream of a former process");
        engine.publish_all(root, edits).await?;
    }
    // All at the end, oldest first: whoever ended a stream is known as long as that stream is.
    for (incarnation, _) in &former {
        shippers.buffer.state_delete(&key(incarnation))?;
    }
    Ok(StreamWriter::new(store, shippers.incarnation.clone(), 1))
}

async fn look(
    engine: &Engine,
    root: &RootKey,
    store: &dyn ObjectStore,
    incarnation: &str,
    from: u64,
) -> Result<Look, BeginError> {
    match stream::look(store, incarnation, from).await {
        // Each commit notes its number here, so no process leaves its successor more than one round.
        Err(error @ StreamError::TooMany { .. }) => Err(engine.older_copy(root, error.to_string()).into()),
        other => Ok(other?),
    }
}

/// Whoever ended a stream noted itself in its data folder before: a stranger did not run on this one.
fn check_end(
    engine: &Engine,
    root: &RootKey,
    known: &[(String, u64)],
    incarnation: &str,
    fenced_by: Option<&str>,
) -> Result<(), Disowned> {
    let Some(by) = fenced_by else { return Ok(()) };
    if by == engine.shippers.incarnation || known.iter().any(|(known, _)| known == by) {
        return Ok(());
    }
    let found = format!("the stream of process `{incarnation}` was ended by `{by}`, which never ran on this folder");
    Err(engine.older_copy(root, found))
}

/// Checks all `edits` before anything is changed for one.
async fn check_all(engine: &Arc<Engine>, root: &RootKey, edits: Vec<Edit>) -> Result<(), BeginError> {
    let checking = Arc::clone(engine);
    let checked = tokio::task::spawn_blocking(move || edits.iter().try_for_each(|edit| checking.check_covered(edit)));
    match checked.await? {
        Err(PublishError::Uncovered(found)) => Err(engine.older_copy(root, found).into()),
        other => Ok(other?),
    }
}

async fn commit(
    engine: &Arc<Engine>,
    root: &RootKey,
    stream: &mut StreamWriter,
    edits: Vec<Edit>,
) -> Result<(), ShipError> {
    let mut backoff = Backoff::default();
    loop {
        match stream.append(edits.clone()).await {
            Ok(_) => break,
            Err(error @ (StreamError::Fenced { .. } | StreamError::Foreign { .. })) => {
                tracing::error!(storage = %root, error = %Chain(&error), "the commit stream was ended");
                return Err(engine.disown(Disowned::Fenced).into());
            }
            Err(error @ (StreamError::TooLarge { .. } | StreamError::Encode(_))) => {
                return Err(ShipError::Refused(Arc::new(error)));
            }
            Err(error) => tracing::warn!(storage = %root, error = %Chain(&error), "the outcome of a commit is unknown"),
        }
        engine.pause(&mut backoff).await?;
        if let Ok(store) = engine.open_store(root) {
            stream.use_store(store);
        }
    }
    crash::point("flush.committed");
    engine.publish_all(root, edits).await?;
    // Everything before the next object is published here, so a later start need not look at it.
    let key = format!("{}{}", Shippers::state_prefix(root), engine.shippers.incarnation);
    if let Err(error) = engine.shippers.buffer.state_put(&key, stream.next_seq().to_string().as_bytes()) {
        tracing::warn!(error = %Chain(&error), "cannot save the position of the commit stream; a restart replays more");
    }
    Ok(())
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
