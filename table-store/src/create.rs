//! Creates an object exactly once, whatever the store answers. Every conditional put goes through here.
//!
//! Owns: what an ambiguous answer means. Does not own: paths and contents; the caller puts a nonce into the bytes, so
//! that no other writer makes the same ones.
//!
//! After a crash the object is there whole or not at all. A put that was given up may still land later: the caller must
//! not move on to another path until this one is resolved, and resolves it by calling again with the same bytes.

use std::time::Duration;

use bytes::Bytes;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};

/// Puts after the first one.
const RETRIES_MAX: u32 = 3;
/// Pause before the first retry; doubles with each: 100 + 200 + 400 ms.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// One small request, the store's own retries included; 4 puts and 4 gets make at most 80 s.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// What a slow line carries in a second: large objects get more time.
const BYTES_PER_SECOND_MIN: u64 = 1 << 20;

/// Who created the object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Create {
    /// This call, or an earlier one with the same bytes.
    Ours,
    /// Somebody else; holds what is there.
    Lost(Bytes),
}

/// Why it is not known who created the object.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The store did not say, and may still create the object later.
    #[error("cannot tell whether `{path}` was created, after {attempts} attempts")]
    Unknown {
        /// The object.
        path: Path,
        /// Puts that were tried.
        attempts: u32,
        /// The last answer.
        source: object_store::Error,
    },
}

/// Creates `path` with `bytes` unless it is there, and says who created it.
///
/// # Errors
/// [`CreateError::Unknown`] when the store gave no definite answer in 4 attempts: neither success nor failure may be
/// concluded from it.
pub async fn create_exact(store: &dyn ObjectStore, path: &Path, bytes: Bytes) -> Result<Create, CreateError> {
    let mut attempt = 0;
    loop {
        let put = store.put_opts(path, PutPayload::from_bytes(bytes.clone()), PutMode::Create.into());
        let failure = match within_for(bytes.len() as u64, put).await {
            Ok(_) => return Ok(Create::Ours),
            // Even "already exists" may be our own put: the store may have retried it, or lost its first answer.
            Err(failure) => failure,
        };
        let source = match read(store, path).await {
            Ok(Some(found)) if found == bytes => return Ok(Create::Ours),
            Ok(Some(found)) => return Ok(Create::Lost(found)),
            Ok(None) => failure,
            Err(failure) => failure,
        };
        attempt += 1;
        if attempt > RETRIES_MAX {
            return Err(CreateError::Unknown { path: path.clone(), attempts: attempt, source });
        }
        tokio::time::sleep(BACKOFF_FIRST * 2_u32.pow(attempt - 1)).await;
    }
}

/// The bytes at `path`; `None` only when the store says that nothing is there.
pub(crate) async fn read(store: &dyn ObjectStore, path: &Path) -> Result<Option<Bytes>, object_store::Error> {
    let get = async {
        let found = within(store.get(path)).await?;
        let size = found.meta.size;
        let bytes = within_for(size, found.bytes()).await?;
        // Nobody below counts: a body that ends early would be another object.
        if bytes.len() as u64 == size {
            Ok(bytes)
        } else {
            let source = format!("`{path}` has {size} bytes, and {} of them came", bytes.len()).into();
            Err(object_store::Error::Generic { store: "table-store", source })
        }
    };
    match get.await {
        Ok(bytes) => Ok(Some(bytes)),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Bounds one small request.
pub(crate) async fn within<T>(
    call: impl Future<Output = Result<T, object_store::Error>>,
) -> Result<T, object_store::Error> {
    within_for(0, call).await
}

/// Bounds a request that carries so many bytes.
async fn within_for<T>(
    bytes: u64,
    call: impl Future<Output = Result<T, object_store::Error>>,
) -> Result<T, object_store::Error> {
    let limit = CALL_TIMEOUT + Duration::from_secs(bytes / BYTES_PER_SECOND_MIN);
    tokio::time::timeout(limit, call)
        .await
        .unwrap_or_else(|elapsed| Err(object_store::Error::Generic { store: "table-store", source: Box::new(elapsed) }))
}

/// A text that no other process makes: what tells our object from another's.
#[must_use]
pub fn nonce() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Microseconds since 1970, for people who look into an object; nothing is decided by it.
pub(crate) fn now_us() -> i64 {
    chrono::Utc::now().timestamp_micros()
}
