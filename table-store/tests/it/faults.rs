//! What create-if-absent, the commit stream and the catalog log promise on a store that fails before and after success.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::join_all;
use kalamdb_table_store::catalog_log::{Appended, LogError};
use kalamdb_table_store::manifest::Edit;
use kalamdb_table_store::{CatalogLog, Create, CreateError, StreamError, StreamWriter, create_exact, fence, paths};
use object_store::ObjectStoreExt;
use object_store::path::Path;

use crate::backend::{Store, memory};
use crate::fault_store::{Fault, FaultStore, GARBLED, Rates};
use crate::sample::{catalog, edit};
use crate::streams::{replayed, round};

/// Every second put fails somehow, every fifth other call too: far worse than any store, so that retries run out.
const BAD: Rates = Rates { before: 0.25, after: 0.25, other: 0.2 };

fn failing(seed: u64) -> (Store, FaultStore) {
    let truth = memory();
    (Arc::clone(&truth), FaultStore::seeded(truth, seed, BAD))
}

async fn until_known(store: &FaultStore, path: &Path, bytes: Bytes) -> Create {
    loop {
        if let Ok(outcome) = create_exact(store, path, bytes.clone()).await {
            return outcome;
        }
    }
}

#[tokio::test]
async fn two_creators_on_a_failing_store_never_both_win() {
    let race = |seed: u64| async move {
        let (truth, store) = failing(seed);
        let path = Path::parse("log/1").unwrap();
        let (a, b) = (Bytes::from_static(b"a"), Bytes::from_static(b"b"));
        let outcomes = tokio::join!(until_known(&store, &path, a.clone()), until_known(&store, &path, b.clone()));
        let found = truth.get(&path).await.unwrap().bytes().await.unwrap();
        let lost = |bytes: &Bytes| Create::Lost(bytes.clone());
        match outcomes {
            (Create::Ours, other) => assert_eq!((found, other), (a.clone(), lost(&a)), "seed {seed}"),
            (other, Create::Ours) => assert_eq!((found, other), (b.clone(), lost(&b)), "seed {seed}"),
            both => panic!("seed {seed}: nobody won: {both:?}"),
        }
        store.faults()
    };
    let faults: u64 = join_all((0..200).map(race)).await.into_iter().sum();
    assert!(faults > 100, "only {faults} faults");
}

#[tokio::test]
async fn a_store_that_is_down_is_neither_empty_nor_ours() {
    let store = FaultStore::healthy(memory());
    store.set_down(true);
    let path = Path::parse("log/1").unwrap();
    let CreateError::Unknown { attempts, .. } = create_exact(&store, &path, Bytes::new()).await.unwrap_err();
    assert_eq!((attempts, store.puts()), (4, 4));
    assert!(CatalogLog::load(&store).await.is_err());
    assert!(CatalogLog::next(&store, &catalog(0)).await.is_err());
    assert!(CatalogLog::trim(&store, 9).await.is_err());
    assert!(kalamdb_table_store::stream::read(&store, "01A", 0).await.is_err());
    assert!(kalamdb_table_store::probe(&store).await.is_err());
}

/// Appends 30 edits one by one; on an unknown answer, sends the same again or goes on with the next.
async fn append_30(store: FaultStore, resend: bool) -> Vec<Edit> {
    let mut writer = StreamWriter::new(Arc::new(store.clone()), "01A", 0);
    let mut wanted = Vec::new();
    for n in 1..=30 {
        wanted.push(edit(n));
        while let Err(error) = writer.append(&round([edit(n)])).await {
            assert!(matches!(error, StreamError::Unknown(_)), "{error}");
            assert!(writer.is_stalled());
            if !resend && writer.next_seq() == n - 1 {
                break;
            }
        }
    }
    store.heal();
    if writer.is_stalled() {
        writer.append(&round([edit(30)])).await.unwrap();
    }
    assert_eq!(writer.next_seq(), 30);
    wanted
}

#[tokio::test]
async fn a_failing_store_loses_no_commit_and_doubles_none() {
    let run = |seed: u64| async move {
        let (truth, store) = failing(seed);
        let wanted = append_30(store.clone(), seed.is_multiple_of(2)).await;
        let end = fence(&*truth, "01A", 0, "01B").await.unwrap();
        let found: Vec<Edit> = replayed(&*truth, "01A", 0, end.seq).await.into_iter().map(|(_, edit)| edit).collect();
        assert_eq!(found, wanted, "seed {seed}");
    };
    join_all((0..40).map(run)).await;
}

#[tokio::test]
async fn an_unknown_commit_stalls_on_its_number_and_bytes_until_it_is_resolved() {
    let truth = memory();
    let store = FaultStore::healthy(Arc::clone(&truth));
    let mut writer = StreamWriter::new(Arc::new(store.clone()), "01A", 0);
    store.script([Some(Fault::Late); 4]);
    assert!(matches!(writer.append(&round([edit(1)])).await, Err(StreamError::Unknown(_))));
    assert_eq!((writer.is_stalled(), writer.next_seq()), (true, 0));
    store.set_down(true);
    assert!(matches!(writer.append(&round([edit(2)])).await, Err(StreamError::Unknown(_))));
    assert_eq!((writer.is_stalled(), writer.next_seq()), (true, 0));
    store.set_down(false);
    // The puts that were given up land after all: the same bytes, so they are ours.
    assert_eq!(store.land_late_puts().await.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert_eq!(writer.append(&round([edit(2)])).await.unwrap(), 1);
    let fence = fence(&*truth, "01A", 0, "01B").await.unwrap();
    assert_eq!(replayed(&*truth, "01A", 0, fence.seq).await, [(0, edit(1)), (1, edit(2))]);
}

#[tokio::test]
async fn a_put_that_lands_after_the_fence_changes_nothing() {
    let truth = memory();
    let store = FaultStore::healthy(Arc::clone(&truth));
    let mut writer = StreamWriter::new(Arc::new(store.clone()), "01A", 0);
    writer.append(&round([edit(1)])).await.unwrap();
    store.script([Some(Fault::Late); 4]);
    assert!(matches!(writer.append(&round([edit(2)])).await, Err(StreamError::Unknown(_))));
    let end = fence(&*truth, "01A", 0, "01B").await.unwrap();
    assert_eq!(replayed(&*truth, "01A", 0, end.seq).await, [(0, edit(1))]);
    assert!(store.land_late_puts().await.iter().all(Result::is_err));
    assert!(matches!(writer.append(&round([edit(2)])).await, Err(StreamError::Fenced { .. })));
    assert_eq!(fence(&*truth, "01A", 0, "01B").await.unwrap(), end);
}

#[tokio::test]
async fn what_the_store_garbled_is_never_taken_for_ours() {
    let truth = memory();
    let store = FaultStore::healthy(Arc::clone(&truth));
    store.script([Some(Fault::Garbled)]);
    let path = Path::parse("users/a/file").unwrap();
    let created = create_exact(&store, &path, Bytes::from_static(b"rows")).await.unwrap();
    assert_eq!(created, Create::Lost(Bytes::from_static(GARBLED.as_bytes())));
}

#[tokio::test]
async fn a_commit_whose_future_was_dropped_is_resolved_by_the_next() {
    let truth = memory();
    let store = FaultStore::healthy(Arc::clone(&truth));
    let mut writer = StreamWriter::new(Arc::new(store.clone()), "01A", 0);
    store.script([Some(Fault::After)]);
    store.set_down(true);
    let short = std::time::Duration::from_millis(20);
    assert!(tokio::time::timeout(short, writer.append(&round([edit(1)]))).await.is_err());
    store.set_down(false);
    assert_eq!(writer.append(&round([edit(2)])).await.unwrap(), 1);
    let fence = fence(&*truth, "01A", 0, "01B").await.unwrap();
    assert_eq!(replayed(&*truth, "01A", 0, fence.seq).await, [(0, edit(1)), (1, edit(2))]);
}

#[tokio::test]
async fn a_fence_on_a_failing_store_ends_the_stream_once() {
    let run = |seed: u64| async move {
        let (truth, store) = failing(seed);
        let mut writer = StreamWriter::new(Arc::clone(&truth), "01A", 0);
        for n in 1..=5 {
            writer.append(&round([edit(n)])).await.unwrap();
        }
        let fence = loop {
            match fence(&store, "01A", 0, "01B").await {
                Ok(fence) => break fence,
                Err(error) => assert!(matches!(error, StreamError::Unknown(_)), "{error}"),
            }
        };
        assert_eq!((replayed(&*truth, "01A", 0, 5).await.len(), fence.seq), (5, 5), "seed {seed}");
        assert!(matches!(writer.append(&round([edit(6)])).await, Err(StreamError::Fenced { .. })));
        assert!(truth.head(&paths::stream_object("01A", 6)).await.is_err());
    };
    join_all((0..40).map(run)).await;
}

#[tokio::test]
async fn a_catalog_on_a_failing_store_is_written_once_per_version() {
    let run = |seed: u64| async move {
        let (truth, store) = failing(seed);
        for version in 1..=20 {
            loop {
                match CatalogLog::append(&store, &catalog(version - 1), &catalog(version), "w1").await {
                    Ok(outcome) => break assert_eq!(outcome, Appended::Ours, "seed {seed}"),
                    Err(LogError::Unknown(_) | LogError::Store { .. }) => {}
                    Err(error) => panic!("seed {seed}: {error}"),
                }
            }
        }
        assert_eq!(CatalogLog::load(&*truth).await.unwrap(), catalog(20), "seed {seed}");
    };
    join_all((0..20).map(run)).await;
}

#[tokio::test]
async fn of_two_writers_on_a_failing_store_one_leads_and_the_other_steps_down() {
    let run = |seed: u64| async move {
        let (truth, store) = failing(seed);
        let lead = |writer: &'static str, extra: u32| {
            let store = store.clone();
            async move {
                let (mut written, mut version) = (0, 1);
                while version <= 10 {
                    let nonce = |version| format!("{writer} {version}");
                    let with = |version| kalamdb_model::Catalog {
                        nonce: nonce(version),
                        next_table: 2 + extra,
                        ..catalog(version)
                    };
                    let previous = if version == 1 { catalog(0) } else { with(version - 1) };
                    match CatalogLog::append(&store, &previous, &with(version), writer).await {
                        Ok(Appended::Ours) => (written, version) = (version, version + 1),
                        Ok(Appended::Foreign { .. }) => break,
                        Err(LogError::Unknown(_) | LogError::Store { .. }) => {}
                        Err(error) => panic!("seed {seed}: {error}"),
                    }
                }
                (written, extra)
            }
        };
        let (a, b) = tokio::join!(lead("a", 0), lead("b", 100));
        let loaded = CatalogLog::load(&*truth).await.unwrap();
        let (leader, other) = if a.0 > b.0 { (a, b) } else { (b, a) };
        assert_eq!((leader.0, other.0), (10, 0), "seed {seed}");
        assert_eq!((loaded.version, loaded.next_table), (10, 2 + leader.1), "seed {seed}");
    };
    join_all((0..20).map(run)).await;
}
