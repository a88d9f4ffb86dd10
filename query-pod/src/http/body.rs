//! Answers on their way to the client. What a client has not taken yet stays in memory, so it stays counted: every piece
//! gives back what it holds when its last byte is sent, or when the connection ends.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use kalamdb_model::UserId;

use crate::error::{ApiError, Kind};
use crate::shares::{Full, Share, Shares};

/// How long an answer waits for room.
const ROOM_WAIT: Duration = Duration::from_secs(2);

/// Where the bytes of one user's answers are counted.
pub struct Room {
    bytes: Arc<Shares>,
    user: UserId,
}

impl Room {
    /// `user`'s part of `bytes`, the room of all answers.
    #[must_use]
    pub const fn new(bytes: Arc<Shares>, user: UserId) -> Self {
        Self { bytes, user }
    }

    /// Room for `bytes` more.
    ///
    /// # Errors
    /// 429 if there is none within two seconds.
    pub(super) async fn take(&self, bytes: usize) -> Result<Share, ApiError> {
        let count = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.bytes.take(&self.user, count, ROOM_WAIT).await.map_err(|full| {
            let (whose, most) = match full {
                Full::User(most) => ("of one user", most),
                Full::All(most) => ("of all users", most),
            };
            let message =
                format!("answers {whose} may hold {most} bytes until they are read, and there is no room; try again");
            ApiError::new(Kind::Busy, "ANSWERS_BUSY", message)
        })
    }
}

/// A piece of a body that keeps `held` until it is sent or dropped.
pub(super) fn piece<T: Send + 'static>(text: String, held: T) -> Bytes {
    Bytes::from_owner(Held { text, _until_sent: held })
}

struct Held<T> {
    text: String,
    _until_sent: T,
}

impl<T> AsRef<[u8]> for Held<T> {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

/// A body of these pieces. hyper takes the next ones when it has sent some, and copies none.
pub(super) fn body(pieces: impl Into<VecDeque<Bytes>>) -> Body {
    let pieces = pieces.into();
    let left = pieces.iter().map(|piece| piece.len() as u64).sum();
    Body::new(Pieces { pieces, left })
}

struct Pieces {
    pieces: VecDeque<Bytes>,
    left: u64,
}

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.pieces.pop_front();
        self.left -= piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
