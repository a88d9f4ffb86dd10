//! A table for DataFusion: which rows it has is decided in [`InstanceTable::scan`], from the identity in the session.
//!
//! The provider itself belongs to no user. A scan in a session without an identity fails, and so does one of what was
//! not read for its statement ([`super::pinned`]).

use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use datafusion::catalog::memory::MemorySourceConfig;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::stats::Precision;
use datafusion::common::{DFSchema, ScalarValue, Statistics};
use datafusion::datasource::TableType;
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::object_store::ObjectStoreUrl;
use datafusion::datasource::physical_plan::parquet::ParquetRowSelection;
use datafusion::datasource::physical_plan::{
    FileGroup, FileScanConfigBuilder, ParquetFileReaderFactory, ParquetSource,
};
use datafusion::datasource::source::DataSourceExec;
use datafusion::error::{DataFusionError, Result};
use datafusion::logical_expr::utils::conjunction;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown};
use datafusion::physical_expr_adapter::{
    DefaultPhysicalExprAdapterFactory, PhysicalExprAdapter, PhysicalExprAdapterFactory, replace_columns_with_literals,
};
use datafusion::physical_plan::metrics::ExecutionPlanMetricsSet;
use datafusion::physical_plan::union::UnionExec;
use datafusion::physical_plan::{ExecutionPlan, PhysicalExpr};
use kalamdb_model::{InstanceId, TableEntry};
use kalamdb_table_store::manifest::FileEntry;
use kalamdb_table_store::{DataFiles, Positions};
use object_store::ObjectMeta;
use parquet::arrow::async_reader::AsyncFileReader;

use super::pinned::Pinned;
use super::session::store_url;
use super::{owner_for, params};
use crate::auth::Identity;
use crate::engine::{Engine, ReadError, Rows};
use crate::error::ApiError;

/// One table of the catalog.
pub(super) struct InstanceTable {
    pub(super) engine: Arc<Engine>,
    pub(super) table: Arc<TableEntry>,
    /// The table's own columns, perhaps with the system columns after them.
    pub(super) schema: SchemaRef,
}

impl std::fmt::Debug for InstanceTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "InstanceTable({})", self.table.name)
    }
}

impl InstanceTable {
    pub(super) fn new(engine: Arc<Engine>, table: Arc<TableEntry>, system_columns: bool) -> Self {
        let all = table.arrow_schema();
        let schema = if system_columns {
            all
        } else {
            let own: Vec<usize> = (0..table.columns.len()).collect();
            Arc::new(all.project(&own).expect("the table's own columns come first"))
        };
        Self { engine, table, schema }
    }

    /// The instance that a session reads.
    pub(super) fn instance(&self, state: &dyn Session) -> Result<InstanceId> {
        let identity = state
            .config()
            .get_extension::<Identity>()
            .ok_or_else(|| DataFusionError::Internal("a scan without an identity was refused".to_owned()))?;
        let owner = owner_for(&self.table, &identity, false).map_err(external)?;
        Ok(Engine::instance_id(&self.table, &owner))
    }

    /// Buffered rows with the columns of a scan.
    fn buffered(&self, rows: &Rows, projection: Option<&Vec<usize>>) -> Result<Arc<dyn ExecutionPlan>> {
        let place = |column: usize| rows.columns.iter().position(|read| *read == column).ok_or_else(not_read);
        let places: Vec<usize> = match projection {
            Some(columns) => columns.iter().copied().map(place).collect::<Result<_>>()?,
            None => (0..self.schema.fields().len()).map(place).collect::<Result<_>>()?,
        };
        let schema = rows.buffered.first().map(RecordBatch::schema).ok_or_else(not_read)?;
        let source = MemorySourceConfig::try_new(std::slice::from_ref(&rows.buffered), schema, Some(places))?;
        Ok(DataSourceExec::from_data_source(source))
    }

    fn predicate(&self, state: &dyn Session, filters: &[Expr]) -> Result<Option<Arc<dyn PhysicalExpr>>> {
        let Some(all) = conjunction(filters.to_vec()) else { return Ok(None) };
        let schema = DFSchema::try_from(Arc::clone(&self.schema))?;
        state.create_physical_expr(all, &schema).map(Some)
    }

    fn names_floats(&self, filter: &Expr) -> bool {
        filter
            .column_refs()
            .iter()
            .any(|column| self.schema.field_with_name(column.name()).is_ok_and(|field| field.data_type().is_floating()))
    }

    fn files(
        &self,
        state: &dyn Session,
        rows: &Rows,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let mut files = Vec::new();
        let mut shown = 0;
        for file in &rows.view.manifest.files {
            if let Some((file, rows)) = partitioned(file, rows.replaced.get(file.path.as_str()))? {
                files.push(file);
                shown += rows;
            }
        }
        if files.is_empty() {
            return Ok(None);
        }
        // Only now: a storage that has no files yet may have no folder either.
        let data = self.engine.storages().files(&self.engine.catalog().current(), &rows.root).map_err(ReadError::from);
        let data = data.map_err(|error| external(super::engine_errors::of_read(&error)))?;
        let mut source =
            ParquetSource::new(Arc::clone(&self.schema)).with_parquet_file_reader_factory(Arc::new(Readers(data)));
        // Files say nothing of NaN in their statistics, which is above every number: a filter on floats prunes nothing.
        let pruning: Vec<Expr> = filters.iter().filter(|filter| !self.names_floats(filter)).cloned().collect();
        if let Some(predicate) = self.predicate(state, &pruning)? {
            source = source.with_predicate(predicate);
        }
        let partitions = state.config().target_partitions().clamp(1, files.len());
        let mut groups = vec![Vec::new(); partitions];
        for (index, file) in files.into_iter().enumerate() {
            groups[index % partitions].push(file);
        }
        let statistics = Statistics { num_rows: Precision::Exact(shown), ..Statistics::new_unknown(&self.schema) };
        let config = FileScanConfigBuilder::new(ObjectStoreUrl::parse(store_url(&rows.root))?, Arc::new(source))
            .with_file_groups(groups.into_iter().map(FileGroup::new).collect())
            .with_projection_indices(projection.cloned())?
            .with_limit(limit)
            .with_statistics(statistics)
            .with_expr_adapter(Some(Arc::new(Defaults::of(&self.table)?)))
            .build();
        Ok(Some(DataSourceExec::from_data_source(config)))
    }
}

/// Readers of one scan's files, which share the footers and the bytes of the pod's caches. DataFusion's own cache of
/// footers is by path alone, and two storages may have equal paths; it is not asked.
#[derive(Debug)]
struct Readers(DataFiles);

impl ParquetFileReaderFactory for Readers {
    fn create_reader(
        &self,
        _: usize,
        file: PartitionedFile,
        _: Option<usize>,
        _: &ExecutionPlanMetricsSet,
    ) -> Result<Box<dyn AsyncFileReader + Send>> {
        let rows = file.extension::<FileRows>().map(|rows| rows.0);
        let rows = rows.ok_or_else(|| DataFusionError::Internal("a file of unknown rows".to_owned()))?;
        let ObjectMeta { location, size, .. } = file.object_meta;
        Ok(Box::new(self.0.reader(location, size, rows)))
    }
}

/// How many rows the manifest says that a file has.
struct FileRows(u64);

/// The file without the rows that are deleted or replaced, in the file itself or by rows of the buffer, and how many
/// that leaves; `None` if none.
pub(super) fn partitioned(file: &FileEntry, replaced: Option<&Positions>) -> Result<Option<(PartitionedFile, usize)>> {
    let too_many = || DataFusionError::Internal(format!("a file of {} rows", file.rows));
    let rows = u32::try_from(file.rows).map_err(|_| too_many())?;
    let mut hidden = file.hidden();
    if let Some(replaced) = replaced {
        hidden = hidden.union(replaced);
    }
    let selection = hidden.all_but(rows);
    let shown = selection.row_count();
    if shown == 0 {
        return Ok(None);
    }
    let location =
        object_store::path::Path::parse(&file.path).map_err(|error| DataFusionError::External(Box::new(error)))?;
    let last_modified = chrono::DateTime::from_timestamp_micros(file.created_us).unwrap_or_default();
    let object = ObjectMeta { location, last_modified, size: file.bytes, e_tag: None, version: None };
    let found = PartitionedFile::new_from_meta(object).with_extension(FileRows(file.rows));
    let file = if hidden.is_empty() { found } else { found.with_extension(ParquetRowSelection::new(selection)) };
    Ok(Some((file, shown)))
}

#[async_trait]
impl TableProvider for InstanceTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        Ok(vec![TableProviderFilterPushDown::Inexact; filters.len()])
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let id = self.instance(state)?;
        let pinned = state.config().get_extension::<Pinned>().ok_or_else(not_read)?;
        let rows = pinned.rows(&id).ok_or_else(not_read)?;
        let hot = self.buffered(rows, projection)?;
        let bounded = if filters.is_empty() { limit } else { None };
        match self.files(state, rows, projection, filters, bounded)? {
            Some(cold) => UnionExec::try_new(vec![hot, cold]),
            None => Ok(hot),
        }
    }
}

fn not_read() -> DataFusionError {
    DataFusionError::Internal("a scan of what was not read for its statement was refused".to_owned())
}

pub(super) fn external(error: ApiError) -> DataFusionError {
    DataFusionError::External(Box::new(error))
}

/// Columns that are younger than a file read as their literal default there, or as NULL.
#[derive(Debug)]
struct Defaults(Arc<std::collections::HashMap<String, ScalarValue>>);

impl Defaults {
    fn of(table: &TableEntry) -> Result<Self> {
        let with_default =
            table.columns.iter().filter(|column| !column.absent().is_null()).map(|column| {
                params::scalar(column.absent(), &column.ty).map(|scalar| (column.name.to_string(), scalar))
            });
        Ok(Self(Arc::new(with_default.collect::<Result<_>>()?)))
    }
}

impl PhysicalExprAdapterFactory for Defaults {
    fn create(&self, logical: SchemaRef, physical: SchemaRef) -> Result<Arc<dyn PhysicalExprAdapter>> {
        let missing = self
            .0
            .iter()
            .filter(|(name, _)| physical.column_with_name(name).is_none())
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        let inner = DefaultPhysicalExprAdapterFactory.create(logical, physical)?;
        Ok(Arc::new(WithDefaults { missing, inner }))
    }
}

#[derive(Debug)]
struct WithDefaults {
    missing: std::collections::HashMap<String, ScalarValue>,
    inner: Arc<dyn PhysicalExprAdapter>,
}

impl PhysicalExprAdapter for WithDefaults {
    fn rewrite(&self, expr: Arc<dyn PhysicalExpr>) -> Result<Arc<dyn PhysicalExpr>> {
        self.inner.rewrite(replace_columns_with_literals(expr, &self.missing)?)
    }
}

#[cfg(test)]
mod tests {
    use datafusion::datasource::provider_as_source;
    use datafusion::execution::context::SessionState;
    use datafusion::logical_expr::{LogicalPlan, LogicalPlanBuilder};
    use datafusion::prelude::{SessionConfig, SessionContext};
    use kalamdb_model::{OnRemoval, Role, UserId, compile};
    use kalamdb_test_support::pod::MANIFESTS;

    use super::*;
    use crate::catalog::CatalogHandle;
    use crate::engine::{EngineLimits, Secrets, Storages};
    use crate::metrics::Metrics;
    use crate::sql::pinned::pin;

    fn engine(dir: &std::path::Path) -> Arc<Engine> {
        let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), MANIFESTS.to_owned())]);
        let catalog = CatalogHandle::open(dir).unwrap();
        catalog.serve(compile(&catalog.current().catalog, &folder.declared, OnRemoval::Retain).0);
        let storages = Storages::new(dir.to_owned(), Secrets::default());
        let limits = EngineLimits {
            instance_bytes_max: 1 << 20,
            disk_reserve_bytes: 0,
            buffered_bytes_max: 1 << 30,
            garbage_after_secs: 0,
            orphans_after_secs: 0,
            flushes_max: 1,
        };
        Engine::open(dir, catalog, storages, limits, Arc::new(Metrics::default())).unwrap()
    }

    /// A session of `user` which reads into `pinned`.
    fn session(user: Option<&str>, pinned: &Arc<Pinned>) -> SessionState {
        let config = SessionConfig::new().with_extension(Arc::clone(pinned));
        let config = match user {
            Some(user) => {
                config.with_extension(Arc::new(Identity { user: UserId::new(user).unwrap(), role: Role::User }))
            }
            None => config,
        };
        SessionContext::new_with_config(config).state()
    }

    async fn scan(table: &InstanceTable, state: &SessionState) -> Result<(), String> {
        table.scan(state, None, &[], None).await.map(|_| ()).map_err(|error| error.to_string())
    }

    /// A table, and a plan that reads the columns `projection` of it.
    fn planned(engine: &Arc<Engine>, projection: Option<Vec<usize>>) -> (Arc<InstanceTable>, LogicalPlan) {
        let entry = Arc::new(engine.catalog().current().catalog.tables.values().next().unwrap().clone());
        let table = Arc::new(InstanceTable::new(Arc::clone(engine), entry, false));
        let source = provider_as_source(Arc::clone(&table) as Arc<dyn TableProvider>);
        let plan = LogicalPlanBuilder::scan("t", source, projection).unwrap().build().unwrap();
        (table, plan)
    }

    #[tokio::test]
    async fn a_scan_in_a_session_without_an_identity_fails() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(dir.path());
        let (table, plan) = planned(&engine, None);
        let pinned = Arc::default();
        let (nobody, alice) = (session(None, &pinned), session(Some("alice"), &pinned));
        let pool = Arc::clone(&alice.runtime_env().memory_pool);
        let refused = pin(&nobody, &pool, &plan).await.unwrap_err().to_string();
        assert!(refused.contains("without an identity"), "{refused}");
        pin(&alice, &pool, &plan).await.unwrap();
        scan(&table, &alice).await.unwrap();
        let refused = scan(&table, &nobody).await.unwrap_err();
        assert!(refused.contains("without an identity"), "{refused}");
        engine.close(std::time::Duration::from_secs(5)).await;
    }

    #[tokio::test]
    async fn a_scan_of_what_was_not_read_for_its_statement_fails() {
        let dir = tempfile::tempdir().unwrap();
        let engine = engine(dir.path());
        let (table, plan) = planned(&engine, Some(vec![0]));
        let pinned = Arc::default();
        let (alice, bob) = (session(Some("alice"), &pinned), session(Some("bob"), &pinned));
        let pool = Arc::clone(&alice.runtime_env().memory_pool);
        let first = vec![0];
        let refused = async |state: &SessionState, projection: Option<&Vec<usize>>| {
            let error = table.scan(state, projection, &[], None).await.map(|_| ()).unwrap_err().to_string();
            assert!(error.contains("not read"), "{error}");
        };
        refused(&alice, Some(&first)).await;
        pin(&alice, &pool, &plan).await.unwrap();
        table.scan(&alice, Some(&first), &[], None).await.unwrap();
        refused(&alice, None).await;
        // Another's rows are no one's own, even where they are at hand.
        refused(&bob, Some(&first)).await;
        // A statement has one moment.
        pin(&alice, &pool, &plan).await.unwrap_err();
        engine.close(std::time::Duration::from_secs(5)).await;
    }
}
