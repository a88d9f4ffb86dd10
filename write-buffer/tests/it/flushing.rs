//! Freeze, publish, reclaim: every row is in exactly one place at every moment.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kalamdb_model::Generation;
use kalamdb_write_buffer::{Generations, ReadError, WriteBuffer};
use parking_lot::{Mutex, RwLock};

use crate::support::{Stored, instance, message, open, pk, scan, scan_generation};

const NONE: Generation = Generation(0);

#[tokio::test]
async fn a_freeze_of_nothing_is_none_and_a_frozen_generation_is_returned_until_published() {
    let directory = tempfile::tempdir().unwrap();
    let alice = instance("alice");
    {
        let buffer = open(directory.path());
        assert_eq!(buffer.freeze(alice.clone()).await.unwrap(), None);
        assert!(buffer.record(&alice).unwrap().is_none());
        buffer.commit(alice.clone(), vec![message(1, "a")]).await.unwrap();
        assert_eq!(buffer.freeze(alice.clone()).await.unwrap(), Some(Generation(1)));
        buffer.commit(alice.clone(), vec![message(2, "b")]).await.unwrap();
    }
    let buffer = open(directory.path());
    assert_eq!(buffer.freeze(alice.clone()).await.unwrap(), Some(Generation(1)), "frozen before the restart");
    assert_eq!(buffer.counters(&alice).unwrap().active, Generation(2));
    buffer.publish(&alice, Generation(1), b"one").unwrap();
    assert_eq!(buffer.freeze(alice.clone()).await.unwrap(), Some(Generation(2)));
    buffer.publish(&alice, Generation(2), b"two").unwrap();
    assert_eq!(buffer.freeze(alice.clone()).await.unwrap(), None);
    let record = buffer.record(&alice).unwrap().unwrap();
    assert_eq!((record.flushed, record.active), (Generation(2), Generation(3)));
    assert_eq!(record.manifest, b"two");
}

#[tokio::test]
async fn a_publication_never_goes_back_and_never_names_a_generation_that_takes_rows() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    let alice = instance("alice");
    buffer.commit(alice.clone(), vec![message(1, "a")]).await.unwrap();
    let early = buffer.publish(&alice, Generation(1), b"");
    assert!(matches!(early, Err(ReadError::NotFrozen { .. })), "{early:?}");
    buffer.freeze(alice.clone()).await.unwrap();
    assert!(matches!(buffer.reclaim(&alice, Generation(1)), Err(ReadError::NotFlushed { .. })));
    buffer.publish(&alice, Generation(1), b"one").unwrap();
    buffer.publish(&alice, Generation(1), b"one again").unwrap();
    assert!(matches!(buffer.publish(&alice, NONE, b"zero"), Err(ReadError::Stale { .. })));
    assert_eq!(buffer.record(&alice).unwrap().unwrap().manifest, b"one again");
}

#[tokio::test]
async fn rows_are_removed_only_once_and_a_reader_of_removed_rows_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    let alice = instance("alice");
    buffer.commit(alice.clone(), (0..10_000).map(|id| message(id, "x")).collect()).await.unwrap();
    buffer.freeze(alice.clone()).await.unwrap();
    buffer.commit(alice.clone(), vec![message(5, "newer")]).await.unwrap();
    buffer.publish(&alice, Generation(1), b"files").unwrap();
    assert_eq!(scan_generation(&buffer, &alice, Generation(1)).len(), 10_000, "old views still read it");
    assert_eq!(buffer.reclaim(&alice, Generation(1)).unwrap(), 10_000);
    assert_eq!(buffer.reclaim(&alice, Generation(1)).unwrap(), 0);
    let rows = scan(&buffer, &alice, Generation(1));
    assert_eq!(rows[&5].body, "newer");
    assert_eq!(rows.len(), 1);
    let stale = buffer.scan(&alice, NONE, &mut |_, _, _| ControlFlow::Continue(()));
    assert!(matches!(stale, Err(ReadError::Reclaimed { .. })), "{stale:?}");
    assert!(matches!(buffer.get(&alice, NONE, b"k"), Err(ReadError::Reclaimed { .. })));
}

#[tokio::test]
async fn rows_that_were_published_and_not_removed_are_gone_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let alice = instance("alice");
    {
        let buffer = open(directory.path());
        buffer.commit(alice.clone(), vec![message(1, "a"), message(2, "b")]).await.unwrap();
        buffer.freeze(alice.clone()).await.unwrap();
        buffer.commit(alice.clone(), vec![message(3, "c")]).await.unwrap();
        buffer.publish(&alice, Generation(1), b"files").unwrap();
    }
    let buffer = open(directory.path());
    assert_eq!(scan(&buffer, &alice, Generation(1)).into_keys().collect::<Vec<_>>(), [3]);
    assert_eq!(buffer.reclaim(&alice, Generation(1)).unwrap(), 0);
    let stale = buffer.scan(&alice, NONE, &mut |_, _, _| ControlFlow::Continue(()));
    assert!(matches!(stale, Err(ReadError::Reclaimed { .. })));
}

#[tokio::test]
async fn a_moment_shows_all_instances_as_they_were_whatever_is_written_and_removed_since() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    let (alice, bob) = (instance("alice"), instance("bob"));
    buffer.commit(alice.clone(), vec![message(1, "a"), message(2, "b")]).await.unwrap();
    buffer.freeze(alice.clone()).await.unwrap();
    buffer.commit(alice.clone(), vec![message(2, "newer")]).await.unwrap();
    let moment = buffer.moment();
    let (hers, his) = (moment.generations(&alice, NONE).unwrap(), moment.generations(&bob, NONE).unwrap());
    buffer.commit(bob.clone(), vec![message(3, "later")]).await.unwrap();
    buffer.commit(alice.clone(), vec![message(4, "later")]).await.unwrap();
    for flushed in [1, 2] {
        buffer.publish(&alice, Generation(flushed), b"files").unwrap();
        assert_eq!(buffer.reclaim(&alice, Generation(flushed)).unwrap(), 2);
        buffer.freeze(alice.clone()).await.unwrap();
    }
    let seen = |of: &Generations<'_>| {
        let mut keys = Vec::new();
        of.scan(&mut |generation, key, _| {
            keys.push((generation.0, key.to_vec()));
            ControlFlow::Continue(())
        })
        .unwrap();
        keys
    };
    assert_eq!(seen(&hers), [(1, pk(1)), (2, pk(2))]);
    assert!(seen(&his).is_empty());
    // Whoever asks only now is told that it is too late.
    assert!(matches!(moment.generations(&alice, NONE), Err(ReadError::Reclaimed { .. })));
    assert_eq!(scan(&buffer, &bob, NONE).len(), 1);
}

#[tokio::test]
async fn a_visitor_ends_a_scan() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    buffer.commit(instance("alice"), (0..10).map(|id| message(id, "x")).collect()).await.unwrap();
    let mut seen = 0;
    let visit = &mut |_: Generation, _: &[u8], _: &[u8]| {
        seen += 1;
        if seen == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    buffer.scan(&instance("alice"), NONE, visit).unwrap();
    assert_eq!(seen, 3);
}

const STATEMENT_ROWS: i64 = 3;
const WRITERS: i64 = 8;

/// Files and the generation that they reach, as a query pod keeps them: changed and read under one lock.
#[derive(Default)]
struct View {
    flushed: Option<Generation>,
    files: BTreeMap<i64, Stored>,
}

/// The last acknowledged statement of each writer.
type Acknowledged = Arc<Vec<Mutex<i64>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn under_load_a_statement_lies_in_one_generation_and_every_row_is_seen_exactly_once() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    let stop = Arc::new(AtomicBool::new(false));
    let view = Arc::new(RwLock::new(View::default()));
    let acknowledged: Acknowledged = Arc::new((0..WRITERS).map(|_| Mutex::new(0)).collect());
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        tasks.spawn(write(buffer.clone(), writer, Arc::clone(&acknowledged), Arc::clone(&stop)));
    }
    let reader = {
        let (buffer, view) = (buffer.clone(), Arc::clone(&view));
        let (acknowledged, stop) = (Arc::clone(&acknowledged), Arc::clone(&stop));
        std::thread::spawn(move || read_until(&buffer, &view, &acknowledged, &stop))
    };
    let end = Instant::now() + Duration::from_secs(3);
    let mut flushes = 0;
    while Instant::now() < end {
        flushes += u32::from(flush(&buffer, &view).await);
    }
    stop.store(true, Ordering::Relaxed);
    tasks.join_all().await;
    let reads = reader.join().expect("every read was right");
    assert!(flushes > 10 && reads > 10, "{flushes} flushes and {reads} reads prove little");
    check_view(&buffer, &view, &acknowledged);
}

async fn write(buffer: WriteBuffer, writer: i64, acknowledged: Acknowledged, stop: Arc<AtomicBool>) {
    let mut statement = 0;
    while !stop.load(Ordering::Relaxed) {
        let rows = ids(writer, statement).map(|id| message(id, "x")).collect();
        buffer.commit(instance("alice"), rows).await.unwrap();
        statement += 1;
        *acknowledged[usize::try_from(writer).unwrap()].lock() = statement;
    }
}

fn ids(writer: i64, statement: i64) -> impl Iterator<Item = i64> {
    (0..STATEMENT_ROWS).map(move |part| writer * 1_000_000_000 + statement * STATEMENT_ROWS + part)
}

/// One flush as a query pod does it; the file is a map.
async fn flush(buffer: &WriteBuffer, view: &RwLock<View>) -> bool {
    let alice = instance("alice");
    let Some(frozen) = buffer.freeze(alice.clone()).await.unwrap() else { return false };
    let rows = scan_generation(buffer, &alice, frozen);
    for id in rows.keys() {
        let first = id - id % 1_000_000_000 % STATEMENT_ROWS;
        assert!((first..first + STATEMENT_ROWS).all(|part| rows.contains_key(&part)), "half of a statement is frozen");
    }
    tokio::time::sleep(Duration::from_millis(2)).await;
    assert_eq!(scan_generation(buffer, &alice, frozen), rows, "a row came into a frozen generation");
    {
        let mut view = view.write();
        buffer.publish(&alice, frozen, b"files").unwrap();
        view.flushed = Some(frozen);
        view.files.extend(rows);
    }
    buffer.reclaim(&alice, frozen).unwrap();
    true
}

fn read_until(buffer: &WriteBuffer, view: &RwLock<View>, acknowledged: &Acknowledged, stop: &AtomicBool) -> u32 {
    let mut reads = 0;
    while !stop.load(Ordering::Relaxed) {
        check_view(buffer, view, acknowledged);
        reads += 1;
    }
    reads
}

fn check_view(buffer: &WriteBuffer, view: &RwLock<View>, acknowledged: &Acknowledged) {
    let before: Vec<i64> = acknowledged.iter().map(|statement| *statement.lock()).collect();
    let view = view.read();
    let hot = scan(buffer, &instance("alice"), view.flushed.unwrap_or(NONE));
    assert!(hot.keys().all(|id| !view.files.contains_key(id)), "a row is in a file and in the buffer");
    for (writer, statements) in (0..).zip(before) {
        for id in (0..statements).flat_map(|statement| ids(writer, statement)) {
            assert!(hot.contains_key(&id) || view.files.contains_key(&id), "row {id} is nowhere");
        }
    }
}
