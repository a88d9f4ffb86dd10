//! `INSERT INTO t [(columns)] VALUES …`: from expressions to checked, encoded rows.

use std::cell::OnceCell;
use std::sync::Arc;

use arrow::array::{Array as _, ArrayRef};
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
use kalamdb_model::{Column, ColumnType, TableEntry, Value, key};
use kalamdb_write_buffer::{EncodedRow, row};
use serde_json::value::RawValue;

use super::parse::InsertValues;
use super::{Request, Sql, engine_errors, owner_for, rewrite};
use crate::catalog::Snapshot;
use crate::engine::{NewRow, now_us};
use crate::error::{ApiError, Kind};
use crate::http::encode::Answer;

/// Largest primary key, encoded: every file's smallest and largest key stand in its manifest.
const KEY_BYTES_MAX: usize = 8 << 10;

/// A row before encoding: values in table order, and whether the whole key was generated.
struct Row {
    values: Vec<Value>,
    generated_key: bool,
}

impl Sql {
    pub(super) async fn insert(
        &self,
        request: &Request<'_>,
        snapshot: &Arc<Snapshot>,
        insert: &InsertValues,
    ) -> Result<Answer, ApiError> {
        let table = Arc::clone(self.resolve(request, snapshot, &insert.table)?);
        let owner = owner_for(&table, request.identity, true)?;
        let (count, limit) = (insert.rows.len(), self.limits.insert_rows_max);
        if count > limit {
            let message = format!("the statement has {count} rows, at most {limit} are taken at once");
            return Err(ApiError::new(Kind::TooLarge, "TOO_MANY_ROWS", message));
        }
        let targets = targets(&table, &insert.columns)?;
        let mut used = vec![false; request.params.len()];
        let evaluate = Evaluate { sql: self, request, snapshot, now_us: now_us(), session: OnceCell::new() };
        let mut rows = Vec::with_capacity(count);
        for (index, exprs) in insert.rows.iter().enumerate() {
            rows.push(evaluate.row(&table, &targets, index, exprs, &mut used)?);
        }
        if let Some(index) = used.iter().position(|used| !used) {
            let message = format!("parameter ${} was sent, and the statement does not use it", index + 1);
            return Err(ApiError::invalid("INVALID_PARAMETER", message));
        }
        let positions = table.key_positions();
        let encoded: Vec<NewRow> = rows.iter().map(|row| encode(&table, &positions, row)).collect();
        if let Some(index) = encoded.iter().position(|row| row.encoded.key.len() > KEY_BYTES_MAX) {
            let columns: Vec<&str> = positions.iter().map(|at| table.columns[*at].name.as_str()).collect();
            let message = format!(
                "row {}: its primary key (`{}`) has {} bytes, at most {KEY_BYTES_MAX} are taken",
                index + 1,
                columns.join("`, `"),
                encoded[index].encoded.key.len()
            );
            return Err(ApiError::new(Kind::TooLarge, "KEY_TOO_LARGE", message));
        }
        let key_text = |index: usize| shown_key(&table, &positions, &rows[index]);
        // A task of its own: a client that hangs up must not stop a write between the buffer and its locks.
        let (engine, into) = (Arc::clone(&self.engine), Arc::clone(&table));
        let written = tokio::spawn(async move { engine.insert(&into, &owner, encoded).await })
            .await
            .map_err(|error| ApiError::internal(&error))?
            .map_err(|error| engine_errors::of_write(error, key_text))?;
        Ok(Answer::affected(written, format!("inserted {written} row(s)")))
    }

    fn next_snowflake(&self, now_us: i64) -> i64 {
        self.snowflake.lock().next(now_us / 1_000)
    }
}

/// Position in the table of each column of the statement.
fn targets(table: &TableEntry, columns: &[String]) -> Result<Vec<usize>, ApiError> {
    if columns.is_empty() {
        return Ok((0..table.columns.len()).collect());
    }
    let mut targets = Vec::with_capacity(columns.len());
    for name in columns {
        if SYSTEM_COLUMNS.contains(&name.as_str()) {
            return Err(ApiError::invalid(
                "READ_ONLY_COLUMN",
                format!("`{name}` is a system column and cannot be written"),
            ));
        }
        let position = table.position(name).ok_or_else(|| no_column(table, name))?;
        if targets.contains(&position) {
            return Err(ApiError::invalid("INVALID_SQL", format!("column `{name}` is named twice")));
        }
        targets.push(position);
    }
    Ok(targets)
}

fn no_column(table: &TableEntry, name: &str) -> ApiError {
    let names: Vec<&str> = table.columns.iter().map(|column| column.name.as_str()).collect();
    let shown: String = name.chars().take(64).collect();
    let message = format!("`{}` has no column `{shown}`; it has `{}`", table.name, names.join("`, `"));
    ApiError::invalid("COLUMN_NOT_FOUND", message)
}

fn encode(table: &TableEntry, key_positions: &[usize], row: &Row) -> NewRow {
    let key_values: Vec<Value> = key_positions.iter().map(|at| row.values[*at].clone()).collect();
    let encoded = EncodedRow { key: key::encode(&key_values), value: row::encode(table, &row.values) };
    NewRow { encoded, generated: row.generated_key }
}

/// The key of a row as the sender wrote it, shortened.
fn shown_key(table: &TableEntry, key_positions: &[usize], row: &Row) -> String {
    let parts = key_positions.iter().map(|at| {
        let text: String = match &row.values[*at] {
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
struct Evaluate<'a> {
    sql: &'a Sql,
    request: &'a Request<'a>,
    snapshot: &'a Arc<Snapshot>,
    now_us: i64,
    /// For computed values; opened with the first.
    session: OnceCell<SessionState>,
}

impl Evaluate<'_> {
    fn row(
        &self,
        table: &TableEntry,
        targets: &[usize],
        index: usize,
        exprs: &[Expr],
        used: &mut [bool],
    ) -> Result<Row, ApiError> {
        let number = index + 1;
        if exprs.len() != targets.len() {
            let message = format!("row {number} has {} value(s) for {} column(s)", exprs.len(), targets.len());
            return Err(ApiError::invalid("INVALID_SQL", message));
        }
        let mut given: Vec<Option<Value>> = vec![None; table.columns.len()];
        for (expr, at) in exprs.iter().zip(targets) {
            let column = &table.columns[*at];
            given[*at] = self.value(expr, column, number, used)?;
        }
        let mut generated: Vec<bool> = vec![false; table.columns.len()];
        let mut values = Vec::with_capacity(given.len());
        for (at, (given, column)) in given.into_iter().zip(&table.columns).enumerate() {
            let value = match given {
                Some(value) => value,
                None => {
                    let (value, fresh) = self.default(column);
                    generated[at] = fresh;
                    value
                }
            };
            if value.is_null() && !column.nullable {
                let message = format!("row {number}: column `{}` must not be NULL", column.name);
                return Err(ApiError::invalid("NULL_VALUE", message));
            }
            values.push(value);
        }
        self.check_size(number, &values)?;
        let generated_key = table.key_positions().iter().all(|at| generated[*at]);
        Ok(Row { values, generated_key })
    }

    fn check_size(&self, number: usize, values: &[Value]) -> Result<(), ApiError> {
        let (bytes, limit) = (values.iter().map(Value::size).sum::<usize>(), self.sql.limits.row_bytes_max);
        if bytes > limit {
            let message = format!("row {number} has {bytes} bytes, at most {limit} are taken");
            return Err(ApiError::new(Kind::TooLarge, "ROW_TOO_LARGE", message));
        }
        Ok(())
    }

    /// `None` for DEFAULT.
    fn value(&self, expr: &Expr, column: &Column, number: usize, used: &mut [bool]) -> Result<Option<Value>, ApiError> {
        let misfit = |message: String| {
            ApiError::invalid("INVALID_VALUE", format!("row {number}, column `{}`: {message}", column.name))
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
                    let raw = self.parameter(name, used)?;
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

    fn parameter(&self, name: &str, used: &mut [bool]) -> Result<&RawValue, ApiError> {
        let invalid = |message: String| ApiError::invalid("INVALID_PARAMETER", message);
        let number: usize = name
            .strip_prefix('$')
            .and_then(|digits| digits.parse().ok())
            .filter(|number| *number >= 1)
            .ok_or_else(|| invalid(format!("`{name}` is no parameter; use $1, $2, …")))?;
        let sent = self.request.params.len();
        let raw = self
            .request
            .params
            .get(number - 1)
            .ok_or_else(|| invalid(format!("the statement uses ${number}, and {sent} parameter(s) were sent")))?;
        used[number - 1] = true;
        Ok(raw)
    }

    fn default(&self, column: &Column) -> (Value, bool) {
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
            DefaultCall::SnowflakeId => Value::BigInt(self.sql.next_snowflake(self.now_us)),
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
        if array.is_null(0) {
            return Ok(Value::Null);
        }
        let wanted = column.ty.arrow();
        if !assignable(array.data_type(), &wanted) {
            return Err(format!("the expression is {}, expected {}", array.data_type(), column.ty));
        }
        let options = arrow::compute::CastOptions { safe: false, ..Default::default() };
        let cast = arrow::compute::cast_with_options(&array, &wanted, &options).map_err(|error| error.to_string())?;
        if rounds(&array, &cast).map_err(|error| error.to_string())? {
            return Err(format!("the result would be rounded to {}; use ROUND or CAST", column.ty));
        }
        let scalar = ScalarValue::try_from_array(&cast, 0).map_err(|error| plain(&error))?;
        of_scalar(&scalar, &column.ty)
    }

    /// One row of one column: what `expr` is, by the same rules as in a query.
    fn evaluate(&self, expr: &Expr) -> Result<ArrayRef, DataFusionError> {
        let state = self.session()?;
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

    fn session(&self) -> Result<&SessionState, DataFusionError> {
        if let Some(session) = self.session.get() {
            return Ok(session);
        }
        let session = self.sql.sessions.open(self.request.identity, self.snapshot, self.request.namespace, false)?;
        Ok(self.session.get_or_init(|| session))
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
        (DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..), DataType::List(_)) => true,
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
