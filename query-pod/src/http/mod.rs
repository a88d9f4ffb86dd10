//! HTTP: `POST /v1/api/sql` with its envelope, and the endpoints that Kubernetes asks.

mod body;
pub mod encode;

pub use body::Room;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request as HttpRequest, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::auth::{Identity, Tokens};
use crate::error::{ApiError, Kind};
use crate::metrics::Metrics;
use crate::shares::{Full, Share, Shares};
use crate::sql::{Request, Sql};
use encode::Answer;

/// What the handlers share.
pub struct Api {
    /// Runs statements.
    pub sql: Sql,
    /// Checks tokens.
    pub tokens: Tokens,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Largest request body, bytes.
    pub body_bytes_max: usize,
    /// One permit per request under way, until the last byte of its answer is sent.
    pub requests: Shares,
    /// Whether a catalog was loaded and the pod is not stopping.
    pub ready: watch::Receiver<bool>,
}

/// Longest time in which a client may send its body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// All routes.
pub fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/v1/api/sql", post(sql))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(|| async {
            answer(
                Err(ApiError::new(Kind::NotFound, "NOT_FOUND", "no such path; SQL goes to POST /v1/api/sql")),
                Duration::ZERO,
                None,
            )
        })
        .method_not_allowed_fallback(|| async {
            let error = ApiError::new(Kind::NotFound, "METHOD_NOT_ALLOWED", "this path takes another method");
            let mut response = answer(Err(error), Duration::ZERO, None);
            *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
            response
        })
        .with_state(api)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Statement<'a> {
    #[serde(borrow)]
    sql: Cow<'a, str>,
    #[serde(default, borrow)]
    params: Option<Params<'a>>,
    #[serde(default)]
    namespace_id: Option<String>,
}

/// Most parameters that are read at all: eight million small ones fit a body, and would take its size many times over.
const PARAMS_MAX: usize = 100_000;

struct Params<'a>(Vec<&'a RawValue>);

impl<'de: 'a, 'a> Deserialize<'de> for Params<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bounded;
        impl<'de> serde::de::Visitor<'de> for Bounded {
            type Value = Params<'de>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, "an array of at most {PARAMS_MAX} parameters")
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut items: A) -> Result<Params<'de>, A::Error> {
                let mut params = Vec::new();
                while let Some(item) = items.next_element()? {
                    if params.len() == PARAMS_MAX {
                        return Err(serde::de::Error::invalid_length(PARAMS_MAX + 1, &self));
                    }
                    params.push(item);
                }
                Ok(Params(params))
            }
        }
        deserializer.deserialize_seq(Bounded)
    }
}

async fn sql(State(api): State<Arc<Api>>, request: HttpRequest) -> Response {
    let started = Instant::now();
    let (outcome, place) = match admit(&api, request.headers()).await {
        Ok((identity, place)) => (handle(&api, identity, request).await, Some(place)),
        Err(error) => (Err(error), None),
    };
    if let Err(error) = &outcome {
        api.metrics.failed(error.kind);
    }
    api.metrics.statement_seconds.observe(started.elapsed().as_secs_f64());
    answer(outcome, started.elapsed(), place)
}

/// Who asks, and his place among the requests under way.
async fn admit(api: &Api, headers: &HeaderMap) -> Result<(Identity, Share), ApiError> {
    let authorization = headers.get(header::AUTHORIZATION).map(HeaderValue::to_str);
    let authorization = authorization.transpose().map_err(|_| {
        ApiError::new(Kind::Unauthenticated, "UNAUTHENTICATED", "the Authorization header is not plain text")
    })?;
    // Identity first: nothing of a request is read before it is known whose it is.
    let identity = api.tokens.identify(authorization)?;
    let place = api.requests.take(&identity.user, 1, Duration::ZERO).await.map_err(|full| {
        let message = match full {
            Full::User(most) => format!("at most {most} requests of one user are taken at once; try again"),
            Full::All(most) => format!("{most} requests are under way on this pod already; try again"),
        };
        ApiError::new(Kind::Busy, "TOO_MANY_REQUESTS", message)
    })?;
    Ok((identity, place))
}

async fn handle(api: &Arc<Api>, identity: Identity, request: HttpRequest) -> Result<Answer, ApiError> {
    let body = read_body(request.into_body(), api.body_bytes_max).await?;
    let api = Arc::clone(api);
    // Ends with the request: a client that hangs up takes its query with it. A write goes on (`Sql::insert`).
    let run = AbortOnDropHandle::new(tokio::spawn(async move {
        let statement: Statement<'_> = serde_json::from_slice(&body).map_err(|error| {
            ApiError::invalid(
                "INVALID_REQUEST",
                format!("the body is not {{\"sql\", \"params\", \"namespace_id\"}}: {error}"),
            )
        })?;
        let request = Request {
            identity: &identity,
            sql: &statement.sql,
            params: statement.params.as_ref().map_or(&[], |params| &params.0),
            namespace: statement.namespace_id.as_deref(),
        };
        api.sql.run(&request).await
    }));
    run.await.map_err(|error| ApiError::internal(&error))?
}

async fn read_body(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    use http_body_util::{BodyExt as _, Limited};
    let collected = match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, limit).collect()).await {
        Ok(collected) => collected,
        Err(_) => {
            let message = format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs());
            return Err(ApiError::invalid("INVALID_REQUEST", message));
        }
    };
    match collected {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.downcast_ref::<http_body_util::LengthLimitError>().is_some() => {
            let message = format!("the body is larger than {limit} bytes");
            Err(ApiError::new(Kind::TooLarge, "REQUEST_TOO_LARGE", message))
        }
        Err(_) => Err(ApiError::invalid("INVALID_REQUEST", "the body was cut off")),
    }
}

/// The envelope. `place` is kept until the client has it.
fn answer(outcome: Result<Answer, ApiError>, took: Duration, place: Option<Share>) -> Response {
    // Milliseconds, to the microsecond.
    let took_ms = f64::from(u32::try_from(took.as_micros()).unwrap_or(u32::MAX)) / 1_000.0;
    let (status, pieces) = match outcome {
        Ok(answer) => (StatusCode::OK, answer.into_pieces(took_ms, place)),
        Err(error) => {
            let described = serde_json::json!({"code": error.code, "message": error.message, "details": error.details});
            let text = format!(r#"{{"status":"error","results":[],"took":{took_ms:?},"error":{described}}}"#);
            (error.kind.status(), vec![body::piece(text, place)])
        }
    };
    let mut response = (status, [(header::CONTENT_TYPE, "application/json")], body::body(pieces)).into_response();
    if matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    if status == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// Fails when only a restart helps. It does not when the data is another's ([`crate::engine::Disowned`]): a new process
/// on the same folder has no more right to it.
async fn livez(State(api): State<Arc<Api>>) -> Response {
    if api.sql.engine().is_broken() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the disk failed a write; restart\n").into_response();
    }
    "ok\n".into_response()
}

async fn readyz(State(api): State<Arc<Api>>) -> Response {
    if !*api.ready.borrow() {
        return (StatusCode::SERVICE_UNAVAILABLE, "no catalog yet, or stopping\n").into_response();
    }
    if api.sql.engine().is_broken() {
        return (StatusCode::SERVICE_UNAVAILABLE, "the disk failed a write; restart\n").into_response();
    }
    if let Some(reason) = api.sql.engine().disowned() {
        return (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response();
    }
    "ok\n".into_response()
}

async fn metrics(State(api): State<Arc<Api>>) -> Response {
    let memory = api.sql.query_memory_bytes();
    api.metrics.query_memory_bytes.set(i64::try_from(memory).unwrap_or(i64::MAX));
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], api.metrics.text())
        .into_response()
}
