//! Why a value does not fit its column.

/// A value that does not fit a type. `Display` never holds more than the first 64 characters of the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not of this type at all.
    #[error("expected {expected}, got {got}")]
    Mismatch {
        /// What the type takes.
        expected: String,
        /// What came, shortened.
        got: String,
    },
    /// Of this type, but too large, too small or too precise.
    #[error("{got} is out of range for {expected}")]
    Range {
        /// The type.
        expected: String,
        /// What came, shortened.
        got: String,
    },
}

impl ValueError {
    /// `got` is no `expected`.
    #[must_use]
    pub fn mismatch(expected: impl ToString, got: &str) -> Self {
        Self::Mismatch { expected: expected.to_string(), got: shorten(got) }
    }

    /// `got` does not fit `expected`.
    #[must_use]
    pub fn range(expected: impl ToString, got: &str) -> Self {
        Self::Range { expected: expected.to_string(), got: shorten(got) }
    }
}

/// Quotes at most 64 characters: an error must not carry a megabyte back.
fn shorten(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("`{}…`", &text[..end]),
        None => format!("`{text}`"),
    }
}
