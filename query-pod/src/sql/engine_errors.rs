//! What the data plane says, for the client.

use crate::engine::{FlushError, ReadError, Rebuilding, ShipError, StoragesError, WriteError};
use crate::error::{ApiError, Kind};
use kalamdb_write_buffer::CommitError;

/// A write that failed. `key` tells the key of a row of the statement, for the one who sent it.
pub(super) fn of_write(error: WriteError, key: impl Fn(usize) -> String) -> ApiError {
    match error {
        WriteError::Exists(index) => ApiError::new(
            Kind::Conflict,
            "DUPLICATE_KEY",
            format!("row {}: the primary key ({}) exists already; nothing was written", index + 1, key(index)),
        ),
        WriteError::BufferFull { bytes, limit } => ApiError::unavailable(
            "BUFFER_FULL",
            format!("the unflushed rows of this table take {bytes} bytes, and at most {limit} are buffered; try again"),
        ),
        error @ (WriteError::PodFull { .. } | WriteError::StorageFull { .. }) => {
            ApiError::unavailable("BUFFER_FULL", format!("{error}; nothing was written, try again"))
        }
        WriteError::Disowned(_) => not_owner(),
        WriteError::Rebuilding(error) => rebuilding(&error),
        error @ WriteError::Held => {
            ApiError::new(Kind::Busy, "WRITES_BUSY", format!("{error}; nothing was written, send the request again"))
        }
        error @ (WriteError::Place(_) | WriteError::Settle(_)) => {
            tracing::warn!(error = %crate::error::Chain(&error), "a write has no place to go to");
            ApiError::unavailable("STORAGE_UNAVAILABLE", format!("{error}; nothing was written"))
        }
        error @ WriteError::Slow => ApiError::unavailable(
            "STORAGE_UNAVAILABLE",
            format!("{error}; nothing was written, send the request again"),
        ),
        WriteError::Ship(error) => of_ship(error),
        WriteError::Commit(error) => of_commit(error),
        WriteError::Read(ReadError::Storage(error)) => of_storage(&error),
        WriteError::Read(ReadError::Disowned(_)) => not_owner(),
        WriteError::Read(ReadError::Rebuilding(error)) => rebuilding(&error),
        error @ WriteError::Read(ReadError::File(_)) => {
            tracing::warn!(error = %crate::error::Chain(&error), "a write could not look its keys up");
            ApiError::unavailable(
                "STORAGE_UNAVAILABLE",
                "the storage of the table does not answer; nothing was written",
            )
        }
        error @ (WriteError::Instance(_) | WriteError::Buffer(_) | WriteError::Row(_) | WriteError::Read(_)) => {
            ApiError::internal(&error)
        }
    }
}

/// Rows that did not get through the commit stream.
fn of_ship(error: ShipError) -> ApiError {
    tracing::warn!(error = %crate::error::Chain(&error), "rows were not acknowledged");
    match error {
        ShipError::Disowned(_) => not_owner(),
        ShipError::Waiting => ApiError::unavailable(
            "STORAGE_UNAVAILABLE",
            "the storage of the table takes no rows at the moment; nothing was written, send the request again",
        ),
        ShipError::Storage(error) => of_storage(&error),
        error @ ShipError::Shared(_) => {
            ApiError::unavailable("STORAGE_UNAVAILABLE", format!("{error}; nothing was written"))
        }
        ShipError::Stopping | ShipError::Unapplied(_) => outcome_unknown(),
        error @ (ShipError::Refused(_) | ShipError::Row(_) | ShipError::Buffer(_)) => ApiError::internal(&error),
    }
}

/// The statement goes on, or will after the next start.
pub(super) fn outcome_unknown() -> ApiError {
    ApiError::unavailable(
        "OUTCOME_UNKNOWN",
        "it is not known yet whether the statement was written: look before you send it again",
    )
}

fn rebuilding(error: &Rebuilding) -> ApiError {
    ApiError::unavailable("STORAGE_UNAVAILABLE", format!("{error}; nothing was read or written, try again"))
}

fn of_commit(error: CommitError) -> ApiError {
    match error {
        CommitError::Busy => ApiError::new(Kind::Busy, "WRITES_BUSY", "too many writes are waiting; try again"),
        CommitError::DiskFull { .. } => ApiError::unavailable("DISK_FULL", format!("{error}; nothing was written")),
        CommitError::Closed => ApiError::unavailable("STOPPING", "the pod is stopping; send the request again"),
        CommitError::Lost => outcome_unknown(),
        CommitError::Write { .. } => {
            tracing::error!(error = %crate::error::Chain(&error), "a write was not acknowledged");
            ApiError::unavailable("WRITE_FAILED", "the disk failed; the rows may or may not be there after a restart")
        }
        CommitError::Empty
        | CommitError::Row { .. }
        | CommitError::Exhausted
        | CommitError::Order { .. }
        | CommitError::Read { .. } => ApiError::internal(&error),
    }
}

/// Why is for the operator: the log, `/readyz` and a metric say it.
fn not_owner() -> ApiError {
    ApiError::unavailable("NOT_OWNER", "this pod may not serve the data any more; send the request again")
}

/// A read that failed.
pub(super) fn of_read(error: &ReadError) -> ApiError {
    match error {
        ReadError::Disowned(_) => not_owner(),
        ReadError::Rebuilding(error) => rebuilding(error),
        ReadError::Storage(error) => of_storage(error),
        ReadError::File(_) => {
            tracing::warn!(error = %crate::error::Chain(error), "a read could not look keys up in files");
            ApiError::unavailable("STORAGE_UNAVAILABLE", "the storage of the table does not answer; try again")
        }
        // Whoever reads within bounds says what they are.
        ReadError::Full
        | ReadError::Instance(_)
        | ReadError::Buffer(_)
        | ReadError::Row(_)
        | ReadError::Path(_)
        | ReadError::Twice
        | ReadError::Interrupted(_)
        | ReadError::Foreign => ApiError::internal(error),
    }
}

/// A flush that failed.
pub(super) fn of_flush(error: &FlushError) -> ApiError {
    tracing::warn!(error = %crate::error::Chain(error), "a requested flush failed");
    match error {
        FlushError::Disowned(_) => not_owner(),
        FlushError::Storage(error) => of_storage(error),
        FlushError::Freeze(error) => of_commit(error.clone()),
        FlushError::Upload { .. }
        | FlushError::Located(ReadError::File(_))
        | FlushError::Garbled { .. }
        | FlushError::Describe { .. }
        | FlushError::Ship(_)
        | FlushError::Copy { .. }
        | FlushError::Place(_)
        | FlushError::Rebuilding(_)
        | FlushError::Waiting => ApiError::unavailable(
            "STORAGE_UNAVAILABLE",
            "the storage of the table does not answer; the rows stay buffered, and the flush is tried again",
        ),
        FlushError::TableGone
        | FlushError::NewerRows { .. }
        | FlushError::Instance(_)
        | FlushError::Buffer(_)
        | FlushError::Row(_)
        | FlushError::Located(_)
        | FlushError::Compact(_)
        | FlushError::Note(_)
        | FlushError::Cancelled
        | FlushError::File(_)
        | FlushError::Path(_)
        | FlushError::Interrupted(_) => ApiError::internal(error),
    }
}

fn of_storage(error: &StoragesError) -> ApiError {
    tracing::warn!(error = %error, "a storage is not usable");
    match error {
        StoragesError::Unknown(_) => {
            ApiError::unavailable("STORAGE_UNAVAILABLE", "the storage of the table is not known")
        }
        StoragesError::CredentialsMissing { .. } | StoragesError::Open { .. } => ApiError::unavailable(
            "STORAGE_UNAVAILABLE",
            "the storage of the table is not usable; see its Storage object",
        ),
    }
}
