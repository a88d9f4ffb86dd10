//! Reconciles KalamDB's custom resources into the catalog that query pods serve from.
//!
//! Layers, outermost first; each knows only the ones below it:
//! - `main`, [`args`], [`serve`]: start-up and the pages for probes and metrics;
//! - [`pass`]: the loop: what there is → compile → append to the catalog log → status;
//! - [`watch`] (what there is), [`storages`] (who can be reached), [`log`] (the
//!   catalog), [`cluster`] (every call to the API server);
//! - [`status`], [`usage`], [`backoff`]: decisions, pure.
//!
//! After a crash: everything here is level-triggered and may run twice. Nothing is kept but the catalog log, which has
//! one writer at a time by its own means, and the objects' statuses, which the next pass makes right.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

pub mod args;
pub mod backoff;
pub mod cluster;
pub mod log;
pub mod metrics;
pub mod pass;
pub mod serve;
pub mod status;
pub mod storages;
pub mod usage;
pub mod watch;
