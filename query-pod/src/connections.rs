//! Accepts connections, as many as the process has files for, and ends those that keep it waiting.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Longest wait for a request's head, the pause between two requests of one connection included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// Files that connections leave to the write buffer and the storages.
const FILES_RESERVED: usize = 1_024;
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `router` until `stop`; returns the connections that are then still open.
pub async fn serve(listener: TcpListener, router: Router, wanted: usize, stop: &CancellationToken) -> TaskTracker {
    let limit = allowed(wanted, files_max());
    if limit < wanted {
        tracing::warn!(connections = limit, "fewer connections than asked for: the process may open few files");
    }
    let slots = Arc::new(Semaphore::new(limit));
    let connections = TaskTracker::new();
    loop {
        let slot = tokio::select! {
            () = stop.cancelled() => break,
            slot = Arc::clone(&slots).acquire_owned() => slot,
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (router, stop) = (router.clone(), stop.clone());
                connections.spawn(async move {
                    connection(stream, router, stop).await;
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(error = %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    connections.close();
    connections
}

async fn connection(stream: TcpStream, router: Router, stop: CancellationToken) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(error = %error, "cannot turn off delays of a connection");
    }
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut serving = std::pin::pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = stop.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error = %error, "a connection broke");
    }
}

/// How many connections fit `files`, of which some are kept for the rest of the process.
fn allowed(wanted: usize, files: Option<usize>) -> usize {
    match files {
        Some(files) => wanted.min(files.saturating_sub(FILES_RESERVED).max(files / 4)).max(1),
        None => wanted,
    }
}

/// The soft limit of open files, as Linux shows it.
fn files_max() -> Option<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find(|line| line.starts_with("Max open files"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_files_to_the_rest() {
        assert_eq!(allowed(4_096, Some(20_000)), 4_096);
        assert_eq!(allowed(4_096, Some(2_048)), 1_024);
        assert_eq!(allowed(4_096, Some(256)), 64);
        assert_eq!(allowed(4_096, None), 4_096);
    }
}
