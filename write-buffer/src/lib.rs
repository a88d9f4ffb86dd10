//! Durable rows that are not in Parquet yet: one RocksDB per pod, written by one committer thread.
//!
//! Owns: the layout of row keys ([`keys`]), the bytes of a row ([`row`]) and their way into Arrow ([`batch`]), who
//! stamps generation and `_seq` (the committer, nobody else), and the records of what was flushed.
//! Does not own: when to flush, the Parquet files, what a manifest says (opaque bytes here), locks between statements.
//!
//! After a crash: every acknowledged statement is there, whole; one that was not acknowledged is there whole or not at
//! all; frozen generations that were not published are still frozen; `_seq` goes on above everything ever stored.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod batch;
mod buffer;
mod committer;
mod error;
pub mod keys;
mod lock;
mod record;
mod recovery;
pub mod row;
mod state;
mod store;

pub use batch::BatchBuilder;
pub use buffer::{Adopted, Applied, Committed, EncodedRow, FreeSpace, Fresh, OnApplied, Options, Stamps, WriteBuffer};
pub use error::{CommitError, OpenError, ReadError};
pub use keys::KeyError;
pub use record::{Record, RecordError};
pub use row::{RowError, RowView};
pub use state::Counters;
pub use store::{Found, Generations, Moment, Visit};
