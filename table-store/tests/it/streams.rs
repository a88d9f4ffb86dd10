//! The commit stream on stores that work.

use kalamdb_table_store::stream::{self, Body, Fence, Round};
use kalamdb_table_store::{Edit, StreamError, StreamWriter, fence};
use object_store::ObjectStore;
use std::sync::Arc;

use crate::backend::Store;
use crate::sample::edit;

pub fn round(edits: impl IntoIterator<Item = Edit>) -> Arc<Round> {
    Arc::new(Round { edits: edits.into_iter().collect(), rows: Vec::new() })
}

/// The edits of objects `from..to`, each with the number of its object.
pub async fn replayed(store: &dyn ObjectStore, incarnation: &str, from: u64, to: u64) -> Vec<(u64, Edit)> {
    let mut edits = Vec::new();
    for seq in from..to {
        let (_, round) = stream::round(store, incarnation, seq).await.unwrap();
        edits.extend(round.edits.into_iter().map(|edit| (seq, edit)));
    }
    edits
}

pub async fn what_is_appended_is_replayed_in_order(store: Store) {
    let mut writer = StreamWriter::new(Arc::clone(&store), "01A", 0);
    assert_eq!(writer.append(&round([edit(1), edit(2)])).await.unwrap(), 0);
    assert_eq!(writer.append(&round([edit(3)])).await.unwrap(), 1);
    assert_eq!(writer.append(&Arc::default()).await.unwrap(), 2);
    let read = stream::read(&*store, "01A", 1).await.unwrap().unwrap();
    assert_eq!((read.header.seq, read.body), (1, Body::Round(Round::clone(&round([edit(3)])))));
    assert_eq!(stream::read(&*store, "01A", 3).await.unwrap(), None);
    assert_eq!(stream::last(&*store, "01A").await.unwrap(), Some(2));
    let fence = fence(&*store, "01A", 0, "01B").await.unwrap();
    assert_eq!(fence, Fence { seq: 3, by: "01B".to_owned() });
    assert_eq!(replayed(&*store, "01A", 0, 3).await, [(0, edit(1)), (0, edit(2)), (1, edit(3))]);
    assert!(matches!(stream::round(&*store, "01A", 3).await, Err(StreamError::Missing { .. })));
    assert_eq!(
        (stream::is_fence(&*store, "01A", 3).await.unwrap(), stream::is_fence(&*store, "01A", 2).await.unwrap()),
        (true, false)
    );
    assert_eq!(stream::incarnations(&*store).await.unwrap(), ["01A"]);
    stream::trim(&*store, "01A", 0, 2).await.unwrap();
    stream::trim(&*store, "01A", 0, 2).await.unwrap();
    assert!(matches!(stream::round(&*store, "01A", 1).await, Err(StreamError::Missing { .. })));
    stream::trim_before(&*store, "01A", 3).await.unwrap();
    assert_eq!(stream::read(&*store, "01A", 2).await.unwrap(), None);
    assert_eq!(stream::last(&*store, "01A").await.unwrap(), Some(3));
}

pub async fn a_fenced_writer_never_appends_again(store: Store) {
    let mut writer = StreamWriter::new(Arc::clone(&store), "01A", 0);
    writer.append(&round([edit(1)])).await.unwrap();
    fence(&*store, "01A", 1, "01B").await.unwrap();
    for _ in 0..2 {
        match writer.append(&round([edit(2)])).await {
            Err(StreamError::Fenced { by, .. }) => assert_eq!(by, "01B"),
            other => panic!("{other:?}"),
        }
    }
    let mut restarted = StreamWriter::new(Arc::clone(&store), "01A", 1);
    assert!(matches!(restarted.append(&round([edit(2)])).await, Err(StreamError::Fenced { .. })));
    let mut twin = StreamWriter::new(Arc::clone(&store), "01A", 0);
    assert!(matches!(twin.append(&round([edit(9)])).await, Err(StreamError::Foreign { .. })));
    let end = fence(&*store, "01A", 0, "01B").await.unwrap().seq;
    assert_eq!(replayed(&*store, "01A", 0, end).await, [(0, edit(1))]);
}

pub async fn a_fence_is_found_by_who_made_it_and_by_who_comes_later(store: Store) {
    let first = fence(&*store, "01A", 0, "01B").await.unwrap();
    assert_eq!(first.seq, 0);
    assert_eq!(fence(&*store, "01A", 0, "01B").await.unwrap(), first);
    assert_eq!(fence(&*store, "01A", 0, "01C").await.unwrap(), first);
}

pub async fn what_was_acknowledged_beside_a_fence_is_replayed(store: Store) {
    for attempt in 0..4_u64 {
        let incarnation = format!("01R{attempt}");
        let mut writer = StreamWriter::new(Arc::clone(&store), incarnation.clone(), 0);
        let append = tokio::spawn(async move {
            let mut acknowledged = Vec::new();
            for n in 1..=50 {
                match writer.append(&round([edit(n)])).await {
                    Ok(seq) => acknowledged.push((seq, edit(n))),
                    Err(StreamError::Fenced { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            acknowledged
        });
        tokio::time::sleep(std::time::Duration::from_millis(5 * attempt)).await;
        let replay = fence(&*store as &dyn ObjectStore, &incarnation, 0, "01Z").await.unwrap();
        let acknowledged = append.await.unwrap();
        assert_eq!(replayed(&*store, &incarnation, 0, replay.seq).await, acknowledged);
    }
}
