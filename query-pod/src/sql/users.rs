//! `UPDATE system.users`: in which storage a user's rows lie, where a table lets him have his own.
//!
//! Users are those of the tokens; the table has a row of each of whom something was said, and an UPDATE that names another
//! one begins his.

use std::sync::Arc;

use datafusion::sql::sqlparser::ast::{BinaryOperator, Expr, SetExpr, Statement};
use kalamdb_model::{Column, ColumnId, ColumnType, SqlName, StorageName, UserId, Value};
use kalamdb_table_store::users::StorageMode;

use super::assign::Evaluate;
use super::parse::QueryStatement;
use super::parse_dml::{SetTo, Update};
use super::query::check_parameters;
use super::{Request, Sql, system_tables};
use crate::catalog::Snapshot;
use crate::engine::UserError;
use crate::error::{ApiError, Chain, Kind};
use crate::http::encode::Answer;

impl Sql {
    pub(super) async fn update_user(
        &self,
        request: &Request<'_>,
        snapshot: &Arc<Snapshot>,
        update: &Update,
    ) -> Result<Answer, ApiError> {
        system_tables::check_role(request.identity.role, "changing `system.users`")?;
        check_parameters(&update.parameters, request.params.len())?;
        if update.returning.is_some() {
            return Err(ApiError::invalid("UNSUPPORTED_STATEMENT", "`system.users` takes no RETURNING"));
        }
        let evaluate = Evaluate::new(self, request, snapshot);
        let text = |column: &str, expr: &Expr| -> Result<Option<String>, ApiError> {
            let column = Column {
                id: ColumnId(1),
                name: SqlName::new(column).map_err(|error| ApiError::internal(&error))?,
                ty: ColumnType::Text,
                nullable: true,
                default: None,
                initial: None,
            };
            match evaluate.value(expr, &column, None)? {
                Some(Value::Text(text)) => Ok(Some(text)),
                _ => Ok(None),
            }
        };
        let named = named(&update.set.rows).ok_or_else(|| {
            let message = "an UPDATE of `system.users` names one user: WHERE username = '…'";
            ApiError::invalid("UNSUPPORTED_STATEMENT", message)
        })?;
        let id = text("username", named)?.unwrap_or_default();
        let id = UserId::new(id).map_err(|error| ApiError::invalid("INVALID_VALUE", format!("username: {error}")))?;
        let mut change = Change::default();
        for (column, to) in &update.set.columns {
            let SetTo::Constant(expr) = to else {
                let message = format!("column `{column}` of `system.users` takes a literal or a parameter");
                return Err(ApiError::invalid("UNSUPPORTED_STATEMENT", message));
            };
            change.set(column, text(column, expr)?)?;
        }
        let message = format!("changed user `{id}`");
        let engine = Arc::clone(self.engine());
        // A client that hangs up does not cut it in half.
        let putting = tokio::spawn(async move { engine.change_user(id, change.mode, change.storage).await });
        putting.await.map_err(|error| ApiError::internal(&error))?.map_err(|error| refused(&error))?;
        Ok(Answer::affected(1, message))
    }
}

/// What `WHERE username = …` compares with.
fn named(rows: &QueryStatement) -> Option<&Expr> {
    let Statement::Query(query) = &rows.statement else { return None };
    let SetExpr::Select(select) = &*query.body else { return None };
    let Expr::BinaryOp { left, op: BinaryOperator::Eq, right } = select.selection.as_ref()? else { return None };
    let is_name = |expr: &Expr| match expr {
        Expr::Identifier(name) => name.value.eq_ignore_ascii_case("username"),
        Expr::CompoundIdentifier(names) => names.last().is_some_and(|name| name.value.eq_ignore_ascii_case("username")),
        _ => false,
    };
    match (&**left, &**right) {
        (name, value @ Expr::Value(_)) if is_name(name) => Some(value),
        (value @ Expr::Value(_), name) if is_name(name) => Some(value),
        _ => None,
    }
}

/// What SET says.
#[derive(Default)]
struct Change {
    mode: Option<StorageMode>,
    storage: Option<Option<StorageName>>,
}

impl Change {
    fn set(&mut self, column: &str, value: Option<String>) -> Result<(), ApiError> {
        match column {
            "storage_mode" => {
                self.mode = Some(match value.as_deref() {
                    Some("table") => StorageMode::Table,
                    Some("region") => StorageMode::Region,
                    _ => return Err(ApiError::invalid("INVALID_VALUE", "storage_mode is 'table' or 'region'")),
                });
            }
            "storage_id" => {
                let storage = value.map(StorageName::new).transpose();
                let storage =
                    storage.map_err(|error| ApiError::invalid("INVALID_VALUE", format!("storage_id: {error}")))?;
                self.storage = Some(storage);
            }
            other => {
                let message = format!("`system.users` lets storage_mode and storage_id be set, not `{other}`");
                return Err(ApiError::invalid("INVALID_SQL", message));
            }
        }
        Ok(())
    }
}

fn refused(error: &UserError) -> ApiError {
    match error {
        UserError::NoStorage(_) => ApiError::new(Kind::NotFound, "STORAGE_NOT_FOUND", error.to_string()),
        UserError::NoId => ApiError::invalid("INVALID_VALUE", error.to_string()),
        UserError::NoHome | UserError::Log(_) | UserError::Buffer(_) => {
            tracing::warn!(error = %Chain(error), "a user was not changed");
            let message = "the log of users does not answer; look before you send the statement again";
            ApiError::unavailable("OUTCOME_UNKNOWN", message)
        }
    }
}
