//! Queries: plan with DataFusion, bind parameters, run within limits, encode.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, SchemaRef};
use datafusion::common::tree_node::{Transformed, TreeNode as _, TreeNodeRecursion};
use datafusion::common::{ParamValues, ScalarValue};
use datafusion::error::DataFusionError;
use datafusion::execution::TaskContext;
use datafusion::execution::context::SessionState;
use datafusion::logical_expr::expr::Placeholder;
use datafusion::logical_expr::{Expr, LogicalPlan};
use datafusion::physical_plan::filter::FilterExec;
use datafusion::physical_plan::{ExecutionPlan, execute_stream};
use datafusion::sql::parser::Statement as PlannerStatement;
use futures::StreamExt as _;
use parquet::errors::ParquetError;

use super::parse::{self, QueryStatement};
use super::plans::Planned;
use super::session::Given;
use super::width::BATCH_ROWS;
use super::{QUERY_WAIT, Request, Sql, params, pinned, session, weight, wildcard};
use crate::catalog::Snapshot;
use crate::engine::StoragesError;
use crate::error::{ApiError, Kind};
use crate::http::Room;
use crate::http::encode::{Answer, Encoder};
use crate::shares::Full;

impl Sql {
    pub(super) async fn query(
        &self,
        request: &Request<'_>,
        snapshot: &Arc<Snapshot>,
        query: &QueryStatement,
    ) -> Result<Answer, ApiError> {
        let work = async {
            match self.answer_fast(request, snapshot, &query.statement).await? {
                Some(answer) => Ok(answer),
                None => Box::pin(self.run_query(request, snapshot, query)).await,
            }
        };
        self.within_limits(request, Box::pin(work)).await
    }

    /// Waits for a turn, and stops `work` when it takes too long.
    async fn within_limits<T>(
        &self,
        request: &Request<'_>,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let _turn = self.queries.take(&request.identity.user, 1, QUERY_WAIT).await.map_err(|full| {
            let message = match full {
                Full::User(most) => format!("at most {most} queries of one user are run at once; try again"),
                Full::All(most) => format!("{most} queries are running already; try again"),
            };
            ApiError::new(Kind::Busy, "TOO_MANY_QUERIES", message)
        })?;
        self.metrics.queries.inc();
        let limit = Duration::from_secs(self.limits.query_timeout_secs);
        match tokio::time::timeout(limit, work).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let message = format!("the query ran longer than {} s and was stopped", limit.as_secs());
                Err(ApiError::unavailable("QUERY_TIMEOUT", message))
            }
        }
    }

    async fn run_query(
        &self,
        request: &Request<'_>,
        snapshot: &Arc<Snapshot>,
        query: &QueryStatement,
    ) -> Result<Answer, ApiError> {
        let (state, planned) = Box::pin(self.plan(request, snapshot, query, Vec::new())).await?;
        check_parameters(planned.parameters.keys(), request.params.len())?;
        let plan = bind(planned, request)?;
        let task = self.task(&state, snapshot)?;
        let room = Room::new(Arc::clone(&self.answers_bytes), request.identity.user.clone());
        let work = run(state, task, plan, Arc::clone(snapshot), self.limits.clone(), room);
        self.workers.run(work).await.map_err(|error| ApiError::internal(&error))?
    }

    /// The rows that a statement which writes has to read; `given` are tables of rows of its own.
    pub(super) async fn rows(
        &self,
        request: &Request<'_>,
        snapshot: &Arc<Snapshot>,
        query: &QueryStatement,
        given: Vec<Given>,
    ) -> Result<(SchemaRef, Vec<RecordBatch>), ApiError> {
        let work = async {
            let (state, planned) = Box::pin(self.plan(request, snapshot, query, given)).await?;
            let plan = bind(planned, request)?;
            let task = self.task(&state, snapshot)?;
            let work = collect(state, task, plan, Arc::clone(snapshot), self.limits.clone());
            self.workers.run(work).await.map_err(|error| ApiError::internal(&error))?
        };
        self.within_limits(request, Box::pin(work)).await
    }

    /// A session for the caller, and the plan of `query`: one that was made before, unless it reads what is `given`.
    async fn plan(
        &self,
        request: &Request<'_>,
        snapshot: &Arc<Snapshot>,
        query: &QueryStatement,
        given: Vec<Given>,
    ) -> Result<(SessionState, Planned), ApiError> {
        let QueryStatement { statement, names_system_columns } = query;
        let names_system_columns = *names_system_columns;
        let for_all = given.is_empty();
        if for_all && let Some(planned) = self.plans.get(request, snapshot) {
            self.metrics.plans_reused.inc();
            let state = self.sessions.open(request.identity, snapshot, request.namespace, names_system_columns, given);
            return Ok((state, planned));
        }
        let mut statement = statement.clone();
        if names_system_columns {
            wildcard::expand(&mut statement, snapshot, request.namespace)?;
        }
        let explain = |error| of_datafusion(error, snapshot, &self.limits);
        let state = self.sessions.open(request.identity, snapshot, request.namespace, names_system_columns, given);
        let plan = state.statement_to_plan(PlannerStatement::Statement(Box::new(statement))).await.map_err(explain)?;
        // First of all: whatever else looks at a plan looks at it as often as it is heavy.
        let weight = weight::check(&plan)?;
        refuse_writes(&plan)?;
        let parameters = Arc::new(parameter_types(&plan).map_err(invalid_parameter)?);
        let planned = Planned { plan, parameters };
        if for_all {
            self.plans.keep(request, snapshot, &planned, weight);
        }
        Ok((state, planned))
    }

    fn task(&self, state: &SessionState, snapshot: &Snapshot) -> Result<Arc<TaskContext>, ApiError> {
        self.sessions.task(state).map_err(|error| of_datafusion(error, snapshot, &self.limits))
    }
}

/// Has filters glue no more than `rows` rows together. Those that the optimizer brings below a union do not know how many
/// the session says.
fn with_batches_of(rows: usize, plan: Arc<dyn ExecutionPlan>) -> Result<Arc<dyn ExecutionPlan>, DataFusionError> {
    let plan = plan.transform_up(|plan| match plan.downcast_ref::<FilterExec>() {
        Some(filter) => Ok(Transformed::yes(Arc::new(filter.with_batch_size(rows)?) as Arc<dyn ExecutionPlan>)),
        None => Ok(Transformed::no(plan)),
    })?;
    Ok(plan.data)
}

/// Optimizes `plan`, reads what its scans need of buffered rows and lists of files, and makes the plan that is run.
async fn prepare(
    state: &mut SessionState,
    task: Arc<TaskContext>,
    plan: &LogicalPlan,
) -> Result<(Arc<dyn ExecutionPlan>, Arc<TaskContext>), DataFusionError> {
    let plan = state.optimize(plan)?;
    if let LogicalPlan::Explain(explained) = &plan
        && !explained.logical_optimization_succeeded
    {
        // It shows as a row what went wrong; this is the error itself.
        state.optimize(&explained.plan)?;
    }
    let rows = pinned::pin(state, task.memory_pool(), &plan).await?;
    let task = if rows == BATCH_ROWS {
        task
    } else {
        let config = state.config().clone().with_batch_size(rows);
        *state.config_mut() = config;
        Arc::new(TaskContext::from(&*state).with_runtime(task.runtime_env()))
    };
    let planner = state.query_planner();
    if let LogicalPlan::Explain(explained) = &plan {
        // The same for what cannot be planned.
        planner.create_physical_plan(&explained.plan, state).await?;
    }
    let physical = planner.create_physical_plan(&plan, state).await?;
    Ok((if rows == BATCH_ROWS { physical } else { with_batches_of(rows, physical)? }, task))
}

/// Optimizes and runs `plan`, and keeps what it gives.
async fn collect(
    mut state: SessionState,
    task: Arc<TaskContext>,
    plan: LogicalPlan,
    snapshot: Arc<Snapshot>,
    limits: super::SqlLimits,
) -> Result<(SchemaRef, Vec<RecordBatch>), ApiError> {
    let explain = |error| of_datafusion(error, &snapshot, &limits);
    let (physical, task) = prepare(&mut state, task, &plan).await.map_err(explain)?;
    let schema = physical.schema();
    let mut stream = execute_stream(physical, task).map_err(explain)?;
    let (mut batches, mut bytes) = (Vec::new(), 0);
    while let Some(batch) = stream.next().await {
        let batch = batch.map_err(explain)?;
        // Of the slice: a batch may be a part of a much larger one.
        let sizes = batch.columns().iter().map(|column| column.to_data().get_slice_memory_size());
        bytes += sizes.sum::<Result<usize, _>>().map_err(|error| ApiError::internal(&error))?;
        if bytes > limits.statement_rows_bytes_max {
            let limit = limits.statement_rows_bytes_max;
            let message = format!("the statement touches more than {limit} bytes of rows; do it in parts");
            return Err(ApiError::new(Kind::TooLarge, "TOO_MANY_ROWS", message));
        }
        batches.push(batch);
    }
    Ok((schema, batches))
}

/// Optimizes and runs `plan`.
async fn run(
    mut state: SessionState,
    task: Arc<TaskContext>,
    plan: LogicalPlan,
    snapshot: Arc<Snapshot>,
    limits: super::SqlLimits,
    room: Room,
) -> Result<Answer, ApiError> {
    let explain = |error| of_datafusion(error, &snapshot, &limits);
    let (physical, task) = prepare(&mut state, task, &plan).await.map_err(explain)?;
    let mut encoder = Encoder::new(&physical.schema(), limits.answer_bytes_max, room);
    let mut batches = execute_stream(physical, task).map_err(explain)?;
    while let Some(batch) = batches.next().await {
        encoder.push(&batch.map_err(explain)?).await?;
    }
    Ok(encoder.finish())
}

/// The second lock on the same door: whatever the parser let through, a plan that writes or changes the session is not
/// run.
fn refuse_writes(plan: &LogicalPlan) -> Result<(), ApiError> {
    use datafusion::execution::context::SQLOptions;
    SQLOptions::new()
        .with_allow_ddl(false)
        .with_allow_dml(false)
        .with_allow_statements(false)
        .verify_plan(plan)
        .map_err(|_| ApiError::invalid("UNSUPPORTED_STATEMENT", "only queries are run; nothing was changed"))
}

fn invalid_parameter(error: DataFusionError) -> ApiError {
    ApiError::invalid("INVALID_PARAMETER", error.strip_backtrace())
}

fn bind(planned: Planned, request: &Request<'_>) -> Result<LogicalPlan, ApiError> {
    let Planned { plan, parameters: inferred } = planned;
    if inferred.is_empty() {
        return Ok(plan);
    }
    let mut values: Vec<ScalarValue> = Vec::with_capacity(request.params.len());
    for (number, raw) in (1_usize..).zip(request.params) {
        // A parameter that another part of the statement uses may be of any type; nobody looks at it here.
        values.push(match inferred.get(&format!("${number}")) {
            Some(wanted) => params::parameter(number, raw, wanted.as_ref())?,
            None => ScalarValue::Null,
        });
    }
    plan.with_param_values(ParamValues::from(values)).map_err(invalid_parameter)
}

/// The type that the planner inferred for each placeholder of `plan`; none where it has none, or more than one.
fn parameter_types(plan: &LogicalPlan) -> Result<HashMap<String, Option<DataType>>, DataFusionError> {
    let mut inferred: HashMap<String, Option<DataType>> = HashMap::new();
    let mut note = |placeholder: &Placeholder, ty: Option<&DataType>| match (inferred.get_mut(&placeholder.id), ty) {
        (Some(known), Some(ty)) if known.as_ref() != Some(ty) => *known = None,
        (Some(_), _) => {}
        (None, ty) => {
            inferred.insert(placeholder.id.clone(), ty.cloned());
        }
    };
    plan.apply_with_subqueries(|plan| {
        // LIMIT and OFFSET take integers, which the planner does not infer.
        let is_limit = matches!(plan, LogicalPlan::Limit(_));
        plan.apply_expressions(|expr| {
            expr.apply(|expr| {
                if let Expr::Placeholder(placeholder) = expr {
                    let field = placeholder.field.as_ref().map(|field| field.data_type());
                    note(placeholder, field.or(is_limit.then_some(&DataType::Int64)));
                }
                Ok(TreeNodeRecursion::Continue)
            })
        })
    })?;
    Ok(inferred)
}

/// Every placeholder is `$1`, `$2`, … and has a value; every value has a placeholder.
pub(super) fn check_parameters<'n>(names: impl IntoIterator<Item = &'n String>, sent: usize) -> Result<(), ApiError> {
    let mut used = vec![false; sent];
    for name in names {
        let number = name.strip_prefix('$').and_then(|digits| digits.parse::<usize>().ok()).filter(|n| *n >= 1);
        let Some(number) = number else {
            let message = format!("`{name}` is no parameter; use $1, $2, …");
            return Err(ApiError::invalid("INVALID_PARAMETER", message));
        };
        match used.get_mut(number - 1) {
            Some(slot) => *slot = true,
            None => {
                let message = format!("the statement uses ${number}, and {sent} parameter(s) were sent");
                return Err(ApiError::invalid("INVALID_PARAMETER", message));
            }
        }
    }
    match used.iter().position(|used| !used) {
        Some(index) => {
            let message = format!("parameter ${} was sent, and the statement does not use it", index + 1);
            Err(ApiError::invalid("INVALID_PARAMETER", message))
        }
        None => Ok(()),
    }
}

/// What DataFusion says, for the client. Its plan and value errors speak of the caller's own statement; everything else
/// is ours, and goes to the log.
pub(super) fn of_datafusion(error: DataFusionError, snapshot: &Snapshot, limits: &super::SqlLimits) -> ApiError {
    let mut said = classify(&error, snapshot, limits);
    said.message = parse::shorten(&said.message);
    said
}

fn classify(error: &DataFusionError, snapshot: &Snapshot, limits: &super::SqlLimits) -> ApiError {
    match error.find_root() {
        DataFusionError::External(inner) => match inner.downcast_ref::<ApiError>() {
            Some(ours) => ours.clone(),
            None => storage_or_internal(error),
        },
        DataFusionError::ResourcesExhausted(_) => ApiError::new(
            Kind::TooLarge,
            "QUERY_MEMORY_EXCEEDED",
            format!("the query needs more than {} bytes of memory; narrow it", limits.query_memory_bytes),
        ),
        DataFusionError::Plan(message) => match missing_table(message) {
            Some(name) => session::no_such_table(snapshot, &name),
            None => ApiError::invalid("INVALID_SQL", message.clone()),
        },
        DataFusionError::SchemaError(schema, _) => ApiError::invalid("INVALID_SQL", schema.to_string()),
        DataFusionError::SQL(parser, _) => ApiError::invalid("SYNTAX_ERROR", parser.to_string()),
        DataFusionError::NotImplemented(message) => ApiError::invalid("UNSUPPORTED", message.clone()),
        DataFusionError::Execution(message) | DataFusionError::Configuration(message) => {
            ApiError::invalid("INVALID_VALUE", message.clone())
        }
        DataFusionError::ArrowError(arrow, _) => of_arrow(arrow, error),
        _ => storage_or_internal(error),
    }
}

fn of_arrow(arrow: &arrow::error::ArrowError, whole: &DataFusionError) -> ApiError {
    use arrow::error::ArrowError;
    match arrow {
        ArrowError::DivideByZero => ApiError::invalid("DIVISION_BY_ZERO", "division by zero"),
        ArrowError::CastError(message)
        | ArrowError::ParseError(message)
        | ArrowError::ComputeError(message)
        | ArrowError::InvalidArgumentError(message)
        | ArrowError::ArithmeticOverflow(message) => ApiError::invalid("INVALID_VALUE", message.clone()),
        _ => storage_or_internal(whole),
    }
}

fn storage_or_internal(error: &DataFusionError) -> ApiError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = source {
        if is_of_store(inner) {
            tracing::warn!(error = %crate::error::Chain(error), "a query could not read its files");
            return ApiError::unavailable("STORAGE_UNAVAILABLE", "the storage of the table does not answer; try again");
        }
        source = inner.source();
    }
    ApiError::internal(error)
}

/// Whether an error is an object store's. On the way through Parquet and DataFusion it may have been boxed, which makes it
/// another type.
fn is_of_store(error: &(dyn std::error::Error + 'static)) -> bool {
    let boxed = error.downcast_ref::<Box<object_store::Error>>().is_some();
    let wrapped = error.downcast_ref::<DataFusionError>().is_some_and(|e| matches!(e, DataFusionError::ObjectStore(_)));
    let parquet = error.downcast_ref::<Box<ParquetError>>().map(|error| &**error).or_else(|| error.downcast_ref());
    let external = match parquet {
        Some(ParquetError::External(inner)) => is_of_store(inner.as_ref()),
        // Where DataFusion fetches a footer it keeps nothing of the error but its text.
        Some(ParquetError::General(text)) => text.contains("Object Store error: "),
        _ => false,
    };
    let unusable = error.downcast_ref::<StoragesError>().is_some();
    boxed || wrapped || external || unusable || error.downcast_ref::<object_store::Error>().is_some()
}

/// The name in DataFusion's `table 'kalam.app.t' not found`, as the client wrote it.
fn missing_table(message: &str) -> Option<String> {
    let name = message.strip_prefix("table '")?.strip_suffix("' not found")?;
    Some(name.strip_prefix("kalam.").unwrap_or(name).trim_start_matches('.').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_stores_error_is_known_however_it_is_wrapped() {
        let lost = || object_store::Error::Generic { store: "S3", source: "connection refused".into() };
        let parquet = || ParquetError::External(Box::new(lost()));
        for error in [
            DataFusionError::ObjectStore(Box::new(lost())),
            DataFusionError::External(Box::new(lost())),
            DataFusionError::ParquetError(Box::new(parquet())),
            DataFusionError::External(Box::new(parquet())),
            DataFusionError::ParquetError(Box::new(ParquetError::General(format!(
                "Failed to fetch metadata for file x: {}",
                DataFusionError::ObjectStore(Box::new(lost()))
            )))),
            DataFusionError::ArrowError(Box::new(arrow::error::ArrowError::ExternalError(Box::new(parquet()))), None),
            DataFusionError::Shared(Arc::new(DataFusionError::ParquetError(Box::new(parquet())))),
            DataFusionError::Context("reading".to_owned(), Box::new(DataFusionError::ObjectStore(Box::new(lost())))),
        ] {
            let shown = error.to_string();
            assert_eq!(storage_or_internal(&error).code, "STORAGE_UNAVAILABLE", "{shown}");
        }
        let ours = DataFusionError::Internal("a mistake".to_owned());
        assert_eq!(storage_or_internal(&ours).code, "INTERNAL");
    }
}
