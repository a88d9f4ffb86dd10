//! Bounds and refusals.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use kalamdb_model::Generation;
use kalamdb_write_buffer::{CommitError, OpenError, Options, WriteBuffer};
use parking_lot::Mutex;

use crate::support::{instance, message, open, options, scan};

const NONE: Generation = Generation(0);

#[tokio::test]
async fn below_the_disk_reserve_commits_are_refused_and_freezes_are_not() {
    let directory = tempfile::tempdir().unwrap();
    let free = Arc::new(AtomicU64::new(1_000));
    let free_space = {
        let free = Arc::clone(&free);
        Arc::new(move || Ok(free.load(Ordering::Relaxed)))
    };
    let full = Options { disk_reserve_bytes: 1_000, free_space: Some(free_space), ..options() };
    let buffer = WriteBuffer::open(directory.path(), full).unwrap();
    let alice = instance("alice");
    buffer.commit(alice.clone(), vec![message(1, "a")]).await.unwrap();
    free.store(999, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(150)).await;
    let error = buffer.commit(alice.clone(), vec![message(2, "b")]).await.expect_err("refused");
    assert!(matches!(error, CommitError::DiskFull { free: 999, reserve: 1_000 }), "{error}");
    assert_eq!(buffer.freeze(alice.clone()).await.unwrap(), Some(Generation(1)));
    assert_eq!(scan(&buffer, &alice, NONE).len(), 1);
    free.store(1_000, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(150)).await;
    buffer.commit(alice, vec![message(2, "b")]).await.unwrap();
}

#[tokio::test]
async fn the_free_space_of_the_real_disk_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let greedy = Options { disk_reserve_bytes: u64::MAX, ..options() };
    let buffer = WriteBuffer::open(directory.path(), greedy).unwrap();
    let error = buffer.commit(instance("alice"), vec![message(1, "a")]).await.expect_err("no disk is that large");
    assert!(matches!(error, CommitError::DiskFull { free, .. } if free > 0), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_busy_and_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (gate, opened) = mpsc::channel::<()>();
    let opened = Mutex::new(opened);
    // Waits until the gate is dropped.
    let on_applied = Arc::new(move |_: &[_]| assert!(opened.lock().recv().is_err()));
    let narrow = Options { queue_max: 2, round_ops_max: 1, on_applied, ..options() };
    let buffer = WriteBuffer::open(directory.path(), narrow).unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for id in 0..20 {
        let buffer = buffer.clone();
        tasks.spawn(async move { (id, buffer.commit(instance("alice"), vec![message(id, "x")]).await) });
    }
    // Two wait in the queue and one is with the committer at most; the others are answered while the gate is closed.
    let mut outcomes = Vec::new();
    while outcomes.len() < 17 {
        outcomes.push(tasks.join_next().await.expect("at most three are taken").unwrap());
    }
    assert!(outcomes.iter().all(|(_, outcome)| matches!(outcome, Err(CommitError::Busy))), "{outcomes:?}");
    drop(gate);
    let taken: Vec<i64> =
        tasks.join_all().await.into_iter().filter_map(|(id, outcome)| outcome.ok().map(|_| id)).collect();
    assert!(taken.len() >= 2, "{taken:?}");
    let stored = scan(&buffer, &instance("alice"), NONE);
    assert_eq!(stored.len(), taken.len());
    assert!(taken.iter().all(|id| stored.contains_key(id)));
}

#[tokio::test]
async fn a_buffer_of_another_version_is_refused_with_both_versions() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(directory.path()));
    {
        let database = rocksdb::Options::default();
        let families = ["default", "rows", "instances"];
        let database = rocksdb::DB::open_cf(&database, directory.path().join("db"), families).unwrap();
        database.put("format", "7").unwrap();
    }
    let error = WriteBuffer::open(directory.path(), options()).expect_err("another format");
    assert!(matches!(&error, OpenError::Format { found, supported: "1", .. } if found == "7"), "{error}");
    assert!(error.to_string().contains("`7`"), "{error}");
}

#[tokio::test]
async fn a_damaged_row_or_key_stops_the_opening() {
    for (key, value) in [(&b"short"[..], &b"row"[..]), (&row_key()[..], &b"no row"[..])] {
        let directory = tempfile::tempdir().unwrap();
        drop(open(directory.path()));
        {
            let families = ["default", "rows", "instances"];
            let path = directory.path().join("db");
            let database = rocksdb::DB::open_cf(&rocksdb::Options::default(), path, families).unwrap();
            database.put_cf(database.cf_handle("rows").unwrap(), key, value).unwrap();
        }
        let error = WriteBuffer::open(directory.path(), options()).expect_err("damaged");
        assert!(matches!(error, OpenError::Stored { .. }), "{error}");
    }
}

fn row_key() -> Vec<u8> {
    kalamdb_write_buffer::keys::row_key(&instance("alice"), Generation(1), b"k")
}
