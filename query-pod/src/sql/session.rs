//! One DataFusion session per request, cloned from a template: it sees one catalog snapshot and one caller.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use datafusion::catalog::{CatalogProvider, CatalogProviderList, SchemaProvider, TableFunction, TableProvider};
use datafusion::datasource::MemTable;
use datafusion::error::{DataFusionError, Result};
use datafusion::execution::context::SessionState;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::{GreedyMemoryPool, MemoryPool};
use datafusion::execution::object_store::ObjectStoreRegistry;
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::execution::{SessionStateDefaults, TaskContext};
use datafusion::logical_expr::{AggregateUDF, ScalarUDF};
use datafusion::optimizer::AnalyzerRule;
use datafusion::prelude::SessionConfig;
use kalamdb_model::{SqlName, StorageName, TableName};
use object_store::ObjectStore;

use super::parse::TABLE_FUNCTIONS;
use super::parse_dml::GIVEN;
use super::pinned::Pinned;
use super::width::BATCH_ROWS;
use super::{SqlLimits, amplify, exact, functions, information_schema, owner_for, provider, sum, system_tables};
use crate::auth::Identity;
use crate::catalog::{CatalogHandle, Snapshot};
use crate::engine::{Engine, RootKey, Storages};
use crate::error::{ApiError, Kind};

/// The one catalog that sessions have; users need not name it.
const CATALOG: &str = "kalam";

/// Makes sessions.
pub(super) struct Sessions {
    template: SessionState,
    runtime: Arc<RuntimeEnv>,
    engine: Arc<Engine>,
    pool: Arc<dyn MemoryPool>,
    query_memory_bytes: usize,
}

impl Sessions {
    pub(super) fn new(engine: &Arc<Engine>, limits: &SqlLimits) -> Result<Self> {
        let stores = Arc::new(Stores { catalog: engine.catalog().clone(), storages: engine.storages().clone() });
        let runtime = RuntimeEnvBuilder::new()
            .with_object_store_registry(stores)
            // Queries do not spill: rows of users would lie in temporary files. The limit is an error instead.
            .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(DiskManagerMode::Disabled))
            .build_arc()?;
        let template = SessionStateBuilder::new_with_default_features()
            .with_config(config())
            .with_scalar_functions(scalar_functions(limits))
            .with_aggregate_functions(aggregate_functions())
            .with_analyzer_rules(analyzer_rules(limits))
            .with_runtime_env(Arc::clone(&runtime))
            .with_table_functions(table_functions())
            .with_table_factories(HashMap::new())
            .with_catalog_list(Arc::new(Catalogs::default()))
            .build();
        let pool = Arc::new(GreedyMemoryPool::new(limits.queries_memory_bytes));
        Ok(Self { template, runtime, engine: Arc::clone(engine), pool, query_memory_bytes: limits.query_memory_bytes })
    }

    /// A session for `identity` on `snapshot`. With `system_columns`, tables show `_seq`, `_updated`, `_deleted`.
    pub(super) fn open(
        &self,
        identity: &Identity,
        snapshot: &Arc<Snapshot>,
        namespace: Option<&str>,
        system_columns: bool,
        given: Vec<Given>,
    ) -> SessionState {
        let visible = Visible {
            engine: Arc::clone(&self.engine),
            snapshot: Arc::clone(snapshot),
            identity: identity.clone(),
            system_columns,
            given,
        };
        // A builder would make every function anew.
        let mut state = self.template.clone();
        let config = state.config_mut();
        config.set_extension(Arc::new(identity.clone()));
        config.set_extension(Arc::new(Pinned::default()));
        functions::speak_for(identity, config);
        if let Some(namespace) = namespace {
            config.options_mut().catalog.default_schema = namespace.to_owned();
        }
        state.register_catalog_list(Arc::new(Catalogs(Some(Arc::new(visible)))));
        // NOW() is the time at which the statement started; without this DataFusion knows none. It takes the options, too.
        state.mark_start_execution();
        state
    }

    /// Whether the function of this name makes one value of many rows.
    pub(super) fn is_aggregate(&self, name: &str) -> bool {
        self.template.aggregate_functions().contains_key(name)
    }

    /// What all queries have taken of their memory.
    pub(super) fn memory_taken(&self) -> usize {
        self.pool.reserved()
    }

    /// What one query of `state` reads and runs with: its share of the memory.
    pub(super) fn task(&self, state: &SessionState) -> Result<Arc<TaskContext>> {
        let pool = Arc::new(QueryPool::new(self.query_memory_bytes, Arc::clone(&self.pool)));
        let runtime = RuntimeEnvBuilder::from_runtime_env(&self.runtime).with_memory_pool(pool).build_arc()?;
        Ok(Arc::new(TaskContext::from(state).with_runtime(runtime)))
    }
}

fn config() -> SessionConfig {
    let mut config = SessionConfig::new()
        .with_target_partitions(std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(4))
        .with_batch_size(BATCH_ROWS)
        .with_create_default_catalog_and_schema(false)
        .with_information_schema(false)
        .with_default_catalog_and_schema(CATALOG, "");
    let options = config.options_mut();
    // A decimal literal stays exact; as a double, `price = 1.10` would compare after rounding.
    options.sql_parser.parse_float_as_decimal = true;
    options.sql_parser.map_string_types_to_utf8view = false;
    options.execution.parquet.schema_force_view_types = false;
    options.execution.parquet.enable_page_index = true;
    options.execution.parquet.bloom_filter_on_read = true;
    // Zone of the answers, whatever the machine's.
    options.execution.time_zone = Some("+00:00".to_owned());
    config
}

fn table_functions() -> HashMap<String, Arc<TableFunction>> {
    SessionStateDefaults::default_table_functions()
        .into_iter()
        .filter(|function| TABLE_FUNCTIONS.contains(&function.name()))
        .map(|function| (function.name().to_owned(), function))
        .collect()
}

fn scalar_functions(limits: &SqlLimits) -> Vec<Arc<ScalarUDF>> {
    let mut all = amplify::bounded(SessionStateDefaults::default_scalar_functions(), limits.query_memory_bytes);
    all.push(Arc::new(functions::current_user()));
    all
}

fn aggregate_functions() -> Vec<Arc<AggregateUDF>> {
    let mut all = SessionStateDefaults::default_aggregate_functions();
    all.retain(|function| !["sum", "string_agg"].contains(&function.name()));
    all.extend([sum::function(), amplify::string_agg()]);
    all
}

fn analyzer_rules(limits: &SqlLimits) -> Vec<Arc<dyn AnalyzerRule + Send + Sync>> {
    let mut rules = exact::analyzer_rules();
    rules.push(amplify::operators(limits.query_memory_bytes));
    rules
}

/// URL under which a root's store is known to DataFusion: `kalam://storage.root/`.
pub(super) fn store_url(root: &RootKey) -> String {
    format!("kalam://{root}")
}

/// Knows the stores of the catalog and no others: no `file://`, no discovery.
#[derive(Clone)]
struct Stores {
    catalog: CatalogHandle,
    storages: Storages,
}

impl std::fmt::Debug for Stores {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stores")
    }
}

impl ObjectStoreRegistry for Stores {
    fn register_store(&self, _: &url::Url, _: Arc<dyn ObjectStore>) -> Option<Arc<dyn ObjectStore>> {
        None
    }

    fn get_store(&self, url: &url::Url) -> Result<Arc<dyn ObjectStore>> {
        let unknown = || DataFusionError::Plan("no such object store".to_owned());
        if url.scheme() != "kalam" {
            return Err(unknown());
        }
        let (storage, root) = url.host_str().and_then(|host| host.rsplit_once('.')).ok_or_else(unknown)?;
        let storage = StorageName::new(storage).map_err(|_| unknown())?;
        let key = RootKey { storage, root: root.parse().map_err(|_| unknown())? };
        self.storages.store(&self.catalog.current(), &key).map_err(|error| DataFusionError::External(Box::new(error)))
    }
}

/// What one request sees.
pub(super) struct Visible {
    pub(super) engine: Arc<Engine>,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) identity: Identity,
    pub(super) system_columns: bool,
    given: Vec<Given>,
}

/// Rows of a statement as a table of [`GIVEN`], in one query.
pub(super) struct Given {
    name: &'static str,
    rows: Arc<MemTable>,
}

impl Given {
    pub(super) fn new(name: &'static str, rows: MemTable) -> Self {
        Self { name, rows: Arc::new(rows) }
    }
}

#[derive(Default)]
struct Catalogs(Option<Arc<Visible>>);

impl std::fmt::Debug for Catalogs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Catalogs")
    }
}

impl CatalogProviderList for Catalogs {
    fn register_catalog(&self, _: String, _: Arc<dyn CatalogProvider>) -> Option<Arc<dyn CatalogProvider>> {
        None
    }

    fn catalog_names(&self) -> Vec<String> {
        vec![CATALOG.to_owned()]
    }

    fn catalog(&self, name: &str) -> Option<Arc<dyn CatalogProvider>> {
        let visible = self.0.as_ref().filter(|_| name == CATALOG)?;
        Some(Arc::new(Schemas(Arc::clone(visible))))
    }
}

struct Schemas(Arc<Visible>);

impl std::fmt::Debug for Schemas {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Schemas")
    }
}

impl CatalogProvider for Schemas {
    fn schema_names(&self) -> Vec<String> {
        self.0.snapshot.catalog.namespaces.keys().map(ToString::to_string).collect()
    }

    fn schema(&self, name: &str) -> Option<Arc<dyn SchemaProvider>> {
        Some(Arc::new(Tables { visible: Arc::clone(&self.0), schema: name.to_owned() }))
    }
}

struct Tables {
    visible: Arc<Visible>,
    schema: String,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tables")
    }
}

impl Tables {
    fn entry(&self, table: &str) -> Option<TableName> {
        Some(TableName { namespace: SqlName::new(&*self.schema).ok()?, table: SqlName::new(table).ok()? })
    }
}

#[async_trait]
impl SchemaProvider for Tables {
    fn table_names(&self) -> Vec<String> {
        let Ok(namespace) = SqlName::new(&*self.schema) else { return Vec::new() };
        self.visible.snapshot.tables_of(&namespace).iter().map(|name| name.table.to_string()).collect()
    }

    async fn table(&self, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
        if self.schema == GIVEN {
            let given = self.visible.given.iter().find(|given| given.name == name);
            return Ok(given.map(|given| Arc::clone(&given.rows) as Arc<dyn TableProvider>));
        }
        if self.schema == information_schema::NAME {
            return information_schema::table(&self.visible, name);
        }
        if self.schema == system_tables::NAME {
            return system_tables::table(&self.visible, name);
        }
        let entry = self.entry(name).and_then(|name| self.visible.snapshot.table(&name).cloned());
        let Some(entry) = entry else { return Ok(None) };
        // Said again by every scan; here, so that EXPLAIN tells no columns of a table that may not be read.
        owner_for(&entry, &self.visible.identity, false).map_err(|error| DataFusionError::External(Box::new(error)))?;
        let engine = Arc::clone(&self.visible.engine);
        Ok(Some(Arc::new(provider::InstanceTable::new(engine, entry, self.visible.system_columns))))
    }

    fn table_exist(&self, name: &str) -> bool {
        self.entry(name).is_some_and(|name| self.visible.snapshot.table(&name).is_some())
    }
}

/// A table that is not there, with the nearest name that is.
pub(super) fn no_such_table(snapshot: &Snapshot, name: &str) -> ApiError {
    const DISTANCE_MAX: usize = 3;
    let chars = name.chars().count();
    let near = snapshot
        .catalog
        .tables
        .keys()
        .map(ToString::to_string)
        // Texts are at least as far apart as their lengths.
        .filter(|known| known.len().abs_diff(chars) <= DISTANCE_MAX)
        .map(|known| (datafusion::common::utils::datafusion_strsim::levenshtein(&known, name), known))
        .filter(|(distance, _)| *distance <= DISTANCE_MAX)
        .min();
    let hint = near.map(|(_, known)| format!("; did you mean `{known}`?")).unwrap_or_default();
    ApiError::new(Kind::NotFound, "TABLE_NOT_FOUND", format!("table `{name}` does not exist{hint}"))
}

/// The memory of one query: its own limit, taken from the limit of all.
#[derive(Debug)]
struct QueryPool {
    own: GreedyMemoryPool,
    all: Arc<dyn MemoryPool>,
}

impl QueryPool {
    fn new(limit: usize, all: Arc<dyn MemoryPool>) -> Self {
        Self { own: GreedyMemoryPool::new(limit), all }
    }
}

impl std::fmt::Display for QueryPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("query")
    }
}

impl MemoryPool for QueryPool {
    fn name(&self) -> &str {
        "query"
    }

    fn grow(&self, reservation: &datafusion::execution::memory_pool::MemoryReservation, additional: usize) {
        self.own.grow(reservation, additional);
        self.all.grow(reservation, additional);
    }

    fn shrink(&self, reservation: &datafusion::execution::memory_pool::MemoryReservation, shrink: usize) {
        self.own.shrink(reservation, shrink);
        self.all.shrink(reservation, shrink);
    }

    fn try_grow(
        &self,
        reservation: &datafusion::execution::memory_pool::MemoryReservation,
        additional: usize,
    ) -> Result<()> {
        self.own.try_grow(reservation, additional)?;
        self.all.try_grow(reservation, additional).inspect_err(|_| self.own.shrink(reservation, additional))
    }

    fn reserved(&self) -> usize {
        self.own.reserved()
    }
}
