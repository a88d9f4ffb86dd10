//! What people declare, after decoding and before [`crate::compile()`]: the same for Kubernetes objects and for YAML files.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::defaults::DefaultExpr;
use crate::names::{SqlName, StorageName};
use crate::template;
use crate::types::ColumnType;

/// The kinds of declared objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// A storage.
    Storage,
    /// A namespace of KalamDB.
    Namespace,
    /// A replica node.
    ReplicaNode,
    /// A table with one private instance per user.
    UserTable,
    /// A table that all users share.
    SharedTable,
}

impl Kind {
    /// The kind as manifests write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Storage => "Storage",
            Self::Namespace => "Namespace",
            Self::ReplicaNode => "ReplicaNode",
            Self::UserTable => "UserTable",
            Self::SharedTable => "SharedTable",
        }
    }
}

/// Which object, in which state. Standalone: `uid` is `kind/name`, `resource_version` a hash of the text, `created` 0.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectRef {
    /// Its kind.
    pub kind: Kind,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.resourceVersion`.
    pub resource_version: String,
    /// `metadata.generation`.
    pub generation: i64,
    /// `metadata.creationTimestamp`, seconds since 1970; of two that claim one name the older wins.
    pub created: i64,
}

/// One declared object.
#[derive(Clone, Debug, PartialEq)]
pub struct Declared {
    /// Which.
    pub object: ObjectRef,
    /// Whether it is being deleted (`deletionTimestamp` is set): still served, but nothing new may refer to it.
    pub deleting: bool,
    /// What it says, or why it cannot be read: all problems, each naming its field (`spec.columns[2].type: …`).
    pub spec: Result<Spec, Vec<String>>,
}

/// What an object says. References are object names (`metadata.name`), not SQL names.
#[derive(Clone, Debug, PartialEq)]
pub enum Spec {
    /// See [`StorageSpec`].
    Storage(StorageSpec),
    /// See [`NamespaceSpec`].
    Namespace(NamespaceSpec),
    /// See [`NodeSpec`].
    ReplicaNode(NodeSpec),
    /// A user or shared table; the object's kind tells which.
    Table(Box<TableSpec>),
}

/// A place for files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageSpec {
    /// Name in SQL.
    pub sql_name: StorageName,
    /// For people.
    pub display_name: Option<String>,
    /// Where.
    pub root: StorageRoot,
    /// Secret in the same Kubernetes namespace; `None` = the pod's own identity.
    pub credentials_secret: Option<String>,
    /// Template for shared tables.
    pub shared_tables_template: String,
    /// Template for user tables.
    pub user_tables_template: String,
}

/// A bucket, container or folder, with how to reach it. [`StorageRoot::identity`] is what makes it the same place.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "type", rename_all_fields = "camelCase")]
pub enum StorageRoot {
    /// A folder; a relative path is relative to the data directory.
    Filesystem {
        /// The folder.
        path: String,
    },
    /// Amazon S3 or a server that speaks it.
    S3 {
        /// Bucket.
        bucket: String,
        /// Key prefix without slashes at its ends, may be empty.
        prefix: String,
        /// Region; `us-east-1` if nothing else is known.
        region: Option<String>,
        /// URL of a server other than AWS.
        endpoint: Option<String>,
        /// `endpoint/bucket/key` rather than `bucket.endpoint/key`.
        path_style: bool,
        /// Whether `http://` endpoints are taken.
        allow_http: bool,
    },
    /// Google Cloud Storage.
    Gcs {
        /// Bucket.
        bucket: String,
        /// As for S3.
        prefix: String,
    },
    /// Azure Blob Storage.
    Azure {
        /// Account.
        account: String,
        /// Container.
        container: String,
        /// As for S3.
        prefix: String,
        /// URL of a server other than Azure's.
        endpoint: Option<String>,
    },
}

impl StorageRoot {
    /// What must stay the same for stored files to be found: changing it is a new root, changing the rest (how to reach
    /// it) is not.
    #[must_use]
    pub fn identity(&self) -> String {
        let (place, path) = self.place();
        match self {
            Self::S3 { bucket, .. } => format!("s3:{bucket}/{path}"),
            _ => format!("{place}/{path}"),
        }
    }

    /// The bucket, container or file system, and the path in it below which files lie.
    #[must_use]
    pub fn place(&self) -> (String, &str) {
        match self {
            Self::Filesystem { path } => ("file:".to_owned(), path.trim_start_matches("./")),
            Self::S3 { bucket, prefix, endpoint, .. } => {
                (format!("s3:{}/{bucket}", endpoint.as_deref().unwrap_or("")), prefix)
            }
            Self::Gcs { bucket, prefix } => (format!("gs:{bucket}"), prefix),
            Self::Azure { account, container, prefix, .. } => (format!("az:{account}/{container}"), prefix),
        }
    }

    /// Whether `other` names the same place, in the same words.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        let ((place, path), (other_place, other_path)) = (self.place(), other.place());
        place == other_place && path.trim_end_matches('/') == other_path.trim_end_matches('/')
    }

    /// Whether files of `template` below this root and files of `other_template` below `other` could be the same.
    #[must_use]
    pub fn overlaps(&self, template: &str, other: &Self, other_template: &str) -> bool {
        let ((place, path), (other_place, other_path)) = (self.place(), other.place());
        let full = |path: &str, template: &str| format!("{path}/{template}").trim_matches('/').to_owned();
        place == other_place && template::overlap(&full(path, template), &full(other_path, other_template))
    }

    /// The root as a URL, for messages and for matching inline locations: `s3://bucket/prefix`, `file:///data`.
    #[must_use]
    pub fn url(&self) -> String {
        let join = |scheme: &str, bucket: &str, prefix: &str| {
            if prefix.is_empty() { format!("{scheme}://{bucket}") } else { format!("{scheme}://{bucket}/{prefix}") }
        };
        match self {
            Self::Filesystem { path } => format!("file://{path}"),
            Self::S3 { bucket, prefix, .. } => join("s3", bucket, prefix),
            Self::Gcs { bucket, prefix } => join("gs", bucket, prefix),
            Self::Azure { container, prefix, .. } => join("az", container, prefix),
        }
    }
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceSpec {
    /// Name in SQL.
    pub sql_name: SqlName,
    /// Storage for tables that name none.
    pub default_storage: Option<String>,
    /// Free options, shown by `SHOW NAMESPACES`.
    pub options: std::collections::BTreeMap<String, String>,
}

/// A replica node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// For people.
    pub display_name: Option<String>,
    /// `host:port`.
    pub address: String,
    /// What `replication.tags` select by.
    pub tags: Vec<String>,
    /// No new assignments.
    pub unschedulable: bool,
}

/// A table. Columns in the order that they were written.
#[derive(Clone, Debug, PartialEq)]
pub struct TableSpec {
    /// Object name of the namespace.
    pub namespace_ref: String,
    /// Name in SQL, without the namespace.
    pub table_name: SqlName,
    /// At least one.
    pub columns: Vec<ColumnSpec>,
    /// Object name of the storage; neither this nor `location`: the namespace's default.
    pub storage_ref: Option<String>,
    /// URL with `{userId}`; excludes `storage_ref`.
    pub location: Option<String>,
    /// Whether a user's own storage goes before the table's.
    pub use_user_storage: bool,
    /// When to flush.
    pub flush_policy: FlushPolicy,
    /// Copies on replica nodes.
    pub replication: Option<Replication>,
    /// `None`: deleted rows are kept for ever.
    pub deleted_retention_hours: Option<u32>,
    /// What an acknowledgement means.
    pub durability: Durability,
    /// What happens to the files when the object goes.
    pub deletion_policy: DeletionPolicy,
    /// Who may use a shared table.
    pub access: Access,
}

/// One declared column.
#[derive(Clone, Debug, PartialEq)]
pub struct ColumnSpec {
    /// Name.
    pub name: SqlName,
    /// Type.
    pub ty: ColumnType,
    /// Whether NULL is taken.
    pub nullable: bool,
    /// Whether it is part of the primary key.
    pub primary_key: bool,
    /// Value of a row that names none.
    pub default: Option<DefaultExpr>,
}

/// When the buffered rows of one instance become a file: at whichever limit comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlushPolicy {
    /// Rows in one instance's buffer.
    pub rows: Option<u64>,
    /// Age of its oldest row, seconds.
    pub interval_secs: Option<u64>,
}

impl Default for FlushPolicy {
    fn default() -> Self {
        Self { rows: Some(10_000), interval_secs: Some(3_600) }
    }
}

impl FlushPolicy {
    /// Whether an instance with `rows` buffered rows, the oldest `age` old, is due.
    #[must_use]
    pub fn is_due(&self, rows: u64, age: Duration) -> bool {
        rows > 0
            && (self.rows.is_some_and(|limit| rows >= limit)
                || self.interval_secs.is_some_and(|limit| age >= Duration::from_secs(limit)))
    }
}

/// Where copies go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Replication {
    /// That many nodes, by load.
    Replicas(u32),
    /// Every node that carries one of these tags.
    Tags(Vec<String>),
}

/// What an acknowledged write has survived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Durability {
    /// fsync on the pod's disk.
    #[default]
    Local,
    /// The commit-stream object is stored.
    ObjectStore,
}

/// What deleting the object does to the files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeletionPolicy {
    /// They stay, and the table is adopted when it is declared again.
    #[default]
    Retain,
    /// They go first.
    Delete,
}

/// Who may read a shared table without a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Everybody who is authenticated.
    Public,
    /// Nobody.
    #[default]
    Restricted,
}
