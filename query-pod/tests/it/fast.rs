//! Statements that need no planner answer what the planner would have answered.
//!
//! Each statement by primary key, or by its order, is sent as it is, and once more in a form that means the same and needs the planner. What
//! writes is sent so for two users, who have the same rows; where those lie differs. `KALAMDB_SEED` repeats a run,
//! `KALAMDB_STEPS` makes it longer.

use anyhow::{Context as _, ensure};
use kalamdb_test_support::pod::{Answer, Home, Pod};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;

use super::{BINARY, declare, refused, returns, table, user_table};

/// Has all its rows by statements that need no planner where that can be; `OTHER` by the general way alone.
const FAST: &str = "alice";
const OTHER: &str = "bob";

/// Values of one type.
struct Kind {
    ty: &'static str,
    /// As INSERT takes them: all different.
    rows: &'static [&'static str],
    /// Literals that a key is found by without the planner.
    sure: &'static [&'static str],
    /// Others, some of which are errors.
    odd: &'static [&'static str],
    /// Parameters, as JSON.
    sure_params: &'static [&'static str],
    odd_params: &'static [&'static str],
}

const ODD: &[&str] =
    &["NULL", "TRUE", "'x'", "''", "1.5", "X'00'", "NOW()", "CURRENT_USER()", "1 + 0", "(0)", "DATE '1970-01-01'"];
const ODD_PARAMS: &[&str] = &["null", "true", "\"x\"", "\"\"", "[]", "{}", "[1]", "\" 1\"", "1e400"];

const BIGINT: Kind = Kind {
    ty: "BIGINT",
    rows: &["0", "1", "-1", "7", "9223372036854775807", "-9223372036854775808"],
    sure: &["0", "1", "-1", "7", "-0", "007", "9223372036854775807", "-9223372036854775808", "5"],
    odd: &[
        "'1'",
        "1.0",
        "7.00",
        "1e0",
        "9223372036854775808",
        "-9223372036854775809",
        "1_0",
        "CAST(1 AS SMALLINT)",
        "- -1",
        "+1",
        "0.5",
    ],
    sure_params: &[
        "0",
        "1",
        "\"1\"",
        "-1",
        "7.0",
        "7e0",
        "\"7.0\"",
        "9223372036854775807",
        "\"-9223372036854775808\"",
        "5",
    ],
    odd_params: &["1.5", "9223372036854775808", "\"9223372036854775808\"", "\"1,0\""],
};
const INT: Kind = Kind {
    ty: "INT",
    rows: &["0", "-2147483648", "2147483647"],
    sure: &["0", "-0", "2147483647", "-2147483648", "3"],
    odd: &["2147483648", "0.0", "'0'", "-2147483649"],
    sure_params: &["0", "\"0\"", "0.0", "-2147483648"],
    odd_params: &["2147483648", "0.1"],
};
const SMALLINT: Kind = Kind {
    ty: "SMALLINT",
    rows: &["0", "-32768", "32767"],
    sure: &["0", "32767", "-32768"],
    odd: &["32768", "0.0", "'0'"],
    sure_params: &["0", "\"32767\""],
    odd_params: &["32768", "\"a\""],
};
const TEXT: Kind = Kind {
    ty: "TEXT",
    rows: &["''", "'a'", "'A'", "'a '", "'1'", "'é'", "'e\u{301}'", "'🙂'", "'it''s'", "'{}'", "'null'", "'%'"],
    sure: &["''", "'a'", "'A'", "'a '", "'1'", "'é'", "'it''s'", "'{}'", "'null'", "'nope'"],
    odd: &["$$a$$", "E'a'", "U&'a'", "'a' || ''", "upper('a')"],
    sure_params: &["\"\"", "\"a\"", "\"A\"", "\"1\"", "\"\\u00e9\"", "\"{}\"", "\"null\"", "\"nope\""],
    odd_params: &["1", "1.0", "{ \"a\": 1}"],
};
const UUID: Kind = Kind {
    ty: "UUID",
    rows: &["'6f9619ff-8b86-d011-b42d-00cf4fc964ff'", "'00000000-0000-0000-0000-000000000000'"],
    sure: &[
        "'6f9619ff-8b86-d011-b42d-00cf4fc964ff'",
        "'6F9619FF8B86D011B42D00CF4FC964FF'",
        "'{6F9619FF-8B86-D011-B42D-00CF4FC964FF}'",
        "'00000000-0000-0000-0000-000000000001'",
    ],
    odd: &["'6f9619ff'", "'6f9619ff-8b86-d011-b42d-00cf4fc964ff '"],
    sure_params: &["\"6F9619FF-8B86-D011-B42D-00CF4FC964FF\"", "\"00000000000000000000000000000000\""],
    odd_params: &["\"6f9619ff\"", "0"],
};
const TIMESTAMP: Kind = Kind {
    ty: "TIMESTAMP",
    rows: &["0", "'1970-01-01T00:00:01.5Z'", "'9999-12-31T23:59:59.999999Z'", "'1969-12-31'"],
    sure: &[
        "'1970-01-01'",
        "'0'",
        "'1970-01-01T01:00:01.5+01:00'",
        "'1970-01-01 00:00:01.500000'",
        "'9999-12-31T23:59:59.999999Z'",
        "'1969-12-31'",
    ],
    odd: &["0", "1500000", "'yesterday'", "'1970-01-01T00:00:01.5000001Z'", "TIMESTAMP '1970-01-01'", "'1970'"],
    sure_params: &["0", "\"0\"", "1500000", "\"1970-01-01T00:00:01.5Z\"", "\"1969-12-31\""],
    odd_params: &["\"yesterday\"", "0.5", "1.5e6", "9223372036854775808"],
};
const DATE: Kind = Kind {
    ty: "DATE",
    rows: &["'1970-01-01'", "'2024-02-29'"],
    sure: &["'1970-01-01'", "'0'", "'2024-02-29'"],
    odd: &["0", "'2023-02-29'", "'1970-01-01T00:00:00Z'", "DATE '1970-01-01'"],
    sure_params: &["0", "\"2024-02-29\""],
    odd_params: &["\"2023-02-29\"", "2147483648"],
};
const TIME: Kind = Kind {
    ty: "TIME",
    rows: &["'00:00'", "'23:59:59.999999'"],
    sure: &["'00:00'", "'0'", "'00:00:00.000'", "'23:59:59.999999'"],
    odd: &["0", "'24:00'", "TIME '00:00:00'"],
    sure_params: &["0", "\"00:00\"", "86399999999"],
    odd_params: &["86400000000", "-1"],
};
const BOOLEAN: Kind = Kind {
    ty: "BOOLEAN",
    rows: &["true", "false"],
    sure: &["true", "FALSE"],
    odd: &["'true'", "1", "0"],
    sure_params: &["true", "false"],
    odd_params: &["\"true\"", "1"],
};
const BYTES: Kind = Kind {
    ty: "BYTES",
    rows: &["'\\x'", "'\\x00'", "'\\x6161'"],
    sure: &[],
    odd: &["X'00'", "'\\x00'", "'AA=='", "'aa'", "X'6161'"],
    sure_params: &["\"\"", "\"AA==\"", "\"\\\\x6161\"", "\"YWE=\""],
    odd_params: &["\"?\"", "0"],
};
const DECIMAL: Kind = Kind {
    ty: "DECIMAL(10,2)",
    rows: &["0", "1.5", "-1.5", "99999999.99"],
    sure: &["0", "1.5", "1.50", "-1.5", "99999999.99", "-0", "0.01"],
    odd: &["1.500", "1.505", "100000000", "1e0", "'1.5'", ".5", "5.", "99999999999999999999999999999999999999"],
    sure_params: &["0", "1.5", "\"1.5\"", "1.500", "-15e-1", "99999999.99"],
    odd_params: &["1.505", "100000000", "\"one\""],
};
const WIDE: Kind = Kind {
    ty: "DECIMAL(38,30)",
    rows: &["0", "1.5", "99999999.999999999999999999999999999999"],
    sure: &["0", "1.5", "99999999.999999999999999999999999999999", "-99999999"],
    odd: &["100000000", "12345678901234567890"],
    sure_params: &["0", "1.5", "\"1.5\""],
    odd_params: &["100000000"],
};
const DOUBLE: Kind = Kind {
    ty: "DOUBLE",
    rows: &["0", "-0.0", "'NaN'", "1e300", "0.1", "NULL"],
    sure: &[],
    odd: &[],
    sure_params: &[],
    odd_params: &[],
};
const JSON: Kind = Kind {
    ty: "JSON",
    rows: &["'{\"a\": 1.10}'", "'[]'", "'\"x\"'", "NULL"],
    sure: &[],
    odd: &[],
    sure_params: &[],
    odd_params: &[],
};
const ARRAY: Kind = Kind {
    ty: "ARRAY<BIGINT>",
    rows: &["'[1,null]'", "'[]'", "NULL"],
    sure: &[],
    odd: &[],
    sure_params: &[],
    odd_params: &[],
};

/// Columns with whether they are of the key.
struct Shape {
    name: &'static str,
    columns: &'static [(&'static str, Kind, bool)],
}

const SHAPES: &[Shape] = &[
    Shape {
        name: "bigs",
        columns: &[("id", BIGINT, true), ("s", TEXT, false), ("d", DOUBLE, false), ("j", JSON, false)],
    },
    Shape { name: "words", columns: &[("w", TEXT, true), ("num", INT, false), ("l", ARRAY, false)] },
    Shape { name: "codes", columns: &[("v", BYTES, false), ("u", UUID, true)] },
    Shape { name: "pairs", columns: &[("b", BIGINT, true), ("v", DECIMAL, false), ("a", TEXT, true)] },
    Shape { name: "stamps", columns: &[("at", TIMESTAMP, true), ("v", TIMESTAMP, false)] },
    Shape { name: "moneys", columns: &[("m", DECIMAL, true), ("v", UUID, false)] },
    Shape { name: "wides", columns: &[("m", WIDE, true), ("v", DATE, false)] },
    Shape {
        name: "mixed",
        columns: &[("f", BOOLEAN, true), ("s", SMALLINT, true), ("i", INT, true), ("v", TIME, false)],
    },
    Shape {
        name: "times",
        columns: &[("d", DATE, true), ("t", TIME, true), ("z", BYTES, true), ("v", BOOLEAN, false)],
    },
];

fn manifests() -> String {
    let column = |(name, kind, key): &(&str, Kind, bool)| {
        format!("{name}, type: \"{}\"{}", kind.ty, if *key { ", primaryKey: true" } else { "" })
    };
    let declared: Vec<String> = SHAPES
        .iter()
        .map(|shape| {
            let columns: Vec<String> = shape.columns.iter().map(column).collect();
            user_table(shape.name, &columns.iter().map(String::as_str).collect::<Vec<_>>())
        })
        .collect();
    declare(&declared)
}

fn pick<'a>(rng: &mut StdRng, from: &[&'a str]) -> &'a str {
    from.choose(rng).copied().unwrap_or("0")
}

/// A statement in two forms, and its parameters.
struct Asked {
    fast: String,
    general: String,
    params: Vec<String>,
    /// Whether the first form needs no planner; `None`: it may.
    sure: Option<bool>,
}

/// A condition on the whole key. Sure ones come by halves.
fn condition(rng: &mut StdRng, shape: &Shape, qualifier: &str, params: &mut Vec<String>) -> (String, bool) {
    let mut sure = true;
    let mut parts = Vec::new();
    let all_sure = rng.random();
    for (name, kind, _) in shape.columns.iter().filter(|(.., key)| *key) {
        let certain = all_sure || rng.random_range(0..3) > 0;
        let literal = rng.random() && !(certain && kind.sure.is_empty());
        let value = match (literal, certain) {
            (true, true) => pick(rng, kind.sure).to_owned(),
            (true, false) => {
                // What makes the planner convert each row's text fails at the first that it comes to, which may be any.
                let from = if rng.random() || matches!(kind.ty, "TEXT" | "UUID") { kind.odd } else { ODD };
                pick(rng, from).to_owned()
            }
            (false, _) => {
                let from = match (certain, rng.random()) {
                    (true, _) => kind.sure_params,
                    (false, true) => kind.odd_params,
                    (false, false) => ODD_PARAMS,
                };
                params.push(pick(rng, from).to_owned());
                format!("${}", params.len())
            }
        };
        sure &= certain;
        let column = if rng.random() { format!("{qualifier}.{name}") } else { (*name).to_owned() };
        parts.push(if rng.random() { format!("{column} = {value}") } else { format!("{value} = {column}") });
    }
    if rng.random_range(0..12) == 0 {
        sure = false;
        match rng.random_range(0..3) {
            0 => parts.extend_from_within(..1),
            1 => parts.push(format!("{} IS NOT NULL", shape.columns[0].0)),
            _ => parts.push("nope = 1".to_owned()),
        }
    }
    (parts.join(" AND "), sure)
}

/// Now and then a parameter too many or too few.
fn miscount(rng: &mut StdRng, params: &mut Vec<String>) -> bool {
    match rng.random_range(0..40) {
        0 => params.push("1".to_owned()),
        1 => return params.pop().is_none(),
        _ => return true,
    }
    false
}

fn select(rng: &mut StdRng, shape: &Shape) -> (Asked, bool) {
    let (from, qualifier) = match rng.random_range(0..3) {
        0 => (format!("app.{}", shape.name), shape.name),
        1 => (format!("app.{} AS x", shape.name), "x"),
        _ => (format!("App.{} Q", shape.name.to_uppercase()), "q"),
    };
    let mut params = Vec::new();
    let (condition, sure) = condition(rng, shape, qualifier, &mut params);
    let column = |rng: &mut StdRng| shape.columns[rng.random_range(0..shape.columns.len())].0;
    let (items, sure_items, system) = match rng.random_range(0..12) {
        0..=2 => ("*".to_owned(), true, false),
        // An error where it is the last part of the table's name.
        3 => (format!("{qualifier}.*"), qualifier != shape.name, false),
        4 => (format!("{} AS \"A b.c\", {qualifier}.{} AS Two", column(rng), column(rng)), true, false),
        5 => (column(rng).to_owned(), true, false),
        6 => (format!("{} AS v", column(rng)), true, false),
        7 => ("_seq, _updated AS at, _deleted".to_owned(), true, true),
        8 => (format!("*, {qualifier}._SEQ"), true, true),
        9 => (format!("{c}, {c}", c = column(rng)), false, false),
        10 => ("*, nope".to_owned(), false, false),
        _ => (format!("{} AS y, count(*) OVER ()", column(rng)), false, false),
    };
    let limit = pick(rng, &["", "", "", " LIMIT 1", " LIMIT 10"]);
    let counted = miscount(rng, &mut params);
    let fast = format!("SELECT {items} FROM {from} WHERE {condition}{limit}");
    let general = format!("SELECT {items} FROM {from} WHERE ({condition}) AND TRUE{limit}");
    let sure = (sure && sure_items && counted).then_some(true).filter(|_| !system);
    (Asked { fast, general, params, sure }, system)
}

/// The first or last rows by key.
fn ordered(rng: &mut StdRng, shape: &Shape) -> Asked {
    let key: Vec<&(&str, Kind, bool)> = shape.columns.iter().filter(|(.., key)| *key).collect();
    let equal = rng.random_range(0..=key.len());
    let (mut parts, mut params, mut sure) = (Vec::new(), Vec::new(), equal < key.len());
    let mut value = |rng: &mut StdRng, kind: &Kind| match rng.random_range(0..8) {
        0 => (pick(rng, kind.odd).to_owned(), false),
        1..=3 if !kind.sure.is_empty() => (pick(rng, kind.sure).to_owned(), true),
        _ => {
            params.push(pick(rng, kind.sure_params).to_owned());
            (format!("${}", params.len()), true)
        }
    };
    for (name, kind, _) in &key[..equal] {
        let (value, certain) = value(rng, kind);
        parts.push(format!("{name} = {value}"));
        sure &= certain;
    }
    if let Some((name, kind, _)) = key.get(equal) {
        for _ in 0..rng.random_range(0..3) {
            let (value, _) = value(rng, kind);
            let operator = pick(rng, &["<", "<=", ">", ">="]);
            parts.push(if rng.random() {
                format!("{name} {operator} {value}")
            } else {
                format!("{value} {operator} {name}")
            });
            // Two may be on the same side; UUIDs are not compared.
            sure = false;
        }
    }
    let direction = pick(rng, &["", " ASC", " DESC", " DESC NULLS LAST"]);
    let from = rng.random_range(0..=equal.min(key.len() - 1));
    let qualified = rng.random_range(0..3) == 0;
    let qualifier = if qualified { format!("{}.", shape.name) } else { String::new() };
    let by: Vec<String> = key[from..].iter().map(|(name, ..)| format!("{qualifier}{name}{direction}")).collect();
    let column = |rng: &mut StdRng| shape.columns[rng.random_range(0..shape.columns.len())].0;
    let items = match rng.random_range(0..5) {
        0..=2 => "*".to_owned(),
        3 => {
            sure = false;
            // Not one whose equal values look different.
            format!("{} AS {}", if shape.name == "bigs" { "s" } else { column(rng) }, key[from].0)
        }
        _ => column(rng).to_owned(),
    };
    let limit = match rng.random_range(0..6) {
        0 => {
            params.push(rng.random_range(1..4).to_string());
            format!("${}", params.len())
        }
        1 => {
            sure = false;
            pick(rng, &["0", "2 OFFSET 1", "1001", "'1'", "NULL", "1 + 1"]).to_owned()
        }
        _ => rng.random_range(1..6).to_string(),
    };
    let tail = format!("ORDER BY {} LIMIT {limit}", by.join(", "));
    let condition = parts.join(" AND ");
    let all = if parts.is_empty() { String::new() } else { format!("WHERE {condition} ") };
    let general = if parts.is_empty() { "TRUE".to_owned() } else { format!("({condition}) AND TRUE") };
    Asked {
        fast: format!("SELECT {items} FROM app.{} {all}{tail}", shape.name),
        general: format!("SELECT {items} FROM app.{} WHERE {general} {tail}", shape.name),
        params,
        sure: sure.then_some(true),
    }
}

fn change(rng: &mut StdRng, shape: &Shape) -> Asked {
    let mut params = Vec::new();
    let returning = if rng.random_range(0..4) == 0 { " RETURNING *" } else { "" };
    let head = if rng.random_range(0..3) == 0 {
        format!("DELETE FROM app.{}", shape.name)
    } else {
        let (name, kind, _) = &shape.columns[rng.random_range(0..shape.columns.len())];
        let value = match rng.random_range(0..6) {
            0 => "DEFAULT".to_owned(),
            1 => "NULL".to_owned(),
            2 if !kind.sure_params.is_empty() => {
                params.push(pick(rng, kind.sure_params).to_owned());
                "$1".to_owned()
            }
            3 => pick(rng, &["'x'", "1.5", "$9", "1 + 1", "CURRENT_USER()"]).to_owned(),
            _ => pick(rng, kind.rows).to_owned(),
        };
        format!("UPDATE app.{} SET {name} = {value}", shape.name)
    };
    let (condition, _) = condition(rng, shape, shape.name, &mut params);
    miscount(rng, &mut params);
    let fast = format!("{head} WHERE {condition}{returning}");
    let general = format!("{head} WHERE ({condition}) AND TRUE{returning}");
    Asked { fast, general, params, sure: None }
}

async fn send(pod: &Pod, user: &str, sql: &str, params: &[String]) -> anyhow::Result<Answer> {
    let authorization = format!("Bearer {}", pod.token(user, "user")?);
    let body = format!(r#"{{"sql":{},"params":[{}]}}"#, json!(sql), params.join(","));
    pod.send(Some(&authorization), body).await
}

/// How many statements needed no planner.
async fn count(pod: &Pod) -> anyhow::Result<u64> {
    let (_, text) = pod.get("/metrics").await?;
    let value = text.lines().find_map(|line| line.strip_prefix("kalamdb_fast_statements_total "));
    Ok(value.context("no such metric")?.parse()?)
}

/// All that an answer says but the time that it took.
fn said(answer: &Answer) -> String {
    let said = format!("{} {} {} {}", answer.status, answer.code(), answer.message(), answer.results());
    // The one word that is not the same for both.
    said.replace(FAST, "CURRENT_USER").replace(OTHER, "CURRENT_USER")
}

/// Sends both forms, each for its user, and compares what is said.
async fn compare(pod: &Pod, asked: &Asked, users: [&str; 2]) -> anyhow::Result<bool> {
    let Asked { fast, general, params, sure } = asked;
    let before = count(pod).await?;
    let first = send(pod, users[0], fast, params).await?;
    let between = count(pod).await?;
    let second = send(pod, users[1], general, params).await?;
    let after = count(pod).await?;
    ensure!(after == between, "{general} {params:?}: this form was to go the general way");
    ensure!(
        sure.is_none_or(|sure| sure == (between > before)),
        "{fast} {params:?}: {} without the planner",
        between - before
    );
    let (first, second) = (said(&first), said(&second));
    ensure!(first == second, "{params:?}\n{fast}\n said {first}\n{general}\n said {second}");
    Ok(between > before)
}

async fn step(pod: &Pod, rng: &mut StdRng, shape: &Shape) -> anyhow::Result<bool> {
    let table = format!("app.{}", shape.name);
    match rng.random_range(0..20) {
        0..=3 => {
            let values: Vec<&str> = shape.columns.iter().map(|(_, kind, _)| pick(rng, kind.rows)).collect();
            let sql = format!("INSERT INTO {table} VALUES ({}) ON CONFLICT DO NOTHING", values.join(", "));
            let (first, second) = (send(pod, FAST, &sql, &[]).await?, send(pod, OTHER, &sql, &[]).await?);
            ensure!(first.status == 200 && said(&first) == said(&second), "{sql}: {} {}", first.text, second.text);
            Ok(false)
        }
        4 => {
            let user = pick(rng, &[FAST, OTHER]);
            let verb = pick(rng, &["FLUSH", "FLUSH", "COMPACT"]);
            pod.run(user, &format!("STORAGE {verb} TABLE {table}"), json!([])).await?;
            Ok(false)
        }
        5 => {
            let name = pick(rng, &["", " AS n", " total"]);
            let asked = Asked {
                fast: format!("SELECT count(*){name} FROM {table}"),
                general: format!("SELECT count(*){name} FROM {table} WHERE TRUE"),
                params: Vec::new(),
                sure: Some(true),
            };
            compare(pod, &asked, [FAST, FAST]).await?;
            compare(pod, &asked, [FAST, OTHER]).await
        }
        6..=8 => {
            let asked = ordered(rng, shape);
            compare(pod, &asked, [FAST, FAST]).await?;
            compare(pod, &asked, [FAST, OTHER]).await
        }
        9..=13 => {
            let (asked, system) = select(rng, shape);
            let fast = compare(pod, &asked, [FAST, FAST]).await?;
            // The users' rows were written at other times.
            if !system {
                compare(pod, &asked, [FAST, OTHER]).await?;
            }
            Ok(fast)
        }
        _ => compare(pod, &change(rng, shape), [FAST, OTHER]).await,
    }
}

#[tokio::test]
async fn a_statement_without_a_plan_says_what_the_planner_would_have_said() -> anyhow::Result<()> {
    let number = |name: &str, default: u64| std::env::var(name).ok().map_or(default, |text| text.parse().unwrap());
    let (seed, steps) = (number("KALAMDB_SEED", 20_261_121), number("KALAMDB_STEPS", 1_000));
    println!("seed {seed}, {steps} steps (KALAMDB_SEED, KALAMDB_STEPS)");
    let mut rng = StdRng::seed_from_u64(seed);
    let home = Home::new(BINARY, &manifests())?;
    let mut pod = home.start().await?;
    let mut fast = 0;
    for number in 0..steps {
        if rng.random_range(0..250) == 0 {
            drop(pod);
            pod = home.start().await?;
        }
        let shape = &SHAPES[rng.random_range(0..SHAPES.len())];
        let was_fast = step(&pod, &mut rng, shape).await.with_context(|| format!("seed {seed}, step {number}"))?;
        fast += u64::from(was_fast);
        if number % 50 == 0 || number + 1 == steps {
            let all: Vec<&str> = shape.columns.iter().map(|(name, ..)| *name).collect();
            let sql = format!("SELECT * FROM app.{} ORDER BY {}", shape.name, all[..all.len().min(4)].join(", "));
            let sql = sql.replace(", j", "").replace(", l", "");
            let (first, second) = (send(&pod, FAST, &sql, &[]).await?, send(&pod, OTHER, &sql, &[]).await?);
            ensure!(first.status == 200 && said(&first) == said(&second), "{sql}: {} {}", first.text, second.text);
        }
    }
    ensure!(fast * 5 > steps, "only {fast} of {steps} steps needed no planner");
    Ok(())
}

#[tokio::test]
async fn a_row_is_found_by_its_key_for_its_owner_alone_wherever_it_lies() -> anyhow::Result<()> {
    let restricted = table(
        "SharedTable",
        "secrets",
        &["id, type: BIGINT, primaryKey: true", "v, type: TEXT"],
        &["access: Restricted", "flushPolicy: {rows: 100000, interval: 24h}"],
    );
    let home = Home::new(
        BINARY,
        &declare(&[user_table("t", &["id, type: BIGINT, primaryKey: true", "v, type: TEXT"]), restricted]),
    )?;
    let mut pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.t VALUES (1, 'hers'), (2, 'hers')", json!([])).await?;
    pod.run("bob", "INSERT INTO app.t VALUES (1, 'his')", json!([])).await?;
    pod.sql_as("root", "service", "INSERT INTO app.secrets VALUES (1, 'of the service')", json!([])).await?.rows()?;
    for round in ["buffered", "flushed", "restarted"] {
        let before = count(&pod).await?;
        for (user, id, expected) in [
            ("alice", 1, json!([["hers"]])),
            ("alice", 2, json!([["hers"]])),
            ("bob", 1, json!([["his"]])),
            ("bob", 2, json!([])),
            ("carol", 1, json!([])),
        ] {
            returns(&pod, user, &format!("SELECT v FROM app.t WHERE id = {id}"), expected.clone())
                .await
                .context(round)?;
            let found = super::rows(&pod, user, "SELECT v FROM app.t WHERE id = $1", json!([id])).await?;
            ensure!(found == expected, "{round}, {user}: {found}");
            let as_dba = pod.sql_as(user, "dba", &format!("SELECT v FROM app.t WHERE id = {id}"), json!([])).await?;
            ensure!(json!(as_dba.rows()?) == expected, "{round}, {user}: {}", as_dba.text);
        }
        returns(&pod, "alice", "SELECT count(*) FROM app.t", json!([["2"]])).await?;
        returns(&pod, "carol", "SELECT count(*) FROM app.t", json!([["0"]])).await?;
        ensure!(count(&pod).await? == before + 17, "{round}: not all of them were fast");
        for sql in ["SELECT v FROM app.secrets WHERE id = 1", "SELECT count(*) FROM app.secrets"] {
            refused(&pod, sql, json!([]), 403, "PERMISSION_DENIED").await?;
        }
        refused(&pod, "UPDATE app.secrets SET v = 'x' WHERE id = 1", json!([]), 403, "PERMISSION_DENIED").await?;
        let told = pod.sql_as("root", "service", "SELECT v FROM app.secrets WHERE id = 1", json!([])).await?;
        ensure!(json!(told.rows()?) == json!([["of the service"]]), "{}", told.text);
        if round == "buffered" {
            for user in ["alice", "bob"] {
                ensure!(pod.run(user, "STORAGE FLUSH TABLE app.t", json!([])).await? > 0);
            }
        } else {
            pod.kill()?;
            pod = home.start().await?;
        }
    }
    Ok(())
}

/// Files of many pages whose key ranges overlap, deleted and replaced rows in them, newer ones in the buffer: the rows by
/// order are those that a scan finds.
#[tokio::test]
async fn rows_by_order_are_found_in_the_middle_of_many_files() -> anyhow::Result<()> {
    let single = user_table("single", &["id, type: BIGINT, primaryKey: true", "v, type: TEXT"]);
    let pair = user_table(
        "pair",
        &["room, type: TEXT, primaryKey: true", "id, type: BIGINT, primaryKey: true", "v, type: TEXT"],
    );
    let home = Home::new(BINARY, &declare(&[single, pair]))?;
    let pod = home.start().await?;
    let run = async |sql: &str| pod.run("alice", sql, json!([])).await.with_context(|| sql.to_owned());
    for part in 0..4 {
        // Each file has every fourth row of half the range, so that neighbours share most of theirs.
        let from = part * 5_000;
        let ids = format!("FROM generate_series({from}, {}) g(i)", from + 39_999);
        run(&format!("INSERT INTO app.single SELECT i, 'file {part}' {ids} WHERE i % 4 = {part}")).await?;
        run(&format!(
            "INSERT INTO app.pair SELECT 'room ' || CAST(i % 3 AS TEXT), i, 'file {part}' {ids} WHERE i % 4 = {part}"
        ))
        .await?;
        for table in ["single", "pair"] {
            run(&format!("STORAGE FLUSH TABLE app.{table}")).await?;
        }
    }
    for table in ["single", "pair"] {
        run(&format!("DELETE FROM app.{table} WHERE id BETWEEN 20000 AND 23000 AND id % 5 <> 0")).await?;
        run(&format!("UPDATE app.{table} SET v = 'flushed again' WHERE id % 1000 = 7")).await?;
        run(&format!("STORAGE FLUSH TABLE app.{table}")).await?;
        run(&format!("DELETE FROM app.{table} WHERE id BETWEEN 30000 AND 30500")).await?;
        run(&format!("UPDATE app.{table} SET v = 'buffered' WHERE id BETWEEN 22900 AND 23100 OR id % 777 = 0")).await?;
    }
    let seed = 20_261_121;
    let mut rng = StdRng::seed_from_u64(seed);
    let before = count(&pod).await?;
    let mut asked = 0;
    for turn in 0..120 {
        let (direction, limit) = (pick(&mut rng, &["", " DESC"]), rng.random_range(1..80));
        let (table, by, mut conditions) = match (turn % 2, rng.random_range(0..3)) {
            (0, _) => ("single", "id", Vec::new()),
            (_, 0) => ("pair", "room, id", Vec::new()),
            (_, room) => ("pair", "id", vec![format!("room = 'room {room}'")]),
        };
        let edge = rng.random_range(0..56_000).min(rng.random_range(0..56_000));
        if by == "id" {
            for operator in ["<", "<=", ">", ">="].into_iter().filter(|_| rng.random_range(0..4) == 0).take(1) {
                conditions.push(format!("id {operator} {edge}"));
            }
        }
        let by: Vec<String> = by.split(", ").map(|column| format!("{column}{direction}")).collect();
        let tail = format!("ORDER BY {} LIMIT {limit}", by.join(", "));
        let fast = if conditions.is_empty() { String::new() } else { format!("WHERE {} ", conditions.join(" AND ")) };
        let general: String = conditions.iter().map(|condition| format!("({condition}) AND ")).collect();
        let asked_for = Asked {
            fast: format!("SELECT * FROM app.{table} {fast}{tail}"),
            general: format!("SELECT * FROM app.{table} WHERE {general}TRUE {tail}"),
            params: Vec::new(),
            sure: Some(true),
        };
        compare(&pod, &asked_for, [FAST, FAST]).await.with_context(|| format!("seed {seed}, turn {turn}"))?;
        asked += 1;
    }
    ensure!(count(&pod).await? == before + asked, "not all of them were fast");
    Ok(())
}

#[tokio::test]
async fn rows_that_are_older_than_a_column_show_its_first_default() -> anyhow::Result<()> {
    let old = ["id, type: BIGINT, primaryKey: true", "v, type: TEXT"];
    let home = Home::new(BINARY, &declare(&[user_table("t", &old)]))?;
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.t VALUES (1, 'in a file'), (2, 'in a file')", json!([])).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.t", json!([])).await?;
    pod.run("alice", "INSERT INTO app.t VALUES (3, 'buffered')", json!([])).await?;
    let new = [old[0], old[1], "num, type: INT, default: \"7\"", "x, type: TEXT"];
    home.write_manifest("all.yaml", &declare(&[user_table("t", &new)]))?;
    kalamdb_test_support::pod::eventually("the column is there", async || {
        Ok(pod.sql("alice", "SELECT num FROM app.t WHERE id = 1", json!([])).await?.status == 200)
    })
    .await?;
    pod.run("alice", "UPDATE app.t SET x = 'y' WHERE id = 2", json!([])).await?;
    for (id, expected) in [
        (1, json!([["1", "in a file", 7, null]])),
        (2, json!([["2", "in a file", 7, "y"]])),
        (3, json!([["3", "buffered", 7, null]])),
    ] {
        returns(&pod, "alice", &format!("SELECT * FROM app.t WHERE id = {id}"), expected.clone()).await?;
        returns(&pod, "alice", &format!("SELECT * FROM app.t WHERE id = {id} AND TRUE"), expected).await?;
    }
    Ok(())
}
