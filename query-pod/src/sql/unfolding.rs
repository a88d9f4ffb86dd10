//! How large a statement is with every query of WITH written out where it is used.
//!
//! The planner writes them out, so forty CTEs that each use the one before twice are 2⁴⁰ plans, and the memory for them ends
//! the pod. Hence this looks at what was parsed, before anything is planned.

use std::collections::HashMap;
use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{self, ObjectName, Query, Select, TableFactor, Visit as _, Visitor};

use crate::error::ApiError;

/// Most SELECTs and tables of a statement that is written out. Measured: joins of 4,096 tables take two seconds to plan.
const PARTS_MAX: u64 = 4_096;

/// Refuses statements that are too large.
///
/// # Errors
/// 400, `STATEMENT_TOO_DEEP`.
pub(super) fn check(statement: &ast::Statement) -> Result<(), ApiError> {
    let mut unfolding = Unfolding { scopes: Vec::new(), parts: vec![0], names: HashMap::new() };
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
    /// Parts of the queries that WITH names, for each query around.
    scopes: Vec<HashMap<String, u64>>,
    /// Parts of each query around, so far; the first is the statement.
    parts: Vec<u64>,
    /// Names of the queries of WITH, by their addresses.
    names: HashMap<*const Query, String>,
}

impl Unfolding {
    fn add(&mut self, parts: u64) {
        if let Some(sum) = self.parts.last_mut() {
            *sum = sum.saturating_add(parts);
        }
    }

    fn parts_of(&self, name: &ObjectName) -> u64 {
        let [part] = name.0.as_slice() else { return 1 };
        let Some(ident) = part.as_ident() else { return 1 };
        let name = ident.value.to_lowercase();
        self.scopes.iter().rev().find_map(|scope| scope.get(&name)).copied().unwrap_or(1)
    }
}

impl Visitor for Unfolding {
    type Break = ();

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        for cte in query.with.iter().flat_map(|with| &with.cte_tables) {
            self.names.insert(std::ptr::from_ref(&*cte.query), cte.alias.name.value.to_lowercase());
        }
        self.scopes.push(HashMap::new());
        self.parts.push(0);
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, query: &Query) -> ControlFlow<()> {
        self.scopes.pop();
        let parts = self.parts.pop().unwrap_or(0);
        match self.names.remove(&std::ptr::from_ref(query)) {
            Some(name) => {
                if let Some(scope) = self.scopes.last_mut() {
                    scope.insert(name, parts);
                }
                // Planned once where it stands, too.
                self.add(1);
            }
            None => self.add(parts),
        }
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, _: &Select) -> ControlFlow<()> {
        self.add(1);
        ControlFlow::Continue(())
    }

    fn pre_visit_table_factor(&mut self, factor: &TableFactor) -> ControlFlow<()> {
        if let TableFactor::Table { name, .. } = factor {
            let parts = self.parts_of(name);
            self.add(parts);
        }
        ControlFlow::Continue(())
    }
}
