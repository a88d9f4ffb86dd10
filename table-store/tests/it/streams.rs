//! The commit stream on stores that work.

use kalamdb_table_store::stream::{self, Body};
use kalamdb_table_store::{StreamError, StreamWriter, fence};
use object_store::ObjectStore;
use std::sync::Arc;

use crate::backend::Store;
use crate::sample::edit;

pub async fn what_is_appended_is_replayed_in_order(store: Store) {
    let mut writer = StreamWriter::new(Arc::clone(&store), "01A", 0);
    assert_eq!(writer.append(vec![edit(1), edit(2)]).await.unwrap(), 0);
    assert_eq!(writer.append(vec![edit(3)]).await.unwrap(), 1);
    assert_eq!(writer.append(Vec::new()).await.unwrap(), 2);
    assert_eq!(writer.resolve().await.unwrap(), None);
    let read = stream::read(&*store, "01A", 1).await.unwrap().unwrap();
    assert_eq!((read.header.seq, read.body), (1, Body::Edits(vec![edit(3)])));
    assert_eq!(stream::read(&*store, "01A", 3).await.unwrap(), None);
    let replay = fence(&*store, "01A", 0, "01B").await.unwrap();
    assert_eq!(replay.edits, [(0, edit(1)), (0, edit(2)), (1, edit(3))]);
    assert_eq!((replay.fence_seq, replay.fenced_by.as_str()), (3, "01B"));
    assert_eq!(fence(&*store, "01A", 1, "01B").await.unwrap().edits, [(1, edit(3))]);
}

pub async fn a_fenced_writer_never_appends_again(store: Store) {
    let mut writer = StreamWriter::new(Arc::clone(&store), "01A", 0);
    writer.append(vec![edit(1)]).await.unwrap();
    fence(&*store, "01A", 1, "01B").await.unwrap();
    for _ in 0..2 {
        match writer.append(vec![edit(2)]).await {
            Err(StreamError::Fenced { by, .. }) => assert_eq!(by, "01B"),
            other => panic!("{other:?}"),
        }
    }
    let mut restarted = StreamWriter::new(Arc::clone(&store), "01A", 1);
    assert!(matches!(restarted.append(vec![edit(2)]).await, Err(StreamError::Fenced { .. })));
    let mut twin = StreamWriter::new(Arc::clone(&store), "01A", 0);
    assert!(matches!(twin.append(vec![edit(9)]).await, Err(StreamError::Foreign { .. })));
    assert_eq!(fence(&*store, "01A", 0, "01B").await.unwrap().edits, [(0, edit(1))]);
}

pub async fn a_fence_is_found_by_who_made_it_and_by_who_comes_later(store: Store) {
    let first = fence(&*store, "01A", 0, "01B").await.unwrap();
    assert_eq!((first.fence_seq, first.edits.len()), (0, 0));
    assert_eq!(fence(&*store, "01A", 0, "01B").await.unwrap(), first);
    assert_eq!(fence(&*store, "01A", 0, "01C").await.unwrap(), first);
}

pub async fn what_was_acknowledged_beside_a_fence_is_replayed(store: Store) {
    for round in 0..4_u64 {
        let incarnation = format!("01R{round}");
        let mut writer = StreamWriter::new(Arc::clone(&store), incarnation.clone(), 0);
        let append = tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for n in 1..=50 {
                match writer.append(vec![edit(n)]).await {
                    Ok(seq) => acknowledged.push((seq, edit(n))),
                    Err(StreamError::Fenced { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            acknowledged
        });
        tokio::time::sleep(std::time::Duration::from_millis(5 * round)).await;
        let replay = fence(&*store as &dyn ObjectStore, &incarnation, 0, "01Z").await.unwrap();
        let acknowledged = append.await.unwrap();
        assert_eq!(replay.edits, acknowledged);
    }
}
