//! Keeps answers exact where DataFusion would round or wrap silently.
//!
//! - A FLOAT or DOUBLE beside a decimal is compared as a floating-point number. DataFusion would make both decimals, which
//!   rounds, and fails for large numbers, infinities and NaN.
//! - A UUID beside a text literal is compared by value: the text is brought to the canonical form. One that is no UUID
//!   equals none.
//! - A time beside a text literal reads it as INSERT does. DataFusion goes over nanoseconds, which end in 2262.
//! - An integer that is cast to a time is what INSERT takes it for: microseconds, or days. DataFusion takes other units.
//! - A FLOAT or DOUBLE that a call or CASE makes one type with a decimal, as `coalesce(weight, 0.0)` does, stays floating.
//! - IN, CASE, DISTINCT and ORDER BY take `0.0` and `-0.0` for one value, as `=` and GROUP BY do.
//! - A difference of times beside an INTERVAL of days is compared by its length. DataFusion compares months, days and
//!   nanoseconds in this order.
//! - `+`, `-`, `*` and negation of integers fail when the result does not fit; DataFusion's wrap around.

use std::sync::Arc;

use arrow::compute::kernels::numeric::{add, mul, sub};
use arrow::datatypes::{DataType, Field, IntervalMonthDayNano};
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode as _};
use datafusion::common::{DFSchema, Result, ScalarValue};
use datafusion::error::DataFusionError;
use datafusion::logical_expr::expr::{Between, Cast, InList, ScalarFunction, TryCast};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::utils::merge_schema;
use datafusion::logical_expr::{
    BinaryExpr, ColumnarValue, Expr, ExprSchemable as _, LogicalPlan, Operator, ScalarFunctionArgs, ScalarUDF,
    ScalarUDFImpl, Signature, Volatility, cast, lit,
};
use datafusion::optimizer::{Analyzer, AnalyzerRule};
use datafusion::physical_expr_common::datum::apply;
use kalamdb_model::{ColumnType, Value};

use super::params;

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
        let plan = rewrite(plan, compare)?;
        let ordered = plan.transform_up_with_subqueries(|plan| match plan {
            LogicalPlan::Sort(mut sort) => {
                let schema = Arc::clone(sort.input.schema());
                sort.expr.iter_mut().for_each(|key| unsign_zero(&mut key.expr, &schema));
                Ok(Transformed::yes(LogicalPlan::Sort(sort)))
            }
            other => Ok(Transformed::no(other)),
        })?;
        Ok(ordered.data)
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
        let renamed = |expr: Expr| {
            let name = names.save(&expr);
            let changed = expr.transform_up(|expr| change(expr, &schema))?;
            Ok(if changed.transformed { changed.update_data(|expr| name.restore(expr)) } else { changed })
        };
        let changed = plan.map_expressions(|expr| match expr {
            // Has no name of its own; what it groups by has.
            Expr::GroupingSet(_) => expr.map_children(renamed),
            _ => renamed(expr),
        })?;
        // Of every plan: the types of those below may be others now.
        changed.map_data(LogicalPlan::recompute_schema)
    })?;
    Ok(rewritten.data)
}

fn compare(expr: Expr, schema: &DFSchema) -> Result<Transformed<Expr>> {
    match expr {
        Expr::BinaryExpr(BinaryExpr { left, op, right }) if compares(op) => {
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
        Expr::InList(InList { mut expr, list, negated }) => {
            let value = field(&expr, schema);
            let item = |item: Expr| -> Result<Expr> {
                let fits = fit(&item, field(&item, schema).as_deref(), value.as_deref())?;
                Ok(fits.unwrap_or(item))
            };
            let mut list = list.into_iter().map(item).collect::<Result<Vec<_>>>()?;
            list.iter_mut().chain([&mut *expr]).for_each(|value| unsign_zero(value, schema));
            Ok(Transformed::yes(Expr::InList(InList { expr, list, negated })))
        }
        Expr::Case(mut case) => {
            if let Some(value) = &mut case.expr {
                let whens = case.when_then_expr.iter_mut().map(|(when, _)| &mut **when);
                let mut compared: Vec<&mut Expr> = whens.chain([&mut **value]).collect();
                unify(&mut compared, schema)?;
                compared.into_iter().for_each(|value| unsign_zero(value, schema));
            }
            let thens = case.when_then_expr.iter_mut().map(|(_, then)| &mut **then);
            unify(&mut thens.chain(case.else_expr.as_deref_mut()).collect::<Vec<_>>(), schema)?;
            Ok(Transformed::yes(Expr::Case(case)))
        }
        Expr::ScalarFunction(mut call) if UNIFYING.contains(&call.func.name()) => {
            unify(&mut call.args.iter_mut().collect::<Vec<_>>(), schema)?;
            Ok(Transformed::yes(Expr::ScalarFunction(call)))
        }
        Expr::Cast(Cast { expr, field: to }) => Ok(match time(&expr, to.data_type(), schema)? {
            Some(time) => Transformed::yes(Expr::Cast(Cast::new_from_field(Box::new(time), to))),
            None => Transformed::no(Expr::Cast(Cast { expr, field: to })),
        }),
        Expr::TryCast(TryCast { expr, field: to }) => {
            let time = time(&expr, to.data_type(), schema).unwrap_or_else(|_| Some(lit(ScalarValue::Null)));
            Ok(match time {
                Some(time) => Transformed::yes(Expr::TryCast(TryCast::new_from_field(Box::new(time), to))),
                None => Transformed::no(Expr::TryCast(TryCast { expr, field: to })),
            })
        }
        Expr::AggregateFunction(mut call) => {
            if call.params.distinct {
                call.params.args.iter_mut().for_each(|arg| unsign_zero(arg, schema));
            }
            call.params.order_by.iter_mut().for_each(|sort| unsign_zero(&mut sort.expr, schema));
            Ok(Transformed::yes(Expr::AggregateFunction(call)))
        }
        Expr::WindowFunction(mut call) => {
            let params = &mut call.params;
            params.partition_by.iter_mut().for_each(|key| unsign_zero(key, schema));
            params.order_by.iter_mut().for_each(|sort| unsign_zero(&mut sort.expr, schema));
            Ok(Transformed::yes(Expr::WindowFunction(call)))
        }
        other => Ok(Transformed::no(other)),
    }
}

const fn compares(op: Operator) -> bool {
    use Operator::{Eq, Gt, GtEq, IsDistinctFrom, IsNotDistinctFrom, Lt, LtEq, NotEq};
    matches!(op, Eq | NotEq | Lt | LtEq | Gt | GtEq | IsDistinctFrom | IsNotDistinctFrom)
}

/// The type of `expr`; what has none yet is left to DataFusion.
fn field(expr: &Expr, schema: &DFSchema) -> Option<Arc<Field>> {
    expr.to_field(schema).ok().map(|(_, field)| field)
}

/// `value`, whose type is `own`, as it is to be compared with something of type `beside`; `None`: as it is.
fn fit(value: &Expr, own: Option<&Field>, beside: Option<&Field>) -> Result<Option<Expr>> {
    let (Some(own), Some(beside)) = (own, beside) else { return Ok(None) };
    if beside.data_type().is_floating() && (own.data_type().is_decimal() || own.data_type().is_floating()) {
        let written = number(value).and_then(|text| floating(&text, beside.data_type()));
        return Ok(match written {
            Some(floating) => Some(lit(floating)),
            None => own.data_type().is_decimal().then(|| cast(value.clone(), DataType::Float64)),
        });
    }
    let Expr::Literal(literal, _) = value else { return Ok(None) };
    if let (ScalarValue::IntervalMonthDayNano(Some(interval)), DataType::Duration(_)) = (literal, beside.data_type()) {
        return Ok(Some(cast(duration(*interval)?, beside.data_type().clone())));
    }
    let (Some(Some(text)), Some(ty)) = (literal.try_as_str(), ColumnType::of_arrow(beside)) else { return Ok(None) };
    match ty {
        ColumnType::Uuid => Ok(uuid::Uuid::try_parse(text).ok().map(|uuid| lit(uuid.to_string()))),
        ColumnType::Timestamp | ColumnType::Date | ColumnType::Time => match Value::from_text(text, &ty) {
            Ok(value) => Ok(Some(lit(params::scalar(&value, &ty)?))),
            Err(_) => Ok(None),
        },
        _ => Ok(None),
    }
}

/// An integer that is to be of type `to`, as a time; `None`: one of the two is something else.
fn time(value: &Expr, to: &DataType, schema: &DFSchema) -> Result<Option<Expr>> {
    let ty = match to {
        DataType::Time64(_) => ColumnType::Time,
        DataType::Timestamp(..) => ColumnType::Timestamp,
        _ => return Ok(None),
    };
    if !value.get_type(schema).is_ok_and(|ty| ty.is_integer()) {
        return Ok(None);
    }
    match value {
        Expr::Literal(literal, _) if !literal.is_null() => {
            let read = Value::from_text(&literal.to_string(), &ty);
            let read = read.map_err(|error| DataFusionError::Execution(error.to_string()))?;
            params::scalar(&read, &ty).map(|scalar| Some(lit(scalar)))
        }
        other => Ok(Some(cast(cast(other.clone(), DataType::Int64), ty.arrow()))),
    }
}

/// Makes a floating-point `-0.0` a `0.0`, by adding one.
fn unsign_zero(value: &mut Expr, schema: &DFSchema) {
    let zero = match value.get_type(schema) {
        Ok(DataType::Float32) => lit(0_f32),
        Ok(DataType::Float64) => lit(0_f64),
        _ => return,
    };
    *value = std::mem::take(value) + zero;
}

/// Functions whose arguments become one type.
const UNIFYING: [&str; 5] = ["coalesce", "greatest", "least", "make_array", "nullif"];

/// Makes decimals among `values` floating if one of them is.
fn unify(values: &mut [&mut Expr], schema: &DFSchema) -> Result<()> {
    let double = Field::new("", DataType::Float64, true);
    let fields: Vec<_> = values.iter().map(|value| field(value, schema)).collect();
    if !fields.iter().flatten().any(|field| field.data_type().is_floating()) {
        return Ok(());
    }
    for (value, own) in values.iter_mut().zip(&fields) {
        if let Some(fits) = fit(value, own.as_deref(), Some(&double))? {
            **value = fits;
        }
    }
    Ok(())
}

/// An interval as the length that it has whenever it begins.
fn duration(interval: IntervalMonthDayNano) -> Result<Expr> {
    const MICROS_PER_DAY: i64 = 86_400_000_000;
    if interval.months != 0 {
        return Err(DataFusionError::Plan("an interval of months has no fixed length; use days".to_owned()));
    }
    let micros = i64::from(interval.days) * MICROS_PER_DAY + interval.nanoseconds / 1_000;
    Ok(lit(ScalarValue::DurationMicrosecond(Some(micros))))
}

/// The text of a number as the statement has it: a decimal, or `1e300`, which was read as `CAST('1e300' AS DOUBLE)`.
fn number(value: &Expr) -> Option<String> {
    match value {
        Expr::Literal(literal, _) if literal.data_type().is_decimal() => {
            let array = literal.to_array().ok()?;
            arrow::util::display::array_value_to_string(&array, 0).ok()
        }
        Expr::Cast(cast) if cast.field.data_type() == &DataType::Float64 => match &*cast.expr {
            Expr::Literal(literal, _) => literal.try_as_str()?.map(str::to_owned),
            _ => None,
        },
        _ => None,
    }
}

/// The number of type `beside` that is nearest to a literal. FLOAT only where it is in range: the nearest FLOAT to `1e300`
/// is Infinity.
fn floating(text: &str, beside: &DataType) -> Option<ScalarValue> {
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
                Some(arithmetic) => Transformed::yes(Checked::call(*left, arithmetic, *right)),
                None => Transformed::no(Expr::BinaryExpr(BinaryExpr { left, op, right })),
            })
        }
        Expr::Negative(inner) => match integer(&inner) {
            Some(ty) => {
                let zero = lit(ScalarValue::new_zero(&ty)?);
                Ok(Transformed::yes(Checked::call(zero, Arithmetic::Minus, *inner)))
            }
            None => Ok(Transformed::no(Expr::Negative(inner))),
        },
        other => Ok(Transformed::no(other)),
    }
}

/// Arithmetic on two integers of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Arithmetic {
    Plus,
    Minus,
    Times,
}

impl Arithmetic {
    const fn of(op: Operator) -> Option<Self> {
        match op {
            Operator::Plus => Some(Self::Plus),
            Operator::Minus => Some(Self::Minus),
            Operator::Multiply => Some(Self::Times),
            _ => None,
        }
    }

    const fn sign(self) -> char {
        match self {
            Self::Plus => '+',
            Self::Minus => '-',
            Self::Times => '*',
        }
    }
}

/// A chain of arithmetic on integers of one type, from left to right, that fails on overflow. It is one function with
/// many arguments, because the time to plan functions within functions is cubic in their depth.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Checked {
    steps: Vec<Arithmetic>,
    signature: Signature,
}

impl Checked {
    /// `left op right`; if `left` is such a chain, one step more of it.
    fn call(left: Expr, op: Arithmetic, right: Expr) -> Expr {
        let (mut steps, mut args) = match left {
            Expr::ScalarFunction(ScalarFunction { func, args }) => match func.inner().downcast_ref::<Self>() {
                Some(chain) => (chain.steps.clone(), args),
                None => (Vec::new(), vec![Expr::ScalarFunction(ScalarFunction { func, args })]),
            },
            other => (Vec::new(), vec![other]),
        };
        steps.push(op);
        args.push(right);
        let signature = Signature::any(args.len(), Volatility::Immutable);
        let function = Arc::new(ScalarUDF::from(Self { steps, signature }));
        Expr::ScalarFunction(ScalarFunction::new_udf(function, args))
    }
}

impl ScalarUDFImpl for Checked {
    fn name(&self) -> &str {
        "checked"
    }

    /// As without the check: `a + b`.
    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        let mut name = String::new();
        for (at, arg) in args.iter().enumerate() {
            if let Some(step) = at.checked_sub(1).and_then(|at| self.steps.get(at)) {
                name.extend([' ', step.sign(), ' ']);
            }
            name.push_str(&arg.schema_name().to_string());
        }
        Ok(name)
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        Ok(types[0].clone())
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let mut args = args.args.into_iter();
        let first = args.next().ok_or_else(|| DataFusionError::Internal("arithmetic on nothing".to_owned()))?;
        self.steps.iter().zip(args).try_fold(first, |sum, (step, arg)| match step {
            Arithmetic::Plus => apply(&sum, &arg, add),
            Arithmetic::Minus => apply(&sum, &arg, sub),
            Arithmetic::Times => apply(&sum, &arg, mul),
        })
    }
}
