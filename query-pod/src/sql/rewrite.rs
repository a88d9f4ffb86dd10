//! What statements say, in words that mean the same to DataFusion.
//!
//! - `1.5e300` is a DOUBLE, as in the SQL standard; `1.5` is a decimal, which could not hold it.
//! - TIMESTAMP is microseconds, as in columns. DataFusion's is nanoseconds, which end in 2262, and of an integer seconds.
//! - What counts is a BIGINT. DataFusion has unsigned numbers there, which become decimals beside others.

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    self, CastKind, DataType, Expr, Function, Statement, TableFactor, TypedString, UnaryOperator, ValueWithSpan,
    VisitMut as _, VisitorMut,
};

/// Rewrites the expressions of a query.
pub(super) fn query(statement: &mut Statement) {
    let _ = statement.visit(&mut Rewrite { table_functions: 0 });
}

/// Rewrites an expression on its own.
pub(super) fn expression(expr: &mut Expr) {
    let _ = expr.visit(&mut Rewrite { table_functions: 0 });
}

struct Rewrite {
    /// Table functions around the expression: their arguments are literals of DataFusion's types.
    table_functions: usize,
}

impl VisitorMut for Rewrite {
    type Break = ();

    fn pre_visit_table_factor(&mut self, factor: &mut TableFactor) -> ControlFlow<()> {
        self.table_functions += usize::from(is_function(factor));
        ControlFlow::Continue(())
    }

    fn post_visit_table_factor(&mut self, factor: &mut TableFactor) -> ControlFlow<()> {
        self.table_functions -= usize::from(is_function(factor));
        ControlFlow::Continue(())
    }

    // Numbers come before the sign that they have, and nothing that is written here is visited.
    fn post_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        match expr {
            Expr::Value(ValueWithSpan { value: ast::Value::Number(text, _), .. }) if text.contains(['e', 'E']) => {
                *expr = double(text.clone());
            }
            Expr::UnaryOp { op: UnaryOperator::Minus, expr: inner } => {
                if let Some(text) = as_double(inner).filter(|text| !text.starts_with('-')) {
                    *expr = double(format!("-{text}"));
                }
            }
            Expr::Cast { data_type, .. } | Expr::TypedString(TypedString { data_type, .. })
                if self.table_functions == 0 =>
            {
                if let DataType::Timestamp(precision @ (None | Some(9)), _) = data_type {
                    *precision = Some(MICROSECONDS);
                }
            }
            Expr::Function(function) if counts(function) => {
                let counted = std::mem::replace(expr, Expr::Value(ast::Value::Null.with_empty_span()));
                *expr = cast(counted, DataType::BigInt(None));
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

/// Digits of a second that a TIMESTAMP has.
const MICROSECONDS: u64 = 6;

/// Functions whose result is an unsigned number.
const COUNTING: [&str; 15] = [
    "approx_distinct",
    "array_indexof",
    "array_length",
    "array_ndims",
    "array_position",
    "cardinality",
    "dense_rank",
    "list_indexof",
    "list_length",
    "list_ndims",
    "list_position",
    "ntile",
    "rank",
    "regr_count",
    "row_number",
];

fn counts(function: &Function) -> bool {
    let [part] = function.name.0.as_slice() else { return false };
    part.as_ident().is_some_and(|name| COUNTING.iter().any(|counting| name.value.eq_ignore_ascii_case(counting)))
}

fn is_function(factor: &TableFactor) -> bool {
    matches!(factor, TableFactor::Table { args: Some(_), .. } | TableFactor::Function { .. })
}

fn cast(expr: Expr, data_type: DataType) -> Expr {
    Expr::Cast { kind: CastKind::Cast, expr: Box::new(expr), data_type, array: false, format: None }
}

/// `CAST('text' AS DOUBLE PRECISION)`.
fn double(text: String) -> Expr {
    cast(Expr::Value(ast::Value::SingleQuotedString(text).with_empty_span()), DataType::DoublePrecision)
}

/// The text of what [`double`] makes.
fn as_double(expr: &Expr) -> Option<&str> {
    let Expr::Cast { expr, data_type: DataType::DoublePrecision, .. } = expr else { return None };
    match &**expr {
        Expr::Value(ValueWithSpan { value: ast::Value::SingleQuotedString(text), .. }) => Some(text),
        _ => None,
    }
}
