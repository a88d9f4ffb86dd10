//! The commit stream of one incarnation in one storage: the order in which its flushes became true, the rows that are in
//! no file yet, and its end.
//!
//! Owns: numbers without gaps, the stall on an unknown answer, fences, reading back. Does not own: the bytes
//! ([`StreamObject`]), when to append, or checkpoints ([`crate::checkpoint`]).
//!
//! After a crash: [`fence`] makes sure that nothing is appended any more; what lies before the fence is read with
//! [`round`]. A put that was given up may land at any later time; therefore the writer keeps number *and* bytes until it
//! knows. Fences are never deleted: a number that became free could be won by a writer that had slept. Of the other
//! objects the last one stays until there is a later one ([`trim`]): so a reader that begins too early sees that something
//! is missing, and takes it for no end.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::ObjectStore;
use object_store::path::Path;

use crate::create::{self, Create, CreateError, create_exact};
use crate::paths;
pub use crate::stream_format::{BLOCK_BYTES_MAX, Body, FORMAT, FormatError, Header, Round, RowBlock, StreamObject};

/// Most edits of one object.
pub const APPEND_EDITS_MAX: usize = 10_000;
/// Largest object that is written; a round with more is split by the caller.
pub const APPEND_BYTES_MAX: usize = 160 << 20;

/// Why a stream cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// Another incarnation has taken over: this one must stop acknowledging at once.
    #[error("stream `{incarnation}` was ended by `{by}`")]
    Fenced {
        /// The stream.
        incarnation: String,
        /// Who ended it.
        by: String,
    },
    /// Another process writes under the same incarnation, which must never happen.
    #[error("another writer uses stream `{incarnation}`: `{path}` is not ours")]
    Foreign {
        /// The stream.
        incarnation: String,
        /// What it wrote.
        path: Path,
    },
    /// The store does not say whether the object is there. Acknowledge nothing, and call again.
    #[error("the outcome of a commit is unknown")]
    Unknown(#[source] CreateError),
    /// The store does not answer a read.
    #[error("failed to read `{path}`")]
    Read {
        /// The object.
        path: Path,
        /// What the store said.
        source: object_store::Error,
    },
    /// An object is damaged, or from a later version.
    #[error("`{path}` cannot be read")]
    Corrupt {
        /// The object.
        path: Path,
        /// What is wrong.
        source: FormatError,
    },
    /// More than one object may hold; nothing was written.
    #[error(
        "a commit of {edits} edits and {bytes} bytes is too large; commit at most {APPEND_EDITS_MAX} edits at once"
    )]
    TooLarge {
        /// Edits.
        edits: usize,
        /// Bytes.
        bytes: usize,
    },
    /// The bytes cannot be made; nothing was written.
    #[error("the commit cannot be encoded")]
    Encode(#[source] FormatError),
    /// The store does not list.
    #[error("failed to list `{prefix}`")]
    List {
        /// What was to be listed.
        prefix: Path,
        /// What the store said.
        source: object_store::Error,
    },
    /// An object that must be there is not.
    #[error("`{path}` is missing")]
    Missing {
        /// The object.
        path: Path,
    },
}

/// Appends to the stream of its own incarnation. One per incarnation and storage.
#[derive(Debug)]
pub struct StreamWriter {
    store: Arc<dyn ObjectStore>,
    incarnation: String,
    next_seq: u64,
    pending: Option<Pending>,
    end: Option<End>,
}

/// An object that may or may not be there.
#[derive(Debug)]
struct Pending {
    round: Arc<Round>,
    bytes: Bytes,
}

#[derive(Debug, Clone)]
enum End {
    Fenced { by: String },
    Foreign { path: Path },
}

impl StreamWriter {
    /// A writer whose next object is `next_seq`.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>, incarnation: impl Into<String>, next_seq: u64) -> Self {
        Self { store, incarnation: incarnation.into(), next_seq, pending: None, end: None }
    }

    /// The number of the next object; that of the pending one while there is one.
    #[must_use]
    pub const fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Goes on through another handle to the same storage: credentials rotate while a put is pending.
    pub fn use_store(&mut self, store: Arc<dyn ObjectStore>) {
        self.store = store;
    }

    /// Whether an earlier append is still unknown.
    #[must_use]
    pub const fn is_stalled(&self) -> bool {
        self.pending.is_some()
    }

    /// Stores `round` as the next object and returns its number: from then on it is true.
    ///
    /// After [`StreamError::Unknown`], or when the future was dropped, the same round may be true or not. The next call
    /// resolves that first: called with the same round it returns its number and writes it once only; called with
    /// another, it appends this after it.
    ///
    /// # Errors
    /// [`StreamError::Fenced`] and [`StreamError::Foreign`] are final. After others the call may be repeated.
    pub async fn append(&mut self, round: &Arc<Round>) -> Result<u64, StreamError> {
        if let Some(pending) = &self.pending {
            let same = pending.round == *round;
            let seq = self.settle().await?;
            if same {
                return Ok(seq);
            }
        }
        self.check_end()?;
        let bytes = self.encode(round)?;
        self.pending = Some(Pending { round: Arc::clone(round), bytes });
        self.settle().await
    }

    fn encode(&self, round: &Round) -> Result<Bytes, StreamError> {
        let too_large = |bytes| StreamError::TooLarge { edits: round.edits.len(), bytes };
        if round.edits.len() > APPEND_EDITS_MAX {
            return Err(too_large(0));
        }
        let body = Body::Round(round.clone());
        let bytes = object_bytes(&self.incarnation, self.next_seq, body)?;
        if bytes.len() > APPEND_BYTES_MAX { Err(too_large(bytes.len())) } else { Ok(bytes) }
    }

    /// Creates the pending object. It stays pending, number and bytes, until the store has said what became of it.
    async fn settle(&mut self) -> Result<u64, StreamError> {
        self.check_end()?;
        let path = paths::stream_object(&self.incarnation, self.next_seq);
        let bytes = self.pending.as_ref().map(|pending| pending.bytes.clone()).unwrap_or_default();
        match create_exact(&*self.store, &path, bytes).await {
            Ok(Create::Ours) => {
                self.pending = None;
                self.next_seq += 1;
                Ok(self.next_seq - 1)
            }
            Ok(Create::Lost(found)) => {
                // What cannot be read proves nothing: it may be the page of a proxy. The object stays pending.
                let found = StreamObject::decode(&found);
                self.end = Some(match found.map_err(|source| StreamError::Corrupt { path: path.clone(), source })? {
                    StreamObject { body: Body::Fence { by }, .. } => End::Fenced { by },
                    StreamObject { .. } => End::Foreign { path },
                });
                self.check_end().map(|()| self.next_seq)
            }
            Err(unknown) => Err(StreamError::Unknown(unknown)),
        }
    }

    fn check_end(&self) -> Result<(), StreamError> {
        let incarnation = || self.incarnation.clone();
        match self.end.clone() {
            None => Ok(()),
            Some(End::Fenced { by }) => Err(StreamError::Fenced { incarnation: incarnation(), by }),
            Some(End::Foreign { path }) => Err(StreamError::Foreign { incarnation: incarnation(), path }),
        }
    }
}

/// The end of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// Its number: all before it counts, and nothing comes after it.
    pub seq: u64,
    /// Who ended the stream: the caller, or somebody before him.
    pub by: String,
}

/// Ends the stream of `incarnation` for ever, at its first free number from `from_seq` on.
///
/// A fence that is there already, ours or another's, ends it just as well: a caller that died after its fence, and its
/// successor, both get the same answer.
///
/// # Errors
/// Nothing is concluded from an unknown answer or a damaged object: until the call succeeds the stream may go on.
pub async fn fence(store: &dyn ObjectStore, incarnation: &str, from_seq: u64, by: &str) -> Result<Fence, StreamError> {
    let mut seq = from_seq;
    loop {
        let path = paths::stream_object(incarnation, seq);
        let bytes = object_bytes(incarnation, seq, Body::Fence { by: by.to_owned() })?;
        let found = match create_exact(store, &path, bytes).await.map_err(StreamError::Unknown)? {
            Create::Ours => return Ok(Fence { seq, by: by.to_owned() }),
            Create::Lost(found) => decode(&found, &path, incarnation, seq)?,
        };
        match found.body {
            Body::Fence { by } => return Ok(Fence { seq, by }),
            Body::Round(_) | Body::Checkpoint { .. } => seq += 1,
        }
    }
}

/// The largest number in the stream of `incarnation`; `None` if it has no object.
///
/// # Errors
/// If the store does not list.
pub async fn last(store: &dyn ObjectStore, incarnation: &str) -> Result<Option<u64>, StreamError> {
    let prefix = paths::stream_prefix(incarnation);
    let listed: Vec<_> = list(store, &prefix).await?;
    Ok(listed.iter().filter_map(paths::stream_seq).max())
}

/// Every incarnation that has a stream in `store`, oldest first: their names rise.
///
/// # Errors
/// If the store does not list.
pub async fn incarnations(store: &dyn ObjectStore) -> Result<Vec<String>, StreamError> {
    let prefix = paths::streams_prefix();
    let listed = create::within(store.list_with_delimiter(Some(&prefix))).await;
    let listed = listed.map_err(|source| StreamError::List { prefix, source })?;
    let mut names: Vec<String> =
        listed.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned)).collect();
    names.sort_unstable();
    Ok(names)
}

/// Deletes the objects `from..to` of the stream of `incarnation`; those that are gone are no error.
///
/// # Errors
/// If the store does not delete one; the others may be gone.
pub async fn trim(store: &dyn ObjectStore, incarnation: &str, from: u64, to: u64) -> Result<(), StreamError> {
    let paths: Vec<Path> = (from..to).map(|seq| paths::stream_object(incarnation, seq)).collect();
    delete(store, paths).await
}

/// Deletes whatever of the stream of `incarnation` lies before object `to`.
///
/// # Errors
/// If the store does not list or delete.
pub async fn trim_before(store: &dyn ObjectStore, incarnation: &str, to: u64) -> Result<(), StreamError> {
    let mut gone = list(store, &paths::stream_prefix(incarnation)).await?;
    gone.retain(|path| paths::stream_seq(path).is_some_and(|seq| seq < to));
    delete(store, gone).await
}

/// Whether object `seq` of a stream is its fence.
///
/// # Errors
/// As [`read`].
pub async fn is_fence(store: &dyn ObjectStore, incarnation: &str, seq: u64) -> Result<bool, StreamError> {
    let found = read(store, incarnation, seq).await?;
    Ok(matches!(found, Some(StreamObject { body: Body::Fence { .. }, .. })))
}

pub(crate) async fn delete(store: &dyn ObjectStore, paths: Vec<Path>) -> Result<(), StreamError> {
    let paths = futures::stream::iter(paths.into_iter().map(Ok)).boxed();
    let mut outcomes = store.delete_stream(paths);
    while let Some(outcome) = outcomes.next().await {
        match outcome {
            Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
            Err(source) => return Err(StreamError::List { prefix: paths::streams_prefix(), source }),
        }
    }
    Ok(())
}

pub(crate) async fn list(store: &dyn ObjectStore, prefix: &Path) -> Result<Vec<Path>, StreamError> {
    let mut listing = store.list(Some(prefix));
    let mut paths = Vec::new();
    // A store that hangs in the middle must not hold its reader up for ever.
    while let Some(found) = create::within(listing.try_next())
        .await
        .map_err(|source| StreamError::List { prefix: prefix.clone(), source })?
    {
        paths.push(found.location);
    }
    Ok(paths)
}

/// The commits of object `seq`, which must be there and be no fence.
///
/// # Errors
/// As [`read`], and [`StreamError::Missing`].
pub async fn round(store: &dyn ObjectStore, incarnation: &str, seq: u64) -> Result<(Header, Round), StreamError> {
    match read(store, incarnation, seq).await? {
        Some(StreamObject { header, body: Body::Round(round) }) => Ok((header, round)),
        _ => Err(StreamError::Missing { path: paths::stream_object(incarnation, seq) }),
    }
}

/// Object `seq` of a stream; `None` when the stream has not come so far.
///
/// # Errors
/// If the store does not answer or the object is damaged.
pub async fn read(store: &dyn ObjectStore, incarnation: &str, seq: u64) -> Result<Option<StreamObject>, StreamError> {
    let path = paths::stream_object(incarnation, seq);
    match create::read(store, &path).await {
        Ok(None) => Ok(None),
        Ok(Some(bytes)) => decode(&bytes, &path, incarnation, seq).map(Some),
        Err(source) => Err(StreamError::Read { path, source }),
    }
}

pub(crate) fn object_bytes(incarnation: &str, seq: u64, body: Body) -> Result<Bytes, StreamError> {
    StreamObject::new(incarnation, seq, create::nonce(), create::now_us(), body)
        .and_then(|object| object.encode())
        .map(Bytes::from)
        .map_err(StreamError::Encode)
}

/// Decodes, and checks that the object says of itself what its path says.
pub(crate) fn decode(bytes: &[u8], path: &Path, incarnation: &str, seq: u64) -> Result<StreamObject, StreamError> {
    let corrupt = |source| StreamError::Corrupt { path: path.clone(), source };
    let object = StreamObject::decode(bytes).map_err(corrupt)?;
    if object.header.incarnation == incarnation && object.header.seq == seq {
        Ok(object)
    } else {
        Err(corrupt(FormatError::Order("the header names another object")))
    }
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    use super::*;

    /// What a proxy between us and the store answers with status 200.
    const PAGE: &str = "<!doctype html><title>Sign in to the network</title>";

    async fn with_page(seq: u64) -> Arc<dyn ObjectStore> {
        let store = InMemory::new();
        store.put(&paths::stream_object("01a", seq), PAGE.into()).await.unwrap();
        Arc::new(store)
    }

    #[tokio::test]
    async fn a_page_in_place_of_an_object_is_neither_ours_nor_anothers_and_the_commit_stays_pending() {
        let store = with_page(1).await;
        let mut writer = StreamWriter::new(Arc::clone(&store), "01a", 1);
        for _ in 0..2 {
            assert!(matches!(writer.append(&Arc::default()).await, Err(StreamError::Corrupt { .. })));
            assert_eq!((writer.is_stalled(), writer.next_seq()), (true, 1));
        }
        store.delete(&paths::stream_object("01a", 1)).await.unwrap();
        assert_eq!(writer.append(&Arc::default()).await.unwrap(), 1);
        assert_eq!((writer.is_stalled(), writer.next_seq()), (false, 2));
    }

    #[tokio::test]
    async fn a_page_in_place_of_an_object_ends_no_stream_and_shortens_none() {
        let store = with_page(2).await;
        StreamWriter::new(Arc::clone(&store), "01a", 1).append(&Arc::default()).await.unwrap();
        for _ in 0..2 {
            assert!(matches!(fence(&*store, "01a", 1, "01b").await, Err(StreamError::Corrupt { .. })));
            assert!(matches!(read(&*store, "01a", 2).await, Err(StreamError::Corrupt { .. })));
        }
        assert_eq!(store.get(&paths::stream_object("01a", 2)).await.unwrap().bytes().await.unwrap(), PAGE);
        store.delete(&paths::stream_object("01a", 2)).await.unwrap();
        assert_eq!(last(&*store, "01a").await.unwrap(), Some(1));
        assert_eq!(fence(&*store, "01a", 1, "01b").await.unwrap(), Fence { seq: 2, by: "01b".to_owned() });
        assert_eq!(last(&*store, "01a").await.unwrap(), Some(2));
    }
}
