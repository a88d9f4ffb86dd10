//! What create-if-absent, the commit stream and the catalog log promise on a store that fails before and after success.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::TryStreamExt;
use futures::future::join_all;
use kalamdb_model::{StorageName, UserId};
use kalamdb_table_store::catalog_log::{Appended, LogError};
use kalamdb_table_store::checkpoint::{self, CheckpointWriter};
use kalamdb_table_store::manifest::Edit;
use kalamdb_table_store::users::{StorageMode, User, Users};
use kalamdb_table_store::{
    CatalogLog, Create, CreateError, StreamError, StreamWriter, create_exact, fence, paths, stream,
};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};

use crate::backend::{Store, memory};
use crate::fault_store::{Call, Fault, FaultStore, GARBLED, Rates};
use crate::sample::{catalog, edit};
use crate::streams::{replayed, round};

/// Every second put fails somehow, every fifth other call too: far worse than any store, so that retries run out.
fn bad() -> Rates {
    Rates {
        before: 0.2,
        after: 0.15,
        late: 0.05,
        conflict: 0.1,
        other: 0.15,
        short: 0.04,
        broken: 0.04,
        ..Rates::default()
    }
}

fn failing(seed: u64) -> (Store, FaultStore) {
    let truth = memory();
    (Arc::clone(&truth), FaultStore::seeded(truth, seed, bad()))
}

#[tokio::test]
async fn the_failing_store_fails_on_every_call_in_every_way_that_it_says() {
    let truth = memory();
    let (a, b) = (Path::from("a"), Path::from("b"));
    for path in [&a, &b] {
        truth.put(path, "0123456789".into()).await.unwrap();
    }
    let store = FaultStore::healthy(Arc::clone(&truth));
    store.set_hang(Duration::from_millis(1));
    let fails = async |rates: Rates| {
        store.set_rates(rates);
        let fresh = Path::from(format!("new {}", store.puts()));
        let body = async { store.get(&a).await?.bytes().await };
        let answers = [
            ("create", store.put_opts(&fresh, "x".into(), PutMode::Create.into()).await.is_ok()),
            ("overwrite", store.put(&b, "x".into()).await.is_ok()),
            ("upload", store.put_multipart(&b).await.is_ok()),
            ("get", body.await.is_ok_and(|bytes| bytes.len() == 10)),
            ("ranges", store.get_ranges(&a, &[1..9, 2..3]).await.is_ok_and(|found| found[0].len() == 8)),
            ("head", store.head(&a).await.is_ok()),
            ("list", store.list(None).try_collect::<Vec<_>>().await.is_ok()),
            ("level", store.list_with_delimiter(None).await.is_ok()),
            ("copy", store.copy(&a, &b).await.is_ok()),
            ("delete", store.delete(&b).await.is_ok()),
        ];
        let failed: Vec<&str> = answers.iter().filter(|(_, answered)| !answered).map(|(name, _)| *name).collect();
        failed.join(" ")
    };
    let none = Rates::default();
    assert_eq!(fails(none).await, "");
    assert_eq!(fails(Rates { before: 1.0, ..none }).await, "create overwrite");
    assert_eq!(fails(Rates { after: 1.0, ..none }).await, "create overwrite");
    assert_eq!(fails(Rates { conflict: 1.0, ..none }).await, "create");
    assert_eq!(fails(Rates { late: 1.0, ..none }).await, "create");
    assert_eq!(fails(Rates { other: 1.0, ..none }).await, "upload get ranges head list level copy delete");
    assert_eq!(fails(Rates { slow: 1.0, ..none }).await, "");
    let all = "create overwrite upload get ranges head list level copy delete";
    assert_eq!(fails(Rates { hang: 1.0, ..none }).await, all);
    assert_eq!(fails(Rates { short: 1.0, ..none }).await, "get ranges");
    assert_eq!(fails(Rates { broken: 1.0, ..none }).await, "get ranges list level");
    let calls: BTreeSet<Call> = store.tally().into_keys().map(|(call, _)| call).collect();
    assert_eq!(calls.len(), 9, "{calls:?}");
    // What was late has landed, or does so soon.
    while truth.head(&Path::from("new 8")).await.is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
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
    assert!(stream::read(&store, "01A", 0).await.is_err());
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
async fn a_conflict_is_ours_anothers_or_nobodys_as_the_object_says() {
    let store = FaultStore::healthy(memory());
    let (ours, theirs) = (Bytes::from_static(b"ours"), Bytes::from_static(b"theirs"));
    let at = |name: &str| Path::from(name);
    store.script([Some(Fault::MetItself)]);
    assert_eq!(create_exact(&store, &at("1"), ours.clone()).await.unwrap(), Create::Ours);
    store.script([Some(Fault::Conflict)]);
    assert_eq!(create_exact(&store, &at("2"), ours.clone()).await.unwrap(), Create::Ours);
    store.script([Some(Fault::Conflict); 4]);
    let CreateError::Unknown { .. } = create_exact(&store, &at("3"), ours.clone()).await.unwrap_err();
    assert_eq!(create_exact(&store, &at("3"), theirs.clone()).await.unwrap(), Create::Ours);
    store.script([Some(Fault::Conflict)]);
    assert_eq!(create_exact(&store, &at("3"), ours).await.unwrap(), Create::Lost(theirs));
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_given_up_and_what_it_did_is_found_out() {
    let store = FaultStore::healthy(memory());
    store.set_hang(Duration::from_secs(600));
    store.script([Some(Fault::Hang)]);
    let (path, started) = (Path::from("log/1"), Instant::now());
    let hanging = FaultStore::seeded(memory(), 1, Rates { hang: 1.0, ..Rates::default() });
    hanging.set_hang(Duration::from_secs(600));
    let (created, read, last, streams, users) = tokio::join!(
        create_exact(&store, &path, Bytes::from_static(b"ours")),
        stream::read(&hanging, "01A", 0),
        stream::last(&hanging, "01A"),
        stream::incarnations(&hanging),
        Users::load(&hanging),
    );
    assert_eq!(created.unwrap(), Create::Ours);
    assert!(read.is_err() && last.is_err() && streams.is_err() && users.is_err());
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
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
async fn of_checkpoints_on_a_failing_store_the_last_counts_and_has_all_its_parts() {
    let run = |seed: u64| async move {
        let (truth, store) = failing(seed);
        let mut attempt = 0;
        let made = loop {
            attempt += 1;
            let mut writer = CheckpointWriter::new(&store, "01A", 7, attempt);
            let written = async {
                for n in 1..=3 {
                    writer.part(edits_of(n)).await?;
                }
                writer.finish().await
            };
            if let Ok(made) = written.await {
                break made;
            }
        };
        // What was given up may be completed after it.
        tokio::time::sleep(Duration::from_millis(400)).await;
        let found = checkpoint::newest(&*truth, "01A").await.unwrap().unwrap();
        assert_eq!((&found, found.parts()), (&made, 3), "seed {seed}");
        for part in 0..3 {
            assert_eq!(found.part(&*truth, part).await.unwrap(), edits_of(u64::from(part) + 1), "seed {seed}");
        }
    };
    join_all((0..40).map(run)).await;
}

fn edits_of(n: u64) -> stream::Round {
    stream::Round { edits: vec![edit(n)], rows: Vec::new() }
}

#[tokio::test]
async fn users_on_a_failing_store_are_what_was_said_of_them_last() {
    let run = |seed: u64| async move {
        let (truth, store) = failing(seed);
        let mut users = Users::default();
        for n in 0..20 {
            let id = UserId::new(format!("user {}", n % 7)).unwrap();
            let storage_id = Some(StorageName::new(format!("s{n}")).unwrap());
            let user = User { id, storage_mode: StorageMode::Region, storage_id };
            while users.put(&store, user.clone()).await.is_err() {}
            assert_eq!(users.users[&user.id], user, "seed {seed}");
        }
        assert_eq!(Users::load(&*truth).await.unwrap(), users, "seed {seed}");
    };
    join_all((0..20).map(run)).await;
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
