//! The bytes of rows and their way into Arrow.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Date32Type, Decimal128Type, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type, Time64MicrosecondType,
    TimestampMicrosecondType,
};
use arrow_array::{Array, RecordBatch};
use kalamdb_model::catalog::TableEntry;
use kalamdb_model::defaults::DefaultExpr;
use kalamdb_model::{Column, ColumnType, Value};
use kalamdb_write_buffer::BatchBuilder;
use kalamdb_write_buffer::row::{self, RowError, RowView};
use proptest::prelude::*;

use crate::support::{column, table};

/// One row of format 1 with every type; must decode for as long as any version reads format 1.
const SAMPLE: &str = include_str!("row-format-1.hex");

fn array(item: ColumnType) -> ColumnType {
    ColumnType::Array(Box::new(item))
}

fn sample() -> (TableEntry, Vec<Value>) {
    let columns = [
        (ColumnType::BigInt, Value::BigInt(-2)),
        (ColumnType::Boolean, Value::Boolean(true)),
        (ColumnType::SmallInt, Value::SmallInt(-300)),
        (ColumnType::Int, Value::Int(70_000)),
        (ColumnType::Float, Value::Float(1.5)),
        (ColumnType::Double, Value::Double(-2.25)),
        (ColumnType::Decimal { precision: 18, scale: 4 }, Value::Decimal(-1_234_567_890_123_456)),
        (ColumnType::Text, Value::Text("grüß dich".into())),
        (ColumnType::Text, Value::Null),
        (ColumnType::Bytes, Value::Bytes(vec![0, 1, 0xFF])),
        (ColumnType::Json, Value::Json("{\"a\": 1.10}".into())),
        (ColumnType::Timestamp, Value::Timestamp(1_700_000_000_000_001)),
        (ColumnType::Date, Value::Date(-1)),
        (ColumnType::Time, Value::Time(86_399_999_999)),
        (ColumnType::Uuid, Value::Uuid(*b"0123456789abcdef")),
        (
            array(array(ColumnType::Uuid)),
            Value::Array(vec![Value::Array(vec![Value::Uuid([7; 16]), Value::Null]), Value::Null]),
        ),
        (ColumnType::Text, Value::Text("x".repeat(200))),
    ];
    let (types, values): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
    (table((1..).zip(types).map(|(id, ty)| column(id, ty)).collect()), values)
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits = text.trim();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

#[test]
fn the_stored_sample_of_format_1_decodes_and_is_still_what_is_written() {
    let (table, values) = sample();
    let mut written = row::encode(&table, &values);
    row::mark_deleted(&mut written);
    row::mark_fresh(&mut written);
    row::stamp(&mut written, 41, -5).unwrap();
    let hex: String = written.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, SAMPLE.trim(), "what is written changed: that needs a new format");
    let stored = from_hex(SAMPLE);
    let view = RowView::parse(&stored).unwrap();
    assert_eq!((view.seq(), view.updated(), view.deleted(), view.fresh()), (41, -5, true, true));
    assert_eq!((view.schema_version(), view.column_count()), (3, 17));
    assert_eq!(view.values(&table).unwrap(), values);
}

#[test]
fn every_type_comes_out_of_arrow_as_it_went_in() {
    let (table, values) = sample();
    let stored = from_hex(SAMPLE);
    let everything: Vec<usize> = (0..values.len() + 3).collect();
    let mut builder = BatchBuilder::new(&table, &everything);
    builder.push(&stored).unwrap();
    builder.push(&stored).unwrap();
    assert_eq!((builder.rows(), builder.bytes()), (2, stored.len() * 2));
    let batch = builder.finish().unwrap();
    assert_eq!(batch.schema(), table.arrow_schema());
    assert_eq!(own_values(&table, &batch, 1), values);
    let system = |name: &str| Arc::clone(batch.column_by_name(name).unwrap());
    assert_eq!(system("_seq").as_primitive::<Int64Type>().value(0), 41);
    assert_eq!(system("_updated").as_primitive::<TimestampMicrosecondType>().value(0), -5);
    assert!(system("_deleted").as_boolean().value(0));
}

#[test]
fn a_projection_gives_its_columns_in_its_order_and_no_column_still_counts_rows() {
    let (table, values) = sample();
    let stored = from_hex(SAMPLE);
    for projection in [vec![], vec![17], vec![19, 0, 18, 7], vec![15, 15, 2], vec![16]] {
        let mut builder = BatchBuilder::new(&table, &projection);
        builder.push(&stored).unwrap();
        let batch = builder.finish().unwrap();
        assert_eq!(batch.num_rows(), 1);
        assert_eq!(batch.schema().as_ref(), &table.arrow_schema().project(&projection).unwrap());
        for (at, position) in projection.iter().enumerate().filter(|(_, position)| **position < values.len()) {
            let ty = &table.columns[*position].ty;
            assert_eq!(arrow_value(batch.column(at).as_ref(), 0, ty), values[*position]);
        }
    }
    let missing = BatchBuilder::new(&table, &[20]).finish().expect_err("no such column");
    assert!(missing.to_string().contains("`app.t`"), "{missing}");
}

#[test]
fn a_row_that_is_older_than_a_column_shows_the_literal_default_or_null() {
    let old = table(vec![column(1, ColumnType::BigInt)]);
    let stored = row::encode(&old, &[Value::BigInt(1)]);
    let with_default = |id, ty: ColumnType, default: &str| {
        let default = Some(DefaultExpr::parse(default, &ty).unwrap());
        Column { initial: default.clone(), default, nullable: false, ..column(id, ty) }
    };
    let items = array(ColumnType::Int);
    let newer = table(vec![
        // Placed first by a later ALTER: the order of columns is not the order of ids.
        with_default(4, ColumnType::Uuid, "'67e55044-10b1-426f-9247-bb680e5fe0c8'"),
        column(1, ColumnType::BigInt),
        with_default(2, ColumnType::Text, "'none'"),
        column(3, items.clone()),
        Column { nullable: true, ..with_default(5, ColumnType::Timestamp, "NOW()") },
        with_default(6, items, "[1,null]"),
        with_default(7, ColumnType::Json, "{}"),
    ]);
    let expected = vec![
        newer.columns[0].default.as_ref().unwrap().literal().unwrap().clone(),
        Value::BigInt(1),
        Value::Text("none".into()),
        Value::Null,
        Value::Null,
        Value::Array(vec![Value::Int(1), Value::Null]),
        Value::Json("{}".into()),
    ];
    assert_eq!(RowView::parse(&stored).unwrap().values(&newer).unwrap(), expected);
    let mut builder = BatchBuilder::new(&newer, &[0, 1, 2, 3, 4, 5, 6]);
    builder.push(&stored).unwrap();
    assert_eq!(own_values(&newer, &builder.finish().unwrap(), 0), expected);
    // And a reader that does not know the newer columns yet ignores them.
    let newest = row::encode(&newer, &expected);
    assert_eq!(RowView::parse(&newest).unwrap().values(&old).unwrap(), [Value::BigInt(1)]);
}

#[test]
fn a_value_of_another_type_and_a_null_where_none_may_be_are_errors() {
    let text = table(vec![column(1, ColumnType::Text)]);
    let number = table(vec![column(1, ColumnType::BigInt)]);
    let stored = row::encode(&text, &[Value::Text("seven by".into())]);
    assert!(RowView::parse(&stored).unwrap().values(&number).is_ok(), "eight bytes are any number");
    let stored = row::encode(&text, &[Value::Text("seven".into())]);
    assert_eq!(RowView::parse(&stored).unwrap().values(&number), Err(RowError::Value(ColumnType::BigInt)));
    let mut builder = BatchBuilder::new(&number, &[0]);
    assert_eq!(builder.push(&stored), Err(RowError::Value(ColumnType::BigInt)));
    assert!(builder.finish().is_err(), "a builder that met a bad row makes no batch");

    let strict = table(vec![Column { nullable: false, ..column(1, ColumnType::Text) }]);
    let mut builder = BatchBuilder::new(&strict, &[0]);
    builder.push(&row::encode(&strict, &[Value::Null])).unwrap();
    assert!(builder.finish().is_err());
}

fn own_values(table: &TableEntry, batch: &RecordBatch, row: usize) -> Vec<Value> {
    let columns = table.columns.iter().zip(batch.columns());
    columns.map(|(column, array)| arrow_value(array.as_ref(), row, &column.ty)).collect()
}

/// The reverse of the builder, written the other way round: from Arrow's accessors.
fn arrow_value(array: &dyn Array, row: usize, ty: &ColumnType) -> Value {
    assert_eq!(array.data_type(), &ty.arrow());
    if array.is_null(row) {
        return Value::Null;
    }
    match ty {
        ColumnType::Boolean => Value::Boolean(array.as_boolean().value(row)),
        ColumnType::SmallInt => Value::SmallInt(array.as_primitive::<Int16Type>().value(row)),
        ColumnType::Int => Value::Int(array.as_primitive::<Int32Type>().value(row)),
        ColumnType::BigInt => Value::BigInt(array.as_primitive::<Int64Type>().value(row)),
        ColumnType::Float => Value::Float(array.as_primitive::<Float32Type>().value(row)),
        ColumnType::Double => Value::Double(array.as_primitive::<Float64Type>().value(row)),
        ColumnType::Decimal { .. } => Value::Decimal(array.as_primitive::<Decimal128Type>().value(row)),
        ColumnType::Text => Value::Text(array.as_string::<i32>().value(row).to_owned()),
        ColumnType::Json => Value::Json(array.as_string::<i32>().value(row).to_owned()),
        ColumnType::Bytes => Value::Bytes(array.as_binary::<i32>().value(row).to_vec()),
        ColumnType::Timestamp => Value::Timestamp(array.as_primitive::<TimestampMicrosecondType>().value(row)),
        ColumnType::Date => Value::Date(array.as_primitive::<Date32Type>().value(row)),
        ColumnType::Time => Value::Time(array.as_primitive::<Time64MicrosecondType>().value(row)),
        ColumnType::Uuid => {
            let text = array.as_string::<i32>().value(row);
            assert_eq!((text.len(), text), (36, text.to_lowercase().as_str()));
            Value::from_text(text, ty).unwrap()
        }
        ColumnType::Array(item) => {
            let items = array.as_list::<i32>().value(row);
            Value::Array((0..items.len()).map(|at| arrow_value(items.as_ref(), at, item)).collect())
        }
    }
}

fn types() -> impl Strategy<Value = ColumnType> {
    let scalar = prop_oneof![
        Just(ColumnType::Boolean),
        Just(ColumnType::SmallInt),
        Just(ColumnType::Int),
        Just(ColumnType::BigInt),
        Just(ColumnType::Float),
        Just(ColumnType::Double),
        Just(ColumnType::Decimal { precision: 38, scale: 10 }),
        Just(ColumnType::Text),
        Just(ColumnType::Bytes),
        Just(ColumnType::Json),
        Just(ColumnType::Timestamp),
        Just(ColumnType::Date),
        Just(ColumnType::Time),
        Just(ColumnType::Uuid),
    ];
    scalar.prop_recursive(3, 4, 1, |item| item.prop_map(array))
}

fn values(ty: &ColumnType) -> BoxedStrategy<Value> {
    let some = match ty {
        ColumnType::Boolean => any::<bool>().prop_map(Value::Boolean).boxed(),
        ColumnType::SmallInt => any::<i16>().prop_map(Value::SmallInt).boxed(),
        ColumnType::Int => any::<i32>().prop_map(Value::Int).boxed(),
        ColumnType::BigInt => any::<i64>().prop_map(Value::BigInt).boxed(),
        ColumnType::Float => any::<f32>().prop_map(Value::Float).boxed(),
        ColumnType::Double => any::<f64>().prop_map(Value::Double).boxed(),
        ColumnType::Decimal { .. } => any::<i128>().prop_map(Value::Decimal).boxed(),
        ColumnType::Text => any::<String>().prop_map(Value::Text).boxed(),
        ColumnType::Bytes => any::<Vec<u8>>().prop_map(Value::Bytes).boxed(),
        ColumnType::Json => any::<String>().prop_map(Value::Json).boxed(),
        ColumnType::Timestamp => any::<i64>().prop_map(Value::Timestamp).boxed(),
        ColumnType::Date => any::<i32>().prop_map(Value::Date).boxed(),
        ColumnType::Time => any::<i64>().prop_map(Value::Time).boxed(),
        ColumnType::Uuid => any::<[u8; 16]>().prop_map(Value::Uuid).boxed(),
        ColumnType::Array(item) => prop::collection::vec(values(item), 0..10).prop_map(Value::Array).boxed(),
    };
    prop_oneof![1 => Just(Value::Null), 4 => some].boxed()
}

/// A table whose columns are not in the order of their ids, and a row of it.
fn rows() -> impl Strategy<Value = (TableEntry, Vec<Value>)> {
    let ids = Just((1..=20_u32).collect::<Vec<_>>()).prop_shuffle();
    (ids, prop::collection::vec(types(), 1..20)).prop_flat_map(|(ids, types)| {
        let row: Vec<_> = types.iter().map(values).collect();
        let columns = ids.into_iter().zip(types).map(|(id, ty)| column(id, ty)).collect();
        (Just(table(columns)), row)
    })
}

fn everything_of(table: &TableEntry) -> Vec<usize> {
    (0..table.columns.len() + 3).collect()
}

proptest! {
    #[test]
    fn any_row_reads_back_by_value_and_through_arrow((table, values) in rows(), seq in any::<i64>()) {
        let mut stored = row::encode(&table, &values);
        row::stamp(&mut stored, seq, 1).unwrap();
        let view = RowView::parse(&stored).unwrap();
        prop_assert_eq!(view.seq(), seq);
        prop_assert_eq!(&view.values(&table).unwrap(), &values);
        for (index, position) in row::id_order(&table.columns).into_iter().enumerate() {
            let value = view.value(index, &table.columns[position].ty).unwrap();
            prop_assert_eq!(value.as_ref(), Some(&values[position]));
        }
        let mut builder = BatchBuilder::new(&table, &everything_of(&table));
        builder.push(&stored).unwrap();
        let batch = builder.finish().unwrap();
        prop_assert_eq!(batch.schema(), table.arrow_schema());
        prop_assert_eq!(own_values(&table, &batch, 0), values);
    }

    #[test]
    fn a_row_that_is_cut_anywhere_is_an_error((table, values) in rows(), at in any::<prop::sample::Index>()) {
        let stored = row::encode(&table, &values);
        let cut = &stored[..at.index(stored.len())];
        prop_assert!(RowView::parse(cut).is_err());
        prop_assert!(BatchBuilder::new(&table, &[]).push(cut).is_err());
        let mut longer = stored.clone();
        longer.push(0);
        prop_assert_eq!(RowView::parse(&longer).expect_err("longer"), RowError::Trailing(1));
    }

    #[test]
    fn damaged_rows_are_errors_or_rows_and_never_a_panic(
        (table, values) in rows(), flips in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..6),
    ) {
        let mut stored = row::encode(&table, &values);
        for (at, mask) in flips {
            let at = at.index(stored.len());
            stored[at] ^= mask;
        }
        read_all(&table, &stored);
    }

    #[test]
    fn any_bytes_are_an_error_or_a_row_and_never_a_panic(
        (table, _) in rows(), tail in any::<Vec<u8>>(), columns in 0_u16..24,
    ) {
        read_all(&table, &tail);
        let mut stored = vec![0; row::HEADER_BYTES];
        stored[0] = row::FORMAT;
        stored.extend(columns.to_le_bytes());
        stored.extend(tail);
        read_all(&table, &stored);
    }
}

fn read_all(table: &TableEntry, stored: &[u8]) {
    let values = RowView::parse(stored).and_then(|view| view.values(table));
    let mut builder = BatchBuilder::new(table, &everything_of(table));
    let pushed = builder.push(stored);
    assert_eq!(pushed.is_ok(), values.is_ok(), "both readers see the same: {pushed:?} {values:?}");
    let _error_or_batch = builder.finish();
    let _error_or_stamped = row::stamp(&mut stored.to_vec(), 1, 1);
}
