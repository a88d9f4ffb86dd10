//! The commit stream of one incarnation in one storage: the order in which its flushes became true, and its end.
//!
//! Owns: numbers without gaps, the stall on an unknown answer, fences, replay. Does not own: the bytes
//! ([`StreamObject`]) or when to append (the committer's and the flush's business).
//!
//! After a crash: what was appended is found again by [`fence`], which also makes sure that nothing is appended any more.
//! A put that was given up may land at any later time; therefore the writer keeps number *and* bytes until it knows.
//! Fences are never deleted: a number that became free could be won by a writer that had slept.

use std::sync::Arc;

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::path::Path;

use crate::create::{self, Create, CreateError, create_exact};
use crate::manifest::Edit;
use crate::paths;
pub use crate::stream_format::{BLOCK_BYTES_MAX, Body, FORMAT, FormatError, Header, StreamObject};

/// Most edits of one object.
pub const APPEND_EDITS_MAX: usize = 10_000;
/// Largest object that is written; a round with more is split by the caller.
pub const APPEND_BYTES_MAX: usize = 16 << 20;
/// Most edits that [`fence`] keeps in memory, a few hundred bytes each. A pod records in its write buffer how far its
/// stream has come, so that in practice no more than one round is replayed.
pub const REPLAY_EDITS_MAX: usize = 100_000;

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
    /// More edits than fit in memory. Apply them with [`read`] up to `next_seq`, then fence from there.
    #[error("stream `{incarnation}` has more than {REPLAY_EDITS_MAX} edits before object {next_seq}")]
    TooMany {
        /// The stream.
        incarnation: String,
        /// The first object that was not replayed.
        next_seq: u64,
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
    edits: Vec<Edit>,
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

    /// Stores `edits` as the next object and returns its number: from then on they are true.
    ///
    /// After [`StreamError::Unknown`], or when the future was dropped, the same edits may be true or not. The next call
    /// resolves that first: called with the same edits it returns their number and writes them once only; called with
    /// others, it appends these after them.
    ///
    /// # Errors
    /// [`StreamError::Fenced`] and [`StreamError::Foreign`] are final. After others the call may be repeated.
    pub async fn append(&mut self, edits: Vec<Edit>) -> Result<u64, StreamError> {
        if let Some(pending) = &self.pending {
            let same = pending.edits == edits;
            let seq = self.settle().await?;
            if same {
                return Ok(seq);
            }
        }
        self.check_end()?;
        let bytes = self.encode(&edits)?;
        self.pending = Some(Pending { edits, bytes });
        self.settle().await
    }

    /// Resolves an append whose outcome is unknown; its number if there was one. After `Ok` nothing is pending.
    ///
    /// # Errors
    /// As [`StreamWriter::append`].
    pub async fn resolve(&mut self) -> Result<Option<u64>, StreamError> {
        if self.pending.is_none() { Ok(None) } else { self.settle().await.map(Some) }
    }

    fn encode(&self, edits: &[Edit]) -> Result<Bytes, StreamError> {
        let too_large = |bytes| StreamError::TooLarge { edits: edits.len(), bytes };
        if edits.len() > APPEND_EDITS_MAX {
            return Err(too_large(0));
        }
        let body = Body::Edits(edits.to_vec());
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

/// What a stream held that is now ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// Its edits from the number that was asked for, each with the number of its object, in commit order.
    pub edits: Vec<(u64, Edit)>,
    /// Number of the fence.
    pub fence_seq: u64,
    /// Who ended the stream: the caller, or somebody before him.
    pub fenced_by: String,
}

/// What a stream holds so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    /// Its edits from the number that was asked for, in commit order.
    pub edits: Vec<Edit>,
    /// Who ended it, if it is ended.
    pub fenced_by: Option<String>,
}

/// What the stream of `incarnation` holds from `from_seq` on, as far as it has come. Ends nothing: more may follow.
///
/// # Errors
/// As [`fence`].
pub async fn look(store: &dyn ObjectStore, incarnation: &str, from_seq: u64) -> Result<Look, StreamError> {
    let mut edits = Vec::new();
    let mut seq = from_seq;
    while let Some(found) = read(store, incarnation, seq).await? {
        match found.body {
            Body::Fence { by } => return Ok(Look { edits, fenced_by: Some(by) }),
            Body::Edits(more) => edits.extend(more),
        }
        seq += 1;
        if edits.len() > REPLAY_EDITS_MAX {
            return Err(StreamError::TooMany { incarnation: incarnation.to_owned(), next_seq: seq });
        }
    }
    Ok(Look { edits, fenced_by: None })
}

/// Ends the stream of `incarnation` for ever, and returns what it holds from `from_seq` on.
///
/// A fence that is there already, ours or another's, ends it just as well: a caller that died after its fence, and its
/// successor, both get the same answer. Memory is bounded by [`REPLAY_EDITS_MAX`] and one object at a time.
///
/// # Errors
/// Nothing is concluded from an unknown answer or a damaged object: until the call succeeds the stream may go on.
pub async fn fence(store: &dyn ObjectStore, incarnation: &str, from_seq: u64, by: &str) -> Result<Replay, StreamError> {
    let mut edits = Vec::new();
    let mut seq = from_seq;
    loop {
        let path = paths::stream_object(incarnation, seq);
        let bytes = object_bytes(incarnation, seq, Body::Fence { by: by.to_owned() })?;
        let found = match create_exact(store, &path, bytes).await.map_err(StreamError::Unknown)? {
            Create::Ours => return Ok(Replay { edits, fence_seq: seq, fenced_by: by.to_owned() }),
            Create::Lost(found) => decode(&found, &path, incarnation, seq)?,
        };
        match found.body {
            Body::Fence { by } => return Ok(Replay { edits, fence_seq: seq, fenced_by: by }),
            Body::Edits(more) => edits.extend(more.into_iter().map(|edit| (seq, edit))),
        }
        seq += 1;
        if edits.len() > REPLAY_EDITS_MAX {
            return Err(StreamError::TooMany { incarnation: incarnation.to_owned(), next_seq: seq });
        }
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

fn object_bytes(incarnation: &str, seq: u64, body: Body) -> Result<Bytes, StreamError> {
    StreamObject::new(incarnation, seq, create::nonce(), create::now_us(), body)
        .and_then(|object| object.encode())
        .map(Bytes::from)
        .map_err(StreamError::Encode)
}

/// Decodes, and checks that the object says of itself what its path says.
fn decode(bytes: &[u8], path: &Path, incarnation: &str, seq: u64) -> Result<StreamObject, StreamError> {
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
            assert!(matches!(writer.append(Vec::new()).await, Err(StreamError::Corrupt { .. })));
            assert_eq!((writer.is_stalled(), writer.next_seq()), (true, 1));
        }
        store.delete(&paths::stream_object("01a", 1)).await.unwrap();
        assert_eq!(writer.append(Vec::new()).await.unwrap(), 1);
        assert_eq!((writer.is_stalled(), writer.next_seq()), (false, 2));
    }

    #[tokio::test]
    async fn a_page_in_place_of_an_object_ends_no_stream_and_shortens_none() {
        let store = with_page(2).await;
        StreamWriter::new(Arc::clone(&store), "01a", 1).append(Vec::new()).await.unwrap();
        for _ in 0..2 {
            assert!(matches!(fence(&*store, "01a", 1, "01b").await, Err(StreamError::Corrupt { .. })));
            assert!(matches!(look(&*store, "01a", 1).await, Err(StreamError::Corrupt { .. })));
            assert!(matches!(read(&*store, "01a", 2).await, Err(StreamError::Corrupt { .. })));
        }
        assert_eq!(store.get(&paths::stream_object("01a", 2)).await.unwrap().bytes().await.unwrap(), PAGE);
        store.delete(&paths::stream_object("01a", 2)).await.unwrap();
        assert_eq!(look(&*store, "01a", 1).await.unwrap(), Look { edits: Vec::new(), fenced_by: None });
        assert_eq!(fence(&*store, "01a", 1, "01b").await.unwrap().fence_seq, 2);
        assert_eq!(look(&*store, "01a", 1).await.unwrap().fenced_by.as_deref(), Some("01b"));
    }
}
