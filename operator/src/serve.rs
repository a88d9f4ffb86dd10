//! `/livez`, `/readyz` and `/metrics`.
//!
//! Live is the process that answers. Ready is the operator that has seen every kind and knows the newest catalog: until
//! then it would take what it has not seen for deleted, and so it does nothing.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Router, serve};
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::metrics::Metrics;

/// What the operator still waits for; `None` = it is ready.
pub type Waiting = Option<String>;

#[derive(Clone)]
struct Pages {
    metrics: Arc<Metrics>,
    waiting: watch::Receiver<Waiting>,
}

/// Binds the address; the pages are served by the future that comes back.
///
/// # Errors
/// If the address cannot be used.
pub async fn listen(
    address: SocketAddr,
    metrics: Arc<Metrics>,
    waiting: watch::Receiver<Waiting>,
) -> anyhow::Result<impl Future<Output = std::io::Result<()>>> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("failed to listen on {address}"))?;
    tracing::info!(address = %listener.local_addr()?, "listening");
    Ok(serve(listener, router(metrics, waiting)).into_future())
}

fn router(metrics: Arc<Metrics>, waiting: watch::Receiver<Waiting>) -> Router {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(text))
        .with_state(Pages { metrics, waiting })
}

async fn ready(State(pages): State<Pages>) -> (StatusCode, String) {
    match pages.waiting.borrow().as_ref() {
        None => (StatusCode::OK, "ok\n".to_owned()),
        Some(what) => (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for {what}\n")),
    }
}

async fn text(State(pages): State<Pages>) -> impl IntoResponse {
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], pages.metrics.text())
}
