//! `information_schema.{schemata,tables,columns}`: the catalog, which is the same for everybody. Nothing in it tells who
//! has rows, or how many.

use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, Int64Array, RecordBatch, StringArray};
use datafusion::catalog::TableProvider;
use datafusion::datasource::MemTable;
use datafusion::error::Result;
use kalamdb_model::{TableEntry, TableKind};

use super::owner_for;
use super::session::Visible;

/// Name of the schema.
pub(super) const NAME: &str = "information_schema";

const CATALOG: &str = "kalam";

/// The view called `name`, or `None`.
pub(super) fn table(visible: &Visible, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
    let batch = match name {
        "schemata" => schemata(visible)?,
        "tables" => tables(visible)?,
        "columns" => columns(visible)?,
        _ => return Ok(None),
    };
    let table = MemTable::try_new(batch.schema(), vec![vec![batch]])?;
    Ok(Some(Arc::new(table)))
}

fn text<'a>(values: impl IntoIterator<Item = &'a str>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

/// Tables that the caller may read.
fn readable(visible: &Visible) -> Vec<&TableEntry> {
    visible
        .snapshot
        .catalog
        .tables
        .values()
        .filter(|table| owner_for(table, &visible.identity, false).is_ok())
        .collect()
}

fn schemata(visible: &Visible) -> Result<RecordBatch> {
    let names: Vec<&str> = visible.snapshot.catalog.namespaces.keys().map(|name| name.as_str()).collect();
    Ok(RecordBatch::try_from_iter([
        ("catalog_name", text(names.iter().map(|_| CATALOG))),
        ("schema_name", text(names.iter().copied())),
    ])?)
}

fn tables(visible: &Visible) -> Result<RecordBatch> {
    let tables = readable(visible);
    let kind = |table: &TableEntry| match table.kind {
        TableKind::User => "USER TABLE",
        TableKind::Shared => "SHARED TABLE",
    };
    Ok(RecordBatch::try_from_iter([
        ("table_catalog", text(tables.iter().map(|_| CATALOG))),
        ("table_schema", text(tables.iter().map(|table| table.name.namespace.as_str()))),
        ("table_name", text(tables.iter().map(|table| table.name.table.as_str()))),
        ("table_type", text(tables.iter().map(|table| kind(table)))),
        (
            "use_user_storage",
            Arc::new(BooleanArray::from_iter(tables.iter().map(|table| Some(table.use_user_storage)))) as ArrayRef,
        ),
    ])?)
}

fn columns(visible: &Visible) -> Result<RecordBatch> {
    let tables = readable(visible);
    let all: Vec<_> =
        tables.iter().flat_map(|table| (1_i64..).zip(&table.columns).map(move |(at, c)| (*table, at, c))).collect();
    let types: Vec<String> = all.iter().map(|(_, _, column)| column.ty.to_string()).collect();
    let defaults = all.iter().map(|(_, _, column)| column.default.as_ref().map(ToString::to_string));
    let in_key = all.iter().map(|(table, _, column)| Some(table.key.contains(&column.id)));
    Ok(RecordBatch::try_from_iter_with_nullable([
        ("table_catalog", text(all.iter().map(|_| CATALOG)), false),
        ("table_schema", text(all.iter().map(|(table, ..)| table.name.namespace.as_str())), false),
        ("table_name", text(all.iter().map(|(table, ..)| table.name.table.as_str())), false),
        ("column_name", text(all.iter().map(|(_, _, column)| column.name.as_str())), false),
        (
            "ordinal_position",
            Arc::new(Int64Array::from_iter_values(all.iter().map(|(_, at, _)| *at))) as ArrayRef,
            false,
        ),
        ("column_default", Arc::new(defaults.collect::<StringArray>()) as ArrayRef, true),
        ("is_nullable", text(all.iter().map(|(_, _, column)| if column.nullable { "YES" } else { "NO" })), false),
        ("data_type", text(types.iter().map(String::as_str)), false),
        ("is_primary_key", Arc::new(in_key.collect::<BooleanArray>()) as ArrayRef, false),
    ])?)
}
