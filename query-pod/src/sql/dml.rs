//! INSERT, UPDATE and DELETE, from checked statement to commit.
//!
//! A statement that reads what it writes holds its instance from before its first look until its commit is applied, so
//! nothing changes in between. All of it is checked and computed, RETURNING too, before anything is written; the commit
//! itself is one. What it settles, `_seq` and `_updated`, is put into the answer afterwards, which cannot fail.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arrow::array::{ArrayRef, AsArray as _, Int64Array, RecordBatch};
use arrow::datatypes::{DataType, Field, Int64Type, Schema};
use datafusion::datasource::MemTable;
use kalamdb_model::{Column, Owner, TableEntry, Value, key};
use kalamdb_table_store::values;
use kalamdb_write_buffer::{BatchBuilder, Stamps, row};

use super::assign::{Evaluate, targets, writable};
use super::parse::{QueryStatement, TableRef};
use super::parse_dml::{Assignments, Conflict, Delete, EXCLUDED, Insert, ROW, ROWS, Returning, SetTo, Source, Update};
use super::query::check_parameters;
use super::session::Given;
use super::{Request, Sql, assign, engine_errors, fast, owner_for};
use crate::catalog::Snapshot;
use crate::engine::{NewRow, WriteError, Writing};
use crate::error::{ApiError, Kind};
use crate::http::Room;
use crate::http::encode::{Answer, Encoder};

/// Largest primary key, encoded: every file's smallest and largest key stand in its manifest.
const KEY_BYTES_MAX: usize = 8 << 10;

/// Rows that exist which an upsert reads at once.
const EXISTING_ROWS: usize = 64;

/// How long a statement waits for its commit to be acknowledged.
const COMMIT_WAIT: Duration = Duration::from_secs(30);

/// A whole row with its key.
struct Row {
    key: Vec<u8>,
    values: Vec<Value>,
}

/// What one statement writes to.
struct Target<'a> {
    sql: &'a Sql,
    request: &'a Request<'a>,
    snapshot: &'a Arc<Snapshot>,
    table: Arc<TableEntry>,
    owner: Owner,
    key: Vec<usize>,
    /// Of the rows that were read or made so far.
    bytes: AtomicUsize,
}

/// What a column of a row becomes.
enum NewValue {
    Is(Value),
    Default,
    /// The computed column with this number.
    Computed(usize),
}

/// The rows of a statement once it is known what becomes of them.
#[derive(Default)]
struct Changes {
    put: Vec<Row>,
    delete: Vec<Row>,
    /// How many the client is told of.
    count: u64,
}

impl Sql {
    fn target<'a>(
        &'a self,
        request: &'a Request<'a>,
        snapshot: &'a Arc<Snapshot>,
        table: &TableRef,
        parameters: &BTreeSet<String>,
    ) -> Result<Target<'a>, ApiError> {
        check_parameters(parameters, request.params.len())?;
        let table = Arc::clone(self.resolve(request, snapshot, table)?);
        let owner = owner_for(&table, request.identity, true)?;
        let key = table.key_positions();
        Ok(Target { sql: self, request, snapshot, table, owner, key, bytes: AtomicUsize::new(0) })
    }

    pub(super) async fn insert(
        &self,
        request: &Request<'_>,
        snapshot: &Arc<Snapshot>,
        insert: &Insert,
    ) -> Result<Answer, ApiError> {
        let Insert { table, columns, source, conflict, returning, parameters } = insert;
        let target = self.target(request, snapshot, table, parameters)?;
        let evaluate = Evaluate::new(self, request, snapshot);
        let into = targets(&target.table, columns)?;
        // What a query reads must not change before it is written; VALUES need no lock before they are known.
        let mut held = None;
        let (rows, generated) = match source {
            Source::Values(rows) => target.of_values(&evaluate, &into, rows)?,
            Source::Query(query) => {
                held = Some(target.hold().await?);
                target.of_query(&evaluate, &into, query).await?
            }
        };
        let Some(conflict) = conflict else {
            let changes = Changes { count: rows.len() as u64, put: rows, delete: Vec::new() };
            return target.insert_all(held, changes, generated, returning.as_ref()).await;
        };
        target.check_conflict_target(conflict)?;
        let mut writing = match held {
            Some(writing) => writing,
            None => target.hold().await?,
        };
        let changes = target.resolve_conflicts(&evaluate, &mut writing, rows, conflict).await?;
        target.finish(writing, changes, returning.as_ref(), "inserted").await
    }

    pub(super) async fn update(
        &self,
        request: &Request<'_>,
        snapshot: &Arc<Snapshot>,
        update: &Update,
    ) -> Result<Answer, ApiError> {
        let Update { table, set, returning, parameters } = update;
        let target = self.target(request, snapshot, table, parameters)?;
        let evaluate = Evaluate::new(self, request, snapshot);
        let Assignments { columns, rows } = set;
        let set = target.set(&evaluate, columns)?;
        let mut writing = target.hold().await?;
        let batches = target.selected(&mut writing, rows).await?;
        let width = target.table.columns.len();
        let mut changes = Changes::default();
        for batch in &batches {
            let old = target.rows_of(batch)?;
            let values: Vec<Vec<Value>> = old.iter().map(|row| row.values.clone()).collect();
            let new = target.assign(&evaluate, &set, values, batch, width, changes.put.len())?;
            changes.count += old.len() as u64;
            changes.delete.extend(old);
            changes.put.extend(new);
        }
        let writing = target.move_keys(writing, &mut changes).await?;
        target.finish(writing, changes, returning.as_ref(), "updated").await
    }

    pub(super) async fn delete(
        &self,
        request: &Request<'_>,
        snapshot: &Arc<Snapshot>,
        delete: &Delete,
    ) -> Result<Answer, ApiError> {
        let Delete { table, rows, returning, parameters } = delete;
        let target = self.target(request, snapshot, table, parameters)?;
        let mut writing = target.hold().await?;
        let mut changes = Changes::default();
        for batch in target.selected(&mut writing, rows).await? {
            changes.delete.extend(target.rows_of(&batch)?);
        }
        changes.count = changes.delete.len() as u64;
        target.finish(writing, changes, returning.as_ref(), "deleted").await
    }
}

impl Target<'_> {
    async fn hold(&self) -> Result<Writing, ApiError> {
        let writing = self.sql.engine.write(&self.table, &self.owner).await.map_err(of_engine)?;
        // Rows that were written since by a newer catalog have columns that this statement would drop.
        let now = self.sql.engine.catalog().current().table_by_id(self.table.id).map(|table| table.schema_version);
        if now == Some(self.table.schema_version) {
            return Ok(writing);
        }
        let message = format!("`{}` was changed while the statement waited; send it again", self.table.name);
        Err(ApiError::unavailable("TABLE_CHANGED", message))
    }

    /// Counts a row against what one statement may hold: the values of all its rows, old and new.
    fn take(&self, bytes: usize, number: usize) -> Result<(), ApiError> {
        let limit = self.sql.limits.statement_rows_bytes_max;
        if self.bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) <= limit {
            return Ok(());
        }
        let message =
            format!("the rows of the statement, up to row {number}, take more than {limit} bytes; do it in parts");
        Err(ApiError::new(Kind::TooLarge, "TOO_MANY_ROWS", message))
    }

    /// A row of whole values; `number` is its place in the statement, counted from 1.
    fn row(&self, values: Vec<Value>, number: usize) -> Result<Row, ApiError> {
        let limit = self.sql.limits.row_bytes_max;
        let bytes: usize = values.iter().map(Value::size).sum();
        if bytes > limit {
            let message = format!("row {number} has {bytes} bytes, at most {limit} are taken");
            return Err(ApiError::new(Kind::TooLarge, "ROW_TOO_LARGE", message));
        }
        if let Some(column) =
            self.table.columns.iter().zip(&values).find(|(column, value)| value.is_null() && !column.nullable)
        {
            let message = format!("row {number}: column `{}` must not be NULL", column.0.name);
            return Err(ApiError::invalid("NULL_VALUE", message));
        }
        self.take(bytes + values.len() * size_of::<Value>(), number)?;
        let key_values: Vec<Value> = self.key.iter().map(|at| values[*at].clone()).collect();
        let key = key::encode(&key_values);
        if key.len() > KEY_BYTES_MAX {
            let columns: Vec<&str> = self.key.iter().map(|at| self.table.columns[*at].name.as_str()).collect();
            let message = format!(
                "row {number}: its primary key (`{}`) has {} bytes, at most {KEY_BYTES_MAX} are taken",
                columns.join("`, `"),
                key.len()
            );
            return Err(ApiError::new(Kind::TooLarge, "KEY_TOO_LARGE", message));
        }
        Ok(Row { key, values })
    }

    fn of_values(
        &self,
        evaluate: &Evaluate<'_>,
        into: &[usize],
        rows: &[Vec<datafusion::sql::sqlparser::ast::Expr>],
    ) -> Result<(Vec<Row>, bool), ApiError> {
        let (count, limit) = (rows.len(), self.sql.limits.insert_rows_max);
        if count > limit {
            let message = format!("the statement has {count} rows, at most {limit} are taken at once");
            return Err(ApiError::new(Kind::TooLarge, "TOO_MANY_ROWS", message));
        }
        let mut made = Vec::with_capacity(count);
        let mut generated = true;
        for (number, exprs) in (1..).zip(rows) {
            let (values, key_generated) = evaluate.row(&self.table, into, number, exprs)?;
            generated &= key_generated;
            made.push(self.row(values, number)?);
        }
        Ok((made, generated))
    }

    async fn of_query(
        &self,
        evaluate: &Evaluate<'_>,
        into: &[usize],
        query: &QueryStatement,
    ) -> Result<(Vec<Row>, bool), ApiError> {
        let mut made = Vec::new();
        let mut generated = true;
        let (schema, batches) = self.sql.rows(self.request, self.snapshot, query, Vec::new()).await?;
        if schema.fields().len() != into.len() {
            let message = format!("the query gives {} column(s) for {} column(s)", schema.fields().len(), into.len());
            return Err(ApiError::invalid("INVALID_SQL", message));
        }
        for batch in batches {
            let mut given: Vec<Vec<Option<Value>>> = vec![vec![None; self.table.columns.len()]; batch.num_rows()];
            for (array, at) in batch.columns().iter().zip(into) {
                let column = &self.table.columns[*at];
                for (row, value) in given.iter_mut().zip(self.assigned(array, column, made.len())?) {
                    row[*at] = Some(value);
                }
            }
            for row in given {
                let (values, key_generated) = evaluate.complete(&self.table, row);
                generated &= key_generated;
                made.push(self.row(values, made.len() + 1)?);
            }
        }
        Ok((made, generated))
    }

    /// Computed values on their way into a column; `before` rows came before them.
    fn assigned(&self, array: &ArrayRef, column: &Column, before: usize) -> Result<Vec<Value>, ApiError> {
        assign::assign(array, column).map_err(|(row, message)| {
            let place = row.map_or_else(String::new, |row| format!("row {}, ", before + row + 1));
            ApiError::invalid("INVALID_VALUE", format!("{place}column `{}`: {message}", column.name))
        })
    }

    /// The rows that `query` selects to change: found by their key where it names one, else by running it.
    async fn selected(&self, writing: &mut Writing, query: &QueryStatement) -> Result<Vec<RecordBatch>, ApiError> {
        let asked = fast::by_key(&query.statement, self.snapshot, self.request.namespace, self.request.params);
        let Some(asked) = asked.filter(|asked| !asked.shows_system_columns()) else {
            return Ok(self.sql.rows(self.request, self.snapshot, query, Vec::new()).await?.1);
        };
        let found = writing.rows(&BTreeSet::from([asked.key.clone()])).await.map_err(of_engine)?;
        let batch = |values: Vec<Value>| asked.batch(Some(&row::encode(&self.table, &values)));
        let batches = found.into_values().map(batch).collect::<Result<_, _>>();
        self.sql.metrics.fast_statements.inc();
        batches.map_err(|error| ApiError::internal(&error))
    }

    /// Rows that a query gave, the columns of the table first.
    fn rows_of(&self, batch: &RecordBatch) -> Result<Vec<Row>, ApiError> {
        let mut rows: Vec<Vec<Value>> = vec![Vec::with_capacity(self.table.columns.len()); batch.num_rows()];
        for (column, array) in self.table.columns.iter().zip(batch.columns()) {
            for (at, row) in rows.iter_mut().enumerate() {
                row.push(values::value(array.as_ref(), at, &column.ty).map_err(|error| ApiError::internal(&error))?);
            }
        }
        (1..).zip(rows).map(|(number, values)| self.row(values, number)).collect()
    }

    /// Positions of the columns of SET, and what they become.
    fn set(&self, evaluate: &Evaluate<'_>, columns: &[(String, SetTo)]) -> Result<Vec<(usize, NewValue)>, ApiError> {
        let mut set: Vec<(usize, NewValue)> = Vec::with_capacity(columns.len());
        for (name, to) in columns {
            let position = writable(&self.table, name)?;
            if set.iter().any(|(other, _)| *other == position) {
                return Err(ApiError::invalid("INVALID_SQL", format!("column `{name}` is set twice")));
            }
            let column = &self.table.columns[position];
            let to = match to {
                SetTo::Constant(expr) => evaluate.value(expr, column, None)?.map_or(NewValue::Default, NewValue::Is),
                SetTo::Computed(index) => NewValue::Computed(*index),
            };
            set.push((position, to));
        }
        Ok(set)
    }

    /// Rows with what SET says. The computed columns of `batch` begin at `first`; `before` rows came before these.
    fn assign(
        &self,
        evaluate: &Evaluate<'_>,
        set: &[(usize, NewValue)],
        rows: Vec<Vec<Value>>,
        batch: &RecordBatch,
        first: usize,
        before: usize,
    ) -> Result<Vec<Row>, ApiError> {
        let computed = set.iter().filter(|(_, to)| matches!(to, NewValue::Computed(_))).count();
        if batch.num_columns() != first + computed || batch.num_rows() != rows.len() {
            return Err(internal("the computed columns are not those of the statement"));
        }
        let mut assigned: HashMap<usize, std::vec::IntoIter<Value>> = HashMap::new();
        for (position, to) in set {
            if let NewValue::Computed(index) = to {
                let column = &self.table.columns[*position];
                let values = self.assigned(batch.column(first + index), column, before)?;
                assigned.insert(*position, values.into_iter());
            }
        }
        // Row by row, so that what is made is counted before there is more of it.
        let new = |(number, mut values): (usize, Vec<Value>)| {
            for (position, to) in set {
                let column = &self.table.columns[*position];
                values[*position] = match to {
                    NewValue::Is(value) => value.clone(),
                    NewValue::Default => evaluate.default(column).0,
                    NewValue::Computed(_) => assigned
                        .get_mut(position)
                        .and_then(Iterator::next)
                        .ok_or_else(|| internal("a computed column is too short"))?,
                };
            }
            self.row(values, number)
        };
        (before + 1..).zip(rows).map(new).collect()
    }

    /// After an UPDATE: a row whose key stayed is only put; one whose key changed goes from the old to the new, where none
    /// may be but those that go elsewhere.
    async fn move_keys(&self, mut writing: Writing, changes: &mut Changes) -> Result<Writing, ApiError> {
        let mut new: BTreeSet<&[u8]> = BTreeSet::new();
        if let Some(row) = changes.put.iter().find(|row| !new.insert(row.key.as_slice())) {
            return Err(self.exists(row, "two rows would have it"));
        }
        let old: BTreeSet<&[u8]> = changes.delete.iter().map(|row| row.key.as_slice()).collect();
        let moved: Vec<&Row> = changes.put.iter().filter(|row| !old.contains(row.key.as_slice())).collect();
        writing.look_up(moved.iter().map(|row| row.key.as_slice())).await.map_err(of_engine)?;
        if let Some(row) = moved.iter().find(|row| writing.exists(&row.key)) {
            return Err(self.exists(row, "another row has it"));
        }
        let stays: Vec<bool> = changes.delete.iter().map(|row| new.contains(row.key.as_slice())).collect();
        let mut stays = stays.into_iter();
        changes.delete.retain(|_| !stays.next().unwrap_or(false));
        Ok(writing)
    }

    fn exists(&self, row: &Row, why: &str) -> ApiError {
        let key = assign::shown_key(&self.table, &self.key, &row.values);
        let message = format!("the primary key ({key}) is taken, {why}; nothing was written");
        ApiError::new(Kind::Conflict, "DUPLICATE_KEY", message)
    }

    fn check_conflict_target(&self, conflict: &Conflict) -> Result<(), ApiError> {
        let key: BTreeSet<&str> = self.key.iter().map(|at| self.table.columns[*at].name.as_str()).collect();
        let named: BTreeSet<&str> = conflict.target.iter().map(String::as_str).collect();
        if named.is_empty() || named == key {
            return Ok(());
        }
        let key: Vec<&str> = key.into_iter().collect();
        let message = format!("ON CONFLICT takes the primary key of `{}`, ({})", self.table.name, key.join(", "));
        Err(ApiError::invalid("INVALID_SQL", message))
    }

    /// What becomes of `rows`, some of which may exist.
    async fn resolve_conflicts(
        &self,
        evaluate: &Evaluate<'_>,
        writing: &mut Writing,
        rows: Vec<Row>,
        conflict: &Conflict,
    ) -> Result<Changes, ApiError> {
        if let Some(update) = &conflict.update {
            self.set(evaluate, &update.columns)?;
        }
        writing.look_up(rows.iter().map(|row| row.key.as_slice())).await.map_err(of_engine)?;
        let mut changes = Changes::default();
        let mut seen: BTreeSet<Vec<u8>> = BTreeSet::new();
        let mut conflicting = Vec::new();
        for row in rows {
            let again = !seen.insert(row.key.clone());
            match (again, writing.exists(&row.key)) {
                (true, _) if conflict.update.is_some() => {
                    return Err(self.exists(&row, "two rows of the statement have it"));
                }
                (true, _) => {}
                (false, true) => conflicting.push(row),
                (false, false) => changes.put.push(row),
            }
        }
        if let Some(update) = &conflict.update
            && !conflicting.is_empty()
        {
            let mut existing = HashMap::new();
            // A few at a time, so that they are counted before there are more.
            for some in conflicting.chunks(EXISTING_ROWS) {
                let keys: BTreeSet<Vec<u8>> = some.iter().map(|row| row.key.clone()).collect();
                for (key, values) in writing.rows(&keys).await.map_err(of_engine)? {
                    let bytes: usize = values.iter().map(Value::size).sum();
                    self.take(bytes + values.len() * size_of::<Value>(), existing.len() + 1)?;
                    existing.insert(key, values);
                }
            }
            self.update_conflicting(evaluate, &mut changes, conflicting, existing, update).await?;
        }
        changes.count = changes.put.len() as u64;
        Ok(changes)
    }

    async fn update_conflicting(
        &self,
        evaluate: &Evaluate<'_>,
        changes: &mut Changes,
        proposed: Vec<Row>,
        mut existing: HashMap<Vec<u8>, Vec<Value>>,
        update: &Assignments,
    ) -> Result<(), ApiError> {
        let Assignments { columns, rows: query } = update;
        let set = self.set(evaluate, columns)?;
        if let Some((at, _)) = set.iter().find(|(at, _)| self.key.contains(at)) {
            let message = format!("ON CONFLICT DO UPDATE cannot set the key column `{}`", self.table.columns[*at].name);
            return Err(ApiError::invalid("INVALID_SQL", message));
        }
        let mut old = Vec::with_capacity(proposed.len());
        for row in &proposed {
            let values = existing.remove(&row.key).ok_or_else(|| internal("a row that exists has no values"))?;
            old.push(Row { key: row.key.clone(), values });
        }
        let given = vec![Given::new(ROWS, self.numbered(&old)?), Given::new(EXCLUDED, self.numbered(&proposed)?)];
        for batch in self.sql.rows(self.request, self.snapshot, query, given).await?.1 {
            let numbers = batch.column(0).as_primitive::<Int64Type>();
            let chosen: Vec<&Row> = numbers
                .values()
                .iter()
                .filter_map(|number| usize::try_from(*number).ok().and_then(|number| old.get(number)))
                .collect();
            let values = chosen.iter().map(|row| row.values.clone()).collect();
            let new = self.assign(evaluate, &set, values, &batch, 1, changes.put.len())?;
            changes.put.extend(new);
        }
        Ok(())
    }

    /// Rows as a table for a query, numbered.
    fn numbered(&self, rows: &[Row]) -> Result<MemTable, ApiError> {
        let batch = self.batch(rows)?;
        let numbers = (0..).take(rows.len());
        let mut fields: Vec<Arc<Field>> = batch.schema().fields().iter().cloned().collect();
        fields.push(Arc::new(Field::new(ROW, DataType::Int64, false)));
        let mut arrays = batch.columns().to_vec();
        arrays.push(Arc::new(Int64Array::from_iter_values(numbers)));
        let schema = Arc::new(Schema::new(fields));
        let batch = RecordBatch::try_new(Arc::clone(&schema), arrays).map_err(|error| ApiError::internal(&error))?;
        MemTable::try_new(schema, vec![vec![batch]]).map_err(|error| ApiError::internal(&error))
    }

    /// Rows as the columns of `SELECT *`.
    fn batch(&self, rows: &[Row]) -> Result<RecordBatch, ApiError> {
        let own: Vec<usize> = (0..self.table.columns.len()).collect();
        let mut builder = BatchBuilder::new(&self.table, &own);
        for row in rows {
            builder.push(&row::encode(&self.table, &row.values)).map_err(|error| ApiError::internal(&error))?;
        }
        builder.finish().map_err(|error| ApiError::internal(&error))
    }

    /// What RETURNING says, but what the commit settles. Before it: what fails in RETURNING writes nothing.
    async fn returned(&self, changes: &Changes, returning: Option<&Returning>) -> Result<Option<Encoder>, ApiError> {
        let Some(returning) = returning else { return Ok(None) };
        if let Some(name) = returning.aggregate(|name| self.sql.sessions.is_aggregate(name)) {
            let message = format!("RETURNING gives each row that is written, and `{name}` makes one of many");
            return Err(ApiError::invalid("INVALID_SQL", message));
        }
        // In the order in which they get their numbers.
        let rows = if returning.deleted { &changes.delete } else { &changes.put };
        let given = vec![Given::new(ROWS, self.numbered(rows)?)];
        let (query, stamped) = returning.query(&self.table)?;
        let (schema, batches) = self.sql.rows(self.request, self.snapshot, &query, given).await?;
        let room = Room::new(Arc::clone(&self.sql.answers_bytes), self.request.identity.user.clone());
        let mut encoder = Encoder::of_unwritten(&schema, &stamped, self.sql.limits.answer_bytes_max, room);
        for batch in &batches {
            encoder.push(batch).await?;
        }
        Ok(Some(encoder))
    }

    async fn insert_all(
        &self,
        held: Option<Writing>,
        changes: Changes,
        generated: bool,
        returning: Option<&Returning>,
    ) -> Result<Answer, ApiError> {
        let returned = self.returned(&changes, returning).await?;
        let engine = &self.sql.engine;
        let writing = match held {
            Some(writing) => writing,
            None if generated => engine.append(&self.table, &self.owner).await.map_err(of_engine)?,
            None => engine.write(&self.table, &self.owner).await.map_err(of_engine)?,
        };
        let put = self.encoded(&changes.put);
        let shown = |index: usize| assign::shown_key(&self.table, &self.key, &changes.put[index].values);
        let stamps = written(async move { writing.insert(put).await })
            .await?
            .map_err(|error| engine_errors::of_write(error, shown))?;
        Ok(answer(returned, stamps, changes.count, "inserted"))
    }

    async fn finish(
        &self,
        writing: Writing,
        changes: Changes,
        returning: Option<&Returning>,
        verb: &str,
    ) -> Result<Answer, ApiError> {
        let returned = self.returned(&changes, returning).await?;
        let (put, delete) = (self.encoded(&changes.put), self.encoded(&changes.delete));
        let stamps = written(async move { writing.commit(put, delete).await }).await?.map_err(of_engine)?;
        Ok(answer(returned, stamps, changes.count, verb))
    }

    fn encoded(&self, rows: &[Row]) -> Vec<NewRow> {
        let encode = |row: &Row| NewRow { key: row.key.clone(), value: row::encode(&self.table, &row.values) };
        rows.iter().map(encode).collect()
    }
}

/// The answer of a statement that has written `count` rows, which got `stamps` if there are any.
fn answer(returned: Option<Encoder>, stamps: Option<Stamps>, count: u64, verb: &str) -> Answer {
    match (returned, stamps) {
        (None, _) => Answer::affected(count, format!("{verb} {count} row(s)")),
        (Some(returned), Some(stamps)) => returned.finish_written(stamps),
        (Some(returned), None) => returned.finish(),
    }
}

/// Waits for a commit, which goes on as a task of its own when the client hangs up, or when its storage takes too long: it
/// must not end between the buffer and its locks.
async fn written(
    work: impl Future<Output = Result<Option<Stamps>, WriteError>> + Send + 'static,
) -> Result<Result<Option<Stamps>, WriteError>, ApiError> {
    let joined = tokio::time::timeout(COMMIT_WAIT, tokio::spawn(work)).await;
    joined.map_err(|_| engine_errors::outcome_unknown())?.map_err(|error| ApiError::internal(&error))
}

fn of_engine(error: WriteError) -> ApiError {
    engine_errors::of_write(error, |_| String::new())
}

fn internal(what: &str) -> ApiError {
    ApiError::internal(&std::io::Error::other(what.to_owned()))
}
