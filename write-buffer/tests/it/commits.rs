//! Statements: whole, in order, durable.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use kalamdb_model::Generation;
use kalamdb_write_buffer::row::{self, RowView};
use kalamdb_write_buffer::{CommitError, Counters, EncodedRow, Fresh, Options, WriteBuffer};
use parking_lot::Mutex;

use crate::support::{instance, message, open, options, pk, scan};

const NONE: Generation = Generation(0);

#[tokio::test]
async fn a_statement_of_many_rows_is_in_one_generation_with_rising_seq() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    let alice = instance("alice");
    let committed =
        buffer.commit(alice.clone(), vec![message(1, "a"), message(2, "b"), message(3, "c")]).await.unwrap();
    assert_eq!(committed.generation, Generation(1));
    assert_eq!(committed.last_seq, committed.first_seq + 2);
    let seqs: Vec<i64> = scan(&buffer, &alice, NONE).values().map(|stored| stored.seq).collect();
    assert_eq!(seqs, [committed.first_seq, committed.first_seq + 1, committed.last_seq]);
}

#[tokio::test]
async fn a_statement_with_one_bad_row_stores_none() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    let alice = instance("alice");
    let bad = EncodedRow { key: pk(2), value: vec![9, 9, 9], fresh: Fresh::Yes };
    let error = buffer.commit(alice.clone(), vec![message(1, "a"), bad]).await.expect_err("refused");
    assert!(matches!(error, CommitError::Row { index: 1, .. }), "{error}");
    assert!(matches!(buffer.commit(alice.clone(), vec![]).await, Err(CommitError::Empty)));
    assert!(scan(&buffer, &alice, NONE).is_empty());
    assert!(buffer.dirty().is_empty());
}

#[tokio::test]
async fn no_user_sees_the_rows_of_another() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    let users = ["a", "a/", "A", "aa", "é", "e\u{301}", "😀"];
    for (id, user) in (0..).zip(users) {
        buffer.commit(instance(user), vec![message(id, user)]).await.unwrap();
    }
    for (id, user) in (0..).zip(users) {
        let rows = scan(&buffer, &instance(user), NONE);
        assert_eq!(rows.keys().copied().collect::<Vec<i64>>(), [id], "{user}");
        assert_eq!(rows[&id].body, user);
        assert!(buffer.get(&instance(user), NONE, &pk(id + 1)).unwrap().is_none());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn concurrent_statements_are_all_stored_and_their_seqs_never_meet() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..64_i64 {
        let buffer = buffer.clone();
        tasks.spawn(async move {
            let mut seqs = Vec::new();
            for round in 0..20 {
                let id = writer * 1_000 + round * 2;
                let rows = vec![message(id, "x"), message(id + 1, "y")];
                let committed = buffer.commit(instance("alice"), rows).await.unwrap();
                seqs.extend(committed.first_seq..=committed.last_seq);
            }
            assert!(seqs.is_sorted(), "one writer's statements are committed in its order");
            seqs
        });
    }
    let seqs: Vec<i64> = tasks.join_all().await.into_iter().flatten().collect();
    let distinct: BTreeSet<i64> = seqs.iter().copied().collect();
    assert_eq!((seqs.len(), distinct.len()), (64 * 40, 64 * 40));
    let stored: BTreeSet<i64> = scan(&buffer, &instance("alice"), NONE).values().map(|row| row.seq).collect();
    assert_eq!(stored, distinct);
    assert_eq!(buffer.counters(&instance("alice")).unwrap().rows, 64 * 40);
}

#[tokio::test]
async fn seq_rises_strictly_across_restarts_flushes_and_a_clock_that_goes_back() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(AtomicI64::new(1_000_000));
    let open = || {
        let clock = Arc::clone(&clock);
        let clock = Arc::new(move || clock.load(Ordering::Relaxed));
        WriteBuffer::open(directory.path(), Options { clock, ..options() }).unwrap()
    };
    let alice = instance("alice");
    let mut last = 0;
    for id in 0..12 {
        let buffer = open();
        let committed = buffer.commit(alice.clone(), vec![message(id, "x"), message(id + 100, "y")]).await.unwrap();
        assert!(committed.first_seq > last, "{committed:?} after {last}");
        last = committed.last_seq;
        if id % 3 == 2 {
            // Nothing but the record is left to tell the last number.
            let frozen = buffer.freeze(alice.clone()).await.unwrap().unwrap();
            buffer.publish(&alice, frozen, b"files").unwrap();
            buffer.reclaim(&alice, frozen).unwrap();
            assert!(buffer.dirty().is_empty());
        }
        clock.fetch_sub(1_000, Ordering::Relaxed);
    }
    assert_eq!(last, 1_000_000 + 23, "the clock gives the first number, and every other is one more");
}

#[tokio::test]
async fn seq_follows_the_clock_and_updated_is_the_clock() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Arc::new(|| 77_000_000);
    let buffer = WriteBuffer::open(directory.path(), Options { clock, ..options() }).unwrap();
    let alice = instance("alice");
    assert_eq!(buffer.commit(alice.clone(), vec![message(1, "x")]).await.unwrap().first_seq, 77_000_000);
    let (_, stored) = buffer.get(&alice, NONE, &pk(1)).unwrap().unwrap();
    assert_eq!(RowView::parse(&stored).unwrap().updated(), 77_000_000);
}

#[tokio::test]
async fn counters_are_the_same_after_a_restart_and_count_a_key_once() {
    let directory = tempfile::tempdir().unwrap();
    let alice = instance("alice");
    let before: Vec<(_, Counters)> = {
        let buffer = open(directory.path());
        buffer.commit(alice.clone(), vec![message(1, "a"), message(1, "longer"), message(2, "b")]).await.unwrap();
        buffer
            .commit(alice.clone(), vec![EncodedRow { fresh: Fresh::No, ..message(2, "another text") }, message(3, "")])
            .await
            .unwrap();
        buffer.commit(instance("bob"), vec![message(1, "x")]).await.unwrap();
        buffer.freeze(instance("bob")).await.unwrap();
        buffer.commit(instance("bob"), vec![message(1, "y")]).await.unwrap();
        sorted(buffer.dirty())
    };
    assert_eq!(before[0].1.rows, 3);
    assert_eq!(before[1].1.rows, 1);
    assert!(before[1].1.has_frozen());
    let buffer = open(directory.path());
    let after = sorted(buffer.dirty());
    // An overwritten first row no longer tells when the generation began.
    let without_age = |(instance, counters): &(_, Counters)| {
        (InstanceName::clone(instance), counters.rows, counters.bytes, counters.active)
    };
    assert_eq!(before.iter().map(without_age).collect::<Vec<_>>(), after.iter().map(without_age).collect::<Vec<_>>());
}

type InstanceName = kalamdb_model::InstanceId;

fn sorted(mut dirty: Vec<(InstanceName, Counters)>) -> Vec<(InstanceName, Counters)> {
    dirty.sort_by(|a, b| a.0.cmp(&b.0));
    dirty
}

#[tokio::test]
async fn the_listener_hears_of_each_round_before_its_statements_are_answered() {
    let directory = tempfile::tempdir().unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let on_applied = {
        let heard = Arc::clone(&heard);
        Arc::new(move |applied: &[_]| heard.lock().extend_from_slice(applied))
    };
    let buffer = WriteBuffer::open(directory.path(), Options { on_applied, ..options() }).unwrap();
    buffer.commit(instance("alice"), vec![message(1, "a"), message(2, "b")]).await.unwrap();
    let applied = heard.lock().pop().expect("told before the answer");
    assert_eq!((applied.instance, applied.rows), (instance("alice"), 2));
    assert!(applied.bytes > 0 && applied.oldest_us > 0);
}

#[tokio::test]
async fn a_listener_that_panics_does_not_end_writing() {
    let directory = tempfile::tempdir().unwrap();
    let on_applied = Arc::new(|_: &[_]| panic!("a bad listener"));
    let buffer = WriteBuffer::open(directory.path(), Options { on_applied, ..options() }).unwrap();
    for id in 0..3 {
        buffer.commit(instance("alice"), vec![message(id, "a")]).await.unwrap();
    }
    assert_eq!(scan(&buffer, &instance("alice"), NONE).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_whose_caller_goes_away_is_committed_whole_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    for id in 0..200_i64 {
        let rows = vec![message(id * 2, "x"), message(id * 2 + 1, "y")];
        let committing = buffer.commit(instance("alice"), rows);
        let _cut_off = tokio::time::timeout(Duration::from_micros(u64::try_from(id).unwrap() * 5), committing).await;
    }
    // A commit that is answered is behind all that were cut off.
    buffer.commit(instance("alice"), vec![message(-1, "last")]).await.unwrap();
    let stored = scan(&buffer, &instance("alice"), NONE);
    for id in 0..200_i64 {
        assert_eq!(stored.contains_key(&(id * 2)), stored.contains_key(&(id * 2 + 1)), "statement {id}");
    }
}

#[tokio::test]
async fn closing_finishes_what_is_queued_and_refuses_the_rest() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    let mut tasks = tokio::task::JoinSet::new();
    for id in 0..100 {
        let buffer = buffer.clone();
        tasks.spawn(async move { buffer.commit(instance("alice"), vec![message(id, "x")]).await.is_ok() });
    }
    tokio::task::yield_now().await;
    buffer.clone().close().await;
    let acknowledged = tasks.join_all().await.into_iter().filter(|ok| *ok).count();
    assert_eq!(scan(&buffer, &instance("alice"), NONE).len(), acknowledged);
    assert!(matches!(buffer.commit(instance("alice"), vec![message(1, "x")]).await, Err(CommitError::Closed)));
    assert!(matches!(buffer.freeze(instance("alice")).await, Err(CommitError::Closed)));
}

#[tokio::test]
async fn the_newest_version_of_a_row_is_found_across_generations() {
    let directory = tempfile::tempdir().unwrap();
    let buffer = open(directory.path());
    let alice = instance("alice");
    buffer.commit(alice.clone(), vec![message(1, "old")]).await.unwrap();
    buffer.freeze(alice.clone()).await.unwrap();
    assert!(buffer.get(&alice, NONE, &pk(1)).unwrap().is_some());
    let mut deleted = message(1, "new");
    row::mark_deleted(&mut deleted.value);
    buffer.commit(alice.clone(), vec![deleted]).await.unwrap();
    let (generation, stored) = buffer.get(&alice, NONE, &pk(1)).unwrap().unwrap();
    assert_eq!(generation, Generation(2));
    assert!(RowView::parse(&stored).unwrap().deleted());
    let mut seen = Vec::new();
    let visit = &mut |generation, pk: &[u8], row: &[u8]| {
        seen.push((generation, pk.to_vec(), RowView::parse(row).unwrap().deleted()));
        ControlFlow::Continue(())
    };
    buffer.commit(alice.clone(), vec![message(0, "before"), message(2, "after")]).await.unwrap();
    buffer.scan(&alice, NONE, visit).unwrap();
    let expected = [(0, false), (1, true), (2, false)].map(|(id, deleted)| (Generation(2), pk(id), deleted));
    assert_eq!(seen, expected, "each row once, by key");
    assert!(buffer.get(&alice, Generation(2), &pk(1)).unwrap().is_none());
}

#[tokio::test]
async fn pod_state_survives_and_is_listed_by_prefix() {
    let directory = tempfile::tempdir().unwrap();
    {
        let buffer = open(directory.path());
        for key in ["jobs/1", "jobs/2", "format", "incarnation"] {
            buffer.state_put(key, key.as_bytes()).unwrap();
        }
        buffer.state_delete("jobs/1").unwrap();
    }
    let buffer = open(directory.path());
    assert_eq!(buffer.state_scan("jobs/").unwrap(), [("jobs/2".to_owned(), b"jobs/2".to_vec())]);
    assert_eq!(buffer.state_get("format").unwrap().as_deref(), Some(&b"format"[..]));
    assert_eq!(buffer.state_get("jobs/1").unwrap(), None);
    assert_eq!(buffer.state_scan("").unwrap().len(), 3);
}
