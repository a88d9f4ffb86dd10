//! Small valid catalogs, tables, edits and rows.

use std::sync::Arc;

use arrow_array::{ArrayRef, BooleanArray, Int64Array, RecordBatch, TimestampMicrosecondArray};
use kalamdb_model::catalog::{Catalog, Column, Location, NamespaceEntry, TableEntry, TableKind};
use kalamdb_model::declared::{Access, DeletionPolicy, Durability, FlushPolicy, Kind, ObjectRef};
use kalamdb_model::ids::{ColumnId, Generation, InstanceId, TableId, UserId};
use kalamdb_model::names::{SqlName, StorageName, TableName};
use kalamdb_table_store::manifest::{Edit, FileEntry};

pub fn object(kind: Kind, name: &str) -> ObjectRef {
    let (name, uid, resource_version) = (name.to_owned(), format!("uid-{name}"), "7".to_owned());
    ObjectRef { kind, name, uid, resource_version, generation: 1, created: 1_700_000_000 }
}

pub fn file(n: u64) -> FileEntry {
    FileEntry {
        path: format!("users/alice/app/messages/00000001-{n:016x}-01jarz3ndektsv4rrffq69g5fa.parquet"),
        rows: n,
        bytes: 1_000 + n,
        min_key: n.to_be_bytes().to_vec(),
        max_key: (n + 1).to_be_bytes().to_vec(),
        min_seq: 1_732_000_000_000_000,
        max_seq: 1_732_000_000_000_009,
        schema_version: 1,
        created_us: 1_732_000_000_000_010,
    }
}

pub fn edit(n: u64) -> Edit {
    Edit {
        instance: InstanceId::of_user(UserId::new("Alice é").unwrap(), TableId(1)),
        generation: Generation(u32::try_from(n).unwrap()),
        last_seq: i64::try_from(n).unwrap(),
        add: vec![file(n)],
        remove: if n.is_multiple_of(3) { vec![format!("old/{n}")] } else { Vec::new() },
    }
}

pub fn table(columns: &[(&str, &str, bool)]) -> TableEntry {
    let column = |(at, (name, ty, key)): (usize, &(&str, &str, bool))| Column {
        id: ColumnId(u32::try_from(at).unwrap() + 1),
        name: SqlName::new(*name).unwrap(),
        ty: ty.parse().unwrap(),
        nullable: !key,
        default: None,
        initial: None,
    };
    let keys = columns.iter().enumerate().filter(|(_, (_, _, key))| *key);
    TableEntry {
        object: object(Kind::UserTable, "app.messages"),
        id: TableId(1),
        name: TableName::parse("app.messages").unwrap(),
        kind: TableKind::User,
        schema_version: 3,
        columns: columns.iter().enumerate().map(column).collect(),
        next_column: u32::try_from(columns.len()).unwrap() + 1,
        key: keys.map(|(at, _)| ColumnId(u32::try_from(at).unwrap() + 1)).collect(),
        location: Location {
            storage: StorageName::new("local").unwrap(),
            root: 0,
            template: "users/{userId}/app/messages".to_owned(),
        },
        use_user_storage: false,
        flush_policy: FlushPolicy::default(),
        replication: None,
        deleted_retention_hours: Some(24),
        durability: Durability::Local,
        deletion_policy: DeletionPolicy::Retain,
        access: Access::Restricted,
    }
}

/// Rows of `table`: its own columns and made-up system columns, `_seq` counting from `first_seq`.
pub fn batch(table: &TableEntry, own: Vec<ArrayRef>, first_seq: i64) -> RecordBatch {
    let rows = own[0].len();
    let seqs = first_seq..first_seq + i64::try_from(rows).unwrap();
    let mut columns = own;
    columns.push(Arc::new(Int64Array::from_iter_values(seqs.clone())));
    columns.push(Arc::new(TimestampMicrosecondArray::from_iter_values(seqs).with_timezone("UTC")));
    columns.push(Arc::new(BooleanArray::from(vec![false; rows])));
    RecordBatch::try_new(table.arrow_schema(), columns).unwrap()
}

/// The catalog at `version`: each version has one namespace more, and the table's schema version counts along.
pub fn catalog(version: u64) -> Catalog {
    if version == 0 {
        return Catalog::default();
    }
    let mut catalog = Catalog { version, next_table: 2, ..Catalog::default() };
    for n in 1..=version {
        let name = SqlName::new(format!("ns{n}")).unwrap();
        let options = [("n".to_owned(), n.to_string())].into();
        let object = object(Kind::Namespace, name.as_str());
        catalog.namespaces.insert(name, NamespaceEntry { object, default_storage: None, options });
    }
    let mut table = table(&[("id", "BIGINT", true), ("body", "TEXT", false), ("price", "DECIMAL(18,4)", false)]);
    table.schema_version = u32::try_from(version).unwrap();
    catalog.tables.insert(table.name.clone(), table);
    catalog
}
