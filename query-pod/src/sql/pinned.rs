//! What a statement reads of its instances: read once for all of its scans, as of one moment, before it is planned.
//!
//! Owns: which instances and columns the scans of a plan need, and the memory that buffered rows take of the query's.
//! Does not own: whose instance a scan reads. It says so itself ([`super::provider`]), and gets only what is here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use arrow::array::RecordBatch;
use arrow::compute::filter_record_batch;
use arrow::datatypes::Schema;
use datafusion::common::cast::as_boolean_array;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::common::{DFSchema, Result};
use datafusion::datasource::source_as_provider;
use datafusion::error::DataFusionError;
use datafusion::execution::context::SessionState;
use datafusion::execution::memory_pool::{MemoryConsumer, MemoryPool, MemoryReservation};
use datafusion::logical_expr::expr_rewriter::unnormalize_cols;
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{Expr, LogicalPlan, TableScan};
use datafusion::physical_plan::PhysicalExpr;
use kalamdb_model::{InstanceId, TableEntry};

use super::engine_errors;
use super::provider::{InstanceTable, external};
use super::width::{BATCH_ROWS, Width};
use crate::engine::{Engine, Needed, ReadError, Rows, Want};

/// The rows of one statement, once they are read: an extension of its session.
#[derive(Default)]
pub(super) struct Pinned(OnceLock<Read>);

struct Read {
    rows: BTreeMap<InstanceId, Rows>,
    /// Given back with the rows.
    _memory: Arc<MemoryReservation>,
}

impl Pinned {
    /// What was read of an instance, if it was.
    pub(super) fn rows(&self, id: &InstanceId) -> Option<&Rows> {
        self.0.get()?.rows.get(id)
    }
}

/// Reads what the scans of `plan` need, which is optimized. Buffered rows are taken of `pool` until the session ends.
/// Returns how many rows the statement's batches may have.
///
/// # Errors
/// If anything cannot be read or does not fit; if this session has read before.
pub(super) async fn pin(state: &SessionState, pool: &Arc<dyn MemoryPool>, plan: &LogicalPlan) -> Result<usize> {
    let Some((engine, asked)) = asked_by(state, plan)? else { return Ok(BATCH_ROWS) };
    let (mut wants, mut tables) = (BTreeMap::new(), BTreeMap::new());
    for (id, asked) in asked {
        tables.insert(id.clone(), Arc::clone(&asked.table));
        wants.insert(id, asked.want(state)?);
    }
    let memory = Arc::new(MemoryConsumer::new("buffered rows").register(pool));
    let taken = Arc::clone(&memory);
    let reading = engine.read_all(wants, move |bytes| taken.try_grow(bytes).is_ok());
    let rows = Box::pin(reading).await.map_err(|error| match error {
        ReadError::Full => DataFusionError::ResourcesExhausted(error.to_string()),
        error => external(engine_errors::of_read(&error)),
    })?;
    let mut width = Width::default();
    for (id, rows) in &rows {
        let table = tables.get(id).ok_or_else(|| DataFusionError::Internal("rows that nobody asked for".to_owned()))?;
        width.note(table, &rows.view.manifest.files, &rows.buffered);
    }
    let pinned = state.config().get_extension::<Pinned>();
    let pinned = pinned.ok_or_else(|| DataFusionError::Internal("a session that keeps no rows".to_owned()))?;
    let again = |_| DataFusionError::Internal("a statement was to be read twice".to_owned());
    pinned.0.set(Read { rows, _memory: memory }).map_err(again)?;
    Ok(width.batch_rows())
}

/// What the scans of one instance need.
struct Asked {
    table: Arc<TableEntry>,
    scans: usize,
    columns: BTreeSet<usize>,
    /// Of the last scan.
    filters: Vec<Expr>,
    /// Of the last scan.
    fetch: Option<usize>,
}

type Asks = BTreeMap<InstanceId, Asked>;

/// The engine of the tables that `plan` scans, and what it asks of each instance; nothing without such a table.
fn asked_by(state: &SessionState, plan: &LogicalPlan) -> Result<Option<(Arc<Engine>, Asks)>> {
    let mut engine = None;
    let mut all = Asks::new();
    plan.apply_with_subqueries(|plan| {
        if let LogicalPlan::TableScan(scan) = plan {
            let provider = source_as_provider(&scan.source)?;
            if let Some(of) = provider.downcast_ref::<InstanceTable>() {
                let asked = all.entry(of.instance(state)?).or_insert_with(|| Asked::nothing(&of.table));
                asked.add(scan, &of.schema)?;
                engine = Some(Arc::clone(&of.engine));
            }
        }
        Ok(TreeNodeRecursion::Continue)
    })?;
    Ok(engine.map(|engine| (engine, all)))
}

impl Asked {
    fn nothing(table: &Arc<TableEntry>) -> Self {
        let (columns, filters) = (BTreeSet::new(), Vec::new());
        Self { table: Arc::clone(table), scans: 0, columns, filters, fetch: None }
    }

    fn add(&mut self, scan: &TableScan, schema: &Schema) -> Result<()> {
        match &scan.projection {
            Some(columns) => self.columns.extend(columns),
            None => self.columns.extend(0..schema.fields().len()),
        }
        for column in scan.filters.iter().flat_map(Expr::column_refs) {
            self.columns.insert(schema.index_of(&column.name)?);
        }
        self.scans += 1;
        self.filters.clone_from(&scan.filters);
        self.fetch = scan.fetch;
        Ok(())
    }

    fn want(self, state: &SessionState) -> Result<Want> {
        let columns: Vec<usize> = self.columns.into_iter().collect();
        let needed = match (self.scans, self.fetch) {
            // What one of several scans does without, another may need.
            (2.., _) => Needed::All,
            (_, Some(limit)) if self.filters.is_empty() => Needed::First(limit),
            _ => needed_by(state, self.table.arrow_schema().project(&columns)?, self.filters)?,
        };
        Ok(Want { table: self.table, columns, needed })
    }
}

/// The rows that `filters` let through. Where that cannot be told, all: the plan has the filters, too, and says why.
fn needed_by(state: &SessionState, schema: Schema, filters: Vec<Expr>) -> Result<Needed> {
    let Some(filter) = conjunction(unnormalize_cols(filters)) else { return Ok(Needed::All) };
    let schema = DFSchema::try_from(Arc::new(schema))?;
    let Ok(predicate) = state.create_physical_expr(filter, &schema) else { return Ok(Needed::All) };
    let keep = move |batch: RecordBatch| filtered(&*predicate, &batch).unwrap_or(batch);
    Ok(Needed::Where(Box::new(keep)))
}

fn filtered(predicate: &dyn PhysicalExpr, batch: &RecordBatch) -> Result<RecordBatch> {
    let mask = predicate.evaluate(batch)?.into_array(batch.num_rows())?;
    Ok(filter_record_batch(batch, as_boolean_array(&mask)?)?)
}
