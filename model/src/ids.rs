//! Identifiers. Each is its own type, so a user id never stands where a name is meant.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Number of virtual shards, fixed for the life of an instance of KalamDB.
pub const SHARDS: u16 = 256;

/// A user as the token's `sub` names him: 1 to 256 bytes of UTF-8 without control characters, case-sensitive,
/// never normalized (`é` in its two normal forms is two users). `.` and `..` are refused, because no file path can hold them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UserId(String);

/// Why a string is no [`UserId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UserIdError {
    /// The empty string.
    #[error("a user id must not be empty")]
    Empty,
    /// More than 256 bytes.
    #[error("a user id has at most 256 bytes, got {0}")]
    TooLong(usize),
    /// A control character (Unicode category Cc).
    #[error("a user id must not contain control characters")]
    Control,
    /// `.` or `..`.
    #[error("a user id must not be `.` or `..`")]
    Dots,
}

impl UserId {
    /// Longest user id, in bytes.
    pub const MAX_BYTES: usize = 256;

    /// Checks `id`.
    ///
    /// # Errors
    /// Says which rule `id` breaks.
    pub fn new(id: impl Into<String>) -> Result<Self, UserIdError> {
        let id = id.into();
        if id.is_empty() {
            Err(UserIdError::Empty)
        } else if id.len() > Self::MAX_BYTES {
            Err(UserIdError::TooLong(id.len()))
        } else if id.chars().any(char::is_control) {
            Err(UserIdError::Control)
        } else if id == "." || id == ".." {
            Err(UserIdError::Dots)
        } else {
            Ok(Self(id))
        }
    }

    /// The id as given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for UserId {
    type Error = UserIdError;
    fn try_from(id: String) -> Result<Self, UserIdError> {
        Self::new(id)
    }
}

impl From<UserId> for String {
    fn from(id: UserId) -> Self {
        id.0
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a caller may do; each role may do what the ones before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads and writes his own rows.
    User,
    /// Acts for users (`EXECUTE AS USER`); cannot change schemas.
    Service,
    /// Changes schemas, storages and users.
    Dba,
    /// The product itself.
    System,
}

impl Role {
    /// The role as SQL, tokens and flags write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Service => "service",
            Self::Dba => "dba",
            Self::System => "system",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        [Self::User, Self::Service, Self::Dba, Self::System]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| format!("unknown role `{text}`; use one of `user`, `service`, `dba`, `system`"))
    }
}

/// A table's number in the catalog; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TableId(pub u32);

/// A column's number within its table; never reused. Parquet fields and stored rows bind to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ColumnId(pub u32);

/// Which filling of an instance's write buffer a row belongs to. A flush freezes one and opens the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u32);

/// One of the [`SHARDS`] virtual shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ShardId(pub u16);

/// Whose rows an instance holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Owner {
    /// The one instance of a shared table.
    Shared,
    /// One user's private instance.
    User(UserId),
}

/// One user's part of a user table, or a whole shared table: the unit of flush, manifest, lock and isolation.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct InstanceId {
    /// Whose rows.
    pub owner: Owner,
    /// Of which table.
    pub table: TableId,
}

impl InstanceId {
    /// The instance of `table` that belongs to `user`.
    #[must_use]
    pub const fn of_user(user: UserId, table: TableId) -> Self {
        Self { owner: Owner::User(user), table }
    }

    /// The shard: all tables of one user share it, a shared table has its own.
    #[must_use]
    pub fn shard(&self) -> ShardId {
        let hash = match &self.owner {
            Owner::User(user) => xxhash_rust::xxh3::xxh3_64(user.as_str().as_bytes()),
            Owner::Shared => xxhash_rust::xxh3::xxh3_64(&self.table.0.to_be_bytes()),
        };
        ShardId(u16::try_from(hash % u64::from(SHARDS)).expect("the remainder is below 256"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_id_of_256_bytes_is_taken_and_one_of_257_is_refused() {
        assert!(UserId::new("x".repeat(256)).is_ok());
        assert_eq!(UserId::new("x".repeat(257)), Err(UserIdError::TooLong(257)));
    }

    #[test]
    fn ids_that_no_path_can_hold_are_refused() {
        assert_eq!(UserId::new(""), Err(UserIdError::Empty));
        assert_eq!(UserId::new("."), Err(UserIdError::Dots));
        assert_eq!(UserId::new(".."), Err(UserIdError::Dots));
        assert_eq!(UserId::new("a\u{0}b"), Err(UserIdError::Control));
        assert_eq!(UserId::new("a\u{85}b"), Err(UserIdError::Control));
    }

    #[test]
    fn shards_of_stored_data_never_change() {
        let instance = |user: &str| InstanceId::of_user(UserId::new(user).expect("valid"), TableId(1)).shard();
        assert_eq!((instance("alice").0, instance("bob").0), SHARDS_OF_ALICE_AND_BOB);
    }

    /// Computed once; a change here means that stored rows would no longer be found.
    const SHARDS_OF_ALICE_AND_BOB: (u16, u16) = (176, 229);
}
