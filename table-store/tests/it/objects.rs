//! What every store does, so that the code above needs to know of none in particular.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use kalamdb_model::catalog::Location;
use kalamdb_model::ids::{Owner, UserId};
use kalamdb_model::names::StorageName;
use kalamdb_table_store::{paths, probe};
use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, MultipartUpload, ObjectStoreExt, PutMode, PutPayload};

use crate::backend::Store;

fn path(text: &str) -> Path {
    Path::parse(text).unwrap()
}

async fn put(store: &Store, at: &str, bytes: &str) {
    store.put(&path(at), PutPayload::from(bytes.to_owned())).await.unwrap();
}

async fn get(store: &Store, at: &str) -> Bytes {
    store.get(&path(at)).await.unwrap().bytes().await.unwrap()
}

async fn list(store: &Store, prefix: Option<&str>) -> Vec<String> {
    let prefix = prefix.map(path);
    let mut found: Vec<String> =
        store.list(prefix.as_ref()).map_ok(|meta| meta.location.to_string()).try_collect().await.unwrap();
    found.sort();
    found
}

pub async fn what_is_put_is_read_whole_and_in_ranges(store: Store) {
    put(&store, "a/b", "0123456789").await;
    put(&store, "a/empty", "").await;
    assert_eq!(get(&store, "a/b").await, "0123456789");
    assert_eq!(get(&store, "a/empty").await, "");
    let at = path("a/b");
    assert_eq!(store.head(&at).await.unwrap().size, 10);
    assert_eq!(store.get_range(&at, 2..5).await.unwrap(), "234");
    assert_eq!(store.get_ranges(&at, &[0..1, 8..10, 3..4]).await.unwrap(), ["0", "89", "3"]);
    let ranged = |range: GetRange| {
        let options = GetOptions::new().with_range(Some(range));
        async { store.get_opts(&at, options).await.unwrap().bytes().await.unwrap() }
    };
    assert_eq!(ranged(GetRange::Offset(7)).await, "789");
    assert_eq!(ranged(GetRange::Suffix(3)).await, "789");
    assert_eq!(ranged(GetRange::Bounded(8..99)).await, "89");
    assert!(store.get_range(&at, 10..11).await.is_err());
    assert!(matches!(store.get(&path("a")).await, Err(Error::NotFound { .. })));
    assert!(matches!(store.head(&path("a/b/c")).await, Err(Error::NotFound { .. })));
    assert!(matches!(store.get_ranges(&path("no"), &[0..1, 2..3]).await, Err(Error::NotFound { .. })));
}

pub async fn an_overwrite_replaces_the_whole_object(store: Store) {
    put(&store, "a", "a long first version").await;
    let before = store.head(&path("a")).await.unwrap();
    put(&store, "a", "short").await;
    assert_eq!(get(&store, "a").await, "short");
    assert_ne!(store.head(&path("a")).await.unwrap().e_tag, before.e_tag);
}

pub async fn of_16_creators_one_wins_and_his_bytes_stay(store: Store) {
    for round in 0..5 {
        let at = path(&format!("race/{round}/object"));
        let create = |n: usize| {
            let (store, at) = (Store::clone(&store), at.clone());
            tokio::spawn(async move {
                let payload = PutPayload::from(format!("{n}").repeat(10_000));
                store.put_opts(&at, payload, PutMode::Create.into()).await
            })
        };
        let outcomes = futures::future::join_all((0..16).map(create)).await;
        let mut winners = Vec::new();
        for (n, outcome) in outcomes.into_iter().enumerate() {
            match outcome.unwrap() {
                Ok(_) => winners.push(n),
                Err(Error::AlreadyExists { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(winners.len(), 1, "{winners:?}");
        let found = store.get(&at).await.unwrap().bytes().await.unwrap();
        assert_eq!(found, winners[0].to_string().repeat(10_000));
    }
}

pub async fn a_list_is_complete_and_goes_by_segments(store: Store) {
    for at in ["a/1", "a/2", "a/b/3", "ab/4", "a.x/5", "c"] {
        put(&store, at, "x").await;
    }
    assert_eq!(list(&store, None).await, ["a.x/5", "a/1", "a/2", "a/b/3", "ab/4", "c"]);
    assert_eq!(list(&store, Some("a")).await, ["a/1", "a/2", "a/b/3"]);
    assert!(list(&store, Some("c")).await.is_empty());
    assert!(list(&store, Some("nothing/here")).await.is_empty());
    let after = store.list_with_offset(Some(&path("a")), &path("a/1"));
    let mut after: Vec<String> = after.map_ok(|meta| meta.location.to_string()).try_collect().await.unwrap();
    after.sort();
    assert_eq!(after, ["a/2", "a/b/3"]);
    let level = store.list_with_delimiter(Some(&path("a"))).await.unwrap();
    assert_eq!(level.common_prefixes, [path("a/b")]);
    let objects: Vec<_> = level.objects.iter().map(|meta| (meta.location.to_string(), meta.size)).collect();
    assert_eq!(objects, [("a/1".to_owned(), 1), ("a/2".to_owned(), 1)]);
    assert_eq!(store.list_with_delimiter(None).await.unwrap().common_prefixes.len(), 3);
}

pub async fn a_list_of_1100_objects_is_complete(store: Store) {
    let puts = (0..1_100).map(|n| {
        let (store, at) = (Store::clone(&store), path(&format!("many/{n:05}")));
        async move { store.put(&at, "x".into()).await }
    });
    futures::stream::iter(puts).buffer_unordered(16).try_collect::<Vec<_>>().await.unwrap();
    let listed = list(&store, Some("many")).await;
    assert_eq!(listed, (0..1_100).map(|n| format!("many/{n:05}")).collect::<Vec<_>>());
    let all = futures::stream::iter(listed.into_iter().map(|at| Ok(path(&at)))).boxed();
    assert_eq!(store.delete_stream(all).try_collect::<Vec<_>>().await.unwrap().len(), 1_100);
    assert!(list(&store, None).await.is_empty());
}

pub async fn a_deleted_object_is_gone_and_may_be_created_again(store: Store) {
    put(&store, "a/b", "one").await;
    store.delete(&path("a/b")).await.unwrap();
    assert!(matches!(store.get(&path("a/b")).await, Err(Error::NotFound { .. })));
    assert!(matches!(store.delete(&path("a/b")).await, Ok(()) | Err(Error::NotFound { .. })));
    store.put_opts(&path("a/b"), "two".into(), PutMode::Create.into()).await.unwrap();
    assert_eq!(get(&store, "a/b").await, "two");
}

pub async fn a_condition_on_the_etag_is_kept(store: Store) {
    put(&store, "a", "one").await;
    let etag = store.head(&path("a")).await.unwrap().e_tag;
    assert!(etag.is_some());
    let matching = GetOptions::new().with_if_match(etag.clone());
    assert_eq!(store.get_opts(&path("a"), matching).await.unwrap().bytes().await.unwrap(), "one");
    let other = GetOptions::new().with_if_match(Some("\"other\""));
    assert!(matches!(store.get_opts(&path("a"), other).await, Err(Error::Precondition { .. })));
    let unchanged = GetOptions::new().with_if_none_match(etag);
    assert!(matches!(store.get_opts(&path("a"), unchanged).await, Err(Error::NotModified { .. })));
}

pub async fn users_of_every_kind_have_files_of_their_own(store: Store) {
    let template = "users/{userId}/app/t".to_owned();
    let location = Location { storage: StorageName::new("s").unwrap(), root: 0, template };
    let long = ["y".repeat(256), "Y".repeat(256), "é".repeat(128), "x".repeat(199) + ".."];
    let short = ["a", "A", "a/", "a%2F", "a%2f", "é", "e\u{301}", "🦀", "a=", "...", "a b", "%", "\\", "_cluster"];
    let users: Vec<UserId> =
        short.map(str::to_owned).into_iter().chain(long).map(|id| UserId::new(id).unwrap()).collect();
    for user in &users {
        let prefix = paths::instance_prefix(&location, &Owner::User(user.clone())).unwrap();
        let file = paths::data_file(&prefix, 1, 1, "01J");
        store.put_opts(&file, PutPayload::from(user.to_string()), PutMode::Create.into()).await.unwrap();
    }
    assert_eq!(list(&store, None).await.len(), users.len());
    for user in &users {
        let prefix = paths::instance_prefix(&location, &Owner::User(user.clone())).unwrap();
        let files = list(&store, Some(prefix.as_ref())).await;
        assert_eq!(files, [paths::data_file(&prefix, 1, 1, "01J").to_string()]);
        assert_eq!(get(&store, &files[0]).await, user.as_str());
    }
}

pub async fn a_multipart_upload_appears_whole_or_not_at_all(store: Store) {
    let (part, at) = (vec![7_u8; 5 << 20], path("big/file"));
    let mut upload = store.put_multipart(&at).await.unwrap();
    upload.put_part(part.clone().into()).await.unwrap();
    assert!(matches!(store.head(&at).await, Err(Error::NotFound { .. })));
    upload.put_part("end".into()).await.unwrap();
    upload.complete().await.unwrap();
    assert_eq!(store.head(&at).await.unwrap().size, (5 << 20) + 3);
    assert_eq!(store.get_range(&at, (5 << 20) - 1..(5 << 20) + 3).await.unwrap(), b"\x07end".as_slice());
    let mut aborted = store.put_multipart(&path("big/aborted")).await.unwrap();
    aborted.put_part(part.into()).await.unwrap();
    aborted.abort().await.unwrap();
    drop(aborted);
    assert_eq!(list(&store, None).await, ["big/file"]);
}

pub async fn a_copy_is_the_same_object_under_another_name(store: Store) {
    put(&store, "a/one", "one").await;
    put(&store, "b/two", "two").await;
    store.copy(&path("a/one"), &path("c/d/three")).await.unwrap();
    assert_eq!(get(&store, "c/d/three").await, "one");
    store.copy(&path("a/one"), &path("b/two")).await.unwrap();
    store.copy(&path("a/one"), &path("b/two")).await.unwrap();
    assert_eq!(get(&store, "b/two").await, "one");
    put(&store, "a/one", "changed").await;
    assert_eq!(get(&store, "b/two").await, "one");
    assert!(store.copy(&path("no"), &path("x")).await.is_err());
    store.rename(&path("a/one"), &path("e/four")).await.unwrap();
    assert_eq!(list(&store, None).await, ["b/two", "c/d/three", "e/four"]);
}

pub async fn a_probe_leaves_nothing_behind(store: Store) {
    probe(&*store).await.unwrap();
    assert!(list(&store, None).await.is_empty());
}
