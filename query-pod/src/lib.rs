//! The KalamDB server: SQL over HTTP on rows that are buffered in RocksDB and kept as Parquet in object storage.
//!
//! Layers, outermost first; each knows only the ones below it:
//! - [`args`], [`standalone`], [`cluster`], [`server`]: start-up and shutdown, one line per service;
//! - [`http`]: requests and answers, limits ([`shares`]), identity from the token ([`auth`]);
//! - [`sql`]: which statements are taken, how they run, whose rows they see;
//! - [`engine`]: instances, flush, commit stream, storages.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod args;
pub mod auth;
pub mod catalog;
pub mod cluster;
pub mod connections;
pub mod crash;
pub mod engine;
pub mod error;
pub mod http;
pub mod metrics;
pub mod server;
pub mod shares;
pub mod sql;
pub mod standalone;
