//! The log of users.

use std::collections::BTreeSet;
use std::sync::Arc;

use kalamdb_model::{StorageName, UserId};
use kalamdb_table_store::paths;
use kalamdb_table_store::users::{StorageMode, User, Users, UsersError};
use object_store::{ObjectStoreExt as _, PutPayload};

use crate::backend::Store;

fn user(name: &str, storage: &str) -> User {
    let storage_id = Some(StorageName::new(storage).unwrap());
    User { id: UserId::new(name).unwrap(), storage_mode: StorageMode::Region, storage_id }
}

pub async fn what_is_put_is_loaded_and_followed(store: Store) {
    let mut here = Users::load(store.as_ref()).await.unwrap();
    assert_eq!(here, Users::default());
    let mut there = here.clone();
    for n in 0..150 {
        here.put(store.as_ref(), user(&format!("user {}", n % 70), &format!("s{n}"))).await.unwrap();
    }
    assert_eq!((here.version, here.users.len()), (150, 70));
    here.put(store.as_ref(), user("user 1", "s141")).await.unwrap();
    assert_eq!(here.version, 150, "what is known already is not written again");
    there.follow(store.as_ref()).await.unwrap();
    assert_eq!((&there, &Users::load(store.as_ref()).await.unwrap()), (&here, &here));
    assert_eq!(here.users[&UserId::new("user 9").unwrap()].region().unwrap().as_str(), "s149");
    // The last whole entry but one, and what came after it.
    assert!(store.head(&paths::users_entry(64)).await.is_ok());
    assert!(store.head(&paths::users_entry(63)).await.is_err());
}

pub async fn writers_at_once_lose_nothing(store: Store) {
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4 {
        let store = Arc::clone(&store);
        writers.spawn(async move {
            let mut users = Users::default();
            for n in 0..10 {
                // Who loses too often in a row is told to try again.
                while let Err(error) = users.put(store.as_ref(), user(&format!("{writer} {n}"), "s")).await {
                    assert!(matches!(error, UsersError::Busy), "{error}");
                }
            }
        });
    }
    while let Some(ended) = writers.join_next().await {
        ended.unwrap();
    }
    let users = Users::load(store.as_ref()).await.unwrap();
    let expected: BTreeSet<String> = (0..40).map(|n| format!("{} {}", n / 10, n % 10)).collect();
    assert_eq!(users.users.keys().map(ToString::to_string).collect::<BTreeSet<_>>(), expected);
}

pub async fn an_entry_that_cannot_be_read_is_never_no_users(store: Store) {
    let mut users = Users::default();
    users.put(store.as_ref(), user("a", "s")).await.unwrap();
    for damaged in ["", "{}", "<html>", r#"{"format":2,"version":2,"nonce":"","atUs":0,"whole":false,"users":[]}"#] {
        store.put(&paths::users_entry(2), PutPayload::from(damaged.to_owned())).await.unwrap();
        assert!(matches!(Users::load(store.as_ref()).await, Err(UsersError::Corrupt { .. })), "{damaged}");
        assert!(users.put(store.as_ref(), user("b", "s")).await.is_err());
    }
}
