//! Promises of the write buffer, on a real RocksDB in a temporary directory.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod commits;
mod crash;
mod flushing;
mod formats;
mod limits;
mod rows;
mod support;
