//! Bounds on functions that make much of little: `repeat('x', 2000000000)` would take the memory of the whole pod, and
//! what a function allocates is not counted by the query's memory limit.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray as _, Int64Array, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, FieldRef, Int64Type, IntervalMonthDayNanoType, IntervalUnit, TimeUnit};
use datafusion::common::{Result, resources_datafusion_err};
use datafusion::logical_expr::simplify::{ExprSimplifyResult, SimplifyContext};
use datafusion::logical_expr::{
    ColumnarValue, Documentation, Expr, ReturnFieldArgs, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature,
};

/// Estimates how many bytes a call makes.
type Estimate = fn(&[ArrayRef]) -> Result<u128>;

/// Functions whose result may be much larger than their arguments.
const AMPLIFIERS: [(&str, Estimate); 8] = [
    ("repeat", repeated_text),
    ("lpad", padded_text),
    ("rpad", padded_text),
    ("replace", replaced_text),
    ("array_repeat", repeated_element),
    ("array_resize", resized_list),
    ("range", series),
    ("generate_series", series),
];

/// `functions` with bounds: no call of an amplifier makes more than `bytes_max` bytes.
pub(super) fn bounded(functions: Vec<Arc<ScalarUDF>>, bytes_max: usize) -> Vec<Arc<ScalarUDF>> {
    let bound = |function: Arc<ScalarUDF>| match AMPLIFIERS.iter().find(|(name, _)| *name == function.name()) {
        Some((_, estimate)) => {
            Arc::new(ScalarUDF::from(Bounded { inner: function, estimate: *estimate, bytes_max: bytes_max as u128 }))
        }
        None => function,
    };
    functions.into_iter().map(bound).collect()
}

#[derive(Debug)]
struct Bounded {
    inner: Arc<ScalarUDF>,
    estimate: Estimate,
    bytes_max: u128,
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

impl ScalarUDFImpl for Bounded {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn aliases(&self) -> &[String] {
        self.inner.aliases()
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

    fn simplify(&self, args: Vec<Expr>, context: &SimplifyContext) -> Result<ExprSimplifyResult> {
        self.inner.simplify(args, context)
    }

    fn documentation(&self) -> Option<&Documentation> {
        self.inner.documentation()
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> Result<ColumnarValue> {
        let all_scalar = args.args.iter().all(|arg| matches!(arg, ColumnarValue::Scalar(_)));
        let rows = if all_scalar { 1 } else { args.number_rows };
        let arrays: Vec<ArrayRef> = args.args.iter().map(|arg| arg.to_array(rows)).collect::<Result<_>>()?;
        let bytes = (self.estimate)(&arrays)?;
        if bytes > self.bytes_max {
            return Err(resources_datafusion_err!("`{}` would make about {bytes} bytes", self.name()));
        }
        self.inner.invoke_with_args(args)
    }
}

/// Argument `at` as integers, NULL and negative ones as 0.
fn counts(args: &[ArrayRef], at: usize) -> Result<Vec<u128>> {
    let Some(array) = args.get(at) else { return Ok(Vec::new()) };
    let array = cast(array, &DataType::Int64)?;
    let array: &Int64Array = array.as_primitive::<Int64Type>();
    Ok(array.iter().map(|count| u128::try_from(count.unwrap_or(0)).unwrap_or(0)).collect())
}

/// Lengths of the texts of argument `at`, in bytes.
fn lengths(args: &[ArrayRef], at: usize) -> Result<Vec<u128>> {
    let Some(array) = args.get(at) else { return Ok(Vec::new()) };
    let array = cast(array, &DataType::Utf8)?;
    let array: &StringArray = array.as_string::<i32>();
    Ok(array.iter().map(|text| text.map_or(0, str::len) as u128).collect())
}

fn products(left: &[u128], right: &[u128]) -> u128 {
    left.iter().zip(right).fold(0, |sum, (a, b)| sum.saturating_add(a.saturating_mul(*b)))
}

fn repeated_text(args: &[ArrayRef]) -> Result<u128> {
    Ok(products(&lengths(args, 0)?, &counts(args, 1)?))
}

fn padded_text(args: &[ArrayRef]) -> Result<u128> {
    Ok(counts(args, 1)?.iter().fold(0, |sum, count| sum.saturating_add(*count)))
}

fn replaced_text(args: &[ArrayRef]) -> Result<u128> {
    let (texts, from, to) = (lengths(args, 0)?, lengths(args, 1)?, lengths(args, 2)?);
    let times: Vec<u128> = texts.iter().zip(&from).map(|(text, from)| text / from.max(&1) + 1).collect();
    Ok(products(&times, &to).saturating_add(texts.iter().sum()))
}

/// Bytes that one row of `array` takes on average.
fn row_bytes(array: &ArrayRef) -> u128 {
    (array.get_buffer_memory_size() / array.len().max(1)).max(1) as u128
}

fn repeated_element(args: &[ArrayRef]) -> Result<u128> {
    let total = counts(args, 1)?.iter().fold(0_u128, |sum, count| sum.saturating_add(*count));
    Ok(args.first().map_or(0, |element| total.saturating_mul(row_bytes(element))))
}

fn resized_list(args: &[ArrayRef]) -> Result<u128> {
    let total = counts(args, 1)?.iter().fold(0_u128, |sum, count| sum.saturating_add(*count));
    Ok(total.saturating_mul(args.get(2).map_or(8, row_bytes)))
}

/// `series(stop)`, `series(start, stop)`, `series(start, stop, step)`, of integers or of times.
fn series(args: &[ArrayRef]) -> Result<u128> {
    let position = |array: &ArrayRef| -> Result<Vec<i128>> {
        let array = match array.data_type() {
            ty if ty.is_temporal() => cast(array, &DataType::Timestamp(TimeUnit::Microsecond, None))?,
            _ => Arc::clone(array),
        };
        let array = cast(&array, &DataType::Int64)?;
        Ok(array.as_primitive::<Int64Type>().iter().map(|value| i128::from(value.unwrap_or(0))).collect())
    };
    let (start, stop) = match args {
        [stop] => (vec![0; stop.len()], position(stop)?),
        [start, stop, ..] => (position(start)?, position(stop)?),
        [] => return Ok(0),
    };
    let step = match args.get(2) {
        Some(step) if matches!(step.data_type(), DataType::Interval(_)) => microseconds(step)?,
        Some(step) => position(step)?,
        None => vec![1; start.len()],
    };
    const VALUE_BYTES: u128 = 8;
    let values = start.iter().zip(&stop).zip(&step).fold(0_u128, |sum, ((start, stop), step)| {
        sum.saturating_add((stop - start).unsigned_abs() / step.unsigned_abs().max(1))
    });
    Ok(values.saturating_mul(VALUE_BYTES))
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
