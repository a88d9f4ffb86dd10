//! Small valid catalogs, tables, edits and rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::builder::{ListBuilder, StringBuilder};
use arrow_array::types::Int64Type;
use arrow_array::{
    ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float32Array, Float64Array, Int16Array,
    Int32Array, Int64Array, ListArray, RecordBatch, StringArray, Time64MicrosecondArray, TimestampMicrosecondArray,
};
use kalamdb_model::catalog::{Catalog, Column, Location, NamespaceEntry, TableEntry, TableKind};
use kalamdb_model::declared::{Access, DeletionPolicy, Durability, FlushPolicy, Kind, ObjectRef};
use kalamdb_model::ids::{ColumnId, Generation, InstanceId, TableId, UserId};
use kalamdb_model::names::{SqlName, StorageName, TableName};
use kalamdb_table_store::Positions;
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
        raw_bytes: 0,
        widest_row: 0,
        min_key: n.to_be_bytes().to_vec(),
        max_key: (n + 1).to_be_bytes().to_vec(),
        min_seq: 1_732_000_000_000_000,
        max_seq: 1_732_000_000_000_009,
        schema_version: 1,
        created_us: 1_732_000_000_000_010,
        tombstones: Positions::default(),
        deleted_since_us: 0,
        replaced: Positions::default(),
    }
}

pub fn edit(n: u64) -> Edit {
    Edit {
        instance: InstanceId::of_user(UserId::new("Alice é").unwrap(), TableId(1)),
        generation: Generation(u32::try_from(n).unwrap()),
        last_seq: i64::try_from(n).unwrap(),
        add: vec![file(n)],
        remove: if n.is_multiple_of(3) { vec![format!("old/{n}")] } else { Vec::new() },
        replace: BTreeMap::new(),
        placed: None,
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
        had_user_storage: false,
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

/// A table with a column of each type, and rows with usual values, NULLs, and the ends of what the types hold.
pub fn all_types() -> (TableEntry, RecordBatch) {
    let table = table(&[
        ("id", "BIGINT", true),
        ("boolean", "BOOLEAN", false),
        ("smallint", "SMALLINT", false),
        ("int", "INT", false),
        ("float", "FLOAT", false),
        ("double", "DOUBLE", false),
        ("price", "DECIMAL(18,4)", false),
        ("wide", "DECIMAL(38,10)", false),
        ("text", "TEXT", false),
        ("bytes", "BYTES", false),
        ("json", "JSON", false),
        ("timestamp", "TIMESTAMP", false),
        ("date", "DATE", false),
        ("time", "TIME", false),
        ("uuid", "UUID", false),
        ("longs", "ARRAY<BIGINT>", false),
        ("words", "ARRAY<TEXT>", false),
    ]);
    let decimals = |values: [Option<i128>; 3], precision, scale| {
        Decimal128Array::from(values.to_vec()).with_precision_and_scale(precision, scale).unwrap()
    };
    let widest = 10_i128.pow(38) - 1;
    let longs = [Some(vec![Some(1), None, Some(i64::MIN)]), None, Some(vec![])];
    let mut words = ListBuilder::new(StringBuilder::new());
    words.append_value([Some("a"), None, Some("")]);
    words.append_null();
    words.append_value(std::iter::empty::<Option<&str>>());
    let uuids = [Some("67e55044-10b1-426f-9247-bb680e5fe0c8"), None, Some("ffffffff-ffff-ffff-ffff-ffffffffffff")];
    let moments =
        TimestampMicrosecondArray::from(vec![Some(1_732_000_000_000_001), None, Some(-62_135_596_800_000_000)]);
    let own: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(vec![i64::MIN, 7, i64::MAX])),
        Arc::new(BooleanArray::from(vec![Some(true), None, Some(false)])),
        Arc::new(Int16Array::from(vec![Some(-300), None, Some(i16::MAX)])),
        Arc::new(Int32Array::from(vec![Some(70_000), None, Some(i32::MIN)])),
        Arc::new(Float32Array::from(vec![Some(1.5), None, Some(f32::INFINITY)])),
        Arc::new(Float64Array::from(vec![Some(-2.25), None, Some(-0.0)])),
        Arc::new(decimals([Some(12_345), None, Some(-1)], 18, 4)),
        Arc::new(decimals([Some(widest), None, Some(-widest)], 38, 10)),
        Arc::new(StringArray::from(vec![Some("grüß dich"), None, Some("")])),
        Arc::new(BinaryArray::from(vec![Some(&[0_u8, 1, 0xFF][..]), None, Some(&[])])),
        Arc::new(StringArray::from(vec![Some("{\"a\": 1.10}"), None, Some("null")])),
        Arc::new(moments.with_timezone("UTC")),
        Arc::new(Date32Array::from(vec![Some(20_000), None, Some(-1)])),
        Arc::new(Time64MicrosecondArray::from(vec![Some(1), None, Some(86_399_999_999)])),
        Arc::new(StringArray::from(uuids.to_vec())),
        Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>(longs)),
        Arc::new(words.finish()),
    ];
    let rows = batch(&table, own, 1_732_000_000_000_000);
    (table, rows)
}

/// The catalog at `version`: each version has one namespace more, and the table's schema version counts along. Its
/// nonce is its version.
pub fn catalog(version: u64) -> Catalog {
    if version == 0 {
        return Catalog::default();
    }
    let mut catalog = Catalog { version, nonce: format!("{version:032x}"), next_table: 2, ..Catalog::default() };
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
