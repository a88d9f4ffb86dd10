//! Names, ids, types, row values, declared objects and the compiled catalog: the vocabulary of every other crate.
//!
//! Owns: what a valid name, type, value and table is, and [`compile()`], which turns declared objects into a [`Catalog`].
//! Does not own: how any of it is stored (`write_buffer::row`, `table_store::paths`) or declared in YAML (`crds`).
//!
//! Everything here is pure: no clock, no disk, no network, no randomness that is not handed in.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod catalog;
mod compile;
pub mod declared;
pub mod defaults;
pub mod error;
pub mod ids;
pub mod key;
pub mod names;
pub mod snowflake;
pub mod template;
pub mod types;
pub mod value;

pub use catalog::{Catalog, Column, Location, TableEntry, TableKind};
pub use compile::{OnRemoval, Outcome, Reason, Refusal, compile};
pub use error::ValueError;
pub use ids::{ColumnId, Generation, InstanceId, Owner, Role, SHARDS, ShardId, TableId, UserId};
pub use names::{SqlName, StorageName, TableName};
pub use types::ColumnType;
pub use value::Value;
