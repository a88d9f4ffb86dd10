//! The ownership log: which volume serves an instance of KalamDB.
//!
//! Unflushed rows and manifests lie on one volume. A pod on another one, such as a second replica, would answer with a part
//! of the rows and look healthy; so a volume claims the instance, and others are refused. Only a pod of the same name may
//! claim it again from a new volume: Kubernetes runs at most one, so the old volume is lost, and what was on it has to be
//! read back from the storages. The last entry counts.
//!
//! And which storages the instance has. Each is held by one instance for ever, by an object of its own ([`hold`]): it is
//! known by the volume that had it first, the [`founder`]. Before that the home store is told ([`note_used`]), so that a
//! new volume knows which storages it has to wait for, and which have nothing of it.

use std::collections::BTreeSet;

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::path::Path;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::create::{self, Create, CreateError, create_exact};
use crate::paths;
use crate::stream::{self, StreamError};

/// Format that this version writes and reads.
const FORMAT: u32 = 1;

/// An entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    /// Version of this format.
    pub format: u32,
    /// The volume: a random id that lies on it.
    pub volume: String,
    /// Name of the pod that claimed; for people.
    pub pod: String,
}

/// Whose a storage is.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Holder {
    format: u32,
    founder: String,
}

/// A storage root that is used.
#[derive(Serialize)]
struct Used<'a> {
    format: u32,
    name: &'a str,
}

/// Why the instance is not ours.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another volume has it.
    #[error(
        "the instance belongs to volume `{volume}` of pod `{pod}`, and this is another one: its unflushed rows and the \
         lists of its files are there; run one query pod only, and bring that volume back, or start a pod of that name \
         without it to go on from what the storages have"
    )]
    Owned {
        /// The volume.
        volume: String,
        /// The pod that claimed.
        pod: String,
    },
    /// The store does not say.
    #[error("it is not known what became of a claim")]
    Unknown(#[source] CreateError),
    /// The store does not list.
    #[error("failed to list the storages that are used")]
    List(#[source] StreamError),
    /// The store does not answer a read.
    #[error("failed to read `{path}`")]
    Read {
        /// The entry.
        path: Path,
        /// What the store said.
        source: object_store::Error,
    },
    /// The entry cannot be read.
    #[error("`{path}` is damaged or from a later version")]
    Corrupt {
        /// The entry.
        path: Path,
    },
}

/// How the instance became ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimed {
    /// Nobody had it before.
    First,
    /// From a volume that is lost: its data has to be read back.
    Succeeded,
}

/// Claims the instance for `volume`. Claiming again from the same volume changes nothing.
///
/// # Errors
/// [`ClaimError::Owned`] is final; after the others the call may be repeated.
pub async fn claim(home: &dyn ObjectStore, volume: &str, pod: &str) -> Result<Claimed, ClaimError> {
    let ours = Owner { format: FORMAT, volume: volume.to_owned(), pod: pod.to_owned() };
    let (mut entries, mut had_it) = (0, false);
    let mut last = None;
    while let Some(owner) = read::<Owner>(home, &paths::owners_entry(entries + 1)).await? {
        entries += 1;
        had_it |= owner.volume == volume;
        last = Some(owner);
    }
    let claimed = |entry| if entry == 1 { Claimed::First } else { Claimed::Succeeded };
    match last {
        Some(owner) if owner.volume == volume => return Ok(claimed(entries)),
        // A volume that was succeeded once is an older copy.
        Some(owner) if owner.pod != pod || had_it => {
            return Err(ClaimError::Owned { volume: owner.volume, pod: owner.pod });
        }
        _ => {}
    }
    let path = paths::owners_entry(entries + 1);
    match create_exact(home, &path, json(&ours)).await.map_err(ClaimError::Unknown)? {
        Create::Ours => Ok(claimed(entries + 1)),
        Create::Lost(found) => {
            let Owner { volume, pod, .. } = parse(&found, &path)?;
            Err(ClaimError::Owned { volume, pod })
        }
    }
}

/// The volume that had the instance first: storages know the instance by it, whatever volume has it now. `None` if nobody
/// ever claimed it.
///
/// # Errors
/// If the store does not answer, or the entry is damaged.
pub async fn founder(home: &dyn ObjectStore) -> Result<Option<String>, ClaimError> {
    Ok(read::<Owner>(home, &paths::owners_entry(1)).await?.map(|owner| owner.volume))
}

/// The founder of the instance that holds a storage; `None` if nobody does.
///
/// # Errors
/// As [`founder`].
pub async fn holder(storage: &dyn ObjectStore) -> Result<Option<String>, ClaimError> {
    Ok(read::<Holder>(storage, &paths::holder()).await?.map(|holder| holder.founder))
}

/// Takes a storage for the instance of `founder`, and tells whose it is: another's, if he was faster.
///
/// # Errors
/// If the store does not say; the call may be repeated.
pub async fn hold(storage: &dyn ObjectStore, founder: &str) -> Result<String, ClaimError> {
    let (path, ours) = (paths::holder(), Holder { format: FORMAT, founder: founder.to_owned() });
    match create_exact(storage, &path, json(&ours)).await.map_err(ClaimError::Unknown)? {
        Create::Ours => Ok(ours.founder),
        Create::Lost(found) => Ok(parse::<Holder>(&found, &path)?.founder),
    }
}

/// Takes note that the storage root of this name is used. Doing it again changes nothing.
///
/// # Errors
/// If the store does not say; the call may be repeated.
pub async fn note_used(home: &dyn ObjectStore, name: &str) -> Result<(), ClaimError> {
    let created = create_exact(home, &paths::used_entry(name), json(&Used { format: FORMAT, name })).await;
    // Whatever it holds: its name says all.
    created.map(drop).map_err(ClaimError::Unknown)
}

/// The names of all storage roots that are used.
///
/// # Errors
/// If the store does not list: that is never "none".
pub async fn used(home: &dyn ObjectStore) -> Result<BTreeSet<String>, ClaimError> {
    let listed = stream::list(home, &paths::used_prefix()).await.map_err(ClaimError::List)?;
    Ok(listed.iter().filter_map(paths::used_name).collect())
}

fn json(content: &impl Serialize) -> Bytes {
    serde_json::to_vec(content).expect("strings and numbers always have a JSON form").into()
}

async fn read<T: DeserializeOwned>(store: &dyn ObjectStore, path: &Path) -> Result<Option<T>, ClaimError> {
    match create::read(store, path).await {
        Ok(Some(bytes)) => parse(&bytes, path).map(Some),
        Ok(None) => Ok(None),
        Err(source) => Err(ClaimError::Read { path: path.clone(), source }),
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<T, ClaimError> {
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let corrupt = || ClaimError::Corrupt { path: path.clone() };
    let Versioned { format } = serde_json::from_slice(bytes).map_err(|_| corrupt())?;
    if format > FORMAT {
        return Err(corrupt());
    }
    serde_json::from_slice(bytes).map_err(|_| corrupt())
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    use super::*;

    #[tokio::test]
    async fn one_volume_owns_an_instance_until_a_pod_of_the_same_name_comes_with_another() {
        let home = InMemory::new();
        for pod in ["kalamdb-0", "kalamdb-0", "kalamdb-0-renamed"] {
            assert_eq!(claim(&home, "one", pod).await.unwrap(), Claimed::First);
        }
        let refused = claim(&home, "two", "kalamdb-1").await.unwrap_err();
        assert!(matches!(&refused, ClaimError::Owned { volume, .. } if volume == "one"), "{refused}");
        assert!(refused.to_string().contains("kalamdb-0"));
        for _ in 0..2 {
            assert_eq!(claim(&home, "two", "kalamdb-0").await.unwrap(), Claimed::Succeeded);
        }
        let late = claim(&home, "one", "kalamdb-0").await.unwrap_err();
        assert!(matches!(&late, ClaimError::Owned { volume, .. } if volume == "two"), "{late}");
        assert!(claim(&home, "two-too", "kalamdb-1").await.is_err());
        assert_eq!(claim(&home, "three", "kalamdb-0").await.unwrap(), Claimed::Succeeded);
        assert_eq!(founder(&home).await.unwrap().as_deref(), Some("one"));
    }

    #[tokio::test]
    async fn a_storage_is_held_by_whoever_comes_first_and_what_cannot_be_read_is_never_nobodys() {
        let storage = InMemory::new();
        assert_eq!(holder(&storage).await.unwrap(), None);
        for founder in ["one", "two", "one"] {
            assert_eq!(hold(&storage, founder).await.unwrap(), "one");
        }
        assert_eq!(holder(&storage).await.unwrap().as_deref(), Some("one"));
        storage.put(&paths::holder(), r#"{"format":1,"founder":"written before"}"#.into()).await.unwrap();
        assert_eq!(holder(&storage).await.unwrap().as_deref(), Some("written before"));
        for damage in ["<html>", r#"{"format":2,"founder":"one"}"#, "{}"] {
            storage.put(&paths::holder(), damage.into()).await.unwrap();
            assert!(matches!(holder(&storage).await, Err(ClaimError::Corrupt { .. })), "{damage}");
            assert!(hold(&storage, "two").await.is_err(), "{damage}");
        }
    }

    #[tokio::test]
    async fn the_home_store_knows_each_storage_that_is_used() {
        let home = InMemory::new();
        assert!(used(&home).await.unwrap().is_empty());
        for name in ["eu.1/s3:bucket/", "eu.2/s3:other/a/b", "eu.1/s3:bucket/"] {
            note_used(&home, name).await.unwrap();
        }
        assert!(used(&home).await.unwrap().iter().eq(["eu.1/s3:bucket/", "eu.2/s3:other/a/b"]));
    }
}
