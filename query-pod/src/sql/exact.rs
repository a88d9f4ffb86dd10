//! Keeps answers exact where DataFusion would round or wrap silently.
//!
//! - A FLOAT or DOUBLE beside a decimal is compared as a floating-point number. DataFusion would make both decimals, which
//!   rounds, and fails for large numbers, infinities and NaN.
//! - A UUID beside a text is compared by value: the text is brought to the canonical form, or refused.
//! - `+`, `-`, `*` and negation of integers fail when the result does not fit; DataFusion's wrap around.

use std::sync::{Arc, LazyLock};

use arrow::compute::kernels::numeric::{add, mul, sub};
use arrow::datatypes::{DataType, Field};
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode as _};
use datafusion::common::{DFSchema, Result, ScalarValue, plan_err};
use datafusion::logical_expr::expr::{Between, InList, ScalarFunction};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::utils::merge_schema;
use datafusion::logical_expr::{
    BinaryExpr, ColumnarValue, Expr, ExprSchemable as _, LogicalPlan, Operator, ScalarFunctionArgs, ScalarUDF,
    ScalarUDFImpl, Signature, Volatility, cast, lit,
};
use datafusion::optimizer::{Analyzer, AnalyzerRule};
use datafusion::physical_expr_common::datum::apply;
use kalamdb_model::ColumnType;

type Rules = Vec<Arc<dyn AnalyzerRule + Send + Sync>>;

/// DataFusion's analyzer rules with ours around them: comparisons before types are coerced, arithmetic after.
pub(super) fn analyzer_rules() -> Rules {
    let mut rules: Rules = vec![Arc::new(Comparisons)];
    rules.extend(Analyzer::new().rules);
    rules.push(Arc::new(CheckedArithmetic));
    rules
}

#[derive(Debug)]
struct Comparisons;

impl AnalyzerRule for Comparisons {
    fn name(&self) -> &str {
        "kalam_comparisons"
    }

    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        rewrite(plan, compare)
    }
}

#[derive(Debug)]
struct CheckedArithmetic;

impl AnalyzerRule for CheckedArithmetic {
    fn name(&self) -> &str {
        "kalam_checked_arithmetic"
    }

    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        rewrite(plan, check)
    }
}

/// Applies `change` to every expression of `plan`, leaves first; names of columns stay.
fn rewrite(plan: LogicalPlan, change: fn(Expr, &DFSchema) -> Result<Transformed<Expr>>) -> Result<LogicalPlan> {
    let rewritten = plan.transform_up_with_subqueries(|plan| {
        let schema = merge_schema(&plan.inputs());
        let names = NamePreserver::new(&plan);
        let changed = plan.map_expressions(|expr| {
            let name = names.save(&expr);
            let changed = expr.transform_up(|expr| change(expr, &schema))?;
            Ok(if changed.transformed { changed.update_data(|expr| name.restore(expr)) } else { changed })
        })?;
        if changed.transformed { changed.map_data(LogicalPlan::recompute_schema) } else { Ok(changed) }
    })?;
    Ok(rewritten.data)
}

fn compare(expr: Expr, schema: &DFSchema) -> Result<Transformed<Expr>> {
    match expr {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) if op.is_comparison_operator() => {
            let (of_left, of_right) = (field(&left, schema), field(&right, schema));
            let left_fits = fit(&left, of_left.as_deref(), of_right.as_deref())?;
            let right_fits = fit(&right, of_right.as_deref(), of_left.as_deref())?;
            let changed = left_fits.is_some() || right_fits.is_some();
            let (left, right) = (left_fits.map_or(left, Box::new), right_fits.map_or(right, Box::new));
            let expr = Expr::BinaryExpr(BinaryExpr { left, op, right });
            Ok(if changed { Transformed::yes(expr) } else { Transformed::no(expr) })
        }
        Expr::Between(Between { expr, negated, low, high }) => {
            let value = field(&expr, schema);
            let bound = |bound: Box<Expr>| -> Result<Box<Expr>> {
                let fits = fit(&bound, field(&bound, schema).as_deref(), value.as_deref())?;
                Ok(fits.map_or(bound, Box::new))
            };
            let (low, high) = (bound(low)?, bound(high)?);
            Ok(Transformed::yes(Expr::Between(Between { expr, negated, low, high })))
        }
        Expr::InList(InList { expr, list, negated }) => {
            let value = field(&expr, schema);
            let item = |item: Expr| -> Result<Expr> {
                let fits = fit(&item, field(&item, schema).as_deref(), value.as_deref())?;
                Ok(fits.unwrap_or(item))
            };
            let list = list.into_iter().map(item).collect::<Result<_>>()?;
            Ok(Transformed::yes(Expr::InList(InList { expr, list, negated })))
        }
        other => Ok(Transformed::no(other)),
    }
}

/// The type of `expr`; what has none yet is left to DataFusion.
fn field(expr: &Expr, schema: &DFSchema) -> Option<Arc<Field>> {
    expr.to_field(schema).ok().map(|(_, field)| field)
}

/// `value`, whose type is `own`, as it is to be compared with something of type `beside`; `None`: as it is.
fn fit(value: &Expr, own: Option<&Field>, beside: Option<&Field>) -> Result<Option<Expr>> {
    let (Some(own), Some(beside)) = (own, beside) else { return Ok(None) };
    let literal = match value {
        Expr::Literal(literal, _) => Some(literal),
        _ => None,
    };
    if own.data_type().is_decimal() && beside.data_type().is_floating() {
        return Ok(Some(match literal.and_then(|literal| floating(literal, beside.data_type())) {
            Some(floating) => lit(floating),
            None => cast(value.clone(), DataType::Float64),
        }));
    }
    if ColumnType::of_arrow(beside) == Some(ColumnType::Uuid)
        && let Some(ScalarValue::Utf8(Some(text)) | ScalarValue::Utf8View(Some(text)) | ScalarValue::LargeUtf8(Some(text))) =
            literal
    {
        return match uuid::Uuid::try_parse(text) {
            Ok(uuid) => Ok(Some(lit(uuid.to_string()))),
            Err(_) => plan_err!("expected UUID, got `{}`", text.chars().take(64).collect::<String>()),
        };
    }
    Ok(None)
}

/// A decimal literal as the number that a column of type `beside` would hold for it. FLOAT only where it is in range: the
/// nearest FLOAT to `1e300` is Infinity.
fn floating(literal: &ScalarValue, beside: &DataType) -> Option<ScalarValue> {
    let text = literal.to_array().ok().and_then(|array| arrow::util::display::array_value_to_string(&array, 0).ok())?;
    match (beside, text.parse::<f32>().ok()) {
        (DataType::Float32, Some(near)) if near.is_finite() => Some(ScalarValue::from(near)),
        _ => text.parse::<f64>().ok().map(ScalarValue::from),
    }
}

fn check(expr: Expr, schema: &DFSchema) -> Result<Transformed<Expr>> {
    let integer = |expr: &Expr| expr.get_type(schema).ok().filter(DataType::is_integer);
    match expr {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) => {
            let checked = Arithmetic::of(op).filter(|_| integer(&left).is_some() && integer(&left) == integer(&right));
            Ok(match checked {
                Some(arithmetic) => Transformed::yes(arithmetic.call(*left, *right)),
                None => Transformed::no(Expr::BinaryExpr(BinaryExpr { left, op, right })),
            })
        }
        Expr::Negative(inner) => match integer(&inner) {
            Some(ty) => Ok(Transformed::yes(Arithmetic::Minus.call(lit(ScalarValue::new_zero(&ty)?), *inner))),
            None => Ok(Transformed::no(Expr::Negative(inner))),
        },
        other => Ok(Transformed::no(other)),
    }
}

/// Arithmetic on two integers of one type that fails on overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Arithmetic {
    Plus,
    Minus,
    Times,
}

static FUNCTIONS: LazyLock<[Arc<ScalarUDF>; 3]> = LazyLock::new(|| {
    [Arithmetic::Plus, Arithmetic::Minus, Arithmetic::Times].map(|arithmetic| {
        let signature = Signature::any(2, Volatility::Immutable);
        Arc::new(ScalarUDF::from(Checked { arithmetic, signature }))
    })
});

impl Arithmetic {
    const fn of(op: Operator) -> Option<Self> {
        match op {
            Operator::Plus => Some(Self::Plus),
            Operator::Minus => Some(Self::Minus),
            Operator::Multiply => Some(Self::Times),
            _ => None,
        }
    }

    fn call(self, left: Expr, right: Expr) -> Expr {
        let function = Arc::clone(&FUNCTIONS[self as usize]);
        Expr::ScalarFunction(ScalarFunction::new_udf(function, vec![left, right]))
    }
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Checked {
    arithmetic: Arithmetic,
    signature: Signature,
}

impl ScalarUDFImpl for Checked {
    fn name(&self) -> &str {
        match self.arithmetic {
            Arithmetic::Plus => "checked_add",
            Arithmetic::Minus => "checked_subtract",
            Arithmetic::Times => "checked_multiply",
        }
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        Ok(types[0].clone())
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let kernel = match self.arithmetic {
            Arithmetic::Plus => add,
            Arithmetic::Minus => sub,
            Arithmetic::Times => mul,
        };
        apply(&args.args[0], &args.args[1], kernel)
    }
}
