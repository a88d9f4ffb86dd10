//! Many users with a few buffered rows each: what they cost in memory, and how long a server that was killed with them
//! takes to be ready again.

use std::path::Path;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kalamdb_model::{Role, UserId};
use serde_json::Value;

use super::rows::{insert_sql, params};
use super::server::Server;
use super::sides::Sides;
use super::{CLIENTS, PATIENCE};
use crate::client::Client;
use crate::progress::Progress;

/// Rows of each user while memory is measured.
const ROWS_FEW: u64 = 3;
/// Rows of each user when the server is killed: a million of ten thousand users.
const ROWS: u64 = 100;

/// The users of one server.
struct Crowd {
    client: Client,
    tokens: Vec<String>,
}

/// Measures a server of its own, below `parent`, with `users` users.
///
/// # Errors
/// If the server refuses, does not come back, or has lost or doubled a row.
pub async fn measure(parent: &Path, users: u64, sides: &mut Sides) -> anyhow::Result<()> {
    let mut server = Server::start(parent).await?;
    let signer = server.signer()?;
    let token = |user| signer.token(&UserId::new(format!("crowd-{user}"))?, Role::User);
    let tokens = (0..users).map(token).collect::<anyhow::Result<_>>()?;
    let crowd = Crowd { client: Client::new(server.url(), PATIENCE)?, tokens };

    let memory = |server: &Server| server.resident_bytes().unwrap_or(0);
    let before = memory(&server);
    crowd.insert(0, ROWS_FEW).await?;
    let after = memory(&server);
    let what = format!("resident memory, {users} users with {ROWS_FEW} buffered rows each");
    println!("{what:<58} {:>10} MiB   ({} MiB before)", after >> 20, before >> 20);
    #[expect(clippy::cast_precision_loss, reason = "shown with few digits")]
    sides.add(format!("{what}, KiB a user"), after.saturating_sub(before) as f64 / 1_024.0 / users as f64, None, "");

    crowd.insert(ROWS_FEW, ROWS - ROWS_FEW).await?;
    let unflushed = users * ROWS;
    println!("{:<58} {:>10} MiB", format!("  with {unflushed} unflushed rows"), memory(&server) >> 20);
    let ready = server.crash().await.context("the server was killed and did not come back")?.as_secs_f64();
    let what = format!("ready after kill -9 with {unflushed} unflushed rows");
    println!("{what:<58} {ready:>10.2} s");
    sides.add(format!("{what}, s"), ready, None, "< 2 s");
    crowd.check(ROWS).await
}

impl Crowd {
    /// Writes rows `first..first + count` of every user.
    async fn insert(&self, first: u64, count: u64) -> anyhow::Result<()> {
        let sql = insert_sql("bench.hot", count);
        let progress = Progress::start("users written for", self.tokens.len() as u64);
        let inserted = stream::iter(&self.tokens).map(async |token| {
            self.client.sql(token, &sql, &params(first, count)).await?;
            progress.advance(1);
            anyhow::Ok(())
        });
        inserted
            .buffer_unordered(CLIENTS as usize)
            .try_collect::<()>()
            .await
            .context("failed to write for many users")?;
        progress.finish();
        Ok(())
    }

    /// Every user has `rows` rows.
    async fn check(&self, rows: u64) -> anyhow::Result<()> {
        let expected = vec![vec![Value::from(rows.to_string())]];
        let counted = stream::iter(&self.tokens).map(async |token| {
            let answer = self.client.sql(token, "SELECT count(*) FROM bench.hot", &[]).await?;
            anyhow::ensure!(answer.rows == expected, "a user with {rows} rows has {:?} after a restart", answer.rows);
            Ok(())
        });
        counted.buffer_unordered(CLIENTS as usize).try_collect::<()>().await
    }
}
