//! The ownership log: which volume serves an instance of KalamDB.
//!
//! Unflushed rows and manifests lie on one volume. A pod on another one, a second replica or the successor of a lost
//! volume, would answer with a part of the rows and look healthy; so the first volume claims the instance for good, and
//! any other is refused. Handing over is a later entry of the same log.

use bytes::Bytes;
use object_store::ObjectStore;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::create::{Create, CreateError, create_exact};
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
         lists of its files are there; bring that volume back, and run one query pod only"
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
    /// The entry cannot be read.
    #[error("`{path}` is damaged or from a later version")]
    Corrupt {
        /// The entry.
        path: Path,
    },
}

/// Claims the instance for `volume`. Claiming again from the same volume changes nothing.
///
/// # Errors
/// [`ClaimError::Owned`] is final; after [`ClaimError::Unknown`] the call may be repeated.
pub async fn claim(home: &dyn ObjectStore, volume: &str, pod: &str) -> Result<(), ClaimError> {
    let path = paths::owners_entry(1);
    let owner = Owner { format: FORMAT, volume: volume.to_owned(), pod: pod.to_owned() };
    let bytes = serde_json::to_vec(&owner).expect("strings and numbers always have a JSON form");
    let found = match create_exact(home, &path, Bytes::from(bytes)).await.map_err(ClaimError::Unknown)? {
        Create::Ours => return Ok(()),
        Create::Lost(found) => found,
    };
    let found: Owner = serde_json::from_slice(&found).map_err(|_| ClaimError::Corrupt { path: path.clone() })?;
    if found.format > FORMAT {
        return Err(ClaimError::Corrupt { path });
    }
    if found.volume == volume { Ok(()) } else { Err(ClaimError::Owned { volume: found.volume, pod: found.pod }) }
}

#[cfg(test)]
mod tests {
    use object_store::memory::InMemory;

    use super::*;

    #[tokio::test]
    async fn one_volume_owns_an_instance_for_good() {
        let home = InMemory::new();
        claim(&home, "one", "kalamdb-0").await.unwrap();
        claim(&home, "one", "kalamdb-0-renamed").await.unwrap();
        let refused = claim(&home, "two", "kalamdb-1").await.unwrap_err();
        assert!(matches!(&refused, ClaimError::Owned { volume, .. } if volume == "one"), "{refused}");
        assert!(refused.to_string().contains("kalamdb-0"));
    }
}
