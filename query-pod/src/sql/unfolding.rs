//! How large a statement is with every query of WITH written out where it is used.
//!
//! The planner writes them out, so forty CTEs that each use the one before twice are 2⁴⁰ plans, and the memory for them ends
//! the pod. Hence this looks at what was parsed, before anything is planned.

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{self, Query, Select, TableFactor, Visit as _, Visitor};

use super::scopes::WithNames;
use crate::error::ApiError;

/// Most SELECTs and tables of a statement that is written out. Measured: joins of 4,096 tables take two seconds to plan.
const PARTS_MAX: u64 = 4_096;

/// Refuses statements that are too large.
///
/// # Errors
/// 400, `STATEMENT_TOO_DEEP`.
pub(super) fn check(statement: &ast::Statement) -> Result<(), ApiError> {
    let mut unfolding = Unfolding { with: WithNames::new(), parts: vec![0] };
    let _ = statement.visit(&mut unfolding);
    if unfolding.parts.iter().sum::<u64>() <= PARTS_MAX {
        return Ok(());
    }
    let message = format!(
        "the statement has more than {PARTS_MAX} tables and SELECTs, with those of WITH wherever they are used"
    );
    Err(ApiError::invalid("STATEMENT_TOO_DEEP", message))
}

struct Unfolding {
    /// Parts of the queries that WITH names.
    with: WithNames<u64>,
    /// Parts of each query around, so far; the first is the statement.
    parts: Vec<u64>,
}

impl Unfolding {
    fn add(&mut self, parts: u64) {
        if let Some(sum) = self.parts.last_mut() {
            *sum = sum.saturating_add(parts);
        }
    }
}

impl Visitor for Unfolding {
    type Break = ();

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        self.with.enter(query);
        self.parts.push(0);
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        let parts = self.parts.pop().unwrap_or(0);
        // A query of WITH is planned once where it stands, too.
        let here = self.with.leave(query, parts).unwrap_or(1);
        self.add(here);
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, _: &Select) -> ControlFlow<()> {
        self.add(1);
        ControlFlow::Continue(())
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
        if let TableFactor::Table { name, .. } = factor {
            let parts = self.with.get(name).copied().unwrap_or(1);
            self.add(parts);
        }
        ControlFlow::Continue(())
    }
}
