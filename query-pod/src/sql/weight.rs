//! How much work the planning of a statement is, before it is done.
//!
//! Planning is not cut off by the query's timeout, and a short statement can make it endless: the optimizer visits a
//! subquery in an expression twice on each level, and writes the expression behind a column wherever the column is used.
//! (What WITH multiplies is refused before: [`super::unfolding`].)

use std::collections::HashMap;
use std::rc::Rc;

use datafusion::common::tree_node::{TreeNode as _, TreeNodeRecursion};
use datafusion::common::{Column, DFSchemaRef, Result};
use datafusion::logical_expr::{Expr, LogicalPlan};

use crate::error::ApiError;

/// Heaviest plan that is optimized. Measured: about 0.1 ms a unit for small plans, a second at this bound.
const WEIGHT_MAX: u64 = 20_000;

/// Refuses plans that are too heavy to optimize; returns the weight of others.
///
/// # Errors
/// 400, `STATEMENT_TOO_DEEP`.
pub(super) fn check(plan: &LogicalPlan) -> Result<u64, ApiError> {
    let mut weighing = Weighing { seen: HashMap::new(), heaviest: 0 };
    let outcome = weighing.plan(plan).map(|weight| weight.nodes.max(weighing.heaviest));
    match outcome {
        Ok(weight) if weight <= WEIGHT_MAX => Ok(weight),
        Ok(_) => {
            let message = "the statement is too complex: subqueries, CTEs or computed columns that are used again and \
                           again multiply; split it";
            Err(ApiError::invalid("STATEMENT_TOO_DEEP", message))
        }
        Err(error) => Err(ApiError::internal(&error)),
    }
}

/// Weight of one plan with all that is below it.
struct Weight {
    /// Plans, each as often as it is visited.
    nodes: u64,
    /// How many expressions each column of its output stands for.
    columns: Vec<u64>,
}

struct Weighing {
    /// By address: a plan that is used twice is weighed once.
    seen: HashMap<*const LogicalPlan, Rc<Weight>>,
    /// The largest growth of an expression when columns are replaced by what is behind them.
    heaviest: u64,
}

impl Weighing {
    fn plan(&mut self, plan: &LogicalPlan) -> Result<Rc<Weight>> {
        let address = std::ptr::from_ref(plan);
        if let Some(known) = self.seen.get(&address) {
            return Ok(Rc::clone(known));
        }
        let mut inputs = Vec::new();
        for input in plan.inputs() {
            inputs.push((input.schema(), self.plan(input)?));
        }
        let mut nodes = inputs.iter().fold(1_u64, |sum, (_, weight)| sum.saturating_add(weight.nodes));
        let mut computed = Vec::new();
        plan.apply_expressions(|expr| {
            let (weight, own) = self.expression(expr, &inputs, &mut nodes)?;
            self.heaviest = self.heaviest.max(weight.saturating_sub(own));
            computed.push(weight);
            Ok(TreeNodeRecursion::Continue)
        })?;
        let weight = Rc::new(Weight { nodes, columns: output(plan, &inputs, computed) });
        self.seen.insert(address, Rc::clone(&weight));
        Ok(weight)
    }

    /// Weight of `expr` with columns written out, and as it stands. Subqueries in it are added to `nodes`.
    fn expression(
        &mut self,
        expr: &Expr,
        inputs: &[(&DFSchemaRef, Rc<Weight>)],
        nodes: &mut u64,
    ) -> Result<(u64, u64)> {
        let (mut weight, mut own) = (0_u64, 0_u64);
        expr.apply(|expr| {
            own += 1;
            match expr {
                Expr::Column(column) => weight = weight.saturating_add(behind(column, inputs)),
                Expr::ScalarSubquery(subquery) => self.subquery(&subquery.subquery, nodes)?,
                Expr::Exists(exists) => self.subquery(&exists.subquery.subquery, nodes)?,
                Expr::InSubquery(within) => self.subquery(&within.subquery.subquery, nodes)?,
                Expr::SetComparison(comparison) => self.subquery(&comparison.subquery.subquery, nodes)?,
                Expr::Alias(_) => {}
                _ => weight = weight.saturating_add(1),
            }
            Ok(TreeNodeRecursion::Continue)
        })?;
        Ok((weight, own))
    }

    fn subquery(&mut self, plan: &LogicalPlan, nodes: &mut u64) -> Result<()> {
        let weight = self.plan(plan)?.nodes;
        *nodes = nodes.saturating_add(weight.saturating_mul(2));
        Ok(())
    }
}

/// How many expressions stand behind `column`.
fn behind(column: &Column, inputs: &[(&DFSchemaRef, Rc<Weight>)]) -> u64 {
    let found = inputs.iter().find_map(|(schema, weight)| weight.columns.get(schema.maybe_index_of_column(column)?));
    found.copied().unwrap_or(1)
}

/// Weights of the columns that `plan` returns.
fn output(plan: &LogicalPlan, inputs: &[(&DFSchemaRef, Rc<Weight>)], computed: Vec<u64>) -> Vec<u64> {
    let count = plan.schema().fields().len();
    let below = inputs.iter().flat_map(|(_, weight)| weight.columns.iter().copied());
    let columns: Vec<u64> = match plan {
        LogicalPlan::Projection(_) | LogicalPlan::Aggregate(_) => computed,
        LogicalPlan::Window(_) => below.chain(computed).collect(),
        LogicalPlan::Union(_) => (0..count)
            .map(|at| inputs.iter().filter_map(|(_, weight)| weight.columns.get(at)).copied().max().unwrap_or(1))
            .collect(),
        _ => below.collect(),
    };
    if columns.len() == count {
        return columns;
    }
    // Grouping sets, semi joins, unnesting: every column counts as the heaviest.
    vec![columns.into_iter().max().unwrap_or(1); count]
}
