//! What KalamDB keeps in object storage: where each object lies, how it is written safely, and how it reads back.
//!
//! Owns: object paths ([`paths`]), stores and their credentials ([`store`], [`filesystem`]), create-if-absent
//! ([`create`]), the catalog log ([`catalog_log`]), the commit stream ([`stream`]) and its checkpoints ([`checkpoint`]),
//! manifests ([`manifest`]), Parquet files ([`parquet_file`]) and their decoded footers ([`Footers`]).
//! Does not own: which pod may write (shards and leases are the query pod's), unflushed rows (`write_buffer`), SQL.
//!
//! After a crash: every object is created whole or not at all and is never changed afterwards, so each step may run
//! twice. What a writer does not know, it asks the store; it never guesses, and an error is never read as "empty".
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod catalog_delta;
pub mod catalog_log;
pub mod checkpoint;
pub mod create;
pub mod filesystem;
mod footers;
pub mod key_columns;
pub mod manifest;
pub mod merge;
pub mod owners;
pub mod parquet_file;
pub mod parquet_read;
pub mod paths;
pub mod positions;
pub mod probe;
pub mod store;
pub mod stream;
mod stream_format;
pub mod users;
pub mod values;
pub mod width;

pub use catalog_log::CatalogLog;
pub use create::{Create, CreateError, create_exact};
pub use filesystem::FilesystemStore;
pub use footers::{FooterCounts, Footers};
pub use manifest::{Edit, FileEntry, Manifest};
pub use parquet_read::{DataFiles, FileReader};
pub use positions::Positions;
pub use probe::{ProbeError, ProbeReason, probe};
pub use store::{Credentials, StoreError, open, open_first, open_home};
pub use stream::{StreamError, StreamWriter, fence};
