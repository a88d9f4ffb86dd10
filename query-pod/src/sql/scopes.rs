//! What the names of WITH stand for, where the planner knows them: behind their own query, up to the end of the query that
//! has the WITH.

use std::collections::HashMap;

use datafusion::sql::sqlparser::ast::{Ident, ObjectName, Query};

/// The names around the place where a visitor is, each with a `T`.
#[derive(Debug)]
pub(super) struct WithNames<T> {
    /// Of every query around.
    scopes: Vec<HashMap<String, T>>,
    /// Names of queries that are visited or will be, by their addresses.
    queries: HashMap<*const Query, String>,
}

impl<T> WithNames<T> {
    pub(super) fn new() -> Self {
        Self { scopes: Vec::new(), queries: HashMap::new() }
    }

    /// On the way into a query.
    pub(super) fn enter(&mut self, query: &Query) {
        for cte in query.with.iter().flat_map(|with| &with.cte_tables) {
            self.queries.insert(std::ptr::from_ref(&*cte.query), folded(&cte.alias.name));
        }
        self.scopes.push(HashMap::new());
    }

    /// On the way out of a query, which is worth `worth`. Returns it if WITH gives the query no name.
    pub(super) fn leave(&mut self, query: &Query, worth: T) -> Option<T> {
        self.scopes.pop();
        let Some(name) = self.queries.remove(&std::ptr::from_ref(query)) else { return Some(worth) };
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name, worth);
        }
        None
    }

    pub(super) fn get(&self, name: &ObjectName) -> Option<&T> {
        let [part] = name.0.as_slice() else { return None };
        let name = folded(part.as_ident()?);
        self.scopes.iter().rev().find_map(|scope| scope.get(&name))
    }
}

/// A name as the planner compares it: quoted, as it is written; else in lower case.
pub(super) fn folded(ident: &Ident) -> String {
    if ident.quote_style.is_some() { ident.value.clone() } else { ident.value.to_ascii_lowercase() }
}
