//! What a client is told when a statement fails: few kinds, each with one HTTP status and a code for programs.

use http::StatusCode;

/// A failed statement.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// The kind; decides the HTTP status.
    pub kind: Kind,
    /// For programs: upper case, stable.
    pub code: &'static str,
    /// For people: what failed, on what, what to do.
    pub message: String,
    /// More for people, where there is more.
    pub details: Option<String>,
}

/// Kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Bad SQL or values.
    Invalid,
    /// No valid identity.
    Unauthenticated,
    /// A valid identity that may not.
    Forbidden,
    /// Something named does not exist.
    NotFound,
    /// Something named exists already.
    Conflict,
    /// Over a size limit.
    TooLarge,
    /// Over a rate or concurrency limit; try again.
    Busy,
    /// A part that we need is down; try again.
    Unavailable,
    /// Our own fault.
    Internal,
}

impl Kind {
    /// The HTTP status.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Self::Invalid => StatusCode::BAD_REQUEST,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Conflict => StatusCode::CONFLICT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Busy => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl ApiError {
    /// An error of `kind`.
    pub fn new(kind: Kind, code: &'static str, message: impl Into<String>) -> Self {
        Self { kind, code, message: message.into(), details: None }
    }

    /// Adds details.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = Some(details.into());
        self
    }

    /// Bad SQL or values.
    pub fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, code, message)
    }

    /// A part that we need is down.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Kind::Unavailable, code, message)
    }

    /// Our own fault: the cause goes to the log under an id, the client gets only the id.
    pub fn internal(error: &dyn std::error::Error) -> Self {
        let id = ulid::Ulid::generate();
        tracing::error!(query_id = %id, error = %Chain(error), "statement failed by our own fault");
        Self::new(Kind::Internal, "INTERNAL", format!("internal error, request id {id}"))
    }
}

/// Prints an error with all its causes, for logs.
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
