//! Serving and stopping, the same for every mode.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::args::Server;
use crate::auth::Tokens;
use crate::catalog::CatalogHandle;
use crate::connections;
use crate::engine::{Caches, Engine, Secrets, Storages};
use crate::http::{self, Api};
use crate::metrics::Metrics;
use crate::shares::Shares;
use crate::sql::Sql;

/// How long a start waits for storages to tell whether this data folder is the newest one.
const STREAMS_WAIT: Duration = Duration::from_secs(2);

/// How long a stop waits for bytes on their way to the cache's disk; they are in the storage, too.
const CACHES_GRACE: Duration = Duration::from_secs(2);

/// The parts of a server that is open and not yet serving.
pub struct Parts {
    /// The catalog; whoever compiles or tails it replaces it here.
    pub catalog: CatalogHandle,
    /// Credentials of storages.
    pub secrets: Secrets,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// The data plane.
    pub engine: Arc<Engine>,
    /// Set to true once a catalog is known.
    pub ready: watch::Sender<bool>,
}

impl Parts {
    /// Opens the data folder.
    ///
    /// # Errors
    /// If it cannot be used; another process that has it is named.
    pub fn open(server: &Server) -> anyhow::Result<Self> {
        let dir = &server.data_dir;
        std::fs::create_dir_all(dir).with_context(|| format!("failed to create `{}`", dir.display()))?;
        let dir = dir.canonicalize().with_context(|| format!("failed to resolve `{}`", dir.display()))?;
        let catalog = CatalogHandle::open(&dir)?;
        let secrets = Secrets::default();
        let metrics = Arc::new(Metrics::default());
        let storages = Storages::new(dir.clone(), secrets.clone());
        let engine = Engine::open(&dir, catalog.clone(), storages, server.engine.clone(), Arc::clone(&metrics))?;
        Ok(Self { catalog, secrets, metrics, engine, ready: watch::Sender::new(false) })
    }
}

/// Serves until SIGTERM or SIGINT, then finishes what is under way. Shutdown order: not ready, no new requests, requests
/// finish, flushes finish, the write buffer closes, the caches close.
///
/// # Errors
/// If the address cannot be used.
pub async fn serve(server: &Server, parts: Parts, tokens: Tokens) -> anyhow::Result<()> {
    let Parts { metrics, engine, ready, .. } = parts;
    engine.storages().set_caches(Caches::open(&server.data_dir, &server.cache, server.engine.disk_reserve_bytes).await);
    metrics.watch(&engine, &server.data_dir);
    // Before anybody is answered: the storages may know that the data folder is not what it was.
    engine.open_known_streams(STREAMS_WAIT).await?;
    let sql = Sql::new(Arc::clone(&engine), server.sql.clone(), Arc::clone(&metrics))?;
    let api = Api {
        sql,
        tokens,
        metrics,
        body_bytes_max: server.body_bytes_max,
        requests: Shares::new(server.requests_max, server.requests_per_user_max),
        ready: ready.subscribe(),
    };
    let listener =
        TcpListener::bind(server.listen).await.with_context(|| format!("failed to listen on {}", server.listen))?;
    tracing::info!(address = %listener.local_addr()?, "listening");
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        stop_signal().await;
        tracing::info!("stopping");
        ready.send_replace(false);
        stopping.cancel();
    });
    let connections = connections::serve(listener, http::router(Arc::new(api)), server.connections_max, &stop).await;
    let grace = Duration::from_secs(server.stop_grace_secs);
    if tokio::time::timeout(grace, connections.wait()).await.is_err() {
        tracing::warn!("stopping although requests are still under way");
    }
    engine.close(grace).await;
    if let Some(caches) = engine.storages().caches() {
        caches.close(CACHES_GRACE).await;
    }
    tracing::info!("stopped");
    Ok(())
}

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(error) => {
                tracing::error!(error = %error, "cannot listen for SIGTERM");
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = terminate => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}
