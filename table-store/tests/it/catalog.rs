//! The catalog log on stores that work, raced and trimmed.

use kalamdb_table_store::catalog_log::{Appended, LogError, SNAPSHOT_EVERY};
use kalamdb_table_store::{CatalogLog, paths};
use object_store::{Error, ObjectStoreExt};

use crate::backend::Store;
use crate::sample::catalog;

async fn append(store: &Store, version: u64, writer: &str) -> Appended {
    CatalogLog::append(&**store, &catalog(version - 1), &catalog(version), writer).await.unwrap()
}

async fn fill(store: &Store, versions: std::ops::RangeInclusive<u64>) {
    for version in versions {
        assert_eq!(append(store, version, "w1").await, Appended::Ours);
    }
}

pub async fn a_log_is_loaded_and_tailed_to_the_same_catalog(store: Store) {
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), catalog(0));
    fill(&store, 1..=SNAPSHOT_EVERY + 3).await;
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), catalog(SNAPSHOT_EVERY + 3));
    assert!(store.head(&paths::catalog_snapshot(SNAPSHOT_EVERY)).await.is_ok());
    let mut tail = catalog(60);
    for version in 61..=SNAPSHOT_EVERY + 3 {
        tail = CatalogLog::next(&*store, &tail).await.unwrap().unwrap();
        assert_eq!(tail, catalog(version));
    }
    assert_eq!(CatalogLog::next(&*store, &tail).await.unwrap(), None);
    // A crash between entry and snapshot: the log is the same without it.
    store.delete(&paths::catalog_snapshot(SNAPSHOT_EVERY)).await.unwrap();
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), tail);
}

pub async fn of_16_writers_one_wins_each_number(store: Store) {
    for version in 1..=5 {
        let race = |n: u32| {
            let store = Store::clone(&store);
            tokio::spawn(async move {
                let mut next = catalog(version);
                next.next_table += n;
                CatalogLog::append(&*store, &catalog(version - 1), &next, &format!("w{n}")).await.unwrap()
            })
        };
        let outcomes: Vec<_> = futures::future::join_all((0..16).map(race)).await;
        let outcomes: Vec<Appended> = outcomes.into_iter().map(Result::unwrap).collect();
        let winners: Vec<usize> = (0..16).filter(|n| outcomes[*n] == Appended::Ours).collect();
        assert_eq!(winners.len(), 1, "{outcomes:?}");
        let writer = format!("w{}", winners[0]);
        let foreign = Appended::Foreign { version, writer };
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == foreign).count(), 15);
    }
    assert_eq!(CatalogLog::load(&*store).await.unwrap().version, 5);
}

pub async fn a_slow_reader_gets_past_trimmed_entries(store: Store) {
    fill(&store, 1..=2 * SNAPSHOT_EVERY + 2).await;
    let newest = 2 * SNAPSHOT_EVERY;
    assert_eq!(CatalogLog::trim(&*store, 10).await.unwrap(), 9);
    assert_eq!(CatalogLog::trim(&*store, 10).await.unwrap(), 0);
    // The entries up to the newest snapshot and the snapshot before it.
    assert_eq!(CatalogLog::trim(&*store, u64::MAX).await.unwrap() as u64, newest - 9 + 1);
    assert!(store.head(&paths::catalog_snapshot(newest)).await.is_ok());
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), catalog(newest + 2));
    let mut polls = 0;
    let jumped = loop {
        if let Some(found) = CatalogLog::next(&*store, &catalog(5)).await.unwrap() {
            break found;
        }
        polls += 1;
        assert!(polls < 200, "the reader hangs");
    };
    assert_eq!(jumped, catalog(newest));
    assert_eq!(CatalogLog::next(&*store, &jumped).await.unwrap(), Some(catalog(newest + 1)));
}

pub async fn a_writer_that_wins_a_freed_number_steps_down(store: Store) {
    fill(&store, 1..=SNAPSHOT_EVERY + 1).await;
    CatalogLog::trim(&*store, u64::MAX).await.unwrap();
    let outcome = append(&store, 7, "sleeper").await;
    assert_eq!(outcome, Appended::Foreign { version: SNAPSHOT_EVERY, writer: "w1".to_owned() });
    assert!(matches!(store.head(&paths::catalog_entry(7)).await, Err(Error::NotFound { .. })));
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), catalog(SNAPSHOT_EVERY + 1));
}

pub async fn an_append_that_is_repeated_counts_once(store: Store) {
    fill(&store, 1..=SNAPSHOT_EVERY).await;
    fill(&store, SNAPSHOT_EVERY..=SNAPSHOT_EVERY).await;
    assert_eq!(
        append(&store, SNAPSHOT_EVERY, "w2").await,
        Appended::Foreign { version: SNAPSHOT_EVERY, writer: "w1".to_owned() }
    );
    let skipped = CatalogLog::append(&*store, &catalog(70), &catalog(72), "w1").await;
    assert!(matches!(skipped, Err(LogError::Order { previous: 70, next: 72 })));
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), catalog(SNAPSHOT_EVERY));
}

pub async fn a_damaged_object_is_an_error(store: Store) {
    fill(&store, 1..=2).await;
    let entry = store.get(&paths::catalog_entry(2)).await.unwrap().bytes().await.unwrap();
    let third = paths::catalog_entry(3);
    for (bad, expected) in [
        (entry.clone(), "says that it is version 2"),
        (entry.slice(..entry.len() - 1), "is damaged"),
        (bytes::Bytes::new(), "is damaged"),
        (bytes::Bytes::from_static(b"{\"format\":2,\"version\":3}"), "format 2"),
        (bytes::Bytes::from_static(b"{\"format\":1,\"version\":3}"), "is damaged"),
    ] {
        store.put(&third, bad.into()).await.unwrap();
        for error in [
            CatalogLog::load(&*store).await.map(drop).unwrap_err(),
            CatalogLog::next(&*store, &catalog(2)).await.map(drop).unwrap_err(),
            CatalogLog::append(&*store, &catalog(2), &catalog(3), "w1").await.map(drop).unwrap_err(),
        ] {
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
    store.delete(&third).await.unwrap();
    store.put(&paths::catalog_snapshot(2), "{}".into()).await.unwrap();
    assert!(matches!(CatalogLog::load(&*store).await, Err(LogError::Corrupt { .. })));
}
