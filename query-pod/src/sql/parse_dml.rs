//! INSERT, UPDATE and DELETE: from the parser's tree to the parts that are run.
//!
//! What such a statement reads becomes a query of its own, which goes through the same checks as any other and is the
//! only thing that DataFusion sees. Its own rows, in RETURNING and ON CONFLICT DO UPDATE, are tables of [`GIVEN`]: to
//! subqueries the table that it writes to is still there, as it was before.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use datafusion::sql::sqlparser::ast::{
    self, Assignment, AssignmentTarget, ConflictTarget, Expr, FromTable, Ident, ObjectName, ObjectNamePart,
    OnConflictAction, OnInsert, Query, Select, SelectItem, SelectItemQualifiedWildcardKind, SetExpr, TableFactor,
    TableObject, TableWithJoins, VisitMut as _, Visitor, VisitorMut,
};
use datafusion::sql::sqlparser::parser::Parser;
use kalamdb_model::TableEntry;
use kalamdb_model::names::SYSTEM_COLUMNS;

use super::dialect::KalamDialect;
use super::parse::{QueryStatement, TableRef, query, refuse, table_ref};
use super::wildcard;
use crate::error::ApiError;
use crate::http::encode::Stamped;

/// The parts of an INSERT.
#[derive(Debug)]
pub struct Insert {
    /// Into which table.
    pub table: TableRef,
    /// Column names in order; empty: all, in table order.
    pub columns: Vec<String>,
    /// What is inserted.
    pub source: Source,
    /// `ON CONFLICT`.
    pub conflict: Option<Conflict>,
    /// `RETURNING`.
    pub returning: Option<Returning>,
    /// Every `$n` of the statement.
    pub parameters: BTreeSet<String>,
}

/// Where the rows of an INSERT come from.
#[derive(Debug)]
pub enum Source {
    /// Rows of expressions.
    Values(Vec<Vec<Expr>>),
    /// A query.
    Query(Box<QueryStatement>),
}

/// What happens to a row whose key exists.
#[derive(Debug)]
pub struct Conflict {
    /// Columns that `ON CONFLICT` names; empty: none.
    pub target: Vec<String>,
    /// `None`: nothing.
    pub update: Option<Assignments>,
}

/// The parts of an UPDATE.
#[derive(Debug)]
pub struct Update {
    /// Of which table.
    pub table: TableRef,
    /// `SET`; its query gives the columns of the table before what is computed.
    pub set: Assignments,
    /// `RETURNING`.
    pub returning: Option<Returning>,
    /// Every `$n` of the statement.
    pub parameters: BTreeSet<String>,
}

/// The parts of a DELETE.
#[derive(Debug)]
pub struct Delete {
    /// Of which table.
    pub table: TableRef,
    /// Gives the rows to delete: the columns of the table.
    pub rows: QueryStatement,
    /// `RETURNING`.
    pub returning: Option<Returning>,
    /// Every `$n` of the statement.
    pub parameters: BTreeSet<String>,
}

/// `SET a = 1, b = b + 1`.
#[derive(Debug)]
pub struct Assignments {
    /// Columns, each with what it becomes.
    pub columns: Vec<(String, SetTo)>,
    /// Gives the rows to change, and in its last columns what is computed.
    pub rows: QueryStatement,
}

/// What is told of each row that a statement writes.
#[derive(Debug)]
pub struct Returning {
    items: Vec<SelectItem>,
    /// What the table is called in them.
    alias: Ident,
    /// Whether the statement deletes the rows.
    pub deleted: bool,
}

/// What a column becomes.
#[derive(Debug)]
pub enum SetTo {
    /// The same in all rows, or DEFAULT: a literal or a parameter, which takes the column's type.
    Constant(Box<Expr>),
    /// The computed column with this number, counted from 0.
    Computed(usize),
}

/// The schema of a statement's own rows. No namespace has such a name.
pub const GIVEN: &str = "__given";
/// The table of the rows that exist, for ON CONFLICT, or that are written, for RETURNING.
pub const ROWS: &str = "rows";
/// The table of the rows that were to be inserted, and what ON CONFLICT calls it.
pub const EXCLUDED: &str = "excluded";
/// The column of both that tells a row's place among them, counted from 0.
pub const ROW: &str = "__row";

fn parameters(statement: &impl ast::Visit) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let _ = ast::visit_expressions(statement, |expr| {
        if let Expr::Value(ast::ValueWithSpan { value: ast::Value::Placeholder(name), .. }) = expr {
            names.insert(name.clone());
        }
        ControlFlow::<()>::Continue(())
    });
    names
}

/// The clauses of UPDATE and DELETE that other databases know and this one does not.
fn no(present: bool, what: &str) -> Result<(), ApiError> {
    if present { refuse(what) } else { Ok(()) }
}

pub(super) fn insert(mut insert: ast::Insert) -> Result<Insert, ApiError> {
    let parameters = parameters(&insert);
    let (on, returning, source) = (insert.on.take(), insert.returning.take(), insert.source.take());
    let (table, columns, alias) = (insert.table.clone(), insert.columns.clone(), insert.table_alias.take());
    let plain = ast::Insert {
        table: table.clone(),
        columns: columns.clone(),
        source: None,
        insert_token: insert.insert_token.clone(),
        into: true,
        has_table_keyword: insert.has_table_keyword,
        optimizer_hints: Vec::new(),
        or: None,
        ignore: false,
        table_alias: None,
        overwrite: false,
        assignments: Vec::new(),
        partitioned: None,
        after_columns: Vec::new(),
        on: None,
        returning: None,
        output: None,
        replace_into: false,
        priority: None,
        insert_alias: None,
        settings: None,
        format_clause: None,
        multi_table_insert_type: None,
        multi_table_into_clauses: Vec::new(),
        multi_table_when_clauses: Vec::new(),
        multi_table_else_clause: None,
    };
    if plain != insert {
        return refuse("INSERT with clauses other than ON CONFLICT and RETURNING");
    }
    let TableObject::TableName(name) = table else { return refuse("INSERT into a function or query") };
    let target = table_ref(&name)?;
    let columns = columns.iter().map(|name| table_ref(name).map(TableRef::joined)).collect::<Result<_, _>>()?;
    let Some(source) = source else { return refuse("INSERT … DEFAULT VALUES") };
    let source = match *source {
        Query { with: None, body, order_by: None, limit_clause: None, fetch: None, locks, .. }
            if matches!(*body, SetExpr::Values(_)) && locks.is_empty() =>
        {
            let SetExpr::Values(values) = *body else { return refuse("INSERT of this") };
            Source::Values(values.rows.into_iter().map(|row| row.content).collect())
        }
        other => Source::Query(Box::new(query(ast::Statement::Query(Box::new(other)))?)),
    };
    let named = alias.map_or_else(|| last_part(&name), |alias| Ok(alias.alias))?;
    let conflict = on.map(|on| conflict(on, &named)).transpose()?;
    let returning = returning.map(|items| self::returning(items, named)).transpose()?;
    Ok(Insert { table: target, columns, source, conflict, returning, parameters })
}

fn conflict(on: OnInsert, alias: &Ident) -> Result<Conflict, ApiError> {
    let OnInsert::OnConflict(on) = on else { return refuse("ON DUPLICATE KEY") };
    let target = match on.conflict_target {
        None => Vec::new(),
        Some(ConflictTarget::Columns(columns)) => columns.iter().map(column_name).collect(),
        Some(ConflictTarget::OnConstraint(_)) => return refuse("ON CONFLICT ON CONSTRAINT"),
    };
    let OnConflictAction::DoUpdate(update) = on.action else { return Ok(Conflict { target, update: None }) };
    if target.is_empty() {
        return refuse("ON CONFLICT DO UPDATE without the columns of the primary key");
    }
    let excluded = Ident::new(EXCLUDED);
    let pairs =
        Expr::BinaryOp { left: Box::new(place(alias)), op: ast::BinaryOperator::Eq, right: Box::new(place(&excluded)) };
    let join = ast::Join {
        relation: given(EXCLUDED, excluded),
        global: false,
        join_operator: ast::JoinOperator::Inner(ast::JoinConstraint::On(pairs)),
    };
    let from = TableWithJoins { relation: given(ROWS, alias.clone()), joins: vec![join] };
    let first = SelectItem::UnnamedExpr(place(alias));
    let mut selection = update.selection;
    let mut assignments = update.assignments;
    let names_system_columns = names_system_column(&assignments) || names_system_column(&selection);
    no(names_system_columns, "a system column in ON CONFLICT DO UPDATE")?;
    // A bare column is the row that exists.
    let mut own = OwnColumns { table: alias, subqueries: 0 };
    let _ = selection.visit(&mut own);
    for assignment in &mut assignments {
        let _ = assignment.value.visit(&mut own);
    }
    let set = assign(assignments, vec![first], from, selection)?;
    Ok(Conflict { target, update: Some(set) })
}

/// Says of every bare column whose it is, but in subqueries, which have columns of their own.
struct OwnColumns<'a> {
    table: &'a Ident,
    /// Around the expression that is looked at.
    subqueries: usize,
}

impl VisitorMut for OwnColumns<'_> {
    type Break = ();

    fn pre_visit_query(&mut self, _: &mut Query) -> ControlFlow<()> {
        self.subqueries += 1;
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _: &mut Query) -> ControlFlow<()> {
        self.subqueries -= 1;
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<()> {
        if self.subqueries > 0 {
            return ControlFlow::Continue(());
        }
        let same = |a: &Ident, b: &str| column_name(a) == b;
        match expr {
            Expr::Identifier(ident) if !(ident.quote_style.is_none() && same(ident, "default")) => {
                *expr = Expr::CompoundIdentifier(vec![self.table.clone(), ident.clone()]);
            }
            // `excluded.tags[1]` is parsed as a field of a column `excluded`.
            Expr::CompoundFieldAccess { root, access_chain } => {
                if let Expr::Identifier(first) = &**root
                    && (same(first, EXCLUDED) || same(first, &column_name(self.table)))
                    && let Some(ast::AccessExpr::Dot(Expr::Identifier(column))) = access_chain.first()
                {
                    **root = Expr::CompoundIdentifier(vec![first.clone(), column.clone()]);
                    access_chain.remove(0);
                }
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

pub(super) fn update(update: ast::Update) -> Result<Update, ApiError> {
    let parameters = parameters(&update);
    let ast::Update {
        table,
        assignments,
        from,
        selection,
        returning,
        output,
        or,
        order_by,
        limit,
        optimizer_hints,
        ..
    } = update;
    no(from.is_some(), "UPDATE … FROM; use a subquery")?;
    no(output.is_some() || or.is_some() || !optimizer_hints.is_empty(), "this form of UPDATE")?;
    no(!order_by.is_empty() || limit.is_some(), "UPDATE with ORDER BY or LIMIT")?;
    let (name, alias) = plain_table(&table)?;
    let from = TableWithJoins { relation: factor(&name, alias.clone()), joins: Vec::new() };
    let set = assign(assignments, vec![wildcard_of(&alias)], from, selection)?;
    let returning = returning.map(|items| self::returning(items, alias)).transpose()?;
    Ok(Update { table: table_ref(&name)?, set, returning, parameters })
}

pub(super) fn delete(delete: ast::Delete) -> Result<Delete, ApiError> {
    let parameters = parameters(&delete);
    let ast::Delete { tables, from, using, selection, returning, output, order_by, limit, optimizer_hints, .. } =
        delete;
    no(!tables.is_empty(), "DELETE from many tables")?;
    no(using.is_some(), "DELETE … USING; use a subquery")?;
    no(output.is_some() || !optimizer_hints.is_empty(), "this form of DELETE")?;
    no(!order_by.is_empty() || limit.is_some(), "DELETE with ORDER BY or LIMIT")?;
    let (FromTable::WithFromKeyword(from) | FromTable::WithoutKeyword(from)) = from;
    let [table] = from.as_slice() else { return refuse("DELETE from many tables") };
    let (name, alias) = plain_table(table)?;
    let from = TableWithJoins { relation: factor(&name, alias.clone()), joins: Vec::new() };
    let rows = select(vec![wildcard_of(&alias)], from, selection)?;
    let returning = returning.map(|items| self::returning(items, alias)).transpose()?;
    let returning = returning.map(|returning| Returning { deleted: true, ..returning });
    Ok(Delete { table: table_ref(&name)?, rows, returning, parameters })
}

fn assign(
    assignments: Vec<Assignment>,
    mut items: Vec<SelectItem>,
    from: TableWithJoins,
    selection: Option<Expr>,
) -> Result<Assignments, ApiError> {
    let mut columns = Vec::with_capacity(assignments.len());
    let mut computed = 0;
    for Assignment { target, value } in assignments {
        let AssignmentTarget::ColumnName(name) = target else {
            return refuse("SET of several columns at once; write `SET a = 1, b = 2`");
        };
        let [ObjectNamePart::Identifier(column)] = name.0.as_slice() else {
            return refuse("a target of SET that is not the bare name of a column");
        };
        no_unnest(&value, "SET")?;
        let to = if is_constant(&value) {
            SetTo::Constant(Box::new(value))
        } else {
            let alias = Ident::with_quote('"', format!("__set_{computed}"));
            items.push(SelectItem::ExprWithAlias { expr: value, alias });
            computed += 1;
            SetTo::Computed(computed - 1)
        };
        columns.push((column_name(column), to));
    }
    Ok(Assignments { columns, rows: select(items, from, selection)? })
}

/// Whether a value is written as it is in VALUES, where it takes the column's type, or is computed.
fn is_constant(value: &Expr) -> bool {
    match value {
        Expr::Value(_) => true,
        Expr::UnaryOp { op: ast::UnaryOperator::Minus, expr } => {
            matches!(&**expr, Expr::Value(value) if matches!(value.value, ast::Value::Number(..)))
        }
        Expr::Identifier(ident) => ident.quote_style.is_none() && ident.value.eq_ignore_ascii_case("default"),
        _ => false,
    }
}

/// RETURNING of a statement that calls its table `alias`.
fn returning(items: Vec<SelectItem>, alias: Ident) -> Result<Returning, ApiError> {
    for item in &items {
        no_unnest(item, "RETURNING")?;
        if system_column(item, &alias).is_none() && names_system_column(item) {
            let message = "RETURNING takes a system column by itself, as in `RETURNING _seq AS s`, and not within an \
                           expression: the commit settles it, and what may fail is computed before";
            return Err(ApiError::invalid("UNSUPPORTED_STATEMENT", message));
        }
    }
    Ok(Returning { items, alias, deleted: false })
}

impl Returning {
    /// `SELECT items FROM the rows that are written`: one row for each, in their order. In the columns that the commit
    /// settles, which are returned too, it has the places of the rows.
    pub(super) fn query(&self, table: &TableEntry) -> Result<(QueryStatement, Vec<(usize, Stamped)>), ApiError> {
        let Self { items, alias, deleted } = self;
        let (mut columns, mut stamped) = (Vec::new(), Vec::new());
        for item in items {
            if is_wildcard_of(item, alias) {
                wildcard::own(table, alias, &mut columns);
                continue;
            }
            let Some((column, name)) = system_column(item, alias) else {
                columns.push(item.clone());
                continue;
            };
            let value = match column {
                "_seq" => Some(Stamped::Seq),
                "_updated" => Some(Stamped::Updated),
                _ => None,
            };
            stamped.extend(value.map(|value| (columns.len(), value)));
            let known = || Expr::Value(ast::Value::Boolean(*deleted).with_empty_span());
            let expr = value.map_or_else(known, |_| place(alias));
            columns.push(SelectItem::ExprWithAlias { expr, alias: name });
        }
        let from = TableWithJoins { relation: given(ROWS, alias.clone()), joins: Vec::new() };
        let mut rows = select(columns, from, None)?;
        if let ast::Statement::Query(query) = &mut rows.statement {
            let kind = ast::OrderByKind::Expressions(vec![Ident::with_quote('"', ROW).into()]);
            query.order_by = Some(ast::OrderBy { kind, interpolate: None });
        }
        Ok((rows, stamped))
    }

    /// A call of a function for which `is_aggregate` holds; it would make one row of many.
    pub(super) fn aggregate(&self, is_aggregate: impl Fn(&str) -> bool) -> Option<String> {
        let mut found = None;
        outside_subqueries(&self.items, |expr| {
            let Expr::Function(function) = expr else { return false };
            let name = function.name.to_string().to_ascii_lowercase();
            let is = function.over.is_none() && is_aggregate(&name);
            found = is.then_some(name);
            is
        });
        found
    }
}

/// The system column that `item` is, and what the answer calls it.
fn system_column(item: &SelectItem, table: &Ident) -> Option<(&'static str, Ident)> {
    let (expr, name) = match item {
        SelectItem::UnnamedExpr(expr) => (expr, None),
        SelectItem::ExprWithAlias { expr, alias } => (expr, Some(alias)),
        _ => return None,
    };
    let column = match expr {
        Expr::Identifier(column) => column,
        Expr::CompoundIdentifier(parts) => match parts.as_slice() {
            [of, column] if column_name(of) == column_name(table) => column,
            _ => return None,
        },
        _ => return None,
    };
    let column = column_name(column);
    let system = SYSTEM_COLUMNS.into_iter().find(|system| *system == column)?;
    Some((system, name.cloned().unwrap_or_else(|| Ident::with_quote('"', system))))
}

/// Whether `part` names a system column. A subquery may name those of the tables that it reads; others are not there.
fn names_system_column(part: &impl ast::Visit) -> bool {
    let is_system = |column: &Ident| SYSTEM_COLUMNS.contains(&column_name(column).as_str());
    outside_subqueries(part, |expr| match expr {
        Expr::Identifier(column) => is_system(column),
        Expr::CompoundIdentifier(parts) => parts.last().is_some_and(is_system),
        _ => false,
    })
}

/// Whether `is` holds for an expression of `part` that is in no subquery.
fn outside_subqueries(part: &impl ast::Visit, is: impl FnMut(&Expr) -> bool) -> bool {
    ast::Visit::visit(part, &mut Outside { is, subqueries: 0 }).is_break()
}

struct Outside<F> {
    is: F,
    /// Around the expression that is looked at.
    subqueries: usize,
}

impl<F: FnMut(&Expr) -> bool> Visitor for Outside<F> {
    type Break = ();

    fn pre_visit_query(&mut self, _: &Query) -> ControlFlow<()> {
        self.subqueries += 1;
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _: &Query) -> ControlFlow<()> {
        self.subqueries -= 1;
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        if self.subqueries == 0 && (self.is)(expr) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

fn select(items: Vec<SelectItem>, from: TableWithJoins, selection: Option<Expr>) -> Result<QueryStatement, ApiError> {
    const FORM: &str = "SELECT 1 FROM t";
    let mut parsed = Parser::new(&KalamDialect::new(FORM.len()))
        .try_with_sql(FORM)
        .and_then(|mut parser| parser.parse_query())
        .map_err(|error| ApiError::internal(&error))?;
    if let SetExpr::Select(select) = parsed.body.as_mut() {
        let select: &mut Select = select;
        select.projection = items;
        select.from = vec![from];
        select.selection = selection;
    }
    query(ast::Statement::Query(parsed))
}

/// `unnest` makes other rows of one, and other columns of one.
fn no_unnest(part: &impl ast::Visit, place: &str) -> Result<(), ApiError> {
    let found = ast::visit_expressions(part, |expr| match expr {
        Expr::Function(function) if function.name.to_string().eq_ignore_ascii_case("unnest") => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    no(found.is_break(), &format!("`unnest` in {place}"))
}

/// A table with the name that its columns are called by.
pub(super) fn plain_table(table: &TableWithJoins) -> Result<(ObjectName, Ident), ApiError> {
    match &table.relation {
        TableFactor::Table {
            name,
            alias,
            args: None,
            with_hints,
            version: None,
            with_ordinality: false,
            partitions,
            json_path: None,
            sample: None,
            index_hints,
        } if table.joins.is_empty() && with_hints.is_empty() && partitions.is_empty() && index_hints.is_empty() => {
            let alias = match alias {
                None => last_part(name)?,
                Some(alias) if alias.columns.is_empty() && alias.at.is_none() => alias.name.clone(),
                Some(_) => return refuse("new names for columns here"),
            };
            Ok((name.clone(), alias))
        }
        _ => refuse("anything but one table here"),
    }
}

fn last_part(name: &ObjectName) -> Result<Ident, ApiError> {
    match name.0.last() {
        Some(ObjectNamePart::Identifier(ident)) => Ok(ident.clone()),
        _ => refuse("a function as a table name"),
    }
}

fn wildcard_of(alias: &Ident) -> SelectItem {
    let name = ObjectName(vec![ObjectNamePart::Identifier(alias.clone())]);
    SelectItem::QualifiedWildcard(SelectItemQualifiedWildcardKind::ObjectName(name), Default::default())
}

/// Whether `item` is `*` or `alias.*`.
fn is_wildcard_of(item: &SelectItem, alias: &Ident) -> bool {
    match item {
        SelectItem::Wildcard(options) => wildcard::plain(options).is_ok(),
        SelectItem::QualifiedWildcard(SelectItemQualifiedWildcardKind::ObjectName(name), options) => {
            let parts: Option<Vec<&Ident>> = name.0.iter().map(ObjectNamePart::as_ident).collect();
            let named = matches!(parts.as_deref(), Some([part]) if column_name(part) == column_name(alias));
            named && wildcard::plain(options).is_ok()
        }
        _ => false,
    }
}

/// The place of a row of `of`.
fn place(of: &Ident) -> Expr {
    Expr::CompoundIdentifier(vec![of.clone(), Ident::with_quote('"', ROW)])
}

/// A table of the statement's own rows.
fn given(name: &str, alias: Ident) -> TableFactor {
    let name = [GIVEN, name].map(|part| Ident::with_quote('"', part));
    factor(&ObjectName::from(name.to_vec()), alias)
}

fn factor(name: &ObjectName, alias: Ident) -> TableFactor {
    TableFactor::Table {
        name: name.clone(),
        alias: Some(ast::TableAlias { explicit: true, name: alias, columns: Vec::new(), at: None }),
        args: None,
        with_hints: Vec::new(),
        version: None,
        with_ordinality: false,
        partitions: Vec::new(),
        json_path: None,
        sample: None,
        index_hints: Vec::new(),
    }
}

/// Unquoted names are lower-cased, as everywhere in SQL.
fn column_name(ident: &Ident) -> String {
    if ident.quote_style.is_none() { ident.value.to_ascii_lowercase() } else { ident.value.clone() }
}
