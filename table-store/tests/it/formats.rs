//! Stored samples of format 1 must parse for ever. A sample is never rewritten; a new format gets samples of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fs;
use std::path::PathBuf;

use arrow_array::RecordBatch;
use bytes::Bytes;
use kalamdb_model::catalog::Location;
use kalamdb_model::ids::{InstanceId, Owner, TableId, UserId};
use kalamdb_model::names::StorageName;
use kalamdb_table_store::catalog_log::{self, CatalogLog};
use kalamdb_table_store::manifest::{self, Manifest, Placed};
use kalamdb_table_store::owners::{self, ClaimError, Claimed};
use kalamdb_table_store::parquet_file::{self, key_of, locate_keys};
use kalamdb_table_store::stream::{self, Body, Round, RowBlock, StreamObject};
use kalamdb_table_store::users::{StorageMode, User, Users};
use kalamdb_table_store::{Edit, FileEntry, checkpoint, paths};
use object_store::ObjectStoreExt;
use object_store::path::Path;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::backend::memory;
use crate::sample::{all_types, catalog, edit, file};

/// The process that has written the streams and checkpoints.
const INCARNATION: &str = "01JARZ3NDEKTSV4RRFFQ69G5FA";

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

fn placed(storage: &str, moves: u32) -> Option<Placed> {
    let (storage, template) = (StorageName::new(storage).unwrap(), "users/{userId}/app/messages".to_owned());
    Some(Placed { location: Location { storage, root: 1, template }, moves })
}

/// A move with a file that has deleted and replaced rows, a flush that replaces more, and what a storage is told that the
/// instance has left.
fn placed_edits() -> Vec<Edit> {
    let moved = FileEntry {
        tombstones: [1_u32, 2].into_iter().collect(),
        deleted_since_us: 1_732_000_000_000_005,
        replaced: [0_u32, 3, 70_000].into_iter().collect(),
        ..file(80_000)
    };
    let replace = BTreeMap::from([(moved.path.clone(), (10..5_000_u32).collect())]);
    vec![
        Edit { add: vec![moved], placed: placed("eu", 1), ..edit(4) },
        Edit { replace, placed: placed("eu", 1), ..edit(5) },
        Edit { add: Vec::new(), placed: placed("us", 2), ..edit(7) },
    ]
}

fn manifest_of(edits: &[Edit]) -> Manifest {
    edits.iter().fold(Manifest::default(), |before, edit| manifest::apply(&before, edit))
}

/// What entry `version` of the log says of one of three users in turn.
fn user(version: u64) -> User {
    let (id, storage_mode) = match version % 3 {
        0 => ("Alice é", StorageMode::Region),
        1 => ("bob", StorageMode::Region),
        _ => ("carol", StorageMode::Table),
    };
    let storage_id = (version != 62).then(|| StorageName::new(format!("s{version}")).unwrap());
    User { id: UserId::new(id).unwrap(), storage_mode, storage_id }
}

/// All of them after that entry.
fn users(version: u64) -> Users {
    let users = (version - 2..=version).map(user).map(|user| (user.id.clone(), user)).collect();
    Users { version, users }
}

#[test]
fn a_stored_stream_object_parses() {
    let object = StreamObject::decode(&sample("stream-edits.log")).unwrap();
    assert_eq!((object.header.incarnation.as_str(), object.header.seq), (INCARNATION, 7));
    assert_eq!(object.body, Body::Round(Round { edits: edits(), rows: Vec::new() }));
    let placed = StreamObject::decode(&sample("stream-placed.log")).unwrap();
    assert_eq!(placed.body, Body::Round(Round { edits: placed_edits(), rows: Vec::new() }));
    let rows = StreamObject::decode(&sample("stream-rows.log")).unwrap();
    assert_eq!(rows.body, Body::Round(Round { edits: vec![edit(1)], rows: rows_of_two() }));
    let fence = StreamObject::decode(&sample("stream-fence.log")).unwrap();
    assert_eq!(fence.body, Body::Fence { by: "01JARZ3NDEKTSV4RRFFQ69G5FB".to_owned() });
}

#[tokio::test]
async fn a_stored_checkpoint_is_found_and_its_part_parses() {
    let (store, attempt) = (memory(), "0000000001");
    let part = paths::checkpoint_part(INCARNATION, 10, attempt, 0);
    store.put(&part, sample("checkpoint-part.log").into()).await.unwrap();
    store.put(&paths::checkpoint(INCARNATION, 10, attempt), sample("checkpoint.log").into()).await.unwrap();
    let found = checkpoint::newest(&*store, INCARNATION).await.unwrap().unwrap();
    assert_eq!((found.seq, found.parts()), (10, 3));
    assert_eq!(found.part(&*store, 0).await.unwrap(), Round { edits: placed_edits(), rows: rows_of_two() });
}

#[test]
fn a_stored_manifest_parses() {
    assert_eq!(Manifest::decode(&sample("manifest.json")).unwrap(), manifest_of(&edits()));
    assert_eq!(Manifest::decode(&sample("manifest-placed.json")).unwrap(), manifest_of(&placed_edits()[..2]));
}

#[tokio::test]
async fn a_stored_log_of_users_parses() {
    let store = memory();
    for version in [64, 65] {
        store.put(&paths::users_entry(version), sample(&format!("users-entry-{version}.json")).into()).await.unwrap();
        assert_eq!(Users::load(&*store).await.unwrap(), users(version));
    }
}

#[tokio::test]
async fn a_stored_claim_of_an_instance_counts() {
    let store = memory();
    store.put(&paths::owners_entry(1), sample("owners-entry-1.json").into()).await.unwrap();
    assert_eq!(owners::claim(&*store, "01jarz3ndektsv4rrffq69g5fa", "kalamdb-0").await.unwrap(), Claimed::First);
    let refused = owners::claim(&*store, "another", "kalamdb-1").await;
    assert!(matches!(&refused, Err(ClaimError::Owned { pod, .. }) if pod == "kalamdb-0"), "{refused:?}");
}

#[tokio::test]
async fn a_stored_holder_of_a_storage_is_known() {
    let store = memory();
    store.put(&paths::holder(), sample("holder.json").into()).await.unwrap();
    assert_eq!(owners::holder(&*store).await.unwrap().as_deref(), Some("01jarz3ndektsv4rrffq69g5fa"));
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
#[tokio::test]
#[ignore = "run by hand when a new kind of sample is added"]
async fn write_missing_samples() {
    let object = |seq, body| {
        let object = StreamObject::new(INCARNATION, seq, "00ff".repeat(8), 1_732_000_000_000_000, body);
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
    let (home, mut log) = (memory(), Users::default());
    for version in 1..=65 {
        log.put(&*home, user(version)).await.unwrap();
    }
    assert_eq!(log, users(65));
    owners::claim(&*home, "01jarz3ndektsv4rrffq69g5fa", "kalamdb-0").await.unwrap();
    owners::hold(&*home, "01jarz3ndektsv4rrffq69g5fa").await.unwrap();
    let stored = async |path: Path| home.get(&path).await.unwrap().bytes().await.unwrap().to_vec();
    assert_eq!(stream::FORMAT, 1, "samples of another format belong in another folder");
    for (name, bytes) in [
        ("stream-edits.log", object(7, Body::Round(Round { edits: edits(), rows: Vec::new() }))),
        ("stream-rows.log", object(9, Body::Round(Round { edits: vec![edit(1)], rows: rows_of_two() }))),
        ("checkpoint.log", object(10, Body::Checkpoint { parts: 3 })),
        ("stream-fence.log", object(8, fence)),
        ("stream-placed.log", object(11, Body::Round(Round { edits: placed_edits(), rows: Vec::new() }))),
        ("checkpoint-part.log", object(0, Body::Round(Round { edits: placed_edits(), rows: rows_of_two() }))),
        ("manifest.json", manifest_of(&edits()).encode()),
        ("manifest-placed.json", manifest_of(&placed_edits()[..2]).encode()),
        ("users-entry-64.json", stored(paths::users_entry(64)).await),
        ("users-entry-65.json", stored(paths::users_entry(65)).await),
        ("owners-entry-1.json", stored(paths::owners_entry(1)).await),
        ("holder.json", stored(paths::holder()).await),
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
