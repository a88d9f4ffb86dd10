//! Brings UUID literals to the form in which UUIDs are stored.
//!
//! UUID columns are text to DataFusion, in canonical lower case. A literal that is compared with one may be written in any
//! form that a UUID has (upper case, braces, no hyphens); as plain text it would silently equal nothing.

use datafusion::common::tree_node::{Transformed, TreeNode as _};
use datafusion::common::{Column, DFSchema, ScalarValue};
use datafusion::error::Result;
use datafusion::logical_expr::expr::{Between, BinaryExpr, InList};
use datafusion::logical_expr::{Expr, LogicalPlan, Operator};
use kalamdb_model::types::TYPE_METADATA;

/// Rewrites literals that stand beside a UUID column in a comparison, IN or BETWEEN, anywhere in `plan`.
///
/// # Errors
/// If the plan cannot be walked, which no planned statement causes.
pub(super) fn uuids(plan: LogicalPlan) -> Result<LogicalPlan> {
    let rewritten = plan.transform_up_with_subqueries(|node| {
        let mut schema = DFSchema::empty();
        for input in node.inputs() {
            schema.merge(input.schema());
        }
        node.map_expressions(|expr| expr.transform_up(|expr| Ok(in_comparison(expr, &schema))))
    })?;
    Ok(rewritten.data)
}

fn in_comparison(expr: Expr, schema: &DFSchema) -> Transformed<Expr> {
    match expr {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) if compares(op) => {
            let (left, right) = if is_uuid(&left, schema) {
                (*left, canonical(*right))
            } else if is_uuid(&right, schema) {
                (canonical(*left), *right)
            } else {
                (*left, *right)
            };
            Transformed::yes(Expr::BinaryExpr(BinaryExpr::new(Box::new(left), op, Box::new(right))))
        }
        Expr::InList(InList { expr, list, negated }) if is_uuid(&expr, schema) => {
            let list = list.into_iter().map(canonical).collect();
            Transformed::yes(Expr::InList(InList { expr, list, negated }))
        }
        Expr::Between(Between { expr, negated, low, high }) if is_uuid(&expr, schema) => {
            let (low, high) = (Box::new(canonical(*low)), Box::new(canonical(*high)));
            Transformed::yes(Expr::Between(Between { expr, negated, low, high }))
        }
        other => Transformed::no(other),
    }
}

const fn compares(op: Operator) -> bool {
    use Operator::{Eq, Gt, GtEq, IsDistinctFrom, IsNotDistinctFrom, Lt, LtEq, NotEq};
    matches!(op, Eq | NotEq | Lt | LtEq | Gt | GtEq | IsDistinctFrom | IsNotDistinctFrom)
}

fn is_uuid(expr: &Expr, schema: &DFSchema) -> bool {
    match expr {
        Expr::Column(column) => field_is_uuid(column, schema),
        Expr::Alias(alias) => is_uuid(&alias.expr, schema),
        _ => false,
    }
}

fn field_is_uuid(column: &Column, schema: &DFSchema) -> bool {
    schema
        .qualified_field_from_column(column)
        .is_ok_and(|(_, field)| field.metadata().get(TYPE_METADATA).is_some_and(|ty| ty == "UUID"))
}

/// A text that is no UUID stays as it is: it equals no stored one, which is right.
fn canonical(expr: Expr) -> Expr {
    match expr {
        Expr::Literal(ScalarValue::Utf8(Some(text)), metadata) => {
            let text = uuid::Uuid::try_parse(&text).map_or(text, |uuid| uuid.to_string());
            Expr::Literal(ScalarValue::Utf8(Some(text)), metadata)
        }
        other => other,
    }
}
