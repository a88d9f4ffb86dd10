//! The log of users in the home store: what is known of each of them besides his token.
//!
//! Owns: the objects below `_catalog/users/`, who won a number, trimming. Does not own: who may change a user.
//!
//! ```text
//! {version:020}.json  {"format":1,"version","nonce","atUs","whole","users":[…]}
//! ```
//! An entry holds the users that it changes, every 64th all of them (`whole`). Any pod may write: it reads on to the end,
//! creates the next number, and if somebody else had it, reads on and tries again. Before the last whole entry but one
//! everything is deleted. A number that was freed so could be won by a writer that slept; therefore a writer has won only
//! when it sees, after its entry, none above it.

use std::collections::BTreeMap;

use bytes::Bytes;
use kalamdb_model::{StorageName, UserId};
use object_store::ObjectStore;
use object_store::path::Path;
use serde::{Deserialize, Serialize};

use crate::create::{self, Create, CreateError, create_exact};
use crate::paths;
use crate::stream::{StreamError, delete, list};

/// The format that this build writes, and the newest that it reads.
const FORMAT: u32 = 1;
/// Entries with such a number are whole.
const WHOLE_EVERY: u64 = 64;
/// How often a number that somebody else has won is followed by another try.
const ATTEMPTS_MAX: u32 = 16;

/// Which storage a user's rows lie in, where a table lets him choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StorageMode {
    /// The table's.
    #[default]
    Table,
    /// His own.
    Region,
}

/// What is known of a user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct User {
    /// Who he is.
    pub id: UserId,
    /// Whether `storage_id` counts.
    #[serde(default)]
    pub storage_mode: StorageMode,
    /// His storage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_id: Option<StorageName>,
}

impl User {
    /// The storage that he wants his rows in, if it is not each table's.
    #[must_use]
    pub fn region(&self) -> Option<&StorageName> {
        self.storage_id.as_ref().filter(|_| self.storage_mode == StorageMode::Region)
    }
}

/// An entry as stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    format: u32,
    version: u64,
    nonce: String,
    at_us: i64,
    whole: bool,
    users: Vec<User>,
}

/// All users at one version of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Number of the entry that this is the state after; 0 without any.
    pub version: u64,
    /// By id.
    pub users: BTreeMap<UserId, User>,
}

/// Why the log cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum UsersError {
    /// The store does not list or delete.
    #[error("failed to list the log of users")]
    List(#[from] StreamError),
    /// The store does not answer.
    #[error("failed to read `{path}`")]
    Read {
        /// The entry.
        path: Path,
        /// What the store said.
        source: object_store::Error,
    },
    /// An entry that cannot be understood; what follows builds on it.
    #[error("`{path}` is damaged or from a later version")]
    Corrupt {
        /// The entry.
        path: Path,
    },
    /// The store does not say whether the change is there: read again before it is tried again.
    #[error("the outcome of a change is unknown")]
    Unknown(#[source] CreateError),
    /// Others are always faster.
    #[error("the log of users changed {ATTEMPTS_MAX} times meanwhile")]
    Busy,
}

impl Users {
    /// The newest state.
    ///
    /// # Errors
    /// If the store does not answer or an entry is damaged; neither is ever taken for "no users".
    pub async fn load(home: &dyn ObjectStore) -> Result<Self, UsersError> {
        let mut users = Self::default();
        users.follow(home).await?;
        Ok(users)
    }

    /// Reads on to the newest state.
    ///
    /// # Errors
    /// As [`Users::load`]; what was read until then stays.
    pub async fn follow(&mut self, home: &dyn ObjectStore) -> Result<(), UsersError> {
        'again: for _ in 0..ATTEMPTS_MAX {
            let newest = numbers(home).await?.into_iter().max().unwrap_or(0);
            // The newest whole entry has all before it, and those before it may be gone.
            let whole = newest - newest % WHOLE_EVERY;
            let first = if whole > self.version { whole } else { self.version + 1 };
            for version in first..=newest {
                let path = paths::users_entry(version);
                let found = create::read(home, &path).await;
                let found = found.map_err(|source| UsersError::Read { path: path.clone(), source })?;
                // Deleted meanwhile, because a later one has all of it.
                let Some(found) = found else { continue 'again };
                self.apply(parse(&found, version).ok_or(UsersError::Corrupt { path })?);
            }
            return Ok(());
        }
        Err(UsersError::Busy)
    }

    /// Stores `user`, whatever is known of him now, and reads on to the state after that.
    ///
    /// # Errors
    /// As [`Users::load`], and [`UsersError::Unknown`], [`UsersError::Busy`].
    pub async fn put(&mut self, home: &dyn ObjectStore, user: User) -> Result<(), UsersError> {
        for _ in 0..ATTEMPTS_MAX {
            self.follow(home).await?;
            if self.users.get(&user.id) == Some(&user) {
                return Ok(());
            }
            let version = self.version + 1;
            let whole = version.is_multiple_of(WHOLE_EVERY);
            let mut after = self.clone();
            after.users.insert(user.id.clone(), user.clone());
            let users = if whole { after.users.into_values().collect() } else { vec![user.clone()] };
            let (nonce, at_us) = (create::nonce(), create::now_us());
            let entry = Entry { format: FORMAT, version, nonce, at_us, whole, users };
            let bytes = Bytes::from(serde_json::to_vec(&entry).expect("strings and numbers always have a JSON form"));
            let created = create_exact(home, &paths::users_entry(version), bytes).await.map_err(UsersError::Unknown)?;
            if created != Create::Ours {
                continue;
            }
            // The number may have been freed: then nobody reads the entry, and the next turn tries again.
            if numbers(home).await?.into_iter().any(|number| number > version) {
                continue;
            }
            self.apply(entry);
            if whole {
                // The entry counts; what is left is deleted after the next whole one.
                let _ = trim(home, version.saturating_sub(WHOLE_EVERY)).await;
            }
            return Ok(());
        }
        Err(UsersError::Busy)
    }

    fn apply(&mut self, entry: Entry) {
        if entry.whole {
            self.users.clear();
        }
        self.version = entry.version;
        self.users.extend(entry.users.into_iter().map(|user| (user.id.clone(), user)));
    }
}

async fn numbers(home: &dyn ObjectStore) -> Result<Vec<u64>, UsersError> {
    let listed = list(home, &paths::users_prefix()).await?;
    Ok(listed.iter().filter_map(paths::users_entry_version).collect())
}

/// Deletes what lies before the whole entry `keep_from`.
async fn trim(home: &dyn ObjectStore, keep_from: u64) -> Result<(), UsersError> {
    let gone = numbers(home).await?.into_iter().filter(|number| *number < keep_from).map(paths::users_entry);
    Ok(delete(home, gone.collect()).await?)
}

fn parse(bytes: &[u8], version: u64) -> Option<Entry> {
    let entry: Entry = serde_json::from_slice(bytes).ok()?;
    let whole = entry.whole == version.is_multiple_of(WHOLE_EVERY);
    (entry.format <= FORMAT && entry.version == version && whole).then_some(entry)
}
