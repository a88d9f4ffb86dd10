//! Accepts connections, as many as the process has files for, and ends those that keep it waiting.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Longest wait for a request's head, the pause between two requests of one connection included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// Longest time in which a client takes nothing of an answer that waits for it. The system asks for more only when a good
/// part of its own buffer is free, so that a byte now and then is not enough.
const TAKE_TIMEOUT: Duration = Duration::from_secs(30);
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
                    connection(stream, router, stop, TAKE_TIMEOUT).await;
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

async fn connection(stream: TcpStream, router: Router, stop: CancellationToken, take_timeout: Duration) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(error = %error, "cannot turn off delays of a connection");
    }
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(Impatient::new(stream, take_timeout)), TowerToHyperService::new(router));
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

/// A stream that fails when the other side takes nothing for `limit`.
struct Impatient {
    stream: TcpStream,
    limit: Duration,
    /// Runs while a write waits.
    stuck: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    const fn new(stream: TcpStream, limit: Duration) -> Self {
        Self { stream, limit, stuck: None }
    }

    fn timed(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stuck = None;
            return written;
        }
        let limit = self.limit;
        ready!(self.stuck.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit))).as_mut().poll(cx));
        let message = format!("the client took nothing of its answer for {} s", limit.as_secs());
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }
}

impl AsyncRead for Impatient {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.timed(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.timed(cx, written)
    }

    /// hyper copies answers where this is false, and what is copied is not counted any more (`http::body`).
    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn connections_leave_files_to_the_rest() {
        assert_eq!(allowed(4_096, Some(20_000)), 4_096);
        assert_eq!(allowed(4_096, Some(2_048)), 1_024);
        assert_eq!(allowed(4_096, Some(256)), 64);
        assert_eq!(allowed(4_096, None), 4_096);
    }

    /// More than the system buffers on both sides.
    const LARGE: usize = 64 << 20;
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

    fn answers_with(bytes: usize) -> Router {
        Router::new().fallback(move || async move { vec![b'x'; bytes] })
    }

    /// A client, and the end of what serves it.
    async fn connect(bytes: usize, take_timeout: Duration) -> (TcpStream, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let (client, accepted) =
            tokio::join!(TcpStream::connect(listener.local_addr().expect("bound")), listener.accept());
        let (served, mut client) = (accepted.expect("accepted").0, client.expect("connected"));
        let ended = tokio::spawn(connection(served, answers_with(bytes), CancellationToken::new(), take_timeout));
        client.write_all(REQUEST).await.expect("sent");
        (client, ended)
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_disconnected() {
        let (mut client, ended) = connect(LARGE, Duration::from_millis(200)).await;
        tokio::time::timeout(Duration::from_secs(10), ended).await.expect("given up").expect("no panic");
        // What was on its way arrives; the rest does not.
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer).await;
        assert!(answer.len() < LARGE, "{}", answer.len());
    }

    #[tokio::test]
    async fn a_client_that_takes_its_time_gets_everything() {
        let (mut client, ended) = connect(LARGE, Duration::from_millis(500)).await;
        let (mut answer, mut buffer) = (0, vec![0; 4 << 20]);
        loop {
            match client.read(&mut buffer).await.expect("connected") {
                0 => break,
                bytes => answer += bytes,
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(answer > LARGE, "{answer}");
        ended.await.expect("no panic");
    }

    #[tokio::test]
    async fn more_connections_than_the_limit_wait_and_are_then_served() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        let serving = tokio::spawn(async move { serve(listener, answers_with(1), 2, &stopping).await });
        let mut first = TcpStream::connect(address).await.expect("connected");
        let _second = TcpStream::connect(address).await.expect("connected");
        let mut third = TcpStream::connect(address).await.expect("connected");
        third.write_all(REQUEST).await.expect("sent");
        let mut answer = Vec::new();
        let early = tokio::time::timeout(Duration::from_millis(300), third.read_to_end(&mut answer)).await;
        assert!(early.is_err(), "the third connection was served beside two others");
        first.write_all(REQUEST).await.expect("sent");
        first.read_to_end(&mut Vec::new()).await.expect("the first is served");
        drop(first);
        let late = tokio::time::timeout(Duration::from_secs(10), third.read_to_end(&mut answer)).await;
        late.expect("the third is served once another has ended").expect("connected");
        assert!(answer.starts_with(b"HTTP/1.1 200 OK"));
        stop.cancel();
        serving.await.expect("no panic");
    }
}
