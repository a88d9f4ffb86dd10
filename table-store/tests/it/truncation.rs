//! A body that ends early is never taken for a shorter object, of whatever kind, wherever it ends.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

use bytes::Bytes;
use kalamdb_model::UserId;
use kalamdb_table_store::catalog_log::SNAPSHOT_EVERY;
use kalamdb_table_store::checkpoint::{self, CheckpointWriter};
use kalamdb_table_store::manifest::{self, Manifest};
use kalamdb_table_store::merge::Merge;
use kalamdb_table_store::parquet_file::{key_of, locate_keys};
use kalamdb_table_store::parquet_read::read_rows;
use kalamdb_table_store::stream::{self, Fence, Round, RowBlock};
use kalamdb_table_store::users::{StorageMode, User, Users};
use kalamdb_table_store::{
    CatalogLog, Create, CreateError, DataFiles, Footers, Positions, StreamWriter, create_exact, fence, owners, paths,
};
use object_store::ObjectStoreExt;
use object_store::path::Path;

use crate::backend::{Store, memory};
use crate::fault_store::{Fault, FaultStore, Rates};
use crate::parquet::{longs, texts, upload};
use crate::sample::{batch, catalog, edit, table};

/// Every body ends early, without an error.
fn short() -> Rates {
    Rates { short: 1.0, ..Rates::default() }
}

/// Some lengths below `length`, the smallest and the largest among them.
fn cuts(length: usize) -> impl Iterator<Item = usize> {
    (0..length).step_by(length / 30 + 1).chain([length - 1])
}

/// Checks that `read`, which gives `None` for an error, gives the same whether or not the body of `path` comes whole.
async fn is_never_short<T: PartialEq + Debug>(
    store: &Store,
    path: &Path,
    read: impl AsyncFn(&FaultStore) -> Option<T>,
) {
    let faults = FaultStore::healthy(Arc::clone(store));
    let whole = read(&faults).await;
    assert!(whole.is_some(), "{path} is not read at all");
    let length = usize::try_from(store.head(path).await.unwrap().size).unwrap();
    faults.set_rates(short());
    let mut errors = 0;
    for cut in cuts(length) {
        faults.cut_at(cut);
        match read(&faults).await {
            None => errors += 1,
            found => assert_eq!(found, whole, "{path} after {cut} of {length} bytes"),
        }
    }
    assert!(errors > 0, "nothing was cut off from {path}");
}

fn round() -> Round {
    let row = |n: u8| (vec![n; 9], vec![n; 100]);
    let block = |buffered| RowBlock { instance: edit(1).instance, buffered, rows: vec![row(1), row(2)] };
    Round { edits: vec![edit(1), edit(2)], rows: vec![block(true), block(false)] }
}

pub async fn an_object_of_a_stream_is_read_whole_or_not_at_all(store: Store) {
    StreamWriter::new(Arc::clone(&store), "01A", 1).append(&Arc::new(round())).await.unwrap();
    fence(&*store, "01A", 2, "01B").await.unwrap();
    for seq in [1, 2] {
        let read = async |cut: &FaultStore| stream::read(cut, "01A", seq).await.ok().flatten();
        is_never_short(&store, &paths::stream_object("01A", seq), read).await;
    }
    // Whoever ends it again finds the end, or does not know.
    let faults = FaultStore::healthy(Arc::clone(&store));
    faults.set_rates(short());
    faults.cut_at(40);
    assert!(fence(&faults, "01A", 1, "01C").await.is_err());
    faults.heal();
    assert_eq!(fence(&faults, "01A", 1, "01C").await.unwrap(), Fence { seq: 2, by: "01B".to_owned() });
}

pub async fn a_checkpoint_is_read_whole_or_not_at_all(store: Store) {
    let mut writer = CheckpointWriter::new(&*store, "01A", 7, 1);
    writer.part(round()).await.unwrap();
    let made = writer.finish().await.unwrap();
    let newest = async |cut: &FaultStore| checkpoint::newest(cut, "01A").await.ok().flatten();
    is_never_short(&store, &paths::checkpoint("01A", 7, "0000000001"), newest).await;
    let part = async |cut: &FaultStore| made.part(cut, 0).await.ok();
    is_never_short(&store, &paths::checkpoint_part("01A", 7, "0000000001", 0), part).await;
}

pub async fn a_catalog_is_read_whole_or_not_at_all(store: Store) {
    let append = async |version: u64| {
        CatalogLog::append(&*store, &catalog(version - 1), &catalog(version), "w").await.unwrap();
    };
    append(1).await;
    let load = async |cut: &FaultStore| CatalogLog::load(cut).await.ok();
    is_never_short(&store, &paths::catalog_entry(1), load).await;
    let next = async |cut: &FaultStore| CatalogLog::next(cut, &catalog(0)).await.ok().flatten();
    is_never_short(&store, &paths::catalog_entry(1), next).await;
    for version in 2..=SNAPSHOT_EVERY {
        append(version).await;
    }
    let load = async |cut: &FaultStore| CatalogLog::load(cut).await.ok();
    is_never_short(&store, &paths::catalog_snapshot(SNAPSHOT_EVERY), load).await;
    let next = async |cut: &FaultStore| CatalogLog::next(cut, &catalog(5)).await.ok().flatten();
    is_never_short(&store, &paths::catalog_snapshot(SNAPSHOT_EVERY), next).await;
}

pub async fn users_and_owners_are_read_whole_or_not_at_all(store: Store) {
    let user = User { id: UserId::new("a").unwrap(), storage_mode: StorageMode::Table, storage_id: None };
    Users::default().put(store.as_ref(), user).await.unwrap();
    let load = async |cut: &FaultStore| Users::load(cut).await.ok();
    is_never_short(&store, &paths::users_entry(1), load).await;
    owners::claim(store.as_ref(), "one", "pod").await.unwrap();
    let claim = async |cut: &FaultStore| owners::claim(cut, "one", "pod").await.ok();
    is_never_short(&store, &paths::owners_entry(1), claim).await;
    assert!(store.head(&paths::owners_entry(2)).await.is_err(), "an entry that was cut off was none");
}

pub async fn a_data_file_is_read_whole_or_not_at_all(store: Store) {
    let table = table(&[("id", "BIGINT", true), ("body", "TEXT", false)]);
    let rows = batch(&table, vec![longs(0..9_000), texts((0..9_000).map(|n| format!("body {n}")))], 1);
    let keys: BTreeSet<Vec<u8>> = [5, 4_000, 8_999].map(|row| key_of(&table, &rows, row).unwrap()).into();
    let file = upload(&store, &table, vec![rows]).await;
    let path = Path::parse(&file.path).unwrap();
    let positions: Positions = [5, 4_000, 8_999].into_iter().collect();
    // With a footer that is read each time, and with one that is kept: then only pages are read.
    for footers in [Footers::default(), Footers::new(16 << 20)] {
        let files = |cut: &FaultStore| DataFiles::new(Arc::new(cut.clone()), "test".into(), footers.clone());
        let located = async |cut: &FaultStore| locate_keys(&files(cut), &file, &table, &keys).await.ok();
        is_never_short(&store, &path, located).await;
        let read = async |cut: &FaultStore| read_rows(&files(cut), &file, &table, &positions).await.ok();
        is_never_short(&store, &path, read).await;
        let merged = async |cut: &FaultStore| {
            let mut merge = Merge::begin(&files(cut), &table, std::slice::from_ref(&file), None).await.ok()?;
            let mut rows = 0;
            while let Some(batch) = merge.next().await.ok()? {
                rows += batch.num_rows();
            }
            Some(rows)
        };
        is_never_short(&store, &path, merged).await;
    }
}

#[test]
fn a_manifest_is_decoded_whole_or_not_at_all() {
    let manifest = manifest::apply(&manifest::apply(&Manifest::default(), &edit(1)), &edit(2));
    let bytes = manifest.encode();
    assert_eq!(Manifest::decode(&bytes).unwrap(), manifest);
    for cut in 0..bytes.len() {
        assert!(Manifest::decode(&bytes[..cut]).is_err(), "after {cut} of {} bytes", bytes.len());
    }
}

#[tokio::test]
async fn an_object_of_ours_that_comes_back_cut_off_is_not_anothers() {
    let store = FaultStore::healthy(memory());
    let (path, ours) = (Path::from("log/1"), Bytes::from_static(b"ours"));
    store.script([Some(Fault::After)]);
    store.set_rates(short());
    for cut in [0, 3] {
        store.cut_at(cut);
        let CreateError::Unknown { .. } = create_exact(&store, &path, ours.clone()).await.unwrap_err();
    }
    store.heal();
    assert_eq!(create_exact(&store, &path, ours).await.unwrap(), Create::Ours);
}
