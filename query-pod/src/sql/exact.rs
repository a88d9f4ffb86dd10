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
//! - A comparison with a cast that loses something is one with what the cast gives. DataFusion compares what is cast, and
//!   takes the smallest and the largest value of a file for those of the cast ones. It sees no such cast here.

use std::sync::Arc;

use arrow::compute::kernels::numeric::{add, mul, sub};
use arrow::datatypes::{DataType, Field, FieldRef, IntervalMonthDayNano, TimeUnit};
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::{Transformed, TreeNode as _};
use datafusion::common::{DFSchema, Result, ScalarValue};
use datafusion::error::DataFusionError;
use datafusion::logical_expr::expr::{Between, Cast, InList, ScalarFunction, TryCast};
use datafusion::logical_expr::expr_rewriter::NamePreserver;
use datafusion::logical_expr::utils::merge_schema;
use datafusion::logical_expr::{
    BinaryExpr, ColumnarValue, Expr, ExprSchemable as _, LogicalPlan, Operator, ReturnFieldArgs, ScalarFunctionArgs,
    ScalarUDF, ScalarUDFImpl, Signature, Volatility, cast, lit,
};
use datafusion::optimizer::{Analyzer, AnalyzerRule};
use datafusion::physical_expr_common::datum::apply;
use kalamdb_model::{ColumnType, Value};

use super::params;

type Rules = Vec<Arc<dyn AnalyzerRule + Send + Sync>>;

/// DataFusion's analyzer rules with ours around them: comparisons before types are coerced, arithmetic after.
pub(super) fn analyzer_rules() -> Rules {
    let mut rules: Rules = Analyzer::new().rules;
    let coercion = rules.iter().position(|rule| rule.name() == "type_coercion").unwrap_or(0);
    rules.insert(coercion, Arc::new(Comparisons));
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
pub(super) fn rewrite(
    plan: LogicalPlan,
    change: impl Fn(Expr, &DFSchema) -> Result<Transformed<Expr>>,
) -> Result<LogicalPlan> {
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
        Expr::Cast(Cast { expr, field: to }) => {
            let (value, hidden) = Checked::shown(*expr);
            let value = time(&value, to.data_type(), schema)?.unwrap_or(value);
            let hides = hidden || misleads(&value, to.data_type(), schema);
            let cast = Expr::Cast(Cast::new_from_field(Box::new(value), to));
            Ok(Transformed::yes(if hides { Checked::hidden(cast) } else { cast }))
        }
        Expr::TryCast(TryCast { expr, field: to }) => {
            let (value, hidden) = Checked::shown(*expr);
            let time = time(&value, to.data_type(), schema).unwrap_or_else(|_| Some(lit(ScalarValue::Null)));
            let value = time.unwrap_or(value);
            let hides = hidden || misleads(&value, to.data_type(), schema);
            let cast = Expr::TryCast(TryCast::new_from_field(Box::new(value), to));
            Ok(Transformed::yes(if hides { Checked::hidden(cast) } else { cast }))
        }
        Expr::ScalarFunction(call)
            if CASTING.contains(&call.func.name()) && !matches!(call.args.first(), Some(Expr::Literal(..))) =>
        {
            Ok(Transformed::yes(Checked::hidden(Expr::ScalarFunction(call))))
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

/// Functions that the optimizer makes casts of.
const CASTING: [&str; 4] = ["arrow_cast", "arrow_try_cast", "cast_to_type", "try_cast_to_type"];

/// Whether the optimizer must not see a cast of `value` to `to`, because it would compare something else.
fn misleads(value: &Expr, to: &DataType, schema: &DFSchema) -> bool {
    use DataType::{Date32, Timestamp};
    if matches!(value, Expr::Literal(..)) {
        return false;
    }
    let Ok(from) = value.get_type(schema) else { return true };
    match (&from, to) {
        // These lose something in order, which what files say allows for, and their comparisons are left as they are.
        (from, to) if to.is_floating() => !from.is_numeric(),
        (Timestamp(..), Date32) => false,
        (from, to) => !injective(from, to),
    }
}

/// Whether a cast gives every value of type `from` one of its own.
fn injective(from: &DataType, to: &DataType) -> bool {
    use DataType::{Date32, Float32, Float64, Int16, Int32, Int64, Timestamp};
    /// Digits that any number keeps as one of these.
    const FLOAT_DIGITS: i16 = 6;
    const DOUBLE_DIGITS: i16 = 15;
    let few = |most: i16| digits(from).is_some_and(|(whole, scale)| whole.max(0) + scale <= most);
    match (from, to) {
        (Timestamp(unit, zone), Timestamp(finer, other)) => {
            let utc = |zone: Option<&str>| zone.is_none_or(|zone| matches!(zone, "UTC" | "+00:00"));
            let shifts = zone.is_some() != other.is_some() && !(utc(zone.as_deref()) && utc(other.as_deref()));
            *unit >= TimeUnit::Microsecond && finer >= unit && !shifts
        }
        (Timestamp(..), Int64) | (Int64 | Date32, Timestamp(..)) => true,
        (Date32, Int32 | Int64) | (Int16 | Int32, Date32) | (Float32, Float64) => true,
        (_, Float32) => from == to || few(FLOAT_DIGITS),
        (_, Float64) => from == to || few(DOUBLE_DIGITS),
        (_, to) if to.is_string() => from.is_string() || from.is_integer(),
        _ => from == to || fits(from, to),
    }
}

/// Whether every number of type `from` is one of type `to`.
fn fits(from: &DataType, to: &DataType) -> bool {
    let (Some((whole, scale)), Some((most, finest))) = (digits(from), digits(to)) else { return false };
    // An integer may have ten digits, and not all integers of ten digits are in range.
    whole <= most - i16::from(to.is_integer()) && scale <= finest
}

/// How many digits a number of type `ty` has before the point, at most, and after it.
fn digits(ty: &DataType) -> Option<(i16, i16)> {
    use DataType::{Decimal32, Decimal64, Decimal128, Decimal256, Int8, Int16, Int32, Int64};
    match *ty {
        Int8 => Some((3, 0)),
        Int16 => Some((5, 0)),
        Int32 => Some((10, 0)),
        Int64 => Some((19, 0)),
        Decimal32(precision, scale)
        | Decimal64(precision, scale)
        | Decimal128(precision, scale)
        | Decimal256(precision, scale) => Some((i16::from(precision) - i16::from(scale), i16::from(scale))),
        _ => None,
    }
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
        Expr::Cast(cast) if is_coarse(&cast, schema) => Ok(Transformed::yes(Checked::hidden(Expr::Cast(cast)))),
        Expr::BinaryExpr(BinaryExpr { left, op: Operator::Eq, right }) => {
            let (merges, others) = (correlated(&left, &right, schema), correlated(&right, &left, schema));
            let left = if merges { Box::new(Checked::hidden(*left)) } else { left };
            let right = if others { Box::new(Checked::hidden(*right)) } else { right };
            let expr = Expr::BinaryExpr(BinaryExpr { left, op: Operator::Eq, right });
            Ok(if merges || others { Transformed::yes(expr) } else { Transformed::no(expr) })
        }
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

/// Whether `cast` makes microseconds of whole seconds or milliseconds: to compare them, DataFusion would cut the other side
/// down to these.
fn is_coarse(cast: &Cast, schema: &DFSchema) -> bool {
    use DataType::Timestamp;
    let from = cast.expr.get_type(schema);
    matches!(
        (from, cast.field.data_type()),
        (Ok(Timestamp(unit, _)), Timestamp(finer, _)) if unit < TimeUnit::Microsecond && unit < *finer
    )
}

/// Whether `value` is a cast that makes one of several values, beside something of the query around. A subquery that
/// aggregates DataFusion would group by what is cast, so that a row around it came once for each of those values.
fn correlated(value: &Expr, beside: &Expr, schema: &DFSchema) -> bool {
    let Expr::Cast(Cast { expr, field: to }) = value else { return false };
    beside.contains_outer() && !expr.get_type(schema).is_ok_and(|from| injective(&from, to.data_type()))
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
/// many arguments, because the time to plan functions within functions is cubic in their depth. Without a step it is its
/// one argument, of any type, which the optimizer then does not look into.
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
        Self::of(steps, args)
    }

    fn of(steps: Vec<Arithmetic>, args: Vec<Expr>) -> Expr {
        let signature = Signature::any(args.len(), Volatility::Immutable);
        let function = Arc::new(ScalarUDF::from(Self { steps, signature }));
        Expr::ScalarFunction(ScalarFunction::new_udf(function, args))
    }

    /// `expr`, hidden from the optimizer.
    fn hidden(expr: Expr) -> Expr {
        Self::of(Vec::new(), vec![expr])
    }

    /// What is hidden as `expr`, else `expr`; and whether it is.
    fn shown(expr: Expr) -> (Expr, bool) {
        match expr {
            Expr::ScalarFunction(mut call) if call.args.len() == 1 && call.func.inner().is::<Self>() => {
                (call.args.swap_remove(0), true)
            }
            other => (other, false),
        }
    }
}

impl ScalarUDFImpl for Checked {
    fn name(&self) -> &str {
        "checked"
    }

    /// As without the check: `a + b`. What is hidden has its own name: a cast has the one of what is cast, and both may be
    /// columns of one join.
    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        if let [hidden] = args {
            return Ok(hidden.to_string());
        }
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

    fn return_field_from_args(&self, args: ReturnFieldArgs<'_>) -> Result<FieldRef> {
        match args.arg_fields {
            [hidden] => Ok(Arc::clone(hidden)),
            fields => Ok(Arc::new(Field::new(self.name(), fields[0].data_type().clone(), true))),
        }
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
