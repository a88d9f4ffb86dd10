//! Keeps `_seq`, `_updated` and `_deleted` out of what means "all columns".
//!
//! Tables show the system columns only to statements that name one. In those, every `*` over a table is written out as the
//! table's own columns before planning, and the columns that an alias names, `t(a, b)`, are the table's own. What cannot be
//! written out is refused, and so is NATURAL JOIN, which would join on the system columns.

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    self, Ident, Join, JoinConstraint, JoinOperator, ObjectName, ObjectNamePart, Query, Select, SelectItem,
    SelectItemQualifiedWildcardKind, TableAlias, TableAliasColumnDef, TableFactor, VisitMut, VisitorMut,
    WildcardAdditionalOptions,
};
use kalamdb_model::names::SYSTEM_COLUMNS;
use kalamdb_model::{SqlName, TableEntry, TableName};

use super::scopes::{WithNames, folded};
use crate::catalog::Snapshot;
use crate::error::ApiError;

/// Writes out what means all columns in `statement`.
///
/// # Errors
/// Where it cannot be written out: NATURAL JOIN, `*` beside USING, `*` with EXCLUDE and its like.
pub(super) fn expand(
    statement: &mut ast::Statement,
    snapshot: &Snapshot,
    namespace: Option<&str>,
) -> Result<(), ApiError> {
    let mut expand = Expand { snapshot, namespace, with: WithNames::new() };
    match statement.visit(&mut expand) {
        ControlFlow::Break(error) => Err(error),
        ControlFlow::Continue(()) => Ok(()),
    }
}

/// Writes out `alias.*` of a table.
pub(super) fn own(table: &TableEntry, alias: &Ident, out: &mut Vec<SelectItem>) {
    write_out(&Source { qualifier: vec![alias.clone()], columns: Some(own_columns(table, None)) }, out);
}

struct Expand<'a> {
    snapshot: &'a Snapshot,
    namespace: Option<&'a str>,
    /// Names that hide tables.
    with: WithNames<()>,
}

/// One item of FROM.
struct Source {
    qualifier: Vec<Ident>,
    /// What `*` over a table stands for; `None` for what has no system columns.
    columns: Option<Vec<Ident>>,
}

impl Expand<'_> {
    fn select(&self, select: &mut Select) -> Result<(), ApiError> {
        let joins = || select.from.iter().flat_map(|item| &item.joins);
        joins().try_for_each(not_natural)?;
        if !select.projection.iter().any(is_wildcard) {
            return Ok(());
        }
        joins().try_for_each(side_by_side)?;
        let mut sources = Vec::new();
        for item in &select.from {
            self.source(&item.relation, &mut sources)?;
            for join in &item.joins {
                self.source(&join.relation, &mut sources)?;
            }
        }
        let mut written = Vec::new();
        for item in std::mem::take(&mut select.projection) {
            match item {
                SelectItem::Wildcard(options) => {
                    plain(&options)?;
                    sources.iter().for_each(|source| write_out(source, &mut written));
                }
                SelectItem::QualifiedWildcard(SelectItemQualifiedWildcardKind::ObjectName(name), options) => {
                    plain(&options)?;
                    write_out(the_one(&sources, &name)?, &mut written);
                }
                other => written.push(other),
            }
        }
        select.projection = written;
        Ok(())
    }

    fn source(&self, factor: &TableFactor, out: &mut Vec<Source>) -> Result<(), ApiError> {
        match factor {
            TableFactor::Table { name, alias, args: None, .. } => {
                let qualifier = match alias {
                    Some(alias) => vec![alias.name.clone()],
                    None => name.0.iter().filter_map(|part| part.as_ident().cloned()).collect(),
                };
                out.push(Source {
                    qualifier,
                    columns: self.table(name).map(|table| own_columns(table, alias.as_ref())),
                });
            }
            TableFactor::NestedJoin { table_with_joins, alias: None } => {
                self.source(&table_with_joins.relation, out)?;
                for join in &table_with_joins.joins {
                    side_by_side(join)?;
                    self.source(&join.relation, out)?;
                }
            }
            TableFactor::Table { alias: Some(alias), .. }
            | TableFactor::Derived { alias: Some(alias), .. }
            | TableFactor::Function { alias: Some(alias), .. }
            | TableFactor::UNNEST { alias: Some(alias), .. } => {
                out.push(Source { qualifier: vec![alias.name.clone()], columns: None });
            }
            TableFactor::NestedJoin { alias: Some(_), .. } => return Err(unclear(JOIN_ALIAS)),
            _ => return Err(unclear("`*` over something without a name")),
        }
        Ok(())
    }

    /// Lets an alias that names all own columns of a table leave the system columns their names.
    fn factor(&self, factor: &mut TableFactor) -> Result<(), ApiError> {
        match factor {
            TableFactor::Table { name, alias: Some(alias), args: None, .. } if !alias.columns.is_empty() => {
                let Some(table) = self.table(name) else { return Ok(()) };
                let (has, named) = (table.columns.len(), alias.columns.len());
                if has != named {
                    let message = format!("`{}` has {has} column(s), and its alias names {named}", table.name);
                    return Err(ApiError::invalid("INVALID_SQL", message));
                }
                let quoted = |name: &str| TableAliasColumnDef { name: Ident::with_quote('"', name), data_type: None };
                alias.columns.extend(SYSTEM_COLUMNS.map(quoted));
                Ok(())
            }
            TableFactor::NestedJoin { alias: Some(_), .. } => Err(unclear(JOIN_ALIAS)),
            TableFactor::NestedJoin { table_with_joins, alias: None } => {
                table_with_joins.joins.iter().try_for_each(not_natural)
            }
            _ => Ok(()),
        }
    }

    /// The table of the catalog that `name` means here; `None` for a name that WITH gives.
    fn table(&self, name: &ObjectName) -> Option<&TableEntry> {
        if self.with.get(name).is_some() {
            return None;
        }
        let parts: Vec<String> = name.0.iter().filter_map(ObjectNamePart::as_ident).map(folded).collect();
        let (namespace, table) = match parts.as_slice() {
            [table] => (self.namespace?, table.as_str()),
            [.., namespace, table] => (namespace.as_str(), table.as_str()),
            [] => return None,
        };
        let name = TableName { namespace: SqlName::new(namespace).ok()?, table: SqlName::new(table).ok()? };
        self.snapshot.table(&name).map(|entry| &**entry)
    }

    /// A recursive query knows its own name in its second half only.
    fn recursion(&self, query: &Query) -> Result<(), ApiError> {
        let Some(with) = query.with.as_ref().filter(|with| with.recursive) else { return Ok(()) };
        let hides = |name: &Ident| self.table(&ObjectName::from(vec![name.clone()])).is_some();
        match with.cte_tables.iter().map(|cte| &cte.alias.name).find(|name| hides(name)) {
            Some(name) => Err(unclear(&format!("WITH RECURSIVE with the name of a table, `{}`,", folded(name)))),
            None => Ok(()),
        }
    }
}

const JOIN_ALIAS: &str = "an alias for a whole join";

fn is_wildcard(item: &SelectItem) -> bool {
    matches!(item, SelectItem::Wildcard(_) | SelectItem::QualifiedWildcard(..))
}

/// The item of FROM that `name.*` speaks of.
fn the_one<'s>(sources: &'s [Source], name: &ObjectName) -> Result<&'s Source, ApiError> {
    let wanted: Vec<String> = name.0.iter().filter_map(ObjectNamePart::as_ident).map(folded).collect();
    let named = |source: &&Source| source.qualifier.iter().map(folded).eq(wanted.iter().cloned());
    let mut found = sources.iter().filter(named);
    match (found.next(), found.next()) {
        (Some(source), None) => Ok(source),
        (None, _) => Err(ApiError::invalid("INVALID_SQL", format!("`{name}.*` names nothing of FROM"))),
        (Some(_), Some(_)) => Err(ApiError::invalid("INVALID_SQL", format!("`{name}.*` is ambiguous"))),
    }
}

/// The names that a table's own columns have in a statement.
fn own_columns(table: &TableEntry, alias: Option<&TableAlias>) -> Vec<Ident> {
    match alias.filter(|alias| !alias.columns.is_empty()) {
        Some(alias) => alias.columns.iter().map(|column| column.name.clone()).collect(),
        None => table.columns.iter().map(|column| Ident::with_quote('"', column.name.as_str())).collect(),
    }
}

fn write_out(source: &Source, out: &mut Vec<SelectItem>) {
    match &source.columns {
        Some(columns) => out.extend(columns.iter().map(|column| {
            let idents = source.qualifier.iter().chain([column]).cloned().collect();
            SelectItem::UnnamedExpr(ast::Expr::CompoundIdentifier(idents))
        })),
        None => out.push(SelectItem::QualifiedWildcard(
            SelectItemQualifiedWildcardKind::ObjectName(ObjectName::from(source.qualifier.clone())),
            WildcardAdditionalOptions::default(),
        )),
    }
}

/// Refuses a `*` that is not all columns.
pub(super) fn plain(options: &WildcardAdditionalOptions) -> Result<(), ApiError> {
    let WildcardAdditionalOptions {
        wildcard_token: _,
        opt_ilike,
        opt_exclude,
        opt_except,
        opt_replace,
        opt_rename,
        opt_alias,
    } = options;
    let none = opt_ilike.is_none()
        && opt_exclude.is_none()
        && opt_except.is_none()
        && opt_replace.is_none()
        && opt_rename.is_none()
        && opt_alias.is_none();
    if none { Ok(()) } else { Err(unclear("`*` with EXCLUDE, REPLACE or RENAME")) }
}

/// ON, USING or NATURAL of a join.
pub(super) fn constraint(operator: &JoinOperator) -> Option<&JoinConstraint> {
    match operator {
        JoinOperator::Join(constraint)
        | JoinOperator::Inner(constraint)
        | JoinOperator::Left(constraint)
        | JoinOperator::LeftOuter(constraint)
        | JoinOperator::Right(constraint)
        | JoinOperator::RightOuter(constraint)
        | JoinOperator::FullOuter(constraint)
        | JoinOperator::CrossJoin(constraint)
        | JoinOperator::Semi(constraint)
        | JoinOperator::LeftSemi(constraint)
        | JoinOperator::RightSemi(constraint)
        | JoinOperator::Anti(constraint)
        | JoinOperator::LeftAnti(constraint)
        | JoinOperator::RightAnti(constraint)
        | JoinOperator::AsOf { constraint, .. }
        | JoinOperator::StraightJoin(constraint) => Some(constraint),
        JoinOperator::CrossApply
        | JoinOperator::OuterApply
        | JoinOperator::ArrayJoin
        | JoinOperator::LeftArrayJoin
        | JoinOperator::InnerArrayJoin => None,
    }
}

fn not_natural(join: &Join) -> Result<(), ApiError> {
    match constraint(&join.join_operator) {
        Some(JoinConstraint::Natural) => Err(unclear("NATURAL JOIN")),
        _ => Ok(()),
    }
}

/// Refuses joins whose columns are not those of both sides, one after the other.
fn side_by_side(join: &Join) -> Result<(), ApiError> {
    match (&join.join_operator, constraint(&join.join_operator)) {
        (_, Some(JoinConstraint::Using(_))) => Err(unclear("`*` beside USING")),
        (
            JoinOperator::Semi(_)
            | JoinOperator::LeftSemi(_)
            | JoinOperator::RightSemi(_)
            | JoinOperator::Anti(_)
            | JoinOperator::LeftAnti(_)
            | JoinOperator::RightAnti(_),
            _,
        ) => Err(unclear("`*` beside SEMI or ANTI JOIN")),
        _ => Ok(()),
    }
}

fn unclear(what: &str) -> ApiError {
    ApiError::invalid(
        "UNSUPPORTED",
        format!("{what} is not supported in a statement that names a system column; name the columns you want"),
    )
}

fn flow(outcome: Result<(), ApiError>) -> ControlFlow<ApiError> {
    match outcome {
        Ok(()) => ControlFlow::Continue(()),
        Err(error) => ControlFlow::Break(error),
    }
}

impl VisitorMut for Expand<'_> {
    type Break = ApiError;

    fn pre_visit_query(&mut self, query: &mut Query) -> ControlFlow<ApiError> {
        flow(self.recursion(query))?;
        self.with.enter(query);
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, query: &mut Query) -> ControlFlow<ApiError> {
        self.with.leave(query, ());
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, select: &mut Select) -> ControlFlow<ApiError> {
        flow(self.select(select))
    }

    fn pre_visit_table_factor(&mut self, factor: &mut TableFactor) -> ControlFlow<ApiError> {
        flow(self.factor(factor))
    }
}
