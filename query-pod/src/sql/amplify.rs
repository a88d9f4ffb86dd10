//! Bounds on functions that make much of little: `repeat('x', 2000000000)` would take the memory of the whole pod, and
//! what a function allocates is not counted by the query's memory limit.
//!
//! No call makes more than the limit. Nor do all constants of a statement together: they are made while it is planned,
//! which nothing interrupts, and kept until it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow::array::{Array, ArrayRef, AsArray as _, BooleanArray, GenericListArray, OffsetSizeTrait};
use arrow::buffer::NullBuffer;
use arrow::compute::kernels::length::length;
use arrow::compute::{cast, nullif};
use arrow::datatypes::{DataType, FieldRef, Int64Type, IntervalMonthDayNanoType, IntervalUnit, TimeUnit};
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::Transformed;
use datafusion::common::{DFSchema, Result, ScalarValue, resources_datafusion_err};
use datafusion::error::DataFusionError;
use datafusion::functions::string::concat::ConcatFunc;
use datafusion::functions_aggregate::string_agg::StringAgg;
use datafusion::logical_expr::expr::ScalarFunction;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, BinaryExpr, ColumnarValue, Documentation, Expr, ExprSchemable as _,
    GroupsAccumulator, LogicalPlan, Operator, ReturnFieldArgs, ReversedUDAF, ScalarFunctionArgs, ScalarUDF,
    ScalarUDFImpl, Signature, Volatility,
};
use datafusion::optimizer::AnalyzerRule;
use datafusion::physical_expr::expressions::Literal;

use super::{exact, functions};

/// Estimates how many bytes a call makes.
type Estimate = fn(&Arguments<'_>) -> Result<u128>;

/// Functions whose result may be much larger than each of their arguments.
const AMPLIFIERS: [(&str, Estimate); 19] = [
    ("repeat", repeated_text),
    ("lpad", padded_text),
    ("rpad", padded_text),
    ("replace", replaced_text),
    ("regexp_replace", replaced_matches),
    ("concat", joined_text),
    ("concat_ws", separated_text),
    ("array_to_string", listed_text),
    ("array_repeat", repeated_element),
    ("array_resize", resized_list),
    ("array_replace_n", replaced_elements),
    ("array_replace_all", replaced_elements),
    ("array_append", gathered),
    ("array_prepend", gathered),
    ("array_concat", gathered),
    ("make_array", gathered),
    ("arrays_zip", zipped),
    ("range", series),
    ("generate_series", series),
];

/// `functions` with bounds: no call of an amplifier makes more than `bytes_max` bytes.
pub(super) fn bounded(functions: Vec<Arc<ScalarUDF>>, bytes_max: usize) -> Vec<Arc<ScalarUDF>> {
    functions.into_iter().map(|function| bound(&function, bytes_max).unwrap_or(function)).collect()
}

/// The bounds on what statements write as operators, after types are coerced: `||`, and the functions that the planner
/// takes for `[…]` and for `||` of lists, which are not the session's.
pub(super) fn operators(bytes_max: usize) -> Arc<dyn AnalyzerRule + Send + Sync> {
    Arc::new(Operators { bytes_max })
}

/// `function` with its bound; `None`: it needs none, or has it.
fn bound(function: &Arc<ScalarUDF>, bytes_max: usize) -> Option<Arc<ScalarUDF>> {
    let (_, estimate) = AMPLIFIERS.iter().find(|(name, _)| *name == function.name())?;
    let has = function.inner().is::<Bounded>();
    (!has).then(|| Bounded::function(Arc::clone(function), *estimate, bytes_max))
}

#[derive(Debug)]
struct Operators {
    bytes_max: usize,
}

impl AnalyzerRule for Operators {
    fn name(&self) -> &str {
        "kalam_bounded_operators"
    }

    fn analyze(&self, plan: LogicalPlan, _: &ConfigOptions) -> Result<LogicalPlan> {
        exact::rewrite(plan, |expr, schema| Ok(self.bound(expr, schema)))
    }
}

impl Operators {
    fn bound(&self, expr: Expr, schema: &DFSchema) -> Transformed<Expr> {
        match expr {
            Expr::ScalarFunction(ScalarFunction { func, args }) => match bound(&func, self.bytes_max) {
                Some(bounded) => Transformed::yes(Expr::ScalarFunction(ScalarFunction::new_udf(bounded, args))),
                None => Transformed::no(Expr::ScalarFunction(ScalarFunction { func, args })),
            },
            Expr::BinaryExpr(BinaryExpr { left, op: Operator::StringConcat, right })
                if right.get_type(schema).is_ok_and(|ty| joins(&ty)) =>
            {
                Transformed::yes(Joined::call(*left, *right, self.bytes_max))
            }
            other => Transformed::no(other),
        }
    }
}

#[derive(Debug)]
struct Bounded {
    inner: Arc<ScalarUDF>,
    estimate: Estimate,
    bytes_max: u128,
}

impl Bounded {
    fn function(inner: Arc<ScalarUDF>, estimate: Estimate, bytes_max: usize) -> Arc<ScalarUDF> {
        Arc::new(ScalarUDF::from(Self { inner, estimate, bytes_max: bytes_max as u128 }))
    }
}

/// There is one of each name in a session.
impl PartialEq for Bounded {
    fn eq(&self, other: &Self) -> bool {
        self.inner == other.inner
    }
}

impl Eq for Bounded {}

impl std::hash::Hash for Bounded {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.inner.hash(state);
    }
}

/// Does not simplify: DataFusion's `concat` would join constants on the way, without a bound.
impl ScalarUDFImpl for Bounded {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn aliases(&self) -> &[String] {
        self.inner.aliases()
    }

    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        self.inner.schema_name(args)
    }

    fn signature(&self) -> &Signature {
        self.inner.signature()
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        self.inner.return_type(types)
    }

    fn return_field_from_args(&self, args: ReturnFieldArgs<'_>) -> Result<FieldRef> {
        self.inner.return_field_from_args(args)
    }

    fn coerce_types(&self, types: &[DataType]) -> Result<Vec<DataType>> {
        self.inner.coerce_types(types)
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.inner.documentation()
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let constant = args.args.iter().all(|arg| matches!(arg, ColumnarValue::Scalar(_)));
        let rows = if constant { 1 } else { args.number_rows };
        let bytes = (self.estimate)(&Arguments { values: &args.args, rows })?;
        let made = functions::constants_made(&args.config_options).filter(|_| constant);
        let before = made.map_or(0, |made| made.load(Ordering::Relaxed));
        if bytes.saturating_add(u128::from(before)) > self.bytes_max {
            return Err(resources_datafusion_err!("`{}` would make about {bytes} bytes", self.name()));
        }
        // For many rows, this is no planning, and what it makes is not kept.
        if let Some(made) = made.filter(|_| args.number_rows == 1) {
            made.fetch_add(u64::try_from(bytes).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        self.inner.invoke_with_args(args)
    }
}

/// Whether texts or bytes of type `ty` are joined by [`Joined`].
fn joins(ty: &DataType) -> bool {
    ty.is_string() || matches!(ty, DataType::Binary | DataType::LargeBinary | DataType::BinaryView)
}

/// `||`: texts in a row, NULL if one of them is. Many operands are one call, because each call copies what it joins.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Joined {
    concat: ConcatFunc,
    signature: Signature,
}

impl Joined {
    const NAME: &str = "||";

    /// `left || right`; if `left` is such a call, one operand more of it.
    fn call(left: Expr, right: Expr, bytes_max: usize) -> Expr {
        let mut args = match left {
            Expr::ScalarFunction(ScalarFunction { func, args }) if func.name() == Self::NAME => args,
            other => vec![other],
        };
        args.push(right);
        let signature = Signature::any(args.len(), Volatility::Immutable);
        let inner = Arc::new(ScalarUDF::from(Self { concat: ConcatFunc::new(), signature }));
        Expr::ScalarFunction(ScalarFunction::new_udf(Bounded::function(inner, joined_text, bytes_max), args))
    }
}

impl ScalarUDFImpl for Joined {
    fn name(&self) -> &str {
        Self::NAME
    }

    /// As of the operator: `a || b`.
    fn schema_name(&self, args: &[Expr]) -> Result<String> {
        let names: Vec<String> = args.iter().map(|arg| arg.schema_name().to_string()).collect();
        Ok(names.join(" || "))
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        Ok(types[0].clone())
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let mut nulls = None;
        for arg in &args.args {
            match arg {
                ColumnarValue::Scalar(scalar) if scalar.is_null() => {
                    return ScalarValue::try_from(args.return_type()).map(ColumnarValue::Scalar);
                }
                ColumnarValue::Scalar(_) => {}
                ColumnarValue::Array(array) => {
                    nulls = NullBuffer::union(nulls.as_ref(), array.logical_nulls().as_ref());
                }
            }
        }
        match (self.concat.invoke_with_args(args)?, nulls) {
            (ColumnarValue::Array(array), Some(nulls)) => {
                Ok(ColumnarValue::Array(nullif(&array, &BooleanArray::new(!nulls.inner(), None))?))
            }
            (joined, _) => Ok(joined),
        }
    }
}

/// `string_agg`, in place of DataFusion's.
pub(super) fn string_agg() -> Arc<AggregateUDF> {
    Arc::new(AggregateUDF::from(ShortDelimiter { inner: StringAgg::new() }))
}

/// Longest delimiter of `string_agg`, bytes. With ORDER BY the memory limit counts each value as 64 bytes at least, and the
/// delimiter once: so the text is at most twice what was counted.
const DELIMITER_BYTES_MAX: usize = 64;

#[derive(Debug, PartialEq, Eq, Hash)]
struct ShortDelimiter {
    inner: StringAgg,
}

impl ShortDelimiter {
    fn check(args: &AccumulatorArgs<'_>) -> Result<()> {
        let literal = args.exprs.get(1).and_then(|expr| expr.downcast_ref::<Literal>());
        let bytes = literal.and_then(|literal| literal.value().try_as_str().flatten()).map_or(0, str::len);
        if bytes > DELIMITER_BYTES_MAX {
            let message =
                format!("the delimiter of `string_agg` has {bytes} bytes, at most {DELIMITER_BYTES_MAX} are taken");
            return Err(DataFusionError::Plan(message));
        }
        Ok(())
    }
}

impl AggregateUDFImpl for ShortDelimiter {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn signature(&self) -> &Signature {
        self.inner.signature()
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        self.inner.return_type(types)
    }

    fn accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        Self::check(&args)?;
        self.inner.accumulator(args)
    }

    fn state_fields(&self, args: StateFieldsArgs<'_>) -> Result<Vec<FieldRef>> {
        self.inner.state_fields(args)
    }

    fn groups_accumulator_supported(&self, args: AccumulatorArgs<'_>) -> bool {
        self.inner.groups_accumulator_supported(args)
    }

    fn create_groups_accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn GroupsAccumulator>> {
        Self::check(&args)?;
        self.inner.create_groups_accumulator(args)
    }

    fn reverse_expr(&self) -> ReversedUDAF {
        ReversedUDAF::Reversed(string_agg())
    }
}

/// The arguments of a call for so many rows.
struct Arguments<'a> {
    values: &'a [ColumnarValue],
    rows: usize,
}

impl Arguments<'_> {
    /// What `of` says of each row of argument `at`. A constant is looked at once: for all rows, it may be large itself.
    fn each<T: Copy>(&self, at: usize, of: impl Fn(&ArrayRef) -> Result<Vec<T>>) -> Result<Vec<T>> {
        match self.values.get(at) {
            Some(ColumnarValue::Array(array)) => of(array),
            Some(ColumnarValue::Scalar(scalar)) => Ok(of(&scalar.to_array()?)?.repeat(self.rows)),
            None => Ok(Vec::new()),
        }
    }

    /// What `of` says of all rows of argument `at` together.
    fn all(&self, at: usize, of: impl Fn(&ArrayRef) -> Result<u128>) -> Result<u128> {
        match self.values.get(at) {
            Some(ColumnarValue::Array(array)) => of(array),
            Some(ColumnarValue::Scalar(scalar)) => Ok(of(&scalar.to_array()?)?.saturating_mul(self.rows as u128)),
            None => Ok(0),
        }
    }
}

/// Integers, NULL and negative ones as 0.
fn counts(array: &ArrayRef) -> Result<Vec<u128>> {
    let array = cast(array, &DataType::Int64)?;
    let counts = array.as_primitive::<Int64Type>().iter();
    Ok(counts.map(|count| u128::try_from(count.unwrap_or(0)).unwrap_or(0)).collect())
}

/// Lengths of texts in bytes, and of lists in elements.
fn lengths(array: &ArrayRef) -> Result<Vec<u128>> {
    if array.data_type().is_null() {
        return Ok(vec![0; array.len()]);
    }
    counts(&length(array)?)
}

/// Bytes of texts.
fn text(array: &ArrayRef) -> Result<u128> {
    Ok(sum(&lengths(array)?))
}

/// Bytes of `array`, without what it does not show of its buffers.
fn bytes(array: &ArrayRef) -> Result<u128> {
    const OFFSET_BYTES: u128 = 4;
    let offsets = array.len() as u128 * OFFSET_BYTES;
    if let Some(elements) = elements(array) {
        return Ok(bytes(&elements)? + offsets);
    }
    if joins(array.data_type()) {
        return Ok(text(array)? + offsets);
    }
    Ok(array.to_data().get_slice_memory_size()? as u128)
}

/// Bytes of each row, at least one.
fn sizes(array: &ArrayRef) -> Result<Vec<u128>> {
    (0..array.len()).map(|row| Ok(bytes(&array.slice(row, 1))?.max(1))).collect()
}

/// What lists hold.
fn elements(lists: &ArrayRef) -> Option<ArrayRef> {
    fn shown<O: OffsetSizeTrait>(lists: &GenericListArray<O>) -> ArrayRef {
        let (first, end) = (lists.offsets()[0].as_usize(), lists.offsets()[lists.len()].as_usize());
        lists.values().slice(first, end - first)
    }
    match lists.data_type() {
        DataType::List(_) => Some(shown(lists.as_list::<i32>())),
        DataType::LargeList(_) => Some(shown(lists.as_list::<i64>())),
        DataType::FixedSizeList(..) => Some(Arc::clone(lists.as_fixed_size_list().values())),
        _ => None,
    }
}

/// How many values lists hold, those of lists within lists.
fn leaves(array: &ArrayRef) -> u128 {
    elements(array).map_or(array.len() as u128, |elements| leaves(&elements))
}

fn sum(numbers: &[u128]) -> u128 {
    numbers.iter().fold(0, |sum, number| sum.saturating_add(*number))
}

fn products(left: &[u128], right: &[u128]) -> u128 {
    left.iter().zip(right).fold(0, |sum, (a, b)| sum.saturating_add(a.saturating_mul(*b)))
}

fn repeated_text(args: &Arguments<'_>) -> Result<u128> {
    Ok(products(&args.each(0, lengths)?, &args.each(1, counts)?))
}

fn padded_text(args: &Arguments<'_>) -> Result<u128> {
    args.all(1, |array| Ok(sum(&counts(array)?)))
}

fn replaced_text(args: &Arguments<'_>) -> Result<u128> {
    let (texts, from, to) = (args.each(0, lengths)?, args.each(1, lengths)?, args.each(2, lengths)?);
    let times: Vec<u128> = texts.iter().zip(&from).map(|(text, from)| text / from.max(&1) + 1).collect();
    Ok(products(&times, &to).saturating_add(sum(&texts)))
}

/// `regexp_replace(text, pattern, replacement, flags)`: one match or, with the flag `g`, one before each byte; and what
/// matches may stand in its replacement many times.
fn replaced_matches(args: &Arguments<'_>) -> Result<u128> {
    let (texts, to, references) = (args.each(0, lengths)?, args.each(2, lengths)?, args.each(2, references)?);
    let once = match args.values.get(3) {
        None => true,
        Some(ColumnarValue::Scalar(flags)) => !flags.try_as_str().flatten().is_some_and(|flags| flags.contains('g')),
        Some(ColumnarValue::Array(_)) => false,
    };
    let times: Vec<u128> = texts.iter().map(|text| if once { 1 } else { text + 1 }).collect();
    let (own, matched) = (sum(&texts), products(&references, &texts));
    Ok(products(&times, &to).saturating_add(own).saturating_add(matched))
}

/// How often a replacement may name what matched: `\1`, `$1`.
fn references(replacements: &ArrayRef) -> Result<Vec<u128>> {
    let replacements = cast(replacements, &DataType::Utf8)?;
    let texts = replacements.as_string::<i32>().iter();
    Ok(texts.map(|text| text.map_or(0, |text| text.matches(['\\', '$']).count() as u128)).collect())
}

fn joined_text(args: &Arguments<'_>) -> Result<u128> {
    (0..args.values.len()).try_fold(0_u128, |made, at| Ok(made.saturating_add(args.all(at, text)?)))
}

/// `concat_ws(separator, text, …)`.
fn separated_text(args: &Arguments<'_>) -> Result<u128> {
    let separators = args.all(0, text)?.saturating_mul(args.values.len() as u128);
    Ok(joined_text(args)?.saturating_add(separators))
}

/// `array_to_string(list, delimiter, text of NULL)`.
fn listed_text(args: &Arguments<'_>) -> Result<u128> {
    /// What a number is longer as a text.
    const MORE_BYTES: u128 = 16;
    let longest = |at: usize| Ok::<_, DataFusionError>(args.each(at, lengths)?.into_iter().max().unwrap_or(0));
    let each = longest(1)?.saturating_add(longest(2)?).saturating_add(MORE_BYTES);
    let count = args.all(0, |lists| Ok(leaves(lists)))?;
    Ok(args.all(0, bytes)?.saturating_add(count.saturating_mul(each)))
}

/// A list of the arguments, or one of their elements.
fn gathered(args: &Arguments<'_>) -> Result<u128> {
    (0..args.values.len()).try_fold(0_u128, |made, at| Ok(made.saturating_add(args.all(at, bytes)?)))
}

fn repeated_element(args: &Arguments<'_>) -> Result<u128> {
    Ok(products(&args.each(0, sizes)?, &args.each(1, counts)?))
}

fn resized_list(args: &Arguments<'_>) -> Result<u128> {
    const NULL_BYTES: u128 = 8;
    let counts = args.each(1, counts)?;
    let sizes = if args.values.len() > 2 { args.each(2, sizes)? } else { vec![NULL_BYTES; counts.len()] };
    Ok(products(&counts, &sizes))
}

/// `array_replace_all(list, from, to)`.
fn replaced_elements(args: &Arguments<'_>) -> Result<u128> {
    let replaced = products(&args.each(0, lengths)?, &args.each(2, sizes)?);
    Ok(args.all(0, bytes)?.saturating_add(replaced))
}

/// `arrays_zip(list, …)`: all become as long as the longest.
fn zipped(args: &Arguments<'_>) -> Result<u128> {
    const NULL_BYTES: u128 = 8;
    let mut longest = vec![0; args.rows];
    for at in 0..args.values.len() {
        longest.iter_mut().zip(args.each(at, lengths)?).for_each(|(most, length)| *most = length.max(*most));
    }
    let filled = sum(&longest).saturating_mul(args.values.len() as u128).saturating_mul(NULL_BYTES);
    Ok(gathered(args)?.saturating_add(filled))
}

/// `series(stop)`, `series(start, stop)`, `series(start, stop, step)`, of integers or of times.
fn series(args: &Arguments<'_>) -> Result<u128> {
    const VALUE_BYTES: u128 = 8;
    let (start, stop) = match args.values.len() {
        0 => return Ok(0),
        1 => (vec![0; args.rows], args.each(0, positions)?),
        _ => (args.each(0, positions)?, args.each(1, positions)?),
    };
    let step = match args.values.get(2) {
        Some(step) if matches!(step.data_type(), DataType::Interval(_)) => args.each(2, microseconds)?,
        Some(_) => args.each(2, positions)?,
        None => vec![1; start.len()],
    };
    let values = start.iter().zip(&stop).zip(&step).fold(0_u128, |sum, ((start, stop), step)| {
        sum.saturating_add((stop - start).unsigned_abs() / step.unsigned_abs().max(1))
    });
    Ok(values.saturating_mul(VALUE_BYTES))
}

/// Integers, or times in microseconds.
fn positions(array: &ArrayRef) -> Result<Vec<i128>> {
    let array = match array.data_type() {
        ty if ty.is_temporal() => cast(array, &DataType::Timestamp(TimeUnit::Microsecond, None))?,
        _ => Arc::clone(array),
    };
    let array = cast(&array, &DataType::Int64)?;
    Ok(array.as_primitive::<Int64Type>().iter().map(|value| i128::from(value.unwrap_or(0))).collect())
}

/// Intervals in microseconds, a month as its shortest.
fn microseconds(intervals: &ArrayRef) -> Result<Vec<i128>> {
    const MICROS_PER_DAY: i128 = 86_400_000_000;
    let intervals = cast(intervals, &DataType::Interval(IntervalUnit::MonthDayNano))?;
    let micros = intervals.as_primitive::<IntervalMonthDayNanoType>().iter().map(|interval| {
        interval.map_or(1, |i| {
            let days = i128::from(i.months) * 28 + i128::from(i.days);
            days * MICROS_PER_DAY + i128::from(i.nanoseconds) / 1_000
        })
    });
    Ok(micros.collect())
}
