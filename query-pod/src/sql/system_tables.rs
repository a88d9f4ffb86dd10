//! `system.jobs`, what the pod does, and `system.users`, which users have storages of their own: for those who run it. Only
//! `dba` and `system` may look; errors of jobs may quote paths with user ids.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use datafusion::catalog::TableProvider;
use datafusion::datasource::MemTable;
use datafusion::error::{DataFusionError, Result};
use kalamdb_model::Role;
use kalamdb_table_store::users::{StorageMode, User};

use super::session::Visible;
use crate::engine::Job;
use crate::error::{ApiError, Kind};

/// Name of the schema.
pub(super) const NAME: &str = "system";

/// The table called `name`, or `None`.
pub(super) fn table(visible: &Visible, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
    let refused = |error: ApiError| DataFusionError::External(Box::new(error));
    let check = || check_role(visible.identity.role, &format!("reading `system.{name}`")).map_err(refused);
    let batch = match name {
        "jobs" => {
            check()?;
            jobs(&visible.engine.jobs().all())?
        }
        "users" => {
            check()?;
            let unknown = || refused(ApiError::unavailable("STORAGE_UNAVAILABLE", "the log of users was not read yet"));
            users(&visible.engine.users().ok_or_else(unknown)?)?
        }
        _ => return Ok(None),
    };
    Ok(Some(Arc::new(MemTable::try_new(batch.schema(), vec![vec![batch]])?)))
}

/// Refuses whoever does not run the pod.
pub(super) fn check_role(role: Role, what: &str) -> std::result::Result<(), ApiError> {
    if role >= Role::Dba {
        return Ok(());
    }
    Err(ApiError::new(Kind::Forbidden, "PERMISSION_DENIED", format!("{what} needs the role `dba`; you have `{role}`")))
}

fn users(users: &[User]) -> Result<RecordBatch> {
    let names = users.iter().map(|user| user.id.to_string());
    let modes = users.iter().map(|user| match user.storage_mode {
        StorageMode::Table => "table",
        StorageMode::Region => "region",
    });
    let storages: StringArray = users.iter().map(|user| user.storage_id.as_ref().map(ToString::to_string)).collect();
    Ok(RecordBatch::try_from_iter_with_nullable([
        ("username", Arc::new(StringArray::from_iter_values(names)) as ArrayRef, false),
        ("storage_mode", Arc::new(StringArray::from_iter_values(modes)) as ArrayRef, false),
        ("storage_id", Arc::new(storages) as ArrayRef, true),
    ])?)
}

fn jobs(jobs: &[Job]) -> Result<RecordBatch> {
    let text = |of: fn(&Job) -> &str| Arc::new(StringArray::from_iter_values(jobs.iter().map(of))) as ArrayRef;
    let count = |of: fn(&Job) -> u64| {
        let counts = jobs.iter().map(|job| i64::try_from(of(job)).unwrap_or(i64::MAX));
        Arc::new(Int64Array::from_iter_values(counts)) as ArrayRef
    };
    let time = |of: fn(&Job) -> Option<i64>| {
        let times: TimestampMicrosecondArray = jobs.iter().map(of).collect();
        Arc::new(times.with_timezone("UTC")) as ArrayRef
    };
    let tables = jobs.iter().map(|job| job.table.to_string());
    let errors: StringArray = jobs.iter().map(|job| job.error.as_deref()).collect();
    Ok(RecordBatch::try_from_iter_with_nullable([
        ("job_id", text(|job| &job.id), false),
        ("kind", text(|job| job.kind.as_str()), false),
        ("table_name", Arc::new(StringArray::from_iter_values(tables)) as ArrayRef, false),
        ("users", count(|job| job.users), false),
        ("rows", count(|job| job.rows), false),
        ("bytes", count(|job| job.bytes), false),
        ("state", text(|job| job.state.as_str()), false),
        ("error", Arc::new(errors) as ArrayRef, true),
        ("started_at", time(|job| Some(job.started_us)), false),
        ("ended_at", time(|job| job.ended_us), true),
    ])?)
}
