//! A query pod as a process of its own, driven over HTTP like any client would.

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// How long a pod may take to get ready or to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// What ends a process that aborts.
const SIGABRT: i32 = 6;
/// What tokens are signed with where the pods have no key of their own.
const SECRET: &str = "what the tokens of a test are signed with";

/// The manifests of most tests: a storage on the local file system, a namespace, and one table, `app.messages`.
pub const MANIFESTS: &str = "
apiVersion: kalamdb.org/v1alpha1
kind: Storage
metadata: {name: local}
spec:
  type: Filesystem
  filesystem: {path: ./files}
  userTablesTemplate: users/{userId}/{namespace}/{tableName}
  sharedTablesTemplate: shared/{namespace}/{tableName}
---
apiVersion: kalamdb.org/v1alpha1
kind: Namespace
metadata: {name: app}
spec: {defaultStorage: local}
---
apiVersion: kalamdb.org/v1alpha1
kind: UserTable
metadata: {name: app.messages}
spec:
  namespaceRef: app
  tableName: messages
  columns:
    - {name: id, type: BIGINT, primaryKey: true, default: SNOWFLAKE_ID()}
    - {name: body, type: TEXT, nullable: false}
  flushPolicy: {rows: 10000, interval: 1h}
";

/// A folder for one pod: its data, its manifests, its log. Outlives restarts of the pod.
pub struct Home {
    dir: tempfile::TempDir,
    binary: PathBuf,
    /// The command that serves, and where its catalog comes from.
    command: Vec<String>,
    /// Flags of `token` that say what signs.
    signed: Vec<String>,
    /// More flags of the command.
    pub flags: Vec<String>,
    /// More environment of the process.
    pub env: Vec<(String, String)>,
}

/// A running pod.
pub struct Pod {
    child: Child,
    binary: PathBuf,
    signed: Vec<String>,
    log: PathBuf,
    /// `http://127.0.0.1:port`.
    pub url: String,
    client: reqwest::Client,
    tokens: Mutex<HashMap<(String, String), String>>,
}

/// What a statement was answered with.
#[derive(Debug, Clone)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The envelope.
    pub body: Value,
    /// The envelope as it was sent: numbers as they were written, and the order of members.
    pub text: String,
}

impl Home {
    /// A folder with `manifests` as its one manifest file, for pods that run `binary`.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn new(binary: impl Into<PathBuf>, manifests: &str) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let folder = dir.path().join("manifests");
        std::fs::create_dir(&folder)?;
        let command = ["standalone".to_owned(), "--manifests".to_owned(), folder.display().to_string()];
        let signed = ["--data-dir".to_owned(), dir.path().join("data").display().to_string()];
        let home = Self::of(dir, binary.into(), command.into(), signed.into());
        home.write_manifest("all.yaml", manifests)?;
        Ok(home)
    }

    /// A folder for pods that run `binary` as in a cluster, with the catalog of the home store at `home_url`.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn in_cluster(binary: impl Into<PathBuf>, home_url: &str) -> anyhow::Result<Self> {
        let command = ["serve", "--home-url", home_url, "--jwt-secret", SECRET].map(str::to_owned);
        let signed = ["--jwt-secret", SECRET].map(str::to_owned);
        Ok(Self::of(tempfile::tempdir()?, binary.into(), command.into(), signed.into()))
    }

    fn of(dir: tempfile::TempDir, binary: PathBuf, command: Vec<String>, signed: Vec<String>) -> Self {
        Self { dir, binary, command, signed, flags: Vec::new(), env: Vec::new() }
    }

    /// Starts another binary from now on.
    pub fn set_binary(&mut self, binary: impl Into<PathBuf>) {
        self.binary = binary.into();
    }

    /// Adds or replaces a manifest file.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn write_manifest(&self, name: &str, text: &str) -> anyhow::Result<()> {
        Ok(std::fs::write(self.dir.path().join("manifests").join(name), text)?)
    }

    /// Removes a manifest file.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn remove_manifest(&self, name: &str) -> anyhow::Result<()> {
        Ok(std::fs::remove_file(self.dir.path().join("manifests").join(name))?)
    }

    /// The pod's data folder.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Everything the pods of this folder have logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Starts the process and does not wait for it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self) -> anyhow::Result<Child> {
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log"))?;
        let mut command = Command::new(&self.binary);
        command
            .args(&self.command)
            .args(["--listen", "127.0.0.1:0", "--data-dir"])
            .arg(self.data_dir())
            .args(&self.flags)
            .envs(self.env.iter().cloned())
            .env("POD_NAME", "kalamdb-0")
            .env("RUST_LOG", "info")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        command.spawn().with_context(|| format!("failed to start `{}`", self.binary.display()))
    }

    /// What pods are told that are to end at the crash point `point`.
    #[must_use]
    pub fn crash_at(point: &str) -> Vec<(String, String)> {
        vec![("KALAMDB_CRASH_AT".to_owned(), point.to_owned())]
    }

    /// Starts a pod that ends by itself at the crash point `point`, and waits until it has.
    ///
    /// # Errors
    /// With its log, if it does not, or otherwise.
    pub async fn crash(&mut self, point: &str) -> anyhow::Result<()> {
        let before = std::mem::replace(&mut self.env, Self::crash_at(point));
        let spawned = self.spawn();
        self.env = before;
        let mut child = spawned?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                bail!("the pod does not get to {point}:\n{}", self.log());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        ensure!(status.signal() == Some(SIGABRT), "{point}: the pod ended with {status}:\n{}", self.log());
        Ok(())
    }

    /// Starts a pod and waits until it is ready.
    ///
    /// # Errors
    /// With its log, if it does not get ready.
    pub async fn start(&self) -> anyhow::Result<Pod> {
        let mut pod = self.start_listening().await?;
        let deadline = Instant::now() + PATIENCE;
        while !pod.get("/readyz").await.is_ok_and(|(status, _)| status == 200) {
            if let Some(status) = pod.child.try_wait()? {
                bail!("the pod ended with {status}:\n{}", pod.log());
            }
            ensure!(Instant::now() < deadline, "the pod did not get ready:\n{}", pod.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(pod)
    }

    /// Starts a pod and waits until it listens; it may never be ready.
    ///
    /// # Errors
    /// With its log, if it does not listen.
    pub async fn start_listening(&self) -> anyhow::Result<Pod> {
        let before = self.log().len();
        let mut child = self.spawn()?;
        let deadline = Instant::now() + PATIENCE;
        let client = reqwest::Client::builder().timeout(PATIENCE).build()?;
        loop {
            if let Some(status) = child.try_wait()? {
                bail!("the pod ended with {status}:\n{}", self.log());
            }
            let log = self.log();
            let address =
                log[before..].lines().find_map(|line| line.split_once("address=")).map(|(_, address)| address.trim());
            if let Some(address) = address {
                let (binary, signed) = (self.binary.clone(), self.signed.clone());
                let (url, log) = (format!("http://{address}"), self.dir.path().join("log"));
                return Ok(Pod { child, binary, signed, log, url, client, tokens: Mutex::default() });
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                bail!("the pod does not listen:\n{log}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Pod {
    /// A token for `user`.
    ///
    /// # Errors
    /// If the `token` command fails.
    pub fn token(&self, user: &str, role: &str) -> anyhow::Result<String> {
        let key = (user.to_owned(), role.to_owned());
        if let Some(token) = self.tokens.lock().expect("no panic while locked").get(&key) {
            return Ok(token.clone());
        }
        let output =
            Command::new(&self.binary).args(["token", "--role", role, "--user", user]).args(&self.signed).output()?;
        ensure!(output.status.success(), "no token for `{user}`: {}", String::from_utf8_lossy(&output.stderr));
        let token = String::from_utf8(output.stdout)?.trim().to_owned();
        self.tokens.lock().expect("no panic while locked").insert(key, token.clone());
        Ok(token)
    }

    /// Runs a statement as `user`.
    ///
    /// # Errors
    /// If there is no answer; an answer that is an error is an [`Answer`].
    pub async fn sql(&self, user: &str, sql: &str, params: Value) -> anyhow::Result<Answer> {
        self.sql_as(user, "user", sql, params).await
    }

    /// Runs a statement as `user` with `role`.
    ///
    /// # Errors
    /// As [`Pod::sql`].
    pub async fn sql_as(&self, user: &str, role: &str, sql: &str, params: Value) -> anyhow::Result<Answer> {
        let body = json!({"sql": sql, "params": params});
        let authorization = format!("Bearer {}", self.token(user, role)?);
        self.send(Some(&authorization), body.to_string()).await
    }

    /// Posts `body` as it is, with `authorization` as the header of that name.
    ///
    /// # Errors
    /// If there is no answer, or one that is not JSON.
    pub async fn send(&self, authorization: Option<&str>, body: impl Into<reqwest::Body>) -> anyhow::Result<Answer> {
        let mut request = self.client.post(format!("{}/v1/api/sql", self.url)).body(body);
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        let response = request.send().await?;
        let status = response.status().as_u16();
        let text = response.text().await?;
        let body = serde_json::from_str(&text).with_context(|| format!("no JSON, with status {status}: {text}"))?;
        Ok(Answer { status, body, text })
    }

    /// Begins a request as `user` on a connection of its own and waits until the server asks for its body, of `bytes`
    /// bytes. Sending that and reading the answer is left to the caller.
    ///
    /// # Errors
    /// If there is no connection, or the server does not want the body.
    pub async fn begin(&self, user: &str, bytes: usize) -> anyhow::Result<TcpStream> {
        const GO_ON: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
        let address = self.url.strip_prefix("http://").context("an HTTP address")?;
        let token = self.token(user, "user")?;
        let mut connection = TcpStream::connect(address).await?;
        let head = format!(
            "POST /v1/api/sql HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {token}\r\nconnection: close\r\n\
             content-length: {bytes}\r\nexpect: 100-continue\r\n\r\n"
        );
        connection.write_all(head.as_bytes()).await?;
        let mut said = [0; GO_ON.len()];
        connection.read_exact(&mut said).await?;
        ensure!(said == GO_ON, "the server said {}…", String::from_utf8_lossy(&said));
        Ok(connection)
    }

    /// Sends a statement as `user` on a connection of its own, and leaves it to the caller to read the answer.
    ///
    /// # Errors
    /// As [`Pod::begin`].
    pub async fn send_unread(&self, user: &str, sql: &str) -> anyhow::Result<TcpStream> {
        let body = json!({"sql": sql}).to_string();
        let mut connection = self.begin(user, body.len()).await?;
        connection.write_all(body.as_bytes()).await?;
        Ok(connection)
    }

    /// Runs a statement as `user` and returns its rows.
    ///
    /// # Errors
    /// With the answer, if it is an error.
    pub async fn rows(&self, user: &str, sql: &str) -> anyhow::Result<Vec<Value>> {
        self.sql(user, sql, json!([])).await?.rows()
    }

    /// Runs a statement as `user` that must succeed; returns `row_count`.
    ///
    /// # Errors
    /// With the answer, if it is an error.
    pub async fn run(&self, user: &str, sql: &str, params: Value) -> anyhow::Result<u64> {
        let answer = self.sql(user, sql, params).await?;
        ensure!(answer.status == 200, "{sql}: {}", answer.body);
        answer.body["results"][0]["row_count"].as_u64().context("no row_count")
    }

    /// GETs a path.
    ///
    /// # Errors
    /// If there is no answer.
    pub async fn get(&self, path: &str) -> anyhow::Result<(u16, String)> {
        let response = self.client.get(format!("{}{path}", self.url)).send().await?;
        Ok((response.status().as_u16(), response.text().await?))
    }

    /// Ends the process as `kill -9` does.
    ///
    /// # Errors
    /// If it was gone already.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        let status = self.child.wait()?;
        ensure!(status.signal() == Some(9), "it had ended before: {status}");
        Ok(())
    }

    /// Asks the process to stop with SIGTERM and waits.
    ///
    /// # Errors
    /// If it does not end in time.
    pub async fn stop(&mut self) -> anyhow::Result<ExitStatus> {
        let pid = self.child.id().to_string();
        ensure!(Command::new("kill").args(["-TERM", &pid]).status()?.success(), "kill failed");
        self.wait().await
    }

    /// Waits until the process has ended by itself.
    ///
    /// # Errors
    /// If it does not in time.
    pub async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "the pod does not end:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Answer {
    /// `error.code`, or the empty string.
    #[must_use]
    pub fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }

    /// `error.message`, or the empty string.
    #[must_use]
    pub fn message(&self) -> &str {
        self.body["error"]["message"].as_str().unwrap_or_default()
    }

    /// `results` as they were sent: all but the time that the statement took.
    #[must_use]
    pub fn results(&self) -> &str {
        let end = self.text.rfind("],\"took\":").unwrap_or(self.text.len());
        let start = self.text.find("\"results\":").unwrap_or(0);
        &self.text[start..end]
    }

    /// The rows.
    ///
    /// # Errors
    /// With the whole answer, if it is an error.
    pub fn rows(&self) -> anyhow::Result<Vec<Value>> {
        ensure!(self.status == 200, "{}: {}", self.status, self.body);
        Ok(self.body["results"][0]["rows"].as_array().context("no rows")?.clone())
    }
}

/// Waits until `check` returns true.
///
/// # Errors
/// If it does not within a minute.
pub async fn eventually<F: AsyncFnMut() -> anyhow::Result<bool>>(what: &str, mut check: F) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !check().await? {
        ensure!(Instant::now() < deadline, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    Ok(())
}

/// All files below `folder`, as paths relative to it, sorted.
///
/// # Errors
/// If the disk fails.
pub fn files_below(folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        let entries = match std::fs::read_dir(&next) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path.strip_prefix(folder)?.to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// All Parquet files below `folder`, as [`files_below`].
///
/// # Errors
/// If the disk fails.
pub fn data_files_below(folder: &Path) -> anyhow::Result<Vec<String>> {
    Ok(files_below(folder)?.into_iter().filter(|file| file.ends_with(".parquet")).collect())
}

/// The binary of that name beside the test that is running, where `cargo build --workspace --bins` put it.
///
/// # Errors
/// If it was not built.
pub fn binary(name: &str) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    let folder = test.parent().and_then(Path::parent).context("a test lies in target/PROFILE/deps")?;
    let path = folder.join(name);
    ensure!(path.is_file(), "`{}` is missing; run `cargo build --workspace --bins` first", path.display());
    Ok(path)
}
