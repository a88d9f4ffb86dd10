//! The compiled catalog: what query pods serve from. Only [`crate::compile()`] makes one.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, TimeUnit};
use serde::{Deserialize, Serialize};

use crate::declared::{Access, DeletionPolicy, Durability, FlushPolicy, ObjectRef, Replication, StorageRoot};
use crate::defaults::DefaultExpr;
use crate::ids::{ColumnId, TableId};
use crate::names::{SqlName, StorageName, TableName};
use crate::template;
use crate::types::ColumnType;
use crate::value::Value;

/// Everything that was declared and is valid, at one version. Serialized as JSON; unknown fields are ignored, so a pod
/// reads what a newer operator wrote.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Catalog {
    /// Number of the catalog-log object that this is the state after; 0 = empty.
    pub version: u64,
    /// Random text of whoever stored this version, which tells it from the same number of another history. Empty in an
    /// empty catalog and in one that is not stored yet.
    pub nonce: String,
    /// The next table gets this id. Ids are never reused.
    pub next_table: u32,
    /// By SQL name.
    pub storages: BTreeMap<StorageName, StorageEntry>,
    /// By SQL name.
    pub namespaces: BTreeMap<SqlName, NamespaceEntry>,
    /// By object name.
    pub nodes: BTreeMap<String, NodeEntry>,
    /// Tables that SQL sees.
    pub tables: BTreeMap<TableName, TableEntry>,
    /// Tables whose object went away while their files stay: adopted when declared again with the same columns.
    pub retained: BTreeMap<TableName, TableEntry>,
}

/// A storage and every root it has had.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StorageEntry {
    /// The object it came from.
    pub object: ObjectRef,
    /// For people.
    pub display_name: Option<String>,
    /// Roots by number; tables are pinned to one. Numbers are never reused.
    pub roots: BTreeMap<u32, StorageRoot>,
    /// The root that new tables get.
    pub current_root: u32,
    /// Secret with the credentials.
    pub credentials_secret: Option<String>,
    /// Template for new shared tables, complete.
    pub shared_tables_template: String,
    /// Template for new user tables, complete.
    pub user_tables_template: String,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamespaceEntry {
    /// The object it came from.
    pub object: ObjectRef,
    /// Storage for tables that name none.
    pub default_storage: Option<StorageName>,
    /// Free options.
    pub options: BTreeMap<String, String>,
}

/// A replica node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeEntry {
    /// The object it came from.
    pub object: ObjectRef,
    /// For people.
    pub display_name: Option<String>,
    /// `host:port`.
    pub address: String,
    /// Tags.
    pub tags: Vec<String>,
    /// No new assignments.
    pub unschedulable: bool,
}

/// Whose rows a table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TableKind {
    /// One private instance per user.
    User,
    /// One instance for all.
    Shared,
}

/// A table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TableEntry {
    /// The object it came from.
    pub object: ObjectRef,
    /// Its number.
    pub id: TableId,
    /// Its name.
    pub name: TableName,
    /// Whose rows.
    pub kind: TableKind,
    /// Rises with every change of `columns`.
    pub schema_version: u32,
    /// In the order of `SELECT *`.
    pub columns: Vec<Column>,
    /// The next column gets this id.
    pub next_column: u32,
    /// Columns of the primary key, in key order; at least one.
    pub key: Vec<ColumnId>,
    /// Where its files lie; pinned when the table was first accepted.
    pub location: Location,
    /// Whether a user's own storage goes before `location`.
    pub use_user_storage: bool,
    /// Whether it ever did: rows may lie in any storage that users had.
    #[serde(default)]
    pub had_user_storage: bool,
    /// When to flush.
    pub flush_policy: FlushPolicy,
    /// Copies.
    pub replication: Option<Replication>,
    /// How long deleted rows stay.
    pub deleted_retention_hours: Option<u32>,
    /// What an acknowledgement means.
    pub durability: Durability,
    /// What deletion of the object does.
    pub deletion_policy: DeletionPolicy,
    /// Who may use it, for shared tables.
    pub access: Access,
}

/// A column.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Column {
    /// Its number in the table.
    pub id: ColumnId,
    /// Its name.
    pub name: SqlName,
    /// Its type.
    #[serde(rename = "type")]
    pub ty: ColumnType,
    /// Whether NULL is taken.
    pub nullable: bool,
    /// Value of a new row that names none.
    pub default: Option<DefaultExpr>,
    /// Value of rows that are older than the column: the literal default that it was added with, for ever; else NULL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial: Option<DefaultExpr>,
}

impl Column {
    /// What a row that is older than the column shows for it.
    #[must_use]
    pub fn absent(&self) -> &Value {
        self.initial.as_ref().and_then(DefaultExpr::literal).unwrap_or(&Value::Null)
    }
}

/// Where the files of a table lie: a root of a storage and a template below it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Location {
    /// The storage.
    pub storage: StorageName,
    /// Which of its roots.
    pub root: u32,
    /// Path below the root; only `{userId}` is left to fill in (user tables).
    pub template: String,
}

/// Parquet field ids and Arrow positions of the system columns start here; catalog column ids stay below.
pub const SYSTEM_COLUMN_ID_FIRST: u32 = 1 << 30;

/// Arrow field metadata key under which Parquet keeps a field's id.
pub const FIELD_ID_METADATA: &str = "PARQUET:field_id";

impl TableEntry {
    /// The column with that id.
    #[must_use]
    pub fn column(&self, id: ColumnId) -> Option<&Column> {
        self.columns.iter().find(|column| column.id == id)
    }

    /// Position in `columns` of the column with that name.
    #[must_use]
    pub fn position(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name.as_str() == name)
    }

    /// Positions in `columns` of the key columns, in key order.
    #[must_use]
    pub fn key_positions(&self) -> Vec<usize> {
        self.key.iter().filter_map(|id| self.columns.iter().position(|column| column.id == *id)).collect()
    }

    /// The table's own columns and then `_seq`, `_updated`, `_deleted`: the schema of files and scans.
    #[must_use]
    pub fn arrow_schema(&self) -> Arc<Schema> {
        let own = self
            .columns
            .iter()
            .map(|column| with_field_id(column.ty.arrow_field(column.name.as_str(), column.nullable), column.id.0));
        Arc::new(Schema::new(own.chain(system_fields()).collect::<Vec<_>>()))
    }
}

/// `_seq BIGINT`, `_updated TIMESTAMP`, `_deleted BOOLEAN`, none nullable.
#[must_use]
pub fn system_fields() -> [Field; 3] {
    let timestamp = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    [
        with_field_id(Field::new("_seq", DataType::Int64, false), SYSTEM_COLUMN_ID_FIRST),
        with_field_id(Field::new("_updated", timestamp, false), SYSTEM_COLUMN_ID_FIRST + 1),
        with_field_id(Field::new("_deleted", DataType::Boolean, false), SYSTEM_COLUMN_ID_FIRST + 2),
    ]
}

fn with_field_id(field: Field, id: u32) -> Field {
    let mut metadata = field.metadata().clone();
    metadata.insert(FIELD_ID_METADATA.to_owned(), id.to_string());
    field.with_metadata(metadata)
}

impl Catalog {
    /// Where the rows of a user lie who has `storage` as his own, in a table that lets him; `None` if it is not there.
    #[must_use]
    pub fn place_in(&self, storage: &StorageName, table: &TableEntry) -> Option<Location> {
        let entry = self.storages.get(storage)?;
        let template = template::resolve(&entry.user_tables_template, &table.name);
        Some(Location { storage: storage.clone(), root: entry.current_root, template })
    }

    /// Another table than `table` whose files may get in the way of those that lie at `location`.
    #[must_use]
    pub fn in_the_way(&self, table: &TableEntry, location: &Location) -> Option<&TableEntry> {
        let root = self.root(location)?;
        let overlaps = |other: &&TableEntry| {
            let found = self.root(&other.location);
            found.is_some_and(|found| root.overlaps(&location.template, found, &other.location.template))
        };
        self.tables.values().chain(self.retained.values()).filter(|other| other.id != table.id).find(overlaps)
    }

    /// The root that a location is pinned to.
    #[must_use]
    pub fn root(&self, location: &Location) -> Option<&StorageRoot> {
        self.storages.get(&location.storage)?.roots.get(&location.root)
    }

    /// Tables, live and retained, that keep files in `storage`.
    pub fn tables_in<'a>(&'a self, storage: &'a StorageName) -> impl Iterator<Item = &'a TableEntry> + 'a {
        self.tables.values().chain(self.retained.values()).filter(move |table| table.location.storage == *storage)
    }
}
