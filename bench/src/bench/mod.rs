//! `bench`: figures of one server, each with what it was measured on, and beside them those of PostgreSQL, DataFusion and
//! the Parquet writer from the same run. Bounded in time; slow is a figure, wrong is an error.

mod crowd;
mod machine;
mod measure;
mod postgres;
mod raw;
mod rows;
mod scans;
mod server;
mod sides;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use datafusion::prelude::SessionContext;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kalamdb_model::{Role, UserId};
use kalamdb_table_store::paths;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

use crate::client::Client;
use crate::progress::Progress;
use crate::token::{SecretArgs, Signer};
use measure::{Bounds, Measured, repeat};
use postgres::Postgres;
use rows::{insert_sql, mix, params, payload};
use scans::{DEAD_SQL, SCANS, Scan, is_dead};
use server::Server;
use sides::Sides;

/// Clients of the write measurements.
const CLIENTS: u32 = 64;
/// Statements at once while the cold rows are loaded.
const LOADERS: usize = 4;
/// Rows in the buffer for the hot point reads.
const HOT_ROWS: u64 = 10_000;
/// Rows of each timed flush, and how many there are.
const FLUSH_ROWS: u64 = 100_000;
const FLUSHES: u64 = 3;
/// Most runs of a query over all cold rows.
const SCANS_MAX: u64 = 50;
/// What is promised of them, beside DataFusion.
const SCAN_TARGET: &str = "<= 1.2x, < 100 ms";
/// Rows that a DELETE looks at.
const DELETE_ROWS: usize = 100_000;
/// How long a busy server is asked again.
const PATIENCE: Duration = Duration::from_secs(60);

/// Flags of `bench`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// A running server with the tables of `bench/manifests`; default: an own one, in a folder that is removed afterwards.
    #[arg(long)]
    url: Option<String>,
    /// Where the secret of the running server is.
    #[command(flatten)]
    secret: SecretArgs,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    seconds: u64,
    /// Cold rows.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    cold_rows: u64,
    /// Rows of a statement while they are loaded.
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    cold_statement_rows: u64,
    /// Longest load of the cold rows, seconds; what is loaded by then is measured.
    #[arg(long, default_value_t = 300)]
    load_secs_max: u64,
    /// Where the own server's folder is made; a disk, if figures of durable writes shall mean something.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// Users with 100 unflushed rows each, for memory and the start after a crash.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=40_000))]
    users: u64,
}

/// One run against one server.
struct Bench {
    client: Arc<Client>,
    signer: Signer,
    seconds: Duration,
    /// Users and keys of this run, so that runs against one server do not meet.
    run: u64,
    /// Root of the own server's files.
    files: Option<PathBuf>,
    postgres: Option<Postgres>,
}

/// Inserts of one measurement.
#[derive(Clone, Copy)]
struct Inserts {
    name: &'static str,
    clients: u32,
    /// Client `n` writes as user `n % users`.
    users: u32,
    rows_each: u64,
    own_keys: bool,
}

/// Runs all measurements and prints them.
///
/// # Errors
/// If the server refuses, does not answer or answers wrongly; never because it is slow.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    // What was started and made goes with its values: they must be dropped, whatever ends the run.
    tokio::select! {
        done = Box::pin(measure_all(args)) => done,
        stopped = stop_signal() => {
            stopped?;
            anyhow::bail!("interrupted")
        }
    }
}

async fn stop_signal() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

async fn measure_all(args: &Args) -> anyhow::Result<()> {
    let mut sides = Sides::default();
    Box::pin(measure_one(args, &mut sides)).await?;
    if args.url.is_some() {
        println!("left out, as they need a server of our own: memory of many users, a crash, what others do");
    } else {
        Box::pin(crowd::measure(&args.dir, args.users, &mut sides)).await?;
    }
    sides.print();
    Ok(())
}

async fn measure_one(args: &Args, sides: &mut Sides) -> anyhow::Result<()> {
    let own = if args.url.is_some() { None } else { Some(Server::start(&args.dir).await?) };
    let url = args.url.as_deref().or(own.as_ref().map(Server::url)).unwrap_or_default();
    let signer = own.as_ref().map_or_else(|| args.secret.signer(), Server::signer)?;
    let run = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
    let client = Arc::new(Client::new(url, PATIENCE)?);
    let seconds = Duration::from_secs(args.seconds);
    let files = own.as_ref().map(Server::files);
    let mut bench = Bench { client, signer, seconds, run, files, postgres: None };
    bench.check_tables().await?;

    machine::print();
    if own.is_some() {
        println!(
            "disk:    {:.3} ms for 4 KiB with fdatasync in {}",
            machine::sync_millis(&args.dir)?,
            args.dir.display()
        );
        bench.postgres = start_postgres(args).await;
    }
    println!("\n{:<58} {:>14} {:>9} {:>9} {:>9}", "", "per second", "p50 ms", "p99 ms", "n");
    Box::pin(bench.writes(sides)).await?;
    Box::pin(bench.hot_reads(sides)).await?;
    bench.postgres = None;
    Box::pin(bench.flushes(sides)).await?;
    let memory = |when: &str| {
        if let Some(bytes) = own.as_ref().and_then(Server::resident_bytes) {
            println!("{:<58} {:>10} MiB", format!("resident memory of the server {when}"), bytes >> 20);
        }
    };
    memory("before the cold rows");
    let loaded = Box::pin(bench.load_cold(args)).await?;
    memory("after their load");
    Box::pin(bench.cold_reads(loaded, sides)).await?;
    memory("at the end");
    println!("{:<58} {:>14}", "requests sent again because the server was busy", bench.client.repeated());
    Ok(())
}

/// PostgreSQL, if there is one; without it nothing is compared with it, and all else is measured.
async fn start_postgres(args: &Args) -> Option<Postgres> {
    match Postgres::start(&args.dir).await {
        Ok(Some(postgres)) => {
            println!("beside:  PostgreSQL {}, default settings, TCP, prepared statements", postgres.version());
            return Some(postgres);
        }
        Ok(None) => println!("beside:  no PostgreSQL 15 is installed; to compare with it: {}", postgres::INSTALL),
        Err(error) => println!("beside:  PostgreSQL is left out: {error:#}"),
    }
    None
}

fn show(what: &str, rows_each: u64, measured: &Measured) {
    let factor = f64::from(u32::try_from(rows_each).unwrap_or(u32::MAX));
    println!(
        "{what:<58} {:>14.0} {:>9.2} {:>9.2} {:>9}",
        measured.per_second() * factor,
        measured.millis_at(0.5),
        measured.millis_at(0.99),
        measured.operations()
    );
}

/// Prints rows per second, and returns them.
fn once(what: &str, rows: u64, elapsed: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "shown without digits")]
    let per_second = rows as f64 / elapsed.as_secs_f64().max(f64::EPSILON);
    println!("{what:<58} {per_second:>14.0} {:>9} {:>9} {rows:>9}", "", "");
    per_second
}

impl Bench {
    /// Prints what `measuring` measured, and whether the server was too busy for some of it: a request that is sent again
    /// waits for a second or more, which is no figure of the server's.
    async fn row(
        &self,
        what: &str,
        rows_each: u64,
        measuring: impl Future<Output = anyhow::Result<Measured>>,
    ) -> anyhow::Result<Measured> {
        let before = self.client.repeated();
        let measured = measuring.await?;
        show(what, rows_each, &measured);
        let again = self.client.repeated() - before;
        if again > 0 {
            println!("  (with waits: {again} requests were sent again because the server was busy)");
        }
        Ok(measured)
    }

    /// Prints what PostgreSQL does, where there is one. Its failure is none of ours.
    async fn beside(
        &self,
        rows_each: u64,
        measuring: impl AsyncFnOnce(&Postgres) -> anyhow::Result<Measured>,
    ) -> Option<Measured> {
        match measuring(self.postgres.as_ref()?).await {
            Ok(measured) => {
                show("  the same, PostgreSQL", rows_each, &measured);
                Some(measured)
            }
            Err(error) => {
                println!("  (PostgreSQL is left out: {error:#})");
                None
            }
        }
    }

    fn bounds(&self, clients: u32) -> Bounds {
        Bounds { clients, duration: self.seconds, operations_max: 10_000_000 }
    }

    fn user(&self, name: &str) -> anyhow::Result<UserId> {
        Ok(UserId::new(format!("bench-{}-{name}", self.run))?)
    }

    fn token(&self, name: &str) -> anyhow::Result<Arc<str>> {
        Ok(self.signer.token(&self.user(name)?, Role::User)?.into())
    }

    /// The folder of one user's part of a table, where the server is our own.
    fn folder(&self, name: &str, table: &str) -> anyhow::Result<Option<PathBuf>> {
        let Some(files) = &self.files else { return Ok(None) };
        let user = paths::encode_user(&self.user(name)?);
        Ok(Some(files.join("users").join(user).join("bench").join(table)))
    }

    async fn check_tables(&self) -> anyhow::Result<()> {
        let token = self.token("check")?;
        for table in ["bench.hot", "bench.cold"] {
            let answer = self.client.sql(&token, &format!("SELECT count(*) FROM {table}"), &[]).await;
            answer.with_context(|| format!("cannot read `{table}`; apply bench/manifests/bench.yaml to the server"))?;
        }
        Ok(())
    }

    async fn inserts(&self, inserts: Inserts) -> anyhow::Result<Measured> {
        let Inserts { name, clients, users, rows_each, own_keys } = inserts;
        let client = Arc::clone(&self.client);
        let tokens: Arc<[Arc<str>]> =
            (0..users).map(|user| self.token(&format!("{name}-{user}"))).collect::<anyhow::Result<_>>()?;
        let sql: Arc<str> = if own_keys {
            insert_sql("bench.hot", rows_each).into()
        } else {
            "INSERT INTO bench.hot (payload) VALUES ($1)".into()
        };
        repeat(self.bounds(clients), move |number, turn| {
            let (client, sql) = (Arc::clone(&client), Arc::clone(&sql));
            let token = Arc::clone(&tokens[(number % users) as usize]);
            async move {
                let first = (u64::from(number) << 40) + turn * rows_each;
                let params = if own_keys { params(first, rows_each) } else { vec![payload(first).into()] };
                let answer = client.sql(&token, &sql, &params).await?;
                anyhow::ensure!(answer.row_count == rows_each, "{rows_each} rows sent, {} written", answer.row_count);
                Ok(())
            }
        })
        .await
        .with_context(|| format!("failed to insert ({name})"))
    }

    async fn writes(&self, sides: &mut Sides) -> anyhow::Result<()> {
        let many = Inserts { name: "many", clients: CLIENTS, users: CLIENTS, rows_each: 1, own_keys: true };
        let one = Inserts { name: "one", users: 1, ..many };
        let alone = Inserts { name: "alone", clients: 1, ..one };
        let hundred = Inserts { name: "hundred", rows_each: 100, ..many };
        self.writes_beside("durable INSERT of 1 row, 64 clients, 64 users", many, ">= 1x", sides).await?;
        self.writes_beside("durable INSERT of 1 row, 1 client", alone, "", sides).await?;
        self.writes_beside("rows by INSERT of 100 rows, 64 clients, 64 users", hundred, ">= 5x", sides).await?;
        let generated = Inserts { name: "generated", own_keys: false, ..many };
        self.row("durable INSERT, keys generated, 64 clients, 64 users", 1, self.inserts(generated)).await?;
        self.row("durable INSERT of 1 row, 64 clients, one user", 1, self.inserts(one)).await?;
        let generated = Inserts { name: "one-generated", own_keys: false, ..one };
        self.row("  the same, keys generated", 1, self.inserts(generated)).await?;
        Ok(())
    }

    async fn writes_beside(
        &self,
        what: &str,
        inserts: Inserts,
        target: &'static str,
        sides: &mut Sides,
    ) -> anyhow::Result<()> {
        let Inserts { clients, rows_each, .. } = inserts;
        let ours = self.row(what, rows_each, self.inserts(inserts)).await?;
        let theirs = self.beside(rows_each, async |other| other.inserts(self.bounds(clients), rows_each).await).await;
        #[expect(clippy::cast_precision_loss, reason = "1 or 100")]
        let rows = |measured: &Measured| measured.per_second() * rows_each as f64;
        let theirs = theirs.as_ref().map(|theirs| ("PostgreSQL", rows(theirs)));
        sides.add(format!("{what}, a second"), rows(&ours), theirs, target);
        Ok(())
    }

    async fn hot_reads(&self, sides: &mut Sides) -> anyhow::Result<()> {
        let token = self.token("hot")?;
        self.insert_range(&token, "bench.hot", 0, HOT_ROWS).await?;
        let what = "point SELECT of a hot row, 1 client";
        let ours = self.row(what, 1, self.point_reads(&token, "bench.hot", HOT_ROWS, 1)).await?;
        let theirs = self.beside(1, async |other| other.point_reads(self.bounds(1), HOT_ROWS).await).await;
        let theirs = theirs.map(|theirs| ("PostgreSQL", theirs.millis_at(0.5)));
        sides.add(format!("{what}, p50 ms"), ours.millis_at(0.5), theirs, "<= 0.3 ms");
        let what = "point SELECT of a hot row, 64 clients";
        let ours = self.row(what, 1, self.point_reads(&token, "bench.hot", HOT_ROWS, CLIENTS)).await?;
        let theirs = self.beside(1, async |other| other.point_reads(self.bounds(CLIENTS), HOT_ROWS).await).await;
        let theirs = theirs.map(|theirs| ("PostgreSQL", theirs.per_second()));
        sides.add(format!("{what}, a second"), ours.per_second(), theirs, "");
        Ok(())
    }

    /// Reads rows of `0..rows` by key, in random order, and checks each.
    async fn point_reads(&self, token: &Arc<str>, table: &str, rows: u64, clients: u32) -> anyhow::Result<Measured> {
        let (client, token) = (Arc::clone(&self.client), Arc::clone(token));
        let sql: Arc<str> = format!("SELECT payload FROM {table} WHERE id = $1").into();
        repeat(self.bounds(clients), move |number, turn| {
            let (client, sql, token) = (Arc::clone(&client), Arc::clone(&sql), Arc::clone(&token));
            async move {
                let id = mix((u64::from(number) << 40) + turn) % rows;
                let answer = client.sql(&token, &sql, &[Value::from(id)]).await?;
                let right = answer.rows.len() == 1 && answer.rows[0] == [Value::from(payload(id))];
                anyhow::ensure!(right, "the answer for id {id} is wrong: {:?}", answer.rows);
                Ok(())
            }
        })
        .await
        .with_context(|| format!("failed to read from `{table}`"))
    }

    /// Times `STORAGE FLUSH` of one user's rows, a few times, and the encoding alone of the same rows.
    async fn flushes(&self, sides: &mut Sides) -> anyhow::Result<()> {
        let (mut elapsed, mut encoding) = (Duration::ZERO, Duration::ZERO);
        for turn in 0..FLUSHES {
            let name = format!("flush-{turn}");
            let token = self.token(&name)?;
            self.insert_range(&token, "bench.hot", 0, FLUSH_ROWS).await?;
            let started = Instant::now();
            let answer =
                self.client.sql(&token, "STORAGE FLUSH TABLE bench.hot", &[]).await.context("failed to flush")?;
            elapsed += started.elapsed();
            anyhow::ensure!(answer.row_count == FLUSH_ROWS, "{FLUSH_ROWS} rows to flush, {} flushed", answer.row_count);
            for path in self.live_files(&name, "hot")? {
                encoding += tokio::task::spawn_blocking(move || raw::encoding(&path)).await??;
            }
        }
        let (what, rows) = (format!("flushed rows, {FLUSHES} x {FLUSH_ROWS} rows of one user"), FLUSHES * FLUSH_ROWS);
        let ours = once(&what, rows, elapsed);
        let theirs = self.files.as_ref().map(|_| once("  the same rows, Parquet encoding alone", rows, encoding));
        let theirs = theirs.map(|theirs| ("Parquet writer", theirs));
        sides.add(format!("{what}, a second"), ours, theirs, ">= 0.8x");
        Ok(())
    }

    /// The files of one user's part of a table, where the server is our own.
    fn live_files(&self, name: &str, table: &str) -> anyhow::Result<Vec<PathBuf>> {
        let (Some(root), Some(folder)) = (&self.files, self.folder(name, table)?) else { return Ok(Vec::new()) };
        Ok(raw::files(&folder)?.iter().map(|file| root.join(&file.path)).collect())
    }

    async fn insert_range(&self, token: &str, table: &str, first: u64, count: u64) -> anyhow::Result<()> {
        const ROWS: u64 = 5_000;
        let statements = (first..first + count).step_by(usize::try_from(ROWS)?);
        let inserted = stream::iter(statements).map(async |start| {
            let rows = ROWS.min(first + count - start);
            self.client.sql(token, &insert_sql(table, rows), &params(start, rows)).await.map(|_| ())
        });
        inserted
            .buffer_unordered(LOADERS)
            .try_collect::<()>()
            .await
            .with_context(|| format!("failed to load `{table}`"))
    }

    /// Loads one user's cold rows, flushes the last ones, and returns how many there are.
    async fn load_cold(&self, args: &Args) -> anyhow::Result<u64> {
        let token = self.token("cold")?;
        let progress = Progress::start("cold rows loaded", args.cold_rows);
        let started = Instant::now();
        let (step, limit) = (args.cold_statement_rows * LOADERS as u64, Duration::from_secs(args.load_secs_max));
        let mut loaded = 0;
        while loaded < args.cold_rows && started.elapsed() < limit {
            let now = step.min(args.cold_rows - loaded);
            let starts = (loaded..loaded + now).step_by(usize::try_from(args.cold_statement_rows)?);
            let end = loaded + now;
            let statements = stream::iter(starts).map(async |start| {
                let rows = args.cold_statement_rows.min(end - start);
                self.client.sql(&token, &insert_sql("bench.cold", rows), &params(start, rows)).await.map(|_| ())
            });
            statements.buffer_unordered(LOADERS).try_collect::<()>().await.context("failed to load the cold rows")?;
            loaded = end;
            progress.advance(now);
        }
        let elapsed = progress.finish();
        let each = args.cold_statement_rows;
        once(&format!("rows loaded by INSERT of {each} rows, one user, flushing"), loaded, elapsed);
        if loaded < args.cold_rows {
            println!("  (stopped after {} s; {} rows were asked for)", limit.as_secs(), args.cold_rows);
        }
        // One more: a flush with nothing to do would not describe the files, where they are looked up afterwards.
        self.insert_range(&token, "bench.cold", loaded, 1).await?;
        self.client.sql(&token, "STORAGE FLUSH TABLE bench.cold", &[]).await.context("failed to flush")?;
        Ok(loaded + 1)
    }

    async fn cold_reads(&self, rows: u64, sides: &mut Sides) -> anyhow::Result<()> {
        let token = self.token("cold")?;
        let files = self.live_files("cold", "cold")?;
        let plain = if files.is_empty() { None } else { Some(Box::pin(raw::open(&files)).await?) };
        let mut medians = Vec::new();
        for scan in &SCANS {
            let what = format!("{} over {rows} cold rows", scan.what);
            let ours = self.row(&what, 1, self.scans(&token, scan, 0..rows)).await?;
            let theirs = match &plain {
                Some(plain) => Some(self.plain_scans(plain, scan, rows).await?.millis_at(0.5)),
                None => None,
            };
            let other = theirs.map(|median| ("DataFusion, same files", median));
            sides.add(format!("{what}, p50 ms"), ours.millis_at(0.5), other, SCAN_TARGET);
            medians.push(theirs);
        }
        let reads = |clients| self.point_reads(&token, "bench.cold", rows, clients);
        self.row("point SELECT of a cold row, 1 client", 1, reads(1)).await?;
        self.row("point SELECT of a cold row, 8 clients", 1, reads(8)).await?;
        self.delete_some(&token, rows).await?;
        for (scan, theirs) in SCANS.iter().zip(medians) {
            let what = format!("{} over {rows} cold rows, 9.9 % dead", scan.what);
            let live = (0..rows).filter(|id| !is_dead(*id));
            let ours = self.row(&what, 1, self.scans(&token, scan, live)).await?;
            // DataFusion knows nothing of dead rows: what it took for all of them is what is compared with.
            let other = theirs.map(|median| ("DataFusion, none dead", median));
            sides.add(format!("{what}, p50 ms"), ours.millis_at(0.5), other, SCAN_TARGET);
        }
        Ok(())
    }

    /// Repeats `scan` over the cold rows, which are `ids`.
    async fn scans(&self, token: &Arc<str>, scan: &Scan, ids: impl Iterator<Item = u64>) -> anyhow::Result<Measured> {
        let (client, token) = (Arc::clone(&self.client), Arc::clone(token));
        let sql: Arc<str> = scan.sql("bench.cold").into();
        let expected: Vec<Vec<Value>> =
            scan.answer(ids).into_iter().map(|row| row.into_iter().map(Value::from).collect()).collect();
        let expected = Arc::new(expected);
        repeat(Bounds { operations_max: SCANS_MAX, ..self.bounds(1) }, move |_, _| {
            let (client, sql, token) = (Arc::clone(&client), Arc::clone(&sql), Arc::clone(&token));
            let expected = Arc::clone(&expected);
            async move {
                let answer = client.sql(&token, &sql, &[]).await?;
                anyhow::ensure!(answer.rows == *expected, "`{sql}` says {:?}, not {expected:?}", answer.rows);
                Ok(())
            }
        })
        .await
        .with_context(|| format!("failed to scan ({})", scan.what))
    }

    /// The same by DataFusion alone, over `0..rows`.
    async fn plain_scans(&self, plain: &SessionContext, scan: &Scan, rows: u64) -> anyhow::Result<Measured> {
        let plain = plain.clone();
        let sql: Arc<str> = scan.sql(raw::TABLE).into();
        let expected = Arc::new(scan.answer(0..rows));
        let measured = repeat(Bounds { operations_max: SCANS_MAX, ..self.bounds(1) }, move |_, _| {
            let (plain, sql, expected) = (plain.clone(), Arc::clone(&sql), Arc::clone(&expected));
            async move {
                let answer = raw::answer(&plain, &sql).await?;
                anyhow::ensure!(answer == *expected, "`{sql}` says {answer:?}, not {expected:?}");
                Ok(())
            }
        });
        let measured = measured.await.with_context(|| format!("failed to scan with DataFusion ({})", scan.what))?;
        show(&format!("  the same, DataFusion {}", datafusion::DATAFUSION_VERSION), 1, &measured);
        Ok(measured)
    }

    /// Deletes rows of `0..rows` and flushes that, so that they are dead rows of files.
    async fn delete_some(&self, token: &str, rows: u64) -> anyhow::Result<()> {
        for first in (0..rows).step_by(DELETE_ROWS) {
            let sql = format!(
                "DELETE FROM bench.cold WHERE id >= {first} AND id < {} AND {DEAD_SQL}",
                first + DELETE_ROWS as u64
            );
            self.client.sql(token, &sql, &[]).await.context("failed to delete")?;
        }
        self.client.sql(token, "STORAGE FLUSH TABLE bench.cold", &[]).await.context("failed to flush")?;
        if let Some(folder) = self.folder("cold", "cold")? {
            let dead: u64 = raw::files(&folder)?.iter().map(|file| file.replaced.len()).sum();
            println!("  ({dead} rows of the files are dead now)");
        }
        Ok(())
    }
}
