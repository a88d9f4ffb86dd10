//! Checkpoints of a commit stream: all manifests and unflushed rows of a storage as of one number of the stream or later,
//! so that a replay begins there and what lies before it can go.
//!
//! Owns: how a checkpoint is written and found. Does not own: what is in it, and when one is due.
//!
//! A checkpoint may hold more than its number says, because it is written while commits go on: whoever replays the stream
//! from there on passes over what is there already. After a crash: parts without their last object are no checkpoint.

use bytes::Bytes;
use object_store::ObjectStore;

use crate::create::{self, Create, create_exact};
use crate::paths;
use crate::stream::{self, Body, Round, StreamError, StreamObject};

/// A checkpoint that is complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// The stream that it shortens.
    pub incarnation: String,
    /// The first object that has to be replayed after it.
    pub seq: u64,
    attempt: String,
    parts: u32,
}

/// Writes one checkpoint, part by part.
#[derive(Debug)]
pub struct CheckpointWriter<'a> {
    store: &'a dyn ObjectStore,
    checkpoint: Checkpoint,
}

impl<'a> CheckpointWriter<'a> {
    /// A checkpoint of the stream of `incarnation` before `seq`. `attempt` rises with each that this process writes: a
    /// completion that lands late must not go before a later one.
    #[must_use]
    pub fn new(store: &'a dyn ObjectStore, incarnation: &str, seq: u64, attempt: u64) -> Self {
        let attempt = format!("{attempt:010}");
        Self { store, checkpoint: Checkpoint { incarnation: incarnation.to_owned(), seq, attempt, parts: 0 } }
    }

    /// Writes the next part: manifests as edits that bring all their files, and rows.
    ///
    /// # Errors
    /// If it is not known to be there. The checkpoint has to be given up then.
    pub async fn part(&mut self, round: Round) -> Result<(), StreamError> {
        let Checkpoint { incarnation, seq, attempt, parts } = &self.checkpoint;
        let path = paths::checkpoint_part(incarnation, *seq, attempt, *parts);
        let bytes = stream::object_bytes(incarnation, u64::from(*parts), Body::Round(round))?;
        self.create(&path, bytes).await?;
        self.checkpoint.parts += 1;
        Ok(())
    }

    /// Makes the checkpoint true.
    ///
    /// # Errors
    /// If it is not known to be.
    pub async fn finish(self) -> Result<Checkpoint, StreamError> {
        let Checkpoint { incarnation, seq, attempt, parts } = &self.checkpoint;
        let bytes = stream::object_bytes(incarnation, *seq, Body::Checkpoint { parts: *parts })?;
        self.create(&paths::checkpoint(incarnation, *seq, attempt), bytes).await?;
        Ok(self.checkpoint)
    }

    async fn create(&self, path: &object_store::path::Path, bytes: Bytes) -> Result<(), StreamError> {
        match create_exact(self.store, path, bytes).await.map_err(StreamError::Unknown)? {
            Create::Ours => Ok(()),
            // Under a name of this process only: other bytes are our own, garbled.
            Create::Lost(_) => {
                Err(StreamError::Foreign { incarnation: self.checkpoint.incarnation.clone(), path: path.clone() })
            }
        }
    }
}

/// The newest checkpoint of the stream of `incarnation`.
///
/// # Errors
/// If the store does not answer, or the object that completes it is damaged: that is never "there is none".
pub async fn newest(store: &dyn ObjectStore, incarnation: &str) -> Result<Option<Checkpoint>, StreamError> {
    let listed = stream::list(store, &paths::checkpoints_prefix(incarnation)).await?;
    let Some((seq, attempt)) = listed.iter().filter_map(paths::checkpoint_name).max() else { return Ok(None) };
    let path = paths::checkpoint(incarnation, seq, &attempt);
    match read(store, &path, incarnation, seq).await?.body {
        Body::Checkpoint { parts } => Ok(Some(Checkpoint { incarnation: incarnation.to_owned(), seq, attempt, parts })),
        _ => Err(StreamError::Missing { path }),
    }
}

impl Checkpoint {
    /// How many parts it has.
    #[must_use]
    pub const fn parts(&self) -> u32 {
        self.parts
    }

    /// Reads a part.
    ///
    /// # Errors
    /// If it is missing or damaged.
    pub async fn part(&self, store: &dyn ObjectStore, part: u32) -> Result<Round, StreamError> {
        let path = paths::checkpoint_part(&self.incarnation, self.seq, &self.attempt, part);
        match read(store, &path, &self.incarnation, u64::from(part)).await?.body {
            Body::Round(round) => Ok(round),
            _ => Err(StreamError::Missing { path }),
        }
    }

    /// Deletes every other checkpoint of the stream, complete or not.
    ///
    /// # Errors
    /// If the store does not list or delete.
    pub async fn delete_others(&self, store: &dyn ObjectStore) -> Result<(), StreamError> {
        let ours = format!("{:020}-{}", self.seq, self.attempt);
        delete_but(store, &self.incarnation, Some(&ours)).await
    }
}

/// Deletes all checkpoints of the stream of `incarnation`, of which nothing has to be replayed any more.
///
/// # Errors
/// If the store does not list or delete.
pub async fn delete_all(store: &dyn ObjectStore, incarnation: &str) -> Result<(), StreamError> {
    delete_but(store, incarnation, None).await
}

async fn delete_but(store: &dyn ObjectStore, incarnation: &str, kept: Option<&str>) -> Result<(), StreamError> {
    let prefix = paths::checkpoints_prefix(incarnation);
    let mut gone = stream::list(store, &prefix).await?;
    gone.retain(|path| {
        kept.is_none_or(|kept| !path.as_ref()[prefix.as_ref().len()..].trim_start_matches('/').starts_with(kept))
    });
    // First what completes them: parts alone are no checkpoint.
    gone.sort_by_key(|path| paths::checkpoint_name(path).is_none());
    let (complete, parts): (Vec<_>, Vec<_>) = gone.into_iter().partition(|path| paths::checkpoint_name(path).is_some());
    stream::delete(store, complete).await?;
    stream::delete(store, parts).await
}

async fn read(
    store: &dyn ObjectStore,
    path: &object_store::path::Path,
    incarnation: &str,
    seq: u64,
) -> Result<StreamObject, StreamError> {
    match create::read(store, path).await {
        Ok(Some(bytes)) => stream::decode(&bytes, path, incarnation, seq),
        Ok(None) => Err(StreamError::Missing { path: path.clone() }),
        Err(source) => Err(StreamError::Read { path: path.clone(), source }),
    }
}

#[cfg(test)]
mod tests {
    use kalamdb_model::ids::{InstanceId, TableId, UserId};
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    use super::*;
    use crate::stream::RowBlock;

    fn rows(value: &str) -> Round {
        let instance = InstanceId::of_user(UserId::new("alice").unwrap(), TableId(1));
        let rows = vec![(b"key".to_vec(), value.as_bytes().to_vec())];
        Round { edits: Vec::new(), rows: vec![RowBlock { instance, buffered: true, rows }] }
    }

    async fn write(store: &InMemory, seq: u64, attempt: u64, values: &[&str]) -> Checkpoint {
        let mut writer = CheckpointWriter::new(store, "01a", seq, attempt);
        for value in values {
            writer.part(rows(value)).await.unwrap();
        }
        writer.finish().await.unwrap()
    }

    #[tokio::test]
    async fn the_newest_complete_checkpoint_is_read_and_the_others_go() {
        let store = InMemory::new();
        assert_eq!(newest(&store, "01a").await.unwrap(), None);
        let first = write(&store, 8, 1, &["one", "two"]).await;
        let mut given_up = CheckpointWriter::new(&store, "01a", 9, 2);
        given_up.part(rows("half")).await.unwrap();
        assert_eq!(newest(&store, "01a").await.unwrap(), Some(first));
        let second = write(&store, 8, 3, &["three"]).await;
        let found = newest(&store, "01a").await.unwrap().unwrap();
        assert_eq!((&found, found.parts()), (&second, 1));
        assert_eq!(found.part(&store, 0).await.unwrap(), rows("three"));
        second.delete_others(&store).await.unwrap();
        assert_eq!(stream::list(&store, &paths::checkpoints_prefix("01a")).await.unwrap().len(), 2);
        assert_eq!(newest(&store, "01a").await.unwrap(), Some(second));
        delete_all(&store, "01a").await.unwrap();
        assert_eq!(newest(&store, "01a").await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_damaged_or_missing_object_is_an_error_and_never_an_empty_checkpoint() {
        let store = InMemory::new();
        let made = write(&store, 7, 1, &["one"]).await;
        let part = paths::checkpoint_part("01a", 7, &made.attempt, 0);
        store.put(&part, "<html>".into()).await.unwrap();
        assert!(matches!(made.part(&store, 0).await, Err(StreamError::Corrupt { .. })));
        store.delete(&part).await.unwrap();
        assert!(matches!(made.part(&store, 0).await, Err(StreamError::Missing { .. })));
        store.put(&paths::checkpoint("01a", 7, &made.attempt), "<html>".into()).await.unwrap();
        assert!(matches!(newest(&store, "01a").await, Err(StreamError::Corrupt { .. })));
    }
}
