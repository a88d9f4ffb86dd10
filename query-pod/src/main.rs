//! `kalamdb-query-pod`: see [`kalamdb_query_pod`].

use clap::Parser as _;
use kalamdb_query_pod::args::{Cli, Command, Token};
use kalamdb_query_pod::auth::Tokens;
use kalamdb_query_pod::{cluster, standalone};

/// glibc's takes a fifth of the time of an INSERT (docs/decisions/0013-jemalloc.md).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Stack of a worker thread: planning recurses with the depth of a statement, which is bounded.
const STACK_BYTES: usize = 8 << 20;

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        // One line with all causes; a backtrace helps nobody who mistyped a path.
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let cli = Cli::parse();
    // One provider for all of TLS, before the first connection: rustls panics when it has to guess.
    let _ = rustls::crypto::ring::default_provider().install_default();
    if let Command::Token(token) = &cli.command {
        return print_token(token);
    }
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(STACK_BYTES).build()?;
    runtime.block_on(async {
        match &cli.command {
            Command::Standalone(args) => Box::pin(standalone::run(args)).await,
            Command::Serve(args) => Box::pin(cluster::run(args)).await,
            Command::Token(token) => print_token(token),
        }
    })
}

fn print_token(args: &Token) -> anyhow::Result<()> {
    let tokens = match (&args.jwt_secret, &args.data_dir) {
        (Some(secret), _) => Tokens::new(secret.as_bytes())?,
        (None, Some(dir)) => {
            std::fs::create_dir_all(dir)?;
            Tokens::of_data_dir(dir)?
        }
        (None, None) => anyhow::bail!("name the server's data folder with --data-dir, or set KALAMDB_JWT_SECRET"),
    };
    let now = u64::try_from(chrono::Utc::now().timestamp())?;
    println!("{}", tokens.issue(&args.user, args.role, now, args.ttl_secs)?);
    Ok(())
}
