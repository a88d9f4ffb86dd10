//! Counts the requests to a store, by kind. What the store's client repeats by itself counts once.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, OBJECT_STORE_COALESCE_DEFAULT, ObjectMeta,
    ObjectStore, ObjectStoreExt as _, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
    coalesce_ranges,
};
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;

/// What is asked of a store.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Kind {
    /// An object or a part of one.
    Get,
    /// What there is to know of an object.
    Head,
    /// An object is written.
    Put,
    /// An object is removed.
    Delete,
    /// Objects below a prefix.
    List,
    /// An object gets another name.
    Copy,
}

impl EncodeLabelValue for Kind {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> std::result::Result<(), fmt::Error> {
        let text = match self {
            Self::Get => "get",
            Self::Head => "head",
            Self::Put => "put",
            Self::Delete => "delete",
            Self::List => "list",
            Self::Copy => "copy",
        };
        text.encode(encoder)
    }
}

/// Label of requests.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct Asked {
    kind: Kind,
}

/// Requests to all storages.
pub type Requests = Family<Asked, Counter>;

/// Where the ranges of an object are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// On this machine: several ranges are one look.
    Local,
    /// Elsewhere: ranges that lie close together are one request.
    Remote,
}

/// A store whose requests are counted.
#[derive(Debug)]
pub(super) struct Counted {
    store: Arc<dyn ObjectStore>,
    reach: Reach,
    requests: Requests,
}

impl Counted {
    pub(super) fn new(store: Arc<dyn ObjectStore>, reach: Reach, requests: Requests) -> Self {
        Self { store, reach, requests }
    }

    fn count(&self, kind: Kind) {
        self.requests.get_or_create(&Asked { kind }).inc();
    }

    /// A range of an object, or an error: several are cut from one body, which must not end before them.
    async fn whole_range(&self, location: &Path, range: Range<u64>) -> Result<Bytes> {
        let length = range.end.saturating_sub(range.start);
        let bytes = self.get_range(location, range).await?;
        if bytes.len() as u64 == length {
            Ok(bytes)
        } else {
            let source = format!("{} bytes of `{location}` came, and {length} were asked for", bytes.len()).into();
            Err(Error::Generic { store: "storage", source })
        }
    }
}

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Counted {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.count(Kind::Put);
        self.store.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.count(Kind::Put);
        self.store.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.count(if options.head { Kind::Head } else { Kind::Get });
        self.store.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        match self.reach {
            Reach::Local => {
                self.count(Kind::Get);
                self.store.get_ranges(location, ranges).await
            }
            // As the clients of remote stores do it themselves, but past the count.
            Reach::Remote => {
                let get = |range| self.whole_range(location, range);
                coalesce_ranges(ranges, get, OBJECT_STORE_COALESCE_DEFAULT).await
            }
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let deleted = self.requests.get_or_create_owned(&Asked { kind: Kind::Delete });
        self.store.delete_stream(locations.inspect(move |_| _ = deleted.inc()).boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.count(Kind::List);
        self.store.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.count(Kind::List);
        self.store.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.count(Kind::List);
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.count(Kind::Copy);
        self.store.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.count(Kind::Copy);
        self.store.rename_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests {
    use kalamdb_test_support::fault_store::{FaultStore, Rates};
    use object_store::memory::InMemory;

    use super::*;

    #[tokio::test]
    async fn ranges_of_a_body_that_ends_early_are_an_error() {
        let (truth, path) = (Arc::new(InMemory::new()), Path::from("a.parquet"));
        truth.put(&path, PutPayload::from(vec![7_u8; 1_000])).await.unwrap();
        let faults = FaultStore::healthy(truth);
        let store = Counted::new(Arc::new(faults.clone()), Reach::Remote, Requests::default());
        let ranges = [0..10, 900..1_000];
        assert_eq!(store.get_ranges(&path, &ranges).await.unwrap().concat(), [7; 110]);
        faults.set_rates(Rates { short: 1.0, ..Rates::default() });
        for cut in [0, 5, 500, 999] {
            faults.cut_at(cut);
            assert!(store.get_ranges(&path, &ranges).await.is_err(), "after {cut} bytes");
        }
    }
}
