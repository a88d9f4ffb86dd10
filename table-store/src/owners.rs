//! The ownership log: which volume serves an instance of KalamDB.
//!
//! Unflushed rows and manifests lie on one volume. A pod on another one, such as a second replica, would answer with a part
//! of the rows and look healthy; so a volume claims the instance, and others are refused. Only a pod of the same name may
//! claim it again from a new volume: Kubernetes runs at most one, so the old volume is lost, and what was on it has to be
//! read back from the storages. The last entry counts.

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::create::{self, Create, CreateError, create_exact};
use crate::paths;

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
    #[error("failed to claim the instance")]
    Unknown(#[source] CreateError),
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
    while let Some(owner) = read(home, &paths::owners_entry(entries + 1)).await? {
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
    let bytes = serde_json::to_vec(&ours).expect("strings and numbers always have a JSON form");
    match create_exact(home, &path, Bytes::from(bytes)).await.map_err(ClaimError::Unknown)? {
        Create::Ours => Ok(claimed(entries + 1)),
        Create::Lost(found) => {
            let Owner { volume, pod, .. } = parse(&found, &path)?;
            Err(ClaimError::Owned { volume, pod })
        }
    }
}

async fn read(home: &dyn ObjectStore, path: &Path) -> Result<Option<Owner>, ClaimError> {
    match create::read(home, path).await {
        Ok(Some(bytes)) => parse(&bytes, path).map(Some),
        Ok(None) => Ok(None),
        Err(source) => Err(ClaimError::Read { path: path.clone(), source }),
    }
}

fn parse(bytes: &[u8], path: &Path) -> Result<Owner, ClaimError> {
    let corrupt = || ClaimError::Corrupt { path: path.clone() };
    let owner: Owner = serde_json::from_slice(bytes).map_err(|_| corrupt())?;
    if owner.format > FORMAT { Err(corrupt()) } else { Ok(owner) }
}

#[cfg(test)]
mod tests {
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
    }
}
