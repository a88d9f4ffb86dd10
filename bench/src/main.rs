//! `kalamdb-bench`: loads a running KalamDB with real rows and checks every one of them (`demo`), or measures it (`bench`).
//!
//! Both speak to the server only as any client would: SQL over HTTP with bearer tokens. Nothing here keeps state; an
//! interrupted `demo` is run again and goes on where it stopped.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod bench;
mod client;
mod demo;
mod progress;
mod token;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The server's, so that DataFusion and the Parquet writer are measured beside it with the same.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Real input and figures for a running KalamDB.
#[derive(Parser, Debug)]
#[command(name = "kalamdb-bench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Load this machine's Debian changelogs, every maintainer a user, and compare what the server then says with the files.
    Demo(demo::Args),
    /// Measure writes, reads, flush and memory; never fails because something is slow.
    Bench(bench::Args),
}

#[tokio::main]
async fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Demo(args) => Box::pin(demo::run(&args)).await,
        Command::Bench(args) => Box::pin(bench::run(&args)).await.map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
