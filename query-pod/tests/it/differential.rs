//! Generated statements against SQLite: whatever is written, flushed, compacted or restarted, both answer the same.
//!
//! `KALAMDB_SEED` repeats a run, `KALAMDB_STEPS` makes it longer. A failure prints the statements of the table that led
//! to it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use clap::Parser as _;
use kalamdb_model::{OnRemoval, Role, UserId, compile};
use kalamdb_query_pod::auth::Identity;
use kalamdb_query_pod::catalog::CatalogHandle;
use kalamdb_query_pod::engine::{Engine, EngineLimits, Secrets, Storages};
use kalamdb_query_pod::metrics::Metrics;
use kalamdb_query_pod::sql::{Request, Sql, SqlLimits};
use object_store::ObjectStore;
use object_store::memory::InMemory;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rusqlite::types::ValueRef;

use crate::{declare, user_table};

const USERS: [&str; 3] = ["alice", "bob", "é/🙂"];

/// A table of both databases.
struct Shape {
    name: &'static str,
    columns: &'static [&'static str],
    key: &'static [&'static str],
    sqlite: &'static str,
    /// A key and values for the other columns.
    row: fn(&mut StdRng) -> Vec<String>,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "notes",
        columns: &["id", "num", "s"],
        key: &["id"],
        sqlite: "id INTEGER PRIMARY KEY, num INTEGER, s TEXT",
        row: |rng| vec![id(rng), number(rng), text(rng)],
    },
    Shape {
        name: "pairs",
        columns: &["v", "a", "b"],
        key: &["a", "b"],
        sqlite: "v INTEGER, a TEXT NOT NULL, b INTEGER NOT NULL, PRIMARY KEY (a, b)",
        row: |rng| vec![number(rng), word(rng), rng.random_range(0..6).to_string()],
    },
    Shape {
        name: "words",
        columns: &["w", "num"],
        key: &["w"],
        sqlite: "w TEXT PRIMARY KEY NOT NULL, num INTEGER",
        row: |rng| vec![word(rng), number(rng)],
    },
];

fn id(rng: &mut StdRng) -> String {
    match rng.random_range(0..40) {
        0 => "9223372036854775807".to_owned(),
        1 => "-9223372036854775808".to_owned(),
        _ => rng.random_range(-5..60).to_string(),
    }
}

fn number(rng: &mut StdRng) -> String {
    match rng.random_range(0..6) {
        0 => "NULL".to_owned(),
        _ => rng.random_range(-9..10).to_string(),
    }
}

fn text(rng: &mut StdRng) -> String {
    if rng.random_range(0..6) == 0 { "NULL".to_owned() } else { word(rng) }
}

fn word(rng: &mut StdRng) -> String {
    const WORDS: [&str; 12] = ["", "a", "b", "A", "é", "e\u{301}", "zz", "it''s", "%", "_", "🙂", "a b"];
    format!("'{}'", WORDS[rng.random_range(0..WORDS.len())])
}

#[derive(clap::Parser)]
struct Limits {
    #[command(flatten)]
    limits: SqlLimits,
}

/// The limits that a pod has unless it is told others.
pub fn sql_limits() -> SqlLimits {
    Limits::parse_from(["pod"]).limits
}

/// What either database answers: rows as texts, or that the key exists.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Rows(Vec<Vec<Option<String>>>),
    Changed(usize),
    Duplicate,
}

struct Ours {
    dir: tempfile::TempDir,
    store: Arc<dyn ObjectStore>,
    running: Option<(Arc<Engine>, Sql)>,
}

impl Ours {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { dir: tempfile::tempdir()?, store: Arc::new(InMemory::new()), running: None })
    }

    fn open(&mut self) -> anyhow::Result<()> {
        let catalog = CatalogHandle::open(self.dir.path())?;
        let tables = [
            user_table("notes", &["id, type: BIGINT, primaryKey: true", "num, type: BIGINT", "s, type: TEXT"]),
            user_table(
                "pairs",
                &["v, type: BIGINT", "a, type: TEXT, primaryKey: true", "b, type: INT, primaryKey: true"],
            ),
            user_table("words", &["w, type: TEXT, primaryKey: true", "num, type: BIGINT"]),
        ];
        let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), declare(&tables))]);
        let (compiled, conditions) = compile(&catalog.current().catalog, &folder.declared, OnRemoval::Retain);
        ensure!(compiled.tables.len() == SHAPES.len(), "{conditions:?}");
        catalog.save(&compiled)?;
        catalog.serve(compiled);
        let store = Arc::clone(&self.store);
        let open = Box::new(move |_: &_, _: Option<&_>, _| Ok(Arc::clone(&store)));
        let storages = Storages::opened_by(open, Secrets::default());
        let limits = EngineLimits {
            instance_bytes_max: 64 << 20,
            disk_reserve_bytes: 0,
            buffered_bytes_max: 1 << 30,
            flushes_max: 4,
            garbage_after_secs: 0,
            orphans_after_secs: 0,
        };
        let metrics = Arc::new(Metrics::default());
        let engine = Engine::open(self.dir.path(), catalog, storages, limits, Arc::clone(&metrics))?;
        let sql = Sql::new(Arc::clone(&engine), sql_limits(), metrics)?;
        self.running = Some((engine, sql));
        Ok(())
    }

    async fn restart(&mut self) -> anyhow::Result<()> {
        if let Some((engine, sql)) = self.running.take() {
            drop(sql);
            engine.close(std::time::Duration::from_secs(5)).await;
        }
        self.open()
    }

    async fn run(&self, user: &str, sql: &str) -> anyhow::Result<Said> {
        let (_, front) = self.running.as_ref().context("it runs")?;
        let identity = Identity { user: UserId::new(user)?, role: Role::User };
        let request = Request { identity: &identity, sql, params: &[], namespace: Some("app") };
        match front.run(&request).await {
            Ok(answer) => said(&answer.into_pieces(0.0, ()).concat()),
            Err(error) if error.code == "DUPLICATE_KEY" => Ok(Said::Duplicate),
            Err(error) => bail!("{error}"),
        }
    }
}

pub fn said(answer: &[u8]) -> anyhow::Result<Said> {
    let answer: serde_json::Value = serde_json::from_slice(answer)?;
    let answer = &answer["results"][0];
    if answer["schema"].as_array().is_some_and(Vec::is_empty) {
        return Ok(Said::Changed(usize::try_from(answer["row_count"].as_u64().context("a count")?)?));
    }
    let cell = |value: &serde_json::Value| match value {
        serde_json::Value::Null => None,
        serde_json::Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    let rows = answer["rows"].as_array().context("rows")?;
    let row = |row: &serde_json::Value| row.as_array().map(|cells| cells.iter().map(cell).collect());
    Ok(Said::Rows(rows.iter().map(row).collect::<Option<_>>().context("cells")?))
}

struct Theirs(rusqlite::Connection);

impl Theirs {
    fn new() -> anyhow::Result<Self> {
        let connection = rusqlite::Connection::open_in_memory()?;
        connection.execute_batch("PRAGMA case_sensitive_like = ON")?;
        for shape in &SHAPES {
            connection.execute_batch(&format!("CREATE TABLE {} ({})", shape.name, shape.sqlite))?;
        }
        Ok(Self(connection))
    }

    fn run(&self, sql: &str) -> anyhow::Result<Said> {
        let mut statement = self.0.prepare(sql)?;
        let width = statement.column_count();
        let outcome = if width == 0 {
            statement.execute([]).map(Said::Changed)
        } else {
            statement
                .query_map([], |row| (0..width).map(|at| row.get_ref(at).map(cell)).collect())
                .and_then(Iterator::collect)
                .map(Said::Rows)
        };
        match outcome {
            Ok(said) => Ok(said),
            Err(rusqlite::Error::SqliteFailure(error, _)) if error.code == rusqlite::ErrorCode::ConstraintViolation => {
                Ok(Said::Duplicate)
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn cell(value: ValueRef<'_>) -> Option<String> {
    match value {
        ValueRef::Null => None,
        ValueRef::Integer(v) => Some(v.to_string()),
        ValueRef::Real(v) => Some(v.to_string()),
        ValueRef::Text(v) => Some(String::from_utf8_lossy(v).into_owned()),
        ValueRef::Blob(_) => Some("blob".to_owned()),
    }
}

/// One statement that both databases read the same way.
fn statement(rng: &mut StdRng, shape: &Shape) -> String {
    let table = shape.name;
    let values = |rng: &mut StdRng| format!("({})", (shape.row)(rng).join(", "));
    let many = |rng: &mut StdRng| {
        let rows: Vec<String> = (0..rng.random_range(1..4)).map(|_| values(rng)).collect();
        rows.join(", ")
    };
    let returning =
        if rng.random_range(0..4) == 0 { format!(" RETURNING {}", shape.columns.join(", ")) } else { String::new() };
    let number = shape.columns.iter().find(|name| ["num", "v"].contains(name)).copied().unwrap_or("num");
    let key = shape.key.join(", ");
    match rng.random_range(0..23) {
        0..=4 => format!("INSERT INTO {table} VALUES {}{returning}", many(rng)),
        5 => format!("INSERT INTO {table} VALUES {} ON CONFLICT DO NOTHING", many(rng)),
        6 => format!(
            "INSERT INTO {table} VALUES {} ON CONFLICT ({key}) DO UPDATE SET {number} = excluded.{number}{returning}",
            values(rng)
        ),
        7 => format!(
            "INSERT INTO {table} VALUES {} ON CONFLICT ({key}) DO UPDATE SET {number} = coalesce({table}.{number}, 0) + 1 \
             WHERE excluded.{number} IS NOT NULL",
            values(rng)
        ),
        8 | 9 => {
            format!("UPDATE {table} SET {number} = {} WHERE {}{returning}", self::number(rng), exactly(rng, shape))
        }
        10 => format!("UPDATE {table} SET {number} = {number} + 1 WHERE {}", condition(rng, shape)),
        11 => format!("UPDATE {table} SET {number} = NULL WHERE {}{returning}", condition(rng, shape)),
        12 => {
            let new: Vec<String> = (shape.row)(rng);
            let set: Vec<String> =
                shape.columns.iter().zip(new).map(|(name, value)| format!("{name} = {value}")).collect();
            format!("UPDATE {table} SET {} WHERE {}", set.join(", "), exactly(rng, shape))
        }
        13 | 14 => format!("DELETE FROM {table} WHERE {}{returning}", exactly(rng, shape)),
        15 => format!("DELETE FROM {table} WHERE {}", condition(rng, shape)),
        16 => format!(
            "DELETE FROM {table} WHERE {number} = (SELECT max({number}) FROM {table} WHERE {})",
            condition(rng, shape)
        ),
        17 => format!("SELECT * FROM {table} WHERE {}", exactly(rng, shape)),
        18 => format!("SELECT count(*), count({number}), min({number}), max({number}) FROM {table}"),
        19 => format!("SELECT {number}, count(*) FROM {table} WHERE {} GROUP BY {number}", condition(rng, shape)),
        20 => format!(
            "SELECT * FROM {table} WHERE {} ORDER BY {key} {} LIMIT {}",
            condition(rng, shape),
            if rng.random() { "ASC" } else { "DESC" },
            rng.random_range(0..5)
        ),
        21 => format!(
            "INSERT INTO {table} VALUES {} ON CONFLICT ({key}) DO UPDATE SET {number} = (SELECT min({number}) FROM {table}) \
             WHERE EXISTS (SELECT 1 FROM {table} o WHERE o.{number} > excluded.{number}){returning}",
            values(rng)
        ),
        _ => format!(
            "SELECT count(*) FROM {table} x JOIN {table} y ON x.{number} = y.{number} WHERE x.{number} > {}",
            rng.random_range(-9..9)
        ),
    }
}

/// The whole key.
fn exactly(rng: &mut StdRng, shape: &Shape) -> String {
    let row = (shape.row)(rng);
    let part = |name: &&str| {
        let at = shape.columns.iter().position(|column| column == name).unwrap_or(0);
        format!("{name} = {}", row[at])
    };
    shape.key.iter().map(part).collect::<Vec<_>>().join(" AND ")
}

fn condition(rng: &mut StdRng, shape: &Shape) -> String {
    let row = (shape.row)(rng);
    let at = rng.random_range(0..shape.columns.len());
    let (name, value) = (shape.columns[at], &row[at]);
    match rng.random_range(0..6) {
        0 => format!("{name} IS NULL"),
        1 => format!("{name} >= {value}"),
        2 => format!("{name} < {value} OR {name} IS NULL"),
        3 => format!("NOT ({name} = {value})"),
        4 => format!("{name} IN ({value}, {})", (shape.row)(rng)[at]),
        _ => format!("{name} = {value}"),
    }
}

fn sorted(said: Said) -> Said {
    match said {
        Said::Rows(mut rows) => {
            rows.sort();
            Said::Rows(rows)
        }
        other => other,
    }
}

async fn run(seed: u64, steps: usize) -> anyhow::Result<()> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut ours = Ours::new()?;
    ours.open()?;
    let theirs: BTreeMap<&str, Theirs> =
        USERS.iter().map(|user| Theirs::new().map(|theirs| (*user, theirs))).collect::<anyhow::Result<_>>()?;
    let mut history: BTreeMap<(&str, &str), String> = BTreeMap::new();
    for step in 0..steps {
        let user = USERS[rng.random_range(0..USERS.len())];
        let shape = &SHAPES[rng.random_range(0..SHAPES.len())];
        let past = history.entry((user, shape.name)).or_default();
        match rng.random_range(0..100) {
            0..=5 => {
                let flush = format!("STORAGE FLUSH TABLE app.{}", shape.name);
                writeln!(past, "{flush};")?;
                ours.run(user, &flush).await?;
                continue;
            }
            6 => {
                let compact = format!("STORAGE COMPACT TABLE app.{}", shape.name);
                writeln!(past, "{compact};")?;
                ours.run(user, &compact).await?;
                continue;
            }
            7 if rng.random_range(0..4) == 0 => {
                history.values_mut().for_each(|past| past.push_str("-- restart\n"));
                ours.restart().await?;
                continue;
            }
            _ => {}
        }
        let sql = statement(&mut rng, shape);
        writeln!(past, "{sql};")?;
        let expected = theirs[user].run(&sql).with_context(|| format!("sqlite: {sql}"))?;
        let context = || format!("seed {seed}, step {step}, {user}:\n{past}");
        let found = ours.run(user, &sql).await.with_context(context)?;
        let (found, expected) = (sorted(found), sorted(expected));
        ensure!(found == expected, "found {found:?}\nexpected {expected:?}\n{}", context());
        let all = format!("SELECT * FROM {}", shape.name);
        if step % 20 == 0 {
            let (found, expected) = (sorted(ours.run(user, &all).await?), sorted(theirs[user].run(&all)?));
            ensure!(found == expected, "{all}: found {found:?}\nexpected {expected:?}\n{}", context());
        }
    }
    for user in USERS {
        for shape in &SHAPES {
            let all = format!("SELECT * FROM {}", shape.name);
            let (found, expected) = (sorted(ours.run(user, &all).await?), sorted(theirs[user].run(&all)?));
            ensure!(found == expected, "{user}, {all}: found {found:?}\nexpected {expected:?}, seed {seed}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_statements_answer_as_sqlite_does() -> anyhow::Result<()> {
    let number = |name: &str, default: u64| std::env::var(name).ok().map_or(default, |text| text.parse().unwrap());
    let (seed, steps) = (number("KALAMDB_SEED", 20_261_121), number("KALAMDB_STEPS", 4_000));
    println!("seed {seed}, {steps} steps (KALAMDB_SEED, KALAMDB_STEPS)");
    run(seed, usize::try_from(steps)?).await
}

/// Rows go from the buffer to files and from file to file while they are changed and read: each is there exactly once, in
/// its newest version, at every moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_row_is_seen_once_and_newest_while_flushes_and_compactions_run() -> anyhow::Result<()> {
    const KEYS: i64 = 40;
    let mut ours = Ours::new()?;
    ours.open()?;
    let ours = Arc::new(ours);
    let rows: Vec<String> = (0..KEYS).map(|id| format!("({id}, 0, 'x')")).collect();
    ours.run("alice", &format!("INSERT INTO notes VALUES {}", rows.join(", "))).await?;
    let stop = tokio_util::sync::CancellationToken::new();
    let mut background = tokio::task::JoinSet::new();
    for command in ["STORAGE FLUSH TABLE app.notes", "STORAGE COMPACT TABLE app.notes"] {
        let (ours, stop) = (Arc::clone(&ours), stop.clone());
        background.spawn(async move {
            let mut times = 0;
            while !stop.is_cancelled() {
                ours.run("alice", command).await?;
                times += 1;
            }
            anyhow::Ok(times)
        });
    }
    for _ in 0..2 {
        let (ours, stop) = (Arc::clone(&ours), stop.clone());
        background.spawn(async move {
            let (mut times, mut last) = (0, 0);
            while !stop.is_cancelled() {
                let sql = "SELECT count(*), count(distinct id), coalesce(sum(num), 0) FROM notes WHERE s = 'x'";
                let Said::Rows(rows) = ours.run("alice", sql).await? else { bail!("no rows") };
                let number = |at: usize| rows[0][at].as_ref().context("a number")?.parse::<i64>().context("a number");
                let (count, distinct, sum) = (number(0)?, number(1)?, number(2)?);
                ensure!(count == distinct, "{count} rows have {distinct} keys");
                ensure!(count == KEYS, "{count} rows of {KEYS}");
                ensure!(sum >= last, "the sum went from {last} to {sum}: an old version came back");
                last = sum;
                times += 1;
            }
            anyhow::Ok(times)
        });
    }
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4_i64 {
        let ours = Arc::clone(&ours);
        writers.spawn(async move {
            for step in 0..60_i64 {
                let id = (step * 7 + writer * 10) % KEYS;
                // One statement that moves the newest version to the buffer, and one that deletes and inserts again what
                // nobody counts.
                ours.run("alice", &format!("UPDATE notes SET num = num + 1 WHERE id = {id}")).await?;
                let other = KEYS + writer;
                ours.run("alice", &format!("INSERT INTO notes VALUES ({other}, {step}, 'y')")).await?;
                ours.run("alice", &format!("DELETE FROM notes WHERE id = {other}")).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = writers.join_next().await {
        done??;
    }
    stop.cancel();
    while let Some(done) = background.join_next().await {
        ensure!(done?? > 3, "it ran beside the writers");
    }
    let Said::Rows(rows) = ours.run("alice", "SELECT count(*), sum(num) FROM notes").await? else { bail!("no rows") };
    ensure!(rows == [[Some(KEYS.to_string()), Some("240".to_owned())]], "{rows:?}");
    Ok(())
}
