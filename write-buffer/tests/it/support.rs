//! Tables, rows and buffers to test with.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use kalamdb_model::catalog::{Location, TableEntry, TableKind};
use kalamdb_model::declared::{Access, DeletionPolicy, Durability, FlushPolicy, Kind, ObjectRef};
use kalamdb_model::{
    Column, ColumnId, ColumnType, Generation, InstanceId, SqlName, StorageName, TableId, TableName, UserId, Value, key,
};
use kalamdb_write_buffer::row::{self, RowView};
use kalamdb_write_buffer::{EncodedRow, Fresh, Options, WriteBuffer};

/// Options that ask nothing of the machine's disk.
pub fn options() -> Options {
    Options { disk_reserve_bytes: 0, ..Options::default() }
}

pub fn open(directory: &Path) -> WriteBuffer {
    WriteBuffer::open(directory, options()).expect("a directory of its own")
}

pub fn instance(user: &str) -> InstanceId {
    InstanceId::of_user(UserId::new(user).expect("valid"), TableId(1))
}

pub fn column(id: u32, ty: ColumnType) -> Column {
    let name = SqlName::new(format!("c{id}")).expect("valid");
    Column { id: ColumnId(id), name, ty, nullable: true, default: None, initial: None }
}

pub fn table(columns: Vec<Column>) -> TableEntry {
    let next_column = columns.iter().map(|column| column.id.0).max().unwrap_or(0) + 1;
    TableEntry {
        object: ObjectRef {
            kind: Kind::UserTable,
            name: "app.t".into(),
            uid: "u".into(),
            resource_version: "1".into(),
            generation: 1,
            created: 0,
        },
        id: TableId(1),
        name: TableName::parse("app.t").expect("valid"),
        kind: TableKind::User,
        schema_version: 3,
        key: vec![columns[0].id],
        columns,
        next_column,
        location: Location {
            storage: StorageName::new("local").expect("valid"),
            root: 1,
            template: "users/{userId}/app/t".into(),
        },
        use_user_storage: false,
        had_user_storage: false,
        flush_policy: FlushPolicy::default(),
        replication: None,
        deleted_retention_hours: None,
        durability: Durability::default(),
        deletion_policy: DeletionPolicy::default(),
        access: Access::default(),
    }
}

/// `id BIGINT, body TEXT`.
pub fn messages() -> TableEntry {
    table(vec![column(1, ColumnType::BigInt), column(2, ColumnType::Text)])
}

pub fn pk(id: i64) -> Vec<u8> {
    key::encode(&[Value::BigInt(id)])
}

pub fn message(id: i64, body: &str) -> EncodedRow {
    let values = [Value::BigInt(id), Value::Text(body.to_owned())];
    EncodedRow { key: pk(id), value: row::encode(&messages(), &values), fresh: Fresh::Yes }
}

/// A stored message: its generation, `_seq` and body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub generation: Generation,
    pub seq: i64,
    pub body: String,
}

/// The messages of generations above `after`, each id exactly once.
pub fn scan(buffer: &WriteBuffer, instance: &InstanceId, after: Generation) -> BTreeMap<i64, Stored> {
    let mut found = BTreeMap::new();
    buffer
        .scan(instance, after, &mut |generation, pk, row| {
            collect(&mut found, generation, pk, row);
            ControlFlow::Continue(())
        })
        .expect("a readable buffer");
    found
}

pub fn scan_generation(buffer: &WriteBuffer, instance: &InstanceId, generation: Generation) -> BTreeMap<i64, Stored> {
    let mut found = BTreeMap::new();
    buffer
        .scan_generation(instance, generation, &mut |of, pk, row| {
            assert_eq!(of, generation);
            collect(&mut found, of, pk, row);
            ControlFlow::Continue(())
        })
        .expect("a readable buffer");
    found
}

fn collect(found: &mut BTreeMap<i64, Stored>, generation: Generation, key: &[u8], row: &[u8]) {
    let view = RowView::parse(row).expect("a whole row");
    let values = view.values(&messages()).expect("a message");
    let [Value::BigInt(id), Value::Text(body)] = &values[..] else { panic!("no message: {values:?}") };
    assert_eq!(key, pk(*id));
    let stored = Stored { generation, seq: view.seq(), body: body.clone() };
    assert_eq!(found.insert(*id, stored), None, "row {id} is there twice");
}
