//! Statements that need no planner: one row by its whole primary key, the first or last rows by key, and `count(*)` of a
//! table.
//!
//! Owns: which statements are taken ([`by_key`], [`by_order`], [`count`]), decided from what was parsed alone. Only what certainly means
//! the same to the planner is: a wrong name, a parameter too many, a literal of another type than its column (which the
//! planner may convert), NULL and all else go the general way, and so get its answer or its error.

use std::sync::Arc;

use arrow::array::{Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};
use datafusion::sql::sqlparser::ast::{
    self, BinaryOperator, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArgumentList, FunctionArguments,
    GroupByExpr, Ident, LimitClause, ObjectName, ObjectNamePart, OrderBy, OrderByExpr, OrderByKind, Query, Select,
    SelectItem, SelectItemQualifiedWildcardKind, SetExpr, TableFactor, UnaryOperator, Value as Literal, ValueWithSpan,
};
use kalamdb_model::key::{self, KeyRange};
use kalamdb_model::names::SYSTEM_COLUMNS;
use kalamdb_model::{Column, ColumnType, TableEntry, Value};
use kalamdb_write_buffer::{BatchBuilder, RowError, row};
use serde_json::value::RawValue;

use super::parse::table_ref;
use super::parse_dml::plain_table;
use super::query::of_datafusion;
use super::scopes::folded;
use super::{Request, Sql, engine_errors, owner_for, provider, wildcard};
use crate::catalog::Snapshot;
use crate::engine::{Row, Window};
use crate::error::ApiError;
use crate::http::Room;
use crate::http::encode::{Answer, Encoder};

impl Sql {
    /// The answer to a query that needs no planner. `None`: it goes the general way.
    pub(super) async fn answer_fast(
        &self,
        request: &Request<'_>,
        snapshot: &Snapshot,
        query: &ast::Statement,
    ) -> Result<Option<Answer>, ApiError> {
        let answered = if let Some((table, name)) = count(query, snapshot, request.namespace) {
            self.count_rows(request, snapshot, &table, name).await?
        } else if let Some(asked) = by_key(query, snapshot, request.namespace, request.params) {
            self.row_by_key(request, asked).await?
        } else if let Some(asked) = by_order(query, snapshot, request.namespace, request.params) {
            self.rows_by_order(request, asked).await?
        } else {
            None
        };
        let Some((schema, batch)) = answered else { return Ok(None) };
        let room = Room::new(Arc::clone(&self.answers_bytes), request.identity.user.clone());
        let mut encoder = Encoder::new(&schema, self.limits.answer_bytes_max, room);
        encoder.push(&batch).await?;
        self.metrics.fast_statements.inc();
        Ok(Some(encoder.finish()))
    }

    async fn row_by_key(&self, request: &Request<'_>, asked: ByKey) -> Result<Option<(Schema, RecordBatch)>, ApiError> {
        let table = &asked.table;
        let Ok(owner) = owner_for(table, request.identity, false) else { return Ok(None) };
        if asked.parameters != request.params.len() {
            return Ok(None);
        }
        let found = self.engine.get(table, &owner, asked.key.clone()).await;
        let row = match found.map_err(|error| engine_errors::of_read(&error))? {
            None => None,
            Some(Row::Buffered(row)) => Some(row),
            Some(Row::Filed(_)) if asked.shows_system_columns() => return Ok(None),
            Some(Row::Filed(values)) => Some(row::encode(table, &values)),
        };
        let batch = asked.batch(row.as_deref()).map_err(|error| ApiError::internal(&error))?;
        Ok(Some((named(&batch, &asked.names), batch)))
    }

    async fn rows_by_order(
        &self,
        request: &Request<'_>,
        asked: ByOrder,
    ) -> Result<Option<(Schema, RecordBatch)>, ApiError> {
        let table = &asked.table;
        let Ok(owner) = owner_for(table, request.identity, false) else { return Ok(None) };
        if asked.parameters != request.params.len() {
            return Ok(None);
        }
        let (engine, of, window) = (Arc::clone(&self.engine), Arc::clone(table), asked.window.clone());
        let found = self.workers.run(async move { engine.range(&of, &owner, window).await }).await;
        let found = found.map_err(|error| ApiError::internal(&error))?;
        let Some(rows) = found.map_err(|error| engine_errors::of_read(&error))? else { return Ok(None) };
        let mut builder = BatchBuilder::new(table, &asked.columns);
        for row in rows {
            let row = match row {
                Row::Buffered(row) => row,
                Row::Filed(values) => row::encode(table, &values),
            };
            builder.push(&row).map_err(|error| ApiError::internal(&error))?;
        }
        let batch = builder.finish().map_err(|error| ApiError::internal(&error))?;
        Ok(Some((named(&batch, &asked.names), batch)))
    }

    /// From the manifest and the heads of buffered rows; no file is read, but where it is not known yet which of its rows
    /// buffered ones replace.
    async fn count_rows(
        &self,
        request: &Request<'_>,
        snapshot: &Snapshot,
        table: &Arc<TableEntry>,
        name: String,
    ) -> Result<Option<(Schema, RecordBatch)>, ApiError> {
        let Ok(owner) = owner_for(table, request.identity, false) else { return Ok(None) };
        if !request.params.is_empty() {
            return Ok(None);
        }
        let rows = self.engine.read(table, &owner, Vec::new(), None).await;
        let rows = rows.map_err(|error| engine_errors::of_read(&error))?;
        let mut count: usize = rows.buffered.iter().map(RecordBatch::num_rows).sum();
        for file in &rows.view.manifest.files {
            let shown = provider::partitioned(file, rows.replaced.get(file.path.as_str()))
                .map_err(|error| of_datafusion(error, snapshot, &self.limits))?;
            count += shown.map_or(0, |(_, shown)| shown);
        }
        let count = i64::try_from(count).map_err(|error| ApiError::internal(&error))?;
        let schema = Schema::new(vec![Field::new(name, DataType::Int64, false)]);
        let batch = RecordBatch::try_new(Arc::new(schema.clone()), vec![Arc::new(Int64Array::from(vec![count]))]);
        Ok(Some((schema, batch.map_err(|error| ApiError::internal(&error))?)))
    }
}

/// The columns of `batch` under these names.
fn named(batch: &RecordBatch, names: &[String]) -> Schema {
    let fields = batch.schema();
    let named = fields.fields().iter().zip(names).map(|(field, name)| field.as_ref().clone().with_name(name));
    Schema::new(named.collect::<Vec<Field>>())
}

/// What a statement asks for: columns of the row with a primary key.
#[derive(Debug, PartialEq)]
pub(super) struct ByKey {
    pub(super) table: Arc<TableEntry>,
    /// Positions in the table's Arrow schema.
    pub(super) columns: Vec<usize>,
    /// What the answer calls them.
    pub(super) names: Vec<String>,
    /// Memcomparable.
    pub(super) key: Vec<u8>,
    /// How many parameters the key takes, each once.
    pub(super) parameters: usize,
}

impl ByKey {
    /// The columns of `row`, as it is stored, or of no row.
    pub(super) fn batch(&self, row: Option<&[u8]>) -> Result<RecordBatch, RowError> {
        let mut builder = BatchBuilder::new(&self.table, &self.columns);
        row.map_or(Ok(()), |row| builder.push(row))?;
        builder.finish()
    }

    /// Whether a system column is asked for.
    pub(super) fn shows_system_columns(&self) -> bool {
        self.columns.iter().any(|at| *at >= self.table.columns.len())
    }
}

/// `SELECT columns FROM t WHERE` the whole primary key `= …`; `None`: it is something else, or may mean something else.
pub(super) fn by_key(
    statement: &ast::Statement,
    snapshot: &Snapshot,
    namespace: Option<&str>,
    params: &[&RawValue],
) -> Option<ByKey> {
    let (select, limit) = plain_select(statement, None)?;
    limits_to_some(limit)?;
    let source = Source::of(select, snapshot, namespace)?;
    let (columns, names) = source.columns(&select.projection)?;
    let mut given: Vec<Option<&Expr>> = vec![None; source.table.columns.len()];
    source.comparisons(select.selection.as_ref()?, &mut given)?;
    let positions = source.table.key_positions();
    if given.iter().flatten().count() != positions.len() {
        return None;
    }
    let mut used = vec![false; params.len()];
    let mut values = Vec::with_capacity(positions.len());
    for at in positions {
        values.push(value(given[at]?, &source.table.columns[at], params, &mut used)?);
    }
    let parameters = used.iter().filter(|used| **used).count();
    Some(ByKey { key: key::encode(&values), table: source.table, columns, names, parameters })
}

/// `SELECT count(*) FROM t` and no more: the table, and what the answer calls the number.
pub(super) fn count(
    statement: &ast::Statement,
    snapshot: &Snapshot,
    namespace: Option<&str>,
) -> Option<(Arc<TableEntry>, String)> {
    let (select, limit) = plain_select(statement, None)?;
    limits_to_some(limit)?;
    let source = Source::of(select, snapshot, namespace)?;
    let (expr, name) = match select.projection.as_slice() {
        [SelectItem::UnnamedExpr(expr)] => (expr, "count(*)".to_owned()),
        [SelectItem::ExprWithAlias { expr, alias }] => (expr, name(alias)?),
        _ => return None,
    };
    (select.selection.is_none() && counts_rows(expr)).then_some((source.table, name))
}

fn counts_rows(expr: &Expr) -> bool {
    let Expr::Function(Function {
        name,
        uses_odbc_syntax: false,
        parameters: FunctionArguments::None,
        args: FunctionArguments::List(FunctionArgumentList { duplicate_treatment: None, args, clauses }),
        filter: None,
        null_treatment: None,
        over: None,
        within_group,
    }) = expr
    else {
        return false;
    };
    let [ObjectNamePart::Identifier(name)] = name.0.as_slice() else { return false };
    let all = matches!(args.as_slice(), [FunctionArg::Unnamed(FunctionArgExpr::Wildcard)]);
    all && clauses.is_empty() && within_group.is_empty() && folded(name) == "count"
}

/// The SELECT of a query without WITH and so on, and its LIMIT; with ORDER BY only where `order` takes it.
fn plain_select<'s>(
    statement: &'s ast::Statement,
    order: Option<&mut Option<&'s OrderBy>>,
) -> Option<(&'s Select, Option<&'s LimitClause>)> {
    let ast::Statement::Query(query) = statement else { return None };
    let Query {
        with: None,
        body,
        order_by,
        limit_clause,
        fetch: None,
        locks,
        for_clause: None,
        settings: None,
        format_clause: None,
        pipe_operators,
    } = &**query
    else {
        return None;
    };
    match (order_by, order) {
        (None, _) => {}
        (Some(by), Some(order)) => *order = Some(by),
        (Some(_), None) => return None,
    }
    let SetExpr::Select(select) = &**body else { return None };
    // Every field by name: one that a later parser adds does not go unseen.
    let Select {
        select_token: _,
        optimizer_hints,
        distinct: None,
        select_modifiers: None,
        top: None,
        top_before_distinct: false,
        projection: _,
        exclude: None,
        into: None,
        from: _,
        lateral_views,
        prewhere: None,
        selection: _,
        connect_by,
        group_by: GroupByExpr::Expressions(groups, modifiers),
        cluster_by,
        distribute_by,
        sort_by,
        having: None,
        named_window,
        qualify: None,
        window_before_qualify: false,
        value_table_mode: None,
        flavor: ast::SelectFlavor::Standard,
    } = &**select
    else {
        return None;
    };
    let plain = optimizer_hints.is_empty()
        && lateral_views.is_empty()
        && connect_by.is_empty()
        && groups.is_empty()
        && modifiers.is_empty()
        && cluster_by.is_empty()
        && distribute_by.is_empty()
        && sort_by.is_empty()
        && named_window.is_empty();
    (plain && locks.is_empty() && pipe_operators.is_empty()).then_some((select, limit_clause.as_ref()))
}

/// What `LIMIT n` without OFFSET says.
fn limit_of(limit: &LimitClause) -> Option<&Literal> {
    let LimitClause::LimitOffset { limit: Some(Expr::Value(limit)), offset: None, limit_by } = limit else {
        return None;
    };
    limit_by.is_empty().then_some(&limit.value)
}

/// Whether a query that finds one row may give it: LIMIT may be a number but 0.
fn limits_to_some(limit: Option<&LimitClause>) -> Option<()> {
    let Some(limit) = limit else { return Some(()) };
    let Literal::Number(text, false) = limit_of(limit)? else { return None };
    (all_digits(text) && text.parse::<i64>().is_ok_and(|limit| limit > 0)).then_some(())
}

/// Most rows by order that are taken: from there on planning is a small part of the work.
const ORDERED_ROWS_MAX: usize = 1_000;

/// What a statement asks for: columns of the first or last rows by primary key.
#[derive(Debug, PartialEq)]
pub(super) struct ByOrder {
    table: Arc<TableEntry>,
    /// Positions in the table's Arrow schema.
    columns: Vec<usize>,
    /// What the answer calls them.
    names: Vec<String>,
    window: Window,
    /// How many parameters it takes, each once.
    parameters: usize,
}

/// What a column is compared with.
#[derive(Clone, Copy, Default)]
struct Compared<'e> {
    equal: Option<&'e Expr>,
    /// With whether the bound itself is meant, too.
    above: Option<(&'e Expr, bool)>,
    below: Option<(&'e Expr, bool)>,
}

/// `SELECT columns FROM t WHERE` the first key columns `= …` and the next one is in a range `ORDER BY` the key `LIMIT n`;
/// `None`: it is something else, or may mean something else.
pub(super) fn by_order(
    statement: &ast::Statement,
    snapshot: &Snapshot,
    namespace: Option<&str>,
    params: &[&RawValue],
) -> Option<ByOrder> {
    let mut order = None;
    let (select, limit) = plain_select(statement, Some(&mut order))?;
    let source = Source::of(select, snapshot, namespace)?;
    let (columns, names) = source.columns(&select.projection)?;
    // Files are read without them.
    if columns.iter().any(|at| *at >= source.table.columns.len()) {
        return None;
    }
    let mut compared = vec![Compared::default(); source.table.columns.len()];
    if let Some(selection) = &select.selection {
        source.ranges(selection, &mut compared)?;
    }
    let key = source.table.key_positions();
    let equal = key.iter().take_while(|at| compared[**at].equal.is_some()).count();
    let others = || compared.iter().enumerate().filter(|(at, _)| !key.iter().take(equal + 1).any(|key| key == at));
    let one_is_compared = |one: &Compared<'_>| one.equal.is_some() || one.above.is_some() || one.below.is_some();
    if equal == key.len() || others().any(|(_, one)| one_is_compared(one)) {
        return None;
    }
    let descending = source.direction(order?, &columns, &names, &key, equal)?;
    let mut used = vec![false; params.len()];
    let mut value = |expr: &Expr, at: usize| value(expr, &source.table.columns[at], params, &mut used);
    let mut prefix = Vec::with_capacity(equal);
    for at in key.iter().take(equal) {
        prefix.push(value(compared[*at].equal?, *at)?);
    }
    let next = key[equal];
    let with = |last: Value| key::encode(&prefix.iter().cloned().chain([last]).collect::<Vec<_>>());
    let mut range = KeyRange::beginning_with(&key::encode(&prefix));
    if equal == 0 {
        range = KeyRange::default();
    }
    let Compared { above, below, .. } = compared[next];
    // The order of texts of these types is not that of their values for every way to write them.
    if (above.is_some() || below.is_some()) && matches!(source.table.columns[next].ty, ColumnType::Uuid) {
        return None;
    }
    if let Some((bound, inclusive)) = above {
        let bound = with(value(bound, next)?);
        range.from = if inclusive { bound } else { key::after(&bound)? };
    }
    if let Some((bound, inclusive)) = below {
        let bound = with(value(bound, next)?);
        range.to = if inclusive { Some(key::after(&bound)?) } else { Some(bound) };
    }
    let limit = match limit_of(limit?)? {
        Literal::Number(text, false) => text.as_str(),
        Literal::Placeholder(name) => {
            let number: usize = name.strip_prefix('$')?.parse().ok()?;
            let at = number.checked_sub(1)?;
            if *name != format!("${number}") || std::mem::replace(used.get_mut(at)?, true) {
                return None;
            }
            params.get(at)?.get()
        }
        _ => return None,
    };
    let limit = Some(limit).filter(|limit| all_digits(limit))?.parse().ok()?;
    if !(1..=ORDERED_ROWS_MAX).contains(&limit) {
        return None;
    }
    let parameters = used.iter().filter(|used| **used).count();
    let window = Window { range, limit, descending };
    Some(ByOrder { table: source.table, columns, names, window, parameters })
}

/// The one table that a SELECT reads.
struct Source {
    table: Arc<TableEntry>,
    /// What its columns may be qualified with.
    qualifier: String,
    /// Whether that is an alias: `t.*` of a table that is called `app.t` is an error.
    aliased: bool,
}

impl Source {
    fn of(select: &Select, snapshot: &Snapshot, namespace: Option<&str>) -> Option<Self> {
        let [from] = select.from.as_slice() else { return None };
        let (object, alias) = plain_table(from).ok()?;
        object.0.iter().try_for_each(|part| name(part.as_ident()?).map(drop))?;
        let qualified = table_ref(&object).ok()?.qualified(namespace).ok()?;
        let aliased = matches!(&from.relation, TableFactor::Table { alias: Some(_), .. });
        let source = Self { table: Arc::clone(snapshot.table(&qualified)?), qualifier: name(&alias)?, aliased };
        // `x.y` could be a part of a column `x`, too.
        source.table.position(&source.qualifier).is_none().then_some(source)
    }

    /// Position in the table's Arrow schema and name of the column that `expr` is.
    fn column(&self, expr: &Expr) -> Option<(usize, String)> {
        let column = match expr {
            Expr::Identifier(column) => name(column)?,
            Expr::CompoundIdentifier(parts) => match parts.as_slice() {
                [qualifier, column] if name(qualifier)? == self.qualifier => name(column)?,
                _ => return None,
            },
            _ => return None,
        };
        let system = || SYSTEM_COLUMNS.iter().position(|name| *name == column);
        let at = self.table.position(&column).or_else(|| Some(self.table.columns.len() + system()?))?;
        Some((at, column))
    }

    /// Positions and names of what is selected; no name twice, which is an error.
    fn columns(&self, items: &[SelectItem]) -> Option<(Vec<usize>, Vec<String>)> {
        let (mut columns, mut names) = (Vec::new(), Vec::new());
        for item in items {
            let (at, name) = match item {
                SelectItem::UnnamedExpr(expr) => self.column(expr)?,
                SelectItem::ExprWithAlias { expr, alias } => (self.column(expr)?.0, name(alias)?),
                item if self.is_wildcard(item) => {
                    columns.extend(0..self.table.columns.len());
                    names.extend(self.table.columns.iter().map(|column| column.name.to_string()));
                    continue;
                }
                _ => return None,
            };
            columns.push(at);
            names.push(name);
        }
        let mut sorted: Vec<&str> = names.iter().map(String::as_str).collect();
        sorted.sort_unstable();
        let distinct = !sorted.windows(2).any(|pair| pair[0] == pair[1]);
        (distinct && !columns.is_empty()).then_some((columns, names))
    }

    fn is_wildcard(&self, item: &SelectItem) -> bool {
        let of_table = |object: &ObjectName| match object.0.as_slice() {
            [ObjectNamePart::Identifier(ident)] => name(ident).is_some_and(|name| name == self.qualifier),
            _ => false,
        };
        match item {
            SelectItem::Wildcard(options) => wildcard::plain(options).is_ok(),
            SelectItem::QualifiedWildcard(SelectItemQualifiedWildcardKind::ObjectName(object), options) => {
                self.aliased && of_table(object) && wildcard::plain(options).is_ok()
            }
            _ => false,
        }
    }

    /// As [`Source::comparisons`], with `<` and its like.
    fn ranges<'e>(&self, expr: &'e Expr, compared: &mut [Compared<'e>]) -> Option<()> {
        let Expr::BinaryOp { left, op, right } = expr else { return None };
        if *op == BinaryOperator::And {
            self.ranges(left, compared)?;
            return self.ranges(right, compared);
        }
        let (at, value, turned) = match (self.column(left), self.column(right)) {
            (Some((at, _)), None) => (at, &**right, false),
            (None, Some((at, _))) => (at, &**left, true),
            _ => return None,
        };
        let column = compared.get_mut(at)?;
        if column.equal.is_some() {
            return None;
        }
        let twice = match (op, turned) {
            (BinaryOperator::Eq, _) if column.above.is_none() && column.below.is_none() => {
                column.equal.replace(value).is_some()
            }
            (BinaryOperator::Gt, false) | (BinaryOperator::Lt, true) => column.above.replace((value, false)).is_some(),
            (BinaryOperator::GtEq, false) | (BinaryOperator::LtEq, true) => {
                column.above.replace((value, true)).is_some()
            }
            (BinaryOperator::Lt, false) | (BinaryOperator::Gt, true) => column.below.replace((value, false)).is_some(),
            (BinaryOperator::LtEq, false) | (BinaryOperator::GtEq, true) => {
                column.below.replace((value, true)).is_some()
            }
            _ => return None,
        };
        (!twice).then_some(())
    }

    /// Whether the rows come with the greatest key first: ORDER BY names the key columns at `key`, in their order, but
    /// perhaps those of the first `equal`, which are the same in all rows. `None`: it is another order.
    fn direction(
        &self,
        order: &OrderBy,
        columns: &[usize],
        names: &[String],
        key: &[usize],
        equal: usize,
    ) -> Option<bool> {
        let OrderBy { kind: OrderByKind::Expressions(by), interpolate: None } = order else { return None };
        let first = key.len().checked_sub(by.len()).filter(|first| *first <= equal)?;
        let mut descending = None;
        for (OrderByExpr { expr, options, with_fill }, wanted) in by.iter().zip(&key[first..]) {
            let (at, name) = self.column(expr)?;
            // A name of the answer goes before that of a column, and one that is qualified is ambiguous beside it.
            let other = names.iter().position(|other| *other == name).is_some_and(|shown| columns[shown] != at);
            let down = options.asc == Some(false);
            if at != *wanted || other || with_fill.is_some() || descending.is_some_and(|other| other != down) {
                return None;
            }
            descending = Some(down);
        }
        descending
    }

    /// Notes what each column is compared with, by the column's position. `None` if `expr` is more than such comparisons
    /// of own columns, or compares one of them twice.
    fn comparisons<'e>(&self, expr: &'e Expr, given: &mut [Option<&'e Expr>]) -> Option<()> {
        match expr {
            Expr::BinaryOp { left, op: BinaryOperator::And, right } => {
                self.comparisons(left, given)?;
                self.comparisons(right, given)
            }
            Expr::BinaryOp { left, op: BinaryOperator::Eq, right } => {
                let (at, value) = match (self.column(left), self.column(right)) {
                    (Some((at, _)), None) => (at, right),
                    (None, Some((at, _))) => (at, left),
                    _ => return None,
                };
                let slot = given.get_mut(at)?;
                if slot.is_some() || !self.table.key.contains(&self.table.columns[at].id) {
                    return None;
                }
                *slot = Some(value);
                Some(())
            }
            _ => None,
        }
    }
}

/// A name as the planner knows it.
fn name(ident: &Ident) -> Option<String> {
    matches!(ident.quote_style, None | Some('"')).then(|| folded(ident))
}

/// What a key column is compared with, as a value of the column's type: only where both ways read it the same.
fn value(expr: &Expr, column: &Column, params: &[&RawValue], used: &mut [bool]) -> Option<Value> {
    let literal = match expr {
        Expr::Value(ValueWithSpan { value, .. }) => value,
        Expr::UnaryOp { op: UnaryOperator::Minus, expr } => match &**expr {
            Expr::Value(ValueWithSpan { value: Literal::Number(text, false), .. }) => {
                return number(text, &format!("-{text}"), &column.ty);
            }
            _ => return None,
        },
        _ => return None,
    };
    match literal {
        Literal::Placeholder(name) => parameter(name, &column.ty, params, used),
        Literal::Number(text, false) => number(text, text, &column.ty),
        Literal::Boolean(flag) if column.ty == ColumnType::Boolean => Some(Value::Boolean(*flag)),
        // The planner reads texts for these types as INSERT does (`exact::fit`).
        Literal::SingleQuotedString(text) => match column.ty {
            ColumnType::Text | ColumnType::Uuid | ColumnType::Timestamp | ColumnType::Date | ColumnType::Time => {
                Value::from_text(text, &column.ty).ok()
            }
            _ => None,
        },
        _ => None,
    }
}

fn all_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// `digits` with its sign as a number of type `ty`, which it must be without any conversion that could round or overflow.
fn number(digits: &str, signed: &str, ty: &ColumnType) -> Option<Value> {
    match ty {
        ColumnType::SmallInt | ColumnType::Int | ColumnType::BigInt if all_digits(digits) => {
            Value::from_text(signed, ty).ok()
        }
        ColumnType::Decimal { precision, scale } => {
            let (whole, fraction) = match digits.split_once('.') {
                Some((whole, fraction)) => (whole, all_digits(fraction).then_some(fraction)?),
                None => (digits, ""),
            };
            // With no more digits on either side than the column, both are compared in the column's own type.
            let whole_max = usize::from(precision - scale).max(1);
            let fits = all_digits(whole) && whole.len() <= whole_max && fraction.len() <= usize::from(*scale);
            fits.then(|| Value::from_text(signed, ty).ok())?
        }
        _ => None,
    }
}

/// A parameter that stands only here: the planner then takes it for a value of the column's Arrow type (`params`).
fn parameter(name: &str, ty: &ColumnType, params: &[&RawValue], used: &mut [bool]) -> Option<Value> {
    let number: usize = name.strip_prefix('$')?.parse().ok()?;
    let at = number.checked_sub(1)?;
    let raw = params.get(at)?;
    if name != format!("${number}") || std::mem::replace(used.get_mut(at)?, true) {
        return None;
    }
    // JSON objects and arrays are taken as texts for UUID and TEXT.
    let is_text = matches!(ty, ColumnType::Text | ColumnType::Uuid);
    if is_text && !raw.get().starts_with('"') {
        return None;
    }
    Value::from_json(raw, ty).ok().filter(|value| !value.is_null())
}

#[cfg(test)]
mod tests {
    use kalamdb_model::{OnRemoval, compile};

    use super::*;
    use crate::catalog::CatalogHandle;
    use crate::sql::parse::{self, Statement};

    const TABLES: [(&str, &str); 6] = [
        ("t", "{name: id, type: BIGINT, primaryKey: true}, {name: v, type: TEXT}"),
        ("own", "{name: own, type: BIGINT, primaryKey: true}"),
        ("small", "{name: id, type: SMALLINT, primaryKey: true}, {name: x, type: INT}"),
        (
            "pair",
            "{name: b, type: BIGINT, primaryKey: true}, {name: v, type: INT}, {name: a, type: TEXT, primaryKey: true}",
        ),
        ("money", "{name: m, type: \"DECIMAL(6,2)\", primaryKey: true}"),
        ("codes", "{name: u, type: UUID, primaryKey: true}, {name: at, type: TIMESTAMP, primaryKey: true}"),
    ];

    fn snapshot() -> Arc<Snapshot> {
        let head = "
apiVersion: kalamdb.org/v1alpha1
kind: Storage
metadata: {name: local}
spec: {type: Filesystem, filesystem: {path: ./files}, userTablesTemplate: 'u/{userId}', sharedTablesTemplate: s}
---
apiVersion: kalamdb.org/v1alpha1
kind: Namespace
metadata: {name: app}
spec: {defaultStorage: local}
";
        let table = |(name, columns): &(&str, &str)| {
            format!(
                "---\napiVersion: kalamdb.org/v1alpha1\nkind: UserTable\nmetadata: {{name: app.{name}}}\nspec: \
                 {{namespaceRef: app, tableName: {name}, columns: [{columns}]}}\n"
            )
        };
        let text = format!("{head}{}", TABLES.iter().map(table).collect::<String>());
        let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), text)]);
        let dir = tempfile::tempdir().expect("a folder");
        let catalog = CatalogHandle::open(dir.path()).expect("empty");
        let (compiled, conditions) = compile(&catalog.current().catalog, &folder.declared, OnRemoval::Retain);
        assert_eq!(compiled.tables.len(), TABLES.len(), "{conditions:?}");
        catalog.serve(compiled);
        catalog.current()
    }

    fn ask(snapshot: &Snapshot, sql: &str, params: &[&str]) -> Option<ByKey> {
        let raw = |text: &&str| RawValue::from_string((*text).to_owned()).expect("JSON");
        let params: Vec<Box<RawValue>> = params.iter().map(raw).collect();
        let params: Vec<&RawValue> = params.iter().map(|raw| &**raw).collect();
        match parse::parse(sql) {
            Ok(Statement::Query(query)) => by_key(&query.statement, snapshot, Some("app"), &params),
            Ok(Statement::Update(update)) => by_key(&update.set.rows.statement, snapshot, Some("app"), &params),
            Ok(Statement::Delete(delete)) => by_key(&delete.rows.statement, snapshot, Some("app"), &params),
            other => panic!("{sql}: {other:?}"),
        }
    }

    #[test]
    fn a_whole_key_is_recognized_however_it_is_written() {
        let snapshot = snapshot();
        let uuid = "6F9619FF-8B86-D011-B42D-00CF4FC964FF";
        let bytes = *uuid::Uuid::try_parse(uuid).expect("a UUID").as_bytes();
        let codes = format!("SELECT * FROM codes WHERE at = '1970-01-01T00:00:01Z' AND '{uuid}' = u");
        let (text, big) = (|text: &str| Value::Text(text.to_owned()), Value::BigInt);
        for (sql, params, key) in [
            ("SELECT * FROM t WHERE id = 1", &[] as &[&str], vec![big(1)]),
            ("select T.ID as x, v from App.T where -7 = t.Id limit 3;", &[], vec![big(-7)]),
            ("SELECT x.*, _seq FROM t AS x WHERE x.id = $1", &["\"9223372036854775807\""], vec![big(i64::MAX)]),
            ("SELECT v FROM t WHERE id = $1", &["7e2"], vec![big(700)]),
            ("SELECT v FROM pair WHERE a = 'it''s' AND b = 007", &[], vec![big(7), text("it's")]),
            ("SELECT v FROM pair WHERE b = $2 AND a = $1", &["\"é\"", "1"], vec![big(1), text("é")]),
            ("SELECT id FROM small WHERE id = -32768", &[], vec![Value::SmallInt(i16::MIN)]),
            ("SELECT m FROM money WHERE m = 1234.50", &[], vec![Value::Decimal(123_450)]),
            ("SELECT m FROM money WHERE m = -3", &[], vec![Value::Decimal(-300)]),
            ("SELECT m FROM money WHERE m = $1", &["0.01"], vec![Value::Decimal(1)]),
            (&codes, &[], vec![Value::Uuid(bytes), Value::Timestamp(1_000_000)]),
            ("UPDATE t SET v = 'x' WHERE id = 5", &[], vec![big(5)]),
            ("DELETE FROM app.t AS y WHERE y.id = 5", &[], vec![big(5)]),
        ] {
            let asked = ask(&snapshot, sql, params).unwrap_or_else(|| panic!("not recognized: {sql}"));
            assert_eq!((asked.key, asked.parameters), (key::encode(&key), params.len()), "{sql}");
        }
        let asked = ask(&snapshot, "SELECT _deleted AS \"D\", v, b FROM pair WHERE a = '' AND b = 0", &[]);
        let asked = asked.expect("recognized");
        assert_eq!((asked.columns.as_slice(), asked.names.join(" ").as_str()), (&[5, 1, 0][..], "D v b"));
        assert!(asked.shows_system_columns());
    }

    #[test]
    fn what_may_mean_something_else_goes_the_general_way() {
        let snapshot = snapshot();
        for sql in [
            "SELECT * FROM t",
            "EXPLAIN SELECT * FROM t WHERE id = 1",
            "SELECT * FROM t WHERE id = 1 AND TRUE",
            "SELECT * FROM t WHERE (id = 1 OR FALSE)",
            "SELECT * FROM t WHERE id = 1 AND id = 1",
            "SELECT * FROM t WHERE id = 1 AND v = 'x'",
            "SELECT * FROM t WHERE v = 'x'",
            "SELECT * FROM t WHERE id = id",
            "SELECT * FROM t WHERE id <> 1",
            "SELECT * FROM t WHERE id = '1'",
            "SELECT * FROM t WHERE id = 1.0",
            "SELECT * FROM t WHERE id = 1e0",
            "SELECT * FROM t WHERE id = 1_0",
            "SELECT * FROM t WHERE id = NULL",
            "SELECT * FROM t WHERE id = TRUE",
            "SELECT * FROM t WHERE id = - -1",
            "SELECT * FROM t WHERE id = 9223372036854775808",
            "SELECT * FROM t WHERE _seq = 1",
            "SELECT * FROM t WHERE nope = 1",
            "SELECT * FROM t WHERE y.id = 1",
            "SELECT * FROM t x WHERE t.id = 1",
            "SELECT * FROM t WHERE \"ID\" = 1",
            "SELECT * FROM own WHERE own = 1",
            "SELECT * FROM t AS x(a, b) WHERE id = 1",
            "SELECT * FROM nope WHERE id = 1",
            "SELECT * FROM kalam.app.t WHERE id = 1",
            "SELECT * FROM t, t u WHERE id = 1",
            "SELECT * FROM t JOIN t u ON true WHERE id = 1",
            "WITH t AS (SELECT 1 AS id) SELECT * FROM t WHERE id = 1",
            "SELECT * FROM (SELECT * FROM t) t WHERE id = 1",
            "SELECT DISTINCT * FROM t WHERE id = 1",
            "SELECT count(*) FROM t WHERE id = 1",
            "SELECT id + 1 FROM t WHERE id = 1",
            "SELECT 1 FROM t WHERE id = 1",
            "SELECT id, id FROM t WHERE id = 1",
            "SELECT *, v AS id FROM t WHERE id = 1",
            "SELECT y.* FROM t WHERE id = 1",
            "SELECT t.* FROM app.t WHERE id = 1",
            "SELECT v FROM t WHERE id = 1 GROUP BY v",
            "SELECT v FROM t WHERE id = 1 HAVING true",
            "SELECT v FROM t WHERE id = 1 ORDER BY v",
            "SELECT v FROM t WHERE id = 1 LIMIT 0",
            "SELECT v FROM t WHERE id = 1 LIMIT NULL",
            "SELECT v FROM t WHERE id = 1 LIMIT 1 OFFSET 1",
            "SELECT v FROM t WHERE id = 1 OFFSET 1",
            "SELECT v FROM t WHERE id = 1 FETCH FIRST 1 ROWS ONLY",
            "SELECT v FROM t WHERE id = 1 UNION ALL SELECT v FROM t WHERE id = 1",
            "SELECT * FROM small WHERE id = 32768",
            "SELECT * FROM pair WHERE a = 'a'",
            "SELECT * FROM pair WHERE a = 1 AND b = 1",
            "SELECT * FROM money WHERE m = 1.234",
            "SELECT * FROM money WHERE m = 1.500",
            "SELECT * FROM money WHERE m = 12345",
            "SELECT * FROM money WHERE m = '1.5'",
            "SELECT * FROM money WHERE m = .5",
            "SELECT * FROM codes WHERE u = 'x' AND at = 0",
            "SELECT * FROM codes WHERE u = '6F9619FF-8B86-D011-B42D-00CF4FC964FF' AND at = 0",
            "DELETE FROM t WHERE id IN (1)",
            "UPDATE t SET v = v || 'x' WHERE id = 1",
        ] {
            assert_eq!(ask(&snapshot, sql, &[]), None, "{sql}");
        }
        for (sql, params) in [
            ("SELECT v FROM t WHERE id = $1", &["1.5"] as &[&str]),
            ("SELECT v FROM t WHERE id = $1", &["null"]),
            ("SELECT v FROM t WHERE id = $1", &["\"x\""]),
            ("SELECT v FROM t WHERE id = $1", &["true"]),
            ("SELECT v FROM t WHERE id = $1", &["[1]"]),
            ("SELECT v FROM t WHERE id = $2", &["1"]),
            ("SELECT v FROM t WHERE id = $01", &["1"]),
            ("SELECT v FROM t WHERE id = $x", &["1"]),
            ("SELECT v FROM t WHERE id = -$1", &["1"]),
            ("SELECT v FROM pair WHERE b = $1 AND a = $1", &["\"1\""]),
            ("SELECT v FROM pair WHERE b = 1 AND a = $1", &["1"]),
            ("SELECT v FROM pair WHERE b = 1 AND a = $1", &["{}"]),
            ("SELECT at FROM codes WHERE u = $1 AND at = $2", &["\"x\"", "1"]),
            ("SELECT v FROM t WHERE id = 1 LIMIT $1", &["1"]),
        ] {
            assert_eq!(ask(&snapshot, sql, params), None, "{sql}");
        }
        // What a query of a parameter too many says is said by the general way: the caller compares.
        assert_eq!(ask(&snapshot, "SELECT v FROM t WHERE id = $1", &["1", "2"]).map(|asked| asked.parameters), Some(1));
    }

    #[test]
    fn only_a_bare_count_is_counted_without_a_plan() {
        let snapshot = snapshot();
        let named = |sql: &str| match parse::parse(sql) {
            Ok(Statement::Query(query)) => count(&query.statement, &snapshot, Some("app")).map(|(_, name)| name),
            other => panic!("{sql}: {other:?}"),
        };
        assert_eq!(named("SELECT count(*) FROM app.t").as_deref(), Some("count(*)"));
        assert_eq!(named("SELECT COUNT(*) AS N FROM t x LIMIT 1").as_deref(), Some("n"));
        for sql in [
            "SELECT count(v) FROM t",
            "SELECT count(1) FROM t",
            "SELECT count(*), 1 FROM t",
            "SELECT count(*) + 1 FROM t",
            "SELECT count(*) FILTER (WHERE id = 1) FROM t",
            "SELECT count(*) OVER () FROM t",
            "SELECT count(*) FROM t WHERE id = 1",
            "SELECT count(*) FROM t GROUP BY v",
            "SELECT count(*) FROM t LIMIT 0",
            "SELECT count(*) FROM t, t u",
            "SELECT count(*) FROM nope",
            "SELECT \"COUNT\"(*) FROM t",
            "SELECT sum(*) FROM t",
        ] {
            assert_eq!(named(sql), None, "{sql}");
        }
    }
}
