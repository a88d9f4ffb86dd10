//! `bench`: figures of one server, each with what it was measured on. Bounded in time; slow is a figure, wrong is an error.

mod machine;
mod measure;
mod rows;
mod server;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kalamdb_model::{Role, UserId};
use serde_json::Value;

use crate::client::Client;
use crate::progress::Progress;
use crate::token::{SecretArgs, Signer};
use measure::{Bounds, Measured, repeat};
use rows::{insert_sql, mix, params, payload};
use server::Server;

/// Clients of the write measurements.
const CLIENTS: u32 = 64;
/// Statements at once while the cold rows are loaded.
const LOADERS: usize = 4;
/// Rows in the buffer for the hot point reads.
const HOT_ROWS: u64 = 10_000;
/// Rows of each timed flush, and how many there are.
const FLUSH_ROWS: u64 = 100_000;
const FLUSHES: u64 = 3;
/// Most counts over the cold rows.
const COUNTS: u64 = 50;
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
}

/// One run against one server.
struct Bench {
    client: Arc<Client>,
    signer: Signer,
    seconds: Duration,
    /// Users and keys of this run, so that runs against one server do not meet.
    run: u64,
}

/// Runs all measurements and prints them.
///
/// # Errors
/// If the server refuses, does not answer or answers wrongly; never because it is slow.
pub async fn run(args: &Args) -> anyhow::Result<()> {
    let own = if args.url.is_some() { None } else { Some(Server::start(&args.dir).await?) };
    let url = args.url.as_deref().or(own.as_ref().map(Server::url)).unwrap_or_default();
    let signer = own.as_ref().map_or_else(|| args.secret.signer(), Server::signer)?;
    let run = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
    let client = Arc::new(Client::new(url, PATIENCE)?);
    let bench = Bench { client, signer, seconds: Duration::from_secs(args.seconds), run };
    bench.check_tables().await?;

    machine::print();
    if own.is_some() {
        println!(
            "disk:    {:.3} ms for 4 KiB with fdatasync in {}",
            machine::sync_millis(&args.dir)?,
            args.dir.display()
        );
    }
    println!("\n{:<58} {:>14} {:>9} {:>9} {:>9}", "", "per second", "p50 ms", "p99 ms", "n");
    Box::pin(bench.writes()).await?;
    Box::pin(bench.hot_reads()).await?;
    Box::pin(bench.flushes()).await?;
    let memory = |when: &str| {
        if let Some(bytes) = own.as_ref().and_then(Server::resident_bytes) {
            println!("{:<58} {:>10} MiB", format!("resident memory of the server {when}"), bytes >> 20);
        }
    };
    memory("before the cold rows");
    let loaded = Box::pin(bench.load_cold(args)).await?;
    memory("after their load");
    Box::pin(bench.cold_reads(loaded)).await?;
    memory("at the end");
    println!("{:<58} {:>14}", "requests sent again because the server was busy", bench.client.repeated());
    Ok(())
}

fn once(what: &str, rows: u64, elapsed: Duration) {
    #[expect(clippy::cast_precision_loss, reason = "shown without digits")]
    let per_second = rows as f64 / elapsed.as_secs_f64().max(f64::EPSILON);
    println!("{what:<58} {per_second:>14.0} {:>9} {:>9} {rows:>9}", "", "");
}

impl Bench {
    /// Prints what `measuring` measured, and whether the server was too busy for some of it: a request that is sent again
    /// waits for a second or more, which is no figure of the server's.
    async fn row(
        &self,
        what: &str,
        rows_each: u64,
        measuring: impl Future<Output = anyhow::Result<Measured>>,
    ) -> anyhow::Result<()> {
        let before = self.client.repeated();
        let measured = measuring.await?;
        let factor = f64::from(u32::try_from(rows_each).unwrap_or(u32::MAX));
        println!(
            "{what:<58} {:>14.0} {:>9.2} {:>9.2} {:>9}",
            measured.per_second() * factor,
            measured.millis_at(0.5),
            measured.millis_at(0.99),
            measured.operations()
        );
        let again = self.client.repeated() - before;
        if again > 0 {
            println!("  (with waits: {again} requests were sent again because the server was busy)");
        }
        Ok(())
    }

    fn token(&self, name: &str) -> anyhow::Result<Arc<str>> {
        let user = UserId::new(format!("bench-{}-{name}", self.run))?;
        Ok(self.signer.token(&user, Role::User)?.into())
    }

    fn tokens(&self, name: &str) -> anyhow::Result<Arc<[Arc<str>]>> {
        (0..CLIENTS).map(|client| self.token(&format!("{name}-{client}"))).collect()
    }

    async fn check_tables(&self) -> anyhow::Result<()> {
        let token = self.token("check")?;
        for table in ["bench.hot", "bench.cold"] {
            let answer = self.client.sql(&token, &format!("SELECT count(*) FROM {table}"), &[]).await;
            answer.with_context(|| format!("cannot read `{table}`; apply bench/manifests/bench.yaml to the server"))?;
        }
        Ok(())
    }

    /// Repeats inserts of `rows_each` rows at 64 clients; client `n` writes as user `n % users`.
    async fn inserts(&self, name: &str, users: usize, rows_each: u64, own_keys: bool) -> anyhow::Result<Measured> {
        let (client, tokens) = (Arc::clone(&self.client), self.tokens(name)?);
        let sql: Arc<str> = if own_keys {
            insert_sql("bench.hot", rows_each).into()
        } else {
            "INSERT INTO bench.hot (payload) VALUES ($1)".into()
        };
        let bounds = Bounds { clients: CLIENTS, duration: self.seconds, operations_max: 10_000_000 };
        repeat(bounds, move |number, turn| {
            let (client, sql) = (Arc::clone(&client), Arc::clone(&sql));
            let token = Arc::clone(&tokens[number as usize % users]);
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

    async fn writes(&self) -> anyhow::Result<()> {
        let all = CLIENTS as usize;
        self.row("durable INSERT of 1 row, 64 clients, 64 users", 1, self.inserts("many", all, 1, true)).await?;
        self.row("  the same, keys generated", 1, self.inserts("generated", all, 1, false)).await?;
        self.row("durable INSERT of 1 row, 64 clients, one user", 1, self.inserts("one", 1, 1, true)).await?;
        self.row("  the same, keys generated", 1, self.inserts("one-generated", 1, 1, false)).await?;
        self.row("rows by INSERT of 100 rows, 64 clients, 64 users", 100, self.inserts("hundred", all, 100, true)).await
    }

    async fn hot_reads(&self) -> anyhow::Result<()> {
        let token = self.token("hot")?;
        self.insert_range(&token, "bench.hot", 0, HOT_ROWS).await?;
        let reads = |clients| self.point_reads(&token, "bench.hot", HOT_ROWS, clients);
        self.row("point SELECT of a hot row, 1 client", 1, reads(1)).await?;
        self.row("point SELECT of a hot row, 64 clients", 1, reads(CLIENTS)).await
    }

    /// Reads rows of `0..rows` by key, in random order, and checks each.
    async fn point_reads(&self, token: &Arc<str>, table: &str, rows: u64, clients: u32) -> anyhow::Result<Measured> {
        let (client, token) = (Arc::clone(&self.client), Arc::clone(token));
        let sql: Arc<str> = format!("SELECT payload FROM {table} WHERE id = $1").into();
        let bounds = Bounds { clients, duration: self.seconds, operations_max: 10_000_000 };
        repeat(bounds, move |number, turn| {
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

    /// Times `STORAGE FLUSH` of one user's rows, a few times.
    async fn flushes(&self) -> anyhow::Result<()> {
        let mut elapsed = Duration::ZERO;
        for turn in 0..FLUSHES {
            let token = self.token(&format!("flush-{turn}"))?;
            self.insert_range(&token, "bench.hot", 0, FLUSH_ROWS).await?;
            let started = Instant::now();
            let answer =
                self.client.sql(&token, "STORAGE FLUSH TABLE bench.hot", &[]).await.context("failed to flush")?;
            elapsed += started.elapsed();
            anyhow::ensure!(answer.row_count == FLUSH_ROWS, "{FLUSH_ROWS} rows to flush, {} flushed", answer.row_count);
        }
        once(&format!("flushed rows, {FLUSHES} x {FLUSH_ROWS} rows of one user"), FLUSHES * FLUSH_ROWS, elapsed);
        Ok(())
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
        self.client.sql(&token, "STORAGE FLUSH TABLE bench.cold", &[]).await.context("failed to flush")?;
        Ok(loaded)
    }

    async fn cold_reads(&self, rows: u64) -> anyhow::Result<()> {
        let token = self.token("cold")?;
        let count = self.counts(&token, "SELECT count(*) FROM bench.cold", rows);
        self.row(&format!("count(*) over {rows} cold rows, 1 client"), 1, count).await?;
        let sql = "SELECT count(*) FROM bench.cold WHERE payload LIKE '%-%'";
        self.row("  the same, reading every payload", 1, self.counts(&token, sql, rows)).await?;
        let reads = |clients| self.point_reads(&token, "bench.cold", rows, clients);
        self.row("point SELECT of a cold row, 1 client", 1, reads(1)).await?;
        self.row("point SELECT of a cold row, 8 clients", 1, reads(8)).await
    }

    async fn counts(&self, token: &Arc<str>, sql: &'static str, rows: u64) -> anyhow::Result<Measured> {
        let (client, token) = (Arc::clone(&self.client), Arc::clone(token));
        let bounds = Bounds { clients: 1, duration: self.seconds, operations_max: COUNTS };
        repeat(bounds, move |_, _| {
            let (client, token) = (Arc::clone(&client), Arc::clone(&token));
            async move {
                let answer = client.sql(&token, sql, &[]).await?;
                let right = answer.rows == [[Value::from(rows.to_string())]];
                anyhow::ensure!(right, "there are {rows} rows, and `{sql}` says {:?}", answer.rows);
                Ok(())
            }
        })
        .await
        .context("failed to count")
    }
}
