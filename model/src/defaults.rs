//! Column defaults: a literal or one of a closed list of functions.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::types::ColumnType;
use crate::value::Value;

/// The value that a row gets for a column that it does not name. Stored as its text plus the column's type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", content = "text", rename_all = "camelCase")]
pub enum DefaultExpr {
    /// A literal, already of the column's type.
    Literal(LiteralDefault),
    /// A call without arguments.
    Call(DefaultCall),
}

/// A literal default with the text that it was declared as.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "(String, ColumnType)", into = "(String, ColumnType)")]
pub struct LiteralDefault {
    text: String,
    ty: ColumnType,
    value: Value,
}

/// A function that makes a default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DefaultCall {
    /// The statement's time: TIMESTAMP, DATE or TIME.
    #[serde(rename = "NOW()")]
    Now,
    /// A rising 64-bit id: BIGINT.
    #[serde(rename = "SNOWFLAKE_ID()")]
    SnowflakeId,
    /// A time-ordered UUID: UUID or TEXT.
    #[serde(rename = "UUID_V7()")]
    UuidV7,
    /// A time-ordered text id: TEXT.
    #[serde(rename = "ULID()")]
    Ulid,
    /// The caller: TEXT.
    #[serde(rename = "CURRENT_USER()")]
    CurrentUser,
}

impl DefaultCall {
    const ALL: [Self; 5] = [Self::Now, Self::SnowflakeId, Self::UuidV7, Self::Ulid, Self::CurrentUser];

    /// The call as SQL writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Now => "NOW()",
            Self::SnowflakeId => "SNOWFLAKE_ID()",
            Self::UuidV7 => "UUID_V7()",
            Self::Ulid => "ULID()",
            Self::CurrentUser => "CURRENT_USER()",
        }
    }

    /// The function of that name, in any case, with or without parentheses.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        let name = name.trim().trim_end_matches("()").trim_end().to_ascii_uppercase();
        Self::ALL.into_iter().find(|call| call.as_str().trim_end_matches("()") == name)
    }

    /// Whether its result fits a column of type `ty`.
    #[must_use]
    pub const fn fits(self, ty: &ColumnType) -> bool {
        match self {
            Self::Now => matches!(ty, ColumnType::Timestamp | ColumnType::Date | ColumnType::Time),
            Self::SnowflakeId => matches!(ty, ColumnType::BigInt),
            Self::UuidV7 => matches!(ty, ColumnType::Uuid | ColumnType::Text),
            Self::Ulid | Self::CurrentUser => matches!(ty, ColumnType::Text),
        }
    }

    /// Whether each call gives a key that is new and above all earlier ones of this pod.
    #[must_use]
    pub const fn rises(self) -> bool {
        matches!(self, Self::SnowflakeId)
    }
}

impl DefaultExpr {
    /// Parses a declared default for a column of type `ty`: a call, `NULL` (refused: leave the default out), a quoted
    /// SQL string, or a bare number, boolean or text.
    ///
    /// # Errors
    /// Says what does not fit, for people.
    pub fn parse(text: &str, ty: &ColumnType) -> Result<Self, String> {
        let trimmed = text.trim();
        if trimmed.ends_with("()") {
            let call = DefaultCall::by_name(trimmed).ok_or_else(|| {
                let known = DefaultCall::ALL.map(DefaultCall::as_str).join(", ");
                format!("unknown function `{trimmed}`; use a literal or one of {known}")
            })?;
            return if call.fits(ty) {
                Ok(Self::Call(call))
            } else {
                Err(format!("`{}` gives no {ty}", call.as_str()))
            };
        }
        if trimmed.eq_ignore_ascii_case("null") {
            return Err("a default of NULL is what a nullable column has anyway; leave it out".to_owned());
        }
        LiteralDefault::try_from((text.to_owned(), ty.clone())).map(Self::Literal)
    }

    /// The value, if it is the same for every row.
    #[must_use]
    pub fn literal(&self) -> Option<&Value> {
        match self {
            Self::Literal(literal) => Some(&literal.value),
            Self::Call(_) => None,
        }
    }
}

impl TryFrom<(String, ColumnType)> for LiteralDefault {
    type Error = String;

    fn try_from((text, ty): (String, ColumnType)) -> Result<Self, String> {
        let inner = text.trim();
        let unquoted = match inner.strip_prefix('\'').and_then(|rest| rest.strip_suffix('\'')) {
            Some(quoted) => quoted.replace("''", "'"),
            None => inner.to_owned(),
        };
        let value = Value::from_text(&unquoted, &ty).map_err(|error| error.to_string())?;
        Ok(Self { text, ty, value })
    }
}

impl From<LiteralDefault> for (String, ColumnType) {
    fn from(literal: LiteralDefault) -> Self {
        (literal.text, literal.ty)
    }
}

impl fmt::Display for DefaultExpr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Literal(literal) => f.write_str(&literal.text),
            Self::Call(call) => f.write_str(call.as_str()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_parse_by_type_and_read_back_from_json() {
        for (text, ty) in [
            ("SNOWFLAKE_ID()", ColumnType::BigInt),
            ("now()", ColumnType::Timestamp),
            ("'it''s'", ColumnType::Text),
            ("7", ColumnType::Int),
            ("1.50", ColumnType::Decimal { precision: 6, scale: 2 }),
            ("true", ColumnType::Boolean),
        ] {
            let parsed = DefaultExpr::parse(text, &ty).expect(text);
            let json = serde_json::to_string(&parsed).expect("json");
            assert_eq!(serde_json::from_str::<DefaultExpr>(&json).expect("json"), parsed, "{json}");
        }
        assert_eq!(
            DefaultExpr::parse("'it''s'", &ColumnType::Text).expect("text").literal(),
            Some(&Value::Text("it's".into()))
        );
    }

    #[test]
    fn a_default_that_does_not_fit_is_refused() {
        assert!(DefaultExpr::parse("SNOWFLAKE_ID()", &ColumnType::Text).is_err());
        assert!(DefaultExpr::parse("RANDOM()", &ColumnType::Double).expect_err("unknown").contains("NOW()"));
        assert!(DefaultExpr::parse("abc", &ColumnType::Int).is_err());
        assert!(DefaultExpr::parse("NULL", &ColumnType::Int).is_err());
    }
}
