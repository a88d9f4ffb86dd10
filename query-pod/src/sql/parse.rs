//! The allow-list: which statements are taken at all. What is not listed here does not reach DataFusion.

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    self, DuplicateTreatment, Expr, FunctionArg, FunctionArgExpr, FunctionArguments, Join, JoinConstraint, ObjectName,
    ObjectNamePart, Query, SetExpr, TableFactor, Visit, Visitor,
};
use datafusion::sql::sqlparser::keywords::Keyword;
use datafusion::sql::sqlparser::parser::Parser;
use datafusion::sql::sqlparser::tokenizer::{Token, TokenWithSpan, Tokenizer};
use kalamdb_model::{SqlName, TableName};

use super::dialect::KalamDialect;
use super::parse_dml::{self, Delete, Insert, Update};
use super::{rewrite, unfolding, wildcard};
use crate::error::ApiError;

/// A statement that is taken.
#[derive(Debug)]
pub enum Statement {
    /// A query, or EXPLAIN of one.
    Query(Box<QueryStatement>),
    /// `INSERT INTO t …`.
    Insert(Box<Insert>),
    /// `UPDATE t SET …`.
    Update(Box<Update>),
    /// `DELETE FROM t …`.
    Delete(Box<Delete>),
    /// `STORAGE FLUSH TABLE t`.
    Flush(TableRef),
    /// `STORAGE COMPACT TABLE t`.
    Compact(TableRef),
    /// `CANCEL JOB 'id'`.
    CancelJob(String),
}

/// A query with how it is to be answered.
#[derive(Debug)]
pub struct QueryStatement {
    /// The statement for DataFusion: a query, or EXPLAIN of one.
    pub statement: ast::Statement,
    /// Whether any identifier in it is the name of a system column.
    pub names_system_columns: bool,
}

/// A table as a statement names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableRef(Vec<String>);

/// Table functions that are safe: they read nothing.
pub const TABLE_FUNCTIONS: [&str; 3] = ["generate_series", "range", "unnest"];

/// Most operators and keywords between two commas on one level of parentheses.
const CHAIN_MAX: usize = 1_000;

/// Longest name in a statement, characters: twice what a name of a table or column may have.
pub(super) const NAME_CHARS_MAX: usize = 128;

/// Most opening parentheses in a row: in FROM the parser reads what is inside twice on each level.
const PARENTHESES_MAX: usize = 16;

/// Deepest nesting of a statement; the parser's own stack is bounded by it.
const DEPTH_MAX: usize = 64;

impl TableRef {
    /// As the statement wrote it, unquoted parts in lower case.
    pub(super) fn joined(self) -> String {
        self.0.join(".")
    }

    /// The full name, with `namespace` where the statement has none.
    ///
    /// # Errors
    /// If there are too many parts, or a part is no name.
    pub fn qualified(&self, namespace: Option<&str>) -> Result<TableName, ApiError> {
        let invalid = |message: String| ApiError::invalid("INVALID_TABLE_NAME", message);
        let name = |part: &str| SqlName::new(part).map_err(|error| invalid(error.to_string()));
        match (self.0.as_slice(), namespace) {
            ([namespace, table], _) => Ok(TableName { namespace: name(namespace)?, table: name(table)? }),
            ([table], Some(namespace)) => Ok(TableName { namespace: name(namespace)?, table: name(table)? }),
            ([table], None) => {
                Err(invalid(format!("`{table}` has no namespace; write `namespace.{table}` or send `namespace_id`")))
            }
            _ => Err(invalid(format!("`{}` is not `namespace.table`", self.0.join(".")))),
        }
    }
}

/// Parses `sql`: exactly one statement of an allowed kind.
///
/// # Errors
/// 400 with the position of a syntax error, or what is not taken and what is.
pub fn parse(sql: &str) -> Result<Statement, ApiError> {
    let dialect = KalamDialect::new(sql.len());
    let tokens = Tokenizer::new(&dialect, sql)
        .tokenize_with_location()
        .map_err(|error| ApiError::invalid("SYNTAX_ERROR", shorten(&error.to_string())))?;
    check_names(&tokens)?;
    check_chains(&tokens)?;
    let mut parser = Parser::new(&dialect).with_recursion_limit(DEPTH_MAX).with_tokens_with_locations(tokens);
    if let Some(statement) = command(&mut parser)? {
        return Ok(statement);
    }
    let statements = {
        let mut statements = Vec::new();
        loop {
            while parser.consume_token(&Token::SemiColon) {}
            if matches!(parser.peek_token().token, Token::EOF) {
                break;
            }
            statements.push(parser.parse_statement().map_err(syntax)?);
            if !matches!(parser.peek_token().token, Token::EOF | Token::SemiColon) {
                return Err(syntax_at(&parser, "expected the end of the statement"));
            }
        }
        statements
    };
    let mut statements = statements.into_iter();
    match (statements.next(), statements.next()) {
        (None, _) => Err(ApiError::invalid("EMPTY_STATEMENT", "the statement is empty")),
        (Some(_), Some(_)) => {
            Err(ApiError::invalid("MULTIPLE_STATEMENTS", "send one statement at a time; a request is one commit"))
        }
        (Some(statement), None) => allow(statement),
    }
}

/// Refuses names beyond [`NAME_CHARS_MAX`]: what looks for near ones takes as long as a name is.
fn check_names(tokens: &[TokenWithSpan]) -> Result<(), ApiError> {
    let name = |token: &TokenWithSpan| match &token.token {
        Token::Word(word) => check_name(&word.value),
        Token::Placeholder(name) => check_name(name),
        _ => Ok(()),
    };
    tokens.iter().try_for_each(name)
}

/// Refuses a name beyond [`NAME_CHARS_MAX`].
pub(super) fn check_name(name: &str) -> Result<(), ApiError> {
    if name.len() <= NAME_CHARS_MAX || name.chars().count() <= NAME_CHARS_MAX {
        return Ok(());
    }
    let start: String = name.chars().take(32).collect();
    let message = format!("a name has at most {NAME_CHARS_MAX} characters; `{start}…` has more");
    Err(ApiError::invalid("NAME_TOO_LONG", message))
}

/// A text in quotes stands for a table, too: `FROM 'name'`.
fn check_parts(name: &ObjectName) -> Result<(), ApiError> {
    name.0.iter().filter_map(ObjectNamePart::as_ident).try_for_each(|part| check_name(&part.value))
}

/// Refuses `1 + 1 + 1 + …` beyond [`CHAIN_MAX`]: the parser reads such a chain in a loop, but its tree is as deep as the
/// chain is long, and whatever walks or drops the tree recurses.
fn check_chains(tokens: &[TokenWithSpan]) -> Result<(), ApiError> {
    let mut levels = vec![0_usize];
    let mut opened = 0;
    for TokenWithSpan { token, span } in tokens {
        match token {
            Token::LParen => opened += 1,
            Token::Whitespace(_) => {}
            _ => opened = 0,
        }
        if opened > PARENTHESES_MAX {
            let message = format!("more than {PARENTHESES_MAX} opening parentheses in a row{}", span.start);
            return Err(ApiError::invalid("STATEMENT_TOO_DEEP", message));
        }
        match token {
            Token::Whitespace(_) => {}
            Token::LParen | Token::LBracket => levels.push(0),
            Token::RParen | Token::RBracket if levels.len() > 1 => {
                levels.pop();
            }
            Token::Comma | Token::SemiColon => {
                if let Some(level) = levels.last_mut() {
                    *level = 0;
                }
            }
            Token::Word(word) if word.keyword == Keyword::NoKeyword => {}
            Token::Number(..) | Token::SingleQuotedString(_) | Token::Placeholder(_) | Token::Period => {}
            _ => {
                if let Some(level) = levels.last_mut() {
                    *level += 1;
                    if *level > CHAIN_MAX {
                        let message =
                            format!("more than {CHAIN_MAX} operators in a row{}; use IN or split it", span.start);
                        return Err(ApiError::invalid("STATEMENT_TOO_DEEP", message));
                    }
                }
            }
        }
    }
    Ok(())
}

fn syntax(error: datafusion::sql::sqlparser::parser::ParserError) -> ApiError {
    use datafusion::sql::sqlparser::parser::ParserError;
    match error {
        ParserError::TokenizerError(message) | ParserError::ParserError(message) => {
            ApiError::invalid("SYNTAX_ERROR", shorten(&message))
        }
        ParserError::RecursionLimitExceeded => {
            ApiError::invalid("STATEMENT_TOO_DEEP", format!("the statement nests deeper than {DEPTH_MAX} levels"))
        }
    }
}

fn syntax_at(parser: &Parser<'_>, what: &str) -> ApiError {
    let token = parser.peek_token();
    let message = format!("{what}, found: {}{}", token.token, token.span.start);
    ApiError::invalid("SYNTAX_ERROR", shorten(&message))
}

/// A message quotes what was found; a megabyte of it helps nobody.
pub(super) fn shorten(message: &str) -> String {
    match message.char_indices().nth(400) {
        Some((end, _)) => format!("{}…", &message[..end]),
        None => message.to_owned(),
    }
}

/// `STORAGE FLUSH TABLE name`, `STORAGE COMPACT TABLE name` and `CANCEL JOB 'id'`, which the SQL parser does not know.
fn command(parser: &mut Parser<'_>) -> Result<Option<Statement>, ApiError> {
    let word = |parser: &mut Parser<'_>, wanted: &str| {
        let matches =
            matches!(&parser.peek_token().token, Token::Word(word) if word.value.eq_ignore_ascii_case(wanted));
        if matches {
            parser.advance_token();
        }
        matches
    };
    let end = |parser: &mut Parser<'_>, statement: Statement| {
        while parser.consume_token(&Token::SemiColon) {}
        if matches!(parser.peek_token().token, Token::EOF) {
            return Ok(Some(statement));
        }
        Err(syntax_at(parser, "expected the end of the statement"))
    };
    if word(parser, "CANCEL") {
        if !word(parser, "JOB") {
            return Err(syntax_at(parser, "expected `JOB 'id'`"));
        }
        return match parser.peek_token().token {
            Token::SingleQuotedString(id) => {
                parser.advance_token();
                end(parser, Statement::CancelJob(id))
            }
            _ => Err(syntax_at(parser, "expected the id of a job, in quotes")),
        };
    }
    if !word(parser, "STORAGE") {
        return Ok(None);
    }
    let statement = match (word(parser, "FLUSH"), word(parser, "COMPACT")) {
        (true, false) => Statement::Flush,
        (false, true) => Statement::Compact,
        _ => return Err(syntax_at(parser, "expected `FLUSH` or `COMPACT`")),
    };
    if !parser.parse_keyword(Keyword::TABLE) {
        return Err(syntax_at(parser, "expected `TABLE namespace.table`"));
    }
    let name = parser.parse_object_name(false).map_err(syntax)?;
    end(parser, statement(table_ref(&name)?))
}

pub(super) fn refuse<T>(what: impl std::fmt::Display) -> Result<T, ApiError> {
    Err(ApiError::invalid(
        "UNSUPPORTED_STATEMENT",
        format!(
            "{what} is not supported; use SELECT, EXPLAIN, INSERT, UPDATE, DELETE, STORAGE FLUSH TABLE, STORAGE COMPACT TABLE \
             or CANCEL JOB"
        ),
    ))
}

fn allow(statement: ast::Statement) -> Result<Statement, ApiError> {
    match statement {
        ast::Statement::Query(_) => query(statement).map(Box::new).map(Statement::Query),
        ast::Statement::Explain { statement: inner, analyze, verbose, format: None, options: None, .. } => {
            if !matches!(*inner, ast::Statement::Query(_)) {
                return refuse("EXPLAIN of anything but a query");
            }
            let explain = ast::Statement::Explain {
                describe_alias: ast::DescribeAlias::Explain,
                analyze,
                verbose,
                query_plan: false,
                estimate: false,
                statement: inner,
                format: None,
                options: None,
            };
            query(explain).map(Box::new).map(Statement::Query)
        }
        ast::Statement::Insert(_) | ast::Statement::Update(_) | ast::Statement::Delete(_) => writing(statement),
        other => refuse(format!("`{}`", kind_of(&other))),
    }
}

/// A statement that writes, after the checks of a query: what is in VALUES is computed without being planned as one.
fn writing(statement: ast::Statement) -> Result<Statement, ApiError> {
    check(&statement)?;
    match statement {
        ast::Statement::Insert(insert) => parse_dml::insert(insert).map(Box::new).map(Statement::Insert),
        ast::Statement::Update(update) => parse_dml::update(update).map(Box::new).map(Statement::Update),
        ast::Statement::Delete(delete) => parse_dml::delete(delete).map(Box::new).map(Statement::Delete),
        other => refuse(format!("`{}`", kind_of(&other))),
    }
}

/// The first words of a statement, without what it says: the text of an error must not grow with the statement.
fn kind_of(statement: &ast::Statement) -> String {
    let text = statement.to_string();
    let words: Vec<&str> = text.split_whitespace().take(2).collect();
    shorten(&words.join(" ").chars().take(40).collect::<String>())
}

/// Checks what is to be planned, at any depth.
pub(super) fn query(mut statement: ast::Statement) -> Result<QueryStatement, ApiError> {
    let names_system_columns = check(&statement)?;
    rewrite::query(&mut statement);
    Ok(QueryStatement { statement, names_system_columns })
}

/// Refuses what must not be planned, and tells whether a system column is named.
fn check(statement: &ast::Statement) -> Result<bool, ApiError> {
    let mut check = Check { names_system_columns: false, maps: 0 };
    if let ControlFlow::Break(error) = statement.visit(&mut check) {
        return Err(error);
    }
    unfolding::check(statement)?;
    Ok(check.names_system_columns)
}

/// Refuses what a query must not hold, at any depth.
struct Check {
    names_system_columns: bool,
    /// Calls of `map` around the one that is looked at.
    maps: usize,
}

/// Deepest nesting of calls of `map`: the planner plans its arguments twice, so ten deep it plans them 1,024 times.
const MAP_DEPTH_MAX: usize = 8;

/// Most grouping sets of one GROUP BY: each is computed on its own.
const GROUPING_SETS_MAX: usize = 1_024;

impl Check {
    fn note(&mut self, ident: &ast::Ident) {
        let is_system = kalamdb_model::names::SYSTEM_COLUMNS.iter().any(|name| ident.value.eq_ignore_ascii_case(name));
        self.names_system_columns |= is_system;
    }

    /// Columns of USING are names, and no expressions.
    fn note_joins(&mut self, joins: &[Join]) {
        for join in joins {
            if let Some(JoinConstraint::Using(columns)) = wildcard::constraint(&join.join_operator) {
                columns
                    .iter()
                    .flat_map(|name| &name.0)
                    .filter_map(ObjectNamePart::as_ident)
                    .for_each(|ident| self.note(ident));
            }
        }
    }
}

fn stop(what: impl std::fmt::Display) -> ControlFlow<ApiError> {
    match refuse::<()>(what) {
        Err(error) => ControlFlow::Break(error),
        Ok(()) => ControlFlow::Continue(()),
    }
}

impl Visitor for Check {
    type Break = ApiError;

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<ApiError> {
        if !query.locks.is_empty() || query.for_clause.is_some() {
            return stop("FOR UPDATE and its like");
        }
        if query.settings.is_some() || query.format_clause.is_some() || !query.pipe_operators.is_empty() {
            return stop("SETTINGS, FORMAT or a pipe in a query");
        }
        // The planner finds it for `a.b`, too, and what looks at statements before it does not.
        if query.with.iter().flat_map(|with| &with.cte_tables).any(|cte| cte.alias.name.value.contains('.')) {
            return stop("a dot in the name of a WITH");
        }
        match body(&query.body) {
            Some(what) => stop(what),
            None => ControlFlow::Continue(()),
        }
    }

    fn pre_visit_select(&mut self, select: &ast::Select) -> ControlFlow<ApiError> {
        if select.into.is_some() {
            return stop("SELECT INTO");
        }
        if grouping_sets(&select.group_by) > GROUPING_SETS_MAX {
            return too_deep(format!("GROUP BY has more than {GROUPING_SETS_MAX} grouping sets"));
        }
        select.from.iter().for_each(|item| self.note_joins(&item.joins));
        ControlFlow::Continue(())
    }

    fn pre_visit_relation(&mut self, relation: &ObjectName) -> ControlFlow<ApiError> {
        match check_parts(relation) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => ControlFlow::Break(error),
        }
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<ApiError> {
        let function = |name: &ObjectName| {
            let name = name.to_string().to_ascii_lowercase();
            if TABLE_FUNCTIONS.contains(&name.as_str()) {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(ApiError::invalid(
                    "UNSUPPORTED_FUNCTION",
                    format!(
                        "the table function `{}` is not supported; use {}",
                        shorten(&name),
                        TABLE_FUNCTIONS.join(", ")
                    ),
                ))
            }
        };
        if let TableFactor::NestedJoin { table_with_joins, .. } = factor {
            self.note_joins(&table_with_joins.joins);
        }
        match factor {
            TableFactor::Table { name, args: Some(_), .. } | TableFactor::Function { name, .. } => function(name),
            TableFactor::Table { version: None, json_path: None, sample: None, partitions, index_hints, .. }
                if partitions.is_empty() && index_hints.is_empty() =>
            {
                ControlFlow::Continue(())
            }
            TableFactor::Derived { sample: None, .. } | TableFactor::UNNEST { .. } | TableFactor::NestedJoin { .. } => {
                ControlFlow::Continue(())
            }
            _ => stop("this form of FROM"),
        }
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<ApiError> {
        match expr {
            Expr::Identifier(ident) => self.note(ident),
            Expr::CompoundIdentifier(idents) => idents.iter().for_each(|ident| self.note(ident)),
            Expr::Function(function) if miscounts(function) => {
                return stop("`*` as an argument beside DISTINCT or a table's name");
            }
            Expr::Function(function) if is_map(function) => {
                self.maps += 1;
                if self.maps > MAP_DEPTH_MAX {
                    return too_deep(format!("`map` nests deeper than {MAP_DEPTH_MAX} levels"));
                }
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn post_visit_expr(&mut self, expr: &Expr) -> ControlFlow<ApiError> {
        if matches!(expr, Expr::Function(function) if is_map(function)) {
            self.maps -= 1;
        }
        ControlFlow::Continue(())
    }
}

fn is_map(function: &ast::Function) -> bool {
    function.name.to_string().eq_ignore_ascii_case("map")
}

/// The planner takes `count(DISTINCT *)` for `count(DISTINCT 1)`, and `count(t.*)` for `count(*)`.
fn miscounts(function: &ast::Function) -> bool {
    let FunctionArguments::List(list) = &function.args else { return false };
    list.args.iter().any(|arg| {
        let (FunctionArg::Named { arg, .. } | FunctionArg::ExprNamed { arg, .. } | FunctionArg::Unnamed(arg)) = arg;
        match arg {
            FunctionArgExpr::Expr(_) => false,
            FunctionArgExpr::Wildcard => list.duplicate_treatment == Some(DuplicateTreatment::Distinct),
            FunctionArgExpr::QualifiedWildcard(_) | FunctionArgExpr::WildcardWithOptions(_) => true,
        }
    })
}

fn too_deep(message: String) -> ControlFlow<ApiError> {
    ControlFlow::Break(ApiError::invalid("STATEMENT_TOO_DEEP", message))
}

/// How many grouping sets `group_by` stands for.
fn grouping_sets(group_by: &ast::GroupByExpr) -> usize {
    let ast::GroupByExpr::Expressions(exprs, _) = group_by else { return 1 };
    let sets = exprs.iter().map(|expr| match expr {
        Expr::Cube(columns) => {
            1_usize.checked_shl(u32::try_from(columns.len()).unwrap_or(u32::MAX)).unwrap_or(usize::MAX)
        }
        Expr::Rollup(columns) => columns.len() + 1,
        Expr::GroupingSets(sets) => sets.len(),
        _ => 1,
    });
    sets.fold(1, usize::saturating_mul)
}

/// What of a query's body is not taken.
fn body(body: &SetExpr) -> Option<&'static str> {
    match body {
        SetExpr::Select(_) | SetExpr::Query(_) | SetExpr::Values(_) => None,
        SetExpr::SetOperation { left, right, .. } => self::body(left).or_else(|| self::body(right)),
        SetExpr::Insert(_) | SetExpr::Update(_) | SetExpr::Delete(_) | SetExpr::Merge(_) => {
            Some("a statement that writes inside a query")
        }
        SetExpr::Table(_) => Some("TABLE as a query"),
    }
}

pub(super) fn table_ref(name: &ObjectName) -> Result<TableRef, ApiError> {
    check_parts(name)?;
    let parts = name.0.iter().map(|part| match part {
        // Unquoted names are lower-cased, as everywhere in SQL.
        ObjectNamePart::Identifier(ident) if ident.quote_style.is_none() => Ok(ident.value.to_ascii_lowercase()),
        ObjectNamePart::Identifier(ident) => Ok(ident.value.clone()),
        ObjectNamePart::Function(_) => refuse("a function as a table name"),
    });
    parts.collect::<Result<_, _>>().map(TableRef)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(sql: &str) -> Option<&'static str> {
        parse(sql).err().map(|error| error.code)
    }

    #[test]
    fn what_is_not_listed_is_refused() {
        for sql in [
            "CREATE EXTERNAL TABLE t STORED AS PARQUET LOCATION '/etc/passwd'",
            "CREATE TABLE t (a INT)",
            "CREATE VIEW v AS SELECT 1",
            "CREATE FUNCTION f() RETURNS INT RETURN 1",
            "COPY t TO '/tmp/x'",
            "COPY t FROM '/etc/passwd'",
            "SET datafusion.execution.batch_size = 1",
            "SHOW ALL",
            "PREPARE p AS SELECT 1",
            "BEGIN",
            "DROP TABLE t",
            "UPDATE t SET a = 1 FROM u",
            "UPDATE t SET (a, b) = (1, 2)",
            "UPDATE t, u SET a = 1",
            "UPDATE t SET a = 1 ORDER BY b LIMIT 1",
            "DELETE FROM t USING u",
            "DELETE FROM t, u",
            "DELETE t FROM t JOIN u ON true",
            "MERGE INTO t USING u ON true WHEN MATCHED THEN DELETE",
            "REPLACE INTO t VALUES (1)",
            "TRUNCATE t",
            "WITH x AS (DELETE FROM t RETURNING *) SELECT * FROM x",
            "WITH x AS (INSERT INTO t VALUES (1) RETURNING *) SELECT * FROM x",
            "SELECT * INTO u FROM t",
            "SELECT * FROM t FOR UPDATE",
            "EXPLAIN INSERT INTO t VALUES (1)",
            "EXPLAIN DELETE FROM t",
            "INSERT INTO t SELECT * INTO v FROM u",
            "INSERT INTO t VALUES (1) ON CONFLICT DO UPDATE SET a = 1",
            "INSERT INTO t VALUES (1) ON CONFLICT (a) DO UPDATE SET b = _seq",
            "INSERT INTO t VALUES (1) ON CONFLICT (a) DO UPDATE SET b = 1 WHERE t._updated IS NULL",
            "INSERT INTO t VALUES (1) ON CONFLICT ON CONSTRAINT c DO NOTHING",
            "INSERT INTO t VALUES (1) RETURNING _seq + 1",
            "INSERT INTO t VALUES (1) RETURNING (t._updated)",
            "UPDATE t SET a = 1 RETURNING t._seq IN (SELECT 1)",
            "DELETE FROM t RETURNING other._seq",
            "DELETE FROM t RETURNING CASE WHEN _Deleted THEN 1 END",
            "DELETE FROM t RETURNING (WITH x AS (DELETE FROM t RETURNING *) SELECT 1 FROM x)",
            "ATTACH DATABASE 'x' AS y",
            "LOAD DATA INPATH 'x' INTO TABLE y",
            "TABLE t",
            "SELECT count(DISTINCT *) FROM t",
            "SELECT count(t.*) FROM t",
        ] {
            let error = parse(sql).expect_err(sql);
            assert!(matches!(error.code, "UNSUPPORTED_STATEMENT" | "SYNTAX_ERROR"), "{sql}: {error}");
        }
    }

    #[test]
    fn returning_and_upserts_take_system_columns_by_themselves_and_subqueries_with_theirs() {
        for sql in [
            "INSERT INTO t VALUES (1) RETURNING _seq, _UPDATED AS at, T.\"_deleted\", *",
            "DELETE FROM t AS x RETURNING x.*, X._seq",
            "UPDATE t SET a = 1 RETURNING a, (SELECT max(_seq) FROM t WHERE _deleted IS NOT NULL) + 1",
            "INSERT INTO t VALUES (1) ON CONFLICT (a) DO UPDATE SET b = (SELECT _seq FROM u) WHERE EXISTS (SELECT 1)",
        ] {
            assert_eq!(code(sql), None, "{sql}");
        }
        for sql in [
            "DELETE FROM t RETURNING (SELECT * FROM read_csv('x'))",
            "INSERT INTO t VALUES (1) ON CONFLICT (a) DO UPDATE SET b = (SELECT * FROM read_csv('x'))",
            "INSERT INTO t VALUES (1) ON CONFLICT (a) DO UPDATE SET b = 1 WHERE EXISTS (SELECT * FROM read_csv('x'))",
        ] {
            assert_eq!(code(sql), Some("UNSUPPORTED_FUNCTION"), "{sql}");
        }
    }

    #[test]
    fn only_listed_table_functions_are_taken() {
        for sql in [
            "SELECT * FROM read_parquet('/etc/passwd')",
            "SELECT * FROM parquet_metadata('x')",
            "SELECT 1 WHERE EXISTS (SELECT * FROM read_csv('x'))",
            "WITH a AS (SELECT * FROM glob('*')) SELECT * FROM a",
            "SELECT * FROM LATERAL flatten(x)",
        ] {
            assert_eq!(code(sql), Some("UNSUPPORTED_FUNCTION"), "{sql}");
        }
        assert_eq!(code("SELECT * FROM generate_series(1, 3)"), None);
    }

    #[test]
    fn a_request_is_one_statement() {
        assert_eq!(code("SELECT 1; SELECT 2"), Some("MULTIPLE_STATEMENTS"));
        assert_eq!(code("SELECT 1;"), None);
        assert_eq!(code(" ; "), Some("EMPTY_STATEMENT"));
        assert_eq!(code("SELECT 1 garbage garbage"), Some("SYNTAX_ERROR"));
    }

    #[test]
    fn a_syntax_error_names_its_place() {
        let error = parse("SELECT FROM WHERE").expect_err("wrong");
        assert!(error.message.contains("Line: 1"), "{error}");
    }

    #[test]
    fn a_deep_statement_is_an_error_and_no_crash() {
        let deep = format!("SELECT {}1{}", "(".repeat(5_000), ")".repeat(5_000));
        assert_eq!(code(&deep), Some("STATEMENT_TOO_DEEP"));
        let chain = format!("SELECT 1{}", " + 1".repeat(200_000));
        assert_eq!(code(&chain), Some("STATEMENT_TOO_DEEP"));
        let wide = format!("SELECT 1{}", ", 1 + 1".repeat(10_000));
        assert_eq!(code(&wide), None);
    }

    #[test]
    fn a_name_has_a_bound_wherever_it_stands() {
        let (most, more) = ("é".repeat(128), "é".repeat(129));
        for sql in [
            "SELECT {} FROM t",
            "SELECT \"{}\" FROM t",
            "SELECT 1 AS {}",
            "SELECT * FROM {}",
            "SELECT * FROM a.{}.c",
            "SELECT * FROM '{}'",
            "SELECT {}(1)",
            "WITH {} AS (SELECT 1) SELECT 2",
            "STORAGE FLUSH TABLE {}",
            "STORAGE FLUSH TABLE '{}'",
            "INSERT INTO {} VALUES (1)",
            "INSERT INTO t ({}) VALUES (1)",
            "INSERT INTO '{}' VALUES (1)",
            "SELECT $n{}",
        ] {
            assert_eq!(code(&sql.replace("{}", &more)), Some("NAME_TOO_LONG"), "{sql}");
            assert_ne!(code(&sql.replace("{}", &most[4..])), Some("NAME_TOO_LONG"), "{sql}");
        }
        assert_eq!(code(&format!("SELECT '{more}', $${more}$$ -- {more}")), None);
    }

    #[test]
    fn names_of_with_are_counted_as_the_planner_knows_them() {
        // Each level uses the one before twice; beside it stands a query of almost the same name that is small.
        let chain = |twin: &dyn Fn(usize) -> String, name: &dyn Fn(usize) -> String| {
            let level = |n: usize| {
                let (this, before) = (name(n), name(n - 1));
                format!("{this} AS (SELECT 1 FROM {before}, {before} b){}", twin(n))
            };
            let levels: Vec<String> = (1..40).map(level).collect();
            format!("WITH {} AS (SELECT 1), {} SELECT 2 FROM {}", name(0), levels.join(", "), name(39))
        };
        let plain = |n: usize| format!("a{n}");
        assert_eq!(code(&chain(&|_| String::new(), &plain)), Some("STATEMENT_TOO_DEEP"));
        assert_eq!(code(&chain(&|n| format!(", \"A{n}\" AS (SELECT 1)"), &plain)), Some("STATEMENT_TOO_DEEP"));
        assert_eq!(code("WITH \"a.b\" AS (SELECT 1) SELECT * FROM a.b"), Some("UNSUPPORTED_STATEMENT"));
        assert_eq!(code("WITH a AS (SELECT 1), \"A\" AS (SELECT 2) SELECT * FROM a, \"A\""), None);
    }

    #[test]
    fn current_user_may_have_parentheses() {
        for sql in ["SELECT CURRENT_USER()", "SELECT current_user ( ) = 'a', 1", "SELECT CURRENT_USER"] {
            assert_eq!(code(sql), None, "{sql}");
        }
        assert_eq!(code("INSERT INTO t VALUES (CURRENT_USER())"), None);
    }

    #[test]
    fn flush_takes_a_table() {
        assert!(
            matches!(parse("storage flush table App.messages;"), Ok(Statement::Flush(table)) if table.0 == ["app", "messages"])
        );
        assert_eq!(code("STORAGE FLUSH messages"), Some("SYNTAX_ERROR"));
    }

    #[test]
    fn system_columns_are_noticed_at_any_depth() {
        let names = |sql: &str| match parse(sql) {
            Ok(Statement::Query(query)) => query.names_system_columns,
            other => panic!("{sql}: {other:?}"),
        };
        assert!(names("SELECT * FROM (SELECT t._seq FROM app.t) x"));
        assert!(names("SELECT 1 FROM app.t ORDER BY _SEQ"));
        assert!(names("SELECT 1 FROM app.t JOIN app.u USING (id, _seq)"));
        assert!(names("SELECT 1 FROM (app.t JOIN app.u USING (_deleted))"));
        assert!(!names("SELECT * FROM app.t"));
    }
}
