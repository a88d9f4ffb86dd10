//! A PostgreSQL of our own to compare with: the installed one with its default settings, which sync every commit, in a
//! folder that goes with it.

use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tempfile::TempDir;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls, Statement};

use super::measure::{Bounds, Measured, repeat};
use super::rows::{insert_sql, mix, payload};

/// Installs what is measured here.
pub const INSTALL: &str = "sudo apt-get install -y --no-install-recommends postgresql-15";

/// Where Debian keeps the server programs, below it a folder for each version.
const INSTALLED: &str = "/usr/lib/postgresql";
const VERSION: &str = "15";
/// The superuser, trusted without a password: only this machine reaches it.
const OWNER: &str = "bench";
/// How long a start may take.
const START: Duration = Duration::from_secs(30);
/// As close to the tables of `bench.yaml` as it can be. Without a column for the user, which a user table of KalamDB has
/// by itself: the less there is to write, the better for PostgreSQL.
const TABLE: &str = "DROP TABLE IF EXISTS hot; CREATE TABLE hot (id BIGINT PRIMARY KEY, payload TEXT)";

/// A running PostgreSQL. Dropped: stopped, its folder removed.
pub struct Postgres {
    child: Child,
    programs: Programs,
    port: u16,
    version: String,
}

/// The programs of one installation and what they work on.
struct Programs {
    bin: PathBuf,
    folder: TempDir,
    /// User and group to run as, where we are root: PostgreSQL refuses to.
    account: Option<(u32, u32)>,
}

impl Postgres {
    /// Starts PostgreSQL in a new folder below `parent`; `None` if it is not installed.
    ///
    /// # Errors
    /// If it is installed and does not start.
    pub async fn start(parent: &Path) -> anyhow::Result<Option<Self>> {
        let bin = Path::new(INSTALLED).join(VERSION).join("bin");
        if !bin.join("initdb").is_file() {
            return Ok(None);
        }
        let programs = Programs::new(bin, parent)?;
        programs.init()?;
        // Free at this moment. Whoever takes it first makes the start fail with a message; nothing worse.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let log = std::fs::File::create(programs.folder.path().join("log"))?;
        let mut command = programs.command("postgres");
        command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-k", ""]).stdout(Stdio::null()).stderr(log);
        let child = command.spawn().context("failed to start PostgreSQL")?;
        let mut postgres = Self { child, programs, port, version: String::new() };
        postgres.version = postgres.await_ready().await?;
        Ok(Some(postgres))
    }

    /// What it says it is.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Repeats inserts of `rows_each` rows into an empty table; each client has its connection and its statement.
    ///
    /// # Errors
    /// If PostgreSQL refuses.
    pub async fn inserts(&self, bounds: Bounds, rows_each: u64) -> anyhow::Result<Measured> {
        self.connect().await?.batch_execute(TABLE).await?;
        let prepared = self.prepare(bounds.clients, &insert_sql("hot", rows_each)).await?;
        repeat(bounds, move |number, turn| {
            let prepared = Arc::clone(&prepared);
            async move {
                let (client, statement) = &prepared[number as usize];
                insert(client, statement, (u64::from(number) << 40) + turn * rows_each, rows_each).await
            }
        })
        .await
    }

    /// Reads rows of `0..rows` by key, in random order, and checks each.
    ///
    /// # Errors
    /// If PostgreSQL refuses, or answers wrongly.
    pub async fn point_reads(&self, bounds: Bounds, rows: u64) -> anyhow::Result<Measured> {
        const ROWS_EACH: u64 = 1_000;
        let client = self.connect().await?;
        client.batch_execute(TABLE).await?;
        let insertion = client.prepare(&insert_sql("hot", ROWS_EACH)).await?;
        for first in (0..rows.next_multiple_of(ROWS_EACH)).step_by(usize::try_from(ROWS_EACH)?) {
            insert(&client, &insertion, first, ROWS_EACH).await?;
        }
        client.batch_execute("VACUUM ANALYZE hot").await?;
        let prepared = self.prepare(bounds.clients, "SELECT payload FROM hot WHERE id = $1").await?;
        repeat(bounds, move |number, turn| {
            let prepared = Arc::clone(&prepared);
            async move {
                let (client, statement) = &prepared[number as usize];
                let id = mix((u64::from(number) << 40) + turn) % rows;
                let found: String = client.query_one(statement, &[&i64::try_from(id)?]).await?.try_get(0)?;
                anyhow::ensure!(found == payload(id), "the answer for id {id} is wrong: {found}");
                Ok(())
            }
        })
        .await
    }

    /// A connection for each of `clients`, with `sql` prepared on it.
    async fn prepare(&self, clients: u32, sql: &str) -> anyhow::Result<Arc<[(Client, Statement)]>> {
        let mut prepared = Vec::new();
        for _ in 0..clients {
            let client = self.connect().await?;
            let statement = client.prepare(sql).await?;
            prepared.push((client, statement));
        }
        Ok(prepared.into())
    }

    async fn connect(&self) -> Result<Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.port).user(OWNER).dbname("postgres");
        let (client, connection) = config.connect(NoTls).await?;
        // Ends with the client, which has then been told of any error.
        tokio::spawn(connection);
        Ok(client)
    }

    /// Waits until it answers, with its version.
    async fn await_ready(&mut self) -> anyhow::Result<String> {
        let started = Instant::now();
        loop {
            if let Ok(client) = self.connect().await {
                return Ok(client.query_one("SHOW server_version", &[]).await?.try_get(0)?);
            }
            let ended = self.child.try_wait()?;
            if ended.is_some() || started.elapsed() > START {
                let log = std::fs::read_to_string(self.programs.folder.path().join("log")).unwrap_or_default();
                anyhow::bail!("PostgreSQL did not start; its log is\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // By its own program, because its processes share memory that a killed one would leave behind.
        let stop = self.programs.command("pg_ctl").args(["stop", "-s", "-m", "immediate"]).status();
        if !stop.is_ok_and(|status| status.success()) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

impl Programs {
    fn new(bin: PathBuf, parent: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("kalamdb-bench-postgres-").tempdir_in(parent);
        let folder = folder.with_context(|| format!("failed to make a folder in `{}`", parent.display()))?;
        let is_root = folder.path().metadata()?.uid() == 0;
        let account = if is_root { Some(account().context("there is no account to run PostgreSQL as")?) } else { None };
        if let Some((user, group)) = account {
            chown(folder.path(), Some(user), Some(group))?;
        }
        Ok(Self { bin, folder, account })
    }

    /// Makes the data folder.
    fn init(&self) -> anyhow::Result<()> {
        let mut command = self.command("initdb");
        command.args(["--username", OWNER, "--auth", "trust", "--encoding", "UTF8", "--no-locale"]);
        let made = command.output().context("failed to run initdb")?;
        anyhow::ensure!(made.status.success(), "initdb failed: {}", String::from_utf8_lossy(&made.stderr).trim());
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.arg("-D").arg(self.folder.path().join("data")).current_dir(self.folder.path()).stdin(Stdio::null());
        if let Some((user, group)) = self.account {
            command.uid(user).gid(group);
        }
        command
    }
}

/// User and group ids of the first account without rights that there is.
fn account() -> Option<(u32, u32)> {
    let accounts = std::fs::read_to_string("/etc/passwd").ok()?;
    ["postgres", "nobody"].iter().find_map(|name| {
        let mut fields =
            accounts.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?.split(':').skip(1);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    })
}

async fn insert(client: &Client, statement: &Statement, first: u64, count: u64) -> anyhow::Result<()> {
    let ids = i64::try_from(first)?..i64::try_from(first + count)?;
    let rows: Vec<(i64, String)> = ids.zip((first..).map(payload)).collect();
    let params: Vec<&(dyn ToSql + Sync)> =
        rows.iter().flat_map(|(id, payload)| [id as &(dyn ToSql + Sync), payload]).collect();
    let written = client.execute(statement, &params).await?;
    anyhow::ensure!(written == count, "{count} rows sent, {written} written");
    Ok(())
}
