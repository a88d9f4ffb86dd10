//! Values on their way into columns: literals, parameters, defaults and what is computed.

use std::sync::Arc;
use std::sync::OnceLock;

use arrow::array::{Array as _, ArrayRef, AsArray as _};
use arrow::datatypes::DataType;
use datafusion::common::tree_node::TreeNode as _;
use datafusion::common::{DFSchema, ScalarValue};
use datafusion::error::DataFusionError;
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::simplify::SimplifyContext;
use datafusion::logical_expr::{Expr as Logical, LogicalPlanBuilder};
use datafusion::optimizer::simplify_expressions::ExprSimplifier;
use datafusion::sql::sqlparser::ast::{Expr, UnaryOperator, Value as Literal};
use kalamdb_model::defaults::{DefaultCall, DefaultExpr};
use kalamdb_model::names::SYSTEM_COLUMNS;
use kalamdb_model::{Column, ColumnType, TableEntry, Value};
use serde_json::value::RawValue;

use super::{Request, Sql, rewrite};
use crate::catalog::Snapshot;
use crate::engine::now_us;
use crate::error::ApiError;

/// Position in the table of each column of the statement.
pub(super) fn targets(table: &TableEntry, columns: &[String]) -> Result<Vec<usize>, ApiError> {
    if columns.is_empty() {
        return Ok((0..table.columns.len()).collect());
    }
    let mut targets = Vec::with_capacity(columns.len());
    for name in columns {
        let position = writable(table, name)?;
        if targets.contains(&position) {
            return Err(ApiError::invalid("INVALID_SQL", format!("column `{name}` is named twice")));
        }
        targets.push(position);
    }
    Ok(targets)
}

/// Position in the table of a column that a statement writes.
pub(super) fn writable(table: &TableEntry, name: &str) -> Result<usize, ApiError> {
    if SYSTEM_COLUMNS.contains(&name) {
        let message = format!("`{name}` is a system column and cannot be written");
        return Err(ApiError::invalid("READ_ONLY_COLUMN", message));
    }
    table.position(name).ok_or_else(|| no_column(table, name))
}

fn no_column(table: &TableEntry, name: &str) -> ApiError {
    let names: Vec<&str> = table.columns.iter().map(|column| column.name.as_str()).collect();
    let shown: String = name.chars().take(64).collect();
    let message = format!("`{}` has no column `{shown}`; it has `{}`", table.name, names.join("`, `"));
    ApiError::invalid("COLUMN_NOT_FOUND", message)
}

/// The key of a row as the sender wrote it, shortened.
pub(super) fn shown_key(table: &TableEntry, key_positions: &[usize], values: &[Value]) -> String {
    let parts = key_positions.iter().map(|at| {
        let text: String = match &values[*at] {
            Value::BigInt(v) | Value::Timestamp(v) | Value::Time(v) => v.to_string(),
            Value::Int(v) | Value::Date(v) => v.to_string(),
            Value::SmallInt(v) => v.to_string(),
            Value::Text(text) => format!("'{}'", text.chars().take(64).collect::<String>()),
            Value::Uuid(bytes) => uuid::Uuid::from_bytes(*bytes).to_string(),
            _ => "…".to_owned(),
        };
        format!("{} = {text}", table.columns[*at].name)
    });
    parts.collect::<Vec<_>>().join(", ")
}

/// Evaluates the expressions of one statement.
pub(super) struct Evaluate<'a> {
    sql: &'a Sql,
    request: &'a Request<'a>,
    snapshot: &'a Arc<Snapshot>,
    now_us: i64,
    /// For computed values; opened with the first.
    session: OnceLock<SessionState>,
}

impl<'a> Evaluate<'a> {
    pub(super) fn new(sql: &'a Sql, request: &'a Request<'a>, snapshot: &'a Arc<Snapshot>) -> Self {
        Self { sql, request, snapshot, now_us: now_us(), session: OnceLock::new() }
    }

    /// Row `number` of VALUES, counted from 1: all its values, and whether the whole key was generated.
    pub(super) fn row(
        &self,
        table: &TableEntry,
        targets: &[usize],
        number: usize,
        exprs: &[Expr],
    ) -> Result<(Vec<Value>, bool), ApiError> {
        if exprs.len() != targets.len() {
            let message = format!("row {number} has {} value(s) for {} column(s)", exprs.len(), targets.len());
            return Err(ApiError::invalid("INVALID_SQL", message));
        }
        let mut given: Vec<Option<Value>> = vec![None; table.columns.len()];
        for (expr, at) in exprs.iter().zip(targets) {
            given[*at] = self.value(expr, &table.columns[*at], Some(number))?;
        }
        Ok(self.complete(table, given))
    }

    /// A row with defaults in the place of what is not given, and whether the whole key was generated.
    pub(super) fn complete(&self, table: &TableEntry, given: Vec<Option<Value>>) -> (Vec<Value>, bool) {
        let mut generated: Vec<bool> = vec![false; table.columns.len()];
        let complete = given.into_iter().zip(&table.columns).enumerate().map(|(at, (given, column))| {
            given.unwrap_or_else(|| {
                let (value, fresh) = self.default(column);
                generated[at] = fresh;
                value
            })
        });
        let values = complete.collect();
        (values, table.key_positions().iter().all(|at| generated[*at]))
    }

    /// A value for `column`, in row `number` of the statement if it has numbered rows; `None` for DEFAULT.
    pub(super) fn value(&self, expr: &Expr, column: &Column, number: Option<usize>) -> Result<Option<Value>, ApiError> {
        let misfit = |message: String| {
            let row = number.map_or_else(String::new, |number| format!("row {number}, "));
            ApiError::invalid("INVALID_VALUE", format!("{row}column `{}`: {message}", column.name))
        };
        let of_text =
            |text: &str| Value::from_text(text, &column.ty).map(Some).map_err(|error| misfit(error.to_string()));
        match expr {
            Expr::Identifier(ident) if ident.quote_style.is_none() && ident.value.eq_ignore_ascii_case("default") => {
                Ok(None)
            }
            Expr::Value(literal) => match &literal.value {
                Literal::Null => Ok(Some(Value::Null)),
                Literal::Placeholder(name) => {
                    let raw = self.parameter(name)?;
                    Value::from_json(raw, &column.ty).map(Some).map_err(|error| misfit(format!("{name}: {error}")))
                }
                Literal::Number(text, _) if takes_numbers(&column.ty) => of_text(text),
                Literal::Boolean(flag) if column.ty == ColumnType::Boolean => Ok(Some(Value::Boolean(*flag))),
                Literal::SingleQuotedString(text) | Literal::EscapedStringLiteral(text) => of_text(text),
                Literal::DollarQuotedString(text) => of_text(&text.value),
                Literal::HexStringLiteral(hex) if column.ty == ColumnType::Bytes => of_text(&format!("\\x{hex}")),
                Literal::Number(text, _) => Err(misfit(format!("expected {}, got the number `{text}`", column.ty))),
                _ => self.computed(expr, column).map(Some).map_err(misfit),
            },
            Expr::UnaryOp { op: UnaryOperator::Minus, expr: inner } => match &**inner {
                Expr::Value(literal) => match &literal.value {
                    Literal::Number(text, _) if takes_numbers(&column.ty) => of_text(&format!("-{text}")),
                    _ => self.computed(expr, column).map(Some).map_err(misfit),
                },
                _ => self.computed(expr, column).map(Some).map_err(misfit),
            },
            Expr::Function(function) if default_call(function).is_some() => {
                let call = default_call(function).ok_or_else(|| misfit("unknown function".to_owned()))?;
                if !call.fits(&column.ty) {
                    return Err(misfit(format!("`{}` gives no {}", call.as_str(), column.ty)));
                }
                Ok(Some(self.call(call, &column.ty)))
            }
            _ => self.computed(expr, column).map(Some).map_err(misfit),
        }
    }

    fn parameter(&self, name: &str) -> Result<&RawValue, ApiError> {
        let invalid = |message: String| ApiError::invalid("INVALID_PARAMETER", message);
        let number: usize = name
            .strip_prefix('$')
            .and_then(|digits| digits.parse().ok())
            .filter(|number| *number >= 1)
            .ok_or_else(|| invalid(format!("`{name}` is no parameter; use $1, $2, …")))?;
        let sent = self.request.params.len();
        let missing = || invalid(format!("the statement uses ${number}, and {sent} parameter(s) were sent"));
        self.request.params.get(number - 1).copied().ok_or_else(missing)
    }

    pub(super) fn default(&self, column: &Column) -> (Value, bool) {
        match &column.default {
            None => (Value::Null, false),
            Some(DefaultExpr::Call(call)) => (self.call(*call, &column.ty), call.rises()),
            Some(literal) => (literal.literal().cloned().unwrap_or(Value::Null), false),
        }
    }

    fn call(&self, call: DefaultCall, ty: &ColumnType) -> Value {
        const MICROS_PER_DAY: i64 = 86_400_000_000;
        match call {
            DefaultCall::Now => match ty {
                ColumnType::Date => Value::Date(i32::try_from(self.now_us.div_euclid(MICROS_PER_DAY)).unwrap_or(0)),
                ColumnType::Time => Value::Time(self.now_us.rem_euclid(MICROS_PER_DAY)),
                _ => Value::Timestamp(self.now_us),
            },
            DefaultCall::SnowflakeId => Value::BigInt(self.sql.snowflake.lock().next(self.now_us / 1_000)),
            DefaultCall::UuidV7 => {
                let uuid = uuid::Uuid::now_v7();
                if *ty == ColumnType::Uuid { Value::Uuid(uuid.into_bytes()) } else { Value::Text(uuid.to_string()) }
            }
            DefaultCall::Ulid => Value::Text(ulid::Ulid::generate().to_string()),
            DefaultCall::CurrentUser => Value::Text(self.request.identity.user.to_string()),
        }
    }

    /// Any other expression without columns: DataFusion computes it, and its type must fit the column's.
    fn computed(&self, expr: &Expr, column: &Column) -> Result<Value, String> {
        if contains_placeholder(expr) {
            return Err("a parameter must be a value of its own, not part of an expression".to_owned());
        }
        let array = self.evaluate(expr).map_err(|error| plain(&error))?;
        let mut values = assign(&array, column).map_err(|(_, message)| message)?;
        values.pop().ok_or_else(|| "no value".to_owned())
    }

    /// One row of one column: what `expr` is, by the same rules as in a query.
    fn evaluate(&self, expr: &Expr) -> Result<ArrayRef, DataFusionError> {
        let state = self.session();
        let schema = DFSchema::empty();
        let mut expr = expr.clone();
        rewrite::expression(&mut expr);
        let spoken = datafusion::sql::sqlparser::ast::ExprWithAlias { expr, alias: None };
        let logical = state.create_logical_expr_from_sql_expr(spoken, &schema)?;
        if logical.exists(|expr| Ok(needs_rows(expr)))? {
            return Err(DataFusionError::Plan("VALUES takes no subqueries, aggregates or window functions".to_owned()));
        }
        let plan = LogicalPlanBuilder::empty(true).project([logical])?.build()?;
        let options = state.config().options();
        let analyzed = state.analyzer().execute_and_check(plan, options, |_, _| ())?;
        let context = SimplifyContext::builder()
            .with_schema(Arc::new(schema.clone()))
            .with_config_options(Arc::clone(options))
            .with_query_execution_start_time(chrono::DateTime::from_timestamp_micros(self.now_us))
            .build();
        let simplifier = ExprSimplifier::new(context);
        let logical =
            analyzed.expressions().pop().ok_or_else(|| DataFusionError::Internal("no expression".to_owned()))?;
        let physical = state.create_physical_expr(simplifier.simplify(logical)?, &schema)?;
        let batch = arrow::array::RecordBatch::try_new_with_options(
            Arc::new(arrow::datatypes::Schema::empty()),
            Vec::new(),
            &arrow::array::RecordBatchOptions::new().with_row_count(Some(1)),
        )?;
        physical.evaluate(&batch)?.into_array(1)
    }

    fn session(&self) -> &SessionState {
        self.session.get_or_init(|| {
            self.sql.sessions.open(self.request.identity, self.snapshot, self.request.namespace, false, Vec::new())
        })
    }
}

/// What went wrong, without DataFusion's names for kinds of errors.
fn plain(error: &DataFusionError) -> String {
    match error.find_root() {
        DataFusionError::Plan(message)
        | DataFusionError::Execution(message)
        | DataFusionError::NotImplemented(message) => message.clone(),
        DataFusionError::SchemaError(error, _) => error.to_string(),
        DataFusionError::ArrowError(error, _) => error.to_string(),
        DataFusionError::ResourcesExhausted(message) => message.clone(),
        other => other.strip_backtrace(),
    }
}

/// Computed values for a column, whose type must fit the column's.
///
/// # Errors
/// What is wrong, and in which row if it is one row's fault.
pub(super) fn assign(array: &ArrayRef, column: &Column) -> Result<Vec<Value>, (Option<usize>, String)> {
    let whole = |message: String| (None, message);
    if array.null_count() == array.len() || *array.data_type() == DataType::Null {
        return Ok(vec![Value::Null; array.len()]);
    }
    let wanted = column.ty.arrow();
    if !assignable(array.data_type(), &wanted) {
        return Err(whole(format!("the expression is {}, expected {}", array.data_type(), column.ty)));
    }
    let options = arrow::compute::CastOptions { safe: false, ..Default::default() };
    let cast = arrow::compute::cast_with_options(array, &wanted, &options).map_err(|error| whole(error.to_string()))?;
    if rounds(array, &cast).map_err(|error| whole(error.to_string()))? {
        return Err(whole(format!("the result would be rounded to {}; use ROUND or CAST", column.ty)));
    }
    let value = |row: usize| {
        let scalar = ScalarValue::try_from_array(&cast, row).map_err(|error| (Some(row), plain(&error)))?;
        of_scalar(&scalar, &column.ty).map_err(|message| (Some(row), message))
    };
    (0..cast.len()).map(value).collect()
}

fn needs_rows(expr: &Logical) -> bool {
    matches!(
        expr,
        Logical::AggregateFunction(_)
            | Logical::WindowFunction(_)
            | Logical::ScalarSubquery(_)
            | Logical::Exists(_)
            | Logical::InSubquery(_)
            | Logical::SetComparison(_)
            | Logical::Unnest(_)
    )
}

/// Whether a number lost digits on its way into a column of whole numbers or decimals. Into FLOAT and DOUBLE every number
/// is rounded, as a literal is.
fn rounds(from: &ArrayRef, to: &ArrayRef) -> Result<bool, arrow::error::ArrowError> {
    if let (DataType::List(_), DataType::List(_)) = (from.data_type(), to.data_type()) {
        return rounds(from.as_list::<i32>().values(), to.as_list::<i32>().values());
    }
    let exact = to.data_type().is_integer() || to.data_type().is_decimal();
    if !exact || !from.data_type().is_numeric() {
        return Ok(false);
    }
    Ok(*arrow::compute::cast(to, from.data_type())? != **from)
}

/// Whether a computed value of type `from` may become `to`: within numbers, within text, within times; never from text
/// to numbers, which a literal does without a computation.
fn assignable(from: &DataType, to: &DataType) -> bool {
    let numeric = |ty: &DataType| ty.is_numeric();
    let texty = |ty: &DataType| matches!(ty, DataType::Utf8 | DataType::Utf8View | DataType::LargeUtf8);
    let binary = |ty: &DataType| matches!(ty, DataType::Binary | DataType::BinaryView | DataType::LargeBinary);
    match (from, to) {
        // The items as the values of a column.
        (DataType::List(from), DataType::List(to)) => {
            from.data_type().is_null() || assignable(from.data_type(), to.data_type())
        }
        (DataType::LargeList(from) | DataType::FixedSizeList(from, _), DataType::List(to)) => {
            from.data_type() == to.data_type()
        }
        (from, to) if from.is_temporal() && to.is_temporal() => true,
        (from, to) => {
            from == to || (numeric(from) && numeric(to)) || (texty(from) && texty(to)) || (binary(from) && binary(to))
        }
    }
}

fn of_scalar(scalar: &ScalarValue, ty: &ColumnType) -> Result<Value, String> {
    let text = |text: &str| Value::from_text(text, ty).map_err(|error| error.to_string());
    Ok(match (scalar, ty) {
        (scalar, _) if scalar.is_null() => Value::Null,
        (ScalarValue::Boolean(Some(v)), _) => Value::Boolean(*v),
        (ScalarValue::Int16(Some(v)), _) => Value::SmallInt(*v),
        (ScalarValue::Int32(Some(v)), _) => Value::Int(*v),
        (ScalarValue::Int64(Some(v)), _) => Value::BigInt(*v),
        (ScalarValue::Float32(Some(v)), _) => Value::Float(*v),
        (ScalarValue::Float64(Some(v)), _) => Value::Double(*v),
        (ScalarValue::Decimal128(Some(v), precision, _), _)
            if v.unsigned_abs() >= 10_u128.pow(u32::from(*precision)) =>
        {
            return Err(format!("the result is out of range for {ty}"));
        }
        (ScalarValue::Decimal128(Some(v), _, _), _) => Value::Decimal(*v),
        (ScalarValue::Utf8(Some(v)), _) => text(v)?,
        (ScalarValue::Binary(Some(v)), _) => Value::Bytes(v.clone()),
        (ScalarValue::TimestampMicrosecond(Some(v), _), _) => Value::Timestamp(*v),
        (ScalarValue::Date32(Some(v)), _) => Value::Date(*v),
        (ScalarValue::Time64Microsecond(Some(v)), _) => Value::Time(*v),
        (ScalarValue::List(list), ColumnType::Array(item)) => {
            let values = list.value(0);
            let items = (0..values.len()).map(|at| {
                let scalar = ScalarValue::try_from_array(&values, at).map_err(|error| error.strip_backtrace())?;
                of_scalar(&scalar, item)
            });
            Value::Array(items.collect::<Result<_, String>>()?)
        }
        (scalar, _) => return Err(format!("a computed {} cannot be stored as {ty}", scalar.data_type())),
    })
}

fn takes_numbers(ty: &ColumnType) -> bool {
    matches!(
        ty,
        ColumnType::SmallInt
            | ColumnType::Int
            | ColumnType::BigInt
            | ColumnType::Float
            | ColumnType::Double
            | ColumnType::Decimal { .. }
            | ColumnType::Timestamp
            | ColumnType::Date
            | ColumnType::Time
    )
}

fn default_call(function: &datafusion::sql::sqlparser::ast::Function) -> Option<DefaultCall> {
    use datafusion::sql::sqlparser::ast::FunctionArguments;
    let no_arguments = match &function.args {
        FunctionArguments::None => true,
        FunctionArguments::List(list) => list.args.is_empty() && list.clauses.is_empty(),
        FunctionArguments::Subquery(_) => false,
    };
    DefaultCall::by_name(&function.name.to_string()).filter(|_| no_arguments)
}

fn contains_placeholder(expr: &Expr) -> bool {
    use datafusion::sql::sqlparser::ast::visit_expressions;
    use std::ops::ControlFlow;
    visit_expressions(expr, |expr| match expr {
        Expr::Value(value) if matches!(value.value, Literal::Placeholder(_)) => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    })
    .is_break()
}
