//! `create_exact` on stores that work.

use bytes::Bytes;
use kalamdb_table_store::{Create, create_exact};
use object_store::path::Path;

use crate::backend::Store;

pub async fn the_first_creator_is_told_so_and_later_ones_get_his_bytes(store: Store) {
    let path = Path::parse("log/1").unwrap();
    let create = |bytes: &'static str| create_exact(&*store, &path, Bytes::from_static(bytes.as_bytes()));
    assert_eq!(create("first").await.unwrap(), Create::Ours);
    assert_eq!(create("second").await.unwrap(), Create::Lost(Bytes::from_static(b"first")));
    assert_eq!(create("first").await.unwrap(), Create::Ours);
}

pub async fn of_16_exact_creators_one_is_told_that_it_won(store: Store) {
    let path = Path::parse("log/2").unwrap();
    let create = |n: u32| {
        let (store, path) = (Store::clone(&store), path.clone());
        tokio::spawn(async move { create_exact(&*store, &path, Bytes::from(format!("nonce {n}"))).await.unwrap() })
    };
    let outcomes = futures::future::join_all((0..16).map(create)).await;
    let mut lost = Vec::new();
    let mut won = Vec::new();
    for (n, outcome) in outcomes.into_iter().enumerate() {
        match outcome.unwrap() {
            Create::Ours => won.push(format!("nonce {n}")),
            Create::Lost(found) => lost.push(found),
        }
    }
    assert_eq!((won.len(), lost.len()), (1, 15));
    assert!(lost.iter().all(|found| found == won[0].as_bytes()));
}
