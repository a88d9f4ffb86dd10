//! The catalog log on stores that work, raced and trimmed.

use kalamdb_model::catalog::StorageEntry;
use kalamdb_model::declared::{Kind, StorageRoot};
use kalamdb_model::{Catalog, SqlName, StorageName, TableEntry, TableKind, TableName};
use kalamdb_table_store::catalog_log::{Appended, Entry, FORMAT, LogError, SNAPSHOT_EVERY, Tail, contradiction, diff};
use kalamdb_table_store::{CatalogLog, paths};
use object_store::{Error, ObjectStoreExt};

use crate::backend::Store;
use crate::sample::{catalog, object};

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
    let mut tail = catalog(SNAPSHOT_EVERY - 1);
    for version in SNAPSHOT_EVERY..=SNAPSHOT_EVERY + 3 {
        tail = CatalogLog::next(&*store, &tail).await.unwrap().unwrap();
        assert_eq!(tail, catalog(version));
    }
    assert_eq!(CatalogLog::next(&*store, &tail).await.unwrap(), None);
    // A reader that is behind a snapshot takes it.
    let behind = CatalogLog::next(&*store, &catalog(7)).await.unwrap();
    assert_eq!(behind, Some(catalog(SNAPSHOT_EVERY)));
    // A crash between entry and snapshot: the log is the same without it.
    store.delete(&paths::catalog_snapshot(SNAPSHOT_EVERY)).await.unwrap();
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), tail);
}

pub async fn of_16_writers_one_wins_each_number(store: Store) {
    let mut previous = catalog(0);
    for version in 1..=5 {
        let by = |n: usize| Catalog { nonce: format!("w{n} {version}"), ..catalog(version) };
        let race = |n: usize| {
            let (store, previous, next) = (Store::clone(&store), previous.clone(), by(n));
            tokio::spawn(async move { CatalogLog::append(&*store, &previous, &next, &format!("w{n}")).await.unwrap() })
        };
        let outcomes: Vec<_> = futures::future::join_all((0..16).map(race)).await;
        let outcomes: Vec<Appended> = outcomes.into_iter().map(Result::unwrap).collect();
        let winners: Vec<usize> = (0..16).filter(|n| outcomes[*n] == Appended::Ours).collect();
        assert_eq!(winners.len(), 1, "{outcomes:?}");
        previous = by(winners[0]);
        let writer = format!("w{}", winners[0]);
        let foreign = Appended::Foreign { version, writer };
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == foreign).count(), 15);
    }
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), previous);
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
    let jumped = Tail::default().next(&*store, &catalog(5)).await.unwrap().unwrap();
    assert_eq!(jumped, catalog(newest));
    assert_eq!(CatalogLog::next(&*store, &jumped).await.unwrap(), Some(catalog(newest + 1)));
    // A reader that was at the end of the log finds out, too, though not at once.
    let (last, mut tail) = (catalog(newest + 2), Tail::default());
    assert_eq!(tail.next(&*store, &last).await.unwrap(), None);
    fill(&store, newest + 3..=newest + SNAPSHOT_EVERY).await;
    CatalogLog::trim(&*store, u64::MAX).await.unwrap();
    for _ in 1..32 {
        assert_eq!(tail.next(&*store, &last).await.unwrap(), None);
    }
    assert_eq!(tail.next(&*store, &last).await.unwrap(), Some(catalog(newest + SNAPSHOT_EVERY)));
}

pub async fn a_writer_that_wins_a_freed_number_steps_down(store: Store) {
    fill(&store, 1..=SNAPSHOT_EVERY + 1).await;
    CatalogLog::trim(&*store, u64::MAX).await.unwrap();
    let late = Catalog { nonce: "late".to_owned(), ..catalog(7) };
    let outcome = CatalogLog::append(&*store, &catalog(6), &late, "sleeper").await.unwrap();
    assert_eq!(outcome, Appended::Foreign { version: SNAPSHOT_EVERY, writer: "w1".to_owned() });
    assert!(matches!(store.head(&paths::catalog_entry(7)).await, Err(Error::NotFound { .. })));
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), catalog(SNAPSHOT_EVERY + 1));
}

/// `next` as the entry of its number, as a writer leaves it that dies right after its put.
async fn put_entry(store: &Store, previous: &Catalog, next: &Catalog) {
    let entry = Entry {
        format: FORMAT,
        version: next.version,
        nonce: next.nonce.clone(),
        previous: previous.nonce.clone(),
        writer: "dead".to_owned(),
        at_us: 0,
        delta: diff(previous, next),
    };
    let bytes = serde_json::to_vec(&entry).unwrap();
    store.put(&paths::catalog_entry(next.version), bytes.into()).await.unwrap();
}

pub async fn an_entry_under_a_freed_number_is_applied_by_nobody(store: Store) {
    let newest = SNAPSHOT_EVERY;
    fill(&store, 1..=newest).await;
    CatalogLog::trim(&*store, u64::MAX).await.unwrap();
    for version in [7, newest] {
        let (before, own) = (catalog(version - 1), catalog(version));
        put_entry(&store, &before, &Catalog { nonce: "phantom".to_owned(), next_table: 99, ..own }).await;
        assert_eq!(CatalogLog::next(&*store, &before).await.unwrap(), Some(catalog(newest)));
        assert_eq!(CatalogLog::load(&*store).await.unwrap(), catalog(newest));
    }
    // A reader and a writer at the number itself know by the snapshot that the entry is none.
    assert_eq!(CatalogLog::next(&*store, &catalog(newest)).await.unwrap(), None);
    assert_eq!(append(&store, newest + 1, "w1").await, Appended::Ours);
}

/// What another operator would have made of `version` after the home store was brought back to version 2.
fn other(version: u64) -> Catalog {
    if version <= 2 { catalog(version) } else { Catalog { nonce: format!("other {version}"), ..catalog(version) } }
}

pub async fn a_log_of_another_history_is_neither_followed_nor_continued(store: Store) {
    let refused = |error: LogError, part: &str| {
        let text = error.to_string();
        assert!(matches!(error, LogError::OtherHistory { version: 3, .. }) && text.contains(part), "{text}");
    };
    let append_4 = async || CatalogLog::append(&*store, &catalog(3), &catalog(4), "w1").await.map(drop);
    let (third, fourth) = (paths::catalog_entry(3), paths::catalog_entry(4));
    fill(&store, 1..=3).await;
    store.delete(&third).await.unwrap();
    let next = async || CatalogLog::next(&*store, &catalog(3)).await.map(drop);
    refused(next().await.unwrap_err(), "3.json` is missing or another one");
    let mut tail = Tail::default();
    for _ in 0..2 {
        let polled = tail.next(&*store, &catalog(3)).await.map(drop);
        refused(polled.unwrap_err(), "is missing or another one");
    }
    refused(append_4().await.unwrap_err(), "is missing or another one");
    CatalogLog::append(&*store, &other(2), &other(3), "w2").await.unwrap();
    refused(next().await.unwrap_err(), "3.json` is missing or another one");
    refused(append_4().await.unwrap_err(), "is missing or another one");
    assert!(matches!(store.head(&fourth).await, Err(Error::NotFound { .. })));
    CatalogLog::append(&*store, &other(3), &other(4), "w2").await.unwrap();
    refused(next().await.unwrap_err(), "4.json` follows another version 3");
    refused(append_4().await.unwrap_err(), "is missing or another one");
    assert_eq!(CatalogLog::load(&*store).await.unwrap(), other(4));
    // Brought back to its newest state, the log is followed again.
    put_entry(&store, &catalog(2), &catalog(3)).await;
    put_entry(&store, &catalog(3), &catalog(4)).await;
    assert_eq!(CatalogLog::next(&*store, &catalog(3)).await.unwrap(), Some(catalog(4)));
    // A log whose entries do not belong together is read by nobody.
    put_entry(&store, &other(3), &other(4)).await;
    refused(CatalogLog::load(&*store).await.map(drop).unwrap_err(), "4.json` follows another version 3");
}

pub async fn a_snapshot_that_gives_an_id_another_meaning_is_refused(store: Store) {
    let with_table = |version| {
        let mut catalog = Catalog { nonce: format!("other {version}"), ..catalog(version) };
        let mut table = catalog.tables.values().next().unwrap().clone();
        table.name = TableName::parse("app.notes").unwrap();
        catalog.tables = [(table.name.clone(), table)].into();
        catalog
    };
    let mut previous = catalog(0);
    for version in 1..=SNAPSHOT_EVERY {
        let next = with_table(version);
        assert_eq!(CatalogLog::append(&*store, &previous, &next, "w1").await.unwrap(), Appended::Ours);
        previous = next;
    }
    CatalogLog::trim(&*store, u64::MAX).await.unwrap();
    let error = CatalogLog::next(&*store, &catalog(5)).await.unwrap_err();
    assert!(error.to_string().contains("`app.notes` has id 1, which is that of `app.messages`"), "{error}");
    assert_eq!(CatalogLog::next(&*store, &with_table(5)).await.unwrap(), Some(with_table(SNAPSHOT_EVERY)));
}

#[test]
fn ids_columns_and_places_that_mean_something_else_are_found() {
    let old = catalog(3);
    let after = |change: &dyn Fn(&mut Catalog)| {
        let mut next = catalog(9);
        change(&mut next);
        contradiction(&old, &next)
    };
    let table = |change: fn(&mut TableEntry)| after(&|next| next.tables.values_mut().for_each(change));
    assert_eq!(after(&|_| {}), None);
    // Gone, retained, grown, and a new table under the name: all of it happens.
    assert_eq!(after(&|next| next.tables.clear()), None);
    assert_eq!(after(&|next| next.retained = std::mem::take(&mut next.tables)), None);
    let grow = |table: &mut TableEntry| {
        let mut column = table.columns[1].clone();
        (column.id.0, column.name) = (4, SqlName::new("more").unwrap());
        table.columns.insert(0, column);
    };
    assert_eq!(table(grow), None);
    let renumber = |next: &mut Catalog| {
        next.next_table = 3;
        next.tables.values_mut().for_each(|table| table.id.0 = 2);
    };
    assert_eq!(after(&renumber), None);

    let finds =
        |found: Option<String>, part: &str| assert!(found.clone().unwrap_or_default().contains(part), "{found:?}");
    finds(after(&|next| next.next_table = 1), "the next table gets id 1");
    finds(contradiction(&Catalog { tables: [].into(), ..old.clone() }, &catalog(9)), "which was another table's");
    let changes: [fn(&mut TableEntry); 7] = [
        |table| table.columns[1].ty = "BYTES".parse().unwrap(),
        |table| table.columns[1].name = SqlName::new("text").unwrap(),
        |table| table.columns[1].id.0 = 4,
        |table| drop(table.columns.remove(1)),
        |table| table.kind = TableKind::Shared,
        |table| table.key[0].0 = 2,
        |table| table.location.root = 1,
    ];
    for change in changes {
        finds(table(change), "has other columns or lies elsewhere");
    }
    // A column that the old one does not have, under an id that it has given.
    let mut fewer = old.clone();
    fewer.tables.values_mut().for_each(|table| drop(table.columns.remove(1)));
    finds(contradiction(&fewer, &catalog(9)), "has other columns or lies elsewhere");
    let moved = contradiction(&placed(old.clone(), "a"), &placed(catalog(9), "b"));
    finds(moved, "has other columns or lies elsewhere");
    assert_eq!(contradiction(&placed(old.clone(), "a"), &placed(catalog(9), "a")), None);
}

/// With a storage for the table, in the folder `path`.
fn placed(mut catalog: Catalog, path: &str) -> Catalog {
    let entry = StorageEntry {
        object: object(Kind::Storage, "local"),
        display_name: None,
        roots: [(0, StorageRoot::Filesystem { path: path.to_owned() })].into(),
        current_root: 0,
        credentials_secret: None,
        shared_tables_template: "shared".to_owned(),
        user_tables_template: "users/{userId}".to_owned(),
    };
    catalog.storages.insert(StorageName::new("local").unwrap(), entry);
    catalog
}

pub async fn an_append_that_is_repeated_counts_once(store: Store) {
    fill(&store, 1..=SNAPSHOT_EVERY).await;
    fill(&store, SNAPSHOT_EVERY..=SNAPSHOT_EVERY).await;
    let other = Catalog { nonce: "w2".to_owned(), ..catalog(SNAPSHOT_EVERY) };
    assert_eq!(
        CatalogLog::append(&*store, &catalog(SNAPSHOT_EVERY - 1), &other, "w2").await.unwrap(),
        Appended::Foreign { version: SNAPSHOT_EVERY, writer: "w1".to_owned() }
    );
    for nonce in ["", &catalog(SNAPSHOT_EVERY).nonce] {
        let unnamed = Catalog { nonce: nonce.to_owned(), ..catalog(SNAPSHOT_EVERY + 1) };
        let refused = CatalogLog::append(&*store, &catalog(SNAPSHOT_EVERY), &unnamed, "w1").await;
        assert!(matches!(refused, Err(LogError::Order { .. })), "{nonce}");
    }
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
