//! The kinds `UserTable` and `SharedTable`, and the fields that they share.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::is_default;
use crate::status::has_conditions;

/// What a user table is.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "kalamdb.org",
    version = "v1alpha1",
    kind = "UserTable",
    plural = "usertables",
    singular = "usertable",
    shortname = "kut",
    category = "kalamdb",
    namespaced,
    status = "TableStatus",
    derive = "PartialEq",
    doc = "A table of which every user has a private instance.",
    selectable = ".spec.namespaceRef",
    selectable = ".spec.storageRef",
    printcolumn(name = "Storage", type_ = "string", json_path = ".spec.storageRef"),
    printcolumn(name = "Schema", type_ = "integer", json_path = ".status.schemaVersion"),
    printcolumn(name = "Location", type_ = "string", json_path = ".status.location", priority = 1),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new(
        "self.metadata.name == self.spec.namespaceRef + '.' + self.spec.tableName.replace('_', '-')"
    )
    .message("metadata.name must be <namespaceRef>.<tableName with _ written as ->")
)]
#[x_kube(
    validation = Rule::new("!has(self.location) || self.location.matches('/[$]?[{](userId|user_id)[}](/|$)')")
        .message("the location of a user table must contain {userId} as a whole path segment"),
    validation = Rule::new(
        "!has(self.location) || !self.location.matches('[{](userId|user_id)[}].*[{](userId|user_id)[}]')"
    )
    .message("{userId} stands more than once")
)]
#[serde(rename_all = "camelCase")]
pub struct UserTableSpec {
    /// What all kinds of tables have.
    #[serde(flatten)]
    pub table: TableFields,
    /// Whether a user's own storage goes before the table's.
    #[serde(default, skip_serializing_if = "is_default")]
    pub use_user_storage: bool,
}

/// What a shared table is.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "kalamdb.org",
    version = "v1alpha1",
    kind = "SharedTable",
    plural = "sharedtables",
    singular = "sharedtable",
    shortname = "ksh",
    category = "kalamdb",
    namespaced,
    status = "TableStatus",
    derive = "PartialEq",
    doc = "A table that all users share.",
    selectable = ".spec.namespaceRef",
    selectable = ".spec.storageRef",
    printcolumn(name = "Storage", type_ = "string", json_path = ".spec.storageRef"),
    printcolumn(name = "Access", type_ = "string", json_path = ".spec.access"),
    printcolumn(name = "Schema", type_ = "integer", json_path = ".status.schemaVersion"),
    printcolumn(name = "Location", type_ = "string", json_path = ".status.location", priority = 1),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new(
        "self.metadata.name == self.spec.namespaceRef + '.' + self.spec.tableName.replace('_', '-')"
    )
    .message("metadata.name must be <namespaceRef>.<tableName with _ written as ->")
)]
#[x_kube(
    validation = Rule::new("!has(self.location) || !self.location.matches('[{](userId|user_id)[}]')")
        .message("the location of a shared table must not contain {userId}")
)]
#[serde(rename_all = "camelCase")]
pub struct SharedTableSpec {
    /// What all kinds of tables have.
    #[serde(flatten)]
    pub table: TableFields,
    /// Who may use the table without a rule that lets him; Restricted if left out.
    #[serde(default, skip_serializing_if = "is_default")]
    pub access: Access,
}

/// What all kinds of tables have.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[x_kube(
    validation = Rule::new("!(has(self.storageRef) && has(self.location))")
        .message("storageRef and location exclude each other"),
    validation = Rule::new("oldSelf.columns.all(o, self.columns.exists(c, c.name == o.name))")
        .message("existing columns cannot be removed"),
    validation = Rule::new(
        "self.columns.all(c, oldSelf.columns.all(o, o.name != c.name || o.type == c.type))"
    )
    .message("the type of an existing column cannot be changed"),
    validation = Rule::new(
        "self.columns.all(c, !has(c.nullable) || c.nullable || oldSelf.columns.all(o, o.name != c.name || \
         (has(o.nullable) && !o.nullable) || (has(o.primaryKey) && o.primaryKey)))"
    )
    .message("an existing column that takes NULL cannot become nullable: false"),
    validation = Rule::new(
        "self.columns.all(c, !has(c.nullable) || c.nullable || \
         (has(c.default) && !c.default.trim().endsWith('()')) || oldSelf.columns.exists(o, o.name == c.name))"
    )
    .message("a new column must be nullable or have a literal default"),
    validation = Rule::new(
        "self.columns.filter(c, has(c.primaryKey) && c.primaryKey).map(c, c.name) == \
         oldSelf.columns.filter(c, has(c.primaryKey) && c.primaryKey).map(c, c.name)"
    )
    .message("the primary key is fixed when a table is created")
)]
#[serde(rename_all = "camelCase")]
pub struct TableFields {
    /// Name of the Namespace object.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z]([a-z0-9-]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("namespaceRef cannot be changed"))]
    pub namespace_ref: String,
    /// Name in SQL, without the namespace.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z]([a-z0-9_]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("tableName cannot be changed"))]
    pub table_name: String,
    /// The columns, in the order of `SELECT *`. Without a primary key, the column `id` becomes it, or a first column
    /// `id BIGINT DEFAULT SNOWFLAKE_ID()` is added.
    #[schemars(length(min = 1, max = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub columns: Vec<Column>,
    /// Name of the Storage object; without it and `location`, the namespace's default. The place is fixed when the
    /// table is created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z]([a-z0-9-]*[a-z0-9])?$"))]
    pub storage_ref: Option<String>,
    /// URL of a folder of this table alone, inside of a Storage; of a user table, with {userId}.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 6, max = 1024), regex(pattern = r"^(s3|gs|az|file)://.+$"))]
    #[x_kube(
        validation = Rule::new("self.matches('^([^{}$]|[$]?[{](userId|user_id)[}])*$')")
            .message("the only variable in a location is {userId}"),
        validation = Rule::new(
            "!self.matches('/[.][.]?(/|$)') && !self.matches('^[a-z0-9]+://.*[^/]//+[^/]') && \
             !self.matches('[[:cntrl:]]')"
        )
        .message("a location has no empty, . or .. segment")
    )]
    pub location: Option<String>,
    /// When buffered rows of one instance become a file; without it, at 10000 rows or after 1 hour.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flush_policy: Option<FlushPolicy>,
    /// Copies of the files on replica nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replication: Option<Replication>,
    /// How long deleted rows stay visible to `with_deleted`, at most ten years; 0 until the next compaction, without it for
    /// ever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 87_600))]
    pub deleted_retention_hours: Option<i32>,
    /// What an acknowledged write has survived; local if left out.
    #[serde(default, skip_serializing_if = "is_default")]
    pub durability: Durability,
    /// What deleting this object does to the files; Retain if left out.
    #[serde(default, skip_serializing_if = "is_default")]
    pub deletion_policy: DeletionPolicy,
}

/// A column.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[x_kube(
    validation = Rule::new("!has(self.primaryKey) || !self.primaryKey || !has(self.nullable) || !self.nullable")
        .message("a column of the primary key cannot be nullable"),
    validation = Rule::new(
        "!has(self.primaryKey) || !self.primaryKey || !self.type.matches('^(?i)(FLOAT|DOUBLE|JSON|ARRAY<.*)$')"
    )
    .message("FLOAT, DOUBLE, JSON and ARRAY cannot be part of a primary key")
)]
#[serde(rename_all = "camelCase")]
pub struct Column {
    /// Lower-case letters, digits and `_`, a letter first, no `_` at the end.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z]([a-z0-9_]*[a-z0-9])?$"))]
    #[x_kube(
        validation = Rule::new("!(self in ['_seq', '_updated', '_deleted'])")
            .message("_seq, _updated and _deleted are system columns")
    )]
    pub name: String,
    /// BOOLEAN, SMALLINT, INT, BIGINT, FLOAT, DOUBLE, DECIMAL(p,s), TEXT, BYTES, JSON, TIMESTAMP, DATE, TIME, UUID, or
    /// ARRAY of one of them.
    #[serde(rename = "type")]
    #[schemars(length(min = 3, max = 64))]
    #[x_kube(
        validation = Rule::new(
            "self.matches('^(?i)(ARRAY<){0,4}(BOOLEAN|BOOL|SMALLINT|INT|INTEGER|BIGINT|FLOAT|DOUBLE|TEXT|STRING|BYTES|\
             JSON|TIMESTAMP|DATE|TIME|UUID|DECIMAL|DECIMAL[(] *([1-9]|[12][0-9]|3[0-8]) *(, *[0-9]{1,2} *)?[)])>{0,4}$') \
             && size(self.split('<')) == size(self.split('>'))"
        )
        .message(
            "unknown type; use BOOLEAN, SMALLINT, INT, BIGINT, FLOAT, DOUBLE, DECIMAL(p,s), TEXT, BYTES, JSON, \
             TIMESTAMP, DATE, TIME, UUID or ARRAY<type>"
        )
    )]
    pub type_: String,
    /// Whether NULL is taken; true if left out, but never for columns of the primary key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nullable: Option<bool>,
    /// Whether it is part of the primary key; false if left out. The key's order is that of the columns.
    #[serde(default, skip_serializing_if = "is_default")]
    pub primary_key: bool,
    /// Value of rows that name none: a literal, NOW(), SNOWFLAKE_ID(), UUID_V7(), ULID() or CURRENT_USER().
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub default: Option<String>,
}

/// When buffered rows of one instance become a file: at whichever limit comes first.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[x_kube(
    validation = Rule::new("has(self.rows) || has(self.interval)").message("flushPolicy needs rows, interval or both")
)]
#[serde(rename_all = "camelCase")]
pub struct FlushPolicy {
    /// Rows in the buffer of one instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub rows: Option<i64>,
    /// Age of the oldest row in it, 1s to 24h, as in 90s, 30m or 1h30m.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 24), regex(pattern = r"^([0-9]{1,5}[hms]){1,4}$"))]
    #[x_kube(
        validation = Rule::new(
            "self.matches('^([0-9]{1,5}[hms]){1,4}$') && duration(self) >= duration('1s') && \
             duration(self) <= duration('24h')"
        )
        .message("interval must be 1s to 24h, written like 90s, 30m or 1h30m")
    )]
    pub interval: Option<String>,
}

/// Where copies of the files go.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[x_kube(
    validation = Rule::new("has(self.replicas) != (has(self.tags) && size(self.tags) > 0)")
        .message("replication needs either replicas or tags")
)]
#[serde(rename_all = "camelCase")]
pub struct Replication {
    /// Number of nodes, chosen by load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16))]
    pub replicas: Option<i32>,
    /// Every node that carries one of these tags.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(length(min = 1, max = 63), regex(pattern = r"^[A-Za-z0-9]([A-Za-z0-9._:=/-]*[A-Za-z0-9])?$"))
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub tags: Vec<String>,
}

/// What an acknowledged write has survived.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Durability {
    /// It is synced to the pod's disk.
    #[default]
    Local,
    /// It is in object storage.
    ObjectStore,
}

/// What deleting the object does to the files.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema)]
pub enum DeletionPolicy {
    /// They stay, and the table has its rows again when it is declared again.
    #[default]
    Retain,
    /// They are removed first.
    Delete,
}

/// Who may use a shared table without a rule that lets him.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema)]
pub enum Access {
    /// Everybody who is authenticated may read.
    Public,
    /// Nobody.
    #[default]
    Restricted,
}

/// What became of a table.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct TableStatus {
    /// The metadata.generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Version of the catalog that contains that generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub catalog_version: Option<i64>,
    /// Where the files lie, fixed when the table was first accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048))]
    pub location: Option<String>,
    /// Rises with every change of the columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub schema_version: Option<i32>,
    /// Replica nodes with copies, by object name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 253)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub assigned_nodes: Vec<String>,
    /// Ready, Accepted, Serving, Replicated, Reconciling, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

has_conditions!(TableStatus);
