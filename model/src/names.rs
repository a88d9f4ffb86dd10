//! Names in SQL and what they are called as Kubernetes objects.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest SQL name and longest part of a Kubernetes name, in bytes.
pub const NAME_BYTES_MAX: usize = 63;

/// Why a string is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Breaks the pattern.
    #[error(
        "`{0}` is not a name: use lower-case letters, digits and `_`, a letter first, at most 63 bytes, no `_` at the end"
    )]
    Sql(String),
    /// Breaks the pattern of storage names.
    #[error(
        "`{0}` is not a storage name: use lower-case letters, digits, `_` and `-`, a letter first, at most 63 bytes"
    )]
    Storage(String),
    /// Has no or several dots.
    #[error("`{0}` is not a table: write `namespace.table`")]
    Table(String),
}

/// A namespace, table or column: `[a-z]([a-z0-9_]*[a-z0-9])?`, at most 63 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SqlName(String);

/// A storage: like [`SqlName`], and may hold `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StorageName(String);

/// `namespace.table`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TableName {
    /// KalamDB's namespace, not the Kubernetes one.
    pub namespace: SqlName,
    /// The table in it.
    pub table: SqlName,
}

fn is_name(text: &str, also: char) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == also;
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.len() <= NAME_BYTES_MAX
        && text.chars().next().is_some_and(|c| c.is_ascii_lowercase())
        && text.chars().last().is_some_and(edge)
        && text.chars().all(inner)
}

impl SqlName {
    /// Checks `name`; SQL identifiers are lower-cased by the parser before they come here.
    ///
    /// # Errors
    /// Quotes the name and the rule.
    pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
        let name = name.into();
        if is_name(&name, '_') { Ok(Self(name)) } else { Err(NameError::Sql(name)) }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as a Kubernetes object name: `_` written as `-`. One-to-one, because SQL names hold no `-`.
    #[must_use]
    pub fn object_name(&self) -> String {
        self.0.replace('_', "-")
    }
}

impl StorageName {
    /// Checks `name`.
    ///
    /// # Errors
    /// Quotes the name and the rule.
    pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
        let name = name.into();
        if is_name(&name, '-') { Ok(Self(name)) } else { Err(NameError::Storage(name)) }
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name as a Kubernetes object name. Not one-to-one (`a_b` and `a-b` meet): the second is a conflict.
    #[must_use]
    pub fn object_name(&self) -> String {
        self.0.replace('_', "-")
    }
}

impl TableName {
    /// Parses `namespace.table`.
    ///
    /// # Errors
    /// If a part breaks the rule of [`SqlName`] or there are not exactly two.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        match text.split('.').collect::<Vec<_>>()[..] {
            [namespace, table] => Ok(Self { namespace: SqlName::new(namespace)?, table: SqlName::new(table)? }),
            _ => Err(NameError::Table(text.to_owned())),
        }
    }

    /// `metadata.name` of the table's object.
    #[must_use]
    pub fn object_name(&self) -> String {
        format!("{}.{}", self.namespace.object_name(), self.table.object_name())
    }
}

impl fmt::Display for SqlName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for StorageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.namespace, self.table)
    }
}

macro_rules! string_conversions {
    ($($name:ident: $parse:path),*) => {$(
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                $parse(text.as_ref())
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.to_string()
            }
        }
    )*};
}
string_conversions!(SqlName: Self::of_str, StorageName: Self::of_str, TableName: Self::parse);

impl SqlName {
    fn of_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl StorageName {
    fn of_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}

/// Namespaces that SQL keeps for itself.
pub const RESERVED_NAMESPACES: [&str; 4] = ["system", "information_schema", "public", "kalam"];

/// Columns that every table has besides its own: selectable by name, not part of `*`, never writable.
pub const SYSTEM_COLUMNS: [&str; 3] = ["_seq", "_updated", "_deleted"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_pattern() {
        for good in ["a", "a1", "chat_messages", &"a".repeat(63)] {
            assert!(SqlName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "A", "1a", "_a", "a_", "a-b", "a.b", "é", &"a".repeat(64)] {
            assert!(SqlName::new(bad).is_err(), "{bad}");
        }
        assert!(StorageName::new("s3-eu").is_ok());
    }

    #[test]
    fn a_table_is_named_as_an_object() {
        let name = TableName::parse("my_app.chat_messages").expect("valid");
        assert_eq!(name.object_name(), "my-app.chat-messages");
        assert!(TableName::parse("a").is_err());
        assert!(TableName::parse("a.b.c").is_err());
    }
}
