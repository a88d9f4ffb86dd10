//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kalamdb_model::{Role, UserId};

use crate::engine::{CacheLimits, EngineLimits};
use crate::sql::SqlLimits;

/// The KalamDB server.
#[derive(Parser, Debug)]
#[command(name = "kalamdb-query-pod", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Serve alone: manifests from a folder, files on this machine or in object storage, no cluster.
    Standalone(Box<Standalone>),
    /// Serve in a cluster: the catalog comes from the operator through the home store.
    Serve(Box<Serve>),
    /// Print one bearer token, and nothing else.
    Token(Token),
}

/// Flags of `standalone`.
#[derive(Args, Debug)]
pub struct Standalone {
    /// Folder with the manifests of storages, namespaces and tables (and Secrets); changes are seen within a second.
    #[arg(long)]
    pub manifests: PathBuf,
    /// Flags of every server.
    #[command(flatten)]
    pub server: Server,
}

/// Flags of `serve`.
#[derive(Args, Debug)]
pub struct Serve {
    /// Where the catalog is: `s3://bucket/prefix`, `gs://…`, `az://…` or `file:///folder`, with the store's usual
    /// variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT, …).
    #[arg(long, env = "KALAMDB_HOME_URL")]
    pub home_url: String,
    /// Secret that tokens are signed with, at least 32 bytes.
    #[arg(long, env = "KALAMDB_JWT_SECRET", hide_env_values = true)]
    pub jwt_secret: String,
    /// Kubernetes namespace of the Secrets that Storages name; default: the pod's own.
    #[arg(long, env = "POD_NAMESPACE")]
    pub kube_namespace: Option<String>,
    /// Flags of every server.
    #[command(flatten)]
    pub server: Server,
}

/// Flags of every server.
#[derive(Args, Debug)]
pub struct Server {
    /// Folder for unflushed rows, the saved catalog and, standalone, relative storages. One process at a time.
    #[arg(long)]
    pub data_dir: PathBuf,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:2900")]
    pub listen: SocketAddr,
    /// Largest request body, bytes.
    #[arg(long, default_value_t = 16 << 20)]
    pub body_bytes_max: usize,
    /// Connections at once; more wait. Lowered where the process may not open that many files.
    #[arg(long, default_value_t = 4_096)]
    pub connections_max: usize,
    /// Requests at once; more are refused. A request ends when its answer is sent.
    #[arg(long, default_value_t = 1_024)]
    pub requests_max: usize,
    /// Requests of one user at once; more are refused. Enough for a service that writes for many, and a quarter of all.
    #[arg(long, default_value_t = 256)]
    pub requests_per_user_max: usize,
    /// Seconds to finish requests and flushes after SIGTERM.
    #[arg(long, default_value_t = 20)]
    pub stop_grace_secs: u64,
    /// Limits of statements.
    #[command(flatten)]
    pub sql: SqlLimits,
    /// Limits of the data plane.
    #[command(flatten)]
    pub engine: EngineLimits,
    /// Limits of what is kept of data files.
    #[command(flatten)]
    pub cache: CacheLimits,
}

/// Flags of `token`.
#[derive(Args, Debug)]
pub struct Token {
    /// Data folder of a standalone server, whose key signs; not needed when KALAMDB_JWT_SECRET is set.
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Secret to sign with instead.
    #[arg(long, env = "KALAMDB_JWT_SECRET", hide_env_values = true)]
    pub jwt_secret: Option<String>,
    /// The user id.
    #[arg(long, value_parser = parse_user)]
    pub user: UserId,
    /// user, service, dba or system.
    #[arg(long, default_value = "user")]
    pub role: Role,
    /// How long the token is valid, seconds.
    #[arg(long, default_value_t = 30 * 24 * 3_600)]
    pub ttl_secs: u64,
}

fn parse_user(text: &str) -> Result<UserId, kalamdb_model::ids::UserIdError> {
    UserId::new(text)
}
