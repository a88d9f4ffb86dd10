//! Statements of all other shapes, which SQLite reads the same way: the planner's.

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;

use super::tables::{InSqlite, TABLES, Table};

/// What a statement is, and so what of its answer is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// It changes its table.
    Change,
    /// Its rows come in any order.
    Query,
    /// Their order is settled.
    Ordered,
}

/// A statement.
#[derive(Clone)]
pub struct General {
    pub table: &'static Table,
    pub kind: &'static str,
    pub form: Form,
    pub sql: String,
}

impl General {
    pub fn random(rng: &mut StdRng) -> Self {
        let of = any(rng);
        let shape = &SHAPES[rng.random_range(0..SHAPES.len())];
        Self { table: of.table, kind: shape.kind, form: shape.form, sql: (shape.write)(rng, &of) }
    }
}

pub fn kinds() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|shape| shape.kind)
}

struct Shape {
    kind: &'static str,
    form: Form,
    write: fn(&mut StdRng, &Of) -> String,
}

/// A table with what a shape needs to know of it.
struct Of {
    table: &'static Table,
    name: &'static str,
    /// Its column of small numbers.
    n: &'static str,
    /// Its column of short texts.
    t: &'static str,
    key: String,
}

impl Of {
    fn new(table: &'static Table, InSqlite { number, text, .. }: InSqlite) -> Self {
        Self { table, name: table.name, n: number, t: text, key: table.key_names() }
    }

    /// `a DESC, b DESC`
    fn key_with(&self, prefix: &str, suffix: &str) -> String {
        self.table.key().map(|column| format!("{prefix}{}{suffix}", column.name)).collect::<Vec<_>>().join(", ")
    }
}

fn tables() -> impl Iterator<Item = Of> {
    TABLES.iter().filter_map(|table| Some(Of::new(table, table.sqlite?)))
}

fn any(rng: &mut StdRng) -> Of {
    let mut all: Vec<Of> = tables().collect();
    all.swap_remove(rng.random_range(0..all.len()))
}

/// Another table: what a statement asks about its own for each row, SQLite answers from one that is half changed.
fn other(rng: &mut StdRng, than: &Of) -> Of {
    let mut others: Vec<Of> = tables().filter(|of| of.name != than.name).collect();
    others.swap_remove(rng.random_range(0..others.len()))
}

fn small(rng: &mut StdRng) -> i32 {
    rng.random_range(-9..10)
}

fn one<'a>(rng: &mut StdRng, of: &[&'a str]) -> &'a str {
    of.choose(rng).copied().unwrap()
}

fn values(rng: &mut StdRng, of: &Of) -> String {
    let row: Vec<String> = of.table.row(rng).into_iter().map(|value| value.sql).collect();
    format!("({})", row.join(", "))
}

fn returning(rng: &mut StdRng, of: &Of) -> String {
    let names: Vec<&str> = of.table.columns.iter().map(|column| column.name).collect();
    if rng.random_range(0..4) == 0 { format!(" RETURNING {}", names.join(", ")) } else { String::new() }
}

/// The whole key.
fn exactly(rng: &mut StdRng, of: &Of) -> String {
    let parts =
        of.table.key().zip(of.table.a_key(rng)).map(|(column, value)| format!("{} = {}", column.name, value.sql));
    parts.collect::<Vec<_>>().join(" AND ")
}

fn condition(rng: &mut StdRng, of: &Of) -> String {
    match rng.random_range(0..6) {
        0 => format!("{} AND {}", comparison(rng, of), comparison(rng, of)),
        1 => format!("({} OR {})", comparison(rng, of), comparison(rng, of)),
        _ => comparison(rng, of),
    }
}

fn comparison(rng: &mut StdRng, of: &Of) -> String {
    let at = rng.random_range(0..of.table.columns.len());
    let name = of.table.columns[at].name;
    let value = |rng: &mut StdRng| of.table.value(rng, at).sql;
    match rng.random_range(0..8) {
        0 => format!("{name} IS NULL"),
        1 => format!("{name} IS NOT NULL"),
        2 => format!("{name} >= {}", value(rng)),
        3 => format!("({name} < {} OR {name} IS NULL)", value(rng)),
        4 => format!("NOT ({name} = {})", value(rng)),
        5 => format!("{name} IN ({}, {}, {})", value(rng), value(rng), value(rng)),
        6 => format!("{name} BETWEEN {} AND {}", value(rng), value(rng)),
        _ => format!("{name} = {}", value(rng)),
    }
}

/// Rows of any table with keys that other statements seldom make.
fn insert_from_query(rng: &mut StdRng, of: &Of) -> String {
    let from = any(rng);
    let Of { name, n, t, key, .. } = &from;
    let (condition, first) = (condition(rng, &from), one(rng, &["100", "200", "300"]));
    let (number, text) = (format!("{first} + row_number() OVER (ORDER BY {key})"), format!("coalesce({t}, '-')"));
    let query = match of.name {
        "notes" => format!("SELECT {number}, {n}, {t} FROM {name} WHERE {condition}"),
        "pairs" => format!("SELECT {n}, {text}, {number} FROM {name} WHERE {condition}"),
        _ => format!("SELECT {text} || '+', max({n}) FROM {name} WHERE {condition} GROUP BY {text}"),
    };
    let conflict = one(rng, &["", " ON CONFLICT DO NOTHING"]);
    format!("INSERT INTO {} {query}{conflict}{}", of.name, returning(rng, of))
}

fn insert_expressions(rng: &mut StdRng, of: &Of) -> String {
    let (a, b) = (rng.random_range(0..20), small(rng));
    let row = match of.name {
        "notes" => format!("1 + {a} * 3, abs({b}), 'a' || 'b'"),
        "pairs" => format!("{b} - 1, coalesce(NULL, 'a') || 'b', {a} + 1"),
        _ => format!("'a' || upper('b'), abs({b}) * 2"),
    };
    format!("INSERT INTO {} VALUES ({row}){}", of.name, returning(rng, of))
}

/// Moves keys to where others only come by another such statement, and back: SQLite checks each row on its way.
fn update_keys(rng: &mut StdRng, of: &Of) -> String {
    let (from, forth) = (rng.random_range(-5..60), rng.random::<bool>());
    match (of.name, forth) {
        ("notes", true) => format!("UPDATE notes SET id = id + 1000 WHERE id BETWEEN {from} AND {}", from + 20),
        ("notes", false) => {
            format!("UPDATE notes SET id = id - 1000 WHERE id BETWEEN {} AND {}", from + 1_000, from + 1_020)
        }
        ("pairs", true) => {
            format!("UPDATE pairs SET b = b + 1000, v = b WHERE b BETWEEN 0 AND 5 AND ({})", condition(rng, of))
        }
        ("pairs", false) => {
            format!("UPDATE pairs SET b = b - 1000 WHERE b BETWEEN 1000 AND 1005 AND ({})", condition(rng, of))
        }
        _ => {
            let mut word = || of.table.a_key(rng)[0].sql.clone();
            format!("UPDATE words SET w = 'm' || w WHERE w IN ({}, {}, {})", word(), word(), word())
        }
    }
}

const fn change(kind: &'static str, write: fn(&mut StdRng, &Of) -> String) -> Shape {
    Shape { kind, form: Form::Change, write }
}

const fn query(kind: &'static str, write: fn(&mut StdRng, &Of) -> String) -> Shape {
    Shape { kind, form: Form::Query, write }
}

const fn ordered(kind: &'static str, write: fn(&mut StdRng, &Of) -> String) -> Shape {
    Shape { kind, form: Form::Ordered, write }
}

static SHAPES: [Shape; 48] = [
    change("insert from a query", insert_from_query),
    change("insert expressions", insert_expressions),
    change("insert some columns", |rng, of| {
        let columns = of.table.columns.iter().enumerate().rev().filter(|(_, column)| column.name != of.n);
        let (at, names): (Vec<usize>, Vec<&str>) = columns.map(|(at, column)| (at, column.name)).unzip();
        let row: Vec<String> = at.into_iter().map(|at| of.table.value(rng, at).sql).collect();
        let (name, names, row) = (of.name, names.join(", "), row.join(", "));
        format!("INSERT INTO {name} ({names}) VALUES ({row}) ON CONFLICT DO NOTHING{}", returning(rng, of))
    }),
    change("insert many rows", |rng, of| {
        let rows: Vec<String> = (0..20).map(|_| values(rng, of)).collect();
        format!("INSERT INTO {} VALUES {} ON CONFLICT DO NOTHING", of.name, rows.join(", "))
    }),
    change("insert, do update where", |rng, of| {
        let Of { name, n, key, .. } = of;
        format!(
            "INSERT INTO {name} VALUES {} ON CONFLICT ({key}) DO UPDATE SET {n} = coalesce({name}.{n}, 0) + 1 WHERE \
             excluded.{n} IS NOT NULL{}",
            values(rng, of),
            returning(rng, of)
        )
    }),
    change("insert, do update from a subquery", |rng, of| {
        let Of { name, n, key, .. } = of;
        format!(
            "INSERT INTO {name} VALUES {} ON CONFLICT ({key}) DO UPDATE SET {n} = (SELECT min({n}) FROM {name}) WHERE \
             EXISTS (SELECT 1 FROM {name} o WHERE o.{n} > excluded.{n}){}",
            values(rng, of),
            returning(rng, of)
        )
    }),
    change("update where", |rng, of| {
        let Of { name, n, .. } = of;
        format!("UPDATE {name} SET {n} = {n} + 1 WHERE {}{}", condition(rng, of), returning(rng, of))
    }),
    change("update a row", |rng, of| {
        let Of { name, n, .. } = of;
        format!("UPDATE {name} SET {n} = coalesce({n}, 0) - 1 WHERE {}{}", exactly(rng, of), returning(rng, of))
    }),
    change("update to NULL", |rng, of| {
        format!("UPDATE {} SET {} = NULL WHERE {}{}", of.name, of.n, condition(rng, of), returning(rng, of))
    }),
    change("update by cases", |rng, of| {
        let Of { name, n, .. } = of;
        let case = format!("CASE WHEN {n} IS NULL THEN 0 WHEN {n} < 0 THEN -{n} END");
        format!("UPDATE {name} SET {n} = {case} WHERE {}{}", condition(rng, of), returning(rng, of))
    }),
    change("update from a subquery", |rng, of| {
        let from = any(rng);
        let most = format!("SELECT max(y.{}) FROM {} y WHERE y.{} < {}", from.n, from.name, from.n, small(rng));
        format!("UPDATE {} SET {} = ({most}) WHERE {}", of.name, of.n, condition(rng, of))
    }),
    change("update from a correlated subquery", |rng, of| {
        let (Of { name, n, .. }, from) = (of, other(rng, of));
        let count = format!("SELECT count(*) FROM {} y WHERE y.{} = {name}.{n}", from.name, from.n);
        format!("UPDATE {name} SET {n} = ({count}) WHERE {}", condition(rng, of))
    }),
    change("update in a subquery", |rng, of| {
        let Of { name, n, .. } = of;
        format!("UPDATE {name} SET {n} = {} WHERE {n} IN ({})", small(rng), numbers(rng))
    }),
    change("update all columns", |rng, of| {
        let named = of.table.columns.iter().zip(of.table.row(rng));
        let set: Vec<String> = named.map(|(column, value)| format!("{} = {}", column.name, value.sql)).collect();
        format!("UPDATE {} SET {} WHERE {}{}", of.name, set.join(", "), exactly(rng, of), returning(rng, of))
    }),
    change("update keys", update_keys),
    change("delete where", |rng, of| {
        format!("DELETE FROM {} WHERE {}{}", of.name, condition(rng, of), returning(rng, of))
    }),
    change("delete the largest", |rng, of| {
        let Of { name, n, .. } = of;
        format!("DELETE FROM {name} WHERE {n} = (SELECT max({n}) FROM {name} WHERE {})", condition(rng, of))
    }),
    change("delete in a subquery", |rng, of| format!("DELETE FROM {} WHERE {} IN ({})", of.name, of.n, numbers(rng))),
    change("delete what exists elsewhere", |rng, of| {
        let (Of { name, n, .. }, from) = (of, other(rng, of));
        let same = format!("y.{} = {name}.{n} AND y.{} > {}", from.n, from.n, small(rng));
        format!("DELETE FROM {name} WHERE EXISTS (SELECT 1 FROM {} y WHERE {same})", from.name)
    }),
    change("delete all", |_, of| format!("DELETE FROM {}", of.name)),
    query("select where", |rng, of| format!("SELECT * FROM {} WHERE {}", of.name, condition(rng, of))),
    query("select by key and more", |rng, of| {
        format!("SELECT * FROM {} WHERE {} AND {} > {}", of.name, exactly(rng, of), of.n, small(rng))
    }),
    query("aggregates", |rng, of| {
        let Of { name, n, t, .. } = of;
        let items = format!("count(*), count({n}), min({n}), max({n}), sum({n}), count(DISTINCT {n}), min({t})");
        format!("SELECT {items} FROM {name} WHERE {}", condition(rng, of))
    }),
    query("aggregates with a filter", |rng, of| {
        format!("SELECT count(*) FILTER (WHERE {} > {}), count(*) FROM {}", of.n, small(rng), of.name)
    }),
    query("group by", |rng, of| {
        let (Of { name, n, t, .. }, least) = (of, rng.random_range(0..3));
        let condition = condition(rng, of);
        format!("SELECT {n}, count(*), max({t}) FROM {name} WHERE {condition} GROUP BY {n} HAVING count(*) > {least}")
    }),
    query("group by cases", |_, of| {
        let Of { name, n, .. } = of;
        let case = format!("CASE WHEN {n} > 0 THEN 'more' WHEN {n} < 0 THEN 'less' ELSE 'none' END");
        format!("SELECT {case}, count(*) FROM {name} GROUP BY 1")
    }),
    ordered("page", |rng, of| {
        let key = of.key_with("", one(rng, &[" ASC", " DESC"]));
        let (condition, limit, offset) = (condition(rng, of), rng.random_range(0..6), rng.random_range(0..4));
        format!("SELECT * FROM {} WHERE {condition} ORDER BY {key} LIMIT {limit} OFFSET {offset}", of.name)
    }),
    ordered("first by number", |rng, of| {
        let (Of { name, n, key, .. }, limit) = (of, rng.random_range(1..9));
        let order = one(rng, &["ASC NULLS FIRST", "DESC NULLS LAST"]);
        format!("SELECT {n}, {key} FROM {name} ORDER BY {n} {order}, {key} LIMIT {limit}")
    }),
    query("join", |rng, of| {
        let (key, on, more) = (of.key_with("x.", ""), any(rng), small(rng));
        let both = format!("x.{} = y.{} WHERE x.{} > {more}", of.n, on.n, of.n);
        format!("SELECT {key}, y.{} FROM {} x JOIN {} y ON {both}", on.n, of.name, on.name)
    }),
    query("left join", |rng, of| {
        let (key, on, more) = (of.key_with("x.", ""), any(rng), small(rng));
        let both = format!("x.{} = y.{} AND y.{} > {more}", of.t, on.t, on.n);
        format!("SELECT {key}, y.{} FROM {} x LEFT JOIN {} y ON {both}", on.n, of.name, on.name)
    }),
    query("full join", |rng, of| {
        let on = any(rng);
        let both = format!("{} x FULL JOIN {} y ON x.{} = y.{}", of.name, on.name, of.t, on.t);
        format!("SELECT x.{}, y.{} FROM {both}", of.n, on.n)
    }),
    query("cross join", |rng, of| {
        let on = any(rng);
        let both = format!("{} x, {} y WHERE x.{} < y.{}", of.name, on.name, of.n, on.n);
        format!("SELECT count(*), sum(x.{}) FROM {both}", of.n)
    }),
    query("in a subquery", |rng, of| format!("SELECT * FROM {} WHERE {} IN ({})", of.name, of.n, numbers(rng))),
    query("not in a subquery", |rng, of| format!("SELECT * FROM {} WHERE {} NOT IN ({})", of.name, of.n, numbers(rng))),
    query("not in a subquery with NULL", |rng, of| {
        let from = any(rng);
        format!("SELECT * FROM {} WHERE {} NOT IN (SELECT y.{} FROM {} y)", of.name, of.n, from.n, from.name)
    }),
    query("not exists", |rng, of| {
        let (key, from) = (of.key_with("x.", ""), any(rng));
        let same = format!("SELECT 1 FROM {} y WHERE y.{} = x.{}", from.name, from.n, of.n);
        format!("SELECT {key} FROM {} x WHERE NOT EXISTS ({same})", of.name)
    }),
    query("correlated subquery", |rng, of| {
        let (key, from) = (of.key_with("x.", ""), any(rng));
        let same = format!("SELECT count(*) FROM {} y WHERE y.{} = x.{}", from.name, from.n, of.n);
        format!("SELECT {key}, ({same}) FROM {} x", of.name)
    }),
    query("compared with a subquery", |rng, of| {
        let from = any(rng);
        let least = format!("SELECT min({}) FROM {} WHERE {}", from.n, from.name, condition(rng, &from));
        format!("SELECT * FROM {} WHERE {} >= ({least})", of.name, of.n)
    }),
    query("distinct", |rng, of| {
        format!("SELECT DISTINCT {}, {} FROM {} WHERE {}", of.n, of.t, of.name, condition(rng, of))
    }),
    query("set operation", |rng, of| {
        let (with, operation) = (any(rng), one(rng, &["UNION", "UNION ALL", "INTERSECT", "EXCEPT"]));
        let mut part = |of: &Of| format!("SELECT {} FROM {} WHERE {}", of.n, of.name, condition(rng, of));
        format!("{} {operation} {}", part(of), part(&with))
    }),
    query("with", |_, of| {
        let Of { name, n, .. } = of;
        let counts = format!("SELECT {n} AS x, count(*) AS c FROM {name} GROUP BY {n}");
        format!("WITH q AS ({counts}) SELECT a.x, a.c, b.c FROM q a LEFT JOIN q b ON a.x = b.x + 1")
    }),
    query("with recursive", |_, of| {
        let first = format!("SELECT min({}) AS x FROM {}", of.n, of.name);
        format!(
            "WITH RECURSIVE r AS ({first} UNION ALL SELECT x + 1 FROM r WHERE x < 5) SELECT count(*), max(x) FROM r"
        )
    }),
    query("window", |_, of| {
        let Of { name, n, key, .. } = of;
        let number = format!("row_number() OVER (PARTITION BY {n} ORDER BY {key})");
        format!("SELECT {key}, {number}, sum({n}) OVER (ORDER BY {key}) FROM {name}")
    }),
    query("texts", |rng, of| {
        let (t, like) = (of.t, one(rng, &["a%", "%b", "%_%", "_", "%"]));
        let items = format!("{t} || '.', length({t}), substr({t}, 1, 1), coalesce(nullif({t}, ''), 'e')");
        format!("SELECT {items} FROM {} WHERE {t} LIKE '{like}'", of.name)
    }),
    query("numbers", |rng, of| {
        let Of { name, n, .. } = of;
        let items = format!("{n} + 1, {n} * {n} - 3, {n} / 4, {n} % 4, -{n}, abs({n})");
        format!("SELECT {items} FROM {name} WHERE {}", condition(rng, of))
    }),
    query("from a subquery", |_, of| {
        let Of { name, n, key, .. } = of;
        format!("SELECT count(*), max(x) FROM (SELECT {n} + 1 AS x FROM {name} ORDER BY {key} LIMIT 5) q")
    }),
    query("some columns", |rng, of| {
        format!("SELECT {}, {} FROM {} WHERE {}", of.n, of.key, of.name, condition(rng, of))
    }),
    query("count where", |rng, of| format!("SELECT count(*) FROM {} WHERE {}", of.name, condition(rng, of))),
];

/// Some numbers of any table.
fn numbers(rng: &mut StdRng) -> String {
    let from = any(rng);
    format!("SELECT y.{n} FROM {} y WHERE y.{n} > {}", from.name, small(rng), n = from.n)
}
