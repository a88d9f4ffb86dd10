//! Finds out whether a storage can be used, before anybody's rows depend on it.
//!
//! Owns: one small object per probe, removed again. A crash leaves one of a few bytes in `_cluster/probe/`.

use std::time::Duration;

use bytes::Bytes;
use object_store::client::{HttpError, HttpErrorKind};
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt, PutMode, PutPayload};

use crate::{create, paths};

/// The whole probe.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What kind of trouble it is, from a closed list that conditions and metrics use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProbeReason {
    /// The credentials are wrong, or may not do this.
    AccessDenied,
    /// The bucket, container or folder does not exist.
    NotFound,
    /// No answer in time.
    Timeout,
    /// Anything else; the source says what.
    Other,
}

/// Why a storage cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the storage cannot {action} an object")]
pub struct ProbeError {
    /// What kind of trouble.
    pub reason: ProbeReason,
    /// `create`, `create twice`, `read` or `delete`.
    pub action: &'static str,
    /// What the store said.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Creates a small object, sees that it cannot be created twice, reads and deletes it.
///
/// Create-if-absent is tested because every log depends on it: a server that ignores the condition would let two
/// writers win one number.
///
/// # Errors
/// The first step that failed, and why.
pub async fn probe(store: &dyn ObjectStore) -> Result<(), ProbeError> {
    let nonce = create::nonce();
    let path = paths::probe_object(&nonce);
    tokio::time::timeout(TIMEOUT, steps(store, &path, Bytes::from(nonce)))
        .await
        .unwrap_or_else(|elapsed| Err(failed(ProbeReason::Timeout, "create", elapsed.into())))
}

async fn steps(store: &dyn ObjectStore, path: &Path, bytes: Bytes) -> Result<(), ProbeError> {
    let put = |bytes: Bytes| store.put_opts(path, PutPayload::from_bytes(bytes), PutMode::Create.into());
    put(bytes.clone()).await.map_err(|error| classified("create", error))?;
    let second = match put(Bytes::from_static(b"second")).await {
        Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(()),
        Err(error) => Err(classified("create twice", error)),
        Ok(_) => Err(failed(ProbeReason::Other, "create twice", "it ignores the condition `If-None-Match: *`".into())),
    };
    let found = match store.get(path).await {
        Ok(result) => result.bytes().await,
        Err(error) => Err(error),
    };
    let deleted = store.delete(path).await.map_err(|error| classified("delete", error));
    second?;
    if found.map_err(|error| classified("read", error))? != bytes {
        return Err(failed(ProbeReason::Other, "read", "it returned other bytes than were written".into()));
    }
    deleted
}

fn classified(action: &'static str, error: Error) -> ProbeError {
    let reason = match &error {
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => ProbeReason::AccessDenied,
        Error::NotFound { .. } => ProbeReason::NotFound,
        error if is_timeout(error) => ProbeReason::Timeout,
        _ => ProbeReason::Other,
    };
    failed(reason, action, error.into())
}

fn failed(reason: ProbeReason, action: &'static str, source: Box<dyn std::error::Error + Send + Sync>) -> ProbeError {
    ProbeError { reason, action, source }
}

fn is_timeout(error: &Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        let kind = error.downcast_ref::<HttpError>().map(HttpError::kind);
        if matches!(kind, Some(HttpErrorKind::Timeout | HttpErrorKind::Connect)) {
            return true;
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_store_that_works_is_left_as_it_was() {
        let store = object_store::memory::InMemory::new();
        probe(&store).await.unwrap();
        assert!(store.list_with_delimiter(None).await.unwrap().common_prefixes.is_empty());
    }
}
