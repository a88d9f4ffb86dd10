//! Makes committed edits visible, and takes the rows back that only a commit stream has.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use kalamdb_model::Generation;
use kalamdb_table_store::manifest::{self, Edit};
use kalamdb_table_store::stream::RowBlock;
use kalamdb_write_buffer::row::Header;
use kalamdb_write_buffer::{CommitError, ReadError, RowError};

use super::instance::{InstanceError, Position, View};
use super::ship::{Backoff, Disowned, ShipError};
use super::{Engine, RootKey};
use crate::error::Chain;

/// Blocks of rows that are taken back at once.
const RESTORES_MAX: usize = 1_024;

/// Why a committed edit cannot be made visible.
#[derive(Debug, thiserror::Error)]
pub(super) enum PublishError {
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error("failed to read buffered rows")]
    Buffer(#[from] ReadError),
    #[error("a buffered row is damaged")]
    Row(#[from] RowError),
    #[error("failed to restore rows")]
    Restore(#[from] CommitError),
    /// Rows that are in no file would go with it.
    #[error("{0}")]
    Uncovered(String),
}

impl Engine {
    /// Makes a committed edit visible: the record on disk and the view in memory change under the instance's lock.
    /// Blocking; running it twice changes nothing.
    pub(super) fn publish(&self, root: &RootKey, edit: &Edit) -> Result<(), PublishError> {
        if edit.placed.as_ref().is_some_and(|placed| RootKey::of(&placed.location) != *root) {
            // Said to those who only have this stream: the other one has brought it here.
            return Ok(());
        }
        // Outside the lock: rows of a frozen generation do not change, and only the shipper publishes.
        self.check_covered(edit)?;
        let instance = self.instances.get(&edit.instance)?;
        let mut current = instance.current.write();
        if is_published(&current.view, edit) {
            return Ok(());
        }
        if edit.placed.as_ref().is_some_and(|placed| placed.moves > current.view.manifest.moves()) {
            self.moves.note_placed(&edit.instance)?;
            self.note_left(&edit.instance, &current.view)?;
            current.located.clear();
        }
        self.note_garbage(root, &current.view, edit)?;
        let manifest = manifest::apply(&current.view.manifest, edit);
        self.buffer.publish(&edit.instance, edit.generation.max(current.view.flushed), &manifest.encode())?;
        // Keys of which nothing was found may be in the new file; of the others those are still where they were whose rows
        // the new file does not replace.
        let stays = |at: &Position| {
            let removed = edit.remove.iter().any(|path| **path == *at.path);
            !removed && edit.replace.get(&*at.path).is_none_or(|replaced| !replaced.contains(at.row))
        };
        current.located.retain(|_, at| at.as_ref().is_some_and(stays));
        current.view = Arc::new(View { flushed: edit.generation.max(current.view.flushed), manifest });
        Ok(())
    }

    /// Checks that the files of `edit` hold every row that is given up for them: its generation is closed here, and none
    /// of its rows is newer than the files. Blocking.
    pub(super) fn check_covered(&self, edit: &Edit) -> Result<(), PublishError> {
        let (generation, table) = (edit.generation, edit.instance.table.0);
        let flushed = self.instances.get(&edit.instance)?.current.read().view.flushed;
        if flushed >= generation {
            return Ok(());
        }
        let active = self.buffer.counters(&edit.instance)?.active;
        if generation >= active {
            let found = format!("generation {} of table {table} is committed, and takes rows here", generation.0);
            return Err(PublishError::Uncovered(found));
        }
        let (mut newest, mut damaged) = (i64::MIN, None);
        for of in flushed.0 + 1..=generation.0 {
            self.buffer.scan_generation(&edit.instance, Generation(of), &mut |_, _, row| match Header::parse(row) {
                Ok(header) => {
                    newest = newest.max(header.seq);
                    ControlFlow::Continue(())
                }
                Err(error) => {
                    damaged = Some(error);
                    ControlFlow::Break(())
                }
            })?;
        }
        if let Some(error) = damaged {
            return Err(error.into());
        }
        if newest > edit.last_seq {
            let found = format!(
                "generation {} of table {table} is committed up to `_seq` {}, and has rows up to {newest} here",
                generation.0, edit.last_seq
            );
            return Err(PublishError::Uncovered(found));
        }
        Ok(())
    }

    /// Publishes until it works: a committed edit that was given up here would be written a second time.
    pub(super) async fn publish_all(self: &Arc<Self>, root: &RootKey, edits: Vec<Edit>) -> Result<(), ShipError> {
        for edit in edits {
            let mut backoff = Backoff::default();
            loop {
                let (engine, of, again) = (Arc::clone(self), root.clone(), edit.clone());
                match tokio::task::spawn_blocking(move || engine.publish(&of, &again)).await {
                    Ok(Ok(())) => break,
                    Ok(Err(PublishError::Uncovered(found))) => return Err(self.older_copy(root, found).into()),
                    Ok(Err(error)) => {
                        tracing::error!(error = %Chain(&error), "cannot publish a committed flush");
                        self.broken.store(true, Ordering::Release);
                    }
                    Err(error) => tracing::error!(error = %error, "cannot publish a committed flush"),
                }
                self.pause(&mut backoff).await?;
            }
        }
        Ok(())
    }

    pub(super) fn older_copy(&self, root: &RootKey, found: String) -> Disowned {
        self.disown(Disowned::OlderCopy { root: root.clone(), found })
    }

    /// Checks that rows which were in the buffer before they came into the stream are still there, or in files. Blocking.
    pub(super) fn check_buffered(&self, block: &RowBlock) -> Result<(), PublishError> {
        if !block.buffered {
            return Ok(());
        }
        let instance = self.instances.get(&block.instance)?;
        let current = instance.current.read();
        for (key, value) in &block.rows {
            let seq = Header::parse(value)?.seq;
            if seq <= current.view.manifest.last_seq {
                continue;
            }
            let stored = self.buffer.get(&block.instance, current.view.flushed, key)?;
            let newest = stored.map(|(_, value)| Header::parse(&value)).transpose()?.map(|header| header.seq);
            if newest.is_none_or(|newest| newest < seq) {
                let table = block.instance.table.0;
                let found = format!("a row of table {table} with `_seq` {seq} is in a commit, and not here");
                return Err(PublishError::Uncovered(found));
            }
        }
        Ok(())
    }

    /// Takes rows of one object of a commit stream back into the buffer, but those that are there, or in files, and tells
    /// how many. Many blocks at once, so that they share the fsyncs.
    pub(super) async fn restore_all(&self, blocks: Vec<RowBlock>) -> Result<u64, PublishError> {
        let restoring = stream::iter(blocks.into_iter().map(|block| self.restore(block)));
        restoring.buffer_unordered(RESTORES_MAX).try_fold(0, async |all, rows| Ok(all + rows)).await
    }

    async fn restore(&self, block: RowBlock) -> Result<u64, PublishError> {
        let RowBlock { instance: id, rows, .. } = block;
        let in_files = self.instances.get(&id)?.current.read().view.manifest.last_seq;
        let mut missing = Vec::with_capacity(rows.len());
        for (key, value) in rows {
            if Header::parse(&value)?.seq > in_files {
                missing.push((key, value));
            }
        }
        let count = missing.len() as u64;
        let mut backoff = Backoff::default();
        loop {
            match self.buffer.restore(id.clone(), missing.clone()).await {
                Ok(()) => return Ok(count),
                Err(CommitError::Busy) if !self.stop.is_cancelled() => tokio::time::sleep(backoff.next()).await,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether `view` has what `edit` brings: a flush brings a generation, a compaction takes files away, a move another place.
pub(super) fn is_published(view: &View, edit: &Edit) -> bool {
    if edit.placed.as_ref().is_some_and(|placed| placed.moves > view.manifest.moves()) {
        false
    } else if edit.remove.is_empty() {
        view.flushed >= edit.generation
    } else {
        edit.remove.iter().all(|path| view.file(path).is_none())
    }
}
