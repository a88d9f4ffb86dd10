//! SQL: which statements are taken, how they run, and whose rows they see.
//!
//! A statement is parsed once, here ([`parse`]); only queries reach DataFusion. Identity travels as an extension of the
//! session and is read again inside every scan ([`provider`]).

mod amplify;
mod assign;
mod dialect;
mod dml;
mod engine_errors;
mod exact;
mod fast;
mod functions;
mod information_schema;
pub mod params;
pub mod parse;
mod parse_dml;
mod pinned;
mod plans;
mod provider;
mod query;
mod rewrite;
mod scopes;
mod session;
mod statements;
mod sum;
mod system_tables;
mod unfolding;
mod users;
mod weight;
mod width;
mod wildcard;
mod workers;

use std::sync::Arc;
use std::time::Duration;

use kalamdb_model::{InstanceId, Owner, Role, TableEntry};
use parking_lot::Mutex;
use serde_json::value::RawValue;

use crate::auth::Identity;
use crate::catalog::Snapshot;
use crate::engine::Engine;
use crate::error::{ApiError, Kind};
use crate::http::encode::Answer;
use crate::metrics::Metrics;
use crate::shares::Shares;
use parse::Statement;

/// Bounds of statements. Every one has its own error.
#[derive(Clone, Debug, clap::Args)]
pub struct SqlLimits {
    /// Longest SQL text, bytes.
    #[arg(long, default_value_t = 1 << 20)]
    pub statement_bytes_max: usize,
    /// Most parameters of one statement.
    #[arg(long, default_value_t = 65_535)]
    pub params_max: usize,
    /// Most rows of one INSERT.
    #[arg(long, default_value_t = 10_000)]
    pub insert_rows_max: usize,
    /// Largest row, bytes of its values.
    #[arg(long, default_value_t = 4 << 20)]
    pub row_bytes_max: usize,
    /// Memory that one query may use, bytes.
    #[arg(long, default_value_t = 256 << 20)]
    pub query_memory_bytes: usize,
    /// Memory that all queries together may use, bytes.
    #[arg(long, default_value_t = 1 << 30)]
    pub queries_memory_bytes: usize,
    /// Longest run of one query, seconds.
    #[arg(long, default_value_t = 30)]
    pub query_timeout_secs: u64,
    /// Queries at once, at most half of them of one user; others wait up to two seconds.
    #[arg(long, default_value_t = 64)]
    pub queries_max: usize,
    /// Most bytes of rows that one INSERT … SELECT, UPDATE or DELETE reads.
    #[arg(long, default_value_t = 64 << 20)]
    pub statement_rows_bytes_max: usize,
    /// Largest answer, bytes of JSON.
    #[arg(long, default_value_t = 64 << 20)]
    pub answer_bytes_max: usize,
    /// Answers that are not sent yet, bytes of JSON, at most half of them for one user; others wait up to two seconds.
    /// At least twice the largest answer.
    #[arg(long, default_value_t = 512 << 20)]
    pub answers_bytes_max: usize,
}

/// How long a query waits for its turn.
const QUERY_WAIT: Duration = Duration::from_secs(2);

/// One statement with what came along.
pub struct Request<'a> {
    /// Who asks.
    pub identity: &'a Identity,
    /// The SQL text.
    pub sql: &'a str,
    /// Values of `$1`, `$2`, … as JSON texts.
    pub params: &'a [&'a RawValue],
    /// Namespace of tables that are named without one.
    pub namespace: Option<&'a str>,
}

/// Runs statements.
pub struct Sql {
    engine: Arc<Engine>,
    sessions: session::Sessions,
    statements: statements::Statements,
    plans: plans::Plans,
    limits: SqlLimits,
    queries: Shares,
    answers_bytes: Arc<Shares>,
    workers: workers::Workers,
    snowflake: Mutex<kalamdb_model::snowflake::Snowflake>,
    metrics: Arc<Metrics>,
}

impl Sql {
    /// A front to `engine`.
    ///
    /// # Errors
    /// If the query engine cannot be set up, or two limits contradict each other.
    pub fn new(
        engine: Arc<Engine>,
        limits: SqlLimits,
        metrics: Arc<Metrics>,
    ) -> Result<Self, datafusion::error::DataFusionError> {
        let (largest, all) = (limits.answer_bytes_max, limits.answers_bytes_max);
        if all / 2 < largest {
            // One user gets half; a larger answer would wait for room that there never is.
            let message = format!(
                "--answers-bytes-max is {all}, and must be at least twice --answer-bytes-max, which is {largest}"
            );
            return Err(datafusion::error::DataFusionError::Configuration(message));
        }
        Ok(Self {
            sessions: session::Sessions::new(&engine, &limits)?,
            statements: statements::Statements::default(),
            plans: plans::Plans::default(),
            engine,
            queries: Shares::halves(limits.queries_max),
            answers_bytes: Arc::new(Shares::halves(limits.answers_bytes_max)),
            workers: workers::Workers::new()?,
            limits,
            // Ten random bits keep two processes from making the same id in the same millisecond, mostly; the primary
            // key check does the rest.
            snowflake: Mutex::new(kalamdb_model::snowflake::Snowflake::new(rand::random())),
            metrics,
        })
    }

    /// The data plane below.
    #[must_use]
    pub const fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Memory that running queries have taken.
    #[must_use]
    pub fn query_memory_bytes(&self) -> usize {
        self.sessions.memory_taken()
    }

    /// Runs one statement.
    ///
    /// # Errors
    /// What the client is told; nothing was written then, unless the error says that it is not known.
    pub async fn run(&self, request: &Request<'_>) -> Result<Answer, ApiError> {
        let outcome = self.run_statement(request).await;
        // A message may quote the statement.
        outcome.map_err(|error| ApiError { message: parse::shorten(&error.message), ..error })
    }

    async fn run_statement(&self, request: &Request<'_>) -> Result<Answer, ApiError> {
        self.check_size(request)?;
        request.namespace.map_or(Ok(()), parse::check_name)?;
        let snapshot = self.engine.catalog().current();
        match &*self.statements.parse(request.sql)? {
            Statement::Query(query) => Box::pin(self.query(request, &snapshot, query)).await,
            Statement::Insert(insert) => Box::pin(self.insert(request, &snapshot, insert)).await,
            Statement::Update(update) if is_system_users(&update.table, request) => {
                Box::pin(self.update_user(request, &snapshot, update)).await
            }
            Statement::Update(update) => Box::pin(self.update(request, &snapshot, update)).await,
            Statement::Delete(delete) => Box::pin(self.delete(request, &snapshot, delete)).await,
            Statement::Flush(target) => self.flush(request, &snapshot, target).await,
            Statement::Compact(target) => self.compact(request, &snapshot, target).await,
            Statement::CancelJob(id) => self.cancel_job(request, id),
        }
    }

    fn check_size(&self, request: &Request<'_>) -> Result<(), ApiError> {
        let too_large = |code, message: String| Err(ApiError::new(Kind::TooLarge, code, message));
        let (bytes, limit) = (request.sql.len(), self.limits.statement_bytes_max);
        if bytes > limit {
            return too_large(
                "STATEMENT_TOO_LARGE",
                format!("the statement has {bytes} bytes, at most {limit} are taken"),
            );
        }
        let (count, limit) = (request.params.len(), self.limits.params_max);
        if count > limit {
            return too_large(
                "TOO_MANY_PARAMETERS",
                format!("{count} parameters were sent, at most {limit} are taken"),
            );
        }
        Ok(())
    }

    /// `STORAGE FLUSH TABLE t`: for a user, his own rows; for `dba` and `system`, everybody's.
    async fn flush(
        &self,
        request: &Request<'_>,
        snapshot: &Snapshot,
        target: &parse::TableRef,
    ) -> Result<Answer, ApiError> {
        let table = self.resolve(request, snapshot, target)?;
        let matches = own_or_all(table, request.identity);
        let engine = Arc::clone(&self.engine);
        let flushing = tokio::spawn(async move { engine.flush_matching(matches).await });
        let rows = flushing
            .await
            .map_err(|error| ApiError::internal(&error))?
            .map_err(|error| engine_errors::of_flush(&error))?;
        Ok(Answer::affected(rows, format!("flushed {rows} row(s) of `{}`", table.name)))
    }

    /// `STORAGE COMPACT TABLE t`: for a user, his own files; for `dba` and `system`, everybody's.
    async fn compact(
        &self,
        request: &Request<'_>,
        snapshot: &Snapshot,
        target: &parse::TableRef,
    ) -> Result<Answer, ApiError> {
        let table = self.resolve(request, snapshot, target)?;
        let matches = own_or_all(table, request.identity);
        let engine = Arc::clone(&self.engine);
        let compacting = tokio::spawn(async move { engine.compact_matching(matches).await });
        let done = compacting
            .await
            .map_err(|error| ApiError::internal(&error))?
            .map_err(|error| engine_errors::of_flush(&error))?;
        let message = format!("compacted {} file(s) of `{}`", done.files, table.name);
        Ok(Answer::affected(done.files, message))
    }

    /// `CANCEL JOB 'id'`, for `dba` and `system`.
    fn cancel_job(&self, request: &Request<'_>, id: &str) -> Result<Answer, ApiError> {
        system_tables::check_role(request.identity.role, "cancelling a job")?;
        let refuse = |kind, code, message: String| Err(ApiError::new(kind, code, message));
        match self.engine.jobs().cancel(id) {
            Some(true) => Ok(Answer::affected(1, format!("job `{id}` is asked to stop"))),
            Some(false) => {
                let message = format!("job `{id}` has ended, or is of a kind that is never stopped");
                refuse(Kind::Conflict, "JOB_NOT_CANCELLABLE", message)
            }
            None => refuse(Kind::NotFound, "JOB_NOT_FOUND", format!("there is no job `{id}`; see `system.jobs`")),
        }
    }

    /// The table that `target` names for this request.
    fn resolve<'s>(
        &self,
        request: &Request<'_>,
        snapshot: &'s Snapshot,
        target: &parse::TableRef,
    ) -> Result<&'s Arc<TableEntry>, ApiError> {
        let name = target.qualified(request.namespace)?;
        snapshot.table(&name).ok_or_else(|| session::no_such_table(snapshot, &name.to_string()))
    }
}

fn is_system_users(table: &parse::TableRef, request: &Request<'_>) -> bool {
    let name = table.qualified(request.namespace);
    name.is_ok_and(|name| name.namespace.as_str() == system_tables::NAME && name.table.as_str() == "users")
}

/// Instances of `table` that a command is about: the caller's own; for `dba` and `system`, everybody's.
fn own_or_all(table: &TableEntry, identity: &Identity) -> impl Fn(&InstanceId) -> bool + use<> {
    let (id, all, own) = (table.id, identity.role >= Role::Dba, Owner::User(identity.user.clone()));
    move |instance| instance.table == id && (all || instance.owner == own)
}

/// Whose instance of `table` the caller reads and writes.
///
/// # Errors
/// On shared tables that are not open to him.
fn owner_for(table: &TableEntry, identity: &Identity, writing: bool) -> Result<Owner, ApiError> {
    use kalamdb_model::TableKind;
    use kalamdb_model::declared::Access;
    match table.kind {
        TableKind::User => Ok(Owner::User(identity.user.clone())),
        TableKind::Shared => {
            let open = table.access == Access::Public && !writing;
            if open || identity.role >= Role::Service {
                return Ok(Owner::Shared);
            }
            let needs = if writing { "writing to a shared table" } else { "reading a restricted shared table" };
            Err(ApiError::new(
                Kind::Forbidden,
                "PERMISSION_DENIED",
                format!("{needs}, `{}`, needs the role `service`; you have `{}`", table.name, identity.role),
            ))
        }
    }
}
