//! What can go wrong, by what was being done.

use std::io;
use std::path::PathBuf;

use kalamdb_model::Generation;

use crate::keys::KeyError;
use crate::record::RecordError;
use crate::row::RowError;

/// Why a buffer cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory cannot be made, read or synced.
    #[error("cannot use the directory `{path}`")]
    Directory {
        /// The directory or a file in it.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has it open.
    #[error("`{path}` is in use by {}; stop it first, or use another data directory", owner(*.pid))]
    Locked {
        /// The directory.
        path: PathBuf,
        /// The process; `None` if it did not say.
        pid: Option<u32>,
    },
    /// RocksDB refuses.
    #[error("cannot open the write buffer in `{path}`")]
    Database {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: rocksdb::Error,
    },
    /// Written by another version.
    #[error("the write buffer in `{path}` has format `{found}`, this version reads `{supported}`")]
    Format {
        /// The directory.
        path: PathBuf,
        /// What it says; empty if it says nothing and is not empty.
        found: String,
        /// What this version reads and writes.
        supported: &'static str,
    },
    /// What is stored cannot be read. Nothing was changed.
    #[error("the write buffer in `{path}` cannot be read")]
    Stored {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        source: ReadError,
    },
    /// No thread for the committer.
    #[error("cannot start the committer thread")]
    Thread {
        /// Why.
        source: io::Error,
    },
}

fn owner(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".to_owned(), |pid| format!("the process with pid {pid}"))
}

/// Why reading, publishing or reclaiming failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// RocksDB failed.
    #[error("failed to {operation}")]
    Database {
        /// What was being done.
        operation: &'static str,
        /// Why.
        source: rocksdb::Error,
    },
    /// A stored key is none.
    #[error("a key of the write buffer is damaged")]
    Key {
        /// How.
        source: KeyError,
    },
    /// A stored row is none.
    #[error("a row of the write buffer is damaged")]
    Row {
        /// How.
        source: RowError,
    },
    /// A stored record is none.
    #[error("a record of the write buffer is damaged")]
    Record {
        /// How.
        source: RecordError,
    },
    /// The rows asked for are in files by now; take the current view and ask again.
    #[error("generations after {} were asked for, but those up to {} are removed", .after.0, .reclaimed.0)]
    Reclaimed {
        /// Asked for.
        after: Generation,
        /// Removed, or being removed.
        reclaimed: Generation,
    },
    /// Publishing an older state over a newer one.
    #[error("generation {} cannot be published: generation {} already is", .flushed.0, .stored.0)]
    Stale {
        /// Asked for.
        flushed: Generation,
        /// Published before.
        stored: Generation,
    },
    /// Publishing a generation that still takes rows.
    #[error("generation {} cannot be published: generation {} still takes rows", .flushed.0, .active.0)]
    NotFrozen {
        /// Asked for.
        flushed: Generation,
        /// Takes rows.
        active: Generation,
    },
    /// Removing rows that are not in files yet.
    #[error("generation {} cannot be removed: only generations up to {} are flushed", .up_to.0, .flushed.0)]
    NotFlushed {
        /// Asked for.
        up_to: Generation,
        /// Published.
        flushed: Generation,
    },
}

/// Why a statement was not committed. After [`CommitError::Write`] and [`CommitError::Lost`] it may yet be there
/// after a restart, then whole; after all others it is not.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CommitError {
    /// The queue is full.
    #[error("the write buffer is busy; try again")]
    Busy,
    /// Too little space is left on the disk.
    #[error("the disk of the write buffer has {free} bytes free, {reserve} must stay free")]
    DiskFull {
        /// Free now, bytes.
        free: u64,
        /// Must stay free, bytes.
        reserve: u64,
    },
    /// The buffer was closed.
    #[error("the write buffer is closed")]
    Closed,
    /// The committer ended without an answer: the statement may be there.
    #[error("the write buffer gave no answer")]
    Lost,
    /// A statement without rows.
    #[error("a commit needs at least one row")]
    Empty,
    /// A row that [`crate::row::encode`] did not make; nothing of the statement was stored.
    #[error("row {index} of the statement is no encoded row")]
    Row {
        /// Which.
        index: usize,
        /// Why.
        source: RowError,
    },
    /// No `_seq` or generation is left, which needs a damaged clock or record.
    #[error("the instance has no sequence numbers or generations left")]
    Exhausted,
    /// Rows that were stamped before are older than what the instance has.
    #[error("rows that were stamped from {first_seq} on come too late: {next_seq} is next")]
    Order {
        /// Their first `_seq`.
        first_seq: i64,
        /// The least that could be taken.
        next_seq: i64,
    },
    /// The state of the instance cannot be read.
    #[error("the state of the instance cannot be read")]
    Read {
        /// Why.
        source: ReadError,
    },
    /// The write or its fsync failed.
    #[error("failed to write to the write buffer")]
    Write {
        /// Why.
        source: rocksdb::Error,
    },
}
