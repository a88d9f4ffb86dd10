//! Stored samples of format 1 must parse for ever. A sample is never rewritten; a new format gets samples of its own.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs;
use std::path::PathBuf;

use arrow_array::RecordBatch;
use bytes::Bytes;
use kalamdb_model::ids::{InstanceId, Owner, TableId};
use kalamdb_table_store::catalog_log::{self, CatalogLog};
use kalamdb_table_store::manifest::{self, Manifest};
use kalamdb_table_store::parquet_file::{self, key_of, locate_keys};
use kalamdb_table_store::stream::{self, Body, Round, RowBlock, StreamObject};
use kalamdb_table_store::{Edit, FileEntry, paths};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::backend::memory;
use crate::sample::{all_types, catalog, edit, file};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/format-1")
}

fn sample(name: &str) -> Bytes {
    let path = folder().join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).into()
}

fn edits() -> Vec<Edit> {
    vec![edit(1), edit(2), edit(3)]
}

/// Blocks of a user and of a shared table, one of them acknowledged before it was stored.
fn rows_of_two() -> Vec<RowBlock> {
    let block = |instance, buffered| RowBlock {
        instance,
        buffered,
        rows: vec![(b"key 1".to_vec(), b"value 1".to_vec()), (Vec::new(), Vec::new())],
    };
    let shared = InstanceId { owner: Owner::Shared, table: TableId(8) };
    vec![block(edit(1).instance, true), block(shared, false)]
}

fn manifest() -> Manifest {
    edits().iter().fold(Manifest::default(), |before, edit| manifest::apply(&before, edit))
}

#[test]
fn a_stored_stream_object_parses() {
    let object = StreamObject::decode(&sample("stream-edits.log")).unwrap();
    assert_eq!((object.header.incarnation.as_str(), object.header.seq), ("01JARZ3NDEKTSV4RRFFQ69G5FA", 7));
    assert_eq!(object.body, Body::Round(Round { edits: edits(), rows: Vec::new() }));
    let rows = StreamObject::decode(&sample("stream-rows.log")).unwrap();
    assert_eq!(rows.body, Body::Round(Round { edits: vec![edit(1)], rows: rows_of_two() }));
    let checkpoint = StreamObject::decode(&sample("checkpoint.log")).unwrap();
    assert_eq!(checkpoint.body, Body::Checkpoint { parts: 3 });
    let fence = StreamObject::decode(&sample("stream-fence.log")).unwrap();
    assert_eq!(fence.body, Body::Fence { by: "01JARZ3NDEKTSV4RRFFQ69G5FB".to_owned() });
}

#[test]
fn a_stored_manifest_parses() {
    assert_eq!(Manifest::decode(&sample("manifest.json")).unwrap(), manifest());
}

#[tokio::test]
async fn a_stored_catalog_log_parses() {
    let store = memory();
    store.put(&paths::catalog_snapshot(64), sample("catalog-snapshot-64.json").into()).await.unwrap();
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), catalog(64));
    store.put(&paths::catalog_entry(65), sample("catalog-entry-65.json").into()).await.unwrap();
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), catalog(65));
}

#[tokio::test]
async fn a_stored_parquet_file_opens_with_the_same_rows() {
    let ((table, rows), bytes) = (all_types(), sample("all-types.parquet"));
    let batches = ParquetRecordBatchReaderBuilder::try_new(bytes.clone()).unwrap().build().unwrap();
    let found: Vec<RecordBatch> = batches.collect::<Result<_, _>>().unwrap();
    assert_eq!(found, std::slice::from_ref(&rows));
    let keys: Vec<Vec<u8>> = (0..rows.num_rows()).map(|row| key_of(&table, &rows, row).unwrap()).collect();
    let (min_key, max_key) = (keys[0].clone(), keys[2].clone());
    let entry = FileEntry { rows: 3, bytes: bytes.len() as u64, min_key, max_key, ..file(3) };
    let store = memory();
    store.put(&Path::parse(&entry.path).unwrap(), bytes.into()).await.unwrap();
    let keys = BTreeSet::from_iter(keys);
    let located = locate_keys(&crate::parquet::files(&store), &entry, &table, &keys).await.unwrap();
    assert_eq!(located.into_keys().collect::<BTreeSet<_>>(), keys);
}

/// Writes the samples that are missing; those that are there stay as they are.
#[test]
#[ignore = "run by hand when a new kind of sample is added"]
fn write_missing_samples() {
    let object = |seq, body| {
        let object =
            StreamObject::new("01JARZ3NDEKTSV4RRFFQ69G5FA", seq, "00ff".repeat(8), 1_732_000_000_000_000, body);
        object.unwrap().encode().unwrap()
    };
    let (format, writer, at_us) = (1, "operator-0/1".to_owned(), 1_732_000_000_000_000);
    let (before, after) = (catalog(64), catalog(65));
    let delta = catalog_log::diff(&before, &after);
    let (nonce, previous) = (after.nonce, before.nonce.clone());
    let entry = catalog_log::Entry { format, version: 65, nonce, previous, writer: writer.clone(), at_us, delta };
    let snapshot = catalog_log::Snapshot { format, version: 64, writer, at_us, catalog: before };
    let (table, rows) = all_types();
    let mut parquet = Vec::new();
    parquet_file::write(&table, 1, [Ok::<_, Infallible>(rows)], &mut parquet).unwrap();
    let fence = Body::Fence { by: "01JARZ3NDEKTSV4RRFFQ69G5FB".to_owned() };
    assert_eq!(stream::FORMAT, 1, "samples of another format belong in another folder");
    for (name, bytes) in [
        ("stream-edits.log", object(7, Body::Round(Round { edits: edits(), rows: Vec::new() }))),
        ("stream-rows.log", object(9, Body::Round(Round { edits: vec![edit(1)], rows: rows_of_two() }))),
        ("checkpoint.log", object(10, Body::Checkpoint { parts: 3 })),
        ("stream-fence.log", object(8, fence)),
        ("manifest.json", manifest().encode()),
        ("all-types.parquet", parquet),
        ("catalog-snapshot-64.json", serde_json::to_vec(&snapshot).unwrap()),
        ("catalog-entry-65.json", serde_json::to_vec(&entry).unwrap()),
    ] {
        let path = folder().join(name);
        if !path.exists() {
            fs::write(path, bytes).unwrap();
        }
    }
}
