//! SQL over stores that fail in the ways in which stores do, against a model: what was acknowledged is there, what was
//! refused is not, what is not known is there whole or not at all, and no answer is wrong or short.
//!
//! Users write to a table of each durability and move between storages, while all of it is flushed, compacted,
//! restarted, and read back after the loss of a volume. `KALAMDB_SEED` repeats a run, as far as threads allow;
//! `KALAMDB_STEPS`, in statements, makes it longer.

use std::collections::BTreeMap;
use std::future::ready;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use kalamdb_model::declared::StorageRoot;
use kalamdb_model::{Role, TableName, UserId};
use kalamdb_query_pod::auth::Identity;
use kalamdb_query_pod::engine::{CacheLimits, Caches, Engine};
use kalamdb_query_pod::error::{ApiError, Kind};
use kalamdb_query_pod::metrics::Metrics;
use kalamdb_query_pod::sql::{Request, Sql};
use kalamdb_table_store::{Credentials, FilesystemStore, open};
use kalamdb_test_support::fault_store::Rates;
use kalamdb_test_support::pod::eventually;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::Instant;

use crate::S3;
use crate::differential::{Said, said, sql_limits};
use crate::world::{PATIENCE, World, user};

const USERS: [&str; 3] = ["alice", "bob", "é/🙂"];
const STORAGES: [&str; 3] = ["home", "eu", "us"];
/// The rows of the second are stored before they are acknowledged.
static TABLES: [&str; 2] = ["messages", "ledger"];
/// Ids of rows are below this.
const IDS: i64 = 24;
/// Statements of each user in a phase.
const STATEMENTS: usize = 25;
/// How long a process may take to end.
const GRACE: Duration = Duration::from_secs(10);

fn manifests() -> String {
    let storage = |name: &str| {
        format!(
            "apiVersion: kalamdb.org/v1alpha1\nkind: Storage\nmetadata: {{name: {name}}}\nspec:\n  type: S3\n  \
             s3: {{bucket: bucket, prefix: {name}, endpoint: 'http://s3:1', allowHttp: true}}\n  \
             userTablesTemplate: users/{{userId}}/{{namespace}}/{{tableName}}\n  \
             sharedTablesTemplate: shared/{{namespace}}/{{tableName}}\n---\n"
        )
    };
    let table = |(name, durability): (&str, &str)| {
        let durability = format!("durability: {durability}");
        let more = ["useUserStorage: true", &durability, "flushPolicy: {rows: 30, interval: 1h}"];
        crate::table("UserTable", name, &["id, type: BIGINT, primaryKey: true", "body, type: TEXT"], &more)
    };
    let namespace =
        "apiVersion: kalamdb.org/v1alpha1\nkind: Namespace\nmetadata: {name: app}\nspec: {defaultStorage: home}\n";
    let tables = TABLES.into_iter().zip(["local", "objectStore"]).map(table).collect::<String>();
    format!("{}{namespace}{tables}", STORAGES.map(storage).concat())
}

/// How stores fail for a while: all of it a little, and some of it more.
fn weather(random: &mut StdRng) -> Rates {
    let fair = Rates {
        before: 0.03,
        after: 0.03,
        late: 0.02,
        conflict: 0.03,
        other: 0.03,
        slow: 0.05,
        hang: 0.01,
        short: 0.03,
        broken: 0.03,
    };
    match random.random_range(0..4) {
        0 => Rates { before: 0.15, after: 0.15, late: 0.05, conflict: 0.15, ..fair },
        1 => Rates { other: 0.08, short: 0.08, broken: 0.08, ..fair },
        2 => Rates { slow: 0.3, hang: 0.05, ..fair },
        _ => fair,
    }
}

type Rows = BTreeMap<i64, String>;

fn body(random: &mut StdRng) -> String {
    format!("{:08x}", random.random::<u32>()).repeat(if random.random_bool(0.1) { 200 } else { 1 })
}

/// A statement that writes.
enum Change {
    Insert(Rows),
    Upsert(Rows),
    /// Of the rows with these ids.
    Update(Range<i64>, String),
    Delete(Range<i64>),
}

impl Change {
    fn random(random: &mut StdRng) -> Self {
        let first = random.random_range(0..IDS - 4);
        let ids = first..first + [1, 1, 4][random.random_range(0..3)];
        let rows = ids.clone().map(|id| (id, body(random))).collect();
        match random.random_range(0..6) {
            0 => Self::Insert(rows),
            1..=3 => Self::Upsert(rows),
            4 => Self::Update(ids, body(random)),
            _ => Self::Delete(ids),
        }
    }

    fn sql(&self, table: &str) -> String {
        let insert = |rows: &Rows| {
            let rows: Vec<String> = rows.iter().map(|(id, body)| format!("({id}, '{body}')")).collect();
            format!("INSERT INTO {table} (id, body) VALUES {}", rows.join(", "))
        };
        // One row by its key, several by a query.
        let these = |ids: &Range<i64>| match ids.end - ids.start {
            1 => format!("id = {}", ids.start),
            _ => format!("id >= {} AND id < {}", ids.start, ids.end),
        };
        match self {
            Self::Insert(rows) => insert(rows),
            Self::Upsert(rows) => format!("{} ON CONFLICT (id) DO UPDATE SET body = excluded.body", insert(rows)),
            Self::Update(ids, body) => format!("UPDATE {table} SET body = '{body}' WHERE {}", these(ids)),
            Self::Delete(ids) => format!("DELETE FROM {table} WHERE {}", these(ids)),
        }
    }

    /// What becomes of `rows`, and how many of them the statement is said to change; `None` if a key is taken.
    fn applied(&self, rows: &Rows) -> Option<(Rows, usize)> {
        let mut after = rows.clone();
        let count = match self {
            Self::Insert(new) if new.keys().any(|id| rows.contains_key(id)) => return None,
            Self::Insert(new) | Self::Upsert(new) => {
                after.extend(new.clone());
                new.len()
            }
            Self::Update(ids, body) => {
                after.range_mut(ids.clone()).for_each(|(_, old)| old.clone_from(body));
                rows.range(ids.clone()).count()
            }
            Self::Delete(ids) => {
                after.retain(|id, _| !ids.contains(id));
                rows.len() - after.len()
            }
        };
        Some((after, count))
    }
}

/// A statement that reads.
enum Query {
    ByKey(i64),
    All,
    Count,
    /// Of rows with ids below this.
    Bounds(i64),
    /// The last ids of rows with bodies not below this.
    Last(String),
}

impl Query {
    fn random(random: &mut StdRng) -> Self {
        match random.random_range(0..6) {
            0 | 1 => Self::ByKey(random.random_range(0..IDS)),
            2 => Self::Count,
            3 => Self::Bounds(random.random_range(0..IDS)),
            4 => Self::Last(body(random)),
            _ => Self::All,
        }
    }

    fn sql(&self, table: &str) -> String {
        match self {
            Self::ByKey(id) => format!("SELECT id, body FROM {table} WHERE id = {id}"),
            Self::All => format!("SELECT id, body FROM {table} ORDER BY id"),
            Self::Count => format!("SELECT count(*) FROM {table}"),
            Self::Bounds(end) => format!("SELECT count(*), min(body), max(id) FROM {table} WHERE id < {end}"),
            Self::Last(least) => format!("SELECT id FROM {table} WHERE body >= '{least}' ORDER BY id DESC LIMIT 3"),
        }
    }

    fn answer(&self, rows: &Rows) -> Said {
        let row = |(id, body): (&i64, &String)| vec![Some(id.to_string()), Some(body.clone())];
        Said::Rows(match self {
            Self::ByKey(id) => rows.get_key_value(id).map(row).into_iter().collect(),
            Self::All => rows.iter().map(row).collect(),
            Self::Count => vec![vec![Some(rows.len().to_string())]],
            Self::Bounds(end) => {
                let below = || rows.range(..*end);
                let (least, last) = (below().map(|(_, body)| body.clone()).min(), below().next_back());
                vec![vec![Some(below().count().to_string()), least, last.map(|(id, _)| id.to_string())]]
            }
            Self::Last(least) => {
                let found = rows.iter().rev().filter(|(_, body)| *body >= least).take(3);
                found.map(|(id, _)| vec![Some(id.to_string())]).collect()
            }
        })
    }
}

/// Checks that an error tells of stores that fail, and of nothing else.
fn is_of_stores(error: &ApiError) -> anyhow::Result<()> {
    let is = matches!(error.kind, Kind::Unavailable | Kind::Busy) && error.code != "NOT_OWNER";
    ensure!(is, "{}: {}", error.code, error.message);
    Ok(())
}

/// What a table of a user may hold: more than one thing as long as the outcome of a statement is not known.
#[derive(Clone, Debug)]
struct Model(Vec<Rows>);

impl Model {
    /// Takes note of what a statement was answered with.
    fn note(&mut self, change: &Change, outcome: Result<Said, ApiError>) -> anyhow::Result<()> {
        let told = format!("{outcome:?}");
        let after: Vec<Option<(Rows, usize)>> = self.0.iter().map(|rows| change.applied(rows)).collect();
        let possible: Vec<Rows> = match outcome {
            Ok(Said::Changed(count)) => {
                after.into_iter().flatten().filter(|(_, changed)| *changed == count).map(|(rows, _)| rows).collect()
            }
            Ok(other) => bail!("it was answered with {other:?}"),
            Err(error) if error.code == "DUPLICATE_KEY" => {
                self.0.iter().zip(after).filter(|(_, after)| after.is_none()).map(|(rows, _)| rows.clone()).collect()
            }
            Err(error) if ["OUTCOME_UNKNOWN", "WRITE_FAILED"].contains(&error.code) => {
                let mut both = self.0.clone();
                both.extend(after.into_iter().flatten().map(|(rows, _)| rows));
                both.dedup();
                both
            }
            Err(error) => {
                is_of_stores(&error)?;
                return Ok(());
            }
        };
        ensure!(!possible.is_empty(), "it was answered with {told}, and there may be {self:?}");
        self.0 = possible;
        Ok(())
    }

    fn check(&self, query: &Query, said: &Said) -> anyhow::Result<()> {
        let fits = self.0.iter().any(|rows| query.answer(rows) == *said);
        ensure!(fits, "it was answered with {said:?}, and there may be {self:?}");
        Ok(())
    }

    fn is_known(&self) -> bool {
        self.0.len() == 1
    }
}

/// What the tables of one user may hold.
type Tables = [Model; 2];

/// A process, and SQL on it.
struct Process {
    engine: Arc<Engine>,
    sql: Sql,
}

impl Process {
    async fn start(world: &World, cached: bool) -> anyhow::Result<Arc<Self>> {
        let deadline = Instant::now() + PATIENCE;
        let engine = loop {
            match world.open_with(&manifests()) {
                Ok((engine, _)) => break engine,
                // What the last one had under way may still hold the folder.
                Err(error) => ensure!(Instant::now() < deadline, "{error:#}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        if cached {
            let limits = CacheLimits { cache_memory_bytes: 8 << 20, cache_disk_bytes: 0 };
            engine.storages().set_caches(Caches::open(world.dir.path(), &limits, 0).await);
        }
        let sql = Sql::new(Arc::clone(&engine), sql_limits(), Arc::new(Metrics::default()))?;
        Ok(Arc::new(Self { engine, sql }))
    }

    async fn run(&self, user: &str, role: Role, sql: &str) -> anyhow::Result<Result<Said, ApiError>> {
        let identity = Identity { user: UserId::new(user)?, role };
        let request = Request { identity: &identity, sql, params: &[], namespace: Some("app") };
        match self.sql.run(&request).await {
            Ok(answer) => Ok(Ok(said(&answer.into_pieces(0.0, ()).concat())?)),
            Err(error) => Ok(Err(error)),
        }
    }

    /// What a query says, as soon as the stores let it.
    async fn answered(&self, user: &str, sql: &str) -> anyhow::Result<Said> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.run(user, Role::User, sql).await? {
                Ok(said) => return Ok(said),
                Err(error) => {
                    is_of_stores(&error)?;
                    ensure!(Instant::now() < deadline, "{sql}: {error}");
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until the streams have every row. Only over stores that work.
    async fn ship_all(&self) -> anyhow::Result<()> {
        eventually("all rows are shipped", async || Ok(self.engine.unshipped_bytes() == 0)).await?;
        // What was taken for a stream is in it when that answers again.
        Ok(self.engine.open_known_streams(PATIENCE).await?)
    }

    /// Sends a user's rows to a storage.
    async fn send(&self, user: &str, storage: &str) -> anyhow::Result<Result<Said, ApiError>> {
        let sql = format!(
            "UPDATE system.users SET storage_mode = 'region', storage_id = '{storage}' WHERE username = '{user}'"
        );
        self.run("root", Role::Dba, &sql).await
    }

    /// In which storage a user's rows of a table are.
    async fn place(&self, name: &str, table: &str) -> anyhow::Result<String> {
        let table = TableName::parse(&format!("app.{table}"))?;
        let table = self.engine.catalog().current().table(&table).context("the table")?.clone();
        Ok(self.engine.read(&table, &user(name)?, vec![0], None).await?.root.storage.to_string())
    }
}

/// A user reads his tables, and writes to those in `written`.
async fn work(
    process: Arc<Process>,
    user: &'static str,
    mut tables: Tables,
    written: &'static [&'static str],
    seed: u64,
) -> anyhow::Result<Tables> {
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..STATEMENTS {
        let at = random.random_range(0..TABLES.len());
        let (table, model) = (TABLES[at], &mut tables[at]);
        // What is not known yet is left alone: it may still happen.
        if written.contains(&table) && model.is_known() && random.random_bool(0.6) {
            let change = Change::random(&mut random);
            let sql = change.sql(table);
            let outcome = process.run(user, Role::User, &sql).await?;
            model.note(&change, outcome).with_context(|| format!("{user}: {sql}"))?;
        } else {
            let query = Query::random(&mut random);
            let sql = query.sql(table);
            let checked = match process.run(user, Role::User, &sql).await? {
                Ok(said) => model.check(&query, &said),
                Err(error) => is_of_stores(&error),
            };
            checked.with_context(|| format!("{user}: {sql}"))?;
        }
    }
    Ok(tables)
}

/// Flushes, compacts and moves what there is.
async fn tidy(process: Arc<Process>, seed: u64) -> anyhow::Result<()> {
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..6 {
        let table = TABLES[random.random_range(0..TABLES.len())];
        let outcome = match random.random_range(0..5) {
            0 | 1 => process.run("root", Role::Dba, &format!("STORAGE FLUSH TABLE app.{table}")).await?,
            2 => process.run("root", Role::Dba, &format!("STORAGE COMPACT TABLE app.{table}")).await?,
            _ => {
                let (user, storage) = (random.random_range(0..USERS.len()), random.random_range(0..STORAGES.len()));
                process.send(USERS[user], STORAGES[storage]).await?
            }
        };
        if let Err(error) = outcome {
            is_of_stores(&error)?;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// All users at work at once.
async fn phase(
    process: &Arc<Process>,
    all: &mut [Tables],
    written: &'static [&'static str],
    random: &mut StdRng,
    meanwhile: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let mut users = Vec::new();
    for (user, tables) in USERS.into_iter().zip(all.iter()) {
        users.push(tokio::spawn(work(Arc::clone(process), user, tables.clone(), written, random.random())));
    }
    let tidying = (!written.is_empty()).then(|| tokio::spawn(tidy(Arc::clone(process), random.random())));
    meanwhile.await;
    for (tables, user) in all.iter_mut().zip(users) {
        *tables = user.await??;
    }
    match tidying {
        Some(tidying) => tidying.await?,
        None => Ok(()),
    }
}

/// Finds out what came of statements whose outcome was not known: over stores that work, all of it is decided when the
/// streams are open.
async fn settle(process: &Process, all: &mut [Tables]) -> anyhow::Result<()> {
    process.engine.open_known_streams(PATIENCE).await?;
    for (user, tables) in USERS.into_iter().zip(all) {
        for (table, model) in TABLES.into_iter().zip(tables) {
            let found = process.answered(user, &Query::All.sql(table)).await?;
            model.check(&Query::All, &found).with_context(|| format!("{table} of {user}"))?;
            model.0.retain(|rows| Query::All.answer(rows) == found);
            model.0.truncate(1);
        }
    }
    Ok(())
}

/// Checks what every other way of asking says.
async fn agree(process: &Process, all: &[Tables]) -> anyhow::Result<()> {
    for (user, tables) in USERS.into_iter().zip(all) {
        for (table, model) in TABLES.into_iter().zip(tables) {
            for query in (0..IDS).map(Query::ByKey).chain([Query::Count, Query::Bounds(IDS / 2), Query::Bounds(IDS)]) {
                let sql = query.sql(table);
                let found = process.answered(user, &sql).await?;
                model.check(&query, &found).with_context(|| format!("{user}: {sql}"))?;
            }
        }
    }
    Ok(())
}

/// The life of a process, up to its end or the loss of its volume.
async fn turn(
    world: &mut World,
    all: &mut [Tables],
    random: &mut StdRng,
    rates: Rates,
    loses_volume: bool,
) -> anyhow::Result<()> {
    let clear = Rates::default();
    world.set_rates(rates);
    let process = Process::start(world, random.random()).await?;
    // Streams begin, and storages are read back, over stores that fail; users may look already.
    let clearing = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        world.set_rates(clear);
    };
    phase(&process, all, &[], random, clearing).await.context("at the start")?;
    settle(&process, all).await.context("after the start")?;
    world.set_rates(rates);
    let mut written = &TABLES[..];
    if loses_volume {
        phase(&process, all, written, random, ready(())).await?;
        world.set_rates(clear);
        process.ship_all().await?;
        world.set_rates(rates);
        // From now on only rows that nothing may lose.
        written = &TABLES[1..];
    }
    let cut_off = random.random_bool(0.5).then(|| Duration::from_millis(random.random_range(50..600)));
    let ending = async {
        if let Some(after) = cut_off {
            tokio::time::sleep(after).await;
            process.engine.close(GRACE).await;
        }
    };
    phase(&process, all, written, random, ending).await?;
    process.engine.close(GRACE).await;
    ensure!(process.engine.disowned().is_none(), "{:?}", process.engine.disowned());
    drop(process);
    if loses_volume {
        drop(world.lose_volume()?);
    } else {
        world.keep_volume();
    }
    Ok(())
}

/// Everything is there at last, with its volume and without, and everybody gets where he is sent.
async fn end(world: &mut World, all: &mut [Tables]) -> anyhow::Result<()> {
    world.set_rates(Rates::default());
    for _ in 0..2 {
        let process = Process::start(world, true).await?;
        settle(&process, all).await?;
        agree(&process, all).await?;
        process.ship_all().await?;
        process.engine.close(GRACE).await;
        drop(process);
        world.lose_volume()?;
    }
    let process = Process::start(world, false).await?;
    settle(&process, all).await?;
    for user in USERS {
        ensure!(process.send(user, "us").await?.is_ok());
    }
    for (user, tables) in USERS.into_iter().zip(all.iter()) {
        for (table, _) in TABLES.into_iter().zip(tables).filter(|(_, model)| !model.0[0].is_empty()) {
            let arrived = async || Ok(process.place(user, table).await.is_ok_and(|place| place == "us"));
            eventually("the rows are in their new storage", arrived).await?;
        }
    }
    agree(&process, all).await?;
    process.engine.close(GRACE).await;
    Ok(())
}

/// So many turns, unless `KALAMDB_STEPS` says otherwise, over stores in `truth`.
async fn run(truth: Arc<dyn ObjectStore>, weather: fn(&mut StdRng) -> Rates, turns: u64) -> anyhow::Result<()> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>()).transpose();
    let seed = number("KALAMDB_SEED")?.unwrap_or_else(rand::random);
    let of_turn = u64::try_from(USERS.len() * STATEMENTS)?;
    let turns = number("KALAMDB_STEPS")?.map_or(turns, |steps| steps.div_ceil(of_turn));
    println!("seed {seed}, {turns} turns (KALAMDB_SEED, KALAMDB_STEPS)");
    let mut random = StdRng::seed_from_u64(seed);
    let mut world = World::over(truth, seed, Rates::default())?;
    let mut all: [Tables; 3] = USERS.map(|_| TABLES.map(|_| Model(vec![Rows::new()])));
    for at in 0..turns {
        let rates = weather(&mut random);
        let turn = turn(&mut world, &mut all, &mut random, rates, at % 2 == 1);
        Box::pin(turn).await.with_context(|| format!("seed {seed}, turn {at}"))?;
    }
    Box::pin(end(&mut world, &mut all)).await.with_context(|| format!("seed {seed}, at the end"))?;
    let faults: u64 = world.tally().values().sum();
    println!("{faults} faults: {:?}", world.tally());
    let fails = weather(&mut random).other > 0.0;
    ensure!(faults > 30 || !fails, "the stores did not fail, so nothing was tested");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_users_do_while_they_wander_is_neither_lost_nor_doubled() -> anyhow::Result<()> {
    run(Arc::new(InMemory::new()), |_| Rates::default(), 4).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_failing_stores_statements_are_whole_or_not_there_and_no_answer_is_wrong() -> anyhow::Result<()> {
    run(Arc::new(InMemory::new()), weather, 4).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_a_failing_folder_statements_are_whole_or_not_there_and_no_answer_is_wrong() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    run(Arc::new(FilesystemStore::open(folder.path())?), weather, 2).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_a_failing_s3_server_statements_are_whole_or_not_there_and_no_answer_is_wrong() -> anyhow::Result<()> {
    let Some(S3 { endpoint, bucket, access_key, secret_key }) = S3::find()? else { return Ok(()) };
    let root = StorageRoot::S3 {
        bucket,
        prefix: format!("pod/{:016x}", rand::random::<u64>()),
        region: Some("us-east-1".to_owned()),
        endpoint: Some(endpoint),
        path_style: true,
        allow_http: true,
    };
    let keys = [("accessKeyId", access_key), ("secretAccessKey", secret_key)];
    let credentials = Credentials::new(keys.map(|(key, value)| (key.to_owned(), value)).into());
    run(open(&root, Some(&credentials), Path::new("/"))?, weather, 2).await
}
