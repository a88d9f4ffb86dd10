//! Plans that were made before, for everybody who may see the same.
//!
//! What is kept is the plan before optimization and without parameters: the optimizer writes the caller's name and the time
//! into a plan. A kept plan belongs to no caller: its tables read the identity inside their scans ([`super::provider`]), and
//! `CURRENT_USER()` reads it when it is evaluated ([`super::functions`]). Table functions are planned with their arguments'
//! values, and `information_schema` holds what one role sees: plans with either are not kept.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use arrow::datatypes::DataType;
use datafusion::common::Result;
use datafusion::common::tree_node::TreeNodeRecursion;
use datafusion::datasource::source_as_provider;
use datafusion::logical_expr::LogicalPlan;
use kalamdb_model::Role;
use parking_lot::Mutex;

use super::Request;
use super::provider::InstanceTable;
use crate::catalog::Snapshot;

/// Most plans that are kept.
const PLANS_MAX: usize = 512;
/// Longest statement whose plan is kept, bytes.
const SQL_BYTES_MAX: usize = 8 << 10;
/// Heaviest plan that is kept, as [`super::weight`] counts. With the two above, plans take some hundred MiB at the very
/// worst; 512 common ones of ten to twenty nodes take about ten.
const WEIGHT_MAX: u64 = 200;

/// A plan before optimization, with the types of its parameters.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) plan: LogicalPlan,
    /// By placeholder; none where the planner knows none, or more than one.
    pub(super) parameters: Arc<HashMap<String, Option<DataType>>>,
}

/// The plans of one catalog.
#[derive(Default)]
pub(super) struct Plans(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    /// Weak: the plans of a catalog that is gone do not hold it.
    snapshot: Weak<Snapshot>,
    plans: HashMap<Key, (Planned, u64)>,
    /// Counts uses, so that the plan whose last one is the oldest makes room.
    uses: u64,
}

/// What a plan depends on, besides the catalog. Whether tables show system columns follows from the statement.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    sql: String,
    namespace: Option<String>,
    /// Decides which tables may be named (`owner_for`).
    role: Role,
}

impl Key {
    fn of(request: &Request<'_>) -> Self {
        let namespace = request.namespace.map(str::to_owned);
        Self { sql: request.sql.to_owned(), namespace, role: request.identity.role }
    }
}

impl Plans {
    /// The plan of this statement on `snapshot`, if it is kept.
    pub(super) fn get(&self, request: &Request<'_>, snapshot: &Arc<Snapshot>) -> Option<Planned> {
        if request.sql.len() > SQL_BYTES_MAX {
            return None;
        }
        let mut kept = self.0.lock();
        if !kept.is_of(snapshot) {
            return None;
        }
        kept.uses += 1;
        let now = kept.uses;
        let (planned, used) = kept.plans.get_mut(&Key::of(request))?;
        *used = now;
        Some(planned.clone())
    }

    /// Keeps a plan of this statement, which weighs `weight`, if it may and should be.
    pub(super) fn keep(&self, request: &Request<'_>, snapshot: &Arc<Snapshot>, planned: &Planned, weight: u64) {
        let small = request.sql.len() <= SQL_BYTES_MAX && weight <= WEIGHT_MAX;
        if !small || !reads_only_tables(&planned.plan).unwrap_or(false) {
            return;
        }
        let mut kept = self.0.lock();
        if !kept.is_of(snapshot) {
            *kept = Kept { snapshot: Arc::downgrade(snapshot), ..Kept::default() };
        }
        if kept.plans.len() >= PLANS_MAX {
            let mut uses: Vec<u64> = kept.plans.values().map(|(_, used)| *used).collect();
            // An eighth at a time: what makes room looks at all of them.
            let (_, oldest, _) = uses.select_nth_unstable(PLANS_MAX / 8);
            let oldest = *oldest;
            kept.plans.retain(|_, (_, used)| *used > oldest);
        }
        kept.uses += 1;
        let now = kept.uses;
        kept.plans.insert(Key::of(request), (planned.clone(), now));
    }
}

impl Kept {
    fn is_of(&self, snapshot: &Arc<Snapshot>) -> bool {
        std::ptr::eq(self.snapshot.as_ptr(), Arc::as_ptr(snapshot))
    }
}

/// Whether all that `plan` reads are tables of the catalog, which are the same object for everybody.
fn reads_only_tables(plan: &LogicalPlan) -> Result<bool> {
    let mut only = true;
    plan.apply_with_subqueries(|plan| {
        if let LogicalPlan::TableScan(scan) = plan {
            only &= source_as_provider(&scan.source)?.is::<InstanceTable>();
        }
        Ok(if only { TreeNodeRecursion::Continue } else { TreeNodeRecursion::Stop })
    })?;
    Ok(only)
}
