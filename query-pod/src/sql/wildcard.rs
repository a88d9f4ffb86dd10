//! Keeps `_seq`, `_updated` and `_deleted` out of `*`.
//!
//! Tables show the system columns only to statements that name one. In those, every `*` over a table is written out as
//! the table's own columns before planning.

use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    self, Ident, JoinConstraint, JoinOperator, ObjectName, ObjectNamePart, Query, Select, SelectItem,
    SelectItemQualifiedWildcardKind, TableFactor, VisitMut, VisitorMut, WildcardAdditionalOptions,
};
use kalamdb_model::{SqlName, TableEntry, TableName};

use crate::catalog::Snapshot;
use crate::error::ApiError;

/// Writes out every `*` of `statement`.
///
/// # Errors
/// Where `*` cannot be written out: beside NATURAL JOIN or USING, or with EXCLUDE and its like.
pub(super) fn expand(
    statement: &mut ast::Statement,
    snapshot: &Snapshot,
    namespace: Option<&str>,
) -> Result<(), ApiError> {
    let mut expand = Expand { snapshot, namespace, with: Vec::new() };
    match statement.visit(&mut expand) {
        ControlFlow::Break(error) => Err(error),
        ControlFlow::Continue(()) => Ok(()),
    }
}

struct Expand<'a> {
    snapshot: &'a Snapshot,
    namespace: Option<&'a str>,
    /// Names that WITH gives, of every query around: they hide tables.
    with: Vec<Vec<String>>,
}

/// One item of FROM.
struct Source<'a> {
    qualifier: Vec<Ident>,
    table: Option<&'a TableEntry>,
}

impl Expand<'_> {
    fn select(&self, select: &mut Select) -> Result<(), ApiError> {
        if !select.projection.iter().any(is_wildcard) {
            return Ok(());
        }
        let mut sources = Vec::new();
        let mut merges_columns = false;
        for item in &select.from {
            self.source(&item.relation, &mut sources)?;
            for join in &item.joins {
                self.source(&join.relation, &mut sources)?;
                merges_columns |= merges(&join.join_operator);
            }
        }
        if merges_columns {
            return Err(unclear("`*` beside NATURAL JOIN or USING"));
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
                    match sources.iter().find(|source| names(source, &name)) {
                        Some(source) => write_out(source, &mut written),
                        None => written.push(SelectItem::QualifiedWildcard(
                            SelectItemQualifiedWildcardKind::ObjectName(name),
                            options,
                        )),
                    }
                }
                other => written.push(other),
            }
        }
        select.projection = written;
        Ok(())
    }

    fn source<'s>(&'s self, factor: &TableFactor, out: &mut Vec<Source<'s>>) -> Result<(), ApiError> {
        match factor {
            TableFactor::Table { name, alias, args: None, .. } => {
                let qualifier = match alias {
                    Some(alias) => vec![alias.name.clone()],
                    None => name.0.iter().filter_map(|part| part.as_ident().cloned()).collect(),
                };
                out.push(Source { qualifier, table: self.table(name) });
            }
            TableFactor::NestedJoin { table_with_joins, alias: None } => {
                self.source(&table_with_joins.relation, out)?;
                for join in &table_with_joins.joins {
                    self.source(&join.relation, out)?;
                    if merges(&join.join_operator) {
                        return Err(unclear("`*` beside NATURAL JOIN or USING"));
                    }
                }
            }
            TableFactor::Table { alias: Some(alias), .. }
            | TableFactor::Derived { alias: Some(alias), .. }
            | TableFactor::Function { alias: Some(alias), .. }
            | TableFactor::UNNEST { alias: Some(alias), .. }
            | TableFactor::NestedJoin { alias: Some(alias), .. } => {
                out.push(Source { qualifier: vec![alias.name.clone()], table: None });
            }
            _ => return Err(unclear("`*` over something without a name")),
        }
        Ok(())
    }

    /// The table of the catalog that `name` means here; `None` for a name that WITH gives.
    fn table(&self, name: &ObjectName) -> Option<&TableEntry> {
        let parts: Vec<String> = name
            .0
            .iter()
            .filter_map(ObjectNamePart::as_ident)
            .map(
                |ident| {
                    if ident.quote_style.is_some() { ident.value.clone() } else { ident.value.to_ascii_lowercase() }
                },
            )
            .collect();
        let (namespace, table) = match parts.as_slice() {
            [table] if self.with.iter().flatten().any(|with| with == table) => return None,
            [table] => (self.namespace?, table.as_str()),
            [.., namespace, table] => (namespace.as_str(), table.as_str()),
            [] => return None,
        };
        let name = TableName { namespace: SqlName::new(namespace).ok()?, table: SqlName::new(table).ok()? };
        self.snapshot.table(&name).map(|entry| &**entry)
    }
}

fn is_wildcard(item: &SelectItem) -> bool {
    matches!(item, SelectItem::Wildcard(_) | SelectItem::QualifiedWildcard(..))
}

fn names(source: &Source<'_>, name: &ObjectName) -> bool {
    let parts: Vec<&Ident> = name.0.iter().filter_map(ObjectNamePart::as_ident).collect();
    let same = |a: &Ident, b: &Ident| a.value.eq_ignore_ascii_case(&b.value);
    parts.len() <= source.qualifier.len()
        && parts.iter().rev().zip(source.qualifier.iter().rev()).all(|(a, b)| same(a, b))
}

fn write_out(source: &Source<'_>, out: &mut Vec<SelectItem>) {
    match source.table {
        Some(table) => out.extend(table.columns.iter().map(|column| {
            let mut idents = source.qualifier.clone();
            idents.push(Ident::with_quote('"', column.name.as_str()));
            SelectItem::UnnamedExpr(ast::Expr::CompoundIdentifier(idents))
        })),
        None => out.push(SelectItem::QualifiedWildcard(
            SelectItemQualifiedWildcardKind::ObjectName(ObjectName::from(source.qualifier.clone())),
            WildcardAdditionalOptions::default(),
        )),
    }
}

fn plain(options: &WildcardAdditionalOptions) -> Result<(), ApiError> {
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

fn merges(operator: &JoinOperator) -> bool {
    let constraint = match operator {
        JoinOperator::Join(constraint)
        | JoinOperator::Inner(constraint)
        | JoinOperator::Left(constraint)
        | JoinOperator::LeftOuter(constraint)
        | JoinOperator::Right(constraint)
        | JoinOperator::RightOuter(constraint)
        | JoinOperator::FullOuter(constraint) => constraint,
        _ => return false,
    };
    matches!(constraint, JoinConstraint::Natural | JoinConstraint::Using(_))
}

fn unclear(what: &str) -> ApiError {
    ApiError::invalid(
        "UNSUPPORTED",
        format!("{what} is not supported in a statement that names a system column; name the columns you want"),
    )
}

impl VisitorMut for Expand<'_> {
    type Break = ApiError;

    fn pre_visit_query(&mut self, query: &mut Query) -> ControlFlow<ApiError> {
        let names = query.with.iter().flat_map(|with| &with.cte_tables);
        self.with.push(names.map(|cte| cte.alias.name.value.to_ascii_lowercase()).collect());
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _: &mut Query) -> ControlFlow<ApiError> {
        self.with.pop();
        ControlFlow::Continue(())
    }

    fn pre_visit_select(&mut self, select: &mut Select) -> ControlFlow<ApiError> {
        match self.select(select) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => ControlFlow::Break(error),
        }
    }
}
