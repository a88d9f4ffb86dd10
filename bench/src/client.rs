//! One statement over HTTP, with patience: busy and unreachable servers are asked again, for a bounded time.
//!
//! Repeating is safe for what this program sends: reads, flushes, deletes, and inserts that bring their own keys, where a
//! repeat of something that did happen is a 409 `DUPLICATE_KEY`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use reqwest::header::RETRY_AFTER;
use serde::Deserialize;
use serde_json::Value;

/// Longest wait that a server's `Retry-After` is granted, and the wait where it names none.
const WAIT_MAX: Duration = Duration::from_secs(10);
const WAIT: Duration = Duration::from_secs(1);
/// Longest run of one request. Flushes of everybody are the longest.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(180);

/// A server.
pub struct Client {
    http: reqwest::Client,
    url: String,
    patience: Duration,
    repeated: AtomicU64,
}

/// The answer to a statement.
#[derive(Debug, Deserialize)]
pub struct Answer {
    /// Rows, values in the order of the columns.
    pub rows: Vec<Vec<Value>>,
    /// Rows returned or affected.
    pub row_count: u64,
}

/// A statement without an answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The server said no.
    #[error("{status}, {code}: {message}")]
    Refused {
        /// HTTP status.
        status: StatusCode,
        /// For programs.
        code: String,
        /// For people.
        message: String,
    },
    /// There was no answer.
    #[error("no answer from `{url}`")]
    Unreachable {
        /// Where we asked.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The answer is not the envelope that was agreed on.
    #[error("the answer ({status}) is not the envelope of `POST /v1/api/sql`: {text}")]
    Malformed {
        /// HTTP status.
        status: StatusCode,
        /// The start of the answer.
        text: String,
    },
}

impl Failure {
    /// Whether the server refused with `code`.
    pub fn is(&self, code: &str) -> bool {
        matches!(self, Self::Refused { code: given, .. } if given == code)
    }
}

#[derive(Deserialize)]
struct Envelope {
    results: Vec<Answer>,
    error: Option<Described>,
}

#[derive(Deserialize)]
struct Described {
    code: String,
    message: String,
}

impl Client {
    /// A client of the server at `url`, which asks again for up to `patience` when the server is busy or away.
    ///
    /// # Errors
    /// If the HTTP client cannot be set up.
    pub fn new(url: &str, patience: Duration) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder().timeout(REQUEST_TIMEOUT).tcp_nodelay(true).no_proxy().build()?;
        Ok(Self { http, url: url.trim_end_matches('/').to_owned(), patience, repeated: AtomicU64::new(0) })
    }

    /// The server's address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// How many requests were sent again so far.
    pub fn repeated(&self) -> u64 {
        self.repeated.load(Ordering::Relaxed)
    }

    /// Whether the server says that it is ready.
    pub async fn is_ready(&self) -> bool {
        let request = self.http.get(format!("{}/readyz", self.url)).timeout(WAIT);
        request.send().await.is_ok_and(|response| response.status() == StatusCode::OK)
    }

    /// Runs `sql` as the user whom `token` proves.
    ///
    /// # Errors
    /// What the server said, or that it did not answer for as long as this client is patient.
    pub async fn sql(&self, token: &str, sql: &str, params: &[Value]) -> Result<Answer, Failure> {
        let body = serde_json::json!({"sql": sql, "params": params}).to_string();
        let started = Instant::now();
        loop {
            let (failure, wait) = match self.once(token, body.clone()).await {
                Ok(answer) => return Ok(answer),
                Err((failure, Some(wait))) if started.elapsed() + wait <= self.patience => (failure, wait),
                Err((failure, _)) => return Err(failure),
            };
            drop(failure);
            self.repeated.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(wait).await;
        }
    }

    /// One try; with its failure comes how long to wait before another may help.
    async fn once(&self, token: &str, body: String) -> Result<Answer, (Failure, Option<Duration>)> {
        let unreachable = |source| (Failure::Unreachable { url: self.url.clone(), source }, Some(WAIT));
        let request = self.http.post(format!("{}/v1/api/sql", self.url)).bearer_auth(token);
        let request = request.header(reqwest::header::CONTENT_TYPE, "application/json").body(body);
        let response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let wait = wait_of(&response);
        let bytes = response.bytes().await.map_err(unreachable)?;
        read_envelope(status, &bytes).map_err(|failure| (failure, wait))
    }
}

fn wait_of(response: &reqwest::Response) -> Option<Duration> {
    if !matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        return None;
    }
    let named = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Some(named.map_or(WAIT, Duration::from_secs).clamp(Duration::from_millis(100), WAIT_MAX))
}

fn read_envelope(status: StatusCode, bytes: &[u8]) -> Result<Answer, Failure> {
    let malformed = || Failure::Malformed { status, text: String::from_utf8_lossy(bytes).chars().take(200).collect() };
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(|_| malformed())?;
    match (envelope.error, envelope.results.into_iter().next()) {
        (Some(error), _) => Err(Failure::Refused { status, code: error.code, message: error.message }),
        (None, Some(answer)) if status == StatusCode::OK => Ok(answer),
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_rows_or_a_refusal_and_never_a_guess() {
        let ok = br#"{"status":"success","results":[{"schema":[],"rows":[["1"]],"row_count":1,"message":null}],"took":0.1,"error":null}"#;
        assert_eq!(read_envelope(StatusCode::OK, ok).unwrap().rows, vec![vec![Value::from("1")]]);
        let conflict = br#"{"status":"error","results":[],"took":0.1,"error":{"code":"DUPLICATE_KEY","message":"m","details":null}}"#;
        assert!(read_envelope(StatusCode::CONFLICT, conflict).unwrap_err().is("DUPLICATE_KEY"));
        for odd in [&b"<html>"[..], br#"{"results":[],"error":null}"#] {
            assert!(matches!(read_envelope(StatusCode::OK, odd), Err(Failure::Malformed { .. })));
        }
    }
}
