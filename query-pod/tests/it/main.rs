//! Component tests: a query pod as a process, driven over HTTP.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod failure;
