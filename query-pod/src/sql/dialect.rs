//! The dialect that statements are written in: PostgreSQL's, but for these things.
//!
//! - `CURRENT_USER()` may have parentheses, as the other functions without arguments have.
//! - The name of a named argument (`f(name => 1)`) is an identifier. PostgreSQL's is any expression, for which the parser
//!   reads each argument twice, and `f(f(f(…)))` 2ⁿ times.
//! - What begins with the name of a function of special syntax and `(` is that function: `CAST(1 +` is an error. The parser
//!   would read it a second time as a function of that name, and `CAST(CAST(CAST(1 +` 2ⁿ times.
//! - Wherever else the parser goes back and reads again, it may do so only so often for so many tokens.

use std::any::TypeId;
use std::cell::Cell;

use datafusion::sql::sqlparser::ast::{Expr, Function, FunctionArguments, ObjectName};
use datafusion::sql::sqlparser::dialect::{Dialect, PostgreSqlDialect, Precedence};
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::parser::{Parser, ParserError};
use datafusion::sql::sqlparser::tokenizer::Token;

/// The dialect, for one statement.
#[derive(Debug)]
pub(super) struct KalamDialect {
    /// Expressions that may still be begun.
    budget: Cell<usize>,
}

/// How often an expression may begin at one token: several times as often as in any statement that is not made for it.
const READS_MAX: usize = 16;

impl KalamDialect {
    /// For a statement of `tokens` tokens, as many as its bytes at most.
    pub(super) const fn new(tokens: usize) -> Self {
        Self { budget: Cell::new(tokens.saturating_mul(READS_MAX)) }
    }
}

const BASE: PostgreSqlDialect = PostgreSqlDialect {};

/// What of [`PostgreSqlDialect`] statements other than queries and INSERT need is left out.
impl Dialect for KalamDialect {
    fn dialect(&self) -> TypeId {
        // The parser asks for the type where it has no method to ask.
        TypeId::of::<PostgreSqlDialect>()
    }

    fn is_delimited_identifier_start(&self, ch: char) -> bool {
        BASE.is_delimited_identifier_start(ch)
    }

    fn is_identifier_start(&self, ch: char) -> bool {
        BASE.is_identifier_start(ch)
    }

    fn is_identifier_part(&self, ch: char) -> bool {
        BASE.is_identifier_part(ch)
    }

    fn is_reserved_for_identifier(&self, keyword: Keyword) -> bool {
        let function = SPECIAL_FUNCTIONS.contains(&keyword) || matches!(keyword, Keyword::CASE | Keyword::ARRAY);
        function || BASE.is_reserved_for_identifier(keyword)
    }

    fn is_custom_operator_part(&self, ch: char) -> bool {
        BASE.is_custom_operator_part(ch)
    }

    fn get_next_precedence(&self, parser: &Parser) -> Option<Result<u8, ParserError>> {
        BASE.get_next_precedence(parser)
    }

    fn prec_value(&self, precedence: Precedence) -> u8 {
        BASE.prec_value(precedence)
    }

    fn parse_prefix(&self, parser: &mut Parser) -> Option<Result<Expr, ParserError>> {
        match self.budget.get().checked_sub(1) {
            Some(rest) => self.budget.set(rest),
            // The one error that the parser does not answer with another attempt.
            None => return Some(Err(ParserError::RecursionLimitExceeded)),
        }
        current_user(parser).or_else(|| plain_name(parser).map(Ok))
    }

    fn supports_unicode_string_literal(&self) -> bool {
        BASE.supports_unicode_string_literal()
    }

    fn supports_string_escape_constant(&self) -> bool {
        BASE.supports_string_escape_constant()
    }

    fn supports_numeric_literal_underscores(&self) -> bool {
        BASE.supports_numeric_literal_underscores()
    }

    fn supports_nested_comments(&self) -> bool {
        BASE.supports_nested_comments()
    }

    fn supports_filter_during_aggregation(&self) -> bool {
        BASE.supports_filter_during_aggregation()
    }

    fn supports_group_by_expr(&self) -> bool {
        BASE.supports_group_by_expr()
    }

    fn supports_bitwise_shift_operators(&self) -> bool {
        BASE.supports_bitwise_shift_operators()
    }

    fn supports_notnull_operator(&self) -> bool {
        BASE.supports_notnull_operator()
    }

    fn supports_array_typedef_with_brackets(&self) -> bool {
        BASE.supports_array_typedef_with_brackets()
    }

    fn supports_comma_separated_trim(&self) -> bool {
        BASE.supports_comma_separated_trim()
    }

    fn allow_extract_custom(&self) -> bool {
        BASE.allow_extract_custom()
    }

    fn allow_extract_single_quotes(&self) -> bool {
        BASE.allow_extract_single_quotes()
    }
}

/// Functions whose arguments have words between them, as in `CAST(1 AS INT)`.
const SPECIAL_FUNCTIONS: [Keyword; 13] = [
    Keyword::CAST,
    Keyword::CEIL,
    Keyword::CONVERT,
    Keyword::EXTRACT,
    Keyword::FLOOR,
    Keyword::OVERLAY,
    Keyword::POSITION,
    Keyword::SAFE_CAST,
    Keyword::SUBSTR,
    Keyword::SUBSTRING,
    Keyword::TRIM,
    Keyword::TRY_CAST,
    Keyword::TRY_CONVERT,
];

/// The name of such a function without `(`: a column of that name.
fn plain_name(parser: &mut Parser) -> Option<Expr> {
    let token = parser.peek_token();
    let Token::Word(word) = token.token else { return None };
    let is_function = parser.peek_nth_token(1).token == Token::LParen;
    if is_function || word.quote_style.is_some() || !SPECIAL_FUNCTIONS.contains(&word.keyword) {
        return None;
    }
    parser.advance_token();
    Some(Expr::Identifier(word.to_ident(token.span)))
}

/// `CURRENT_USER`, with or without parentheses.
fn current_user(parser: &mut Parser) -> Option<Result<Expr, ParserError>> {
    let token = parser.peek_token();
    let name = match token.token {
        Token::Word(word) if word.keyword == Keyword::CURRENT_USER && word.quote_style.is_none() => {
            word.to_ident(token.span)
        }
        _ => return None,
    };
    parser.advance_token();
    if parser.consume_token(&Token::LParen)
        && let Err(error) = parser.expect_token(&Token::RParen)
    {
        return Some(Err(error));
    }
    Some(Ok(Expr::Function(Function {
        name: ObjectName::from(vec![name]),
        uses_odbc_syntax: false,
        parameters: FunctionArguments::None,
        args: FunctionArguments::None,
        filter: None,
        null_treatment: None,
        over: None,
        within_group: Vec::new(),
    })))
}
