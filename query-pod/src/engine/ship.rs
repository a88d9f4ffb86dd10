//! One commit stream per storage: gathers the edits of finished uploads, commits each round as one object, and
//! publishes what is committed.
//!
//! Before the first commit of a process to a storage, every former incarnation that this data folder knows is fenced
//! there, and what it had committed but not published is published now. Until then rows stay in the buffer, and reads
//! are right. One storage that does not answer holds up only its own flushes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kalamdb_table_store::manifest::{self, Edit};
use kalamdb_table_store::stream::{self, StreamError, StreamWriter};
use kalamdb_write_buffer::WriteBuffer;
use object_store::ObjectStore;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::instance::{InstanceError, View};
use super::storages::StoragesError;
use super::{Engine, RootKey};
use crate::crash;
use crate::error::Chain;

/// A commit that did not happen, or whose happening is not known here.
#[derive(Debug, thiserror::Error)]
pub enum ShipError {
    /// Another process has fenced this one.
    #[error("another process has taken over")]
    Fenced,
    /// The process stops.
    #[error("the process is stopping")]
    Stopping,
    /// The edit cannot be committed at all.
    #[error("the commit was refused")]
    Refused(#[source] Arc<StreamError>),
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
    fenced: AtomicBool,
    running: Mutex<HashMap<RootKey, mpsc::Sender<Request>>>,
}

impl Shippers {
    pub(super) fn new(buffer: WriteBuffer) -> Self {
        let incarnation = ulid::Ulid::generate().to_string().to_ascii_lowercase();
        Self { buffer, incarnation, fenced: AtomicBool::new(false), running: Mutex::default() }
    }

    pub(super) fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::Acquire)
    }

    fn state_prefix(root: &RootKey) -> String {
        format!("stream/{root}/")
    }
}

impl Engine {
    /// Waits until former incarnations are fenced in `root` and what they had committed is published.
    pub(super) async fn open_stream(self: &Arc<Self>, root: &RootKey) -> Result<(), ShipError> {
        self.request(root, None).await
    }

    /// Commits `edit` in the stream of `root` and publishes it.
    pub(super) async fn ship(self: &Arc<Self>, root: &RootKey, edit: Edit) -> Result<(), ShipError> {
        self.request(root, Some(edit)).await
    }

    async fn request(self: &Arc<Self>, root: &RootKey, edit: Option<Edit>) -> Result<(), ShipError> {
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
        queue.send(Request { edit, done }).await.map_err(|_| ShipError::Stopping)?;
        answer.await.map_err(|_| ShipError::Stopping)?
    }

    /// Makes a committed edit visible: the record on disk and the view in memory change under the instance's lock.
    /// Blocking; running it twice changes nothing.
    fn publish(&self, edit: &Edit) -> Result<(), InstanceError> {
        let instance = self.instances.get(&edit.instance)?;
        let mut view = instance.view.write();
        if view.flushed >= edit.generation {
            return Ok(());
        }
        let manifest = manifest::apply(&view.manifest, edit);
        self.buffer.publish(&edit.instance, edit.generation, &manifest.encode())?;
        *view = Arc::new(View { flushed: edit.generation, manifest });
        Ok(())
    }

    /// Publishes until it works: a committed edit that was given up here would be written a second time.
    async fn publish_all(self: &Arc<Self>, edits: Vec<Edit>) -> Result<(), ShipError> {
        for edit in edits {
            let mut backoff = Backoff::default();
            loop {
                let (engine, again) = (Arc::clone(self), edit.clone());
                match tokio::task::spawn_blocking(move || engine.publish(&again)).await {
                    Ok(Ok(())) => break,
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

/// About what an edit takes in its object: keys are written in hex.
fn size(request: &Request) -> usize {
    let files = request.edit.iter().flat_map(|edit| &edit.add);
    files.map(|file| 512 + 2 * (file.min_key.len() + file.max_key.len()) + file.path.len()).sum()
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
            let answer = match &outcome {
                Ok(()) => Ok(()),
                Err(ShipError::Fenced) => Err(ShipError::Fenced),
                Err(ShipError::Stopping) => Err(ShipError::Stopping),
                Err(ShipError::Refused(source)) => Err(ShipError::Refused(Arc::clone(source))),
            };
            // The flush may have been given up; its edit is published all the same.
            let _ = request.done.send(answer);
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
        match begin(engine, root).await {
            Ok(writer) => return Ok(writer),
            Err(error) => {
                tracing::warn!(storage = %root, error = %Chain(error.as_ref()), "cannot begin the commit stream yet");
            }
        }
        engine.pause(&mut backoff).await?;
    }
}

async fn begin(engine: &Arc<Engine>, root: &RootKey) -> Result<StreamWriter, Box<dyn std::error::Error + Send + Sync>> {
    let store = engine.open_store(root)?;
    let shippers = &engine.shippers;
    let prefix = Shippers::state_prefix(root);
    for (key, position) in shippers.buffer.state_scan(&prefix)? {
        let former = key.trim_start_matches(&prefix);
        if former == shippers.incarnation {
            continue;
        }
        let from: u64 = String::from_utf8(position)?.parse()?;
        let replay = stream::fence(store.as_ref(), former, from, &shippers.incarnation).await?;
        let edits: Vec<Edit> = replay.edits.into_iter().map(|(_, edit)| edit).collect();
        tracing::info!(storage = %root, rows = edits.len(), "ended the commit stream of a former process");
        engine.publish_all(edits).await?;
        shippers.buffer.state_delete(&key)?;
    }
    // On disk before the first object: the next process must know that this stream may exist.
    shippers.buffer.state_put(&format!("{prefix}{}", shippers.incarnation), b"1")?;
    Ok(StreamWriter::new(store, shippers.incarnation.clone(), 1))
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
                tracing::error!(storage = %root, error = %Chain(&error), "this process no longer owns its data");
                engine.shippers.fenced.store(true, Ordering::Release);
                return Err(ShipError::Fenced);
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
    engine.publish_all(edits).await?;
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
