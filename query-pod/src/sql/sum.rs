//! `SUM` that is exact or an error.
//!
//! DataFusion adds integers and decimals modulo 2⁶⁴ and 2¹²⁸. Here both are added as 128-bit integers, and a sum that does
//! not fit its type is an error. Everything else about SUM, other types included, is DataFusion's.

use std::collections::HashSet;
use std::mem::size_of;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray as _, BooleanArray, Decimal128Array, Int64Array};
use arrow::datatypes::{DECIMAL128_MAX_PRECISION, DataType, Decimal128Type, Field, FieldRef, Int64Type};
use arrow::error::ArrowError;
use datafusion::common::{Result, ScalarValue};
use datafusion::functions_aggregate::sum::Sum;
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::format_state_name;
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, EmitTo, GroupsAccumulator, ReversedUDAF, Signature,
};

/// `sum`, in place of DataFusion's.
pub(super) fn function() -> Arc<AggregateUDF> {
    Arc::new(AggregateUDF::from(ExactSum { inner: Sum::new() }))
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct ExactSum {
    inner: Sum,
}

/// A type whose values are added here.
#[derive(Clone, Copy, Debug)]
enum Exact {
    BigInt,
    Decimal { precision: u8, scale: i8 },
}

impl Exact {
    const fn of(result: &DataType) -> Option<Self> {
        match result {
            DataType::Int64 => Some(Self::BigInt),
            DataType::Decimal128(precision, scale) => Some(Self::Decimal { precision: *precision, scale: *scale }),
            _ => None,
        }
    }

    /// Partial sums travel as decimals: those of integers stay below 2⁶³ times the number of rows.
    const fn state_type(self) -> DataType {
        match self {
            Self::BigInt => DataType::Decimal128(DECIMAL128_MAX_PRECISION, 0),
            Self::Decimal { scale, .. } => DataType::Decimal128(DECIMAL128_MAX_PRECISION, scale),
        }
    }

    /// Visits the values of `array`, arguments or states.
    fn for_each(array: &ArrayRef, mut visit: impl FnMut(usize, i128) -> Result<()>) -> Result<()> {
        let valid = |row: &usize| array.is_valid(*row);
        match array.data_type() {
            DataType::Int64 => {
                let values = array.as_primitive::<Int64Type>().values();
                (0..values.len()).filter(valid).try_for_each(|row| visit(row, i128::from(values[row])))
            }
            _ => {
                let values = array.as_primitive::<Decimal128Type>().values();
                (0..values.len()).filter(valid).try_for_each(|row| visit(row, values[row]))
            }
        }
    }

    /// Sums as the result's type.
    fn results(self, sums: &[Option<i128>]) -> Result<ArrayRef> {
        match self {
            Self::BigInt => {
                let fits = |sum: i128| i64::try_from(sum).map_err(|_| overflow());
                let sums = sums.iter().map(|sum| sum.map(fits).transpose()).collect::<Result<Int64Array>>()?;
                Ok(Arc::new(sums))
            }
            Self::Decimal { precision, scale } => {
                let limit = 10_u128.pow(u32::from(precision));
                if sums.iter().flatten().any(|sum| sum.unsigned_abs() >= limit) {
                    return Err(overflow());
                }
                let sums: Decimal128Array = sums.iter().copied().collect();
                Ok(Arc::new(sums.with_precision_and_scale(precision, scale)?))
            }
        }
    }

    fn states(self, sums: &[Option<i128>]) -> Result<ArrayRef> {
        let sums: Decimal128Array = sums.iter().copied().collect();
        Ok(Arc::new(sums.with_data_type(self.state_type())))
    }
}

fn overflow() -> datafusion::error::DataFusionError {
    ArrowError::ArithmeticOverflow(
        "the SUM does not fit its type; cast the argument to DECIMAL(38, 0) or DOUBLE".to_owned(),
    )
    .into()
}

fn plus(sum: i128, value: i128) -> Result<i128> {
    sum.checked_add(value).ok_or_else(overflow)
}

impl AggregateUDFImpl for ExactSum {
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
        match Exact::of(args.return_field.data_type()) {
            Some(exact) if args.is_distinct => {
                Ok(Box::new(DistinctSum { inner: self.inner.accumulator(args)?, exact }))
            }
            Some(exact) => Ok(Box::new(PlainSum { exact, sum: 0, count: 0 })),
            None => self.inner.accumulator(args),
        }
    }

    fn create_sliding_accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        match Exact::of(args.return_field.data_type()) {
            Some(exact) if !args.is_distinct => Ok(Box::new(PlainSum { exact, sum: 0, count: 0 })),
            _ => self.inner.create_sliding_accumulator(args),
        }
    }

    fn state_fields(&self, args: StateFieldsArgs<'_>) -> Result<Vec<FieldRef>> {
        match Exact::of(args.return_field.data_type()) {
            Some(exact) if !args.is_distinct => {
                Ok(vec![Arc::new(Field::new(format_state_name(args.name, "sum"), exact.state_type(), true))])
            }
            _ => self.inner.state_fields(args),
        }
    }

    fn groups_accumulator_supported(&self, args: AccumulatorArgs<'_>) -> bool {
        self.inner.groups_accumulator_supported(args)
    }

    fn create_groups_accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn GroupsAccumulator>> {
        match Exact::of(args.return_field.data_type()) {
            Some(exact) => Ok(Box::new(GroupSums { exact, sums: Vec::new() })),
            None => self.inner.create_groups_accumulator(args),
        }
    }

    fn reverse_expr(&self) -> ReversedUDAF {
        ReversedUDAF::Identical
    }

    fn order_sensitivity(&self) -> datafusion::logical_expr::utils::AggregateOrderSensitivity {
        self.inner.order_sensitivity()
    }
}

/// The sum of one group or window.
#[derive(Debug)]
struct PlainSum {
    exact: Exact,
    sum: i128,
    count: u64,
}

impl PlainSum {
    fn current(&self) -> [Option<i128>; 1] {
        [(self.count > 0).then_some(self.sum)]
    }
}

impl Accumulator for PlainSum {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        Exact::for_each(&values[0], |_, value| {
            self.sum = plus(self.sum, value)?;
            self.count += 1;
            Ok(())
        })
    }

    fn retract_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        Exact::for_each(&values[0], |_, value| {
            self.sum = self.sum.checked_sub(value).ok_or_else(overflow)?;
            self.count -= 1;
            Ok(())
        })
    }

    fn supports_retract_batch(&self) -> bool {
        true
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        self.update_batch(states)
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        ScalarValue::try_from_array(&self.exact.results(&self.current())?, 0)
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        Ok(vec![ScalarValue::try_from_array(&self.exact.states(&self.current())?, 0)?])
    }

    fn size(&self) -> usize {
        size_of::<Self>()
    }
}

/// `SUM(DISTINCT …)`: DataFusion gathers the values, their sum is ours.
#[derive(Debug)]
struct DistinctSum {
    inner: Box<dyn Accumulator>,
    exact: Exact,
}

impl Accumulator for DistinctSum {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.inner.update_batch(values)
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        self.inner.merge_batch(states)
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        let mut distinct = HashSet::new();
        for state in self.inner.state()? {
            if let ScalarValue::List(list) = state {
                Exact::for_each(&list.value(0), |_, value| {
                    distinct.insert(value);
                    Ok(())
                })?;
            }
        }
        let sum = distinct.iter().try_fold(0, |sum, value| plus(sum, *value))?;
        ScalarValue::try_from_array(&self.exact.results(&[(!distinct.is_empty()).then_some(sum)])?, 0)
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        self.inner.state()
    }

    fn size(&self) -> usize {
        size_of::<Self>() + self.inner.size()
    }
}

/// The sums of many groups; `None` for a group without a value.
#[derive(Debug)]
struct GroupSums {
    exact: Exact,
    sums: Vec<Option<i128>>,
}

impl GroupsAccumulator for GroupSums {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        total: usize,
    ) -> Result<()> {
        self.sums.resize(total, None);
        let wanted = |row: usize| filter.is_none_or(|filter| filter.is_valid(row) && filter.value(row));
        Exact::for_each(&values[0], |row, value| {
            if wanted(row) {
                let sum = &mut self.sums[groups[row]];
                *sum = Some(plus(sum.unwrap_or(0), value)?);
            }
            Ok(())
        })
    }

    fn merge_batch(&mut self, states: &[ArrayRef], groups: &[usize], total: usize) -> Result<()> {
        self.update_batch(states, groups, None, total)
    }

    fn evaluate(&mut self, emit: EmitTo) -> Result<ArrayRef> {
        self.exact.results(&emit.take_needed(&mut self.sums))
    }

    fn state(&mut self, emit: EmitTo) -> Result<Vec<ArrayRef>> {
        Ok(vec![self.exact.states(&emit.take_needed(&mut self.sums))?])
    }

    fn convert_to_state(&self, values: &[ArrayRef], filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        let mut sums = vec![None; values[0].len()];
        let wanted = |row: usize| filter.is_none_or(|filter| filter.is_valid(row) && filter.value(row));
        Exact::for_each(&values[0], |row, value| {
            sums[row] = wanted(row).then_some(value);
            Ok(())
        })?;
        Ok(vec![self.exact.states(&sums)?])
    }

    fn size(&self) -> usize {
        self.sums.capacity() * size_of::<Option<i128>>()
    }
}
