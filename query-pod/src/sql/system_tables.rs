//! `system.jobs`: what the pod does, for those who run it. Errors in it may quote paths with user ids, so only `dba` and
//! `system` may look.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use datafusion::catalog::TableProvider;
use datafusion::datasource::MemTable;
use datafusion::error::{DataFusionError, Result};
use kalamdb_model::Role;

use super::session::Visible;
use crate::engine::Job;
use crate::error::{ApiError, Kind};

/// Name of the schema.
pub(super) const NAME: &str = "system";

/// The table called `name`, or `None`.
pub(super) fn table(visible: &Visible, name: &str) -> Result<Option<Arc<dyn TableProvider>>> {
    if name != "jobs" {
        return Ok(None);
    }
    let role = visible.identity.role;
    check_role(role, "reading `system.jobs`").map_err(|error| DataFusionError::External(Box::new(error)))?;
    let batch = jobs(&visible.engine.jobs().all())?;
    Ok(Some(Arc::new(MemTable::try_new(batch.schema(), vec![vec![batch]])?)))
}

/// Refuses whoever does not run the pod.
pub(super) fn check_role(role: Role, what: &str) -> std::result::Result<(), ApiError> {
    if role >= Role::Dba {
        return Ok(());
    }
    Err(ApiError::new(Kind::Forbidden, "PERMISSION_DENIED", format!("{what} needs the role `dba`; you have `{role}`")))
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
