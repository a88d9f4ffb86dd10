//! The store that a reader sees: ranges of data files from chunks, everything else as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

use crate::Cache;
use crate::chunk::{self, CHUNK_BYTES, Chunk, Key};
use crate::flights::{self, Source};

/// Chunks of one request that are looked for on disk at once.
const LOOKS_MAX: usize = 16;

#[derive(Debug)]
pub(crate) struct Layer {
    cache: Cache,
    root: Arc<str>,
    store: Arc<dyn ObjectStore>,
    /// Bytes that this reader has put into the cache.
    taken: AtomicU64,
}

impl Layer {
    pub(crate) fn new(cache: Cache, root: Arc<str>, store: Arc<dyn ObjectStore>) -> Self {
        Self { cache, root, store, taken: AtomicU64::default() }
    }

    /// The bytes of `ranges`; `None` where the store has to say itself what it makes of them, or where the reader has had
    /// its share of the cache.
    async fn cached(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Option<Vec<Bytes>>> {
        let cache = &self.cache.0;
        let asked = ranges.iter().map(|range| range.end.saturating_sub(range.start)).fold(0, u64::saturating_add);
        if asked > cache.share_bytes {
            return Ok(None);
        }
        let Some(wanted) = chunks_of(ranges) else { return Ok(None) };
        let path: Arc<str> = location.as_ref().into();
        let source = Source { root: &self.root, path: &path, location, store: &self.store };
        let keys: Vec<Key> = wanted.iter().map(|number| source.key(*number)).collect();
        let mut found: BTreeMap<u32, Chunk> = stream::iter(keys)
            .map(|key| async move { cache.find(&key).await })
            .buffered(LOOKS_MAX)
            .filter_map(|chunk| async move { chunk.map(|chunk| (chunk.number, chunk)) })
            .collect()
            .await;
        cache.hits.fetch_add(found.len() as u64, Ordering::Relaxed);
        // Any chunk knows where the file ends: nothing is past it.
        let end = found.values().next().map_or(u64::MAX, |chunk| chunk.file_bytes.div_ceil(CHUNK_BYTES));
        let missing: Vec<u32> =
            wanted.into_iter().filter(|number| !found.contains_key(number) && u64::from(*number) < end).collect();
        if !missing.is_empty() {
            cache.misses.fetch_add(missing.len() as u64, Ordering::Relaxed);
            let asked = asked.min(missing.len() as u64 * CHUNK_BYTES);
            if self.taken.load(Ordering::Relaxed).saturating_add(asked) > cache.share_bytes {
                return Ok(None);
            }
            let fetched = flights::fetch(cache, &source, &missing).await?;
            let bytes: usize = fetched.values().map(|chunk| chunk.bytes.len()).sum();
            self.taken.fetch_add(bytes as u64, Ordering::Relaxed);
            found.extend(fetched);
        }
        Ok(ranges.iter().map(|range| cut(range, &found)).collect())
    }
}

/// The chunks that `ranges` touch; `None` if one is empty, turned around, or further than a file goes.
fn chunks_of(ranges: &[Range<u64>]) -> Option<BTreeSet<u32>> {
    let mut chunks = BTreeSet::new();
    for range in ranges {
        let last = range.end.checked_sub(1).filter(|last| *last >= range.start)?;
        chunks.extend(u32::try_from(range.start / CHUNK_BYTES).ok()?..=u32::try_from(last / CHUNK_BYTES).ok()?);
    }
    Some(chunks)
}

/// The bytes of `range`, which end with the file. `None` if it begins past that.
fn cut(range: &Range<u64>, chunks: &BTreeMap<u32, Chunk>) -> Option<Bytes> {
    let first = u32::try_from(range.start / CHUNK_BYTES).ok()?;
    let chunk = chunks.get(&first)?;
    let end = range.end.min(chunk.file_bytes);
    let length = usize::try_from(end.checked_sub(range.start).filter(|length| *length > 0)?).ok()?;
    let start = usize::try_from(range.start % CHUNK_BYTES).ok()?;
    if start + length <= chunk.bytes.len() {
        return Some(chunk.bytes.slice(start..start + length));
    }
    let mut bytes = BytesMut::with_capacity(length);
    bytes.extend_from_slice(chunk.bytes.get(start..)?);
    for number in first + 1.. {
        if bytes.len() == length {
            break;
        }
        let next = &chunks.get(&number)?.bytes;
        bytes.extend_from_slice(&next[..next.len().min(length - bytes.len())]);
    }
    Some(bytes.freeze())
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cached {}", self.store)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Layer {
    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        if chunk::is_data_file(location)
            && let Some(bytes) = self.cached(location, ranges).await?
        {
            return Ok(bytes);
        }
        self.store.get_ranges(location, ranges).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.store.get_opts(location, options).await
    }

    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.store.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(location, opts).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.store.rename_opts(from, to, options).await
    }
}
