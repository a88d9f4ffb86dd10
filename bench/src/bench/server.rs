//! A standalone server of our own, in a folder that goes with it.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tempfile::TempDir;

use crate::client::Client;
use crate::token::Signer;

/// How long a start may take.
const START: Duration = Duration::from_secs(30);
/// How often a starting server is asked whether it is ready; how long a start took is known to this.
const POLL: Duration = Duration::from_millis(5);

/// A running server. Dropped: killed, its folder removed.
pub struct Server {
    child: Child,
    folder: TempDir,
    listen: SocketAddr,
    url: String,
}

impl Server {
    /// Starts the server binary beside this one, in a new folder below `parent`, with the benchmark's tables.
    ///
    /// # Errors
    /// If there is no binary, or it does not become ready; with the end of its log.
    pub async fn start(parent: &Path) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("kalamdb-bench-").tempdir_in(parent);
        let folder = folder.with_context(|| format!("failed to make a folder in `{}`", parent.display()))?;
        let manifests = folder.path().join("manifests");
        std::fs::create_dir(&manifests)?;
        std::fs::write(manifests.join("bench.yaml"), include_str!("../../manifests/bench.yaml"))?;
        std::fs::write(manifests.join("storage.yaml"), include_str!("../../manifests/storage.yaml"))?;
        // Free at this moment. Whoever takes it first makes the start fail with a message; nothing worse.
        let listen = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let child = spawn(folder.path(), listen)?;
        let mut server = Self { child, folder, listen, url: format!("http://{listen}") };
        server.await_ready().await?;
        Ok(server)
    }

    /// Its address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Signs for it.
    ///
    /// # Errors
    /// If its key cannot be read.
    pub fn signer(&self) -> anyhow::Result<Signer> {
        Signer::of_data_dir(&self.folder.path().join("data"))
    }

    /// The root of its one storage.
    pub fn files(&self) -> PathBuf {
        self.folder.path().join("data/files")
    }

    /// Kills it, as `kill -9` does, and starts it again on what it left. Returns how long that took until it was ready.
    ///
    /// # Errors
    /// If it does not become ready again; with the end of its log.
    pub async fn crash(&mut self) -> anyhow::Result<Duration> {
        self.child.kill()?;
        self.child.wait()?;
        let started = Instant::now();
        self.child = spawn(self.folder.path(), self.listen)?;
        self.await_ready().await?;
        Ok(started.elapsed())
    }

    /// Its memory in RAM, bytes; `None` where there is no `/proc`.
    pub fn resident_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1_024)
    }

    async fn await_ready(&mut self) -> anyhow::Result<()> {
        let client = Client::new(&self.url, Duration::ZERO)?;
        let started = Instant::now();
        while !client.is_ready().await {
            let ended = self.child.try_wait()?;
            if ended.is_some() || started.elapsed() > START {
                let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(10).collect();
                let tail: Vec<&str> = tail.into_iter().rev().collect();
                anyhow::bail!("the server did not become ready; its log ends with\n{}", tail.join("\n"));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Whatever it still has to do, its folder goes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the server binary beside this one on the data and the manifests in `folder`.
fn spawn(folder: &Path, listen: SocketAddr) -> anyhow::Result<Child> {
    let binary = binary()?;
    let log = std::fs::File::options().create(true).append(true).open(folder.join("log"))?;
    let mut command = Command::new(&binary);
    command
        .arg("standalone")
        .arg("--data-dir")
        .arg(folder.join("data"))
        .arg("--manifests")
        .arg(folder.join("manifests"));
    command.arg("--listen").arg(listen.to_string()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().with_context(|| format!("failed to start `{}`", binary.display()))
}

fn binary() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("failed to find this program's own file")?;
    let binary = own.with_file_name("kalamdb-query-pod");
    anyhow::ensure!(
        binary.is_file(),
        "there is no server at `{}`; build it with `cargo build --workspace --bins`, or name a running one with --url",
        binary.display()
    );
    Ok(binary)
}
